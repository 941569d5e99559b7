//! Reference pages: one pattern, shown by any number of guest pages (R22).
//!
//! A reference page is a layer, so freeze, fork and reset keep it as a reference without special
//! cases, and the first write copies it. The differences (I10, R23): its mappings are not counted;
//! it is never exclusive, and so never pinned for writing (a pin copies it first); it lives as long
//! as its handle or a map that shows it.
//!
//! Zero pages are a special case that needs no file: pages in no layer.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::backing::Backing;
use crate::error::RamError;
use crate::layer::{Layer, LayerOffset};
use crate::ownership::TableGuard;
use crate::region::mappings::Mapping;
use crate::region::{GuestRegion, State};
use crate::store::{Store, StoreError};
use crate::testing::failpoint::{Call, failpoint};
use crate::testing::sabotage::{Break, broken};
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange, join_runs, pages_in, subtract_runs};

/// The bytes of one page.
pub type PagePattern = [u8; PAGE_SIZE as usize];

/// A handle to a reference page. Clones are the same page.
#[derive(Clone)]
pub struct RefPage(RefKind);

#[derive(Clone)]
enum RefKind {
    Zero,
    /// A block of copies of the pattern, so that 2 MiB of guest memory cost one mapping.
    Pattern(Arc<Layer>),
}

impl fmt::Debug for RefPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            RefKind::Zero => f.write_str("RefPage(zero)"),
            RefKind::Pattern(layer) => write!(f, "RefPage({:?})", layer.id()),
        }
    }
}

impl RefPage {
    /// Whether both are handles to the same page.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (RefKind::Zero, RefKind::Zero) => true,
            (RefKind::Pattern(a), RefKind::Pattern(b)) => a.id() == b.id(),
            _ => false,
        }
    }

    /// The sources of `range` when it shows this page: none for zeros, else one piece per block.
    pub(crate) fn sources(&self, range: PageRange) -> Vec<(PageRange, LayerOffset)> {
        match &self.0 {
            RefKind::Zero => Vec::new(),
            RefKind::Pattern(layer) => range
                .blocks()
                .map(|(_, piece)| (piece, LayerOffset { layer: Arc::clone(layer), at: piece.start % BLOCK_PAGES }))
                .collect(),
        }
    }

    /// The page of zeros.
    #[must_use]
    pub fn zero() -> Self {
        Self(RefKind::Zero)
    }
}

impl Store {
    /// A reference page that shows `pattern`.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn reference_page(&self, pattern: &PagePattern) -> Result<RefPage, StoreError> {
        if pattern.iter().all(|byte| *byte == 0) {
            return Ok(RefPage::zero());
        }
        let layer = self.reference_layer(BLOCK_PAGES, Backing::Huge)?;
        let block = pattern.repeat(BLOCK_PAGES as usize);
        let wrote = failpoint(Call::Copy).and_then(|()| layer.file().write_all_at(&block, 0));
        wrote.map_err(|source| StoreError::File { pages: BLOCK_PAGES, source })?;
        Ok(RefPage(RefKind::Pattern(Arc::new(layer))))
    }
}

/// Result of a discard. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Pages that became reference pages or were given back. Pages that are neither discarded nor
    /// pinned keep memory and contents: no mapping was left, and the mapping below the copy
    /// disagrees with the layer map (I14).
    pub discarded: u64,
    /// Pinned pages, which stay as they are (I7).
    pub pinned: u64,
    /// Discarded pages that were given back without a mapping, because the VM has used up its share
    /// of mappings. Their memory is free. Until written they show zeros if they were the VM's own
    /// since it was populated, else the bytes of their layer.
    pub unmapped: u64,
}

impl GuestRegion {
    /// Shows `page` in all of `range`, in place of its pages. Ranges that were not inherited stay
    /// absent (R19).
    ///
    /// # Errors
    /// When a page is pinned, or mappings run out; then nothing has changed. When a mapping fails
    /// half-way, a part of the range shows the page.
    pub fn map_reference(&self, range: PageRange, page: &RefPage) -> Result<(), RamError> {
        let mut state = self.checked(range)?;
        // Finishes background copies first, because they read pages that are replaced here.
        self.finish_background(&mut state)?;
        let table = self.table.lock();
        // The bit is cleared first, atomically against lockless pins; the loser takes the locked
        // path (I8).
        let pinned = self.share_unless_pinned(&table, range);
        if !pinned.is_empty() {
            self.reclaim(&state, &table, range);
            return Err(RamError::Pinned { pages: pages_in(&pinned), first: pinned[0] });
        }
        let runs = self.not_absent(&[range]);
        let shown = runs.into_iter().try_for_each(|run| self.show(&mut state, &table, run, page));
        shown.inspect_err(|_| self.reclaim(&state, &table, range))
    }

    /// Frees the memory of `range` (balloon, free page reporting): its pages become zeros without
    /// cost, except pinned ones. Ranges that were not inherited stay absent (R19).
    ///
    /// Zeros in the middle of a mapping cost one or two mappings. Since guests control their
    /// discards, each region has a share of the process's mappings. Beyond it pages are given back
    /// without a mapping ([`Discarded::unmapped`]).
    ///
    /// # Errors
    /// When the kernel refuses; the pages done so far are discarded, and the others are unchanged.
    pub fn discard(&self, range: PageRange) -> Result<Discarded, RamError> {
        let mut state = self.checked(range)?;
        // Finishes background copies first, because they read pages that are dropped here.
        self.finish_background(&mut state)?;
        let table = self.table.lock();
        // I7: a pinned page is not discarded.
        let mut pinned = self.share_unless_pinned(&table, range);
        if broken(Break::DropPinned) {
            pinned.clear();
        }
        let (mut unmapped, mut kept) = (0, 0);
        // Pages that are being read keep the bit if they had it.
        pinned.iter().for_each(|run| self.reclaim(&state, &table, *run));
        for run in self.not_absent(&subtract_runs(&[range], &pinned)) {
            let mapped = self.may_map_zero(&state, run).then(|| self.show(&mut state, &table, run, &RefPage::zero()));
            let shown = match mapped {
                // Beyond the region's share, or another VM has taken the last mappings since:
                // nothing has changed.
                None | Some(Err(RamError::Budget(_))) => self.give_back_unmapped(&state, &table, run).map(|given| {
                    unmapped += given;
                    kept += run.len() - given;
                }),
                Some(shown) => shown,
            };
            shown.inspect_err(|_| self.reclaim(&state, &table, range))?;
        }
        let pinned = pages_in(&pinned);
        Ok(Discarded { discarded: range.len() - pinned - kept, pinned, unmapped })
    }

    /// Whether mapping zeros in `range` stays within the region's share of mappings, or needs none.
    fn may_map_zero(&self, state: &State, range: PageRange) -> bool {
        let (now, then) = (state.space.mappings().len() as u64, state.space.mappings().len_with(range) as u64);
        let budget = self.store.budget();
        // Mappings needed during the operation: see `try_show`.
        then <= now || (then <= budget.fair_share() && now + 2 <= state.space.promised().max(now + budget.left()))
    }

    /// Frees the memory of `range`, which is not pinned, without a new mapping: only the VM's own
    /// copies are dropped. Returns the number of freed pages. A copy over a mapping that disagrees
    /// with the map stays (I14).
    fn give_back_unmapped(&self, state: &State, table: &TableGuard<'_>, range: PageRange) -> Result<u64, RamError> {
        let base = state.space.mappings().base_within(range);
        let private = subtract_runs(&[range], &base);
        let dropped: Vec<PageRange> = private.iter().flat_map(|run| state.space.matched_ranges(*run)).collect();
        for run in &dropped {
            self.at.drop_private(*run).map_err(|source| RamError::Map { range: *run, source })?;
        }
        // The remaining pages keep their bits: they are unchanged.
        subtract_runs(&private, &dropped).iter().for_each(|run| self.reclaim(state, table, *run));
        // Punched in place: holes in the VM's own file are zeros, and the pages stay its own.
        state.space.free_base(&base);
        base.iter().for_each(|run| table.set_exclusive(*run));
        Ok(pages_in(&dropped) + pages_in(&base))
    }

    /// Clears the bits of the unpinned pages of `range`. Returns the pinned pages: counted, or read
    /// without a count.
    fn share_unless_pinned(&self, table: &TableGuard<'_>, range: PageRange) -> Vec<PageRange> {
        let mut pinned = table.share(range);
        pinned.extend(self.srcu.ranges().into_iter().map(|read| read.intersect(range)).filter(|read| !read.is_empty()));
        pinned.sort_unstable();
        join_runs(&pinned, 0)
    }

    /// Maps `page` over `range`. No page of it is pinned, or can be before the locks are released.
    fn show(
        &self,
        state: &mut State,
        table: &TableGuard<'_>,
        range: PageRange,
        page: &RefPage,
    ) -> Result<(), RamError> {
        let base = state.space.mappings().base_within(range);
        let shown = self.try_show(state, range, page);
        state.space.free_replaced_base(&base);
        if broken(Break::OwnReference) {
            table.set_exclusive(range);
        }
        // On failure the remaining pages are still this VM's own, with their bits cleared. The
        // caller restores the bits: a discard that is refused a mapping drops the copies first
        // (I8).
        state.space.trim();
        shown
    }

    fn try_show(&self, state: &mut State, range: PageRange, page: &RefPage) -> Result<(), RamError> {
        let sources = page.sources(range);
        // Reserved before any change (D5): each piece adds a mapping and splits the one it lies in.
        // Zeros are one piece, and may replace as many pieces as they need.
        if !sources.is_empty() {
            state.space.reserve_runs(sources.len())?;
        }
        if sources.is_empty() {
            state.space.show(range, &Mapping::Zero)?;
        }
        for (piece, source) in sources {
            state.space.show(piece, &Mapping::Private(source))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, GuestRam, PinLifetime, Quiesced, RamLayout};
    use vm_memory::{Bytes, GuestAddress};

    const PAGES: u64 = 3 * BLOCK_PAGES;

    fn base(store: &Store) -> GuestRam {
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
        ram.populate().unwrap();
        ram
    }

    fn word(ram: &GuestRam, page: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE + 8)).unwrap()
    }

    fn pattern(word: u64) -> PagePattern {
        let mut page = [0; PAGE_SIZE as usize];
        page.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_le_bytes()));
        page
    }

    #[test]
    fn r22_a_pattern_is_shown_until_it_is_written() {
        let store = Store::open().unwrap();
        let ram = base(&store);
        let region = &ram.regions()[0];
        let page = store.reference_page(&pattern(0xabcd)).unwrap();
        region.map_reference(PageRange::new(100, 1200), &page).unwrap();
        assert_eq!((word(&ram, 99), word(&ram, 100), word(&ram, 1199), word(&ram, 1200)), (0, 0xabcd, 0xabcd, 0));
        assert_eq!(ram.stats().unwrap().reference, 1100);

        ram.memory().write_obj(7u64, GuestAddress(600 * PAGE_SIZE + 8)).unwrap();
        assert_eq!((word(&ram, 599), word(&ram, 600), word(&ram, 601)), (0xabcd, 7, 0xabcd), "the first write copies");
        assert_eq!(ram.stats().unwrap().reference, 1099);

        // Freeze and fork keep the reference, whichever handle is dropped.
        drop(page);
        let (image, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        let child = GuestRam::reserve(image.layout(), &store).unwrap();
        child.adopt(&image).unwrap();
        drop((ram, image));
        assert_eq!((word(&child, 599), word(&child, 600)), (0xabcd, 7));
        // Gaps that the freeze closed were copied; all others are still references.
        assert!(child.stats().unwrap().reference > 1000);
        drop(child);
        // R23: the page lives as long as it is shown.
        store.expect_no_layers();
    }

    #[test]
    fn i10_a_write_pin_of_a_reference_page_copies_first() {
        let store = Store::open().unwrap();
        let ram = base(&store);
        let region = &ram.regions()[0];
        let page = store.reference_page(&pattern(1)).unwrap();
        region.map_reference(PageRange::new(0, 10), &page).unwrap();
        region.map_reference(PageRange::new(10, 20), &RefPage::zero()).unwrap();
        for at in [3, 13] {
            let pin = region.pin(PageRange::with_len(at, 1), Access::Write, PinLifetime::LongTerm).unwrap();
            pin.slice().write_obj(9u64, 8).unwrap();
            assert_eq!(
                (word(&ram, at), word(&ram, at + 1)),
                (9, if at < 10 { 1 } else { 0 }),
                "only this page changed"
            );
        }
    }

    #[test]
    fn i7_discard_leaves_pinned_pages() {
        let store = Store::open().unwrap();
        for freeze_first in [false, true] {
            let ram = base(&store);
            let region = &ram.regions()[0];
            (0..PAGES).for_each(|p| ram.memory().write_obj(p + 1, GuestAddress(p * PAGE_SIZE + 8)).unwrap());
            if freeze_first {
                ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
            }
            let pin = region.pin(PageRange::new(5, 7), Access::Write, PinLifetime::LongTerm).unwrap();
            let done = region.discard(PageRange::new(0, 600)).unwrap();
            assert_eq!(done, Discarded { discarded: 598, pinned: 2, unmapped: 0 });
            let seen: Vec<u64> = [0, 4, 5, 6, 7, 599, 600].iter().map(|p| word(&ram, *p)).collect();
            assert_eq!(seen, [0, 0, 6, 7, 0, 0, 601]);
            pin.slice().write_obj(77u64, 8).unwrap();
            assert_eq!(word(&ram, 5), 77, "the device and the guest still see one page");
            assert!(matches!(
                region.map_reference(PageRange::new(0, 10), &RefPage::zero()),
                Err(RamError::Pinned { pages: 2, .. })
            ));
            assert_eq!(word(&ram, 6), 7);
        }
    }

    /// For a page that a freeze copied in place, the map shows the copy and the mapping below shows
    /// the older layer. If it were given back without a mapping, it would show a page that is not
    /// in the map.
    #[test]
    fn i14_what_stayed_in_place_at_a_freeze_is_not_given_back_without_a_mapping() {
        let store = Store::open_with_budget(crate::MappingBudget::with_limit(100));
        let ram = base(&store);
        (0..PAGES).for_each(|p| ram.memory().write_obj(p + 1, GuestAddress(p * PAGE_SIZE + 8)).unwrap());
        let quiesced = Quiesced::by(&crate::NoWriters);
        let first = ram.freeze_in(crate::FreezeMode::Eager, &quiesced).unwrap().0;
        (100..110).for_each(|p| ram.memory().write_obj(7u64, GuestAddress(p * PAGE_SIZE + 8)).unwrap());
        let second = ram.freeze_in(crate::FreezeMode::Eager, &quiesced).unwrap().0;
        let region = &ram.regions()[0];
        // Until the region's share of mappings is used up.
        while region.discard(PageRange::with_len(2 * ram.stats().unwrap().mappings, 1)).unwrap().unmapped == 0 {}
        let done = region.discard(PageRange::new(100, 120)).unwrap();
        ram.check(&quiesced).unwrap();
        assert_eq!(done, Discarded { discarded: 10, pinned: 0, unmapped: 10 }, "the ten others stay");
        let third = ram.freeze_in(crate::FreezeMode::Eager, &quiesced).unwrap().0;
        drop((first, second));
        store.wait_reclaimed();
        let child = GuestRam::reserve(third.layout(), &store).unwrap();
        child.adopt(&third).unwrap();
        (0..PAGES).for_each(|p| assert_eq!(word(&ram, p), word(&child, p), "page {p} of parent and child"));
    }

    /// Zeros in place of zeros that were written need no mapping, so the budget may be exhausted.
    #[test]
    fn d5_a_discard_of_one_piece_needs_no_mapping_of_its_own() {
        let store = Store::open_with_budget(crate::MappingBudget::with_limit(100));
        let ram = base(&store);
        let region = &ram.regions()[0];
        region.discard(PageRange::new(0, 100)).unwrap();
        (0..120).for_each(|p| ram.memory().write_obj(p + 1, GuestAddress(p * PAGE_SIZE + 8)).unwrap());
        let others = store.budget().promise(store.budget().left()).unwrap();
        let done = region.discard(PageRange::new(0, 100)).unwrap();
        assert_eq!(done, Discarded { discarded: 100, pinned: 0, unmapped: 0 });
        ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
        assert_eq!((word(&ram, 0), word(&ram, 99), word(&ram, 100)), (0, 0, 101));
        // More than one piece, and no mapping left: the copies are dropped, and their bits are
        // cleared.
        let done = region.discard(PageRange::new(50, 110)).unwrap();
        assert_eq!((done.discarded, done.unmapped), (60, 60));
        ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
        assert_eq!((word(&ram, 105), word(&ram, 115)), (0, 116));
        drop(others);
    }

    #[test]
    fn discarding_gives_the_memory_back() {
        let store = Store::open().unwrap();
        let ram = base(&store);
        (0..PAGES).for_each(|p| ram.memory().write_obj(p + 1, GuestAddress(p * PAGE_SIZE)).unwrap());
        assert_eq!(ram.stats().unwrap().private_kib, PAGES * 4);
        ram.regions()[0].discard(PageRange::new(0, 2 * BLOCK_PAGES)).unwrap();
        let stats = ram.stats().unwrap();
        assert_eq!((stats.private_kib, stats.reference), (BLOCK_PAGES * 4, 2 * BLOCK_PAGES));
    }
}
