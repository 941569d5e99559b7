use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    Access, DontFork, FreezeMode, GuestRam, Learned, NoWriters, PageSetError, PinLifetime, Quiesced, RamImage,
    RamLayout, Store, SuspendFile,
};

/// Pages of the first region. The second has a quarter of that.
const PAGES: u64 = 2048;
const ALL: u64 = PAGES + PAGES / 4;
const SECOND: u64 = 1 << 30;

fn stopped() -> Quiesced<'static> {
    Quiesced::by(&NoWriters)
}

fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), PAGES), (GuestAddress(SECOND), ALL - PAGES)]).unwrap()
}

fn address(page: u64) -> GuestAddress {
    GuestAddress(page.checked_sub(PAGES).map_or(page * PAGE_SIZE, |page| SECOND + page * PAGE_SIZE))
}

fn put(ram: &GuestRam, page: u64, word: u64) {
    ram.memory().write_obj(word, address(page)).unwrap();
}

fn word(ram: &GuestRam, page: u64) -> u64 {
    ram.memory().read_obj(address(page)).unwrap()
}

fn contents(ram: &GuestRam) -> Vec<u64> {
    (0..ALL).map(|page| word(ram, page)).collect()
}

fn run(start: u64, end: u64) -> PageRange {
    PageRange::new(start, end)
}

fn set(first: &[PageRange], second: &[PageRange]) -> PageSet {
    PageSet::new(&layout(), vec![first.to_vec(), second.to_vec()]).unwrap()
}

/// An image of which every page is written.
fn image(store: &Store) -> RamImage {
    let ram = GuestRam::reserve(&layout(), store).unwrap();
    ram.populate().unwrap();
    (0..ALL).for_each(|page| put(&ram, page, page + 1));
    ram.freeze_in(FreezeMode::Eager, &stopped()).unwrap().0
}

fn child(store: &Store, image: &RamImage) -> GuestRam {
    let ram = GuestRam::reserve(&layout(), store).unwrap();
    ram.adopt(image).unwrap();
    ram
}

fn own(ram: &GuestRam) -> u64 {
    ram.stats().unwrap().exclusive
}

fn suspend(ram: &GuestRam) -> (crate::Suspended, crate::TouchedPages) {
    ram.suspend(SuspendFile::create(Path::new("/dev/shm")).unwrap(), &stopped(), Duration::ZERO).unwrap()
}

#[test]
fn i2_what_is_copied_ahead_is_the_vms_own_and_changes_nothing() {
    for store in [Store::open(), Store::open_small()] {
        let store = store.unwrap();
        let image = image(&store);
        let (vm, sibling) = (child(&store, &image), child(&store, &image));
        let before = contents(&vm);
        // Some pages are the VM's own already.
        put(&vm, 12, 13);
        let wanted = set(&[run(10, 300), run(700, 701)], &[run(5, 15)]);
        assert_eq!(vm.copy_ahead(&wanted, 10_000).unwrap(), 300);
        assert_eq!((own(&vm), own(&sibling)), (301, 0));
        let region = &vm.regions()[0];
        assert!((10..300).filter(|page| *page != 12).all(|page| region.ownership().get(page).0), "no bit");
        assert_eq!(contents(&vm), before);
        assert_eq!(vm.copy_ahead(&wanted, 10_000).unwrap(), 0, "copied twice");
        let counts = vm.cow_counts().unwrap();
        assert_eq!((counts.ahead, counts.guest), (300, 1));
        // Writes by the guest and by a device stay private to the VM.
        let pin = region.pin(run(20, 22), Access::Write, PinLifetime::LongTerm).unwrap();
        assert_eq!(vm.pin_counts().locked, 0, "a pin of what was copied ahead takes no lock");
        pin.slice().write_obj(77u64, 0).unwrap();
        put(&vm, 21, 78);
        assert_eq!((word(&vm, 20), pin.slice().read_obj::<u64>(PAGE_SIZE as usize).unwrap()), (77, 78));
        assert_eq!(contents(&sibling), before);
        vm.check(&stopped()).unwrap();
        drop(pin);
        // A child has the same contents.
        let (second, _) = vm.freeze_in(FreezeMode::Eager, &stopped()).unwrap();
        assert_eq!(contents(&child(&store, &second)), contents(&vm));
        vm.check(&stopped()).unwrap();
    }
}

#[test]
fn no_more_than_the_budget_is_copied() {
    let store = Store::open_small().unwrap();
    let image = image(&store);
    let wanted = set(&[run(0, 100), run(200, 300)], &[run(0, 50)]);
    for (most, copied) in [(0, 0), (1, 1), (64, 64), (130, 130), (249, 249), (250, 250), (251, 250)] {
        let vm = child(&store, &image);
        assert_eq!((vm.copy_ahead(&wanted, most).unwrap(), own(&vm)), (copied, copied), "{most} at most");
    }
}

#[test]
fn a_set_of_another_guest_is_refused() {
    let store = Store::open_small().unwrap();
    let vm = child(&store, &image(&store));
    let other = RamLayout::new(2 * PAGES * PAGE_SIZE).unwrap();
    let one = PageSet::new(&other, vec![vec![run(0, 5)]]).unwrap();
    assert_eq!(vm.copy_ahead(&one, 9).unwrap_err(), PageSetError::Regions { given: 1, guest: 2 });
    let larger = RamLayout::of_ranges(&[(GuestAddress(0), PAGES), (GuestAddress(SECOND), ALL)]).unwrap();
    let beyond = PageSet::new(&larger, vec![vec![run(0, 5)], vec![run(0, ALL)]]).unwrap();
    assert!(matches!(vm.copy_ahead(&beyond, 9), Err(PageSetError::Beyond { region: 1, .. })));
    assert_eq!(own(&vm), 0);
}

#[test]
fn hits_and_waste_are_told_apart_and_only_hits_are_learned() {
    let store = Store::open_small().unwrap();
    let image = image(&store);
    let vm = child(&store, &image);
    vm.copy_ahead(&set(&[run(0, 100)], &[run(0, 10)]), 1000).unwrap();
    (50..150).chain(PAGES + 5..PAGES + 20).for_each(|page| put(&vm, page, 0));
    // Rewritten with the same bytes.
    put(&vm, 3, 4);
    let (written, came) = vm.written_set(&stopped()).unwrap();
    assert_eq!(written, set(&[run(50, 150)], &[run(5, 20)]));
    assert_eq!(came, AheadUse { copied: 110, hits: 55, waste: 55 });
    assert_eq!(vm.written_set(&stopped()).unwrap(), (written, came), "a question changes nothing");
    assert!(vm.is_written_set_whole());
    // A reset and a freeze start over.
    vm.reset(&image, &stopped(), Duration::ZERO).unwrap();
    assert_eq!(vm.written_set(&stopped()).unwrap(), (set(&[], &[]), AheadUse::default()));
    assert_eq!(own(&vm), 0);
    vm.copy_ahead(&set(&[run(0, 100)], &[]), 1000).unwrap();
    vm.freeze_in(FreezeMode::Eager, &stopped()).unwrap();
    assert_eq!(vm.written_set(&stopped()).unwrap().1, AheadUse::default());
    assert!(!vm.is_written_set_whole(), "what it wrote before is not in it");
    vm.reset(&image, &stopped(), Duration::ZERO).unwrap();
    assert!(vm.is_written_set_whole());
    // What a reset restores is learned only if the VM writes it again.
    [3, 900].iter().for_each(|page| put(&vm, *page, 0));
    vm.reset(&image, &stopped(), Duration::ZERO).unwrap();
    assert_eq!(own(&vm), 2, "restored");
    assert_eq!(vm.written_set(&stopped()).unwrap(), (set(&[], &[]), AheadUse::default()));
    put(&vm, 900, 0);
    assert_eq!(vm.written_set(&stopped()).unwrap().0, set(&[run(900, 901)], &[]));
    suspend(&vm);
    assert!(!vm.is_written_set_whole());
}

#[test]
fn children_learn_from_each_other_and_adapt() {
    let store = Store::open_small().unwrap();
    let image = image(&store);
    let mut learned = Learned::new(image.layout());
    let mut hits = Vec::new();
    for nth in 0..16 {
        let vm = child(&store, &image);
        vm.copy_ahead(&learned.likely(500), 500).unwrap();
        // Another workload from the eighth on.
        let first = if nth < 8 { 100 } else { 1000 };
        (first..first + 200).for_each(|page| put(&vm, page, nth));
        let (written, came) = vm.written_set(&stopped()).unwrap();
        assert_eq!(written, set(&[run(first, first + 200)], &[]));
        learned.record(&written).unwrap();
        hits.push((came.hits, came.waste));
    }
    assert_eq!(hits[..2], [(0, 0), (200, 0)]);
    assert_eq!(hits[8..14], [(0, 200), (0, 200), (0, 200), (0, 200), (200, 200), (200, 0)]);
}

#[test]
fn r19_what_is_absent_or_zeros_or_being_filled_is_left_out() {
    let store = Store::open_small().unwrap();
    let parent = child(&store, &image(&store));
    parent.regions()[0].set_dont_fork(run(50, 60), Some(DontFork::Absent)).unwrap();
    parent.regions()[0].discard(run(70, 80)).unwrap();
    (0..10).for_each(|page| put(&parent, page, 9));
    (900..1000).for_each(|page| put(&parent, page, 9));
    store.start_background().unwrap();
    let (image, _) = parent.freeze_in(FreezeMode::Background, &stopped()).unwrap();
    let vm = child(&store, &image);
    let pending = image.is_pending();
    let copied = vm.copy_ahead(&set(&[run(40, 100)], &[]), 1000).unwrap();
    assert_eq!(copied, 40, "of 60, 10 are absent, and 10 are zeros");
    assert!(vm.memory().read_obj::<u64>(address(55)).is_err());
    // Missing pages are not waited for; they are copied once filled.
    let early = vm.copy_ahead(&set(&[run(900, 1000)], &[]), 1000).unwrap();
    assert!(pending || early == 100);
    vm.finish_background().unwrap();
    image.finish_background().unwrap();
    assert_eq!(early + vm.copy_ahead(&set(&[run(900, 1000)], &[]), 1000).unwrap(), 100);
    assert!((900..1000).all(|page| word(&vm, page) == 9) && word(&vm, 75) == 0);
    vm.check(&stopped()).unwrap();
}

#[test]
fn a_vm_that_is_booted_or_has_no_memory_copies_nothing() {
    let store = Store::open_small().unwrap();
    let vm = GuestRam::reserve(&layout(), &store).unwrap();
    let all = set(&[run(0, PAGES)], &[]);
    assert_eq!(vm.copy_ahead(&all, 10).unwrap(), 0);
    vm.populate().unwrap();
    assert_eq!(vm.copy_ahead(&all, 10).unwrap(), 0);
}

#[test]
fn a_suspension_gives_back_what_was_copied_for_nothing() {
    let store = Store::open_small().unwrap();
    let vm = child(&store, &image(&store));
    suspend(&vm);
    // After the wake: pages written now are learned at the next suspension.
    (100..200).chain(PAGES + 3..PAGES + 5).for_each(|page| put(&vm, page, 1 << 40));
    assert_eq!(word(&vm, 1500), 1501);
    let (report, working_set) = suspend(&vm);
    assert_eq!((report.written, working_set.written()), (102, 102));
    assert!(working_set.pages() > 102, "what was read is of it");
    vm.read_ahead(&working_set);
    assert_eq!(own(&vm), 102, "copied ahead");
    // Half of them are written this time, and page 50.
    (100..150).chain([50]).for_each(|page| put(&vm, page, 1 << 41));
    let before = contents(&vm);
    let pin = vm.regions()[0].pin(run(180, 181), Access::Write, PinLifetime::LongTerm).unwrap();
    let file = SuspendFile::create(Path::new("/dev/shm")).unwrap();
    assert!(matches!(vm.suspend(file, &stopped(), Duration::ZERO), Err(RamError::Pinned { .. })), "I7");
    drop(pin);
    assert_eq!((own(&vm), contents(&vm)), (103, before.clone()), "refused, and nothing has changed");
    let (report, working_set) = suspend(&vm);
    assert_eq!((report.written, working_set.written()), (51, 51), "what was copied for nothing is written nowhere");
    assert_eq!((own(&vm), contents(&vm)), (0, before));
    vm.check(&stopped()).unwrap();
}

#[test]
fn i7_a_device_that_writes_what_was_copied_ahead_is_seen_by_the_suspension() {
    let store = Store::open_small().unwrap();
    let vm = child(&store, &image(&store));
    vm.copy_ahead(&set(&[run(0, 64)], &[]), 64).unwrap();
    let pin = vm.regions()[0].pin(run(7, 8), Access::Write, PinLifetime::Transient).unwrap();
    pin.slice().write_obj(99u64, 8).unwrap();
    drop(pin);
    assert_eq!(suspend(&vm).0.written, 1);
    assert_eq!(vm.memory().read_obj::<u64>(GuestAddress(7 * PAGE_SIZE + 8)).unwrap(), 99);
}

/// The guest and a device write during forks and resets, and no write is lost.
#[test]
fn copies_ahead_beside_writers_forks_and_pins_lose_nothing() {
    let store = Store::open_small().unwrap();
    let image = image(&store);
    let (vm, end) = (child(&store, &image), AtomicBool::new(false));
    let wanted = set(&[run(0, PAGES)], &[run(0, ALL - PAGES)]);
    thread::scope(|scope| {
        let copier = scope.spawn(|| {
            let mut copied = 0;
            while !end.load(Ordering::Relaxed) {
                copied += vm.copy_ahead(&wanted, 700).unwrap();
            }
            copied
        });
        let device = scope.spawn(|| {
            let mut round = 0;
            while !end.load(Ordering::Relaxed) {
                round += 1;
                let pin =
                    vm.regions()[0].pin(run(round % PAGES, round % PAGES + 1), Access::Write, PinLifetime::Transient);
                let pin = pin.unwrap();
                pin.slice().write_obj(round, 64).unwrap();
                let seen: u64 = vm.memory().read_obj(GuestAddress((round % PAGES) * PAGE_SIZE + 64)).unwrap();
                assert_eq!(seen, round, "I3");
            }
        });
        for round in 1..40u64 {
            (round..ALL).step_by(7).for_each(|page| put(&vm, page, round << 32 | page));
            let (frozen, _) = vm.freeze_in(FreezeMode::Eager, &stopped()).unwrap();
            let other = child(&store, &frozen);
            (round..ALL).step_by(7).for_each(|page| {
                assert_eq!((word(&vm, page), word(&other, page)), (round << 32 | page, round << 32 | page));
            });
        }
        end.store(true, Ordering::Relaxed);
        device.join().unwrap();
        assert!(copier.join().unwrap() > 1000);
    });
    vm.check(&stopped()).unwrap();
    // And a VM that ends in the middle.
    let short = Arc::new(child(&store, &image));
    let other = Arc::clone(&short);
    let copier = thread::spawn(move || other.copy_ahead(&set(&[run(0, PAGES)], &[]), PAGES));
    drop(short);
    copier.join().unwrap().unwrap();
}
