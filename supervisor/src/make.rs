//! Children and booted VMs: starts the workers that make them, all of a request or none (I13).
//!
//! The steps of a request, in their order. A failure undoes the earlier steps, by the drop of what they
//! have made:
//!
//! | step | where | undone by |
//! |---|---|---|
//! | the parent's record is read, the host's limits are checked, names are claimed | `claim` | `NameClaim` |
//! | the request for the parent's image is sent: it is taken while workers start | `PendingFork::begin` | its drop: the parent runs on |
//! | workers are taken from the pool, or started; each is in its group and confined | `assign` | `Workers`, `Group` |
//! | interfaces, addresses, sockets, files and the record of each VM are made, and sent | `WorkerResources::make` | `WorkerResources` |
//! | the network hook connects the interfaces | `NetHook::up` | `Up` |
//! | closed networks are closed | `close_links` | `WorkerResources` |
//! | workers get the image: from here on they read what another process has written | `give_image` | `Workers` |
//! | the processes are recorded: a VM may end at once | `Processes::add` | `Processes::remove` |
//! | all VMs are made; networks of unknown state are settled | `run_together` | `Workers` |
//! | the VMs run. A failure of one ends only that one | `run_together` | nothing |
//! | files, interfaces and names are left to the VMs | `keep`, `leave` | nothing |

use std::cell::{Cell, OnceCell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::cgroups::{Bounds, Cgroups, Group};
use super::checkpoint::Checkpoint;
use super::net_hook::Up;
use super::reidentify::expect_reachable;
use super::session::Session;
use super::vm_record::{VmRecord, template_of_boot};
use super::worker_resources::{Start, WorkerResources};
use super::{ImagePermit, Inner, Supervisor};
use clade_api::http::{Cancel, ClientProcess};
use clade_api::secrets::{Secrets, SecretsRecord};
use clade_api::{
    BootRequest, DaemonError, ErasedInfo, ForkAnswer, ForkRequest, NameClaim, ProblemKind, VmLimits, check_names,
    claim_names, secrets,
};
use clade_devices::virtio::net::Link;
use clade_vmm::vm::{Endpoints, VmError};
use clade_worker::ahead::{AheadRequest, Learning, note};
use clade_worker::host_limits::{ResourceDemand, check_host_limits, check_share};
use clade_worker::image::PendingFork;
use clade_worker::jail::is_block_device;
use clade_worker::{
    BeforeTheyRun, ConfineRequest, Inherited, LaunchedVm, Pace, StartBootRequest, StartChildRequest, VmTemplate,
    Worker, WorkerRequest, Workers, has_ended,
};

/// The file for a child's written pages, and the set that learns from it.
type Note = Option<(OwnedFd, Weak<Learning>)>;

/// Most memory that a child may have copies of ahead, in MiB.
const MAX_AHEAD_MIB: u32 = 4096;
/// The least memory of a VM's process, in MiB.
const MIN_LIMIT_MIB: u64 = 32;
/// Least processor time of a VM's limit.
const MIN_CPUS: f64 = 0.01;
const MAX_CPUS: f64 = 1024.0;

/// A worker's confinement and limits.
pub(super) struct WorkerEnv {
    pub(super) confine: ConfineRequest,
    pub(super) bounds: Bounds,
}

/// The source of children.
pub(super) struct ChildSource<'a> {
    pub(super) vm_record: &'a VmRecord,
    /// The VM, if it is not the image of a snapshot.
    pub(super) vm: Option<&'a str>,
    /// Whether the network of its children is open unless they are made with another state. None
    /// until a worker has read the state of its devices.
    pub(super) network: Option<Link>,
    /// Learns the pages that its children write, if that is wanted.
    pub(super) learning: Option<&'a Arc<Learning>>,
    /// Returns the image once it is there: it is requested after the workers have their requests.
    pub(super) image: &'a dyn Fn() -> Result<&'a Checkpoint, DaemonError>,
}

/// VMs to be made.
struct LaunchPlan<'a> {
    /// The template of prepared workers. None if none fit.
    template: Option<&'a VmTemplate>,
    worker_env: WorkerEnv,
    claims: &'a [NameClaim],
    /// Gives a worker the request for the VM of a claim.
    assign: &'a dyn Fn(&Worker, &NameClaim) -> Result<WorkerResources, DaemonError>,
    check: &'a dyn Fn(usize) -> Result<(), DaemonError>,
    pace: Pace,
}

/// Workers with their requests, each with its descriptors, in its group.
struct AssignedWorkers {
    workers: Workers,
    all_resources: Vec<WorkerResources>,
    groups: Vec<Option<Group>>,
}

/// Refuses to detach children of a checkpoint or a snapshot.
///
/// # Errors
/// When that is requested.
pub(super) fn expect_no_detach(request: &ForkRequest) -> Result<(), DaemonError> {
    if !request.detach {
        return Ok(());
    }
    let text = "detach: only the fork of a VM is detached. Take a detached checkpoint, and fork that".to_owned();
    Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text })
}

/// Returns the count of secrets erased in each of the children made without secrets.
fn erased(made: &[LaunchedVm], request: &ForkRequest) -> Option<ErasedInfo> {
    made.first().filter(|_| request.without_secrets).map(|child| child.erased)
}

impl Supervisor {
    /// Forks a VM, in whichever process it runs, into children of one instant.
    ///
    /// # Errors
    /// When there is no such VM, or a child cannot be made: then none is made (I13). The parent
    /// runs on.
    pub(crate) fn fork_vm(
        &self,
        vm: &str,
        request: &ForkRequest,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        check_names(request.count, request.name.as_deref())?;
        if request.detach {
            return self.fork_detached(vm, request, permit, cancel);
        }
        // Before the request for its image: when that is there, the VM's files may be another's.
        let vm_record = VmRecord::expect(&self.0.dir, vm)?;
        let line = self.0.kept_lines.now(vm, vm_record.process);
        // Before the parent is paused: a refused request costs it nothing.
        let claims = self.claim(vm, request, &vm_record.template, cancel)?;
        let _launching = self.0.launching(&claims);
        let claimed = Instant::now();
        // Its fork and the starts of the children's workers run side by side.
        let pending_fork = Cell::new(Some((PendingFork::begin(self.dir(), vm)?, permit)));
        let taken = OnceCell::new();
        let image = || match (taken.get(), pending_fork.take()) {
            (Some(taken), _) => Ok(taken),
            (None, Some((pending_fork, _permit))) => {
                let check = || self.check(0, request.count, cancel);
                let before = (vm_record.clone(), line.clone());
                let checkpoint = Checkpoint::of_pending(&self.0.dir, vm, before, pending_fork, &check)?;
                tracing::debug!(vm, claim = ?claimed - begun, image = ?claimed.elapsed(), "fork");
                Ok(taken.get_or_init(|| checkpoint))
            }
            // The request for it has failed.
            (None, None) => Err(DaemonError::Ending),
        };
        let made = self.start_children(
            &ChildSource {
                vm_record: &vm_record,
                vm: Some(vm),
                network: vm_record.network,
                learning: None,
                image: &image,
            },
            claims,
            request,
            cancel,
        )?;
        let erased = erased(&made, request);
        let answer = image()?.answer(made, begun.elapsed(), erased);
        self.0.events.forked(vm, &answer.children, answer.pause_us);
        Ok(answer)
    }

    /// Forks a VM into children that start from copies of what its process can write.
    fn fork_detached(
        &self,
        vm: &str,
        request: &ForkRequest,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        let claims = self.claim(vm, request, &VmRecord::expect(&self.0.dir, vm)?.template, cancel)?;
        let _launching = self.0.launching(&claims);
        let image = self.detached_image(vm, permit, cancel)?;
        let (vm_record, network) = (image.vm_record(), image.network());
        let origin = ChildSource { vm_record, vm: Some(vm), network, learning: None, image: &|| Ok(&image) };
        let made = self.start_children(&origin, claims, request, cancel)?;
        let erased = erased(&made, request);
        let answer = image.answer(made, begun.elapsed(), erased);
        self.0.events.forked(vm, &answer.children, answer.pause_us);
        Ok(answer)
    }

    /// Starts children from a checkpoint.
    ///
    /// # Errors
    /// As for a VM's.
    pub(crate) fn fork_checkpoint(
        &self,
        name: &str,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        check_names(request.count, request.name.as_deref())?;
        expect_no_detach(request)?;
        let checkpoint = self.checkpoint_of(name, cancel)?;
        let claims = self.claim(name, request, &checkpoint.vm_record().template, cancel)?;
        let _launching = self.0.launching(&claims);
        let made = self.start_children_of(&checkpoint, claims, request, cancel)?;
        let erased = erased(&made, request);
        let answer = checkpoint.answer(made, begun.elapsed(), erased);
        self.0.events.forked(name, &answer.children, answer.pause_us);
        Ok(answer)
    }

    /// Claims the names of children of `template`, after a check that the host has room.
    /// [`check_names`] comes first.
    pub(super) fn claim(
        &self,
        stem: &str,
        request: &ForkRequest,
        template: &VmTemplate,
        cancel: &Cancel,
    ) -> Result<Vec<NameClaim>, DaemonError> {
        let count = request.count;
        if request.ready {
            expect_reachable(stem, &template.config)?;
        }
        check_host_limits(count, ResourceDemand::of(&template.config))
            .map_err(|source| DaemonError::HostLimit { count, source })?;
        let listed = self.0.processes.names();
        if !request.overcommit {
            let running = if request.paused { None } else { Some(listed.len()) };
            check_share(count, running).map_err(|source| DaemonError::HostLimit { count, source })?;
        }
        let check = || self.check(0, count, cancel);
        claim_names(&self.0.dir, stem, count, request.name.as_deref(), |name| listed.contains(name), check)
    }

    /// Starts children from an existing image.
    pub(super) fn start_children_of(
        &self,
        checkpoint: &Checkpoint,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<LaunchedVm>, DaemonError> {
        let learning = Some(checkpoint.learning());
        let origin = ChildSource {
            vm_record: checkpoint.vm_record(),
            vm: checkpoint.vm(),
            network: checkpoint.network(),
            learning,
            image: &|| Ok(checkpoint),
        };
        self.start_children(&origin, claims, request, cancel)
    }

    /// Starts children of `origin`: all or none (I13).
    ///
    /// # Errors
    /// When one cannot be made.
    pub(super) fn start_children(
        &self,
        origin: &ChildSource<'_>,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<LaunchedVm>, DaemonError> {
        let count = claims.len();
        let failed = |source| DaemonError::Worker { source };
        let budget = Learning::budget(self.ahead_pages(origin, request)?, count);
        let VmRecord { template, identity, session, bounds, secrets, .. } = origin.vm_record;
        let secrets = match secrets {
            None => request.without_secrets.then_some(SecretsRecord::Withheld),
            Some(secrets) => Some(secrets.of_child(request.without_secrets)),
        };
        let ancestors = origin.vm_record.ancestors_of_child();
        let session = match (session, origin.learning) {
            (Some(session), None) => Some(session.expect_live(count)?),
            // A checkpoint outlives the session of its VM.
            (Some(session), Some(_)) => session.live(),
            (None, _) => None,
        };
        let mut choice = request.identity();
        let (network, is_chosen) = (choice.network.or(origin.network), choice.network.is_some());
        // The image comes from the parent's process, which may lie about the network.
        choice.network = choice.network.or(origin.network.filter(|network| *network == Link::Closed));
        // Held while any is made: a worker's grants must name existing directories.
        let _overlays = self.0.overlays.hold(&template.written())?;
        claims.iter().for_each(|claim| self.0.forget_earlier(&claim.name));
        let processes = RefCell::new(Vec::with_capacity(count));
        let assign = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::child(&template.config, identity, &claim.name, &choice).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&template.written())?;
            let start = Start {
                template,
                session: session.as_ref(),
                parent: origin.vm,
                ancestors: &ancestors,
                bounds: *bounds,
                secrets: secrets.as_ref(),
                pid: worker.pid(),
                network,
            };
            let (mut resources, passed_fds) = WorkerResources::make(claim, start, overlays, ends, &self.0.broker)?;
            let launch = StartChildRequest {
                name: claim.name.clone(),
                template: template.clone(),
                passed_fds,
                parent: origin.vm.map(str::to_owned),
                paused: request.paused,
            };
            worker.request(&WorkerRequest::Fork(Box::new(launch)), &resources.files(claim))?;
            resources.sent();
            processes.borrow_mut().extend(resources.process().map(|process| (claim.name.clone(), process)));
            Ok(resources)
        };
        let give = |workers: &Workers| -> Result<Vec<Note>, DaemonError> {
            let checkpoint = (origin.image)()?;
            if network == Some(Link::Open) && !is_chosen && checkpoint.network() == Some(Link::Closed) {
                let text = "the network of the VM was closed while the VM was forked".to_owned();
                return Err(DaemonError::Refused { kind: ProblemKind::WrongState, text });
            }
            let labels = request.labels.as_ref().unwrap_or_else(|| checkpoint.labels()).clone();
            let (secrets, withhold) = (checkpoint.secrets().clone(), request.without_secrets);
            if withhold {
                secrets.expect_known(origin.vm)?;
            }
            let learns = origin.learning.filter(|_| budget > 0);
            let likely = learns.map(|learning| learning.likely(budget)).transpose().map_err(failed)?;
            let ahead = learns.map(|_| AheadRequest { pages: budget });
            let inherited = Inherited { labels, secrets, withhold, ahead };
            let give = |worker: &Worker| {
                let note =
                    learns.map(|learning| Ok((note()?, Arc::downgrade(learning)))).transpose().map_err(failed)?;
                let files: Vec<_> = likely.iter().chain(note.iter().map(|(note, _)| note)).map(AsFd::as_fd).collect();
                worker.give_image(&inherited, &files, checkpoint.parts())?;
                Ok(note)
            };
            workers.0.iter().map(give).collect()
        };
        let worker_env = WorkerEnv { confine: self.0.sandbox.of_child(template), bounds: *bounds };
        let its_session = |made| session.as_ref().map_or(Ok(()), |live| live.check(made, count));
        let check = |made| its_session(made).and_then(|()| self.check(made, count, cancel));
        let pace = if request.paused { Pace::Paused } else { Pace::Running };
        let plan =
            LaunchPlan { template: Some(template), worker_env, claims: &claims, assign: &assign, check: &check, pace };
        // Its workers end with the command.
        let made = self.make(&plan, give).map_err(|error| its_session(0).err().unwrap_or(error))?;
        // Of a worker that was replaced, the later process counts.
        self.note_children((origin.image)()?, &processes.borrow());
        claims.into_iter().for_each(NameClaim::leave);
        Ok(made)
    }

    /// Boots a VM.
    ///
    /// # Errors
    /// When the name is taken, or the VM cannot be made.
    pub(crate) fn boot(
        &self,
        request: BootRequest,
        client: Option<ClientProcess>,
        cancel: &Cancel,
    ) -> Result<LaunchedVm, DaemonError> {
        let _busy = self.0.busy.read();
        let BootRequest {
            name,
            mut config,
            kernel,
            initrd,
            cmdline,
            labels,
            paused,
            reports_ready,
            session,
            limits,
            secrets,
        } = request;
        let bounds = self.bounds(limits)?;
        secrets::check(&secrets)?;
        let secrets = Secrets::of(secrets);
        let record = SecretsRecord::of(&secrets).map_err(|source| DaemonError::Worker { source })?;
        let session = session.map(|name| Session::of(&name, client)).transpose()?;
        let session = session.as_ref().map(|session| session.expect_live(1)).transpose()?;
        let claim = NameClaim::new(&self.0.dir, &name)?;
        check_host_limits(1, ResourceDemand::of(&config))
            .map_err(|source| DaemonError::HostLimit { count: 1, source })?;
        config.check_devices().map_err(VmError::from)?;
        config.check_queues().map_err(VmError::from)?;
        self.wait_for_writers(&config, cancel)?;
        let template = template_of_boot(&config);
        // The writes of a disk without a journal. Journals are made beside the image.
        let mut written = Vec::new();
        for (disk, overlays) in config.disks.iter_mut().zip(&template.overlays) {
            let has_journal = !disk.disk.ephemeral && !is_block_device(&disk.disk.path);
            if !disk.disk.read_only && !has_journal {
                disk.disk.overlays = Some(overlays.clone());
                written.push(overlays.clone());
            }
        }
        let template = VmTemplate { config: config.clone(), ..template };
        let _overlays = self.0.overlays.hold(&written)?;
        let worker_env = WorkerEnv { confine: self.0.sandbox.of_boot(&config, &kernel, initrd.as_deref()), bounds };
        let claims = [claim];
        let _launching = self.0.launching(&claims);
        self.0.forget_earlier(&claims[0].name);
        let assign = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::boot(&config).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&written)?;
            let start = Start {
                template: &template,
                session: session.as_ref(),
                parent: None,
                ancestors: &[],
                bounds,
                secrets: Some(&record),
                pid: worker.pid(),
                network: Some(Link::Open),
            };
            let (mut resources, passed_fds) = WorkerResources::make(claim, start, overlays, ends, &self.0.broker)?;
            let (kernel, initrd, cmdline) = (kernel.clone(), initrd.clone(), cmdline.clone());
            let (name, config, labels) = (claim.name.clone(), config.clone(), labels.clone());
            let secrets = secrets.clone();
            let launch = StartBootRequest {
                name,
                passed_fds,
                config,
                kernel,
                initrd,
                cmdline,
                labels,
                secrets,
                paused,
                reports_ready,
            };
            worker.request(&WorkerRequest::Boot(Box::new(launch)), &resources.files(claim))?;
            resources.sent();
            Ok(resources.booted())
        };
        let check = |made| self.check(made, 1, cancel);
        let pace = if paused { Pace::Paused } else { Pace::Running };
        let plan = LaunchPlan { template: None, worker_env, claims: &claims, assign: &assign, check: &check, pace };
        let made = self.make(&plan, |workers| Ok(workers.0.iter().map(|_| None).collect()))?;
        claims.into_iter().for_each(NameClaim::leave);
        made.iter().for_each(|vm| self.0.events.booted(&vm.name));
        made.into_iter().next().ok_or(DaemonError::Ending)
    }

    /// Has a worker for each claim make its VM, and then lets all run. `give` sends the parts that
    /// follow the requests, and returns the files for the written pages. On failure the claims must
    /// outlive this call: a name is free only once nothing uses it.
    fn make(
        &self,
        plan: &LaunchPlan<'_>,
        give: impl Fn(&Workers) -> Result<Vec<Note>, DaemonError>,
    ) -> Result<Vec<LaunchedVm>, DaemonError> {
        // Further workers are prepared afterwards: that takes processor time.
        let (prepared, _busy) = match plan.template {
            Some(template) => {
                let (prepared, busy) = self.0.pool.take(template, plan.claims.len());
                (prepared, Some(busy))
            }
            None => (Vec::new(), None),
        };
        let were_prepared = !prepared.is_empty();
        let begun = Instant::now();
        let assigned = self.assign(prepared, plan)?;
        let have_requests = Instant::now();
        let made = match self.run(assigned, plan, &give) {
            // A prepared worker may have died meanwhile. For others this is an error.
            Err(DaemonError::Worker { source }) if were_prepared => {
                tracing::info!(error = %source, "a prepared worker has failed, and others are taken");
                self.run(self.assign(Vec::new(), plan)?, plan, &give)
            }
            made => made,
        };
        tracing::debug!(
            count = plan.claims.len(),
            requests = ?have_requests - begun,
            run = ?have_requests.elapsed(),
            "made"
        );
        made
    }

    /// Gives requests to the `prepared` workers, and to as many new ones as needed.
    fn assign(&self, prepared: Vec<Worker>, plan: &LaunchPlan<'_>) -> Result<AssignedWorkers, DaemonError> {
        let LaunchPlan { worker_env, claims, assign, check, .. } = plan;
        let count = prepared.len();
        let mut workers = Workers(self.0.zygote.workers(claims.len() - count)?);
        // The prepared ones first: they are the first to be done.
        workers.0.splice(..0, prepared);
        // In its group before its first request, if that is possible.
        let settle = |worker: &Worker, claim: &NameClaim, is_prepared: bool| {
            let group = self.0.group_for(worker, &claim.name, worker_env)?;
            if !is_prepared {
                worker.confine(worker_env.confine.clone())?;
            }
            Ok::<_, DaemonError>(group)
        };
        let ours = workers.0.iter().zip(*claims).enumerate();
        let groups = ours.map(|(at, (worker, claim))| settle(worker, claim, at < count));
        let mut groups: Vec<Option<Group>> = groups.collect::<Result<_, _>>()?;
        let mut all_resources = Vec::with_capacity(claims.len());
        for (at, claim) in claims.iter().enumerate() {
            check(0)?;
            let resources = match assign(&workers.0[at], claim) {
                // A prepared worker may have died meanwhile. For another this is an error.
                Err(DaemonError::Worker { .. }) => {
                    workers.0[at] = self.0.zygote.workers(1)?.pop().ok_or(DaemonError::Ending)?;
                    groups[at] = settle(&workers.0[at], claim, false)?;
                    assign(&workers.0[at], claim)
                }
                other => other,
            };
            all_resources.push(resources?);
        }
        Ok(AssignedWorkers { workers, all_resources, groups })
    }

    /// Sends workers the parts that follow their requests, and lets their VMs run once all are
    /// made.
    fn run(
        &self,
        assigned: AssignedWorkers,
        plan: &LaunchPlan<'_>,
        give: impl Fn(&Workers) -> Result<Vec<Note>, DaemonError>,
    ) -> Result<Vec<LaunchedVm>, DaemonError> {
        // In this order: after a failure the workers end first, and then closed networks are opened.
        let AssignedWorkers { all_resources, groups, mut workers } = assigned;
        let confinement = self.0.sandbox.confinement;
        // All of them, or no VM runs.
        let interfaces = || all_resources.iter().map(WorkerResources::interfaces).collect();
        let up = self.0.net_hook.as_ref().map(|hook| hook.up(interfaces())).transpose()?;
        // Behind the hook, which takes interfaces up, and before the workers read what another
        // process has written.
        all_resources.iter().try_for_each(|resources| resources.close_links(confinement))?;
        let notes = give(&workers)?;
        // Before they run: a VM may end at once.
        let pids: Vec<u32> = workers.0.iter().map(Worker::pid).collect();
        let vms = workers.0.iter().zip(&all_resources).zip(groups).zip(notes);
        for (((worker, resources), group), note) in vms {
            let process = worker.pidfd()?.ok_or(DaemonError::Ending)?;
            self.0.processes.add([(worker.pid(), resources.own_vm(process, group).noting(note))]);
        }
        let settle = |made: &[LaunchedVm]| {
            let mut vms = all_resources.iter().zip(made);
            vms.try_for_each(|(resources, vm)| resources.settle_network(vm.network, confinement))
        };
        let is_unknown = all_resources.iter().any(WorkerResources::has_unknown_network);
        let settle: Option<&BeforeTheyRun<'_>> = if is_unknown { Some(&settle) } else { None };
        let made = workers.run_together(plan.pace, plan.check, settle).inspect_err(|_| {
            pids.iter().for_each(|pid| drop(self.0.processes.remove(*pid)));
        })?;
        all_resources.into_iter().for_each(WorkerResources::keep);
        up.into_iter().for_each(Up::keep);
        Ok(made)
    }

    /// Returns the number of pages that a child of `origin` may copy ahead.
    fn ahead_pages(&self, origin: &ChildSource<'_>, request: &ForkRequest) -> Result<u64, DaemonError> {
        let refused = |text: String| Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text });
        let mib = match (request.ahead_mib, origin.learning) {
            (Some(mib @ 1..), None) => {
                return refused(format!("ahead_mib: {mib}: nothing is learned of a VM's forks: fork a checkpoint"));
            }
            (Some(mib), _) if mib > MAX_AHEAD_MIB => {
                return refused(format!("ahead_mib: {mib} is more than {MAX_AHEAD_MIB}"));
            }
            (Some(mib), _) => mib,
            (None, _) => self.0.ahead_mib,
        };
        Ok((u64::from(mib) << 20) / clade_memory::PAGE_SIZE)
    }

    /// Returns the resource limits of a VM, if they are requested and can be enforced.
    fn bounds(&self, limits: VmLimits) -> Result<Bounds, DaemonError> {
        let refused = |text: &str| Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text: text.to_owned() });
        let VmLimits { memory_mib, cpus } = limits;
        let bounds = Bounds { memory_mib, cpus };
        if memory_mib.is_some_and(|mib| mib < MIN_LIMIT_MIB) {
            return refused(&format!("limits.memory_mib: a VM's process takes {MIN_LIMIT_MIB} MiB at least"));
        }
        if cpus.is_some_and(|cpus| !(MIN_CPUS..=MAX_CPUS).contains(&cpus)) {
            return refused(&format!("limits.cpus: {MIN_CPUS} to {MAX_CPUS} processors"));
        }
        self.expect_enforced(bounds)?;
        Ok(bounds)
    }

    /// Refuses resource limits that cannot be enforced.
    pub(super) fn expect_enforced(&self, bounds: Bounds) -> Result<(), DaemonError> {
        if bounds.is_none() || self.0.cgroups.as_ref().is_some_and(Cgroups::limits_memory) {
            return Ok(());
        }
        let text = "limits need control groups (v2), which this supervisor has not got: see --cgroup".to_owned();
        Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text })
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
