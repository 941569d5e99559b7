//! A disk at one instant, as taken by a fork, and its export.

use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clade_host_io::{FileError, IoFile};

use super::directory::{Directory, sync_to_copy};
use super::map::{BlockMap, CLUSTER, ClusterSource};
use super::setup::Setup;
use super::{DiskConfig, DiskError};

/// Bytes that an export copies at once.
const CHUNK: u64 = 1 << 20;

/// A disk at one instant. Any number of disks can be opened from it, each with writes of its own.
/// The image keeps the files alive, but not the VM.
#[derive(Clone, Debug)]
pub struct DiskImage {
    pub(super) setup: Arc<Setup>,
    pub(super) map: BlockMap,
    /// Files that had writes in flight at that instant.
    pub(super) unsettled: Vec<Arc<IoFile>>,
}

impl DiskImage {
    /// The configuration of the disk it was taken from.
    #[must_use]
    pub fn config(&self) -> &DiskConfig {
        &self.setup.config
    }

    /// The directory of its overlays.
    #[must_use]
    pub fn overlay_dir(&self) -> &Path {
        self.setup.overlays.path()
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.setup.size
    }

    /// Waits up to `patience` until no write of the VM it was taken from is in flight to one of its
    /// files. Returns whether that is so.
    ///
    /// A child does not need to wait: its device does the requests in flight again. A copy of the
    /// disk must wait.
    #[must_use]
    pub fn settle(&self, patience: Duration) -> bool {
        self.unsettled.iter().all(|file| file.settle(patience))
    }

    /// Writes the whole disk into a new file at `path`, sparse where it is zeros, and makes it
    /// durable. The file gets the image's permissions. A disk without an image file gives it to its
    /// owner alone.
    ///
    /// # Errors
    /// When the file exists, a write to the disk was lost, or a system call fails. Nothing is left at `path` then.
    pub fn export(&self, path: &Path) -> Result<u64, FileError> {
        let failed = |what| move |source| FileError { path: path.to_owned(), what, source };
        let to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed("created"))?;
        // A block device's permissions do not suit a file.
        let image = self.setup.base.as_ref().filter(|base| !base.is_block_device());
        let stat = image.map(|base| rustix::fs::fstat(&**base)).transpose();
        let mode =
            stat.map_err(|error| failed("given the image's mode")(error.into()))?.map(|stat| stat.st_mode & 0o777);
        let copied = mode
            .map_or(Ok(()), |mode| to.set_permissions(Permissions::from_mode(mode)))
            .map_err(failed("given the image's mode"))
            .and_then(|()| to.set_len(self.setup.size).map_err(failed("given the disk's size")))
            .and_then(|()| {
                copy_data(&self.map, self.setup.size, |at, bytes| to.write_all_at(bytes, at).map_err(failed("written")))
            })
            .and_then(|copied| to.sync_all().map_err(failed("made durable")).map(|()| copied));
        if copied.is_err() {
            // The first error is the one to report.
            let _ = std::fs::remove_file(path);
        }
        copied
    }
}

/// Calls `write` with each chunk that is not all zeros. Returns the total size of these chunks.
fn copy_data(
    map: &BlockMap,
    size: u64,
    mut write: impl FnMut(u64, &[u8]) -> Result<(), FileError>,
) -> Result<u64, FileError> {
    let mut copied = 0;
    map.sizes().iter().try_for_each(|(file, _)| sync_to_copy(file))?;
    for (range, source) in map.pieces(0..size.div_ceil(CLUSTER)) {
        let ClusterSource::File(file) = source else { continue };
        for_chunks(range.start * CLUSTER, (range.end * CLUSTER).min(size), |at, len| {
            let mut bytes = vec![0; len];
            file.read_now(&mut bytes, at)?;
            if bytes.iter().any(|byte| *byte != 0) {
                write(at, &bytes)?;
                copied += len as u64;
            }
            Ok(())
        })?;
    }
    Ok(copied)
}

fn for_chunks(
    start: u64,
    end: u64,
    mut each: impl FnMut(u64, usize) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let mut at = start;
    while at < end {
        let len = CHUNK.min(end - at);
        each(at, len as usize)?;
        at += len;
    }
    Ok(())
}

/// The directory for overlays of `config`. `block_device`: the image is a block device.
#[must_use]
pub fn overlay_dir(config: &DiskConfig, block_device: bool) -> PathBuf {
    match (&config.overlays, config.path.parent()) {
        (Some(dir), _) => dir.clone(),
        // A block device's directory is in memory.
        (None, _) if block_device => std::env::temp_dir(),
        (None, Some(dir)) if dir.as_os_str().is_empty() => PathBuf::from("."),
        (None, Some(dir)) => dir.to_owned(),
        (None, None) => PathBuf::from("."),
    }
}

/// Opens the directory for overlays. For a writable disk, makes and drops one overlay, so that a
/// failure appears here and not at the guest's first write after a fork.
pub(super) fn open_overlays(config: &DiskConfig, block_device: bool, size: u64) -> Result<Directory, DiskError> {
    let path = overlay_dir(config, block_device);
    // As a path: this process may lack permission to list the directory, which other disks use.
    let opened = Directory::reach(&path).and_then(|dir| {
        if !config.read_only {
            dir.try_unnamed(size)?;
        }
        Ok(dir)
    });
    opened.map_err(|source| DiskError::Overlays { disk: config.path.clone(), dir: path, source })
}
