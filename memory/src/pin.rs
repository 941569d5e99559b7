//! Pins: a promise to a device that the frames behind a range stay this VM's, in place, until the pin is dropped.

use std::sync::Arc;
use std::time::Instant;
use std::{fmt, io};

use thiserror::Error;
use vm_memory::VolatileSlice;

use crate::region::GuestRegion;
use crate::units::{PAGE_SHIFT, PageRange};
use crate::word::{MAX_PINS, PinMiss};

/// A pin that was refused. Nothing stays pinned.
#[derive(Debug, Error)]
pub enum PinError {
    /// Not inside the region.
    #[error("{range} reach beyond the region's {pages} pages")]
    OutOfRange {
        /// Asked for.
        range: PageRange,
        /// Size of the region.
        pages: u64,
    },
    /// Nothing to pin.
    #[error("a pin needs at least one page")]
    NoPages,
    /// The region has no memory.
    #[error("the region at {base:#x} has no memory yet")]
    Empty {
        /// Its guest physical address.
        base: u64,
    },
    /// A page has as many pins as can be counted (I6).
    #[error("a page of {range} already has {MAX_PINS} pins")]
    Saturated {
        /// Asked for.
        range: PageRange,
    },
    /// The VM's own copy of a shared page could not be made.
    #[error("{range} could not be unshared")]
    Unshare {
        /// The shared run.
        range: PageRange,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Pages that are exclusive and stay the same frames until this is dropped (I3).
///
/// An operation in flight owns its pin: drop it after the completion has been reaped, never before.
pub struct DmaPin {
    region: Arc<GuestRegion>,
    range: PageRange,
    since: Instant,
}

impl DmaPin {
    /// The pages pinned.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// When the pin was taken.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Host address of the first byte, stable for the pin's life.
    #[must_use]
    pub fn host_address(&self) -> *mut u8 {
        self.region.at.addr(self.range.start)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.bytes()
    }

    /// Never: a pin has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The pinned bytes.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the range was checked against the region, is mapped while the region is live, and the region outlives `self`.
        unsafe { VolatileSlice::new(self.host_address(), self.len()) }
    }
}

impl fmt::Debug for DmaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpa = self.region.base.0 + (self.range.start << PAGE_SHIFT);
        write!(f, "DmaPin({gpa:#x} + {:#x} pages, for {:?})", self.range.len(), self.since.elapsed())
    }
}

impl Drop for DmaPin {
    fn drop(&mut self) {
        self.region.table.unpin(self.range);
    }
}

impl GuestRegion {
    /// Pins `range`: every page is exclusive before this returns, by copying the shared ones (I3, I9).
    ///
    /// The common case, exclusive pages, takes no lock and one atomic step a page, or one a 2 MiB block.
    ///
    /// # Errors
    /// [`PinError`]; then nothing stays pinned.
    pub fn pin(self: &Arc<Self>, range: PageRange) -> Result<DmaPin, PinError> {
        if range.is_empty() {
            return Err(PinError::NoPages);
        }
        if range.end > self.pages() {
            return Err(PinError::OutOfRange { range, pages: self.pages() });
        }
        if !self.is_live() {
            return Err(PinError::Empty { base: self.base.0 });
        }
        match self.table.try_pin(range) {
            Ok(()) => {}
            Err(PinMiss::Saturated) => return Err(PinError::Saturated { range }),
            Err(PinMiss::NotExclusive | PinMiss::Split) => self.unshare_and_pin(range)?,
        }
        Ok(DmaPin { region: Arc::clone(self), range, since: Instant::now() })
    }

    #[cold]
    fn unshare_and_pin(&self, range: PageRange) -> Result<(), PinError> {
        // The state lock keeps freeze and adopt out; the table lock keeps the bit and the kernel's page tables in step.
        let _state = self.state();
        let table = self.table.lock();
        for run in table.not_exclusive(range) {
            // Break COW before the bit is set: a page is exclusive only once the frame is ours (I2). Where the kernel already
            // copied it for an earlier guest write, this finds it writable and does nothing.
            self.at.populate_write(run).map_err(|source| PinError::Unshare { range: run, source })?;
            table.set_exclusive(run);
        }
        table.split_partial(range);
        // Under the lock nobody clears the bit or splits, so only saturation is left to miss.
        self.table.try_pin(range).map_err(|_| PinError::Saturated { range })
    }
}
