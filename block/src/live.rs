//! A disk in use: accepts requests, follows the map, gives operations to the engine, and reports
//! completed requests.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use clade_host_io::{CachePolicy, Completion, IoFile, Request, Stats, total_len};
use vmm_sys_util::eventfd::EventFd;

use super::durability::Durability;
use super::image::{DiskImage, open_overlays};
use super::job::{Job, JobKind};
use super::journal::{Journal, RecoveredJournal};
use super::locks::Hold;
use super::map::{BlockMap, CLUSTER, ClusterSource};
use super::op::{DiskDone, DiskHealth, DiskOp};
use super::overlay_chain::OverlayChain;
use super::reflink::{self, ReflinkImage};
use super::request_table::RequestTable;
use super::setup::Setup;
use super::{DiskConfig, DiskError, SECTOR};

/// A VM's disk. Not thread-safe by itself: a device's worker owns it.
///
/// Each part keeps its own invariants; the methods of `Disk` keep the parts in step.
///
/// - A job ends in `requests` after its clusters are in the map of `chain`, and after `durability`
///   has noted their change.
/// - A move that `chain` counts as running is a job in `requests`.
/// - The flush in progress in `durability` is a job in `requests`.
#[derive(Debug)]
pub struct Disk {
    // Dropped first, as the first field: operations in flight end while the other fields still
    // exist.
    pub(super) requests: RequestTable,
    pub(super) chain: OverlayChain,
    pub(super) durability: Durability,
}

impl DiskImage {
    /// Makes a disk that continues from here.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn open(&self) -> Result<Disk, DiskError> {
        let (requests, chain) = (RequestTable::new()?, OverlayChain::from_image(self));
        Ok(Disk { requests, chain, durability: Durability::default() })
    }
}

impl Disk {
    /// Opens the disk of a VM that is booted. A journal that was left beside the image is applied
    /// first. A read-only disk shows the journal's clusters without applying them.
    ///
    /// # Errors
    /// When the file cannot be a disk, or its journal cannot be applied. No data of the journal is
    /// lost then.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let base = Arc::new(IoFile::open(&config.path, !(config.read_only || config.ephemeral), config.cache)?);
        let size = base.size()? / SECTOR * SECTOR;
        if size == 0 {
            return Err(DiskError::TooSmall { path: config.path.clone(), bytes: base.size()? });
        }
        if base.link_count()? == 0 {
            return Err(DiskError::Replaced { path: config.path.clone() });
        }
        reflink::sweep(&base);
        let overlays = open_overlays(config, base.is_block_device(), size)?;
        let mut map = BlockMap::new(size.div_ceil(CLUSTER), ClusterSource::File(Arc::clone(&base)));
        match RecoveredJournal::find(&base, size)? {
            Some(left) if config.read_only || config.ephemeral => map = left.map,
            Some(left) => {
                let report = left.write_back(&base, size)?;
                tracing::warn!(path = %config.path.display(), ?report, "replayed journal after unclean shutdown");
            }
            None => {}
        }
        let active = base.is_writable().then(|| Arc::clone(&base));
        // A process that has ended may have left writes in the page cache. Reads return that data,
        // so the first flush covers it.
        base.set_unsynced();
        let journal = active.as_ref().and_then(|base| Journal::new(base, size, &overlays));
        let reflink = journal.as_ref().and_then(|_| ReflinkImage::new(&base, size, &overlays, config.cache));
        let setup = Arc::new(Setup { config: config.clone(), base: Some(base), size, overlays, pool: Arc::default() });
        let chain = OverlayChain::opened(setup, map, active);
        Ok(Self { requests: RequestTable::new()?, chain, durability: Durability::new(journal, reflink) })
    }

    /// The disk at this instant, in constant time. Data written so far becomes read-only, for this
    /// disk as well.
    ///
    /// Writes in flight continue into files that the image has too. The image's map does not show
    /// them, except in clusters that were already mapped to the file being written. The device that
    /// continues from the image repeats those requests, with the same bytes, before it reads
    /// anything (see docs/devices.md).
    pub fn fork(&mut self) -> DiskImage {
        self.durability.forked();
        self.chain.fork(self.requests.targets())
    }

    /// Goes back to an image, in place. Later writes are dropped with the active file. Returns
    /// false, with nothing changed, while requests are in flight.
    #[must_use]
    pub fn rewind(&mut self, image: &DiskImage) -> bool {
        if self.in_flight() > 0 {
            return false;
        }
        self.durability.rewound(self.chain.has_base_of(image));
        self.chain.rewind(image);
        self.requests.take_done();
        true
    }

    /// Size in bytes: whole sectors.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.chain.size()
    }

    /// The configuration that the disk was opened with.
    #[must_use]
    pub fn config(&self) -> &DiskConfig {
        self.chain.config()
    }

    /// Whether transfers go through the host's page cache. The file system may not support the
    /// policy that was configured.
    #[must_use]
    pub fn policy(&self) -> CachePolicy {
        self.chain.policy()
    }

    /// Whether the disk was ever forked, or made by a fork: its writes are then in overlays.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.chain.is_forked()
    }

    /// Unfinished requests, and relocations in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.in_flight() + self.chain.relocation().running()
    }

    /// Readable when [`Disk::reap`] has completions to process.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        self.requests.event()
    }

    /// Transfer counters of the engine.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.requests.stats()
    }

    /// Failures of the disk on the host.
    #[must_use]
    pub fn health(&self) -> DiskHealth {
        DiskHealth { no_room: self.requests.no_room(), lost: self.durability.is_lost() }
    }

    /// Extents in the map, and files that have at least one cluster.
    #[must_use]
    pub fn extents_and_files(&self) -> (usize, usize) {
        (self.chain.map().len(), self.chain.map().sizes().len())
    }

    /// Accepts a request, whose memory is all there. It begins at the next [`Disk::kick`]. `token`
    /// comes back in a [`DiskDone`]; no other request in flight may have it.
    ///
    /// # Errors
    /// When the request is invalid for this disk. Nothing was begun then.
    pub fn submit(&mut self, op: DiskOp, token: u64) -> Result<(), DiskError> {
        let (offset, len, work) = match op {
            DiskOp::Read { offset, buffers } => (offset, total_len(&buffers) as u64, JobKind::Read(buffers)),
            DiskOp::Write { offset, buffers } => (offset, total_len(&buffers) as u64, JobKind::Write(buffers)),
            DiskOp::Zero { offset, len, unmap } => (offset, len, JobKind::Zero { punch: unmap, advisory: false }),
            DiskOp::Discard { offset, len } => (offset, len, JobKind::Zero { punch: true, advisory: true }),
            DiskOp::Flush => (0, 0, JobKind::Flush),
        };
        let job = Job::new(token, offset, len, work);
        self.check(offset, len, job.changes())?;
        self.add(job);
        Ok(())
    }

    /// Refuses a request that exceeds the disk, or changes a disk that is read-only.
    pub(super) fn check(&self, offset: u64, len: u64, changes: bool) -> Result<(), DiskError> {
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(DiskError::OutOfRange { offset, len, size });
        }
        if changes && self.config().read_only {
            return Err(DiskError::ReadOnly { path: self.config().path.clone() });
        }
        Ok(())
    }

    pub(super) fn add(&mut self, job: Job) {
        let at = self.requests.insert(job);
        self.begin(at);
        self.begin_waiting();
    }

    /// Begins a job, or leaves it waiting for its clusters. Returns whether it waits.
    fn begin(&mut self, at: usize) -> bool {
        let Some(mut job) = self.requests.take(at) else { return false };
        let flush_waits = matches!(job.work, JobKind::Flush) && self.flush_waits();
        if flush_waits || job.changes() && job.lock.is_none() && !self.lock(at, &mut job) {
            self.requests.park(at, job);
            return true;
        }
        self.plan(at, job);
        false
    }

    /// Takes the clusters that a job changes. Returns whether it has them.
    fn lock(&mut self, at: usize, job: &mut Job) -> bool {
        let chain = &self.chain;
        let in_place = |active: &Arc<IoFile>| {
            // Whether a change in the active file leaves the map unchanged.
            let stays = matches!(job.work, JobKind::Write(_)) || chain.is_base(active);
            stays && chain.map().is_all(job.clusters(), active)
        };
        let hold = if chain.active().is_some_and(in_place) { Hold::Shared } else { Hold::Alone };
        self.requests.lock(at, job, hold)
    }

    /// Gives the engine an operation of the job in slot `at`.
    pub(super) fn give(&mut self, at: usize, job: &mut Job, request: Request) -> Result<(), DiskError> {
        self.requests.give(at, job, request, self.chain.config().latency)
    }

    /// Submits the begun operations to the kernel.
    ///
    /// # Errors
    /// When the kernel accepts no operation. The next call submits them again.
    pub fn kick(&mut self) -> Result<(), DiskError> {
        self.begin_moves();
        Ok(self.requests.flush_engine()?)
    }

    /// Whether the kernel had no memory for a submission. The caller should kick again soon.
    #[must_use]
    pub fn is_stalled(&mut self) -> bool {
        self.requests.is_stalled()
    }

    /// Processes the kernel's completions, and returns the requests that are done.
    ///
    /// # Errors
    /// As [`Disk::kick`].
    pub fn reap(&mut self) -> Result<Vec<DiskDone>, DiskError> {
        let (mut reaped, result) = self.requests.reap();
        for completion in reaped.drain(..) {
            self.completed(completion);
        }
        self.begin_waiting();
        self.requests.recycle(reaped);
        self.kick()?;
        result?;
        Ok(self.requests.take_done())
    }

    /// Cancels the operations that the kernel can cancel, and the rests of transfers. Every request
    /// must still be reaped.
    pub fn cancel(&mut self) {
        self.chain.forget_moves();
        let mut reaped = self.requests.cancel();
        for completion in reaped.drain(..) {
            self.completed(completion);
        }
        // A flush may have waited for moves that are now dropped.
        self.requests.release();
        self.begin_waiting();
        self.requests.recycle(reaped);
    }

    /// Waits up to `patience` for a completion.
    ///
    /// # Errors
    /// When the engine cannot wait.
    pub fn wait(&mut self, patience: Duration) -> Result<(), DiskError> {
        Ok(self.requests.wait(patience)?)
    }

    fn completed(&mut self, completion: Completion<usize>) {
        let Some((at, mut job)) = self.requests.complete(completion) else { return };
        if job.left == 0 {
            self.next_step(at, &mut job);
        }
        self.put(at, job);
    }

    /// Ends a job: changes the map, releases its clusters, and lets jobs that waited for them
    /// begin.
    pub(super) fn end(&mut self, at: usize, mut job: Job) {
        match (&job.work, &job.error) {
            (JobKind::Write(_) | JobKind::Move(_), None) if job.moves => {
                if let Some(target) = job.target.take() {
                    self.insert(job.clusters(), ClusterSource::File(target));
                }
            }
            (JobKind::Zero { .. }, None) if job.moves => {
                let source = job.target.clone().map_or(ClusterSource::Zero, ClusterSource::File);
                self.insert(job.whole_clusters(self.size()), source);
            }
            (JobKind::Flush, _) => self.flush_ends(at, &mut job),
            _ => {}
        }
        if job.changes() {
            self.durability.changed(job.clusters());
            // A flush may wait until no write to the image is in flight.
            if job.target.as_ref().is_some_and(|target| target.is_named()) {
                self.requests.release();
            }
            self.note(job.error.as_ref().filter(|_| !job.is_relocation()));
        }
        if job.is_relocation() {
            self.chain.move_ended();
            if let Some(error) = job.error.take() {
                // The clusters stay in place. The next attempt comes some overlays later, or with a flush if the disk
                // folds.
                tracing::debug!(%error, "overlays are not merged");
                self.chain.forget_moves();
            }
        }
        self.requests.finish(at, job);
    }

    /// Counts a write that found no room, and logs the first one.
    fn note(&mut self, error: Option<&DiskError>) {
        let Some(error) = error.filter(|error| error.is_full()) else { return };
        if self.requests.count_no_room() == 1 {
            let (path, error) = (self.config().path.display(), error as &dyn std::error::Error);
            tracing::warn!(%path, error, "no space for the guest's writes: they fail until space is free");
        }
    }

    fn insert(&mut self, clusters: Range<u64>, source: ClusterSource) {
        self.durability.moved(&clusters);
        self.chain.insert(clusters, source);
    }

    /// Begins the jobs that need not wait any more, in order. Not called from within `end`, which
    /// would recurse.
    fn begin_waiting(&mut self) {
        while self.requests.take_released() {
            for at in self.requests.waiting() {
                if !self.begin(at) {
                    self.requests.stop_waiting(at);
                }
            }
        }
    }

    /// Takes the requests that were done without the kernel, when they were submitted.
    #[must_use]
    pub fn take_done(&mut self) -> Vec<DiskDone> {
        self.requests.take_done()
    }
}
