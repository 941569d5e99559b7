//! Flushes, and folding: overlays that no clone needs any more go back into the image while the guest goes on.
//!
//! A disk is *alone* when no other disk and no image has its setup, and so its base in a map. The base may then be
//! written again. At the second flush in a row that finds the disk alone, the journal first says, durably, that the
//! image is being written. Then the base is the disk's own file again: writes go there, and what is in overlays is
//! moved there, cluster by cluster, like by compaction ([`super::compact`]). The flush after that finds everything in
//! the image and takes the journal away. A fork in the middle is a fork like any other: the map has some clusters in
//! the image and some in overlays.
//!
//! Without a journal nothing is folded: a crash half-way would leave an image that is of no instant.

use std::sync::Arc;

use clade_io::{Failure, IoFile, Request};

use super::DiskError;
use super::job::{Job, Stage};
use super::journal::{Journal, Standing};
use super::live::Disk;
use super::map::{BlockMap, CLUSTER, Source};
use super::shadow::Shadow;

/// Flushes in a row that have found the disk alone, before it is folded: a guest that is forked again and again need not be.
const FOLD_AFTER: u32 = 2;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Fold {
    /// Flushes in a row that have found the disk alone.
    alone: u32,
    /// Whether the base is the own file again, of a disk that was forked.
    pub(super) active: bool,
    /// Whether there may be clusters in overlays that nobody has begun to move.
    pub(super) rescan: bool,
}

impl Disk {
    /// Whether a flush must wait: for one that is on its way; for writes to the image that were begun before the fork and would change its times; or
    /// for overlays that take too much to be merged, because it would give a name to one more.
    pub(super) fn flush_waits(&self) -> bool {
        let base_busy = || self.base().is_some_and(|base| base.has_writes());
        let image_busy = self.forked && self.journal.is_some() && !self.fold.active && base_busy();
        self.flushing.is_some() || image_busy || self.merges_first()
    }

    /// Whether nobody else has the base in a map.
    fn is_alone(&mut self) -> bool {
        let settled = !self.unsettled.iter().any(|file| file.has_writes());
        // Not the count alone: what others did with it happened before.
        settled && Arc::get_mut(&mut self.setup).is_some()
    }

    /// Whether the image is as this disk has left it: what something else has written there is not to be written over.
    fn may_fold(&self) -> bool {
        let checked = self.journal.as_ref().map_or(Ok(()), Journal::check_image);
        if let Err(error) = checked.as_ref().map_err(|error| error as &dyn std::error::Error)
            && self.fold.alone == FOLD_AFTER
        {
            tracing::warn!(path = %self.config().path.display(), error, "overlays stay where they are");
        }
        checked.is_ok()
    }

    fn is_all_base(&self) -> bool {
        self.base().is_some_and(|base| self.map.is_all(0..self.size().div_ceil(CLUSTER), base))
    }

    pub(super) fn plan_flush(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        job.stage = Stage::Transfer;
        if self.lost {
            return Err(DiskError::Lost { path: self.config().path.clone() });
        }
        let base = self.base().filter(|base| base.is_writable()).cloned();
        let dirty = base.as_ref().is_some_and(|base| base.take_unsynced());
        // To be given back if the flush fails.
        job.target = base.clone().filter(|_| dirty);
        let begun = self.begin_shadow(dirty)?;
        let alone = self.forked && self.shadow.is_none() && self.journal.is_some() && self.is_alone();
        self.fold.alone = if alone { self.fold.alone + 1 } else { 0 };
        let folds = self.fold.active || self.fold.alone >= FOLD_AFTER && self.may_fold();
        let shadowed = begun.is_some();
        let mut requests = begun.unwrap_or_default();
        // Of a disk that has no journal, what is in an overlay is gone with the process, synced or not.
        let begun = match self.journal.as_mut().filter(|_| self.forked && !shadowed) {
            _ if shadowed => true,
            Some(journal) => match journal.begin(&self.map, Standing { dirty, writing: folds }) {
                Ok(first) => {
                    requests.extend(first);
                    true
                }
                Err(error) if journal.is_impossible(&error) => {
                    tracing::warn!(%error, "no journal here: a flush after a fork is not durable");
                    journal.remove()?;
                    self.journal = None;
                    false
                }
                Err(error) => return Err(error.into()),
            },
            None => false,
        };
        if let (false, true, Some(file)) = (begun, dirty, base) {
            requests.push(Request::Sync { file, all: false });
        }
        self.flushing = Some(at);
        requests.into_iter().try_for_each(|request| self.give(at, job, request))?;
        if job.left == 0 { self.flush_on(at, job) } else { Ok(()) }
    }

    /// Begins a flush into a new image, where the file system has reflinks. None if a journal does instead.
    fn begin_shadow(&mut self, dirty: bool) -> Result<Option<Vec<Request>>, DiskError> {
        let Some(shadow) = self.shadow.as_mut().filter(|_| self.forked) else { return Ok(None) };
        match shadow.begin(&self.map, dirty) {
            Ok(first) => Ok(Some(first)),
            Err(error) if shadow.is_image() || shadow.is_broken() => Err(error.into()),
            Err(error) => {
                let (path, error) = (self.config().path.display(), &error as &dyn std::error::Error);
                tracing::warn!(%path, error, "no new image: a flush after a fork needs a journal");
                self.shadow = None;
                Ok(None)
            }
        }
    }

    /// The next step of the flush that the journal is busy with, or the new image.
    pub(super) fn flush_on(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        if let Some(shadow) = self.shadow.as_mut().filter(|shadow| self.flushing == Some(at) && shadow.is_writing()) {
            let next = shadow.next()?;
            return next.map_or(Ok(()), |request| self.give(at, job, request));
        }
        let Some(journal) = self.journal.as_mut().filter(|_| self.flushing == Some(at)) else { return Ok(()) };
        let next = journal.next()?;
        next.map_or(Ok(()), |request| self.give(at, job, request))
    }

    /// What a flush leaves behind.
    pub(super) fn flush_ends(&mut self, at: usize, job: &mut Job) {
        if let Some(error) = &job.error {
            // Not durable: the next flush tries again, unless the system has said that something is lost. It says so once.
            let base = job.target.take().or_else(|| self.base().cloned());
            if let Some(base) = base {
                self.lost |= is_lost(error, &base);
                base.set_unsynced();
            }
        }
        if self.flushing != Some(at) {
            return;
        }
        self.flushing = None;
        // Nothing is left to give up when it went well. What was cancelled is not lost.
        let lost = matches!(&job.error, Some(DiskError::Transfer(failure)) if failure.errno().is_some());
        self.journal.iter_mut().for_each(|journal| journal.give_up(lost));
        self.shadow.iter_mut().for_each(|shadow| shadow.give_up(lost));
        // Other flushes have waited for it.
        self.released = true;
        if job.error.is_none() {
            self.after_flush();
        }
    }

    /// Begins to fold, or is done with it; or has overlays merged that take too much.
    fn after_flush(&mut self) {
        if self.shadow.as_ref().is_some_and(Shadow::is_image) {
            return self.take_over();
        }
        let Some(journal) = self.journal.as_ref().filter(|_| self.forked) else { return };
        let (kept, writing) = (journal.kept_in().is_some(), journal.says_writing());
        if self.fold.active {
            if !kept && self.is_all_base() {
                self.fold = Fold::default();
                self.forked = false;
            }
            return;
        }
        if writing && self.is_alone() && !self.is_all_base() {
            self.moves.forget();
            self.own = self.base().cloned();
            self.fold.active = true;
            self.fold.rescan = true;
            return;
        }
        let Some(journal) = &self.journal else { return };
        let wasteful = journal.wasteful(&self.map, self.own.as_ref());
        if !wasteful.is_empty() && self.moves.is_idle() {
            self.queue_moves(|source| wasteful.iter().any(|file| source.is(file)));
            self.moves.urgent = true;
        }
    }
}

impl Disk {
    /// The new image becomes the base, if no clone needs the old one and nothing is on its way into an overlay.
    fn take_over(&mut self) {
        let changing = self.jobs.iter().flatten().any(Job::changes);
        if changing || !self.moves.is_idle() || !self.is_alone() {
            return;
        }
        let (Some(shadow), Some(setup)) = (&mut self.shadow, Arc::get_mut(&mut self.setup)) else { return };
        let known = shadow.image().map(IoFile::identity);
        let Some(Ok(identity)) = known else { return };
        let Some(file) = shadow.take_over() else { return };
        self.map = BlockMap::new(setup.size.div_ceil(CLUSTER), Source::File(Arc::clone(&file)));
        self.journal.iter_mut().for_each(|journal| journal.rebase(&file, identity));
        self.own = Some(Arc::clone(&file));
        setup.base = Some(file);
        (self.forked, self.fold) = (false, Fold::default());
    }
}

/// Whether the system has failed to make the base durable.
fn is_lost(error: &DiskError, base: &IoFile) -> bool {
    matches!(error, DiskError::Transfer(Failure::Io { path, .. }) if path == base.path())
}

#[cfg(test)]
mod tests;
