//! The journal's files: where they are, whose they may be, taking them away, and the disk that they show when they were left behind.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_io::{CachePolicy, FileError, IoFile};
use rustix::fs::OFlags;
use rustix::process::geteuid;

use super::format::{self, Entry, Image, JournalError};
use crate::disk::DiskError;
use crate::disk::map::{BlockMap, GRANULE, Source};

pub(super) const JOURNAL: &str = "journal";
pub(super) const NEXT: &str = "journal.next";
const OVERLAY: &str = "overlay.";

/// The directory beside the image that `path` leads to.
pub(super) fn directory(path: &Path) -> io::Result<PathBuf> {
    let mut name = fs::canonicalize(path)?.into_os_string();
    name.push(".clade-journal");
    Ok(name.into())
}

/// The overlay of that number in a journal's directory.
pub(super) fn overlay(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{OVERLAY}{number}"))
}

pub(super) fn device(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.dev())
}

/// Opens a journal's directory, which nobody else may have made or may write in: what is in it goes into an image.
pub(super) fn open_ours(dir: &Path) -> io::Result<File> {
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(dir)?;
    let metadata = opened.metadata()?;
    let ours = metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if ours { Ok(opened) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Removes what nobody needs any more. What cannot be is only in the way.
pub(super) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file that nobody needs any more was not removed");
    }
}

/// The journal first, and durably: overlays without it are nothing, while it without overlays is damaged.
pub(super) fn remove_all(dir: &Path) -> Result<(), FileError> {
    let path = dir.join(JOURNAL);
    let gone = match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::open(dir).and_then(|dir| dir.sync_all()),
    };
    gone.map_err(|source| FileError { path, what: "removed", source })?;
    let ours = |name: &str| name == NEXT || name.starts_with(OVERLAY);
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter(|entry| entry.file_name().to_str().is_some_and(ours));
    names.for_each(|entry| remove(&entry.path()));
    if let Err(error) = fs::remove_dir(dir) {
        tracing::warn!(path = %dir.display(), %error, "a directory that nobody needs any more was not removed");
    }
    Ok(())
}

/// Where the journal is that was left beside `base`, if one was.
pub(in crate::disk) fn left_in(base: &IoFile) -> Option<PathBuf> {
    directory(base.path()).ok().filter(|dir| dir.join(JOURNAL).exists())
}

/// A disk whose journal was left behind: by a process that did not end in order, or with somebody else still using the image.
#[derive(Debug)]
pub(in crate::disk) struct Left {
    dir: PathBuf,
    /// What the disk shows.
    pub(in crate::disk) map: BlockMap,
    /// Nobody else's meanwhile.
    _locked: File,
}

impl Left {
    /// Looks for the journal of the image that `base` is.
    ///
    /// # Errors
    /// When there is one that cannot be read, is not this image's, or lacks a file.
    pub(in crate::disk) fn find(base: &Arc<IoFile>, size: u64) -> Result<Option<Self>, DiskError> {
        let failed = |path: &Path, what: &'static str| {
            let path = path.to_owned();
            move |source| DiskError::from(FileError { path, what, source })
        };
        // Without a name it has nothing beside it.
        let Ok(dir) = directory(base.path()) else { return Ok(None) };
        let path = dir.join(JOURNAL);
        let locked = match open_ours(&dir) {
            Ok(opened) => opened,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(DiskError::Journal { path, source: JournalError::NotOurs });
            }
            Err(error) => return Err(failed(&dir, "opened")(error)),
        };
        let alone = if base.is_writable() { locked.try_lock() } else { locked.try_lock_shared() };
        alone.map_err(|error| failed(&dir, "locked")(error.into()))?;
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Names that were given before there was a journal to use them.
                if base.is_writable() {
                    remove_all(&dir)?;
                }
                return Ok(None);
            }
            Err(error) => return Err(failed(&path, "read")(error)),
        };
        let granules = size.div_ceil(GRANULE);
        let (inode, born) = base.identity()?;
        let image = Image { size, inode, born };
        let entries = format::entries(&bytes, image, granules);
        let entries = entries.map_err(|source| DiskError::Journal { path: path.clone(), source })?;
        let mut map = BlockMap::new(granules, Source::File(Arc::clone(base)));
        let mut files: Vec<(u64, Arc<IoFile>)> = Vec::new();
        for Entry { granules, overlay } in entries {
            let source = match (overlay, files.iter().find(|(number, _)| Some(*number) == overlay)) {
                (None, _) => Source::Zero,
                (_, Some((_, file))) => Source::File(Arc::clone(file)),
                (Some(number), None) => {
                    let path = self::overlay(&dir, number);
                    let file = File::open(&path).map_err(failed(&path, "opened"))?;
                    let file = Arc::new(IoFile::read_only(file, &path, CachePolicy::Host));
                    files.push((number, Arc::clone(&file)));
                    Source::File(file)
                }
            };
            map.insert(granules, source);
        }
        Ok(Some(Self { dir, map, _locked: locked }))
    }

    /// Takes the journal away, when the image has everything.
    ///
    /// # Errors
    /// As [`Journal::remove`].
    pub(in crate::disk) fn remove(self) -> Result<(), FileError> {
        remove_all(&self.dir)
    }
}
