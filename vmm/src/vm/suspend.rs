//! Suspending a VM: it is paused, and the memory that it owns is in a file.
//!
//! ```text
//!  vCPUs    ──running──┤ kick │                              │ suspended │ ├──running──
//!  devices                    │ quiesced, halted             │           │ resumed
//!  memory                                      │ write, sync │ the file  │ read ahead
//!                             └────── may be refused ────────┘           └─ wake
//! ```
//!
//! 1. Pause, as for a fork: vCPUs, then devices. Then halt the devices: the kernel must give up the
//!    requests it holds, because its pins keep their pages (I7).
//! 2. Memory goes to the file ([`clade_memory::GuestRam::suspend`]).
//! 3. The pause stays. It belongs to the suspension, beside that of the VM's owner.
//!
//! A failure in 1 or 2 leaves the VM running with its memory (I13): the drop of the guard resumes
//! it, and devices submit the requests again that they had to give up.
//!
//! A suspended VM can be forked, saved and read, and stays suspended. Operations that need its
//! guest to run wake it ([`Vm::wake`]).

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clade_devices::virtio::net::Net;
use clade_devices::virtio::sync_device::DeviceOps;
use clade_devices::virtio::vsock::Vsock;
use clade_host_io::sched::BoostGuard;
use clade_memory::{AheadUse, PageSet, Quiesced, StopsWriters, SuspendFile, Suspended, TouchedPages};

use crate::vm::error::VmError;
use crate::vm::machine::Vm;
use crate::vm::vcpu::ticket_lock::TicketGuard;

/// Timeout for the kernel to give up the requests it holds.
const HALT: Duration = super::reset::HALT;
/// Timeout for transient pins that do not belong to the VM's devices.
const PINS: Duration = super::reset::PINS;

/// The result of a suspension, and the parts of its time.
#[derive(Clone, Copy, Debug, Default)]
pub struct SuspendReport {
    /// Whether the VM was suspended before. The call then had no effect.
    pub was_suspended: bool,
    /// The pages.
    pub memory: Suspended,
    /// From the request until no vCPU was in the guest, the devices were quiesced, and no request
    /// was in flight.
    pub halt: Duration,
    /// The time to write the file and to give memory back.
    pub write: Duration,
    /// Whether a device has input for the guest that no request source announces again: a host
    /// waits for the guest, so the VM has to be woken at once.
    pub has_input: bool,
}

/// A descriptor that is readable when there is a request for a device.
#[derive(Debug)]
pub struct RequestSource {
    /// A duplicate of the descriptor.
    pub fd: OwnedFd,
    /// Whether a driver uses the device. Otherwise its input stays there, awake or not.
    pub is_served: bool,
}

/// The result of a wake.
#[derive(Clone, Copy, Debug, Default)]
pub struct WakeReport {
    /// Whether the VM was suspended.
    pub was_suspended: bool,
    /// Pages of the working set.
    pub working_set: u64,
    /// The time until the vCPUs may run.
    pub total: Duration,
}

/// A VM that is suspended.
#[derive(Debug)]
struct SuspendedState {
    /// The pages that the wake reads ahead.
    working_set: TouchedPages,
    /// Pipes that are closed when it is woken.
    told: Vec<PipeWriter>,
}

/// Whether a VM is suspended.
#[derive(Debug, Default)]
enum State {
    #[default]
    Awake,
    /// A suspension is under way, and holds the operations' lock.
    FallingAsleep,
    Asleep(SuspendedState),
}

/// The state of a VM's suspension.
#[derive(Debug, Default)]
pub(crate) struct Suspension(Mutex<State>);

impl Suspension {
    fn state(&self) -> MutexGuard<'_, State> {
        // Replaced in one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_awake(&self) -> bool {
        matches!(*self.state(), State::Awake)
    }
}

/// A suspension in progress. If it fails, the VM is awake again.
#[derive(Debug)]
struct FallingAsleep<'a>(&'a Suspension);

impl<'a> FallingAsleep<'a> {
    fn begin(suspension: &'a Suspension) -> Self {
        *suspension.state() = State::FallingAsleep;
        Self(suspension)
    }

    fn done(self, asleep: SuspendedState) {
        *self.0.state() = State::Asleep(asleep);
    }
}

impl Drop for FallingAsleep<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if matches!(*state, State::FallingAsleep) {
            *state = State::Awake;
        }
    }
}

/// A VM whose vCPUs have exited. Its devices are quiesced until the drop.
#[derive(Debug)]
struct ExitedVm<'a>(&'a Vm);

impl<'a> ExitedVm<'a> {
    fn of(vm: &'a Vm) -> Self {
        vm.devices.quiesce();
        Self(vm)
    }
}

// vCPUs never run again, and devices are quiesced from its creation until its drop.
impl StopsWriters for ExitedVm<'_> {}

impl Drop for ExitedVm<'_> {
    fn drop(&mut self) {
        self.0.devices.resume();
    }
}

impl Vm {
    /// Suspends it: the VM is paused until [`Vm::wake`], and the memory that it owns goes to
    /// `file`. A VM that is already suspended stays so, and the file is not used.
    ///
    /// # Errors
    /// When it has stopped, a reset has failed half-way, requests or pins do not end, or the file
    /// cannot be written. Then it runs on with the same memory (I13).
    pub fn suspend(&self, file: SuspendFile) -> Result<SuspendReport, VmError> {
        let _one = self.operations.take();
        let _boost = BoostGuard::new();
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        self.expect_whole()?;
        if self.is_suspended() {
            return Ok(SuspendReport { was_suspended: true, ..SuspendReport::default() });
        }
        let begun = Instant::now();
        // Before the first step: a wake that comes from here on waits for the operations' lock, and
        // then wakes the VM. Until the file is written, that may take seconds.
        let falling = FallingAsleep::begin(&self.suspension);
        let guard = self.pause_inner(false)?;
        if let Some(place) = self.devices.halt(HALT) {
            return Err(VmError::InFlight { place, seconds: HALT.as_secs() });
        }
        let halted = Instant::now();
        let (memory, working_set) = self.ram().suspend(file, &guard.quiesced(), PINS)?;
        // While devices are quiesced: afterwards a source announces new input.
        let has_input = self.has_input();
        falling.done(SuspendedState { working_set, told: Vec::new() });
        // The guard's pause becomes the suspension's.
        std::mem::forget(guard);
        let (halt, write) = (halted - begun, halted.elapsed());
        let report = SuspendReport { was_suspended: false, memory, halt, write, has_input };
        tracing::debug!(name = self.name(), ?report, "suspended");
        Ok(report)
    }

    /// Wakes it, if it is suspended: reads its working set ahead, and lets it run, or leaves it
    /// paused if its owner has paused it.
    ///
    /// # Errors
    /// When it has stopped.
    pub fn wake(&self) -> Result<WakeReport, VmError> {
        // Each request that needs the guest calls this. The lock below waits for a suspension in
        // progress.
        if self.suspension.is_awake() {
            return Ok(WakeReport::default());
        }
        let _one = self.operations.take();
        let _boost = BoostGuard::new();
        let begun = Instant::now();
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        let state = std::mem::take(&mut *self.suspension.state());
        let State::Asleep(SuspendedState { working_set, told }) = state else { return Ok(WakeReport::default()) };
        self.ram().read_ahead(&working_set);
        self.unpause();
        drop(told);
        let report = WakeReport { was_suspended: true, working_set: working_set.pages(), total: begun.elapsed() };
        tracing::debug!(name = self.name(), ?report, "woken");
        Ok(report)
    }

    /// Wakes it, and holds the operations' lock: no suspension begins as long as the guard lives. A
    /// suspension that took the lock between the wake and this is undone as well.
    ///
    /// # Errors
    /// When it has stopped.
    pub(crate) fn awake(&self) -> Result<TicketGuard<'_>, VmError> {
        loop {
            self.wake()?;
            let one = self.operations.take();
            if self.suspension.is_awake() {
                return Ok(one);
            }
        }
    }

    /// The pages that it has written since it was last made, reset, forked or woken, and the use of
    /// the pages that were copied ahead. Pauses the VM meanwhile, if it has not ended.
    ///
    /// # Errors
    /// When requests do not end, or the kernel cannot be queried.
    pub fn written_set(&self) -> Result<(PageSet, AheadUse), VmError> {
        let _one = self.operations.take();
        // Pages with transfers in progress would be compared while they change.
        let halt = || match self.devices.halt(HALT) {
            Some(place) => Err(VmError::InFlight { place, seconds: HALT.as_secs() }),
            None => Ok(()),
        };
        if self.wait(Duration::ZERO).is_some() {
            let ended = ExitedVm::of(self);
            halt()?;
            return Ok(self.ram().written_set(&Quiesced::by(&ended))?);
        }
        let guard = self.pause_inner(false)?;
        halt()?;
        Ok(self.ram().written_set(&guard.quiesced())?)
    }

    /// Whether it is suspended.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        matches!(*self.suspension.state(), State::Asleep(_))
    }

    /// Whether it is awake, and no suspension is in progress. Otherwise [`Vm::wake`] has an effect.
    #[must_use]
    pub fn is_awake(&self) -> bool {
        self.suspension.is_awake()
    }

    /// A pipe that is closed when the VM is woken, or dropped; at once if the VM is not suspended.
    ///
    /// # Errors
    /// When there is no free descriptor.
    pub fn woken(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        if let State::Asleep(asleep) = &mut *self.suspension.state() {
            asleep.told.push(writer);
        }
        Ok(reader)
    }

    /// Descriptors that become readable when there is a request for its devices: connections to its
    /// socket, packets to its interfaces.
    ///
    /// # Errors
    /// When there is no free descriptor.
    pub fn request_sources(&self) -> io::Result<Vec<RequestSource>> {
        let nets = (0..self.config.nets.len()).filter_map(|number| self.sources_of::<Net>(number));
        let sources = nets.chain(self.sources_of::<Vsock>(0)).flatten();
        sources.collect()
    }

    /// Whether a device with a driver has input for the guest ([`DeviceOps::has_input`]).
    fn has_input(&self) -> bool {
        let nets = (0..self.config.nets.len()).filter(|number| self.device_has_input::<Net>(*number)).count();
        // All devices are queried, because each remembers the query.
        self.device_has_input::<Vsock>(0) || nets > 0
    }

    fn device_has_input<H: DeviceOps>(&self, number: usize) -> bool {
        let asked = self.devices.with_sync_device(number, |device| {
            device.is_in_use() && device.with(|handler: &mut H| handler.has_input()) == Some(true)
        });
        asked == Some(true)
    }

    fn sources_of<H: DeviceOps>(&self, number: usize) -> Option<Vec<io::Result<RequestSource>>> {
        let copied = |fd: RawFd| {
            // SAFETY: the handler keeps its sources open, and is not dropped while it is looked at.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fd.try_clone_to_owned()
        };
        self.devices.with_sync_device(number, |device| {
            let is_served = device.is_in_use();
            let source = |(fd, _)| Ok(RequestSource { fd: copied(fd)?, is_served });
            device.with(|handler: &mut H| handler.sources().into_iter().map(source).collect())
        })?
    }
}
