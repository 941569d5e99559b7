//! Rolling a VM back to a checkpoint, in its process: the client passes the image.
//!
//! The request goes over the VM's image socket ([`crate::image`]).
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | client | the byte of the request: [`OWN`] if the image is one of the VM itself, or [`FOREIGN`] |
//! | 2.. | client | the image ([`SealedParts`]) |
//! | last | VM's process | the report, as JSON; or the error |
//!
//! An own image is still in the VM's process, which looks it up by its number: the disks that the VM
//! writes in place go on with it. A foreign image is imported. Its layers of memory that the VM shows
//! already are the same there, so a rollback maps the other pages alone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::{Duration, Instant};

use clade_block::overlay_dir;
use clade_host_io::seqpacket;
use serde::{Deserialize, Serialize};

use crate::control::{ProblemKind, ResetAnswer};
use crate::flight;
use crate::image::{connected, read_answer};
use crate::vm_host::{DaemonError, WeakVmHost};
use clade_vmm::vm::{ForkImage, Leases, Overlays, SealedParts, SharedFiles, Vm};

/// The byte of a request with an image that the VM's process has given away.
pub(crate) const OWN: u8 = 5;
/// The byte of a request with an image of another process.
pub(crate) const FOREIGN: u8 = 6;
/// Time limit of a VM's process: it waits for requests and pins in flight.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
enum RollbackReply {
    Done(Box<ResetAnswer>),
    Refused {
        /// The kind of the error.
        kind: ProblemKind,
        text: String,
    },
}

/// Rolls the VM of this process back.
pub(crate) fn answer(socket: &OwnedFd, vm: &Weak<Vm>, leases: Option<&Leases>, vm_host: &WeakVmHost) -> io::Result<()> {
    let parts = SealedParts::receive(socket).map_err(io::Error::other)?;
    let vm = vm.upgrade().ok_or(DaemonError::Ending);
    let reply = match vm.and_then(|vm| rolled_back(&vm, leases, parts, vm_host)) {
        Ok(answer) => RollbackReply::Done(Box::new(answer)),
        Err(error) => {
            let text = clade_vmm::error_chain(&error);
            flight::note(&format!("not rolled back: {text}"));
            RollbackReply::Refused { kind: error.problem(), text }
        }
    };
    seqpacket::send(socket, &serde_json::to_vec(&reply)?, &[])
}

/// `leases` are those of this process's images, if the image is among them.
fn rolled_back(
    vm: &Vm,
    leases: Option<&Leases>,
    parts: SealedParts,
    vm_host: &WeakVmHost,
) -> Result<ResetAnswer, DaemonError> {
    let entry = vm_host.upgrade().and_then(|vm_host| vm_host.entry());
    let entry = entry.ok_or_else(|| DaemonError::NoSuchVm { name: vm.name().to_owned() })?;
    let begun = Instant::now();
    let parts = parts.open()?;
    let number = parts.number()?;
    let image = match leases.and_then(|leases| leases.image(number)) {
        Some(image) => image,
        None => {
            let origin = vm.origin();
            let shared = origin.as_deref().map(SharedFiles::of_memory).transpose()?;
            let overlays = overlays(vm, origin.as_deref());
            ForkImage::import_beside(vm.context(), parts, Overlays::In(&overlays), &mut shared.unwrap_or_default())?
        }
    };
    let imported = begun.elapsed();
    let report = vm.reset(&image)?;
    tracing::debug!(name = vm.name(), ?imported, ?report, "rolled back");
    Ok(ResetAnswer::new(&entry, &report, "rolled back"))
}

/// The directory for the overlays of each disk.
fn overlays(vm: &Vm, origin: Option<&ForkImage>) -> Vec<PathBuf> {
    let of_boot = || vm.config().disks.iter().map(|disk| overlay_dir(&disk.disk, false)).collect();
    origin.map_or_else(of_boot, |origin| origin.disks().map(|disk| disk.overlay_dir().to_owned()).collect())
}

/// Rolls the VM called `name` back to an image, which is its own process's or another's. Calls `check`
/// while it waits; the VM may be rolled back even if that fails.
///
/// # Errors
/// When there is no such VM, or it cannot be rolled back: it then runs on.
pub(crate) fn roll_back(
    runtime: &Path,
    name: &str,
    (is_own, parts): (bool, &SealedParts),
    check: &dyn Fn() -> Result<(), DaemonError>,
) -> Result<ResetAnswer, DaemonError> {
    let failed = |source| DaemonError::Worker { source };
    let socket = connected(runtime, name, PATIENCE)?;
    seqpacket::send(&socket, &[if is_own { OWN } else { FOREIGN }], &[]).map_err(failed)?;
    parts.send(&socket)?;
    let bytes = read_answer(&socket, name, Instant::now() + PATIENCE, check)?;
    match serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))? {
        RollbackReply::Done(answer) => Ok(*answer),
        RollbackReply::Refused { kind, text } => Err(DaemonError::Refused { kind, text }),
    }
}
