//! A device that reads pages of a layer by a short pin reads the bytes of the pin's instant until
//! its end, regardless of later changes to the view, the layer, its file or its VM (I4).

use std::time::Duration;

use clade_memory::{Access, DmaPin, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage, Store};
use vm_memory::Bytes;

use crate::splice::Splice;
use crate::{born, child, fill, fill_all, freeze, high, one_word, seeded, stores};

/// Pages of the second region provided by a delta: enough that a freeze maps them, few enough that
/// its file is kept.
const SHOWN: PageRange = PageRange::new(40, 440);
/// Pages that the device reads.
const READ: PageRange = PageRange::new(100, 164);
/// Freezes of other VMs: each could reuse a file.
const FREEZES: u64 = 12;

/// A read in progress.
struct Read {
    splice: Splice,
    pin: DmaPin,
    seed: u64,
}

impl Read {
    fn begin(ram: &GuestRam, pages: PageRange, seed: u64) -> Self {
        let pin = high(ram).pin(pages, Access::Read, PinLifetime::Transient).unwrap();
        Self { splice: Splice::of(&pin), pin, seed }
    }

    fn finish(self, what: &str) {
        let first = self.pin.range().start();
        let got = self.splice.read();
        for (page, got) in (first..).zip(got.as_chunks::<{ PAGE_SIZE as usize }>().0) {
            let want = seeded(self.seed, 1, page);
            assert_eq!(one_word(got), Some(want), "I4: {what}: the device reads page {page:#x}");
        }
        drop(self.pin);
    }
}

/// A VM whose pages `SHOWN` come from a delta that no other view shows, and an older image of it.
fn shown(store: &Store) -> (GuestRam, RamImage) {
    let ram = born(store, 1);
    let first = freeze(&ram);
    fill(&ram, 1, SHOWN, 2);
    drop(freeze(&ram));
    (ram, first)
}

/// Other VMs repeatedly freeze as many pages.
fn strangers_freeze(store: &Store) {
    let strangers = [7, 8].map(|seed| born(store, seed));
    strangers.iter().for_each(|stranger| drop(freeze(stranger)));
    for round in 0..FREEZES {
        for stranger in &strangers {
            fill(stranger, 1, SHOWN, 100 + round);
            drop(freeze(stranger));
        }
        store.sweep();
        // Waits for background frees.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A read of pages shown from a delta, while `goes_on` runs and other VMs freeze.
fn holds(what: &str, goes_on: impl Fn(&Store, GuestRam, &RamImage) -> Option<GuestRam>) {
    for store in stores() {
        let (ram, first) = shown(&store);
        let read = Read::begin(&ram, READ, 2);
        let left = goes_on(&store, ram, &first);
        strangers_freeze(&store);
        read.finish(&format!("{what}, {} pages", store.backing().name()));
        drop(left);
    }
}

#[test]
fn i4_a_short_read_outlives_eager_freezes() {
    holds("frozen again", |_, ram, _| {
        for round in 0..FREEZES {
            fill(&ram, 1, SHOWN, 200 + round);
            drop(freeze(&ram));
        }
        Some(ram)
    });
}

#[test]
fn i4_a_short_read_outlives_its_view_compacted() {
    holds("compacted", |_, ram, _| {
        ram.compact(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        Some(ram)
    });
}

#[test]
fn i4_a_short_read_outlives_a_discard() {
    holds("discarded", |_, ram, _| {
        // Spared or not: the device reads the same bytes.
        high(&ram).discard(SHOWN).unwrap();
        Some(ram)
    });
}

#[test]
fn i4_a_short_read_outlives_a_reset() {
    holds("reset", |_, ram, first| {
        let patience = Duration::from_millis(1);
        // Refused because of the pin, or done: the device reads the same bytes.
        let _ = ram.reset(first, &Quiesced::by(&clade_memory::NoWriters), patience);
        Some(ram)
    });
}

#[test]
fn i4_a_short_read_outlives_its_vm() {
    holds("its VM is gone", |_, ram, _| {
        drop(ram);
        None
    });
}

/// The same by address: the pin keeps the memory of its range.
#[test]
fn i4_a_pin_shows_its_pages_when_its_vm_is_gone() {
    for store in stores() {
        let (ram, first) = shown(&store);
        let pin = high(&ram).pin(READ, Access::Read, PinLifetime::Transient).unwrap();
        drop((ram, first));
        strangers_freeze(&store);
        for page in READ.start()..READ.end() {
            let mut got = vec![0; PAGE_SIZE as usize];
            pin.slice().read_slice(&mut got, ((page - READ.start()) * PAGE_SIZE) as usize).unwrap();
            assert_eq!(one_word(&got), Some(seeded(2, 1, page)), "page {page:#x}");
        }
    }
}

/// A request may look up its frames at any time before it completes.
#[test]
fn i4_frames_that_are_looked_up_after_a_freeze_are_held_too() {
    for store in stores() {
        let (ram, _first) = shown(&store);
        let pin = high(&ram).pin(READ, Access::Read, PinLifetime::Transient).unwrap();
        // The guest writes the pages that the device reads, so the freeze shows them from a new
        // delta.
        fill(&ram, 1, SHOWN, 3);
        drop(freeze(&ram));
        let splice = Splice::of(&pin);
        for round in 0..FREEZES {
            fill(&ram, 1, SHOWN, 200 + round);
            drop(freeze(&ram));
        }
        strangers_freeze(&store);
        let got = splice.read();
        for (page, got) in (READ.start()..).zip(got.as_chunks::<{ PAGE_SIZE as usize }>().0) {
            let want = [2, 3].map(|seed| Some(seeded(seed, 1, page)));
            assert!(want.contains(&one_word(got)), "I4: page {page:#x} is {:x?}", one_word(got));
        }
        drop(pin);
    }
}

#[test]
fn i4_a_short_read_outlives_a_childs_freezes() {
    holds("a child writes as many pages and freezes", |store, ram, first| {
        let child = child(first, store);
        fill(&ram, 1, SHOWN, 3);
        drop(freeze(&ram));
        for round in 0..FREEZES {
            fill(&child, 1, SHOWN, 300 + round);
            drop(freeze(&child));
        }
        drop(child);
        Some(ram)
    });
}

/// The tail of a huge layer is less than a block: punching it zeroes it in place.
#[test]
fn i4_a_short_read_outlives_a_sweep_of_a_layers_tail() {
    for store in stores() {
        let ram = born(&store, 1);
        drop(freeze(&ram));
        // The whole region in a delta, the tail after a whole block.
        fill(&ram, 1, high(&ram).range(), 2);
        drop(freeze(&ram));
        let tail = PageRange::new(512, high(&ram).pages());
        let read = Read::begin(&ram, PageRange::new(540, 580), 2);
        // Now no view shows the tail of that layer any more.
        fill(&ram, 1, tail, 3);
        drop(freeze(&ram));
        for _ in 0..3 {
            store.sweep();
        }
        read.finish(&format!("the tail was given back, {} pages", store.backing().name()));
    }
}

/// The same with one page that is the VM's own: it is counted, and the others are held as well.
#[test]
fn i4_a_short_read_of_mixed_pages_outlives_a_sweep_of_a_layers_tail() {
    for store in stores() {
        let ram = born(&store, 1);
        let first = freeze(&ram);
        fill(&ram, 1, high(&ram).range(), 2);
        drop(freeze(&ram));
        let (own, range) = (PageRange::new(539, 540), PageRange::new(539, 580));
        drop(high(&ram).pin(own, Access::Write, PinLifetime::Transient).unwrap());
        assert!(high(&ram).ownership().get(own.start()).0);
        let read = Read::begin(&ram, range, 2);
        assert!(high(&ram).ownership().get(own.start()).1 == 1 && !high(&ram).ownership().get(own.end()).0);
        fill(&ram, 1, PageRange::new(512, own.start()), 3);
        fill(&ram, 1, PageRange::new(own.end(), high(&ram).pages()), 3);
        drop(freeze(&ram));
        for _ in 0..3 {
            store.sweep();
        }
        // I7: other operations do not remove its pages either.
        let discarded = high(&ram).discard(range).unwrap();
        assert_eq!((discarded.discarded, discarded.pinned), (0, range.len()));
        assert!(ram.reset(&first, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO).is_err());
        read.finish(&format!("the tail was given back, {} pages", store.backing().name()));
        assert_eq!(high(&ram).discard(range).unwrap().pinned, 0, "it is over");
    }
}

/// Small layers are punched page by page, and a layer without visible pages is freed as a whole.
#[test]
fn i4_a_short_read_outlives_a_sweep_of_everything() {
    for store in stores() {
        let (ram, first) = shown(&store);
        let read = Read::begin(&ram, READ, 2);
        let other = child(&first, &store);
        drop(first);
        fill_all(&ram, 5);
        drop(freeze(&ram));
        store.sweep();
        strangers_freeze(&store);
        read.finish(&format!("swept, {} pages", store.backing().name()));
        drop(other);
    }
}
