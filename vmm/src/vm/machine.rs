//! The VM itself: boot, assembly, pause, stop, and queries.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clade_block::Disk;
use clade_devices::Console;
use clade_devices::virtio::block::{Block, DiskNotTaken};
use clade_devices::virtio::vsock::BrokerSlot;
use clade_memory::{CowCounts, Erased, GuestRam, PageMap, RamStats};

use crate::boot::{self, BootSource};
use crate::platform::COM1_GSI;
use crate::vm::config::{Irqchip, VmConfig};
use crate::vm::context::Context;
use crate::vm::devices::{Devices, Reports};
use crate::vm::error::VmError;
use crate::vm::fork::{Admission, ForkImage, PauseGuard};
use crate::vm::identity::generation::{self, GenerationError};
use crate::vm::identity::{Claims, Endpoints, Identity};
use crate::vm::pause_times::Pauses;
use crate::vm::persist::SaveTracker;
use crate::vm::prepared::PreparedVm;
use crate::vm::stop::StopReason;
use crate::vm::suspend::Suspension;
use crate::vm::timeline::Timeline;
use crate::vm::vcpu::ticket_lock::TicketLock;
use crate::vm::vcpu::{StartCommand, VcpuStart};

/// The parts that a VM is assembled from.
pub(super) struct VmParts {
    pub(super) prepared: PreparedVm,
    pub(super) devices: Arc<Devices>,
    pub(super) ends: Endpoints,
    /// Number of forks between the VM and the one that was booted.
    pub(super) generation: u32,
    /// The image that the VM is started from.
    pub(super) origin: Option<Arc<ForkImage>>,
    /// The timeline of a child's start.
    pub(super) timeline: Option<Arc<Timeline>>,
}

/// Disks of a VM that has stopped.
#[derive(Debug, Default)]
pub struct TakenDisks {
    /// The disks whose requests have ended.
    pub disks: Vec<Disk>,
    /// The numbers of those whose requests have not ended. A later call takes them.
    pub in_use: Vec<usize>,
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
    pub(crate) generation: u32,
    born: Instant,
    timeline: Option<Arc<Timeline>>,
    /// The process that connects the guest to the host, if it is another one.
    broker: Option<BrokerSlot>,
    /// Dropped after the devices, whose interfaces and addresses the claims hold.
    _claims: Claims,
    /// Whether its owner has paused it. Guards pause it independently.
    pub(crate) held: AtomicBool,
    /// Whether a reset has failed half-way: memory, vCPUs and devices belong to different instants.
    pub(crate) inconsistent: AtomicBool,
    /// The image it was started from.
    pub(crate) origin: Mutex<Option<Arc<ForkImage>>>,
    /// One fork, reset, pause or resume at a time.
    pub(crate) operations: TicketLock,
    pub(crate) saving: SaveTracker,
    pub(crate) erased: Erased,
    pub(crate) pauses: Pauses,
    pub(crate) suspension: Suspension,
    /// Last: see [`Vm::drop_last`].
    tail: DropLast,
}

/// Values that are dropped after everything else of a VM.
#[derive(Default)]
struct DropLast(Vec<Box<dyn Send + Sync>>);

impl fmt::Debug for DropLast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tail({})", self.0.len())
    }
}

impl Vm {
    /// Boots a guest.
    ///
    /// # Errors
    /// When the VM cannot be made, or the guest cannot be loaded.
    pub fn boot(context: &Context, name: &str, config: &Arc<VmConfig>, source: &BootSource) -> Result<Self, VmError> {
        config.check_devices()?;
        config.check_queues()?;
        Self::boot_as(context, name, config, source, Endpoints::boot(config)?, false)
    }

    /// Boots a guest with endpoints that were taken for it before ([`Endpoints::boot`]). A `paused`
    /// guest waits for [`Vm::resume`] before its first instruction.
    ///
    /// # Errors
    /// As [`Vm::boot`].
    pub fn boot_as(
        context: &Context,
        name: &str,
        config: &Arc<VmConfig>,
        source: &BootSource,
        mut ends: Endpoints,
        paused: bool,
    ) -> Result<Self, VmError> {
        config.check_devices()?;
        config.check_queues()?;
        let prepared = context.take_prepared(config)?;
        prepared.ram.populate()?;
        let layout = boot::GuestRamRanges::of_memory(prepared.ram.memory())?;
        let quirks = context.host().quirks();
        // A kernel without ACPI or a device tree finds virtio devices by its command line only.
        let cmdline = format!("{}{}", quirks.extend_cmdline(&source.cmdline), config.device_args());
        let added = cmdline.len() - source.cmdline.len();
        let source = BootSource { cmdline: cmdline.trim_start().to_owned(), ..source.clone() };
        let mut firmware = boot::Firmware { cpus: config.cpus(), rsdp: None };
        if config.has_acpi() {
            let mem = prepared.ram.memory();
            generation::begin(mem)?;
            let tables = boot::write_acpi_tables(mem, config.cpus(), config.virtio_queues().count());
            firmware.rsdp = Some(tables.map_err(GenerationError::from)?);
        }
        let loaded =
            boot::load(prepared.ram.memory(), &layout, &source, &firmware).map_err(|error| error.without(added))?;
        let devices = Arc::new(Devices::new(None, config, &prepared, &mut ends, context.has_report_port())?);
        let parts = VmParts { prepared, devices, ends, generation: 0, origin: None, timeline: None };
        let vm = Self::assemble(context, name, config, parts)?;
        if paused {
            vm.hold();
        }
        vm.start(&VcpuStart::Boot(loaded.entry), None)?;
        Ok(vm)
    }

    /// Makes the VM start paused.
    pub(super) fn hold(&self) {
        self.held.store(true, Ordering::Release);
        self.prepared.control.start_paused();
        self.devices.quiesce();
    }

    pub(super) fn assemble(
        context: &Context,
        name: &str,
        config: &Arc<VmConfig>,
        parts: VmParts,
    ) -> Result<Self, VmError> {
        let VmParts { prepared, devices, ends, generation, origin, timeline } = parts;
        if config.irqchip == Irqchip::Full {
            devices
                .with_serial_irq(|irq| prepared.fd.register_irqfd(irq.eventfd(), COM1_GSI))
                .map_err(|e| VmError::kvm("connect the console's interrupt", e))?;
        }
        // Pages may still be copied in the background, or be on a disk. If one is lost, the VM
        // stops with the reason, and never reads zeros. Weak: devices hold the memory, and the
        // vCPUs' orders hold the devices. With a strong handle, a VM would keep itself alive.
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
            broker: ends.broker,
            _claims: ends.claims,
            born: Instant::now(),
            timeline,
            held: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            origin: Mutex::new(origin),
            operations: TicketLock::default(),
            saving: SaveTracker::default(),
            erased: Erased::default(),
            pauses: Pauses::default(),
            suspension: Suspension::default(),
            tail: DropLast::default(),
        })
    }

    /// Keeps `what` until the VM is dropped, and drops it after everything else of the VM: threads,
    /// devices, interfaces, memory.
    pub fn drop_last(&mut self, what: impl Send + Sync + 'static) {
        self.tail.0.push(Box::new(what));
    }

    /// Starts the vCPUs, if `admission` agrees. When this returns, all have loaded their state. On an error, none
    /// has run.
    pub(super) fn start(&self, start: &VcpuStart, admission: Option<Admission>) -> Result<(), VmError> {
        let (devices, timeline) = (Arc::clone(&self.devices), self.timeline.clone());
        let order = StartCommand { start: start.clone(), devices, timeline, admission };
        self.prepared.control.start(std::iter::repeat_n(order, usize::from(self.config.cpus())))
    }

    /// Keeps the VM paused for as long as the guard lives.
    ///
    /// # Errors
    /// When it has stopped, or a vCPU does not leave the guest.
    pub fn pause_guard(&self) -> Result<PauseGuard<'_>, VmError> {
        self.pause_inner(false)
    }

    /// Pauses the VM until [`Vm::resume`]. Pausing a paused VM has no effect.
    ///
    /// # Errors
    /// When it has stopped, or a vCPU does not leave the guest.
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

    /// Lets a paused VM run. Wakes a suspended VM.
    ///
    /// # Errors
    /// When it has stopped, or a reset has failed half-way.
    pub fn resume(&self) -> Result<(), VmError> {
        let _one = self.awake()?;
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

    /// Has the process behind `broker` make the guest's connections to the host from now on
    /// ([`clade_devices::virtio::vsock::answer_broker`]).
    ///
    /// # Errors
    /// When the VM makes them itself, or has no socket device.
    pub fn connect_broker(&self, broker: OwnedFd) -> io::Result<()> {
        self.broker.as_ref().ok_or(io::ErrorKind::Unsupported)?.put(broker)
    }

    /// Stops the VM for good. A snapshot of it that is being written ends with an error.
    pub fn stop(&self) {
        self.stop_because(StopReason::Requested);
    }

    /// The same for another reason. An earlier reason stays.
    pub fn stop_because(&self, reason: StopReason) {
        self.prepared.control.stop(reason);
        // After the stop: a snapshot that begins now fails, and a running one is cancelled.
        self.cancel_snapshot();
    }

    /// The stop reason, if the VM has stopped.
    #[must_use]
    pub fn stopped(&self) -> Option<StopReason> {
        self.prepared.control.stopped()
    }

    /// The last exits of each vCPU from KVM_RUN and their handling, in words.
    #[must_use]
    pub fn last_exits(&self) -> Vec<String> {
        self.prepared.control.last_exits()
    }

    /// Waits up to `timeout` until its vCPU threads have exited. Returns why it stopped, or None
    /// after the timeout.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<StopReason> {
        self.prepared.control.wait_exited(timeout)
    }

    /// Ends what a vCPU's thread has kept of a real-time priority that it was given for its start: a short slice,
    /// until its guest's first exit. For guests that have none by themselves.
    pub fn end_start(&self) {
        self.prepared.control.end_starts();
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

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &Arc<VmConfig> {
        &self.config
    }

    /// The state shared with the other VMs of the process.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.prepared.ram
    }

    /// Number of forks between the VM and the one that was booted.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Occurrences of withheld secrets that were erased in its memory before its first instruction.
    #[must_use]
    pub fn erased(&self) -> Erased {
        self.erased
    }

    /// The time since the VM was made.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// The duration of each step of its start. None for a VM that was booted.
    #[must_use]
    pub fn timeline(&self) -> Option<&Timeline> {
        self.timeline.as_deref()
    }

    /// The output of its serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.devices.console
    }

    /// Types into its serial console. Returns the number of bytes accepted.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.devices.type_in(bytes)
    }

    /// Runs `with` on its disk number `index`, between two steps of the device. Returns None
    /// without such a disk.
    pub fn with_disk<T>(&self, index: usize, with: impl FnOnce(&mut Disk) -> T) -> Option<T> {
        self.devices.with_block(index, |block| block.with_disk(with)).flatten()
    }

    /// Takes the disks of a stopped VM, in their order, to be committed, exported or dropped. Takes none while the VM
    /// has not stopped.
    pub fn take_disks(&self) -> TakenDisks {
        let mut taken = TakenDisks::default();
        if self.stopped().is_none() {
            return taken;
        }
        for at in 0..self.config.disks.len() {
            match self.devices.with_block(at, Block::take_disk) {
                Some(Ok(disk)) => taken.disks.push(disk),
                Some(Err(DiskNotTaken::InUse)) => taken.in_use.push(at),
                Some(Err(DiskNotTaken::Gone)) | None => {}
            }
        }
        taken
    }

    /// The reports of the bare guest.
    #[must_use]
    pub fn reports(&self) -> &Reports {
        &self.devices.reports
    }

    /// The numbers of its pages, by kind.
    ///
    /// # Errors
    /// When the kernel cannot be queried.
    pub fn memory_stats(&self) -> Result<RamStats, VmError> {
        Ok(self.prepared.ram.stats()?)
    }

    /// The state of each of its pages, and the layers that it is shown.
    ///
    /// # Errors
    /// When the kernel cannot be queried.
    pub fn page_map(&self) -> Result<PageMap, VmError> {
        // Siblings in this process share the image: it does not belong to this VM alone then.
        let origin = self.origin().filter(|origin| Arc::strong_count(origin) <= 2 + self.saving.holds(origin));
        Ok(self.prepared.ram.page_map(origin.as_ref().map(|origin| origin.ram()))?)
    }

    /// The numbers of pages that were copied, by cause.
    ///
    /// # Errors
    /// When the kernel cannot be queried.
    pub fn cow_counts(&self) -> Result<CowCounts, VmError> {
        Ok(self.prepared.ram.cow_counts()?)
    }

    /// Its pause times, by cause.
    #[must_use]
    pub fn pauses(&self) -> &Pauses {
        &self.pauses
    }
}
