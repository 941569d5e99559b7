//! Copies that are made before they are asked for: which pages VMs of one kind write is learned from
//! those that have ended, and the next one gets its own copies of them in bulk.
//!
//! A guest's first write to a shared page costs a fault of the guest, and two if the page was mapped
//! for reading before: the copy takes away what KVM has just looked up. A copy in bulk costs a
//! fraction of that, and KVM then maps several neighbours at one fault.
//!
//! ```text
//!   child ends ── GuestRam::written_set ──► Learned::record
//!                                                │
//!   next child ◄── GuestRam::copy_ahead ◄── Learned::likely
//! ```
//!
//! A copy ahead changes no contents and needs no proof: it is what the kernel does at a write, done
//! earlier. So a set that is wrong costs time and memory, and nothing else (I5).

use std::collections::BTreeMap;

use thiserror::Error;

use crate::ram::RamLayout;
use crate::units::{PageRange, pages_in, push_run, subtract_runs};

/// Runs that a set has at most, over all regions.
const MAX_RUNS: usize = 65_536;
/// Pages that are learned of one set at most: 256 MiB. The others are left out.
const MAX_LEARNED: u64 = 65_536;
/// Sets that are remembered, one bit of a page's record each.
const REMEMBERED: u32 = u8::BITS;

/// A set of pages that does not fit the guest it is for.
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

/// Pages of a guest: runs by region, ascending and apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    runs: Vec<Vec<PageRange>>,
}

impl PageSet {
    /// The pages `runs`, by region, of a guest of this shape.
    ///
    /// # Errors
    /// When they do not fit it, are not ascending, or are too many.
    pub fn new(layout: &RamLayout, runs: Vec<Vec<PageRange>>) -> Result<Self, PageSetError> {
        let given = runs.iter().map(Vec::len).sum();
        if given > MAX_RUNS {
            return Err(PageSetError::TooManyRuns { given });
        }
        let set = Self { runs };
        set.expect_fits(layout)?;
        Ok(set)
    }

    /// Of what this process has found itself.
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

    /// Its runs, by region.
    #[must_use]
    pub fn runs(&self) -> &[Vec<PageRange>] {
        &self.runs
    }

    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|runs| pages_in(runs)).sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.iter().all(Vec::is_empty)
    }

    /// With the runs of a region before those it has.
    pub(crate) fn insert_first(&mut self, runs: Vec<PageRange>) {
        self.runs.insert(0, runs);
    }

    /// Its first `most` pages.
    pub(crate) fn first(&self, most: u64) -> Self {
        let mut left = most;
        let mut cut = |run: &PageRange| {
            let part = PageRange::with_len(run.start, run.len().min(left));
            left -= part.len();
            (!part.is_empty()).then_some(part)
        };
        Self { runs: self.runs.iter().map(|runs| runs.iter().filter_map(&mut cut).collect()).collect() }
    }

    /// Those of it that `other`, of the same guest, has not.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let others = other.runs.iter().map(Vec::as_slice).chain(std::iter::repeat([].as_slice()));
        Self { runs: self.runs.iter().zip(others).map(|(runs, other)| subtract_runs(runs, other)).collect() }
    }
}

/// What came of the pages that were copied ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AheadUse {
    /// Copied ahead since the VM was made, reset, frozen or suspended last.
    pub copied: u64,
    /// Of these, written since: a fault less each. A page that was written with the bytes it had is
    /// not among them.
    pub hits: u64,
    /// Of these, still as they were copied: memory and time for nothing. What is neither has been
    /// given back since.
    pub waste: u64,
}

impl std::ops::AddAssign for AheadUse {
    fn add_assign(&mut self, other: Self) {
        self.copied += other.copied;
        self.hits += other.hits;
        self.waste += other.waste;
    }
}

/// What the VMs of one kind write: the children of a checkpoint, or one VM between its resets.
///
/// The last eight sets are remembered. A page is likely to be written if half of them have it, so
/// what is written no more is forgotten after five.
#[derive(Clone, Debug)]
pub struct Learned {
    layout: RamLayout,
    /// Sets that were recorded, as far as they are remembered.
    sets: u32,
    /// By region and page: which of the last sets have it. The lowest bit is the last one's.
    pages: Vec<BTreeMap<u64, u8>>,
}

impl Learned {
    /// Nothing yet, of guests of this shape.
    #[must_use]
    pub fn new(layout: &RamLayout) -> Self {
        Self { layout: layout.clone(), sets: 0, pages: vec![BTreeMap::new(); layout.ranges().len()] }
    }

    /// Takes note of what one of them has written.
    ///
    /// # Errors
    /// When the set is of a guest of another shape. Then nothing is noted.
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

    /// The pages that the next one is likely to write, `most` at most: what most have written, and
    /// of that what was written last, first.
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

    /// Sets that were recorded, as far as they are remembered.
    #[must_use]
    pub fn sets(&self) -> u32 {
        self.sets
    }
}

#[cfg(test)]
mod tests;
