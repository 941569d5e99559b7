//! Pins: a promise to a device that the frames behind a range stay this VM's, in place, until the pin is dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use thiserror::Error;
use vm_memory::VolatileSlice;

use crate::region::GuestRegion;
use crate::sabotage::{Break, broken};
use crate::units::{PAGE_SHIFT, PageRange, subtract_runs};
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

/// What the device will do with the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read them.
    Read,
    /// Write them.
    Write,
}

/// For how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Term {
    /// For one request: the device reads what is there when it starts.
    Short,
    /// Until further notice, across requests: the guest's later writes must be seen (I9). Listed with its owner while it lasts.
    Long,
}

/// A long-term pin, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinInfo {
    /// Who asked for it.
    pub owner: &'static str,
    /// Which pages.
    pub range: PageRange,
    /// What for.
    pub access: Access,
    /// For how long it has been held.
    pub held: Duration,
}

/// The long-term pins of a region. Short ones are only counted: writing their names down would cost more than the pin.
#[derive(Debug, Default)]
pub(crate) struct PinList(Mutex<Listed>);

#[derive(Debug, Default)]
struct Listed {
    next: u64,
    pins: BTreeMap<u64, (PinInfo, Instant)>,
}

impl PinList {
    fn listed(&self) -> std::sync::MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, info: PinInfo) -> u64 {
        let mut listed = self.listed();
        listed.next += 1;
        let ticket = listed.next;
        listed.pins.insert(ticket, (info, Instant::now()));
        ticket
    }

    fn remove(&self, ticket: u64) {
        self.listed().pins.remove(&ticket);
    }

    /// All of them, the longest held first.
    pub(crate) fn all(&self) -> Vec<PinInfo> {
        let listed = self.listed();
        listed.pins.values().map(|(info, since)| PinInfo { held: since.elapsed(), ..info.clone() }).collect()
    }
}

/// Pages that are exclusive and stay the same frames until this is dropped (I3).
///
/// An operation in flight owns its pin: drop it after the completion has been reaped, never before.
///
/// A short read of pages that are not the VM's own is the one case in which nothing is counted for them: a layer's page does not change
/// (I4), and one that the guest writes meanwhile is copied *away* from the device, which was asked for what was there before.
pub struct DmaPin {
    region: Arc<GuestRegion>,
    range: PageRange,
    /// The pages counted, where they are not all of `range`.
    part: Option<Vec<PageRange>>,
    ticket: Option<u64>,
}

impl DmaPin {
    /// The pages pinned.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.range
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
        write!(f, "DmaPin({gpa:#x} + {:#x} pages)", self.range.len())
    }
}

impl Drop for DmaPin {
    fn drop(&mut self) {
        match &self.part {
            None => self.region.table.unpin(self.range),
            Some(runs) => runs.iter().for_each(|run| self.region.table.unpin(*run)),
        }
        if let Some(ticket) = self.ticket {
            self.region.pins.remove(ticket);
        }
    }
}

impl GuestRegion {
    /// Pins `range` for a device. Except for a short read, every page is exclusive before this returns, by copying the shared ones (I3, I9).
    ///
    /// The common case, exclusive pages, takes no lock and one atomic step a page, or one a 2 MiB block.
    ///
    /// # Errors
    /// [`PinError`]; then nothing stays pinned.
    pub fn pin(self: &Arc<Self>, range: PageRange, access: Access, term: Term) -> Result<DmaPin, PinError> {
        self.pin_as("unnamed", range, access, term)
    }

    /// As [`GuestRegion::pin`], with the owner's name for [`GuestRegion::long_pins`].
    ///
    /// # Errors
    /// [`PinError`]; then nothing stays pinned.
    pub fn pin_as(
        self: &Arc<Self>,
        owner: &'static str,
        range: PageRange,
        access: Access,
        term: Term,
    ) -> Result<DmaPin, PinError> {
        if range.is_empty() {
            return Err(PinError::NoPages);
        }
        if range.end > self.pages() {
            return Err(PinError::OutOfRange { range, pages: self.pages() });
        }
        if !self.is_live() {
            return Err(PinError::Empty { base: self.base.0 });
        }
        let part = match self.table.try_pin(range) {
            Ok(()) => None,
            Err(PinMiss::Saturated) => return Err(PinError::Saturated { range }),
            Err(PinMiss::NotExclusive | PinMiss::Split) => self.pin_locked(range, access, term)?,
        };
        let listed = || self.pins.add(PinInfo { owner, range, access, held: Duration::ZERO });
        let ticket = (term == Term::Long).then(listed);
        Ok(DmaPin { region: Arc::clone(self), range, part, ticket })
    }

    /// The long-term pins and their owners, the longest held first.
    #[must_use]
    pub fn long_pins(&self) -> Vec<PinInfo> {
        self.pins.all()
    }

    #[cold]
    fn pin_locked(&self, range: PageRange, access: Access, term: Term) -> Result<Option<Vec<PageRange>>, PinError> {
        // The state lock keeps freeze, adopt and reset out; the table lock keeps the bit and the kernel's page tables in step.
        let state = self.state();
        // Before the table is locked, which is never held while waiting: a page that is still being copied is copied now and
        // released, because a device heeds no protection (D4); one that was adopted unfinished is made to be there.
        self.settle(&state, range).map_err(|e| PinError::Unshare { range, source: io::Error::other(e) })?;
        let table = self.table.lock();
        let shared = table.not_exclusive(range);
        let brief = term == Term::Short || broken(Break::ReadInPlace);
        if access == Access::Read && brief && !shared.is_empty() {
            let own = subtract_runs(&[range], &shared);
            for (at, run) in own.iter().enumerate() {
                table.split_partial(*run);
                if self.table.try_pin(*run).is_err() {
                    own[..at].iter().for_each(|done| self.table.unpin(*done));
                    return Err(PinError::Saturated { range });
                }
            }
            return Ok(Some(own));
        }
        for run in shared {
            // Break COW before the bit is set: a page is exclusive only once the frame is ours (I2). Where the kernel already
            // copied it for an earlier guest write, this finds it writable and does nothing.
            if broken(Break::PinInPlace) {
                table.set_exclusive(run);
                continue;
            }
            self.at.populate_write(run).map_err(|source| PinError::Unshare { range: run, source })?;
            table.set_exclusive(run);
        }
        table.split_partial(range);
        // Under the lock nobody clears the bit or splits, so only saturation is left to miss.
        self.table.try_pin(range).map_err(|_| PinError::Saturated { range })?;
        Ok(None)
    }
}
