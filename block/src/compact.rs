//! Keeps the number of a disk's files low.
//!
//! After a fork, the next write makes another overlay. An overlay lives as long as one of its
//! clusters is in no other file. Without compaction, a disk that was forked a thousand times, with
//! a few writes in between, would have a thousand overlays with two descriptors each.
//!
//! So when a map names too many overlays, the clusters of the smallest are *moved* into the active
//! file until half as many are left. A move reads the clusters, writes them, and changes the map,
//! while the guest runs. Like a guest's write, a move holds its clusters. As in a log-structured
//! merge, moved clusters are in a larger file, and move again only when there are many files of
//! that size.
//!
//! Images keep their files. Moves wait until the parent's writes in flight to a file of this disk
//! have ended. No overlay is made only to move clusters into it: a disk without writes costs no
//! file.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_host_io::{AlignedBuf, Fragment, IoFile, Request};

use super::DiskError;
use super::job::{Job, JobKind, JobStage};
use super::live::Disk;
use super::map::{BlockMap, CLUSTER, ClusterSource};

/// Overlays that a map may name before they are merged.
const MAX_OVERLAYS: usize = 64;
/// Overlays made between two counts of them: counting takes time proportional to the map.
const CHECK_INTERVAL: u32 = 16;
/// Maximum number of clusters in one move.
const MAX_RUN: u64 = 64;
/// Moves in flight.
const MAX_RUNNING: usize = 2;
/// How long a commit waits for the moves in flight.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The queue of moves, and the number of moves in flight.
///
/// Invariants: at most [`MAX_RUNNING`] moves run. A queued range is at most [`MAX_RUN`] clusters.
/// Clearing the queue clears the urgent flag.
#[derive(Debug)]
pub(super) struct Relocation {
    /// Ranges of clusters. The file of a range is looked up when its turn comes.
    queue: VecDeque<Range<u64>>,
    /// Moves in flight.
    running: usize,
    /// Overlays made since they were last counted.
    made: u32,
    /// Whether a flush waits for the moves.
    urgent: bool,
    /// Whether no move may begin, because the disk is being committed.
    held: bool,
    /// [`MAX_OVERLAYS`] and [`CHECK_INTERVAL`]; tests set others.
    most: usize,
    look: u32,
}

impl Default for Relocation {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            running: 0,
            made: 0,
            urgent: false,
            held: false,
            most: MAX_OVERLAYS,
            look: CHECK_INTERVAL,
        }
    }
}

impl Relocation {
    /// Notes that `active`, an overlay, was made. Now and then, counts the overlays of `map` and
    /// queues the smallest.
    pub(super) fn overlay_made(&mut self, map: &BlockMap, active: &Arc<IoFile>, path: &Path) {
        self.made += 1;
        if self.made < self.look || self.is_queued() {
            return;
        }
        self.made = 0;
        let mut overlays = map.sizes();
        overlays.retain(|(file, _)| movable(file, Some(active)));
        if overlays.len() <= self.most {
            return;
        }
        overlays.sort_unstable_by_key(|(_, clusters)| *clusters);
        overlays.truncate(overlays.len() - self.most / 2);
        self.urgent = false;
        self.queue_sources(map, |source| overlays.iter().any(|(file, _)| source.is(file)));
        let (overlays, runs) = (overlays.len(), self.queue.len());
        tracing::debug!(path = %path.display(), overlays, runs, "overlays are merged");
    }

    /// Queues the clusters of chosen sources.
    pub(super) fn queue_sources(&mut self, map: &BlockMap, chosen: impl Fn(&ClusterSource) -> bool) {
        for (range, _) in map.extents().filter(|(_, source)| chosen(source)) {
            let starts = (range.start..range.end).step_by(MAX_RUN as usize);
            self.queue(starts.map(|start| start..range.end.min(start + MAX_RUN)));
        }
    }

    /// Queues ranges of at most [`MAX_RUN`] clusters each.
    pub(super) fn queue(&mut self, ranges: impl Iterator<Item = Range<u64>>) {
        self.queue.extend(ranges);
    }

    /// The range to move next, which then counts as running. None while [`MAX_RUNNING`] moves run.
    pub(super) fn next(&mut self) -> Option<Range<u64>> {
        if self.running >= MAX_RUNNING {
            return None;
        }
        let range = self.queue.pop_front()?;
        self.running += 1;
        Some(range)
    }

    /// Counts a move as ended.
    pub(super) fn ended(&mut self) {
        self.running -= 1;
    }

    /// Clears the queue. Moves in flight continue.
    pub(super) fn forget(&mut self) {
        self.urgent = false;
        self.queue.clear();
    }

    /// Whether no move is queued or in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running == 0
    }

    pub(super) fn is_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Moves in flight.
    pub(super) fn running(&self) -> usize {
        self.running
    }

    /// Makes flushes wait for the queued moves.
    pub(super) fn set_urgent(&mut self) {
        self.urgent = true;
    }

    pub(super) fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// Stops moves from beginning, or lets them begin again.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    #[cfg(test)]
    pub(crate) fn at_most(most: usize, look: u32) -> Self {
        Self { most, look, ..Self::default() }
    }
}

/// Whether clusters of `file` may be moved: it is an overlay, and read-only now.
pub(super) fn movable(file: &Arc<IoFile>, active: Option<&Arc<IoFile>>) -> bool {
    !file.is_named() && !active.is_some_and(|active| Arc::ptr_eq(active, file))
}

impl Disk {
    /// Begins moves, as many as may run at once.
    pub(super) fn begin_moves(&mut self) {
        self.chain.rescan_for_fold();
        while let Some(range) = self.chain.next_move() {
            let (start, end) = (range.start * CLUSTER, (range.end * CLUSTER).min(self.size()));
            // The token belongs to no request. The chain counts the move, and no device sees its
            // end.
            self.add(Job::new(u64::MAX, start, end - start, JobKind::Move(None)));
        }
    }

    /// Plans a move: reads one run of the job's clusters that can still be moved. The other runs
    /// are queued again.
    pub(super) fn plan_move(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        // A move that is planned again after a fork may have no clusters left.
        (job.moves, job.target, job.stage) = (false, None, JobStage::Transfer);
        let (chain, map) = (&self.chain, self.chain.map());
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (range, source) in map.pieces(job.clusters()) {
            if chain.is_folding() && matches!(source, ClusterSource::Zero) {
                // A disk that folds is alone, and zeros need no copy.
                runs.push(range);
            } else if chain.is_movable(source) {
                match runs.last_mut() {
                    Some(last) if last.end == range.start && chain.is_movable(&map.at(last.start)) => {
                        last.end = range.end;
                    }
                    _ => runs.push(range),
                }
            }
        }
        let mut runs = runs.into_iter();
        // A disk that was forked meanwhile and not written since has no active file.
        let (Some(active), Some(run)) = (chain.active().cloned(), runs.next()) else { return Ok(()) };
        self.chain.requeue_moves(runs);
        job.offset = run.start * CLUSTER;
        job.len = (run.end * CLUSTER).min(self.size()) - job.offset;
        (job.moves, job.target) = (true, Some(Arc::clone(&active)));
        if matches!(self.chain.map().at(run.start), ClusterSource::Zero) {
            let (offset, len) = (job.offset, job.len);
            return self.give(at, job, Request::Punch { file: active, offset, len });
        }
        let buffer = Arc::new(AlignedBuf::new(job.len as usize));
        let mut reads = Vec::new();
        for (range, source) in self.chain.map().pieces(run) {
            let ClusterSource::File(file) = source else { continue };
            let (start, end) = (range.start * CLUSTER, (range.end * CLUSTER).min(self.size()));
            let buffers = Fragment::owned(&buffer, (start - job.offset) as usize, (end - start) as usize);
            let buffers = buffers.into_iter().collect();
            reads.push(Request::Read { file: Arc::clone(file), offset: start, buffers });
        }
        job.work = JobKind::Move(Some(buffer));
        job.stage = JobStage::RmwEdges;
        reads.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    /// Clears the queue and waits for the moves in flight. One that does not end in time stays in
    /// flight.
    pub(super) fn settle_moves(&mut self) {
        self.chain.forget_moves();
        let deadline = Instant::now() + TIMEOUT;
        while self.chain.relocation().running() > 0 && Instant::now() < deadline {
            let done = self.reap();
            self.requests.put_back_done(done.unwrap_or_default());
            if self.chain.relocation().running() > 0 && self.wait(Duration::from_millis(10)).is_err() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests;
