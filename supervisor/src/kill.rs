//! Ends of VMs by their supervisor: of those that have stopped, and of processes that are killed.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Signal, pidfd_send_signal};

use super::Supervisor;
use super::processes::{OwnVm, kill};
use super::vm_record::VmRecord;
use clade_api::{DaemonError, NameClaim, ProblemKind, StopAnswer, VmInfo, WorkerExit};
use clade_vmm::vm::StopReason;
use clade_worker::has_ended;

/// Time that a process which has not stopped its VM has for that, and the interval of the checks.
const LAST_STOP: Duration = Duration::from_secs(15);
const STOP_INTERVAL: Duration = Duration::from_millis(10);

/// A VM whose process was killed.
#[derive(Debug)]
pub(super) struct Killed {
    vm_record: VmRecord,
    pid: u32,
    process: Arc<OwnedFd>,
    /// Whether the process did not answer. Otherwise the request wanted no answer.
    is_silent: bool,
}

/// The refusal of a request whose VM's process does not answer.
fn silent(name: &str, text: &str) -> DaemonError {
    DaemonError::Refused { kind: ProblemKind::VmSilent, text: format!("the process of {name:?} does not answer{text}") }
}

impl Supervisor {
    /// Removes the files of a stopped VM, whose process has given the name back: `known`, if its pid is
    /// known and not only its own word. Kills a process that only says so, and returns the answer for that.
    pub(super) fn stopped(
        &self,
        known: Option<(u32, OwnVm)>,
        left: Option<(NameClaim, WorkerExit)>,
    ) -> Option<StopAnswer> {
        if left.is_none()
            && let Some(killed) = self.kill_liar(known.as_ref())
        {
            return Some(killed);
        }
        let _ends = self.0.ends();
        let pid = known.as_ref().map(|(pid, _)| *pid);
        // Also of a process that only says that it has. Files that are still its own are removed at its end.
        known.into_iter().for_each(|(pid, vm)| self.0.processes.leaves(pid, vm));
        if let Some((claim, exit)) = left {
            let pid = pid.unwrap_or(exit.pid);
            self.0.clear_up(claim, WorkerExit { pid, ..exit }, true, Vec::new());
        }
        None
    }

    /// Returns whether the VM of a process has its name. A file that cannot be read is not that of a name given back.
    fn has_name(&self, name: &str, pid: u32) -> bool {
        // Sweeps take names of dead owners, and remove their records one after another.
        let _ends = self.0.ends();
        let is_forgotten = VmRecord::read_of(&self.0.dir, name, pid).is_ok_and(|record| record.is_none());
        !is_forgotten && !self.0.processes.gave_back(pid) && NameClaim::is_anothers(&self.0.dir, name)
    }

    /// Kills a process whose VM is recorded, though it says that another VM has its name, or none. Returns None if
    /// there is no such process, or if it does not end.
    fn kill_liar(&self, known: Option<&(u32, OwnVm)>) -> Option<StopAnswer> {
        let (pid, vm) = known?;
        let vm_record = VmRecord::read_of(&self.0.dir, &vm.name, *pid).ok()??;
        if !self.has_name(&vm.name, *pid) {
            return None;
        }
        tracing::warn!(name = vm.name, pid, "a process says that it has given its VM's name back: it is killed");
        self.0.processes.mark_stopped(*pid);
        let killed = Killed { vm_record, pid: *pid, process: Arc::clone(&vm.process), is_silent: true };
        self.reap(&vm.name, killed).inspect_err(|error| tracing::warn!(%error, pid, "it was not killed")).ok()
    }

    /// Kills a VM's process without asking it, if the VM loses nothing by that: the process was started
    /// here, and no disk of the VM is written. Returns None otherwise. The signal is sent when this
    /// returns; [`Self::reap`] waits for the end.
    ///
    /// # Errors
    /// When the record of the VM cannot be read.
    pub(super) fn kill_at_once(&self, name: &str) -> Result<Option<Killed>, DaemonError> {
        let Some((pid, vm)) = self.0.processes.of(name) else { return Ok(None) };
        let vm_record = VmRecord::read_of(&self.0.dir, name, pid)?;
        let Some(vm_record) = vm_record.filter(|its| its.template.written().is_empty()) else { return Ok(None) };
        self.0.processes.mark_stopped(pid);
        // A process that has ended needs no signal.
        let _ = pidfd_send_signal(&vm.process, Signal::KILL);
        Ok(Some(Killed { vm_record, pid, process: vm.process, is_silent: false }))
    }

    /// Ends a VM by killing its process, which does not answer: `known`, from before the request to it. Another VM may
    /// have the name by now.
    ///
    /// # Errors
    /// When the process is unknown, has given its name back, or does not end.
    pub(super) fn kill(&self, name: &str, known: Option<(u32, OwnVm)>) -> Result<StopAnswer, DaemonError> {
        let (pid, vm) = known.ok_or_else(|| silent(name, ", and is not the supervisor's to kill"))?;
        let Some(vm_record) = VmRecord::read_of(&self.0.dir, name, pid)? else {
            // It ends in time, or is killed then.
            self.0.processes.leaves(pid, vm);
            return Err(silent(name, ", and has given its name back meanwhile"));
        };
        tracing::warn!(name, pid, "a VM that is to stop does not answer: its process is killed");
        self.0.processes.mark_stopped(pid);
        self.reap(name, Killed { vm_record, pid, process: vm.process, is_silent: true })
    }

    /// Ends a VM that its `process` has not stopped, though it was told to: it has answered something else, and may be
    /// compromised. Returns None if it has ended, or has given its name back: then it may be writing the VM's disks, and
    /// is killed in time. Another request may be stopping the VM, so it has [`LAST_STOP`] for that.
    ///
    /// # Errors
    /// When the process does not end.
    pub(super) fn kill_unless_ended(
        &self,
        name: &str,
        known: Option<(u32, OwnVm)>,
    ) -> Result<Option<StopAnswer>, DaemonError> {
        let Some((pid, vm)) = known else { return Ok(None) };
        let process = Arc::clone(&vm.process);
        let until = Instant::now() + LAST_STOP;
        loop {
            if has_ended(&process, STOP_INTERVAL) {
                return Ok(None);
            }
            // The number in the lock is the process's own word.
            if !self.has_name(name, pid) {
                self.0.processes.leaves(pid, vm);
                return Ok(None);
            }
            if Instant::now() > until {
                break;
            }
        }
        let Some(vm_record) = VmRecord::read_of(&self.0.dir, name, pid)? else { return Ok(None) };
        tracing::warn!(name, pid, "a VM that is to stop does not: its process is killed");
        self.0.processes.mark_stopped(pid);
        self.reap(name, Killed { vm_record, pid, process, is_silent: true }).map(Some)
    }

    /// Waits for the end of a killed process, and frees the name.
    ///
    /// # Errors
    /// When the process does not end.
    pub(super) fn reap(&self, name: &str, killed: Killed) -> Result<StopAnswer, DaemonError> {
        let Killed { vm_record, pid, process, is_silent } = killed;
        if !kill(&process) {
            return Err(silent(name, ", and does not end though it was killed"));
        }
        let _ends = self.0.ends();
        self.0.processes.give_back(pid);
        let exit = WorkerExit { pid, signal: Some(libc::SIGKILL), code: None };
        match NameClaim::new(&self.0.dir, name) {
            Ok(claim) => self.0.clear_up(claim, exit, true, Vec::new()),
            // Another thread has cleared up, and another VM has the name.
            Err(DaemonError::Taken { .. }) => {}
            Err(error) => return Err(error),
        }
        let config = &vm_record.template.config;
        let vm = if is_silent {
            VmInfo::of_killed(name, exit, config)
        } else {
            VmInfo::of_stopped(name, pid, StopReason::Requested, config)
        };
        Ok(StopAnswer { vm, shutdown: None, killed: is_silent })
    }
}
