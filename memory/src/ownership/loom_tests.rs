//! Every interleaving of pins, unpins, freezes, splits and merges, on the table itself. Blocks have
//! two pages here.

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::*;
use crate::testing::sabotage::tests::with_break;

const BLOCK: PageRange = PageRange { start: 0, end: 2 };

fn page(number: u64) -> PageRange {
    PageRange::with_len(number, 1)
}

/// A region of one block: its table, and under its state lock the frame behind each page.
struct Region {
    table: OwnershipTable,
    frames: Mutex<[u32; 2]>,
}

impl Region {
    fn base() -> Arc<Self> {
        let region = Self { table: OwnershipTable::new(2), frames: Mutex::new([0; 2]) };
        region.table.lock().set_exclusive(BLOCK);
        Arc::new(region)
    }

    /// As `GuestRegion::freeze`: clears the bits, then puts other frames behind the shared pages.
    fn freeze(&self, range: PageRange) {
        let mut frames = self.frames.lock().unwrap();
        let pinned = self.table.lock().share(range);
        for at in range.start..range.end {
            if !pinned.iter().any(|run| run.contains(at)) {
                frames[at as usize] += 1;
            }
        }
    }

    /// As `GuestRegion::pin`: without the lock, or else with it. Returns the frame of each page
    /// that the device gets.
    fn pin(&self, range: PageRange) -> Pinned<'_> {
        if self.table.try_pin(range).is_err() {
            let mut frames = self.frames.lock().unwrap();
            let table = self.table.lock();
            for run in table.not_exclusive(range) {
                (run.start..run.end).for_each(|at| frames[at as usize] += 10);
                table.set_exclusive(run);
            }
            table.split_partial(range);
            self.table.try_pin(range).expect("nobody clears the bit or splits");
        }
        Pinned { region: self, range, held: *self.frames.lock().unwrap() }
    }

    fn expect_no_pins(&self) {
        assert_eq!((self.table.counts(BLOCK).pins, self.table.counts(BLOCK).pinned), (0, 0), "I6: a pin is left");
    }
}

/// A device's hold on pages.
struct Pinned<'a> {
    region: &'a Region,
    range: PageRange,
    held: [u32; 2],
}

impl Pinned<'_> {
    /// Ends the device's use. Its frames must still be behind the pages.
    fn end(self) {
        let frames = *self.region.frames.lock().unwrap();
        // Under the lock: while a block is split or merged, a page's record is closed for a moment.
        let shared = self.region.table.lock().not_exclusive(self.range);
        assert_eq!(shared, [], "I3: a pinned page lost its bit");
        for at in self.range.start..self.range.end {
            assert_eq!(frames[at as usize], self.held[at as usize], "I3: a pinned page was remapped");
        }
        self.region.table.unpin(self.range);
    }
}

/// Runs `one` and `other` on two threads, on a region set up by `prepare`.
fn race(prepare: fn(&Region), one: fn(&Region), other: fn(&Region)) {
    let mut model = loom::model::Builder::new();
    // Three preemptions are enough for every race of two; a full exploration takes hours.
    model.preemption_bound = Some(3);
    model.check(move || {
        let region = Region::base();
        prepare(&region);
        let second = {
            let region = Arc::clone(&region);
            thread::spawn(move || other(&region))
        };
        one(&region);
        second.join().unwrap();
        region.expect_no_pins();
    });
}

fn as_born(_: &Region) {}

fn split(region: &Region) {
    region.table.lock().split_partial(page(0));
}

fn shared(region: &Region) {
    region.freeze(BLOCK);
}

fn half_shared(region: &Region) {
    region.freeze(page(1));
}

fn pin_all(region: &Region) {
    region.pin(BLOCK).end();
}

fn pin_first(region: &Region) {
    region.pin(page(0)).end();
}

fn pin_second(region: &Region) {
    region.pin(page(1)).end();
}

fn freeze_all(region: &Region) {
    region.freeze(BLOCK);
}

fn freeze_second(region: &Region) {
    region.freeze(page(1));
}

fn merge(region: &Region) {
    let _state = region.frames.lock().unwrap();
    region.table.lock().merge(0);
}

#[test]
fn loom_a_pin_of_a_block_against_freezes() {
    for prepare in [as_born, split, shared, half_shared] {
        race(prepare, pin_all, freeze_all);
        race(prepare, pin_all, freeze_second);
    }
}

#[test]
fn loom_a_pin_of_a_page_against_freezes() {
    for prepare in [as_born, split, shared, half_shared] {
        race(prepare, pin_first, freeze_all);
        race(prepare, pin_second, freeze_second);
        race(prepare, pin_first, freeze_second);
    }
}

#[test]
fn loom_a_pin_against_a_pin_and_a_merge() {
    for prepare in [as_born, split, half_shared] {
        race(prepare, pin_all, pin_first);
        race(prepare, pin_all, merge);
        race(prepare, pin_first, merge);
    }
}

#[test]
fn loom_two_devices_and_a_freeze() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let region = Region::base();
        let other = |work: fn(&Region)| {
            let region = Arc::clone(&region);
            thread::spawn(move || work(&region))
        };
        let threads = [other(pin_all), other(freeze_second)];
        pin_first(&region);
        for thread in threads {
            thread.join().unwrap();
        }
        region.expect_no_pins();
    });
}

/// An unpin while its block is being split by a freeze of the other page.
#[test]
fn loom_an_unpin_against_a_split() {
    race(|region| region.table.try_pin(BLOCK).unwrap(), |region| region.table.unpin(BLOCK), freeze_second);
}

/// As the test above with I12 broken: a split forgets the pins of the block.
#[test]
#[should_panic(expected = "I3: unpin of a page that is exclusive, 0 pins")]
fn loom_a_split_that_forgets_pins_is_caught() {
    let pinned = |region: &Region| region.table.try_pin(BLOCK).unwrap();
    with_break(Break::SplitBare, || race(pinned, |region| region.table.unpin(BLOCK), freeze_second))
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
