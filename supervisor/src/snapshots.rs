//! Snapshots of VMs. Their processes may not write files: a worker that runs no guest writes them.
//!
//! The supervisor keeps the image of each VM's last snapshot, as the base of an incremental one,
//! until the VM ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clade_devices::virtio::net::Link;
use clade_memory::PageRange;
use clade_snapshot::{KnownDir, Saved, SnapshotId, record_working_set};

use super::checkpoint::Checkpoint;
use super::vm_record::VmRecord;
use super::{ImagePermit, Supervisor};
use clade_api::http::Cancel;
use clade_api::{
    DaemonError, ProblemKind, SnapshotAnswer, SnapshotProgress, SnapshotRequest, TouchedAnswer, TouchedRun,
};
use clade_vmm::vm::SavedVm;
use clade_worker::jail::{Grants, Role};
use clade_worker::{VmTemplate, WriteSnapshotRequest, written_beside};

/// A VM that was saved.
#[derive(Debug)]
struct LastSnapshot {
    dir: PathBuf,
    id: SnapshotId,
    image: Arc<Checkpoint>,
    /// Directories of the snapshots that it depends on.
    before: Vec<PathBuf>,
}

/// A snapshot that is being written.
#[derive(Debug, Default)]
struct SaveInProgress {
    done: AtomicU64,
    total: AtomicU64,
    cancel: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Arc<LastSnapshot>>,
    saving: Option<Arc<SaveInProgress>>,
}

impl State {
    fn is_by(&self, saving: &Arc<SaveInProgress>) -> bool {
        self.saving.as_ref().is_some_and(|running| Arc::ptr_eq(running, saving))
    }
}

/// The snapshots of the VMs, by their names.
#[derive(Debug, Default)]
pub(super) struct Snapshots(Mutex<BTreeMap<String, State>>);

/// Releases the claim on a VM's snapshots.
struct Ours<'a>(&'a Snapshots, &'a str, Arc<SaveInProgress>);

impl Drop for Ours<'_> {
    fn drop(&mut self) {
        // Another VM may have the name by now.
        if let Some(state) = self.0.states().get_mut(self.1).filter(|state| state.is_by(&self.2)) {
            state.saving = None;
        }
    }
}

impl Snapshots {
    fn states(&self) -> MutexGuard<'_, BTreeMap<String, State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a snapshot. Returns its possible base.
    fn begin(
        &self,
        vm: &str,
        incremental: bool,
    ) -> Result<(Arc<SaveInProgress>, Option<Arc<LastSnapshot>>), DaemonError> {
        let refused = |text| Err(DaemonError::Refused { kind: ProblemKind::SnapshotConflict, text });
        let mut states = self.states();
        let state = states.entry(vm.to_owned()).or_default();
        if state.saving.is_some() {
            return refused(format!("a snapshot of {vm} is being written already"));
        }
        if incremental && state.last.is_none() {
            return refused(format!(
                "{vm} was not saved before under this supervisor, so nothing can be incremental to it: save it in full first"
            ));
        }
        let saving = Arc::<SaveInProgress>::default();
        state.saving = Some(Arc::clone(&saving));
        Ok((saving, state.last.clone().filter(|_| incremental)))
    }

    pub(super) fn progress(&self, vm: &str) -> SnapshotProgress {
        let states = self.states();
        let saving = states.get(vm).and_then(|state| state.saving.as_ref());
        let (done, total) =
            saving.map_or((0, 0), |saving| (saving.done.load(Ordering::Relaxed), saving.total.load(Ordering::Relaxed)));
        SnapshotProgress { running: saving.is_some(), done, total }
    }

    pub(super) fn cancel(&self, vm: &str) {
        if let Some(saving) = self.states().get(vm).and_then(|state| state.saving.as_ref()) {
            saving.cancel.store(true, Ordering::Relaxed);
        }
    }

    /// The directory and the identity of a VM's last snapshot.
    fn last_place(&self, vm: &str) -> Option<(PathBuf, SnapshotId)> {
        let states = self.states();
        let last = states.get(vm)?.last.as_ref()?;
        Some((last.dir.clone(), last.id))
    }

    /// Makes the snapshot that VMs were started from the base of their next ones.
    pub(super) fn restored(&self, vms: &[String], image: Checkpoint, saved: &SavedVm) {
        let SavedVm { place, dirs, .. } = saved;
        let before = dirs.iter().skip(1).rev().map(|dir| dir.path.clone()).collect();
        let last = Arc::new(LastSnapshot { dir: place.dir.clone(), id: place.id, image: Arc::new(image), before });
        let mut states = self.states();
        for vm in vms {
            states.entry(vm.clone()).or_default().last = Some(Arc::clone(&last));
        }
    }

    /// Forgets a VM that has ended.
    pub(super) fn forget(&self, vm: &str) {
        // Not under the lock: closing descriptors takes time.
        let gone = self.states().remove(vm);
        drop(gone);
    }
}

impl Supervisor {
    /// Records the pages that a VM has touched in its last snapshot. `touched` is the answer of its
    /// process. Returns their number.
    ///
    /// # Errors
    /// When the VM was not saved here, or the record cannot be written.
    pub(super) fn record_working_set(&self, vm: &str, touched: &TouchedAnswer) -> Result<u64, DaemonError> {
        let refused = |text| DaemonError::Refused { kind: ProblemKind::SnapshotConflict, text };
        let last = self.0.snapshots.last_place(vm);
        let (dir, id) = last.ok_or_else(|| refused(format!("{vm} was not saved before under this supervisor")))?;
        let (mut runs, mut end) = (Vec::with_capacity(touched.runs.len()), 0);
        for TouchedRun { first, count } in touched.runs.iter().copied() {
            let behind = first.checked_add(count).filter(|_| first >= end && count > 0);
            let Some(behind) = behind else {
                let text = format!("the process of {vm:?} says that it has touched {count} pages from {first} on");
                return Err(DaemonError::Worker { source: std::io::Error::other(text) });
            };
            runs.push(PageRange::new(first, behind));
            end = behind;
        }
        record_working_set(&dir, id, &runs).map_err(|error| DaemonError::Snapshot(Box::new(error.into())))?;
        Ok(runs.iter().map(|run| run.len()).sum())
    }

    /// Has a worker write a snapshot of `image`, which may be based on one of `base`, as
    /// `save_request` has it. The worker may write in the directories `beside`, and read in those of
    /// `read`. Calls `watch` with the bytes done and in all; once that returns true, the worker stops,
    /// which is an error.
    pub(super) fn write(
        &self,
        save_request: WriteSnapshotRequest,
        (beside, read): (Vec<PathBuf>, Vec<KnownDir>),
        base: Option<&Checkpoint>,
        image: &Checkpoint,
        watch: impl Fn(Option<(u64, u64)>) -> bool,
    ) -> Result<Saved, DaemonError> {
        let VmTemplate { config, overlays, saved, .. } = &image.vm_record().template;
        let Grants { read: images, mut dirs, .. } = Grants::of_child(config, overlays, saved);
        dirs.extend(read);
        let grants = Grants { read: images, dirs, beside, role: Role::Snapshot, ..Grants::default() };
        let worker = self.0.zygote.workers(1)?.pop().ok_or(DaemonError::Ending)?;
        worker.confine(self.0.sandbox.confine_request(config, 0, grants))?;
        worker.save(save_request, base.map(Checkpoint::parts), image.parts())?;
        worker.saved(watch)
    }

    /// Saves a VM, which runs on.
    ///
    /// # Errors
    /// When the directory cannot be written, or holds other files; when the request is cancelled.
    /// The directory is then unchanged.
    pub(super) fn snapshot(
        &self,
        vm: &str,
        request: &SnapshotRequest,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<SnapshotAnswer, DaemonError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        VmRecord::expect(&self.0.dir, vm)?;
        let (saving, base) = self.0.snapshots.begin(vm, request.incremental)?;
        let _ours = Ours(&self.0.snapshots, vm, Arc::clone(&saving));
        let beside = written_beside(&request.dir).map_err(|error| DaemonError::Refused {
            kind: ProblemKind::BadPath,
            text: format!("{} cannot be made: {error}", request.dir.display()),
        })?;
        let dir = beside.join(request.dir.file_name().unwrap_or_default());
        let image = self.take_checkpoint(vm, cancel)?;
        drop(permit);
        let before: Vec<PathBuf> =
            base.iter().flat_map(|base| base.before.iter().chain([&base.dir])).cloned().collect();
        let save_request = WriteSnapshotRequest {
            dir: dir.clone(),
            config: image.config().clone(),
            base: base.as_ref().map(|base| (base.dir.clone(), base.id)),
            zstd: request.zstd,
            replace: request.replace,
            is_fixed: false,
            is_closed: image.network() == Some(Link::Closed),
        };
        // The base gets a note of its dependent. Earlier snapshots are only read.
        let written = [beside].into_iter().chain(before.iter().filter_map(|dir| dir.parent()).map(ToOwned::to_owned));
        let saved = self.write(
            save_request,
            (written.collect(), Vec::new()),
            base.as_ref().map(|base| &*base.image),
            &image,
            |progress| {
                if let Some((done, total)) = progress {
                    saving.done.store(done, Ordering::Relaxed);
                    saving.total.store(total, Ordering::Relaxed);
                }
                saving.cancel.load(Ordering::Relaxed) || self.check(0, 0, cancel).is_err()
            },
        )?;
        let pause_us = image.pause_us();
        let last = LastSnapshot { dir: dir.clone(), id: saved.id, image: Arc::new(image), before };
        if let Some(state) = self.0.snapshots.states().get_mut(vm).filter(|state| state.is_by(&saving)) {
            state.last = Some(Arc::new(last));
        }
        let total_us = begun.elapsed().as_secs_f64() * 1e6;
        Ok(SnapshotAnswer {
            dir,
            id: saved.id.to_string(),
            pause_us,
            total_us,
            data_pages: saved.data_pages,
            zero_pages: saved.zero_pages,
            data_bytes: saved.data_bytes,
            base_untold: saved.base_untold,
            base_elsewhere: saved.base_elsewhere,
        })
    }
}
