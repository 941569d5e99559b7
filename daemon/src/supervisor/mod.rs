//! The supervisor: names, checkpoints and forks of the VMs of a runtime directory, each VM in a
//! worker of its own.
//!
//! It never maps guest memory. What it knows of VMs it asks their processes, through the runtime
//! directory. So one that comes back after its end finds all VMs, and one that ends takes none
//! with it: only its checkpoints go.
//!
//! | file | what |
//! |---|---|
//! | `checkpoint` | images that are held, to fork from |
//! | `about` | what is known of a VM, whatever its process says |
//! | `hand` | what a worker may reach, and what it is handed |
//! | `cgroups` | what the processes of VMs may take of the host |
//! | `net_hook` | the program that connects interfaces to the host's network |
//! | `processes` | the processes of its VMs, and the end of those that do not end |
//! | `fetches` | how much of the supervisor one VM may take |
//! | `overlays` | directories for the writes of confined VMs' disks |
//! | `broker` | guests' connections to the host |
//! | `snapshots` | snapshots of VMs whose processes may not write files |
//! | `events` | what happens, for those who follow it |
//! | `idempotency` | requests that are sent again |
//! | `openapi` | the description of the HTTP API |
//! | `metrics` | numbers for Prometheus |
//! | `pool` | workers that are prepared before they are asked for |
//! | `proxy` | requests that are passed on to a VM's process |
//! | `server` | the HTTP API |

mod about;
mod broker;
mod cgroups;
mod checkpoint;
mod events;
mod fetches;
mod hand;
mod idempotency;
mod metrics;
mod net_hook;
mod openapi;
mod overlays;
mod pool;
mod processes;
mod proxy;
mod server;
mod snapshots;

pub use server::TcpError;

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::control::{
    ApiError, BootRequest, CheckpointInfo, ForkAnswer, ForkRequest, ProblemKind, StopAnswer, SupervisorInfo, VmInfo,
    VmLimits,
};
use crate::fleet::{
    Cancel, CancelReason, Children, FleetError, MAX_CHILDREN, NameClaim, Needs, RuntimeDir, SupervisorClaim,
    check_names, check_room, claim_names, record_end, recorded_reason, vm_names,
};
use crate::image::give_broker;
use crate::jail::{Confinement, is_block_device};
use crate::worker::{BootOrder, EnterOrder, ForkOrder, Made, Order, Shape, Worker, Workers, has_ended};
use crate::zygote::{Exit, Zygote};
use about::About;
pub(crate) use about::clear_up;
use broker::Broker;
use cgroups::{Bounds, Cgroups, Group};
pub use cgroups::{CgroupError, CgroupPlace};
use checkpoint::{Checkpoint, Checkpoints};
use clade_vmm::vm::{Endpoints, StopReason, VmError};
use events::Events;
pub(crate) use fetches::Fetch;
use fetches::{Fetches, Passing};
use hand::{Hand, Place, Start};
use idempotency::Keys;
pub use net_hook::HookError;
use net_hook::{NetHook, Up};
use overlays::OverlayDirs;
use pool::Pool;
use processes::{Processes, kill};
use snapshots::Snapshots;

/// The least memory of a VM's process, in MiB.
const MIN_LIMIT_MIB: u64 = 32;
/// How much processor time a VM's limit may be.
const MIN_CPUS: f64 = 0.01;
const MAX_CPUS: f64 = 1024.0;
/// Clients that are given metrics at a time.
const MAX_SCRAPES: usize = 4;
/// How often it looks for what dead processes have left.
const SWEEP_INTERVAL: Duration = Duration::from_secs(2);

/// How VMs are supervised.
#[derive(Clone, Debug, Default)]
pub struct SupervisorOptions {
    /// Most workers that are kept prepared for one configuration.
    pub pool: usize,
    /// Whether the processes of VMs are confined.
    pub confinement: Confinement,
    /// Where their control groups are.
    pub cgroup: CgroupPlace,
    /// The program that connects their interfaces to the host's network.
    pub net_hook: Option<PathBuf>,
}

/// The supervisor of a runtime directory. A clone is a handle to the same one.
#[derive(Clone, Debug)]
pub struct Supervisor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: RuntimeDir,
    place: Place,
    overlays: OverlayDirs,
    broker: Broker,
    /// None if VMs have no control groups.
    cgroups: Option<Cgroups>,
    net_hook: Option<NetHook>,
    zygote: Arc<Zygote>,
    pool: Pool,
    checkpoints: Checkpoints,
    snapshots: Snapshots,
    events: Arc<Events>,
    keys: Arc<Keys>,
    /// VMs whose workers were started here.
    processes: Processes,
    /// Names of VMs that are being made: they have files, and their making is not announced yet.
    making: Mutex<BTreeSet<String>>,
    /// Held while a VM's end is settled: whoever has been told that a name is free finds it free.
    ends: Mutex<()>,
    fetches: Fetches,
    passing: Passing,
    /// Metrics are gathered for so many clients at a time: each takes memory for all VMs' answers.
    scrapes: Semaphore,
    /// VMs that have ended while their names were taken: how, and whether in an orderly way.
    unsettled: Mutex<Vec<(String, Exit, bool)>>,
    closing: AtomicBool,
    /// Shared by requests that make VMs, and taken alone at the end.
    busy: RwLock<()>,
    ending: watch::Sender<bool>,
    runtime: Handle,
    /// Serve the socket, and the port if there is one.
    servers: Mutex<Vec<JoinHandle<()>>>,
    /// None once it has ended.
    claim: Mutex<Option<SupervisorClaim>>,
}

impl Supervisor {
    /// Supervises the runtime directory `dir`: answers at its socket, on `runtime`. Keeps up to
    /// `pool` workers prepared. VMs are confined as `confinement` says.
    ///
    /// # Errors
    /// When another process supervises it, or the zygote cannot be started.
    pub fn start(dir: &Path, pool: usize, confinement: Confinement, runtime: &Handle) -> Result<Self, FleetError> {
        Self::start_with(dir, &SupervisorOptions { pool, confinement, ..SupervisorOptions::default() }, runtime)
    }

    /// The same, as `options` say.
    ///
    /// # Errors
    /// As [`Self::start`]. When there are to be control groups, and they cannot be had.
    pub fn start_with(dir: &Path, options: &SupervisorOptions, runtime: &Handle) -> Result<Self, FleetError> {
        let SupervisorOptions { pool, confinement, ref cgroup, ref net_hook } = *options;
        let dir = RuntimeDir::create(dir)?;
        let (claim, socket) = SupervisorClaim::new(&dir)?;
        // Before there is another process.
        let cgroups = Cgroups::open(cgroup)?;
        let net_hook = net_hook.as_deref().map(NetHook::new).transpose()?;
        let (sender, exits) = mpsc::channel();
        let failed = |source| FleetError::Worker { source };
        let zygote = Arc::new(Zygote::start(sender, confinement)?);
        let place = Place { dir: dir.path().to_owned(), confinement };
        let overlays = OverlayDirs::default();
        let broker = Broker::start().map_err(failed)?;
        // VMs of a supervisor that has ended.
        for (name, about) in About::all(&dir)? {
            overlays.found(&about.overlays);
            if let Some(vsock) = &about.identity.vsock {
                let given = broker.connect(vsock.socket.clone()).map_err(failed);
                let given = given.and_then(|device| give_broker(dir.path(), &name, device.as_fd()));
                if let Err(error) = given {
                    // It has died, most likely.
                    tracing::debug!(%error, name, "its guest is not connected to the host");
                }
            }
        }
        let supervisor = Self(Arc::new(Inner {
            pool: Pool::start(&zygote, place.clone(), overlays.clone(), pool)?,
            broker,
            cgroups,
            net_hook,
            zygote,
            place,
            overlays,
            dir,
            checkpoints: Checkpoints::default(),
            snapshots: Snapshots::default(),
            events: Arc::default(),
            keys: Arc::default(),
            processes: Processes::default(),
            making: Mutex::default(),
            ends: Mutex::default(),
            fetches: Fetches::default(),
            passing: Passing::default(),
            scrapes: Semaphore::new(MAX_SCRAPES),
            unsettled: Mutex::default(),
            closing: AtomicBool::new(false),
            busy: RwLock::default(),
            ending: watch::Sender::new(false),
            runtime: runtime.clone(),
            servers: Mutex::default(),
            claim: Mutex::new(Some(claim)),
        }));
        let weak = Arc::downgrade(&supervisor.0);
        thread::Builder::new()
            .name("clade-ends".to_owned())
            .spawn(move || watch_ends(&exits, &weak))
            .map_err(failed)?;
        supervisor.0.serve(server::serve(socket, supervisor.clone(), supervisor.0.ending.subscribe()));
        Ok(supervisor)
    }

    /// Ends it: no request is taken any more, and prepared workers go. VMs run on.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
        // Those that are under way are cancelled, and leave nothing.
        drop(self.0.busy.write());
        // Then their answers are sent. Without a receiver there is nobody to tell.
        let _ = self.0.ending.send(true);
        let servers = std::mem::take(&mut *self.0.servers.lock().unwrap_or_else(PoisonError::into_inner));
        for server in servers {
            // It ends within a second; a panic of it is logged by the runtime.
            let _ = self.0.runtime.block_on(server);
        }
        self.0.pool.close();
        self.0.checkpoints.clear();
        // Last: another may supervise the directory from here on.
        drop(self.0.claim.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn check(&self, made: usize, count: usize, cancel: &Cancel) -> Result<(), FleetError> {
        let ending = self.0.closing.load(Ordering::Relaxed).then_some(CancelReason::Ending);
        let reason = cancel.reason().or(ending);
        reason.map_or(Ok(()), |reason| Err(FleetError::Cancelled { made, count, reason }))
    }

    /// Takes a checkpoint of a VM, in whatever process it is.
    ///
    /// # Errors
    /// When there is no such VM, it cannot be forked, or the name is taken.
    pub(crate) fn checkpoint(
        &self,
        vm: &str,
        name: Option<&str>,
        fetch: Fetch,
        cancel: &Cancel,
    ) -> Result<CheckpointInfo, FleetError> {
        let _busy = self.0.busy.read();
        let name = self.0.checkpoints.reserve(vm, name)?;
        let checkpoint = Arc::new(Checkpoint::take(&self.0.dir, vm, &|| self.check(0, 0, cancel))?);
        drop(fetch);
        // Nobody would know of it.
        self.check(0, 0, cancel)?;
        let info = checkpoint.info(&name);
        // First: as soon as it is there, another request may remove it, and say so.
        self.0.events.checkpoint_created(&name, vm);
        self.0.checkpoints.insert(&name, checkpoint);
        Ok(info)
    }

    /// Waits for permission to ask for an image of `vm`.
    ///
    /// # Errors
    /// When its process does not answer those who have it.
    pub(crate) async fn fetch(&self, vm: &str) -> Result<Fetch, ApiError> {
        self.0.fetches.begin(vm).await
    }

    /// The number of a VM's process, if it was started here.
    fn pid_of(&self, name: &str) -> Option<u32> {
        self.0.processes.of(name).map(|(pid, _)| pid)
    }

    /// A VM was stopped, and its process has given the name back: `pid`, if it was started here.
    /// Removes what is left.
    fn stopped(&self, pid: Option<u32>, left: Option<(NameClaim, Exit)>) {
        let _ends = self.0.ends();
        pid.into_iter().for_each(|pid| self.0.processes.give_back(pid));
        if let Some((claim, exit)) = left {
            let pid = pid.unwrap_or(exit.pid);
            self.0.clear_up(claim, Exit { pid, ..exit }, true);
        }
    }

    /// Ends a VM by killing its process, which does not answer.
    ///
    /// # Errors
    /// When it is not known which process that is, or it does not end.
    fn kill(&self, name: &str) -> Result<StopAnswer, FleetError> {
        let silent = |text: &str| FleetError::Refused {
            kind: ProblemKind::VmSilent,
            text: format!("the process of {name:?} does not answer{text}"),
        };
        let about = About::read(&self.0.dir, name)?.ok_or_else(|| silent(", and is not the supervisor's to kill"))?;
        let own = self.0.processes.of(name).map(|(pid, vm)| (pid, vm.process));
        let found = || Some((about.process?.pid(), Arc::new(about.process?.open()?)));
        let (pid, process) = own.or_else(found).ok_or_else(|| silent(", and has ended meanwhile"))?;
        tracing::warn!(name, pid, "a VM that is to stop does not answer: its process is killed");
        self.0.processes.mark_stopped(pid);
        if !kill(&process) {
            return Err(silent(", and does not end though it was killed"));
        }
        let _ends = self.0.ends();
        self.0.processes.give_back(pid);
        let exit = Exit { pid, signal: Some(libc::SIGKILL), code: None };
        match NameClaim::new(&self.0.dir, name) {
            Ok(claim) => self.0.clear_up(claim, exit, true),
            // Somebody else has cleared up, and another has the name.
            Err(FleetError::Taken { .. }) => {}
            Err(error) => return Err(error),
        }
        let vm = VmInfo::of_killed(name, exit, &about.shape.config);
        Ok(StopAnswer { vm, shutdown: None, killed: true })
    }

    fn snapshots(&self) -> &Snapshots {
        &self.0.snapshots
    }

    pub(crate) fn checkpoints(&self) -> &Checkpoints {
        &self.0.checkpoints
    }

    /// Prepares workers for children of a checkpoint, until there are `count`.
    ///
    /// # Errors
    /// When there is no such checkpoint, or no room.
    pub(crate) fn prepare(&self, checkpoint: &str, count: usize, cancel: &Cancel) -> Result<usize, FleetError> {
        let _busy = self.0.busy.read();
        // There is no use for more.
        if count > MAX_CHILDREN {
            return Err(FleetError::Count { count });
        }
        let checkpoint = self.0.checkpoints.get(checkpoint)?;
        let shape = &checkpoint.about().shape;
        check_room(count, Needs::of_worker(&shape.config)).map_err(|source| FleetError::Room { count, source })?;
        self.0.pool.prepare(shape, count, || self.check(0, count, cancel))
    }

    /// Forks a VM, in whatever process it is, into children of one instant.
    ///
    /// # Errors
    /// When there is no such VM, or a child cannot be made: then there is none (I13). The parent
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
        // Before the parent is paused: a refused request costs it nothing.
        let claims = self.claim(vm, request, cancel)?;
        let _making = self.0.making(&claims);
        let claimed = Instant::now();
        let checkpoint = Checkpoint::take(&self.0.dir, vm, &|| self.check(0, request.count, cancel))?;
        drop(fetch);
        tracing::debug!(vm, claim = ?claimed - begun, checkpoint = ?claimed.elapsed(), "fork");
        let made = self.start_children(&checkpoint, claims, request, cancel)?;
        let answer = checkpoint.answer(made, begun.elapsed());
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
        let checkpoint = self.0.checkpoints.get(name)?;
        let claims = self.claim(name, request, cancel)?;
        let _making = self.0.making(&claims);
        let made = self.start_children(&checkpoint, claims, request, cancel)?;
        let answer = checkpoint.answer(made, begun.elapsed());
        self.0.events.forked(name, &answer.children, answer.pause_us);
        Ok(answer)
    }

    fn claim(&self, stem: &str, request: &ForkRequest, cancel: &Cancel) -> Result<Vec<NameClaim>, FleetError> {
        check_names(request.count, request.name.as_deref())?;
        // Each name and each process is a descriptor here. What else they need is known when the image is.
        let (count, needs) = (request.count, Needs { descriptors: 4, threads: 1, mappings: 0 });
        check_room(count, needs).map_err(|source| FleetError::Room { count, source })?;
        let identity = request.identity();
        let wanted = Children { count: request.count, pattern: request.name.as_deref(), identity: &identity };
        let listed = self.0.processes.names();
        let check = || self.check(0, request.count, cancel);
        claim_names(&self.0.dir, stem, &wanted, |name| listed.contains(name), check)
    }

    fn start_children(
        &self,
        checkpoint: &Checkpoint,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<Made>, FleetError> {
        let count = claims.len();
        let About { shape, identity, bounds, .. } = checkpoint.about();
        check_room(count, Needs::of_worker(&shape.config)).map_err(|source| FleetError::Room { count, source })?;
        let choice = request.identity();
        let labels = request.labels.as_ref().unwrap_or_else(|| checkpoint.labels());
        // While any is made: a worker is told of directories that are there.
        let _overlays = self.0.overlays.hold(&shape.written())?;
        claims.iter().for_each(|claim| self.0.forget_earlier(&claim.name));
        let order = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::child(&shape.config, identity, &claim.name, &choice).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&shape.written())?;
            let start = Start { shape, parent: Some(checkpoint.vm()), bounds: *bounds, pid: worker.pid() };
            let (mut hand, handed) = Hand::make(claim, start, overlays, ends, &self.0.broker)?;
            let order = ForkOrder {
                name: claim.name.clone(),
                shape: Some(shape.clone()),
                handed: Some(handed),
                parent: Some(checkpoint.vm().to_owned()),
                identity: choice.clone(),
                paused: request.paused,
                labels: labels.clone(),
            };
            worker.fork(order, &hand.files(claim), checkpoint.parts())?;
            hand.sent();
            Ok(hand)
        };
        let ground = Ground { enter: self.0.place.of_child(shape), bounds: *bounds };
        let made = self.make(Some(shape), &ground, &claims, order, |made| self.check(made, count, cancel))?;
        claims.into_iter().for_each(NameClaim::leave);
        Ok(made)
    }

    /// Boots a VM.
    ///
    /// # Errors
    /// When the name is taken, or the VM cannot be made.
    pub(crate) fn boot(&self, request: BootRequest, cancel: &Cancel) -> Result<Made, FleetError> {
        let _busy = self.0.busy.read();
        let BootRequest { name, mut config, kernel, initrd, cmdline, labels, limits } = request;
        let bounds = self.bounds(limits)?;
        let claim = NameClaim::new(&self.0.dir, &name)?;
        check_room(1, Needs::of_worker(&config)).map_err(|source| FleetError::Room { count: 1, source })?;
        config.check_devices().map_err(VmError::from)?;
        config.check_queues().map_err(VmError::from)?;
        let shape = Shape::of_boot(&config);
        // The writes of a disk that keeps no journal. Others are made beside the image.
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
        let give = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::boot(&config).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&written)?;
            let start = Start { shape: &shape, parent: None, bounds, pid: worker.pid() };
            let (mut hand, handed) = Hand::make(claim, start, overlays, ends, &self.0.broker)?;
            let (kernel, initrd, cmdline) = (kernel.clone(), initrd.clone(), cmdline.clone());
            let (name, config, labels) = (claim.name.clone(), config.clone(), labels.clone());
            let order = BootOrder { name, handed, config, kernel, initrd, cmdline, labels };
            worker.order(&Order::Boot(Box::new(order)), &hand.files(claim))?;
            hand.sent();
            Ok(hand.booted())
        };
        let made = self.make(None, &ground, &claims, give, |made| self.check(made, 1, cancel))?;
        claims.into_iter().for_each(NameClaim::leave);
        made.iter().for_each(|vm| self.0.events.booted(&vm.name));
        made.into_iter().next().ok_or(FleetError::Ending)
    }

    /// Has a worker for each claim make its VM, as `order` says, and then all run. The claims must
    /// outlive this when it fails: names are free when nothing uses them any more.
    fn make(
        &self,
        shape: Option<&Shape>,
        ground: &Ground,
        claims: &[NameClaim],
        order: impl Fn(&Worker, &NameClaim) -> Result<Hand, FleetError>,
        check: impl Fn(usize) -> Result<(), FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        let prepared = shape.map_or_else(Vec::new, |shape| self.0.pool.take(shape, claims.len()));
        let were_prepared = !prepared.is_empty();
        match self.make_with(prepared, ground, claims, &order, &check) {
            // One that was prepared may have died meanwhile. Others have no such excuse.
            Err(FleetError::Worker { source }) if were_prepared => {
                tracing::info!(error = %source, "a prepared worker has failed, and others are taken");
                self.make_with(Vec::new(), ground, claims, &order, &check)
            }
            made => made,
        }
    }

    fn make_with(
        &self,
        prepared: Vec<Worker>,
        ground: &Ground,
        claims: &[NameClaim],
        order: impl Fn(&Worker, &NameClaim) -> Result<Hand, FleetError>,
        check: impl Fn(usize) -> Result<(), FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        let begun = Instant::now();
        let count = prepared.len();
        let mut workers = Workers(self.0.zygote.workers(claims.len() - count)?);
        // The prepared ones first: they are the first to be done.
        workers.0.splice(..0, prepared);
        // In its group before it is told anything, as far as that goes.
        let settle = |worker: &Worker, claim: &NameClaim, is_prepared: bool| {
            let group = self.0.group_for(worker, &claim.name, ground)?;
            if !is_prepared {
                worker.enter(ground.enter.clone())?;
            }
            Ok::<_, FleetError>(group)
        };
        let ours = workers.0.iter().zip(claims).enumerate();
        let groups = ours.map(|(at, (worker, claim))| settle(worker, claim, at < count));
        let mut groups: Vec<Option<Group>> = groups.collect::<Result<_, _>>()?;
        let have_workers = Instant::now();
        let mut hands = Vec::with_capacity(claims.len());
        for (at, claim) in claims.iter().enumerate() {
            check(0)?;
            let hand = match order(&workers.0[at], claim) {
                // One that was prepared may have died meanwhile. Another has no such excuse.
                Err(FleetError::Worker { .. } | FleetError::Transfer(_)) => {
                    workers.0[at] = self.0.zygote.workers(1)?.pop().ok_or(FleetError::Ending)?;
                    groups[at] = settle(&workers.0[at], claim, false)?;
                    order(&workers.0[at], claim)
                }
                other => other,
            };
            hands.push(hand?);
        }
        // All of them, or none of the VMs runs.
        let interfaces = || claims.iter().zip(&hands).map(|(claim, hand)| hand.interfaces(&claim.name)).collect();
        let up = self.0.net_hook.as_ref().map(|hook| hook.up(interfaces())).transpose()?;
        // Before they run: one may end at once.
        let pids: Vec<u32> = workers.0.iter().map(Worker::pid).collect();
        for (((worker, claim), hand), group) in workers.0.iter().zip(claims).zip(&hands).zip(groups) {
            let process = worker.pidfd()?.ok_or(FleetError::Ending)?;
            self.0.processes.add([(worker.pid(), hand.own_vm(&claim.name, process, group))]);
        }
        let ordered = Instant::now();
        let made = workers.run_together(check).inspect_err(|_| {
            pids.iter().for_each(|pid| drop(self.0.processes.remove(*pid)));
        })?;
        hands.into_iter().for_each(Hand::keep);
        up.into_iter().for_each(Up::keep);
        let (workers, orders) = (have_workers - begun, ordered - have_workers);
        tracing::debug!(count = claims.len(), ?workers, ?orders, run = ?ordered.elapsed(), "made");
        Ok(made)
    }

    /// What a VM may take, if that is asked for and can be enforced.
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

    /// The supervisor in numbers.
    pub(crate) fn info(&self) -> SupervisorInfo {
        SupervisorInfo {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            dir: self.0.dir.path().to_owned(),
            vms: self.0.processes.names().len(),
            checkpoints: self.0.checkpoints.len(),
            prepared: self.0.pool.len(),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.dir.path()
    }
}

/// Where a worker is, and what it may take.
struct Ground {
    enter: EnterOrder,
    bounds: Bounds,
}

/// VMs that are being made, until this is dropped.
#[derive(Debug)]
struct Making<'a> {
    of: &'a Inner,
    names: Vec<String>,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let mut making = self.of.making.lock().unwrap_or_else(PoisonError::into_inner);
        making.retain(|name| !self.names.contains(name));
    }
}

/// Clears up after workers that have ended.
fn watch_ends(exits: &Receiver<Exit>, supervisor: &Weak<Inner>) {
    let mut due = Instant::now() + SWEEP_INTERVAL;
    // Found dead by the last sweep, and nobody had said so.
    let mut suspects = BTreeSet::new();
    // What is there already.
    if let Some(inner) = supervisor.upgrade() {
        inner.observe();
    }
    loop {
        let exit = match exits.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(exit) => Some(exit),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Some(inner) = supervisor.upgrade() else { return };
        if let Some(exit) = exit {
            inner.ended(exit);
        }
        // However many ends come.
        if Instant::now() >= due {
            suspects = inner.sweep(&suspects);
            inner.observe();
            due = Instant::now() + SWEEP_INTERVAL;
        }
    }
}

impl Inner {
    fn serve(&self, server: impl Future<Output = ()> + Send + 'static) {
        let server = self.runtime.spawn(server);
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).push(server);
    }

    /// The group of a VM that is being made, with its worker in it.
    fn group_for(&self, worker: &Worker, name: &str, ground: &Ground) -> Result<Option<Group>, FleetError> {
        let Some(groups) = &self.cgroups else { return Ok(None) };
        let group = groups.make(name, ground.bounds, ground.enter.ram)?;
        // The number is the worker's while its descriptor says that it is there.
        let pidfd = worker.pidfd()?.filter(|pidfd| !has_ended(pidfd, Duration::ZERO));
        let Some(_pidfd) = pidfd else {
            return Err(FleetError::Worker { source: std::io::ErrorKind::BrokenPipe.into() });
        };
        group.enter(worker.pid())?;
        Ok(Some(group))
    }

    fn ends(&self) -> MutexGuard<'_, ()> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that VMs are being made, until that is dropped.
    fn making(&self, claims: &[NameClaim]) -> Making<'_> {
        let names: Vec<String> = claims.iter().map(|claim| claim.name.clone()).collect();
        self.making.lock().unwrap_or_else(PoisonError::into_inner).extend(names.iter().cloned());
        Making { of: self, names }
    }

    /// Names of VMs that are this supervisor's to announce.
    fn own_names(&self) -> BTreeSet<String> {
        let mut names = self.making.lock().unwrap_or_else(PoisonError::into_inner).clone();
        names.extend(self.processes.names());
        names
    }

    fn ended(&self, exit: Exit) {
        let _ends = self.ends();
        let Some(vm) = self.processes.remove(exit.pid) else { return };
        let name = vm.name.clone();
        let exceeded = vm.group.as_ref().and_then(|group| group.exceeded());
        vm.group.iter().for_each(|group| group.remove());
        tracing::info!(name, pid = exit.pid, signal = exit.signal, code = exit.code, "a VM's process has ended");
        // Its name is another's by now, or free.
        if !vm.has_name() {
            return self.say_ended(&name);
        }
        // By itself, or by a signal that it has heard, or because it did not stop as asked.
        let in_order = exit.signal.is_none() && matches!(exit.code, Some(0..=2 | 129 | 130 | 143));
        let mut was_orderly = in_order || vm.is_stopped;
        if let Some(mib) = exceeded.filter(|_| !was_orderly) {
            tracing::warn!(name, mib, "a VM's process was killed: it took more memory than its limit");
            record_end(&self.dir, &name, exit, StopReason::OverLimit { mib });
            was_orderly = true;
        }
        // Its files are there. The lock went with it, unless another has the name by now: or this
        // process, which has not left it to the VM yet.
        match NameClaim::new(&self.dir, &name) {
            Ok(claim) => self.clear_up(claim, exit, was_orderly),
            Err(FleetError::Taken { .. }) => self.unsettled().push((name.clone(), exit, was_orderly)),
            Err(error) => tracing::warn!(%error, name, "what a VM has left stays for now"),
        }
        self.say_ended(&name);
    }

    /// Images of disks that VMs of this directory use, or checkpoints.
    fn used_images(&self) -> BTreeSet<PathBuf> {
        let of_vms = About::all(&self.dir).unwrap_or_default();
        let configs = of_vms.into_iter().map(|(_, about)| about.shape.config).chain(self.checkpoints.configs());
        configs.flat_map(|config| config.disks).map(|disk| disk.disk.path).collect()
    }

    fn unsettled(&self) -> MutexGuard<'_, Vec<(String, Exit, bool)>> {
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clears up after VMs whose names were taken when they ended.
    fn settle(&self) {
        let ended = std::mem::take(&mut *self.unsettled());
        for (name, exit, was_orderly) in ended {
            // Another VM has the name, or somebody has cleared up.
            let is_gone = !matches!(About::read(&self.dir, &name), Ok(Some(_)));
            if is_gone || self.processes.of(&name).is_some() {
                continue;
            }
            if let Ok(claim) = NameClaim::new(&self.dir, &name) {
                self.clear_up(claim, exit, was_orderly);
            }
        }
    }

    /// Records the end of a VM, and removes its files.
    fn clear_up(&self, claim: NameClaim, exit: Exit, was_orderly: bool) {
        self.snapshots.forget(&claim.name);
        let name = claim.name.clone();
        if let Some(about) = clear_up(claim, exit, was_orderly) {
            self.left(&name, &about);
        }
    }

    /// Forgets an earlier VM of a name that is claimed: it died, and nobody has cleared up.
    fn forget_earlier(&self, name: &str) {
        self.snapshots.forget(name);
        if let Ok(Some(about)) = About::read(&self.dir, name) {
            about.remove_sockets();
            self.left(name, &about);
        }
    }

    /// A VM has ended: what it had outside of the runtime directory goes.
    fn left(&self, name: &str, about: &About) {
        self.overlays.release(&about.overlays);
        self.net_hook.iter().for_each(|hook| hook.down(about.interfaces(name)));
    }

    /// Says that a VM has ended, unless another has its name by now.
    fn say_ended(&self, name: &str) {
        if self.processes.of(name).is_none() {
            self.events.ended(name, recorded_reason(&self.dir, name).as_deref());
        }
    }

    /// Says what VMs of other processes are there, and what has ended without a report.
    fn observe(&self) {
        self.events.zygote_restarts(self.zygote.restarts());
        // Before and after: one may be made, or fail, while the directory is read.
        let mut ours = self.own_names();
        match vm_names(&self.dir) {
            Ok(there) => {
                ours.extend(self.own_names());
                self.events.observe(&there, |name| ours.contains(name), |name| recorded_reason(&self.dir, name));
            }
            Err(error) => tracing::warn!(%error, "the directory cannot be read"),
        }
    }

    /// Clears up after processes whose end nobody has reported: a zygote that was killed reaps no
    /// workers, and VMs of other processes of the directory are no workers. Returns those of workers
    /// whose end may still be reported: they are cleared up if they are among the `suspects` of the
    /// next sweep.
    fn sweep(&self, suspects: &BTreeSet<String>) -> BTreeSet<String> {
        let _ends = self.ends();
        self.settle();
        let mut found = BTreeSet::new();
        let dead = match NameClaim::of_the_dead(&self.dir) {
            Ok(dead) => dead,
            Err(error) => {
                tracing::warn!(%error, "what dead processes have left stays");
                return found;
            }
        };
        for (claim, pid) in dead {
            // Not under the lock: clearing up takes time.
            let worker = self.processes.of(&claim.name).map(|(pid, _)| pid);
            if let Some(pid) = worker.filter(|pid| self.processes.is_there(*pid)) {
                // Its process waits until it may give its disks what was written since a fork. Or it
                // does not end, as one does that was broken into.
                self.processes.give_back(pid);
                self.clear_up(claim, Exit { pid, signal: None, code: None }, true);
                continue;
            }
            if worker.is_some() && !suspects.contains(&claim.name) {
                found.insert(claim.name.clone());
                claim.leave();
                continue;
            }
            // What the lock says, its owner has written.
            let pid = worker.unwrap_or(pid);
            tracing::info!(name = claim.name, pid, "a VM's process has ended, and nobody has said so");
            self.clear_up(claim, Exit { pid, signal: None, code: None }, false);
            worker.map(|pid| self.processes.remove(pid));
        }
        // Those that have ended in an orderly way under a zygote that was killed.
        self.processes.forget_ended(|name| found.contains(name));
        self.cgroups.iter().for_each(Cgroups::tidy);
        let used = OnceCell::new();
        self.processes.kill_overdue(|image| used.get_or_init(|| self.used_images()).contains(image));
        found
    }
}
