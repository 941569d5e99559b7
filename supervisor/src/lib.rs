//! The supervisor: names, checkpoints and forks of the VMs of a runtime directory, each VM in a
//! worker of its own.
//!
//! The supervisor never maps guest memory. It asks the processes of VMs for their state, through
//! the runtime directory. So a new supervisor finds all VMs, and the end of one ends no VM: only
//! its checkpoints go.
//!
//! | file | content |
//! |---|---|
//! | `launched_vm` | new VMs, as the supervisor has made them |
//! | `launch` | forks, restored and booted VMs, all of a request or none |
//! | `ends` | detection of ended processes, and their cleanup |
//! | `checkpoint` | the image of a VM, held for forks |
//! | `checkpoints` | checkpoints by name, in memory and on disk |
//! | `detach`, `copied_files` | copies of images that no VM's process can write |
//! | `vm_record` | the supervisor's own records of VMs |
//! | `worker_resources` | grants and descriptors of workers |
//! | `cgroups` | resource limits of VMs' processes |
//! | `kept` | the directory of checkpoints on disk, for later supervisors |
//! | `keep` | writing them there, with the changes since an earlier one |
//! | `host_link`, `recorded_link` | closed networks, enforced outside of VMs' processes |
//! | `net_hook` | the program that connects interfaces to the host's network |
//! | `flight_records` | flight records of VMs that another supervisor has started |
//! | `processes` | the processes of its VMs, and the end of those that do not end |
//! | `request_limiter` | limits on the supervisor's resources for each VM |
//! | `overlays` | directories for the writes of confined VMs' disks |
//! | `broker` | guests' connections to the host |
//! | `suspend` | suspension of VMs, until they are needed |
//! | `snapshots` | snapshots of VMs whose processes may not write files |
//! | `events` | the event stream |
//! | `idle` | suspension of idle VMs |
//! | `idempotency` | repeated requests |
//! | `openapi` | the description of the HTTP API |
//! | `metrics`, `exposition` | numbers for Prometheus, and their text format |
//! | `browser_page` | the browser's page: its files, and the headers of all answers over TCP |
//! | `pool` | workers prepared ahead of requests |
//! | `proxy` | requests forwarded to a VM's process |
//! | `priority` | real-time priority of a fork's threads |
//! | `reidentify` | identity of guests in new VMs, renewed by their agents |
//! | `ready_limiter` | permits of requests for ready VMs |
//! | `restore` | VMs from snapshots |
//! | `rollback` | VMs put back to a checkpoint of their line |
//! | `session` | VMs that end with a command |
//! | `signals` | default signals of other programs |
//! | `start` | the start of a supervisor, and its options |
//! | `stop` | the end of a VM with or without a supervisor |
//! | `server` | the HTTP API |
//! | `unsettled` | ended VMs whose names are taken |

#![deny(missing_docs)]

mod broker;
mod browser_page;
mod cgroups;
mod checkpoint;
mod checkpoints;
mod copied_files;
mod detach;
mod ends;
mod events;
mod exposition;
mod flight_records;
mod held_interfaces;
mod host_link;
mod idempotency;
mod idle;
mod keep;
mod kept;
mod kill;
mod launch;
mod launched_vm;
mod launching;
mod metrics;
mod net_hook;
mod openapi;
mod overlays;
mod pool;
mod priority;
mod processes;
mod proxy;
mod ready_limiter;
mod recorded_link;
mod reidentify;
mod request_limiter;
mod restore;
mod rollback;
mod server;
mod session;
mod signals;
mod snapshots;
mod start;
mod stop;
mod suspend;
mod unsettled;
mod vm_record;
mod worker_resources;

pub use server::{TcpError, TcpPort, described};

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use std::{iter, thread};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use broker::Broker;
pub use cgroups::CgroupPlace;
use cgroups::Cgroups;
use checkpoint::ImagesInUse;
use checkpoints::Checkpoints;
use clade_api::http::{ApiError, Cancel, Changes, LAST_ANSWERS_OF_ALL};
use clade_api::{CancelReason, DaemonError, MAX_CHILDREN, MergingVm, RuntimeDir, SupervisorClaim, SupervisorInfo};
use clade_vmm::vm::VmConfig;
use clade_worker::host_limits::{ResourceDemand, check_host_limits};
use clade_worker::zygote::Zygote;
use copied_files::CopiedFiles;
pub use ends::settle_dead;
use events::Events;
use flight_records::Records;
use held_interfaces::HeldInterfaces;
use idempotency::Keys;
use idle::Idle;
pub use idle::used_ticks;
use kept::{KeptDir, KeptLines};
use launching::Launching;
use net_hook::NetHook;
use overlays::OverlayDirs;
use pool::Pool;
use priority::Priority;
pub use processes::COMMIT_TIMEOUT;
use processes::{OwnVm, Processes};
use ready_limiter::ReadyLimiter;
pub(crate) use request_limiter::ImagePermit;
use request_limiter::{ForwardLimiter, ImageRequestLimiter, NetworkChanges};
use server::InProcessRequests;
use snapshots::Snapshots;
pub use start::SupervisorOptions;
pub use stop::{agent_socket, stop};
use suspend::AwaitedWakes;
use unsettled::UnsettledEnds;
use vm_record::VmRecord;
pub use vm_record::{in_session, is_in_session, vms_in};
use worker_resources::SandboxProfile;

/// Metrics clients at a time.
const MAX_SCRAPES: usize = 4;
/// The first and the longest interval of the checks for the end of a process.
const MIN_INTERVAL: Duration = Duration::from_millis(5);
const MAX_INTERVAL: Duration = Duration::from_millis(200);

/// The supervisor of a runtime directory. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Supervisor(Arc<Inner>);

/// Returns the intervals of the checks for the end of a process.
fn intervals() -> impl Iterator<Item = Duration> {
    iter::successors(Some(MIN_INTERVAL), |last| Some((2 * *last).min(MAX_INTERVAL)))
}

#[derive(Debug)]
struct Inner {
    dir: RuntimeDir,
    sandbox: SandboxProfile,
    overlays: OverlayDirs,
    broker: Broker,
    /// None if VMs have no control groups.
    cgroups: Option<Cgroups>,
    net_hook: Option<NetHook>,
    /// See [`SupervisorOptions::ahead_mib`].
    ahead_mib: u32,
    until_idle: bool,
    zygote: Arc<Zygote>,
    pool: Pool,
    priority: Priority,
    checkpoints: Checkpoints,
    /// The files of detached checkpoints.
    copied_files: CopiedFiles,
    /// The directory of kept checkpoints, or the reason why it cannot be used.
    kept: Result<KeptDir, String>,
    kept_lines: KeptLines,
    images_in_use: ImagesInUse,
    snapshots: Snapshots,
    events: Arc<Events>,
    keys: Arc<Keys>,
    idle: Idle,
    awaited_wakes: Arc<AwaitedWakes>,
    /// VMs whose workers were started here.
    processes: Processes,
    interfaces: HeldInterfaces,
    records: Arc<Records>,
    launching: Launching,
    /// Held while a VM's end is settled: a name that was reported free is free.
    ends: Mutex<()>,
    image_requests: ImageRequestLimiter,
    forwarded_requests: ForwardLimiter,
    network_changes: NetworkChanges,
    /// Closed VMs that have ended while their processes have not.
    closed: Mutex<Vec<(String, VmRecord)>>,
    /// Metrics clients at a time: each takes memory for all VMs' answers.
    scrapes: Semaphore,
    /// Of guests that renew their identity.
    ready_limiter: ReadyLimiter,
    /// Made VMs that no answer has named yet.
    pending_vms: Arc<Changes>,
    /// VMs that have ended while their names were taken.
    unsettled: UnsettledEnds,
    closing: AtomicBool,
    /// Shared by requests that make VMs, and taken alone at the end.
    busy: RwLock<()>,
    last_request: Mutex<Instant>,
    requests: Arc<metrics::Requests>,
    in_process: InProcessRequests,
    ending: watch::Sender<bool>,
    runtime: Handle,
    /// The tasks that serve the socket, and the port if there is one.
    servers: Mutex<Vec<JoinHandle<()>>>,
    /// None after the end.
    claim: Mutex<Option<SupervisorClaim>>,
}

impl Supervisor {
    /// Ends the supervisor: it accepts no more requests, and prepared workers go. VMs run on.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
        self.0.ready_limiter.close();
        // Open requests are cancelled, and leave nothing.
        drop(self.0.busy.write());
        // Then their answers are sent. Without a receiver no server is left.
        let _ = self.0.ending.send(true);
        let servers = std::mem::take(&mut *self.0.servers.lock().unwrap_or_else(PoisonError::into_inner));
        // All requests are answered within 10 s; the runtime logs panics of servers.
        let ended = async {
            for server in servers {
                let _ = server.await;
            }
        };
        self.0.runtime.block_on(async { tokio::join!(ended, self.0.in_process.close()) });
        // Work whose request was dropped meanwhile, and then the ends of its VMs.
        drop(self.0.busy.write());
        let pending = async { timeout(LAST_ANSWERS_OF_ALL, self.0.pending_vms.ended()).await };
        if self.0.runtime.block_on(pending).is_err() {
            tracing::warn!("new VMs of requests that were cut off have not ended in time");
        }
        self.0.pool.close();
        self.0.checkpoints.clear();
        self.0.kept.iter().for_each(KeptDir::release);
        // Last: another supervisor may start from here on.
        drop(self.0.claim.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Takes no more requests if the supervisor has no VM, no checkpoint that ends with it, and no request
    /// for either, and had no request that changes something within `time`. Returns whether that is so; the caller
    /// then closes it.
    #[must_use]
    pub fn ends_if_idle(&self, time: Duration) -> bool {
        let is_recent = || self.0.last_request.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < time;
        if is_recent() {
            return false;
        }
        let no_vm = self.0.processes.is_empty() && vms_in(self.dir()).is_ok_and(|vms| vms.is_empty());
        if !(no_vm && self.0.checkpoints.unkept() == 0 && self.0.busy.try_write().is_ok()) {
            return false;
        }
        self.0.closing.store(true, Ordering::SeqCst);
        // After the mark: a request that has not seen it is seen here, and one that may have been promised that
        // the supervisor goes on is obeyed.
        let goes_on = is_recent();
        if goes_on {
            self.0.closing.store(false, Ordering::SeqCst);
        }
        !goes_on
    }

    /// Waits while an ended VM merges its writes into a disk of `config`: its process has the image
    /// locked. A VM that waits for others in turn is not waited for.
    ///
    /// # Errors
    /// When the request is cancelled.
    fn wait_for_writers(&self, config: &VmConfig, cancel: &Cancel) -> Result<(), DaemonError> {
        let images: BTreeSet<_> = config.disks.iter().map(|disk| disk.disk.path.clone()).collect();
        let writes = || self.0.ended_writers().iter().any(|vm| vm.writes_to(&images));
        // Each look reads the records of all VMs, and a writer may take minutes.
        for interval in intervals() {
            if !writes() || !self.0.used_images()?.is_disjoint(&images) {
                break;
            }
            self.check(0, 1, cancel)?;
            thread::sleep(interval);
        }
        Ok(())
    }

    /// Returns the ended VMs whose processes have yet to merge the writes since a fork into their
    /// disks.
    fn merging(&self) -> Vec<MergingVm> {
        let ended = self.0.ended_writers();
        // Only shown: those of a VM whose record cannot be read are left out.
        let used = if ended.is_empty() { BTreeSet::new() } else { self.0.used_images().unwrap_or_default() };
        let failed = self.0.processes.unmerged();
        ended.into_iter().map(|vm| vm.merging(&used)).chain(failed).collect()
    }

    fn check(&self, made: usize, count: usize, cancel: &Cancel) -> Result<(), DaemonError> {
        let ending = self.0.closing.load(Ordering::Relaxed).then_some(CancelReason::Ending);
        let reason = cancel.reason().or(ending);
        reason.map_or(Ok(()), |reason| Err(DaemonError::Cancelled { made, count, reason }))
    }

    /// Waits for permission to request an image of `vm`.
    ///
    /// # Errors
    /// When the VM's process does not answer the current holders.
    pub(crate) async fn permit(&self, vm: &str) -> Result<ImagePermit, ApiError> {
        self.0.image_requests.begin(vm).await
    }

    /// Returns the pid of a VM's process, if it was started here.
    fn pid_of(&self, name: &str) -> Option<u32> {
        self.0.processes.of(name).map(|(pid, _)| pid)
    }

    /// Returns the process of a VM, and its pid: one that was started here, or that of its record. None
    /// without a record: then the word of the VM's process decides.
    fn known_process(&self, name: &str) -> Option<(u32, OwnVm)> {
        let recorded = || VmRecord::found(&self.0.dir, name)?.own_vm(name);
        self.0.processes.of(name).or_else(recorded)
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
    pub(crate) fn prepare(&self, checkpoint: &str, count: usize, cancel: &Cancel) -> Result<usize, DaemonError> {
        let _busy = self.0.busy.read();
        // More would be of no use.
        if count > MAX_CHILDREN {
            return Err(DaemonError::Count { count });
        }
        let checkpoint = self.checkpoint_of(checkpoint, cancel)?;
        let template = &checkpoint.vm_record().template;
        check_host_limits(count, ResourceDemand::of(&template.config))
            .map_err(|source| DaemonError::HostLimit { count, source })?;
        self.0.pool.prepare(template, count, || self.check(0, count, cancel))
    }

    /// Returns whether [`Self::info`] reads files: a thread for it costs more than the answer
    /// otherwise.
    pub(crate) fn reads_for_info(&self) -> bool {
        self.0.processes.has_writers()
    }

    /// Returns the supervisor's numbers.
    pub(crate) fn info(&self) -> SupervisorInfo {
        SupervisorInfo {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            dir: self.0.dir.path().to_owned(),
            vms: self.0.processes.names().len(),
            checkpoints: self.0.checkpoints.len(),
            kept: self.0.checkpoints.kept(),
            prepared: self.0.pool.len(),
            until_idle: self.0.until_idle,
            merging: self.merging(),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.dir.path()
    }
}

impl Inner {
    /// Notes that there is work: a request that changes something, or the end of a process.
    fn touch(&self) {
        *self.last_request.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn serve(&self, server: impl Future<Output = ()> + Send + 'static) {
        let server = self.runtime.spawn(server);
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).push(server);
    }
}
