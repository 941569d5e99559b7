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

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_host_io::{AlignedBuf, Fragment, Request};

use super::DiskError;
use super::job::{Job, JobKind, JobStage};
use super::live::Disk;
use super::map::{CLUSTER, ClusterSource};

/// How long a commit waits for the moves in flight.
const TIMEOUT: Duration = Duration::from_secs(10);

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
