//! Commits: writes since the first fork, written back into the image.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clade_host_io::{FileError, IoFile};
use thiserror::Error;

use super::DiskError;
use super::directory::sync;
use super::journal::{ImageCheckError, JournalError, left_in};
use super::live::Disk;
use super::map::{CLUSTER, ClusterSource};
use super::op::DiskOp;
use super::reflink::ReflinkImage;

/// How long one wait for the engine lasts.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Why an overlay was not written back.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// Other VMs or images read the base.
    #[error("{others} other VMs or images use {} as it is; writes since the fork {}", path.display(), outcome_text(kept.as_deref()))]
    Shared {
        /// The base's path.
        path: PathBuf,
        /// How many other VMs and images there are.
        others: usize,
        /// The journal's directory, if the journal has everything.
        kept: Option<PathBuf>,
    },
    /// The disk is a child's, and its parent has left a journal beside the base.
    #[error("{} first needs the journal in {}: the next open replays it", path.display(), dir.display())]
    RecoveredJournal {
        /// The base's path.
        path: PathBuf,
        /// The journal's directory.
        dir: PathBuf,
    },
    /// There is no base: the disk was made of a snapshot's files, which never change.
    #[error("{} comes from a snapshot, which stays as it is; later writes {}", path.display(), outcome_text(None))]
    Snapshot {
        /// The path in the disk's configuration.
        path: PathBuf,
    },
    /// The base was opened for reading.
    #[error("{} was opened read-only", path.display())]
    ReadOnly {
        /// The base's path.
        path: PathBuf,
    },
    /// Requests are in flight.
    #[error("{requests} requests to {} are in flight", path.display())]
    Busy {
        /// The base's path.
        path: PathBuf,
        /// How many requests there are.
        requests: usize,
    },
    /// The base has everything, but its journal could not be removed. Opening the base would apply
    /// the journal again, over later writes to the base.
    #[error(
        "the image has everything that was written since the fork, but the journal beside it is still there: remove it before the image is opened"
    )]
    Journal(#[source] FileError),
    /// A write since the fork was lost, so a copy would differ from the disk.
    #[error("a write to {} since the fork was lost: the system failed to make it durable", path.display())]
    Lost {
        /// The base, or the directory of its overlays.
        path: PathBuf,
    },
    /// The last flush failed. The image is in the state of the flush before.
    #[error("{} is as it was at the last flush: later writes could not be made durable", path.display())]
    Unflushed {
        /// The base's path.
        path: PathBuf,
        /// The error of the flush.
        #[source]
        source: Box<DiskError>,
    },
    /// Another file has the base's name: the parent disk has put a new image there.
    #[error("another file has replaced {}; writes since the fork {}", path.display(), outcome_text(None))]
    Replaced {
        /// The base's path.
        path: PathBuf,
    },
    /// Another program has changed the base since the last flush.
    #[error("another program has changed {}; writes since the fork {}", path.display(), outcome_text(kept.as_deref()))]
    Changed {
        /// The base's path.
        path: PathBuf,
        /// The journal's directory, if the journal has everything.
        kept: Option<PathBuf>,
        /// The attribute of the base that has changed.
        #[source]
        source: Box<JournalError>,
    },
    /// A copy failed. The base has only part of the writes since the fork.
    #[error("the base holds only part of the writes since the fork; the rest {}", outcome_text(kept.as_deref()))]
    Partial {
        /// The journal's directory, if the journal has everything.
        kept: Option<PathBuf>,
        /// The system call that failed.
        #[source]
        source: FileError,
    },
}

/// The place of uncommitted writes, for a message.
fn outcome_text(kept: Option<&Path>) -> String {
    match kept {
        Some(dir) => format!("is in {} and is put in when the image is opened next", dir.display()),
        None => "is in an overlay without a name and ends with it (export it to keep it)".to_owned(),
    }
}

/// The result of a commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitReport {
    /// Bytes copied into the base.
    pub copied: u64,
    /// Bytes of the base that were made zeros.
    pub zeroed: u64,
    /// Whether everything was durable beside the base before the base was changed.
    pub journaled: bool,
}

impl Disk {
    /// Copies everything written since the first fork into the base, and makes it durable. No other
    /// disk and no image may have the base in a map. For a disk that was never forked, there is
    /// nothing to copy.
    ///
    /// With a journal beside the image, a commit is one step. Everything is durable in the journal
    /// before the image changes. If the commit does not finish, opening the image applies the
    /// journal ([`CommitReport::journaled`]).
    ///
    /// # Errors
    /// The disk comes back. This holds also if the copy failed half-way: the disk is still whole.
    pub fn commit(mut self) -> Result<CommitReport, Box<(Self, CommitError)>> {
        self.settle_moves();
        // The commit's own flush must not begin to move clusters either: their room is given back
        // below.
        self.chain.hold_moves(true);
        match self.try_commit() {
            Ok(report) => Ok(report),
            Err(error) => {
                self.chain.hold_moves(false);
                Err(Box::new((self, error)))
            }
        }
    }

    fn try_commit(&mut self) -> Result<CommitReport, CommitError> {
        let Some(base) = self.chain.base().cloned() else {
            return Err(CommitError::Snapshot { path: self.config().path.clone() });
        };
        let path = || base.path().to_owned();
        if self.in_flight() > 0 {
            return Err(CommitError::Busy { path: path(), requests: self.in_flight() });
        }
        if !base.is_writable() {
            return Err(CommitError::ReadOnly { path: path() });
        }
        if self.is_lost() {
            return Err(CommitError::Lost { path: path() });
        }
        if self.is_forked()
            && self.durability.reflink().is_some()
            && let Some(report) = self.commit_to_reflink(&base)?
        {
            return Ok(report);
        }
        if base.link_count().is_ok_and(|links| links == 0) {
            return Err(CommitError::Replaced { path: path() });
        }
        // Each disk and each image holds the setup once. This disk's reference is ours and cannot
        // be cloned meanwhile, so a count of no others means alone.
        let others = self.chain.others();
        let journaled = self.is_forked() && self.keep();
        if self.is_lost() {
            return Err(CommitError::Lost { path: path() });
        }
        let kept = journaled.then(|| self.durability.kept_in()).flatten();
        if others > 0 && self.is_forked() {
            return Err(CommitError::Shared { path: path(), others, kept });
        }
        if let (None, Some(dir)) = (self.durability.journal(), left_in(&base)) {
            return Err(CommitError::RecoveredJournal { path: path(), dir });
        }
        let partial = |kept| move |source| CommitError::Partial { kept, source };
        if journaled {
            match self.durability.check_image() {
                Ok(()) => {}
                Err(ImageCheckError::File(source)) => return Err(partial(kept)(source)),
                Err(ImageCheckError::Changed(source)) => {
                    return Err(CommitError::Changed { path: path(), kept, source: source.into() });
                }
            }
        } else {
            self.sync_overlays(&base)?;
        }
        let mut log = journaled.then(|| self.durability.log()).flatten();
        // The journal is written below without this disk's flushes: the next record must be a whole
        // one.
        self.durability.journal_replaced();
        let report = self.chain.write_back(&base, log.as_mut()).map_err(partial(kept))?;
        self.durability.remove_journal().map_err(CommitError::Journal)?;
        Ok(CommitReport { copied: report.copied, zeroed: report.zeroed, journaled })
    }

    /// Flushes, after which the new image has everything. Returns None if the flush finds that
    /// there is no new image.
    fn commit_to_reflink(&mut self, base: &Arc<IoFile>) -> Result<Option<CommitReport>, CommitError> {
        let mut report = CommitReport { journaled: true, ..CommitReport::default() };
        for (range, source) in self.chain.map().extents() {
            let bytes = (range.end * CLUSTER).min(self.size()) - range.start * CLUSTER;
            match source {
                ClusterSource::Zero => report.zeroed += bytes,
                ClusterSource::File(file) if Arc::ptr_eq(file, base) => {}
                ClusterSource::File(_) => report.copied += bytes,
            }
        }
        let flushed = self.flush_now();
        let current = !self.is_forked() || self.durability.reflink().is_some_and(ReflinkImage::is_image);
        match flushed {
            Ok(()) => Ok(current.then_some(report)),
            Err(source) if current => {
                Err(CommitError::Unflushed { path: base.path().to_owned(), source: Box::new(source) })
            }
            Err(_) => Ok(None),
        }
    }

    fn is_lost(&self) -> bool {
        let mut files = self.chain.map().sizes().into_iter().map(|(file, _)| file).chain(self.chain.base().cloned());
        self.health().lost || files.any(|file| file.has_lost_writes())
    }

    /// Syncs the overlays. The system reports a lost write of a file once.
    fn sync_overlays(&mut self, base: &Arc<IoFile>) -> Result<(), CommitError> {
        let files = self.chain.map().sizes().into_iter().map(|(file, _)| file);
        for file in files.filter(|file| !Arc::ptr_eq(file, base) && file.is_writable()) {
            if let Err(error) = sync(&file) {
                tracing::warn!(error = &error as &dyn std::error::Error, "a write to an overlay was lost");
                self.durability.set_lost();
                file.note_lost_writes();
                return Err(CommitError::Lost { path: error.path });
            }
        }
        Ok(())
    }

    /// Puts everything into the journal. Returns false without a journal, or with no room for it:
    /// durable data is then in the image alone.
    pub(super) fn keep(&mut self) -> bool {
        let kept = self.durability.journal().is_some() && self.flush_now().inspect_err(|error| {
            tracing::warn!(path = %self.config().path.display(), error = error as &dyn std::error::Error, "cannot write a journal before the commit");
        }).is_ok();
        // The flush may have found that a journal is impossible.
        kept && self.durability.journal().is_some()
    }

    /// A complete flush, while no other request is in flight.
    pub(super) fn flush_now(&mut self) -> Result<(), DiskError> {
        const TOKEN: u64 = u64::MAX;
        self.submit(DiskOp::Flush, TOKEN)?;
        self.kick()?;
        loop {
            let mut done = self.take_done();
            done.extend(self.reap()?);
            if let Some(done) = done.into_iter().rfind(|done| done.token == TOKEN) {
                return done.result;
            }
            self.wait(POLL_INTERVAL)?;
        }
    }
}
