//! The socket on which another process requests a VM's image.
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | client | one byte: the request. With `BROKER` comes a socket, and there is no answer. With `SUSPEND` come files ([`suspend`]). A rollback has its own messages ([`rollback`]). To `RECORD` the answer is the same byte and a descriptor |
//! | 2 | VM's process | the report of the fork, as JSON; or the error |
//! | 3.. | VM's process | the image ([`SealedParts`]); or the error, if it cannot be sealed |
//!
//! The VM is forked at the client's request and runs on. Its process holds the image's layers until
//! the last process that uses them has gone.

pub mod rollback;
pub mod suspend;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use clade_host_io::seqpacket::{self, Message};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use suspend::SUSPEND;

use crate::vm_host::WeakVmHost;
use clade_api::http::ACCEPT_BACKOFF;
use clade_api::secrets::Secrets;
use clade_api::{DaemonError, Labels, ProblemKind, check_name, flight, image_path};
use clade_devices::virtio::net::Link;
use clade_vmm::vm::{ForkImage, ForkReport, Leases, SealedParts, TransferError, Vm, VmConfig};

/// Clients of one VM's socket at a time. A VM is forked for one after the other.
const MAX_CLIENTS: usize = 4;
/// Interval of the checks whether the client still wants the image.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Fork the VM, and give the image.
pub(crate) const FORK: u8 = 1;
/// Have the guest's connections made by another broker
/// ([`answer_broker`](clade_devices::virtio::vsock::answer_broker)).
const BROKER: u8 = 2;
/// Give the file of the VM's [flight record](clade_api::flight).
const RECORD: u8 = 3;
/// Most bytes of an answer.
const MAX_ANSWER: usize = 64 << 10;
/// Time limit of the other side for a message, or for the whole fork.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time limit of a client's request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Report of a fork for another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkedVm {
    /// The configuration.
    pub config: VmConfig,
    /// The VM's labels.
    pub labels: Labels,
    /// The secrets that its children may be made without.
    pub secrets: Secrets,
    /// Whether packets pass at that instant. None without a network, or where it is not known.
    #[serde(default)]
    pub network: Option<Link>,
    /// Forks between the image and the VM that was booted.
    pub generation: u32,
    /// Length of the parent's pause.
    pub pause: Duration,
    /// The part of the pause that froze memory.
    pub freeze: Duration,
    /// Part of the pause: the time until vCPUs and devices stood still.
    pub park: Duration,
    /// Device requests in flight.
    pub in_flight: u64,
    /// Pages that became shared without being copied.
    pub remapped: u64,
    /// Pages copied.
    pub copied: u64,
}

#[derive(Debug, Serialize, Deserialize)]
enum ImageAnswer {
    Forked(Box<ForkedVm>),
    Refused {
        /// The kind of the error.
        kind: ProblemKind,
        text: String,
    },
}

/// The name of the thread that answers a VM's image requests, from its first one on.
pub const IMAGE_THREAD: &str = "clade-image";

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs, one after another, on a thread that stays: the supervisor raises it before a request
/// comes. Jobs that come meanwhile run on threads of the runtime.
#[derive(Default)]
struct ImageThread(Option<SyncSender<Job>>);

impl ImageThread {
    fn run(&mut self, job: Job) {
        let job = match &self.0 {
            // Without a buffer: only a thread that waits takes it.
            Some(thread) => match thread.try_send(job) {
                Ok(()) => return,
                Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
            },
            None => {
                if let Err(error) = self.start() {
                    tracing::debug!(%error, "no thread stays for image requests");
                }
                job
            }
        };
        tokio::task::spawn_blocking(job);
    }

    fn start(&mut self) -> io::Result<()> {
        let (sender, jobs) = sync_channel::<Job>(0);
        let runtime = Handle::current();
        thread::Builder::new().name(IMAGE_THREAD.to_owned()).spawn(move || {
            let _runtime = runtime.enter();
            for job in jobs {
                // As on a thread of the runtime: the next request is answered.
                let _ = catch_unwind(AssertUnwindSafe(job));
            }
        })?;
        self.0 = Some(sender);
        Ok(())
    }
}

/// Answers at a VM's socket until it is dropped. The VM is not kept alive.
pub(crate) async fn serve(listener: OwnedFd, vm: Weak<Vm>, leases: Leases, vm_host: WeakVmHost) {
    // SAFETY: an owned descriptor stays the same one, and open, until it is dropped.
    let listener = match unsafe { AsyncFd::register(listener) } {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "no image is given to other processes");
            return;
        }
    };
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut image_thread = ImageThread::default();
    loop {
        let accepted = match listener.readable().await {
            Ok(mut ready) => ready.try_io(|listener| Ok(accept_with(listener, SocketFlags::CLOEXEC)?)),
            Err(error) => {
                tracing::error!(%error, "no image is given to other processes any more");
                return;
            }
        };
        let socket = match accepted {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                tracing::debug!(%error, "image socket");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
            // Another connection took the request.
            Err(_) => continue,
        };
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        let (vm, leases, vm_host) = (vm.clone(), leases.clone(), vm_host.clone());
        image_thread.run(Box::new(move || {
            if let Err(error) = answer(&socket, &vm, &leases, &vm_host) {
                // The client has gone, is another user's, or sent no request.
                tracing::debug!(%error, "image socket");
            }
            drop(permit);
        }));
    }
}

pub(crate) fn answer(socket: &OwnedFd, vm: &Weak<Vm>, leases: &Leases, vm_host: &WeakVmHost) -> io::Result<()> {
    let (peer, own) = (socket_peercred(socket)?.uid, rustix::process::geteuid());
    if peer != own && !peer.is_root() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    set_socket_timeout(socket, Timeout::Recv, Some(REQUEST_TIMEOUT))?;
    set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
    let Message { bytes, mut files } = seqpacket::receive(socket, 1)?;
    match bytes[..] {
        [FORK] => {}
        [BROKER] => {
            let (vm, broker) =
                (vm.upgrade().ok_or(io::ErrorKind::NotFound)?, files.pop().ok_or(io::ErrorKind::InvalidData)?);
            return vm.connect_broker(broker);
        }
        [SUSPEND] => return suspend::answer(socket, vm, files),
        [rollback::OWN] => return rollback::answer(socket, vm, Some(leases), vm_host),
        [rollback::FOREIGN] => return rollback::answer(socket, vm, None, vm_host),
        [RECORD] => return seqpacket::send(socket, &[RECORD], &[flight::descriptor()?.as_fd()]),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    }
    let refuse = |error: DaemonError| {
        let refused = ImageAnswer::Refused { kind: error.problem(), text: clade_vmm::error_chain(&error) };
        seqpacket::send(socket, &serde_json::to_vec(&refused)?, &[])
    };
    // Held until the image is sent: its process ends once the VM is unused and no image is leased, and merges what
    // was written into the VM's disks before.
    let Some(vm) = vm.upgrade() else { return refuse(DaemonError::Ending) };
    let (forked, image) = match forked(&vm, vm_host) {
        Ok(made) => made,
        Err(error) => return refuse(error),
    };
    // Before the image is sealed: the client wakes up meanwhile.
    seqpacket::send(socket, &serde_json::to_vec(&ImageAnswer::Forked(Box::new(forked)))?, &[])?;
    let sent = match sealed(&image, leases) {
        Ok(parts) => parts.send(socket).map_err(io::Error::other),
        Err(error) => refuse(error.into()),
    };
    drop(vm);
    sent
}

fn sealed(image: &Arc<ForkImage>, leases: &Leases) -> Result<SealedParts, TransferError> {
    #[cfg(test)]
    if let Some(act) = tests::BEFORE_SEALING.take() {
        act()?;
    }
    let begun = Instant::now();
    let parts = image.export(leases)?.seal()?;
    tracing::debug!(export = ?begun.elapsed(), "image");
    Ok(parts)
}

/// Forks the VM.
///
/// # Errors
/// When the VM has ended, or cannot be forked.
pub(crate) fn forked(vm: &Vm, vm_host: &WeakVmHost) -> Result<(ForkedVm, Arc<ForkImage>), DaemonError> {
    // Before the fork: an image of a VM that ends meanwhile would go out without the list of its
    // secrets, and the supervisor would refuse it as another VM's.
    let entry = vm_host.upgrade().and_then(|vm_host| vm_host.entry());
    let entry = entry.ok_or_else(|| DaemonError::NoSuchVm { name: vm.name().to_owned() })?;
    let (image, report) = vm.fork()?;
    let network = network_of(vm);
    let ForkReport { times, freeze, in_flight } = report;
    let (pause, remapped, copied) = (times.pause.as_micros(), freeze.remapped, freeze.copied);
    let pages = format!("{remapped} pages remapped, {copied} copied");
    flight::note(&format!("image taken: paused {pause} us, {pages}, {in_flight} requests in flight"));
    let forked = ForkedVm {
        config: VmConfig::clone(image.config()),
        labels: entry.labels,
        secrets: entry.secrets,
        network,
        generation: image.generation(),
        pause: times.pause,
        freeze: times.freeze,
        park: times.park,
        in_flight: in_flight as u64,
        remapped: freeze.remapped,
        copied: freeze.copied,
    };
    Ok((forked, image))
}

/// Returns whether a VM's packets pass: not if one of its devices is closed. None without a network
/// device.
pub(crate) fn network_of(vm: &Vm) -> Option<Link> {
    let links: Vec<Link> = (0..vm.identity().nets.len()).filter_map(|at| vm.network(at)).collect();
    if links.contains(&Link::Closed) { Some(Link::Closed) } else { links.first().copied() }
}

/// A VM that is forked for children in other processes: the request is sent.
#[derive(Debug)]
pub struct PendingFork {
    socket: OwnedFd,
    name: String,
    deadline: Instant,
}

/// Returns the report in an answer.
///
/// # Errors
/// The error in it. When it cannot be read.
fn report_in(answer: &[u8]) -> Result<ForkedVm, DaemonError> {
    match serde_json::from_slice(answer).map_err(|error| failed(error.into()))? {
        ImageAnswer::Forked(forked) => Ok(*forked),
        ImageAnswer::Refused { kind, text } => Err(DaemonError::Refused { kind, text }),
    }
}

fn failed(source: io::Error) -> DaemonError {
    DaemonError::Worker { source }
}

impl PendingFork {
    /// Requests the image of the VM called `name`, in whichever process it runs.
    ///
    /// # Errors
    /// When there is no such VM, or it takes no request.
    pub fn begin(dir: &Path, name: &str) -> Result<Self, DaemonError> {
        Self::begin_within(dir, name, PATIENCE)
    }

    fn begin_within(dir: &Path, name: &str, limit: Duration) -> Result<Self, DaemonError> {
        let deadline = Instant::now() + limit;
        let pending_fork = Self { socket: connected(dir, name, limit)?, name: name.to_owned(), deadline };
        seqpacket::send(&pending_fork.socket, &[FORK], &[]).map_err(|error| pending_fork.silent(&error))?;
        Ok(pending_fork)
    }

    fn silent(&self, source: &io::Error) -> DaemonError {
        silent(&self.name, source)
    }

    /// Waits for the image. `check` is called every `CHECK_INTERVAL`.
    ///
    /// # Errors
    /// That of `check`. When the VM cannot be forked, or its process does not answer.
    pub fn image(self, check: &dyn Fn() -> Result<(), DaemonError>) -> Result<(ForkedVm, SealedParts), DaemonError> {
        let go_on = || Instant::now() < self.deadline && check().is_ok();
        let answer = read_answer(&self.socket, &self.name, self.deadline, check);
        // The client may have gone.
        check()?;
        let forked = report_in(&answer?)?;
        match SealedParts::receive_or_message(&self.socket, MAX_ANSWER, &go_on) {
            // The VM's process has ended, or does not answer.
            Err(TransferError::System { source, .. }) => {
                check()?;
                Err(self.silent(&source))
            }
            Err(error) => Err(error.into()),
            Ok(Ok(parts)) => Ok((forked, parts)),
            // The image could not be sealed. A second report is invalid.
            Ok(Err(message)) => report_in(&message).and(Err(failed(io::ErrorKind::InvalidData.into()))),
        }
    }
}

/// Waits for the answer to a request to the process of the VM called `name`. `check` is called
/// every [`CHECK_INTERVAL`].
///
/// # Errors
/// That of `check`. When the process does not answer until `deadline`.
pub(crate) fn read_answer(
    socket: &OwnedFd,
    name: &str,
    deadline: Instant,
    check: &dyn Fn() -> Result<(), DaemonError>,
) -> Result<Vec<u8>, DaemonError> {
    set_socket_timeout(socket, Timeout::Recv, Some(CHECK_INTERVAL)).map_err(|errno| failed(errno.into()))?;
    let answer = loop {
        match seqpacket::receive(socket.as_fd(), MAX_ANSWER) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => check()?,
            answer => break answer,
        }
    };
    answer.map(|Message { bytes, .. }| bytes).map_err(|error| silent(name, &error))
}

fn silent(name: &str, source: &io::Error) -> DaemonError {
    let is_late = source.kind() == io::ErrorKind::WouldBlock;
    let kind = if is_late { ProblemKind::VmSilent } else { ProblemKind::VmGone };
    DaemonError::Refused { kind, text: format!("the process of {name:?} does not answer: {source}") }
}

/// Has the process of the VM called `name` use another broker for its guest's connections, within
/// `limit`.
///
/// # Errors
/// When there is no such VM, or it takes no request.
pub fn give_broker(dir: &Path, name: &str, broker: BorrowedFd<'_>, limit: Duration) -> Result<(), DaemonError> {
    let socket = connected(dir, name, limit)?;
    seqpacket::send(&socket, &[BROKER], &[broker]).map_err(failed)
}

/// A request for the file of a VM's flight record, sent to its process.
#[derive(Debug)]
pub struct AskedRecord(OwnedFd);

impl AskedRecord {
    /// Asks the process of the VM called `name`, for `limit` at most.
    ///
    /// # Errors
    /// When there is no such VM, or it takes no request.
    pub fn begin(dir: &Path, name: &str, limit: Duration) -> Result<Self, DaemonError> {
        let socket = connected(dir, name, limit)?;
        seqpacket::send(&socket, &[RECORD], &[]).map_err(failed)?;
        Ok(Self(socket))
    }

    /// Returns the file, checked to be a record even if the process is hostile.
    ///
    /// # Errors
    /// When no valid record comes until `deadline`.
    pub fn file(self, deadline: Instant) -> io::Result<OwnedFd> {
        // Zero would be no limit.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        set_socket_timeout(&self.0, Timeout::Recv, Some(left))?;
        let file = seqpacket::receive(&self.0, 1)?.files.pop();
        flight::checked(file.ok_or(io::ErrorKind::InvalidData)?)
    }
}

pub(crate) fn connected(dir: &Path, name: &str, limit: Duration) -> Result<OwnedFd, DaemonError> {
    check_name(name)?;
    let path = image_path(dir, name);
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|errno| failed(errno.into()))?;
    // Set before the connection: with others in the queue, that waits too.
    for which in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, which, Some(limit)).map_err(|errno| failed(errno.into()))?;
    }
    let connected = SocketAddrUnix::new(&path).and_then(|address| connect(&socket, &address));
    match connected {
        Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(DaemonError::NoSuchVm { name: name.to_owned() }),
        // Others are in the queue, and the process accepts none of them.
        Err(Errno::AGAIN) => {
            let text = format!("the process of {name:?} accepts no request for its image");
            return Err(DaemonError::Refused { kind: ProblemKind::VmSilent, text });
        }
        other => other.map_err(|source| DaemonError::Runtime { path, source: source.into() })?,
    }
    Ok(socket)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clade_test_support::wait_until;
    use rustix::net::{bind, listen};

    type BeforeSealing = dyn FnOnce() -> Result<(), TransferError>;

    thread_local! {
        /// Called once, between the report of a fork and its image.
        pub(crate) static BEFORE_SEALING: std::cell::Cell<Option<Box<BeforeSealing>>> = std::cell::Cell::default();
    }

    #[test]
    fn a_process_that_does_not_answer_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let bound = |backlog| {
            let path = image_path(dir.path(), "web");
            let _ = std::fs::remove_file(&path);
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            listen(&socket, backlog).unwrap();
            socket
        };
        let limit = Duration::from_millis(300);
        let image = || PendingFork::begin_within(dir.path(), "web", limit)?.image(&|| Ok(()));
        let kind = || image().map(drop).map_err(|error| error.problem());
        // A request waits in its queue, and then the queue is full.
        let _stopped = bound(8);
        assert_eq!(kind(), Err(ProblemKind::VmSilent));
        let full = bound(0);
        let waits = connected(dir.path(), "web", limit).unwrap();
        assert_eq!(kind(), Err(ProblemKind::VmSilent));
        // A VM that has ended.
        drop((full, waits));
        assert_eq!(kind(), Err(ProblemKind::NoSuchVm));
    }

    #[test]
    fn a_job_that_panics_does_not_end_the_image_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _entered = runtime.enter();
        let mut image_thread = ImageThread::default();
        let (sender, names) = sync_channel(1);
        // A job runs on the image thread if that waits for one.
        let mut run = |panics: bool| {
            let sender = sender.clone();
            image_thread.run(Box::new(move || {
                sender.send(thread::current().name() == Some(IMAGE_THREAD)).unwrap();
                assert!(!panics, "the job panics");
            }));
            names.recv().unwrap()
        };
        for panics in [false, true, false] {
            wait_until("a job of the image thread", || run(panics));
        }
    }
}
