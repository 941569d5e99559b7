//! The steps of a disk's jobs: the operations that a step gives to the engine, and the step after a
//! completion.

use std::sync::Arc;

use clade_host_io::{AlignedBuf, Fragment, Request, window};

use super::DiskError;
use super::job::{Edge, Job, JobKind, JobStage, RmwEdges};
use super::live::Disk;
use super::map::{CLUSTER, ClusterSource};

/// Number of extents in a map above which small zeros and discards add no more. The map then takes
/// some 10 MiB.
pub(super) const MAX_EXTENTS: usize = 1 << 16;
/// Number of clusters from which on zeros always become an extent: a disk has room for few ranges
/// of this size.
const SMALL_ZEROS: u64 = 256;

impl Disk {
    pub(super) fn plan(&mut self, at: usize, mut job: Job) {
        let planned = match job.work {
            JobKind::Read(_) => self.plan_read(at, &mut job),
            JobKind::Write(_) => self.plan_write(at, &mut job),
            JobKind::Zero { punch, advisory } => self.plan_zero(at, &mut job, punch, advisory),
            JobKind::Flush => self.plan_flush(at, &mut job),
            JobKind::Move(_) => self.plan_move(at, &mut job),
        };
        if let Err(error) = planned {
            job.error.get_or_insert(error);
        }
        self.put(at, job);
    }

    /// Puts a job back, or ends it if the engine has no operation of it.
    pub(super) fn put(&mut self, at: usize, job: Job) {
        if job.left > 0 {
            self.requests.put(at, job);
        } else {
            self.end(at, job);
        }
    }

    fn plan_read(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        let JobKind::Read(buffers) = &job.work else { return Ok(()) };
        let mut requests = Vec::new();
        for (range, source) in self.chain.map().pieces(job.clusters()) {
            let start = (range.start * CLUSTER).max(job.offset);
            let end = (range.end * CLUSTER).min(job.end());
            let part = window(buffers, (start - job.offset) as usize, (end - start) as usize);
            match source {
                ClusterSource::File(file) => {
                    requests.push(Request::Read { file: Arc::clone(file), offset: start, buffers: part });
                }
                // The processor may write: these pages are pinned for writing, and so this VM's
                // own.
                ClusterSource::Zero => part.iter().for_each(fill_with_zeros),
            }
        }
        job.stage = JobStage::Transfer;
        requests.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    fn plan_write(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        let active = self.chain.active_or_overlay()?;
        let clusters = job.clusters();
        job.moves = !self.chain.map().is_all(clusters.clone(), &active);
        job.target = Some(Arc::clone(&active));
        job.edges = RmwEdges::default();
        let whole = job.whole_clusters(self.size());
        let (mut reads, mut is_lost) = (Vec::new(), false);
        let mut edge = |cluster: u64| {
            let source = self.chain.map().at(cluster);
            if whole.contains(&cluster) || source.is(&active) {
                return None;
            }
            let len = CLUSTER.min(self.size() - cluster * CLUSTER) as usize;
            let edge = Edge { cluster, bytes: Arc::new(AlignedBuf::new(len)) };
            if let ClusterSource::File(file) = source {
                is_lost |= file.knows_lost_writes();
                let buffers = Fragment::owned(&edge.bytes, 0, len).into_iter().collect();
                reads.push(Request::Read { file, offset: cluster * CLUSTER, buffers });
            }
            Some(edge)
        };
        job.edges.head = edge(clusters.start);
        let last = clusters.end - 1;
        // One cluster can be both head and tail: it is read once.
        let tail = if last == clusters.start { job.edges.head.clone() } else { edge(last) };
        job.edges.tail = tail;
        if is_lost {
            // The rest of the cluster is made durable in another file, and may be what was there before.
            self.durability.set_lost();
        }
        if reads.is_empty() {
            return self.transfer(at, job);
        }
        job.stage = JobStage::RmwEdges;
        reads.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    fn transfer(&mut self, at: usize, job: &mut Job) -> Result<(), DiskError> {
        job.stage = JobStage::Transfer;
        let Some(file) = job.target.clone() else { return Ok(()) };
        let (offset, buffers) = match &job.work {
            JobKind::Write(buffers) => job.edges.around(job.offset, job.end(), buffers),
            JobKind::Move(Some(buffer)) => {
                (job.offset, Fragment::owned(buffer, 0, job.len as usize).into_iter().collect())
            }
            _ => return Ok(()),
        };
        self.give(at, job, Request::Write { file, offset, buffers })
    }

    fn plan_zero(&mut self, at: usize, job: &mut Job, punch: bool, advisory: bool) -> Result<(), DiskError> {
        job.stage = JobStage::Transfer;
        let (offset, len) = (job.offset, job.len);
        let base = self.chain.active().filter(|active| self.chain.is_base(active)).cloned();
        if let Some(file) = base.clone().filter(|base| self.chain.map().is_all(job.clusters(), base)) {
            // In place: the base is durable, and its file system can make zeros.
            job.target = Some(Arc::clone(&file));
            let request =
                if punch { Request::Punch { file, offset, len } } else { Request::Zero { file, offset, len } };
            return self.give(at, job, request);
        }
        let whole = job.whole_clusters(self.size());
        if !advisory {
            for (start, end) in odd_ends(offset, job.end(), &whole) {
                self.write_zeros_later(job.token, start, end);
            }
        }
        (job.offset, job.len) = (whole.start * CLUSTER, 0);
        if whole.is_empty() {
            return Ok(());
        }
        let end = (whole.end * CLUSTER).min(self.size());
        let crowded = self.is_crowded(&whole);
        if crowded && !advisory {
            self.write_zeros_later(job.token, job.offset, end);
            return Ok(());
        }
        job.len = end - job.offset;
        if let Some(file) = base {
            // Clusters of other files are zeros in the base from now on.
            (job.moves, job.target) = (true, Some(Arc::clone(&file)));
            let (offset, len) = (job.offset, job.len);
            return self.give(at, job, Request::Punch { file, offset, len });
        }
        job.moves = !crowded;
        let Some(active) = self.chain.active().cloned() else { return Ok(()) };
        // Punches holes in the active file. Other files belong to other disks too, and stay
        // unchanged.
        let active_pieces = self.chain.map().pieces(whole).filter(|(_, source)| source.is(&active));
        let punches: Vec<Request> = active_pieces
            .map(|(range, _)| {
                let (offset, len) = (range.start * CLUSTER, (range.end - range.start) * CLUSTER);
                Request::Punch { file: Arc::clone(&active), offset, len }
            })
            .collect();
        punches.into_iter().try_for_each(|request| self.give(at, job, request))
    }

    /// Whether the map is full, and zeros in `clusters` would add an extent. Such a discard is done
    /// in the active file only, and such zeros are written as data. So a guest cannot make the host
    /// store an extent for each cluster of a disk by discards alone; by writes it can.
    fn is_crowded(&self, clusters: &std::ops::Range<u64>) -> bool {
        let small = clusters.end - clusters.start < SMALL_ZEROS;
        small && self.chain.map().len() >= MAX_EXTENTS && self.chain.map().pieces(clusters.clone()).take(3).count() < 3
    }

    fn write_zeros_later(&mut self, token: u64, start: u64, end: u64) {
        let zeros = self.requests.zeros(end - start);
        self.requests.insert_later(Job::new(token, start, end - start, JobKind::Write(zeros)));
    }

    /// Whether the kernel has lost writes to a file that the job has read clusters from. It may have given back their
    /// older bytes: those would be made durable in another file.
    fn has_read_lost(&self, job: &Job) -> bool {
        let edges = [&job.edges.head, &job.edges.tail];
        let clusters = match &job.work {
            JobKind::Move(_) => vec![job.clusters()],
            _ => edges.into_iter().flatten().map(|edge| edge.cluster..edge.cluster + 1).collect(),
        };
        let mut sources = clusters.into_iter().flat_map(|clusters| self.chain.map().pieces(clusters));
        sources.any(|(_, source)| matches!(source, ClusterSource::File(file) if file.has_lost_writes()))
    }

    /// Continues a job when the engine has completed all its operations.
    pub(super) fn next_step(&mut self, at: usize, job: &mut Job) {
        if matches!(job.stage, JobStage::RmwEdges) && self.has_read_lost(job) {
            self.durability.set_lost();
        }
        let next = match (&job.work, &job.stage) {
            (JobKind::Write(_) | JobKind::Move(_), JobStage::RmwEdges) if job.error.is_none() => {
                let current = job.target.as_ref().zip(self.chain.active()).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
                // The disk was forked meanwhile, and the target file is read-only now. The job
                // begins again, with the new active file. The bytes already read are still right,
                // since the clusters are held.
                match (current, &job.work) {
                    (true, _) => self.transfer(at, job),
                    (false, JobKind::Move(_)) => self.plan_move(at, job),
                    (false, _) => self.plan_write(at, job),
                }
            }
            (JobKind::Flush, _) if job.error.is_none() => self.flush_on(at, job),
            (JobKind::Zero { advisory, .. }, JobStage::Transfer) => {
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

    /// Handles a file without holes: a discard is complete, zeros are written.
    fn after_zero(&mut self, job: &mut Job, advisory: bool) {
        let refused = matches!(&job.error, Some(DiskError::Transfer(failure)) if failure.errno().is_some());
        if !refused {
            return;
        }
        // For a move, the map records zeros regardless of the file's content; and a discard is a
        // hint.
        job.error = None;
        // In the base, the content is in the file and not in the map.
        job.moves &= job.target.is_none();
        if !job.moves && !advisory {
            let zeros = self.requests.zeros(job.len);
            self.requests.insert_later(Job::new(job.token, job.offset, job.len, JobKind::Write(zeros)));
        }
    }
}

/// The parts of `offset..end` outside its whole clusters.
fn odd_ends(offset: u64, end: u64, whole: &std::ops::Range<u64>) -> Vec<(u64, u64)> {
    if whole.is_empty() {
        // Within one cluster, or across the border of two.
        return vec![(offset, end)];
    }
    let head = (offset, whole.start * CLUSTER);
    let tail = ((whole.end * CLUSTER).min(end), end);
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
