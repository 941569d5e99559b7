//! Rolling a VM back to a checkpoint, in its process: the client passes the image.
//!
//! The request goes over the VM's image socket ([`crate::image`]).
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | client | the byte of the request: `OWN` if the image is one of the VM itself, or `FOREIGN` |
//! | 2.. | client | the image ([`SealedParts`]) |
//! | last | VM's process | the report, as JSON; or the error |
//!
//! An own image is still in the VM's process, which looks it up by its number: the disks that the VM
//! writes in place go on with it. A foreign image is imported. Its layers of memory that the VM shows
//! already are the same there, so a rollback maps the other pages alone.
//!
//! A client that closes its socket before the VM's earlier operations have ended, and its devices are halted,
//! gets no rollback: it was told of a failure, and may go on with the VM.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use clade_block::overlay_dir;
use clade_host_io::seqpacket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::describe::reset_answer;
use crate::image::{connected, read_answer};
use crate::jail::is_block_device;
use crate::vm_host::WeakVmHost;
use clade_api::{DaemonError, ProblemKind, ResetAnswer, flight};
use clade_vmm::vm::{ForkImage, ImageParts, Leases, Overlays, SealedParts, SharedFiles, Vm};

/// The byte of a request with an image that the VM's process has given away.
pub(crate) const OWN: u8 = 5;
/// The byte of a request with an image of another process.
pub(crate) const FOREIGN: u8 = 6;
/// Time limit for the connection, and for each message to the VM's process.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
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

/// Rolls the VM of this process back, if the client still waits when earlier operations have ended.
pub(crate) fn answer(socket: &OwnedFd, vm: &Weak<Vm>, leases: Option<&Leases>, vm_host: &WeakVmHost) -> io::Result<()> {
    let parts = SealedParts::receive(socket).map_err(io::Error::other)?;
    let vm = vm.upgrade().ok_or(DaemonError::Ending);
    let reply = match vm.and_then(|vm| rolled_back(&vm, leases, parts, vm_host, &|| !has_gone(socket))) {
        Ok(answer) => RollbackReply::Done(Box::new(answer)),
        Err(error) => {
            let text = clade_vmm::error_chain(&error);
            flight::note(&format!("not rolled back: {text}"));
            RollbackReply::Refused { kind: error.problem(), text }
        }
    };
    seqpacket::send(socket, &serde_json::to_vec(&reply)?, &[])
}

/// Whether the other end is closed.
fn has_gone(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

/// `leases` are those of this process's images, if the image is among them.
fn rolled_back(
    vm: &Vm,
    leases: Option<&Leases>,
    parts: SealedParts,
    vm_host: &WeakVmHost,
    is_wanted: &dyn Fn() -> bool,
) -> Result<ResetAnswer, DaemonError> {
    let entry = vm_host.upgrade().and_then(|vm_host| vm_host.entry());
    let entry = entry.ok_or_else(|| DaemonError::NoSuchVm { name: vm.name().to_owned() })?;
    let begun = Instant::now();
    let parts = parts.open()?;
    let number = parts.number()?;
    let image = match leases.and_then(|leases| leases.image(number)) {
        Some(image) => image,
        None => imported(vm, parts, leases.is_some())?,
    };
    let import_took = begun.elapsed();
    let report = vm.reset_if(&image, is_wanted)?;
    tracing::debug!(name = vm.name(), ?import_took, ?report, "rolled back");
    Ok(reset_answer(&entry, &report, "rolled back"))
}

/// Imports an image, beside the one that the VM was started from.
fn imported(vm: &Vm, parts: ImageParts, is_own: bool) -> Result<Arc<ForkImage>, DaemonError> {
    let (origin, disks) = (vm.origin(), &vm.config().disks);
    // Over a disk's own image as another process's, later writes would not reach it.
    if is_own && origin.is_none() && disks.iter().any(|disk| !disk.disk.read_only && !disk.disk.ephemeral) {
        let text = format!("the process of {:?} has given this image back", vm.name());
        return Err(DaemonError::Refused { kind: ProblemKind::WrongState, text });
    }
    let of_boot = || disks.iter().map(|disk| overlay_dir(&disk.disk, is_block_device(&disk.disk.path))).collect();
    let of_child = |origin: &Arc<ForkImage>| origin.disks().map(|disk| disk.overlay_dir().to_owned()).collect();
    let overlays: Vec<PathBuf> = origin.as_ref().map_or_else(of_boot, of_child);
    let shared = origin.as_deref().map(SharedFiles::of_memory).transpose()?;
    Ok(ForkImage::import_beside(vm.context(), parts, Overlays::In(&overlays), &mut shared.unwrap_or_default())?)
}

/// A connection to the process of a VM that is to be rolled back.
#[derive(Debug)]
pub struct RollbackClient {
    socket: OwnedFd,
    name: String,
}

impl RollbackClient {
    /// Connects to the process of the VM called `name`. From here on the request is that process's,
    /// whoever has the name later.
    ///
    /// # Errors
    /// When there is no such VM, or its process accepts no request.
    pub fn connect(runtime: &Path, name: &str) -> Result<Self, DaemonError> {
        Ok(Self { socket: connected(runtime, name, CONNECT_PATIENCE)?, name: name.to_owned() })
    }

    /// Rolls the VM back to an image, which is its own process's or another's. Calls `check` before the
    /// request is sent, and while it waits; the VM may be rolled back even if a later call fails.
    ///
    /// # Errors
    /// When the VM cannot be rolled back: it then runs on.
    pub fn roll_back(
        self,
        (is_own, parts): (bool, &SealedParts),
        check: &dyn Fn() -> Result<(), DaemonError>,
    ) -> Result<ResetAnswer, DaemonError> {
        let failed = |source| DaemonError::Worker { source };
        check()?;
        seqpacket::send(&self.socket, &[if is_own { OWN } else { FOREIGN }], &[]).map_err(failed)?;
        parts.send(&self.socket)?;
        let bytes = read_answer(&self.socket, &self.name, Instant::now() + PATIENCE, check)?;
        match serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))? {
            RollbackReply::Done(answer) => Ok(*answer),
            RollbackReply::Refused { kind, text } => Err(DaemonError::Refused { kind, text }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detach::packed;

    #[test]
    fn a_request_whose_client_has_gone_is_not_sent() {
        let parts = packed(&(), Vec::new()).unwrap();
        let roll_back = |check: &dyn Fn() -> Result<(), DaemonError>| {
            let (ours, theirs) = seqpacket::pair().unwrap();
            let waiting = RollbackClient { socket: ours, name: "web".to_owned() };
            // Its process answers nothing: the request that was sent, if any, stays in the socket.
            let answer = waiting.roll_back((true, &parts), check);
            (answer.unwrap_err(), seqpacket::receive(&theirs, 1).map(|message| message.bytes))
        };
        let (error, sent) = roll_back(&|| Err(DaemonError::Ending));
        assert!(matches!(error, DaemonError::Ending), "{error}");
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        // A client that goes later.
        let calls = std::cell::Cell::new(0);
        let (error, sent) = roll_back(&|| {
            calls.set(calls.get() + 1);
            if calls.get() == 1 { Ok(()) } else { Err(DaemonError::Ending) }
        });
        assert!(matches!(error, DaemonError::Ending), "{error}");
        assert_eq!(sent.unwrap(), [OWN]);
    }
}
