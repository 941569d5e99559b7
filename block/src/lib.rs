//! Disks: files that are cloned in constant time with the VM they belong to.
//!
//! A disk is a map from ranges of 4 KiB clusters to files. In a file, each cluster stands at its
//! own offset in the disk. Reads follow the map. Writes go to the *active* file, the one file that
//! this VM may write. A fork makes that file read-only for every disk and image that has it in a
//! map. The map is cloned, which copies one pointer. The next write of either side makes an unnamed
//! overlay, its new active file. docs/devices.md has the reasons; in short:
//!
//! - A write of whole clusters goes to the active file and then into the map. A write of part of a
//!   cluster that is in another file reads the rest of the cluster first, and holds the cluster
//!   alone (`locks.rs`).
//! - The map changes when the write is done. A fork in the middle of a write finds the old cluster,
//!   and the child's device repeats the request.
//!
//! | topic | file |
//! |---|---|
//! | the map | `map.rs` |
//! | `Disk`, which keeps its three parts in step | `live.rs` |
//! | the jobs of requests, the clusters they hold, the engine | `request_table.rs`, `locks.rs` |
//! | reads and writes of any length, in pieces | `transfers.rs`, `issue.rs` |
//! | base, overlays and map | `overlay_chain.rs`, `setup.rs` |
//! | journal, new image, and the flush in progress | `durability.rs` |
//! | the steps of a job | `job.rs`, `steps.rs` |
//! | a disk at one instant, and its export | `image.rs` |
//! | commit | `commit.rs` |
//! | the durable part of a forked disk | `journal/` |
//! | the same on a file system with reflinks | `reflink.rs` |
//! | flushes, and folding of overlays into the image | `flush.rs` |
//! | keeping overlays few | `compact.rs`, `relocation.rs` |
//! | the runs that a snapshot writes, and a disk made of them | `layers.rs` |
//! | copies of files that another process can write | `detach.rs` |

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod commit;
mod compact;
mod detach;
mod directory;
mod durability;
mod flush;
mod image;
mod issue;
mod job;
mod journal;
mod layers;
mod live;
mod locks;
mod map;
mod op;
mod overlay_chain;
mod reflink;
mod relocation;
mod request_table;
#[cfg(feature = "schema")]
mod schema;
mod setup;
mod steps;
mod steps_trace;
#[cfg(test)]
mod testutil;
mod transfers;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_host_io::{CachePolicy, EngineError, FileError, OpError, OpenError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use commit::{CommitError, CommitReport};
pub use detach::DetachedDisk;
pub use image::{DiskImage, overlay_dir};
pub use issue::ISSUE_BYTES;
pub use journal::{DiskJournal, JournalError, JournalId, JournalReport, JournalState, journal_path};
pub use layers::{DiskLayer, DiskRun};
pub use live::Disk;
pub use map::CLUSTER;
pub use op::{DiskDone, DiskHealth, DiskOp};
pub use request_table::prepare_engines;
pub use transfers::{MAX_TRANSFER_BYTES, Transfer};

/// Bytes in a sector, the unit of virtio-blk.
pub const SECTOR: u64 = 512;

/// A disk's file and how it is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DiskConfig {
    /// A raw image or a block device.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub path: PathBuf,
    /// Whether the guest may only read the disk.
    pub read_only: bool,
    /// Whether writes end with the VM. The image is opened read-only, and several VMs may use it.
    #[serde(default)]
    pub ephemeral: bool,
    /// The id that the guest reads (VIRTIO_BLK_T_GET_ID), cut to 20 bytes. Default: the last
    /// component of `path`.
    pub id: Option<String>,
    /// Whether transfers go through the host's page cache.
    pub cache: CachePolicy,
    /// The directory of overlays. Default: the image's directory, or the temporary directory for a
    /// block device.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub overlays: Option<PathBuf>,
    /// A delay added to every transfer, for tests.
    #[cfg_attr(feature = "schema", schema(value_type = Option<schema::Time>))]
    pub latency: Option<Duration>,
}

impl DiskConfig {
    /// A writable disk on `path`, with defaults for the rest.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        let path = path.to_owned();
        Self {
            path,
            read_only: false,
            ephemeral: false,
            id: None,
            cache: CachePolicy::Host,
            overlays: None,
            latency: None,
        }
    }
}

/// Why a disk refuses an operation, or fails it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A system call on a file has failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The image is smaller than a sector.
    #[error("{} has {bytes} bytes: a disk has at least one sector of 512", path.display())]
    TooSmall {
        /// The image's path.
        path: PathBuf,
        /// The image's size in bytes.
        bytes: u64,
    },
    /// The journal beside an image cannot be applied. The image is unchanged.
    #[error(
        "{} is not put into its image: see `clade disk show`, then `clade disk apply` or `clade disk discard`",
        path.display()
    )]
    Journal {
        /// The journal's directory.
        path: PathBuf,
        /// Why the journal is refused.
        #[source]
        source: JournalError,
    },
    /// The image's attribute names a journal that is not beside it.
    #[error(
        "{} has a journal of id {id}, which is not at {}{}: put it there, or give it up with `clade disk discard`",
        image.display(), journal.display(), found.as_ref().map_or_else(String::new, |at| format!(" but at {}", at.display()))
    )]
    JournalMissing {
        /// The image's path.
        image: PathBuf,
        /// The path where the journal should be.
        journal: PathBuf,
        /// The journal's id.
        id: JournalId,
        /// The path where the journal is, if it is in the same directory.
        found: Option<PathBuf>,
    },
    /// Another file took the image's name during the open.
    #[error("{} was replaced while it was opened: try again", path.display())]
    Replaced {
        /// The image's path.
        path: PathBuf,
    },
    /// The directory cannot hold overlays.
    #[error("{} cannot have overlays in {}: name another directory with overlays=", disk.display(), dir.display())]
    Overlays {
        /// The image's path.
        disk: PathBuf,
        /// The directory of overlays.
        dir: PathBuf,
        /// The system call that failed.
        #[source]
        source: FileError,
    },
    /// An earlier flush of the image failed.
    #[error("a write to {} was lost in an earlier flush: no later one makes it durable", path.display())]
    Lost {
        /// The image's path.
        path: PathBuf,
    },
    /// A request exceeds the disk.
    #[error("{len} bytes at {offset:#x} are not on a disk of {size:#x} bytes")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Bytes of the request.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// A disk cannot have this size.
    #[error("a disk of {size:#x} bytes: a disk has at least one sector of 512, and whole ones")]
    Size {
        /// The size in bytes.
        size: u64,
    },
    /// A snapshot's file is open for writing.
    #[error("{} is open for writing: a snapshot's file must be read-only", path.display())]
    WritableLayer {
        /// The snapshot's file.
        path: PathBuf,
    },
    /// A run of a layer exceeds the disk, or its file.
    #[error("the layer in {} has clusters {start:#x} to {end:#x}; there are {clusters:#x}", path.display())]
    LayerRun {
        /// The layer's file; the disk's own path for a run of zeros.
        path: PathBuf,
        /// The run's first cluster.
        start: u64,
        /// The cluster after its last one.
        end: u64,
        /// How many clusters the disk, or the file, has.
        clusters: u64,
    },
    /// A layer has a run of data and no file.
    #[error("a layer of {} has data in clusters {start:#x} to {end:#x} and no file", path.display())]
    NoLayerFile {
        /// The disk's path.
        path: PathBuf,
        /// The run's first cluster.
        start: u64,
        /// The cluster after its last one.
        end: u64,
    },
    /// An image is read while writes of its parent are in flight.
    #[error("writes to {} were in flight when the disk was forked, and have not ended", path.display())]
    Unsettled {
        /// The file being written; for an overlay, its directory.
        path: PathBuf,
    },
    /// A write to a disk that is read-only.
    #[error("{} is read-only", path.display())]
    ReadOnly {
        /// The image's path.
        path: PathBuf,
    },
    /// A transfer failed.
    #[error(transparent)]
    Transfer(#[from] OpError),
    /// The caller of [`Disk::issue`] has no memory for a piece.
    #[error("no memory for a piece of a transfer")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The engine cannot be made, or cannot submit.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No eventfd can be made.
    #[error("no eventfd for a disk")]
    Event(#[source] io::Error),
}

impl DiskError {
    /// Whether the error means that a file system or a quota is full.
    fn is_full(&self) -> bool {
        use rustix::io::Errno;
        let errno = match self {
            Self::Transfer(failure) => failure.errno(),
            Self::File(error) => error.source.raw_os_error(),
            _ => None,
        };
        errno.is_some_and(|errno| [Errno::NOSPC, Errno::DQUOT].iter().any(|full| full.raw_os_error() == errno))
    }
}
