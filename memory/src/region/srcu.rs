//! Grace periods for short read pins: a sleepable RCU for each region.
//!
//! A short read pin of shared pages counts nothing in the ownership table: the pages belong to a
//! layer, which does not change (I4). But the *region* changes while a device reads. A freeze, a
//! reset or a compaction maps other layers in place of those shown at the pin, and the view with
//! the old layers is dropped. If they are in no other view, their pages are punched or freed under
//! the device. So each such pin is a read-side section of its region, and a replaced view stays
//! registered ([`crate::layer::registry`]) until every section that was open then has ended.
//!
//! ```text
//!   pin (no lock)                              change (under the region's state lock)
//!   ────────────────────────────────           ──────────────────────────────────────────
//!   active[current] += 1                       sequence becomes odd
//!   sequence even? else undo, take the lock    map other layers, publish another view
//!   the pages' words: not exclusive            retire the view before, with the section still odd
//!   sequence unchanged? else undo, lock        sequence becomes even
//!   ... the device reads ...
//!   active[side] -= 1; the last one frees      retired view: dropped once both sides were empty
//! ```
//!
//! The sequence is R11's write section. Within a change a page may lack its bit for a moment
//! although it is not shared yet, and pins must not treat it as shared.
//!
//! Sections have two sides, so that pins that overlap for ever do not keep a view for ever. New
//! sections open on the current side. A retired view waits for the other side to empty, then the
//! sides swap, and the view waits for the second side.

use crate::sync::{AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, lock};
use crate::units::{PageRange, join_runs};

/// Number of range slots for lock-free sections of a region. When all are taken, a pin takes the
/// state lock.
const SLOTS: usize = if cfg!(any(loom, shuttle)) { 1 } else { 64 };
/// Bits of a slot for a range's length in pages; the others are its start.
const LEN_BITS: u32 = 24;

/// An open section: the side that counts it, and the place of its range.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ReadGuard {
    side: usize,
    range_slot: RangeSlot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RangeSlot {
    Slot(usize),
    /// In the list, with the state lock held.
    Listed(PageRange),
}

/// A range in a slot's encoding, never 0. `None` if it does not fit.
fn packed(range: PageRange) -> Option<u64> {
    let fits = !range.is_empty() && range.len() < 1 << LEN_BITS && range.start() < 1 << (64 - LEN_BITS);
    fits.then(|| range.start() << LEN_BITS | range.len())
}

fn unpacked(slot: u64) -> PageRange {
    PageRange::with_len(slot >> LEN_BITS, slot & ((1 << LEN_BITS) - 1))
}

#[derive(Debug)]
struct Retired<T> {
    /// Retired before the last swap of the sides: dropped when the other side is empty.
    closing: Vec<T>,
    /// Retired since that swap.
    fresh: Vec<T>,
}

/// See the module's documentation. `T` is the type of the retired values.
#[derive(Debug)]
pub(crate) struct Srcu<T> {
    /// Odd while the region's mappings, bits or view are being changed.
    sequence: AtomicUsize,
    /// The side on which sections open.
    current: AtomicUsize,
    /// Open sections by side.
    active: [AtomicUsize; 2],
    /// Ranges of open sections, or 0.
    slots: [AtomicU64; SLOTS],
    /// Ranges of sections without a slot.
    listed: Mutex<Vec<PageRange>>,
    /// 1 while retired values wait: the last section of a side then calls `advance`.
    waiting: AtomicUsize,
    retired: Mutex<Retired<T>>,
}

impl<T> Default for Srcu<T> {
    fn default() -> Self {
        Self {
            sequence: AtomicUsize::new(0),
            current: AtomicUsize::new(0),
            active: [AtomicUsize::new(0), AtomicUsize::new(0)],
            slots: std::array::from_fn(|_| AtomicU64::new(0)),
            listed: Mutex::new(Vec::new()),
            waiting: AtomicUsize::new(0),
            retired: Mutex::new(Retired { closing: Vec::new(), fresh: Vec::new() }),
        }
    }
}

impl<T> Srcu<T> {
    fn retired(&self) -> MutexGuard<'_, Retired<T>> {
        lock(&self.retired)
    }

    fn open(&self) -> usize {
        // Relaxed: a stale side also works, see `advance`.
        let side = self.current.load(Ordering::Relaxed);
        // AcqRel: pairs with `count`, also a read-modify-write, so that one of the two comes first.
        // Either a change that has retired a view sees this section, or this section sees that
        // change's sequence and mappings.
        self.active[side].fetch_add(1, Ordering::AcqRel);
        side
    }

    /// Notes `range` in a slot, if one is free.
    fn note(&self, range: PageRange) -> Option<usize> {
        let value = packed(range)?;
        // Fibonacci hashing: neighbours in memory, which are in flight together, start looking far
        // apart.
        let first = (range.start().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize;
        let slots = (0..SLOTS).map(|step| first.wrapping_add(step) % SLOTS);
        // AcqRel: pairs with `ranges`, also a read-modify-write. Either a change sees the range, or
        // the section sees the change's sequence.
        let mut free = slots
            .filter(|slot| self.slots[*slot].compare_exchange(0, value, Ordering::AcqRel, Ordering::Relaxed).is_ok());
        free.next()
    }

    /// Opens a section over `range` without a lock, if there is no change in progress while
    /// `shared` confirms that the pages belong to layers. Otherwise returns `Err` with the result
    /// of [`Srcu::close`].
    pub(crate) fn try_open(&self, range: PageRange, shared: impl FnOnce() -> bool) -> Result<ReadGuard, Vec<T>> {
        let side = self.open();
        let Some(slot) = self.note(range) else { return Err(self.leave(side)) };
        let guard = ReadGuard { side, range_slot: RangeSlot::Slot(slot) };
        // Acquire: pairs with `end_change`; pages shared by then are seen as shared.
        let before = self.sequence.load(Ordering::Acquire);
        // `shared` loads with Acquire, so the second load of the sequence comes after it. A bit
        // cleared by a change is seen only together with that change's odd sequence.
        if before.is_multiple_of(2) && shared() && self.sequence.load(Ordering::Acquire) == before {
            Ok(guard)
        } else {
            Err(self.close(guard))
        }
    }

    /// Opens a section over `range` for the holder of the region's state lock, which excludes
    /// changes.
    pub(crate) fn open_locked(&self, range: PageRange) -> ReadGuard {
        let side = self.open();
        let listed = || {
            lock(&self.listed).push(range);
            RangeSlot::Listed(range)
        };
        ReadGuard { side, range_slot: self.note(range).map_or_else(listed, RangeSlot::Slot) }
    }

    /// Ends a section. Returns values that are no longer read, to be dropped outside all locks.
    #[must_use = "what is returned is dropped outside all locks"]
    #[expect(clippy::needless_pass_by_value, reason = "a section is ended once")]
    pub(crate) fn close(&self, guard: ReadGuard) -> Vec<T> {
        match guard.range_slot {
            // Release: the device's reads come before the next use of the slot, or of the pages.
            RangeSlot::Slot(slot) => self.slots[slot].store(0, Ordering::Release),
            RangeSlot::Listed(range) => {
                let mut listed = lock(&self.listed);
                if let Some(at) = listed.iter().position(|listed| *listed == range) {
                    listed.swap_remove(at);
                }
            }
        }
        self.leave(guard.side)
    }

    fn leave(&self, side: usize) -> Vec<T> {
        // AcqRel: pairs with `count`. The device's reads come before any use of freed memory.
        // Either `retire` sees that the section has ended, or this thread sees the waiting flag.
        let last = self.active[side].fetch_sub(1, Ordering::AcqRel) == 1;
        if last && self.waiting.load(Ordering::Acquire) != 0 { self.advance(&mut self.retired()) } else { Vec::new() }
    }

    /// Open sections of a side. A read-modify-write, see `open`.
    fn count(&self, side: usize) -> usize {
        self.active[side].fetch_add(0, Ordering::AcqRel)
    }

    /// The ranges of open sections, as ascending runs. No section opens within a change, so these
    /// are all the pages that a change must not remove.
    pub(crate) fn ranges(&self) -> Vec<PageRange> {
        if self.count(0) + self.count(1) == 0 {
            return Vec::new();
        }
        let mut ranges = lock(&self.listed).clone();
        let slots = self.slots.iter().map(|slot| slot.fetch_or(0, Ordering::AcqRel));
        ranges.extend(slots.filter(|slot| *slot != 0).map(unpacked));
        ranges.sort_unstable();
        join_runs(&ranges, 0)
    }

    /// A change begins. Under the state lock.
    pub(crate) fn begin_change(&self) {
        // A thread that sees a bit cleared after this, by a release, also sees this increment.
        let was = self.sequence.fetch_add(1, Ordering::AcqRel);
        debug_assert!(was.is_multiple_of(2), "changes do not nest: the state lock is held");
    }

    /// A change ends. Under the state lock, after everything it replaced was retired.
    pub(crate) fn end_change(&self) {
        self.sequence.fetch_add(1, Ordering::Release);
    }

    /// Retires `old`, which has no new readers, until all currently open sections have ended.
    /// Called within a change. Returns values that are no longer read.
    #[must_use = "what is returned is dropped outside all locks"]
    pub(crate) fn retire(&self, old: T) -> Vec<T> {
        let mut retired = self.retired();
        retired.fresh.push(old);
        // Before the counts are read: see `close`.
        self.waiting.store(1, Ordering::Release);
        self.advance(&mut retired)
    }

    /// Releases values that have waited for both sides.
    fn advance(&self, retired: &mut Retired<T>) -> Vec<T> {
        let mut free = Vec::new();
        loop {
            let current = self.current.load(Ordering::Relaxed);
            if self.count(1 - current) != 0 {
                break;
            }
            free.append(&mut retired.closing);
            if retired.fresh.is_empty() {
                break;
            }
            // A section that has loaded the old side but counts itself only now opened after all
            // closing values were replaced, so it cannot be reading them. Values retired later wait
            // for its side as well.
            retired.closing.append(&mut retired.fresh);
            self.current.store(1 - current, Ordering::Relaxed);
        }
        let waiting = usize::from(!(retired.closing.is_empty() && retired.fresh.is_empty()));
        self.waiting.store(waiting, Ordering::Release);
        free
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const RANGE: PageRange = PageRange::new(3, 5);

    fn opened(srcu: &Srcu<u32>) -> ReadGuard {
        srcu.try_open(RANGE, || true).expect("nothing is being changed")
    }

    #[test]
    fn what_is_being_read_is_known_however_many_read() {
        let srcu = Srcu::<u32>::default();
        assert!(srcu.ranges().is_empty());
        let mut open: Vec<_> =
            (0..SLOTS as u64).map(|n| srcu.try_open(PageRange::with_len(3 * n, 2), || true)).collect();
        assert!(open.iter().all(Result::is_ok));
        assert!(srcu.try_open(RANGE, || true).is_err(), "no slot is left");
        let more = [RANGE, PageRange::with_len(1 << 50, 1 << 30)].map(|range| srcu.open_locked(range));
        assert_eq!(srcu.ranges().len(), SLOTS + 1, "one lies over two of the others");
        assert!(
            srcu.ranges().contains(&PageRange::new(3, 5))
                && srcu.ranges().contains(&PageRange::with_len(1 << 50, 1 << 30))
        );
        more.into_iter().for_each(|guard| drop(srcu.close(guard)));
        assert_eq!(srcu.ranges().len(), SLOTS);
        drop(srcu.close(open.swap_remove(7).unwrap()));
        assert!(!srcu.ranges().contains(&PageRange::with_len(21, 2)));
        assert!(srcu.try_open(RANGE, || true).is_ok());
    }

    #[test]
    fn what_is_retired_goes_when_the_sections_that_were_open_have_ended() {
        let srcu = Srcu::default();
        assert_eq!(srcu.retire(1), [1], "nobody reads");
        let first = opened(&srcu);
        assert_eq!(srcu.retire(2), [0; 0]);
        let second = opened(&srcu);
        assert_eq!(srcu.retire(3), [0; 0]);
        assert_eq!(srcu.close(first), [2], "the second section opened after 2 had gone from sight");
        assert_eq!(srcu.ranges(), [RANGE]);
        assert_eq!(srcu.close(second), [3]);
        assert_eq!(srcu.retire(4), [4]);
    }

    #[test]
    fn sections_that_overlap_for_ever_keep_nothing_for_ever() {
        let srcu = Srcu::default();
        let mut open = opened(&srcu);
        let (mut kept, mut freed) = (0, 0);
        for round in 0..100 {
            freed += srcu.retire(round).len();
            let next = opened(&srcu);
            freed += srcu.close(open).len();
            open = next;
            kept = kept.max(round as usize + 1 - freed);
        }
        assert!(kept <= 3, "{kept} were kept at a time");
        freed += srcu.close(open).len();
        assert_eq!(freed, 100, "all is gone with the last section");
    }

    #[test]
    fn no_section_opens_within_a_change_or_over_pages_that_are_not_shared() {
        let srcu = Srcu::<u32>::default();
        assert!(srcu.try_open(RANGE, || false).is_err());
        srcu.begin_change();
        assert!(srcu.try_open(RANGE, || true).is_err());
        srcu.end_change();
        let changed = srcu.try_open(RANGE, || {
            srcu.begin_change();
            srcu.end_change();
            true
        });
        assert!(changed.is_err(), "changed between the two looks");
        assert!(srcu.ranges().is_empty());
        assert!(srcu.try_open(RANGE, || true).is_ok());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::ownership::word::{Ownership, Word};
    use loom::sync::Arc;
    use loom::thread;

    /// A file that is freed when its last view is dropped. No device may read it then.
    struct File(Arc<AtomicUsize>);

    impl Drop for File {
        fn drop(&mut self) {
            let readers = self.0.swap(1_000, Ordering::AcqRel);
            assert_eq!(readers, 0, "given back under a device");
        }
    }

    /// One region whose view is replaced twice, and devices that read the shown file.
    fn readers_against_changes(readers: usize) {
        let srcu = Arc::new(Srcu::<File>::default());
        let files: Vec<_> = (0..3).map(|_| Arc::new(AtomicUsize::new(0))).collect();
        // Which file the region shows.
        let shown = Arc::new(AtomicUsize::new(0));
        let devices: Vec<_> = (0..readers)
            .map(|_| {
                let (srcu, files, shown) = (Arc::clone(&srcu), files.clone(), Arc::clone(&shown));
                thread::spawn(move || {
                    let Ok(guard) = srcu.try_open(PageRange::new(0, 1), || true) else { return };
                    // The file mapped when the device gets to it, which may be later than the pin.
                    let file = &files[shown.load(Ordering::Acquire)];
                    let before = file.fetch_add(1, Ordering::AcqRel);
                    assert!(before < 1_000, "read after it was given back");
                    file.fetch_sub(1, Ordering::AcqRel);
                    drop(srcu.close(guard));
                })
            })
            .collect();
        for next in 1..3 {
            srcu.begin_change();
            shown.store(next, Ordering::Release);
            let gone = srcu.retire(File(Arc::clone(&files[next - 1])));
            srcu.end_change();
            drop(gone);
        }
        devices.into_iter().for_each(|device| device.join().unwrap());
    }

    #[test]
    fn loom_a_view_outlives_the_sections_that_read_it() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| readers_against_changes(1));
    }

    #[test]
    fn loom_a_view_outlives_the_sections_of_two_devices() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| readers_against_changes(2));
    }

    /// A page that loses its bit within a change is not shared yet, and pins must not treat it as
    /// shared.
    #[test]
    fn loom_a_bit_that_is_given_up_for_a_moment_is_not_taken_for_shared() {
        loom::model(|| {
            let (srcu, word) = (Arc::new(Srcu::<u32>::default()), Arc::new(Word::new(Ownership::new(true, 0))));
            let device = {
                let (srcu, word) = (Arc::clone(&srcu), Arc::clone(&word));
                thread::spawn(move || srcu.try_open(PageRange::new(0, 1), || !word.load().is_exclusive()).is_ok())
            };
            srcu.begin_change();
            let shared = word.try_share();
            assert!(shared.is_ok());
            word.set_exclusive();
            srcu.end_change();
            assert!(!device.join().unwrap(), "a page that was never shared");
        });
    }

    /// A discard spares a page that is being read. A device that was allowed to read it finds it
    /// there until the end.
    #[test]
    fn loom_what_is_being_read_is_not_taken_away() {
        loom::model(|| {
            let (srcu, there) = (Arc::new(Srcu::<u32>::default()), Arc::new(AtomicUsize::new(1)));
            let device = {
                let (srcu, there) = (Arc::clone(&srcu), Arc::clone(&there));
                thread::spawn(move || {
                    let Ok(guard) = srcu.try_open(PageRange::new(0, 1), || true) else { return };
                    let before = there.load(Ordering::Acquire);
                    assert_eq!(there.load(Ordering::Acquire), before, "taken away under a device");
                    drop(srcu.close(guard));
                })
            };
            srcu.begin_change();
            if srcu.ranges().is_empty() {
                there.store(0, Ordering::Release);
            }
            srcu.end_change();
            device.join().unwrap();
        });
    }
}
