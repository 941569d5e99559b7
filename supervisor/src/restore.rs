//! VMs from snapshots: a worker that can reach only the snapshot's files opens it, and its image is
//! a checkpoint like any other.

use std::cell::{Cell, OnceCell};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::Supervisor;
use super::cgroups::Bounds;
use super::checkpoint::Checkpoint;
use super::kept::KeptRecord;
use super::launch::{ChildSource, expect_no_detach};
use super::overlays::{OverlayUse, unnamed_in};
use super::session::Session;
use super::vm_record::VmRecord;
use clade_api::http::{Cancel, ClientProcess};
use clade_api::secrets::SecretsRecord;
use clade_api::{
    CheckpointInfo, DaemonError, ForkAnswer, ForkRequest, LONGEST_NAME, OpenRequest, ProblemKind, RestoreRequest,
    SavedSource, check_names,
};
use clade_snapshot::{KnownDir, ParentDirs};
use clade_vmm::vm::{RestoreLoad, SavedVm, SnapshotError};
use clade_worker::{ReadSnapshotRequest, VmTemplate, Worker};

/// Returns the default name of VMs from the snapshot in `dir`.
fn stem(dir: &Path) -> String {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let fits = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    // Leaves room for numbers behind it.
    let name: String = name.chars().map(fits).take(LONGEST_NAME - 16).collect();
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) { name } else { format!("vm{name}") }
}

/// A worker that opens a snapshot.
struct Opening {
    worker: Worker,
    /// Whether the worker was prepared, and may have died before it got the request.
    was_prepared: bool,
    /// The directories that disks are unpacked in.
    _overlays: OverlayUse,
}

/// Returns the record for VMs of `template` from the snapshot `saved`.
fn vm_record(template: VmTemplate, saved: &SavedVm, session: Option<Session>) -> VmRecord {
    VmRecord {
        template,
        identity: saved.identity.clone(),
        overlays: Vec::new(),
        socket: None,
        session,
        process: None,
        parent: None,
        ancestors: Vec::new(),
        bounds: Bounds::default(),
        // A snapshot has no list of the secrets in its memory.
        secrets: Some(SecretsRecord::None),
        links: Vec::new(),
        // Known once a worker has read the state of its devices.
        network: None,
    }
}

/// Most attempts to open a snapshot that others replace meanwhile.
const MAX_ATTEMPTS: usize = 3;

/// Calls `open` with what `read` returns. If the snapshot is refused and its directories, as `dirs`
/// has them, are others by now, both are called again.
fn unless_exchanged<S, D: PartialEq, T>(
    read: impl Fn() -> Result<S, DaemonError>,
    dirs: impl Fn(&S) -> D,
    open: impl Fn(S) -> Result<T, DaemonError>,
) -> Result<T, DaemonError> {
    let mut saved = read()?;
    for _ in 1..MAX_ATTEMPTS {
        let before = dirs(&saved);
        match open(saved) {
            Err(error) if error.problem() == ProblemKind::SnapshotConflict => match read() {
                Ok(again) if dirs(&again) != before => saved = again,
                _ => return Err(error),
            },
            opened => return opened,
        }
    }
    open(saved)
}

impl Supervisor {
    /// Reads a snapshot's description of its VM.
    fn saved(&self, source: &SavedSource) -> Result<(SavedVm, VmTemplate), DaemonError> {
        let refused = |error: SnapshotError| DaemonError::Snapshot(Box::new(error));
        let saved = SavedVm::read(&source.dir, &ParentDirs::beneath(source.parents.clone()), Some(self.dir()))
            .map_err(refused)?;
        let overlays = unnamed_in(&SavedVm::overlays(source.overlays.as_deref(), &saved.place.dir));
        let template = VmTemplate {
            config: saved.config.clone(),
            overlays: saved.config.disks.iter().map(|_| overlays.clone()).collect(),
            saved: saved.dirs.clone(),
            detached: false,
        };
        Ok((saved, template))
    }

    /// Reads a snapshot's description and calls `open` with it. If a save to the same directory has
    /// replaced the snapshot in between, the new one is read and opened.
    fn open_saved<T>(
        &self,
        source: &SavedSource,
        open: impl Fn(SavedVm, VmTemplate) -> Result<T, DaemonError>,
    ) -> Result<T, DaemonError> {
        unless_exchanged(
            || self.saved(source),
            |(saved, _)| saved.dirs.clone(),
            |(saved, template)| open(saved, template),
        )
    }

    /// Has a worker open a snapshot, of a VM of `template`: `prepared`, or another.
    fn begin_opening(
        &self,
        prepared: Option<Worker>,
        source: &SavedSource,
        saved: &SavedVm,
        template: &VmTemplate,
    ) -> Result<Opening, DaemonError> {
        // Compressed disks are unpacked there.
        let unpacked: Vec<_> = template.overlays.first().cloned().into_iter().collect();
        let overlays = self.0.overlays.hold(&unpacked)?;
        let open_request = ReadSnapshotRequest {
            dir: saved.place.dir.clone(),
            load: source.load,
            // The checked directories. Others may have their paths by then.
            members: saved.dirs.clone(),
            overlays: unnamed_in(&SavedVm::overlays(source.overlays.as_deref(), &saved.place.dir)),
            sockets: self.dir().to_owned(),
        };
        // A prepared worker may have died meanwhile. For another this is an error.
        let prepared = prepared.filter(|worker| worker.open(open_request.clone()).is_ok());
        let was_prepared = prepared.is_some();
        let worker = match prepared {
            Some(worker) => worker,
            None => {
                let worker = self.0.zygote.workers(1)?.pop().ok_or(DaemonError::Ending)?;
                worker.confine(self.0.sandbox.of_opener(template))?;
                worker.open(open_request)?;
                worker
            }
        };
        Ok(Opening { worker, was_prepared, _overlays: overlays })
    }

    /// Returns the image of the snapshot `saved`, of VMs that `vm_record` describes. Calls `check`
    /// while it waits. A prepared worker may die with its request unread: another opens the
    /// snapshot then.
    fn image(
        &self,
        opening: Opening,
        source: &SavedSource,
        saved: &SavedVm,
        vm_record: VmRecord,
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<Checkpoint, DaemonError> {
        let parts = match opening.worker.opened(&check) {
            Err(DaemonError::Worker { source: error }) if opening.was_prepared => {
                tracing::info!(%error, "a prepared worker has failed, and another opens the snapshot");
                let again = self.begin_opening(None, source, saved, &vm_record.template)?;
                again.worker.opened(&check)?
            }
            parts => parts?,
        };
        Ok(Checkpoint::of_saved(vm_record, saved, parts))
    }

    /// Opens the snapshot `saved`, of VMs that `vm_record` describes.
    fn checkpoint_from(
        &self,
        source: &SavedSource,
        saved: &SavedVm,
        vm_record: VmRecord,
        cancel: &Cancel,
    ) -> Result<Checkpoint, DaemonError> {
        let prepared = self.0.pool.take_opener(&vm_record.template);
        let opening = self.begin_opening(prepared, source, saved, &vm_record.template)?;
        self.image(opening, source, saved, vm_record, || self.check(0, 0, cancel))
    }

    /// Holds the image of a snapshot as a checkpoint.
    ///
    /// # Errors
    /// When it cannot be opened, or the name is taken.
    pub(super) fn open_checkpoint(
        &self,
        request: &OpenRequest,
        cancel: &Cancel,
    ) -> Result<CheckpointInfo, DaemonError> {
        let _busy = self.0.busy.read();
        let stem = stem(&request.saved.dir);
        let name = self.0.checkpoints.reserve(&stem, request.name.as_deref())?;
        let checkpoint = self.open_saved(&request.saved, |saved, template| {
            self.checkpoint_from(&request.saved, &saved, vm_record(template, &saved, None), cancel)
        })?;
        // A checkpoint without a client would stay unknown.
        self.check(0, 0, cancel)?;
        let info = checkpoint.info(&name);
        // First: as soon as the checkpoint is there, another request may remove it, and announce
        // that.
        self.0.events.checkpoint_created(&name, &stem);
        name.hold(Arc::new(checkpoint), None);
        Ok(info)
    }

    /// Opens the snapshot of a kept checkpoint.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn open_kept(
        &self,
        name: &str,
        record: &KeptRecord,
        cancel: &Cancel,
    ) -> Result<Checkpoint, DaemonError> {
        let kept = self.kept()?;
        // An earlier supervisor may have had controllers that this one lacks.
        self.expect_enforced(record.bounds)?;
        // Not beside the snapshot: children's overlays outlive the checkpoint.
        let (dir, overlays) = (kept.snapshot(name, record.chain()), Some(kept.root().to_owned()));
        let source = SavedSource { dir, load: RestoreLoad::default(), overlays, parents: kept.parents(record.chain()) };
        // A link in its place would lead to a snapshot of others, and allow its siblings as parents.
        let known = KnownDir::at(&source.dir).map_err(|error| DaemonError::Snapshot(Box::new(error.into())))?;
        let (saved, template) = self.saved(&source)?;
        if saved.dirs.first().and_then(|dir| dir.id) != known.id {
            let text = format!("the snapshot of checkpoint {name:?} was replaced while it was opened");
            return Err(DaemonError::Refused { kind: ProblemKind::SnapshotConflict, text });
        }
        let vm_record =
            VmRecord { bounds: record.bounds, network: record.network(), ..vm_record(template, &saved, None) };
        let checkpoint = self.checkpoint_from(&source, &saved, vm_record, cancel)?;
        Ok(checkpoint.with_record(record))
    }

    /// Starts VMs from a snapshot: all or none (I13).
    ///
    /// # Errors
    /// When it cannot be opened, or a VM cannot be made.
    pub(super) fn restore(
        &self,
        request: &RestoreRequest,
        client: Option<ClientProcess>,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let _busy = self.0.busy.read();
        let session = request.session.as_ref().map(|name| Session::of(name, client)).transpose()?;
        let stem = stem(&request.saved.dir);
        let mut vms = request.vms.clone();
        if vms.count == 1 && vms.name.is_none() {
            vms.name = Some(stem.clone());
        }
        check_names(vms.count, vms.name.as_deref())?;
        expect_no_detach(&vms)?;
        self.open_saved(&request.saved, |saved, template| {
            self.restore_saved(&request.saved, (saved, template), &vms, session.clone(), cancel)
        })
    }

    /// Starts `vms` from the snapshot `saved`, which was read from `source`.
    fn restore_saved(
        &self,
        source: &SavedSource,
        (saved, template): (SavedVm, VmTemplate),
        vms: &ForkRequest,
        session: Option<Session>,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        // Before the snapshot is opened, which takes longer: a refused request costs little.
        let (claims, _launching) = self.claim(&stem(&source.dir), vms, &template, cancel)?;
        let prepared = self.0.pool.take_opener(&template);
        // The snapshot is opened while its VMs' workers get ready.
        let opening = Cell::new(Some(self.begin_opening(prepared, source, &saved, &template)?));
        let ordered = Instant::now();
        let vm_record = vm_record(template, &saved, session);
        let opened = OnceCell::new();
        let image = || match (opened.get(), opening.take()) {
            (Some(opened), _) => Ok(opened),
            (None, Some(opening)) => {
                let check = || self.check(0, vms.count, cancel);
                let checkpoint = self.image(opening, source, &saved, vm_record.clone(), check)?;
                tracing::debug!(open_request = ?ordered - begun, open = ?ordered.elapsed(), "restore");
                Ok(opened.get_or_init(|| checkpoint))
            }
            // The opening has failed before.
            (None, None) => Err(DaemonError::Ending),
        };
        let made = self.start_children(
            &ChildSource { vm_record: &vm_record, vm: None, network: None, learning: None, image: &image },
            claims,
            vms,
            cancel,
        )?;
        let checkpoint = opened.into_inner().ok_or(DaemonError::Ending)?;
        let answer = checkpoint.answer(made, begun.elapsed(), None);
        answer.children.iter().for_each(|name| self.0.events.booted(name));
        // Later snapshots may be incremental to it.
        self.0.snapshots.restored(&answer.children, checkpoint, &saved);
        // Of a VM that has ended by now, nothing else would forget it.
        for name in answer.children.iter().filter(|name| self.0.processes.of(name).is_none()) {
            self.0.snapshots.forget(name);
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clade_api::check_name;

    /// Opens a snapshot that is at the next of `versions` after each reading, and refuses a version
    /// that is no longer there. Returns the opened version and the number of attempts.
    fn opened(versions: &[u32], kind: ProblemKind) -> (Result<u32, ProblemKind>, usize) {
        let (reads, attempts) = (Cell::new(0), Cell::new(0));
        let read = || {
            let version = versions[reads.get().min(versions.len() - 1)];
            reads.set(reads.get() + 1);
            Ok(version)
        };
        let open = |version| {
            attempts.set(attempts.get() + 1);
            let is_there = version == versions[reads.get().min(versions.len() - 1)];
            if is_there { Ok(version) } else { Err(DaemonError::Refused { kind, text: "exchanged".to_owned() }) }
        };
        (unless_exchanged(read, |version| *version, open).map_err(|error| error.problem()), attempts.get())
    }

    #[test]
    fn a_snapshot_that_a_save_replaces_meanwhile_is_opened_anew() {
        let conflict = ProblemKind::SnapshotConflict;
        assert_eq!(opened(&[1], conflict), (Ok(1), 1));
        assert_eq!(opened(&[1, 2], conflict), (Ok(2), 2));
        assert_eq!(opened(&[1, 2, 3], conflict), (Ok(3), 3));
        // Replaced again and again.
        assert_eq!(opened(&[1, 2, 3, 4], conflict), (Err(conflict), 3));
        // Any other error is the answer.
        assert_eq!(opened(&[1, 2], ProblemKind::NoRoom), (Err(ProblemKind::NoRoom), 1));
        // A refusal of the same snapshot is the answer too.
        let (read, attempts) = (Cell::new(0), Cell::new(0));
        let refused = unless_exchanged(
            || Ok(read.replace(read.get() + 1)),
            |_| "the same directories",
            |_| {
                attempts.set(attempts.get() + 1);
                Err::<(), _>(DaemonError::Refused { kind: conflict, text: "damaged".to_owned() })
            },
        );
        assert_eq!((refused.map_err(|error| error.problem()), attempts.get()), (Err(conflict), 1));
    }

    #[test]
    fn a_snapshots_directory_names_its_vms() {
        for (dir, name) in [("/a/web", "web"), ("/a/.b c", "vm.b-c"), ("/", "vm"), ("/a/é", "vm-")] {
            assert_eq!(stem(Path::new(dir)), name);
            check_name(name).unwrap();
        }
        let long = stem(Path::new(&format!("/{}", "x".repeat(200))));
        check_name(&format!("{long}-9999")).unwrap();
    }
}
