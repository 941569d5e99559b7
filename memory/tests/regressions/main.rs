//! One test for each past bug in which memory was lost, shown to the wrong VM or refused to the
//! right one. Each uses the public interface only, and checks the bytes that devices hold or
//! children see, not the code's records.

#![allow(clippy::unwrap_used, reason = "a test, although not every function of it is one")]

mod alone;
mod balloon;
mod held;
mod process;
mod refusals;
mod second;
#[path = "../dma/splice.rs"]
mod splice;

use std::sync::Arc;

use clade_memory::{FreezeMode, GuestRam, GuestRegion, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

/// Pages of the first region: a block and a part of one.
const LOW: u64 = 512 + 88;
/// Pages of the second, behind a gap.
const HIGH: u64 = 512 + 88;
const HIGH_START: u64 = 1 << 32;

fn stores() -> [Store; 2] {
    [Store::open().unwrap(), Store::open_small().unwrap()]
}

fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), LOW), (GuestAddress(HIGH_START), HIGH)]).unwrap()
}

fn address(region: usize, page: u64) -> u64 {
    HIGH_START * region as u64 + page * PAGE_SIZE
}

/// Fills a page with one word.
fn put(ram: &GuestRam, region: usize, page: u64, word: u64) {
    let bytes = word.to_le_bytes().repeat(PAGE_SIZE as usize / 8);
    ram.memory().write_slice(&bytes, GuestAddress(address(region, page))).unwrap();
}

fn word(ram: &GuestRam, region: usize, page: u64) -> u64 {
    let mut got = vec![0; PAGE_SIZE as usize];
    ram.memory().read_slice(&mut got, GuestAddress(address(region, page))).unwrap();
    one_word(&got).unwrap_or_else(|| panic!("page {page:#x} of region {region} is torn"))
}

/// The word that fills a page, if it is the same everywhere.
fn one_word(page: &[u8]) -> Option<u64> {
    let words = page.as_chunks::<8>().0;
    words.iter().all(|word| *word == words[0]).then(|| u64::from_le_bytes(words[0]))
}

/// Contents of a VM written with `seed`.
fn seeded(seed: u64, region: usize, page: u64) -> u64 {
    seed << 32 | (region as u64) << 16 | (page + 1)
}

fn fill(ram: &GuestRam, region: usize, pages: PageRange, seed: u64) {
    (pages.start()..pages.end()).for_each(|page| put(ram, region, page, seeded(seed, region, page)));
}

fn fill_all(ram: &GuestRam, seed: u64) {
    for (region, of) in ram.regions().iter().enumerate() {
        fill(ram, region, of.range(), seed);
    }
}

fn check_all(ram: &GuestRam, seed: u64, what: &str) {
    for (region, of) in ram.regions().iter().enumerate() {
        for page in 0..of.pages() {
            assert_eq!(word(ram, region, page), seeded(seed, region, page), "{what}: region {region} page {page:#x}");
        }
    }
}

fn reserve(store: &Store) -> GuestRam {
    GuestRam::reserve(&layout(), store).unwrap()
}

fn born(store: &Store, seed: u64) -> GuestRam {
    let ram = reserve(store);
    ram.populate().unwrap();
    fill_all(&ram, seed);
    ram
}

fn child(image: &RamImage, store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(image.layout(), store).unwrap();
    ram.adopt(image).unwrap();
    ram
}

fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters)).unwrap().0
}

fn high(ram: &GuestRam) -> &Arc<GuestRegion> {
    &ram.regions()[1]
}
