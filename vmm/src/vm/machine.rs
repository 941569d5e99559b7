//! A VM from boot or fork to its end.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clade_devices::disk::Disk;
use clade_devices::virtio::block::Block;
use clade_devices::{COM1_GSI, Console};
use clade_memory::{GuestRam, RamStats};

use crate::boot::{self, BootSource};
use crate::kvm::VmState;
use crate::vm::VmError;
use crate::vm::config::{Irqchip, VmConfig};
use crate::vm::context::Context;
use crate::vm::devices::{Devices, Reports};
use crate::vm::fork::{ForkImage, ForkReport, ForkTimes, PauseGuard};
use crate::vm::generation::{self, GenerationError};
use crate::vm::identity::{ChildIdentity, Claims, Endpoints, Identity};
use crate::vm::prepared::PreparedVm;
use crate::vm::sched::BoostGuard;
use crate::vm::snapshot::Saving;
use crate::vm::stop::StopReason;
use crate::vm::ticket_lock::TicketLock;
use crate::vm::vcpu::{Start, StartCommand};

/// How a child starts.
#[derive(Clone, Copy, Default)]
pub struct ChildOptions<'a> {
    /// Not running until it is resumed.
    pub paused: bool,
    /// Called with the child's memory before its first instruction: to give it something that its parent does not have.
    pub before_start: Option<&'a dyn Fn(&GuestRam)>,
}

impl fmt::Debug for ChildOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChildOptions(paused: {})", self.paused)
    }
}

/// What a VM is put together from.
struct Parts {
    prepared: PreparedVm,
    devices: Arc<Devices>,
    ends: Endpoints,
    generation: u32,
    origin: Option<Arc<ForkImage>>,
}

/// A virtual machine that runs, is paused, or has stopped.
#[derive(Debug)]
pub struct Vm {
    name: String,
    pub(crate) config: Arc<VmConfig>,
    context: Context,
    pub(crate) prepared: PreparedVm,
    pub(crate) devices: Arc<Devices>,
    pub(crate) identity: Arc<Identity>,
    generation: u32,
    born: Instant,
    /// After the devices, whose interfaces and addresses they hold.
    _claims: Claims,
    /// Whether its owner has paused it (guards pause it beside that).
    pub(crate) held: AtomicBool,
    /// Whether a reset has failed half-way: memory, vCPUs and devices are of no one instant.
    pub(crate) inconsistent: AtomicBool,
    /// What it was started from.
    pub(crate) origin: Mutex<Option<Arc<ForkImage>>>,
    /// One fork, reset, pause or resume at a time.
    pub(crate) operations: TicketLock,
    pub(crate) saving: Saving,
    /// Last: see [`Vm::drop_last`].
    tail: Tail,
}

/// What is dropped after everything else of a VM.
#[derive(Default)]
struct Tail(Vec<Box<dyn Send + Sync>>);

impl fmt::Debug for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tail({})", self.0.len())
    }
}

impl Vm {
    /// Boots a guest.
    ///
    /// # Errors
    /// When the VM cannot be made or the guest not be loaded.
    pub fn boot(context: &Context, name: &str, config: &Arc<VmConfig>, source: &BootSource) -> Result<Self, VmError> {
        config.check_devices()?;
        let mut ends = Endpoints::boot(config)?;
        let prepared = context.take_prepared(config)?;
        prepared.ram.populate()?;
        let layout = boot::RamLayout::of_memory(prepared.ram.memory())?;
        let quirks = context.host().quirks();
        // A kernel without ACPI or a device tree finds virtio devices in no other way.
        let cmdline = format!("{}{}", quirks.extend_cmdline(&source.cmdline), config.device_args());
        let added = cmdline.len() - source.cmdline.len();
        let source = BootSource { cmdline: cmdline.trim_start().to_owned(), ..source.clone() };
        let mut firmware = boot::Firmware { cpus: config.cpus(), rsdp: None };
        if config.has_generation() {
            let mem = prepared.ram.memory();
            generation::begin(mem)?;
            let tables = boot::write_acpi_tables(mem, config.cpus(), config.virtio_queues().count());
            firmware.rsdp = Some(tables.map_err(GenerationError::from)?);
        }
        let loaded =
            boot::load(prepared.ram.memory(), &layout, &source, &firmware).map_err(|error| error.without(added))?;
        let devices = Arc::new(Devices::new(None, config, &prepared, &mut ends)?);
        let vm = Self::assemble(context, name, config, Parts { prepared, devices, ends, generation: 0, origin: None })?;
        vm.start(&Start::Boot(loaded.entry))?;
        Ok(vm)
    }

    /// Starts a child from an image.
    ///
    /// # Errors
    /// When it cannot be made; nothing of it is left then (I13).
    pub fn from_image(
        context: &Context,
        name: &str,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
    ) -> Result<Self, VmError> {
        let ends = image.endpoints(name, &ChildIdentity::default())?;
        Self::from_image_as(context, name, image, ends, options)
    }

    /// Starts a child with what was taken for it before: [`Vm::child_endpoints`], [`ForkImage::endpoints`].
    ///
    /// # Errors
    /// As [`Vm::from_image`].
    pub fn from_image_as(
        context: &Context,
        name: &str,
        image: &Arc<ForkImage>,
        mut ends: Endpoints,
        options: ChildOptions<'_>,
    ) -> Result<Self, VmError> {
        let _urgent = BoostGuard::new();
        let begun = Instant::now();
        let prepared = context.take_prepared(&image.config)?;
        let have_prepared = Instant::now();
        prepared.ram.adopt(&image.ram)?;
        let adopted = Instant::now();
        // After the memory, in which rings are checked.
        let saved = Some((&image.devices, image.backends.as_slice()));
        let devices = Arc::new(Devices::new(saved, &image.config, &prepared, &mut ends)?);
        let parts = Parts { prepared, devices, ends, generation: image.generation, origin: Some(Arc::clone(image)) };
        let mut vm = Self::assemble(context, name, &image.config, parts)?;
        vm.saving = Saving::of(image);
        if image.config.has_generation() {
            generation::renew(vm.ram().memory())?;
        }
        if let Some(before_start) = options.before_start {
            before_start(vm.ram());
        }
        if options.paused {
            vm.held.store(true, Ordering::Release);
            vm.prepared.control.start_paused();
            vm.devices.quiesce();
        }
        vm.start(&Start::Restore(Arc::clone(image)))?;
        tracing::debug!(name, prepared = ?have_prepared - begun, adopt = ?adopted - have_prepared, start = ?adopted.elapsed(), "child");
        Ok(vm)
    }

    fn assemble(context: &Context, name: &str, config: &Arc<VmConfig>, parts: Parts) -> Result<Self, VmError> {
        let Parts { prepared, devices, ends, generation, origin } = parts;
        if config.irqchip == Irqchip::Full {
            devices
                .with_serial_irq(|irq| prepared.fd.register_irqfd(irq.eventfd(), COM1_GSI))
                .map_err(|e| VmError::kvm("connect the console's interrupt", e))?;
        }
        // Its pages may still be on their way, or on a disk: if one can never come, the VM stops with the reason, and never reads zeros.
        // Weak: memory is held by devices, which vCPUs' orders hold. A VM would hold itself.
        let control = Arc::downgrade(&prepared.control);
        prepared.ram.on_failure(move |error| {
            if let Some(control) = control.upgrade() {
                control.stop(StopReason::MemoryLost { error: crate::error_chain(error.as_ref()) });
            }
        });
        Ok(Self {
            name: name.to_owned(),
            config: Arc::clone(config),
            context: context.clone(),
            prepared,
            devices,
            identity: Arc::new(ends.identity),
            generation,
            _claims: ends.claims,
            born: Instant::now(),
            held: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            origin: Mutex::new(origin),
            operations: TicketLock::default(),
            saving: Saving::default(),
            tail: Tail::default(),
        })
    }

    /// Keeps `what` until the VM is dropped, and drops it after everything else of the VM: threads, devices, interfaces, memory.
    pub fn drop_last(&mut self, what: impl Send + Sync + 'static) {
        self.tail.0.push(Box::new(what));
    }

    /// Starts the vCPUs. When this returns, all have taken their state; on an error none has run.
    fn start(&self, start: &Start) -> Result<(), VmError> {
        let order = StartCommand { start: start.clone(), devices: Arc::clone(&self.devices) };
        self.prepared.control.start(std::iter::repeat_n(order, usize::from(self.config.cpus())))
    }

    /// Freezes the VM at one instant. It goes on running (or stays paused, if it was).
    ///
    /// # Errors
    /// Then it runs on as it did (I13).
    pub fn fork(&self) -> Result<(Arc<ForkImage>, ForkReport), VmError> {
        let _one = self.operations.take();
        let _urgent = BoostGuard::new();
        self.expect_whole()?;
        let begun = Instant::now();
        let guard = self.pause_inner(true)?;
        let parked = Instant::now();
        let (ram, freeze) = self.prepared.ram.freeze(&guard.quiesced())?;
        let frozen = Instant::now();
        let (devices, backends) = self.devices.save()?;
        // The controllers after the vCPUs: an interrupt they have delivered in between is in a local APIC, one they hold is
        // delivered again.
        let vcpus = self.prepared.control.collect()?;
        let vm = VmState::save(&self.prepared.fd, self.config.chips())?;
        drop(guard);
        tracing::debug!(name = self.name, park = ?parked - begun, freeze = ?frozen - parked, save = ?frozen.elapsed(), ?freeze, "fork");
        let times = ForkTimes { park: parked - begun, freeze: frozen - parked, pause: begun.elapsed() };
        let config = Arc::clone(&self.config);
        let in_flight = devices.in_flight();
        let (identity, generation) = (Arc::clone(&self.identity), self.generation.saturating_add(1));
        let image = ForkImage { config, ram, vcpus, vm, devices, backends, identity, generation, place: None };
        Ok((Arc::new(image), ForkReport { times, freeze, in_flight }))
    }

    pub(crate) fn pause_inner(&self, save: bool) -> Result<PauseGuard<'_>, VmError> {
        self.prepared.control.pause(save)?;
        // After the vCPUs: one of them might be activating or resetting a device.
        self.devices.quiesce();
        Ok(PauseGuard::new(self))
    }

    pub(crate) fn unpause(&self) {
        self.devices.resume();
        self.prepared.control.resume();
    }

    /// Keeps the VM paused for as long as the guard lives.
    ///
    /// # Errors
    /// When it has stopped, or a vCPU does not come out of the guest.
    pub fn pause_guard(&self) -> Result<PauseGuard<'_>, VmError> {
        self.pause_inner(false)
    }

    /// Pauses the VM until [`Vm::resume`]. Pausing twice is pausing once.
    ///
    /// # Errors
    /// When it has stopped, or a vCPU does not come out of the guest.
    pub fn pause(&self) -> Result<(), VmError> {
        let _one = self.operations.take();
        if !self.held.swap(true, Ordering::AcqRel) {
            if let Err(error) = self.prepared.control.pause(false) {
                self.held.store(false, Ordering::Release);
                return Err(error);
            }
            self.devices.quiesce();
        }
        Ok(())
    }

    /// Lets a paused VM run.
    ///
    /// # Errors
    /// When it has stopped, or a reset has failed half-way.
    pub fn resume(&self) -> Result<(), VmError> {
        let _one = self.operations.take();
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        self.expect_whole()?;
        if self.held.swap(false, Ordering::AcqRel) {
            self.devices.resume();
            self.prepared.control.resume();
        }
        Ok(())
    }

    /// Stops the VM for good. A snapshot of it that is being written ends with an error.
    pub fn stop(&self) {
        self.prepared.control.stop(StopReason::Requested);
        // After it has stopped: a snapshot that begins now finds it so, one that has begun is cancelled.
        self.cancel_snapshot();
    }

    /// Why it stopped, if it has.
    #[must_use]
    pub fn stopped(&self) -> Option<StopReason> {
        self.prepared.control.stopped()
    }

    /// Waits until it stops, up to `patience`.
    #[must_use]
    pub fn wait(&self, patience: Duration) -> Option<StopReason> {
        self.prepared.control.wait_exited(patience)
    }

    /// Whether its owner has paused it.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &Arc<VmConfig> {
        &self.config
    }

    /// What it shares with the other VMs of the process.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.prepared.ram
    }

    /// Forks between it and the VM that was booted.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// How long ago it was made.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// What its console has written.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.devices.console
    }

    /// Types into its console. Returns how many bytes were taken.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.devices.type_in(bytes)
    }

    /// Runs `with` on its disk number `index`, between two steps of the device. None if there is none.
    pub fn with_disk<T>(&self, index: usize, with: impl FnOnce(&mut Disk) -> T) -> Option<T> {
        self.devices.with_block(index, |block| block.with_disk(with)).flatten()
    }

    /// Takes its disks away from a VM that has stopped, in their order: to be committed, exported or dropped. A disk whose requests do
    /// not end is left out.
    pub fn take_disks(&self) -> Vec<Disk> {
        if self.stopped().is_none() {
            return Vec::new();
        }
        (0..self.config.disks.len()).filter_map(|at| self.devices.with_block(at, Block::take_disk).flatten()).collect()
    }

    /// What the bare guest has reported.
    #[must_use]
    pub fn reports(&self) -> &Reports {
        &self.devices.reports
    }

    /// Its pages, by kind.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn memory_stats(&self) -> Result<RamStats, VmError> {
        Ok(self.prepared.ram.stats()?)
    }
}
