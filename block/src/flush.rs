//! Flushes, and folding: overlays that no clone needs are merged back into the image while the
//! guest runs.
//!
//! A disk is *alone* when no other disk and no image shares its setup, and so no other map contains
//! its base. The base may then be written again. Folding has three steps:
//!
//! 1. The second consecutive flush that finds the disk alone records durably in the journal that
//!    the image is being written.
//! 2. The base becomes the active file again. Writes go there, and overlays are moved there cluster
//!    by cluster, as by compaction ([`super::compact`]).
//! 3. The next flush that finds all clusters in the image removes the journal.
//!
//! A fork during a fold is an ordinary fork: the map has some clusters in the image and some in
//! overlays.
//!
//! Without a journal there is no folding, because a crash half-way would leave an image that
//! matches no instant of the disk.

use super::DiskError;
use super::job::{Job, JobStage};
use super::journal::Journal;
use super::live::Disk;
use super::reflink::ReflinkImage;

impl Disk {
    /// Whether a flush must wait: for another flush in progress; for writes to the image that were
    /// begun before the fork, which would change the image's times; or for the merge of overlays
    /// that waste room, because the flush would name one more.
    pub(super) fn flush_waits(&self) -> bool {
        let base_busy = || self.chain.base().is_some_and(|base| base.has_writes());
        let journaled = self.chain.is_forked() && self.durability.journal().is_some();
        let image_busy = journaled && !self.chain.is_folding() && base_busy();
        self.durability.is_flushing() || image_busy || self.chain.merges_first()
    }

    pub(super) fn plan_flush(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        job.stage = JobStage::Transfer;
        if self.durability.is_base_lost() || self.chain.base().is_some_and(|base| base.knows_lost_writes()) {
            self.durability.set_lost();
            return Err(DiskError::Lost { path: self.config().path.clone() });
        }
        let base = self.chain.base().filter(|base| base.is_writable() && self.durability.is_of_base());
        // The flag is set again if the flush fails.
        job.target = base.filter(|base| base.take_unsynced()).cloned();
        let requests = self.durability.begin_flush(at, &mut self.chain, job.target.is_some())?;
        requests.into_iter().try_for_each(|request| self.give(at, job, request))?;
        if job.left == 0 { self.flush_on(at, job) } else { Ok(()) }
    }

    /// The next step of a flush, in the journal or in the new image.
    pub(super) fn flush_on(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        let next = self.durability.next_step(at, &self.chain)?;
        next.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    /// Notes how a flush has ended.
    pub(super) fn flush_ends(&mut self, at: usize, job: &mut Job) {
        // A copy may have taken the system's report while the sync was in the kernel.
        let mut written = self.chain.base().into_iter().chain(self.chain.active());
        if job.error.is_none() && written.any(|file| file.knows_lost_writes()) {
            self.durability.set_lost();
            job.error = Some(DiskError::Lost { path: self.config().path.clone() });
        }
        if let Some(error) = &job.error {
            // Not durable: the next flush tries again, unless the system has reported a lost write,
            // which it reports only once.
            let base = job.target.take().or_else(|| self.chain.base().cloned());
            if let Some(base) = base {
                self.durability.flush_failed(error, &base);
            }
        }
        if !self.durability.end_flush(at, job.error.as_ref()) {
            return;
        }
        // Other flushes wait for this one.
        self.requests.release();
        if job.error.is_none() {
            self.after_flush();
        }
    }

    /// Begins or ends a fold, or has wasteful overlays merged.
    fn after_flush(&mut self) {
        if self.durability.reflink().is_some_and(ReflinkImage::is_image) {
            return self.take_over();
        }
        let Some(journal) = self.durability.journal().filter(|_| self.chain.is_forked()) else { return };
        let (kept, writing) = (journal.kept_in().is_some(), journal.says_writing());
        if self.chain.is_folding() {
            if !kept && self.chain.is_all_base() {
                self.chain.end_fold();
                self.durability.fold_ended();
            } else {
                self.chain.resume_fold();
            }
            return;
        }
        if writing && self.chain.is_alone() && !self.chain.is_all_base() {
            return self.chain.begin_fold();
        }
        let wasteful = |journal: &Journal| journal.wasteful(self.chain.map(), self.chain.active());
        let wasteful = self.durability.journal().map(wasteful).unwrap_or_default();
        if !wasteful.is_empty() && self.chain.relocation().is_idle() {
            self.chain.queue_urgent_moves(|source| wasteful.iter().any(|file| source.is(file)));
        }
    }

    /// Makes the new image the base, if no clone needs the old one and no overlay is being written.
    fn take_over(&mut self) {
        if !self.requests.has_changes() && self.chain.relocation().is_idle() {
            self.durability.take_over(&mut self.chain);
        }
    }
}

#[cfg(test)]
mod tests;
