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
use crate::region::grace::Section;
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
    /// A page is absent, because it was not inherited (R19).
    #[error("a page of {range} is absent: the VM did not inherit it")]
    Absent {
        /// Asked for.
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
        /// Asked for.
        range: PageRange,
    },
    /// The pages of a long-term pin for writing could not be marked as written.
    #[error("{range} could not be marked as written")]
    MarkWritten {
        /// Asked for.
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
pub enum PinLifetime {
    /// For one request: the device reads what is there when it starts. What it writes is written by a
    /// processor, or by a system call that marks the pages, as a direct read does.
    Transient,
    /// Until further notice, across requests: the guest's later writes must be seen (I9). Listed
    /// with its owner while it lasts. Pages that may be written have memory from the start, and the
    /// kernel takes them for written, whoever holds their frames says so or not (I15).
    LongTerm,
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

/// The long-term pins of a region. Short ones are only counted: writing their names down would cost
/// more than the pin.
#[derive(Debug, Default)]
pub(crate) struct PinList(Mutex<Listed>);

#[derive(Debug, Default)]
struct Listed {
    next: u64,
    /// The longest that one was held which is not any more.
    longest: Duration,
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
        let mut listed = self.listed();
        let held = listed.pins.remove(&ticket).map_or(Duration::ZERO, |(_, since)| since.elapsed());
        listed.longest = listed.longest.max(held);
    }

    /// How many there are and have been, and the longest that one was or has been held.
    pub(crate) fn counts(&self) -> (u64, u64, Duration) {
        let listed = self.listed();
        let held = listed.pins.values().map(|(_, since)| since.elapsed()).max().unwrap_or_default();
        (listed.pins.len() as u64, listed.next, listed.longest.max(held))
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
/// A short read of pages that are not the VM's own is the one case in which nothing is counted for
/// them: a layer's page does not change (I4), and one that the guest writes meanwhile is copied
/// *away* from the device, which was asked for what was there before. Such a pin holds the views
/// its region shows while it lasts, and with them the layers, files and frames
/// (`region/grace.rs`); no reset, discard or eviction takes a page of its range away.
pub struct DmaPin {
    /// Before the region may go.
    trace: trace::Device,
    region: Arc<GuestRegion>,
    range: PageRange,
    access: Access,
    /// The pages counted, where they are not all of `range`.
    part: Option<Vec<PageRange>>,
    /// Where some are not: what keeps the views that show them.
    section: Option<Section>,
    ticket: Option<u64>,
}

/// What a pin that is not of exclusive pages alone holds: the pages counted, if not all, and what
/// keeps the others.
type Held = (Option<Vec<PageRange>>, Option<Section>);

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

    /// Whether it is for more than one request.
    #[must_use]
    pub fn lifetime(&self) -> PinLifetime {
        if self.ticket.is_some() { PinLifetime::LongTerm } else { PinLifetime::Transient }
    }

    /// I15: a frame that was looked up where the page tables allowed writing is not marked by that, and
    /// io_uring marks none when it lets go of a registered buffer. A page that only devices have
    /// written would then be clean: the kernel drops it when memory is short.
    fn mark_written(&self) -> io::Result<()> {
        let may_be_written = self.access == Access::Write && self.lifetime() == PinLifetime::LongTerm;
        if !may_be_written || broken(Break::LeaveClean) {
            return Ok(());
        }
        self.region.at.mark_written(self.range)
    }

    /// Never: a pin has at least one page.
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
        // I15: while they are still pinned. Once more, because the kernel may have written pages to swap
        // space since, before the device looked them up.
        if let Err(error) = self.mark_written() {
            tracing::debug!(%error, range = %self.range, "pages of a device are not marked as written again");
        }
        self.trace.close();
        match &self.part {
            None => self.region.table.unpin(self.range),
            Some(runs) => runs.iter().for_each(|run| self.region.table.unpin(*run)),
        }
        if let Some(section) = self.section.take() {
            self.region.close(section);
        }
        if let Some(ticket) = self.ticket {
            self.region.pins.remove(ticket);
        }
    }
}

impl GuestRegion {
    /// Pins `range` for a device. Except for a short read, every page is exclusive before this
    /// returns, by copying the shared ones (I3, I9).
    ///
    /// The common case, exclusive pages, takes no lock and one atomic step a page, or one a 2 MiB
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
        let (part, section) = match self.table.try_pin(range) {
            Ok(()) => (None, None),
            Err(PinMiss::Saturated) => return Err(PinError::Saturated { range }),
            Err(PinMiss::NotExclusive | PinMiss::Split) => {
                // A part of it would be granted otherwise, and a read of the slice would end the
                // process.
                if self.is_absent(range) {
                    return Err(PinError::Absent { range });
                }
                match self.try_open(range, access, term) {
                    Some(section) => (Some(Vec::new()), Some(section)),
                    None => self.pin_locked(range, access, term)?,
                }
            }
        };
        let listed = || self.pins.add(PinInfo { owner, range, access, held: Duration::ZERO });
        let ticket = (term == PinLifetime::LongTerm).then(listed);
        trace.held(part.as_deref(), section.is_some());
        let pin = DmaPin { trace, region: Arc::clone(self), range, access, part, section, ticket };
        pin.mark_written().map_err(|source| PinError::MarkWritten { range, source })?;
        Ok(pin)
    }

    /// The long-term pins and their owners, the longest held first.
    #[must_use]
    pub fn long_pins(&self) -> Vec<PinInfo> {
        self.pins.all()
    }

    /// A short read of pages that are all a layer's: no lock, no count, but a section that keeps
    /// what the region shows (I4).
    fn try_open(&self, range: PageRange, access: Access, term: PinLifetime) -> Option<Section> {
        // What is still being copied into the layer is brought by the locked path, which says why
        // if it cannot be had.
        if access != Access::Read || term != PinLifetime::Transient || self.is_unfinished() {
            return None;
        }
        match self.grace.try_open(range, || self.table.none_exclusive(range)) {
            Ok(section) => Some(section),
            Err(gone) => {
                self.dispose(gone);
                None
            }
        }
    }

    fn close(&self, section: Section) {
        self.dispose(self.grace.close(section));
    }

    fn dispose(&self, gone: Vec<View>) {
        if !gone.is_empty() {
            // They may hold the last handles of large layers, and this is a device's thread.
            self.store.dispose(gone);
        }
    }

    #[cold]
    fn pin_locked(&self, range: PageRange, access: Access, term: PinLifetime) -> Result<Held, PinError> {
        // The state lock keeps freeze, adopt and reset out; the table lock keeps the bit and the
        // kernel's page tables in step.
        let state = self.state_for_pin();
        self.counters.count_locked();
        // Before the table is locked, which is never held while waiting: a page that is still being
        // copied is copied now and released, because a device heeds no protection (D4); one that
        // was adopted unfinished is made to be there.
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
            return Ok((Some(own), Some(self.grace.open_locked(range))));
        }
        for run in shared {
            // Break COW before the bit is set: a page is exclusive only once the frame is ours
            // (I2). Where the kernel already copied it for an earlier guest write, this finds it
            // writable and does nothing.
            if broken(Break::PinInPlace) {
                table.set_exclusive(run);
                continue;
            }
            // What the guest has copied already is not copied for the pin.
            let copied = self.store.pagemap().seen_runs(&self.at, run);
            self.at.populate_write(run).map_err(|source| PinError::Unshare { range: run, source })?;
            table.set_exclusive(run);
            self.counters.count_guest(pages_in(&subtract_runs(&copied, &state.counted)));
            self.counters.count_pin(run.len().saturating_sub(pages_in(&copied)));
        }
        table.split_partial(range);
        // Under the lock no thread clears the bit or splits, so only saturation is left to miss.
        self.table.try_pin(range).map_err(|_| PinError::Saturated { range })?;
        Ok((None, None))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::reclaim::Busy;
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

    /// A short read that ends may be the last to hold a large layer: a device's thread does not
    /// free it.
    #[test]
    fn what_a_short_read_held_last_is_freed_by_the_reclaim_thread() {
        // More than a freeze leaves with its VM: the child is shown all of its copy.
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
        // All of it anew: only the view that the pin holds still names the layer.
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
