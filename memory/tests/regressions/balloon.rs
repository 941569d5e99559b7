//! A guest's balloon takes pages one by one, endlessly, within its share of the process's mappings.

use std::collections::BTreeSet;
use std::fs;

use clade_memory::{GuestRam, PAGE_SIZE, PageRange, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

use crate::alone::alone;
use crate::{born, child, freeze, high};

/// Every second page is discarded: more runs than the process can have mappings.
const PAGES: u64 = 80_000;
const BATCH: usize = 1_000;

fn put(ram: &GuestRam, page: u64, word: u64) {
    ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
}

fn word(ram: &GuestRam, page: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
}

/// The promised mappings after each batch of discards, and the pages that were given back without a
/// mapping.
fn discard_every_second(ram: &GuestRam, store: &Store) -> (Vec<u64>, BTreeSet<u64>) {
    let region = &ram.regions()[0];
    let pages: Vec<u64> = (0..PAGES).step_by(2).collect();
    let mut unmapped = BTreeSet::new();
    let batch = |pages: &[u64]| {
        for page in pages {
            let done = region.discard(PageRange::with_len(*page, 1));
            let done = done.unwrap_or_else(|error| panic!("the discard of page {page:#x} is refused: {error}"));
            assert_eq!(done.pinned, 0);
            unmapped.extend((done.unmapped > 0).then_some(*page));
        }
        store.budget().used()
    };
    let used = pages.chunks(BATCH).map(batch).collect();
    (used, unmapped)
}

/// Number of this process's mappings in the kernel.
fn kernel_mappings() -> u64 {
    fs::read_to_string("/proc/self/maps").unwrap().lines().count() as u64
}

fn others_go_on(store: &Store) {
    let other = born(store, 1);
    let image = freeze(&other);
    let child = child(&image, store);
    crate::check_all(&child, 1, "beside a balloon");
    for page in (0..500).step_by(2) {
        high(&child).discard(PageRange::with_len(page, 1)).expect("a discard of another VM");
    }
    crate::fill_all(&child, 2);
    drop(freeze(&child));
    crate::check_all(&child, 2, "beside a balloon");
}

fn balloon(freeze_first: bool) {
    let store = Store::open_small().unwrap();
    let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
    ram.populate().unwrap();
    // Far apart, to observe which written pages stay.
    let marked = |page: &u64| page.is_multiple_of(101);
    (0..PAGES).filter(marked).for_each(|page| put(&ram, page, page + 1));
    if freeze_first {
        drop(freeze(&ram));
    }
    let before = kernel_mappings();
    let (used, unmapped) = discard_every_second(&ram, &store);
    // A discard's cost depends on the mappings that it has to search. After the share is used up,
    // further batches add no mapping, in the budget or in the kernel.
    let (most, limit) = (used.iter().max().copied().unwrap(), store.budget().limit());
    assert!(most <= limit / 4, "one guest's balloon takes {most} mappings of {limit}");
    let (middle, last) = (used[used.len() / 2], used[used.len() - 1]);
    assert_eq!(last, middle, "mappings are added after the share was used up: {used:?}");
    let added = kernel_mappings().saturating_sub(before);
    assert!(added <= most + 64, "the kernel has {added} mappings more, and {most} are promised");
    for page in (0..PAGES).filter(marked) {
        // Without its own mapping a page shows the bytes below: zeros in a file of the VM's own,
        // else its layer's.
        let beneath = freeze_first && unmapped.contains(&page);
        let want = if page.is_multiple_of(2) && !beneath { 0 } else { page + 1 };
        assert_eq!(word(&ram, page), want, "page {page:#x}");
    }
    others_go_on(&store);
}

#[test]
fn a_balloon_of_single_pages_takes_no_more_than_its_share() {
    alone("balloon::single_pages_of_a_vm_that_was_born");
}

#[test]
fn a_balloon_of_a_frozen_vm_takes_no_more_than_its_share() {
    alone("balloon::single_pages_of_a_vm_that_was_frozen");
}

#[test]
#[ignore = "takes the process's mappings; run by a test above"]
fn single_pages_of_a_vm_that_was_born() {
    balloon(false);
}

#[test]
#[ignore = "takes the process's mappings; run by a test above"]
fn single_pages_of_a_vm_that_was_frozen() {
    balloon(true);
}
