//! The project's central hazard, on real DMA, both ways: a disk's reads land in guest pages while
//! the guest writes other bytes of the same pages and the memory is frozen repeatedly. With the
//! protocol no byte is wrong, in the parent or in any image; without it, bytes are wrong.
//!
//! Per request (`n` of its buffer) and image: a request completed before the freeze began is in the
//! image; one issued after the freeze returned is not; of one in flight, each word may be either.
//! The parent has all of it on completion.

#![allow(clippy::unwrap_used, reason = "a test, although not every function of it is one")]

mod disk;
mod guest;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use clade_memory::{FreezeMode, GuestRam, PinPolicy, Quiesced, RamImage, RamLayout, Store};
use clade_test_support::{Watchdog, skip};

use disk::{Disk, How};
use guest::{Guest, Snapshot};

/// Images held while the VM runs on, and checked once more before they are dropped (I4).
const HELD: usize = 6;
/// Pause between freezes, so that requests and writes come in between.
const PACE: Duration = Duration::from_millis(2);

/// A storm that hangs must fail.
const HANG_LIMIT: Duration = Duration::from_secs(600);

/// Wrong bytes found.
#[derive(Debug, Default)]
struct Wrong {
    parent: AtomicU64,
    child: AtomicU64,
}

impl Wrong {
    fn total(&self) -> u64 {
        self.parent.load(Ordering::Relaxed) + self.child.load(Ordering::Relaxed)
    }
}

/// Work done, which proves that the test was effective.
#[derive(Debug, Default)]
struct Done {
    requests: AtomicU64,
    freezes: u64,
    pinned: u64,
    pending: u64,
}

struct Image {
    ram: RamImage,
    guest: Snapshot,
    /// For each buffer, the last request completed before the freeze and the last issued by its
    /// return.
    between: Vec<(u64, u64)>,
}

impl Image {
    /// Number of wrong bytes in a child of the image.
    fn wrong_bytes(&self, store: &Store) -> u64 {
        let child = GuestRam::reserve(self.ram.layout(), store).unwrap();
        child.adopt(&self.ram).unwrap();
        let mut wrong = self.guest.wrong_bytes(&child);
        for (slot, (done, issued)) in self.between.iter().enumerate() {
            wrong += disk::wrong_bytes(&child, slot, *done..=*issued);
        }
        wrong
    }
}

/// Freezes `ram` repeatedly while `go_on` is true.
fn storm(
    store: &Store,
    ram: &GuestRam,
    disk: &Disk,
    mode: FreezeMode,
    go_on: impl Fn(&Wrong, &Done) -> bool,
) -> (Wrong, Done) {
    let (wrong, mut done) = (Wrong::default(), Done::default());
    let guest = Mutex::new(Guest::default());
    let stop = AtomicBool::new(false);
    let _watchdog = Watchdog::new(HANG_LIMIT, move || format!("{mode:?} freezes beside disk reads"));
    thread::scope(|scope| {
        scope.spawn(|| Guest::run(&guest, ram, &stop));
        for how in [How::Plain, How::Registered] {
            let (stop, done, parent) = (&stop, &done.requests, &wrong.parent);
            scope.spawn(move || disk.serve(how, ram, stop, done, parent));
        }
        let mut images: Vec<Image> = Vec::new();
        while go_on(&wrong, &done) {
            thread::sleep(PACE);
            let held = guest.lock().unwrap();
            let before = disk.completed();
            let (ram, report) = ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
            let between = before.into_iter().zip(disk.issued()).collect();
            let image = Image { ram, guest: held.snapshot(), between };
            drop(held);
            done.freezes += 1;
            done.pinned += report.pinned;
            done.pending += report.pending;
            // At once, while the image may still be filled; and again after the VM has run on.
            wrong.child.fetch_add(image.wrong_bytes(store), Ordering::Relaxed);
            images.push(image);
            if images.len() > HELD {
                wrong.child.fetch_add(images.remove(0).wrong_bytes(store), Ordering::Relaxed);
            }
        }
        stop.store(true, Ordering::Release);
        for image in images {
            wrong.child.fetch_add(image.wrong_bytes(store), Ordering::Relaxed);
        }
    });
    // No request is in flight any more: every byte of the parent is known.
    let left = guest.lock().unwrap().snapshot().wrong_bytes(ram);
    let last = disk.completed().into_iter().enumerate().map(|(slot, n)| disk::wrong_bytes(ram, slot, n..=n));
    wrong.parent.fetch_add(left + last.sum::<u64>(), Ordering::Relaxed);
    (wrong, done)
}

fn born(store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(guest::BYTES).unwrap(), store).unwrap();
    ram.populate().unwrap();
    ram
}

/// Runs over the backings and modes that this host supports, each with a fresh disk.
fn each(mut run: impl FnMut(&Store, FreezeMode, &Disk, &str)) {
    for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
        for mode in [FreezeMode::Eager, FreezeMode::Background] {
            let what = format!("{mode:?} freezes, {} pages", store.backing().name());
            if let (FreezeMode::Background, Err(error)) = (mode, store.start_background()) {
                skip("uffd", &format!("{what}: {error}"));
                continue;
            }
            match Disk::new() {
                Ok(disk) => run(&store, mode, &disk, &what),
                Err(error) => skip("direct", &format!("{what}: no O_DIRECT: {error}")),
            }
        }
    }
}

#[test]
fn i3_no_byte_is_wrong_while_disk_reads_land_between_freezes() {
    /// Maximum of the freezes of each storm, until enough requests were in flight.
    const MAX_FREEZES: u64 = 20_000;
    // The minimum.
    let freezes = 180 / clade_test_support::stride() as u64;
    each(|store, mode, disk, what| {
        let ram = born(store);
        // Requests were in flight at freezes, and pages were left to the background.
        let is_storm = |done: &Done| {
            done.freezes >= freezes
                && done.requests.load(Ordering::Relaxed) > 4 * freezes
                && done.pinned > freezes
                && (done.pending > 0 || mode == FreezeMode::Eager)
        };
        let (wrong, done) = storm(store, &ram, disk, mode, |_, done| !is_storm(done) && done.freezes < MAX_FREEZES);
        println!("{what}: {done:?}: {wrong:?}");
        assert_eq!(wrong.total(), 0, "I3: {what}: {wrong:?}");
        assert!(is_storm(&done), "{what}: {done:?}");
        assert_eq!(done.pending > 0, mode == FreezeMode::Background, "{what}: {done:?}");
    });
}

/// The same storm finds wrong bytes on both sides when freezes ignore pins.
#[test]
fn without_unshare_before_protect_bytes_are_wrong() {
    /// Number of freezes within which a wrong byte of one kind must appear.
    const MAX_FREEZES: u64 = 20_000;
    /// Number of freezes in which both kinds are awaited. A parent is wrong only if its page is
    /// replaced in the middle of a transfer, which the background copy does when it reaches that
    /// page.
    const FREEZES_FOR_BOTH: u64 = 400;
    let everywhere = Wrong::default();
    each(|store, mode, disk, what| {
        let ram = born(store);
        ram.set_pin_policy(PinPolicy::Ignore);
        let enough = |wrong: &Wrong, freezes| match [&wrong.parent, &wrong.child].map(|n| n.load(Ordering::Relaxed) > 0)
        {
            [true, true] => true,
            [false, false] => freezes >= MAX_FREEZES,
            _ => freezes >= FREEZES_FOR_BOTH,
        };
        let (wrong, done) = storm(store, &ram, disk, mode, |wrong, done| !enough(wrong, done.freezes));
        println!("{what}, pinned pages not spared: {done:?}: {wrong:?}");
        assert!(wrong.total() > 0, "{what}: the storm found no wrong byte although pins are ignored: {wrong:?}");
        everywhere.parent.fetch_add(wrong.parent.load(Ordering::Relaxed), Ordering::Relaxed);
        everywhere.child.fetch_add(wrong.child.load(Ordering::Relaxed), Ordering::Relaxed);
    });
    // Zero runs if the host lacks support.
    let [parent, child] = [&everywhere.parent, &everywhere.child].map(|n| n.load(Ordering::Relaxed));
    assert!((parent > 0) == (child > 0), "only one side was ever wrong: {everywhere:?}");
}
