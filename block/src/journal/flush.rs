//! The steps of a flush: the requests to the kernel, their order, and the state after a failure.
//!
//! The order is in the documentation of [`super`].

use std::collections::BTreeSet;
use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use clade_host_io::{AlignedBuf, FileError, Fragment, IoFile, Request};

use super::files::{JOURNAL, NEXT, forget, overlay, remove_files};
use super::format::{self, ImageStatus, JournalEntry, StoredIn};
use super::{FlushState, Journal, NamedOverlay, image_binding};
use crate::directory::{Directory, not_synced, write};
use crate::map::{BlockMap, ClusterSource};

/// The record of the flush in progress.
#[derive(Debug)]
pub(super) struct JournalWrite {
    /// Ranges to remember again if the flush fails.
    moved: Vec<Range<u64>>,
    whole: bool,
    /// Whether the flush removes the journal.
    retires: bool,
    synced: Vec<Arc<IoFile>>,
    /// Overlays in the record, if it is a whole one. The names of the others are removed.
    named: BTreeSet<u64>,
    entries: Vec<JournalEntry>,
    /// Whether the image was written after its stamp was taken.
    restamp: bool,
    /// The image's state for the record, once it is known.
    seen: ImageStatus,
    /// Bytes of the record.
    len: u64,
    step: JournalStep,
}

/// The last request given to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JournalStep {
    Data,
    Marked,
    Record,
    Sealed,
    Named,
    Retired,
    Unmarked,
}

impl Journal {
    /// Begins to make durable the clusters of `map` that are not durable in the image. Returns the
    /// first requests for the kernel: none, if everything is durable.
    ///
    /// # Errors
    /// When an overlay cannot be named. The next flush tries again.
    pub(crate) fn begin(&mut self, map: &BlockMap, standing: FlushState) -> Result<Vec<Request>, FileError> {
        self.check_whole()?;
        let synced = Arc::clone(&self.base);
        let base = || Request::Sync { file: Arc::clone(&synced), all: true };
        let elsewhere = !map.is_all(0..self.clusters, &self.base);
        if !elsewhere && !self.named {
            self.forget_stale();
            return Ok(standing.dirty.then(base).into_iter().collect());
        }
        if !elsewhere {
            self.begin_retiring();
            return Ok(vec![base()]);
        }
        let mut requests: Vec<Request> = standing.dirty.then(base).into_iter().collect();
        let whole = self.whole || self.is_long(map);
        let all = 0..self.clusters;
        let ranges = if whole { std::slice::from_ref(&all) } else { &self.moved };
        let pieces = ranges.iter().flat_map(|range| map.pieces(range.clone()));
        let pieces = pieces.filter(|(_, source)| !whole || !source.is(&self.base));
        let pieces: Vec<_> = pieces.map(|(clusters, source)| (clusters, source.clone())).collect();
        let dir = self.make_directory()?;
        let mut entries = Vec::with_capacity(pieces.len());
        for (clusters, source) in pieces {
            let stored_in = match source {
                ClusterSource::Zero => StoredIn::Zeros,
                ClusterSource::File(file) if Arc::ptr_eq(&file, &self.base) => StoredIn::Image,
                ClusterSource::File(file) => StoredIn::Overlay(self.number(&dir, &file)?),
            };
            entries.push(JournalEntry { clusters, stored_in });
        }
        let directories = [(self.unnamed.0, &self.location.beside), (self.unnamed.1, &dir)];
        let directories = directories.into_iter().filter(|(wanted, _)| *wanted);
        requests.extend(directories.map(|(_, dir)| Request::Sync { file: Arc::clone(dir.file()), all: true }));
        if whole {
            let next = dir.create(NEXT)?;
            write(&next, &format::header(self.header), 0)?;
            if !self.marked {
                requests.push(Request::Sync { file: Arc::clone(&next), all: false });
                // The directory's name too: the image's attribute must not refer to an absent
                // journal.
                requests.push(Request::Sync { file: Arc::clone(dir.file()), all: true });
            }
            self.next = Some(next);
        }
        self.broken |= self.overlays.iter().any(|named| named.file.knows_lost_writes());
        self.check_whole()?;
        let overlays = self.overlays.iter().map(|named| &named.file);
        let synced: Vec<_> = overlays.filter(|file| file.take_unsynced()).cloned().collect();
        requests.extend(synced.iter().map(|file| Request::Sync { file: Arc::clone(file), all: false }));
        let number =
            |entry: &JournalEntry| if let StoredIn::Overlay(number) = entry.stored_in { Some(number) } else { None };
        let named = entries.iter().filter_map(number).collect();
        let seen = ImageStatus { writing: standing.writing, ..self.seen.unwrap_or_default() };
        // Times of the image are not recorded while it is being written.
        let was_writing = self.says_writing() && !standing.writing;
        let restamp = standing.dirty || was_writing || self.seen.is_none() || !self.marked;
        let moved = mem::take(&mut self.moved);
        self.whole = false;
        let (retires, len, step) = (false, 0, JournalStep::Data);
        self.writing = Some(JournalWrite { moved, whole, retires, synced, named, entries, restamp, seen, len, step });
        Ok(requests)
    }

    fn check_whole(&self) -> Result<(), FileError> {
        if !self.broken {
            return Ok(());
        }
        let (path, source) = (self.location.path(), io::Error::from(rustix::io::Errno::IO));
        Err(FileError { path, what: "added to since a write to an overlay was lost", source })
    }

    /// Begins to remove the journal: the image has everything.
    fn begin_retiring(&mut self) {
        let (moved, entries, synced) = (mem::take(&mut self.moved), Vec::new(), Vec::new());
        let (named, seen) = (BTreeSet::new(), self.seen.unwrap_or_default());
        self.writing = Some(JournalWrite {
            moved,
            whole: true,
            retires: true,
            synced,
            named,
            entries,
            restamp: false,
            seen,
            len: 0,
            step: JournalStep::Data,
        });
    }

    /// The number in an overlay's name. Gives the overlay the next free number if it has no name.
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
            (self.unnamed.1, self.has_linked) = (true, true);
            self.overlays.push(NamedOverlay { file: Arc::clone(file), number });
            return Ok(number);
        }
    }

    /// Opens the journal's directory. Makes it if it is absent.
    fn make_directory(&mut self) -> Result<Directory, FileError> {
        if let Some(dir) = &self.dir {
            return Ok(dir.clone());
        }
        self.location.beside.make(&self.location.name)?;
        self.unnamed.0 = true;
        let dir = self.location.beside.open_ours(&self.location.name)?;
        // Held as long as the journal: an image that takes this one's name under a running VM must
        // not take its journal.
        dir.lock(true)?;
        Ok(self.dir.insert(dir).clone())
    }

    /// The next request, once the kernel has completed all earlier ones. None when everything is
    /// durable.
    ///
    /// # Errors
    /// When a step fails. [`Journal::give_up`] must be called then.
    pub(crate) fn next(&mut self) -> Result<Option<Request>, FileError> {
        let (Some(writing), Some(dir)) = (&mut self.writing, &self.dir) else { return Ok(None) };
        let sync = |file: &Arc<IoFile>, all| Ok(Some(Request::Sync { file: Arc::clone(file), all }));
        let to = if writing.whole { &self.next } else { &self.file };
        match writing.step {
            JournalStep::Data if writing.retires => {
                writing.step = JournalStep::Retired;
                // The rename may be done already, when this is the second attempt.
                if let Err(error) = dir.rename(JOURNAL, NEXT)
                    && error.source.kind() != io::ErrorKind::NotFound
                {
                    return Err(error);
                }
                sync(dir.file(), true)
            }
            JournalStep::Data if !self.marked => {
                self.unnamed = (false, false);
                writing.step = JournalStep::Marked;
                if let Some(id) = self.header.id {
                    image_binding::set_mark(&self.base, id)?;
                }
                sync(&self.base, true)
            }
            JournalStep::Data | JournalStep::Marked => {
                self.unnamed = (false, false);
                self.marked = true;
                self.write_record()
            }
            JournalStep::Record => {
                writing.step = JournalStep::Sealed;
                to.as_ref().map_or(Ok(None), |to| sync(to, false))
            }
            JournalStep::Sealed if writing.whole => {
                writing.step = JournalStep::Named;
                // Set first: the file may have its name even if the rename failed.
                self.named = true;
                dir.rename(NEXT, JOURNAL)?;
                sync(dir.file(), true)
            }
            JournalStep::Sealed | JournalStep::Named => {
                self.written();
                Ok(None)
            }
            JournalStep::Retired => {
                writing.step = JournalStep::Unmarked;
                image_binding::clear_mark(&self.base)?;
                sync(&self.base, true)
            }
            JournalStep::Unmarked => {
                self.retired();
                Ok(None)
            }
        }
    }

    /// Writes the record, now that everything it refers to is durable. None if it equals the last
    /// record.
    fn write_record(&mut self) -> Result<Option<Request>, FileError> {
        let Some(writing) = &mut self.writing else { return Ok(None) };
        if writing.restamp {
            writing.seen.stamp = image_binding::stamp(&self.base)?;
        }
        if !writing.whole && writing.entries.is_empty() && self.seen == Some(writing.seen) {
            self.written();
            return Ok(None);
        }
        let (to, offset, number) =
            if writing.whole { (&self.next, format::HEADER as u64, 0) } else { (&self.file, self.end, self.records) };
        let bytes = format::record(number, writing.seen, &writing.entries);
        writing.len = bytes.len() as u64;
        writing.step = JournalStep::Record;
        let buffer = Arc::new(AlignedBuf::new(bytes.len()));
        let fragment = Fragment::owned(&buffer, 0, bytes.len()).ok();
        fragment.iter().for_each(|fragment| fragment.slice().copy_from(&bytes));
        let buffers = fragment.into_iter().collect();
        Ok(to.clone().map(|file| Request::Write { file, offset, buffers }))
    }

    /// Notes that the journal's record is gone. Overlays that an image contains keep their names: a
    /// file can be named only once, and a rewind to that image puts them into the map again.
    fn retired(&mut self) {
        let (dir, overlays) = (self.dir.clone(), mem::take(&mut self.overlays));
        self.forget_all();
        (self.dir, self.overlays) = (dir, overlays);
        if let Some(dir) = &self.dir
            && let Err(error) = dir.unlink(NEXT)
        {
            tracing::warn!(%error, "cannot remove an unused file");
        }
        self.forget_stale();
    }

    /// Removes the names of overlays that no map and no image contains any more, and the directory
    /// if it is empty then. There is no record.
    fn forget_stale(&mut self) {
        let Some(dir) = self.dir.clone() else { return };
        self.overlays.retain(|named| {
            let is_stale = named.is_stale();
            if is_stale {
                forget(&dir, named.number);
            }
            !is_stale
        });
        if self.overlays.is_empty() && (!self.marked || self.header.id.is_none()) {
            remove_files(&self.location, &dir);
            self.forget_all();
        }
    }

    fn written(&mut self) {
        let (Some(writing), Some(dir)) = (self.writing.take(), &self.dir) else { return };
        if writing.whole {
            (self.file, self.end, self.records) = (self.next.take(), format::HEADER as u64, 0);
            // The removed journal has named these overlays. A file can be named only once, so a
            // file that may be written again keeps its name.
            let keeps = |named: &NamedOverlay| writing.named.contains(&named.number) || !named.is_stale();
            let (keep, gone): (Vec<_>, Vec<_>) = mem::take(&mut self.overlays).into_iter().partition(keeps);
            self.overlays = keep;
            gone.iter().for_each(|named| forget(dir, named.number));
        }
        self.seen = Some(writing.seen);
        self.end += writing.len;
        self.records += u64::from(writing.len > 0);
    }

    /// Ends a failed flush and discards its progress. The next flush does it all again, unless a
    /// write was `lost`.
    pub(crate) fn give_up(&mut self, lost: bool) {
        let Some(mut writing) = self.writing.take() else { return };
        let lost = lost && writing.step == JournalStep::Data;
        self.broken |= lost;
        not_synced(&writing.synced, lost);
        if writing.retires && writing.step != JournalStep::Data {
            // Whether the rename and the attribute took effect is unknown: both are done anew.
            self.marked = self.header.id.is_none();
            self.seen = None;
        }
        // Whether a whole journal got its name is unknown, too.
        self.whole |= writing.whole;
        writing.moved.append(&mut self.moved);
        self.moved = writing.moved;
        if self.whole {
            self.moved.clear();
        }
    }
}
