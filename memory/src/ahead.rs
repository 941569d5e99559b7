//! Copies ahead of writes: the pages that VMs of one kind write are learned from VMs that have
//! ended, and the next VM gets its own copies of them in bulk.
//!
//! A guest's first write to a shared page costs a guest fault, and two if the page was mapped for
//! reading before: the copy invalidates the entry that KVM has just made. A bulk copy costs a
//! fraction of that, and KVM then maps several neighbours per fault.
//!
//! ```text
//!   child ends ── GuestRam::written_set ──► Learned::record
//!                                                │
//!   next child ◄── GuestRam::copy_ahead ◄── Learned::likely
//! ```
//!
//! A copy ahead changes no contents and needs no proof: it is the kernel's copy on write, done
//! earlier. So a wrong set costs only time and memory (I5).

use std::collections::BTreeMap;

use thiserror::Error;

use crate::layout::RamLayout;
use crate::units::{PageRange, pages_in, push_run, subtract_runs};

/// Maximum number of runs of a set, over all regions.
const MAX_RUNS: usize = 65_536;
/// Maximum number of pages learned from one set: 256 MiB. Further pages are left out.
const MAX_LEARNED: u64 = 65_536;
/// Number of sets remembered, one bit of a page's record each.
const REMEMBERED: u32 = u8::BITS;

/// A set of pages that does not fit its guest.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PageSetError {
    /// Another number of regions.
    #[error("a set of pages of {given} regions is for a guest of {guest}")]
    Regions {
        /// Of the set.
        given: usize,
        /// Of the guest.
        guest: usize,
    },
    /// A run reaches beyond its region.
    #[error("{range} of region {region} reach beyond its {pages} pages")]
    Beyond {
        /// The region's number.
        region: usize,
        /// The run.
        range: PageRange,
        /// The region's size.
        pages: u64,
    },
    /// A run is empty, or not behind the one before it.
    #[error("{range} of region {region} are not behind the run before, or empty")]
    Order {
        /// The region's number.
        region: usize,
        /// The run.
        range: PageRange,
    },
    /// More runs than a set may have.
    #[error("{given} runs of pages are more than the {MAX_RUNS} that a set may have")]
    TooManyRuns {
        /// Of the set.
        given: usize,
    },
}

/// Pages of a guest: runs by region, ascending and disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    runs: Vec<Vec<PageRange>>,
}

impl PageSet {
    /// The pages `runs`, by region, of a guest of this shape.
    ///
    /// # Errors
    /// When the runs do not fit the guest, are not ascending, or are too many.
    pub fn new(layout: &RamLayout, runs: Vec<Vec<PageRange>>) -> Result<Self, PageSetError> {
        let given = runs.iter().map(Vec::len).sum();
        if given > MAX_RUNS {
            return Err(PageSetError::TooManyRuns { given });
        }
        let set = Self { runs };
        set.expect_fits(layout)?;
        Ok(set)
    }

    /// A set of pages that this process has found itself.
    pub(crate) fn found(runs: Vec<Vec<PageRange>>) -> Self {
        Self { runs }
    }

    /// Refuses a guest of another shape.
    pub(crate) fn expect_fits(&self, layout: &RamLayout) -> Result<(), PageSetError> {
        let (given, guest) = (self.runs.len(), layout.ranges().len());
        if given != guest {
            return Err(PageSetError::Regions { given, guest });
        }
        for (region, (runs, (_, pages))) in self.runs.iter().zip(layout.ranges()).enumerate() {
            let mut free = 0;
            for range in runs.iter().copied() {
                if range.start < free || range.start >= range.end {
                    return Err(PageSetError::Order { region, range });
                }
                if range.end > *pages {
                    return Err(PageSetError::Beyond { region, range, pages: *pages });
                }
                free = range.end;
            }
        }
        Ok(())
    }

    /// The runs, by region.
    #[must_use]
    pub fn runs(&self) -> &[Vec<PageRange>] {
        &self.runs
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|runs| pages_in(runs)).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.iter().all(Vec::is_empty)
    }

    /// Inserts the runs of a region before the others.
    pub(crate) fn insert_first(&mut self, runs: Vec<PageRange>) {
        self.runs.insert(0, runs);
    }

    /// The first `most` pages.
    pub(crate) fn first(&self, most: u64) -> Self {
        let mut left = most;
        let mut cut = |run: &PageRange| {
            let part = PageRange::with_len(run.start, run.len().min(left));
            left -= part.len();
            (!part.is_empty()).then_some(part)
        };
        Self { runs: self.runs.iter().map(|runs| runs.iter().filter_map(&mut cut).collect()).collect() }
    }

    /// The pages that are not in `other`, a set of the same guest.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let others = other.runs.iter().map(Vec::as_slice).chain(std::iter::repeat([].as_slice()));
        Self { runs: self.runs.iter().zip(others).map(|(runs, other)| subtract_runs(runs, other)).collect() }
    }
}

/// Use of the pages copied ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AheadUse {
    /// Pages copied ahead since the VM was last made, reset, frozen or suspended.
    pub copied: u64,
    /// Copied pages written since: each saved a fault. Pages rewritten with the same bytes are not
    /// included.
    pub hits: u64,
    /// Copied pages still unchanged: wasted memory and time. Pages in neither count have been
    /// dropped since.
    pub waste: u64,
}

impl std::ops::AddAssign for AheadUse {
    fn add_assign(&mut self, other: Self) {
        self.copied += other.copied;
        self.hits += other.hits;
        self.waste += other.waste;
    }
}

/// Learns the pages written by VMs of one kind: the children of a checkpoint, or one VM between its
/// resets.
///
/// The last eight sets are remembered. A page counts as likely if half of them have it, so a page
/// that is no longer written is forgotten after five.
#[derive(Clone, Debug)]
pub struct Learned {
    layout: RamLayout,
    /// Number of sets recorded, as far as they are remembered.
    sets: u32,
    /// By region and page: the sets that have the page. The lowest bit is the latest set.
    pages: Vec<BTreeMap<u64, u8>>,
}

impl Learned {
    /// An empty history, for guests of this shape.
    #[must_use]
    pub fn new(layout: &RamLayout) -> Self {
        Self { layout: layout.clone(), sets: 0, pages: vec![BTreeMap::new(); layout.ranges().len()] }
    }

    /// Records the pages written by one VM.
    ///
    /// # Errors
    /// When the set belongs to a guest of another shape. Then it is not recorded.
    pub fn record(&mut self, written: &PageSet) -> Result<(), PageSetError> {
        written.expect_fits(&self.layout)?;
        self.sets = (self.sets + 1).min(REMEMBERED);
        let mut left = MAX_LEARNED;
        for (pages, runs) in self.pages.iter_mut().zip(&written.runs) {
            pages.values_mut().for_each(|seen| *seen <<= 1);
            for run in runs {
                let part = PageRange::with_len(run.start, run.len().min(left));
                left -= part.len();
                (part.start..part.end).for_each(|page| *pages.entry(page).or_default() |= 1);
            }
            pages.retain(|_, seen| *seen != 0);
        }
        Ok(())
    }

    /// The pages that the next VM is likely to write, at most `most`: the pages in most sets, and
    /// among these the most recently written first.
    #[must_use]
    pub fn likely(&self, most: u64) -> PageSet {
        let mut likely: Vec<(u32, u8, usize, u64)> = Vec::new();
        for (region, pages) in self.pages.iter().enumerate() {
            let seen = pages.iter().map(|(page, seen)| (seen.count_ones(), seen.reverse_bits(), region, *page));
            likely.extend(seen.filter(|(count, ..)| 2 * count >= self.sets));
        }
        likely.sort_unstable_by_key(|&(count, last, region, page)| (std::cmp::Reverse((count, last)), region, page));
        likely.truncate(usize::try_from(most).unwrap_or(usize::MAX));
        likely.sort_unstable_by_key(|&(_, _, region, page)| (region, page));
        let mut runs = vec![Vec::new(); self.pages.len()];
        likely.iter().for_each(|&(_, _, region, page)| push_run(&mut runs[region], PageRange::with_len(page, 1)));
        PageSet { runs }
    }

    /// Number of sets recorded, as far as they are remembered.
    #[must_use]
    pub fn sets(&self) -> u32 {
        self.sets
    }
}

#[cfg(test)]
mod tests;
