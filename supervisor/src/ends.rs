//! Ends of VMs: reaps their processes, frees their names, removes their files.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Inner;
use super::cgroups::Cgroups;
use super::host_link::release_links;
use super::net_hook::{Interfaces, NetHook, PendingDown};
use super::processes::{OwnVm, ProcessId};
use super::unsettled::UnsettledEnd;
use super::vm_record::{VmRecord, clear_up};
use clade_api::flight::FlightEvent;
use clade_api::{
    DaemonError, KnownEnd, NameClaim, RuntimeDir, WorkerExit, record_end, recorded_reason, vm_names, vm_record_name,
};
use clade_vmm::vm::StopReason;
use clade_worker::UNMERGED;

/// Interval of the sweeps for the files of dead processes.
const SWEEP_INTERVAL: Duration = Duration::from_secs(2);
/// Sweeps that must find a worker dead before its end counts as unreported. A busy zygote may
/// report late.
const MAX_SUSPECTED: u32 = 4;

/// Clears up after workers that have ended.
pub(super) fn watch(exits: &Receiver<WorkerExit>, supervisor: &Weak<Inner>) {
    let mut due = Instant::now() + SWEEP_INTERVAL;
    // Workers that the last sweeps found dead, without a report.
    let mut suspects = BTreeMap::new();
    // VMs and dead processes from before this supervisor.
    if let Some(inner) = supervisor.upgrade() {
        inner.observe();
    }
    loop {
        let exit = match exits.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(exit) => Some(exit),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Some(inner) = supervisor.upgrade() else { return };
        if let Some(exit) = exit {
            inner.ended(exit);
        }
        // A sweep is due even in a flood of reports. Reports already received come first: otherwise
        // a VM that ended properly would be recorded as lost.
        if Instant::now() >= due {
            let until = Instant::now() + SWEEP_INTERVAL;
            while Instant::now() < until
                && let Ok(exit) = exits.try_recv()
            {
                inner.ended(exit);
            }
            suspects = inner.sweep(&suspects);
            inner.observe();
            due = Instant::now() + SWEEP_INTERVAL;
        }
    }
}

impl Inner {
    pub(super) fn ends(&self) -> MutexGuard<'_, ()> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the names of VMs that this supervisor announces.
    pub(super) fn own_names(&self) -> BTreeSet<String> {
        let mut names = self.launching.names();
        names.extend(self.processes.names());
        names
    }

    fn ended(&self, exit: WorkerExit) {
        let _ends = self.ends();
        self.interfaces.release_ended();
        // Before the process is forgotten: it is on one of both lists all the time.
        self.processes.note_end(exit);
        // The command of its session looks at the lists once more.
        self.touch();
        let Some(vm) = self.processes.remove_ended(exit.pid) else { return };
        let name = vm.name.clone();
        vm.teach();
        let exceeded = vm.group.as_ref().and_then(|group| group.exceeded());
        vm.group.iter().for_each(|group| group.remove());
        tracing::info!(name, pid = exit.pid, signal = exit.signal, code = exit.code, "a VM's process has ended");
        // By now its name is free, or has another owner. Otherwise the request that stopped it has
        // left the files.
        if !vm.has_name() && !self.has_record(&name, exit.pid) {
            return self.say_ended(&name);
        }
        let flight = vm.flight();
        // By itself, by a signal that it handles, or because it did not stop as requested.
        let is_orderly = |code| matches!(code, 0..=2 | 129 | 130 | 143) || code == i32::from(UNMERGED);
        let in_order = exit.signal.is_none() && exit.code.is_some_and(is_orderly);
        let mut was_orderly = in_order || vm.is_stopped || !vm.has_name();
        let stopped = match exceeded {
            _ if was_orderly => None,
            Some(mib) => {
                tracing::warn!(name, mib, "a VM's process was killed: it took more memory than its limit");
                Some(StopReason::OverLimit { mib })
            }
            None => vm.died_with_command(exit).then_some(StopReason::SessionEnded),
        };
        if let Some(stopped) = stopped {
            let parent = VmRecord::found(&self.dir, &name).and_then(|its| its.parent);
            record_end(&self.dir, &name, stopped, KnownEnd { exit, parent, flight: flight.clone() });
            was_orderly = true;
        }
        // Its files are still there. Its lock has gone, unless another process has the name by now,
        // or this one has not left it to the VM yet.
        match NameClaim::new(&self.dir, &name) {
            Ok(claim) => self.clear_up(claim, exit, was_orderly, flight),
            Err(DaemonError::Taken { .. }) => {
                self.unsettled.push(UnsettledEnd { name: name.clone(), exit, was_orderly, flight });
            }
            Err(error) => tracing::warn!(%error, name, "cannot remove the files of an ended VM"),
        }
        self.say_ended(&name);
    }

    /// Returns the ended VMs whose processes may write to disks.
    pub(super) fn ended_writers(&self) -> Vec<OwnVm> {
        self.processes.writers(|name, pid| self.has_record(name, pid))
    }

    /// Returns the images of disks that VMs or checkpoints of this directory use.
    ///
    /// # Errors
    /// When the directory, or a VM's record, cannot be read: then any image may be in use.
    pub(super) fn used_images(&self) -> Result<BTreeSet<PathBuf>, DaemonError> {
        let mut used = self.images_in_use.paths();
        used.extend(self.checkpoints.images());
        for name in VmRecord::names(&self.dir)? {
            let vm_record = VmRecord::read(&self.dir, &name)?;
            // A process that has given its name back may still have its files.
            let has_left = |its: &VmRecord| its.process.is_some_and(|process| self.processes.gave_back(process.pid()));
            let template = vm_record.filter(|its| !has_left(its)).map(|vm_record| vm_record.template);
            used.extend(template.iter().flat_map(|template| template.images().map(Path::to_owned)));
        }
        Ok(used)
    }

    /// Whether the record of the name is of the VM of this process. It is not if another VM has the name,
    /// or the files of the VM are removed.
    pub(super) fn has_record(&self, name: &str, pid: u32) -> bool {
        VmRecord::found(&self.dir, name).is_some_and(|record| record.has_process(pid))
    }

    /// Clears up after VMs whose names were taken when they ended. Those whose names still are wait on.
    fn settle(&self) {
        let is_its =
            |end: &UnsettledEnd| self.has_record(&end.name, end.exit.pid) && self.processes.of(&end.name).is_none();
        self.unsettled.settle(is_its, |name| NameClaim::new(&self.dir, name), |claim, end| self.settle_end(claim, end));
    }

    fn settle_end(&self, claim: NameClaim, end: UnsettledEnd) {
        self.clear_up(claim, end.exit, end.was_orderly, end.flight);
    }

    /// Records the end of a VM, and removes its files.
    pub(super) fn clear_up(&self, claim: NameClaim, exit: WorkerExit, was_orderly: bool, flight: Vec<FlightEvent>) {
        // Before the name is free: another VM may get an interface of this one, which comes up after it is down.
        let down = self.net_hook.as_ref().map(NetHook::begin_down);
        self.snapshots.forget(&claim.name);
        self.kept_lines.forget(&claim.name);
        self.idle.forget(&claim.name);
        let name = claim.name.clone();
        let process = VmRecord::found(&self.dir, &name).and_then(|vm_record| vm_record.process);
        // The record of a VM that another supervisor has started.
        let found = self.records.take(&name, process);
        let flight = if flight.is_empty() { found } else { flight };
        if let Some(vm_record) = clear_up(claim, exit, was_orderly, flight) {
            self.left(&name, &vm_record, down);
        }
    }

    /// Clears up after an earlier VM of a claimed name, which died without that.
    pub(super) fn forget_earlier(&self, name: &str) {
        self.snapshots.forget(name);
        self.kept_lines.forget(name);
        // Its process may be there yet, and idle.
        self.idle.forget(name);
        if let Ok(Some(vm_record)) = VmRecord::read(&self.dir, name) {
            // Whoever has the claim knows that its process has given the name back. It may write to its disks yet.
            if let Some((pid, vm)) = vm_record.own_vm(name) {
                self.processes.leaves(pid, vm);
                self.dir.forget(&vm_record_name(name));
            }
            vm_record.remove_sockets();
            self.left(name, &vm_record, self.net_hook.as_ref().map(NetHook::begin_down));
        }
    }

    /// Removes the resources of an ended VM outside of the runtime directory.
    fn left(&self, name: &str, vm_record: &VmRecord, down: Option<PendingDown>) {
        self.overlays.release(&vm_record.overlays);
        self.release(name, vm_record);
        if let Some(down) = down {
            down.of(self.given_up(vm_record.interfaces(name), vm_record));
        }
    }

    /// Returns the interfaces of an ended VM, without those that another VM has by now: they were connected for it.
    fn given_up(&self, interfaces: Interfaces, ended: &VmRecord) -> Interfaces {
        let mut others = None;
        interfaces.without(|tap| {
            // Most interfaces go with their VM.
            Path::new("/sys/class/net").join(tap).exists()
                && others
                    .get_or_insert_with(|| VmRecord::all(&self.dir).unwrap_or_default())
                    .iter()
                    .any(|(_, other)| other.process != ended.process && other.has_interface(tap) && other.is_alive())
        })
    }

    /// Announces the end of a VM, unless another has its name by now.
    pub(super) fn say_ended(&self, name: &str) {
        if self.processes.of(name).is_none() {
            self.events.ended(name, recorded_reason(&self.dir, name).as_deref());
        }
    }

    /// Announces new VMs of other processes, and VMs that ended without a report.
    fn observe(&self) {
        self.events.zygote_restarts(self.zygote.restarts());
        // Before and after: a VM may be made, or fail, while the directory is read.
        let mut ours = self.own_names();
        match vm_names(&self.dir) {
            Ok(there) => {
                ours.extend(self.own_names());
                self.records.retain(&there);
                self.launching.note_others(there.difference(&ours).count());
                self.events.observe(&there, |name| ours.contains(name), |name| recorded_reason(&self.dir, name));
            }
            Err(error) => tracing::warn!(%error, "the directory cannot be read"),
        }
    }

    /// Clears up after processes whose end was never reported: a killed zygote reaps no workers,
    /// and VMs of other processes of the directory are not workers. Returns the workers whose end
    /// may still be reported, with the number of sweeps that have found them: after
    /// [`MAX_SUSPECTED`] they are cleared up.
    fn sweep(&self, suspects: &BTreeMap<String, u32>) -> BTreeMap<String, u32> {
        let _ends = self.ends();
        self.settle();
        self.release_closed();
        let mut found = BTreeMap::new();
        let dead = match NameClaim::of_the_dead(&self.dir) {
            Ok(dead) => dead,
            Err(error) => {
                tracing::warn!(%error, "what dead processes have left stays");
                return found;
            }
        };
        for (claim, owner) in dead {
            let record = VmRecord::found(&self.dir, &claim.name);
            let recorded = record.as_ref().and_then(|its| its.process).map(ProcessId::pid);
            // It was taken a moment ago.
            if let Some(end) = self.unsettled.take(&claim.name).filter(|end| recorded == Some(end.exit.pid)) {
                self.settle_end(claim, end);
                continue;
            }
            // The request that stopped it has left the files.
            if let Some(pid) = recorded.filter(|pid| self.processes.gave_back(*pid)) {
                self.clear_up(claim, WorkerExit { pid, signal: None, code: None }, true, Vec::new());
                continue;
            }
            // Not under the lock: clearing up takes time.
            let own = self.processes.of(&claim.name);
            let worker = own.as_ref().map(|(pid, _)| *pid);
            let flight = own.as_ref().map_or_else(Vec::new, |(_, vm)| vm.flight());
            // Its process waits until it may merge the writes since a fork into its disks. Or it is
            // compromised and does not end: also one that an earlier supervisor has started.
            let living = own.filter(|(pid, _)| self.processes.is_there(*pid));
            if let Some((pid, vm)) = living.or_else(|| record.as_ref()?.own_vm(&claim.name)) {
                self.processes.leaves(pid, vm);
                self.clear_up(claim, WorkerExit { pid, signal: None, code: None }, true, flight);
                continue;
            }
            let times = suspects.get(&claim.name).copied().unwrap_or_default() + 1;
            if let Some(pid) = worker.filter(|_| times < MAX_SUSPECTED) {
                found.insert(claim.name.clone(), times);
                // A request that stops it looks for its pid.
                claim.leave_as_found(pid);
                continue;
            }
            // The pid in the lock is the owner's own claim.
            let pid = worker.unwrap_or(owner);
            tracing::info!(name = claim.name, pid, "VM process exited without notification");
            let exit = WorkerExit { pid, signal: None, code: None };
            let (session, parent) = record.map_or((None, None), |its| (its.session, its.parent));
            let is_over = session.is_some_and(|session| session.live().is_none());
            if is_over {
                let end = KnownEnd { exit, parent, flight: flight.clone() };
                record_end(&self.dir, &claim.name, StopReason::SessionEnded, end);
            }
            self.clear_up(claim, exit, is_over, flight);
            worker.map(|pid| self.processes.remove(pid));
        }
        // VMs that ended properly under a killed zygote.
        self.interfaces.release_ended();
        self.processes.forget_ended(|name| found.contains_key(name), MAX_SUSPECTED);
        self.cgroups.iter().for_each(Cgroups::tidy);
        let used = OnceCell::new();
        let used_images =
            || self.used_images().inspect_err(|error| tracing::warn!(%error, "no image is known to be free"));
        self.processes
            .kill_overdue(|image| used.get_or_init(used_images).as_ref().map_or(true, |used| used.contains(image)));
        found
    }
}

/// Removes the files of a VM whose process has ended, where no supervisor is left to do so.
pub fn settle_dead(dir: &Path, name: &str) {
    // A taken name: its process still holds it, or another process clears up.
    if let Ok(claim) = RuntimeDir::open(dir).and_then(|dir| NameClaim::new(&dir, name)) {
        clear_up_alone(claim, WorkerExit { pid: 0, signal: None, code: None });
    }
}

/// Clears up after a VM that has ended, where no supervisor releases the rest of its resources.
pub(crate) fn clear_up_alone(claim: NameClaim, exit: WorkerExit) {
    let (dir, name) = (claim.dir().clone(), claim.name.clone());
    if let Some(ended) = clear_up(claim, exit, true, Vec::new()) {
        release_links(&dir, &name, &ended);
    }
}
