//! Detaching: an image whose files no VM's process can write.
//!
//! The process that gave an image has descriptors for writing its files, and a guest that breaks out
//! into that process has them too. The receiver copies those files, and the copies are in no
//! other process.
//!
//! A file stays as it is if the supervisor knows it: a snapshot's, an image that its VMs only read, an
//! earlier copy. Names prove nothing: a process may give one to its own file.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use clade_block::{DetachedDisk, DiskError};
use clade_devices::virtio::Backend;
use clade_host_io::{FileError, IoFile};
use clade_memory::{CopiedRuns, DetachedRam, LayerHandle, LayerId, LayerTreatment, PAGE_SIZE, PageRange, RamError};
use rustix::fs::{FileType, Stat, fstat, fstatfs};
use serde::{Deserialize, Serialize};

use super::received::{FileId, file_id, is_read_only};
use super::{SealedParts, TransferError};
use crate::vm::context::Context;
use crate::vm::fork::ForkImage;

/// The files that need no copy, and the parts of files that have one.
#[derive(Debug, Default)]
pub struct DetachOptions {
    /// Files that no VM's process can write.
    pub safe: Vec<FileId>,
    /// Copies of parts of layers, from earlier images of the same VM.
    pub known: Vec<KnownCopy>,
    /// Most pages of memory for copies.
    pub room: u64,
}

/// A copy of a part of a layer's file.
#[derive(Debug)]
pub struct KnownCopy {
    /// The file.
    pub of: FileId,
    /// Pages, ascending.
    pub runs: Vec<Range<u64>>,
    /// The copy, open for reading.
    pub copy: File,
}

/// A copy of a part of a layer's file that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedFile {
    /// The file.
    pub of: FileId,
    /// Its pages that were copied, ascending.
    pub runs: Vec<Range<u64>>,
    /// The copy.
    pub copy: FileId,
}

/// The result of a detachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DetachReport {
    /// Counts of its memory.
    pub ram: DetachedRam,
    /// Counts of its disks.
    pub disks: DetachedDisk,
    /// The copies of layers in memory.
    pub made: Vec<CopiedFile>,
}

/// `TMPFS_MAGIC`.
const TMPFS: i64 = 0x0102_1994;

impl ForkImage {
    /// Returns the same image with copies of the files that a VM's process can write. Copies of disks
    /// are made in the directories of overlays that this image was imported with.
    ///
    /// # Errors
    /// When a file cannot be read, or there is no room for a copy.
    pub fn detached(
        &self,
        context: &Context,
        options: &DetachOptions,
    ) -> Result<(Arc<Self>, DetachReport), TransferError> {
        let mut report = DetachReport::default();
        let in_memory: RefCell<HashMap<LayerId, FileId>> = RefCell::default();
        // No process watches the use of copies: they are never written or used again.
        let (_, lease) = std::io::pipe().map_err(TransferError::system("leased"))?;
        let lease = Arc::new(OwnedFd::from(lease));
        let treatment = |layer: &LayerHandle| {
            let file = layer.read_only_file()?;
            let of = file_id(&file).map_err(|error| RamError::Reopen(std::io::Error::other(error)))?;
            if options.safe.contains(&of) {
                return Ok(LayerTreatment::Keep);
            }
            let mut known = Vec::new();
            // Layers in memory never change (I4). A file on a disk has other users.
            if !fstatfs(&file).is_ok_and(|found| found.f_type == TMPFS) {
                return Ok(LayerTreatment::Copy(known));
            }
            in_memory.borrow_mut().insert(layer.id(), of);
            for KnownCopy { runs, copy, .. } in options.known.iter().filter(|known| known.of == of) {
                let copy = copy.try_clone().map_err(RamError::Reopen)?;
                let pages = copy.metadata().map_err(RamError::Reopen)?.len() / PAGE_SIZE;
                let copy = context.store().foreign_layer(copy, pages, Arc::clone(&lease))?;
                let runs = runs.iter().map(|run| PageRange::new(run.start, run.end)).collect();
                known.push(CopiedRuns { copy, runs });
            }
            Ok(LayerTreatment::Copy(known))
        };
        let (ram, counts, made) = self.ram().detached(context.store(), options.room, &treatment)?;
        report.ram = counts;
        for made in made {
            let Some(of) = in_memory.borrow().get(&made.of).copied() else { continue };
            let runs = made.made.runs.iter().map(|run| run.start()..run.end()).collect();
            report.made.push(CopiedFile { of, runs, copy: file_id(made.made.copy.read_only_file()?)? });
        }
        let mut backends = Vec::with_capacity(self.backends.len());
        for backend in &self.backends {
            let Backend::Disk(disk) = backend else {
                backends.push(backend.clone());
                continue;
            };
            let is_safe = |file: &IoFile| {
                let failed = |error| FileError {
                    path: file.path().to_owned(),
                    what: "looked at",
                    source: std::io::Error::other(error),
                };
                Ok::<_, DiskError>(options.safe.contains(&file_id(file).map_err(failed)?))
            };
            let (disk, done) = disk.detached(&is_safe)?;
            report.disks.copied_files += done.copied_files;
            report.disks.copied_bytes += done.copied_bytes;
            backends.push(Backend::Disk(disk));
        }
        Ok((Arc::new(Self { ram, backends, ..self.clone() }), report))
    }
}

/// A file of an image, open for reading only.
#[derive(Clone, Copy, Debug)]
pub struct ImageFile<'a> {
    /// Its identity.
    pub id: FileId,
    /// Its descriptor.
    pub file: BorrowedFd<'a>,
    /// Whether it has no name, and no process may open it for writing.
    pub has_no_writer: bool,
}

impl SealedParts {
    /// The files of its memory and its disks. The other descriptors are pipes, which no descriptor
    /// passes through.
    ///
    /// # Errors
    /// When a file can be written, or a descriptor is of another kind.
    pub fn image_files(&self) -> Result<Vec<ImageFile<'_>>, TransferError> {
        let mut found = Vec::new();
        for file in self.files() {
            let Some(stat) = checked(file)? else { continue };
            let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
            let has_no_writer = is_file && stat.st_nlink == 0 && stat.st_mode & 0o222 == 0;
            found.push(ImageFile { id: file_id(file)?, file: file.as_fd(), has_no_writer });
        }
        Ok(found)
    }

    /// The checks of [`Self::image_files`] alone: a fork waits for them.
    ///
    /// # Errors
    /// The same.
    pub fn check_files(&self) -> Result<(), TransferError> {
        self.files().iter().try_for_each(|file| checked(file).map(drop))
    }
}

/// Refuses a descriptor that is neither a pipe nor of a file for reading. Returns the attributes of a file, and None for
/// a pipe.
fn checked(file: impl AsFd) -> Result<Option<Stat>, TransferError> {
    let failed = |errno: rustix::io::Errno| TransferError::system("looked at")(errno.into());
    let stat = fstat(&file).map_err(failed)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind.is_fifo() {
        return Ok(None);
    }
    if !(kind.is_file() || kind.is_block_device()) {
        return Err(TransferError::malformed(format!("a descriptor of a {kind:?}")));
    }
    if !is_read_only(file)? {
        return Err(TransferError::malformed("a file that can be written"));
    }
    Ok(Some(stat))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;
    use crate::vm::ImageParts;

    #[test]
    fn images_have_files_for_reading_and_pipes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        File::options().write(true).create(true).truncate(true).mode(0o400).open(&path).unwrap();
        let kinds = |file: OwnedFd| {
            let parts = ImageParts::from_raw(Vec::new(), vec![file]).seal().unwrap();
            let files = parts.image_files();
            assert_eq!(parts.check_files().is_ok(), files.is_ok());
            files.map(|files| files.iter().map(|file| file.has_no_writer).collect::<Vec<_>>())
        };
        let (reader, writer) = std::io::pipe().unwrap();
        assert_eq!(kinds(reader.into()).unwrap(), [false; 0]);
        assert_eq!(kinds(writer.into()).unwrap(), [false; 0]);
        let read = File::open(&path).unwrap();
        assert_eq!(kinds(read.try_clone().unwrap().into()).unwrap(), [false], "it has a name");
        for options in [File::options().write(true), File::options().read(true).write(true)] {
            let error = kinds(options.open(&path).unwrap().into()).unwrap_err();
            assert!(error.to_string().contains("can be written"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(kinds(read.into()).unwrap(), [true]);
        let unsealed = tempfile::tempfile_in(dir.path()).unwrap();
        let again = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&unsealed))).unwrap();
        assert_eq!(kinds(again.into()).unwrap(), [false], "its owner may open it for writing");
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(kinds(socket.into()).unwrap_err().to_string().contains("Socket"));
        assert!(kinds(File::open(dir.path()).unwrap().into()).is_err());
    }
}
