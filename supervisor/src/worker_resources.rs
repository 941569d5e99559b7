//! A worker's grants and descriptors.

use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_devices::virtio::net::Link;

use super::broker::Broker;
use super::cgroups::{Bounds, Group};
use super::held_interfaces::HeldInterfaces;
use super::host_link::{release_links, stricter};
use super::launched_vm::LaunchedVm;
use super::net_hook::Interfaces;
use super::overlays::OverlayUse;
use super::processes::{OwnVm, ProcessId};
use super::recorded_link::RecordedLink;
use super::session::Live;
use super::vm_record::{VmRecord, inode};
use clade_api::secrets::SecretsRecord;
use clade_api::{DaemonError, NameClaim, RuntimeDir, flight, forget_ended};
use clade_vmm::vm::{Endpoints, InterfaceClaim, VmConfig};
use clade_worker::jail::{Confinement, Grants};
use clade_worker::{ConfineRequest, PassedFds, ReportedVm, VmTemplate, Worker};

/// The grants of workers in a runtime directory.
#[derive(Clone, Debug)]
pub(super) struct SandboxProfile {
    pub(super) dir: PathBuf,
    pub(super) confinement: Confinement,
}

impl SandboxProfile {
    /// Returns the request for a worker that works with the memory of a VM of `config`, and opens
    /// `disks` disks.
    pub(super) fn confine_request(&self, config: &VmConfig, disks: usize, grants: Grants) -> ConfineRequest {
        let (dir, confinement, ram) = (self.dir.clone(), self.confinement, config.layout().bytes());
        ConfineRequest { dir, confinement, grants, disks, ram }
    }

    /// Returns the request for a child.
    pub(super) fn of_child(&self, template: &VmTemplate) -> ConfineRequest {
        let grants = Grants::of_child(&template.config, &template.overlays, &template.saved);
        self.confine_request(&template.config, template.config.disks.len(), grants)
    }

    /// Returns the request for a worker that opens the snapshot of VMs of `template`. Compressed
    /// disks are unpacked in the directory of overlays.
    pub(super) fn of_opener(&self, template: &VmTemplate) -> ConfineRequest {
        let overlays = template.overlays.first().cloned().into_iter().collect();
        self.confine_request(
            &template.config,
            0,
            Grants { dirs: template.saved.clone(), overlays, ..Grants::default() },
        )
    }

    /// Returns the request for a VM that is booted.
    pub(super) fn of_boot(&self, config: &VmConfig, kernel: &Path, initrd: Option<&Path>) -> ConfineRequest {
        self.confine_request(config, config.disks.len(), Grants::of_boot(config, kernel, initrd))
    }
}

/// A VM to be started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start<'a> {
    pub(super) template: &'a VmTemplate,
    /// The session whose command it ends with.
    pub(super) session: Option<&'a Live<'a>>,
    /// The VM that it is forked from.
    pub(super) parent: Option<&'a str>,
    pub(super) ancestors: &'a [ProcessId],
    pub(super) bounds: Bounds,
    pub(super) secrets: Option<&'a SecretsRecord>,
    /// The worker.
    pub(super) pid: u32,
    /// Whether its network is open. None until a worker has read the state of its devices.
    pub(super) network: Option<Link>,
}

/// The descriptors of one VM, on their way to its worker. A drop removes the files made for it
/// outside of the runtime directory, unless the VM is kept.
#[derive(Debug)]
pub(super) struct WorkerResources {
    dir: RuntimeDir,
    name: String,
    vm_record: VmRecord,
    /// Whether the VM is booted, and not forked.
    is_booted: bool,
    files: Vec<OwnedFd>,
    /// The file of its flight record, read at its end.
    flight: Arc<OwnedFd>,
    /// Further claims on its interfaces.
    interface_claims: Vec<InterfaceClaim>,
    /// None once the VM is kept.
    overlays: Option<OverlayUse>,
}

impl WorkerResources {
    /// Makes the files of a VM that uses `overlays`, and records the VM.
    ///
    /// # Errors
    /// When a file cannot be made. Then none stays.
    pub(super) fn make(
        claim: &NameClaim,
        start: Start<'_>,
        overlays: OverlayUse,
        mut ends: Endpoints,
        broker: &Broker,
    ) -> Result<(Self, PassedFds), DaemonError> {
        let failed = |source| DaemonError::Worker { source };
        let (identity, paths) = (ends.identity().clone(), overlays.paths.clone());
        let socket = identity.vsock.as_ref().and_then(|vsock| inode(&vsock.socket));
        let Start { template, session: live, parent, ancestors, bounds, secrets, pid, network } = start;
        let session = live.map(|live| live.session.clone());
        let (process, parent) = (ProcessId::of(pid), parent.map(str::to_owned));
        let vm_record = VmRecord {
            template: template.clone(),
            identity,
            overlays: paths,
            socket,
            session,
            process,
            parent,
            ancestors: ancestors.to_vec(),
            bounds,
            secrets: secrets.cloned(),
            links: ends.links().iter().filter_map(RecordedLink::of).collect(),
            network,
        };
        let vsock = vm_record.identity.vsock.as_ref();
        let broker = vsock.map(|vsock| broker.connect(vsock.socket.clone())).transpose().map_err(failed)?;
        let flight = Arc::new(flight::make().map_err(failed)?);
        let interface_claims = ends.take_interface_claims();
        let (ends, devices) = ends.hand_over(broker).map_err(failed)?;
        // From here on this owns the socket's file.
        let (dir, name, overlays) = (claim.dir().clone(), claim.name.clone(), Some(overlays));
        let mut resources =
            Self { dir, name, vm_record, is_booted: false, files: Vec::new(), flight, interface_claims, overlays };
        let (sockets, record) = claim.hand_over(template.config.virtio_console)?;
        forget_ended(claim.dir(), &claim.name);
        resources.vm_record.write(claim)?;
        let (sockets, listeners): (Vec<_>, Vec<_>) = sockets.into_iter().unzip();
        resources.files.push(record);
        let command = live.map(|live| live.as_fd().try_clone_to_owned());
        resources.files.extend(command.transpose().map_err(failed)?);
        resources.files.extend(listeners);
        resources.files.extend(devices);
        Ok((resources, PassedFds { ends_with_command: live.is_some(), sockets, ends }))
    }

    /// Marks the VM as booted: it may write its disks' images.
    pub(super) fn booted(mut self) -> Self {
        self.is_booted = true;
        self
    }

    /// Holds its interfaces with several queues until the process of the VM has ended, which `worker` becomes.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn hold_interfaces(&mut self, held: &HeldInterfaces, worker: &Worker) -> Result<(), DaemonError> {
        if !self.interface_claims.is_empty() {
            let process = worker.pidfd()?.ok_or(DaemonError::Ending)?;
            held.hold(&self.name, worker.pid(), process, mem::take(&mut self.interface_claims));
        }
        Ok(())
    }

    /// Returns the VM's process.
    pub(super) fn process(&self) -> Option<ProcessId> {
        self.vm_record.process
    }

    /// Returns the VM's interfaces.
    pub(super) fn interfaces(&self) -> Interfaces {
        self.vm_record.interfaces(&self.name)
    }

    /// Closes the host's side of its network, unless the network is known to be open. That comes
    /// before the worker reads its parent's memory, which may be made to break into it.
    ///
    /// # Errors
    /// When the host refuses it.
    pub(super) fn close_links(&self, confinement: Confinement) -> Result<(), DaemonError> {
        if self.vm_record.links.is_empty() {
            return Ok(());
        }
        let _records = VmRecord::lock();
        match self.network_now() {
            Some(Link::Open) => Ok(()),
            Some(Link::Closed) | None => self.vm_record.set_links(&self.name, Link::Closed, confinement),
        }
    }

    /// Returns whether the network is open. A request may have closed it since the VM was recorded.
    fn network_now(&self) -> Option<Link> {
        let recorded = VmRecord::found(&self.dir, &self.name).filter(|now| now.process == self.vm_record.process);
        stricter(self.vm_record.network, recorded.and_then(|now| now.network))
    }

    /// Returns whether the network waits for the worker's word on its devices.
    pub(super) fn has_unknown_network(&self) -> bool {
        self.vm_record.network.is_none() && !self.vm_record.links.is_empty()
    }

    /// Opens the host's side of a network of unknown state if the worker has found it `network`, and
    /// records the state. The VM has not run yet.
    ///
    /// # Errors
    /// When the host refuses it, or the record cannot be written.
    pub(super) fn settle_network(&self, network: Option<Link>, confinement: Confinement) -> Result<(), DaemonError> {
        if !self.has_unknown_network() {
            return Ok(());
        }
        // Both under the lock: a request that closes it comes before, and is found, or after.
        let _records = VmRecord::lock();
        let network = stricter(network, self.network_now()).unwrap_or(Link::Closed);
        if network == Link::Open {
            self.vm_record.set_links(&self.name, network, confinement)?;
        }
        let settled = VmRecord { network: Some(network), ..self.vm_record.clone() };
        settled.replace(&self.dir, &self.name)
    }

    /// Describes the VM that the worker has `reported` as made.
    pub(super) fn launched(&self, reported: ReportedVm) -> LaunchedVm {
        LaunchedVm::new(&self.name, &self.vm_record, reported)
    }

    /// Returns the VM, with its `process` and its `group`.
    pub(super) fn own_vm(&self, process: OwnedFd, group: Option<Group>) -> OwnVm {
        let vm = OwnVm::new(&self.name, process, &self.vm_record.template.config, self.is_booted);
        let session = self.vm_record.session.as_ref().map(|session| session.name.clone());
        vm.in_group(group).in_session(session).recorded_in(&self.flight)
    }

    /// Returns the descriptors, behind the lock of `claim`.
    pub(super) fn files<'a>(&'a self, claim: &'a NameClaim) -> Vec<BorrowedFd<'a>> {
        let mut files = self.files.iter().map(AsFd::as_fd);
        // The record of its end, and then that of its flight.
        let record = files.next();
        claim.lock().into_iter().chain(record).chain([self.flight.as_fd()]).chain(files).collect()
    }

    /// Closes the descriptors: the worker has its own.
    pub(super) fn sent(&mut self) {
        self.files.clear();
    }

    /// Leaves the files to the VM, which runs.
    pub(super) fn keep(mut self) {
        self.overlays.take().into_iter().for_each(OverlayUse::keep);
    }
}

impl Drop for WorkerResources {
    fn drop(&mut self) {
        if self.overlays.is_some() {
            self.vm_record.remove_sockets();
            if !release_links(&self.dir, &self.name, &self.vm_record) {
                tracing::warn!(
                    name = self.name,
                    "the process of a VM that was not made lives on: its network stays closed"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clade_test_support::wait_eq;
    use clade_vmm::vm::HostLink;

    use super::*;
    use crate::host_link::tests::state;
    use crate::vm_record::tests::record_with;

    /// A request closes the network of a VM that is recorded and does not run yet: while the hook takes its interface
    /// up, or while the worker finds out whether its network is open.
    #[test]
    fn a_network_that_is_closed_while_its_vm_is_launched_stays_closed() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(scratch.path()).unwrap();
        let mut passt = Command::new("sleep").arg("1000").spawn().unwrap();
        let link = RecordedLink::of(&HostLink::User { pid: passt.id() }).unwrap();
        let launched = |network| {
            let process = ProcessId::of(std::process::id());
            let vm_record = VmRecord { process, links: vec![link], network, ..record_with(None) };
            vm_record.replace(&dir, "web").unwrap();
            let (files, flight) = (Vec::new(), Arc::new(flight::make().unwrap()));
            let (dir, name) = (dir.clone(), "web".to_owned());
            WorkerResources {
                dir,
                name,
                vm_record,
                is_booted: false,
                files,
                flight,
                interface_claims: Vec::new(),
                overlays: None,
            }
        };
        let recorded = || VmRecord::found(&dir, "web").unwrap();
        let close = || VmRecord { network: Some(Link::Closed), ..recorded() }.replace(&dir, "web").unwrap();
        let none = Confinement::Require;
        // Open, and as the guest has it.
        launched(Some(Link::Open)).close_links(none).unwrap();
        assert_ne!(state(passt.id()), "T");
        launched(None).settle_network(Some(Link::Open), none).unwrap();
        assert!(state(passt.id()) != "T" && recorded().network == Some(Link::Open));
        let open = launched(Some(Link::Open));
        close();
        open.close_links(none).unwrap();
        wait_eq("it to stop", &"T".to_owned(), || state(passt.id()));
        let unknown = launched(None);
        close();
        unknown.settle_network(Some(Link::Open), none).unwrap();
        assert_eq!((state(passt.id()).as_str(), recorded().network), ("T", Some(Link::Closed)));
        passt.kill().unwrap();
        passt.wait().unwrap();
    }
}
