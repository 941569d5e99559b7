//! A worker's grants and descriptors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::about::{About, inode};
use super::broker::Broker;
use super::cgroups::{Bounds, Group};
use super::net_hook::Interfaces;
use super::overlays::InUse;
use super::processes::{OwnVm, ProcessId};
use super::session::Live;
use crate::fleet::{FleetError, NameClaim, forget_ended};
use crate::flight;
use crate::jail::{Confinement, Grants};
use crate::secrets::SecretsRecord;
use crate::worker::{EnterOrder, Handed, Shape};
use clade_vmm::vm::{Endpoints, VmConfig};

/// The grants of workers in a runtime directory.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) dir: PathBuf,
    pub(super) confinement: Confinement,
}

impl Place {
    /// Returns the order for a worker that works with the memory of a VM of `config`, and opens
    /// `disks` disks.
    pub(super) fn order(&self, config: &VmConfig, disks: usize, grants: Grants) -> EnterOrder {
        let (dir, confinement, ram) = (self.dir.clone(), self.confinement, config.layout().bytes());
        EnterOrder { dir, confinement, grants, disks, ram }
    }

    /// Returns the order for a child.
    pub(super) fn of_child(&self, shape: &Shape) -> EnterOrder {
        let grants = Grants::of_child(&shape.config, &shape.overlays, &shape.saved);
        self.order(&shape.config, shape.config.disks.len(), grants)
    }

    /// Returns the order for a worker that opens the snapshot of VMs of `shape`. Compressed disks
    /// are unpacked in the directory of overlays.
    pub(super) fn of_opener(&self, shape: &Shape) -> EnterOrder {
        let overlays = shape.overlays.first().cloned().into_iter().collect();
        self.order(&shape.config, 0, Grants { dirs: shape.saved.clone(), overlays, ..Grants::default() })
    }

    /// Returns the order for a VM that is booted.
    pub(super) fn of_boot(&self, config: &VmConfig, kernel: &Path, initrd: Option<&Path>) -> EnterOrder {
        self.order(config, config.disks.len(), Grants::of_boot(config, kernel, initrd))
    }
}

/// A VM to be started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start<'a> {
    pub(super) shape: &'a Shape,
    /// The session whose command it ends with.
    pub(super) session: Option<&'a Live<'a>>,
    /// The VM that it is forked from.
    pub(super) parent: Option<&'a str>,
    pub(super) bounds: Bounds,
    pub(super) secrets: Option<&'a SecretsRecord>,
    /// The worker.
    pub(super) pid: u32,
}

/// The descriptors of one VM, on their way to its worker. A drop removes the files made for it
/// outside of the runtime directory, unless the VM is kept.
#[derive(Debug)]
pub(super) struct Hand {
    about: About,
    /// Whether the VM is booted, and not forked.
    is_booted: bool,
    files: Vec<OwnedFd>,
    /// The file of its flight record, read at its end.
    flight: Arc<OwnedFd>,
    /// None once the VM is kept.
    overlays: Option<InUse>,
}

impl Hand {
    /// Makes the files of a VM that uses `overlays`, and records the VM.
    ///
    /// # Errors
    /// When a file cannot be made. Then none stays.
    pub(super) fn make(
        claim: &NameClaim,
        start: Start<'_>,
        overlays: InUse,
        ends: Endpoints,
        broker: &Broker,
    ) -> Result<(Self, Handed), FleetError> {
        let failed = |source| FleetError::Worker { source };
        let (identity, paths) = (ends.identity().clone(), overlays.paths.clone());
        let socket = identity.vsock.as_ref().and_then(|vsock| inode(&vsock.socket));
        let Start { shape, session: live, parent, bounds, secrets, pid } = start;
        let session = live.map(|live| live.session.clone());
        let (process, parent) = (ProcessId::of(pid), parent.map(str::to_owned));
        let about = About {
            shape: shape.clone(),
            identity,
            overlays: paths,
            socket,
            session,
            process,
            parent,
            bounds,
            secrets: secrets.cloned(),
        };
        let vsock = about.identity.vsock.as_ref();
        let broker = vsock.map(|vsock| broker.connect(vsock.socket.clone())).transpose().map_err(failed)?;
        let flight = Arc::new(flight::make().map_err(failed)?);
        let (ends, devices) = ends.hand_over(broker).map_err(failed)?;
        // From here on this owns the socket's file.
        let mut hand = Self { about, is_booted: false, files: Vec::new(), flight, overlays: Some(overlays) };
        let (sockets, record) = claim.hand_over(shape.config.virtio_console)?;
        forget_ended(claim.dir(), &claim.name);
        hand.about.write(claim)?;
        let (sockets, listeners): (Vec<_>, Vec<_>) = sockets.into_iter().unzip();
        hand.files.push(record);
        hand.files.push(hand.flight.try_clone().map_err(failed)?);
        let command = live.map(|live| live.as_fd().try_clone_to_owned());
        hand.files.extend(command.transpose().map_err(failed)?);
        hand.files.extend(listeners);
        hand.files.extend(devices);
        Ok((hand, Handed { is_tied: live.is_some(), sockets, ends }))
    }

    /// Marks the VM as booted: it may write its disks' images.
    pub(super) fn booted(mut self) -> Self {
        self.is_booted = true;
        self
    }

    /// Returns the interfaces of the VM called `name`.
    pub(super) fn interfaces(&self, name: &str) -> Interfaces {
        self.about.interfaces(name)
    }

    /// Returns the VM called `name`, with its `process` and its `group`.
    pub(super) fn own_vm(&self, name: &str, process: OwnedFd, group: Option<Group>) -> OwnVm {
        let vm = OwnVm::new(name, process, &self.about.shape.config, self.is_booted);
        let session = self.about.session.as_ref().map(|session| session.name.clone());
        vm.in_group(group).in_session(session).recorded_in(&self.flight)
    }

    /// Returns the descriptors, behind the lock of `claim`.
    pub(super) fn files<'a>(&'a self, claim: &'a NameClaim) -> Vec<BorrowedFd<'a>> {
        claim.lock().into_iter().chain(self.files.iter().map(AsFd::as_fd)).collect()
    }

    /// Closes the descriptors: the worker has its own.
    pub(super) fn sent(&mut self) {
        self.files.clear();
    }

    /// Leaves the files to the VM, which runs.
    pub(super) fn keep(mut self) {
        self.overlays.take().into_iter().for_each(InUse::keep);
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        if self.overlays.is_some() {
            self.about.remove_sockets();
        }
    }
}
