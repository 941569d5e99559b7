//! VMs on disk: snapshots of running VMs, and VMs that are started from them.
//!
//! | file | contents |
//! |---|---|
//! | `save` | forks a VM, and writes the image to a directory |
//! | `restore` | opens the image in a directory |
//! | `sections` | everything of an image but memory and disks, as named CBOR sections |
//!
//! The files themselves, and the steps that make them durable, belong to `clade-snapshot`.

mod restore;
mod save;
pub mod sections;

use std::io;
use std::path::PathBuf;

use clade_block::DiskError;
use clade_memory::RamError;
use clade_snapshot::SnapshotId;
use thiserror::Error;

use crate::kvm::HostMismatch;
use crate::vm::error::VmError;
pub use restore::{RestoreLoad, RestoreOptions, SavedVm};
use save::SETTLE;
pub(crate) use save::SaveTracker;
pub use save::{SnapshotOptions, SnapshotReport};
pub use sections::SavedError;

/// Why a VM cannot be saved or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The files of the snapshot cannot be written or read.
    #[error(transparent)]
    Files(#[from] clade_snapshot::Error),
    /// The VM cannot be forked, or cannot be started.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The saved state cannot be written or read.
    #[error("the state in the snapshot")]
    State(#[from] SavedError),
    /// The host lacks a feature that the guest was booted with.
    #[error(transparent)]
    Host(#[from] HostMismatch),
    /// A disk cannot be read or opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Writes to a disk do not complete.
    #[error("writes to {} that were in flight have not ended within {} s", path.display(), SETTLE.as_secs())]
    Unsettled {
        /// The disk's file.
        path: PathBuf,
    },
    /// There is no snapshot as the base of an incremental one.
    #[error("{name} was neither saved nor restored before, so nothing can be incremental to it: save it in full first")]
    NoBase {
        /// The VM's name.
        name: String,
    },
    /// Another snapshot of the VM is being written.
    #[error("a snapshot of {name} is being written already")]
    Busy {
        /// The VM's name.
        name: String,
    },
    /// The snapshot has more or fewer disks than its configuration.
    #[error("the snapshot has {found} disks, its configuration {wanted}")]
    Disks {
        /// Disks in the snapshot.
        found: usize,
        /// Disks in the configuration.
        wanted: usize,
    },
    /// The snapshot has no record of the pages to read ahead.
    #[error("{} has no recorded working set: record one with `clade snapshot working-set` of a VM restored from it", path.display())]
    Cold {
        /// The snapshot's directory.
        path: PathBuf,
    },
    /// A compressed disk cannot be unpacked: its file cannot be created.
    #[error("no unnamed file in {}", path.display())]
    Unpack {
        /// The directory for the file.
        path: PathBuf,
        /// The error of creating it.
        #[source]
        source: io::Error,
    },
}

impl From<RamError> for SnapshotError {
    fn from(error: RamError) -> Self {
        VmError::from(error).into()
    }
}

/// The snapshot that a VM was saved to or restored from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAt {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// The snapshot's id: the directory may hold another one by now.
    pub id: SnapshotId,
}
