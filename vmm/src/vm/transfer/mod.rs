//! Images between processes: what a fork of one process starts in another.
//!
//! | file | what |
//! |---|---|
//! | `parts` | an image as bytes and descriptors, and back |
//! | `lease` | how the process that gave an image away knows that it is in use |
//! | `socket` | bytes and descriptors over a Unix socket |
//!
//! The receiver maps the same layers as a child in the giver's process would, and writes to copies
//! of its own. It gets each file open for reading only.
//!
//! **Nothing that another process can see is written, punched or used again.** The giver holds the
//! image until the last receiver has let go of it. The receiver may give it on, and it outlives the
//! giver: files live by their descriptors.

mod lease;
mod parts;
mod socket;

use std::io;
use std::path::PathBuf;

use clade_devices::disk::DiskError;
use clade_io::FileError;
use clade_memory::{RamError, StoreError};
use thiserror::Error;

pub use lease::Leases;
#[cfg(feature = "fuzzing")]
pub(crate) use parts::is_memory;
pub use parts::{ImageParts, Overlays, SharedFiles};
pub use socket::SealedParts;

use crate::kvm::HostMismatch;
use crate::vm::persist::SavedError;

/// Why an image did not reach another process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Its memory cannot be given, or not be mapped here.
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
    /// This host lacks something that the guest was booted with.
    #[error(transparent)]
    Host(#[from] HostMismatch),
    /// A descriptor, a file for the state, or the thread that watches leases is not to be had.
    #[error("the image could not be {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
    /// The other process speaks another version.
    #[error("an image of version {found}, this process reads version {wanted}")]
    Version {
        /// The version that came.
        found: u32,
        /// The version of this process.
        wanted: u32,
    },
    /// The bytes are no image.
    #[error("no image: {what}")]
    Malformed {
        /// What is wrong with them.
        what: String,
    },
    /// It is larger than any that this version sends.
    #[error("an image with {found} {what}, {most} at most are read")]
    TooLarge {
        /// What there are too many of.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// The limit.
        most: u64,
    },
}

impl TransferError {
    fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }

    fn malformed(what: impl Into<String>) -> Self {
        Self::Malformed { what: what.into() }
    }
}
