//! One job of a disk, on its way through its steps.

use std::ops::Range;
use std::sync::Arc;

use clade_host_io::{AlignedBuf, Fragment, IoFile, OpError};

use super::DiskError;
use super::map::CLUSTER;

/// The work of a job.
#[derive(Debug)]
pub(super) enum JobKind {
    /// Reads into the buffers.
    Read(Vec<Fragment>),
    /// Writes the buffers.
    Write(Vec<Fragment>),
    /// Makes zeros.
    Zero {
        /// Whether to punch holes, where the file system has them.
        punch: bool,
        /// Whether the job may be left undone: a discard.
        advisory: bool,
    },
    /// Makes finished writes durable.
    Flush,
    /// Copies clusters of overlays into the active file, through this memory.
    Move(Option<Arc<AlignedBuf>>),
}

/// The step a job has reached.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum JobStage {
    /// The engine has no operation of the job, or the job is to be planned anew.
    Planned,
    /// Reading the rest of partly written clusters, or the clusters to move.
    RmwEdges,
    /// Transferring the data.
    Transfer,
}

/// A job. Offsets and lengths are in bytes of the disk.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) token: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) work: JobKind,
    /// Whether the job is a piece of a transfer. Its length then stays the same.
    pub(super) is_piece: bool,
    pub(super) stage: JobStage,
    /// Operations that the engine has not completed.
    pub(super) left: usize,
    pub(super) error: Option<DiskError>,
    pub(super) lock: Option<u64>,
    /// The file to write to, once that is decided.
    pub(super) target: Option<Arc<IoFile>>,
    /// Whether the map is to refer to `target` for the job's clusters when the job ends.
    pub(super) moves: bool,
    pub(super) edges: RmwEdges,
}

impl Job {
    pub(super) fn new(token: u64, offset: u64, len: u64, work: JobKind) -> Self {
        Self {
            token,
            offset,
            len,
            work,
            is_piece: false,
            stage: JobStage::Planned,
            left: 0,
            error: None,
            lock: None,
            target: None,
            moves: false,
            edges: RmwEdges::default(),
        }
    }

    /// Notes an error. The first error stays, unless it is a cancellation: the kernel reports a
    /// lost write once, and a cancelled flush must not forget it.
    pub(super) fn fail(&mut self, error: DiskError) {
        if matches!(self.error, None | Some(DiskError::Transfer(OpError::Cancelled))) {
            self.error = Some(error);
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The clusters that the job touches.
    pub(super) fn clusters(&self) -> Range<u64> {
        self.offset / CLUSTER..self.end().div_ceil(CLUSTER)
    }

    /// The clusters that the job covers as a whole. On a disk of `size` bytes, the last cluster may
    /// be a short one.
    pub(super) fn whole_clusters(&self, size: u64) -> Range<u64> {
        let end = if self.end() == size { size.div_ceil(CLUSTER) } else { self.end() / CLUSTER };
        let start = self.offset.div_ceil(CLUSTER);
        start..end.max(start)
    }

    /// Whether the job is a relocation, which belongs to no request.
    pub(super) fn is_relocation(&self) -> bool {
        matches!(self.work, JobKind::Move(_))
    }

    /// Whether the job changes the disk.
    pub(super) fn changes(&self) -> bool {
        matches!(self.work, JobKind::Write(_) | JobKind::Zero { .. } | JobKind::Move(_))
    }
}

/// The first and the last cluster of a write, where the write covers only a part of them.
#[derive(Debug, Default)]
pub(super) struct RmwEdges {
    pub(super) head: Option<Edge>,
    pub(super) tail: Option<Edge>,
}

/// A cluster that is written in part. Its other bytes are written along.
#[derive(Clone, Debug)]
pub(super) struct Edge {
    pub(super) cluster: u64,
    /// The cluster's bytes before the write.
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
    /// The start of a write of `offset..end` with its edges, and the memory of all of it.
    pub(super) fn around(&self, offset: u64, end: u64, buffers: &[Fragment]) -> (u64, Vec<Fragment>) {
        let mut all = Vec::with_capacity(buffers.len() + 2);
        let start = self.head.as_ref().map_or(offset, Edge::start);
        all.extend(self.head.as_ref().and_then(|edge| edge.part(edge.start(), offset)));
        all.extend_from_slice(buffers);
        all.extend(self.tail.as_ref().and_then(|edge| edge.part(end, edge.start() + edge.bytes.len() as u64)));
        (start, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(errno: i32) -> DiskError {
        OpError::Io { path: "image".into(), source: std::io::Error::from_raw_os_error(errno) }.into()
    }

    #[test]
    fn a_cancellation_hides_no_lost_write() {
        let errno = |job: &Job| match &job.error {
            Some(DiskError::Transfer(failure)) => failure.errno(),
            _ => None,
        };
        let mut job = Job::new(1, 0, 0, JobKind::Flush);
        job.fail(OpError::Cancelled.into());
        assert_eq!(errno(&job), None);
        job.fail(lost(libc::EIO));
        assert_eq!(errno(&job), Some(libc::EIO));
        job.fail(lost(libc::ENOSPC));
        job.fail(OpError::Cancelled.into());
        assert_eq!(errno(&job), Some(libc::EIO), "the first that the kernel has reported");
    }
}
