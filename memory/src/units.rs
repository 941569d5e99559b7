//! Units: pages, ranges of pages, and the two granules the manager works in.
//!
//! Inside a region everything is counted in pages from the region's start, so that no arithmetic on
//! guest physical addresses (with their gap below 4 GiB) happens below [`crate::ram`].

use std::fmt;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Pages in a 2 MiB block, the granule of one ownership record while a block has one owner. Few in
/// schedule exploration.
pub const BLOCK_PAGES: u64 = if cfg!(loom) {
    2
} else if cfg!(shuttle) {
    4
} else {
    512
};
/// Bytes in a block.
pub const BLOCK_SIZE: u64 = BLOCK_PAGES * PAGE_SIZE;

/// A half-open range of pages, `start..end`, counted from the start of its region.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange {
    /// First page.
    pub(crate) start: u64,
    /// One past the last page. Never below `start`: constructors ensure it, and the field is
    /// private to the crate.
    pub(crate) end: u64,
}

impl PageRange {
    /// The range `start..end`; empty when `end <= start`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    /// `len` pages from `start`. If the end overflows, the range ends with the last possible page:
    /// it is beyond every region and never empty, so that a check refuses it.
    #[must_use]
    pub const fn with_len(start: u64, len: u64) -> Self {
        match start.checked_add(len) {
            Some(end) => Self { start, end },
            None => Self { start: if start == u64::MAX { u64::MAX - 1 } else { start }, end: u64::MAX },
        }
    }

    /// First page.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last page.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The pages touched by `len` bytes at byte `offset`. `None` when the end overflows.
    #[must_use]
    pub fn covering(offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        Some(Self::new(offset >> PAGE_SHIFT, end.div_ceil(PAGE_SIZE)))
    }

    /// Number of pages.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no page in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `page` lies in it.
    #[must_use]
    pub const fn contains(self, page: u64) -> bool {
        self.start <= page && page < self.end
    }

    /// Whether every page of `other` lies in it.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// The pages in both.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::new(start, self.end.min(other.end).max(start))
    }

    /// Length in bytes, for a range that has been checked against a region (which fits in memory).
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.len().saturating_mul(PAGE_SIZE) as usize
    }

    /// Byte offset of the first page.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.start.saturating_mul(PAGE_SIZE)
    }

    /// The pieces of this range, one per block: block number and the pages of the range within it.
    pub fn blocks(self) -> impl Iterator<Item = (usize, Self)> {
        let first = self.start / BLOCK_PAGES;
        let last = if self.is_empty() { first } else { (self.end - 1) / BLOCK_PAGES + 1 };
        (first..last).map(move |block| {
            let whole = Self::with_len(block * BLOCK_PAGES, BLOCK_PAGES);
            (block as usize, self.intersect(whole))
        })
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Appends `range` to a list of ascending runs, joining it to the last one when they touch.
pub(crate) fn push_run(runs: &mut Vec<PageRange>, range: PageRange) {
    if range.is_empty() {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => runs.push(range),
    }
}

/// The parts of the ascending runs `from` that lie in none of the ascending runs `minus`.
pub(crate) fn subtract_runs(from: &[PageRange], minus: &[PageRange]) -> Vec<PageRange> {
    let mut out = Vec::with_capacity(from.len());
    let mut skip = 0;
    for run in from {
        let mut at = run.start;
        while skip < minus.len() && minus[skip].end <= at {
            skip += 1;
        }
        for hole in &minus[skip..] {
            if hole.start >= run.end {
                break;
            }
            push_run(&mut out, PageRange::new(at, hole.start.max(at)));
            at = at.max(hole.end);
        }
        if at < run.end {
            push_run(&mut out, PageRange::new(at, run.end));
        }
    }
    out
}

/// Joins ascending, possibly overlapping runs over gaps of up to `gap` pages.
pub(crate) fn join_runs(runs: &[PageRange], gap: u64) -> Vec<PageRange> {
    let mut out: Vec<PageRange> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if run.start <= last.end + gap => last.end = last.end.max(run.end),
            _ => push_run(&mut out, *run),
        }
    }
    out
}

/// Total pages of a list of disjoint runs.
pub(crate) fn pages_in(runs: &[PageRange]) -> u64 {
    runs.iter().map(|r| r.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn covering_rounds_outward_and_refuses_overflow() {
        assert_eq!(PageRange::covering(4095, 2), Some(PageRange::new(0, 2)));
        assert_eq!(PageRange::covering(8192, 0), Some(PageRange::new(2, 2)));
        assert_eq!(PageRange::covering(u64::MAX, 2), None);
    }

    #[test]
    fn blocks_split_at_block_edges() {
        let pieces: Vec<_> = PageRange::new(510, 1026).blocks().collect();
        assert_eq!(
            pieces,
            vec![(0, PageRange::new(510, 512)), (1, PageRange::new(512, 1024)), (2, PageRange::new(1024, 1026))]
        );
        assert_eq!(PageRange::new(7, 7).blocks().count(), 0);
    }

    fn runs() -> impl Strategy<Value = Vec<PageRange>> {
        proptest::collection::vec(any::<bool>(), 0..64).prop_map(|bits| {
            let mut out = Vec::new();
            for (i, _) in bits.iter().enumerate().filter(|(_, b)| **b) {
                push_run(&mut out, PageRange::with_len(i as u64, 1));
            }
            out
        })
    }

    proptest! {
        #[test]
        fn subtract_agrees_with_a_set_of_pages(a in runs(), b in runs()) {
            let got = subtract_runs(&a, &b);
            for page in 0..64 {
                let want = a.iter().any(|r| r.contains(page)) && !b.iter().any(|r| r.contains(page));
                prop_assert_eq!(got.iter().any(|r| r.contains(page)), want, "page {}", page);
            }
            prop_assert!(got.windows(2).all(|w| w[0].end < w[1].start));
        }
    }
}
