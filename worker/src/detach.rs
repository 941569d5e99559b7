//! A worker that copies the files of an image that a VM's process can write, and ends.
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | starter | [`DetachRequest`] |
//! | 2.. | starter | [`KnownFiles`], as bytes and descriptors |
//! | .. | starter | the image |
//! | next | worker | the counts, or the error |
//! | .. | worker | the image with its copies |
//! | last | worker | the copies it has made: [`CopiedFile`](clade_vmm::vm::CopiedFile)s, as bytes |
//!
//! The process runs no guest. Its descriptors for writing the copies go with it, so the starter waits
//! for its end.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{WorkerAnswer, failed, send};
use crate::host_limits::pages_available;
use clade_api::{DaemonError, DetachedInfo};
use clade_vmm::vm::{
    Context, DetachOptions, FileId, ForkImage, ImageParts, KnownCopy, Leases, Overlays, SealedParts, VmConfig,
};

/// An image to be detached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DetachRequest {
    /// The configuration that the image must have.
    pub config: VmConfig,
    /// The directory of each disk's overlays.
    pub overlays: Vec<PathBuf>,
}

/// Files, and parts of files, that are not copied again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownFiles {
    /// Files that no VM's process can write.
    pub safe: Vec<FileId>,
    /// Parts of the VM's layers, and the descriptor of the copy of each.
    pub parts: Vec<KnownPart>,
}

/// A part of a layer's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownPart {
    /// The file that it is a copy of.
    pub of: FileId,
    /// Pages.
    pub runs: Vec<Range<u64>>,
    /// Index of its descriptor among those of the image.
    pub descriptor: usize,
}

/// Makes a message of any length of a value and descriptors.
///
/// # Errors
/// When there is no memory for it.
pub fn packed(value: &impl Serialize, files: Vec<OwnedFd>) -> Result<SealedParts, DaemonError> {
    let bytes = serde_json::to_vec(value).map_err(|error| failed(error.into()))?;
    Ok(ImageParts::from_raw(bytes, files).seal()?)
}

/// The value and the descriptors of such a message.
///
/// # Errors
/// When it is another value, or too long.
pub(crate) fn unpacked<T: DeserializeOwned>(parts: SealedParts) -> Result<(T, Vec<OwnedFd>), DaemonError> {
    let (bytes, files) = parts.open()?.into_raw();
    Ok((serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?, files))
}

/// The known copies with their descriptors.
fn known_copies(parts: Vec<KnownPart>, files: &[OwnedFd]) -> io::Result<Vec<KnownCopy>> {
    let copy = |KnownPart { of, runs, descriptor }| {
        let copy = files.get(descriptor).ok_or(io::ErrorKind::InvalidData)?.try_clone()?;
        Ok(KnownCopy { of, runs, copy: File::from(copy) })
    };
    parts.into_iter().map(copy).collect()
}

/// Copies the image received over `socket`, and sends it back.
pub(super) fn detach(context: &Context, socket: &OwnedFd, request: DetachRequest) -> Result<(), DaemonError> {
    let begun = Instant::now();
    let DetachRequest { config, overlays } = request;
    let (KnownFiles { safe, parts }, files) = unpacked(SealedParts::receive(socket)?)?;
    let known = known_copies(parts, &files).map_err(failed)?;
    let image = SealedParts::receive(socket)?.open()?;
    let image = ForkImage::import(context, image, Overlays::In(&overlays))?;
    if **image.config() != config {
        return Err(failed(io::Error::other("the image is of a VM with another configuration")));
    }
    let imported = begun.elapsed();
    let options = DetachOptions { safe, known, room: pages_available() };
    let (image, report) = image.detached(context, &options)?;
    // Its files are never written or used again: they need no holder.
    let copied = begun.elapsed() - imported;
    let image = image.export(&Leases::default())?.seal()?;
    tracing::debug!(?imported, ?copied, all = ?begun.elapsed(), "detached");
    let counts = DetachedInfo {
        copied_layers: report.ram.copied_layers,
        shared_layers: report.ram.shared_layers,
        copied_pages: report.ram.copied_pages,
        disk_files: report.disks.copied_files,
        disk_bytes: report.disks.copied_bytes,
        // Of all: the starter measures it.
        total_us: 0.0,
    };
    let made = packed(&report.made, Vec::new())?;
    send(socket, &WorkerAnswer::Detached(counts), &[]).map_err(failed)?;
    image.send(socket)?;
    Ok(made.send(socket)?)
}
