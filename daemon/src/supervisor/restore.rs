//! VMs from snapshots: a worker that has its files alone opens one, and its image is a checkpoint
//! like any other.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::Supervisor;
use super::about::About;
use super::cgroups::Bounds;
use super::checkpoint::Checkpoint;
use super::overlays::unnamed_in;
use crate::control::{CheckpointInfo, ForkAnswer, OpenRequest, RestoreRequest, SavedSource};
use crate::fleet::{Cancel, FleetError, LONGEST_NAME, check_name, check_names};
use crate::jail::Grants;
use crate::worker::{OpenOrder, Shape};
use clade_vmm::vm::{SavedVm, SnapshotError};

/// The name of VMs from the snapshot in `dir`, if none is given.
fn stem(dir: &Path) -> String {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let fits = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    // Numbers are to fit behind it.
    let name: String = name.chars().map(fits).take(LONGEST_NAME - 16).collect();
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) { name } else { format!("vm{name}") }
}

impl Supervisor {
    /// Looks at a snapshot: what VM it is of.
    fn saved(&self, source: &SavedSource) -> Result<(SavedVm, Shape), FleetError> {
        let refused = |error: SnapshotError| FleetError::Snapshot(Box::new(error));
        let saved = SavedVm::read(&source.dir, Some(self.dir())).map_err(refused)?;
        let overlays = unnamed_in(&SavedVm::overlays(source.overlays.as_deref(), &saved.place.dir));
        let shape = Shape {
            config: saved.config.clone(),
            overlays: saved.config.disks.iter().map(|_| overlays.clone()).collect(),
            saved: saved.dirs.clone(),
        };
        Ok((saved, shape))
    }

    /// Opens a snapshot, of a VM of `shape`.
    fn open(
        &self,
        source: &SavedSource,
        (saved, shape): (&SavedVm, Shape),
        session: Option<&str>,
        cancel: &Cancel,
    ) -> Result<Checkpoint, FleetError> {
        let mut grants = Grants { dirs: saved.dirs.clone(), ..Grants::default() };
        // Compressed disks are unpacked there.
        let unpacked: Vec<_> = shape.overlays.first().cloned().into_iter().collect();
        let _overlays = self.0.overlays.hold(&unpacked)?;
        grants.overlays.clone_from(&unpacked);
        let worker = self.0.zygote.workers(1)?.pop().ok_or(FleetError::Ending)?;
        worker.enter(self.0.place.order(&saved.config, 0, grants))?;
        let overlays = unnamed_in(&SavedVm::overlays(source.overlays.as_deref(), &saved.place.dir));
        let order =
            OpenOrder { dir: saved.place.dir.clone(), load: source.load, overlays, sockets: self.dir().to_owned() };
        let parts = worker.open(order, || self.check(0, 0, cancel))?;
        let about = About {
            shape,
            identity: saved.identity.clone(),
            overlays: Vec::new(),
            socket: None,
            session: session.map(str::to_owned),
            process: None,
            parent: None,
            bounds: Bounds::default(),
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
        let checkpoint = self.open(&request.saved, (&saved, shape), None, cancel)?;
        // Nobody would know of it.
        self.check(0, 0, cancel)?;
        let info = checkpoint.info(&name);
        // First: as soon as it is there, another request may remove it, and say so.
        self.0.events.checkpoint_created(&name, &stem);
        self.0.checkpoints.insert(&name, Arc::new(checkpoint));
        Ok(info)
    }

    /// Starts VMs from a snapshot: all or none (I13).
    ///
    /// # Errors
    /// When it cannot be opened, or a VM cannot be made.
    pub(super) fn restore(&self, request: &RestoreRequest, cancel: &Cancel) -> Result<ForkAnswer, FleetError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        request.session.as_deref().map_or(Ok(()), check_name)?;
        let stem = stem(&request.saved.dir);
        let mut vms = request.vms.clone();
        if vms.count == 1 && vms.name.is_none() {
            vms.name = Some(stem.clone());
        }
        check_names(vms.count, vms.name.as_deref())?;
        // Before it is opened, which takes longer: a refused request costs little.
        let (saved, shape) = self.saved(&request.saved)?;
        let claims = self.claim(&stem, &vms, &shape, cancel)?;
        let _making = self.0.making(&claims);
        let checkpoint = self.open(&request.saved, (&saved, shape), request.session.as_deref(), cancel)?;
        let made = self.start_children_of(&checkpoint, claims, &vms, cancel)?;
        let answer = checkpoint.answer(made, begun.elapsed());
        answer.children.iter().for_each(|name| self.0.events.booted(name));
        // What is saved next may be incremental to it.
        self.0.snapshots.restored(&answer.children, checkpoint, &saved);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
