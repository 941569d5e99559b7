use vm_memory::GuestAddress;

use super::*;

fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), 100), (GuestAddress(1 << 30), 50)]).unwrap()
}

fn run(start: u64, end: u64) -> PageRange {
    PageRange::new(start, end)
}

fn set(first: &[PageRange], second: &[PageRange]) -> PageSet {
    PageSet::new(&layout(), vec![first.to_vec(), second.to_vec()]).unwrap()
}

#[test]
fn a_set_that_does_not_fit_its_guest_is_refused_by_name() {
    let refused = |runs| PageSet::new(&layout(), runs).unwrap_err();
    assert_eq!(refused(vec![vec![]]), PageSetError::Regions { given: 1, guest: 2 });
    let beyond = PageSetError::Beyond { region: 1, range: run(49, 51), pages: 50 };
    assert_eq!(refused(vec![vec![run(0, 100)], vec![run(49, 51)]]), beyond);
    for wrong in [vec![run(5, 5)], vec![run(5, 7), run(6, 8)], vec![run(5, 7), run(2, 3)]] {
        let range = *wrong.last().unwrap();
        assert_eq!(refused(vec![wrong, vec![]]), PageSetError::Order { region: 0, range });
    }
    let many = vec![run(0, 1); MAX_RUNS + 1];
    assert_eq!(refused(vec![many, vec![]]), PageSetError::TooManyRuns { given: MAX_RUNS + 1 });
    // A set of another shape is not recorded.
    let mut learned = Learned::new(&RamLayout::new(4096).unwrap());
    assert!(matches!(learned.record(&set(&[run(0, 1)], &[])), Err(PageSetError::Regions { given: 2, guest: 1 })));
    assert_eq!((learned.sets(), learned.likely(9).pages()), (0, 0));
}

#[test]
fn what_half_of_the_last_sets_have_is_likely() {
    let mut learned = Learned::new(&layout());
    assert!(learned.likely(100).is_empty());
    learned.record(&set(&[run(3, 6)], &[run(0, 2)])).unwrap();
    assert_eq!(learned.likely(100), set(&[run(3, 6)], &[run(0, 2)]));
    // One of two is half; one of three is less.
    learned.record(&set(&[run(4, 5)], &[])).unwrap();
    assert_eq!(learned.likely(100), set(&[run(3, 6)], &[run(0, 2)]));
    learned.record(&set(&[run(4, 5)], &[])).unwrap();
    assert_eq!(learned.likely(100), set(&[run(4, 5)], &[]));
}

#[test]
fn what_is_written_no_more_is_forgotten() {
    let mut learned = Learned::new(&layout());
    (0..20).for_each(|_| learned.record(&set(&[run(10, 20)], &[])).unwrap());
    let new = set(&[run(50, 60)], &[run(7, 8)]);
    let mut known = Vec::new();
    for _ in 0..8 {
        learned.record(&new).unwrap();
        let likely = learned.likely(100);
        known.push((likely.runs()[0].contains(&run(10, 20)), likely.runs()[0].contains(&run(50, 60))));
    }
    // Four of the last eight are half.
    let want = [(true, false), (true, false), (true, false), (true, true), (false, true)];
    assert_eq!(known[..5], want);
    assert_eq!(learned.likely(100), new);
    assert_eq!(learned.pages[0].len() + learned.pages[1].len(), 11, "what no set has costs no memory");
}

#[test]
fn a_budget_takes_what_most_have_written() {
    let mut learned = Learned::new(&layout());
    learned.record(&set(&[run(0, 4)], &[run(9, 12)])).unwrap();
    learned.record(&set(&[run(2, 6)], &[run(9, 12)])).unwrap();
    // Both have 2..4 and 9..12. Pages in only one set: the latest set's come first.
    assert_eq!(learned.likely(5), set(&[run(2, 4)], &[run(9, 12)]));
    assert_eq!(learned.likely(6), set(&[run(2, 5)], &[run(9, 12)]));
    assert_eq!(learned.likely(9), set(&[run(0, 6)], &[run(9, 12)]));
    assert!(learned.likely(0).is_empty());
}

#[test]
fn of_a_set_larger_than_what_is_remembered_the_first_pages_are() {
    let pages = 4 * MAX_LEARNED;
    let layout = RamLayout::of_ranges(&[(GuestAddress(0), pages)]).unwrap();
    let mut learned = Learned::new(&layout);
    learned.record(&PageSet::new(&layout, vec![vec![run(5, pages)]]).unwrap()).unwrap();
    assert_eq!(learned.likely(u64::MAX).runs()[0], [run(5, 5 + MAX_LEARNED)]);
}

#[test]
fn sets_are_cut_and_subtracted_by_region() {
    let all = set(&[run(0, 4), run(10, 12)], &[run(3, 9)]);
    assert_eq!(all.first(5), set(&[run(0, 4), run(10, 11)], &[]));
    assert_eq!(all.first(8), set(&[run(0, 4), run(10, 12)], &[run(3, 5)]));
    assert_eq!(all.without(&set(&[run(3, 11)], &[run(0, 4)])), set(&[run(0, 3), run(11, 12)], &[run(4, 9)]));
    assert_eq!(all.without(&PageSet::default()), all);
}
