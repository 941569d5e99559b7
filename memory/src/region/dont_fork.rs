//! No-fork regions: memory that a child does not inherit (R19), such as rings shared with a device
//! or secrets.
//!
//! Declared ranges are left out of every layer: a freeze neither shares nor copies them, and the
//! first freeze moves them out of the base file (up to 4 MiB; pinned pages stay). So their bytes
//! are in no file that a child maps. The parent keeps the pages unchanged. A child gets them
//! absent, as zeros, or fresh from a reference page, and inherits the declaration, and so do its
//! own children. The declaration belongs to the range: writing, protecting, discarding or resetting
//! its pages does not change it.

use std::sync::Arc;

use crate::error::RamError;
use crate::layer::interval::{IntervalMap, Piece};
use crate::layer::{LayerMap, LayerOffset};
use crate::region::GuestRegion;
use crate::region::reference::RefPage;
use crate::testing::sabotage::{Break, broken};
use crate::units::{PageRange, push_run};

/// Contents of a no-fork range in a child.
#[derive(Clone, Debug)]
pub enum DontFork {
    /// No memory: an access stops the child (with an error from KVM for the guest, or from the VMM
    /// for its own accesses).
    Absent,
    /// Zeros.
    Zeroed,
    /// Copies of a reference page.
    Fresh(RefPage),
}

impl Piece for DontFork {
    fn advance(&self, _pages: u64) -> Self {
        self.clone()
    }
    fn continues(&self, _pages: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Absent, Self::Absent) | (Self::Zeroed, Self::Zeroed) => true,
            (Self::Fresh(a), Self::Fresh(b)) => a.same_as(b),
            _ => false,
        }
    }
}

/// Declarations by range.
pub(crate) type DontForkMap = IntervalMap<DontFork>;

/// The declared ranges.
pub(crate) fn runs(declared: &DontForkMap) -> Vec<PageRange> {
    let mut out = Vec::new();
    for (range, _) in declared.iter() {
        push_run(&mut out, range);
    }
    out
}

/// Replaces declared ranges in the children's map, which must not show the parent's pages.
pub(crate) fn hide(declared: &DontForkMap, map: &mut Arc<LayerMap>) {
    if declared.is_empty() || broken(Break::InheritAll) {
        return;
    }
    let map = Arc::make_mut(map);
    for (range, what) in declared.iter() {
        map.remove(range);
        if let DontFork::Fresh(page) = what {
            page.sources(range)
                .into_iter()
                .for_each(|(piece, source): (PageRange, LayerOffset)| map.insert(piece, source));
        }
    }
}

/// The ranges without memory in a child.
pub(crate) fn absent(declared: &DontForkMap) -> Vec<PageRange> {
    declared.iter().filter(|(_, what)| matches!(what, DontFork::Absent)).map(|(range, _)| range).collect()
}

impl GuestRegion {
    /// Declares the contents of `range` in children from the next fork on. `None` removes the
    /// declaration, so that they inherit the range again.
    ///
    /// # Errors
    /// When the range is outside the region, or the region has no memory yet.
    pub fn set_dont_fork(&self, range: PageRange, what: Option<DontFork>) -> Result<(), RamError> {
        let mut state = self.checked(range)?;
        match what {
            Some(what) => state.dont_fork.insert(range, what),
            None => state.dont_fork.remove(range),
        }
        Ok(())
    }

    /// The declared ranges, each with its contents in children.
    #[must_use]
    pub fn dont_fork(&self) -> Vec<(PageRange, DontFork)> {
        self.state().dont_fork.iter().map(|(range, what)| (range, what.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Access, FreezeMode, GuestRam, PAGE_SIZE, PagePattern, PinLifetime, Quiesced, RamImage, RamLayout, Store,
    };
    use vm_memory::{Bytes, GuestAddress};

    const PAGES: u64 = 4 * 512;
    const SECRET: u64 = 0x5ec1_2e7d_a7a5;

    fn word(ram: &GuestRam, page: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
    }

    fn put(ram: &GuestRam, page: u64, word: u64) {
        ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    }

    fn child(image: &RamImage, store: &Store) -> GuestRam {
        let ram = GuestRam::reserve(image.layout(), store).unwrap();
        ram.adopt(image).unwrap();
        ram
    }

    fn declared(store: &Store) -> GuestRam {
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
        ram.populate().unwrap();
        (0..PAGES).for_each(|p| put(&ram, p, SECRET));
        let mut fresh: PagePattern = [0; PAGE_SIZE as usize];
        fresh[..8].copy_from_slice(&77u64.to_le_bytes());
        let region = &ram.regions()[0];
        region.set_dont_fork(PageRange::new(100, 110), Some(DontFork::Zeroed)).unwrap();
        let page = store.reference_page(&fresh).unwrap();
        region.set_dont_fork(PageRange::new(500, 530), Some(DontFork::Fresh(page))).unwrap();
        region.set_dont_fork(PageRange::new(1000, 1001), Some(DontFork::Absent)).unwrap();
        ram
    }

    fn check_child(ram: &GuestRam) {
        let seen: Vec<u64> = [99, 100, 109, 110, 499, 500, 529, 530, 999, 1001].iter().map(|p| word(ram, *p)).collect();
        assert_eq!(seen, [SECRET, 0, 0, SECRET, SECRET, 77, 77, SECRET, SECRET, SECRET]);
        let absent = ram.memory().read_obj::<u64>(GuestAddress(1000 * PAGE_SIZE));
        assert!(absent.is_err(), "R19: absent, not zeros");
        let pin = ram.regions()[0].pin(PageRange::with_len(1000, 1), Access::Write, PinLifetime::Transient);
        assert!(pin.is_err(), "and no device gets it");
    }

    #[test]
    fn r19_children_and_theirs_do_not_inherit_and_the_parent_keeps() {
        for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
            let parent = declared(&store);
            let (image, _) = parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
            assert!((0..PAGES).all(|p| word(&parent, p) == SECRET), "the parent keeps its own");
            let first = child(&image, &store);
            check_child(&first);
            // A sweep walks each map once, regardless of the number of VMs that show it.
            let shown = |ram: &GuestRam| std::sync::Arc::clone(ram.regions()[0].state().space.map());
            assert!(
                std::sync::Arc::ptr_eq(&shown(&first), image.regions()[0].map.map()),
                "a child has the image's map"
            );
            // Written by the child: its own children start fresh again.
            put(&first, 100, 1);
            put(&first, 505, 1);
            let (image, _) = first.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
            assert_eq!((word(&first, 100), word(&first, 505)), (1, 1));
            check_child(&child(&image, &store));
            check_child(&child(&image.flatten(&store, store.backing()).unwrap(), &store));
        }
    }

    #[test]
    fn r19_the_bytes_are_in_no_layer() {
        let store = Store::open().unwrap();
        let parent = declared(&store);
        // The second freeze harvests private pages, the third runs in the background: a page can
        // get into a layer in three ways.
        for mode in [FreezeMode::Eager, FreezeMode::Eager, FreezeMode::Background] {
            let (image, _) = parent.freeze_in(mode, &Quiesced::by(&crate::NoWriters)).unwrap();
            image.finish_background().unwrap();
            let hidden = [100..110, 500..530, 1000..1001];
            for (range, source) in image.regions()[0].map.iter() {
                let shown = hidden.iter().any(|h| h.clone().any(|p| range.contains(p)));
                assert!(
                    !shown || source.layer.id().is_reference(),
                    "{range} of {source:?} shows what is not inherited"
                );
            }
            (0..PAGES).for_each(|p| put(&parent, p, SECRET));
            check_child(&child(&image, &store));
        }
    }

    #[test]
    fn r19_what_is_absent_stays_so_whatever_is_shown_there() {
        let store = Store::open().unwrap();
        let (image, _) = declared(&store).freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        let child = child(&image, &store);
        let region = &child.regions()[0];
        let around = PageRange::new(998, 1003);
        region.discard(around).unwrap();
        assert_eq!((word(&child, 999), word(&child, 1002)), (0, 0));
        let pin = region.pin(PageRange::with_len(1000, 1), Access::Write, PinLifetime::LongTerm);
        assert!(pin.is_err(), "a balloon does not bring back what was not inherited");
        let page = store.reference_page(&[7; PAGE_SIZE as usize]).unwrap();
        region.map_reference(around, &page).unwrap();
        assert_eq!((word(&child, 999), word(&child, 1001)), (0x0707_0707_0707_0707, 0x0707_0707_0707_0707));
        let pin = region.pin(PageRange::with_len(1000, 1), Access::Write, PinLifetime::LongTerm);
        assert!(pin.is_err(), "nor does a pattern");
    }

    /// After the declaration is removed, the next freeze has the child's own pages on both sides of
    /// an absent page, close enough to close the gap.
    #[test]
    fn r19_what_is_absent_is_no_gap_to_be_copied() {
        for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
            let (image, _) = declared(&store).freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
            for mode in [FreezeMode::Eager, FreezeMode::Background] {
                let parent = child(&image, &store);
                parent.regions()[0].set_dont_fork(PageRange::new(1000, 1001), None).unwrap();
                // Enough pages to be shared back from the layer.
                let written = || (700..1300).filter(|page| *page != 1000);
                written().for_each(|page| put(&parent, page, page));
                let (image, report) = parent.freeze_in(mode, &Quiesced::by(&crate::NoWriters)).unwrap();
                assert_eq!(report.copied, 599);
                parent.finish_background().unwrap();
                parent.check(&Quiesced::by(&crate::NoWriters)).unwrap();
                let absent = parent.memory().read_obj::<u64>(GuestAddress(1000 * PAGE_SIZE));
                assert!(absent.is_err(), "{mode:?}: absent still");
                let nowhere = tempfile::tempfile().unwrap();
                let read = parent.regions()[0].at.write_out(&[PageRange::with_len(1000, 1)], &nowhere, 0);
                assert!(read.is_err(), "{mode:?}: for the kernel too");
                let child = child(&image, &store);
                assert!(written().all(|page| word(&parent, page) == page && word(&child, page) == page), "{mode:?}");
                assert_eq!(word(&child, 1000), 0, "{mode:?}: inherited again, from where there is nothing");
            }
        }
    }

    #[test]
    fn r19_a_declaration_survives_pins_discards_and_resets_and_can_be_taken_back() {
        let store = Store::open().unwrap();
        let parent = declared(&store);
        let region = &parent.regions()[0];
        let ring = region.pin(PageRange::new(100, 110), Access::Write, PinLifetime::LongTerm).unwrap();
        let (image, report) = parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        assert_eq!(report.pinned, 0, "a pinned no-fork page is not copied either");
        ring.slice().write_obj(5u64, 0).unwrap();
        assert_eq!(word(&parent, 100), 5);
        check_child(&child(&image, &store));
        drop(ring);
        let one = child(&image, &store);
        one.reset(&image, &Quiesced::by(&crate::NoWriters), std::time::Duration::ZERO).unwrap();
        check_child(&one);
        region.set_dont_fork(PageRange::new(100, 110), None).unwrap();
        let (image, _) = parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        assert_eq!(word(&child(&image, &store), 100), 5, "inherited again");
    }
}
