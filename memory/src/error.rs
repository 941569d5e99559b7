//! What guest memory can refuse.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use crate::budget::BudgetError;
use crate::freeze::background::{BackgroundError, FillError};
use crate::store::StoreError;
use crate::units::PageRange;

/// An operation on guest memory that was refused or failed. The VM it was asked of is as it was
/// (I13).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// No memory at all was asked for.
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
    /// A range of guest memory that cannot be.
    #[error(
        "{pages} pages at {start:#x} cannot be a range of guest memory: ranges are ascending, disjoint and whole pages"
    )]
    Range {
        /// Its guest physical address.
        start: u64,
        /// Its length.
        pages: u64,
    },
    /// An image was to be made of maps that do not fit it.
    #[error("maps that do not fit the guest: {what}")]
    Parts {
        /// What does not.
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
        /// Of the region.
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
        /// How many.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What a VM owns could not be written to the file it was to be suspended to.
    #[error("{pages} pages could not be written to the file of a suspended VM")]
    Suspend {
        /// How many were to be.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer's file could not be opened again for reading.
    #[error("a layer's file could not be opened for another process")]
    Reopen(#[source] io::Error),
    /// Memory is already there.
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
        /// Asked for.
        range: PageRange,
        /// Size of the region.
        pages: u64,
    },
    /// Pages that may not be moved or dropped, because a device was promised them.
    #[error("{pages} pages are pinned for DMA, the first of them at {first}")]
    Pinned {
        /// How many.
        pages: u64,
        /// The first run.
        first: PageRange,
    },
    /// A reset failed half-way: the memory is neither what it was nor what it was to be. Another
    /// reset mends it.
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
    /// A freeze in the background failed; what depends on its layer is lost, and refused.
    #[error("memory that a background freeze was still copying is lost")]
    Lost(#[source] Arc<FillError>),
    /// See [`BackgroundError`].
    #[error("no freeze in the background")]
    Background(#[from] BackgroundError),
    /// See [`BudgetError`].
    #[error("too many memory mappings")]
    Budget(#[from] BudgetError),
    /// See [`StoreError`].
    #[error("no memory for a layer")]
    Store(#[from] StoreError),
}
