//! One request to a disk, on its way through the steps it takes.

use std::ops::Range;
use std::sync::Arc;

use clade_io::{AlignedBuf, Fragment, IoFile};

use super::DiskError;
use super::map::CLUSTER;

/// What a job is to do.
#[derive(Debug)]
pub(super) enum Work {
    /// Read into the buffers.
    Read(Vec<Fragment>),
    /// Write the buffers.
    Write(Vec<Fragment>),
    /// Make zeros.
    Zero {
        /// As holes, where there can be any.
        punch: bool,
        /// Whether it may be left undone.
        advisory: bool,
    },
    /// Make durable.
    Flush,
    /// Copy clusters of overlays into the own file, through this memory.
    Move(Option<Arc<AlignedBuf>>),
}

/// Where a job is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing was given to the engine, or what was is done again from the beginning.
    Planned,
    /// The rest of clusters that are written in part is being read, or what is moved.
    RmwEdges,
    /// The transfer itself.
    Transfer,
}

/// See the module's documentation. Offsets and lengths are in bytes of the disk.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) token: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) work: Work,
    pub(super) stage: Stage,
    /// Operations in the engine.
    pub(super) left: usize,
    pub(super) error: Option<DiskError>,
    pub(super) lock: Option<u64>,
    /// The file written to, once that is known.
    pub(super) target: Option<Arc<IoFile>>,
    /// Whether the map is to name the target when the job is done.
    pub(super) moves: bool,
    pub(super) edges: RmwEdges,
}

impl Job {
    pub(super) fn new(token: u64, offset: u64, len: u64, work: Work) -> Self {
        Self {
            token,
            offset,
            len,
            work,
            stage: Stage::Planned,
            left: 0,
            error: None,
            lock: None,
            target: None,
            moves: false,
            edges: RmwEdges::default(),
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The clusters it touches.
    pub(super) fn clusters(&self) -> Range<u64> {
        self.offset / CLUSTER..self.end().div_ceil(CLUSTER)
    }

    /// Those that it covers, on a disk of `size` bytes, whose last cluster may be a short one.
    pub(super) fn whole_clusters(&self, size: u64) -> Range<u64> {
        let end = if self.end() == size { size.div_ceil(CLUSTER) } else { self.end() / CLUSTER };
        let start = self.offset.div_ceil(CLUSTER);
        start..end.max(start)
    }

    /// Whether it is a relocation, which no request has asked for.
    pub(super) fn is_relocation(&self) -> bool {
        matches!(self.work, Work::Move(_))
    }

    /// Whether it changes the disk.
    pub(super) fn changes(&self) -> bool {
        matches!(self.work, Work::Write(_) | Work::Zero { .. } | Work::Move(_))
    }
}

/// The first and the last cluster of a write, where it covers only a part of them.
#[derive(Debug, Default)]
pub(super) struct RmwEdges {
    pub(super) head: Option<Edge>,
    pub(super) tail: Option<Edge>,
}

/// A cluster whose other bytes are written along.
#[derive(Clone, Debug)]
pub(super) struct Edge {
    pub(super) cluster: u64,
    /// What it held before.
    pub(super) bytes: Arc<AlignedBuf>,
}

impl Edge {
    pub(super) fn start(&self) -> u64 {
        self.cluster * CLUSTER
    }

    fn part(&self, start: u64, end: u64) -> Option<Fragment> {
        let (from, to) = (start - self.start(), end - self.start());
        Fragment::owned(&self.bytes, from as usize, (to - from) as usize).ok().filter(|part| !part.is_empty())
    }
}

impl RmwEdges {
    /// Where a write of `offset..end` begins with them, and its memory.
    pub(super) fn around(&self, offset: u64, end: u64, buffers: &[Fragment]) -> (u64, Vec<Fragment>) {
        let mut all = Vec::with_capacity(buffers.len() + 2);
        let start = self.head.as_ref().map_or(offset, Edge::start);
        all.extend(self.head.as_ref().and_then(|edge| edge.part(edge.start(), offset)));
        all.extend_from_slice(buffers);
        all.extend(self.tail.as_ref().and_then(|edge| edge.part(end, edge.start() + edge.bytes.len() as u64)));
        (start, all)
    }
}
