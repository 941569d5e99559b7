//! A worker that opens a snapshot for others, and ends.
//!
//! A snapshot is not trusted. The supervisor reads its description of the VM, and this process
//! everything else. The process can reach those files alone, and its image is checked like any
//! other.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{WorkerAnswer, failed, send};
use clade_api::DaemonError;
use clade_snapshot::{KnownDir, ParentDirs};
use clade_vmm::vm::{Context, ForkImage, Leases, RestoreLoad, RestoreOptions};

/// A snapshot to be opened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReadSnapshotRequest {
    /// Its directory.
    pub dir: PathBuf,
    /// How the memory is read.
    pub load: RestoreLoad,
    /// Its directory and those of the snapshots that it depends on, as the supervisor has checked them.
    pub members: Vec<KnownDir>,
    /// The directory of its disks' overlays.
    pub overlays: PathBuf,
    /// The directory of its VMs' sockets.
    pub sockets: PathBuf,
}

/// Opens a snapshot, and sends its image over `socket`.
pub(super) fn open(context: &Context, socket: &OwnedFd, request: ReadSnapshotRequest) -> Result<(), DaemonError> {
    let begun = Instant::now();
    let ReadSnapshotRequest { dir, load, members, overlays, sockets } = request;
    let parents = ParentDirs::known(&members);
    let options = RestoreOptions { load, overlays: Some(overlays), sockets: Some(sockets), parents };
    let image = ForkImage::restore(context, &dir, &options)?;
    let opened = Instant::now();
    // Its files are never written or used again: they need no holder.
    let parts = image.export(&Leases::default())?.seal()?;
    send(socket, &WorkerAnswer::Opened, &[]).map_err(failed)?;
    parts.send(socket)?;
    tracing::debug!(open_took = ?opened - begun, send_took = ?opened.elapsed(), "opened");
    Ok(())
}
