//! The queue of moves: clusters of small overlays that are to go to the active file.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use clade_host_io::IoFile;

use super::map::{BlockMap, ClusterSource};

/// Overlays that a map may name before they are merged.
pub(super) const MAX_OVERLAYS: usize = 64;

/// Overlays made between two counts of them: counting takes time proportional to the map.
pub(super) const CHECK_INTERVAL: u32 = 16;

/// Maximum number of clusters in one move.
pub(super) const MAX_RUN: u64 = 64;

/// Moves in flight.
pub(super) const MAX_RUNNING: usize = 2;

/// The queue of moves, and the number of moves in flight.
///
/// Invariants: at most [`MAX_RUNNING`] moves run. A queued range is at most [`MAX_RUN`] clusters.
/// Clearing the queue clears the urgent flag.
#[derive(Debug)]
pub(super) struct Relocation {
    /// Ranges of clusters. The file of a range is looked up when its turn comes.
    pub(super) queue: VecDeque<Range<u64>>,
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

/// Whether clusters of `file` may be moved: it is an overlay, read-only now, and has all that was written to it.
pub(super) fn movable(file: &Arc<IoFile>, active: Option<&Arc<IoFile>>) -> bool {
    !file.is_named() && !file.knows_lost_writes() && !active.is_some_and(|active| Arc::ptr_eq(active, file))
}
