//! Writing checkpoints to the disk, where later supervisors find them.
//!
//! The first kept checkpoint of a line of VMs is written in full. Later ones have the pages and clusters
//! that changed since the nearest kept one that is still in memory: of the VM, or of one that it was forked
//! from.

use std::sync::Arc;

use clade_devices::virtio::net::Link;
use clade_memory::PAGE_SIZE;

use super::Supervisor;
use super::checkpoint::Checkpoint;
use super::kept::{ChainBytes, KeptData, KeptDir, KeptRecord};
use super::processes::ProcessId;
use super::vm_record::VmRecord;
use clade_api::http::Cancel;
use clade_api::{DaemonError, ProblemKind};
use clade_worker::WriteSnapshotRequest;

/// Most snapshots that a kept checkpoint consists of. Each adds files to hold open, and pieces to map.
const MAX_CHAIN: usize = 16;

/// A kept checkpoint that another builds on.
struct KeptBase {
    checkpoint: Arc<Checkpoint>,
    data: KeptData,
}

impl Supervisor {
    /// The directory of kept checkpoints.
    ///
    /// # Errors
    /// When the supervisor has no such directory.
    pub(super) fn kept(&self) -> Result<&KeptDir, DaemonError> {
        self.0.kept.as_ref().map_err(|why| DaemonError::Refused {
            kind: ProblemKind::WrongState,
            text: format!("no checkpoint can be kept: {why}"),
        })
    }

    /// Writes a checkpoint to the disk, where later supervisors find it under `name`: with what changed
    /// since an earlier one, unless `full`. Returns its record.
    ///
    /// # Errors
    /// When it cannot be written. Then nothing is left on the disk.
    pub(super) fn keep(
        &self,
        name: &str,
        checkpoint: &Checkpoint,
        full: bool,
        cancel: &Cancel,
    ) -> Result<KeptRecord, DaemonError> {
        if let Some(base) = self.base_of(checkpoint).filter(|_| !full) {
            match self.keep_on(name, checkpoint, Some(&base), false, cancel) {
                kept @ (Ok(_) | Err(DaemonError::Keep { .. })) => return kept,
                // The files of the base may be damaged.
                Err(error) if error.problem() != ProblemKind::NoRoom && self.check(0, 0, cancel).is_ok() => {
                    tracing::warn!(%error, name, "writes a checkpoint in full, because its base cannot be used");
                }
                kept => return kept,
            }
        }
        self.keep_on(name, checkpoint, None, full, cancel)
    }

    /// Writes a checkpoint, with the changes since `base` if there is one. `is_alone`: no later one builds on
    /// those before it.
    fn keep_on(
        &self,
        name: &str,
        checkpoint: &Checkpoint,
        base: Option<&KeptBase>,
        is_alone: bool,
        cancel: &Cancel,
    ) -> Result<KeptRecord, DaemonError> {
        let kept = self.kept()?;
        let failed = |source| DaemonError::Keep { name: name.to_owned(), source };
        let wanted = base.map(|base| base.data.chain.as_slice()).unwrap_or_default();
        let chain = kept.prepare(name, wanted).map_err(failed)?;
        let write = || -> Result<KeptRecord, DaemonError> {
            // Without its chain, the base was removed meanwhile.
            let base = base.filter(|_| chain.len() > 1);
            let unusable = |error: clade_snapshot::Error| DaemonError::Snapshot(Box::new(error.into()));
            // Not opened here: a process that a guest has broken into may have written them.
            let read = kept.snapshots(&chain[1..]).map_err(unusable)?;
            let save_request = WriteSnapshotRequest {
                dir: kept.snapshot(name, &chain),
                config: checkpoint.config().clone(),
                base: read.first().zip(base).map(|(dir, base)| (dir.path.clone(), base.data.id)),
                zstd: false,
                replace: false,
                // Another process may write a checkpoint on the same base, and the directory of all may
                // be mounted elsewhere by a later supervisor.
                is_fixed: true,
                is_closed: checkpoint.network() == Some(Link::Closed),
            };
            let dirs = (vec![kept.data(&chain[0])], read);
            let image = base.map(|base| &*base.checkpoint);
            let saved = self.write(save_request, dirs, image, checkpoint, |_| self.check(0, 0, cancel).is_err())?;
            // Not `data_bytes`, which has holes.
            let written = saved.data_pages.saturating_mul(PAGE_SIZE);
            let bytes = match base {
                Some(base) => base.data.bytes.with(written),
                None => ChainBytes { full: written, all: written },
            };
            let (labels, bounds) = (checkpoint.labels().clone(), checkpoint.vm_record().bounds);
            let record = KeptRecord::of(checkpoint.info(name), labels, bounds, (chain.clone(), bytes));
            kept.commit(name, &record).map_err(failed)?;
            checkpoint.set_kept(KeptData { chain: chain.clone(), bytes, id: saved.id, is_alone });
            self.note_kept(checkpoint);
            Ok(record)
        };
        write().inspect_err(|_| {
            if let Err(error) = kept.remove(name) {
                tracing::warn!(%error, name, "files of a checkpoint stay");
            }
        })
    }

    /// Returns the kept checkpoint that `checkpoint` is written on: the nearest usable one of its line. None if
    /// it is written in full.
    fn base_of(&self, checkpoint: &Checkpoint) -> Option<KeptBase> {
        let line = checkpoint.line();
        let mut held = line.iter().filter_map(|data| {
            let checkpoint = self.0.checkpoints.held_as(data)?;
            let data = checkpoint.kept()?.clone();
            Some(KeptBase { checkpoint, data })
        });
        let nearest = held.find(|base| is_base(base, checkpoint))?;
        // Not a farther one: what changed since would be more and more.
        let may_grow = nearest.data.chain.len() < MAX_CHAIN && nearest.data.bytes.may_grow();
        may_grow.then_some(nearest)
    }

    /// Notes that the VM of a kept checkpoint descends from it, if it has not ended.
    fn note_kept(&self, checkpoint: &Checkpoint) {
        let Some((vm, process)) = checkpoint.vm().zip(checkpoint.vm_record().process) else { return };
        if VmRecord::read(&self.0.dir, vm).is_ok_and(|now| now.is_some_and(|now| now.process == Some(process))) {
            self.0.kept_lines.extend(vm, process, &checkpoint.line(), checkpoint.instant());
        }
    }

    /// Notes that new VMs, each with its process, start from the image of `checkpoint`.
    pub(super) fn note_children(&self, checkpoint: &Checkpoint, children: &[(String, ProcessId)]) {
        let line = checkpoint.line();
        // A new VM has no line yet.
        if !line.is_empty() {
            children.iter().for_each(|(vm, process)| self.0.kept_lines.begin(vm, *process, &line));
        }
    }

    /// Removes a kept checkpoint from the disk.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(super) fn remove_kept(&self, name: &str) -> Result<(), DaemonError> {
        self.kept()?.remove(name).map_err(|source| DaemonError::Keep { name: name.to_owned(), source })
    }
}

/// Whether `checkpoint` may be written on `base`: the processes of its children will read the files of both.
fn is_base(base: &KeptBase, checkpoint: &Checkpoint) -> bool {
    let (of, vm_record) = (&base.checkpoint, checkpoint.vm_record());
    // Copies have files in common with other copies, and with the files of an earlier supervisor's. A VM
    // has files in common with copies if it descends from copies.
    let shares_files = match (checkpoint.is_detached(), of.is_detached()) {
        (true, false) => of.saved_at().is_some(),
        (false, true) => vm_record.template.detached,
        (true, true) => of.vm_record().process == vm_record.process || checkpoint.descends_from_copies(),
        (false, false) => true,
    };
    shares_files
        && of.config() == checkpoint.config()
        // Secrets that were erased are in the base's files.
        && of.vm_record().secrets == vm_record.secrets
}
