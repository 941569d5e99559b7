//! A disk in use: takes requests, follows the map, gives operations to the engine, and says when requests are done.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use clade_io::{AlignedBuf, CachePolicy, Completion, Engine, IoFile, OverlayPool, Stats, total_len};
use vmm_sys_util::eventfd::EventFd;

use super::compact::Relocation;
use super::directory::Directory;
use super::flush::Fold;
use super::image::{DiskImage, open_overlays};
use super::job::{Job, Work};
use super::journal::{Journal, RecoveredJournal};
use super::locks::{Hold, RangeLocks, overlap};
use super::map::{BlockMap, CLUSTER, Source};
use super::op::{DiskDone, DiskHealth, DiskOp};
use super::shadow::{self, Shadow};
use super::{DiskConfig, DiskError, SECTOR};

/// What all disks of one ancestor share. Each disk and each image holds it once.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) config: DiskConfig,
    /// The file it was opened from. None if it is made of a snapshot's files, of which none is ever written.
    pub(super) base: Option<Arc<IoFile>>,
    pub(super) size: u64,
    /// Where overlays are made.
    pub(super) overlays: Directory,
    /// Overlays that nobody has any more. What is in one is read only where the map says so, and it says so only of what was written since the file
    /// was taken from here: in whole clusters.
    pub(super) pool: Arc<OverlayPool>,
}

/// Jobs of a request that are not done, and the first error among them.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) left: usize,
    error: Option<DiskError>,
}

/// A VM's disk. Not thread-safe by itself: a device's worker owns it.
#[derive(Debug)]
pub struct Disk {
    // First, so that it is dropped first: what is in flight ends while the rest is still there.
    pub(super) engine: Option<Engine<usize>>,
    pub(super) event: EventFd,
    pub(super) setup: Arc<Setup>,
    pub(super) map: BlockMap,
    /// The file that this disk alone may write. None after a fork, until the next write.
    pub(super) own: Option<Arc<IoFile>>,
    pub(super) forked: bool,
    /// Files of its map that were still being written, by another VM, when it was made.
    pub(super) unsettled: Vec<Arc<IoFile>>,
    /// Whether the system has failed to make the base durable: it says so once, and no later flush may say otherwise.
    pub(super) lost: bool,
    pub(super) fold: Fold,
    pub(super) health: DiskHealth,
    /// Of the disk that was opened from the base, where there can be one.
    pub(super) journal: Option<Journal>,
    /// Of the same disk, where the file system has reflinks.
    pub(super) shadow: Option<Shadow>,
    /// The flush that is on its way. Others wait: they promise what it may not have done yet.
    pub(super) flushing: Option<usize>,
    pub(super) jobs: Vec<Option<Job>>,
    pub(super) free: Vec<usize>,
    /// Jobs that wait for their clusters, in the order they came.
    pub(super) waiting: VecDeque<usize>,
    /// Whether clusters were given back since the waiting jobs were looked at.
    pub(super) released: bool,
    pub(super) locks: RangeLocks,
    pub(super) parts: HashMap<u64, Parts>,
    pub(super) done: Vec<DiskDone>,
    pub(super) reaped: Vec<Completion<usize>>,
    pub(super) moves: Relocation,
    /// Not to be read again when the engine fails for good.
    pub(super) zeros: Option<Arc<AlignedBuf>>,
}

impl Disk {
    /// Opens the disk of a VM that is booted. A journal that was left beside the image is put in first; a disk that is only read shows what is
    /// in it.
    ///
    /// # Errors
    /// When the file cannot be used as one, or what was left beside it cannot: nothing of that is lost then.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let base = Arc::new(IoFile::open(&config.path, !(config.read_only || config.ephemeral), config.cache)?);
        let size = base.size()? / SECTOR * SECTOR;
        if size == 0 {
            return Err(DiskError::TooSmall { path: config.path.clone(), bytes: base.size()? });
        }
        if base.link_count()? == 0 {
            return Err(DiskError::Replaced { path: config.path.clone() });
        }
        shadow::sweep(&base);
        let overlays = open_overlays(config, base.is_block_device(), size)?;
        let mut map = BlockMap::new(size.div_ceil(CLUSTER), Source::File(Arc::clone(&base)));
        match RecoveredJournal::find(&base, size)? {
            Some(left) if config.read_only || config.ephemeral => map = left.map,
            Some(left) => {
                let report = left.write_back(&base, size)?;
                tracing::warn!(path = %config.path.display(), ?report, "given what a VM that did not end in order had made durable");
            }
            None => {}
        }
        let own = base.is_writable().then(|| Arc::clone(&base));
        // A process that has ended may have left writes in the page cache. They are shown, so the first flush is about them too.
        base.set_unsynced();
        let journal = own.as_ref().and_then(|base| Journal::new(base, size, &overlays));
        let shadow = journal.as_ref().and_then(|_| Shadow::new(&base, size, &overlays, config.cache));
        let setup = Arc::new(Setup { config: config.clone(), base: Some(base), size, overlays, pool: Arc::default() });
        Ok(Self { journal, shadow, ..Self::assemble(setup, map, own, false)? })
    }

    pub(super) fn from_image(image: &DiskImage) -> Result<Self, DiskError> {
        let disk = Self::assemble(Arc::clone(&image.setup), image.map.clone(), None, true)?;
        Ok(Self { unsettled: image.unsettled.clone(), ..disk })
    }

    fn assemble(setup: Arc<Setup>, map: BlockMap, own: Option<Arc<IoFile>>, forked: bool) -> Result<Self, DiskError> {
        Ok(Self {
            engine: None,
            event: Engine::<usize>::eventfd().map_err(DiskError::Event)?,
            setup,
            map,
            own,
            forked,
            unsettled: Vec::new(),
            lost: false,
            fold: Fold::default(),
            health: DiskHealth::default(),
            journal: None,
            shadow: None,
            flushing: None,
            jobs: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            released: false,
            locks: RangeLocks::default(),
            parts: HashMap::new(),
            done: Vec::new(),
            reaped: Vec::new(),
            moves: Relocation::default(),
            zeros: None,
        })
    }

    /// The disk at this instant, in constant time. What this disk has written so far becomes read-only for everybody.
    ///
    /// Writes in flight go on into files that the image has too. They are not in its map unless they are to clusters
    /// that it has from the very file they go to; those requests are done again by whoever continues the image, with
    /// the same bytes, before it reads anything (see docs/devices.md).
    pub fn fork(&mut self) -> DiskImage {
        self.own = None;
        self.forked = true;
        if self.fold.active {
            self.moves.forget();
        }
        self.fold = Fold::default();
        // Its map may still have them, whether or not its device has done those writes again.
        self.unsettled.retain(|file| file.has_writes());
        let mut unsettled = self.unsettled.clone();
        for target in self.jobs.iter().flatten().filter_map(|job| job.target.as_ref()) {
            if target.has_writes() && !unsettled.iter().any(|known| Arc::ptr_eq(known, target)) {
                unsettled.push(Arc::clone(target));
            }
        }
        DiskImage { setup: Arc::clone(&self.setup), map: self.map.clone(), unsettled }
    }

    /// Goes back to an instant, in place: what was written since is in a file that nobody has any more. Refused, with nothing changed, while
    /// requests are in flight.
    #[must_use]
    pub fn rewind(&mut self, image: &DiskImage) -> bool {
        if self.in_flight() > 0 {
            return false;
        }
        let base = |setup: &Setup| setup.base.as_ref().map(Arc::as_ptr);
        // Of another disk: what this one has made durable stays its image's.
        self.journal = self.journal.take().filter(|_| base(&self.setup) == base(&image.setup));
        self.journal.iter_mut().for_each(Journal::replaced);
        self.shadow = self.shadow.take().filter(|_| base(&self.setup) == base(&image.setup));
        self.shadow.iter_mut().for_each(Shadow::replaced);
        self.setup = Arc::clone(&image.setup);
        self.map = image.map.clone();
        // Nobody has it in a map any more: its room is given back.
        self.own = None;
        self.forked = true;
        self.fold = Fold::default();
        self.unsettled.clone_from(&image.unsettled);
        self.moves.forget();
        self.done.clear();
        true
    }

    /// Its size in bytes: whole sectors.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.setup.size
    }

    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> &DiskConfig {
        &self.setup.config
    }

    /// Whether transfers go through the host's page cache: what was asked for, as far as the file system has it.
    #[must_use]
    pub fn policy(&self) -> CachePolicy {
        self.setup.base.as_ref().map_or(self.setup.config.cache, |base| base.policy())
    }

    /// Whether it was ever forked, or is the result of a fork: its writes are then in overlays.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.forked
    }

    /// Requests that are not done, and what the disk does on its own meanwhile.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.parts.len() + self.moves.running
    }

    /// Readable when there is something to [`Disk::reap`].
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// How transfers were done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.engine.as_ref().map(Engine::stats).unwrap_or_default()
    }

    /// What has gone wrong with it on the host.
    #[must_use]
    pub fn health(&self) -> DiskHealth {
        let journal = self.journal.as_ref().is_some_and(Journal::is_broken);
        let shadow = self.shadow.as_ref().is_some_and(Shadow::is_broken);
        DiskHealth { lost: self.lost || journal || shadow, ..self.health }
    }

    /// Extents of the map, and files that provide something.
    #[must_use]
    pub fn extents_and_files(&self) -> (usize, usize) {
        (self.map.len(), self.map.sizes().len())
    }

    pub(super) fn setup(&self) -> &Arc<Setup> {
        &self.setup
    }

    pub(super) fn base(&self) -> Option<&Arc<IoFile>> {
        self.setup.base.as_ref()
    }

    /// Whether `file` is the one it was opened from.
    pub(super) fn is_base(&self, file: &Arc<IoFile>) -> bool {
        self.base().is_some_and(|base| Arc::ptr_eq(base, file))
    }

    /// Takes a request. It begins at the next [`Disk::kick`], and `token`, which must not be another request's in flight, comes back in a
    /// [`DiskDone`].
    ///
    /// # Errors
    /// When it cannot be done; nothing was begun.
    pub fn submit(&mut self, op: DiskOp, token: u64) -> Result<(), DiskError> {
        let (offset, len, work) = match op {
            DiskOp::Read { offset, buffers } => (offset, total_len(&buffers) as u64, Work::Read(buffers)),
            DiskOp::Write { offset, buffers } => (offset, total_len(&buffers) as u64, Work::Write(buffers)),
            DiskOp::Zero { offset, len, unmap } => (offset, len, Work::Zero { punch: unmap, advisory: false }),
            DiskOp::Discard { offset, len } => (offset, len, Work::Zero { punch: true, advisory: true }),
            DiskOp::Flush => (0, 0, Work::Flush),
        };
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(DiskError::OutOfRange { offset, len, size });
        }
        let job = Job::new(token, offset, len, work);
        if job.changes() && self.setup.config.read_only {
            return Err(DiskError::ReadOnly { path: self.setup.config.path.clone() });
        }
        self.parts.entry(job.token).or_default().left += 1;
        self.add(job);
        Ok(())
    }

    pub(super) fn add(&mut self, job: Job) {
        let at = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[at] = Some(job);
        self.begin(at);
        self.begin_waiting();
    }

    /// Begins a job, or leaves it waiting for its clusters. Returns whether it waits.
    fn begin(&mut self, at: usize) -> bool {
        let Some(mut job) = self.jobs[at].take() else { return false };
        if matches!(job.work, Work::Flush) && self.flush_waits() {
            self.jobs[at] = Some(job);
            self.wait_for_turn(at);
            return true;
        }
        if job.changes() && job.lock.is_none() {
            let range = job.clusters();
            let hold = match &self.own {
                Some(own) if self.map.is_all(range.clone(), own) && self.in_place(&job, own) => Hold::Shared,
                _ => Hold::Alone,
            };
            // Whoever came first and waits for some of the same clusters goes first.
            let earlier = |other: &&usize| **other != at;
            let queued = self.waiting.iter().take_while(earlier).filter_map(|other| self.jobs[*other].as_ref());
            let behind = queued.into_iter().any(|other| overlap(&other.clusters(), &range));
            job.lock = if behind { None } else { self.locks.take(&range, hold) };
            if job.lock.is_none() {
                self.jobs[at] = Some(job);
                self.wait_for_turn(at);
                return true;
            }
        }
        self.plan(at, job);
        false
    }

    fn wait_for_turn(&mut self, at: usize) {
        if !self.waiting.contains(&at) {
            self.waiting.push_back(at);
        }
    }

    /// Whether a change in the own file leaves the map as it is.
    fn in_place(&self, job: &Job, own: &Arc<IoFile>) -> bool {
        matches!(job.work, Work::Write(_)) || self.is_base(own)
    }

    /// Gives the kernel what was submitted.
    ///
    /// # Errors
    /// When it takes nothing; it is given again at the next call.
    pub fn kick(&mut self) -> Result<(), DiskError> {
        self.begin_moves();
        match &mut self.engine {
            Some(engine) => Ok(engine.flush()?),
            None => Ok(()),
        }
    }

    /// Whether the kernel had no memory for what was submitted: kick again soon.
    #[must_use]
    pub fn is_stalled(&mut self) -> bool {
        self.engine.as_mut().is_some_and(Engine::is_stalled)
    }

    /// Takes note of what the kernel has done, and hands out the requests that are done by it.
    ///
    /// # Errors
    /// As [`Disk::kick`].
    pub fn reap(&mut self) -> Result<Vec<DiskDone>, DiskError> {
        let mut reaped = mem::take(&mut self.reaped);
        let result = self.engine.as_mut().map_or(Ok(()), |engine| engine.reap(|completion| reaped.push(completion)));
        for completion in reaped.drain(..) {
            self.completed(completion);
        }
        self.begin_waiting();
        self.reaped = reaped;
        self.kick()?;
        result?;
        Ok(mem::take(&mut self.done))
    }

    /// Gives up on what the kernel can give up on. Everything is still to be reaped.
    pub fn cancel(&mut self) {
        self.moves.forget();
        let mut reaped = mem::take(&mut self.reaped);
        if let Some(engine) = &mut self.engine {
            engine.cancel(|completion| reaped.push(completion));
        }
        for completion in reaped.drain(..) {
            self.completed(completion);
        }
        // A flush may have waited for what is not moved any more.
        self.released = true;
        self.begin_waiting();
        self.reaped = reaped;
    }

    /// Waits for the kernel to have done something, up to `patience`.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn wait(&mut self, patience: std::time::Duration) -> Result<(), DiskError> {
        match &mut self.engine {
            Some(engine) => Ok(engine.wait(patience)?),
            None => Ok(()),
        }
    }

    fn completed(&mut self, completion: Completion<usize>) {
        let at = completion.token;
        let Some(mut job) = self.jobs.get_mut(at).and_then(Option::take) else { return };
        job.left -= 1;
        // The memory goes here, whether or not the job goes on: what it still needs it has itself.
        drop(completion.buffers);
        if let Err(failure) = completion.result {
            job.error.get_or_insert(failure.into());
        }
        if job.left == 0 {
            self.next_step(at, &mut job);
        }
        self.put(at, job);
    }

    /// Ends a job: the map changes, its clusters are free, and whoever waited for them begins.
    pub(super) fn end(&mut self, at: usize, mut job: Job) {
        match (&job.work, &job.error) {
            (Work::Write(_) | Work::Move(_), None) if job.moves => {
                if let Some(target) = job.target.take() {
                    self.insert(job.clusters(), Source::File(target));
                }
            }
            (Work::Zero { .. }, None) if job.moves => {
                let source = job.target.clone().map_or(Source::Zero, Source::File);
                self.insert(job.whole_clusters(self.size()), source);
            }
            (Work::Flush, _) => self.flush_ends(at, &mut job),
            _ => {}
        }
        if job.changes() {
            // In place as well: a new image has none of the overlays.
            self.shadow.iter_mut().for_each(|shadow| shadow.moved(job.clusters()));
            // A flush may wait until nothing is on its way into the image.
            self.released |= job.target.as_ref().is_some_and(|target| target.is_named());
            self.note(job.error.as_ref().filter(|_| !matches!(job.work, Work::Move(_))));
        }
        self.free.push(at);
        if let Work::Move(_) = job.work {
            self.moves.running -= 1;
            if let Some(error) = job.error.take() {
                // Where it is it stays, and is tried again some overlays later.
                tracing::debug!(%error, "overlays are not merged");
                self.moves.forget();
            }
        } else if let Some(parts) = self.parts.get_mut(&job.token) {
            parts.left -= 1;
            if let Some(error) = job.error.take() {
                parts.error.get_or_insert(error);
            }
            if parts.left == 0 {
                let error = self.parts.remove(&job.token).and_then(|parts| parts.error);
                self.done.push(DiskDone { token: job.token, result: error.map_or(Ok(()), Err) });
            }
        }
        if let Some(lock) = job.lock.take() {
            self.locks.release(lock);
            self.released = true;
        }
    }

    /// Counts a write that found no room, and says so the first time.
    fn note(&mut self, error: Option<&DiskError>) {
        let Some(error) = error.filter(|error| error.is_full()) else { return };
        self.health.no_room += 1;
        if self.health.no_room == 1 {
            let (path, error) = (self.config().path.display(), error as &dyn std::error::Error);
            tracing::warn!(%path, error, "no room for what the guest writes: its writes fail until there is");
        }
    }

    fn insert(&mut self, clusters: Range<u64>, source: Source) {
        self.journal.iter_mut().for_each(|journal| journal.moved(clusters.clone()));
        self.fold.rescan |= !self.base().is_some_and(|base| source.is(base));
        self.map.insert(clusters, source);
    }

    /// Begins what waits and need not wait any more, in order. Not from within `end`, which would begin to nest.
    fn begin_waiting(&mut self) {
        while mem::take(&mut self.released) {
            for at in self.waiting.clone() {
                if !self.begin(at) {
                    self.waiting.retain(|other| *other != at);
                }
            }
        }
    }

    /// Requests that were done without the kernel, as they were submitted.
    #[must_use]
    pub fn take_done(&mut self) -> Vec<DiskDone> {
        mem::take(&mut self.done)
    }
}
