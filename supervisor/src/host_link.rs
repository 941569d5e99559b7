//! Closed networks, enforced outside of the VM's process.
//!
//! A VM's process has the queues of its TAP interfaces and the sockets of its passts, and a closed
//! device of an honest process lets no packet pass. A compromised process is bound by the host: the
//! supervisor takes the interfaces down, and stops the passts.
//!
//! | state | interface | passt | the device of the VM |
//! |---|---|---|---|
//! | open | up, by the network hook or the operator | runs | passes packets |
//! | closed | down: the kernel takes no packet from its queues | stopped by SIGSTOP | drops packets |
//!
//! The order is part of that: a child is closed before it is given its parent's memory, and a VM is
//! closed here first and opened here last.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clade_devices::virtio::net::Link;
use rustix::io::Errno;

use super::processes::ProcessId;
use super::vm_record::VmRecord;
use super::{Inner, Supervisor};
use clade_api::{DaemonError, RuntimeDir};
use clade_worker::has_ended;
use clade_worker::jail::Confinement;

/// Combines two sources of a VM's state: closed if one of them is closed.
pub(super) fn stricter(one: Option<Link>, other: Option<Link>) -> Option<Link> {
    if [one, other].contains(&Some(Link::Closed)) { Some(Link::Closed) } else { one.or(other) }
}

impl VmRecord {
    /// Opens or closes the host's side of the VM's network devices.
    ///
    /// # Errors
    /// When the host refuses it for one of them: the others are set. Without the right to configure
    /// interfaces, a closed network is left to the VM's process, unless confinement is required.
    pub(super) fn set_links(&self, name: &str, link: Link, confinement: Confinement) -> Result<(), DaemonError> {
        let mut failed = Ok(());
        for own in &self.links {
            match own.set(link) {
                Err(error)
                    if error.kind() == io::ErrorKind::PermissionDenied && confinement != Confinement::Require =>
                {
                    tracing::warn!(%error, name, ?link, "only the VM's process closes its network");
                }
                Err(source) if failed.is_ok() => failed = Err(DaemonError::Link { name: name.to_owned(), source }),
                _ => {}
            }
        }
        failed
    }

    /// Returns whether the VM's process lives. One that is not known has ended.
    pub(super) fn is_alive(&self) -> bool {
        self.process.and_then(ProcessId::open).is_some_and(|pidfd| !has_ended(&pidfd, Duration::ZERO))
    }
}

impl Inner {
    /// Opens the links of ended VMs whose processes lived on, once they do not.
    pub(super) fn release_closed(&self) {
        let waiting = std::mem::take(&mut *self.closed());
        let live: Vec<_> = waiting.into_iter().filter(|(name, ended)| !release_links(&self.dir, name, ended)).collect();
        self.closed().extend(live);
    }

    /// Opens the links of an ended VM, as soon as its process has ended: a compromised one may only
    /// claim the end.
    pub(super) fn release(&self, name: &str, ended: &VmRecord) {
        if !release_links(&self.dir, name, ended) {
            self.closed().push((name.to_owned(), ended.clone()));
        }
    }

    fn closed(&self) -> MutexGuard<'_, Vec<(String, VmRecord)>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes a network that an earlier supervisor was about to close.
    pub(super) fn close_recorded(&self, name: &str, vm_record: &VmRecord) {
        // The index of an interface of a process that has ended may be another interface's after a
        // restart of the host.
        if vm_record.network == Some(Link::Closed)
            && vm_record.is_alive()
            && let Err(error) = vm_record.set_links(name, Link::Closed, self.sandbox.confinement)
        {
            tracing::error!(error = clade_vmm::error_chain(&error), name, "a closed network is not closed");
        }
    }
}

/// The processes of VMs whose networks are closed, though their records could not be written.
fn unrecorded() -> MutexGuard<'static, Vec<Option<ProcessId>>> {
    static UNRECORDED: Mutex<Vec<Option<ProcessId>>> = Mutex::new(Vec::new());
    UNRECORDED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens the links of an ended VM that was closed. An interface may outlive the VM, and a stopped
/// passt does not notice that its socket is closed. Returns false while the VM's process lives, which
/// has the queues.
pub(super) fn release_links(dir: &RuntimeDir, name: &str, ended: &VmRecord) -> bool {
    let is_open = ended.network == Some(Link::Open) && !unrecorded().contains(&ended.process);
    if is_open || ended.links.is_empty() {
        return true;
    }
    if ended.is_alive() {
        return false;
    }
    unrecorded().retain(|process| *process != ended.process);
    // No VM is recorded meanwhile: one that has the same interface closes it after it is recorded.
    let _records = VmRecord::lock();
    let others = match VmRecord::all(dir) {
        Ok(others) => others,
        Err(error) => {
            tracing::warn!(%error, name, "the interfaces of a closed VM stay down");
            return true;
        }
    };
    for link in &ended.links {
        let is_others = |other: &VmRecord| other.process != ended.process && other.links.contains(link);
        let is_taken = others.iter().any(|(_, other)| is_others(other) && other.network != Some(Link::Open));
        if is_taken {
            continue;
        }
        match link.set(Link::Open) {
            // An interface that has gone with the VM.
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {}
            Err(error) => tracing::warn!(%error, name, ?link, "the interface of a closed VM stays down"),
            Ok(()) => {}
        }
    }
    true
}

impl Supervisor {
    /// Returns the process of the VM called `name`.
    ///
    /// # Errors
    /// When there is no such VM.
    pub(super) fn recorded_process(&self, name: &str) -> Result<Option<ProcessId>, DaemonError> {
        Ok(VmRecord::expect(&self.0.dir, name)?.process)
    }

    /// Opens or closes the host's side of the network of the VM called `name`, whose process is
    /// `process`, and records that.
    ///
    /// # Errors
    /// When there is no such VM, or the host refuses it. A network that is to be closed is then
    /// recorded as closed.
    pub(super) fn set_link(&self, name: &str, process: Option<ProcessId>, link: Link) -> Result<(), DaemonError> {
        let gone = || DaemonError::NoSuchVm { name: name.to_owned() };
        let _records = VmRecord::lock();
        let mut vm_record = VmRecord::expect(&self.0.dir, name)?;
        // Another VM may have the name by now, and the interfaces of one that has ended.
        if vm_record.process != process || !vm_record.is_alive() {
            return Err(gone());
        }
        if vm_record.template.config.nets.is_empty() {
            return Ok(());
        }
        let confinement = self.0.sandbox.confinement;
        match (link, vm_record.network) {
            // An operator's interface that is down was not taken down here.
            (Link::Open, Some(Link::Open) | None) if !unrecorded().contains(&process) => Ok(()),
            (Link::Open, _) => {
                let opened = vm_record.set_links(name, link, confinement).and_then(|()| {
                    let open = VmRecord { network: Some(link), ..vm_record.clone() };
                    open.replace(&self.0.dir, name)
                });
                // As it is recorded.
                opened.inspect_err(|_| drop(vm_record.set_links(name, Link::Closed, confinement)))?;
                unrecorded().retain(|other| *other != process);
                Ok(())
            }
            (Link::Closed, _) => {
                // First: whoever finds the record later closes the network again.
                vm_record.network = Some(link);
                let recorded = vm_record.replace(&self.0.dir, name);
                // Also if there is no room for the record.
                vm_record.set_links(name, link, confinement)?;
                if recorded.is_err() {
                    unrecorded().push(process);
                }
                recorded
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::Command;

    use clade_test_support::wait_eq;
    use clade_vmm::vm::HostLink;

    use super::*;
    use crate::recorded_link::RecordedLink;
    use crate::vm_record::tests::record_with;

    /// The state letter of a process.
    pub(crate) fn state(pid: u32) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1[..1].to_owned()
    }

    #[test]
    fn a_passt_is_stopped_and_goes_on_and_one_that_has_ended_is_closed() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let link = RecordedLink::of(&HostLink::User { pid: child.id() }).unwrap();
        link.set(Link::Closed).unwrap();
        wait_eq("it to stop", &"T".to_owned(), || state(child.id()));
        link.set(Link::Open).unwrap();
        wait_eq("it to go on", &"S".to_owned(), || state(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        link.set(Link::Closed).unwrap();
        link.set(Link::Open).unwrap();
        // An interface that is not there is not known to be closed.
        let refused = RecordedLink::Interface(i32::MAX as u32).set(Link::Closed).unwrap_err().raw_os_error();
        assert!(matches!(refused, Some(libc::ENODEV | libc::EPERM)), "{refused:?}");
    }

    #[test]
    fn links_stay_closed_while_a_process_lives_that_claims_its_end() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(scratch.path()).unwrap();
        let [mut vm, mut passt] = [(); 2].map(|()| Command::new("sleep").arg("1000").spawn().unwrap());
        let link = RecordedLink::of(&HostLink::User { pid: passt.id() }).unwrap();
        link.set(Link::Closed).unwrap();
        wait_eq("it to stop", &"T".to_owned(), || state(passt.id()));
        let record = |pid: u32, network| VmRecord {
            process: ProcessId::of(pid),
            links: vec![link],
            network: Some(network),
            ..record_with(None)
        };
        let ended = record(vm.id(), Link::Closed);
        assert!(!release_links(&dir, "web", &ended));
        vm.kill().unwrap();
        vm.wait().unwrap();
        // Another closed VM has the link by now.
        record(std::process::id(), Link::Closed).replace(&dir, "other").unwrap();
        assert!(release_links(&dir, "web", &ended));
        assert_eq!(state(passt.id()), "T");
        record(std::process::id(), Link::Open).replace(&dir, "other").unwrap();
        assert!(release_links(&dir, "web", &ended));
        wait_eq("it to go on", &"S".to_owned(), || state(passt.id()));
        passt.kill().unwrap();
        passt.wait().unwrap();
    }

    #[test]
    fn either_source_closes_a_network() {
        let (open, closed) = (Some(Link::Open), Some(Link::Closed));
        for (one, other, both) in
            [(None, None, None), (open, None, open), (None, open, open), (open, open, open), (closed, open, closed)]
        {
            assert_eq!((stricter(one, other), stricter(other, one)), (both, both));
        }
        assert_eq!(stricter(None, closed), closed);
    }
}
