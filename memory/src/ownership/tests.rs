use super::*;
use proptest::prelude::*;

const PAGES: u64 = 3 * BLOCK_PAGES + 100;

/// The check of a lock-free short read (I4): whole blocks and split blocks.
#[test]
fn i4_no_page_of_a_range_is_exclusive_or_one_is() {
    let table = OwnershipTable::new(PAGES);
    let (all, page) = (PageRange::new(0, PAGES), BLOCK_PAGES + 7);
    assert!(table.none_exclusive(all));
    table.lock().set_exclusive(PageRange::with_len(page, 1));
    assert!(!table.none_exclusive(all) && !table.none_exclusive(PageRange::with_len(page, 1)));
    assert!(table.none_exclusive(PageRange::new(0, page)), "split, and none of these is exclusive");
    assert!(table.none_exclusive(PageRange::new(page + 1, PAGES)));
    table.lock().set_exclusive(PageRange::with_len(0, BLOCK_PAGES));
    assert!(!table.none_exclusive(PageRange::with_len(3, 1)), "of a block that is whole");
}

#[test]
fn a_table_says_how_large_it_is() {
    let table = OwnershipTable::new(PAGES);
    assert_eq!(table.pages(), PAGES);
    let whole = 4 * size_of::<PageBlock>() as u64;
    assert_eq!(table.footprint(), whole);
    table.lock().split_partial(PageRange::new(3, 4));
    table.lock().split_partial(PageRange::new(BLOCK_PAGES + 3, BLOCK_PAGES + 4));
    assert_eq!(table.footprint(), whole + 2 * BLOCK_PAGES * size_of::<Word>() as u64);
}

#[test]
fn i12_split_gives_every_page_the_blocks_bit_and_pins() {
    let table = OwnershipTable::new(PAGES);
    let block = PageRange::with_len(BLOCK_PAGES, BLOCK_PAGES);
    table.lock().set_exclusive(block);
    table.try_pin(block).unwrap();
    table.lock().split_partial(PageRange::with_len(BLOCK_PAGES + 3, 1));
    for page in block.start..block.end {
        assert_eq!(table.get(page), (true, 1));
    }
    assert_eq!(table.get(block.end), (false, 0));
    table.unpin(block);
    assert_eq!(table.counts(PageRange::new(0, PAGES)).pins, 0);
}

/// A device unpins a block that is being split. The pins have left the block's record, and the
/// pages' records are closed.
#[test]
fn i6_an_unpin_waits_for_a_split() {
    let table = OwnershipTable::new(PAGES);
    let block = PageRange::with_len(0, BLOCK_PAGES);
    let guard = table.lock();
    guard.set_exclusive(block);
    table.try_pin(block).unwrap();
    // The first half of a split.
    let record = &table.blocks[0];
    let pages = record.pages.get_or_init(|| (0..BLOCK_PAGES).map(|_| Word::new(Ownership::closed())).collect());
    let was = record.word.load();
    assert!(record.word.try_split(was));
    std::thread::scope(|scope| {
        let device = scope.spawn(|| table.unpin(block));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!device.is_finished(), "there was nothing to count down");
        pages.iter().for_each(|word| word.reopen(was));
        drop(guard);
    });
    assert_eq!(table.counts(block).pins, 0, "a pin is left behind");
}

#[test]
fn i6_a_part_of_a_block_pins_only_its_pages() {
    let table = OwnershipTable::new(PAGES);
    let block = PageRange::with_len(0, BLOCK_PAGES);
    table.lock().set_exclusive(block);
    let one = PageRange::with_len(9, 1);
    assert_eq!(table.try_pin(one), Err(PinMiss::Split));
    table.lock().split_partial(one);
    table.try_pin(one).unwrap();
    assert_eq!(table.lock().share(block), vec![one], "I3: the pinned page stays, the rest goes");
    assert_eq!(table.counts(block), TableCounts { exclusive: 1, pinned: 1, pins: 1 });
    table.unpin(one);
}

#[test]
fn i12_a_block_that_is_shared_whole_is_one_record_again() {
    let table = OwnershipTable::new(PAGES);
    let block = PageRange::with_len(0, BLOCK_PAGES);
    table.lock().set_exclusive(block);
    table.lock().split_partial(PageRange::with_len(9, 1));
    assert!(table.blocks[0].word.load().is_split());
    assert_eq!(table.lock().share(PageRange::with_len(0, 9)), []);
    assert!(table.blocks[0].word.load().is_split(), "a part of it is shared");
    assert_eq!(table.lock().share(block), []);
    assert!(!table.blocks[0].word.load().is_split());
}

#[test]
fn what_devices_had_is_told_once_and_up_to_a_bound() {
    let table = OwnershipTable::new(PAGES);
    let (all, run) = (PageRange::new(0, PAGES), PageRange::new);
    table.lock().set_exclusive(all);
    let used = |range: PageRange| {
        table.lock().split_partial(range);
        table.try_pin(range).unwrap();
        table.unpin(range);
    };
    used(run(0, BLOCK_PAGES));
    assert_eq!(table.lock().take_recently_pinned(run(3, 9), 100), [], "of a block only when all of it is asked for");
    assert_eq!(table.lock().take_recently_pinned(all, BLOCK_PAGES), [run(0, BLOCK_PAGES)]);
    assert_eq!(table.lock().take_recently_pinned(all, BLOCK_PAGES), [], "it was told");
    let first = BLOCK_PAGES + 10;
    [first, first + 1, first + 5, first + 6, first + 20].into_iter().for_each(|page| used(run(page, page + 1)));
    let taken = table.lock().take_recently_pinned(all, 3);
    assert_eq!(taken, [run(first, first + 2), run(first + 5, first + 6)], "three of five");
    assert_eq!(table.lock().take_recently_pinned(all, 3), [], "the others are forgotten");
    used(run(0, BLOCK_PAGES));
    used(run(first, first + 1));
    let taken = table.lock().take_recently_pinned(all, BLOCK_PAGES);
    assert_eq!(taken, [run(0, BLOCK_PAGES)], "a bound is met and not passed");
}

#[test]
fn i12_merging_needs_one_owner_and_no_pin() {
    let table = OwnershipTable::new(PAGES);
    let block = PageRange::with_len(0, BLOCK_PAGES);
    let one = PageRange::with_len(9, 1);
    table.lock().set_exclusive(one);
    assert!(!table.lock().merge(0), "one page is owned, the others are not");
    table.lock().set_exclusive(block);
    table.try_pin(one).unwrap();
    assert!(!table.lock().merge(0), "a page is pinned");
    assert_eq!(table.counts(block), TableCounts { exclusive: BLOCK_PAGES, pinned: 1, pins: 1 });
    table.unpin(one);
    assert!(table.lock().merge(0));
    assert_eq!(table.counts(block).exclusive, BLOCK_PAGES);
    table.try_pin(block).unwrap();
    assert_eq!(table.try_pin(one), Err(PinMiss::Split), "a part needs the pages' records again");
    table.lock().split_partial(one);
    assert_eq!(table.get(9), (true, 1), "split gives every page the block's pin");
    table.unpin(block);
}

#[test]
fn a_terabyte_is_described_in_a_few_megabytes() {
    let table = OwnershipTable::new(1 << 28);
    table.lock().set_exclusive(PageRange::new(0, 1 << 28));
    assert!(table.footprint() * 5000 <= 1 << 40, "{} bytes: more than 0.02 %", table.footprint());
    table.lock().split_partial(PageRange::with_len(77, 1));
    let split = BLOCK_PAGES as usize * size_of::<Word>();
    assert!(split as u64 <= 8 * BLOCK_PAGES);
    assert_eq!(table.counts(PageRange::new(0, 1 << 28)).exclusive, 1 << 28);
}

#[derive(Clone, Debug)]
enum Op {
    Own(PageRange),
    Share(PageRange),
    Pin(PageRange),
    Unpin(usize),
    Merge(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let edge = prop_oneof![0..PAGES, (0..4u64).prop_map(|b| b * BLOCK_PAGES)];
    let len = prop_oneof![1..40u64, Just(BLOCK_PAGES), Just(2 * BLOCK_PAGES)];
    let range = (edge, len).prop_map(|(s, l)| PageRange::new(s, (s + l).min(PAGES)));
    prop_oneof![
        range.clone().prop_map(Op::Own),
        range.clone().prop_map(Op::Share),
        range.prop_map(Op::Pin),
        any::<usize>().prop_map(Op::Unpin),
        (0..3usize).prop_map(Op::Merge),
    ]
}

proptest! {
    #[test]
    fn agrees_with_a_naive_table(ops in proptest::collection::vec(op(), 0..40)) {
        let table = OwnershipTable::new(PAGES);
        let mut model = vec![(false, 0u32); PAGES as usize];
        let mut held: Vec<PageRange> = Vec::new();
        for op in ops {
            match op {
                Op::Own(r) => {
                    table.lock().set_exclusive(r);
                    for p in r.start..r.end { model[p as usize].0 = true; }
                }
                Op::Share(r) => {
                    let pinned = table.lock().share(r);
                    for p in r.start..r.end {
                        let m = &mut model[p as usize];
                        prop_assert_eq!(pinned.iter().any(|q| q.contains(p)), m.1 > 0);
                        if m.1 == 0 { m.0 = false; }
                    }
                }
                Op::Pin(r) => {
                    let own_all = (r.start..r.end).all(|p| model[p as usize].0);
                    let mut got = table.try_pin(r);
                    if got == Err(PinMiss::Split) {
                        table.lock().split_partial(r);
                        got = table.try_pin(r);
                    }
                    prop_assert_eq!(got.is_ok(), own_all);
                    if own_all {
                        for p in r.start..r.end { model[p as usize].1 += 1; }
                        held.push(r);
                    }
                }
                Op::Unpin(n) if !held.is_empty() => {
                    let r = held.swap_remove(n % held.len());
                    table.unpin(r);
                    for p in r.start..r.end { model[p as usize].1 -= 1; }
                }
                Op::Unpin(_) => {}
                Op::Merge(block) => {
                    let pages = &model[block * BLOCK_PAGES as usize..(block + 1) * BLOCK_PAGES as usize];
                    let alike = pages.iter().all(|p| *p == (pages[0].0, 0));
                    let was_whole = !table.blocks[block].word.load().is_split();
                    prop_assert_eq!(table.lock().merge(block), alike || was_whole);
                }
            }
        }
        for p in 0..PAGES { prop_assert_eq!(table.get(p), model[p as usize], "page {}", p); }
        let all = PageRange::new(0, PAGES);
        prop_assert_eq!(table.counts(all).exclusive, model.iter().filter(|m| m.0).count() as u64);
        prop_assert_eq!(table.counts(all).pins, model.iter().map(|m| u64::from(m.1)).sum::<u64>());
        let free: u64 = table.lock().not_exclusive(all).iter().map(|r| r.len()).sum();
        prop_assert_eq!(free, model.iter().filter(|m| !m.0).count() as u64);
    }
}
