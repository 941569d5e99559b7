//! Forking a running VM.
//!
//! ```text
//!  parent   ──running──┤ kick │ freeze memory      │├──running──────────────
//!  vCPU threads               │ each saves its vCPU ││
//!  child                                             │ map layers │ restore │── first instruction
//! ```
//!
//! 1. [`Vm::pause_inner`]: every vCPU leaves KVM_RUN after it has completed the instruction it
//!    exited on. Then every device completes its current step: after the vCPUs, because they
//!    activate and reset devices. Requests that the kernel holds continue, into pinned pages.
//! 2. [`Vm::freeze_memory`], while the vCPU threads save their vCPUs: neither modifies data read by
//!    the other. No vCPU saves before all have left the guest (`vcpu/control.rs`).
//! 3. [`Vm::save_non_memory`]: devices, then vCPU states, then interrupt controllers. After 1,
//!    because this VM must not raise an interrupt in between. Disks are cloned with the devices, at
//!    the same instant. A request is done in the rings or in the device's list of those in flight,
//!    never both.
//! 4. [`Vm::unpause`]: the parent runs on. The image has everything for a child.
//! 5. [`Vm::from_image_as`], in a prepared VM: map the layers, restore the devices, then let each
//!    vCPU thread restore its vCPU (`vcpu/state.rs`). The last thread to do so restores the
//!    interrupt controllers and the clock ([`ForkImage::restore_controllers`]). Then devices
//!    resume, because the controllers' state would replace an interrupt raised earlier. Then the
//!    vCPUs run.
//!
//! A failure in steps 1-3 leaves no trace: the guard resumes the parent, and frozen pages stay
//! readable and writable to it (I13). A child is returned once all its vCPUs have loaded their
//! state. If one cannot, there is no child.

use clade_devices::virtio::DeviceState;
use clade_devices::virtio::net::Link;
use clade_host_io::sched::BoostGuard;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_block::DiskImage;
use clade_devices::virtio::Backend;
use clade_memory::{
    Backing, Erased, FreezeReport, GuestRam, NoWriters, Quiesced, RamError, RamImage, StopsWriters, Store,
};
use kvm_ioctls::VmFd;

use crate::kvm::{Clock, PlatformState, VcpuState, messages};
use crate::vm::config::VmConfig;
use crate::vm::context::Context;
use crate::vm::devices::{Devices, DevicesState};
use crate::vm::error::VmError;
use crate::vm::identity::{ChildIdentity, Endpoints, Identity, generation};
use crate::vm::machine::{Vm, VmParts};
use crate::vm::persist::{SaveTracker, SavedAt};
use crate::vm::timeline::{ChildStep, Timeline};
use crate::vm::vcpu::VcpuStart;

/// Returns whether a child may run ([`Vm::from_image_if`]).
pub type Admission = Arc<dyn Fn() -> bool + Send + Sync>;

/// How a child starts.
#[derive(Clone, Copy, Default)]
pub struct ChildOptions<'a> {
    /// Whether the child is paused until it is resumed.
    pub paused: bool,
    /// Bytes that are erased everywhere in the child's memory, before any other use of it: a reset
    /// to its origin does not bring them back, and its own children lack them too.
    pub erase: &'a [&'a [u8]],
    /// Called with the child's memory before its first instruction, to add data that its parent
    /// does not have.
    pub before_start: Option<&'a dyn Fn(&GuestRam)>,
}

impl fmt::Debug for ChildOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The erased bytes are secret.
        write!(f, "ChildOptions(paused: {}, erase: {})", self.paused, self.erase.len())
    }
}

/// The parts of a fork's time.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkTimes {
    /// From the request to the vCPUs until none was in the guest and the devices were quiesced.
    pub park: Duration,
    /// The time to freeze memory.
    pub freeze: Duration,
    /// The parent's whole pause: from the first vCPU kicked until all may run.
    pub pause: Duration,
}

/// The result of a fork, and its times.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkReport {
    /// The parts of its time.
    pub times: ForkTimes,
    /// The pages of the freeze.
    pub freeze: FreezeReport,
    /// Device requests in flight: the parent's continue, a child submits them again.
    pub in_flight: usize,
}

/// The state that step 3 saves.
struct NonMemoryState {
    devices: DevicesState,
    backends: Vec<Backend>,
    vcpus: Vec<VcpuState>,
    vm: PlatformState,
}

/// Steps 1 to 4: the parent.
impl Vm {
    /// Takes an image of the VM at one instant. The VM then runs on, or stays paused if it was.
    ///
    /// # Errors
    /// When the VM has stopped, or its state cannot be saved. The VM then runs on as before (I13).
    pub fn fork(&self) -> Result<(Arc<ForkImage>, ForkReport), VmError> {
        self.image().inspect(|(_, report)| self.pauses.fork.record(report.times.pause))
    }

    /// Steps 1 to 4, for a fork or for a snapshot.
    pub(crate) fn image(&self) -> Result<(Arc<ForkImage>, ForkReport), VmError> {
        let _one = self.operations.take();
        let _boost = BoostGuard::new();
        self.expect_whole()?;
        let begun = Instant::now();
        let guard = self.pause_inner(true)?;
        let parked = Instant::now();
        let (ram, freeze) = self.freeze_memory(&guard)?;
        let frozen = Instant::now();
        let NonMemoryState { devices, backends, vcpus, vm } = self.save_non_memory(&guard)?;
        // Step 4, by `unpause`.
        drop(guard);
        tracing::debug!(name = self.name(), park = ?parked - begun, freeze = ?frozen - parked, save = ?frozen.elapsed(), ?freeze, "fork");
        let times = ForkTimes { park: parked - begun, freeze: frozen - parked, pause: begun.elapsed() };
        let config = Arc::clone(&self.config);
        let in_flight = devices.in_flight();
        let (identity, generation) = (Arc::clone(&self.identity), self.generation.saturating_add(1));
        let image = ForkImage { config, ram, vcpus, vm, devices, backends, identity, generation, place: None };
        Ok((Arc::new(image), ForkReport { times, freeze, in_flight }))
    }

    /// Step 1: gets every vCPU out of the guest, then quiesces the devices. With `save`, each vCPU
    /// then saves itself.
    pub(crate) fn pause_inner(&self, save: bool) -> Result<PauseGuard<'_>, VmError> {
        self.prepared.control.pause(save)?;
        // After the vCPUs: one of them might be activating or resetting a device.
        self.devices.quiesce();
        Ok(PauseGuard { vm: self })
    }

    /// Step 2: freezes memory, while the vCPU threads save their vCPUs.
    fn freeze_memory(&self, paused: &PauseGuard<'_>) -> Result<(RamImage, FreezeReport), VmError> {
        Ok(self.prepared.ram.freeze(&paused.quiesced())?)
    }

    /// Step 3: saves everything but memory.
    fn save_non_memory(&self, _paused: &PauseGuard<'_>) -> Result<NonMemoryState, VmError> {
        let (devices, backends) = self.devices.save()?;
        // The controllers after the vCPUs: an interrupt they have delivered in between is in a
        // local APIC, one they hold is delivered again.
        let vcpus = self.prepared.control.collect()?;
        let vm = PlatformState::save(&self.prepared.fd, self.config.chips())?;
        Ok(NonMemoryState { devices, backends, vcpus, vm })
    }

    /// Step 4: resumes the devices, then the vCPUs, unless another pause is held.
    pub(crate) fn unpause(&self) {
        self.devices.resume();
        self.prepared.control.resume();
    }
}

/// Step 5: the child.
impl Vm {
    /// Starts a child from an image.
    ///
    /// # Errors
    /// When it cannot be made. Nothing of it is left then (I13).
    pub fn from_image(
        context: &Context,
        name: &str,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
    ) -> Result<Self, VmError> {
        let ends = image.endpoints(name, &ChildIdentity::default())?;
        Self::from_image_as(context, name, image, ends, options)
    }

    /// Starts a child with endpoints that were taken for it before: [`Vm::child_endpoints`],
    /// [`ForkImage::endpoints`].
    ///
    /// # Errors
    /// As [`Vm::from_image`].
    pub fn from_image_as(
        context: &Context,
        name: &str,
        image: &Arc<ForkImage>,
        ends: Endpoints,
        options: ChildOptions<'_>,
    ) -> Result<Self, VmError> {
        Self::from_image_if(context, name, image, ends, options, None)
    }

    /// The same for a child that runs only if it is admitted. `admission` is called when all but the vCPUs' states are in
    /// place. Its result is called by a vCPU's thread when these are too, and no device and no vCPU has run: to
    /// ask whoever waits for the child costs no further wake-up then.
    ///
    /// # Errors
    /// [`VmError::Unwanted`] if it is not admitted. As [`Vm::from_image_as`].
    pub fn from_image_if(
        context: &Context,
        name: &str,
        image: &Arc<ForkImage>,
        mut ends: Endpoints,
        options: ChildOptions<'_>,
        admission: Option<&dyn Fn(&Self) -> Admission>,
    ) -> Result<Self, VmError> {
        let _boost = BoostGuard::new();
        let timeline = Arc::new(Timeline::begin());
        let prepared = context.take_prepared(&image.config)?;
        timeline.mark(ChildStep::Prepared);
        prepared.ram.adopt(&image.ram)?;
        let (own, erased) = image.without(&prepared.ram, options.erase)?;
        timeline.mark(ChildStep::Memory);
        // After the memory, because devices check their rings there. The devices stay quiesced
        // until the last vCPU has its state.
        let saved = Some((&own.devices, own.backends.as_slice()));
        let devices = Arc::new(Devices::new(saved, &image.config, &prepared, &mut ends, context.has_report_port())?);
        timeline.mark(ChildStep::Devices);
        let (generation, origin) = (image.generation, Some(Arc::clone(&own)));
        let parts = VmParts { prepared, devices, ends, generation, origin, timeline: Some(Arc::clone(&timeline)) };
        let mut vm = Self::assemble(context, name, &image.config, parts)?;
        // That of the original, because erased pages have changed since it was saved.
        vm.saving = SaveTracker::of(image);
        vm.erased = erased;
        if image.config.has_acpi() {
            generation::renew(vm.ram().memory())?;
        }
        if let Some(before_start) = options.before_start {
            before_start(vm.ram());
        }
        if options.paused {
            vm.hold();
        }
        // Each vCPU thread restores its vCPU. The last one restores the controllers, and resumes
        // the devices.
        timeline.mark(ChildStep::Assembled);
        vm.start(&VcpuStart::Restore(own), admission.map(|admission| admission(&vm)))?;
        let steps = ChildStep::ALL.map(|step| (step.name(), timeline.at(step)));
        tracing::debug!(name, ?steps, "child");
        Ok(vm)
    }
}

/// A VM at one instant, from which any number of children start. It consists of plain values and
/// shared layers, so it does not depend on the parent.
#[derive(Clone, Debug)]
pub struct ForkImage {
    pub(crate) config: Arc<VmConfig>,
    pub(crate) ram: RamImage,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) vm: PlatformState,
    pub(crate) devices: DevicesState,
    pub(crate) backends: Vec<Backend>,
    /// The parent's identity, from which the identities of its children are derived.
    pub(crate) identity: Arc<Identity>,
    pub(crate) generation: u32,
    /// The parent's snapshot, if it was restored from one.
    pub(crate) place: Option<SavedAt>,
}

impl ForkImage {
    /// Closes the network devices of its children, whatever their state in the parent.
    pub fn close_network(&mut self) {
        for state in &mut self.devices.virtio {
            if let DeviceState::Net(net) = &mut state.device {
                net.link = Link::Closed;
            }
        }
    }

    /// Ends step 5 and a reset: restores interrupt controllers, clock and pending interrupts. After
    /// every vCPU has its own state, and before any runs.
    pub(crate) fn restore_controllers(&self, vm: &VmFd, devices: &Devices) -> Result<(), VmError> {
        // After every vCPU's own state: an interrupt held by the controllers is delivered to the
        // local APICs, and the clock is computed from the TSCs.
        self.vm.restore_chips(vm)?;
        self.vm.restore_clock(vm, Clock::CatchUp)?;
        // After the interrupt controllers, whose restore would lose an interrupt raised earlier. An
        // interrupt raised by a device of the parent may not have reached them when they were
        // saved.
        devices.reraise();
        devices.notify_events();
        let rung = messages::kick_again(vm, &self.vcpus).and_then(|()| devices.ring_doorbells(vm, self.config.cpus()));
        rung.map_err(|error| VmError::kvm("interrupt a vCPU", error))
    }

    /// Erases `secrets` in the memory of a child that has adopted the image. Returns the image to
    /// start it from, and the erased occurrences. If there were any, the image belongs to the child
    /// alone: a reset to the previous image would bring the secrets back.
    fn without(self: &Arc<Self>, ram: &GuestRam, secrets: &[&[u8]]) -> Result<(Arc<Self>, Erased), VmError> {
        // Its vCPUs and devices are not made yet.
        let quiesced = Quiesced::by(&NoWriters);
        let erased = ram.erase(secrets, &quiesced)?;
        if erased == Erased::default() {
            return Ok((Arc::clone(self), erased));
        }
        let (ram, _) = ram.freeze(&quiesced)?;
        Ok((Arc::new(Self { ram, ..Self::clone(self) }), erased))
    }

    /// The VM's configuration.
    #[must_use]
    pub fn config(&self) -> &Arc<VmConfig> {
        &self.config
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &RamImage {
        &self.ram
    }

    /// Copies the image, with its memory in new layers in `store`.
    ///
    /// # Errors
    /// When there is no memory for the copy.
    pub fn flatten(&self, store: &Store, grain: Backing) -> Result<Arc<Self>, RamError> {
        let ram = self.ram.flatten(store, grain)?;
        Ok(Arc::new(Self { ram, ..self.clone() }))
    }

    /// The disks, by slot, at the instant of the fork.
    pub fn disks(&self) -> impl Iterator<Item = &DiskImage> {
        self.backends.iter().filter_map(|backend| match backend {
            Backend::Disk(image) => Some(image),
            Backend::None => None,
        })
    }

    /// Takes the interfaces, addresses and sockets of a child called `name`: those of `choice`,
    /// otherwise the defaults of [`crate::vm::NetChoice`] and [`crate::vm::VsockChoice`].
    ///
    /// # Errors
    /// When one cannot be taken. Then none is taken (I13).
    pub fn endpoints(&self, name: &str, choice: &ChildIdentity) -> Result<Endpoints, VmError> {
        Ok(Endpoints::child(&self.config, &self.identity, name, choice)?)
    }

    /// The identity of the VM that the image was taken from; its children's are derived from it.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The number of forks between the VM that was booted and this image, counting this one.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }
}

/// A pause of a VM. The drop releases it, also when an error or a panic unwinds through it.
#[derive(Debug)]
pub struct PauseGuard<'a> {
    vm: &'a Vm,
}

impl PauseGuard<'_> {
    /// Proof that only the kernel writes to the VM's memory, through pins, while the guard is held:
    /// vCPUs are parked, and devices are quiesced.
    ///
    /// A [`Vm::reset`] by another thread is the exception: it pauses the VM too, and then replaces
    /// its memory. Do not reset a VM while the proof is in use.
    #[must_use]
    pub fn quiesced(&self) -> Quiesced<'_> {
        Quiesced::by(self)
    }
}

// vCPUs are parked and devices are quiesced from its creation until its drop.
impl StopsWriters for PauseGuard<'_> {}

impl Drop for PauseGuard<'_> {
    fn drop(&mut self) {
        self.vm.unpause();
    }
}
