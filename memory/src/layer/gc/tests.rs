//! Sweeps at any moment must not lose pages.

use std::time::Duration;

use super::*;
use crate::layer::gc::worst::Restless;
use crate::store::Store;
use crate::{Access, FreezeMode, GuestRam, PAGE_SIZE, PinLifetime, Quiesced, RamImage, RamLayout};
use clade_test_support::{receive, wait_eq};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 64;

fn check(ram: &GuestRam, what: &str) {
    for page in 0..PAGES {
        let word: u64 = ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap();
        assert_eq!(word, page + 1, "page {page} {what}");
    }
}

/// The last pages of a base file become a layer's, or their VM is dropped, in the middle of a
/// sweep.
#[test]
fn what_is_shown_while_a_sweep_looks_round_is_kept() {
    for (dies, step) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
        let store = Store::open_small().unwrap();
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
        ram.populate().unwrap();
        (0..PAGES).for_each(|page| ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap());
        let freeze = |ram: &GuestRam| ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0;
        let pin = ram.regions()[0].pin(PageRange::new(5, 9), Access::Write, PinLifetime::LongTerm).unwrap();
        let first = freeze(&ram);
        drop(pin);
        assert!(!ram.regions()[0].state().space.mappings().base_runs().is_empty(), "what was pinned is the VM's still");
        let (mut ram, mut second, mut at) = (Some(ram), None, 0);
        sweep_in_steps(store.views(), || {
            if at == step {
                second = Some(freeze(ram.as_ref().unwrap()));
                ram = ram.take().filter(|_| !dies);
            }
            at += 1;
        });
        let what = format!("(dies: {dies}, in step {step})");
        ram.iter().for_each(|ram| check(ram, &what));
        for image in [first, second.unwrap()] {
            let child = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
            child.adopt(&image).unwrap();
            check(&child, &what);
        }
    }
}

/// All views of a layer are dropped during a sweep, so the sweep is its last user. A layer's end is
/// a step of its own, also in a trace.
#[test]
fn a_layer_may_end_in_a_sweep() {
    let (done, is_done) = std::sync::mpsc::channel();
    let swept = std::thread::spawn(move || {
        let store = Store::open_small().unwrap();
        let ram = named(&store);
        let image = freeze(&ram, FreezeMode::Eager);
        let parts: Vec<_> = image.maps().map(|map| (map, Vec::new())).collect();
        let (mut users, mut at) = (Some((image, ram, parts)), 0);
        sweep_in_steps(store.views(), || {
            if at == 1 {
                let (image, ram, parts) = users.take().unwrap();
                // Handles have been made since, so the pages seen may not be swept.
                drop(RamImage::from_parts(&store, ram.layout(), parts).unwrap());
                drop((image, ram));
                store.wait_reclaimed();
            }
            at += 1;
        });
        store.expect_no_layers();
        done.send(at).unwrap();
    });
    let steps = receive("the end of the sweep", &is_done);
    swept.join().unwrap();
    assert_eq!(steps, 2);
}

/// Pages of each of the two regions.
const SMALL: u64 = 600;
const HIGH: u64 = 1 << 32;

fn address(region: u64, page: u64) -> GuestAddress {
    GuestAddress(region * HIGH + page * PAGE_SIZE)
}

/// Two regions, each page of which holds a word that names it.
fn named(store: &Store) -> GuestRam {
    let layout = RamLayout::of_ranges(&[(GuestAddress(0), SMALL), (GuestAddress(HIGH), SMALL)]).unwrap();
    let ram = GuestRam::reserve(&layout, store).unwrap();
    ram.populate().unwrap();
    (0..SMALL).for_each(|page| name(&ram, page, 1));
    ram
}

fn word(page: u64, region: u64, round: u64) -> u64 {
    round << 32 | region << 16 | (page + 1)
}

fn name(ram: &GuestRam, page: u64, round: u64) {
    (0..2).for_each(|region| ram.memory().write_obj(word(page, region, round), address(region, page)).unwrap());
}

fn expect(ram: &GuestRam, what: &str, round: impl Fn(u64) -> u64) {
    for (region, page) in (0..2).flat_map(|region| (0..SMALL).map(move |page| (region, page))) {
        let got: u64 = ram.memory().read_obj(address(region, page)).unwrap();
        assert_eq!(got, word(page, region, round(page)), "{what}: page {page} of region {region}");
    }
}

fn freeze(ram: &GuestRam, mode: FreezeMode) -> RamImage {
    ram.freeze_in(mode, &Quiesced::by(&crate::NoWriters)).unwrap().0
}

fn child(image: &RamImage, store: &Store) -> GuestRam {
    let child = GuestRam::reserve(image.layout(), store).unwrap();
    child.adopt(image).unwrap();
    child
}

/// Pairs of pages with gaps of two. A freeze closes the gaps, so the delta includes them. The pages
/// are few, so the VM keeps its mappings and shows the gaps from the layer below.
fn is_dirty(page: u64) -> bool {
    page < 200 && page % 4 < 2
}

fn gapped(page: u64) -> u64 {
    if is_dirty(page) { 2 } else { 1 }
}

/// When a background freeze is absorbed, the pages under closed gaps are in no published view yet.
#[test]
fn gaps_of_a_background_freeze_outlive_a_sweep_before_they_are_published() {
    let store = Store::open_small().unwrap();
    let ram = named(&store);
    drop(freeze(&ram, FreezeMode::Eager));
    (0..SMALL).filter(|page| is_dirty(*page)).for_each(|page| name(&ram, page, 2));
    let image = freeze(&ram, FreezeMode::Background);
    image.finish_background().unwrap();
    // Dropped views are freed.
    store.wait_reclaimed();
    for region in ram.regions() {
        let mut state = region.state();
        assert!(state.freezing.as_ref().is_some_and(|freezing| !freezing.gaps.is_empty()), "not looked at yet");
        region.reap_background(&mut state, true);
        sweep(store.views());
        drop(state);
    }
    expect(&ram, "the parent", gapped);
    expect(&child(&image, &store), "a child", gapped);
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    store.sweep();
    expect(&ram, "the parent, swept again", gapped);
}

/// A sweep after every change of the registry, on the thread that makes it.
/// The VM is frozen with pinned pages, without, and with gaps, and reset.
#[test]
fn no_sweep_costs_a_page_whenever_it_comes() {
    let store = Store::open_small().unwrap();
    let ram = named(&store);
    let restless = Restless::begin();
    let pin = |region: &Arc<crate::GuestRegion>| {
        region.pin(PageRange::new(5, 9), Access::Write, PinLifetime::LongTerm).unwrap()
    };
    let pins: Vec<_> = ram.regions().iter().map(pin).collect();
    let first = freeze(&ram, FreezeMode::Eager);
    expect(&ram, "with pins", |_| 1);
    expect(&child(&first, &store), "a child of what was pinned", |_| 1);
    drop(pins);
    // Pages used by devices stay in place once more; then the last of the base file becomes a
    // layer's.
    for round in 0..2 {
        let image = freeze(&ram, FreezeMode::Eager);
        expect(&ram, "without pins", |_| 1);
        expect(&child(&image, &store), &format!("a child of freeze {round}"), |_| 1);
    }
    assert!(
        ram.regions().iter().all(|region| region.state().space.mappings().base_runs().is_empty()),
        "nothing is base any more"
    );
    for mode in [FreezeMode::Eager, FreezeMode::Background] {
        (0..SMALL).filter(|page| is_dirty(*page)).for_each(|page| name(&ram, page, 2));
        let image = freeze(&ram, mode);
        ram.finish_background().unwrap();
        expect(&ram, &format!("{mode:?}, gaps closed"), gapped);
        expect(&child(&image, &store), &format!("a child of {mode:?}, gaps closed"), gapped);
        ram.reset(&first, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
        expect(&ram, &format!("reset after {mode:?}"), |_| 1);
    }
    assert!(restless.sweeps() > 20, "{} sweeps", restless.sweeps());
}

/// A VM that was never frozen is reset to another VM's image: its base file is freed with the
/// mappings.
#[test]
fn a_reset_leaves_no_birth_file_behind() {
    let store = Store::open_small().unwrap();
    let (of, ram) = (named(&store), named(&store));
    let image = freeze(&of, FreezeMode::Eager);
    (0..SMALL).for_each(|page| name(&ram, page, 3));
    let before = store.live_layers();
    ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    expect(&ram, "put back", |_| 1);
    store.wait_reclaimed();
    // Sweeps of other tests hold all views of the process for a moment.
    let left = || store.live_layers();
    clade_test_support::wait_eq("its two base files are kept by nobody", &(before - 2), left);
}

/// During a sweep an image is made of handles, and the handles are dropped.
/// The sweep has read the views before, and finds no handle afterwards.
#[test]
fn i4_an_image_made_of_handles_during_a_sweep_is_kept() {
    // Whether there are handles before the sweep begins, and in which of its steps the image is
    // made of them.
    for (before, step) in [(true, 0), (true, 1), (false, 0), (false, 1)] {
        let store = Store::open_small().unwrap();
        let ram = named(&store);
        let (image, layout) = (freeze(&ram, FreezeMode::Eager), ram.layout().clone());
        // The VM shows all but these pages of the image's layers.
        (0..300).for_each(|page| name(&ram, page, 2));
        drop(freeze(&ram, FreezeMode::Eager));
        let (mut image, mut parts, mut at) = (Some(image), None, 0);
        let hand_out = |image: &mut Option<RamImage>| {
            let image = image.take();
            let parts = image.as_ref().map(|image| image.maps().map(|map| (map, Vec::new())).collect::<Vec<_>>());
            drop(image);
            // The VM's previous view is dropped, too.
            parts
        };
        if before {
            parts = hand_out(&mut image);
        }
        store.wait_reclaimed();
        let mut made = None;
        sweep_in_steps(store.views(), || {
            if !before && at == 0 {
                parts = hand_out(&mut image);
            }
            if at == step {
                made = parts.take().map(|parts| RamImage::from_parts(&store, &layout, parts).unwrap());
            }
            at += 1;
        });
        let child = child(&made.unwrap(), &store);
        expect(&child, &format!("made in step {step}, handles before: {before}"), |_| 1);
    }
}

#[test]
fn of_memory_in_blocks_whole_blocks_are_given_back() {
    let store = Store::open().unwrap();
    let (file, pages) = (crate::sys::small_file(1).unwrap(), 3 * BLOCK_PAGES + 40);
    let layer = store.adopt_file(file, pages, LayerStorage::Memory(Backing::Huge));
    let dead = |seen: &[PageRange], given: &[PageRange]| dead_runs(&layer, seen.to_vec(), given);
    let run = PageRange::new;
    assert_eq!(dead(&[run(1030, 1100), run(0, 10)], &[]), [run(512, 1024), run(1536, pages)]);
    assert_eq!(dead(&[run(0, 10), run(1020, pages)], &[]), [], "only a part of one");
    assert_eq!(dead(&[run(0, 512)], &[run(512, 1024)]), [run(1024, pages)]);
    assert_eq!(dead(&[run(0, 10), run(20, pages)], &[]), [], "less than a block");
    assert_eq!(dead(&[run(0, pages - 1)], &[]), [], "the end of a block");
}

/// Pages discarded after a freeze are in no view. The next freeze punches them, once, and counts
/// them.
#[test]
fn what_nobody_sees_goes_by_itself_and_is_counted() {
    let store = Store::open_small().unwrap();
    let ram = named(&store);
    ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
    let layer = Arc::clone(&ram.regions()[0].state().space.map().get(0).unwrap().layer);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&layer.file().metadata().unwrap());
    assert_eq!((store.given_back(), store.sweep()), (0, Swept::default()));
    let before = blocks();
    ram.regions()[0].discard(PageRange::new(100, 200)).unwrap();
    ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
    wait_eq("pages that a sweep gave back by itself", &100, || store.given_back());
    assert_eq!(before - blocks(), 100 * PAGE_SIZE / 512, "the kernel has them");
    assert_eq!((store.sweep(), store.given_back()), (Swept::default(), 100), "no page goes twice");
}
