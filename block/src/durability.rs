//! Durability of a disk: syncs of its base, and after a fork a journal or a new image.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use clade_host_io::{FileError, IoFile, OpError, Request};

use super::DiskError;
use super::journal::{FlushState, ImageCheckError, Journal, JournalTail};
use super::overlay_chain::OverlayChain;
use super::reflink::ReflinkImage;

/// Consecutive flushes that must find the disk alone before overlays are folded into the base. A
/// guest that is forked repeatedly is then spared the fold.
const FOLD_AFTER: u32 = 2;

/// The flush in progress, and the journal or the new image for data that must not enter the base.
///
/// Invariants:
///
/// - Only the disk that was opened from the base has a journal or a new image; its children have
///   neither.
/// - The journal takes a flush of a forked disk only if there is no new image. A new image that
///   cannot be made is given up for good.
/// - At most one flush, `flushing`, uses the journal or the new image at a time.
/// - `lost` is never cleared. The system reports a lost write once; no later flush may succeed.
#[derive(Debug, Default)]
pub(super) struct Durability {
    /// Whether the disk was opened from the base, and is not a child: a child shares the open file, and
    /// must take neither its unsynced writes nor its errors.
    is_of_base: bool,
    journal: Option<Journal>,
    /// The new image, where the file system has reflinks.
    reflink: Option<ReflinkImage>,
    /// Slot of the flush in progress. Other flushes wait, because they would promise data that this
    /// one may not have written yet.
    flushing: Option<usize>,
    /// The system has failed to make the base durable, or an overlay that is being committed.
    lost: bool,
    /// Consecutive flushes that have found the disk alone.
    alone: u32,
}

impl Durability {
    /// For the disk that was opened from the base.
    pub(super) fn new(journal: Option<Journal>, reflink: Option<ReflinkImage>) -> Self {
        Self { is_of_base: true, journal, reflink, ..Self::default() }
    }

    /// Whether its flushes make the base durable.
    pub(super) fn is_of_base(&self) -> bool {
        self.is_of_base
    }

    /// Notes a fork.
    pub(super) fn forked(&mut self) {
        self.alone = 0;
    }

    /// Notes a rewind. If the image has another base, the journal and the new image stay on disk
    /// unchanged, for that base.
    pub(super) fn rewound(&mut self, same_base: bool) {
        self.journal = self.journal.take().filter(|_| same_base);
        self.journal.iter_mut().for_each(Journal::replaced);
        self.reflink = self.reflink.take().filter(|_| same_base);
        self.reflink.iter_mut().for_each(ReflinkImage::replaced);
        self.alone = 0;
    }

    /// Notes that the map has `clusters` in another file now.
    pub(super) fn moved(&mut self, clusters: &Range<u64>) {
        self.journal.iter_mut().for_each(|journal| journal.moved(clusters.clone()));
    }

    /// Notes that `clusters` have changed, in place or not.
    pub(super) fn changed(&mut self, clusters: Range<u64>) {
        // In place as well: the new image has no overlay's clusters.
        self.reflink.iter_mut().for_each(|reflink| reflink.moved(clusters.clone()));
    }

    /// Whether the system has failed to make something durable.
    pub(super) fn is_lost(&self) -> bool {
        let journal = self.journal.as_ref().is_some_and(Journal::is_broken);
        let reflink = self.reflink.as_ref().is_some_and(ReflinkImage::is_broken);
        self.lost || journal || reflink
    }

    /// Whether the system has failed to make the base durable, or an overlay that is being
    /// committed.
    pub(super) fn is_base_lost(&self) -> bool {
        self.lost
    }

    /// Notes that the system has failed to make a write durable.
    pub(super) fn set_lost(&mut self) {
        self.lost = true;
    }

    pub(super) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    pub(super) fn reflink(&self) -> Option<&ReflinkImage> {
        self.reflink.as_ref()
    }

    pub(super) fn is_flushing(&self) -> bool {
        self.flushing.is_some()
    }

    /// Begins the flush in slot `at`. `dirty`: the base was written since its last sync. Returns
    /// the first requests for the kernel.
    pub(super) fn begin_flush(
        &mut self,
        at: usize,
        chain: &mut OverlayChain,
        dirty: bool,
    ) -> Result<Vec<Request>, DiskError> {
        let begun = match self.reflink.as_mut().filter(|_| chain.is_forked()) {
            Some(reflink) => Some(reflink.begin(chain.map(), dirty)?),
            None => None,
        };
        let alone = chain.is_forked() && self.reflink.is_none() && self.journal.is_some() && chain.is_alone();
        self.alone = if alone { self.alone + 1 } else { 0 };
        let folds = chain.is_folding() || self.alone >= FOLD_AFTER && self.may_fold(chain);
        let reflinked = begun.is_some();
        let mut requests = begun.unwrap_or_default();
        let journaled = if reflinked { None } else { self.begin_journal(chain, FlushState { dirty, writing: folds })? };
        let begun = reflinked || journaled.is_some();
        requests.extend(journaled.into_iter().flatten());
        if let (false, true, Some(file)) = (begun, dirty, chain.base()) {
            requests.push(Request::Sync { file: Arc::clone(file), all: false });
        }
        self.flushing = Some(at);
        Ok(requests)
    }

    /// Begins a flush of a forked disk into the journal. Returns None without one: an overlay then ends with the process,
    /// whether it was synced or not.
    fn begin_journal(&mut self, chain: &OverlayChain, state: FlushState) -> Result<Option<Vec<Request>>, DiskError> {
        let Some(journal) = self.journal.as_mut().filter(|_| chain.is_forked()) else { return Ok(None) };
        match journal.begin(chain.map(), state) {
            Ok(first) => Ok(Some(first)),
            Err(error) if journal.is_impossible(&error) => {
                tracing::warn!(%error, "no journal here: a flush after a fork is not durable");
                journal.remove()?;
                self.journal = None;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the image is as this disk left it. Changes by another program must not be
    /// overwritten.
    fn may_fold(&self, chain: &OverlayChain) -> bool {
        let checked = self.journal.as_ref().map_or(Ok(()), Journal::check_image);
        if let Err(error) = checked.as_ref().map_err(|error| error as &dyn std::error::Error)
            && self.alone == FOLD_AFTER
        {
            tracing::warn!(path = %chain.config().path.display(), error, "overlays stay where they are");
        }
        checked.is_ok()
    }

    /// The next requests of the flush in slot `at`, in the journal or in the new image. None when it is over.
    pub(super) fn next_step(&mut self, at: usize, chain: &OverlayChain) -> Result<Vec<Request>, DiskError> {
        if self.flushing != Some(at) {
            return Ok(Vec::new());
        }
        if let Some(reflink) = self.reflink.as_mut().filter(|reflink| reflink.is_writing()) {
            let error = match reflink.next() {
                Ok(next) => return Ok(next.into_iter().collect()),
                Err(error) => error,
            };
            // The overlays count as unsynced again, and the journal syncs them once it names them.
            let Some(dirty) = reflink.give_up_for_a_journal() else { return Err(error.into()) };
            let (path, error) = (chain.config().path.display(), &error as &dyn std::error::Error);
            tracing::warn!(%path, error, "no new image: a flush after a fork needs a journal");
            self.reflink = None;
            let begun = self.begin_journal(chain, FlushState { dirty, writing: chain.is_folding() })?;
            return Ok(begun.unwrap_or_default());
        }
        let Some(journal) = &mut self.journal else { return Ok(Vec::new()) };
        Ok(journal.next()?.into_iter().collect())
    }

    /// Notes the error of a flush that was to sync `base`.
    pub(super) fn flush_failed(&mut self, error: &DiskError, base: &IoFile) {
        if is_lost(error, base) {
            self.lost = true;
            // The new image has the base's path.
            if !self.reflink.as_ref().is_some_and(ReflinkImage::syncs_new_image) {
                base.note_lost_writes();
            }
        }
        base.set_unsynced();
    }

    /// Ends the flush in slot `at`. Returns whether it was the flush in progress.
    pub(super) fn end_flush(&mut self, at: usize, error: Option<&DiskError>) -> bool {
        if self.flushing != Some(at) {
            return false;
        }
        self.flushing = None;
        // After success there is nothing to give up. A cancelled operation is not a lost write.
        let lost = matches!(error, Some(DiskError::Transfer(failure)) if failure.errno().is_some());
        self.journal.iter_mut().for_each(|journal| journal.give_up(lost));
        self.reflink.iter_mut().for_each(|reflink| reflink.give_up(lost));
        true
    }

    /// Notes the end of a fold. The next one needs [`FOLD_AFTER`] flushes again.
    pub(super) fn fold_ended(&mut self) {
        self.alone = 0;
    }

    /// Makes the new image the base of `chain`, if there is one and no clone needs the old base.
    pub(super) fn take_over(&mut self, chain: &mut OverlayChain) {
        let Some(reflink) = self.reflink.as_mut().filter(|_| chain.is_alone()) else { return };
        let known = reflink.image().map(IoFile::identity);
        let Some(Ok(identity)) = known else { return };
        let Some(file) = reflink.take_over() else { return };
        if chain.replace_base(Arc::clone(&file)) {
            self.journal.iter_mut().for_each(|journal| journal.rebase(&file, identity));
            self.alone = 0;
        }
    }

    /// The journal's directory, if there is one.
    pub(super) fn kept_in(&self) -> Option<PathBuf> {
        self.journal.as_ref().and_then(Journal::kept_in)
    }

    /// Refuses an image that another program has changed since the journal's last record.
    pub(super) fn check_image(&self) -> Result<(), ImageCheckError> {
        self.journal.as_ref().map_or(Ok(()), Journal::check_image)
    }

    /// The end of the journal, where a commit records the clusters it has copied into the image.
    pub(super) fn log(&self) -> Option<JournalTail> {
        self.journal.as_ref().and_then(Journal::log)
    }

    /// Notes that a commit changes the map without the journal: the next record must be a whole
    /// one.
    pub(super) fn journal_replaced(&mut self) {
        self.journal.iter_mut().for_each(Journal::replaced);
    }

    /// Removes the journal: the image has everything.
    pub(super) fn remove_journal(&mut self) -> Result<(), FileError> {
        self.journal.iter_mut().try_for_each(Journal::remove)
    }

    #[cfg(test)]
    pub(super) fn set_reflink(&mut self, reflink: ReflinkImage) {
        self.reflink = Some(reflink);
    }

    #[cfg(test)]
    pub(crate) fn journal_mut(&mut self) -> Option<&mut Journal> {
        self.journal.as_mut()
    }
}

/// Whether the error means that the base was not made durable.
fn is_lost(error: &DiskError, base: &IoFile) -> bool {
    matches!(error, DiskError::Transfer(OpError::Io { path, .. }) if path == base.path())
}
