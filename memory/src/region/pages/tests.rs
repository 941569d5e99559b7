use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{Access, DontFork, FreezeMode, GuestRam, NoWriters, PinLifetime, Quiesced, RamImage, RamLayout, Store};

const PAGES: u64 = 1024;

fn ram(store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    ram
}

fn child(of: &GuestRam, store: &Store) -> (GuestRam, RamImage) {
    let (image, _) = of.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap();
    let child = GuestRam::reserve(image.layout(), store).unwrap();
    child.adopt(&image).unwrap();
    (child, image)
}

fn write(ram: &GuestRam, page: u64) {
    ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap();
}

fn pages_of(map: &PageMap, is: impl Fn(PageKind) -> bool) -> Vec<u64> {
    map.runs.iter().filter(|run| is(run.kind)).flat_map(|run| run.first..run.first + run.count).collect()
}

/// The private copies according to /proc/self/pagemap: present or swapped, and not file-backed.
fn copies_by_the_kernels_words(ram: &GuestRam) -> Vec<u64> {
    let file = File::open("/proc/self/pagemap").unwrap();
    let first = ram.regions()[0].host_address() / PAGE_SIZE;
    let is_copy = |page: &u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, (first + page) * 8).unwrap();
        let word = u64::from_le_bytes(word);
        word >> 62 != 0 && word & 1 << 61 == 0
    };
    (0..PAGES).filter(is_copy).collect()
}

#[test]
fn the_map_shows_what_was_written_as_the_kernels_words_do() {
    let store = Store::open().unwrap();
    let parent = ram(&store);
    (0..600).for_each(|page| write(&parent, page));
    assert_eq!(parent.page_map(None).unwrap().totals(), [0, 0, 0, PAGES, 0]);
    let (child, _image) = child(&parent, &store);
    let written: Vec<u64> = vec![0, 1, 2, 77, 511, 512, 599, 700, 1023];
    written.iter().for_each(|page| write(&child, *page));
    let map = child.page_map(None).unwrap();
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Exclusive), written);
    assert_eq!(copies_by_the_kernels_words(&child), written);
    assert_eq!(map.runs.iter().map(|run| run.count).sum::<u64>(), PAGES);
    assert!(map.runs.windows(2).all(|two| two[0].first + two[0].count == two[1].first), "{map:?}");
    // The base file is the only layer, in full.
    let [layer] = map.layers.as_slice() else { panic!("{:?}", map.layers) };
    assert_eq!((layer.shown, layer.mapped, layer.place), (PAGES - 9, PAGES, LayerPlace::Memory));
    assert_eq!(layer.is_alone, Some(false), "the parent shows it");
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Shared(layer.id)).len() as u64, PAGES - 9);
    let stats = child.stats().unwrap();
    assert_eq!((stats.shared, stats.exclusive, stats.reference), (PAGES - 9, 9, 0));
    assert_eq!(child.cow_counts().unwrap(), CowCounts { guest: 9, ..CowCounts::default() });
}

#[test]
fn what_is_pinned_absent_and_zero_is_said_to_be() {
    let store = Store::open().unwrap();
    let parent = ram(&store);
    parent.regions()[0].set_dont_fork(PageRange::new(100, 110), Some(DontFork::Absent)).unwrap();
    let (child, _image) = child(&parent, &store);
    let region = &child.regions()[0];
    region.discard(PageRange::new(200, 300)).unwrap();
    let pin = region.pin(PageRange::new(50, 53), Access::Write, PinLifetime::LongTerm).unwrap();
    write(&child, 51);
    write(&child, 60);
    let map = child.page_map(None).unwrap();
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Pinned), [50, 51, 52]);
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Exclusive), [60]);
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Absent), (100..110).collect::<Vec<_>>());
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Reference), (200..300).collect::<Vec<_>>());
    assert_eq!(map.totals(), [10, 100, PAGES - 114, 1, 3]);
    std::thread::sleep(Duration::from_millis(2));
    let pins = child.pin_counts();
    assert_eq!((pins.now, pins.long, pins.long_total, pins.locked, pins.reading), (3, 1, 1, 1, 0));
    drop(pin);
    let read = region.pin(PageRange::new(70, 72), Access::Read, PinLifetime::Transient).unwrap();
    let after = child.pin_counts();
    assert_eq!((after.now, after.long, after.long_total, after.reading), (0, 0, 1, 2));
    assert!(after.longest >= Duration::from_millis(2), "{after:?}");
    drop(read);
    assert_eq!(child.pin_counts().reading, 0);
}

#[test]
fn copies_are_counted_once_and_by_what_made_them() {
    let store = Store::open().unwrap();
    let parent = ram(&store);
    (0..PAGES).for_each(|page| write(&parent, page));
    let (child, image) = child(&parent, &store);
    [3, 4, 900].iter().for_each(|page| write(&child, *page));
    let region = &child.regions()[0];
    // Page 4 is the guest's copy, 5 and 6 are the pin's.
    let pin = region.pin(PageRange::new(4, 7), Access::Write, PinLifetime::Transient).unwrap();
    let counts = child.cow_counts().unwrap();
    assert_eq!(counts, CowCounts { guest: 3, pin: 2, ..CowCounts::default() });
    assert_eq!(child.cow_counts().unwrap(), counts, "asking changes nothing");
    let (_, report) = child.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap();
    let counts = child.cow_counts().unwrap();
    assert_eq!((counts.guest, counts.pin), (3, 2));
    assert_eq!((counts.freeze_pinned, counts.freeze_ahead), (3, 0));
    assert_eq!(counts.freeze + counts.freeze_pinned, report.copied);
    drop(pin);
    // Pinned since the last freeze: the pages stay, ahead of the next pin.
    drop(region.pin(PageRange::new(4, 7), Access::Write, PinLifetime::Transient).unwrap());
    child.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap();
    assert_eq!(child.cow_counts().unwrap().freeze_ahead, 3);
    write(&child, 500);
    assert_eq!(child.cow_counts().unwrap().guest, 4);
    child.reset(&image, &Quiesced::by(&NoWriters), Duration::ZERO).unwrap();
    assert_eq!(child.cow_counts().unwrap().guest, 4, "what a reset drops stays counted");
}

#[test]
fn a_layer_is_alone_when_nobody_else_shows_it() {
    let store = Store::open().unwrap();
    let parent = ram(&store);
    let (child, image) = child(&parent, &store);
    let alone = |ram: &GuestRam, origin: Option<&RamImage>| ram.page_map(origin).unwrap().layers[0].is_alone;
    assert_eq!((alone(&parent, None), alone(&child, Some(&image))), (Some(false), Some(false)));
    drop(parent);
    assert_eq!(alone(&child, None), Some(false), "the image shows it");
    assert_eq!(alone(&child, Some(&image)), Some(true), "the image is its own");
    drop(image);
    assert_eq!(alone(&child, None), Some(true));
}

/// A copy that a background freeze leaves in place is the copy that was counted.
#[test]
fn a_copy_that_stays_in_place_is_counted_once() {
    let store = Store::open().unwrap();
    if store.background().is_err() {
        clade_test_support::skipped("no userfaultfd");
        return;
    }
    let parent = ram(&store);
    let (child, _image) = child(&parent, &store);
    let guest = || child.cow_counts().unwrap().guest;
    // Long runs, which are mapped over the delta, and single pages, which stay.
    let written: Vec<u64> = (0..300).chain((400..900).step_by(10)).collect();
    written.iter().for_each(|page| write(&child, *page));
    assert_eq!(guest(), 350);
    child.freeze_in(FreezeMode::Background, &Quiesced::by(&NoWriters)).unwrap();
    assert_eq!(guest(), 350, "while it is copied");
    child.finish_background().unwrap();
    assert_eq!(guest(), 350);
    let stays = child.stats().unwrap().exclusive;
    assert!(stays > 0 && stays < 350, "{stays}");
    // A page that stayed is not copied again; a remapped page and a new page are.
    let own = child.page_map(None).unwrap();
    let kept = pages_of(&own, |kind| kind == PageKind::Exclusive)[0];
    let shared =
        *written.iter().find(|page| !pages_of(&own, |kind| kind == PageKind::Exclusive).contains(page)).unwrap();
    [kept, shared, 1000].iter().for_each(|page| write(&child, *page));
    assert_eq!(guest(), 352);
    drop(child.regions()[0].pin(PageRange::with_len(kept, 1), Access::Write, PinLifetime::Transient).unwrap());
    assert_eq!(child.cow_counts().unwrap(), CowCounts { guest: 352, pin: 0, ..child.cow_counts().unwrap() });
    child.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap();
    assert_eq!(guest(), 352);
}

#[test]
fn pages_are_numbered_as_the_guest_numbers_its_frames() {
    let store = Store::open().unwrap();
    let layout = RamLayout::of_ranges(&[(GuestAddress(0), 64), (GuestAddress(crate::GAP_END), 32)]).unwrap();
    let parent = GuestRam::reserve(&layout, &store).unwrap();
    parent.populate().unwrap();
    let (child, _image) = child(&parent, &store);
    let high = crate::GAP_END / PAGE_SIZE;
    for page in [63, high, high + 31] {
        child.memory().write_obj(1u64, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    let map = child.page_map(None).unwrap();
    assert_eq!(pages_of(&map, |kind| kind == PageKind::Exclusive), [63, high, high + 31]);
    assert_eq!(map.layers.iter().map(|layer| layer.shown).collect::<Vec<_>>(), [63, 30]);
    // Neighbours in the list, of one kind, with a gap between them.
    let own: Vec<(u64, u64)> =
        map.runs.iter().filter(|run| run.kind == PageKind::Exclusive).map(|run| (run.first, run.count)).collect();
    assert_eq!(own, [(63, 1), (high, 1), (high + 31, 1)]);
}
