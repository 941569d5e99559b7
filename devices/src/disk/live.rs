//! A disk in use: takes requests, follows the map, gives operations to the engine, and says when requests are done.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;

use clade_io::{AlignedBuf, Completion, Engine, Fragment, IoFile, Request, Stats, total_len, window};
use vmm_sys_util::eventfd::EventFd;

use super::image::{DiskImage, check_overlays, overlay_dir};
use super::job::{Edge, Edges, Job, Stage, Work};
use super::locks::{Hold, RangeLocks, overlap};
use super::map::{BlockMap, GRANULE, Source};
use super::{DiskConfig, DiskError, SECTOR};

/// Operations in the kernel at a time.
const DEPTH: u32 = 128;
/// Zeros that are written where a file takes no holes.
const ZEROS: usize = 64 << 10;

/// What all disks of one ancestor share. Each disk and each image holds it once.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) config: DiskConfig,
    base: Arc<IoFile>,
    pub(super) size: u64,
    overlays: PathBuf,
}

/// A request to a disk. Offsets and lengths are in bytes, and multiples of a sector.
#[derive(Debug)]
pub enum DiskOp {
    /// Fill the buffers from `offset` on.
    Read {
        /// First byte.
        offset: u64,
        /// To where.
        buffers: Vec<Fragment>,
    },
    /// Write the buffers from `offset` on.
    Write {
        /// First byte.
        offset: u64,
        /// From where.
        buffers: Vec<Fragment>,
    },
    /// The range reads as zeros from now on.
    Zero {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// Whether its room may be given back.
        unmap: bool,
    },
    /// Nobody needs the range any more. What is no whole granule may stay.
    Discard {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Makes all writes that are done durable, as far as anything of this disk outlives the process.
    Flush,
}

/// A request that is over.
#[derive(Debug)]
pub struct DiskDone {
    /// What it was submitted with.
    pub token: u64,
    /// How it ended.
    pub result: Result<(), DiskError>,
}

/// Jobs of a request that are not done, and the first error among them.
#[derive(Debug, Default)]
struct Parts {
    left: usize,
    error: Option<DiskError>,
}

/// A VM's disk. Not thread-safe by itself: a device's worker owns it.
#[derive(Debug)]
pub struct Disk {
    // First, so that it is dropped first: what is in flight ends while the rest is still there.
    engine: Option<Engine<usize>>,
    event: EventFd,
    setup: Arc<Setup>,
    map: BlockMap,
    /// The file that this disk alone may write. None after a fork, until the next write.
    own: Option<Arc<IoFile>>,
    forked: bool,
    /// Whether the base was written and not synced since.
    unsynced: bool,
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that wait for their granules, in the order they came.
    waiting: VecDeque<usize>,
    /// Whether granules were given back since the waiting jobs were looked at.
    released: bool,
    locks: RangeLocks,
    parts: HashMap<u64, Parts>,
    done: Vec<DiskDone>,
    reaped: Vec<Completion<usize>>,
    /// Not to be read again when the engine fails for good.
    zeros: Option<Arc<AlignedBuf>>,
}

impl Disk {
    /// Opens the disk of a VM that is booted.
    ///
    /// # Errors
    /// When the file cannot be used as one.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let base = Arc::new(IoFile::open(&config.path, !config.read_only, config.cache)?);
        let size = base.size()? / SECTOR * SECTOR;
        if size == 0 {
            return Err(DiskError::TooSmall { path: config.path.clone(), bytes: base.size()? });
        }
        let overlays = overlay_dir(config, base.is_block_device());
        if !config.read_only {
            check_overlays(&overlays)?;
        }
        let map = BlockMap::new(size.div_ceil(GRANULE), Source::File(Arc::clone(&base)));
        let own = base.is_writable().then(|| Arc::clone(&base));
        let setup = Arc::new(Setup { config: config.clone(), base, size, overlays });
        Self::assemble(setup, map, own, false)
    }

    pub(super) fn from_image(image: &DiskImage) -> Result<Self, DiskError> {
        Self::assemble(Arc::clone(&image.setup), image.map.clone(), None, true)
    }

    fn assemble(setup: Arc<Setup>, map: BlockMap, own: Option<Arc<IoFile>>, forked: bool) -> Result<Self, DiskError> {
        Ok(Self {
            engine: None,
            event: Engine::<usize>::eventfd().map_err(DiskError::Event)?,
            setup,
            map,
            own,
            forked,
            unsynced: false,
            jobs: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            released: false,
            locks: RangeLocks::default(),
            parts: HashMap::new(),
            done: Vec::new(),
            reaped: Vec::new(),
            zeros: None,
        })
    }

    /// The disk at this instant, in constant time. What this disk has written so far becomes read-only for everybody.
    ///
    /// Writes in flight go on into files that the image has too. They are not in its map unless they are to granules that it has from the
    /// very file they go to; those requests are done again by whoever continues the image, with the same bytes, before it reads anything
    /// (see docs/devices.md).
    pub fn fork(&mut self) -> DiskImage {
        self.own = None;
        self.forked = true;
        let mut unsettled: Vec<Arc<IoFile>> = Vec::new();
        for target in self.jobs.iter().flatten().filter_map(|job| job.target.as_ref()) {
            if target.has_writes() && !unsettled.iter().any(|known| Arc::ptr_eq(known, target)) {
                unsettled.push(Arc::clone(target));
            }
        }
        DiskImage { setup: Arc::clone(&self.setup), map: self.map.clone(), unsettled }
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

    /// Whether it was ever forked, or is the result of a fork: its writes are then in overlays.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.forked
    }

    /// Requests that are not done.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.parts.len()
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

    /// Extents of the map, and files that provide something.
    #[must_use]
    pub fn extents_and_files(&self) -> (usize, usize) {
        (self.map.len(), self.map.files().len())
    }

    pub(super) fn setup(&self) -> &Arc<Setup> {
        &self.setup
    }

    pub(super) fn base(&self) -> &Arc<IoFile> {
        &self.setup.base
    }

    pub(super) fn map(&self) -> &BlockMap {
        &self.map
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
        self.add(job);
        Ok(())
    }

    fn add(&mut self, job: Job) {
        self.parts.entry(job.token).or_default().left += 1;
        let at = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[at] = Some(job);
        self.begin(at);
        self.begin_waiting();
    }

    /// Begins a job, or leaves it waiting for its granules. Returns whether it waits.
    fn begin(&mut self, at: usize) -> bool {
        let Some(mut job) = self.jobs[at].take() else { return false };
        if job.changes() && job.lock.is_none() {
            let range = job.granules();
            let hold = match &self.own {
                Some(own) if self.map.is_all(range.clone(), own) && self.in_place(&job, own) => Hold::Shared,
                _ => Hold::Alone,
            };
            // Whoever came first and waits for some of the same granules goes first.
            let earlier = |other: &&usize| **other != at;
            let queued = self.waiting.iter().take_while(earlier).filter_map(|other| self.jobs[*other].as_ref());
            let behind = queued.into_iter().any(|other| overlap(&other.granules(), &range));
            job.lock = if behind { None } else { self.locks.take(&range, hold) };
            if job.lock.is_none() {
                self.jobs[at] = Some(job);
                if !self.waiting.contains(&at) {
                    self.waiting.push_back(at);
                }
                return true;
            }
        }
        self.plan(at, job);
        false
    }

    /// Whether a change in the own file leaves the map as it is.
    fn in_place(&self, job: &Job, own: &Arc<IoFile>) -> bool {
        matches!(job.work, Work::Write(_)) || Arc::ptr_eq(own, &self.setup.base)
    }

    fn plan(&mut self, at: usize, mut job: Job) {
        let planned = match job.work {
            Work::Read(_) => self.plan_read(at, &mut job),
            Work::Write(_) => self.plan_write(at, &mut job),
            Work::Zero { punch, advisory } => self.plan_zero(at, &mut job, punch, advisory),
            Work::Flush => self.plan_flush(at, &mut job),
        };
        if let Err(error) = planned {
            job.error.get_or_insert(error);
        }
        self.put(at, job);
    }

    /// Puts a job back, or ends it when the engine has nothing of it.
    fn put(&mut self, at: usize, job: Job) {
        if job.left > 0 {
            self.jobs[at] = Some(job);
        } else {
            self.end(at, job);
        }
    }

    fn give(&mut self, at: usize, job: &mut Job, request: Request) -> Result<(), DiskError> {
        if self.engine.is_none() {
            // Made at the first request: most clones of a VM never touch their disk.
            let event = self.event.try_clone().map_err(DiskError::Event)?;
            let mut engine = Engine::new(DEPTH, event)?;
            engine.set_latency(self.setup.config.latency);
            self.engine = Some(engine);
        }
        if let Some(engine) = &mut self.engine {
            engine.submit(request, at);
            job.left += 1;
        }
        Ok(())
    }

    fn plan_read(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        let Work::Read(buffers) = &job.work else { return Ok(()) };
        let mut requests = Vec::new();
        for (range, source) in self.map.pieces(job.granules()) {
            let start = (range.start * GRANULE).max(job.offset);
            let end = (range.end * GRANULE).min(job.end());
            let part = window(buffers, (start - job.offset) as usize, (end - start) as usize);
            match source {
                Source::File(file) => {
                    requests.push(Request::Read { file: Arc::clone(file), offset: start, buffers: part });
                }
                // By the processor: these pages are this VM's own, because they are pinned for writing.
                Source::Zero => part.iter().for_each(fill_with_zeros),
            }
        }
        job.stage = Stage::Transfer;
        requests.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    fn own(&mut self) -> Result<Arc<IoFile>, DiskError> {
        if let Some(own) = &self.own {
            return Ok(Arc::clone(own));
        }
        let setup = &self.setup;
        let file = Arc::new(IoFile::unnamed(&setup.overlays, setup.size, setup.config.cache)?);
        Ok(Arc::clone(self.own.insert(file)))
    }

    fn plan_write(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        let own = self.own()?;
        let granules = job.granules();
        job.moves = !self.map.is_all(granules.clone(), &own);
        job.target = Some(Arc::clone(&own));
        job.edges = Edges::default();
        let whole = job.whole_granules(self.size());
        let mut reads = Vec::new();
        let mut edge = |granule: u64| {
            let source = self.map.at(granule);
            if whole.contains(&granule) || source.is(&own) {
                return None;
            }
            let len = GRANULE.min(self.setup.size - granule * GRANULE) as usize;
            let edge = Edge { granule, bytes: Arc::new(AlignedBuf::new(len)) };
            if let Source::File(file) = source {
                let buffers = Fragment::owned(&edge.bytes, 0, len).into_iter().collect();
                reads.push(Request::Read { file, offset: granule * GRANULE, buffers });
            }
            Some(edge)
        };
        job.edges.head = edge(granules.start);
        let last = granules.end - 1;
        // One granule can be both: it is read once.
        let tail = if last == granules.start { job.edges.head.clone() } else { edge(last) };
        job.edges.tail = tail;
        if reads.is_empty() {
            return self.transfer(at, job);
        }
        job.stage = Stage::Edges;
        reads.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    fn transfer(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        job.stage = Stage::Transfer;
        let (Work::Write(buffers), Some(file)) = (&job.work, job.target.clone()) else { return Ok(()) };
        let (offset, buffers) = job.edges.around(job.offset, job.end(), buffers);
        self.give(at, job, Request::Write { file, offset, buffers })
    }

    fn plan_zero(&mut self, at: usize, job: &mut Job, punch: bool, advisory: bool) -> Result<(), DiskError> {
        job.stage = Stage::Transfer;
        let (offset, len) = (job.offset, job.len);
        if let Some(base) = self.own.clone().filter(|own| Arc::ptr_eq(own, &self.setup.base)) {
            // In place: the base is what lasts, and its file system knows how.
            job.target = Some(Arc::clone(&base));
            let file = base;
            let request =
                if punch { Request::Punch { file, offset, len } } else { Request::Zero { file, offset, len } };
            return self.give(at, job, request);
        }
        let whole = job.whole_granules(self.size());
        if !advisory {
            for (start, end) in odd_ends(offset, job.end(), &whole) {
                let zeros = self.zero_fragments(end - start);
                self.add_later(Job::new(job.token, start, end - start, Work::Write(zeros)));
            }
        }
        (job.offset, job.len) = (whole.start * GRANULE, 0);
        if whole.is_empty() {
            return Ok(());
        }
        job.len = (whole.end * GRANULE).min(self.size()) - job.offset;
        job.moves = true;
        let Some(own) = self.own.clone() else { return Ok(()) };
        // Room in the own file is given back. In files that others have too it is not ours to give.
        let own_pieces = self.map.pieces(whole).filter(|(_, source)| source.is(&own));
        let punches: Vec<Request> = own_pieces
            .map(|(range, _)| {
                let (offset, len) = (range.start * GRANULE, (range.end - range.start) * GRANULE);
                Request::Punch { file: Arc::clone(&own), offset, len }
            })
            .collect();
        punches.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    /// Adds a job that must not begin before the one that adds it holds or has given back its granules.
    fn add_later(&mut self, job: Job) {
        self.parts.entry(job.token).or_default().left += 1;
        let at = self.jobs.len();
        self.jobs.push(Some(job));
        self.waiting.push_back(at);
    }

    fn zero_fragments(&mut self, len: u64) -> Vec<Fragment> {
        let zeros = self.zeros.get_or_insert_with(|| Arc::new(AlignedBuf::new(ZEROS)));
        let mut left = len as usize;
        let mut all = Vec::with_capacity(left.div_ceil(ZEROS));
        while left > 0 {
            let take = left.min(ZEROS);
            all.extend(Fragment::owned(zeros, 0, take));
            left -= take;
        }
        all
    }

    fn plan_flush(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        job.stage = Stage::Transfer;
        // An overlay has no name: nothing of it is there after the process, synced or not. So only the base is.
        if mem::take(&mut self.unsynced) {
            let file = Arc::clone(&self.setup.base);
            job.target = Some(Arc::clone(&file));
            return self.give(at, job, Request::Sync { file });
        }
        Ok(())
    }

    /// Gives the kernel what was submitted.
    ///
    /// # Errors
    /// When it takes nothing; it is given again at the next call.
    pub fn kick(&mut self) -> Result<(), DiskError> {
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
        let mut reaped = mem::take(&mut self.reaped);
        if let Some(engine) = &mut self.engine {
            engine.cancel(|completion| reaped.push(completion));
        }
        for completion in reaped.drain(..) {
            self.completed(completion);
        }
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

    /// What comes after the engine has done all it was given of a job.
    fn next_step(&mut self, at: usize, job: &mut Job) {
        let next = match (&job.work, &job.stage) {
            (Work::Write(_), Stage::Edges) if job.error.is_none() => {
                let current = job.target.as_ref().zip(self.own.as_ref()).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
                // Forked meanwhile: what was to be written to is read-only now. From the beginning, to the new own file; the bytes
                // that were read are still right, since the granules are held.
                if current { self.transfer(at, job) } else { self.plan_write(at, job) }
            }
            (Work::Zero { advisory, .. }, Stage::Transfer) => {
                let advisory = *advisory;
                self.after_zero(job, advisory);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = next {
            job.error.get_or_insert(error);
        }
    }

    /// A file that has no holes: a discard is done, zeros are written.
    fn after_zero(&mut self, job: &mut Job, advisory: bool) {
        let refused = matches!(&job.error, Some(DiskError::Transfer(failure)) if failure.errno().is_some());
        if !refused {
            return;
        }
        // For a move the map says zero, whatever the file still holds; and a discard is a hint.
        job.error = None;
        if !job.moves && !advisory {
            let zeros = self.zero_fragments(job.len);
            self.add_later(Job::new(job.token, job.offset, job.len, Work::Write(zeros)));
        }
    }

    /// Ends a job: the map changes, its granules are free, and whoever waited for them begins.
    fn end(&mut self, at: usize, mut job: Job) {
        match (&job.work, &job.error) {
            (Work::Write(_), None) if job.moves => {
                if let Some(target) = job.target.take() {
                    self.map.insert(job.granules(), Source::File(target));
                }
            }
            (Work::Zero { .. }, None) if job.moves => self.map.insert(job.whole_granules(self.size()), Source::Zero),
            // Not durable: the next flush tries again.
            (Work::Flush, Some(_)) => self.unsynced = true,
            _ => {}
        }
        if job.changes() && job.target.as_ref().is_some_and(|target| target.is_named()) {
            self.unsynced = true;
        }
        self.free.push(at);
        if let Some(parts) = self.parts.get_mut(&job.token) {
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

/// What of `offset..end` lies outside of the whole granules in it.
fn odd_ends(offset: u64, end: u64, whole: &std::ops::Range<u64>) -> Vec<(u64, u64)> {
    if whole.is_empty() {
        // Within one granule, or across the border of two.
        return vec![(offset, end)];
    }
    let head = (offset, whole.start * GRANULE);
    let tail = ((whole.end * GRANULE).min(end), end);
    [head, tail].into_iter().filter(|(start, end)| start < end).collect()
}

fn fill_with_zeros(fragment: &Fragment) {
    const CHUNK: [u8; 4096] = [0; 4096];
    let slice = fragment.slice();
    let mut at = 0;
    while at < slice.len() {
        let len = CHUNK.len().min(slice.len() - at);
        if let Ok(part) = slice.subslice(at, len) {
            part.copy_from(&CHUNK[..len]);
        }
        at += len;
    }
}
