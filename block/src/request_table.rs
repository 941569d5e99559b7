//! The requests of a disk: their jobs, the clusters these hold, and the engine that carries them
//! out.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use clade_host_io::{AlignedBuf, Completion, Engine, EngineError, Fragment, IoFile, OpError, Request, Stats};
use vmm_sys_util::eventfd::EventFd;

use super::job::Job;
use super::locks::{Hold, RangeLocks, overlap};
use super::op::DiskDone;
use super::transfers::{Transfer, TransferQueue};
use super::{DiskError, steps_trace};

/// Operations in the kernel at a time.
const DEPTH: u32 = 128;
/// Bytes of the buffer of zeros, which is written where a file takes no holes.
const ZEROS: usize = 64 << 10;

/// The unfinished parts of one request, and the first error among them.
#[derive(Debug, Default)]
struct RequestProgress {
    /// Jobs that have not ended, and one for the rest of a transfer.
    left: usize,
    error: Option<DiskError>,
}

/// The jobs of a disk, each in a slot whose index is its token in the engine.
///
/// A request consists of one job or several, and of a rest while some bytes of a transfer are in no
/// job. A relocation is a job without a request.
///
/// Invariants:
///
/// - A slot is free, holds a job, or lends its job to a method of `Disk`. That method puts the job
///   back ([`RequestTable::put`], [`RequestTable::park`]) or ends it ([`RequestTable::finish`]).
/// - `parts` has every request with an unfinished job or with a rest. When its last part ends, the
///   request leaves `parts` and enters `done`, once.
/// - A transfer whose job has failed has no rest.
/// - `waiting` names a slot at most once, and keeps the order in which the jobs came.
/// - A job that ends releases its clusters. `released` is then set until waiting jobs are tried
///   again.
#[derive(Debug)]
pub(super) struct RequestTable {
    // Dropped first, as the first field: operations in flight end while the other fields still
    // exist.
    engine: Option<Engine<usize>>,
    /// Signalled by the engine when it has completions.
    event: EventFd,
    jobs: Vec<Option<Job>>,
    /// Free slots of `jobs`.
    free: Vec<usize>,
    /// Slots of jobs that wait for their clusters, or for a flush to end.
    waiting: VecDeque<usize>,
    /// Whether clusters or a flush were released since the waiting jobs were last tried.
    released: bool,
    locks: RangeLocks,
    /// Requests in flight, by token.
    parts: HashMap<u64, RequestProgress>,
    transfers: TransferQueue,
    /// Requests that have ended and have not been taken.
    done: Vec<DiskDone>,
    /// Jobs that failed because a file system, or a quota, had no room.
    no_room: u64,
    /// Kept empty between reaps for its capacity.
    reaped: Vec<Completion<usize>>,
    /// Made at the first use. Left unused once the engine has failed for good.
    zeros: Option<Arc<AlignedBuf>>,
}

/// Makes the kernel objects for the first request of `disks` disks, for a process that may not ask
/// for them later.
///
/// # Errors
/// When io_uring is not available.
pub fn prepare_engines(disks: usize) -> Result<(), EngineError> {
    Engine::<usize>::prepare(DEPTH, disks)
}

impl RequestTable {
    pub(super) fn new() -> Result<Self, DiskError> {
        Ok(Self {
            engine: None,
            event: clade_host_io::eventfd().map_err(DiskError::Event)?,
            jobs: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            released: false,
            locks: RangeLocks::default(),
            parts: HashMap::new(),
            transfers: TransferQueue::default(),
            done: Vec::new(),
            no_room: 0,
            reaped: Vec::new(),
            zeros: None,
        })
    }

    /// Requests that have not ended, including transfers without a piece.
    pub(super) fn in_flight(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn stats(&self) -> Stats {
        self.engine.as_ref().map(Engine::stats).unwrap_or_default()
    }

    /// Whether a job that changes the disk holds a slot.
    pub(super) fn has_changes(&self) -> bool {
        self.jobs.iter().flatten().any(Job::changes)
    }

    /// The target files of jobs.
    pub(super) fn targets(&self) -> impl Iterator<Item = &Arc<IoFile>> {
        self.jobs.iter().flatten().filter_map(|job| job.target.as_ref())
    }

    fn count_part(&mut self, job: &Job) {
        // A relocation's token belongs to no request.
        if !job.is_relocation() {
            self.parts.entry(job.token).or_default().left += 1;
        }
    }

    /// Ends a part of a request, and the request if that was the last one.
    fn end_part(&mut self, token: u64, error: Option<DiskError>) {
        let Some(parts) = self.parts.get_mut(&token) else { return };
        parts.left -= 1;
        if let Some(error) = error {
            parts.error.get_or_insert(error);
        }
        if parts.left == 0 {
            let error = self.parts.remove(&token).and_then(|parts| parts.error);
            self.done.push(DiskDone { token, result: error.map_or(Ok(()), Err) });
        }
    }

    pub(super) fn transfers(&self) -> &TransferQueue {
        &self.transfers
    }

    pub(super) fn transfers_mut(&mut self) -> &mut TransferQueue {
        &mut self.transfers
    }

    /// Adds a transfer, all of which is its rest.
    pub(super) fn begin_transfer(&mut self, transfer: Transfer) {
        self.parts.entry(transfer.token).or_default().left += 1;
        if transfer.len == 0 {
            return self.end_part(transfer.token, None);
        }
        self.transfers.push(transfer);
    }

    /// Ends the rest of a transfer, all of which is in pieces now, or which has failed.
    pub(super) fn end_rest(&mut self, token: u64, error: Option<DiskError>) {
        self.transfers.drop_rest(token);
        self.end_part(token, error);
    }

    /// Gives a job a slot, to be begun next.
    pub(super) fn insert(&mut self, job: Job) -> usize {
        self.count_part(&job);
        let at = self.free.pop().unwrap_or_else(|| self.new_slot());
        self.jobs[at] = Some(job);
        at
    }

    /// Adds a job that must not begin before the adding job holds or has released its clusters.
    pub(super) fn insert_later(&mut self, job: Job) {
        self.count_part(&job);
        // A job that has just ended may still be on the list of those that wait.
        let free = self.free.iter().rposition(|at| !self.waiting.contains(at));
        let at = match free {
            Some(free) => self.free.swap_remove(free),
            None => self.new_slot(),
        };
        self.jobs[at] = Some(job);
        self.waiting.push_back(at);
    }

    fn new_slot(&mut self) -> usize {
        self.jobs.push(None);
        self.jobs.len() - 1
    }

    /// Lends the job in slot `at`.
    pub(super) fn take(&mut self, at: usize) -> Option<Job> {
        self.jobs.get_mut(at).and_then(Option::take)
    }

    /// Puts back a job that has operations in the engine.
    pub(super) fn put(&mut self, at: usize, job: Job) {
        self.jobs[at] = Some(job);
    }

    /// Puts back a job that cannot begin yet.
    pub(super) fn park(&mut self, at: usize, job: Job) {
        self.jobs[at] = Some(job);
        if !self.waiting.contains(&at) {
            self.waiting.push_back(at);
        }
    }

    /// Takes the clusters of `job`, the job of slot `at`. Returns false, with nothing taken, while
    /// another job holds some of them or an earlier one waits for them.
    pub(super) fn lock(&mut self, at: usize, job: &mut Job, hold: Hold) -> bool {
        let range = job.clusters();
        let mut earlier = self.waiting.iter().take_while(|other| **other != at);
        let behind = earlier.any(|other| {
            let other = self.jobs[*other].as_ref();
            other.is_some_and(|other| overlap(&other.clusters(), &range))
        });
        job.lock = if behind { None } else { self.locks.take(&range, hold) };
        job.lock.is_some()
    }

    /// Has the waiting jobs tried again.
    pub(super) fn release(&mut self) {
        self.released = true;
    }

    /// Whether clusters or a flush were released since the last call.
    pub(super) fn take_released(&mut self) -> bool {
        mem::take(&mut self.released)
    }

    /// Slots of the jobs that wait, oldest first.
    pub(super) fn waiting(&self) -> Vec<usize> {
        self.waiting.iter().copied().collect()
    }

    /// Removes the job of slot `at` from the waiting jobs.
    pub(super) fn stop_waiting(&mut self, at: usize) {
        self.waiting.retain(|other| *other != at);
    }

    /// Ends the job of slot `at`: completes its request if it was the last part, and releases its
    /// clusters.
    pub(super) fn finish(&mut self, at: usize, mut job: Job) {
        self.free.push(at);
        if job.is_piece {
            self.transfers.piece_ended(job.len);
        }
        if !job.is_relocation() {
            let error = job.error.take();
            // Of a transfer that has failed, no other piece begins.
            if error.is_some() && self.transfers.drop_rest(job.token) {
                self.end_part(job.token, None);
            }
            self.end_part(job.token, error);
        }
        if let Some(lock) = job.lock.take() {
            self.locks.release(lock);
            self.released = true;
        }
    }

    /// Counts a job that found no room. Returns the new count.
    pub(super) fn count_no_room(&mut self) -> u64 {
        self.no_room += 1;
        self.no_room
    }

    /// Jobs that found no room.
    pub(super) fn no_room(&self) -> u64 {
        self.no_room
    }

    /// Takes the requests that have ended.
    pub(super) fn take_done(&mut self) -> Vec<DiskDone> {
        mem::take(&mut self.done)
    }

    /// Puts back requests that were taken too early.
    pub(super) fn put_back_done(&mut self, done: Vec<DiskDone>) {
        self.done.extend(done);
    }

    /// Gives the engine an operation of `job`, the job of slot `at`. `latency` delays each
    /// transfer.
    pub(super) fn give(
        &mut self,
        at: usize,
        job: &mut Job,
        request: Request,
        latency: Option<Duration>,
    ) -> Result<(), DiskError> {
        if self.engine.is_none() {
            // Made at the first request: most clones of a VM never touch their disk.
            let event = self.event.try_clone().map_err(DiskError::Event)?;
            let mut engine = Engine::new(DEPTH, event)?;
            engine.set_latency(latency);
            self.engine = Some(engine);
        }
        if let Some(engine) = &mut self.engine {
            engine.submit(steps_trace::request(request), at);
            job.left += 1;
        }
        Ok(())
    }

    /// Submits the engine's queued operations to the kernel.
    pub(super) fn flush_engine(&mut self) -> Result<(), EngineError> {
        self.engine.as_mut().map_or(Ok(()), Engine::flush)
    }

    pub(super) fn is_stalled(&mut self) -> bool {
        self.engine.as_mut().is_some_and(Engine::is_stalled)
    }

    pub(super) fn wait(&mut self, patience: Duration) -> Result<(), EngineError> {
        self.engine.as_mut().map_or(Ok(()), |engine| engine.wait(patience))
    }

    /// Takes the engine's completions. The vector comes back by [`RequestTable::recycle`].
    pub(super) fn reap(&mut self) -> (Vec<Completion<usize>>, Result<(), EngineError>) {
        let mut reaped = mem::take(&mut self.reaped);
        let result = self.engine.as_mut().map_or(Ok(()), |engine| engine.reap(|completion| reaped.push(completion)));
        (reaped, result)
    }

    /// Cancels the rests of transfers, and the operations that the kernel can cancel. Takes the
    /// completions of the latter.
    pub(super) fn cancel(&mut self) -> Vec<Completion<usize>> {
        for token in self.transfers.drop_rests() {
            self.end_part(token, Some(DiskError::Transfer(OpError::Cancelled)));
        }
        let mut reaped = mem::take(&mut self.reaped);
        if let Some(engine) = &mut self.engine {
            engine.cancel(|completion| reaped.push(completion));
        }
        reaped
    }

    /// Keeps the vector's memory for the next reap.
    pub(super) fn recycle(&mut self, mut reaped: Vec<Completion<usize>>) {
        reaped.clear();
        self.reaped = reaped;
    }

    /// Notes one operation's end in its job, which is lent. None if the slot has no job.
    pub(super) fn complete(&mut self, completion: Completion<usize>) -> Option<(usize, Job)> {
        let at = completion.token;
        let mut job = self.take(at)?;
        job.left -= 1;
        // The buffers are dropped here even if the job continues: a job has its own references to
        // buffers it still needs.
        drop(completion.buffers);
        if let Err(failure) = completion.result {
            job.fail(failure.into());
        }
        Some((at, job))
    }

    /// `len` bytes of zeros, from a buffer that all requests share.
    pub(super) fn zeros(&mut self, len: u64) -> Vec<Fragment> {
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

    #[cfg(test)]
    pub(crate) fn engine_mut(&mut self) -> Option<&mut Engine<usize>> {
        self.engine.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use crate::testutil::{finish, write};
    use crate::{CLUSTER, Disk, DiskConfig, DiskOp};

    /// A guest repeats such requests without end.
    #[test]
    fn zeros_that_are_written_later_take_no_new_slot_each() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, vec![1; 64 << 12]).unwrap();
        let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
        drop(disk.fork());
        write(&mut disk, 0, &[2; 4096]);
        for token in 0..200 {
            // Two odd ends around whole clusters, and a part of one cluster.
            for (offset, len) in [(512, 3 * CLUSTER), (9 * CLUSTER + 512, 512)] {
                disk.submit(DiskOp::Zero { offset, len, unmap: token % 2 == 0 }, token).unwrap();
            }
            finish(&mut disk);
        }
        assert!(disk.requests.jobs.len() <= 8, "{} slots", disk.requests.jobs.len());
        let free: std::collections::BTreeSet<_> = disk.requests.free.iter().collect();
        assert_eq!((free.len(), disk.requests.free.len()), (disk.requests.jobs.len(), disk.requests.jobs.len()));
    }
}
