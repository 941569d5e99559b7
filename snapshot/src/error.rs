//! What a snapshot can refuse.

use std::io;
use std::path::PathBuf;

use clade_memory::RamError;
use thiserror::Error;

use crate::format::{Damage, SnapshotId};

/// A snapshot that could not be written or used. One that was there before is as it was.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// ENOSPC, EDQUOT.
    #[error("no space left for {}", path.display())]
    Full {
        /// What was being written.
        path: PathBuf,
        /// As the kernel said it.
        #[source]
        source: io::Error,
    },
    /// An operation on a file failed.
    #[error("{} could not be {what}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something else has a file's name.
    #[error("{} is {found}, not a file of a snapshot", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// A file is not what was written there.
    #[error("{} is damaged, or not of this format", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In which way.
        #[source]
        damage: Damage,
    },
    /// Something else is where the snapshot was to be.
    #[error("{} is there and is not a snapshot: it has {found}", path.display())]
    NotASnapshot {
        /// The directory.
        path: PathBuf,
        /// What a snapshot has not, or lacks.
        found: String,
    },
    /// Another snapshot depends on the one that is to be replaced.
    #[error("{} is what {} depends on; --replace replaces it all the same, and that one is lost", path.display(), by.display())]
    Needed {
        /// The directory.
        path: PathBuf,
        /// The snapshot that depends on it.
        by: PathBuf,
    },
    /// Another save or merge has the directory just now.
    #[error("{} has been locked by another for {seconds} s", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A parent cannot be used.
    #[error("{} depends on {}, which cannot be used", path.display(), parent.display())]
    Parent {
        /// The snapshot.
        path: PathBuf,
        /// Where its parent should be.
        parent: PathBuf,
        /// What is wrong there.
        #[source]
        source: Box<Error>,
    },
    /// Another snapshot is where one was expected.
    #[error("{} is snapshot {found}, where {wanted} was expected", path.display())]
    WrongId {
        /// The directory.
        path: PathBuf,
        /// Which one it should be.
        wanted: SnapshotId,
        /// Which one it is.
        found: SnapshotId,
    },
    /// A chain that leads back to itself.
    #[error("{} is its own ancestor: snapshot {id} comes twice in the chain", path.display())]
    Cycle {
        /// Where it comes the second time.
        path: PathBuf,
        /// Which one.
        id: SnapshotId,
    },
    /// Too many ancestors.
    #[error("the chain of {} is more than {most} snapshots long: compact one of them", path.display())]
    TooDeep {
        /// The newest.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// Parent and child are not of one VM.
    #[error("{}: {what}", path.display())]
    Shape {
        /// The snapshot.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// An incremental snapshot would replace what it depends on.
    #[error("{} is part of the chain that the incremental snapshot would depend on", path.display())]
    OwnChain {
        /// The target.
        path: PathBuf,
    },
    /// A path that cannot be written down.
    #[error("the path {path:?} is not text, or has no last component, so it cannot be that of a snapshot")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// What was to be saved is not all there.
    #[error("page {page:#x} of {name} is neither data nor zeros: a full snapshot needs all of it")]
    Incomplete {
        /// Memory, or which disk.
        name: String,
        /// The first that is missing.
        page: u64,
    },
    /// Runs that are not ascending, disjoint and within their space.
    #[error("what was to be saved of {name} goes wrong at page {page:#x} of {pages:#x}")]
    Runs {
        /// Memory, or which disk.
        name: String,
        /// Where.
        page: u64,
        /// Pages there are.
        pages: u64,
    },
    /// What was to be saved could not be read.
    #[error("{name} could not be read at page {page:#x}")]
    Space {
        /// Memory, or which disk.
        name: String,
        /// Where.
        page: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two sections, or two disks, of one name.
    #[error("the name {name:?} is given twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// Guest memory would not.
    #[error("guest memory cannot be saved or restored")]
    Memory(#[from] RamError),
    /// Made on another kind of machine.
    #[error("{} was made on {theirs}; this is {ours}", path.display())]
    Machine {
        /// The snapshot.
        path: PathBuf,
        /// Its architecture.
        theirs: String,
        /// This one.
        ours: &'static str,
    },
    /// The caller changed its mind.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// Damage found in `path`.
    pub(crate) fn damaged(path: impl Into<PathBuf>, damage: Damage) -> Self {
        Self::Damaged { path: path.into(), damage }
    }

    /// A failed operation on `path`.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path, source },
            _ => Self::File { what, path, source },
        }
    }
}
