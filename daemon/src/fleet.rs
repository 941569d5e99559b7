//! The VM of this process: its name, its sockets and its end. Also the rules for names, locks and
//! records of ended VMs that all processes of a runtime directory share.

mod dir;
mod ended;
mod error;
mod labels;
mod names;
mod problem;
mod release;
mod room;
mod settings;
mod shutdown;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::console::Line;
use crate::secrets::Secrets;
use clade_vmm::vm::{Context, Leases, StopReason, Vm, VmError};

pub use names::Cancel;
pub(crate) use names::{check_names, claim_names};

pub(crate) use dir::about;
pub use dir::{
    LONGEST_NAME, LONGEST_SOCKET_PATH, check_name, console_path, image_path, log_path, open_log, runtime_dir,
    socket_path, supervisor_path, virtio_console_path,
};
pub(crate) use dir::{NameClaim, RuntimeDir, SupervisorClaim, VmFiles, vm_names};
pub use ended::{EndedVm, ended_vms};
pub(crate) use ended::{forget as forget_ended, last_output, record_end, recorded_reason, settle};
pub use error::{CancelReason, FleetError, MAX_CHILDREN};
pub use labels::{Label, LabelError, Labels};
use release::{InUse, Tail};
pub use room::RoomError;
pub(crate) use room::{Needs, check as check_room, check_share, most_running, processors, runnable_threads};
pub use settings::KeptSettings;
pub use shutdown::Shutdown;

/// Time limit of a stopped VM to release its interfaces, sockets and name. Disks wait for the
/// kernel for 2 s.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Member {
    listed: Listed,
    /// The record of its end.
    record: File,
    /// Its sockets are served until this is dropped.
    _serving: Serving,
}

/// A VM, and its description.
#[derive(Clone, Debug)]
pub struct Listed {
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

/// The parts of a [`Listed`] that its VM does not know.
#[derive(Debug)]
pub(crate) struct Description {
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
pub struct Fleet(Arc<Inner>);

struct Inner {
    context: Context,
    member: Mutex<Option<Member>>,
    /// Whether the VM has devices, disks and a name.
    in_use: Arc<InUse>,
    /// Images that VMs in other processes use.
    leases: Leases,
    serve: Box<dyn Serve>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fleet({:?})", self.member().as_ref().map(|member| member.listed.vm.name()))
    }
}

/// A handle that does not keep the VM alive: its server holds one.
#[derive(Clone)]
pub(crate) struct WeakFleet(Weak<Inner>);

impl WeakFleet {
    pub(crate) fn upgrade(&self) -> Option<Fleet> {
        self.0.upgrade().map(Fleet)
    }

    /// Returns a handle to a fleet that has gone.
    #[cfg(test)]
    pub(crate) fn gone() -> Self {
        Self(Weak::new())
    }
}

impl Fleet {
    /// Creates the fleet of a VM that the result of `serve` serves.
    pub(crate) fn new(context: &Context, serve: impl FnOnce(WeakFleet) -> Box<dyn Serve>) -> Self {
        Self(Arc::new_cyclic(|weak| Inner {
            context: context.clone(),
            member: Mutex::default(),
            in_use: Arc::default(),
            leases: Leases::default(),
            serve: serve(WeakFleet(weak.clone())),
        }))
    }

    #[cfg(test)]
    pub(crate) fn downgrade(&self) -> WeakFleet {
        WeakFleet(Arc::downgrade(&self.0))
    }

    fn member(&self) -> MutexGuard<'_, Option<Member>> {
        self.0.member.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers open requests before the process ends: a client that stops the VM waits for its
    /// answer.
    pub fn finish(&self) {
        self.0.serve.finish();
    }

    /// Makes the VM under a claimed name. Lists it and serves its sockets once `is_wanted` returns
    /// true. `is_wanted` may let the VM run; no other code can before.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn launch(
        &self,
        claim: NameClaim,
        files: VmFiles,
        about: Description,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
        is_wanted: impl FnOnce(&Vm) -> bool,
    ) -> Result<Option<Arc<Vm>>, FleetError> {
        let mut vm = make(&self.0.context)?;
        let VmFiles { control, image, console, hvc, record } = files;
        let consoles = [(Line::Serial, console)].into_iter().chain(hvc.map(|hvc| (Line::Virtio, hvc))).collect();
        // Dropped after its devices: a name is free only once nothing of its VM is in use.
        vm.drop_last(Tail::new(claim, &self.0.in_use));
        let vm = Arc::new(vm);
        if !is_wanted(&vm) {
            return Ok(None);
        }
        // Requests wait until the VM is listed.
        let mut member = self.member();
        let serving = self.0.serve.begin(Sockets { control, image, consoles }, &vm, &self.0.leases);
        let Description { parent, labels, secrets, reports_ready } = about;
        let listed = Listed { vm: Arc::clone(&vm), parent, labels, secrets, reports_ready };
        *member = Some(Member { listed, record, _serving: serving });
        drop(member);
        Ok(Some(vm))
    }

    /// Returns the VM if its name is `name`.
    ///
    /// # Errors
    /// When it has another name, or has ended.
    pub fn get(&self, name: &str) -> Result<Listed, FleetError> {
        let member = self.member();
        let found = member.as_ref().map(|member| &member.listed).filter(|listed| listed.vm.name() == name);
        found.cloned().ok_or_else(|| FleetError::NoSuchVm { name: name.to_owned() })
    }

    /// Returns the VM, unless it has ended.
    #[must_use]
    pub fn listed(&self) -> Option<Listed> {
        self.member().as_ref().map(|member| member.listed.clone())
    }

    /// Stops the VM, and waits until its name, interfaces, addresses and sockets are free. Returns
    /// the result of `describe`, which is called when the VM has stopped.
    ///
    /// # Errors
    /// When there is no such VM, or some resource of it stays in use.
    pub fn stop<T>(&self, name: &str, describe: impl FnOnce(&Listed) -> T) -> Result<T, FleetError> {
        self.stop_listed(self.get(name)?, describe)
    }

    /// Stops the VM for a `reason` that is recorded, and waits until its name is free.
    ///
    /// # Errors
    /// When there is no such VM, or some resource of it stays in use.
    pub(crate) fn end(&self, name: &str, reason: StopReason) -> Result<(), FleetError> {
        self.get(name)?.vm.stop_because(reason);
        // Unless the thread that waits for the VM's end was quicker.
        self.remove();
        if self.0.in_use.wait_for_none(RELEASE_TIMEOUT) {
            return Ok(());
        }
        Err(FleetError::Unreleased { name: name.to_owned(), seconds: RELEASE_TIMEOUT.as_secs() })
    }

    fn stop_listed<T>(&self, listed: Listed, describe: impl FnOnce(&Listed) -> T) -> Result<T, FleetError> {
        let name = listed.vm.name().to_owned();
        listed.vm.stop();
        let described = describe(&listed);
        // Another thread may hold the last handle.
        drop(listed);
        // Its threads are joined here, unless another thread has removed it or still holds a
        // handle.
        drop(self.take());
        if !self.0.in_use.wait_for_none(RELEASE_TIMEOUT) {
            return Err(FleetError::Unreleased { name, seconds: RELEASE_TIMEOUT.as_secs() });
        }
        Ok(described)
    }

    fn take(&self) -> Option<Member> {
        self.member().take()
    }

    /// Removes the VM. It ends with its last handle. If it stopped by itself, the reason is
    /// recorded ([`EndedVm`]).
    pub fn remove(&self) {
        if let Some(Member { listed, record, .. }) = self.take() {
            ended::record(record, &listed.vm, listed.parent.as_deref());
            listed.vm.stop();
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
