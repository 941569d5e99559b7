//! Forking a running VM.
//!
//! ```text
//!  parent   ──running──┤ kick │ freeze memory          │├──running──────────────
//!  vCPU threads               │ each saves its own vCPU ││
//!  child                                                 │ map layers │ restore │── first instruction
//! ```
//!
//! 1. Pause: every vCPU leaves KVM_RUN, having completed the instruction it exited on. Then every device finishes what it is at: after the
//!    vCPUs, because they activate and reset devices. What the kernel has of their requests goes on, into pinned pages.
//! 2. Freeze memory, while the vCPU threads save their vCPUs: neither touches what the other reads. No vCPU saves before
//!    all have left the guest ([`vcpu_control`](crate::vm::vcpu_control)).
//! 3. Save devices and interrupt controllers: after 1, because nothing of this VM may raise an interrupt in between. Disks are cloned with
//!    them, at the same instant: a request is in the rings as done, or in the device's list of those in flight, never both.
//! 4. Resume the parent: all that is needed is in the image.
//! 5. In a prepared VM: map the layers, restore devices and VM state, then let each vCPU thread restore its vCPU and run. Devices go on before the
//!    first vCPU runs but after the interrupt controllers have their state, which would forget an interrupt raised earlier. The child is answered
//!    for once all its vCPUs have taken their state; if one cannot, there is no child.
//!
//! Steps 1-3 fail without a trace: the guard resumes the parent, and a frozen page is still readable and writable to it (I13).

use std::sync::Arc;
use std::time::Duration;

use clade_devices::disk::DiskImage;
use clade_devices::virtio::Backend;
use clade_memory::{Backing, FreezeReport, Quiesced, RamError, RamImage, StopsWriters, Store};

use crate::kvm::{VcpuState, VmState};
use crate::vm::VmError;
use crate::vm::config::VmConfig;
use crate::vm::devices::DeviceState;
use crate::vm::identity::{ChildIdentity, Endpoints, Identity};
use crate::vm::snapshot::SavedAt;

/// A VM at one instant: starts any number of children. Plain values and shared layers; the parent may go on or go away.
#[derive(Clone, Debug)]
pub struct ForkImage {
    pub(crate) config: Arc<VmConfig>,
    pub(crate) ram: RamImage,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) vm: VmState,
    pub(crate) devices: DeviceState,
    pub(crate) backends: Vec<Backend>,
    /// The parent's, which its children's are derived from.
    pub(crate) identity: Arc<Identity>,
    pub(crate) generation: u32,
    /// Where it stands on disk, if it was restored from there.
    pub(crate) place: Option<SavedAt>,
}

impl ForkImage {
    /// The shape of the VM.
    #[must_use]
    pub fn config(&self) -> &Arc<VmConfig> {
        &self.config
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &RamImage {
        &self.ram
    }

    /// The same image with its memory copied into layers of its own, in `store`.
    ///
    /// # Errors
    /// When there is no memory for the copy.
    pub fn flatten(&self, store: &Store, grain: Backing) -> Result<Arc<Self>, RamError> {
        let ram = self.ram.flatten(store, grain)?;
        Ok(Arc::new(Self { ram, ..self.clone() }))
    }

    /// The disks, by place, at the instant of the fork.
    pub fn disks(&self) -> impl Iterator<Item = &DiskImage> {
        self.backends.iter().filter_map(|backend| match backend {
            Backend::Disk(image) => Some(image),
            Backend::None => None,
        })
    }

    /// Takes what a child called `name` will have alone: what `choice` says, the rest as [`crate::vm::NetChoice`] and
    /// [`crate::vm::VsockChoice`] say.
    ///
    /// # Errors
    /// When it cannot be had; nothing is taken then (I13).
    pub fn endpoints(&self, name: &str, choice: &ChildIdentity) -> Result<Endpoints, VmError> {
        Ok(Endpoints::child(&self.config, &self.identity, name, choice)?)
    }

    /// How many forks lie between this image and the VM that was booted, counting this one.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }
}

/// Where the time of a fork went.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkTimes {
    /// From asking the vCPUs to stop until none was in the guest.
    pub park: Duration,
    /// Freezing memory.
    pub freeze: Duration,
    /// The parent's whole pause: from the first vCPU kicked to all let go.
    pub pause: Duration,
}

/// What a fork of memory did and how long it took.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkReport {
    /// Times.
    pub times: ForkTimes,
    /// Pages.
    pub freeze: FreezeReport,
    /// Requests to devices that were in flight: the parent's go on, a child's are done again.
    pub in_flight: usize,
}

/// A pause held on a VM. Dropped, the VM runs again: also when an error or a panic unwinds through it.
#[derive(Debug)]
pub struct PauseGuard<'a> {
    vm: &'a crate::vm::Vm,
}

impl<'a> PauseGuard<'a> {
    /// Only [`crate::vm::Vm`] makes one, after the vCPUs have parked.
    pub(crate) fn new(vm: &'a crate::vm::Vm) -> Self {
        Self { vm }
    }

    /// Nothing of this VM writes to its memory while the guard is held but the kernel, through pins: vCPUs are parked, and devices stand still.
    #[must_use]
    pub fn quiesced(&self) -> Quiesced<'_> {
        Quiesced::by(self)
    }
}

// vCPUs have parked and devices stand still from when it is made until it is dropped.
impl StopsWriters for PauseGuard<'_> {}

impl Drop for PauseGuard<'_> {
    fn drop(&mut self) {
        self.vm.unpause();
    }
}
