//! The VM of this process: its name, its sockets and its end.

mod ended;
mod release;
mod shutdown;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::console::Line;
use clade_api::secrets::Secrets;
use clade_vmm::vm::{Context, Leases, StopReason, Vm, VmError};

use clade_api::{DaemonError, Labels, NameClaim, VmFiles};
pub(crate) use ended::last_output;
use release::{ReleaseOnDrop, ResourceUse};
pub use shutdown::Shutdown;

/// Time limit of a stopped VM to release its interfaces, sockets and name. Disks wait for the
/// kernel for 2 s.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct VmSlot {
    entry: VmEntry,
    /// The record of its end.
    record: File,
    /// Its sockets are served until this is dropped.
    _serving: Serving,
}

/// A VM, and its description.
#[derive(Clone, Debug)]
pub struct VmEntry {
    /// The VM.
    pub vm: Arc<Vm>,
    /// The name of its parent, if it has one.
    pub parent: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// The secrets that its children may be made without.
    pub(crate) secrets: Secrets,
    /// Whether its guest reports that it is ready.
    pub(crate) reports_ready: bool,
}

/// The parts of a [`VmEntry`] that its VM does not know.
#[derive(Debug)]
pub(crate) struct VmDescription {
    pub(crate) parent: Option<String>,
    pub(crate) labels: Labels,
    pub(crate) secrets: Secrets,
    pub(crate) reports_ready: bool,
}

/// The sockets of a VM, bound and not yet served.
pub(crate) struct Sockets {
    pub(crate) control: UnixListener,
    /// Socket for requests of other processes for its image.
    pub(crate) image: OwnedFd,
    pub(crate) consoles: Vec<(Line, UnixListener)>,
}

/// Accepts connections on the sockets of a VM until it is dropped. Open connections stay.
pub(crate) struct Serving {
    _until_dropped: Box<dyn Send + Sync>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serving")
    }
}

impl Serving {
    pub(crate) fn new(until_dropped: impl Send + Sync + 'static) -> Self {
        Self { _until_dropped: Box::new(until_dropped) }
    }
}

/// The server of a VM's sockets.
pub(crate) trait Serve: Send + Sync {
    /// Begins to serve. Images that other processes use are held in `leases`.
    fn begin(&self, sockets: Sockets, vm: &Arc<Vm>, leases: &Leases) -> Serving;
    /// Answers the requests that are open, and accepts no others.
    fn finish(&self);
}

/// The VM of this process, once it is made. Clones are handles to the same VM.
#[derive(Clone)]
pub struct VmHost(Arc<Inner>);

struct Inner {
    context: Context,
    slot: Mutex<Option<VmSlot>>,
    /// Whether the VM has devices, disks and a name.
    in_use: Arc<ResourceUse>,
    /// Images that VMs in other processes use.
    leases: Leases,
    serve: Box<dyn Serve>,
}

impl std::fmt::Debug for VmHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VmHost({:?})", self.slot().as_ref().map(|slot| slot.entry.vm.name()))
    }
}

/// A handle that does not keep the VM alive: its server holds one.
#[derive(Clone)]
pub(crate) struct WeakVmHost(Weak<Inner>);

impl WeakVmHost {
    pub(crate) fn upgrade(&self) -> Option<VmHost> {
        self.0.upgrade().map(VmHost)
    }

    /// Returns a handle to a VM host that has gone.
    #[cfg(test)]
    pub(crate) fn gone() -> Self {
        Self(Weak::new())
    }
}

impl VmHost {
    /// Creates the VM host of a VM that the result of `serve` serves.
    pub(crate) fn new(context: &Context, serve: impl FnOnce(WeakVmHost) -> Box<dyn Serve>) -> Self {
        Self(Arc::new_cyclic(|weak| Inner {
            context: context.clone(),
            slot: Mutex::default(),
            in_use: Arc::default(),
            leases: Leases::default(),
            serve: serve(WeakVmHost(weak.clone())),
        }))
    }

    #[cfg(test)]
    pub(crate) fn downgrade(&self) -> WeakVmHost {
        WeakVmHost(Arc::downgrade(&self.0))
    }

    fn slot(&self) -> MutexGuard<'_, Option<VmSlot>> {
        self.0.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers open requests before the process ends: a client that stops the VM waits for its
    /// answer.
    pub fn finish(&self) {
        self.0.serve.finish();
    }

    /// Makes the VM under a claimed name. Lists it and serves its sockets once `is_wanted` returns
    /// true. `is_wanted` may let the VM run, unless `make` has made one that runs ([`Vm::from_image_if`]).
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn launch(
        &self,
        claim: NameClaim,
        files: VmFiles,
        description: VmDescription,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
        is_wanted: impl FnOnce(&Vm) -> bool,
    ) -> Result<Option<Arc<Vm>>, DaemonError> {
        let mut vm = make(&self.0.context)?;
        let VmFiles { control, image, console, hvc, record } = files;
        let consoles = [(Line::Serial, console)].into_iter().chain(hvc.map(|hvc| (Line::Virtio, hvc))).collect();
        // Dropped after its devices: a name is free only once nothing of its VM is in use.
        vm.drop_last(ReleaseOnDrop::new(claim, &self.0.in_use));
        let vm = Arc::new(vm);
        if !is_wanted(&vm) {
            return Ok(None);
        }
        // Requests wait until the VM is listed.
        let mut slot = self.slot();
        let serving = self.0.serve.begin(Sockets { control, image, consoles }, &vm, &self.0.leases);
        let VmDescription { parent, labels, secrets, reports_ready } = description;
        let entry = VmEntry { vm: Arc::clone(&vm), parent, labels, secrets, reports_ready };
        *slot = Some(VmSlot { entry, record, _serving: serving });
        drop(slot);
        Ok(Some(vm))
    }

    /// Returns the VM if its name is `name`.
    ///
    /// # Errors
    /// When it has another name, or has ended.
    pub fn get(&self, name: &str) -> Result<VmEntry, DaemonError> {
        let slot = self.slot();
        let found = slot.as_ref().map(|slot| &slot.entry).filter(|entry| entry.vm.name() == name);
        found.cloned().ok_or_else(|| DaemonError::NoSuchVm { name: name.to_owned() })
    }

    /// Returns the VM, unless it has ended.
    #[must_use]
    pub fn entry(&self) -> Option<VmEntry> {
        self.slot().as_ref().map(|slot| slot.entry.clone())
    }

    /// Stops the VM, and waits until its name, interfaces, addresses and sockets are free. Returns
    /// the result of `describe`, which is called when the VM has stopped.
    ///
    /// # Errors
    /// When there is no such VM, or some resource of it stays in use.
    pub fn stop<T>(&self, name: &str, describe: impl FnOnce(&VmEntry) -> T) -> Result<T, DaemonError> {
        self.stop_entry(self.get(name)?, describe)
    }

    /// Stops the VM for a `reason` that is recorded, and waits until its name is free.
    ///
    /// # Errors
    /// When there is no such VM, or some resource of it stays in use.
    pub(crate) fn end(&self, name: &str, reason: StopReason) -> Result<(), DaemonError> {
        self.get(name)?.vm.stop_because(reason);
        // Unless the thread that waits for the VM's end was quicker.
        self.remove();
        if self.0.in_use.wait_for_none(RELEASE_TIMEOUT) {
            return Ok(());
        }
        Err(DaemonError::Unreleased { name: name.to_owned(), seconds: RELEASE_TIMEOUT.as_secs() })
    }

    fn stop_entry<T>(&self, entry: VmEntry, describe: impl FnOnce(&VmEntry) -> T) -> Result<T, DaemonError> {
        let name = entry.vm.name().to_owned();
        entry.vm.stop();
        let described = describe(&entry);
        // Another thread may hold the last handle.
        drop(entry);
        // Its threads are joined here, unless another thread has removed it or still holds a
        // handle.
        drop(self.take());
        if !self.0.in_use.wait_for_none(RELEASE_TIMEOUT) {
            return Err(DaemonError::Unreleased { name, seconds: RELEASE_TIMEOUT.as_secs() });
        }
        Ok(described)
    }

    fn take(&self) -> Option<VmSlot> {
        self.slot().take()
    }

    /// Removes the VM. It ends with its last handle. If it stopped by itself, the reason is
    /// recorded ([`clade_api::EndedVm`]).
    pub fn remove(&self) {
        if let Some(VmSlot { entry, record, .. }) = self.take() {
            ended::record(record, &entry.vm, entry.parent.as_deref());
            entry.vm.stop();
        }
    }

    /// Images that VMs in other processes use.
    #[must_use]
    pub fn leases(&self) -> &Leases {
        &self.0.leases
    }

    /// Waits up to `timeout` until nothing of the VM is in use, whichever thread holds a handle.
    /// Returns whether that is so.
    pub fn wait_until_unused(&self, timeout: Duration) -> bool {
        self.0.in_use.wait_for_none(timeout)
    }
}

#[cfg(test)]
pub(crate) mod tests;
