use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::layer::gc::worst::Restless;
use crate::testing::failpoint::plan;
use crate::units::BLOCK_SIZE;
use crate::{Access, DontFork, GuestRam, NoWriters, PAGE_SIZE, PinLifetime, Quiesced, RamLayout, StopsWriters, Store};

/// Pages of the first region. The second has a quarter of that.
const PAGES: u64 = 2048;
const ALL: u64 = PAGES + PAGES / 4;
const SECOND: u64 = 1 << 30;
/// A wait that ends when the device drops its pin.
const UNTIL_UNPINNED: Duration = Duration::from_secs(3600);
/// A memory file system: behaviour specific to disks is not tested here.
const DIR: &str = "/dev/shm";

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

fn reserved(store: &Store) -> GuestRam {
    let ranges = [(GuestAddress(0), PAGES), (GuestAddress(SECOND), ALL - PAGES)];
    GuestRam::reserve(&RamLayout::of_ranges(&ranges).unwrap(), store).unwrap()
}

/// Compares all pages, without thousands of numbers on a failure.
#[track_caller]
fn expect(ram: &GuestRam, want: &[u64]) {
    let wrong = (0..ALL).find(|page| word(ram, *page) != want[*page as usize]);
    assert_eq!(wrong.map(|page| (page, word(ram, page), want[page as usize])), None, "page, is, must be");
}

/// A booted VM, and one that was frozen since and has written some pages.
fn booted(store: &Store, frozen: bool) -> GuestRam {
    let ram = reserved(store);
    ram.populate().unwrap();
    // Runs of zeros, long and short, in both regions, and blocks that were never touched.
    (0..900).chain(PAGES..PAGES + 100).filter(|page| !(300..500).contains(page)).for_each(|page| {
        put(&ram, page, if page % 7 == 0 { 0 } else { page + 1 });
    });
    if frozen {
        freeze(&ram);
        (100..140).chain(PAGES + 90..PAGES + 120).for_each(|page| put(&ram, page, 1000 + page));
        (600..1000).step_by(2).for_each(|page| put(&ram, page, 2000 + page));
        (10..12).for_each(|page| put(&ram, page, 0));
    }
    ram
}

fn freeze(ram: &GuestRam) -> crate::RamImage {
    ram.freeze(&Quiesced::by(&NoWriters)).unwrap().0
}

fn suspend(ram: &GuestRam) -> (Suspended, TouchedPages) {
    try_suspend(ram, Duration::ZERO).unwrap()
}

fn try_suspend(ram: &GuestRam, patience: Duration) -> Result<(Suspended, TouchedPages), RamError> {
    ram.suspend(SuspendFile::create(Path::new(DIR)).unwrap(), &Quiesced::by(&NoWriters), patience)
}

fn on_both(test: impl Fn(&Store, bool)) {
    for store in [Store::open(), Store::open_small()] {
        let store = store.unwrap();
        // A sweep must spare pages that a region does not show yet.
        let restless = Restless::begin();
        [false, true].into_iter().for_each(|frozen| test(&store, frozen));
        assert!(restless.sweeps() > 4, "no sweep has come in between");
        drop(restless);
        store.expect_no_layers();
        assert_eq!(store.budget().used(), 0, "something is left");
    }
}

#[test]
fn all_that_a_vm_owns_goes_and_comes_back() {
    on_both(|store, frozen| {
        let ram = booted(store, frozen);
        let before = contents(&ram);
        let own = ram.stats().unwrap().exclusive;
        let (report, working_set) = suspend(&ram);
        assert_eq!(working_set.pages(), 0, "what was touched before is no guide");
        let stats = ram.stats().unwrap();
        assert_eq!((stats.exclusive, stats.private_kib), (0, 0), "frozen: {frozen}");
        let layers = ram.page_map(None).unwrap().layers;
        assert_eq!(layers.iter().filter(|layer| layer.place == crate::LayerPlace::Disk).count(), 1, "one file");
        assert!(report.written + report.zeros >= own && report.kept == 0, "{report:?} of {own}");
        // A frozen VM owns zeros in short runs only.
        assert_eq!(report.zeros > 1000, !frozen, "{report:?}");
        expect(&ram, &before);
        ram.check(&Quiesced::by(&NoWriters)).unwrap();
        // Writable as before, by the guest and by devices.
        (0..ALL).step_by(3).for_each(|page| put(&ram, page, 7 + page));
        let pin = ram.regions()[0].pin(PageRange::new(50, 53), Access::Write, PinLifetime::LongTerm).unwrap();
        pin.slice().write_obj(99u64, 0).unwrap();
        let want = |page: u64| match page {
            50 => 99,
            page if page.is_multiple_of(3) => 7 + page,
            page => before[page as usize],
        };
        (0..ALL).for_each(|page| assert_eq!(word(&ram, page), want(page), "page {page}, frozen: {frozen}"));
    });
}

#[test]
fn the_second_time_only_what_was_written_since_is_written() {
    on_both(|store, frozen| {
        let ram = booted(store, frozen);
        let (first, _) = suspend(&ram);
        let before = contents(&ram);
        [3, 4, 701, PAGES + 7].iter().for_each(|page| put(&ram, *page, 1 << 40));
        let (second, _) = suspend(&ram);
        assert_eq!(second, Suspended { written: 4, zeros: 0, kept: 0 }, "the first time {first:?}");
        // If a VM has written nothing, nothing is written.
        assert_eq!(suspend(&ram).0, Suspended::default());
        (0..ALL).for_each(|page| {
            let new = [3, 4, 701, PAGES + 7].contains(&page);
            assert_eq!(word(&ram, page), if new { 1 << 40 } else { before[page as usize] }, "page {page}");
        });
    });
}

#[test]
fn files_stay_few_and_each_page_is_copied_seldom() {
    let store = Store::open_small().unwrap();
    let ram = booted(&store, true);
    let mut written = suspend(&ram).0.written;
    let whole = written;
    for round in 0..200 {
        (0..4).for_each(|nth| put(&ram, (round * 37 + nth * 400) % ALL, round));
        written += suspend(&ram).0.written;
        let layers = ram.page_map(None).unwrap().layers;
        let files = layers.iter().filter(|layer| layer.place == crate::LayerPlace::Disk).count();
        assert!(files <= MAX_FILES + 1, "{files} files in round {round}");
    }
    // Each of the 800 pages about as often as the number of files has bits, and gaps.
    assert!(written < whole + 40_000, "{written} pages were written, {whole} of them at first");
    ram.check(&Quiesced::by(&NoWriters)).unwrap();
}

#[test]
fn scattered_pages_cost_few_mappings() {
    let store = Store::open_small().unwrap();
    let ram = reserved(&store);
    ram.populate().unwrap();
    (0..ALL).for_each(|page| put(&ram, page, page + 1));
    freeze(&ram);
    (0..PAGES).step_by(6).for_each(|page| put(&ram, page, 1));
    let wants = |page: u64| if page < PAGES && page.is_multiple_of(6) { 1 } else { page + 1 };
    // Far more than a share of the remaining mappings.
    let held = store.budget().promise(store.budget().left() - 600).unwrap();
    suspend(&ram);
    assert!(ram.stats().unwrap().mappings < 100, "{:?}", ram.stats());
    drop(held);
    (0..ALL).for_each(|page| assert_eq!(word(&ram, page), wants(page)));
}

#[test]
fn what_was_touched_since_the_wake_is_read_ahead() {
    let store = Store::open_small().unwrap();
    let ram = booted(&store, false);
    suspend(&ram);
    [20, 21, 22, 800].iter().for_each(|page| assert_eq!(word(&ram, *page), if page % 7 == 0 { 0 } else { page + 1 }));
    put(&ram, PAGES + 3, 5);
    let (_, touched) = suspend(&ram);
    let runs = touched.touched.runs().to_vec();
    let all: Vec<u64> = runs[0].iter().flat_map(|run| run.start..run.end).collect();
    // Fault-around maps the neighbours of a page that is read.
    assert!([20, 22, 800].iter().all(|page| all.contains(page)), "{touched:?}");
    assert!(all.len() < 200 && runs[1].iter().any(|run| run.contains(3)), "{touched:?}");
    let mapped = || ram.regions()[0].touched_now().unwrap();
    assert_eq!(mapped(), [], "the tables are empty");
    ram.read_ahead(&touched);
    let tested = tested_blocks(&runs[0], ram.regions()[0].state_for_pin().wakes);
    assert_eq!(mapped(), subtract_runs(&runs[0], &tested));
    assert_eq!(ram.stats().unwrap().private_kib, 4, "what was read is read, and what was written is copied");
    assert!(ram.regions()[1].ownership().get(3).0);
    // Bounded by the available room.
    suspend(&ram);
    let much = PageSet::found(vec![vec![PageRange::new(0, PAGES)], vec![]]);
    TouchedPages { touched: PageSet::found(vec![vec![], vec![]]), written: much }.read_ahead(ram.regions());
    assert!(ram.stats().unwrap().private_kib <= 4 * MAX_COPIED);
}

#[test]
fn what_is_not_touched_any_more_leaves_the_working_set() {
    let store = Store::open_small().unwrap();
    let ram = booted(&store, false);
    suspend(&ram);
    (0..900).chain(PAGES..PAGES + 100).for_each(|page| {
        word(&ram, page);
    });
    let (_, mut set) = suspend(&ram);
    let mut sizes = vec![set.pages()];
    for _ in 0..TESTED_SHARE {
        ram.read_ahead(&set);
        word(&ram, 20);
        word(&ram, PAGES + 3);
        set = suspend(&ram).1;
        sizes.push(set.pages());
    }
    // A wake maps most of the set ahead, and tests the rest.
    let (first, next, last) = (sizes[0], sizes[1], sizes[TESTED_SHARE as usize]);
    assert!(first >= 800 && next < first && next > first * 3 / 4, "{sizes:?}");
    assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
    assert!((2..=2 * TESTED_BLOCK).contains(&last), "{sizes:?}");
    for (region, page) in [(0, 20), (1, 3)] {
        assert!(set.touched.runs()[region].iter().any(|run| run.contains(page)), "{set:?}");
    }
}

#[test]
fn each_page_of_a_working_set_is_tested_once_in_a_share_of_wakes() {
    let runs = [PageRange::new(3, 5), PageRange::new(6, 40), PageRange::new(1000, 1001)];
    let mut tested = Vec::new();
    for wake in 100..100 + TESTED_SHARE {
        let blocks = tested_blocks(&runs, wake);
        assert!(blocks.is_sorted_by(|a, b| a.end <= b.start), "{blocks:?}");
        tested.extend(blocks);
    }
    tested.sort_unstable();
    let block = |at: u64| PageRange::with_len(at * TESTED_BLOCK, TESTED_BLOCK);
    assert_eq!(tested, [0, 1, 2, 62].map(block));
}

#[test]
fn i7_a_pin_refuses_it_or_is_waited_for() {
    for access in [Access::Write, Access::Read] {
        let store = Store::open().unwrap();
        let ram = booted(&store, true);
        let before = contents(&ram);
        // Shared pages, which a short read does not count.
        let pin = ram.regions()[0].pin(PageRange::new(20, 22), access, PinLifetime::Transient).unwrap();
        let refused = try_suspend(&ram, Duration::from_millis(5));
        assert!(matches!(refused, Err(RamError::Pinned { pages: 2, .. })), "{refused:?}");
        // A pin after the first check.
        let mut late = RamSuspension::to(SuspendFile::create(Path::new(DIR)).unwrap(), ram.regions()).unwrap();
        let late = GuestRegion::suspend_all(ram.regions(), &store, &mut late);
        assert!(matches!(late, Err(RamError::Pinned { pages: 2, .. })), "{late:?}");
        expect(&ram, &before);
        let is_own = ram.regions()[0].ownership().get(20).0;
        assert_eq!(is_own, access == Access::Write, "what was pinned is the VM's own as before");
        let device = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            if access == Access::Write {
                pin.slice().write_obj(77u64, 0).unwrap();
            }
            drop(pin);
        });
        try_suspend(&ram, UNTIL_UNPINNED).unwrap();
        device.join().unwrap();
        assert_eq!(word(&ram, 20), if access == Access::Write { 77 } else { before[20] });
        assert_eq!(ram.stats().unwrap().private_kib, 0);
    }
}

/// A page is looked at for zeros after its bit is cleared: until then a device may pin it by the bit, without a lock.
#[test]
fn i8_a_page_that_a_device_writes_until_its_bit_is_cleared_is_not_taken_for_zeros() {
    // A short run of zeros stays a hole of the file, and a long one is mapped.
    let zeros = [PAGES + 10..PAGES + 18, PAGES + 100..PAGES + 200];
    let written = [PAGES + 14, PAGES + 150];
    let mut acted = 0;
    for nth in 0.. {
        let ram = booted(&Store::open_small().unwrap(), true);
        suspend(&ram);
        zeros.iter().cloned().flatten().for_each(|page| put(&ram, page, 0));
        let region = Arc::clone(&ram.regions()[1]);
        let pin = move |page: u64| {
            let page = PageRange::with_len(page - PAGES, 1);
            region.pin(page, Access::Write, PinLifetime::Transient).unwrap()
        };
        // The VM is known to own the pages, so a pin needs no lock, which the suspension holds.
        zeros.iter().cloned().flatten().for_each(|page| drop(pin(page)));
        let region = Arc::clone(&ram.regions()[1]);
        let wrote = Arc::new(AtomicBool::new(false));
        let writes = Arc::clone(&wrote);
        plan().before(Call::Scan, nth, move || {
            if written.iter().all(|page| region.ownership().get(page - PAGES).0) {
                written.iter().for_each(|page| pin(*page).slice().write_obj(77u64, 0).unwrap());
                writes.store(true, Ordering::Relaxed);
            }
        });
        let mut want = contents(&ram);
        suspend(&ram);
        if !plan().has_acted() {
            break;
        }
        if wrote.load(Ordering::Relaxed) {
            acted += 1;
            written.iter().for_each(|page| want[*page as usize] = 77);
        }
        expect(&ram, &want);
    }
    plan().forget_action();
    assert!(acted > 2, "of two regions, {acted} times");
}

#[test]
fn i13_nothing_is_dropped_before_its_file_is_on_the_disk() {
    let ram = booted(&Store::open_small().unwrap(), true);
    let want = contents(&ram);
    let fails = |op: &dyn Fn() -> Option<RamError>| {
        let owned = ram.stats().unwrap().exclusive;
        plan().fail_call(Call::Sync, 0);
        let refused = op();
        assert_eq!((plan().disarm(), refused.is_some()), (Some(Call::Sync), true), "{refused:?}");
        assert_eq!(ram.stats().unwrap().exclusive, owned);
        expect(&ram, &want);
    };
    fails(&|| try_suspend(&ram, Duration::ZERO).err());
    fails(&|| ram.regions()[0].evict(PageRange::new(0, 600), Path::new(DIR), &Quiesced::by(&NoWriters)).err());
}

#[test]
fn r19_what_children_do_not_inherit_stays_and_reaches_no_file() {
    on_both(|store, frozen| {
        let ram = booted(store, frozen);
        let region = &ram.regions()[0];
        region.set_dont_fork(PageRange::new(120, 125), Some(DontFork::Zeroed)).unwrap();
        let before = contents(&ram);
        let (report, _) = suspend(&ram);
        assert_eq!((report.kept, ram.stats().unwrap().exclusive), (5, 5));
        if let Some(base) = region.state().space.base_file() {
            assert!(base.resident_bytes().unwrap() <= BLOCK_SIZE, "memory is kept behind pages that went");
        }
        let child = reserved(store);
        child.adopt(&freeze(&ram)).unwrap();
        expect(&ram, &before);
        (0..ALL).for_each(|page| {
            let want = if (120..125).contains(&page) { 0 } else { before[page as usize] };
            assert_eq!(word(&child, page), want, "page {page}");
        });
    });
}

#[test]
fn r19_what_is_absent_is_no_gap_between_pages_that_go() {
    let store = Store::open_small().unwrap();
    let ram = booted(&store, false);
    ram.regions()[0].set_dont_fork(PageRange::new(120, 122), Some(DontFork::Absent)).unwrap();
    let child = reserved(&store);
    child.adopt(&freeze(&ram)).unwrap();
    // The range is no longer declared, but still absent.
    child.regions()[0].set_dont_fork(PageRange::new(0, PAGES), None).unwrap();
    [118, 119, 122, 124].iter().for_each(|page| put(&child, *page, 7));
    suspend(&child);
    assert_eq!(child.stats().unwrap().private_kib, 0);
    assert_eq!([118, 119, 122, 124].map(|page| word(&child, page)), [7; 4]);
    assert!(child.memory().read_obj::<u64>(address(120)).is_err());
}

#[test]
fn children_before_and_after_share_and_do_not_see_each_other() {
    on_both(|store, frozen| {
        let ram = booted(store, frozen);
        let (before, first) = (contents(&ram), freeze(&ram));
        let elder = reserved(store);
        elder.adopt(&first).unwrap();
        [5, 6, PAGES + 1].iter().for_each(|page| put(&ram, *page, 50));
        suspend(&ram);
        let second = freeze(&ram);
        let (younger, sibling) = (reserved(store), reserved(store));
        younger.adopt(&second).unwrap();
        sibling.adopt(&second).unwrap();
        let now = contents(&ram);
        expect(&elder, &before);
        expect(&younger, &now);
        // All VMs write, and are suspended in turn.
        for (nth, vm) in [&ram, &elder, &younger].into_iter().enumerate() {
            (0..900).step_by(4).for_each(|page| put(vm, page, 60 + nth as u64));
            suspend(vm);
            put(vm, 1, 70 + nth as u64);
            vm.check(&Quiesced::by(&NoWriters)).unwrap();
        }
        store.sweep();
        expect(&sibling, &now);
        for (nth, (vm, was)) in [(&ram, &now), (&elder, &before), (&younger, &now)].into_iter().enumerate() {
            let nth = nth as u64;
            for page in 0..ALL {
                let want = match page {
                    1 => 70 + nth,
                    page if page < 900 && page.is_multiple_of(4) => 60 + nth,
                    page => was[page as usize],
                };
                assert_eq!(word(vm, page), want, "page {page} of VM {nth}");
            }
        }
        let third = reserved(store);
        third.adopt(&first).unwrap();
        expect(&third, &before);
    });
}

#[test]
fn a_file_that_is_not_what_it_must_be_is_refused() {
    let made = || SuspendFile::create(Path::new(DIR)).unwrap();
    let owned = |file: BorrowedFd<'_>| file.try_clone_to_owned().unwrap();
    let of = |write: BorrowedFd<'_>, read: BorrowedFd<'_>| {
        SuspendFile::of(owned(write), owned(read)).map_err(|error| error.to_string())
    };
    let (one, other) = (made(), made());
    let [[write, read], [_, not_it]] = [one.descriptors(), other.descriptors()];
    assert!(of(write, not_it).unwrap_err().contains("two files"));
    assert!(of(write, write).unwrap_err().contains("reading only"));
    assert!(of(read, read).unwrap_err().contains("reading and writing"));
    assert!(of(write, read).is_ok());
    assert_eq!(fstat(read).unwrap().st_mode & 0o777, 0o400, "others cannot open it to write");
    ftruncate(write, 1).unwrap();
    assert!(of(write, read).unwrap_err().contains("not empty"));
}

/// Held as a guard: the guest does not write.
struct Stopped<'a>(#[allow(dead_code, reason = "held")] std::sync::RwLockWriteGuard<'a, ()>);

impl StopsWriters for Stopped<'_> {}

#[test]
fn nothing_is_lost_of_what_is_written_up_to_the_instant() {
    const SUSPENSIONS: u64 = 40;
    const MAX_ROUNDS: u64 = 40_000;
    let store = Store::open_small().unwrap();
    let (ram, runs, over) = (booted(&store, true), RwLock::new(()), AtomicBool::new(false));
    let last = thread::scope(|threads| {
        let guest = |first: u64| {
            let (ram, runs, over) = (&ram, &runs, &over);
            threads.spawn(move || {
                let mut count = 0u64;
                // At least one round of the ring, even if the thread is slow.
                while !over.load(Ordering::Relaxed) || count <= 200 {
                    let _running = runs.read().unwrap();
                    count += 1;
                    put(ram, first + count % 200, count);
                }
                count
            })
        };
        let (guests, region) = ([guest(0), guest(PAGES + 50)], &ram.regions()[0]);
        let device = threads.spawn(|| {
            let mut count = 0u64;
            while !over.load(Ordering::Relaxed) || count <= 100 {
                let at = PageRange::with_len(1200 + count % 100, 1);
                let pin = region.pin(at, Access::Write, PinLifetime::Transient).unwrap();
                count += 1;
                pin.slice().write_obj(count, 0).unwrap();
                drop(pin);
                thread::sleep(Duration::from_micros(50));
            }
            count
        });
        let (mut done, mut round) = (0, 0);
        while done < SUSPENSIONS && round < MAX_ROUNDS {
            let stopped = Stopped(runs.write().unwrap());
            let file = SuspendFile::create(Path::new(DIR)).unwrap();
            match ram.suspend(file, &Quiesced::by(&stopped), UNTIL_UNPINNED) {
                Ok((_, working_set)) => {
                    done += 1;
                    ram.read_ahead(&working_set);
                }
                // The device has pinned a page after the wait.
                Err(RamError::Pinned { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
            drop(stopped);
            if round % 8 == 0 {
                store.sweep();
            }
            round += 1;
            thread::sleep(Duration::from_millis(1));
        }
        over.store(true, Ordering::Relaxed);
        assert_eq!(done, SUSPENSIONS, "of {round} suspensions the others were refused");
        let [low, high] = guests.map(|guest| guest.join().unwrap());
        [(0, low, 200), (PAGES + 50, high, 200), (1200, device.join().unwrap(), 100)]
    });
    for (first, count, ring) in last {
        assert!(count > ring, "only {count} writes");
        // The guests' counts start at 1, the device's pages at its previous count.
        let offset = u64::from(first != 1200);
        for written in count - ring + 1..=count {
            let page = first + (written - 1 + offset) % ring;
            assert_eq!(word(&ram, page), written, "page {page} of {count} writes");
        }
    }
    ram.check(&Quiesced::by(&NoWriters)).unwrap();
}
