//! Operations that fail in the second of two regions leave no trace (I13): the bits, the
//! declarations and the bytes of the first are as before, and a refused operation succeeds once
//! there is room.

use std::time::Duration;

use clade_memory::{
    Access, DontFork, FreezeMode, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamError, RamLayout, Store,
    TableCounts,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vm_memory::GuestAddress;

use crate::alone::alone;
use crate::{born, check_all, child, fill, freeze, high, reserve, stores};

fn counts(ram: &GuestRam) -> Vec<TableCounts> {
    ram.regions().iter().map(|region| region.ownership().counts(region.range())).collect()
}

fn declared(ram: &GuestRam) -> Vec<Vec<PageRange>> {
    let of = |region: &std::sync::Arc<clade_memory::GuestRegion>| {
        region.dont_fork().into_iter().map(|(range, _)| range).collect()
    };
    ram.regions().iter().map(of).collect()
}

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until the store's threads have closed unused files: a file closed during an attempt would
/// let the attempt open another.
fn settle(store: &Store) {
    store.drain();
    store.sweep();
    let (mut before, mut same) = (descriptors(), 0);
    while same < 3 {
        std::thread::sleep(Duration::from_millis(10));
        let now = descriptors();
        same = if now == before { same + 1 } else { 0 };
        before = now;
    }
}

/// Runs `with` while this process can open just `more` files. The limit applies to descriptor
/// numbers, so every smaller number must be in use: a store's threads leave free ones.
fn with_files<T>(more: u64, with: impl FnOnce() -> T) -> T {
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let highest = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).max().unwrap();
    let mut taken = Vec::new();
    let last = loop {
        let file = std::fs::File::open("/dev/null").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        taken.push(file);
        if number >= highest {
            break number as u64;
        }
    };
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(last + 1 + more), ..before }).unwrap();
    let done = with();
    setrlimit(Resource::Nofile, before).unwrap();
    done
}

/// VMs that use up the budget except for `left` mappings.
fn leave(store: &Store, left: u64) -> Vec<GuestRam> {
    const MOST: u64 = 20_000;
    let mut hogs = Vec::new();
    loop {
        let more = (store.budget().limit() - store.budget().used() - left).min(MOST);
        if more == 0 {
            return hogs;
        }
        // One region each, with one promised mapping.
        let ranges: Vec<_> = (0..more).map(|n| (GuestAddress(n * 2 * PAGE_SIZE), 1)).collect();
        hogs.push(GuestRam::reserve(&RamLayout::of_ranges(&ranges).unwrap(), store).unwrap());
    }
}

/// The VM can be pinned, frozen and forked.
fn goes_on(ram: &GuestRam, store: &Store, seed: u64) {
    for region in ram.regions() {
        drop(region.pin(PageRange::new(3, 9), Access::Write, PinLifetime::LongTerm).unwrap());
    }
    check_all(ram, seed, "goes on");
    check_all(&child(&freeze(ram), store), seed, "a later child");
    check_all(ram, seed, "after a later freeze");
}

#[test]
fn i13_a_birth_that_fails_in_the_second_region_has_not_been() {
    alone("second::birth");
}

#[test]
#[ignore = "takes the process's files; run by a test above"]
fn birth() {
    for store in stores() {
        let ram = reserve(&store);
        let before = counts(&ram);
        let used = store.budget().used();
        let refused = with_files(1, || ram.populate());
        assert!(matches!(refused, Err(RamError::Store(_))), "{refused:?}");
        assert_eq!(counts(&ram), before, "no page is the VM's own");
        assert_eq!(store.budget().used(), used);
        let pin = ram.regions()[0].pin(PageRange::new(0, 1), Access::Write, PinLifetime::Transient);
        assert!(pin.is_err(), "there is no memory to be pinned");
        drop(pin);
        ram.populate().expect("born after all");
        crate::fill_all(&ram, 1);
        goes_on(&ram, &store, 1);
    }
}

#[test]
fn i13_a_freeze_that_fails_in_the_second_region_has_not_been() {
    alone("second::freezes");
}

/// State of a VM in its own records, in the kernel's, and as its guest sees it.
fn books(ram: &GuestRam) -> (Vec<TableCounts>, u64, Vec<Vec<PageRange>>) {
    (counts(ram), ram.stats().unwrap().exclusive, declared(ram))
}

#[test]
#[ignore = "takes the process's files; run by a test above"]
fn freezes() {
    let modes = [FreezeMode::Eager, FreezeMode::Background];
    for (store, mode) in stores().into_iter().flat_map(|store| modes.map(|mode| (store.clone(), mode))) {
        if mode == FreezeMode::Background && store.start_background().is_err() {
            continue;
        }
        let ram = born(&store, 1);
        drop(freeze(&ram));
        // Enough pages that a freeze shares them.
        (0..2).for_each(|region| fill(&ram, region, PageRange::new(10, 590), 1));
        high(&ram).set_dont_fork(PageRange::new(595, 599), Some(DontFork::Zeroed)).unwrap();
        ram.finish_background().unwrap();
        settle(&store);
        let before = books(&ram);
        assert_eq!(before.1, 2 * 580, "both regions have pages to be frozen");
        // A file for each region's copies, and in the background a second handle of it.
        let done = (0..8).find(|files| {
            match with_files(*files, || ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters))) {
                Err(error) => {
                    let now = books(&ram);
                    // Only a page that is the VM's own may get its bit; no other change is allowed.
                    let kept = now.0.iter().zip(&before.0).all(|(now, before)| now.exclusive >= before.exclusive);
                    assert!(kept, "I13: {mode:?} with {files} files: {error}: {now:?}, before {before:?}");
                    assert_eq!(
                        (now.1, now.2),
                        (before.1, before.2.clone()),
                        "I13: {mode:?} with {files} files: {error}"
                    );
                    check_all(&ram, 1, "after a freeze that failed");
                    settle(&store);
                    false
                }
                Ok(_) => true,
            }
        });
        assert!(done.is_some_and(|files| files > 1), "{mode:?} is done with {done:?} files");
        high(&ram).set_dont_fork(PageRange::new(595, 599), None).unwrap();
        goes_on(&ram, &store, 1);
    }
}

#[test]
fn i13_a_first_freeze_that_fails_in_the_second_region_has_not_been() {
    alone("second::first_freezes");
}

/// Pages of the birth file need no copy, except pages that devices hold.
#[test]
#[ignore = "takes the process's files; run by a test above"]
fn first_freezes() {
    for store in stores() {
        let ram = born(&store, 1);
        let pin = high(&ram).pin(PageRange::new(100, 140), Access::Write, PinLifetime::LongTerm).unwrap();
        let before = books(&ram);
        let refused = with_files(0, || ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters)));
        assert!(matches!(refused, Err(RamError::Store(_))), "{refused:?}");
        assert_eq!(books(&ram), before, "I13: every page is still the VM's own");
        check_all(&ram, 1, "after a freeze that failed");
        drop(pin);
        goes_on(&ram, &store, 1);
    }
}

#[test]
fn i13_an_adoption_that_fails_in_the_second_region_has_not_been() {
    alone("second::adoption");
}

#[test]
#[ignore = "takes the process's mappings; run by a test above"]
fn adoption() {
    let store = Store::open_small().unwrap();
    let parent = born(&store, 1);
    for region in parent.regions() {
        // Four pieces in each region: the number that a VM is always allowed.
        region.discard(PageRange::new(100, 200)).unwrap();
        region.discard(PageRange::new(400, 600)).unwrap();
        region.set_dont_fork(PageRange::new(120, 130), Some(DontFork::Zeroed)).unwrap();
    }
    let image = freeze(&parent);
    let fresh = reserve(&store);
    let before = counts(&fresh);
    // Mappings that one region takes with an ample budget, in addition to the one already promised.
    let used = store.budget().used();
    let plenty = child(&image, &store);
    let each = (store.budget().used() - used) / 2;
    drop(plenty);
    assert!(each > 1, "{each} mappings a region");
    // Enough for one of the two.
    let hogs = leave(&store, each);
    let used = store.budget().used();
    let refused = fresh.adopt(&image);
    assert!(matches!(refused, Err(RamError::Budget(_))), "{refused:?}");
    assert_eq!(counts(&fresh), before, "I13: no page is the child's own");
    assert!(declared(&fresh).iter().all(Vec::is_empty), "I13: nothing is declared");
    assert_eq!(store.budget().used(), used, "I13: no mapping stays promised");
    drop(hogs);
    for region in fresh.regions() {
        assert!(region.pin(PageRange::new(0, 1), Access::Read, PinLifetime::Transient).is_err(), "there is no memory");
    }
    fresh.adopt(&image).expect("adopted after all");
    for (region, of) in fresh.regions().iter().enumerate() {
        drop(of.pin(PageRange::new(3, 9), Access::Write, PinLifetime::LongTerm).unwrap());
        for page in 0..of.pages() {
            let gone = (100..200).contains(&page) || (400..600).contains(&page);
            let want = if gone { 0 } else { crate::seeded(1, region, page) };
            assert_eq!(crate::word(&fresh, region, page), want, "region {region} page {page:#x}");
        }
    }
}

#[test]
fn i13_a_reset_that_is_refused_in_the_second_region_has_not_been() {
    alone("second::resets");
}

/// A VM whose reset needs one piece mapped anew in the first region, and three in the second.
fn to_be_reset(store: &Store) -> (GuestRam, clade_memory::RamImage) {
    let ram = born(store, 1);
    let first = freeze(&ram);
    // Enough pages that they are shown from their copies.
    fill(&ram, 0, PageRange::new(10, 590), 2);
    for start in [10, 210, 410] {
        fill(&ram, 1, PageRange::new(start, start + 150), 2);
    }
    drop(freeze(&ram));
    ram.finish_background().unwrap();
    (ram, first)
}

fn check_both(ram: &GuestRam) {
    for (region, of) in ram.regions().iter().enumerate() {
        for page in 0..of.pages() {
            let anew = match region {
                0 => (10..590).contains(&page),
                _ => [10, 210, 410].iter().any(|start| (*start..start + 150).contains(&page)),
            };
            let want = crate::seeded(if anew { 2 } else { 1 }, region, page);
            assert_eq!(crate::word(ram, region, page), want, "I13: region {region} page {page:#x}");
        }
    }
}

#[test]
#[ignore = "takes the process's mappings; run by a test above"]
fn resets() {
    let store = Store::open_small().unwrap();
    let (ram, first) = to_be_reset(&store);
    let quiesced = Quiesced::by(&clade_memory::NoWriters);
    // A pin of the second region.
    let pin = high(&ram).pin(PageRange::new(100, 101), Access::Write, PinLifetime::LongTerm).unwrap();
    let pinned = counts(&ram);
    let refused = ram.reset(&first, &quiesced, Duration::ZERO);
    assert!(matches!(refused, Err(RamError::Pinned { pages: 1, .. })), "{refused:?}");
    assert_eq!(counts(&ram), pinned);
    check_both(&ram);
    drop(pin);
    // No mappings for the second region.
    let before = counts(&ram);
    let mut refusals = 0;
    for left in 0..16 {
        let hogs = leave(&store, left);
        let used = store.budget().used();
        let done = ram.reset(&first, &quiesced, Duration::ZERO);
        if done.is_ok() {
            break;
        }
        refusals += 1;
        assert!(matches!(done, Err(RamError::Budget(_))), "{left} mappings are left: {done:?}");
        assert!(!ram.is_inconsistent(), "I13: {left} mappings are left: a reset that is refused leaves nothing torn");
        assert_eq!(store.budget().used(), used, "{left} mappings are left");
        check_both(&ram);
        assert_eq!(counts(&ram), before, "{left} mappings are left");
        drop(hogs);
    }
    assert!(refusals > 1, "there were mappings enough");
    check_all(&ram, 1, "reset after all");
    goes_on(&ram, &store, 1);
}
