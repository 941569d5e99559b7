//! Guest memory that a running VM can be forked from.
//!
//! A VM's memory is one reservation of host addresses per guest-physical region, mapped over
//! *layers*: immutable, shared sets of pages in memory files. For every page the crate knows
//! whether its VM **owns it outright** (the exclusive bit) and how often it is pinned for DMA. A
//! page becomes the VM's own *before* a device gets its address. So sharing memory never moves it
//! from under the device.
//!
//! | topic | place |
//! |---|---|
//! | the memory of one VM, all regions | [`GuestRam`] in `ram/` |
//! | the exclusive bit and the pin count | `ownership/`, [`OwnershipTable`] |
//! | one region and its mappings | `region/`, [`GuestRegion`] |
//! | breaking COW for a pin | `region/pin.rs`, [`DmaPin`] |
//! | sharing memory | `region/freeze.rs`; write protection: `freeze/protect.rs` |
//! | copies after the pause | `freeze/background/` |
//! | mapping a child's inherited memory | `fork.rs` |
//! | sweeping layers | `layer/`: `gc.rs`, `registry.rs` |
//! | merging layers | `region/compact.rs` |
//! | layers for snapshots on disk, copies of images | `image/`, `handle.rs` |
//! | access from outside the guest | `access.rs` |
//! | copies ahead of writes | `ahead.rs`, `region/ahead.rs` |
//! | erasing secrets for a child | `erase.rs` |
//! | tests | `testing/`, `tests/` |
//!
//! The crate does not depend on KVM and its tests do not need `/dev/kvm`. The caller stops writers
//! (see [`Quiesced`]). The crate handles page faults only for background copies, because the
//! kernel's private mappings copy on write. It writes only evicted and suspended pages to disk.

#![deny(missing_docs)]

// Unit tests share device emulation with the integration tests.
#[cfg(test)]
extern crate self as clade_memory;

/// Logs one linearization point. Empty without the `trace` feature.
macro_rules! trace {
    ($($event:tt)*) => {
        #[cfg(feature = "trace")]
        crate::trace::emit(|| crate::trace::event::Event::$($event)*);
    };
}

mod access;
mod ahead;
mod backing;
mod budget;
mod config;
#[cfg(test)]
#[path = "../tests/dma/mod.rs"]
mod dma;
mod erase;
mod error;
mod fork;
mod freeze;
mod handle;
mod image;
mod layer;
mod layout;
mod lost;
mod ownership;
mod quiesce;
mod ram;
mod reclaim;
mod region;
mod store;
mod sync;
mod sys;
mod testing;
#[cfg(feature = "trace")]
mod trace;
#[cfg(not(feature = "trace"))]
#[path = "trace/off.rs"]
mod trace;
mod units;

pub use access::AccessError;
pub use ahead::{AheadUse, Learned, PageSet, PageSetError};
pub use backing::Backing;
pub use budget::{BudgetError, MappingBudget};
pub use config::Config;
pub use erase::{EraseError, Erased, MAX_SECRET, MIN_EDGE, MIN_SECRET, check_secret};
pub use error::RamError;
#[cfg(any(test, feature = "hazard"))]
pub use freeze::PinPolicy;
pub use freeze::background::BackgroundError;
pub use freeze::{FreezeMode, FreezeReport};
pub use handle::{ImageMap, LayerHandle, LayerSource};
pub use image::builder::LayerBuilder;
pub use image::detach::{CopiedRuns, DetachedRam, LayerTreatment, MadeCopy};
pub use layer::LayerId;
pub use layer::gc::Swept;
pub use layer::interval::{IntervalMap, Piece};
pub use layout::{GAP_END, GAP_START, RamLayout};
pub use lost::FillError;
pub use ownership::word::MAX_PINS;
pub use ownership::{OwnershipTable, TableCounts, TableGuard};
pub use quiesce::{NoWriters, Quiesced, StopsWriters};
pub use ram::tracked::TrackedRegion;
pub use ram::{GuestMemory, GuestRam, RamImage};
pub use region::GuestRegion;
pub use region::backend::SharedFile;
pub use region::check::CheckError;
pub use region::compact::CompactReport;
pub use region::counts::{CowCounts, PinCounts};
pub use region::dont_fork::DontFork;
pub use region::evict::Evicted;
pub use region::pages::{LayerPlace, PageKind, PageMap, PageRun, ShownLayer};
pub use region::pin::{Access, DmaPin, PinError, PinInfo, PinLifetime};
pub use region::reference::{Discarded, PagePattern, RefPage};
pub use region::reset::RamResetReport;
pub use region::stats::RamStats;
pub use region::suspend::{SuspendFile, Suspended, TouchedPages};
pub use store::{Store, StoreError};
pub use sys::HugeTmpfs;
pub use units::{BLOCK_PAGES, BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageRange};

/// The example of the crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
