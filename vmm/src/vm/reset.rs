//! Resetting a VM in place: back to the instant of an image, at a cost in what was written since.
//!
//! ```text
//!  vCPUs    ──running──┤ kick                          │ each takes its state │      ├──running from the image──
//!  devices              │ stand still, give up │       │          rewound     │ IRQs │
//!  memory                                      │ drop ││
//!                       └── may be refused ────┘└───── half-way until the end ┘
//! ```
//!
//! 1. Pause, as for a fork: vCPUs, then devices.
//! 2. Check that the image fits, and halt the devices: the kernel gives up what it is busy with, because its pins keep their pages (I7). What was in flight
//!    is remembered. If the reset is refused here or in 3, the devices do it again and the VM goes on as if nothing had been (I13).
//! 3. Memory: refused while pages stay pinned, or when mappings run out; after that pages are dropped, and there is no way back.
//! 4. Devices: after memory, because what was in flight at the image's instant is described by rings that must be that instant's.
//! 5. vCPUs, each on its own thread: after memory, because KVM writes to guest memory when it is given the addresses of clocks.
//! 6. Interrupt controllers and clock: after every vCPU, as for a child ([`VmState::restore_chips`](crate::kvm::VmState::restore_chips)). Then what the
//!    devices of that instant had pending is raised again, because an interrupt that was on its way is in nobody's state.
//! 7. The guest is told that its generation has changed, devices go on, then vCPUs, unless the VM was paused.
//!
//! A failure after 3 leaves the VM paused and good for nothing but another reset. What is the VM's alone stays: name, addresses, interfaces, sockets.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::kvm::Clock;
use crate::vm::VmError;
use crate::vm::fork::ForkImage;
use crate::vm::generation;
use crate::vm::machine::Vm;
use crate::vm::sched::BoostGuard;
use crate::vm::vcpu::{Start, StartCommand};

/// How long the kernel may take to give up what it is busy with. A read or write of a file that has begun cannot be given up, and ends.
const HALT: Duration = Duration::from_secs(2);
/// How long is waited for pins that are not the VM's devices'.
const PINS: Duration = Duration::from_millis(100);

/// What a reset did, and where its time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetReport {
    /// Pages.
    pub memory: clade_memory::ResetReport,
    /// From asking the vCPUs to stop until none was in the guest and the devices stood still.
    pub park: Duration,
    /// Until nothing was in flight any more.
    pub halt: Duration,
    /// Putting memory back.
    pub drop: Duration,
    /// Devices, vCPUs and interrupt controllers.
    pub load: Duration,
    /// All of it.
    pub total: Duration,
}

impl Vm {
    /// The image that it was started from, and goes back to by [`Vm::reset_to_origin`]. A VM that was booted has none.
    #[must_use]
    pub fn origin(&self) -> Option<Arc<ForkImage>> {
        self.origin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets go of the image that it was started from: layers that only that needs are given back.
    pub fn forget_origin(&self) {
        let forgotten = self.origin.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Not under the lock: it may be the last.
        drop(forgotten);
    }

    /// Puts it back to the instant of the image it was started from; see [`Vm::reset`].
    ///
    /// # Errors
    /// [`VmError::NoOrigin`] if there is none; otherwise as [`Vm::reset`].
    pub fn reset_to_origin(&self) -> Result<ResetReport, VmError> {
        let origin = self.origin().ok_or(VmError::NoOrigin)?;
        self.reset(&origin)
    }

    /// Puts it back to the instant of `image`, in place: the one it was started from, or one that was taken of it, or of an ancestor. Memory, vCPUs,
    /// devices and disks are that instant's; writes since are gone. It runs on from there, or stays paused if it was. Name, addresses, interfaces and
    /// sockets stay its own; network and socket devices tell their drivers what a child's are told.
    ///
    /// # Errors
    /// When it has stopped, the image is of another shape, or somebody keeps pages pinned: then it goes on as it was. When it fails
    /// half-way ([`VmError::Inconsistent`] says every call after that): it is paused, and another reset mends it.
    pub fn reset(&self, image: &Arc<ForkImage>) -> Result<ResetReport, VmError> {
        let _one = self.operations.take();
        let _urgent = BoostGuard::new();
        let begun = Instant::now();
        if !Arc::ptr_eq(&image.config, &self.config) && *image.config != *self.config {
            return Err(VmError::OtherShape);
        }
        let guard = self.pause_inner(false)?;
        let parked = Instant::now();
        self.devices.check(&image.devices)?;
        if let Some(place) = self.devices.halt(HALT) {
            return Err(VmError::InFlight { place, seconds: HALT.as_secs() });
        }
        let halted = Instant::now();
        let memory = self.ram().reset(&image.ram, &guard.quiesced(), PINS);
        let dropped = Instant::now();
        let done = match memory {
            // Nothing has changed: the guard lets everything go on.
            Err(error) if !self.ram().is_inconsistent() => return Err(error.into()),
            Err(error) => Err(error.into()),
            Ok(memory) => self.load(image).map(|()| memory),
        };
        let memory = match done {
            Ok(memory) => memory,
            Err(error) => {
                self.inconsistent.store(true, Ordering::Release);
                if !self.held.swap(true, Ordering::AcqRel) {
                    // The guard's pause becomes the owner's.
                    std::mem::forget(guard);
                }
                return Err(error);
            }
        };
        self.inconsistent.store(false, Ordering::Release);
        let loaded = Instant::now();
        drop(guard);
        let report = ResetReport {
            memory,
            park: parked - begun,
            halt: halted - parked,
            drop: dropped - halted,
            load: loaded - dropped,
            total: begun.elapsed(),
        };
        tracing::debug!(name = self.name(), ?report, "reset");
        Ok(report)
    }

    /// Everything but memory, which is the image's already.
    fn load(&self, image: &Arc<ForkImage>) -> Result<(), VmError> {
        // The id is that of whoever else was started from the image: this is another VM than it was.
        if self.config.has_generation() {
            generation::renew(self.ram().memory())?;
        }
        let cpus = usize::from(self.config.cpus());
        let (start, devices) = (Start::Restore(Arc::clone(image)), Arc::clone(&self.devices));
        let order = StartCommand { start, devices };
        self.prepared.control.load(std::iter::repeat_n(order, cpus));
        // Beside the vCPUs: neither touches what the other does.
        let devices = self.devices.rewind(&image.devices, &image.backends);
        // Awaited in any case: a vCPU that is still taking its state must not meet the next reset.
        self.prepared.control.await_loaded()?;
        devices?;
        image.vm.restore_chips(&self.prepared.fd)?;
        image.vm.restore_clock(&self.prepared.fd, Clock::CatchUp)?;
        self.devices.reraise();
        self.devices.tell_generation();
        Ok(())
    }

    /// Refuses what only a whole VM can do.
    pub(crate) fn expect_whole(&self) -> Result<(), VmError> {
        // Acquire: pairs with the store of the reset that failed.
        if self.inconsistent.load(Ordering::Acquire) { Err(VmError::Inconsistent) } else { Ok(()) }
    }
}
