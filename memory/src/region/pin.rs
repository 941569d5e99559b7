//! Pins: a promise to a device that the frames behind a range stay this VM's, in place, until the
//! pin is dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use thiserror::Error;
use vm_memory::VolatileSlice;

use crate::layer::registry::View;
use crate::ownership::word::{MAX_PINS, PinMiss};
use crate::region::GuestRegion;
use crate::region::srcu::ReadGuard;
use crate::testing::sabotage::{Break, broken};
use crate::trace;
use crate::units::{PAGE_SHIFT, PageRange, pages_in, subtract_runs};

/// A pin that was refused. Nothing stays pinned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PinError {
    /// Not inside the region.
    #[error("{range} reach beyond the region's {pages} pages")]
    OutOfRange {
        /// Requested range.
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
    /// A page is absent, because it was not inherited (R19).
    #[error("a page of {range} is absent: the VM did not inherit it")]
    Absent {
        /// Requested range.
        range: PageRange,
    },
    /// The region's memory is not in one file: parts of it are mapped privately, over layers or
    /// zeros.
    #[error("the region at {base:#x} is not in one file: {shared} of its {pages} pages are")]
    NotInOneFile {
        /// Its guest physical address.
        base: u64,
        /// Its size.
        pages: u64,
        /// Pages that are mapped shared over its base file.
        shared: u64,
    },
    /// The region's file could not be opened once more.
    #[error("no descriptor for the region's file")]
    File(#[source] std::io::Error),
    /// A page has as many pins as can be counted (I6).
    #[error("a page of {range} already has {MAX_PINS} pins")]
    Saturated {
        /// Requested range.
        range: PageRange,
    },
    /// The pages of a long-term pin for writing could not be marked as written.
    #[error("{range} could not be marked as written")]
    MarkWritten {
        /// Requested range.
        range: PageRange,
        /// Why.
        #[source]
        source: io::Error,
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

/// How the device uses the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device reads them.
    Read,
    /// The device writes them.
    Write,
}

/// Lifetime of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinLifetime {
    /// For one request: the device reads the bytes present when it starts. Data is written by a
    /// processor, or by a system call that marks the pages, as a direct read does.
    Transient,
    /// Until further notice, across requests: the device must see the guest's later writes (I9).
    /// Listed with its owner as long as it is held. Writable pages have memory from the start, and
    /// are marked as written whether or not the holder of their frames marks them (I15).
    LongTerm,
}

/// A long-term pin, for listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinInfo {
    /// Owner of the pin.
    pub owner: &'static str,
    /// Pinned pages.
    pub range: PageRange,
    /// Access of the device.
    pub access: Access,
    /// Time since the pin was taken.
    pub held: Duration,
}

/// The long-term pins of a region. Short pins are only counted: listing them would cost more than
/// the pin.
#[derive(Debug, Default)]
pub(crate) struct PinList(Mutex<PinTable>);

#[derive(Debug, Default)]
struct PinTable {
    next: u64,
    /// The longest time that a released pin was held.
    longest: Duration,
    pins: BTreeMap<u64, (PinInfo, Instant)>,
}

impl PinList {
    fn listed(&self) -> std::sync::MutexGuard<'_, PinTable> {
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
        let mut listed = self.listed();
        let held = listed.pins.remove(&ticket).map_or(Duration::ZERO, |(_, since)| since.elapsed());
        listed.longest = listed.longest.max(held);
    }

    /// Number of current pins, number of all pins so far, and the longest time one was held.
    pub(crate) fn counts(&self) -> (u64, u64, Duration) {
        let listed = self.listed();
        let held = listed.pins.values().map(|(_, since)| since.elapsed()).max().unwrap_or_default();
        (listed.pins.len() as u64, listed.next, listed.longest.max(held))
    }

    /// All pins, the longest held first.
    pub(crate) fn all(&self) -> Vec<PinInfo> {
        let listed = self.listed();
        listed.pins.values().map(|(info, since)| PinInfo { held: since.elapsed(), ..info.clone() }).collect()
    }
}

/// Pages that are exclusive and stay in the same frames until this is dropped (I3).
///
/// An operation in flight owns its pin: drop it after the completion was reaped, never before.
///
/// Only a short read of pages that the VM does not own is uncounted: a layer's page does not change
/// (I4), and if the guest writes it meanwhile, the guest's copy is made *away* from the device,
/// which was asked for the bytes before the write. Such a pin holds the region's views as long as
/// it lasts, and with them layers, files and frames (`region/srcu.rs`). Resets, discards and
/// evictions spare the pages of its range.
pub struct DmaPin {
    /// Dropped before the region.
    trace: trace::Device,
    region: Arc<GuestRegion>,
    range: PageRange,
    access: Access,
    /// The counted pages, if they are not all of `range`.
    part: Option<Vec<PageRange>>,
    /// The section that keeps the views of the uncounted pages, if any.
    read_guard: Option<ReadGuard>,
    ticket: Option<u64>,
}

/// Holdings of a pin that covers other than exclusive pages: the counted pages, if not all, and the
/// section that keeps the others.
type MixedPin = (Option<Vec<PageRange>>, Option<ReadGuard>);

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

    /// Whether the pin lasts for more than one request.
    #[must_use]
    pub fn lifetime(&self) -> PinLifetime {
        if self.ticket.is_some() { PinLifetime::LongTerm } else { PinLifetime::Transient }
    }

    /// I15: looking up a frame through a writable page table entry does not mark it, and io_uring
    /// does not mark registered buffers on release. So a page that only devices have written would
    /// be clean, and the kernel would drop it under memory pressure.
    fn mark_written(&self) -> io::Result<()> {
        let may_be_written = self.access == Access::Write && self.lifetime() == PinLifetime::LongTerm;
        if !may_be_written || broken(Break::LeaveClean) {
            return Ok(());
        }
        self.region.at.mark_written(self.range)
    }

    /// Always false: a pin has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The pinned bytes.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the range was checked against the region, is mapped while the region is live, and
        // the region outlives `self`.
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
        // I15: while the pages are still pinned. A second marking is needed because the kernel may
        // have swapped pages out since the first, before the device looked them up.
        if let Err(error) = self.mark_written() {
            tracing::debug!(%error, range = %self.range, "pages of a device are not marked as written again");
        }
        self.trace.close();
        match &self.part {
            None => self.region.table.unpin(self.range),
            Some(runs) => runs.iter().for_each(|run| self.region.table.unpin(*run)),
        }
        if let Some(read_guard) = self.read_guard.take() {
            self.region.close(read_guard);
        }
        if let Some(ticket) = self.ticket {
            self.region.pins.remove(ticket);
        }
    }
}

impl GuestRegion {
    /// Pins `range` for a device. Except for a short read, every page is exclusive on return,
    /// because shared pages are copied (I3, I9).
    ///
    /// The common case, exclusive pages, takes no lock and one atomic step per page, or per 2 MiB
    /// block.
    ///
    /// # Errors
    /// [`PinError`]; then nothing stays pinned.
    pub fn pin(self: &Arc<Self>, range: PageRange, access: Access, term: PinLifetime) -> Result<DmaPin, PinError> {
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
        term: PinLifetime,
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
        let trace = trace::Device::pin(&self.table.trace, range, access, term);
        let (part, read_guard) = match self.table.try_pin(range) {
            Ok(()) => (None, None),
            Err(PinMiss::Saturated) => return Err(PinError::Saturated { range }),
            Err(PinMiss::NotExclusive | PinMiss::Split) => {
                // Otherwise part of the range would be granted, and reading the slice would kill
                // the process.
                if self.is_absent(range) {
                    return Err(PinError::Absent { range });
                }
                match self.try_open(range, access, term) {
                    Some(read_guard) => (Some(Vec::new()), Some(read_guard)),
                    None => self.pin_locked(range, access, term)?,
                }
            }
        };
        let listed = || self.pins.add(PinInfo { owner, range, access, held: Duration::ZERO });
        let ticket = (term == PinLifetime::LongTerm).then(listed);
        trace.held(part.as_deref(), read_guard.is_some());
        let pin = DmaPin { trace, region: Arc::clone(self), range, access, part, read_guard, ticket };
        pin.mark_written().map_err(|source| PinError::MarkWritten { range, source })?;
        Ok(pin)
    }

    /// The long-term pins and their owners, the longest held first.
    #[must_use]
    pub fn long_pins(&self) -> Vec<PinInfo> {
        self.pins.all()
    }

    /// Opens a short read of pages that all belong to layers. Takes no lock and no count, only a
    /// section that keeps the region's views (I4).
    fn try_open(&self, range: PageRange, access: Access, term: PinLifetime) -> Option<ReadGuard> {
        // Pages still being copied into the layer take the locked path, which reports the reason if
        // they cannot be filled.
        if access != Access::Read || term != PinLifetime::Transient || self.is_unfinished() {
            return None;
        }
        match self.srcu.try_open(range, || self.table.none_exclusive(range)) {
            Ok(read_guard) => Some(read_guard),
            Err(gone) => {
                self.dispose(gone);
                None
            }
        }
    }

    fn close(&self, read_guard: ReadGuard) {
        self.dispose(self.srcu.close(read_guard));
    }

    fn dispose(&self, gone: Vec<View>) {
        if !gone.is_empty() {
            // These views may hold the last handles of large layers, and this is a device's thread.
            self.store.dispose(gone);
        }
    }

    #[cold]
    fn pin_locked(&self, range: PageRange, access: Access, term: PinLifetime) -> Result<MixedPin, PinError> {
        // The state lock keeps freeze, adopt and reset out; the table lock keeps the bit and the
        // kernel's page tables in step.
        let state = self.state_for_pin();
        self.counters.count_locked();
        // Before the table is locked, because no thread waits with the table lock held. A page that
        // is still to be copied is copied and released now, because a device ignores protection
        // (D4). A page that was adopted unfinished is filled.
        self.copy_range_now(&state, range).map_err(|e| PinError::Unshare { range, source: io::Error::other(e) })?;
        let table = self.table.lock();
        let shared = table.not_exclusive(range);
        let brief = term == PinLifetime::Transient || broken(Break::ReadInPlace);
        if access == Access::Read && brief && !shared.is_empty() {
            let own = subtract_runs(&[range], &shared);
            for (at, run) in own.iter().enumerate() {
                table.split_partial(*run);
                if self.table.try_pin(*run).is_err() {
                    own[..at].iter().for_each(|done| self.table.unpin(*done));
                    return Err(PinError::Saturated { range });
                }
            }
            return Ok((Some(own), Some(self.srcu.open_locked(range))));
        }
        for run in shared {
            // Break COW before the bit is set: a page is exclusive only once the VM owns the frame
            // (I2). If the kernel has copied the page on an earlier guest write, this is a no-op.
            if broken(Break::PinInPlace) {
                table.set_exclusive(run);
                continue;
            }
            // Pages that the guest has copied already are not counted as copied for the pin.
            let copied = self.store.pagemap().seen_runs(&self.at, run);
            self.at.populate_write(run).map_err(|source| PinError::Unshare { range: run, source })?;
            table.set_exclusive(run);
            self.counters.count_guest(pages_in(&subtract_runs(&copied, &state.counted)));
            self.counters.count_pin(run.len().saturating_sub(pages_in(&copied)));
        }
        table.split_partial(range);
        // Under the lock no thread clears the bit or splits, so only saturation can fail the pin.
        self.table.try_pin(range).map_err(|_| PinError::Saturated { range })?;
        Ok((None, None))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::testing::busy::Busy;
    use crate::{GuestRam, NoWriters, PAGE_SIZE, Quiesced, RamLayout, Store};

    #[test]
    fn only_long_pins_are_listed_with_their_owners() {
        let store = Store::open_small().unwrap();
        let ram = GuestRam::reserve(&RamLayout::new(64 * PAGE_SIZE).unwrap(), &store).unwrap();
        ram.populate().unwrap();
        let region = &ram.regions()[0];
        let short = region.pin_as("block", PageRange::with_len(4, 2), Access::Write, PinLifetime::Transient).unwrap();
        assert_eq!(region.long_pins(), []);
        assert!(!short.is_empty());
        let long = region.pin_as("net", PageRange::with_len(8, 3), Access::Read, PinLifetime::LongTerm).unwrap();
        let listed = region.long_pins();
        let expected =
            PinInfo { held: listed[0].held, owner: "net", range: PageRange::with_len(8, 3), access: Access::Read };
        assert_eq!(listed, [expected]);
        drop(short);
        assert_eq!(region.long_pins().len(), 1, "a short pin's end is not the long one's");
        let second = region.pin_as("vhost", PageRange::with_len(20, 1), Access::Write, PinLifetime::LongTerm).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let listed = region.long_pins();
        assert_eq!(listed.iter().map(|pin| pin.owner).collect::<Vec<_>>(), ["net", "vhost"]);
        assert!(listed[0].held >= listed[1].held && listed[1].held >= Duration::from_millis(2), "{listed:?}");
        drop(long);
        assert_eq!(region.long_pins()[0].owner, "vhost");
        drop(second);
        assert_eq!(region.long_pins(), []);
    }

    /// A short read that ends may hold the last reference to a large layer: a device's thread does
    /// not free it.
    #[test]
    fn what_a_short_read_held_last_is_freed_by_the_reclaim_thread() {
        // More pages than a freeze leaves with its VM: the child shows all pages of its copy.
        const BYTES: u64 = 600 * PAGE_SIZE;
        let store = Store::open_small().unwrap();
        let stopped = || Quiesced::by(&NoWriters);
        let parent = GuestRam::reserve(&RamLayout::new(BYTES).unwrap(), &store).unwrap();
        parent.populate().unwrap();
        parent.memory().write_slice(&[1; BYTES as usize], GuestAddress(0)).unwrap();
        let (image, _) = parent.freeze(&stopped()).unwrap();
        let child = GuestRam::reserve(image.layout(), &store).unwrap();
        child.adopt(&image).unwrap();
        drop((parent, image));
        let region = &child.regions()[0];
        let layer = Arc::downgrade(&region.state().space.map().get(5).unwrap().layer);
        let pin = region.pin(PageRange::with_len(5, 2), Access::Read, PinLifetime::Transient).unwrap();
        // Overwrites all pages: only the pin's view still contains the layer.
        child.memory().write_slice(&[2; BYTES as usize], GuestAddress(0)).unwrap();
        child.freeze(&stopped()).unwrap();
        let busy = Busy::begin(&store);
        assert!(layer.strong_count() > 0, "I4: a device reads it");
        drop(pin);
        let kept = layer.strong_count();
        drop(busy);
        assert!(kept > 0, "freed on the device's thread");
        clade_test_support::wait_eq("handles of the layer that a device read", &0, || layer.strong_count());
    }
}
