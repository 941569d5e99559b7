//! A supervisor for a bench, started as by a user, and requests to it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clade_api::{
    BootRequest, CheckpointInfo, CheckpointRequest, Client, ClientError, Labels, PrepareRequest, Prepared, StopRequest,
    SupervisorInfo, VmInfo, VmLimits, supervisor_path,
};
use clade_harness::Sample;
use clade_vmm::vm::VmConfig;
use hyper::Method;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use clade::{BARE, Failure, exit_on_signal, for_each};

/// Time limit of the supervisor's start, and of a bench's waits for it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(20);

/// Checks of the available memory, the time from one to the next, and a difference that is none.
const SETTLE_CHECKS: u32 = 40;
const SETTLE_INTERVAL: Duration = Duration::from_millis(50);
const SETTLED_KIB: u64 = 512;

/// The session of the VMs.
const SESSION: &str = "bench";

/// A supervisor in a directory of its own. A drop ends it and its VMs.
pub(super) struct BenchSupervisor {
    /// Of the calling thread, as a client of one request is: with a thread of its own, each request would be handed to it
    /// and back.
    pub(super) runtime: Runtime,
    /// Ends everything on a signal.
    _signals: Runtime,
    pub(super) client: Client,
    process: Child,
    dir: tempfile::TempDir,
}

impl Drop for BenchSupervisor {
    fn drop(&mut self) {
        let all = self.ask::<Vec<VmInfo>>(Method::GET, "/v1/vms", None::<&()>);
        let names: Vec<_> = all.unwrap_or_default().into_iter().map(|vm| vm.name).collect();
        drop(self.stop(&names, 0));
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let _ = self.process.wait();
    }
}

impl BenchSupervisor {
    /// Starts `clade serve` with these arguments and variables.
    pub(super) fn start(args: &[&str], variables: &[(&str, &str)]) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::run)?;
        let signals =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(Failure::run)?;
        let dir = runtime_dir().map_err(Failure::run)?;
        let mut process = Command::new("/proc/self/exe")
            .arg("serve")
            .args(args)
            .env("CLADE_RUNTIME_DIR", dir.path())
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Failure::run)?;
        let (pid, path) = (Pid::from_child(&process), dir.path().to_owned());
        // The VMs end with this process.
        let clean_up = move || {
            let _ = kill_process(pid, Signal::TERM);
            // It writes to its directory until then.
            let _ = waitpid(Some(pid), WaitOptions::empty());
            let _ = std::fs::remove_dir_all(path);
        };
        let listening = exit_on_signal(signals.handle(), clean_up).map_err(Failure::run);
        if let Err(error) = listening.and_then(|()| answers(dir.path())) {
            let _ = process.kill();
            let _ = process.wait();
            return Err(error);
        }
        Ok(Self { runtime, _signals: signals, client: Client::new(dir.path()), process, dir })
    }

    /// Returns its runtime directory.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, Failure> {
        self.runtime.block_on(self.client.supervisor(method, path, body)).map_err(Failure::run)
    }

    /// Waits until `count` workers are prepared.
    pub(super) fn await_prepared(&self, count: usize) -> Result<(), Failure> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let info: SupervisorInfo = self.ask(Method::GET, "/v1/supervisor", None::<&()>)?;
            if info.prepared >= count {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure::Run(anyhow::anyhow!("no worker is prepared within {TIMEOUT:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes the checkpoint `name` of the VM `vm`.
    pub(super) fn checkpoint(&self, vm: &str, name: &str) -> Result<(), Failure> {
        let request = CheckpointRequest { name: Some(name.to_owned()), ..CheckpointRequest::default() };
        let path = format!("/v1/vms/{vm}/checkpoint");
        self.ask::<CheckpointInfo>(Method::POST, &path, Some(&request)).map(drop)
    }

    /// Prepares workers for `count` VMs of the checkpoint's configuration, and waits until they are.
    pub(super) fn prepare(&self, checkpoint: &str, count: usize) -> Result<(), Failure> {
        let path = format!("/v1/checkpoints/{checkpoint}/prepare");
        self.ask::<Prepared>(Method::POST, &path, Some(&PrepareRequest { count })).map(drop)
    }

    /// Returns the private memory of each VM's process, in KiB.
    pub(super) fn private_kib(&self, names: &[String]) -> Result<Sample, Failure> {
        let mut sample = Sample::default();
        // A sample is enough: each read takes a while.
        for name in names.iter().step_by(names.len().div_ceil(20)) {
            let info: VmInfo = self.ask(Method::GET, &format!("/v1/vms/{name}"), None::<&()>)?;
            let rollup = format!("/proc/{}/smaps_rollup", info.pid);
            sample.push(kib(&rollup, &["Private_Clean", "Private_Dirty"]).map_err(Failure::run)? as f64);
        }
        Ok(sample)
    }

    /// Stops VMs, and waits until there are no more than `left`.
    pub(super) fn stop(&self, names: &[String], left: usize) -> Result<(), Failure> {
        let stop = |name: String| {
            let client = self.client.clone();
            async move {
                let stopped = clade_supervisor::stop(&client, &name, StopRequest::default()).await;
                if let Err(error @ ClientError::Refused { .. }) = &stopped {
                    tracing::warn!(%error, name, "a clone is not stopped");
                }
                stopped
            }
        };
        drop(self.runtime.block_on(for_each(names, stop)));
        let deadline = Instant::now() + TIMEOUT;
        while self.ask::<SupervisorInfo>(Method::GET, "/v1/supervisor", None::<&()>)?.vms > left {
            if Instant::now() > deadline {
                return Err(Failure::Run(anyhow::anyhow!("clones have not ended within {TIMEOUT:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Returns the sum of some fields of a file of `/proc`, in KiB.
fn kib(file: &str, fields: &[&str]) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(file)?;
    let of = |line: &str| {
        let (name, value) = line.split_once(':')?;
        fields.contains(&name).then(|| value.trim().trim_end_matches(" kB").parse::<u64>().ok())?
    };
    Ok(text.lines().filter_map(of).sum())
}

/// Returns the host's available memory.
pub(super) fn available_kib() -> u64 {
    kib("/proc/meminfo", &["MemAvailable"]).unwrap_or(0)
}

/// Returns a request for a bare guest.
pub(super) fn boot_request(name: &str, config: &VmConfig) -> BootRequest {
    BootRequest {
        name: name.to_owned(),
        config: config.clone(),
        kernel: BARE.into(),
        initrd: None,
        cmdline: String::new(),
        labels: Labels::default(),
        paused: false,
        reports_ready: false,
        // The guest and its clones end with the bench, also if a signal ends that: some spin.
        session: Some(SESSION.to_owned()),
        limits: VmLimits::default(),
        secrets: Vec::new(),
    }
}

/// Returns a runtime directory in memory, as a user's is, unless `TMPDIR` names another place.
fn runtime_dir() -> std::io::Result<tempfile::TempDir> {
    if std::env::var_os("TMPDIR").is_some() {
        return tempfile::tempdir();
    }
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

fn answers(dir: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + TIMEOUT;
    while std::os::unix::net::UnixStream::connect(supervisor_path(dir)).is_err() {
        if Instant::now() > deadline {
            return Err(Failure::Run(anyhow::anyhow!("the supervisor does not answer within {TIMEOUT:?}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Returns the host's available memory, once it no longer changes: memory of processes that have ended comes back late.
pub(super) fn settled_kib() -> u64 {
    let mut last = available_kib();
    for _ in 0..SETTLE_CHECKS {
        std::thread::sleep(SETTLE_INTERVAL);
        let now = available_kib();
        if now.abs_diff(last) < SETTLED_KIB {
            return now;
        }
        last = now;
    }
    last
}
