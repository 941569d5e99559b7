//! Reasons why the daemon refuses or cancels a request.

mod host;
mod problem;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::ProblemKind;
use clade_vmm::vm::{SnapshotError, TransferError, VmError};

pub use host::{CgroupError, HookError, HostLimitError};

/// Longest name of a VM.
pub const LONGEST_NAME: usize = 48;
/// Longest path of a socket: `sun_path` of `struct sockaddr_un` less its terminating NUL.
pub(crate) const LONGEST_SOCKET_PATH: usize = 107;
/// The most children of one request.
pub const MAX_CHILDREN: usize = 10_000;

/// Reason why a fork was cancelled.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CancelReason {
    /// The client has closed its connection.
    #[error("the client has gone")]
    ClientGone,
    /// The process ends.
    #[error("the process is ending")]
    Ending,
    /// The command of the VMs' session has ended.
    #[error("the command of its session has ended")]
    SessionEnded,
}

/// Reasons why the daemon refuses or cancels a request.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The name has characters that a name cannot have, or is too long.
    #[error(
        "{name:?} is not a name: 1 to {LONGEST_NAME} letters, digits, '-', '_' or '.', starting with a letter or digit"
    )]
    BadName {
        /// The name given.
        name: String,
    },
    /// Another VM has the name.
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
    /// The pattern gives every child the same name.
    #[error("{pattern:?} names every child the same: {{n}} stands for the child's number")]
    Pattern {
        /// The pattern given.
        pattern: String,
    },
    /// The number of children is 0 or too large.
    #[error("{count} children: one fork makes 1 to {MAX_CHILDREN}")]
    Count {
        /// The number of children in the request.
        count: usize,
    },
    /// The host has no room for all of them.
    #[error("{count} children do not fit")]
    HostLimit {
        /// The number of children in the request.
        count: usize,
        /// The resource that is too scarce.
        #[source]
        source: HostLimitError,
    },
    /// The request was cancelled; none of its children is left.
    #[error("cancelled after {made} of {count} children: {reason}")]
    Cancelled {
        /// The children that had been made.
        made: usize,
        /// The number of children in the request.
        count: usize,
        /// The cause.
        reason: CancelReason,
    },
    /// The process ends and makes no more VMs.
    #[error("the process is ending")]
    Ending,
    /// The VM has stopped, but some of its resources are still in use.
    #[error("{name} has stopped, but its devices are not released after {seconds} s")]
    Unreleased {
        /// The VM's name.
        name: String,
        /// The timeout in seconds.
        seconds: u64,
    },
    /// The directory for a disk's overlays cannot be made.
    #[error("no directory for the writes of a disk: {}", path.display())]
    Overlays {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// No file can be made in the directory for a suspended VM's memory.
    #[error("no file for a suspended VM can be made in {}", path.display())]
    SuspendDir {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// There is no control group for a VM.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A VM's network cannot be opened or closed.
    #[error("the network of {name} cannot be opened or closed")]
    Link {
        /// The VM's name.
        name: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// An interface could not be connected to the host's network.
    #[error(transparent)]
    NetHook(#[from] Box<HookError>),
    /// A socket's path is longer than the kernel accepts.
    #[error("the socket {} has a path of {length} bytes; {LONGEST_SOCKET_PATH} is the limit", path.display())]
    LongPath {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
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
    /// The runtime directory has a supervisor.
    #[error(
        "{} supervises the VMs in {}: end it with `clade serve --stop`",
        pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}")),
        path.display()
    )]
    Supervised {
        /// The path.
        path: PathBuf,
        /// The supervisor's pid, unless it takes no connections.
        pid: Option<i32>,
    },
    /// No checkpoint has the name.
    #[error("there is no checkpoint {name:?}")]
    NoSuchCheckpoint {
        /// The name given.
        name: String,
    },
    /// Another checkpoint has the name.
    #[error("the name {name:?} is taken by a checkpoint")]
    CheckpointTaken {
        /// The name given.
        name: String,
    },
    /// A file of the runtime directory cannot be made or used.
    #[error("{} cannot be used", path.display())]
    Runtime {
        /// The file or directory.
        path: PathBuf,
        /// The error of the file.
        #[source]
        source: io::Error,
    },
    /// The files of a kept checkpoint cannot be written or removed.
    #[error("the checkpoint {name:?} on the disk")]
    Keep {
        /// The checkpoint's name.
        name: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The VM cannot be made, forked or started.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The VM cannot be saved or restored.
    #[error(transparent)]
    Snapshot(Box<SnapshotError>),
    /// The image cannot be given to another process, or be used by it.
    #[error("a child in a process of its own")]
    Transfer(#[from] Box<TransferError>),
    /// A worker cannot be started, or has ended.
    #[error("a process for a child")]
    Worker {
        /// The system call's error, or the end of the worker.
        #[source]
        source: io::Error,
    },
    /// A worker could not make its VM.
    #[error("{text}")]
    Refused {
        /// The kind of the worker's error.
        kind: ProblemKind,
        /// The worker's error.
        text: String,
    },
}

impl From<SnapshotError> for DaemonError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(Box::new(error))
    }
}

impl From<TransferError> for DaemonError {
    fn from(error: TransferError) -> Self {
        Self::Transfer(Box::new(error))
    }
}
