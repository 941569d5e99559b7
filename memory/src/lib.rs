//! Guest memory that a running VM can be forked from.
//!
//! A VM's memory is one reservation of host addresses per guest-physical region, mapped over *layers*: immutable, shared
//! sets of pages in memory files. The crate knows for every page whether its VM **owns it outright** (the exclusive bit),
//! and how often it is pinned for DMA; a page is made the VM's own *before* a device is given its address, so that sharing memory never
//! moves it from under the device.
//!
//! | to learn about | read |
//! |---|---|
//! | the whole of a VM's memory | [`GuestRam`] |
//! | the bit and the count | [`word`](crate) in `word.rs`, [`OwnershipTable`] |
//! | how memory becomes shared | `freeze.rs`; without waiting for the copies, `background.rs` |
//! | how a child gets it | `adopt.rs` |
//! | DMA | [`DmaPin`] |
//! | how layers stay few, and are given back | `compact.rs`, `sweep.rs`, `view.rs` |
//! | what a snapshot on a disk is made of | `parts.rs` |
//! | how it is tested | `fault.rs`, `sabotage.rs`, `tests/` |
//!
//! The crate knows no KVM and needs no `/dev/kvm` to be tested. What it does not do: it does not stop writers (see
//! [`Quiesced`]), it does not handle page faults (the kernel's private mappings copy on write), and it writes to disk only what is evicted.

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

mod adopt;
mod background;
mod budget;
mod check;
mod compact;
#[cfg(test)]
#[path = "../tests/dma/mod.rs"]
mod dma;
mod error;
mod evict;
mod fault;
mod freeze;
mod grace;
mod handle;
mod interval;
mod layer;
mod mappings;
mod nofork;
mod ownership;
mod parts;
mod pin;
mod pool;
mod protect;
mod ram;
mod reclaim;
mod reference;
mod region;
mod reset;
mod sabotage;
#[cfg(all(test, shuttle))]
mod schedules;
mod stats;
mod store;
mod sweep;
mod sync;
mod sys;
#[cfg(feature = "trace")]
mod trace;
#[cfg(not(feature = "trace"))]
#[path = "trace/off.rs"]
mod trace;
mod units;
mod view;
mod word;

pub use background::{BackgroundError, FillError};
pub use budget::{BudgetError, MappingBudget};
pub use check::CheckError;
pub use compact::CompactReport;
pub use error::RamError;
pub use evict::Evicted;
pub use freeze::{FreezeMode, FreezeReport};
pub use handle::{ImageMap, LayerHandle, LayerSource};
pub use interval::{IntervalMap, Piece};
pub use layer::LayerId;
pub use nofork::NoFork;
pub use ownership::{OwnershipTable, TableCounts, TableGuard};
pub use parts::LayerBuilder;
pub use pin::{Access, DmaPin, PinError, PinInfo, PinLifetime};
pub use ram::{GAP_END, GAP_START, GuestMemory, GuestRam, NoWriters, Quiesced, RamImage, RamLayout, StopsWriters};
pub use reference::{Discarded, Pattern, RefPage};
pub use region::GuestRegion;
pub use reset::ResetReport;
pub use stats::RamStats;
pub use store::{Backing, Store, StoreError};
pub use sweep::Swept;
pub use units::{BLOCK_PAGES, BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageRange};
pub use word::MAX_PINS;

/// The example of the crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
