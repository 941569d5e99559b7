//! VMs in the foreground: they end with the command that has started them.
//!
//! Each VM has a process of its own, which a supervisor in the background starts. The supervisor and
//! its checkpoints outlive the command.

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;

use crate::commands::remote::failure;
use crate::commands::run::say;
use crate::commands::serve::{answers, ensure_with};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::terminal::{Escape, EscapeFilter, RawMode};
use crate::commands::{Failure, Outcome, print_bytes};
use clade_api::{Client, ClientError, EndedVm, StopRequest, SupervisorInfo, console_path, ended_vms, log_path};
use clade_supervisor::{COMMIT_TIMEOUT, in_session, is_in_session, settle_dead};
use clade_vmm::kvm::Host;
use clade_vmm::vm::StopReason;
use clade_worker::jail::Confinement;

/// Interval of the checks for the end of VMs.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The same while many run.
const TURN: Duration = Duration::from_millis(200);
/// Time limit of the last output, whose end follows the VM's.
const LAST_OUTPUT: Duration = Duration::from_secs(10);
/// Time limit of the record of a VM that cannot be reached.
const RECORD_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval of the attempts to clear up after VMs that may have died.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of VMs' ends after a signal.
const LAST_WORK: Duration = Duration::from_secs(10);
/// Time after which the wait for disks is reported.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// Stop requests in flight.
const STOPS: usize = 8;
/// Attempts of a request whose supervisor ends meanwhile.
const ATTEMPTS: u32 = 3;

/// Memory that a child of a checkpoint may have copies of ahead, in MiB.
pub(super) const AHEAD_MIB: u32 = 16;

/// The VMs of this command.
pub(super) struct CommandSession<'a> {
    name: String,
    client: Client,
    confinement: Confinement,
    runtime: &'a Handle,
    shutdown: &'a ShutdownSignal,
}

impl<'a> CommandSession<'a> {
    /// Begins a session. Starts a supervisor if none runs, which ends when it has nothing left.
    pub(super) fn begin(
        confinement: Confinement,
        runtime: &'a Handle,
        shutdown: &'a ShutdownSignal,
    ) -> Result<Self, Failure> {
        let client = Client::default();
        if client.is_remote() {
            return Err(Failure::input(anyhow::anyhow!(
                "CLADE_API is set, and the console of a VM elsewhere is not to be had: use --detach"
            )));
        }
        // The pid may have been another command's, some of whose VMs still run.
        let begun = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
        let name = format!("run-{}-{begun:x}", std::process::id());
        let session = Self { name, client, confinement, runtime, shutdown };
        if !answers(session.client.dir()) {
            // A missing KVM is one error here, and a line in a log there.
            Host::open().map_err(Failure::input)?;
        }
        session.ensure()?;
        Ok(session)
    }

    fn ensure(&self) -> Outcome {
        ensure_with(&["--until-idle", "--cgroup", "off"], self.confinement)
    }

    /// Returns its name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Sends a request to make VMs of this session. Returns their names. A signal cancels it.
    pub(super) fn make<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
        names: impl Fn(T) -> Vec<String>,
    ) -> Result<Vec<String>, Failure> {
        for attempt in 1.. {
            let request = self.client.supervisor(Method::POST, path, Some(body));
            match self.unless_ended(request) {
                // The supervisor has ended: it had nothing left, or it was killed.
                Some(Err(error)) if attempt < ATTEMPTS && has_no_supervisor(&error) => {
                    self.ensure()?;
                    // Killed between its last step and its answer: another request would find the
                    // names taken.
                    let made = self.there();
                    if !made.is_empty() {
                        return Ok(made);
                    }
                }
                Some(answer) => return answer.map(&names).map_err(failure),
                None => break,
            }
        }
        Err(Failure::Signal(self.shutdown.signal().unwrap_or_default()))
    }

    fn unless_ended<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async {
            tokio::select! {
                done = work => Some(done),
                () = self.shutdown.wait() => None,
            }
        })
    }

    fn there(&self) -> Vec<String> {
        let there = in_session(self.client.dir(), &self.name);
        // The request is repeated later.
        there.inspect_err(|error| tracing::warn!(%error, "the VMs cannot be listed")).unwrap_or_default()
    }

    /// Connects this terminal to a VM, unless it is `detached`. Waits until the VM and its children
    /// have ended. Earlier output is shown first.
    pub(super) fn foreground(&self, name: &str, detached: bool) -> Outcome {
        let console = match self.console(name) {
            Ok(console) => console,
            // The VM may have ended at once.
            Err(error) => {
                return match self.ended_soon(name)? {
                    Some(ended) => {
                        print_last(&ended);
                        self.outcome(name, &ended.stopped)
                    }
                    // Another command has stopped it since it was made.
                    None if !self.there().iter().any(|there| there == name) => {
                        self.outcome(name, &StopReason::Requested)
                    }
                    None => Err(error),
                };
            }
        };
        let raw = if detached { None } else { RawMode::enter().map_err(Failure::run)? };
        let shown = show(console.try_clone().map_err(Failure::run)?).map_err(Failure::run)?;
        if !detached {
            self.type_stdin(name, console).map_err(Failure::run)?;
        }
        self.wait_for(name, &shown);
        let _ = shown.done.recv_timeout(LAST_OUTPUT);
        let ended = self.ended(name)?;
        // Its process ended before it accepted the connection.
        if let Some(ended) = ended.as_ref().filter(|_| !shown.is_any.load(Ordering::Relaxed)) {
            print_last(ended);
        }
        drop(raw);
        self.outcome(name, &ended.map_or(StopReason::Requested, |ended| ended.stopped))
    }

    /// Waits for the children of a VM that has ended, and returns the outcome of the command.
    fn outcome(&self, name: &str, stopped: &StopReason) -> Outcome {
        self.wait_for_all(name);
        self.end_by_signal()?;
        match stopped {
            reason if reason.is_in_order() => Ok(()),
            StopReason::Exited { status, .. } => {
                Err(Failure::Exit(*status, Some(anyhow::anyhow!("{name}: {stopped}"))))
            }
            reason => Err(Failure::Run(anyhow::anyhow!("{name}: {reason}"))),
        }
    }

    /// Waits for VMs, and returns the outcome of the command: a failure if one of them did not end in order.
    pub(super) fn wait_for_each(&self, names: &[String]) -> Outcome {
        let (mut running, mut failed): (BTreeSet<&String>, Vec<EndedVm>) = (names.iter().collect(), Vec::new());
        self.wait_while(|left| {
            // At once: another VM may get the name, and records are kept for a while.
            let left: BTreeSet<&String> = left.iter().collect();
            let gone: BTreeSet<&String> = running.difference(&left).copied().collect();
            if !gone.is_empty() {
                let ended = ended_vms(self.client.dir()).unwrap_or_default();
                let has_failed = |ended: &EndedVm| gone.contains(&ended.name) && !ended.stopped.is_in_order();
                failed.extend(ended.into_iter().filter(has_failed));
                running.retain(|name| !gone.contains(name));
            }
        });
        self.end_by_signal()?;
        let Some(first) = failed.first() else { return Ok(()) };
        let more = if failed.len() > 1 { format!(", and {} more", failed.len() - 1) } else { String::new() };
        Err(Failure::Run(anyhow::anyhow!("{}: {}{more}", first.name, first.stopped)))
    }

    /// Returns the signal that has ended the session, as a failure. All VMs have ended by then.
    pub(super) fn end_by_signal(&self) -> Outcome {
        self.shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)))
    }

    fn console(&self, name: &str) -> Result<UnixStream, Failure> {
        let path = console_path(self.client.dir(), name);
        UnixStream::connect(&path).map_err(|source| failure(ClientError::unreachable(name, path, source)))
    }

    /// Returns the end of a VM. None if it was stopped on request, or runs.
    fn ended(&self, name: &str) -> Result<Option<EndedVm>, Failure> {
        let ended = ended_vms(self.client.dir()).map_err(Failure::input)?;
        Ok(ended.into_iter().find(|ended| ended.name == name))
    }

    /// The same for an unreachable VM: its end may not be on record yet.
    fn ended_soon(&self, name: &str) -> Result<Option<EndedVm>, Failure> {
        let (deadline, mut asked) = (Instant::now() + RECORD_TIMEOUT, Instant::now());
        loop {
            // Before the record is read: the record of its end is written before its files go.
            let is_there = self.is_there(name);
            let ended = self.ended(name)?;
            let is_over = !is_there || self.shutdown.signal().is_some() || Instant::now() > deadline;
            if ended.is_some() || is_over {
                return Ok(ended);
            }
            if asked.elapsed() > SETTLE_INTERVAL {
                self.settle(&[name.to_owned()]);
                asked = Instant::now();
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Returns whether a VM is this session's, and has not been cleared up.
    fn is_there(&self, name: &str) -> bool {
        is_in_session(self.client.dir(), name, &self.name).unwrap_or(true)
    }

    /// Waits until a VM has ended. A signal ends it.
    fn wait_for(&self, name: &str, shown: &ConsoleCopy) {
        let (mut is_over, mut asked) = (false, Instant::now());
        while self.is_there(name) {
            if self.shutdown.signal().is_some() {
                return self.stop_all();
            }
            // The VM has most likely ended: its process does not answer, and its supervisor may
            // have gone.
            if is_over && asked.elapsed() > SETTLE_INTERVAL {
                self.settle(&[name.to_owned()]);
                asked = Instant::now();
            }
            match shown.done.recv_timeout(POLL_INTERVAL) {
                Err(RecvTimeoutError::Timeout) => {}
                // No more output comes: the VM's end follows, or the connection was cut.
                _ => {
                    is_over = true;
                    thread::sleep(POLL_INTERVAL);
                }
            }
        }
    }

    /// Clears up after VMs that have died, if no supervisor is left to do so.
    fn settle(&self, names: &[String]) {
        if !answers(self.client.dir()) {
            names.iter().for_each(|name| settle_dead(self.client.dir(), name));
        }
    }

    /// Waits until all VMs have ended. A signal ends them.
    pub(super) fn wait_for_all(&self, first: &str) {
        let left = self.there();
        if !left.is_empty() && self.shutdown.signal().is_none() {
            say!("\r\nclade: {first} has ended; {} of its children run on\r", left.len());
        }
        self.wait_for_any();
    }

    /// The same, without a message.
    pub(super) fn wait_for_any(&self) {
        self.wait_while(|_| {});
    }

    /// The same. Calls `each` with the names of those that have not ended, again and again.
    fn wait_while(&self, mut each: impl FnMut(&[String])) {
        loop {
            let left = self.there();
            each(&left);
            if left.is_empty() {
                return;
            }
            if self.shutdown.signal().is_some() {
                return self.stop_all();
            }
            self.settle(&left);
            thread::sleep(TURN);
        }
    }

    /// Stops all VMs, for [`LAST_WORK`] at most.
    fn stop_all(&self) {
        let deadline = Instant::now() + LAST_WORK;
        loop {
            // Again, because a VM may be forked while others are stopped.
            let left = self.there();
            if left.is_empty() {
                return;
            }
            for some in left.chunks(STOPS) {
                self.runtime.block_on(async {
                    let stops = some.iter().map(|name| {
                        let (client, name) = (self.client.clone(), name.clone());
                        tokio::spawn(async move {
                            clade_supervisor::stop(&client, &name, StopRequest::default()).await.map(drop)
                        })
                    });
                    for stop in stops.collect::<Vec<_>>() {
                        let left = deadline.saturating_duration_since(Instant::now());
                        // The next round counts the remaining VMs.
                        let _ = tokio::time::timeout(left, stop).await;
                    }
                });
            }
            if Instant::now() > deadline {
                say!("\r\nclade: {} VMs have not ended {} s after the signal\r", left.len(), LAST_WORK.as_secs());
                return;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Types standard input into a VM until Ctrl-A x, which stops it.
    fn type_stdin(&self, name: &str, mut console: UnixStream) -> io::Result<()> {
        let (client, name, runtime) = (self.client.clone(), name.to_owned(), self.runtime.clone());
        let read = move || {
            let mut filter = EscapeFilter::default();
            let mut bytes = [0; 1024];
            // The thread dies with the process: a read of a terminal cannot be cancelled.
            while let Ok(typed @ 1..) = io::stdin().lock().read(&mut bytes) {
                let mut keys = Vec::new();
                let escape = filter.feed(&bytes[..typed], &mut keys);
                if console.write_all(&keys).is_err() {
                    return;
                }
                if escape == Some(Escape::Leave) {
                    if let Err(error) = runtime.block_on(clade_supervisor::stop(&client, &name, StopRequest::default()))
                    {
                        say!("\r\nclade: {}\r", clade_vmm::error_chain(&error));
                    }
                    return;
                }
            }
            // At the end of the input its output goes on: the connection stays.
            thread::park();
        };
        thread::Builder::new().name("clade-stdin".into()).spawn(read).map(drop)
    }
}

impl Drop for CommandSession<'_> {
    /// Waits until its ended VMs' disks have the writes since a fork. A VM or a checkpoint that uses
    /// a disk is not waited for: the disk gets the writes after that, whatever this process does.
    fn drop(&mut self) {
        let (begun, signal) = (Instant::now(), self.shutdown.signal());
        let mut said = false;
        // The next signal ends the wait.
        while self.shutdown.signal() == signal {
            let request = self.client.supervisor::<SupervisorInfo>(Method::GET, "/v1/supervisor", None::<&()>);
            let answer = self.runtime.block_on(async {
                tokio::select! {
                    answer = tokio::time::timeout(LAST_WORK, request) => answer.ok(),
                    () = self.shutdown.wait(), if signal.is_none() => None,
                }
            });
            // Without a supervisor that answers the processes merge the writes as well.
            let Some(Ok(info)) = answer else { return };
            let of_this = || info.merging.iter().filter(|vm| vm.session.as_deref() == Some(&*self.name));
            let (waiting, merging): (Vec<_>, Vec<_>) = of_this().filter(|vm| !vm.failed).partition(|vm| vm.waits);
            if merging.is_empty() {
                for failed in of_this().filter(|vm| vm.failed) {
                    let (name, log) = (&failed.name, log_path(self.client.dir()));
                    say!("\r\nclade: a disk of {name} lacks writes since a fork: see {}\r", log.display());
                }
                if let [first, ..] = waiting.as_slice() {
                    let name = &first.name;
                    say!(
                        "\r\nclade: a VM or checkpoint uses a disk of {name}: the disk is given what was written since the fork after that\r"
                    );
                }
                return;
            }
            if begun.elapsed() > COMMIT_TIMEOUT {
                let limit = COMMIT_TIMEOUT.as_secs();
                say!("\r\nclade: a disk has not been given what was written since the fork within {limit} s\r");
                return;
            }
            if !said && begun.elapsed() > SAY_AFTER {
                say!("\r\nclade: disks are given what was written since the fork\r");
                said = true;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Returns whether a request failed because its supervisor has ended, or ends.
fn has_no_supervisor(error: &ClientError) -> bool {
    matches!(error, ClientError::NoSupervisor { .. }) || error.is_lost()
}

/// A console that is copied to standard output.
struct ConsoleCopy {
    /// Receives a message at its end.
    done: Receiver<()>,
    /// Whether there was any output.
    is_any: Arc<AtomicBool>,
}

/// Copies a console to standard output.
fn show(mut console: UnixStream) -> io::Result<ConsoleCopy> {
    let (ended, done) = channel();
    let is_any = Arc::new(AtomicBool::new(false));
    let shows = Arc::clone(&is_any);
    let show = move || {
        let mut bytes = [0; 4096];
        while let Ok(got @ 1..) = console.read(&mut bytes) {
            // Relaxed: read after the message of the end, or to no effect.
            shows.store(true, Ordering::Relaxed);
            if print_bytes(&bytes[..got]).is_err() {
                // The VM runs on without a reader.
                break;
            }
        }
        // The receiver may have gone.
        let _ = ended.send(());
    };
    thread::Builder::new().name("clade-output".into()).spawn(show)?;
    Ok(ConsoleCopy { done, is_any })
}

/// Prints the last output of a VM that was never shown.
fn print_last(ended: &EndedVm) {
    // Standard output may have no reader.
    let _ = print_bytes(ended.console.as_bytes());
}
