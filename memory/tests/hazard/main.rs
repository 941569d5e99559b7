//! The hazard that the project is about, on real DMA, both ways: a disk's reads land in guest pages
//! while the guest writes other bytes of the same pages and the memory is frozen again and again.
//! With the protocol no byte is wrong, in the parent or in any image; with it switched off, bytes
//! are.
//!
//! Per request (`n` of its buffer) and image: completed before the freeze began, it is in the
//! image; issued after the freeze returned, it is not; in flight, each word is one or the other.
//! The parent has all of it as soon as it is complete.

#![allow(clippy::unwrap_used, reason = "a test, although not every function of it is one")]

#[path = "../deadline/mod.rs"]
mod deadline;
#[path = "../require/mod.rs"]
mod require;

mod disk;
mod guest;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clade_memory::{FreezeMode, GuestRam, PinPolicy, Quiesced, RamImage, RamLayout, Store};

use deadline::Deadline;
use disk::{Disk, How};
use guest::{Guest, Snapshot};

/// Images held while the VM goes on, and looked at once more before they go (I4).
const HELD: usize = 6;
/// Between freezes, so that requests and writes come in between.
const PACE: Duration = Duration::from_millis(2);

/// A storm that hangs must fail.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What was found, in bytes.
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

/// What was done, so that finding nothing means something.
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
    /// Of each buffer, the last request completed before and the last issued by the time the freeze
    /// had returned.
    between: Vec<(u64, u64)>,
}

impl Image {
    /// Wrong bytes of a child of it.
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

/// Freezes `ram` for as long as `go_on` says.
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
    let _deadline = Deadline::new(TIMEOUT, move || format!("{mode:?} freezes beside disk reads"));
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
            // At once, while it may still be filled; and once more when the VM has gone on for a
            // while.
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
    // Nothing is in flight any more: every byte of the parent is known.
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

/// Backings and modes that this host can do, each with a fresh disk.
fn each(mut run: impl FnMut(&Store, FreezeMode, &Disk, &str)) {
    for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
        for mode in [FreezeMode::Eager, FreezeMode::Background] {
            let what = format!("{mode:?} freezes, {} pages", store.backing().name());
            if let (FreezeMode::Background, Err(error)) = (mode, store.start_background()) {
                require::skip("uffd", &what, &error.to_string());
                continue;
            }
            match Disk::new() {
                Ok(disk) => run(&store, mode, &disk, &what),
                Err(error) => require::skip("direct", &what, &format!("no O_DIRECT: {error}")),
            }
        }
    }
}

#[test]
fn i3_no_byte_is_wrong_while_disk_reads_land_between_freezes() {
    const FOR: Duration = Duration::from_millis(1_500);
    const FREEZES: u64 = 40;
    each(|store, mode, disk, what| {
        let ram = born(store);
        let begun = Instant::now();
        let (wrong, done) = storm(store, &ram, disk, mode, |_, done| begun.elapsed() < FOR || done.freezes < FREEZES);
        println!("{what}: {done:?}: {wrong:?}");
        assert_eq!(wrong.total(), 0, "I3: {what}: {wrong:?}");
        // The storm was one: requests were in flight at freezes, and pages were left to the
        // background where they should.
        assert!(done.requests.load(Ordering::Relaxed) > 4 * FREEZES && done.pinned > FREEZES, "{what}: {done:?}");
        assert_eq!(done.pending > 0, mode == FreezeMode::Background, "{what}: {done:?}");
    });
}

/// The same storm notices what it is there to notice.
#[test]
fn without_unshare_before_protect_bytes_are_wrong() {
    const AT_MOST: Duration = Duration::from_secs(30);
    /// How long is looked for the other kind when one has been found. A parent is wrong only if it
    /// is given another page in the middle of a transfer, which the background does when it gets to
    /// it.
    const FOR_BOTH: Duration = Duration::from_secs(5);
    let everywhere = Wrong::default();
    each(|store, mode, disk, what| {
        let ram = born(store);
        ram.set_pin_policy(PinPolicy::Ignore);
        let begun = Instant::now();
        let enough = |wrong: &Wrong| match [&wrong.parent, &wrong.child].map(|n| n.load(Ordering::Relaxed) > 0) {
            [true, true] => true,
            [false, false] => begun.elapsed() > AT_MOST,
            _ => begun.elapsed() > FOR_BOTH,
        };
        let (wrong, done) = storm(store, &ram, disk, mode, |wrong, _| !enough(wrong));
        println!("{what}, pinned pages not spared: {done:?}: {wrong:?} after {:?}", begun.elapsed());
        assert!(wrong.total() > 0, "{what}: broken on purpose, and nobody noticed: {wrong:?}");
        everywhere.parent.fetch_add(wrong.parent.load(Ordering::Relaxed), Ordering::Relaxed);
        everywhere.child.fetch_add(wrong.child.load(Ordering::Relaxed), Ordering::Relaxed);
    });
    // Nothing was done if the host cannot.
    let [parent, child] = [&everywhere.parent, &everywhere.child].map(|n| n.load(Ordering::Relaxed));
    assert!((parent > 0) == (child > 0), "only one side was ever wrong: {everywhere:?}");
}
