//! The durable part of a forked disk: a journal beside the image.
//!
//! From its first fork on, a disk writes to unnamed overlays, and the image is read-only. A flush
//! must still make writes durable. So the disk that was opened from the image names its overlays
//! when it is flushed, in a directory beside the image. A journal there records which clusters are
//! in which overlay. Opening the image applies the journal (recovery.rs). A commit works the same
//! way, and so is one step.
//!
//! ```text
//! disk.img                    the image; its attribute user.clade.journal is the journal's id
//! disk.img.clade-journal/
//!     journal                 the places of clusters (format.rs); replaced whole, or appended to
//!     journal.next            an invalid journal: not yet valid, or no longer
//!     overlay.0, overlay.1    clusters, each at its own offset in the disk
//! ```
//!
//! A flush, in this order ([`Journal::begin`], [`Journal::next`]):
//!
//! 1. Overlays that the journal is going to refer to get names.
//! 2. Their data, their names, and the image's data are made durable. For the first journal, so is
//!    its header.
//! 3. The first time, the image gets the journal's id in an attribute, durably.
//! 4. A record is written and made durable. The record has the clusters that have *moved*, and the
//!    image's length and times. Before step 2 the record could refer to data that is not there: a
//!    sector of a disk holds its old or its new content, but a file that was not synced may hold
//!    anything.
//! 5. A whole journal, in a file of its own so far, takes the old one's name. The rename is made
//!    durable.
//!
//! A write in place, to an overlay that the journal refers to already, moves nothing. Its flush is
//! step 2 alone, with one sync.
//!
//! A flush of a disk that is again all in its image removes the journal, in three durable steps:
//! the journal becomes invalid, the image's attribute is removed, the files are removed.
//!
//! The journal holds every file it refers to, even if the map no longer does. The files are reused
//! only when another journal, which does not refer to them, is durable.

mod admin;
mod files;
mod flush;
mod format;
mod image_binding;
mod recovery;
mod space;

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use clade_host_io::{FileError, IoFile};

use super::directory::Directory;
use super::map::{CLUSTER, push_run};
pub use admin::{DiskJournal, JournalState};
pub use files::journal_path;
use files::{JOURNAL, Location};
use flush::JournalWrite;
use format::{ImageStatus, JournalHeader};
pub use format::{JournalError, JournalId};
use image_binding::Mark;
pub use recovery::JournalReport;
pub(super) use recovery::{JournalTail, RecoveredJournal, write_back};

/// Moved ranges that are remembered; with more, the next journal is a whole one.
const MAX_MOVED: usize = 1 << 16;

/// An overlay with a name.
#[derive(Debug)]
struct NamedOverlay {
    file: Arc<IoFile>,
    number: u64,
}

impl NamedOverlay {
    /// Whether the journal has the last reference: no map contains the overlay, and it is not
    /// written.
    fn is_stale(&self) -> bool {
        Arc::strong_count(&self.file) == 1
    }
}

/// The state of a disk at a flush.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlushState {
    /// Whether the image was written since it was last synced.
    pub(super) dirty: bool,
    /// Whether the disk writes into the image, or is going to.
    pub(super) writing: bool,
}

/// The journal of an image, as far as it has been written.
#[derive(Debug)]
pub(super) struct Journal {
    location: Location,
    header: JournalHeader,
    clusters: u64,
    base: Arc<IoFile>,
    /// The journal's directory, once it is made.
    dir: Option<Directory>,
    /// Whether the directory's name may not be durable, and whether names in it may not be.
    unnamed: (bool, bool),
    /// Whether the image's attribute has this journal's id, durably.
    marked: bool,
    /// Whether a file with the journal's name may be there.
    named: bool,
    /// The journal's file. `end` bytes and `records` records of it are durable.
    file: Option<Arc<IoFile>>,
    end: u64,
    records: u64,
    /// The image's state in the last durable record.
    seen: Option<ImageStatus>,
    overlays: Vec<NamedOverlay>,
    /// Whether an overlay was ever named: naming is possible here, and a later failure is an error.
    has_linked: bool,
    next_overlay: u64,
    /// Ranges that the map has moved since the last record.
    moved: Vec<Range<u64>>,
    /// The system has failed to make a write durable. It reports that once, and not the lost range:
    /// no record may refer to the overlay.
    broken: bool,
    /// The next record must be a whole one, because the map is not the one that the last record
    /// continued.
    whole: bool,
    /// The file that will replace the journal.
    next: Option<Arc<IoFile>>,
    writing: Option<JournalWrite>,
}

impl Journal {
    /// For the disk opened from `base`. Returns None, and logs it, where there cannot be a journal:
    /// a block device has no directory on disk beside it, an overlay on another file system cannot
    /// be named, or the directory is read-only.
    pub(super) fn new(base: &Arc<IoFile>, size: u64, overlays: &Directory) -> Option<Self> {
        let ready = || -> Result<Self, FileError> {
            let location = Location::of(base.path())?;
            let wrong = |kind: io::ErrorKind| FileError {
                path: location.path(),
                what: "used as a journal",
                source: kind.into(),
            };
            if base.is_block_device() {
                return Err(wrong(io::ErrorKind::Unsupported));
            }
            if location.beside.device()? != overlays.device()? {
                return Err(wrong(io::ErrorKind::CrossesDevices));
            }
            location.beside.check_writable()?;
            let id = match image_binding::read_mark(base)? {
                Mark::Unsupported => {
                    tracing::warn!(
                        path = %base.path().display(),
                        "no extended attributes here: an image that is renamed or replaced is known by its inode and times alone"
                    );
                    None
                }
                Mark::None | Mark::Id(_) => {
                    let id = image_binding::new_id()
                        .map_err(|error| FileError { source: error.into(), ..wrong(io::ErrorKind::Other) });
                    Some(id?)
                }
            };
            let (inode, born) = base.identity()?;
            Ok(Self {
                location,
                header: JournalHeader { size, id, inode, born },
                clusters: size.div_ceil(CLUSTER),
                base: Arc::clone(base),
                dir: None,
                unnamed: (false, false),
                marked: id.is_none(),
                named: false,
                broken: false,
                file: None,
                end: 0,
                records: 0,
                seen: None,
                overlays: Vec::new(),
                has_linked: false,
                next_overlay: 0,
                moved: Vec::new(),
                whole: true,
                next: None,
                writing: None,
            })
        };
        ready()
            .inspect_err(|error| {
                let error = error as &dyn std::error::Error;
                tracing::warn!(path = %base.path().display(), error, "no journal: a flush after a fork is not durable");
            })
            .ok()
    }

    /// The journal's directory, if there may be a journal.
    pub(super) fn kept_in(&self) -> Option<PathBuf> {
        self.named.then(|| self.location.path())
    }

    /// Whether `error`, from the first attempt to name an overlay, means that naming is impossible:
    /// the file system does not support it, the directory is read-only, or /proc is not mounted.
    pub(super) fn is_impossible(&self, error: &FileError) -> bool {
        use rustix::io::Errno as E;
        let errno = E::from_io_error(&error.source);
        let never = [E::OPNOTSUPP, E::PERM, E::ACCESS, E::ROFS, E::NOENT, E::XDEV, E::MLINK];
        !self.has_linked && !self.named && self.overlays.is_empty() && errno.is_some_and(|errno| never.contains(&errno))
    }

    /// Whether a write to an overlay was lost.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the last durable record marks the image as being written.
    pub(super) fn says_writing(&self) -> bool {
        self.seen.is_some_and(|seen| seen.writing)
    }

    /// Refuses an image that another program has changed since the last record.
    pub(super) fn check_image(&self) -> Result<(), ImageCheckError> {
        match self.seen {
            Some(seen) => Ok(image_binding::unchanged(seen, image_binding::stamp(&self.base)?)?),
            None => Ok(()),
        }
    }

    /// Notes that the map has `clusters` in another file now.
    pub(super) fn moved(&mut self, clusters: Range<u64>) {
        if self.whole {
            return;
        }
        push_run(&mut self.moved, clusters);
        if self.moved.len() > MAX_MOVED {
            self.replaced();
        }
    }

    /// Notes that the map was replaced: the next record is a whole one.
    pub(super) fn replaced(&mut self) {
        self.moved.clear();
        self.whole = true;
    }

    /// Notes that another file is now the image. The journal of the old image is gone.
    pub(super) fn rebase(&mut self, base: &Arc<IoFile>, (inode, born): (u64, u64)) {
        self.base = Arc::clone(base);
        (self.header.inode, self.header.born) = (inode, born);
        self.replaced();
    }

    /// The end of the journal, for a commit that copies overlays into the image piece by piece.
    pub(super) fn log(&self) -> Option<JournalTail> {
        let (file, seen) = (self.file.clone()?, self.seen?);
        Some(JournalTail { file, end: self.end, records: self.records, seen })
    }

    /// Removes the journal, when the image has everything.
    ///
    /// # Errors
    /// When the journal is still there. A journal must not be applied to an image written since.
    pub(super) fn remove(&mut self) -> Result<(), FileError> {
        if let Some(dir) = self.dir.clone() {
            files::retire(&self.location, &dir, &self.base)?;
        }
        self.forget_all();
        Ok(())
    }

    fn forget_all(&mut self) {
        self.replaced();
        (self.file, self.next, self.dir, self.seen, self.writing) = (None, None, None, None, None);
        (self.named, self.marked) = (false, self.header.id.is_none());
        self.unnamed = (false, false);
        self.overlays.clear();
    }
}

/// Why an image does not fit its journal, or cannot be compared with it.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageCheckError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Changed(#[from] JournalError),
}

/// The directory of a journal that was left beside `base`, if there is one.
pub(super) fn left_in(base: &IoFile) -> Option<PathBuf> {
    let location = Location::of(base.path()).ok()?;
    let dir = location.beside.open_ours(&location.name).ok()?;
    files::header_in(&dir, JOURNAL).ok().flatten().map(|_| location.path())
}

#[cfg(test)]
mod tests;
