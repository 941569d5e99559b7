//! The start of a supervisor.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use clade_api::{DaemonError, ProblemKind, RuntimeDir, SupervisorClaim};
use clade_worker::image::give_broker;
use clade_worker::jail::Confinement;
use clade_worker::zygote::Zygote;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::broker::Broker;
use crate::cgroups::{CgroupPlace, Cgroups};
use crate::checkpoint::ImagesInUse;
use crate::checkpoints::Checkpoints;
use crate::copied_files::CopiedFiles;
use crate::held_interfaces::HeldInterfaces;
use crate::idle::Idle;
use crate::kept::{Found, KeptDir, KeptLines};
use crate::launching::Launching;
use crate::net_hook::NetHook;
use crate::overlays::OverlayDirs;
use crate::pool::Pool;
use crate::priority::Priority;
use crate::processes::{ProcessId, Processes};
use crate::ready_limiter::ReadyLimiter;
use crate::reidentify::told_at_a_time;
use crate::request_limiter::{ForwardLimiter, ImageRequestLimiter, NetworkChanges};
use crate::server::InProcessRequests;
use crate::snapshots::Snapshots;
use crate::unsettled::UnsettledEnds;
use crate::vm_record::VmRecord;
use crate::worker_resources::SandboxProfile;
use crate::{Inner, MAX_SCRAPES, Supervisor, ends, server};

/// Time limit for the process of an earlier supervisor's VM to take its broker, and for all of them,
/// before the supervisor serves requests: a process may be compromised.
const BROKER_TIMEOUT: Duration = Duration::from_millis(100);
const BROKERS_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for each of the others after that.
const LATE_BROKER_TIMEOUT: Duration = Duration::from_secs(60);

/// Options of a supervisor.
#[derive(Clone, Debug, Default)]
pub struct SupervisorOptions {
    /// Most workers kept prepared for one configuration.
    pub pool: usize,
    /// Whether the processes of VMs are confined.
    pub confinement: Confinement,
    /// Place of the VMs' control groups.
    pub cgroup: CgroupPlace,
    /// The program that connects their interfaces to the host's network.
    pub net_hook: Option<PathBuf>,
    /// Default memory, in MiB, that a child of a checkpoint may have copies of before it writes
    /// there. 0 for none.
    pub ahead_mib: u32,
    /// Whether the supervisor ends when it is idle, or with its command. Such a one has few VMs: its
    /// workers do not run from a copy of the program in huge pages, which takes 18 MiB and time at the start.
    pub until_idle: bool,
    /// The directory of kept checkpoints. None if no checkpoint can be kept.
    pub kept: Option<PathBuf>,
    /// Variables in the environment of workers.
    pub worker_env: Vec<(&'static str, &'static str)>,
}

/// Opens the directory of kept checkpoints. If that fails, none can be kept, and those there stay as
/// they are.
fn kept_in(dir: Option<&Path>) -> (Result<KeptDir, String>, Found) {
    let Some(dir) = dir else {
        let why = "the supervisor has no directory for them (CLADE_CHECKPOINT_DIR, XDG_DATA_HOME or HOME)";
        return (Err(why.to_owned()), Found::default());
    };
    match KeptDir::open(dir) {
        Ok((kept, found)) => (Ok(kept), found),
        Err(error) => {
            let why = format!("{}: {error}", dir.display());
            tracing::warn!(why, "kept checkpoints cannot be used");
            (Err(why), Found::default())
        }
    }
}

impl Supervisor {
    /// Supervises the runtime directory `dir` with `options`, and answers at its socket, on
    /// `runtime`.
    ///
    /// # Errors
    /// When another process supervises it, or the zygote cannot be started. When control groups are
    /// required, and unavailable.
    pub fn start(dir: &Path, options: &SupervisorOptions, runtime: &Handle) -> Result<Self, DaemonError> {
        let SupervisorOptions {
            pool,
            confinement,
            ref cgroup,
            ref net_hook,
            ahead_mib,
            until_idle,
            ref kept,
            ref worker_env,
        } = *options;
        let dir = RuntimeDir::create(dir)?;
        let (claim, socket) = SupervisorClaim::new(&dir)?;
        let earlier = VmRecord::all(&dir)?;
        // First: their threads may keep the processors from this one, and each of the next steps may fail.
        earlier.iter().filter_map(|(_, vm_record)| vm_record.process).for_each(Priority::give_back);
        // Before any other process is started.
        let cgroups = Cgroups::open(cgroup)?;
        let net_hook = net_hook.as_deref().map(NetHook::new).transpose()?;
        let (sender, exits) = mpsc::channel();
        let failed = |source| DaemonError::Worker { source };
        let zygote = Arc::new(Zygote::start(sender, confinement, !until_idle, worker_env)?);
        let sandbox = SandboxProfile { dir: dir.path().to_owned(), confinement };
        let overlays = OverlayDirs::default();
        let broker = Broker::start().map_err(failed)?;
        // VMs of an earlier supervisor.
        let mut found = Vec::new();
        for (name, vm_record) in &earlier {
            overlays.found(&vm_record.overlays);
            found.extend(vm_record.process.map(|process| (name.clone(), process)));
        }
        // One after another: each guest needs three descriptors, and most processes take theirs at once.
        let guests = earlier.iter().filter_map(|(name, vm_record)| {
            let device = broker.connect(vm_record.identity.vsock.as_ref()?.socket.clone());
            let device =
                device.inspect_err(|error| tracing::warn!(%error, name, "a guest is not connected to the host"));
            Some(EarlierGuest { name: name.clone(), process: vm_record.process, device: device.ok()? })
        });
        let late = give_brokers(&dir, guests, BROKER_TIMEOUT, Some(Instant::now() + BROKERS_TIMEOUT));
        let (kept, found_kept) = kept_in(kept.as_deref());
        let supervisor = Self(Arc::new(Inner {
            priority: Priority::default(),
            pool: Pool::start(&zygote, sandbox.clone(), overlays.clone(), pool)?,
            broker,
            cgroups,
            net_hook,
            ahead_mib,
            until_idle,
            zygote,
            sandbox,
            overlays,
            dir,
            checkpoints: Checkpoints::of_kept(found_kept),
            copied_files: CopiedFiles::default(),
            kept,
            kept_lines: KeptLines::default(),
            snapshots: Snapshots::default(),
            events: Arc::default(),
            keys: Arc::default(),
            images_in_use: ImagesInUse::default(),
            idle: Idle::default(),
            awaited_wakes: Arc::default(),
            processes: Processes::default(),
            records: Arc::default(),
            interfaces: HeldInterfaces::default(),
            launching: Launching::beside(earlier.len()),
            ends: Mutex::default(),
            image_requests: ImageRequestLimiter::default(),
            forwarded_requests: ForwardLimiter::default(),
            network_changes: NetworkChanges::default(),
            closed: Mutex::default(),
            scrapes: Semaphore::new(MAX_SCRAPES),
            ready_limiter: ReadyLimiter::new(told_at_a_time()),
            pending_vms: Arc::default(),
            unsettled: UnsettledEnds::default(),
            closing: AtomicBool::new(false),
            busy: RwLock::default(),
            last_request: Mutex::new(Instant::now()),
            requests: Arc::default(),
            in_process: InProcessRequests::default(),
            ending: watch::Sender::new(false),
            runtime: runtime.clone(),
            servers: Mutex::default(),
            claim: Mutex::new(Some(claim)),
        }));
        earlier.iter().for_each(|(name, vm_record)| supervisor.0.close_recorded(name, vm_record));
        let weak = Arc::downgrade(&supervisor.0);
        thread::Builder::new()
            .name("clade-ends".to_owned())
            .spawn(move || ends::watch(&exits, &weak))
            .map_err(failed)?;
        if !late.is_empty() {
            let dir = supervisor.0.dir.clone();
            let give = move || drop(give_brokers(&dir, late, LATE_BROKER_TIMEOUT, None));
            thread::Builder::new().name("clade-late".to_owned()).spawn(give).map_err(failed)?;
        }
        if !found.is_empty() {
            let (records, dir) = (Arc::clone(&supervisor.0.records), supervisor.0.dir.path().to_owned());
            let fetch = move || records.fetch(&dir, &found);
            thread::Builder::new().name("clade-records".to_owned()).spawn(fetch).map_err(failed)?;
        }
        supervisor.0.serve(server::serve(socket, supervisor.clone(), supervisor.0.ending.subscribe()));
        Ok(supervisor)
    }
}

/// The guest of an earlier supervisor's VM, and its device's end of a socket to the broker.
struct EarlierGuest {
    name: String,
    process: Option<ProcessId>,
    device: OwnedFd,
}

/// Has the processes of VMs connect their guests by this supervisor, with a time limit for each, and
/// one for all. Returns those that have taken no request in time.
fn give_brokers(
    dir: &RuntimeDir,
    guests: impl IntoIterator<Item = EarlierGuest>,
    limit: Duration,
    until: Option<Instant>,
) -> Vec<EarlierGuest> {
    let mut late = Vec::new();
    for guest in guests {
        if until.is_some_and(|until| Instant::now() >= until) {
            late.push(guest);
            continue;
        }
        // Another VM may have the name by now, and its guest reaches other listeners.
        if VmRecord::found(dir, &guest.name).is_none_or(|vm_record| vm_record.process != guest.process) {
            continue;
        }
        match give_broker(dir.path(), &guest.name, guest.device.as_fd(), limit) {
            Ok(()) => {}
            Err(DaemonError::Refused { kind: ProblemKind::VmSilent, .. }) => late.push(guest),
            // The VM has most likely died.
            Err(error) => tracing::debug!(%error, name = guest.name, "a guest is not connected to the host"),
        }
    }
    late
}

#[cfg(test)]
mod tests {
    use clade_api::image_path;
    use clade_host_io::seqpacket;
    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with};

    use super::*;
    use crate::vm_record::tests::record_with;

    #[test]
    fn a_process_that_takes_no_request_delays_neither_the_start_nor_the_others() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(scratch.path()).unwrap();
        let listener = |name: &str, backlog: i32| {
            record_with(None).replace(&dir, name).unwrap();
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            bind(&socket, &SocketAddrUnix::new(image_path(dir.path(), name)).unwrap()).unwrap();
            listen(&socket, backlog).unwrap();
            socket
        };
        let [full, good, other] =
            [("full", 0), ("good", 8), ("other", 8)].map(|(name, backlog)| listener(name, backlog));
        // Another VM has the name by now.
        let new = VmRecord { process: ProcessId::of(std::process::id()), ..record_with(None) };
        new.replace(&dir, "other").unwrap();
        let device = || seqpacket::pair().unwrap().0;
        // Fills the queue of the process that accepts nothing.
        give_broker(dir.path(), "full", device().as_fd(), BROKER_TIMEOUT).unwrap();
        let guest = |name: &str| EarlierGuest { name: name.to_owned(), process: None, device: device() };
        let guests = || ["full", "gone", "other", "good"].map(guest);
        let names = |late: Vec<EarlierGuest>| late.into_iter().map(|guest| guest.name).collect::<Vec<_>>();
        let late = give_brokers(&dir, guests(), BROKER_TIMEOUT, Some(Instant::now()));
        assert_eq!(names(late), ["full", "gone", "other", "good"], "the time for all is over");
        let late = give_brokers(&dir, guests(), BROKER_TIMEOUT, None);
        assert_eq!(names(late), ["full"]);
        let client = accept_with(&good, SocketFlags::CLOEXEC).unwrap();
        assert_eq!(seqpacket::receive(&client, 1).unwrap().files.len(), 1);
        fcntl_setfl(&other, OFlags::NONBLOCK).unwrap();
        assert_eq!(accept_with(&other, SocketFlags::CLOEXEC).unwrap_err(), Errno::AGAIN, "no other VM's broker");
        drop(full);
    }
}
