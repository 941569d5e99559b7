//! Reset: back to an image, in place. The cost is in pages written since, not in memory size.
//!
//! A page that the VM has written since is dropped, and the private mapping shows the layer again.
//! A range is mapped anew if the layer behind it is no longer the image's (the VM was frozen
//! since), or if the VM's copy lies over an older layer (a freeze copied it and left it in place).

use std::sync::Arc;

use crate::error::RamError;
use crate::layer::LayerMap;
use crate::region::freeze::RegionImage;
use crate::region::mappings::{Mapping, Mappings};
use crate::region::{GuestRegion, State};
use crate::units::{BLOCK_PAGES, PageRange, join_runs, pages_in, push_run, subtract_runs};

/// Shared pages between two of the VM's own are dropped along up to this count. Showing them again
/// costs the guest at most one fault, since fault-around maps a page's neighbours with it. That is
/// no more than the saved system call (4 us with KVM's part in it).
const MAX_GAP: u64 = 16;
/// Runs of one block that are dropped one by one. With more, the gaps between them are dropped too.
const MAX_RUNS: usize = 8;

/// Mappings of a region, beyond [`PIECES_OF_A_MAPPING`] for each one that an image needs, at which a reset
/// joins them. Freezes and resets in turn split mappings that show one layer in order, and the host limits
/// their number.
const MAX_PIECES: usize = 1024;
const PIECES_OF_A_MAPPING: usize = 4;

/// Result of a reset. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamResetReport {
    /// The VM's own copies that were dropped.
    pub dropped: u64,
    /// Pages mapped anew.
    pub remapped: u64,
}

impl std::ops::AddAssign for RamResetReport {
    fn add_assign(&mut self, other: Self) {
        self.dropped += other.dropped;
        self.remapped += other.remapped;
    }
}

/// The reason why a reset failed.
#[derive(Debug)]
pub(crate) enum ResetError {
    /// Nothing has changed.
    Refused(RamError),
    /// The reset is partly done.
    Inconsistent(RamError),
}

impl From<RamError> for ResetError {
    fn from(error: RamError) -> Self {
        Self::Refused(error)
    }
}

/// Whether a private mapping shows the pages of `want`.
fn shows(have: &Mapping, want: &Mapping) -> bool {
    match (have, want) {
        (Mapping::Private(have), Mapping::Private(want)) => have.is(want),
        // Ranges that were not inherited stay absent (R19).
        (Mapping::Zero, Mapping::Zero) | (Mapping::Absent, _) => true,
        _ => false,
    }
}

/// The mappings that `map` requires.
fn wanted(map: &LayerMap, all: PageRange) -> Vec<(PageRange, Mapping)> {
    let mut out = Vec::with_capacity(map.len() + 1);
    let mut at = all.start;
    for (range, source) in map.iter() {
        out.push((PageRange::new(at, range.start), Mapping::Zero));
        out.push((range, Mapping::Private(source.clone())));
        at = range.end;
    }
    out.push((PageRange::new(at, all.end), Mapping::Zero));
    out.retain(|(range, _)| !range.is_empty());
    out
}

/// The runs of `range` whose mapping is not `want`, each with its required mapping. With `join`, all of the
/// range if several mappings show it.
fn differing(mappings: &Mappings, range: PageRange, want: &Mapping, join: bool) -> Vec<(PageRange, Mapping)> {
    use crate::layer::interval::Piece;
    let pieces = mappings.within(range);
    let join = join && pieces.len() > 1;
    let mut runs = Vec::new();
    for (piece, have) in pieces {
        // R19.
        let is_joined = join && !matches!(have, Mapping::Absent);
        if is_joined || !shows(&have, &want.advance(piece.start - range.start)) {
            push_run(&mut runs, piece);
        }
    }
    runs.into_iter().map(|run| (run, want.advance(run.start - range.start))).collect()
}

/// `runs`, ascending, joined over gaps where that costs less than it saves. Only shared pages are
/// added, whose loss is a fault.
fn joined(runs: &[PageRange]) -> Vec<PageRange> {
    let mut out: Vec<PageRange> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some(last) if run.start - last.end <= MAX_GAP => last.end = run.end,
            _ => out.push(*run),
        }
    }
    let block = |run: &PageRange| run.start / BLOCK_PAGES;
    let crowds = out.chunk_by(|a, b| block(a) == block(b));
    let each = crowds.flat_map(|runs| match runs {
        [first, .., last] if runs.len() > MAX_RUNS => vec![PageRange::new(first.start, last.end)],
        few => few.to_vec(),
    });
    each.collect()
}

impl GuestRegion {
    /// The reason why the region cannot be reset now, if any. Callers that can wait do so.
    pub(crate) fn in_use(&self) -> Option<RamError> {
        let mut pinned = self.table.pinned_runs(self.range());
        pinned.extend(self.srcu.ranges());
        pinned.sort_unstable();
        let pinned = join_runs(&pinned, 0);
        let first = pinned.first().copied()?;
        Some(RamError::Pinned { pages: pages_in(&pinned), first })
    }

    /// Whether a reset has failed half-way.
    pub(crate) fn is_inconsistent(&self) -> bool {
        self.state().inconsistent
    }

    /// Notes that a reset of the VM has failed half-way, even if not in this region.
    pub(crate) fn mark_inconsistent(&self) {
        self.state().inconsistent = true;
    }

    /// Resets `regions` to `images`. There are no writers. All checks of all regions precede the
    /// first change.
    pub(crate) fn reset_all(
        regions: &[Arc<Self>],
        images: &[RegionImage],
        report: &mut RamResetReport,
    ) -> Result<(), ResetError> {
        let (Some((region, rest)), Some((image, images))) = (regions.split_first(), images.split_first()) else {
            return Ok(());
        };
        let map = image.map.map();
        let mut state = region.live_state()?;
        if let Some(error) = region.lost() {
            return Err(RamError::Lost(error).into());
        }
        // Finishes background copies first, because they read pages that the reset drops.
        region.finish_background(&mut state)?;
        // I7: no uncounted read begins until the lock is released.
        let read = region.srcu.ranges();
        if let Some(first) = read.first().copied() {
            return Err(RamError::Pinned { pages: pages_in(&read), first }.into());
        }
        let table = region.table.lock();
        let base = state.space.mappings().base_runs();
        let owned = region.owned_private(region.range(), &base)?;
        let unseen = region.unseen_copies(&state, &owned);
        region.table.trace.reset_begun();
        // I7, I8: the bit is cleared before the page is dropped. An earlier pin refuses the reset,
        // and a later one waits for the lock.
        let mut pinned = Vec::new();
        for run in base.iter().chain(&owned) {
            pinned.extend(table.share(*run));
        }
        if let Some(first) = pinned.first().copied() {
            base.iter().chain(&owned).for_each(|run| table.set_exclusive(*run));
            return Err(RamError::Pinned { pages: pages_in(&pinned), first }.into());
        }
        // Before any change. A refusal here or in another region leaves everything as it was.
        let todo = region.prepare(&mut state, map).map_err(ResetError::from);
        let todo = todo.and_then(|todo| Self::reset_all(rest, images, report).map(|()| todo));
        let todo = todo.inspect_err(|_| {
            region.reclaim(&state, &table, region.range());
            state.space.trim();
        })?;
        // Until the reset is complete: if it ends in a panic, the VM must not run on.
        state.inconsistent = true;
        *report += region.put_back(&mut state, map, &base, &owned, &todo).map_err(ResetError::Inconsistent)?;
        state.inconsistent = false;
        region.counters.count_guest(unseen);
        state.counted.clear();
        state.ahead.clear();
        state.moved = false;
        Ok(())
    }

    /// The ranges to map anew for `map`, with their mappings reserved (D5).
    fn prepare(&self, state: &mut State, map: &LayerMap) -> Result<Vec<(PageRange, Mapping)>, RamError> {
        let wanted = wanted(map, self.range());
        let todo = |state: &State, join: bool| -> Vec<(PageRange, Mapping)> {
            let mappings = state.space.mappings();
            wanted.iter().flat_map(|(range, want)| differing(mappings, *range, want, join)).collect()
        };
        if state.space.mappings().len() > PIECES_OF_A_MAPPING * wanted.len() + MAX_PIECES {
            let joined = todo(state, true);
            if state.space.reserve_runs(joined.len()).is_ok() {
                return Ok(joined);
            }
            // Near the host's limit. What differs may be less.
        }
        let todo = todo(state, false);
        state.space.reserve_runs(todo.len())?;
        Ok(todo)
    }

    fn put_back(
        &self,
        state: &mut State,
        map: &Arc<LayerMap>,
        base: &[PageRange],
        owned: &[PageRange],
        todo: &[(PageRange, Mapping)],
    ) -> Result<RamResetReport, RamError> {
        let anew: Vec<PageRange> = todo.iter().map(|(range, _)| *range).collect();
        let dropped = subtract_runs(owned, &anew);
        // The joined gaps contain no pinned page: a pinned page is the VM's own (I3, I9), and pins
        // were refused above.
        for run in &joined(&dropped) {
            self.at.drop_private(*run).map_err(|source| RamError::Map { range: *run, source })?;
        }
        let is_other = !Arc::ptr_eq(state.space.map(), map);
        state.space.lay_out(todo, map, |_, _| Ok(()))?;
        if is_other {
            state.space.hold_leases_of_map();
        }
        state.space.retire_base_if_shared();
        state.space.trim();
        Ok(RamResetReport { dropped: pages_in(base) + pages_in(owned), remapped: pages_in(&anew) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, GuestRam, PAGE_SIZE, PinLifetime, Quiesced, RamLayout, Store};
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    const PAGES: u64 = 2048;
    /// A wait that ends when the device drops its pin.
    const UNTIL_UNPINNED: Duration = Duration::from_secs(3600);

    fn frozen(store: &Store) -> (GuestRam, crate::RamImage) {
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
        ram.populate().unwrap();
        (0..PAGES).for_each(|p| put(&ram, p, p + 1));
        let (image, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        (ram, image)
    }

    fn put(ram: &GuestRam, page: u64, word: u64) {
        ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    }

    fn word(ram: &GuestRam, page: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
    }

    #[test]
    fn only_what_was_written_is_dropped() {
        let store = Store::open().unwrap();
        let (ram, image) = frozen(&store);
        [3, 4, 700, 2047].iter().for_each(|p| put(&ram, *p, 0));
        let report = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert_eq!(report, RamResetReport { dropped: 4, remapped: 0 });
        assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
        assert_eq!(ram.stats().unwrap().private_kib, 0);
    }

    /// Whether nothing holds the lease any more.
    fn is_over(end: &std::io::PipeReader) -> bool {
        let mut polled = [rustix::event::PollFd::new(end, rustix::event::PollFlags::empty())];
        rustix::event::poll(&mut polled, Some(&rustix::event::Timespec::default())).unwrap();
        polled[0].revents().contains(rustix::event::PollFlags::HUP)
    }

    /// An image of another process, published twice. The VM holds the lease of the image that it was
    /// reset to last, and the other one's no longer, though no page was mapped anew.
    #[test]
    fn a_reset_to_the_same_pages_takes_the_later_lease() {
        let (giver, store) = (Store::open().unwrap(), Store::open().unwrap());
        let (_ram, given) = frozen(&giver);
        let source = given.maps().next().unwrap().get(0).unwrap().layer;
        let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
        let image_of = |layer: crate::LayerHandle| {
            let mut map = crate::ImageMap::new();
            map.insert(PageRange::new(0, PAGES), crate::LayerSource { layer, at: 0 });
            crate::RamImage::from_parts(&store, &layout, vec![(map, Vec::new())]).unwrap()
        };
        let lease = || std::io::pipe().map(|(end, lease)| (end, Arc::new(lease.into()))).unwrap();
        let ((first_end, first_lease), (later_end, later_lease)) = (lease(), lease());
        let first = store.foreign_layer(source.read_only_file().unwrap(), source.pages(), first_lease).unwrap();
        let later = store.foreign_layer_again(&first, source.read_only_file().unwrap(), later_lease).unwrap();
        assert_eq!(first.id(), later.id());
        let first = image_of(first);
        let ram = GuestRam::reserve(first.layout(), &store).unwrap();
        ram.adopt(&first).unwrap();
        put(&ram, 3, 0);
        let later = image_of(later);
        let reset = |image: &crate::RamImage| ram.reset(image, &Quiesced::by(&crate::NoWriters), Duration::ZERO);
        assert_eq!(reset(&later).unwrap(), RamResetReport { dropped: 1, remapped: 0 });
        assert!(!is_over(&first_end), "its image is there");
        drop((first, later));
        store.wait_reclaimed();
        assert!(is_over(&first_end) && !is_over(&later_end));
        assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
        drop(ram);
        store.wait_reclaimed();
        assert!(is_over(&later_end));
        let file = std::fs::File::from(std::os::fd::AsFd::as_fd(&source).try_clone_to_owned().unwrap());
        let known = store.foreign_layer(source.read_only_file().unwrap(), source.pages(), lease().1).unwrap();
        store.foreign_layer_again(&known, file, lease().1).unwrap_err();
    }

    #[test]
    fn what_was_reset_of_two_regions_is_added_up() {
        let mut report = RamResetReport { dropped: 3, remapped: 5 };
        report += RamResetReport { dropped: 4, remapped: 6 };
        assert_eq!(report, RamResetReport { dropped: 7, remapped: 11 });
    }

    #[test]
    fn only_what_shows_something_else_is_mapped_anew() {
        let store = Store::open_small().unwrap();
        let layer = Arc::new(store.layer(100, crate::Backing::Small).unwrap());
        let private = |at| Mapping::Private(crate::layer::LayerOffset { layer: Arc::clone(&layer), at });
        assert!(shows(&Mapping::Zero, &Mapping::Zero) && shows(&private(7), &private(7)));
        assert!(shows(&Mapping::Absent, &Mapping::Zero) && shows(&Mapping::Absent, &private(7)), "R19");
        assert!(!shows(&Mapping::Zero, &private(7)) && !shows(&private(7), &Mapping::Zero));
        assert!(!shows(&private(8), &private(7)));
        let mut mappings = Mappings::default();
        mappings.insert(PageRange::new(0, 20), private(50));
        mappings.insert(PageRange::new(30, 40), private(80));
        mappings.insert(PageRange::new(20, 30), Mapping::Zero);
        let differ = |range, want: &Mapping| -> Vec<PageRange> {
            differing(&mappings, range, want, false).into_iter().map(|(run, _)| run).collect()
        };
        assert_eq!(differ(PageRange::new(10, 40), &private(60)), [PageRange::new(20, 30)]);
        assert_eq!(differ(PageRange::new(10, 30), &Mapping::Zero), [PageRange::new(10, 20)]);
        let anew = differing(&mappings, PageRange::new(10, 40), &private(61), false);
        assert_eq!(anew.len(), 1, "runs are joined");
        assert!(anew[0].0 == PageRange::new(10, 40) && shows(&anew[0].1, &private(61)));
        // Joined, but for a range that stays absent.
        mappings.insert(PageRange::new(40, 50), private(90));
        mappings.insert(PageRange::new(45, 46), Mapping::Absent);
        let joined = |range, want: &Mapping| -> Vec<PageRange> {
            differing(&mappings, range, want, true).into_iter().map(|(run, _)| run).collect()
        };
        assert_eq!(joined(PageRange::new(30, 50), &private(80)), [PageRange::new(30, 45), PageRange::new(46, 50)]);
        assert_eq!(joined(PageRange::new(30, 40), &private(80)), [], "one mapping already");
    }

    /// Maps every second page anew to what it shows already: each becomes a mapping of its own.
    fn split(region: &GuestRegion, map: &Arc<LayerMap>) {
        let mut state = region.live_state().unwrap();
        let page = |n| PageRange::with_len(2 * n, 1);
        let source = |n| Mapping::Private(map.get(2 * n).unwrap());
        let todo: Vec<_> = (0..PAGES / 2).map(|n| (page(n), source(n))).collect();
        state.space.reserve_runs(todo.len()).unwrap();
        region.put_back(&mut state, map, &[], &[], &todo).unwrap();
        assert_eq!(state.space.mappings().len() as u64, PAGES);
    }

    #[test]
    fn a_reset_joins_mappings_in_pieces() {
        let store = Store::open_small().unwrap();
        let (ram, image) = frozen(&store);
        let region = &ram.regions()[0];
        let mappings = || region.live_state().unwrap().space.mappings().len();
        split(region, image.regions()[0].map.map());
        put(&ram, 9, 0);
        let report = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert_eq!((report, mappings()), (RamResetReport { dropped: 1, remapped: PAGES }, 1));
        assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
        ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    }

    /// Near the host's limit, a reset maps what differs alone.
    #[test]
    fn d5_a_reset_that_may_not_join_is_not_refused() {
        let store = Store::open_with_budget(crate::MappingBudget::with_limit(2 * PAGES));
        let (ram, image) = frozen(&store);
        let region = &ram.regions()[0];
        split(region, image.regions()[0].map.map());
        let mut map = LayerMap::clone(image.regions()[0].map.map());
        (0..100).for_each(|n| map.remove(PageRange::with_len(20 * n, 1)));
        let prepared = |left: u64| {
            let mut state = region.live_state().unwrap();
            state.space.trim();
            let other = store.budget().promise(store.budget().left() - left).unwrap();
            let todo = region.prepare(&mut state, &map).map(|todo| todo.len());
            drop(other);
            todo
        };
        // One mapping more for each run, and one for what it splits.
        assert_eq!(prepared(2 * 201).unwrap(), 200);
        assert_eq!(prepared(2 * 201 - 3).unwrap(), 100);
        assert!(prepared(2 * 100 - 1).is_err());
    }

    #[test]
    fn near_runs_are_dropped_together_and_far_ones_are_not() {
        let run = PageRange::new;
        assert_eq!(joined(&[]), []);
        assert_eq!(joined(&[run(0, 1), run(17, 18), run(35, 36)]), [run(0, 18), run(35, 36)]);
        let far = |count: u64| (0..count).map(|n| run(512 + n * 40, 513 + n * 40)).collect::<Vec<_>>();
        assert_eq!(joined(&far(8)), far(8));
        assert_eq!(joined(&far(9)), [run(512, 513 + 8 * 40)]);
        let over = [run(500, 520), run(560, 561)];
        assert_eq!(joined(&over), over);
    }

    #[test]
    fn what_lies_between_pages_that_are_dropped_stays_as_it_was() {
        let store = Store::open().unwrap();
        let (ram, image) = frozen(&store);
        // One in three, one in forty; and one page in no layer.
        let some = |p: &u64| if *p < 1000 { p.is_multiple_of(3) } else { p.is_multiple_of(40) };
        (0..PAGES).filter(some).for_each(|p| put(&ram, p, 0));
        ram.regions()[0].discard(PageRange::with_len(1001, 1)).unwrap();
        let report = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert_eq!(report.dropped, (0..PAGES).filter(some).count() as u64);
        assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
        assert_eq!(ram.stats().unwrap().private_kib, 0);
    }

    #[test]
    fn back_over_a_freeze_that_came_between() {
        let store = Store::open().unwrap();
        let (ram, first) = frozen(&store);
        // A few pages, which a freeze copies in place; and many, which it remaps.
        put(&ram, 7, 0);
        (1000..1600).for_each(|p| put(&ram, p, 0));
        let (second, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        put(&ram, 7, 1);
        ram.reset(&second, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert_eq!((word(&ram, 7), word(&ram, 1000)), (0, 0), "not the first image's");
        ram.reset(&first, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
        ram.reset(&second, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert_eq!((word(&ram, 7), word(&ram, 1599), word(&ram, 1600)), (0, 0, 1601));
    }

    #[test]
    fn i7_a_pinned_page_refuses_the_reset_and_nothing_changes() {
        let store = Store::open().unwrap();
        let (ram, image) = frozen(&store);
        put(&ram, 5, 55);
        put(&ram, 6, 66);
        let pin = ram.regions()[0].pin(PageRange::with_len(5, 1), Access::Write, PinLifetime::LongTerm).unwrap();
        let refused = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::from_millis(5));
        assert!(matches!(refused, Err(RamError::Pinned { pages: 1, .. })));
        // A pin after the first check is detected by the region itself.
        let late = GuestRegion::reset_all(ram.regions(), image.regions(), &mut RamResetReport::default());
        assert!(matches!(late, Err(ResetError::Refused(RamError::Pinned { pages: 1, .. }))));
        assert_eq!((word(&ram, 5), word(&ram, 6)), (55, 66));
        assert!(ram.regions()[0].ownership().get(6).0, "what was the VM's own is so again");
        drop(pin);
        ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        assert_eq!((word(&ram, 5), word(&ram, 6)), (6, 7));
    }

    #[test]
    fn i7_pages_that_are_read_without_a_count_refuse_the_reset() {
        let store = Store::open().unwrap();
        let (ram, image) = frozen(&store);
        put(&ram, 700, 7);
        let pin = ram.regions()[0].pin(PageRange::with_len(5, 2), Access::Read, PinLifetime::Transient).unwrap();
        assert_eq!(ram.regions()[0].ownership().get(5), (false, 0), "not counted");
        // A read after the first check is detected by the region itself.
        let late = GuestRegion::reset_all(ram.regions(), image.regions(), &mut RamResetReport::default());
        assert!(matches!(late, Err(ResetError::Refused(RamError::Pinned { pages: 2, .. }))), "{late:?}");
        assert_eq!(word(&ram, 700), 7, "nothing has changed");
        let device = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(pin);
        });
        ram.reset(&image, &Quiesced::by(&crate::NoWriters), UNTIL_UNPINNED).expect("waited for the device");
        device.join().unwrap();
        assert_eq!(word(&ram, 700), 701);
    }

    #[test]
    fn a_reset_waits_for_a_device_that_is_nearly_done() {
        let store = Store::open().unwrap();
        let (ram, image) = frozen(&store);
        let pin = ram.regions()[0].pin(PageRange::with_len(5, 1), Access::Write, PinLifetime::Transient).unwrap();
        let device = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            pin.slice().write_obj(1u64, 0).unwrap();
            drop(pin);
        });
        ram.reset(&image, &Quiesced::by(&crate::NoWriters), UNTIL_UNPINNED).unwrap();
        device.join().unwrap();
        assert_eq!(word(&ram, 5), 6, "the device was done before its page went");
    }

    #[test]
    fn d5_all_mappings_of_a_reset_are_promised_before_the_first_is_made() {
        let store = Store::open_small().unwrap();
        let (ram, image) = frozen(&store);
        let region = &ram.regions()[0];
        // Every second page of the image has another source: each is mapped anew in the middle of
        // one mapping.
        let mut map = LayerMap::clone(image.regions()[0].map.map());
        (0..40).for_each(|n| map.remove(PageRange::with_len(100 + 2 * n, 1)));
        let mut state = region.live_state().unwrap();
        let todo = region.prepare(&mut state, &map).unwrap();
        let (before, promised) = (state.space.mappings().len(), state.space.promised());
        region.put_back(&mut state, &Arc::new(map), &[], &[], &todo).unwrap();
        let made = state.space.mappings().len() as u64;
        assert_eq!((before as u64, made), (1, 81));
        assert!(promised >= made, "{made} mappings were made, and {promised} promised");
        drop(state);
        ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    }
}
