//! Images between processes: a fork in one process starts VMs in another.
//!
//! | file | contents |
//! |---|---|
//! | `detach` | copies of the files that the giver can write |
//! | `parts` | an image as bytes and descriptors, and back |
//! | `received` | received descriptors, and checks of them |
//! | `lease` | tracks whether an image given away is still in use |
//! | `socket` | bytes and descriptors over a Unix socket |
//!
//! The receiver maps the same layers as a child in the giver's process would, and writes to copies
//! of its own. Each file is open for reading only.
//!
//! **Files visible to another process are not written, punched or used again** until it has released them: the
//! giver holds the image until the last receiver has. A compromised one may keep a descriptor
//! (docs/security.md). The receiver may pass it on, and it outlives
//! the giver: files live by their descriptors.

mod detach;
mod lease;
mod parts;
mod received;
mod socket;

use std::io;
use std::path::PathBuf;

use clade_block::DiskError;
use clade_host_io::FileError;
use clade_memory::{RamError, StoreError};
use thiserror::Error;

pub use detach::{CopiedFile, DetachOptions, DetachReport, ImageFile, KnownCopy};
pub use lease::Leases;
#[cfg(feature = "fuzzing")]
pub(crate) use parts::is_memory;
pub use parts::{ImageParts, Overlays, SharedFiles};
pub use received::{FileId, file_id_at};
pub use socket::SealedParts;

use crate::kvm::HostMismatch;
use crate::vm::persist::SavedError;

/// Why an image did not reach another process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Its memory cannot be given away, or not be mapped here.
    #[error("the image's memory")]
    Ram(#[from] RamError),
    /// A layer cannot be used here.
    #[error("a layer of the image's memory")]
    Layer(#[from] StoreError),
    /// A disk cannot be used here.
    #[error("a disk of the image")]
    Disk(#[from] DiskError),
    /// A file of a disk cannot be opened again.
    #[error("a disk's file")]
    File(#[from] FileError),
    /// Writes to a disk that were in flight at the fork do not end.
    #[error("writes to {} that were in flight have not ended", path.display())]
    Unsettled {
        /// The disk's file.
        path: PathBuf,
    },
    /// The state of vCPUs or devices cannot be written or read.
    #[error("the image's state")]
    State(#[from] SavedError),
    /// This host lacks a feature that the guest was booted with.
    #[error(transparent)]
    Host(#[from] HostMismatch),
    /// A descriptor, a file for the state, or the thread that watches leases cannot be made.
    #[error("the image could not be {what}")]
    System {
        /// The operation.
        what: &'static str,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
    /// The other process uses another version.
    #[error("an image of version {found}, this process reads version {wanted}")]
    Version {
        /// The version received.
        found: u32,
        /// The version of this process.
        wanted: u32,
    },
    /// The bytes are not an image.
    #[error("no image: {what}")]
    Malformed {
        /// The fault.
        what: String,
    },
    /// The image exceeds a limit of this version.
    #[error("an image with {found} {what}, {most} at most are read")]
    TooLarge {
        /// The items that exceed it.
        what: &'static str,
        /// Their number.
        found: u64,
        /// The limit.
        most: u64,
    },
}

impl TransferError {
    /// Whether the error means that the host lacks memory, or a disk has no room.
    #[must_use]
    pub fn is_no_room(&self) -> bool {
        let mut causes = std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        matches!(self, Self::Ram(RamError::DetachRoom { .. }))
            || causes.any(|cause| {
                let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
                matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
            })
    }

    fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }

    fn malformed(what: impl Into<String>) -> Self {
        Self::Malformed { what: what.into() }
    }
}
