//! Guest memory that a running VM can be forked from.
//!
//! A VM's memory is one reservation of host addresses per guest-physical region. It is mapped over
//! *layers*: immutable, shared sets of pages in memory files. For every page the crate knows
//! whether its VM **owns it outright** (the exclusive bit) and how often it is pinned for DMA. A
//! page is made the VM's own *before* a device is given its address. So sharing memory never moves
//! it from under the device.
//!
//! | to learn about | read |
//! |---|---|
//! | the memory of one VM, all regions | [`GuestRam`] in `ram.rs` |
//! | the exclusive bit and the pin count | `ownership/`, [`OwnershipTable`] |
//! | one region, and what is mapped where | `region/`, [`GuestRegion`] |
//! | how a pin breaks COW | `region/pin.rs`, [`DmaPin`] |
//! | how memory becomes shared | `freeze/`; which pages are write-protected: `freeze/protect.rs` |
//! | copies after the pause | `freeze/background/` |
//! | how a child maps what it inherits | `fork.rs` |
//! | how layers are kept few, and given back | `layer/`: `compact.rs`, `gc.rs`, `registry.rs` |
//! | what a snapshot on a disk is made of | `layer/builder.rs`, `layer/handle.rs` |
//! | how others read and write it | `access.rs` |
//! | what is copied before it is written | `ahead.rs`, `region/ahead.rs` |
//! | how secrets are kept from a child | `erase.rs` |
//! | how it is tested | `testing/`, `tests/` |
//!
//! The crate knows no KVM and needs no `/dev/kvm` to be tested. It does not stop writers (see
//! [`Quiesced`]). It handles no page faults but those of a background copy: the kernel's private
//! mappings copy on write. It writes to a disk only what is evicted.

#![deny(missing_docs)]

// The devices of the tests are those of the integration tests.
#[cfg(test)]
extern crate self as clade_memory;

/// Logs one linearization point. Nothing at all without the `trace` feature.
macro_rules! trace {
    ($($event:tt)*) => {
        #[cfg(feature = "trace")]
        crate::trace::emit(|| crate::trace::event::Event::$($event)*);
    };
}

mod access;
mod ahead;
mod budget;
mod config;
#[cfg(test)]
#[path = "../tests/dma/mod.rs"]
mod dma;
mod erase;
mod error;
mod fork;
mod freeze;
mod layer;
mod ownership;
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
pub use budget::{BudgetError, MappingBudget};
pub use config::Config;
pub use erase::{EraseError, Erased, MAX_SECRET, MIN_EDGE, MIN_SECRET, check_secret};
pub use error::RamError;
#[cfg(any(test, feature = "hazard"))]
pub use freeze::PinPolicy;
pub use freeze::background::{BackgroundError, FillError};
pub use freeze::{FreezeMode, FreezeReport};
pub use layer::LayerId;
pub use layer::builder::LayerBuilder;
pub use layer::compact::CompactReport;
pub use layer::gc::Swept;
pub use layer::handle::{ImageMap, LayerHandle, LayerSource};
pub use layer::interval::{IntervalMap, Piece};
pub use ownership::word::MAX_PINS;
pub use ownership::{OwnershipTable, TableCounts, TableGuard};
pub use ram::{GAP_END, GAP_START, GuestMemory, GuestRam, NoWriters, Quiesced, RamImage, RamLayout, StopsWriters};
pub use region::GuestRegion;
pub use region::backend::SharedFile;
pub use region::check::CheckError;
pub use region::counts::{CowCounts, PinCounts};
pub use region::evict::Evicted;
pub use region::nofork::NoFork;
pub use region::pages::{LayerPlace, PageKind, PageMap, PageRun, ShownLayer};
pub use region::pin::{Access, DmaPin, PinError, PinInfo, PinLifetime};
pub use region::reference::{Discarded, Pattern, RefPage};
pub use region::reset::ResetReport;
pub use region::stats::RamStats;
pub use region::suspend::{SuspendFile, Suspended, WorkingSet};
pub use region::tracked::TrackedRegion;
pub use store::{Backing, Store, StoreError};
pub use sys::HugeTmpfs;
pub use units::{BLOCK_PAGES, BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageRange};

/// The example of the crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
