//! Children and booted VMs: starts the workers that make them, all of a request or none (I13).

use std::cell::{Cell, OnceCell};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::about::About;
use super::cgroups::{Bounds, Group};
use super::checkpoint::Checkpoint;
use super::hand::{Hand, Start};
use super::net_hook::Up;
use super::ready::expect_reachable;
use super::session::Session;
use super::{Fetch, Inner, Supervisor};
use crate::ahead::{AheadOrder, Learning, note};
use crate::control::{BootRequest, ClientProcess, ErasedInfo, ForkAnswer, ForkRequest, ProblemKind, VmLimits};
use crate::fleet::{Cancel, FleetError, NameClaim, Needs, check_names, check_room, check_share, claim_names};
use crate::image::Asked;
use crate::jail::is_block_device;
use crate::secrets::{self, Secrets, SecretsRecord};
use crate::worker::{
    BootOrder, EnterOrder, ForkOrder, Inherited, Made, Order, Pace, Shape, Worker, Workers, has_ended,
};
use clade_vmm::vm::{Endpoints, VmError};

/// The file for a child's written pages, and the set that learns from it.
type Note = Option<(OwnedFd, Weak<Learning>)>;

/// Most memory that a child may have copies of ahead, in MiB.
const MAX_AHEAD_MIB: u32 = 4096;
/// The least memory of a VM's process, in MiB.
const MIN_LIMIT_MIB: u64 = 32;
/// Least processor time of a VM's limit.
const MIN_CPUS: f64 = 0.01;
const MAX_CPUS: f64 = 1024.0;

/// A worker's control group and limits.
pub(super) struct Ground {
    pub(super) enter: EnterOrder,
    pub(super) bounds: Bounds,
}

/// The source of children.
pub(super) struct Origin<'a> {
    pub(super) about: &'a About,
    /// The VM, if it is not the image of a snapshot.
    pub(super) vm: Option<&'a str>,
    /// Learns the pages that its children write, if that is wanted.
    pub(super) learning: Option<&'a Arc<Learning>>,
    /// Returns the image once it is there: it is requested after the workers have their orders.
    pub(super) image: &'a dyn Fn() -> Result<&'a Checkpoint, FleetError>,
}

/// VMs to be made.
struct Making<'a> {
    /// The shape of prepared workers. None if none fit.
    shape: Option<&'a Shape>,
    ground: Ground,
    claims: &'a [NameClaim],
    /// Gives a worker the order for the VM of a claim.
    order: &'a dyn Fn(&Worker, &NameClaim) -> Result<Hand, FleetError>,
    check: &'a dyn Fn(usize) -> Result<(), FleetError>,
    pace: Pace,
}

/// Workers with their orders, each with its descriptors, in its group.
struct Ordered {
    workers: Workers,
    hands: Vec<Hand>,
    groups: Vec<Option<Group>>,
}

/// Returns the count of secrets erased in each of the children made without secrets.
fn erased(made: &[Made], request: &ForkRequest) -> Option<ErasedInfo> {
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
        fetch: Fetch,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, FleetError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        check_names(request.count, request.name.as_deref())?;
        // Before the request for its image: when that is there, the VM's files may be another's.
        let about = About::expect(&self.0.dir, vm)?;
        // Before the parent is paused: a refused request costs it nothing.
        let claims = self.claim(vm, request, &about.shape, cancel)?;
        let _making = self.0.making(&claims);
        let claimed = Instant::now();
        // Its fork and the starts of the children's workers run side by side.
        let asked = Cell::new(Some((Asked::begin(self.dir(), vm)?, fetch)));
        let taken = OnceCell::new();
        let image = || match (taken.get(), asked.take()) {
            (Some(taken), _) => Ok(taken),
            (None, Some((asked, _fetch))) => {
                let check = || self.check(0, request.count, cancel);
                let checkpoint = Checkpoint::of_asked(vm, about.clone(), asked, &check)?;
                tracing::debug!(vm, claim = ?claimed - begun, image = ?claimed.elapsed(), "fork");
                Ok(taken.get_or_init(|| checkpoint))
            }
            // The request for it has failed.
            (None, None) => Err(FleetError::Ending),
        };
        let made = self.start_children(
            &Origin { about: &about, vm: Some(vm), learning: None, image: &image },
            claims,
            request,
            cancel,
        )?;
        let erased = erased(&made, request);
        let answer = image()?.answer(made, begun.elapsed()).with_erased(erased);
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
    ) -> Result<ForkAnswer, FleetError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        check_names(request.count, request.name.as_deref())?;
        let checkpoint = self.checkpoint_of(name, cancel)?;
        let claims = self.claim(name, request, &checkpoint.about().shape, cancel)?;
        let _making = self.0.making(&claims);
        let made = self.start_children_of(&checkpoint, claims, request, cancel)?;
        let erased = erased(&made, request);
        let answer = checkpoint.answer(made, begun.elapsed()).with_erased(erased);
        self.0.events.forked(name, &answer.children, answer.pause_us);
        Ok(answer)
    }

    /// Claims the names of children of `shape`, after a check that the host has room.
    /// [`check_names`] comes first.
    pub(super) fn claim(
        &self,
        stem: &str,
        request: &ForkRequest,
        shape: &Shape,
        cancel: &Cancel,
    ) -> Result<Vec<NameClaim>, FleetError> {
        let count = request.count;
        if request.ready {
            expect_reachable(stem, &shape.config)?;
        }
        check_room(count, Needs::of(&shape.config)).map_err(|source| FleetError::Room { count, source })?;
        let listed = self.0.processes.names();
        if !request.overcommit {
            let running = if request.paused { None } else { Some(listed.len()) };
            check_share(count, running).map_err(|source| FleetError::Room { count, source })?;
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
    ) -> Result<Vec<Made>, FleetError> {
        let learning = Some(checkpoint.learning());
        let origin = Origin { about: checkpoint.about(), vm: checkpoint.vm(), learning, image: &|| Ok(checkpoint) };
        self.start_children(&origin, claims, request, cancel)
    }

    /// Starts children of `origin`: all or none (I13).
    ///
    /// # Errors
    /// When one cannot be made.
    pub(super) fn start_children(
        &self,
        origin: &Origin<'_>,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<Made>, FleetError> {
        let count = claims.len();
        let failed = |source| FleetError::Worker { source };
        let budget = Learning::budget(self.ahead_pages(origin, request)?, count);
        let About { shape, identity, session, bounds, secrets, .. } = origin.about;
        let secrets = secrets.as_ref().map(|secrets| secrets.of_child(request.without_secrets));
        let session = match (session, origin.learning) {
            (Some(session), None) => Some(session.expect_live(count)?),
            // A checkpoint outlives the session of its VM.
            (Some(session), Some(_)) => session.live(),
            (None, _) => None,
        };
        let choice = request.identity();
        // Held while any is made: a worker's grants must name existing directories.
        let _overlays = self.0.overlays.hold(&shape.written())?;
        claims.iter().for_each(|claim| self.0.forget_earlier(&claim.name));
        let order = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::child(&shape.config, identity, &claim.name, &choice).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&shape.written())?;
            let start = Start {
                shape,
                session: session.as_ref(),
                parent: origin.vm,
                bounds: *bounds,
                secrets: secrets.as_ref(),
                pid: worker.pid(),
            };
            let (mut hand, handed) = Hand::make(claim, start, overlays, ends, &self.0.broker)?;
            let order = ForkOrder {
                name: claim.name.clone(),
                shape: shape.clone(),
                handed,
                parent: origin.vm.map(str::to_owned),
                paused: request.paused,
            };
            worker.order(&Order::Fork(Box::new(order)), &hand.files(claim))?;
            hand.sent();
            Ok(hand)
        };
        let give = |workers: &Workers| -> Result<Vec<Note>, FleetError> {
            let checkpoint = (origin.image)()?;
            let labels = request.labels.as_ref().unwrap_or_else(|| checkpoint.labels()).clone();
            let (secrets, withhold) = (checkpoint.secrets().clone(), request.without_secrets);
            if withhold {
                secrets.expect_known(origin.vm)?;
            }
            let learns = origin.learning.filter(|_| budget > 0);
            let likely = learns.map(|learning| learning.likely(budget)).transpose().map_err(failed)?;
            let order = learns.map(|_| AheadOrder { pages: budget });
            let inherited = Inherited { labels, secrets, withhold, ahead: order };
            let give = |worker: &Worker| {
                let note =
                    learns.map(|learning| Ok((note()?, Arc::downgrade(learning)))).transpose().map_err(failed)?;
                let files: Vec<_> = likely.iter().chain(note.iter().map(|(note, _)| note)).map(AsFd::as_fd).collect();
                worker.give_image(&inherited, &files, checkpoint.parts())?;
                Ok(note)
            };
            workers.0.iter().map(give).collect()
        };
        let ground = Ground { enter: self.0.place.of_child(shape), bounds: *bounds };
        let its_session = |made| session.as_ref().map_or(Ok(()), |live| live.check(made, count));
        let check = |made| its_session(made).and_then(|()| self.check(made, count, cancel));
        let pace = if request.paused { Pace::Paused } else { Pace::Running };
        let making = Making { shape: Some(shape), ground, claims: &claims, order: &order, check: &check, pace };
        // Its workers end with the command.
        let made = self.make(&making, give).map_err(|error| its_session(0).err().unwrap_or(error))?;
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
    ) -> Result<Made, FleetError> {
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
        let record = SecretsRecord::of(&secrets).map_err(|source| FleetError::Worker { source })?;
        let session = session.map(|name| Session::of(&name, client)).transpose()?;
        let session = session.as_ref().map(|session| session.expect_live(1)).transpose()?;
        let claim = NameClaim::new(&self.0.dir, &name)?;
        check_room(1, Needs::of(&config)).map_err(|source| FleetError::Room { count: 1, source })?;
        config.check_devices().map_err(VmError::from)?;
        config.check_queues().map_err(VmError::from)?;
        let shape = Shape::of_boot(&config);
        // The writes of a disk without a journal. Journals are made beside the image.
        let mut written = Vec::new();
        for (disk, overlays) in config.disks.iter_mut().zip(&shape.overlays) {
            let has_journal = !disk.disk.ephemeral && !is_block_device(&disk.disk.path);
            if !disk.disk.read_only && !has_journal {
                disk.disk.overlays = Some(overlays.clone());
                written.push(overlays.clone());
            }
        }
        let shape = Shape { config: config.clone(), ..shape };
        let _overlays = self.0.overlays.hold(&written)?;
        let ground = Ground { enter: self.0.place.of_boot(&config, &kernel, initrd.as_deref()), bounds };
        let claims = [claim];
        let _making = self.0.making(&claims);
        self.0.forget_earlier(&claims[0].name);
        let order = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::boot(&config).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&written)?;
            let start = Start {
                shape: &shape,
                session: session.as_ref(),
                parent: None,
                bounds,
                secrets: Some(&record),
                pid: worker.pid(),
            };
            let (mut hand, handed) = Hand::make(claim, start, overlays, ends, &self.0.broker)?;
            let (kernel, initrd, cmdline) = (kernel.clone(), initrd.clone(), cmdline.clone());
            let (name, config, labels) = (claim.name.clone(), config.clone(), labels.clone());
            let secrets = secrets.clone();
            let order =
                BootOrder { name, handed, config, kernel, initrd, cmdline, labels, secrets, paused, reports_ready };
            worker.order(&Order::Boot(Box::new(order)), &hand.files(claim))?;
            hand.sent();
            Ok(hand.booted())
        };
        let check = |made| self.check(made, 1, cancel);
        let pace = if paused { Pace::Paused } else { Pace::Running };
        let making = Making { shape: None, ground, claims: &claims, order: &order, check: &check, pace };
        let made = self.make(&making, |workers| Ok(workers.0.iter().map(|_| None).collect()))?;
        claims.into_iter().for_each(NameClaim::leave);
        made.iter().for_each(|vm| self.0.events.booted(&vm.name));
        made.into_iter().next().ok_or(FleetError::Ending)
    }

    /// Has a worker for each claim make its VM, and then lets all run. `give` sends the parts that
    /// follow the orders, and returns the files for the written pages. On failure the claims must
    /// outlive this call: a name is free only once nothing uses it.
    fn make(
        &self,
        making: &Making<'_>,
        give: impl Fn(&Workers) -> Result<Vec<Note>, FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        // Further workers are prepared afterwards: that takes processor time.
        let (prepared, _busy) = match making.shape {
            Some(shape) => {
                let (prepared, busy) = self.0.pool.take(shape, making.claims.len());
                (prepared, Some(busy))
            }
            None => (Vec::new(), None),
        };
        let were_prepared = !prepared.is_empty();
        let begun = Instant::now();
        let ordered = self.order(prepared, making)?;
        let have_orders = Instant::now();
        let made = match self.run(ordered, making, &give) {
            // A prepared worker may have died meanwhile. For others this is an error.
            Err(FleetError::Worker { source }) if were_prepared => {
                tracing::info!(error = %source, "a prepared worker has failed, and others are taken");
                self.run(self.order(Vec::new(), making)?, making, &give)
            }
            made => made,
        };
        tracing::debug!(
            count = making.claims.len(),
            orders = ?have_orders - begun,
            run = ?have_orders.elapsed(),
            "made"
        );
        made
    }

    /// Gives orders to the `prepared` workers, and to as many new ones as needed.
    fn order(&self, prepared: Vec<Worker>, making: &Making<'_>) -> Result<Ordered, FleetError> {
        let Making { ground, claims, order, check, .. } = making;
        let count = prepared.len();
        let mut workers = Workers(self.0.zygote.workers(claims.len() - count)?);
        // The prepared ones first: they are the first to be done.
        workers.0.splice(..0, prepared);
        // In its group before its first order, if that is possible.
        let settle = |worker: &Worker, claim: &NameClaim, is_prepared: bool| {
            let group = self.0.group_for(worker, &claim.name, ground)?;
            if !is_prepared {
                worker.enter(ground.enter.clone())?;
            }
            Ok::<_, FleetError>(group)
        };
        let ours = workers.0.iter().zip(*claims).enumerate();
        let groups = ours.map(|(at, (worker, claim))| settle(worker, claim, at < count));
        let mut groups: Vec<Option<Group>> = groups.collect::<Result<_, _>>()?;
        let mut hands = Vec::with_capacity(claims.len());
        for (at, claim) in claims.iter().enumerate() {
            check(0)?;
            let hand = match order(&workers.0[at], claim) {
                // A prepared worker may have died meanwhile. For another this is an error.
                Err(FleetError::Worker { .. }) => {
                    workers.0[at] = self.0.zygote.workers(1)?.pop().ok_or(FleetError::Ending)?;
                    groups[at] = settle(&workers.0[at], claim, false)?;
                    order(&workers.0[at], claim)
                }
                other => other,
            };
            hands.push(hand?);
        }
        Ok(Ordered { workers, hands, groups })
    }

    /// Sends workers the parts that follow their orders, and lets their VMs run once all are made.
    fn run(
        &self,
        ordered: Ordered,
        making: &Making<'_>,
        give: impl Fn(&Workers) -> Result<Vec<Note>, FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        let Ordered { mut workers, hands, groups } = ordered;
        let claims = making.claims;
        let notes = give(&workers)?;
        // All of them, or no VM runs.
        let interfaces = || claims.iter().zip(&hands).map(|(claim, hand)| hand.interfaces(&claim.name)).collect();
        let up = self.0.net_hook.as_ref().map(|hook| hook.up(interfaces())).transpose()?;
        // Before they run: a VM may end at once.
        let pids: Vec<u32> = workers.0.iter().map(Worker::pid).collect();
        let vms = workers.0.iter().zip(claims).zip(&hands).zip(groups).zip(notes);
        for ((((worker, claim), hand), group), note) in vms {
            let process = worker.pidfd()?.ok_or(FleetError::Ending)?;
            self.0.processes.add([(worker.pid(), hand.own_vm(&claim.name, process, group).noting(note))]);
        }
        let made = workers.run_together(making.pace, making.check).inspect_err(|_| {
            pids.iter().for_each(|pid| drop(self.0.processes.remove(*pid)));
        })?;
        hands.into_iter().for_each(Hand::keep);
        up.into_iter().for_each(Up::keep);
        Ok(made)
    }

    /// Returns the number of pages that a child of `origin` may copy ahead.
    fn ahead_pages(&self, origin: &Origin<'_>, request: &ForkRequest) -> Result<u64, FleetError> {
        let refused = |text: String| Err(FleetError::Refused { kind: ProblemKind::BadConfig, text });
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
    fn bounds(&self, limits: VmLimits) -> Result<Bounds, FleetError> {
        let refused = |text: &str| Err(FleetError::Refused { kind: ProblemKind::BadConfig, text: text.to_owned() });
        let VmLimits { memory_mib, cpus } = limits;
        let bounds = Bounds { memory_mib, cpus };
        if memory_mib.is_some_and(|mib| mib < MIN_LIMIT_MIB) {
            return refused(&format!("limits.memory_mib: a VM's process takes {MIN_LIMIT_MIB} MiB at least"));
        }
        if cpus.is_some_and(|cpus| !(MIN_CPUS..=MAX_CPUS).contains(&cpus)) {
            return refused(&format!("limits.cpus: {MIN_CPUS} to {MAX_CPUS} processors"));
        }
        if !bounds.is_none() && self.0.cgroups.as_ref().is_none_or(|groups| !groups.limits_memory()) {
            return refused("limits need control groups (v2), which this supervisor has not got: see --cgroup");
        }
        Ok(bounds)
    }
}

impl Inner {
    /// Makes the group of a new VM, with its worker in it.
    fn group_for(&self, worker: &Worker, name: &str, ground: &Ground) -> Result<Option<Group>, FleetError> {
        let Some(groups) = &self.cgroups else { return Ok(None) };
        let group = groups.make(name, ground.bounds, ground.enter.ram)?;
        // The pid is the worker's as long as its pidfd reports no end.
        let pidfd = worker.pidfd()?.filter(|pidfd| !has_ended(pidfd, Duration::ZERO));
        let Some(_pidfd) = pidfd else {
            return Err(FleetError::Worker { source: std::io::ErrorKind::BrokenPipe.into() });
        };
        group.enter(worker.pid())?;
        Ok(Some(group))
    }
}
