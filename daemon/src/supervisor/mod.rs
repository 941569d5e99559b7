//! The supervisor: names, checkpoints and forks of the VMs of a runtime directory, each VM in a
//! worker of its own.
//!
//! It never maps guest memory. What it knows of VMs it asks their processes, through the runtime
//! directory. So one that comes back after its end finds all VMs, and one that ends takes none
//! with it: only its checkpoints go.
//!
//! | file | what |
//! |---|---|
//! | `make` | children and booted VMs, all of a request or none |
//! | `ends` | what has ended is noticed, and cleared up |
//! | `checkpoint` | images that are held, to fork from |
//! | `about` | what is known of a VM, whatever its process says |
//! | `hand` | what a worker may reach, and what it is handed |
//! | `cgroups` | what the processes of VMs may take of the host |
//! | `net_hook` | the program that connects interfaces to the host's network |
//! | `records` | flight records of VMs that another supervisor has started |
//! | `processes` | the processes of its VMs, and the end of those that do not end |
//! | `fetches` | how much of the supervisor one VM may take |
//! | `overlays` | directories for the writes of confined VMs' disks |
//! | `broker` | guests' connections to the host |
//! | `suspend` | VMs that give their memory back until they are needed |
//! | `snapshots` | snapshots of VMs whose processes may not write files |
//! | `events` | what happens, for those who follow it |
//! | `idle` | VMs that are suspended when they do nothing |
//! | `idempotency` | requests that are sent again |
//! | `openapi` | the description of the HTTP API |
//! | `metrics` | numbers for Prometheus |
//! | `page` | the page of a browser: its files, and what all answers over TCP have |
//! | `pool` | workers that are prepared before they are asked for |
//! | `proxy` | requests that are passed on to a VM's process |
//! | `ready` | guests that are told that their VMs are others |
//! | `restore` | VMs from snapshots |
//! | `server` | the HTTP API |

mod about;
mod broker;
mod cgroups;
mod checkpoint;
mod ends;
mod events;
mod fetches;
mod hand;
mod idempotency;
mod idle;
mod make;
mod metrics;
mod net_hook;
mod openapi;
mod overlays;
mod page;
mod pool;
mod processes;
mod proxy;
mod ready;
mod records;
mod restore;
mod server;
mod snapshots;
mod suspend;

pub use server::{TcpError, described};

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::control::{ApiError, CheckpointInfo, ProblemKind, StopAnswer, SupervisorInfo, VmInfo};
use crate::fleet::{
    Cancel, CancelReason, FleetError, MAX_CHILDREN, NameClaim, Needs, RuntimeDir, SupervisorClaim, check_room,
};
use crate::flight::FlightEvent;
use crate::image::give_broker;
use crate::jail::Confinement;
use crate::worker::has_ended;
use crate::zygote::{Exit, Zygote};
use clade_vmm::vm::StopReason;

use about::About;
pub(crate) use about::{clear_up, vsock_known};
pub use about::{in_session, is_in_session, settle_dead, vms_in};
use broker::Broker;
use cgroups::Cgroups;
pub use cgroups::{CgroupError, CgroupPlace};
use checkpoint::{Checkpoint, Checkpoints};
use events::Events;
pub(crate) use fetches::Fetch;
use fetches::{Fetches, Passing};
use hand::Place;
use idempotency::Keys;
use idle::Idle;
pub use net_hook::HookError;
use net_hook::NetHook;
use overlays::OverlayDirs;
use pool::Pool;
pub use processes::COMMIT_TIMEOUT;
use processes::{Processes, kill};
use records::Records;
use snapshots::Snapshots;

/// Clients that are given metrics at a time.
const MAX_SCRAPES: usize = 4;

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
    /// Memory that a child of a checkpoint may have copies of before it writes there, in MiB, if its
    /// request says nothing. 0 for none.
    pub ahead_mib: u32,
    /// The session whose VMs end with this process, however that ends.
    pub session: Option<String>,
}

/// What the VMs of a session end with.
#[derive(Debug)]
struct Tie {
    session: String,
    /// A pidfd of this process.
    process: OwnedFd,
}

impl Tie {
    fn new(session: String) -> io::Result<Self> {
        Ok(Self { session, process: pidfd_open(getpid(), PidfdFlags::empty())? })
    }
}

/// The supervisor of a runtime directory. A clone is a handle to the same one.
#[derive(Clone, Debug)]
pub struct Supervisor(Arc<Inner>);

/// Why a VM's process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kill {
    /// It does not answer.
    Silent,
    /// A request wants no answer of it.
    AtOnce,
}

/// A VM that has ended while its name was taken.
#[derive(Debug)]
struct Unsettled {
    name: String,
    exit: Exit,
    was_orderly: bool,
    flight: Vec<FlightEvent>,
}

#[derive(Debug)]
struct Inner {
    dir: RuntimeDir,
    place: Place,
    overlays: OverlayDirs,
    broker: Broker,
    /// None if VMs have no control groups.
    cgroups: Option<Cgroups>,
    net_hook: Option<NetHook>,
    /// See [`SupervisorOptions::ahead_mib`].
    ahead_mib: u32,
    zygote: Arc<Zygote>,
    /// A session, and this process, which its VMs end with.
    tie: Option<Tie>,
    pool: Pool,
    checkpoints: Checkpoints,
    snapshots: Snapshots,
    events: Arc<Events>,
    keys: Arc<Keys>,
    idle: Idle,
    /// VMs whose workers were started here.
    processes: Processes,
    records: Arc<Records>,
    /// Names of VMs that are being made: they have files, and their making is not announced yet.
    making: Mutex<BTreeSet<String>>,
    /// Held while a VM's end is settled: whoever has been told that a name is free finds it free.
    ends: Mutex<()>,
    fetches: Fetches,
    passing: Passing,
    /// Metrics are gathered for so many clients at a time: each takes memory for all VMs' answers.
    scrapes: Semaphore,
    /// VMs that have ended while their names were taken.
    unsettled: Mutex<Vec<Unsettled>>,
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
    /// Supervises the runtime directory `dir`, as `options` say: answers at its socket, on `runtime`.
    ///
    /// # Errors
    /// When another process supervises it, or the zygote cannot be started. When there are to be control
    /// groups, and they cannot be had.
    pub fn start(dir: &Path, options: &SupervisorOptions, runtime: &Handle) -> Result<Self, FleetError> {
        let SupervisorOptions { pool, confinement, ref cgroup, ref net_hook, ahead_mib, ref session } = *options;
        let dir = RuntimeDir::create(dir)?;
        let (claim, socket) = SupervisorClaim::new(&dir)?;
        // Before there is another process.
        let cgroups = Cgroups::open(cgroup)?;
        let net_hook = net_hook.as_deref().map(NetHook::new).transpose()?;
        let (sender, exits) = mpsc::channel();
        let failed = |source| FleetError::Worker { source };
        let tie = session.clone().map(Tie::new).transpose().map_err(failed)?;
        // One that ends with its VMs has few of them.
        let zygote = Arc::new(Zygote::start(sender, confinement, session.is_none())?);
        let place = Place { dir: dir.path().to_owned(), confinement };
        let overlays = OverlayDirs::default();
        let broker = Broker::start().map_err(failed)?;
        // VMs of a supervisor that has ended.
        let mut found = Vec::new();
        for (name, about) in About::all(&dir)? {
            overlays.found(&about.overlays);
            found.extend(about.process.map(|process| (name.clone(), process)));
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
            ahead_mib,
            zygote,
            tie,
            place,
            overlays,
            dir,
            checkpoints: Checkpoints::default(),
            snapshots: Snapshots::default(),
            events: Arc::default(),
            keys: Arc::default(),
            idle: Idle::default(),
            processes: Processes::default(),
            records: Arc::default(),
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
            .spawn(move || ends::watch(&exits, &weak))
            .map_err(failed)?;
        if !found.is_empty() {
            let (records, dir) = (Arc::clone(&supervisor.0.records), supervisor.0.dir.path().to_owned());
            let fetch = move || records.fetch(&dir, &found);
            thread::Builder::new().name("clade-records".to_owned()).spawn(fetch).map_err(failed)?;
        }
        supervisor.0.serve(server::serve(socket, supervisor.clone(), supervisor.0.ending.subscribe()));
        Ok(supervisor)
    }

    /// Ends it: no request is taken any more, and prepared workers go. VMs run on. Those of its own
    /// session end with this process: see [`Self::wait_for_disks`].
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
        // Those that are under way are cancelled, and leave nothing.
        drop(self.0.busy.write());
        // Then their answers are sent. Without a receiver there is nobody to tell.
        let _ = self.0.ending.send(true);
        let servers = std::mem::take(&mut *self.0.servers.lock().unwrap_or_else(PoisonError::into_inner));
        for server in servers {
            // It ends when all that was asked is answered, within 10 s; a panic of it is logged by the runtime.
            let _ = self.0.runtime.block_on(server);
        }
        self.0.pool.close();
        self.0.checkpoints.clear();
        // Last: another may supervise the directory from here on.
        drop(self.0.claim.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Waits until all VMs of its own session that have ended have given their disks what was written
    /// since a fork, for `limit` at most. Returns whether they have: those that have not lose what
    /// their guests have not flushed, as soon as this process ends.
    ///
    /// After [`Self::close`]: a checkpoint keeps the disks as they are.
    pub fn wait_for_disks(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let process = |name: &str| About::read(&self.0.dir, name).ok().flatten()?.process;
        let writers = self.0.processes.writers(|name, pid| process(name).is_some_and(|its| its.pid() == pid));
        writers.iter().all(|process| has_ended(process, deadline.saturating_duration_since(Instant::now())))
    }

    /// The process that a VM of `session` ends with.
    fn tie(&self, session: Option<&str>) -> Option<&OwnedFd> {
        self.0.tie.as_ref().filter(|tie| Some(&*tie.session) == session).map(|tie| &tie.process)
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
            self.0.clear_up(claim, Exit { pid, ..exit }, true, Vec::new());
        }
    }

    /// Whether a VM loses nothing when its process is killed: it was started here, and none of its disks
    /// is written.
    ///
    /// # Errors
    /// When the record of the VM cannot be read.
    fn may_kill(&self, name: &str) -> Result<bool, FleetError> {
        let about = About::read(&self.0.dir, name)?;
        let is_ours = self.0.processes.of(name).is_some();
        Ok(is_ours && about.is_some_and(|about| about.shape.written().is_empty()))
    }

    /// Sends SIGKILL to a VM's process that was started here.
    fn send_kill(&self, name: &str) {
        if let Some((pid, vm)) = self.0.processes.of(name) {
            self.0.processes.mark_stopped(pid);
            // One that has ended is not there to be killed.
            let _ = pidfd_send_signal(&vm.process, Signal::KILL);
        }
    }

    /// Ends a VM by killing its process.
    ///
    /// # Errors
    /// When it is not known which process that is, or it does not end.
    fn kill(&self, name: &str, why: Kill) -> Result<StopAnswer, FleetError> {
        let silent = |text: &str| FleetError::Refused {
            kind: ProblemKind::VmSilent,
            text: format!("the process of {name:?} does not answer{text}"),
        };
        let about = About::read(&self.0.dir, name)?.ok_or_else(|| silent(", and is not the supervisor's to kill"))?;
        let own = self.0.processes.of(name).map(|(pid, vm)| (pid, vm.process));
        let found = || Some((about.process?.pid(), Arc::new(about.process?.open()?)));
        let (pid, process) = own.or_else(found).ok_or_else(|| silent(", and has ended meanwhile"))?;
        if why == Kill::Silent {
            tracing::warn!(name, pid, "a VM that is to stop does not answer: its process is killed");
        }
        self.0.processes.mark_stopped(pid);
        if !kill(&process) {
            return Err(silent(", and does not end though it was killed"));
        }
        let _ends = self.0.ends();
        self.0.processes.give_back(pid);
        let exit = Exit { pid, signal: Some(libc::SIGKILL), code: None };
        match NameClaim::new(&self.0.dir, name) {
            Ok(claim) => self.0.clear_up(claim, exit, true, Vec::new()),
            // Somebody else has cleared up, and another has the name.
            Err(FleetError::Taken { .. }) => {}
            Err(error) => return Err(error),
        }
        let config = &about.shape.config;
        let vm = match why {
            Kill::Silent => VmInfo::of_killed(name, exit, config),
            Kill::AtOnce => VmInfo::of_stopped(name, pid, StopReason::Requested, config),
        };
        Ok(StopAnswer { vm, shutdown: None, killed: why == Kill::Silent })
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
        check_room(count, Needs::of(&shape.config)).map_err(|source| FleetError::Room { count, source })?;
        self.0.pool.prepare(shape, count, || self.check(0, count, cancel))
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

impl Inner {
    fn serve(&self, server: impl Future<Output = ()> + Send + 'static) {
        let server = self.runtime.spawn(server);
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).push(server);
    }
}
