//! Disks: files that are cloned in constant time with the VM they belong to.
//!
//! A disk is a [`map`] from ranges of 4 KiB clusters to files in which every cluster stands at its own offset. Reads
//! follow the map; writes go to the one file that is this VM's to write, its *own*. At a fork that file becomes
//! read-only for everybody who has it in a map: the map is cloned, which is one pointer, and the next write of either
//! side makes an unnamed overlay of its own. docs/devices.md has the reasons; in short:
//!
//! - A write of whole clusters goes to the own file and then into the map. A write of part of a cluster that is not the own file's reads the
//!   rest of it first, alone with the cluster ([`locks`]).
//! - The map changes when the write is done, so a fork in the middle of it finds the old cluster, and the child's device does the
//!   request again.
//!
//! | to learn about | read |
//! |---|---|
//! | the map | `map.rs` |
//! | taking requests, and saying when they are done | `live.rs` |
//! | their steps | `job.rs`, `steps.rs` |
//! | forking, commit, export | `image.rs` |
//! | what of a forked disk survives the process | `journal/` |
//! | the same where the file system has reflinks | `shadow.rs` |
//! | flushes, and overlays that go back into the image | `flush.rs` |
//! | keeping overlays few | `compact.rs` |
//! | what a snapshot writes, and a disk made of it again | `layers.rs` |

mod compact;
mod directory;
mod durability;
mod flush;
mod image;
mod job;
mod journal;
mod layers;
mod live;
mod locks;
mod map;
mod op;
mod overlay_chain;
mod request_table;
mod shadow;
mod steps;
mod steps_trace;
#[cfg(test)]
mod testutil;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_io::{CachePolicy, EngineError, Failure, FileError, OpenError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use image::{CommitError, CommitReport, DiskImage};
pub use journal::{DiskJournal, JournalError, JournalId, JournalState, Report as JournalReport};
pub use layers::{DiskLayer, DiskRun};
pub use live::Disk;
pub use map::CLUSTER;
pub use op::{DiskDone, DiskHealth, DiskOp};

/// Bytes in a sector, the unit of virtio-blk.
pub const SECTOR: u64 = 512;

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Whether what the guest writes goes with its VM. The image is only read, and several VMs may have it.
    #[serde(default)]
    pub ephemeral: bool,
    /// What the guest is told when it asks for the disk's id; the path's last component if not given. Cut to 20 bytes.
    pub id: Option<String>,
    /// Whether transfers go through the host's page cache.
    pub cache: CachePolicy,
    /// Where overlays are made. If not given: beside the image, or in the temporary directory for a block device.
    pub overlays: Option<PathBuf>,
    /// Makes every transfer late by as much, to try things with.
    pub latency: Option<Duration>,
}

impl DiskConfig {
    /// A writable disk on `path`, everything else as usual.
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

/// What a disk refuses, and what can go wrong with it.
#[derive(Debug, Error)]
pub enum DiskError {
    /// See [`OpenError`].
    #[error(transparent)]
    Open(#[from] OpenError),
    /// See [`FileError`].
    #[error(transparent)]
    File(#[from] FileError),
    /// A file without a sector.
    #[error("{} has {bytes} bytes: a disk has at least one sector of 512", path.display())]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The journal that was left beside an image cannot be used. The image is as it was.
    #[error(
        "{} is not put into its image: see `clade disk show`, then `clade disk apply` or `clade disk discard`",
        path.display()
    )]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Why not.
        #[source]
        source: JournalError,
    },
    /// The image says that it has a journal, which is not beside it.
    #[error(
        "{} has a journal of id {id}, which is not at {}{}: put it there, or give it up with `clade disk discard`",
        image.display(), journal.display(), found.as_ref().map_or_else(String::new, |at| format!(" but at {}", at.display()))
    )]
    JournalMissing {
        /// The image.
        image: PathBuf,
        /// Where the journal should be.
        journal: PathBuf,
        /// Its id.
        id: JournalId,
        /// Where it is, if it is in the same directory.
        found: Option<PathBuf>,
    },
    /// The image got another file's name while it was opened.
    #[error("{} was replaced while it was opened: try again", path.display())]
    Replaced {
        /// The image.
        path: PathBuf,
    },
    /// No overlay can be made.
    #[error("{} cannot have overlays in {}: name another directory with overlays=", disk.display(), dir.display())]
    Overlays {
        /// The disk.
        disk: PathBuf,
        /// Where they were to be.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: FileError,
    },
    /// An earlier flush of the image failed.
    #[error("a write to {} was lost in an earlier flush: no later one makes it durable", path.display())]
    Lost {
        /// The image.
        path: PathBuf,
    },
    /// Not on the disk.
    #[error("{len} bytes at {offset:#x} are not on a disk of {size:#x} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The disk's size.
        size: u64,
    },
    /// A size no disk has.
    #[error("a disk of {size:#x} bytes: a disk has at least one sector of 512, and whole ones")]
    Size {
        /// The size.
        size: u64,
    },
    /// A file of a snapshot that somebody might write.
    #[error("{} is open for writing: what a disk was written down in is only read", path.display())]
    WritableLayer {
        /// Which.
        path: PathBuf,
    },
    /// A run of a layer that is not on the disk, or not in its file.
    #[error("the layer in {} has clusters {start:#x} to {end:#x}; there are {clusters:#x}", path.display())]
    LayerRun {
        /// The layer's file; the disk's own path for zeros.
        path: PathBuf,
        /// The run's first cluster.
        start: u64,
        /// The cluster after its last one.
        end: u64,
        /// How many there can be.
        clusters: u64,
    },
    /// Data without a file to be in.
    #[error("a layer of {} has data in clusters {start:#x} to {end:#x} and no file", path.display())]
    NoLayerFile {
        /// The disk's path.
        path: PathBuf,
        /// The run's first cluster.
        start: u64,
        /// The cluster after its last one.
        end: u64,
    },
    /// A read of what is still being written.
    #[error("writes to {} were in flight when the disk was forked, and have not ended", path.display())]
    Unsettled {
        /// The file; the directory of an overlay.
        path: PathBuf,
    },
    /// A write to a disk that is read-only.
    #[error("{} is read-only", path.display())]
    ReadOnly {
        /// Which.
        path: PathBuf,
    },
    /// A transfer failed.
    #[error(transparent)]
    Transfer(#[from] Failure),
    /// See [`EngineError`].
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No eventfd.
    #[error("no eventfd for a disk")]
    Event(#[source] io::Error),
}

impl DiskError {
    /// Whether a file system, or a quota, has no room.
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
