//! Runs that are too short to be mapped over the delta, and short reads of missing pages.

use super::*;
use crate::PinError;
use crate::freeze::background::work::coalesce_if_many;
use crate::units::pages_in;

/// Forty runs of seven pages: each too short for a mapping.
fn short_runs() -> Vec<PageRange> {
    (0..40).map(|n| PageRange::with_len(20 * n, 7)).collect()
}

/// The pages of `range` that are frames of the parent's own.
fn owned(ram: &GuestRam, range: PageRange) -> u64 {
    let region = &ram.regions()[0];
    pages_in(&region.store.pagemap().owned_runs(&region.at, range).unwrap())
}

#[test]
fn a_short_run_can_be_written_as_soon_as_it_is_copied() {
    let rig = Rig::new(Store::open_small().unwrap(), &short_runs());
    let (image, _) = rig.freeze_held();
    let bg_copy = background(image.bg_copies().next().unwrap());
    // The first 64 pages: nine runs of seven, and one page of the tenth.
    assert!(!bg_copy.step());
    let faults = rig.engine.hooks.faults_read.load(Ordering::Acquire);
    for run in 0..9 {
        write(&rig.parent, 20 * run, 0x77);
        write(&rig.parent, 20 * run + 6, 0x77);
    }
    assert_eq!(rig.engine.hooks.faults_read.load(Ordering::Acquire), faults, "a write waited for the whole copy");
    write(&rig.parent, 20 * 12, 0x77);
    assert!(rig.engine.hooks.faults_read.load(Ordering::Acquire) > faults, "this one is not copied yet");
    rig.let_run();
    expect_image(&rig, &image, &short_runs());
}

#[test]
fn short_runs_that_go_on_in_one_another_are_shared_back_as_one() {
    // Two times four pages with a gap of three: eleven pages, which is worth a mapping.
    let runs: Vec<_> = (0..60).map(|n| PageRange::with_len(30 * (n / 2) + 7 * (n % 2), 4)).collect();
    let rig = Rig::new(Store::open_small().unwrap(), &runs);
    let (image, _) = rig.freeze_held();
    rig.let_run();
    rig.parent.finish_background().unwrap();
    // Of 330 pages at most 256 stay the parent's, so seven runs of eleven are shared.
    assert_eq!(owned(&rig.parent, PageRange::new(0, 900)), (30 - 7) * 8, "released before it could be mapped");
    expect_image(&rig, &image, &runs);
}

#[test]
fn lost_runs_are_few_or_one() {
    let runs = |count: u64| -> Vec<_> { (0..count).map(|n| PageRange::with_len(10 * n, 3)).collect() };
    assert_eq!(coalesce_if_many(runs(64)), runs(64));
    assert_eq!(coalesce_if_many(runs(65)), [PageRange::new(0, 643)]);
    assert_eq!(coalesce_if_many(runs(66)), [PageRange::new(0, 653)]);
    assert_eq!(coalesce_if_many(runs(1)), runs(1));
    assert_eq!(coalesce_if_many(Vec::new()), []);
}

#[test]
fn a_short_read_of_lost_pages_is_refused_and_says_why() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let region = &child.regions()[0];
        // A filled page is read without delay (I4).
        drop(region.pin(PageRange::with_len(1300, 1), Access::Read, PinLifetime::Transient).unwrap());
        rig.engine.hooks.left.store(0, Ordering::Release);
        let refused = region.pin(PageRange::with_len(1050, 1), Access::Read, PinLifetime::Transient);
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        assert!(matches!(refused, Err(PinError::Unshare { .. })), "a device would wait for it, and be told EFAULT");
        rig.let_run();
    }
}

#[test]
fn a_short_read_of_a_layers_pages_takes_no_lock() {
    let rig = Rig::new(Store::open_small().unwrap(), &MANY);
    rig.parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
    let region = Arc::clone(&rig.parent.regions()[0]);
    let state = region.state_for_pin();
    let (done, waited) = mpsc::channel();
    let device = Arc::clone(&region);
    let reader = thread::spawn(move || {
        let pin = device.pin(PageRange::with_len(500, 600), Access::Read, PinLifetime::Transient);
        done.send(pin.is_ok()).unwrap();
    });
    let pinned = receive("a pin while the state is locked", &waited);
    drop(state);
    reader.join().unwrap();
    assert!(pinned);
}

/// More runs than a child may have mappings: some are copied into the child, from an incomplete
/// layer.
#[test]
fn a_child_that_copies_short_runs_waits_for_them() {
    let store = Store::open_small().unwrap();
    let engine = store.background().unwrap();
    let pages = 2500 * 20;
    let parent = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), &store).unwrap();
    parent.populate().unwrap();
    parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
    for n in 0..2500 {
        write(&parent, n * 20, mark(n));
    }
    engine.hooks.hold.store(true, Ordering::Release);
    let (image, report) = parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap();
    assert_eq!(report.pending, 2500);
    let child = GuestRam::reserve(image.layout(), &store).unwrap();
    child.adopt(&image).unwrap();
    assert!(child.stats().unwrap().exclusive > 0, "short runs were copied");
    for n in 0..2500 {
        assert_eq!(read(&child, n * 20), mark(n));
        assert_eq!(read(&child, n * 20 + 1), 0);
    }
}
