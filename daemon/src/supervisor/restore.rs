//! VMs from snapshots: a worker that can reach only the snapshot's files opens it, and its image is
//! a checkpoint like any other.

use std::cell::{Cell, OnceCell};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::Supervisor;
use super::about::About;
use super::cgroups::Bounds;
use super::checkpoint::Checkpoint;
use super::make::Origin;
use super::overlays::{InUse, unnamed_in};
use super::session::Session;
use crate::control::{CheckpointInfo, ClientProcess, ForkAnswer, OpenRequest, RestoreRequest, SavedSource};
use crate::fleet::{Cancel, FleetError, LONGEST_NAME, check_names};
use crate::secrets::SecretsRecord;
use crate::worker::{OpenOrder, Shape, Worker};
use clade_snapshot::ParentDirs;
use clade_vmm::vm::{SavedVm, SnapshotError};

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
    /// Whether the worker was prepared, and may have died before it got the order.
    was_prepared: bool,
    /// The directories that disks are unpacked in.
    _overlays: InUse,
}

/// Returns the record for VMs of `shape` from the snapshot `saved`.
fn about(shape: Shape, saved: &SavedVm, session: Option<Session>) -> About {
    About {
        shape,
        identity: saved.identity.clone(),
        overlays: Vec::new(),
        socket: None,
        session,
        process: None,
        parent: None,
        bounds: Bounds::default(),
        // A snapshot has no list of the secrets in its memory.
        secrets: Some(SecretsRecord::None),
    }
}

impl Supervisor {
    /// Reads a snapshot's description of its VM.
    fn saved(&self, source: &SavedSource) -> Result<(SavedVm, Shape), FleetError> {
        let refused = |error: SnapshotError| FleetError::Snapshot(Box::new(error));
        let saved = SavedVm::read(&source.dir, &ParentDirs::beneath(source.parents.clone()), Some(self.dir()))
            .map_err(refused)?;
        let overlays = unnamed_in(&SavedVm::overlays(source.overlays.as_deref(), &saved.place.dir));
        let shape = Shape {
            config: saved.config.clone(),
            overlays: saved.config.disks.iter().map(|_| overlays.clone()).collect(),
            saved: saved.dirs.clone(),
        };
        Ok((saved, shape))
    }

    /// Has a worker open a snapshot, of a VM of `shape`: `prepared`, or another.
    fn begin_opening(
        &self,
        prepared: Option<Worker>,
        source: &SavedSource,
        saved: &SavedVm,
        shape: &Shape,
    ) -> Result<Opening, FleetError> {
        // Compressed disks are unpacked there.
        let unpacked: Vec<_> = shape.overlays.first().cloned().into_iter().collect();
        let overlays = self.0.overlays.hold(&unpacked)?;
        let order = OpenOrder {
            dir: saved.place.dir.clone(),
            load: source.load,
            // Those that were checked here, whatever has their paths by then.
            members: saved.dirs.clone(),
            overlays: unnamed_in(&SavedVm::overlays(source.overlays.as_deref(), &saved.place.dir)),
            sockets: self.dir().to_owned(),
        };
        // A prepared worker may have died meanwhile. For another this is an error.
        let prepared = prepared.filter(|worker| worker.open(order.clone()).is_ok());
        let was_prepared = prepared.is_some();
        let worker = match prepared {
            Some(worker) => worker,
            None => {
                let worker = self.0.zygote.workers(1)?.pop().ok_or(FleetError::Ending)?;
                worker.enter(self.0.place.of_opener(shape))?;
                worker.open(order)?;
                worker
            }
        };
        Ok(Opening { worker, was_prepared, _overlays: overlays })
    }

    /// Returns the image of the snapshot `saved`, of VMs that `about` describes. Calls `check` while it
    /// waits. A prepared worker may die with its order unread: another opens the snapshot then.
    fn image(
        &self,
        opening: Opening,
        source: &SavedSource,
        saved: &SavedVm,
        about: About,
        check: impl Fn() -> Result<(), FleetError>,
    ) -> Result<Checkpoint, FleetError> {
        let parts = match opening.worker.opened(&check) {
            Err(FleetError::Worker { source: error }) if opening.was_prepared => {
                tracing::info!(%error, "a prepared worker has failed, and another opens the snapshot");
                let again = self.begin_opening(None, source, saved, &about.shape)?;
                again.worker.opened(&check)?
            }
            parts => parts?,
        };
        Ok(Checkpoint::of_saved(about, saved, parts))
    }

    /// Holds the image of a snapshot as a checkpoint.
    ///
    /// # Errors
    /// When it cannot be opened, or the name is taken.
    pub(super) fn open_checkpoint(&self, request: &OpenRequest, cancel: &Cancel) -> Result<CheckpointInfo, FleetError> {
        let _busy = self.0.busy.read();
        let stem = stem(&request.saved.dir);
        let name = self.0.checkpoints.reserve(&stem, request.name.as_deref())?;
        let (saved, shape) = self.saved(&request.saved)?;
        let opening = self.begin_opening(self.0.pool.take_opener(&shape), &request.saved, &saved, &shape)?;
        let about = about(shape, &saved, None);
        let checkpoint = self.image(opening, &request.saved, &saved, about, || self.check(0, 0, cancel))?;
        // A checkpoint without a client would stay unknown.
        self.check(0, 0, cancel)?;
        let info = checkpoint.info(&name);
        // First: as soon as the checkpoint is there, another request may remove it, and announce
        // that.
        self.0.events.checkpoint_created(&name, &stem);
        self.0.checkpoints.insert(&name, Arc::new(checkpoint));
        Ok(info)
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
    ) -> Result<ForkAnswer, FleetError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        let session = request.session.as_ref().map(|name| Session::of(name, client)).transpose()?;
        let stem = stem(&request.saved.dir);
        let mut vms = request.vms.clone();
        if vms.count == 1 && vms.name.is_none() {
            vms.name = Some(stem.clone());
        }
        check_names(vms.count, vms.name.as_deref())?;
        // Before the snapshot is opened, which takes longer: a refused request costs little.
        let (saved, shape) = self.saved(&request.saved)?;
        let read = Instant::now();
        let claims = self.claim(&stem, &vms, &shape, cancel)?;
        let _making = self.0.making(&claims);
        let prepared = self.0.pool.take_opener(&shape);
        // The snapshot is opened while its VMs' workers get ready.
        let opening = Cell::new(Some(self.begin_opening(prepared, &request.saved, &saved, &shape)?));
        let ordered = Instant::now();
        let about = about(shape, &saved, session);
        let opened = OnceCell::new();
        let image = || match (opened.get(), opening.take()) {
            (Some(opened), _) => Ok(opened),
            (None, Some(opening)) => {
                let check = || self.check(0, vms.count, cancel);
                let checkpoint = self.image(opening, &request.saved, &saved, about.clone(), check)?;
                tracing::debug!(read = ?read - begun, order = ?ordered - read, open = ?ordered.elapsed(), "restore");
                Ok(opened.get_or_init(|| checkpoint))
            }
            // The opening has failed before.
            (None, None) => Err(FleetError::Ending),
        };
        let made = self.start_children(
            &Origin { about: &about, vm: None, learning: None, image: &image },
            claims,
            &vms,
            cancel,
        )?;
        let checkpoint = opened.into_inner().ok_or(FleetError::Ending)?;
        let answer = checkpoint.answer(made, begun.elapsed());
        answer.children.iter().for_each(|name| self.0.events.booted(name));
        // Later snapshots may be incremental to it.
        self.0.snapshots.restored(&answer.children, checkpoint, &saved);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::check_name;

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
