//! Compaction and the sweep: the number of layers stays low, and invisible pages are punched,
//! without an effect on VMs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::time::Duration;

use clade_memory::{
    Access, Evicted, FreezeMode, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage, RamLayout, Store,
};
use vm_memory::{Bytes, GuestAddress};

fn stores() -> [Store; 2] {
    [Store::open().unwrap(), Store::open_small().unwrap()]
}

fn put(ram: &GuestRam, page: u64, word: u64) {
    for at in [0, PAGE_SIZE - 8] {
        ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE + at)).unwrap();
    }
}

fn word(ram: &GuestRam, page: u64) -> u64 {
    let at = |at| ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE + at)).unwrap();
    assert_eq!(at(0), at(PAGE_SIZE - 8), "page {page} is torn");
    at(0)
}

fn born(store: &Store, pages: u64) -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    (0..pages).for_each(|page| put(&ram, page, page + 1));
    ram
}

fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters)).unwrap().0
}

fn child(image: &RamImage, store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(image.layout(), store).unwrap();
    ram.adopt(image).unwrap();
    ram
}

fn expect_gone(store: &Store) {
    clade_test_support::wait_eq("layers that are held", &0, || store.live_layers());
}

#[test]
fn what_no_view_sees_is_given_back() {
    let store = Store::open_small().unwrap();
    let ram = born(&store, 64);
    let first = freeze(&ram);
    (0..32).for_each(|page| put(&ram, page, 100 + page));
    let second = freeze(&ram);
    (0..16).for_each(|page| put(&ram, page, 200 + page));
    let third = freeze(&ram);
    // In total, because the store also sweeps by itself.
    let swept = || {
        store.sweep();
        store.given_back()
    };
    assert_eq!(swept(), 0, "every page is in an image");
    let sibling = child(&first, &store);
    drop(first);
    assert_eq!(swept(), 0, "a child sees what its image showed");
    drop(sibling);
    // Pages 0..32 of the first layer are in no view any more: the second image and the VM have
    // newer ones. A sweep of the store's own may have punched them, and count them a moment later.
    clade_test_support::wait_eq("pages 0..32 of the first layer", &32, swept);
    let grandchild = child(&second, &store);
    assert!((0..32).all(|page| word(&grandchild, page) == 100 + page));
    // The second image's layer is freed as a whole: the third copied pages 16..32 again.
    drop((second, grandchild));
    assert_eq!(swept(), 32);
    let want = |page| match page {
        0..16 => 200 + page,
        16..32 => 100 + page,
        _ => page + 1,
    };
    ram.reset(&third, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO).unwrap();
    for vm in [&child(&third, &store), &ram] {
        (0..64).for_each(|page| assert_eq!(word(vm, page), want(page), "page {page}"));
    }
    drop((third, ram));
    expect_gone(&store);
}

/// A freeze copies the page between two written ones along with them. The VM still shows the old
/// page, which must stay.
#[test]
fn a_page_copied_with_its_neighbours_is_still_shown_from_where_it_was() {
    for mode in [FreezeMode::Eager, FreezeMode::Background] {
        for store in stores() {
            let ram = born(&store, 1024);
            drop(freeze(&ram));
            [10, 12].iter().for_each(|page| put(&ram, *page, 7));
            let (image, report) = ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
            assert_eq!(report.copied, 3);
            image.finish_background().unwrap();
            drop(image);
            store.sweep();
            ram.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
            store.sweep();
            assert_eq!([10, 11, 12].map(|page| word(&ram, page)), [7, 12, 7]);
        }
    }
}

#[test]
fn i7_nothing_is_given_back_under_a_pin() {
    for store in stores() {
        let ram = born(&store, 1536);
        let region = &ram.regions()[0];
        // A whole block of the birth file, and a part of another: pinned while the rest becomes a
        // layer.
        let pins = [PageRange::new(512, 1024), PageRange::new(1030, 1040)]
            .map(|range| region.pin(range, Access::Write, PinLifetime::LongTerm).unwrap());
        let image = freeze(&ram);
        (0..1536).for_each(|page| put(&ram, page, 5000 + page));
        let later = freeze(&ram);
        drop(image);
        store.sweep();
        for pin in &pins {
            (pin.range().start()..pin.range().end()).for_each(|page| assert_eq!(word(&ram, page), 5000 + page));
            pin.slice().write_obj(77u64, 0).unwrap();
            assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(pin.range().start() * PAGE_SIZE)).unwrap(), 77);
        }
        drop(pins);
        // Now they belong to an ordinary layer.
        let last = freeze(&ram);
        drop(later);
        store.sweep();
        let vm = child(&last, &store);
        for page in (0..1536).filter(|page| ![512, 1030].contains(page)) {
            assert_eq!(word(&vm, page), 5000 + page);
        }
        drop((last, vm, ram));
        expect_gone(&store);
    }
}

/// Pages written between two freezes.
const EACH: u64 = 60;

/// A VM frozen many times, each time after writes to scattered pages.
fn patchwork(
    store: &Store,
    rounds: u64,
    pages: u64,
    mut after: impl FnMut(&GuestRam, RamImage),
) -> (GuestRam, Vec<u64>) {
    let ram = born(store, pages);
    let mut want: Vec<u64> = (0..pages).map(|page| page + 1).collect();
    for round in 0..rounds {
        for n in 0..EACH {
            let page = (round * EACH + n) * 37 % pages;
            want[page as usize] = (round + 1) << 32 | page;
            put(&ram, page, want[page as usize]);
        }
        after(&ram, freeze(&ram));
        ram.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
    }
    (ram, want)
}

fn expect(vm: &GuestRam, want: &[u64]) {
    (0..).zip(want).for_each(|(page, want)| assert_eq!(word(vm, page), *want, "page {page}"));
}

#[test]
fn many_pieces_are_merged_with_the_same_contents() {
    for store in stores() {
        let mut images = Vec::new();
        let (ram, want) = patchwork(&store, 20, 4096, |_, image| images.push(image));
        let image = images.last().unwrap();
        let (merged, report) = image.compact(&store).unwrap();
        assert!(report.layers_before > 3, "{report:?}");
        assert!(report.layers <= 2 && report.pieces < report.pieces_before / 2, "{report:?}");
        assert_eq!((merged.layers() as u64, merged.mappings() as u64), (report.layers, report.pieces));
        expect(&child(&merged, &store), &want);
        expect(&child(image, &store), &want);

        let before = ram.stats().unwrap();
        let report = ram.compact(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        assert!(report.layers <= 2, "{report:?}");
        let after = ram.stats().unwrap();
        ram.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        assert_eq!((after.exclusive, after.shared), (before.exclusive, before.shared), "nobody owns more than before");
        expect(&ram, &want);
        // Back to the first image, and forward to the merged one.
        ram.reset(&images[0], &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO).unwrap();
        expect(
            &ram,
            &(0..4096u64)
                .map(|page| if page % 37 == 0 && page < EACH * 37 { 1 << 32 | page } else { page + 1 })
                .collect::<Vec<_>>(),
        );
        ram.reset(&merged, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO).unwrap();
        expect(&ram, &want);
        drop((images, merged, ram));
        expect_gone(&store);
    }
}

#[test]
fn d5_layers_and_mappings_stay_bounded_over_hundreds_of_freezes() {
    for store in stores() {
        let (mut most_layers, mut most_mappings) = (0, 0);
        let (ram, want) = patchwork(&store, 200, 8192, |ram, image| {
            most_layers = most_layers.max(image.layers());
            most_mappings = most_mappings.max(ram.stats().unwrap().mappings);
            // The reclaim thread compacts between two freezes: a sweep waits for its tasks.
            store.sweep();
        });
        println!("at most {most_layers} layers, {most_mappings} mappings over 200 freezes");
        assert!(most_layers < 100, "{most_layers} layers of 200 freezes");
        assert!(most_mappings < 1500, "{most_mappings} mappings");
        expect(&ram, &want);
        expect(&child(&freeze(&ram), &store), &want);
        drop(ram);
        expect_gone(&store);
    }
}

#[test]
fn reference_pages_stay_references() {
    let store = Store::open().unwrap();
    let pattern = store.reference_page(&[0x5a; PAGE_SIZE as usize]).unwrap();
    let mut count = 0;
    let (ram, _) = patchwork(&store, 12, 2048, |ram, _| {
        count += 1;
        ram.regions()[0].map_reference(PageRange::with_len(count * 148 + 1, 3), &pattern).unwrap();
    });
    let image = freeze(&ram);
    let (merged, _) = image.compact(&store).unwrap();
    let vm = child(&merged, &store);
    assert_eq!(vm.stats().unwrap().reference, 36);
    assert!((1..=12).all(|n| word(&vm, n * 148 + 2) == 0x5a5a_5a5a_5a5a_5a5a));
}

#[test]
fn evicted_pages_that_were_read_back_are_dropped_again() {
    let dir = Path::new("/var/tmp");
    let store = Store::open().unwrap();
    let ram = born(&store, 256);
    let region = &ram.regions()[0];
    let quiesced = Quiesced::by(&clade_memory::NoWriters);
    let all = PageRange::new(0, 256);
    assert_eq!(region.evict(all, dir, &quiesced).unwrap(), Evicted { written: 256, dropped: 0 });
    (0..256).for_each(|page| assert_eq!(word(&ram, page), page + 1));
    put(&ram, 9, 99);
    let pin = region.pin(PageRange::new(20, 24), Access::Write, PinLifetime::LongTerm).unwrap();
    // Page 9 is the VM's own again and is written to disk; the four pinned pages stay; the others
    // are only dropped from memory.
    let evicted = region.evict(all, dir, &quiesced).unwrap();
    assert_eq!(evicted, Evicted { written: 1, dropped: 251 });
    pin.slice().write_obj(7u64, 0).unwrap();
    assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(20 * PAGE_SIZE)).unwrap(), 7, "the pinned page did not move");
    for page in (0..256).filter(|page| ![9, 20].contains(page)) {
        assert_eq!(word(&ram, page), page + 1);
    }
    assert_eq!(word(&ram, 9), 99);
}

/// More scattered pages than a process may have mappings: a child that needs too many is refused
/// before any change, and succeeds once the image has been merged.
#[test]
fn d5_more_scattered_pages_than_mappings() {
    let store = Store::open().unwrap();
    let layout = RamLayout::new(1 << 30).unwrap();
    let ram = GuestRam::reserve(&layout, &store).unwrap();
    ram.populate().unwrap();
    freeze(&ram);
    let pages: Vec<u64> = (0..262_144).step_by(8).collect();
    for (gap, patient) in [(2u64, false), (8, true)] {
        let written: Vec<u64> = (0..262_144).step_by(gap as usize).collect();
        written.iter().for_each(|page| put(&ram, *page, page + gap));
        let (image, _) = ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
        assert!(ram.stats().unwrap().mappings < 1_500, "{} mappings of the parent", ram.stats().unwrap().mappings);
        let vm = GuestRam::reserve(&layout, &store).unwrap();
        let image = match vm.adopt(&image) {
            Ok(()) => {
                assert!(!patient, "{} pieces were not too many", image.mappings());
                image
            }
            Err(error) => {
                assert!(patient && matches!(error, clade_memory::RamError::Budget(_)), "{error:?}");
                assert_eq!(vm.stats().unwrap().mappings, 0, "refused, and nothing of it is left");
                let (merged, report) = image.compact(&store).unwrap();
                println!("refused with {} pieces, adopted with {}", report.pieces_before, report.pieces);
                vm.adopt(&merged).unwrap();
                merged
            }
        };
        assert!(image.mappings() < 60_000);
        written.iter().for_each(|page| assert_eq!(word(&vm, *page), page + gap));
        vm.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        drop((vm, image));
    }
    pages.iter().for_each(|page| assert_eq!(word(&ram, *page), page + 8));
    drop(ram);
    expect_gone(&store);
}

/// A VM of one store, started from an image of another: neither store punches pages that the
/// other's VM shows.
#[test]
fn stores_look_at_each_others_views() {
    let (ours, theirs) = (Store::open_small().unwrap(), Store::open_small().unwrap());
    let parent = born(&ours, 64);
    let vm = child(&freeze(&parent), &theirs);
    (0..32).for_each(|page| put(&vm, page, 7));
    (32..64).for_each(|page| put(&parent, page, 8));
    drop((freeze(&vm), freeze(&parent)));
    theirs.sweep();
    ours.sweep();
    (0..64).for_each(|page| assert_eq!(word(&vm, page), if page < 32 { 7 } else { page + 1 }));
    (0..64).for_each(|page| assert_eq!(word(&parent, page), if page < 32 { page + 1 } else { 8 }));
    // Invisible pages of this store's layers are punched as well.
    (0..16).for_each(|page| put(&parent, page, 9));
    drop(freeze(&parent));
    drop(vm);
    ours.sweep();
    assert!(ours.given_back() > 0);
}

/// Pages of its birth file that a VM still owned when it was dropped, because a device held them at
/// the last freeze, are punched even if other VMs show the rest.
#[test]
fn what_a_dead_vm_owned_of_its_birth_file_is_given_back() {
    let store = Store::open_small().unwrap();
    let parent = born(&store, 64);
    let pin = parent.regions()[0].pin(PageRange::new(5, 9), Access::Write, PinLifetime::LongTerm).unwrap();
    let image = freeze(&parent);
    store.sweep();
    assert_eq!(store.given_back(), 0, "while it lives it owns them");
    drop((pin, parent));
    store.sweep();
    assert_eq!(store.given_back(), 4);
    let vm = child(&image, &store);
    (0..64).for_each(|page| assert_eq!(word(&vm, page), page + 1));
}
