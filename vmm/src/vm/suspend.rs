//! Suspending a VM: it stands still, and what it owns of memory is in a file.
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
//! 3. The pause stays. It is the suspension's own, beside that of the VM's owner.
//!
//! A failure in 1 or 2 leaves the VM running with its memory (I13): the drop of the guard resumes
//! it, and devices submit the requests again that they were to give up.
//!
//! A suspended VM can be forked, saved and read. It stays suspended. What needs its guest to run
//! wakes it ([`Vm::wake`]).

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clade_devices::virtio::net::Net;
use clade_devices::virtio::plain::DeviceOps;
use clade_devices::virtio::vsock::Vsock;
use clade_memory::{AheadUse, PageSet, Quiesced, StopsWriters, SuspendFile, Suspended, WorkingSet};

use crate::vm::error::VmError;
use crate::vm::machine::Vm;
use crate::vm::vcpu::sched::BoostGuard;

/// How long the kernel may take to give up the requests it holds.
const HALT: Duration = super::reset::HALT;
/// How long to wait for transient pins that are not the VM's devices'.
const PINS: Duration = super::reset::PINS;

/// What a suspension did, and the parts of its time.
#[derive(Clone, Copy, Debug, Default)]
pub struct SuspendReport {
    /// Whether the VM was suspended before. Then nothing was done.
    pub was_suspended: bool,
    /// The pages.
    pub memory: Suspended,
    /// From the request until no vCPU was in the guest, the devices were quiesced, and no request
    /// was in flight.
    pub halt: Duration,
    /// The time to write the file and to give memory back.
    pub write: Duration,
}

/// A descriptor that is readable when a device is asked for something.
#[derive(Debug)]
pub struct RequestSource {
    /// A copy of it.
    pub fd: OwnedFd,
    /// Whether a driver uses the device. Otherwise what is there stays there, awake or not.
    pub is_served: bool,
}

/// What a wake did.
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
struct Asleep {
    /// What the wake reads ahead.
    working_set: WorkingSet,
    /// Pipes that are at their end when it is woken.
    told: Vec<PipeWriter>,
}

/// Whether a VM is suspended.
#[derive(Debug, Default)]
pub(crate) struct Suspension(Mutex<Option<Asleep>>);

impl Suspension {
    fn state(&self) -> MutexGuard<'_, Option<Asleep>> {
        // Replaced in one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A VM whose vCPUs have exited. Its devices are quiesced until the drop.
#[derive(Debug)]
struct Ended<'a>(&'a Vm);

impl<'a> Ended<'a> {
    fn of(vm: &'a Vm) -> Self {
        vm.devices.quiesce();
        Self(vm)
    }
}

// vCPUs never run again, and devices are quiesced from its creation until its drop.
impl StopsWriters for Ended<'_> {}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.devices.resume();
    }
}

impl Vm {
    /// Suspends it: it stands still until [`Vm::wake`], and what it owns of memory goes to `file`.
    /// A VM that is suspended stays so, and the file is not used.
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
        let guard = self.pause_inner(false)?;
        if let Some(place) = self.devices.halt(HALT) {
            return Err(VmError::InFlight { place, seconds: HALT.as_secs() });
        }
        let halted = Instant::now();
        let (memory, working_set) = self.ram().suspend(file, &guard.quiesced(), PINS)?;
        *self.suspension.state() = Some(Asleep { working_set, told: Vec::new() });
        // The guard's pause becomes the suspension's.
        std::mem::forget(guard);
        let report = SuspendReport { was_suspended: false, memory, halt: halted - begun, write: halted.elapsed() };
        tracing::debug!(name = self.name(), ?report, "suspended");
        Ok(report)
    }

    /// Wakes it, if it is suspended: reads its working set ahead, and lets it run, or leaves it
    /// paused if its owner has paused it.
    ///
    /// # Errors
    /// When it has stopped.
    pub fn wake(&self) -> Result<WakeReport, VmError> {
        // What needs the guest asks each time.
        if !self.is_suspended() {
            return Ok(WakeReport::default());
        }
        let _one = self.operations.take();
        let _boost = BoostGuard::new();
        let begun = Instant::now();
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        let Some(Asleep { working_set, told }) = self.suspension.state().take() else {
            return Ok(WakeReport::default());
        };
        self.ram().read_ahead(&working_set);
        self.unpause();
        drop(told);
        let report = WakeReport { was_suspended: true, working_set: working_set.pages(), total: begun.elapsed() };
        tracing::debug!(name = self.name(), ?report, "woken");
        Ok(report)
    }

    /// What it has written since it was made, reset, forked or woken last, and what came of the
    /// pages that were copied ahead. It stands still meanwhile, if it has not ended.
    ///
    /// # Errors
    /// When requests do not end, or the kernel cannot be asked.
    pub fn written_set(&self) -> Result<(PageSet, AheadUse), VmError> {
        let _one = self.operations.take();
        // What a device still transfers would be compared while it changes.
        let halt = || match self.devices.halt(HALT) {
            Some(place) => Err(VmError::InFlight { place, seconds: HALT.as_secs() }),
            None => Ok(()),
        };
        if self.wait(Duration::ZERO).is_some() {
            let ended = Ended::of(self);
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
        self.suspension.state().is_some()
    }

    /// A pipe that is at its end when the VM is woken, or goes. It is so at once if the VM is not
    /// suspended.
    ///
    /// # Errors
    /// When there is no descriptor to be had.
    pub fn woken(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        if let Some(asleep) = self.suspension.state().as_mut() {
            asleep.told.push(writer);
        }
        Ok(reader)
    }

    /// Descriptors that become readable when another asks its devices for something: connections to
    /// its socket, packets to its interfaces.
    ///
    /// # Errors
    /// When there is no descriptor to be had.
    pub fn request_sources(&self) -> io::Result<Vec<RequestSource>> {
        let nets = (0..self.config.nets.len()).filter_map(|number| self.sources_of::<Net>(number));
        let sources = nets.chain(self.sources_of::<Vsock>(0)).flatten();
        sources.collect()
    }

    fn sources_of<H: DeviceOps>(&self, number: usize) -> Option<Vec<io::Result<RequestSource>>> {
        let copied = |fd: RawFd| {
            // SAFETY: the handler keeps its sources open, and does not go while it is looked at.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fd.try_clone_to_owned()
        };
        self.devices.with_plain(number, |device| {
            let is_served = device.is_in_use();
            let source = |(fd, _)| Ok(RequestSource { fd: copied(fd)?, is_served });
            device.with(|handler: &mut H| handler.sources().into_iter().map(source).collect())
        })?
    }
}
