//! Errors of snapshots.

use std::io;
use std::path::PathBuf;

use clade_memory::RamError;
use thiserror::Error;

use crate::format::{Damage, SnapshotId};

/// The reason why a snapshot cannot be written or used. An existing snapshot is unchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A file system or a quota is full (ENOSPC, EDQUOT).
    #[error("no space left for {}", path.display())]
    Full {
        /// The file being written.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// An operation on a file failed.
    #[error("{} could not be {what}", path.display())]
    File {
        /// The operation, as a participle: "opened", "synced".
        what: &'static str,
        /// The file's path.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A name of the snapshot is not a regular file's.
    #[error("{} is {found}, not a file of a snapshot", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// The kind of file that is there.
        found: &'static str,
    },
    /// A file's content differs from the content written.
    #[error("{} is damaged, or not of this format", path.display())]
    Damaged {
        /// The file's path.
        path: PathBuf,
        /// The damage.
        #[source]
        damage: Damage,
    },
    /// The target directory is not a snapshot.
    #[error("{} is there and is not a snapshot: it has {found}", path.display())]
    NotASnapshot {
        /// The directory's path.
        path: PathBuf,
        /// Contents of the directory, or the missing part, in words.
        found: String,
    },
    /// Another snapshot depends on the one to be replaced.
    #[error("{} is what {} depends on; --replace replaces it all the same, and that one is lost", path.display(), by.display())]
    Needed {
        /// The directory of the one to be replaced.
        path: PathBuf,
        /// The directory of the dependent.
        by: PathBuf,
    },
    /// Another save or merge holds the lock.
    #[error("{} has been locked by another for {seconds} s", path.display())]
    Locked {
        /// The locked directory.
        path: PathBuf,
        /// How long the lock was waited for, in seconds.
        seconds: u64,
    },
    /// A parent cannot be used.
    #[error("{} depends on {}, which cannot be used", path.display(), parent.display())]
    Parent {
        /// The snapshot's directory.
        path: PathBuf,
        /// The parent's directory.
        parent: PathBuf,
        /// Why the parent cannot be used.
        #[source]
        source: Box<Error>,
    },
    /// A parent is in a directory that is not allowed for parents.
    #[error(
        "{} is neither in {}, which holds the snapshot, nor beneath an allowed directory of parents: if it is trusted, \
         allow it with --parents DIR",
        path.display(), beside.display()
    )]
    Elsewhere {
        /// The parent's directory.
        path: PathBuf,
        /// The directory that holds the opened snapshot.
        beside: PathBuf,
    },
    /// A directory that was checked is another by now.
    #[error("{} is not the directory that was checked: its path has changed since", path.display())]
    Exchanged {
        /// The path.
        path: PathBuf,
    },
    /// A directory has another snapshot than expected.
    #[error("{} is snapshot {found}, where {wanted} was expected", path.display())]
    WrongId {
        /// The directory.
        path: PathBuf,
        /// The expected identity.
        wanted: SnapshotId,
        /// The identity found.
        found: SnapshotId,
    },
    /// A chain contains a snapshot twice.
    #[error("{} is its own ancestor: snapshot {id} comes twice in the chain", path.display())]
    Cycle {
        /// The directory of the second occurrence.
        path: PathBuf,
        /// The snapshot's identity.
        id: SnapshotId,
    },
    /// A chain has too many snapshots.
    #[error("the chain of {} is more than {most} snapshots long: compact one of them", path.display())]
    TooDeep {
        /// The newest snapshot's directory.
        path: PathBuf,
        /// The most snapshots allowed.
        most: usize,
    },
    /// A snapshot and its parent are not of one VM.
    #[error("{}: {what}", path.display())]
    Shape {
        /// The snapshot's directory.
        path: PathBuf,
        /// The difference between them.
        what: String,
    },
    /// An incremental snapshot would replace one that it depends on.
    #[error("{} is part of the chain that the incremental snapshot would depend on", path.display())]
    OwnChain {
        /// The target directory.
        path: PathBuf,
    },
    /// A path is not UTF-8, or has no last component.
    #[error("the path {path:?} is not text, or has no last component, so it cannot be that of a snapshot")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// A full save does not have all pages.
    #[error("page {page:#x} of {name} is neither data nor zeros: a full snapshot needs all of it")]
    Incomplete {
        /// `memory`, or the disk's name.
        name: String,
        /// The first missing page.
        page: u64,
    },
    /// Runs are not ascending, overlap, or leave their space.
    #[error("invalid runs of {name} to save: page {page:#x} of {pages:#x}")]
    Runs {
        /// `memory`, or the disk's name.
        name: String,
        /// The first page of the wrong run.
        page: u64,
        /// Pages in the space.
        pages: u64,
    },
    /// A space to be saved cannot be read.
    #[error("{name} could not be read at page {page:#x}")]
    Space {
        /// `memory`, or the disk's name.
        name: String,
        /// The first page that cannot be read.
        page: u64,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// Two sections, or two disks, have one name.
    #[error("the name {name:?} is given twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// Guest memory cannot be read or made.
    #[error("guest memory cannot be saved or restored")]
    Memory(#[from] RamError),
    /// The snapshot was made on another architecture.
    #[error("{} was made on {theirs}; this is {ours}", path.display())]
    Machine {
        /// The snapshot's directory.
        path: PathBuf,
        /// The snapshot's architecture.
        theirs: String,
        /// This host's architecture.
        ours: &'static str,
    },
    /// The caller has cancelled the operation.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// The error for damage in `path`.
    pub(crate) fn damaged(path: impl Into<PathBuf>, damage: Damage) -> Self {
        Self::Damaged { path: path.into(), damage }
    }

    /// The error for a failed operation on `path`.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path, source },
            _ => Self::File { what, path, source },
        }
    }
}
