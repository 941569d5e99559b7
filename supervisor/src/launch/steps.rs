//! The steps from claimed names to running VMs, the same for children and booted VMs.

use std::os::fd::OwnedFd;
use std::sync::Weak;
use std::time::{Duration, Instant};

use crate::cgroups::{Bounds, Group};
use crate::launched_vm::LaunchedVm;
use crate::net_hook::Up;
use crate::priority::RaisedStart;
use crate::worker_resources::WorkerResources;
use crate::{Inner, Supervisor};
use clade_api::{DaemonError, NameClaim};
use clade_worker::ahead::Learning;
use clade_worker::{BeforeTheyRun, ConfineRequest, Pace, ReportedVm, VmTemplate, Worker, Workers, has_ended};

/// The file for a child's written pages, and the set that learns from it. None for a VM that is not
/// learned from.
pub(super) type Note = Option<(OwnedFd, Weak<Learning>)>;

/// A worker's confinement and limits.
pub(crate) struct WorkerEnv {
    pub(crate) confine: ConfineRequest,
    pub(crate) bounds: Bounds,
}

/// VMs to be made.
pub(super) trait Launch {
    /// Returns the template of prepared workers. None if none fit.
    fn template(&self) -> Option<&VmTemplate>;
    /// Returns the confinement and limits of the workers.
    fn env(&self) -> WorkerEnv;
    /// Returns whether the VMs run, and so take processor time.
    fn pace(&self) -> Pace;
    /// Checks that the request is still wanted, after `made` VMs.
    fn check(&self, made: usize) -> Result<(), DaemonError>;
    /// Gives a worker the request for the VM of a claim.
    fn assign(&self, worker: &Worker, claim: &NameClaim) -> Result<WorkerResources, DaemonError>;
    /// Returns whether someone waits for the first instruction of the VM, and it starts at once.
    fn is_awaited(&self) -> bool;
    /// Waits until the image is there, if there is one.
    fn await_image(&self) -> Result<(), DaemonError>;
    /// Gives workers the image, after their requests. Returns the files for the written pages.
    fn give_image(&self, workers: &Workers) -> Result<Vec<Note>, DaemonError>;
}

/// Workers with their requests, each with its descriptors, in its group.
struct AssignedWorkers {
    workers: Workers,
    all_resources: Vec<WorkerResources>,
    groups: Vec<Option<Group>>,
    /// Whether all come from the pool.
    are_prepared: bool,
}

impl Supervisor {
    /// Has a worker for each claim make its VM, and then lets all run. On failure the claims must
    /// outlive this call: a name is free only once nothing uses it.
    pub(super) fn make(&self, launch: &impl Launch, claims: &[NameClaim]) -> Result<Vec<LaunchedVm>, DaemonError> {
        // Further workers are prepared afterwards: that takes processor time.
        let (prepared, _busy) = match launch.template() {
            Some(template) => {
                let (prepared, busy) = self.0.pool.take(template, claims.len());
                (prepared, Some(busy))
            }
            None => (Vec::new(), None),
        };
        let were_prepared = !prepared.is_empty();
        let begun = Instant::now();
        let assigned = self.assign(prepared, launch, claims)?;
        let have_requests = Instant::now();
        let made = match self.run(assigned, launch) {
            // A prepared worker may have died meanwhile. For others this is an error.
            Err(DaemonError::Worker { source }) if were_prepared => {
                tracing::info!(error = %source, "a prepared worker has failed, and others are taken");
                self.run(self.assign(Vec::new(), launch, claims)?, launch)
            }
            made => made,
        };
        tracing::debug!(
            count = claims.len(),
            requests = ?have_requests - begun,
            run = ?have_requests.elapsed(),
            "made"
        );
        made
    }

    /// Gives requests to the `prepared` workers, and to as many new ones as needed.
    fn assign(
        &self,
        prepared: Vec<Worker>,
        launch: &impl Launch,
        claims: &[NameClaim],
    ) -> Result<AssignedWorkers, DaemonError> {
        let worker_env = launch.env();
        let count = prepared.len();
        let mut workers = Workers(self.0.zygote.workers(claims.len() - count)?);
        // The prepared ones first: they are the first to be done.
        workers.0.splice(..0, prepared);
        // In its group before its first request, if that is possible.
        let settle = |worker: &Worker, claim: &NameClaim, is_prepared: bool| {
            let group = self.0.group_for(worker, &claim.name, &worker_env)?;
            if !is_prepared {
                worker.confine(worker_env.confine.clone())?;
            }
            Ok::<_, DaemonError>(group)
        };
        let ours = workers.0.iter().zip(claims).enumerate();
        let groups = ours.map(|(at, (worker, claim))| settle(worker, claim, at < count));
        let mut groups: Vec<Option<Group>> = groups.collect::<Result<_, _>>()?;
        let mut all_resources = Vec::with_capacity(claims.len());
        for (at, claim) in claims.iter().enumerate() {
            launch.check(0)?;
            let resources = match launch.assign(&workers.0[at], claim) {
                // A prepared worker may have died meanwhile. For another this is an error.
                Err(DaemonError::Worker { .. }) => {
                    workers.0[at] = self.0.zygote.workers(1)?.pop().ok_or(DaemonError::Ending)?;
                    groups[at] = settle(&workers.0[at], claim, false)?;
                    launch.assign(&workers.0[at], claim)
                }
                other => other,
            };
            all_resources.push(resources?);
        }
        Ok(AssignedWorkers { workers, all_resources, groups, are_prepared: count == claims.len() })
    }

    /// Gives workers the image, and lets their VMs run once all are made.
    fn run(&self, assigned: AssignedWorkers, launch: &impl Launch) -> Result<Vec<LaunchedVm>, DaemonError> {
        // In this order: after a failure the workers end first, and then closed networks are opened.
        let AssignedWorkers { mut all_resources, groups, mut workers, are_prepared } = assigned;
        let confinement = self.0.sandbox.confinement;
        // All of them, or no VM runs.
        let interfaces = || all_resources.iter().map(WorkerResources::interfaces).collect();
        let up = self.0.net_hook.as_ref().map(|hook| hook.up(interfaces())).transpose()?;
        // Behind the hook, which takes interfaces up, and before the workers read what another
        // process has written.
        all_resources.iter().try_for_each(|resources| resources.close_links(confinement))?;
        launch.await_image()?;
        let is_unknown = all_resources.iter().any(WorkerResources::has_unknown_network);
        let raised = match all_resources.as_slice() {
            [resources] if are_prepared && !is_unknown && launch.is_awaited() => {
                self.0.priority.raise_start(resources.process())
            }
            // Several would wait for one another.
            _ => None,
        };
        let notes = launch.give_image(&workers)?;
        // Before they run: a VM may end at once.
        let pids: Vec<u32> = workers.0.iter().map(Worker::pid).collect();
        let vms = workers.0.iter().zip(&mut all_resources).zip(groups).zip(notes);
        let own_vm = |(((worker, resources), group), note): (((&Worker, &mut WorkerResources), _), Note)| {
            resources.hold_interfaces(&self.0.interfaces, worker)?;
            let process = worker.pidfd()?.ok_or(DaemonError::Ending)?;
            Ok((worker.pid(), resources.own_vm(process, group).noting(note)))
        };
        // All or none.
        self.0.processes.add(vms.map(own_vm).collect::<Result<Vec<_>, DaemonError>>()?);
        let settle = |made: &[ReportedVm]| {
            let mut vms = all_resources.iter().zip(made);
            vms.try_for_each(|(resources, vm)| resources.settle_network(vm.network, confinement))
        };
        let settle: Option<&BeforeTheyRun<'_>> = if is_unknown { Some(&settle) } else { None };
        let end_raise = || raised.map_or((), RaisedStart::end);
        let made =
            workers.run_together(launch.pace(), |made| launch.check(made), settle, end_raise).inspect_err(|_| {
                pids.iter().for_each(|pid| drop(self.0.processes.remove(*pid)));
            })?;
        let made = all_resources.iter().zip(made).map(|(resources, reported)| resources.launched(reported)).collect();
        all_resources.into_iter().for_each(WorkerResources::keep);
        up.into_iter().for_each(Up::keep);
        Ok(made)
    }
}

impl Inner {
    /// Makes the group of a new VM, with its worker in it.
    fn group_for(&self, worker: &Worker, name: &str, worker_env: &WorkerEnv) -> Result<Option<Group>, DaemonError> {
        let Some(groups) = &self.cgroups else { return Ok(None) };
        let group = groups.make(name, worker_env.bounds, worker_env.confine.ram)?;
        // The pid is the worker's as long as its pidfd reports no end.
        let pidfd = worker.pidfd()?.filter(|pidfd| !has_ended(pidfd, Duration::ZERO));
        let Some(_pidfd) = pidfd else {
            return Err(DaemonError::Worker { source: std::io::ErrorKind::BrokenPipe.into() });
        };
        group.enter(worker.pid())?;
        Ok(Some(group))
    }
}
