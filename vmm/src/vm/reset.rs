//! Resetting a VM in place to the instant of an image. The cost grows with the pages written since.
//!
//! ```text
//!  vCPUs    ──running──┤ kick                          │ each loads its state │      ├──running──
//!  devices              │ quiesced, halted     │       │          rewound     │ IRQs │
//!  memory                                      │ drop ││
//!                       └── may be refused ────┘└───── half-way until the end ┘
//! ```
//!
//! 1. Pause, as for a fork: vCPUs, then devices.
//! 2. Check that the image fits, and halt the devices. The kernel must give up the requests it
//!    holds, because its pins keep their pages (I7). Requests in flight are remembered. If the
//!    reset is refused here or in 3, the devices submit them again and the VM runs on unchanged
//!    (I13).
//! 3. Memory: refused while pages stay pinned, or when mappings run out. After that pages are
//!    dropped, and there is no way back.
//! 4. Devices: after memory, because the rings there must be those of the image's instant, which
//!    describe the requests then in flight.
//! 5. vCPUs, each on its own thread: after memory, because KVM writes to guest memory when it gets
//!    the addresses of clocks.
//! 6. Interrupt controllers, clock and pending interrupts: after every vCPU, as for a child
//!    ([`ForkImage::restore_controllers`]). This also notifies the guest of its new generation.
//! 7. Devices resume, then vCPUs, unless the VM was paused.
//!
//! A failure after 3 leaves the VM paused, and only another reset repairs it. The VM's identity
//! stays: name, addresses, interfaces, sockets.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::platform::UNUSED_PAGE;
use crate::vm::error::VmError;
use crate::vm::fork::{ForkImage, PauseGuard};
use crate::vm::identity::generation;
use crate::vm::machine::Vm;
use crate::vm::vcpu::{StartCommand, VcpuStart};
use clade_host_io::sched::BoostGuard;

/// Timeout for the kernel to give up the requests it holds. A read or write of a file that has
/// begun cannot be cancelled, and completes, late on a stalled disk. After the timeout the
/// operation fails and the VM runs on (I13).
pub(super) const HALT: Duration = Duration::from_secs(30);
/// Timeout for transient pins that do not belong to the VM's devices. Each ends with a transfer.
/// Long-term pins are not waited for.
pub(super) const PINS: Duration = Duration::from_secs(30);

#[cfg(test)]
thread_local! {
    /// Whether the next reset of this thread panics after it has restored memory and before
    /// anything else.
    pub(super) static PANIC_IN_LOAD: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// The result of a reset, and the parts of its time.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetReport {
    /// The pages of the reset.
    pub memory: clade_memory::RamResetReport,
    /// From the request to the vCPUs until none was in the guest and the devices were quiesced.
    pub park: Duration,
    /// From then until no request was in flight.
    pub halt: Duration,
    /// The time to restore memory.
    pub drop: Duration,
    /// The time to restore devices, vCPUs and interrupt controllers.
    pub load: Duration,
    /// From the request to the end.
    pub total: Duration,
}

impl Vm {
    /// The image that it was started from, which [`Vm::reset_to_origin`] restores. None for a VM
    /// that was booted.
    #[must_use]
    pub fn origin(&self) -> Option<Arc<ForkImage>> {
        self.origin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets the image that it was started from. Layers that only the image uses are freed.
    pub fn forget_origin(&self) {
        let forgotten = self.origin.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Dropped outside the lock: this may be the last handle.
        drop(forgotten);
    }

    /// Resets it to the instant of the image it was started from; see [`Vm::reset`].
    ///
    /// # Errors
    /// [`VmError::NoOrigin`] without such an image; otherwise as [`Vm::reset`].
    pub fn reset_to_origin(&self) -> Result<ResetReport, VmError> {
        let origin = self.origin().ok_or(VmError::NoOrigin)?;
        self.reset(&origin)
    }

    /// Resets it in place to the instant of `image`: the image it was started from, or one of
    /// itself or of an ancestor. Memory, vCPUs, devices and disks are restored; later writes are
    /// lost. The VM runs on from there, or stays paused if it was. Its name, addresses, interfaces
    /// and sockets stay, and so do its declarations of memory that children do not inherit. Network
    /// and socket devices notify their drivers as in a child.
    ///
    /// # Errors
    /// When the VM has stopped, the image is of another shape, or pages stay pinned: the VM then
    /// runs on unchanged. After a failure half-way the VM is paused, other calls fail with
    /// [`VmError::Inconsistent`], and another reset repairs it.
    pub fn reset(&self, image: &Arc<ForkImage>) -> Result<ResetReport, VmError> {
        self.reset_if(image, &|| true)
    }

    /// The same, if `is_wanted` still holds when earlier operations of the VM have ended and its devices
    /// are halted: a suspension may take minutes.
    ///
    /// # Errors
    /// As for [`Vm::reset`]. [`VmError::Unwanted`] if it does not hold.
    pub fn reset_if(&self, image: &Arc<ForkImage>, is_wanted: &dyn Fn() -> bool) -> Result<ResetReport, VmError> {
        let _one = self.operations.take();
        let _boost = BoostGuard::new();
        let begun = Instant::now();
        if !Arc::ptr_eq(&image.config, &self.config)
            && let Some(field) = self.config.difference(&image.config)
        {
            return Err(VmError::OtherConfig { field });
        }
        let guard = self.pause_inner(false)?;
        let parked = Instant::now();
        self.devices.check(&image.devices)?;
        if let Some(place) = self.devices.halt(HALT) {
            return Err(VmError::InFlight { place, seconds: HALT.as_secs() });
        }
        let halted = Instant::now();
        if !is_wanted() {
            return Err(VmError::Unwanted);
        }
        // From here on, an error or a panic leaves parts of two instants. The caller may survive a
        // panic.
        let put_back = || {
            let memory = self.ram().reset(&image.ram, &guard.quiesced(), PINS);
            let dropped = Instant::now();
            let done = match memory {
                Err(error) => Err((error.into(), self.ram().is_inconsistent())),
                Ok(memory) => self.load(image).map(|()| memory).map_err(|error| (error, true)),
            };
            (done, dropped)
        };
        let (done, dropped) = match catch_unwind(AssertUnwindSafe(put_back)) {
            Ok(done) => done,
            Err(panic) => {
                self.hold_inconsistent(guard);
                resume_unwind(panic);
            }
        };
        let memory = match done {
            Ok(memory) => memory,
            // Nothing has changed: the drop of the guard resumes everything.
            Err((error, false)) => return Err(error),
            Err((error, true)) => {
                self.hold_inconsistent(guard);
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
        self.pauses.reset.record(report.total);
        tracing::debug!(name = self.name(), ?report, "reset");
        Ok(report)
    }

    /// Keeps it paused after a reset that failed half-way.
    fn hold_inconsistent(&self, guard: PauseGuard<'_>) {
        self.inconsistent.store(true, Ordering::Release);
        if !self.held.swap(true, Ordering::AcqRel) {
            // The guard's pause becomes the owner's.
            std::mem::forget(guard);
        }
    }

    /// Restores everything but memory, which is already the image's.
    fn load(&self, image: &Arc<ForkImage>) -> Result<(), VmError> {
        #[cfg(test)]
        assert!(!PANIC_IN_LOAD.take(), "asked to panic");
        // The image's other children have its id too, and every VM needs its own.
        if self.config.has_acpi() {
            generation::renew(self.ram().memory())?;
        }
        let cpus = usize::from(self.config.cpus());
        let (start, devices) = (VcpuStart::Restore(Arc::clone(image)), Arc::clone(&self.devices));
        let order = StartCommand { start, devices, timeline: None, admission: None };
        self.prepared.control.load(std::iter::repeat_n(order, cpus));
        // Concurrently with the vCPUs' loads: each modifies different state. What a load has KVM derive from page
        // tables is of the restored memory already.
        let forgotten = self.forget_page_tables();
        let devices = self.devices.rewind(&image.devices, &image.backends);
        // Wait in any case: the next reset must not meet a vCPU that is still loading its state.
        self.prepared.control.await_loaded()?;
        forgotten?;
        devices?;
        // Before it runs on, as for a child.
        image.restore_controllers(&self.prepared.fd, &self.devices)
    }

    /// After memory is restored, and before a vCPU runs with it.
    fn forget_page_tables(&self) -> Result<(), VmError> {
        let (quirks, regions) = (self.context().host().quirks(), self.ram().regions());
        let Some(first) = regions.first() else { return Ok(()) };
        let slot = regions.len() as u32;
        quirks
            .forget_page_tables(&self.prepared.fd, slot, UNUSED_PAGE.0, first.host_address())
            .map_err(|error| VmError::kvm("forget page tables", error))
    }

    /// Fails with [`VmError::Inconsistent`] after a reset that failed half-way.
    pub(crate) fn expect_whole(&self) -> Result<(), VmError> {
        // Acquire: pairs with the store of the reset that failed.
        if self.inconsistent.load(Ordering::Acquire) { Err(VmError::Inconsistent) } else { Ok(()) }
    }
}
