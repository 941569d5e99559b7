//! The journal's files: their names, and their removal.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_host_io::{FileError, IoFile};

use super::format::{self, JournalId};
use super::image_binding;
use crate::directory::{Directory, sync};

pub(super) const JOURNAL: &str = "journal";
/// The name of a journal that is not valid: not yet, or no longer.
pub(super) const NEXT: &str = "journal.next";
const OVERLAY: &str = "overlay.";
const SUFFIX: &str = ".clade-journal";

/// The name of overlay `number`.
pub(super) fn overlay(number: u64) -> String {
    format!("{OVERLAY}{number}")
}

/// The place of an image's journal, whether or not there is one.
#[derive(Clone, Debug)]
pub(super) struct Location {
    /// The image's directory.
    pub(super) beside: Directory,
    /// The name of the journal's directory there.
    pub(super) name: String,
}

/// The directory of the image that `path` leads to, and the name of its journal there.
fn beside(path: &Path) -> Result<(PathBuf, String), FileError> {
    let failed = |source| FileError { path: path.to_owned(), what: "found", source };
    let real = std::fs::canonicalize(path).map_err(failed)?;
    let named = real.file_name().and_then(OsStr::to_str);
    let named = named.ok_or_else(|| failed(std::io::ErrorKind::InvalidFilename.into()))?;
    Ok((real.parent().unwrap_or(Path::new("/")).to_owned(), format!("{named}{SUFFIX}")))
}

/// The path of the journal of the image at `path`, whether or not there is one. None for an image
/// that has no name, or is not there.
#[must_use]
pub fn journal_path(path: &Path) -> Option<PathBuf> {
    beside(path).ok().map(|(parent, name)| parent.join(name))
}

impl Location {
    /// The place beside the image that `path` leads to.
    pub(super) fn of(path: &Path) -> Result<Self, FileError> {
        let (parent, name) = beside(path)?;
        Ok(Self { beside: Directory::open(&parent)?, name })
    }

    /// The same, for a process that may not list the image's directory. The directory cannot be
    /// synced or listed through it.
    pub(super) fn to_read(path: &Path) -> Result<Self, FileError> {
        let (parent, name) = beside(path)?;
        Ok(Self { beside: Directory::reach(&parent)?, name })
    }

    pub(super) fn path(&self) -> PathBuf {
        self.beside.path().join(&self.name)
    }

    /// Another journal in the same directory with this id. There is one if the image was renamed,
    /// or has two names.
    pub(super) fn look_for(&self, id: JournalId) -> Option<PathBuf> {
        let names = self.beside.names().unwrap_or_default();
        let mut journals = names.into_iter().filter(|name| name.ends_with(SUFFIX));
        let has_it = |name: &String| {
            let header = self.beside.open_ours(name).and_then(|dir| header_in(&dir, JOURNAL));
            header.ok().flatten().is_some_and(|header| header.id == Some(id))
        };
        journals.find(has_it).map(|name| self.beside.path().join(name))
    }
}

/// The header of the file `name`, if the file is there and has one.
pub(super) fn header_in(dir: &Directory, name: &str) -> Result<Option<format::JournalHeader>, FileError> {
    let file = match dir.open_file(name, false) {
        Err(error) if error.source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = [0; format::HEADER];
    if file.size()? < bytes.len() as u64 {
        return Ok(None);
    }
    file.read_now(&mut bytes, 0)?;
    Ok(format::read_header(&bytes).ok())
}

/// Removes a journal that is discarded, or whose content is all in the image. First the journal
/// becomes invalid, then the image's attribute is removed, then the files. If this is interrupted,
/// opening the image continues it.
///
/// # Errors
/// When the journal may still be valid. A valid journal must not be applied again once the image
/// has been written.
pub(super) fn retire(location: &Location, dir: &Directory, image: &IoFile) -> Result<(), FileError> {
    if let Err(error) = dir.rename(JOURNAL, NEXT)
        && error.source.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error);
    }
    dir.sync()?;
    unmark(image)?;
    remove_files(location, dir);
    Ok(())
}

/// Removes the journal's id from the image's attributes.
pub(super) fn unmark(image: &IoFile) -> Result<(), FileError> {
    if image_binding::read_mark(image)?.id().is_some() {
        image_binding::clear_mark(image)?;
        sync(image)?;
    }
    Ok(())
}

/// Removes the files of an invalid journal. A file that cannot be removed does no harm.
pub(super) fn remove_files(location: &Location, dir: &Directory) {
    let told = |error: &FileError| tracing::warn!(%error, "cannot remove an unused file");
    let ours = |name: &String| name == NEXT || name.starts_with(OVERLAY);
    let names = dir.names().inspect_err(told).unwrap_or_default();
    for name in names.iter().filter(|name| ours(name)) {
        let _ = dir.unlink(name).inspect_err(told);
    }
    let _ = location.beside.rmdir(&location.name).inspect_err(told);
}

/// Bytes allocated to a file.
pub(super) fn allocated(file: &IoFile) -> u64 {
    rustix::fs::fstat(file).map_or(0, |stat| stat.st_blocks as u64 * 512)
}

/// Removes the name of an overlay that no journal refers to.
pub(super) fn forget(dir: &Directory, number: u64) {
    if let Err(error) = dir.unlink(&overlay(number)) {
        tracing::warn!(%error, "cannot remove an unused file");
    }
}

/// The header of a journal for this image: its size, id, inode number and birth time.
pub(super) fn header_of(image: &Arc<IoFile>, size: u64) -> Result<format::JournalHeader, FileError> {
    let (inode, born) = image.identity()?;
    Ok(format::JournalHeader { size, id: image_binding::read_mark(image)?.id(), inode, born })
}
