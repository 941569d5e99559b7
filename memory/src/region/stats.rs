//! Exact counts of a VM's pages by kind.

use std::os::fd::AsFd;

use crate::error::RamError;
use crate::layer::LayerStorage;
use crate::region::GuestRegion;
use crate::region::mappings::Mapping;
use crate::sys::allocated;
use crate::units::{PAGE_SIZE, PageRange, pages_in, subtract_runs};

/// Every page of a guest is exactly one of reference, shared and exclusive. Counts are pages unless
/// named KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamStats {
    /// In no layer, or showing a reference page: no cost.
    pub reference: u64,
    /// Provided by a layer.
    pub shared: u64,
    /// This VM's own.
    pub exclusive: u64,
    /// Exclusive pages that are pinned for DMA.
    pub pinned: u64,
    /// Memory freed with this VM: its own copies, and the allocated pages of its base file while
    /// the file is not a layer.
    pub private_kib: u64,
    /// Allocated memory of the shared pages. A layer on a disk has none.
    pub shared_kib: u64,
    /// Number of mappings.
    pub mappings: u64,
    /// Bytes of the ownership table.
    pub table_bytes: u64,
}

impl std::ops::AddAssign for RamStats {
    fn add_assign(&mut self, other: Self) {
        self.reference += other.reference;
        self.shared += other.shared;
        self.exclusive += other.exclusive;
        self.pinned += other.pinned;
        self.private_kib += other.private_kib;
        self.shared_kib += other.shared_kib;
        self.mappings += other.mappings;
        self.table_bytes += other.table_bytes;
    }
}

impl GuestRegion {
    pub(crate) fn stats(&self) -> Result<RamStats, RamError> {
        let state = self.state();
        let mut stats = RamStats { table_bytes: self.table.footprint(), ..RamStats::default() };
        if !self.is_live() {
            return Ok(stats);
        }
        let base = state.space.mappings().base_runs();
        let private = subtract_runs(&[self.range()], &base);
        let owned = self.owned_private(self.range(), &base)?;
        for run in subtract_runs(&private, &owned) {
            for (piece, source) in state.space.map().within(run) {
                if source.layer.id().is_reference() {
                    continue;
                }
                stats.shared += piece.len();
                if matches!(source.layer.storage(), LayerStorage::Memory(_) | LayerStorage::Foreign) {
                    let file = PageRange::with_len(source.at, piece.len());
                    let there = allocated(source.layer.as_fd(), file).map_err(RamError::Harvest)?;
                    stats.shared_kib += pages_in(&there) * (PAGE_SIZE / 1024);
                }
            }
        }
        stats.exclusive = pages_in(&base) + pages_in(&owned);
        stats.reference = self.pages() - stats.exclusive - stats.shared;
        stats.pinned = self.table.counts(self.range()).pinned;
        stats.mappings = state.space.mappings().len() as u64;
        let mut own_pages = pages_in(&owned);
        for (range, mapping) in state.space.mappings().iter() {
            if let Mapping::SharedBase(source) = mapping {
                let file = PageRange::with_len(source.at, range.len());
                own_pages += pages_in(&allocated(source.layer.as_fd(), file).map_err(RamError::Harvest)?);
            }
        }
        stats.private_kib = own_pages * (PAGE_SIZE / 1024);
        Ok(stats)
    }
}
