//! What of a forked disk survives the process: a journal beside the image.
//!
//! From its first fork on, a disk's writes are in overlays without names, and the image is everybody's to read and
//! nobody's to write. So that a flush keeps its promise, the disk that was opened from the image gives its overlays
//! names when it is flushed, in a directory beside the image. A journal there says which clusters are in which. Whoever
//! opens the image next puts them in (left.rs). A commit does the same, and so is one step.
//!
//! ```text
//! disk.img                    the image; the attribute user.clade.journal has the journal's id
//! disk.img.clade-journal/
//!     journal                 which clusters are where (format.rs); replaced as a whole, or appended to
//!     journal.next            a journal that does not count: not yet, or no longer
//!     overlay.0, overlay.1    clusters, each at its own offset in the disk
//! ```
//!
//! A flush, in this order ([`Journal::begin`], [`Journal::next`]):
//!
//! 1. Overlays with clusters that the journal is going to name are given names.
//! 2. What was written to them, their names, and what was written to the image are made durable. For the first journal, so is its header.
//! 3. The first time, the image is given the journal's id, durably.
//! 4. A record with the clusters that have *moved*, and with the image's length and times, is written and made durable. Before 2 it could name what is
//!    not there: unlike a disk, whose sectors hold the old or the new, a file that nobody has written holds anything.
//! 5. A whole journal, in a file of its own so far, takes the old one's name, and that is made durable.
//!
//! A write in place, to an overlay the journal names already, moves nothing: 2 is all there is to do, and one sync.
//!
//! A flush of a disk that is all in its image again takes the journal away: it ceases to count, the image says that it has none, the files go.
//! Each is durable before the next.
//!
//! What the journal names is not used again for something else, whatever the map says meanwhile: the journal holds the files until another one, which does not
//! name them, is durable.

mod admin;
mod files;
mod flush;
mod format;
mod left;
mod space;
mod tie;

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use clade_io::{FileError, IoFile};

use super::directory::Directory;
use super::map::{CLUSTER, push_run};
pub use admin::{DiskJournal, JournalState};
use files::{JOURNAL, Location};
use flush::Writing;
use format::{Header, Seen};
pub use format::{JournalError, JournalId};
pub use left::Report;
pub(super) use left::{Log, RecoveredJournal, write_back};
use tie::Mark;

/// Moved ranges that are remembered; if there are more, the next journal is a whole one.
const MAX_MOVED: usize = 1 << 16;

/// An overlay with a name.
#[derive(Debug)]
struct Named {
    file: Arc<IoFile>,
    number: u64,
}

impl Named {
    /// Whether only the journal has it: it is in no map any more, and nobody will write to it.
    fn is_stale(&self) -> bool {
        Arc::strong_count(&self.file) == 1
    }
}

/// How a disk stands when it is flushed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    /// Whether the image was written since it was last synced.
    pub(super) dirty: bool,
    /// Whether the disk goes on, or will go on, to write into the image.
    pub(super) writing: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Journal {
    location: Location,
    header: Header,
    clusters: u64,
    base: Arc<IoFile>,
    /// Once it is there.
    dir: Option<Directory>,
    /// Whether the directory is not known to be durable, or the names in it are not.
    unnamed: (bool, bool),
    /// Whether the image says, durably, that it has this journal.
    marked: bool,
    /// Whether there may be one of that name.
    named: bool,
    /// Durable, with so many bytes and records.
    file: Option<Arc<IoFile>>,
    end: u64,
    records: u64,
    /// What the last durable record says of the image.
    seen: Option<Seen>,
    overlays: Vec<Named>,
    next_overlay: u64,
    /// Since the last record: what the map has elsewhere.
    moved: Vec<Range<u64>>,
    /// Whether the system has failed to make something durable. It says so once, and has then forgotten what: a record must not name it.
    broken: bool,
    /// Whether the next record must say all: the map is not the one the last was about.
    whole: bool,
    /// To be replaced by this one.
    next: Option<Arc<IoFile>>,
    writing: Option<Writing>,
}

impl Journal {
    /// For the disk opened from `base`. None where there cannot be one, which is logged: beside a block device is memory, a file cannot be given a name on
    /// another file system than its own, and a directory may be read-only.
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
            let id = match tie::read_mark(base)? {
                Mark::Unsupported => {
                    tracing::warn!(
                        path = %base.path().display(),
                        "no extended attributes here: an image that is renamed or replaced is known by its inode and times alone"
                    );
                    None
                }
                Mark::None | Mark::Id(_) => {
                    let id = tie::new_id()
                        .map_err(|error| FileError { source: error.into(), ..wrong(io::ErrorKind::Other) });
                    Some(id?)
                }
            };
            let (inode, born) = base.identity()?;
            Ok(Self {
                location,
                header: Header { size, id, inode, born },
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

    /// The directory it is in, if anything is.
    pub(super) fn kept_in(&self) -> Option<PathBuf> {
        self.named.then(|| self.location.path())
    }

    /// Whether `error`, at the first name that was to be given, says that none can be: the file system has no such thing,
    /// the directory is not to be written, or /proc is not there.
    pub(super) fn is_impossible(&self, error: &FileError) -> bool {
        use rustix::io::Errno as E;
        let errno = E::from_io_error(&error.source);
        let never = [E::OPNOTSUPP, E::PERM, E::ACCESS, E::ROFS, E::NOENT, E::XDEV, E::MLINK];
        !self.named && self.overlays.is_empty() && errno.is_some_and(|errno| never.contains(&errno))
    }

    /// Whether a write to an overlay was lost.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the last durable record says that the image is being written.
    pub(super) fn says_writing(&self) -> bool {
        self.seen.is_some_and(|seen| seen.writing)
    }

    /// Refuses an image that something else has changed since the last record.
    pub(super) fn check_image(&self) -> Result<(), ImageError> {
        match self.seen {
            Some(seen) => Ok(tie::unchanged(seen, tie::stamp(&self.base)?)?),
            None => Ok(()),
        }
    }

    /// The map has `clusters` elsewhere now.
    pub(super) fn moved(&mut self, clusters: Range<u64>) {
        if self.whole {
            return;
        }
        push_run(&mut self.moved, clusters);
        if self.moved.len() > MAX_MOVED {
            self.replaced();
        }
    }

    /// The map is another.
    pub(super) fn replaced(&mut self) {
        self.moved.clear();
        self.whole = true;
    }

    /// Another file is the image now. There is no journal of the one before.
    pub(super) fn rebase(&mut self, base: &Arc<IoFile>, (inode, born): (u64, u64)) {
        self.base = Arc::clone(base);
        (self.header.inode, self.header.born) = (inode, born);
        self.replaced();
    }

    /// Where an overlay's clusters go into the image piece by piece.
    pub(super) fn log(&self) -> Option<Log> {
        let (file, seen) = (self.file.clone()?, self.seen?);
        Some(Log { file, end: self.end, records: self.records, seen })
    }

    /// Takes it away: the image has everything.
    ///
    /// # Errors
    /// When it is still there. It must not be put in again, once the image has been written.
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

/// An image that cannot be compared with its journal, or has changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Changed(#[from] JournalError),
}

/// Where the journal is that was left beside `base`, if one was.
pub(super) fn left_in(base: &IoFile) -> Option<PathBuf> {
    let location = Location::of(base.path()).ok()?;
    let dir = location.beside.open_ours(&location.name).ok()?;
    files::header_in(&dir, JOURNAL).ok().flatten().map(|_| location.path())
}

#[cfg(test)]
mod tests;
