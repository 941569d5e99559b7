use std::time::Duration;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::{Access, DontFork, FreezeMode, NoWriters, PageRange, PinLifetime, RamLayout, Store};

/// Pages of the first region: a block and a part of one. The second is behind a gap.
const LOW: u64 = 512 + 40;
const HIGH: u64 = 70;
const HIGH_START: u64 = 1 << 32;
/// Bytes read at a time, in tests where that matters.
const SMALL: usize = 256 << 10;

fn quiesced() -> Quiesced<'static> {
    Quiesced::by(&NoWriters)
}

fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), LOW), (GuestAddress(HIGH_START), HIGH)]).unwrap()
}

fn populated(store: &Store, layout: &RamLayout) -> GuestRam {
    let ram = GuestRam::reserve(layout, store).unwrap();
    ram.populate().unwrap();
    ram
}

fn child(of: &GuestRam, mode: FreezeMode, store: &Store) -> GuestRam {
    let (image, _) = of.freeze_in(mode, &quiesced()).unwrap();
    let child = GuestRam::reserve(image.layout(), store).unwrap();
    child.adopt(&image).unwrap();
    child
}

/// The bytes of each region.
fn all(ram: &GuestRam) -> Vec<Vec<u8>> {
    let region = |(start, pages): &(GuestAddress, u64)| {
        let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
        ram.read_bytes(start.0, &mut bytes).unwrap();
        bytes
    };
    ram.layout().ranges().iter().map(region).collect()
}

/// Remaining occurrences in a region's bytes, by comparing at every offset.
fn naive(bytes: &[u8], secrets: &[Vec<u8>]) -> (Vec<u8>, u64) {
    let mut left = bytes.to_vec();
    let mut count = 0;
    for secret in secrets {
        for at in 0..=bytes.len() - secret.len() {
            if bytes[at..].starts_with(secret) {
                left[at..at + secret.len()].fill(0);
                count += 1;
            }
        }
        for page in (0..bytes.len()).step_by(PAGE) {
            for length in MIN_EDGE..secret.len() {
                if bytes[page..page + length] == secret[secret.len() - length..] {
                    left[page..page + length].fill(0);
                }
                let tail = page + PAGE - length;
                if bytes[tail..page + PAGE] == secret[..length] {
                    left[tail..page + PAGE].fill(0);
                }
            }
        }
    }
    (left, count)
}

/// A secret of this length, whose prefixes and suffixes are all distinct.
fn secret(seed: u64, length: usize) -> Vec<u8> {
    let mut random = clade_test_support::Random::new(seed);
    (0..length).map(|_| random.word() as u8).collect()
}

/// A planted part: its place, and its bytes of a secret.
#[derive(Clone, Debug)]
struct Plant {
    region: usize,
    page: u64,
    /// Where in the page, or at its end or its start.
    place: u8,
    offset: u64,
    of: usize,
    length: usize,
    forks: bool,
}

impl Plant {
    fn write(&self, ram: &GuestRam, secrets: &[Vec<u8>]) {
        let secret = &secrets[self.of % secrets.len()];
        let part = self.length % secret.len() + 1;
        let (start, pages) = ram.layout().ranges()[self.region];
        let page = self.page % pages * PAGE_SIZE;
        let (at, bytes) = match self.place {
            // A prefix at the end of a page, a suffix at the start of one, a complete secret
            // anywhere.
            0 => (page + PAGE_SIZE - part as u64, &secret[..part]),
            1 => (page, &secret[secret.len() - part..]),
            2 => (page + PAGE_SIZE - (part as u64).min(page + PAGE_SIZE), &secret[..]),
            _ => (page + self.offset, &secret[..]),
        };
        let room = (pages * PAGE_SIZE - at).min(bytes.len() as u64) as usize;
        ram.write_bytes(start.0 + at, &bytes[..room]).unwrap();
    }
}

fn plant() -> impl Strategy<Value = Plant> {
    (0..2usize, 0..LOW, 0..4u8, 0..PAGE_SIZE, 0..3usize, 0..MAX_SECRET, prop::bool::weighted(0.2)).prop_map(
        |(region, page, place, offset, of, length, forks)| Plant { region, page, place, offset, of, length, forks },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn what_is_left_is_what_a_comparison_at_every_place_leaves(
        plants in prop::collection::vec(plant(), 1..30),
        lengths in prop::collection::vec(prop_oneof![MIN_SECRET..100, Just(MAX_SECRET), MIN_SECRET..MAX_SECRET], 1..4),
        pinned in prop::collection::vec(0..LOW, 0..4),
        background in any::<bool>(),
        chunk in 1..LOW,
    ) {
        let store = Store::open_small().unwrap();
        let secrets: Vec<Vec<u8>> = (1..).zip(&lengths).map(|(seed, length)| secret(seed, *length)).collect();
        let mut parent = populated(&store, &layout());
        let mut ancestors = Vec::new();
        for plant in &plants {
            plant.write(&parent, &secrets);
            if plant.forks {
                let next = child(&parent, FreezeMode::Eager, &store);
                ancestors.push(std::mem::replace(&mut parent, next));
            }
        }
        let pin = |ram: &GuestRam, page: u64| {
            ram.regions()[0].pin(PageRange::new(page, page + 1), Access::Write, PinLifetime::Transient).unwrap()
        };
        let held: Vec<_> = pinned.iter().map(|page| pin(&parent, *page)).collect();
        let before = all(&parent);
        let mode = if background { FreezeMode::Background } else { FreezeMode::Eager };
        let (image, _) = parent.freeze_in(mode, &quiesced()).unwrap();
        let new = || {
            let ram = GuestRam::reserve(image.layout(), &store).unwrap();
            ram.adopt(&image).unwrap();
            ram
        };
        let (erased, sibling) = (new(), new());
        let own_pins: Vec<_> = pinned.iter().map(|page| pin(&erased, *page)).collect();
        let views: Vec<&[u8]> = secrets.iter().map(Vec::as_slice).collect();
        let found = erased.erase_by(chunk as usize * PAGE, &views, &quiesced()).unwrap();
        let (expected, counts): (Vec<_>, Vec<_>) = before.iter().map(|bytes| naive(bytes, &secrets)).unzip();
        prop_assert!(all(&erased) == expected, "{plants:?}");
        prop_assert_eq!(found.whole, counts.iter().sum::<u64>());
        prop_assert!(all(&parent) == before && all(&sibling) == before, "a relative has lost something");
        // Only pages with a match were written.
        let changed: u64 = before.iter().zip(&expected).map(|(before, after)| {
            before.chunks(PAGE).zip(after.chunks(PAGE)).filter(|(before, after)| before != after).count() as u64
        }).sum();
        let own = erased.stats().unwrap().exclusive;
        prop_assert!(own <= changed + pinned.len() as u64, "{} pages are its own, {} changed", own, changed);
        drop((held, own_pins));
        // Children of the VM are clean as well, and a second search finds no occurrence.
        let grandchild = child(&erased, FreezeMode::Eager, &store);
        prop_assert_eq!(grandchild.erase(&views, &quiesced()).unwrap(), Erased::default());
        prop_assert!(all(&grandchild) == expected);
        erased.check(&quiesced()).unwrap();
    }
}

#[test]
fn a_secret_across_the_bytes_that_are_read_at_a_time_is_found() {
    let store = Store::open_small().unwrap();
    let layout = RamLayout::new(3 * SMALL as u64).unwrap();
    let secret = secret(7, 100);
    let parent = populated(&store, &layout);
    let chunk = SMALL as u64;
    // Complete: before the edge, across it in each split, at the very start, and at the very end.
    let mut places = vec![chunk - 100, 2 * chunk - 3, chunk + 5_000, 0, 3 * chunk - 100];
    places.extend([2 * chunk + 8_192 - 50, 2 * chunk + 100_000]);
    for at in &places {
        parent.write_bytes(*at, &secret).unwrap();
    }
    // A prefix before the edge and a suffix after it that do not belong together.
    parent.write_bytes(chunk, &secret[60..]).unwrap();
    let child = child(&parent, FreezeMode::Eager, &store);
    let found = child.erase_by(SMALL, &[&secret], &quiesced()).unwrap();
    assert_eq!(found, Erased { whole: places.len() as u64, parts: 1 });
    assert!(all(&child)[0].iter().all(|byte| *byte == 0));
}

/// Unallocated memory stays unallocated, and absent ranges are skipped.
#[test]
fn a_search_gives_memory_to_nothing() {
    for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
        let parent = populated(&store, &layout());
        let secret = secret(1, 32);
        for page in [3, 200, 300] {
            parent.write_bytes(page * PAGE_SIZE + 100, &secret).unwrap();
        }
        parent.regions()[0].set_dont_fork(PageRange::new(200, 201), Some(DontFork::Absent)).unwrap();
        let child = child(&parent, FreezeMode::Eager, &store);
        let resident = || {
            let layers = child.page_map(None).unwrap().layers;
            layers.iter().filter_map(|layer| layer.resident_bytes).sum::<u64>()
        };
        let before = resident();
        let found = child.erase(&[&secret], &quiesced()).unwrap();
        assert_eq!((found.whole, found.parts, resident()), (2, 0, before));
        assert_eq!(child.stats().unwrap().exclusive, 2);
    }
}

#[test]
fn what_cannot_be_told_from_other_memory_is_refused_and_nothing_is_written() {
    let store = Store::open_small().unwrap();
    let ram = populated(&store, &layout());
    let good = secret(1, 32);
    ram.write_bytes(0, &good).unwrap();
    let refused = |secret: &[u8]| ram.erase(&[&good, secret], &quiesced()).unwrap_err().to_string();
    assert_eq!(refused(&good[..15]), "a secret of 15 bytes: 16 to 4096 can be found in memory");
    assert!(refused(&secret(1, 4097)).contains("4097"));
    for plain in [[&[b' '; 8], &good[..]].concat(), [&good[..], &[0; 8]].concat()] {
        assert!(refused(&plain).contains("all the same"));
    }
    assert!(all(&ram)[0].starts_with(&good));
    assert_eq!(ram.erase(&[], &quiesced()).unwrap(), Erased::default());
}

/// The worst case that a guest can prepare: pages full of a secret's prefix.
#[test]
fn memory_full_of_beginnings_is_searched_to_the_end() {
    let store = Store::open_small().unwrap();
    let ram = populated(&store, &RamLayout::new(8 << 20).unwrap());
    let secret = [b"ab".repeat(100), b"c".to_vec(), b"de".repeat(50)].concat();
    let bytes = b"ab".repeat(2 << 20);
    (0..2).for_each(|half| ram.write_bytes(half * bytes.len() as u64, &bytes).unwrap());
    ram.write_bytes(5_000_000, &secret).unwrap();
    // A search that repeats its comparisons would take hours.
    let _watchdog = clade_test_support::Watchdog::new(Duration::from_secs(600), || "a search".to_owned());
    assert_eq!(ram.erase(&[&secret], &quiesced()).unwrap().whole, 1);
}
