//! Maps the model's page numbers, which count over both regions, to regions.

use std::sync::Arc;

use clade_memory::{GuestRam, GuestRegion, PAGE_SIZE, PageRange, RamLayout};
use vm_memory::GuestAddress;

/// Pages of the second region.
const HIGH_PAGES: u64 = 40;
/// Start of the second region, behind a gap.
const HIGH_START: u64 = 1 << 32;

pub(crate) fn layout(pages: u64) -> RamLayout {
    let low = pages - HIGH_PAGES;
    RamLayout::of_ranges(&[(GuestAddress(0), low), (GuestAddress(HIGH_START), HIGH_PAGES)]).unwrap()
}

/// Address of `page` in a memory of `pages` pages.
pub(crate) fn address(page: u64, pages: u64) -> GuestAddress {
    let high = page.checked_sub(pages - HIGH_PAGES);
    GuestAddress(high.map_or(page * PAGE_SIZE, |high| HIGH_START + high * PAGE_SIZE))
}

/// The part of a range in one region.
pub(crate) struct Part<'r> {
    pub(crate) region: &'r Arc<GuestRegion>,
    /// The region's first page, counted over both.
    pub(crate) first: u64,
    /// Page range in the region.
    pub(crate) range: PageRange,
    /// Page range counted over both regions.
    pub(crate) pages: PageRange,
}

impl Part<'_> {
    /// The pages that its VM owns, counted over both regions.
    pub(crate) fn own(&self) -> impl Iterator<Item = u64> {
        let table = self.region.ownership();
        (self.pages.start()..self.pages.end()).filter(|page| table.get(page - self.first).0)
    }
}

/// `pages` region by region.
pub(crate) fn parts(ram: &GuestRam, pages: PageRange) -> Vec<Part<'_>> {
    let (mut first, mut out) = (0, Vec::new());
    for region in ram.regions() {
        let of = pages.intersect(PageRange::with_len(first, region.pages()));
        if !of.is_empty() {
            let range = PageRange::with_len(of.start() - first, of.len());
            out.push(Part { region, first, range, pages: of });
        }
        first += region.pages();
    }
    out
}
