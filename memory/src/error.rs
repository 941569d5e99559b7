//! Errors of guest memory.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use crate::budget::BudgetError;
use crate::freeze::background::BackgroundError;
use crate::lost::FillError;
use crate::store::StoreError;
use crate::units::PageRange;

/// An operation on guest memory that was refused or failed. The VM is unchanged (I13).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// The requested size is zero.
    #[error("a guest needs memory: 0 bytes were asked for")]
    NoMemory,
    /// Not a whole number of pages.
    #[error("guest memory comes in pages of 4096 bytes: {bytes} is not a multiple")]
    NotPageSized {
        /// The size.
        bytes: u64,
    },
    /// Larger than guest physical addresses reach.
    #[error("{bytes} bytes of guest memory are more than the {most} that can be addressed")]
    TooLarge {
        /// The size.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// An invalid range of guest memory.
    #[error(
        "{pages} pages at {start:#x} cannot be a range of guest memory: ranges are ascending, disjoint and whole pages"
    )]
    Range {
        /// Its guest physical address.
        start: u64,
        /// Its length.
        pages: u64,
    },
    /// The maps do not fit the image to be assembled.
    #[error("maps that do not fit the guest: {what}")]
    Parts {
        /// The mismatch.
        what: String,
    },
    /// No address range for a region.
    #[error("no host address range for {pages} pages of guest memory")]
    Reserve {
        /// Its size.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mapping failed.
    #[error("{range} could not be mapped")]
    Map {
        /// Range in the region.
        range: PageRange,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Finding the pages a VM owns failed.
    #[error("the pages that the guest owns could not be listed")]
    Harvest(#[source] io::Error),
    /// Copying pages into a layer, or out of one, failed.
    #[error("{pages} pages could not be copied")]
    Copy {
        /// Number of pages.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A VM's own pages could not be written to its suspension file.
    #[error("{pages} pages could not be written to the file of a suspended VM")]
    Suspend {
        /// Number of pages.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer's file could not be opened again for reading.
    #[error("a layer's file could not be opened for another process")]
    Reopen(#[source] io::Error),
    /// The region has memory already.
    #[error("the region at {base:#x} already has memory")]
    NotEmpty {
        /// Its guest physical address.
        base: u64,
    },
    /// The region has no memory yet.
    #[error("the region at {base:#x} has no memory yet")]
    Empty {
        /// Its guest physical address.
        base: u64,
    },
    /// Not inside the region.
    #[error("{range} reach beyond the region's {pages} pages")]
    OutOfRange {
        /// Requested range.
        range: PageRange,
        /// Size of the region.
        pages: u64,
    },
    /// Pages that must not be moved or dropped, because a device holds them.
    #[error("{pages} pages are pinned for DMA, the first of them at {first}")]
    Pinned {
        /// Number of pages.
        pages: u64,
        /// The first run.
        first: PageRange,
    },
    /// A reset failed half-way: the memory is neither the old nor the new contents. Another reset
    /// repairs it.
    #[error("the region at {base:#x} was left half reset: it must be reset again before anything else")]
    Inconsistent {
        /// Its guest physical address.
        base: u64,
    },
    /// An image of another shape.
    #[error("an image of {image} bytes does not fit a guest of {guest} bytes")]
    Shape {
        /// Bytes in the image.
        image: u64,
        /// Bytes reserved.
        guest: u64,
    },
    /// A background freeze failed; memory that depends on its layer is lost, and refused.
    #[error("memory that a background freeze was still copying is lost")]
    Lost(#[source] Arc<FillError>),
    /// See [`BackgroundError`].
    #[error("no freeze in the background")]
    Background(#[from] BackgroundError),
    /// See [`BudgetError`].
    #[error("too many memory mappings")]
    Budget(#[from] BudgetError),
    /// The copies of an image's layers need more memory than is available.
    #[error("copying the image takes {pages} pages of memory, and {room} are available")]
    DetachRoom {
        /// Pages of the copies.
        pages: u64,
        /// Pages available.
        room: u64,
    },
    /// See [`StoreError`].
    #[error("no memory for a layer")]
    Store(#[from] StoreError),
}
