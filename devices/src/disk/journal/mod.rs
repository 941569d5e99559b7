//! What of a forked disk survives the process: a journal beside the image.
//!
//! From its first fork on, a disk's writes are in overlays without names, and the image is everybody's to read and nobody's to write. So that a flush keeps
//! its promise, the disk that was opened from the image gives its overlays names when it is flushed, in a directory beside the image. A journal
//! there says which granules are in which. Whoever opens the image next puts them in (left.rs). A commit does the same, and so is one step.
//!
//! ```text
//! disk.img                    the image; the attribute user.clade.journal has the journal's id
//! disk.img.clade-journal/
//!     journal                 which granules are where (format.rs); replaced as a whole, or appended to
//!     journal.next            a journal that does not count: not yet, or no longer
//!     overlay.0, overlay.1    granules, each at its own offset in the disk
//! ```
//!
//! A flush, in this order ([`Journal::begin`], [`Journal::next`]):
//!
//! 1. Overlays with granules that the journal is going to name are given names.
//! 2. What was written to them, their names, and what was written to the image are made durable. For the first journal, so is its header.
//! 3. The first time, the image is given the journal's id, durably.
//! 4. A record with the granules that have *moved*, and with the image's length and times, is written and made durable. Before 2 it could name what is
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
mod format;
mod left;
mod space;
mod tie;

use std::collections::BTreeSet;
use std::io;
use std::mem;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use clade_io::{AlignedBuf, FileError, Fragment, IoFile, Request};

use super::directory::{Directory, write};
use super::map::{BlockMap, GRANULE, Source, push_run};
pub use admin::{DiskJournal, JournalState};
use files::{JOURNAL, Location, NEXT, forget, overlay, remove_files};
use format::{Entry, Header, Place, Seen};
pub use format::{JournalError, JournalId};
use left::Log;
pub use left::Report;
pub(super) use left::{Left, write_back};
use tie::Mark;

/// Moved ranges that are remembered; if there are more, the next journal is a whole one.
const MOST_MOVED: usize = 1 << 16;
/// What is being made durable.
#[derive(Debug)]
struct Writing {
    /// To be remembered again if it fails.
    moved: Vec<Range<u64>>,
    whole: bool,
    /// Whether the journal is taken away.
    retires: bool,
    synced: Vec<Arc<IoFile>>,
    /// Overlays that the record names, if it is whole: the others' names go.
    named: BTreeSet<u64>,
    entries: Vec<Entry>,
    /// Whether the image was written since its stamp was taken.
    restamp: bool,
    /// What the record says of the image, once that is known.
    seen: Seen,
    /// Bytes of the record.
    len: u64,
    step: Step,
}

/// What the kernel was given last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Data,
    Marked,
    Record,
    Sealed,
    Named,
    Retired,
    Unmarked,
}

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
    granules: u64,
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
                granules: size.div_ceil(GRANULE),
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

    /// The map has `granules` elsewhere now.
    pub(super) fn moved(&mut self, granules: Range<u64>) {
        if self.whole {
            return;
        }
        push_run(&mut self.moved, granules);
        if self.moved.len() > MOST_MOVED {
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

    /// Begins to make durable what `map` shows and the image does not. What is to be given to the kernel first; nothing, if there is
    /// nothing to be done.
    ///
    /// # Errors
    /// When a name cannot be given. The next flush tries again.
    pub(super) fn begin(&mut self, map: &BlockMap, standing: Standing) -> Result<Vec<Request>, FileError> {
        if self.broken {
            let (path, source) = (self.location.path(), io::Error::from(rustix::io::Errno::IO));
            return Err(FileError { path, what: "added to since a write to an overlay was lost", source });
        }
        let synced = Arc::clone(&self.base);
        let base = || Request::Sync { file: Arc::clone(&synced), all: true };
        let elsewhere = !map.is_all(0..self.granules, &self.base);
        if !elsewhere && !self.named {
            return Ok(standing.dirty.then(base).into_iter().collect());
        }
        if !elsewhere {
            self.begin_retiring();
            return Ok(vec![base()]);
        }
        let mut requests: Vec<Request> = standing.dirty.then(base).into_iter().collect();
        let whole = self.whole || self.is_long(map);
        let all = 0..self.granules;
        let ranges = if whole { std::slice::from_ref(&all) } else { &self.moved };
        let pieces = ranges.iter().flat_map(|range| map.pieces(range.clone()));
        let pieces = pieces.filter(|(_, source)| !whole || !source.is(&self.base));
        let pieces: Vec<_> = pieces.map(|(granules, source)| (granules, source.clone())).collect();
        let dir = self.make_directory()?;
        let mut entries = Vec::with_capacity(pieces.len());
        for (granules, source) in pieces {
            let place = match source {
                Source::Zero => Place::Zeros,
                Source::File(file) if Arc::ptr_eq(&file, &self.base) => Place::Image,
                Source::File(file) => Place::Overlay(self.number(&dir, &file)?),
            };
            entries.push(Entry { granules, place });
        }
        let directories = [(self.unnamed.0, &self.location.beside), (self.unnamed.1, &dir)];
        let directories = directories.into_iter().filter(|(wanted, _)| *wanted);
        requests.extend(directories.map(|(_, dir)| Request::Sync { file: Arc::clone(dir.file()), all: true }));
        if whole {
            let next = dir.create(NEXT)?;
            write(&next, &format::header(self.header), 0)?;
            if !self.marked {
                requests.push(Request::Sync { file: Arc::clone(&next), all: false });
                // Its name as well: the image must not say that it has what is not there.
                requests.push(Request::Sync { file: Arc::clone(dir.file()), all: true });
            }
            self.next = Some(next);
        }
        let overlays = self.overlays.iter().map(|named| &named.file);
        let synced: Vec<_> = overlays.filter(|file| file.take_unsynced()).cloned().collect();
        requests.extend(synced.iter().map(|file| Request::Sync { file: Arc::clone(file), all: false }));
        let number = |entry: &Entry| if let Place::Overlay(number) = entry.place { Some(number) } else { None };
        let named = entries.iter().filter_map(number).collect();
        let seen = Seen { writing: standing.writing, ..self.seen.unwrap_or_default() };
        // While the image is written its times are not kept.
        let was_writing = self.says_writing() && !standing.writing;
        let restamp = standing.dirty || was_writing || self.seen.is_none() || !self.marked;
        let moved = mem::take(&mut self.moved);
        self.whole = false;
        let (retires, len, step) = (false, 0, Step::Data);
        self.writing = Some(Writing { moved, whole, retires, synced, named, entries, restamp, seen, len, step });
        Ok(requests)
    }

    /// The image has everything: the journal goes.
    fn begin_retiring(&mut self) {
        let (moved, entries, synced) = (mem::take(&mut self.moved), Vec::new(), Vec::new());
        let (named, seen) = (BTreeSet::new(), self.seen.unwrap_or_default());
        self.writing = Some(Writing {
            moved,
            whole: true,
            retires: true,
            synced,
            named,
            entries,
            restamp: false,
            seen,
            len: 0,
            step: Step::Data,
        });
    }

    /// The number of an overlay's name; the next one that nobody has, if it has none yet.
    fn number(&mut self, dir: &Directory, file: &Arc<IoFile>) -> Result<u64, FileError> {
        if let Some(named) = self.overlays.iter().find(|named| Arc::ptr_eq(&named.file, file)) {
            return Ok(named.number);
        }
        loop {
            let number = self.next_overlay;
            self.next_overlay += 1;
            match dir.link(file, &overlay(number)) {
                Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => continue,
                linked => linked?,
            }
            self.unnamed.1 = true;
            self.overlays.push(Named { file: Arc::clone(file), number });
            return Ok(number);
        }
    }

    /// The journal's directory, made if it is not there.
    fn make_directory(&mut self) -> Result<Directory, FileError> {
        if let Some(dir) = &self.dir {
            return Ok(dir.clone());
        }
        self.location.beside.make(&self.location.name)?;
        self.unnamed.0 = true;
        let dir = self.location.beside.open_ours(&self.location.name)?;
        // Kept for as long as the journal is: an image that takes this one's name under a running VM does not take its journal.
        dir.lock(true)?;
        Ok(self.dir.insert(dir).clone())
    }

    /// What is to be given to the kernel next, when it has done all it was given. None when everything is durable.
    ///
    /// # Errors
    /// When the journal cannot be replaced. To be told with [`Journal::give_up`].
    pub(super) fn next(&mut self) -> Result<Option<Request>, FileError> {
        let (Some(writing), Some(dir)) = (&mut self.writing, &self.dir) else { return Ok(None) };
        let sync = |file: &Arc<IoFile>, all| Ok(Some(Request::Sync { file: Arc::clone(file), all }));
        let to = if writing.whole { &self.next } else { &self.file };
        match writing.step {
            Step::Data if writing.retires => {
                writing.step = Step::Retired;
                // It may be called so already: this may be done for the second time.
                if let Err(error) = dir.rename(JOURNAL, NEXT)
                    && error.source.kind() != io::ErrorKind::NotFound
                {
                    return Err(error);
                }
                sync(dir.file(), true)
            }
            Step::Data if !self.marked => {
                self.unnamed = (false, false);
                writing.step = Step::Marked;
                if let Some(id) = self.header.id {
                    tie::set_mark(&self.base, id)?;
                }
                sync(&self.base, true)
            }
            Step::Data | Step::Marked => {
                self.unnamed = (false, false);
                self.marked = true;
                self.write_record()
            }
            Step::Record => {
                writing.step = Step::Sealed;
                to.as_ref().map_or(Ok(None), |to| sync(to, false))
            }
            Step::Sealed if writing.whole => {
                writing.step = Step::Named;
                // Before: it may be there although it failed.
                self.named = true;
                dir.rename(NEXT, JOURNAL)?;
                sync(dir.file(), true)
            }
            Step::Sealed | Step::Named => {
                self.written();
                Ok(None)
            }
            Step::Retired => {
                writing.step = Step::Unmarked;
                tie::clear_mark(&self.base)?;
                sync(&self.base, true)
            }
            Step::Unmarked => {
                remove_files(&self.location, dir);
                self.forget_all();
                Ok(None)
            }
        }
    }

    /// The record, now that all it is about is durable. Nothing if it would say what the last one says.
    fn write_record(&mut self) -> Result<Option<Request>, FileError> {
        let Some(writing) = &mut self.writing else { return Ok(None) };
        if writing.restamp {
            writing.seen.stamp = tie::stamp(&self.base)?;
        }
        if !writing.whole && writing.entries.is_empty() && self.seen == Some(writing.seen) {
            self.written();
            return Ok(None);
        }
        let (to, offset, number) =
            if writing.whole { (&self.next, format::HEADER as u64, 0) } else { (&self.file, self.end, self.records) };
        let bytes = format::record(number, writing.seen, &writing.entries);
        writing.len = bytes.len() as u64;
        writing.step = Step::Record;
        let buffer = Arc::new(AlignedBuf::new(bytes.len()));
        let fragment = Fragment::owned(&buffer, 0, bytes.len()).ok();
        fragment.iter().for_each(|fragment| fragment.slice().copy_from(&bytes));
        let buffers = fragment.into_iter().collect();
        Ok(to.clone().map(|file| Request::Write { file, offset, buffers }))
    }

    fn written(&mut self) {
        let (Some(writing), Some(dir)) = (self.writing.take(), &self.dir) else { return };
        if writing.whole {
            (self.file, self.end, self.records) = (self.next.take(), format::HEADER as u64, 0);
            // They were named by the journal that is gone. A file can be given a name only once, so whoever may be written again keeps it.
            let keeps = |named: &Named| writing.named.contains(&named.number) || !named.is_stale();
            let (keep, gone): (Vec<_>, Vec<_>) = mem::take(&mut self.overlays).into_iter().partition(keeps);
            self.overlays = keep;
            gone.iter().for_each(|named| forget(dir, named.number));
        }
        self.seen = Some(writing.seen);
        self.end += writing.len;
        self.records += u64::from(writing.len > 0);
    }

    /// The flush failed: nothing of it counts, and the next one does it all again, unless something was `lost`.
    pub(super) fn give_up(&mut self, lost: bool) {
        let Some(mut writing) = self.writing.take() else { return };
        self.broken |= lost && writing.step == Step::Data;
        writing.synced.iter().for_each(|file| file.set_unsynced());
        if writing.retires && writing.step != Step::Data {
            // It may or may not be called one still, and the image may or may not say so: all of it is made anew.
            self.marked = self.header.id.is_none();
            self.seen = None;
        }
        // With the names as well: that of a whole journal may or may not have been taken.
        self.whole |= writing.whole;
        writing.moved.append(&mut self.moved);
        self.moved = writing.moved;
        if self.whole {
            self.moved.clear();
        }
    }

    /// Where an overlay's granules go into the image piece by piece.
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
