//! A worker that opens a snapshot for others, and ends.
//!
//! The snapshot's author may be anybody. The supervisor reads what it says of its VM, and this
//! process all the rest. It has those files alone, and what it gives is taken for an image like any
//! other.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{Answer, failed, send};
use crate::fleet::FleetError;
use clade_vmm::vm::{Context, ForkImage, Leases, RestoreLoad, RestoreOptions};

/// A snapshot to be opened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OpenOrder {
    /// Its directory.
    pub(crate) dir: PathBuf,
    pub(crate) load: RestoreLoad,
    /// The directory of its disks' overlays.
    pub(crate) overlays: PathBuf,
    /// The directory of its VMs' sockets.
    pub(crate) sockets: PathBuf,
}

/// Opens a snapshot, and gives its image over `socket`.
pub(super) fn open(context: &Context, socket: &OwnedFd, order: OpenOrder) -> Result<(), FleetError> {
    let begun = Instant::now();
    let OpenOrder { dir, load, overlays, sockets } = order;
    let options = RestoreOptions { load, overlays: Some(overlays), sockets: Some(sockets) };
    let image = ForkImage::restore(context, &dir, &options)?;
    let opened = Instant::now();
    // Nobody writes its files, or uses them again: they need no holder.
    let parts = image.export(&Leases::default())?.seal()?;
    send(socket, &Answer::Opened, &[]).map_err(failed)?;
    parts.send(socket)?;
    tracing::debug!(open_took = ?opened - begun, send_took = ?opened.elapsed(), "opened");
    Ok(())
}
