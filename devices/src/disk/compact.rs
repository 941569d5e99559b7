//! Keeping the files of a disk few.
//!
//! A disk that is forked gets another overlay at its next write, and an overlay lives for as long as one cluster of it
//! is nowhere else. A disk that is forked a thousand times, and writes a little in between, would have a thousand
//! overlays: two descriptors each, and the process has so many.
//!
//! So when the map names too many, clusters of the smallest are *moved* into the own file until half as many are left:
//! read, written, and then in the map, like a guest's write of the same bytes, alone with its clusters, and while the
//! guest goes on. As in a log-structured merge, what has been moved is in a larger file, and is moved again only when
//! there are many of that size.
//!
//! Images keep the files they have. Nothing is moved while a parent's writes are still on their way into a file of this disk, and nothing is moved
//! into an overlay that would be made for it: a disk nobody writes costs no file.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_io::{AlignedBuf, Fragment, IoFile, Request};

use super::DiskError;
use super::job::{Job, Stage, Work};
use super::live::Disk;
use super::map::{CLUSTER, Source};

/// Overlays that a map may name.
const MOST: usize = 64;
/// Overlays made between two looks at how many there are: looking takes as long as the map is.
const LOOK: u32 = 16;
/// Clusters moved at once.
const RUN: u64 = 64;
/// Moves in flight.
const AT_ONCE: usize = 2;
/// How long the end of moves is waited for.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What is to be moved, and how much of it is under way.
#[derive(Debug)]
pub(super) struct Relocation {
    /// Clusters. Where each is is looked up when its turn comes.
    queue: VecDeque<Range<u64>>,
    /// In flight.
    pub(super) running: usize,
    /// Overlays made since the last look.
    made: u32,
    /// Whether a flush waits for them.
    pub(super) urgent: bool,
    /// Whether none may begin: the disk is being committed.
    pub(super) stopped: bool,
    /// See [`MOST`] and [`LOOK`].
    most: usize,
    look: u32,
}

impl Default for Relocation {
    fn default() -> Self {
        Self { queue: VecDeque::new(), running: 0, made: 0, urgent: false, stopped: false, most: MOST, look: LOOK }
    }
}

impl Relocation {
    /// What is not under way stays where it is.
    pub(super) fn forget(&mut self) {
        self.urgent = false;
        self.queue.clear();
    }

    /// Whether nothing is to be moved.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running == 0
    }

    #[cfg(test)]
    pub(in crate::disk) fn at_most(most: usize, look: u32) -> Self {
        Self { most, look, ..Self::default() }
    }
}

/// Whether clusters of `file` may be moved away: an overlay that has become read-only.
fn movable(file: &Arc<IoFile>, own: Option<&Arc<IoFile>>) -> bool {
    !file.is_named() && !own.is_some_and(|own| Arc::ptr_eq(own, file))
}

impl Disk {
    /// To be called when an overlay was made: looks now and then whether they have become too many.
    pub(super) fn overlay_made(&mut self) {
        self.moves.made += 1;
        if self.moves.made < self.moves.look || !self.moves.queue.is_empty() {
            return;
        }
        self.moves.made = 0;
        let own = self.own.as_ref();
        let mut overlays = self.map.sizes();
        overlays.retain(|(file, _)| movable(file, own));
        if overlays.len() <= self.moves.most {
            return;
        }
        overlays.sort_unstable_by_key(|(_, clusters)| *clusters);
        overlays.truncate(overlays.len() - self.moves.most / 2);
        self.moves.urgent = false;
        self.queue_moves(|source| overlays.iter().any(|(file, _)| source.is(file)));
        tracing::debug!(path = %self.config().path.display(), overlays = overlays.len(), runs = self.moves.queue.len(), "overlays are merged");
    }

    /// Has the clusters of chosen sources moved.
    pub(super) fn queue_moves(&mut self, chosen: impl Fn(&Source) -> bool) {
        for (range, _) in self.map.pieces(0..self.size().div_ceil(CLUSTER)).filter(|(_, source)| chosen(source)) {
            let starts = (range.start..range.end).step_by(RUN as usize);
            self.moves.queue.extend(starts.map(|start| start..range.end.min(start + RUN)));
        }
    }

    /// Begins what is to be moved, a little at a time.
    pub(super) fn begin_moves(&mut self) {
        if self.fold.active && self.fold.rescan && self.moves.is_idle() {
            self.fold.rescan = false;
            let base = self.base().cloned();
            self.queue_moves(|source| !base.as_ref().is_some_and(|base| source.is(base)));
        }
        while !self.moves_are_held() && self.moves.running < AT_ONCE {
            let Some(range) = self.moves.queue.pop_front() else { return };
            let (start, end) = (range.start * CLUSTER, (range.end * CLUSTER).min(self.size()));
            self.moves.running += 1;
            // Its token is nobody's: it is counted here, and told to nobody.
            self.add(Job::new(u64::MAX, start, end - start, Work::Move(None)));
        }
    }

    fn moves_are_held(&self) -> bool {
        // A parent's writes that have not landed are done again by this disk's device, and then they are in the own file.
        self.moves.stopped || self.own.is_none() || self.unsettled.iter().any(|file| file.has_writes())
    }

    /// Whether a flush waits for what is being moved.
    pub(super) fn merges_first(&self) -> bool {
        self.moves.urgent && (self.moves.running > 0 || !self.moves.queue.is_empty() && !self.moves_are_held())
    }

    /// Reads what of the job's clusters can still be moved: all of one run of them. The rest is moved later.
    pub(super) fn plan_move(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        // Planned again after a fork, it may have nothing to do any more.
        (job.moves, job.target, job.stage) = (false, None, Stage::Transfer);
        let (own, all) = (self.own.clone(), job.clusters());
        let mut runs: Vec<Range<u64>> = Vec::new();
        let folds = self.fold.active;
        let may = |source: &Source| match source {
            Source::File(file) => movable(file, own.as_ref()),
            Source::Zero => false,
        };
        for (range, source) in self.map.pieces(all) {
            if folds && matches!(source, Source::Zero) {
                // Alone: no bytes are moved.
                runs.push(range);
            } else if may(source) {
                match runs.last_mut() {
                    Some(last) if last.end == range.start && may(&self.map.at(last.start)) => last.end = range.end,
                    _ => runs.push(range),
                }
            }
        }
        let mut runs = runs.into_iter();
        // Without an own file: forked meanwhile, and not written since.
        let (Some(own), Some(run)) = (own, runs.next()) else { return Ok(()) };
        self.moves.queue.extend(runs);
        job.offset = run.start * CLUSTER;
        job.len = (run.end * CLUSTER).min(self.size()) - job.offset;
        (job.moves, job.target) = (true, Some(Arc::clone(&own)));
        if matches!(self.map.at(run.start), Source::Zero) {
            let (offset, len) = (job.offset, job.len);
            return self.give(at, job, Request::Punch { file: own, offset, len });
        }
        let buffer = Arc::new(AlignedBuf::new(job.len as usize));
        let mut reads = Vec::new();
        for (range, source) in self.map.pieces(run) {
            let Source::File(file) = source else { continue };
            let (start, end) = (range.start * CLUSTER, (range.end * CLUSTER).min(self.size()));
            let buffers = Fragment::owned(&buffer, (start - job.offset) as usize, (end - start) as usize);
            let buffers = buffers.into_iter().collect();
            reads.push(Request::Read { file: Arc::clone(file), offset: start, buffers });
        }
        job.work = Work::Move(Some(buffer));
        job.stage = Stage::RmwEdges;
        reads.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    /// Stops moving, and waits for what is under way. What cannot be ended stays in flight.
    pub(super) fn settle_moves(&mut self) {
        self.moves.forget();
        let deadline = Instant::now() + TIMEOUT;
        while self.moves.running > 0 && Instant::now() < deadline {
            let done = self.reap();
            self.done.extend(done.unwrap_or_default());
            if self.moves.running > 0 && self.wait(Duration::from_millis(10)).is_err() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests;
