//! Children in processes of their own.
//!
//! The parent's process starts a worker for each child: the same program, with a socket
//! (`SOCK_SEQPACKET`) as its standard input. The worker makes the VM of the image that it is sent,
//! with a fleet and sockets of its own in the same runtime directory. From then on it depends on
//! nothing of the parent's process.
//!
//! | message | from | what |
//! |---|---|---|
//! | 1 | parent | what to make, as JSON |
//! | 2.. | parent | the image ([`SealedParts`]) |
//! | next | worker | made, and paused; or the error |
//! | next | parent | one byte, once all children are made: they may run |
//! | last | worker | it runs |
//!
//! A worker whose socket is closed before it runs ends, so all children of a request are made or
//! none (I13). No child runs before all are made.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::control::{IdentityInfo, serve_fleet, status_of};
use crate::fleet::{Cancel, CancelReason, Children, Fleet, FleetError, Needs, check_names, check_room};
use clade_vmm::vm::{ChildIdentity, ChildOptions, Context, ForkImage, ForkReport, SealedParts, Vm};

/// The command-line argument that makes the program a worker.
pub const WORKER: &str = "worker";
/// Most bytes of an order or an answer.
const MAX_MESSAGE: usize = 64 << 10;
/// How long a worker may take to make its VM.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a request that waits for workers looks whether it is cancelled.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long a worker that is not wanted any more may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(10);
const END_POLL: Duration = Duration::from_millis(1);
/// How often ended workers are reaped.
const REAP_INTERVAL: Duration = Duration::from_secs(1);

/// What a worker makes.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    /// The runtime directory.
    dir: PathBuf,
    parent: String,
    pattern: Option<String>,
    identity: ChildIdentity,
    paused: bool,
}

/// What a worker says.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Made {
        name: String,
        identity: Option<IdentityInfo>,
    },
    Running,
    Failed {
        /// The HTTP status that the error stands for.
        status: u16,
        text: String,
    },
}

/// A child in a process of its own.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) name: String,
    /// Its own interfaces, addresses and sockets; `None` if it has no such devices.
    pub(crate) identity: Option<IdentityInfo>,
}

impl Made {
    pub(crate) fn of(vm: &Vm) -> Self {
        Self { name: vm.name().to_owned(), identity: IdentityInfo::of(vm) }
    }
}

/// A worker on its way. Dropped, it is ended.
struct Worker {
    socket: OwnedFd,
    process: Option<Child>,
}

impl Worker {
    fn start(program: &Path, order: &Order, parts: &SealedParts) -> Result<Self, FleetError> {
        let failed = |source| FleetError::Worker { source };
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| failed(errno.into()))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(POLL_INTERVAL)).map_err(|errno| failed(errno.into()))?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).map_err(|errno| failed(errno.into()))?;
        let mut command = Command::new(program);
        // The path of the program says nothing in a list of processes.
        command.arg0("clade").arg(WORKER).stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let process = Some(command.spawn().map_err(failed)?);
        // Its end of the socket, so that its death is seen.
        drop(command);
        // From here on it is ended if anything fails.
        let worker = Self { socket, process };
        let order = serde_json::to_vec(order).map_err(|error| failed(error.into()))?;
        send(&worker.socket, &order, SendFlags::NOSIGNAL).map_err(|errno| failed(errno.into()))?;
        parts.send(&worker.socket)?;
        Ok(worker)
    }

    fn answer(&self, check: impl Fn() -> Result<(), FleetError>) -> Result<Answer, FleetError> {
        let begun = Instant::now();
        let failed = |source| FleetError::Worker { source };
        loop {
            match message(&self.socket) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => {
                    check()?;
                    if begun.elapsed() > PATIENCE {
                        return Err(failed(io::ErrorKind::TimedOut.into()));
                    }
                }
                Ok(Answer::Failed { status, text }) => return Err(FleetError::Refused { status, text }),
                answer => return answer.map_err(failed),
            }
        }
    }

    fn made(&self, check: impl Fn() -> Result<(), FleetError>) -> Result<Made, FleetError> {
        match self.answer(check)? {
            Answer::Made { name, identity } => Ok(Made { name, identity }),
            other => Err(FleetError::Worker { source: unexpected(&other) }),
        }
    }

    fn run(&self) {
        // One that has gone says so when it is asked for its answer.
        let _ = send(&self.socket, &[1], SendFlags::NOSIGNAL);
    }

    /// Lets it go its own way.
    fn release(mut self) {
        if let Some(process) = self.process.take() {
            reap_later(process);
        }
    }
}

/// Workers of one request that has not succeeded yet. Dropped, all are ended.
struct Workers(Vec<Worker>);

impl Drop for Workers {
    fn drop(&mut self) {
        // All at once, and then one is waited for after the other.
        self.0.iter().for_each(|worker| _ = shutdown(&worker.socket, Shutdown::Both));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        // It ends by itself, and leaves no sockets behind then.
        let _ = shutdown(&self.socket, Shutdown::Both);
        let deadline = Instant::now() + END_TIMEOUT;
        while matches!(process.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = process.kill();
                let _ = process.wait();
                return;
            }
            thread::sleep(END_POLL);
        }
    }
}

fn unexpected(answer: &Answer) -> io::Error {
    io::Error::other(format!("it answered {answer:?}"))
}

/// Reaps a process when it has ended. One thread does it for all.
fn reap_later(process: Child) {
    static REAPER: OnceLock<Option<Sender<Child>>> = OnceLock::new();
    let reaper = REAPER.get_or_init(|| {
        let (sender, processes) = mpsc::channel::<Child>();
        let reap = move || {
            let mut running: Vec<Child> = Vec::new();
            loop {
                match processes.recv_timeout(REAP_INTERVAL) {
                    Ok(process) => running.push(process),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                running.retain_mut(|process| matches!(process.try_wait(), Ok(None)));
            }
        };
        thread::Builder::new().name("clade-reaper".to_owned()).spawn(reap).ok().map(|_| sender)
    });
    // Without a thread they stay zombies until this process ends.
    if let Some(reaper) = reaper {
        let _ = reaper.send(process);
    }
}

fn message<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<T> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let (len, whole) = loop {
        match recv(&socket, bytes.as_mut_slice(), RecvFlags::TRUNC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    if whole == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if whole > len {
        return Err(io::Error::other(format!("a message of {whole} bytes")));
    }
    Ok(serde_json::from_slice(&bytes[..len])?)
}

fn say(socket: impl AsFd, answer: &Answer) -> io::Result<()> {
    let bytes = serde_json::to_vec(answer)?;
    send(socket, &bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}

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
    cancel: &Cancel,
) -> Result<(Vec<Made>, ForkReport), FleetError> {
    let parent = fleet.get(name)?.vm;
    let _in_use = fleet.enter();
    let count = wanted.count;
    check_names(count, wanted.pattern)?;
    check_room(count, Needs::of_worker(parent.config())).map_err(|source| FleetError::Room { count, source })?;
    // As it is now: the file may have been replaced since this process began.
    let program = PathBuf::from("/proc/self/exe");
    let (image, report) = parent.fork()?;
    // Stopping the parent waits for nothing of this.
    let stopped = Arc::downgrade(&parent);
    drop(parent);
    let parts = image.export(fleet.leases())?.seal()?;
    drop(image);
    let order = Order {
        dir: fleet.dir().to_owned(),
        parent: name.to_owned(),
        pattern: wanted.pattern.map(str::to_owned),
        identity: wanted.identity.clone(),
        paused,
    };
    let check = |made: usize| {
        let is_stopped = stopped.upgrade().is_none_or(|vm| vm.stopped().is_some());
        let reason = cancel.reason().or(is_stopped.then_some(CancelReason::ParentStopped));
        let reason = reason.or(fleet.is_closed().then_some(CancelReason::Ending));
        reason.map_or(Ok(()), |reason| Err(FleetError::Cancelled { made, count, reason }))
    };
    let mut workers = Workers(Vec::with_capacity(count));
    for at in 0..count {
        check(at)?;
        workers.0.push(Worker::start(&program, &order, &parts)?);
    }
    drop(parts);
    let mut made = Vec::with_capacity(count);
    for worker in &workers.0 {
        let child = worker.made(|| check(made.len()))?;
        made.push(child);
    }
    check(made.len())?;
    // All are there, so all may run. From here on each is on its own: one that fails ends like any
    // VM.
    let workers = std::mem::take(&mut workers.0);
    for worker in &workers {
        worker.run();
    }
    for (worker, child) in workers.into_iter().zip(&made) {
        match worker.answer(|| Ok(())) {
            Ok(Answer::Running) => {}
            other => tracing::warn!(child = child.name, ?other, "a child has ended before it ran"),
        }
        worker.release();
    }
    Ok((made, report))
}

/// Makes the VM that the process behind `socket` orders, in a fleet of its own that `runtime`
/// serves. Returns the fleet once the VM runs, or `None` if it is not wanted any more.
///
/// # Errors
/// When the VM cannot be made, which the other process is told.
pub fn serve(context: &Context, socket: &OwnedFd, runtime: &Handle) -> Result<Option<Fleet>, FleetError> {
    let failed = |source| FleetError::Worker { source };
    let order: Order = message(socket).map_err(failed)?;
    let made = make(context, &order, socket, runtime);
    let (fleet, vm) = match made {
        Ok(made) => made,
        Err(error) => {
            let answer = Answer::Failed { status: status_of(&error), text: clade_vmm::error_chain(&error) };
            // Whoever ordered it may have gone.
            let _ = say(socket, &answer);
            return Err(error);
        }
    };
    let answer = Answer::Made { name: vm.name().to_owned(), identity: IdentityInfo::of(&vm) };
    let mut go = [0];
    let told = say(socket, &answer).is_ok() && matches!(recv(socket, &mut go, RecvFlags::empty()), Ok((1, _)));
    if !told {
        fleet.close();
        return Ok(None);
    }
    if !order.paused {
        // Another request may have stopped it already: it is listed.
        let _ = vm.resume();
    }
    let _ = say(socket, &Answer::Running);
    Ok(Some(fleet))
}

fn make(context: &Context, order: &Order, socket: &OwnedFd, runtime: &Handle) -> Result<(Fleet, Arc<Vm>), FleetError> {
    let image = ForkImage::import(context, SealedParts::receive(socket)?.open()?)?;
    let fleet = serve_fleet(context, &order.dir, runtime)?;
    let wanted = Children { count: 1, pattern: order.pattern.as_deref(), identity: &order.identity };
    let options = ChildOptions { paused: true, before_start: None };
    let vm = fleet.start_child(&order.parent, &wanted, &image, options)?;
    Ok((fleet, vm))
}
