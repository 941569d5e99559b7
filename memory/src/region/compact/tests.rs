use super::*;
use crate::layer::registry::View;
use crate::region::dont_fork::DontForkMap;
use crate::region::freeze::RegionImage;

use crate::{Access, DontFork, FreezeMode, GuestRam, PinError, PinLifetime, Quiesced, RamImage, RamLayout};
use vm_memory::{Bytes, GuestAddress};

/// Pages declared no-fork between the copy and the installation keep the layer from which they are
/// shown.
#[test]
fn a_declaration_that_came_in_between_is_left_alone() {
    let store = Store::open().unwrap();
    let ram = GuestRam::reserve(&RamLayout::new(1024 * PAGE_SIZE).unwrap(), &store).unwrap();
    ram.populate().unwrap();
    let put = |page: u64, word: u64| ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    let freeze = || ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0;
    freeze();
    // Enough pages that most are mapped over the delta.
    (0..1024).filter(|page| page % 512 < 400).for_each(|page| put(page, page + 1));
    let image = freeze();
    // A page of the VM's own, in a range that a freeze skips once it is declared no-fork.
    put(12, 999);
    let region = &ram.regions()[0];
    let mut state = region.state();
    let of = Arc::clone(state.space.map());
    let merged = MergedLayer::make(&store, &of, &runs_to_merge(&of, &[])).unwrap().unwrap();
    state.dont_fork.insert(PageRange::new(10, 20), DontFork::Zeroed);
    let own: Vec<PageRange> = subtract_runs(&region.own(&state).unwrap(), &[PageRange::new(10, 20)]);
    region.install_at_most(&mut state, merged, &own, usize::MAX).unwrap();
    drop(state);
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    drop((image, of));
    store.sweep();
    for page in 0..1024 {
        let want = match page {
            12 => 999,
            _ if page % 512 < 400 => page + 1,
            _ => 0,
        };
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap(), want, "page {page}");
    }
}

/// When the last part is installed, the published view shows only the first part of the new layer.
/// A sweep leaves the rest until that is published too.
#[test]
fn a_sweep_between_the_parts_of_a_compaction_costs_no_page() {
    const PAGES: u64 = 2048;
    let store = Store::open_small().unwrap();
    let parent = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
    parent.populate().unwrap();
    let put = |page: u64, word: u64| parent.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    let freeze = || parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0;
    (0..PAGES).for_each(|page| put(page, page + 1));
    drop(freeze());
    // Short pieces in two places, and one long piece between them.
    let dirty = [(0, 100), (200, 300), (1700, 1800), (1900, 2000)].map(|(start, end)| PageRange::new(start, end));
    let is_dirty = |page: u64| dirty.iter().any(|run| run.contains(page));
    (0..PAGES).filter(|page| is_dirty(*page)).for_each(|page| put(page, page + 5_001));
    // A child, which shows every page from a layer.
    let image = freeze();
    let ram = GuestRam::reserve(image.layout(), &store).unwrap();
    ram.adopt(&image).unwrap();
    drop((image, parent));
    let region = &ram.regions()[0];
    let mut state = region.state();
    let of = Arc::clone(state.space.map());
    let merged = MergedLayer::make(&store, &of, &runs_to_merge(&of, &[])).unwrap().unwrap();
    assert!(merged.placed.len() > 1, "two parts: {:?}", merged.placed);
    let layer = merged.placed[0].1.layer.id();
    let rest = region.install_at_most(&mut state, merged, &[], 1).unwrap().expect("the first part alone");
    // Published.
    drop(state);
    crate::layer::gc::sweep(store.views());
    let mut state = region.state();
    assert!(region.install_at_most(&mut state, rest, &[], usize::MAX).unwrap().is_none());
    crate::layer::gc::sweep(store.views());
    drop(state);
    drop(of);
    store.sweep();
    for page in 0..PAGES {
        let want = if is_dirty(page) { page + 5_001 } else { page + 1 };
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap(), want, "page {page}");
    }
    let state = region.state();
    let shown = state.space.map().iter().filter(|(_, source)| source.layer.id() == layer).count();
    assert!(shown > 1, "both parts were installed");
    drop(state);
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}

/// `pieces` of `len` pages with `gap` between them, over so many layers in turn.
fn pieces(store: &Store, pieces: u64, len: u64, gap: u64, layers: u64) -> LayerMap {
    let layer = |_| Arc::new(store.layer(1 << 20, crate::Backing::Small).unwrap());
    let layers: Vec<_> = (0..layers).map(layer).collect();
    let mut map = LayerMap::new();
    for nth in 0..pieces {
        let (range, layer) = (PageRange::with_len(nth * (len + gap), len), &layers[nth as usize % layers.len()]);
        // Pieces whose sources never continue each other.
        map.insert(range, LayerOffset { layer: Arc::clone(layer), at: 2 * range.start + nth });
    }
    map
}

/// A pin by its bit does not look at the declarations, and its slice would not be mapped.
#[test]
fn no_child_owns_an_absent_page_whatever_the_map_of_its_image_shows() {
    let store = Store::open_small().unwrap();
    let parent = GuestRam::reserve(&RamLayout::new(4096 * PAGE_SIZE).unwrap(), &store).unwrap();
    parent.populate().unwrap();
    let (image, _) = parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
    // More pieces than a child may map: it copies them. One is absent, and so is a gap.
    let map = pieces(&store, 1200, 1, 1, 2);
    let mut dont_fork = DontForkMap::new();
    let (shown, gap) = (PageRange::new(0, 1), PageRange::new(101, 102));
    for range in [shown, gap] {
        dont_fork.insert(range, DontFork::Absent);
    }
    let region = RegionImage { map: Arc::new(View::new(store.views(), Arc::new(map))), dont_fork };
    let image = image.with_regions(vec![region]);
    let child = GuestRam::reserve(image.layout(), &store).unwrap();
    child.adopt(&image).unwrap();
    child.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    let region = &child.regions()[0];
    assert!(region.ownership().get(2).0, "a copy is the child's own");
    for range in [shown, gap] {
        let refused = region.pin(range, Access::Write, PinLifetime::Transient).map(drop);
        assert!(matches!(refused, Err(PinError::Absent { .. })), "{range}: {refused:?}");
    }
    let (merged, report) = image.compact(&store).unwrap();
    assert!(report.pieces < 100, "{report:?}");
    let map = &merged.regions()[0].map;
    assert!(map.get(100).is_some() && map.get(101).is_none() && map.get(102).is_some());
}

/// A merge holds the map that it is of, with the leases of its layers.
#[test]
fn a_rollback_forgets_a_merge_of_the_map_of_before() {
    let store = Store::open_small().unwrap();
    let ram = GuestRam::reserve(&RamLayout::new(1024 * PAGE_SIZE).unwrap(), &store).unwrap();
    ram.populate().unwrap();
    let put = |page: u64, word: u64| ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    let freeze = || ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0;
    let images = [1, 2].map(|word| {
        (0..1024).step_by(2).for_each(|page| put(page, word));
        freeze()
    });
    let region = &ram.regions()[0];
    let (compaction, of) = {
        let mut state = region.state();
        let of = Arc::clone(state.space.map());
        let merged = MergedLayer::make(&store, &of, &[PageRange::new(0, 1024)]).unwrap();
        let compaction = Arc::new(Compaction::default());
        compaction.set(merged);
        state.compaction = Some(Arc::clone(&compaction));
        state.last_compacted = (7, 7);
        (Arc::downgrade(&compaction), Arc::downgrade(&of))
    };
    for (image, is_kept) in [(&images[1], true), (&images[0], false)] {
        ram.reset(image, &Quiesced::by(&crate::NoWriters), std::time::Duration::ZERO).unwrap();
        let last = region.state().last_compacted;
        assert_eq!((compaction.strong_count() > 0, last == (7, 7)), (is_kept, is_kept));
    }
    drop(images);
    store.sweep();
    assert!(of.upgrade().is_none(), "the map of before is held");
}

#[test]
fn a_map_is_compacted_when_it_has_grown_well_beyond_the_last_time() {
    let store = Store::open_small().unwrap();
    let needs = |count, over, last| needs_compaction(&pieces(&store, count, 1, 1, over), last, store.config());
    assert_eq!(layers([&pieces(&store, 10, 1, 1, 3)]), 3);
    assert!(!needs(192, 1, (0, 0)) && needs(193, 1, (0, 0)), "pieces");
    assert!(!needs(300, 1, (200, 0)) && needs(301, 1, (200, 0)), "half as many again");
    assert!(!needs(24, 24, (0, 0)) && needs(25, 25, (0, 0)), "layers");
    assert!(!needs(100, 24, (0, 0)), "many pieces of few layers");
    assert!(!needs(34, 34, (0, 10)) && !needs(40, 34, (0, 10)) && needs(35, 35, (0, 10)));
}

#[test]
fn short_pieces_are_merged_where_that_is_cheap() {
    let store = Store::open_small().unwrap();
    let merged = |count, len, gap| runs_to_merge(&pieces(&store, count, len, gap, 2), &[]).len();
    assert_eq!((merged(1, MAX_MERGED_PAGES - 1, 1), merged(1, MAX_MERGED_PAGES, 1)), (1, 0), "long ones stay");
    assert_eq!((merged(10, 1, 2), merged(48, 1, 2), merged(49, 1, 2)), (10, 48, 1));
    // 49 times 16 pages, and 49 between each two: four times their pages exactly.
    assert_eq!((merged(49, 16, 49), merged(49, 16, 50)), (1, 49));
    // A hundred times their pages, which is worthwhile only for too many pieces.
    assert_eq!((merged(500, 1, 99), merged(513, 1, 99)), (500, 1));
    // Barred pages keep pieces apart, regardless of the length of the gaps considered.
    let barred: Vec<_> = (0..60).map(|nth| PageRange::with_len(2 * nth + 1, 1)).collect();
    assert_eq!(runs_to_merge(&pieces(&store, 60, 1, 1, 2), &barred).len(), 60);
}

#[test]
fn what_is_merged_is_counted() {
    let store = Store::open_small().unwrap();
    let (before, after) = (pieces(&store, 9, 1, 1, 3), pieces(&store, 4, 2, 1, 2));
    let mut report = CompactReport::default();
    report.note(&before, &after, 7);
    report.note(&before, &after, 8);
    let expected = CompactReport { copied: 15, pieces_before: 18, pieces: 8, layers_before: 6, layers: 4 };
    assert_eq!(report, expected);
    let runs = [PageRange::new(0, 3), PageRange::new(4, 9)];
    let merged = MergedLayer::make(&store, &Arc::new(before), &runs).unwrap().unwrap();
    assert_eq!(merged.pages(), 8);
    assert!(MergedLayer::make(&store, &Arc::new(after), &[]).unwrap().is_none());
}

#[test]
fn mapping_anew_is_a_gain_where_it_takes_no_more_mappings() {
    let (run, mut mappings) = (PageRange::new, Mappings::default());
    [run(0, 10), run(10, 30), run(40, 50)].into_iter().for_each(|range| mappings.insert(range, Mapping::Zero));
    mappings.insert(run(60, 70), Mapping::Absent);
    assert!(is_gain(&mappings, &[]) && is_gain(&mappings, &[run(10, 30)]) && is_gain(&mappings, &[run(0, 30)]));
    assert!(!is_gain(&mappings, &[run(10, 20)]), "its rest stays a mapping");
    assert!(!is_gain(&mappings, &[run(20, 30)]), "as does its beginning");
    assert!(!is_gain(&mappings, &[run(2, 4), run(6, 8)]));
    assert!(!is_gain(&mappings, &[run(55, 65)]), "what is absent stays absent");
}

const PAGES: u64 = 4096;

fn child(image: &RamImage, store: &Store) -> GuestRam {
    let child = GuestRam::reserve(image.layout(), store).unwrap();
    child.adopt(image).unwrap();
    child
}

/// An image whose map has some 800 pieces, and a VM that shows it and owns no pages.
fn in_pieces(store: &Store) -> (GuestRam, RamImage) {
    let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    let put = |page: u64, word: u64| ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    (0..PAGES).for_each(|page| put(page, page + 1));
    freeze(&ram);
    (0..400).for_each(|nth| put(nth * 10, nth * 10 + 7));
    let image = freeze(&ram);
    (child(&image, store), image)
}

fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0
}

fn expect_contents(ram: &GuestRam) {
    for page in 0..PAGES {
        let word: u64 = ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap();
        let want = if page.is_multiple_of(10) && page < 4000 { page + 7 } else { page + 1 };
        assert_eq!(word, want, "page {page}");
    }
}

#[test]
fn a_vm_and_an_image_are_the_same_in_fewer_pieces() {
    let store = Store::open_small().unwrap();
    let (ram, image) = in_pieces(&store);
    let before = ram.regions()[0].state().space.map().len() as u64;
    assert!(before > 700, "{before} pieces");
    let (compacted, report) = image.compact(&store).unwrap();
    assert!(report.pieces_before == before && report.pieces < 50 && report.copied >= 400, "{report:?}");
    let child = child(&compacted, &store);
    expect_contents(&child);
    assert_eq!(child.regions()[0].state().space.map().len() as u64, report.pieces);
    let report = ram.compact(&Quiesced::by(&crate::NoWriters)).unwrap();
    assert!(report.pieces_before == before && report.pieces < 50 && report.copied >= 400, "{report:?}");
    expect_contents(&ram);
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}

#[test]
fn a_view_of_many_pieces_is_merged_behind_the_freezes() {
    let store = Store::open_small().unwrap();
    let (ram, image) = in_pieces(&store);
    drop(image);
    let region = &ram.regions()[0];
    let before = region.state().space.map().len();
    drop(freeze(&ram));
    assert!(region.state().compaction.is_some(), "it has been begun");
    for _ in 0..100 {
        store.wait_reclaimed();
        drop(freeze(&ram));
        if region.state().compaction.is_none() {
            break;
        }
    }
    let state = region.state();
    assert!(
        state.compaction.is_none() && state.space.map().len() < before / 2,
        "{} of {before} pieces",
        state.space.map().len()
    );
    assert_eq!(state.last_compacted, (state.space.map().len(), layers([&**state.space.map()])));
    drop(state);
    expect_contents(&ram);
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}
