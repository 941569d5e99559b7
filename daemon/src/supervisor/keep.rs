//! Writing checkpoints to the disk, where later supervisors find them.
//!
//! The first kept checkpoint of a line of VMs is written in full. Later ones have the pages and clusters
//! that changed since the nearest kept one that is still in memory: of the VM, or of one that it was forked
//! from.

use std::sync::Arc;

use clade_devices::virtio::net::Link;
use clade_snapshot::{KnownDir, ParentDirs, Snapshot, SnapshotId};

use super::Supervisor;
use super::checkpoint::Checkpoint;
use super::kept::{DataId, KeptDir, KeptRecord};
use super::processes::ProcessId;
use super::vm_record::VmRecord;
use crate::control::ProblemKind;
use crate::vm_host::{Cancel, DaemonError};
use crate::worker::WriteSnapshotRequest;

/// Most snapshots that a kept checkpoint consists of. Each adds files to hold open, and pieces to map.
const MAX_CHAIN: usize = 16;

/// A checkpoint as it is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeptData {
    /// Its own data, and then the data that it builds on, the nearest first.
    pub(super) chain: Vec<DataId>,
    pub(super) id: SnapshotId,
}

/// A snapshot that another is incremental to.
struct KeptBase<'a> {
    checkpoint: &'a Checkpoint,
    data: &'a KeptData,
    /// Its directories, the newest first.
    dirs: Vec<KnownDir>,
}

impl Supervisor {
    /// The directory of kept checkpoints.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn kept(&self) -> Result<&KeptDir, DaemonError> {
        self.0.kept.as_ref().map_err(|why| DaemonError::Refused {
            kind: ProblemKind::WrongState,
            text: format!("no checkpoint can be kept: {why}"),
        })
    }

    /// Writes a checkpoint to the disk, where later supervisors find it under `name`. Returns its record.
    ///
    /// # Errors
    /// When it cannot be written. Then nothing is left on the disk.
    pub(super) fn keep(&self, name: &str, checkpoint: &Checkpoint, cancel: &Cancel) -> Result<KeptRecord, DaemonError> {
        if let Some(base) = self.base_of(checkpoint) {
            match self.keep_on(name, checkpoint, Some(&base), cancel) {
                // The files of the base may be damaged.
                Err(error) if error.problem() != ProblemKind::NoRoom && self.check(0, 0, cancel).is_ok() => {
                    tracing::warn!(%error, name, "writes a checkpoint in full, because its base cannot be used");
                }
                kept => return kept,
            }
        }
        self.keep_on(name, checkpoint, None, cancel)
    }

    /// Writes a checkpoint, with the changes since `base` if there is one.
    fn keep_on(
        &self,
        name: &str,
        checkpoint: &Checkpoint,
        base: Option<&Arc<Checkpoint>>,
        cancel: &Cancel,
    ) -> Result<KeptRecord, DaemonError> {
        let kept = self.kept()?;
        let failed = |source| DaemonError::Keep { name: name.to_owned(), source };
        let wanted = base.and_then(|base| base.kept()).map(|data| data.chain.as_slice()).unwrap_or_default();
        let chain = kept.prepare(name, wanted).map_err(failed)?;
        let write = || -> Result<KeptRecord, DaemonError> {
            // Without it, the base was removed meanwhile.
            let base = base.filter(|_| chain.len() > 1).map(|base| self.kept_base(kept, base)).transpose()?.flatten();
            let save_request = WriteSnapshotRequest {
                dir: kept.snapshot(name, &chain),
                config: checkpoint.config().clone(),
                base: base.as_ref().map(|base| (kept.snapshot(name, &base.data.chain), base.data.id)),
                zstd: false,
                replace: false,
                // The directory may be mounted elsewhere by a later supervisor.
                is_relative: true,
                is_closed: checkpoint.network() == Some(Link::Closed),
            };
            let dirs = (vec![kept.data(&chain[0])], base.as_ref().map(|base| base.dirs.clone()).unwrap_or_default());
            let image = base.as_ref().map(|base| base.checkpoint);
            let saved = self.write(save_request, dirs, image, checkpoint, |_| self.check(0, 0, cancel).is_err())?;
            let info = checkpoint.info(name);
            let record =
                KeptRecord::of(info, checkpoint.labels().clone(), checkpoint.vm_record().bounds, chain.clone());
            kept.commit(name, &record).map_err(failed)?;
            checkpoint.set_kept(KeptData { chain: chain.clone(), id: saved.id });
            self.note_kept(checkpoint);
            Ok(record)
        };
        write().inspect_err(|_| {
            if let Err(error) = kept.remove(name) {
                tracing::warn!(%error, name, "files of a checkpoint stay");
            }
        })
    }

    /// Returns the snapshot of a kept checkpoint, to be the base of another. None if it is not kept.
    fn kept_base<'a>(&self, kept: &KeptDir, base: &'a Checkpoint) -> Result<Option<KeptBase<'a>>, DaemonError> {
        let Some(data) = base.kept() else { return Ok(None) };
        let parents = ParentDirs::beneath(kept.parents(&data.chain));
        let unusable = |error: clade_snapshot::Error| DaemonError::Snapshot(Box::new(error.into()));
        let own = kept.data(&data.chain[0]).join("snapshot");
        let dirs = Snapshot::open(&own, &parents).and_then(|snapshot| snapshot.known_dirs()).map_err(unusable)?;
        Ok(Some(KeptBase { checkpoint: base, data, dirs }))
    }

    /// Returns the kept checkpoint that `checkpoint` is written on: the nearest of its line.
    fn base_of(&self, checkpoint: &Checkpoint) -> Option<Arc<Checkpoint>> {
        let line = self.line_of(checkpoint);
        let held = line.iter().find_map(|data| self.0.checkpoints.held_as(data))?;
        is_base(&held, checkpoint).then_some(held)
    }

    /// Returns the data of the kept checkpoints that an image descends from, the nearest first.
    fn line_of(&self, checkpoint: &Checkpoint) -> Vec<DataId> {
        match (checkpoint.kept(), checkpoint.vm()) {
            (Some(data), _) => data.chain.clone(),
            (None, Some(vm)) => self.0.kept_lines.of(vm, checkpoint.vm_record().process),
            (None, None) => Vec::new(),
        }
    }

    /// Notes that the VM of a kept checkpoint descends from it, if it has not ended.
    fn note_kept(&self, checkpoint: &Checkpoint) {
        let Some((vm, process)) = checkpoint.vm().zip(checkpoint.vm_record().process) else { return };
        if VmRecord::read(&self.0.dir, vm).is_ok_and(|now| now.is_some_and(|now| now.process == Some(process))) {
            self.note_line(checkpoint, [(vm, process)]);
        }
    }

    /// Notes that VMs, each with its process, have the memory of `checkpoint`.
    pub(super) fn note_line<'a>(&self, checkpoint: &Checkpoint, vms: impl IntoIterator<Item = (&'a str, ProcessId)>) {
        let line = self.line_of(checkpoint);
        vms.into_iter().for_each(|(vm, process)| self.0.kept_lines.note(vm, process, &line));
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
fn is_base(base: &Checkpoint, checkpoint: &Checkpoint) -> bool {
    // Copies have files in common with other copies, and with the files of an earlier supervisor's.
    let shares_files = !checkpoint.is_detached() || base.is_detached() || base.saved_at().is_some();
    shares_files
        && base.kept().is_some_and(|data| data.chain.len() < MAX_CHAIN)
        && base.config() == checkpoint.config()
        // Secrets that were erased are in the base's files.
        && base.vm_record().secrets == checkpoint.vm_record().secrets
}
