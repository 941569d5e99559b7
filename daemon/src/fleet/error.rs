//! What the fleet refuses.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::dir::{LONGEST_NAME, LONGEST_SOCKET_PATH};
use super::room::RoomError;
use clade_vmm::vm::{SnapshotError, VmError};

/// Most children one request may make.
pub const MAX_CHILDREN: usize = 10_000;

/// Why a fork made no children although it could have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CancelReason {
    /// The connection that asked for it is closed.
    #[error("who asked has gone")]
    ClientGone,
    /// The parent was stopped.
    #[error("the parent has stopped")]
    ParentStopped,
    /// The process ends.
    #[error("the process is ending")]
    Ending,
}

/// What the fleet refuses.
#[derive(Debug, Error)]
pub enum FleetError {
    /// Not a name.
    #[error(
        "{name:?} is not a name: 1 to {LONGEST_NAME} letters, digits, '-', '_' or '.', starting with a letter or digit"
    )]
    BadName {
        /// The name given.
        name: String,
    },
    /// Another VM has it.
    #[error("the name {name:?} is taken by a running VM")]
    Taken {
        /// The name.
        name: String,
    },
    /// No VM of this process has the name.
    #[error("there is no VM {name:?}")]
    NoSuchVm {
        /// The name.
        name: String,
    },
    /// A pattern that makes all names equal.
    #[error("{pattern:?} names every child the same: {{n}} stands for the child's number")]
    Pattern {
        /// The pattern given.
        pattern: String,
    },
    /// Too many children, or none.
    #[error("{count} children: one fork makes 1 to {MAX_CHILDREN}")]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// The host has no room for all of them.
    #[error("{count} children do not fit")]
    Room {
        /// How many were asked for.
        count: usize,
        /// What there is too little of.
        #[source]
        source: RoomError,
    },
    /// Broken off; none of the children is left.
    #[error("cancelled after {made} of {count} children: {reason}")]
    Cancelled {
        /// How many had been made.
        made: usize,
        /// How many were asked for.
        count: usize,
        /// Why.
        reason: CancelReason,
    },
    /// No VM is made any more.
    #[error("the process is ending")]
    Ending,
    /// Stopped, but something still holds what it had.
    #[error("{name} has stopped, but its devices are not released after {seconds} s")]
    Unreleased {
        /// The VM's name.
        name: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A socket's path is longer than the kernel takes.
    #[error("the socket {} has a path of {length} bytes; {LONGEST_SOCKET_PATH} is the limit", path.display())]
    LongPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// The runtime directory is a link.
    #[error("the runtime directory {} is a link; name the directory itself", path.display())]
    LinkedDir {
        /// The path.
        path: PathBuf,
    },
    /// The runtime directory is another user's.
    #[error("the runtime directory {} belongs to user {owner}", path.display())]
    ForeignDir {
        /// The path.
        path: PathBuf,
        /// The owner's uid.
        owner: u32,
    },
    /// Others may write to the runtime directory.
    #[error("the runtime directory {} may be written by others (mode {mode:04o}); chmod it to 0700", path.display())]
    OpenDir {
        /// The path.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Sockets and their directory.
    #[error("{} cannot be used", path.display())]
    Runtime {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// See [`VmError`].
    #[error(transparent)]
    Vm(#[from] VmError),
    /// See [`SnapshotError`].
    #[error(transparent)]
    Snapshot(Box<SnapshotError>),
}

impl From<SnapshotError> for FleetError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(Box::new(error))
    }
}
