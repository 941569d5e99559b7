//! What of a forked disk survives the process: a journal beside the image.
//!
//! From its first fork on, a disk's writes are in overlays without names, and the image is everybody's to read and nobody's to write. So that a flush keeps
//! its promise all the same, for the disk that was opened from the image, overlays are given names when it is flushed, in a directory beside the image,
//! and a journal there says which granules are in which. Whoever opens the image next puts them in; a commit does the same, and so is
//! one step: until the journal is durable the image has not changed, and from then on it will have all of it.
//!
//! ```text
//! disk.img                    the image, as it was at the first fork
//! disk.img.clade-journal/
//!     journal                 which granules are where (format.rs); replaced as a whole, or appended to
//!     overlay.0, overlay.1    granules, each at its own offset in the disk
//! ```
//!
//! A flush, in this order ([`Journal::begin`], [`Journal::next`]):
//!
//! 1. Overlays with granules that the journal is going to name are given names.
//! 2. What was written to them, and their names, are made durable.
//! 3. A record with the granules that have *moved* is written, and made durable. Before 2 it could name what is not there: unlike a disk, whose sectors
//!    hold the old or the new, a file that nobody has written holds anything.
//! 4. If it is a whole journal, in a file of its own so far: this takes the old one's name, and that is made durable.
//!
//! A write in place, to an overlay the journal names already, moves nothing: 2 is all there is to do, and one sync.
//!
//! What the journal names is not used again for something else, whatever the map says meanwhile: the journal holds the files until another one, which does not
//! name them, is durable.

mod files;
mod format;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_io::{AlignedBuf, CachePolicy, FileError, Fragment, IoFile, Request};

use super::map::{BlockMap, GRANULE, Source, push_run};
use files::{JOURNAL, NEXT, device, directory, open_ours, overlay, remove, remove_all};
pub(super) use files::{Left, left_in};
pub use format::JournalError;
use format::{Entry, Image};

/// Moved ranges that are remembered; if there are more, the next journal is a whole one.
const MOST_MOVED: usize = 1 << 16;
/// A journal that is longer, and as many times as long as a whole one, is replaced.
const LONG: (u64, u64) = (1 << 20, 4);
/// Overlays that nobody but the journal may have, before it is replaced.
const STALE: usize = 16;

/// What is being made durable.
#[derive(Debug)]
struct Writing {
    /// To be remembered again if it fails.
    moved: Vec<Range<u64>>,
    whole: bool,
    synced: Vec<Arc<IoFile>>,
    /// Overlays that the record names, if it is whole: the others' names go.
    named: BTreeSet<u64>,
    /// The record, and the file's header before it if it is the first.
    bytes: Vec<u8>,
    step: Step,
}

/// What the kernel was given last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Data,
    Record,
    Sealed,
    Named,
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

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    image: Image,
    granules: u64,
    base: Arc<IoFile>,
    /// Once it is there; and the one it is in.
    directory: Option<(Arc<IoFile>, Arc<IoFile>)>,
    /// Whether the directory is not known to be durable, or the names in it are not.
    unnamed: (bool, bool),
    /// Whether there may be one of that name.
    named: bool,
    /// Durable, with so many bytes and records.
    file: Option<Arc<IoFile>>,
    end: u64,
    records: u64,
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
    /// For the disk opened from `base`. None where there cannot be one: beside a block device is memory, and a file cannot be given a name on
    /// another file system than its own.
    pub(super) fn new(base: &Arc<IoFile>, size: u64, overlays: &Path) -> Option<Self> {
        let ready = || -> io::Result<Self> {
            let dir = directory(base.path())?;
            let beside = dir.parent().unwrap_or(Path::new("/"));
            if base.is_block_device() || device(beside)? != device(overlays)? {
                return Err(io::ErrorKind::CrossesDevices.into());
            }
            let (inode, born) = base.identity().map_err(|error| error.source)?;
            Ok(Self {
                dir,
                image: Image { size, inode, born },
                granules: size.div_ceil(GRANULE),
                base: Arc::clone(base),
                directory: None,
                unnamed: (false, false),
                named: false,
                broken: false,
                file: None,
                end: 0,
                records: 0,
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
                tracing::debug!(path = %base.path().display(), %error, "no journal: a flush after a fork is not durable");
            })
            .ok()
    }

    /// The directory it is in, if anything is.
    pub(super) fn kept_in(&self) -> Option<&Path> {
        self.named.then_some(self.dir.as_path())
    }

    /// Whether `error`, at the first name that was to be given, says that none can be: the file system has no such thing,
    /// the directory is not to be written, or /proc is not there.
    pub(super) fn is_impossible(&self, error: &FileError) -> bool {
        use rustix::io::Errno as E;
        let errno = E::from_io_error(&error.source);
        let never = [E::OPNOTSUPP, E::PERM, E::ACCESS, E::ROFS, E::NOENT, E::XDEV, E::MLINK];
        !self.named && self.overlays.is_empty() && errno.is_some_and(|errno| never.contains(&errno))
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

    /// Whether what is moved should rather be said as a whole.
    fn is_long(&self, map: &BlockMap) -> bool {
        let (long, times) = LONG;
        self.end > long && self.end > times * (format::ENTRY * map.len()) as u64
            || self.overlays.iter().filter(|named| named.is_stale()).count() > STALE
    }

    /// Begins to make durable what `map` shows and the image does not. What is to be given to the kernel first; nothing, if there is
    /// nothing to be done.
    ///
    /// # Errors
    /// When a name cannot be given. The next flush tries again.
    pub(super) fn begin(&mut self, map: &BlockMap) -> Result<Vec<Request>, FileError> {
        if self.broken {
            let (path, source) = (self.dir.clone(), io::Error::from(rustix::io::Errno::IO));
            return Err(FileError { path, what: "added to since a write to an overlay was lost", source });
        }
        let whole = self.whole || self.is_long(map);
        let all = 0..self.granules;
        let ranges = if whole { std::slice::from_ref(&all) } else { &self.moved };
        let pieces = ranges.iter().flat_map(|range| map.pieces(range.clone()));
        let pieces = pieces.filter(|(_, source)| !source.is(&self.base));
        let pieces: Vec<_> = pieces.map(|(granules, source)| (granules, source.clone())).collect();
        if whole && pieces.is_empty() && !self.named {
            return Ok(Vec::new());
        }
        let (directory, beside) = self.make_directory()?;
        let mut entries = Vec::with_capacity(pieces.len());
        for (granules, source) in pieces {
            let overlay = match source {
                Source::Zero => None,
                Source::File(file) => Some(self.number(&file)?),
            };
            entries.push(Entry { granules, overlay });
        }
        let named = [(self.unnamed.0, beside), (self.unnamed.1, directory)];
        let mut requests: Vec<Request> = named
            .into_iter()
            .filter(|(wanted, _)| *wanted)
            .map(|(_, file)| Request::Sync { file, all: true })
            .collect();
        let overlays = self.overlays.iter().map(|named| &named.file);
        let synced: Vec<_> = overlays.filter(|file| file.take_unsynced()).cloned().collect();
        requests.extend(synced.iter().map(|file| Request::Sync { file: Arc::clone(file), all: false }));
        let mut bytes = if whole { format::header(self.image) } else { Vec::new() };
        if whole || !entries.is_empty() {
            bytes.extend(format::record(if whole { 0 } else { self.records }, &entries));
        }
        let named = entries.iter().filter_map(|entry| entry.overlay).collect();
        let moved = mem::take(&mut self.moved);
        self.whole = false;
        self.writing = Some(Writing { moved, whole, synced, named, bytes, step: Step::Data });
        Ok(requests)
    }

    /// The number of an overlay's name; the next one that nobody has, if it has none yet.
    fn number(&mut self, file: &Arc<IoFile>) -> Result<u64, FileError> {
        if let Some(named) = self.overlays.iter().find(|named| Arc::ptr_eq(&named.file, file)) {
            return Ok(named.number);
        }
        loop {
            let number = self.next_overlay;
            self.next_overlay += 1;
            match file.link(&overlay(&self.dir, number)) {
                Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => continue,
                linked => linked?,
            }
            self.unnamed.1 = true;
            self.overlays.push(Named { file: Arc::clone(file), number });
            return Ok(number);
        }
    }

    /// The journal's directory, made if it is not there, and the one it is in.
    fn make_directory(&mut self) -> Result<(Arc<IoFile>, Arc<IoFile>), FileError> {
        if let Some((directory, beside)) = &self.directory {
            return Ok((Arc::clone(directory), Arc::clone(beside)));
        }
        let failed = |source| FileError { path: self.dir.clone(), what: "made", source };
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => self.unnamed.0 = true,
        }
        let open = |file: File, path: &Path| Arc::new(IoFile::read_only(file, path, CachePolicy::Host));
        let directory = open_ours(&self.dir).map_err(failed)?;
        // Kept for as long as the journal is: an image that takes this one's name under a running VM does not take its journal.
        directory.try_lock().map_err(|error| failed(error.into()))?;
        let beside = self.dir.parent().unwrap_or(Path::new("/"));
        let beside = open(File::open(beside).map_err(failed)?, beside);
        Ok(self.directory.insert((open(directory, &self.dir), beside)).clone())
    }

    /// What is to be given to the kernel next, when it has done all it was given. None when everything is durable.
    ///
    /// # Errors
    /// When the journal cannot be replaced. To be told with [`Journal::give_up`].
    pub(super) fn next(&mut self) -> Result<Option<Request>, FileError> {
        let Some(writing) = &mut self.writing else { return Ok(None) };
        if writing.step == Step::Data {
            self.unnamed = (false, false);
        }
        if writing.step == Step::Data && writing.whole {
            self.next = Some(Arc::new(IoFile::create(&self.dir.join(NEXT))?));
        }
        let to = if writing.whole { &self.next } else { &self.file };
        match writing.step {
            Step::Data if !writing.bytes.is_empty() => {
                writing.step = Step::Record;
                let buffer = Arc::new(AlignedBuf::new(writing.bytes.len()));
                let fragment = Fragment::owned(&buffer, 0, writing.bytes.len()).ok();
                fragment.iter().for_each(|fragment| fragment.slice().copy_from(&writing.bytes));
                let offset = if writing.whole { 0 } else { self.end };
                let buffers = fragment.into_iter().collect();
                Ok(to.clone().map(|file| Request::Write { file, offset, buffers }))
            }
            Step::Record => {
                writing.step = Step::Sealed;
                Ok(to.clone().map(|file| Request::Sync { file, all: false }))
            }
            Step::Sealed if writing.whole => {
                writing.step = Step::Named;
                // Before: it may be there although it failed.
                self.named = true;
                let failed = |source| FileError { path: self.dir.join(JOURNAL), what: "replaced", source };
                fs::rename(self.dir.join(NEXT), self.dir.join(JOURNAL)).map_err(failed)?;
                Ok(self.directory.clone().map(|(file, _)| Request::Sync { file, all: true }))
            }
            Step::Data | Step::Sealed | Step::Named => {
                self.written();
                Ok(None)
            }
        }
    }

    fn written(&mut self) {
        let Some(writing) = self.writing.take() else { return };
        if writing.whole {
            (self.file, self.end, self.records) = (self.next.take(), 0, 0);
            // They were named by the journal that is gone. A file can be given a name only once, so whoever may be written again keeps it.
            let keeps = |named: &Named| writing.named.contains(&named.number) || !named.is_stale();
            let (keep, gone): (Vec<_>, Vec<_>) = mem::take(&mut self.overlays).into_iter().partition(keeps);
            self.overlays = keep;
            gone.iter().for_each(|named| remove(&overlay(&self.dir, named.number)));
        }
        self.end += writing.bytes.len() as u64;
        self.records += u64::from(!writing.bytes.is_empty());
    }

    /// The flush failed: nothing of it counts, and the next one does it all again, unless something was `lost`.
    pub(super) fn give_up(&mut self, lost: bool) {
        let Some(mut writing) = self.writing.take() else { return };
        self.broken |= lost && writing.step == Step::Data;
        writing.synced.iter().for_each(|file| file.set_unsynced());
        // With the names as well: that of a whole journal may or may not have been taken.
        self.whole |= writing.whole;
        writing.moved.append(&mut self.moved);
        self.moved = writing.moved;
        if self.whole {
            self.moved.clear();
        }
    }

    /// Takes it away: the image has everything.
    ///
    /// # Errors
    /// When it is still there. It must not be put in again, once the image has been written.
    pub(super) fn remove(&mut self) -> Result<(), FileError> {
        self.replaced();
        if self.directory.take().is_some() {
            (self.file, self.next) = (None, None);
            remove_all(&self.dir)?;
        }
        self.named = false;
        self.overlays.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
