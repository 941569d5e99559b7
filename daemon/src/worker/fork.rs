//! A fork into processes of their own, by the process of the parent.

use std::path::PathBuf;

use super::{EnterOrder, ForkOrder, Made, Worker, Workers};
use crate::fleet::{Cancel, Children, Fleet, FleetError, Labels, NameClaim, Needs, Parent, check_room, claim_names};
use crate::jail::{Confinement, Grants};
use clade_vmm::vm::ForkReport;

/// Forks a VM into children of one instant, each in a process of its own. All or none are made
/// (I13); none runs before all are made.
///
/// # Errors
/// As for a fork in this process; when a worker cannot be started or the image cannot be given
/// to it. The parent runs on.
pub(crate) fn fork(
    fleet: &Fleet,
    name: &str,
    wanted: &Children<'_>,
    paused: bool,
    labels: &Labels,
    cancel: &Cancel,
) -> Result<(Vec<Made>, ForkReport), FleetError> {
    let parent = fleet.get(name)?.vm;
    let count = wanted.count;
    // Stopping the parent waits for nothing of this.
    let batch = fleet.batch(count, Some(Parent::new(&parent)), cancel);
    // Dropped after the workers: the names are free when nothing uses them any more.
    let claims = claim_names(fleet.dir(), name, wanted, |_| false, || batch.check(0))?;
    check_room(count, Needs::of_worker(parent.config())).map_err(|source| FleetError::Room { count, source })?;
    // As it is now: the file may have been replaced since this process began.
    let program = PathBuf::from("/proc/self/exe");
    let (image, report) = parent.fork()?;
    drop(parent);
    let parts = image.export(fleet.leases())?.seal()?;
    drop(image);
    let mut workers = Workers(Vec::with_capacity(count));
    for (at, claim) in claims.iter().enumerate() {
        batch.check(at)?;
        let worker = Worker::start(&program)?;
        // In this process too, whoever is in the VM is in all of them.
        let (confinement, grants) = (Confinement::Off, Grants::default());
        worker.enter(EnterOrder { dir: claim.dir().path().to_owned(), confinement, grants, disks: 0, ram: 0 })?;
        let order = ForkOrder {
            name: claim.name.clone(),
            shape: None,
            handed: None,
            parent: Some(name.to_owned()),
            identity: wanted.identity.clone(),
            paused,
            labels: labels.clone(),
        };
        worker.fork(order, claim.lock().as_slice(), &parts)?;
        workers.0.push(worker);
    }
    drop(parts);
    let made = workers.run_together(|made| batch.check(made))?;
    claims.into_iter().for_each(NameClaim::leave);
    Ok((made, report))
}
