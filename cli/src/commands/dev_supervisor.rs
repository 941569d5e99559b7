//! VMs private to this command: each in a process of its own, under a supervisor in a directory
//! that no other command uses. They end with the command.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clade_api::{
    BootRequest, CheckpointInfo, CheckpointRequest, Client, ForkAnswer, ForkRequest, MAX_MEMORY, ResetAnswer,
    StopRequest, VmInfo, VmLimits, VmStats,
};
use clade_api::{Labels, console_path, ended_vms, runtime_dir, socket_path};
use clade_harness::{GuestWords, Machine, WordsError, bytes_of};
use clade_host_io::sched::serve_requests;
use clade_supervisor::{CgroupPlace, Supervisor, SupervisorOptions, vms_in};
use clade_vmm::kvm::Host;
use clade_vmm::vm::{StopReason, VmConfig};
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tokio::runtime::{Handle, Runtime};

use crate::commands::Failure;
use crate::commands::lifecycle::for_each;
use crate::commands::remote::failure;
use crate::commands::session::AHEAD_MIB;
use crate::commands::shutdown::exit_on_signal;
use crate::commands::worker::{ANNOUNCING, MEASURE};

/// The session of all VMs, which end with this process.
const SESSION: &str = "private";
/// Interval of the polls of a process without output.
const POLL_INTERVAL: Duration = Duration::from_micros(100);
/// Words of a request for memory.
const CHUNK_WORDS: usize = 128 << 10;

/// Most workers prepared.
const POOL: usize = 16;

fn dev_options() -> SupervisorOptions {
    let (pool, ahead_mib, cgroup) = (POOL, AHEAD_MIB, CgroupPlace::Off);
    SupervisorOptions { pool, ahead_mib, cgroup, until_idle: true, ..SupervisorOptions::default() }
}

/// The VMs of this command.
#[derive(Debug)]
pub struct DevSupervisor {
    client: Client,
    supervisor: Supervisor,
    /// Dropped before the directory.
    runtime: Runtime,
    _dir: TempDir,
}

impl DevSupervisor {
    /// Starts a supervisor for `command`.
    pub fn begin(command: &str) -> Result<Self, Failure> {
        Self::begin_with(command, &dev_options())
    }

    /// The same, and the vCPUs of the bare guest's children stop what their parent does. The first announces
    /// itself before the fork is answered.
    pub(super) fn begin_announcing(command: &str) -> Result<Self, Failure> {
        Self::begin_with(command, &SupervisorOptions { worker_env: vec![(MEASURE, ANNOUNCING)], ..dev_options() })
    }

    fn begin_with(command: &str, options: &SupervisorOptions) -> Result<Self, Failure> {
        // A missing requirement is reported better here than by another process.
        Host::open().map_err(Failure::input)?;
        let above = Some(runtime_dir()).filter(|dir| dir.is_dir()).unwrap_or_else(std::env::temp_dir);
        let dir = tempfile::Builder::new().prefix(&format!("clade-{command}-")).tempdir_in(above);
        let dir = dir.map_err(Failure::input)?;
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).on_thread_start(serve_requests).enable_all();
        let runtime = builder.build().map_err(Failure::run)?;
        let path = dir.path().to_owned();
        // The VMs end with this process.
        let clean_up = move || drop(fs::remove_dir_all(path));
        exit_on_signal(runtime.handle(), clean_up).map_err(Failure::run)?;
        let supervisor = Supervisor::start(dir.path(), options, runtime.handle()).map_err(Failure::run)?;
        Ok(Self { client: Client::new(dir.path()), supervisor, runtime, _dir: dir })
    }

    /// Sends a request to the supervisor.
    fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, Failure> {
        self.runtime.block_on(self.client.supervisor(method, path, body)).map_err(failure)
    }

    fn vm(&self, name: String) -> RemoteVm {
        RemoteVm { name, client: self.client.clone(), runtime: self.runtime.handle().clone() }
    }

    /// Boots a VM. `kernel` is a file, or the name of one of the program's guests.
    pub fn boot(&self, name: &str, config: &VmConfig, source: KernelSource<'_>) -> Result<RemoteVm, Failure> {
        let request = BootRequest {
            name: name.to_owned(),
            config: config.clone(),
            kernel: source.kernel.into(),
            initrd: source.initrd.map(Into::into),
            cmdline: source.cmdline.to_owned(),
            labels: Labels::default(),
            paused: false,
            reports_ready: false,
            session: Some(SESSION.to_owned()),
            limits: VmLimits::default(),
            secrets: Vec::new(),
        };
        let info: VmInfo = self.ask(Method::POST, "/v1/vms", Some(&request))?;
        Ok(self.vm(info.name))
    }

    /// Forks `of`, as `vms/NAME` or `checkpoints/NAME`, into paused children.
    pub fn fork(&self, of: &str, name: &str, count: usize) -> Result<(Vec<RemoteVm>, ForkAnswer), Failure> {
        self.fork_into(of, name, count, true)
    }

    fn fork_into(
        &self,
        of: &str,
        name: &str,
        count: usize,
        paused: bool,
    ) -> Result<(Vec<RemoteVm>, ForkAnswer), Failure> {
        let request = ForkRequest { count, name: Some(name.to_owned()), paused, ..ForkRequest::default() };
        let answer: ForkAnswer = self.ask(Method::POST, &format!("/v1/{of}/fork"), Some(&request))?;
        Ok((answer.children.iter().map(|name| self.vm(name.clone())).collect(), answer))
    }

    /// Forks `of` into one paused child.
    pub fn fork_one(&self, of: &str, name: &str) -> Result<(RemoteVm, ForkAnswer), Failure> {
        self.fork_one_into(of, name, true)
    }

    /// Forks `of` into one child that runs.
    pub(super) fn fork_one_running(&self, of: &str, name: &str) -> Result<(RemoteVm, ForkAnswer), Failure> {
        self.fork_one_into(of, name, false)
    }

    fn fork_one_into(&self, of: &str, name: &str, paused: bool) -> Result<(RemoteVm, ForkAnswer), Failure> {
        let (children, answer) = self.fork_into(of, name, 1, paused)?;
        let none = || Failure::Run(anyhow::anyhow!("a fork of {of} has no child"));
        Ok((children.into_iter().next().ok_or_else(none)?, answer))
    }

    /// Holds a VM's state at this instant.
    pub fn checkpoint(&self, vm: &str, name: &str) -> Result<CheckpointInfo, Failure> {
        let request = CheckpointRequest { name: Some(name.to_owned()), ..CheckpointRequest::default() };
        self.ask(Method::POST, &format!("/v1/vms/{vm}/checkpoint"), Some(&request))
    }

    /// Removes a checkpoint.
    pub fn remove(&self, checkpoint: &str) -> Result<(), Failure> {
        let removed: CheckpointInfo =
            self.ask(Method::DELETE, &format!("/v1/checkpoints/{checkpoint}"), None::<&()>)?;
        drop(removed);
        Ok(())
    }

    /// Stops all remaining VMs.
    fn stop_all(&self) {
        let names: Vec<String> = vms_in(self.client.dir()).unwrap_or_default().into_iter().collect();
        let stop = |name: String| {
            let client = self.client.clone();
            async move { clade_supervisor::stop(&client, &name, StopRequest::default()).await }
        };
        // A VM that does not end is ended with this process.
        drop(self.runtime.block_on(for_each(&names, stop)));
    }
}

impl Drop for DevSupervisor {
    fn drop(&mut self) {
        self.stop_all();
        self.supervisor.close();
    }
}

/// The kernel of a VM.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource<'a> {
    pub kernel: &'a std::path::Path,
    pub initrd: Option<&'a std::path::Path>,
    pub cmdline: &'a str,
}

/// A VM in a process of its own.
#[derive(Clone, Debug)]
pub struct RemoteVm {
    name: String,
    client: Client,
    runtime: Handle,
}

impl RemoteVm {
    /// Sends a request to its process.
    fn ask<T: DeserializeOwned>(&self, method: Method, action: &str) -> Result<T, Failure> {
        self.runtime.block_on(self.client.request(method, &self.name, action, None::<&()>)).map_err(failure)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn info(&self) -> Result<VmInfo, Failure> {
        self.ask(Method::GET, "")
    }

    pub fn pause(&self) -> Result<(), Failure> {
        self.ask::<VmInfo>(Method::POST, "/pause").map(drop)
    }

    pub fn resume(&self) -> Result<(), Failure> {
        self.ask::<VmInfo>(Method::POST, "/resume").map(drop)
    }

    /// Resets it to the instant of its fork.
    pub fn reset(&self) -> Result<ResetAnswer, Failure> {
        self.ask(Method::POST, "/reset")
    }

    pub fn stats(&self) -> Result<VmStats, Failure> {
        self.ask(Method::GET, "/stats")
    }

    /// Ends the VM. Its name is then free.
    pub fn stop(&self) -> Result<(), Failure> {
        self.runtime
            .block_on(clade_supervisor::stop(&self.client, &self.name, StopRequest::default()))
            .map(drop)
            .map_err(failure)
    }

    /// Connects to its console, which first sends its last output.
    pub(crate) fn console(&self) -> Result<RemoteConsole, Failure> {
        let stream = UnixStream::connect(console_path(self.client.dir(), &self.name)).map_err(Failure::run)?;
        Ok(RemoteConsole { vm: self.clone(), stream, seen: Vec::new() })
    }
}

impl GuestWords for RemoteVm {
    // Whole words are read and written atomically.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError> {
        for (at, part) in (address..).step_by(MAX_MEMORY).zip(bytes.chunks_mut(MAX_MEMORY)) {
            self.runtime.block_on(self.client.read_memory(&self.name, at, part))?;
        }
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError> {
        for (at, part) in (address..).step_by(MAX_MEMORY).zip(bytes.chunks(MAX_MEMORY)) {
            let part = Bytes::copy_from_slice(part);
            self.runtime.block_on(self.client.write_memory(&self.name, at, part))?;
        }
        Ok(())
    }

    fn store_and_ring(&self, address: u64, words: &[u64], vcpu: u64) -> Result<(), WordsError> {
        let bytes = bytes_of(words).into();
        self.runtime.block_on(self.client.write_memory_and_ring(&self.name, address, bytes, vcpu))?;
        Ok(())
    }

    fn chunk(&self) -> usize {
        CHUNK_WORDS
    }
}

impl Machine for RemoteVm {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn stopped(&self) -> Option<StopReason> {
        // Its socket exists as long as its process uses it.
        if socket_path(self.client.dir(), &self.name).exists() {
            return None;
        }
        let ended = ended_vms(self.client.dir()).unwrap_or_default();
        let record = ended.into_iter().find(|ended| ended.name == self.name);
        Some(record.map_or(StopReason::Requested, |record| record.stopped))
    }

    fn await_report(&self, limit: Duration) {
        std::thread::sleep(limit.min(POLL_INTERVAL));
    }
}

/// The console of a VM in a process of its own.
pub(crate) struct RemoteConsole {
    vm: RemoteVm,
    stream: UnixStream,
    seen: Vec<u8>,
}

impl RemoteConsole {
    pub(crate) fn type_in(&mut self, text: &str) -> Result<(), Failure> {
        self.stream.write_all(text.as_bytes()).map_err(Failure::run)
    }

    /// Waits until the VM's output has `text`. Returns all of its output.
    pub(crate) fn wait_for(&mut self, text: &str, patience: Duration) -> Result<String, Failure> {
        let deadline = Instant::now() + patience;
        let mut bytes = [0; 4096];
        loop {
            let seen = String::from_utf8_lossy(&self.seen);
            if seen.contains(text) {
                return Ok(seen.into_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let got = if left.is_zero() {
                Ok(0)
            } else {
                self.stream.set_read_timeout(Some(left)).map_err(Failure::run)?;
                self.stream.read(&mut bytes)
            };
            match got {
                Ok(got @ 1..) => self.seen.extend_from_slice(&bytes[..got]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    let tail: Vec<&str> = seen.lines().rev().take(5).collect();
                    let stopped = self.vm.stopped().map(|reason| format!(" ({reason})")).unwrap_or_default();
                    return Err(Failure::Run(anyhow::anyhow!(
                        "{} did not print {text:?}{stopped}; its last lines: {}",
                        self.vm.name,
                        tail.join(" | ")
                    )));
                }
            }
        }
    }
}
