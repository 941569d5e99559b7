//! Spaces: what memory and disks have in common, a row of 4 KiB pages.

use std::io;

use clade_memory::{PageRange, RamLayout};

use crate::content::PageContent;
use crate::error::Error;
use crate::format::Run;

/// Memory, or a disk, at one instant, to be saved.
pub trait Space: Sync {
    /// Its length in bytes. The rest of its last page is saved as zeros.
    fn bytes(&self) -> u64;

    /// The pages to save, ascending and disjoint. A full snapshot needs all of them, an incremental
    /// one those that may have changed since the base. A page in no run is *unchanged*, never
    /// zeros.
    ///
    /// # Errors
    /// When the runs cannot be determined.
    fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>>;

    /// Reads pages from `page` on, as many as `bytes` holds. `bytes` is whole pages; the last page
    /// of the space is padded with zeros.
    ///
    /// # Errors
    /// When the pages cannot be read.
    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// Converts runs in each region of a layout to pages of the one space that memory is in a snapshot.
#[must_use]
pub fn linear(layout: &RamLayout, runs: &[Vec<PageRange>]) -> Vec<PageRange> {
    let mut first = 0;
    let mut out = Vec::new();
    for ((_, pages), runs) in layout.ranges().iter().zip(runs) {
        out.extend(runs.iter().map(|run| PageRange::new(first + run.start(), first + run.end())));
        first += pages;
    }
    out
}

/// The runs of a space, after a check.
pub(crate) fn checked_runs(name: &str, space: &dyn Space, full: bool) -> Result<Vec<Run>, Error> {
    let pages = space.bytes().div_ceil(clade_memory::PAGE_SIZE);
    let given = space.runs().map_err(|source| Error::Space { name: name.to_owned(), page: 0, source })?;
    let mut runs = Vec::with_capacity(given.len());
    let mut at = 0;
    for (range, kind) in given {
        if range.start() < at || range.end() > pages {
            return Err(Error::Runs { name: name.to_owned(), page: range.start(), pages });
        }
        if full && range.start() > at {
            return Err(Error::Incomplete { name: name.to_owned(), page: at });
        }
        at = range.end();
        crate::format::push_run(&mut runs, range, kind);
    }
    if full && at < pages {
        return Err(Error::Incomplete { name: name.to_owned(), page: at });
    }
    Ok(runs)
}
