//! The zygote: a small process with one thread that has loaded everything that a worker needs, and
//! forks workers.
//!
//! A process with many threads cannot fork safely. One that starts the program anew takes
//! milliseconds for each worker, and shares no memory. The same program starts the zygote, with a
//! socket (`SOCK_SEQPACKET`) as its standard input.
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | starter | one byte, and the mount of all workers' memory files, if there is one |
//! | 2 | zygote | one byte, and the reading end of a pipe with the ends of workers, 8 bytes each: pid and wait status |
//! | request | starter | one byte, and the socket of the worker ([`crate`]) |
//! | answer | zygote | pid and pidfd of the worker; or 0 and the number of the error |
//!
//! The zygote answers requests in order. When its socket is closed, its workers run on; the zygote
//! reaps them, and ends with the last. When it is killed, they run on too, and the starter starts
//! another one.

use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use clade_host_io::seqpacket::{self, Message};
use clade_memory::HugeTmpfs;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions, pidfd_open, waitid, waitpid};

use crate::jail::Confinement;
use crate::{Worker, WorkerProcess, heap, jail, rpc, text};
use clade_api::{DaemonError, WorkerExit};

/// The command-line argument that makes the program a zygote.
pub const ZYGOTE: &str = "zygote";
/// The zygote's argument for a copy of the program in huge pages.
const HUGE_TEXT: &str = "--huge-text";
/// Limit of requests without an answer: a socket's buffer holds as many for sure.
const MAX_WAITING: usize = 64;
/// Time limit of an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The process that [`serve`] returns in.
#[derive(Debug)]
pub enum ZygoteRole {
    /// The zygote, at its end.
    Zygote,
    /// A worker, with its socket.
    Worker(OwnedFd),
}

/// Receives the mount of memory files from the process behind `socket`, which hands the same one,
/// or none, to all of its zygotes.
///
/// # Errors
/// When the process has ended, or sends something else.
pub fn mount(socket: &OwnedFd) -> io::Result<Option<HugeTmpfs>> {
    let Message { mut files, .. } = seqpacket::receive(socket, 1)?;
    files.pop().map(HugeTmpfs::handed_in).transpose()
}

/// Forks workers for the process behind `socket` until that closes it. Returns in the zygote then,
/// and once in each worker, which is not confined yet
/// ([`confine_worker`](crate::confine_worker)). With `huge_text` all workers run from one
/// copy of the program in huge pages: 18 MiB, and a fifth of the time of a worker's start.
///
/// # Errors
/// When this process has more than one thread; when the kernel refuses a call.
#[expect(clippy::needless_pass_by_value, reason = "a worker closes it")]
pub fn serve(socket: OwnedFd, confinement: Confinement, huge_text: bool) -> io::Result<ZygoteRole> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("a process with {threads} threads cannot fork workers")));
    }
    if confinement != Confinement::Off {
        confinement.judge("namespaces", jail::enter_empty()).map_err(io::Error::other)?;
    }
    rpc::warm_up();
    if huge_text && let Err(error) = text::use_huge_pages() {
        tracing::warn!(%error, "the program does not run in huge pages");
    }
    let (exits, write_exits) = io::pipe()?;
    seqpacket::send(&socket, &[1], &[exits.as_fd()])?;
    drop(exits);
    let ended = ChildReaper::watch()?;
    // Last: the calls above are made once.
    jail::confine_zygote(confinement).map_err(io::Error::other)?;
    heap::take_holes();
    let mut is_asked = true;
    while is_asked || ended.has_more() {
        // A closed socket is always ready, and is not polled.
        let mut polled = [PollFd::new(&ended.fd, PollFlags::IN), PollFd::new(&socket, PollFlags::IN)];
        match poll(&mut polled[..1 + usize::from(is_asked)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [has_ended, requested] = polled.map(|fd| !fd.revents().is_empty());
        if has_ended {
            ended.reap(&write_exits);
        }
        if !requested {
            continue;
        }
        let worker = match seqpacket::receive(&socket, 1) {
            Ok(Message { mut files, .. }) => files.pop(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                is_asked = false;
                continue;
            }
            // A descriptor too many: the request is answered, so that answers stay in step.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
            Err(error) => return Err(error),
        };
        let made = worker.ok_or(Errno::MFILE).and_then(|theirs| {
            let Some(pid) = fork()? else { return Ok(Err(theirs)) };
            Ok(Ok((pid, pidfd_open(pid, PidfdFlags::empty())?)))
        });
        match made {
            Ok(Err(theirs)) => {
                ended.forget()?;
                return Ok(ZygoteRole::Worker(theirs));
            }
            Ok(Ok((pid, pidfd))) => {
                seqpacket::send(&socket, &(pid.as_raw_nonzero().get() as u64).to_ne_bytes(), &[pidfd.as_fd()])?;
            }
            Err(errno) => {
                let answer = (errno.raw_os_error() as u64) << 32;
                seqpacket::send(&socket, &answer.to_ne_bytes(), &[])?;
            }
        }
    }
    Ok(ZygoteRole::Zygote)
}

/// Forks. Returns `None` in the new process.
fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: `serve` has seen that the process has one thread, and starts none. So the copy has
    // all of it: no lock is held by a thread that is not there.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Reports ended workers.
struct ChildReaper {
    fd: OwnedFd,
}

impl ChildReaper {
    fn watch() -> io::Result<Self> {
        let signals = child_signals();
        // SAFETY: `signals` is initialised; the old mask is not asked for.
        if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `signals` is initialised, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has returned a new descriptor, which nothing else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Restores the signals in a worker.
    fn forget(&self) -> io::Result<()> {
        let signals = child_signals();
        // SAFETY: `signals` is initialised; the old mask is not asked for.
        match unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const signals, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns whether there is a child that has not been reaped.
    fn has_more(&self) -> bool {
        waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT).is_ok()
    }

    /// Reaps all ended children.
    fn reap(&self, mut to: &PipeWriter) {
        // One signal may stand for many. So it is taken before the children are reaped.
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        let _ = rustix::io::read(&self.fd, &mut record);
        while let Ok(Some((pid, status))) = waitpid(None, WaitOptions::NOHANG) {
            let status = status.as_raw() as u64;
            // The reader may have gone.
            let _ = to.write_all(&(pid.as_raw_nonzero().get() as u64 | status << 32).to_ne_bytes());
        }
    }
}

fn child_signals() -> libc::sigset_t {
    // SAFETY: a signal set is plain numbers, for which zeros are valid.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `signals` is a signal set.
    unsafe { libc::sigemptyset(&raw mut signals) };
    // SAFETY: `signals` is a signal set, and the number is a signal's.
    unsafe { libc::sigaddset(&raw mut signals, libc::SIGCHLD) };
    signals
}

/// Reads the end of a worker from the zygote's pipe.
fn read_exit(mut from: &PipeReader) -> io::Result<WorkerExit> {
    let mut record = [0; 8];
    from.read_exact(&mut record)?;
    let record = u64::from_ne_bytes(record);
    let (pid, status) = (record as u32, (record >> 32) as i32);
    let signal = libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status));
    let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    Ok(WorkerExit { pid, signal, code })
}

/// The process of a zygote, and its socket. The process ends when that is closed.
#[derive(Debug)]
struct ZygoteProcess {
    socket: OwnedFd,
    process: Child,
    /// Whether it may go on to reap its workers when this is dropped.
    is_wanted: bool,
}

impl Drop for ZygoteProcess {
    fn drop(&mut self) {
        if !self.is_wanted {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Reason why workers were not made.
#[derive(Debug)]
enum ForkError {
    /// Requests and answers are no longer in step: the zygote has ended, or does not answer.
    Broken(io::Error),
    /// A lack of resources for them.
    Refused(io::Error),
}

/// The zygote, on its starter's side. Started again when it has ended.
#[derive(Debug)]
pub struct Zygote {
    started: Mutex<Option<ZygoteProcess>>,
    exits: Sender<WorkerExit>,
    confinement: Confinement,
    huge_text: bool,
    env: Vec<(&'static str, &'static str)>,
    /// The mount for workers' memory files of all zygotes, if they use huge pages.
    mount: Option<HugeTmpfs>,
    restarts: AtomicU64,
}

/// The variables of the supervisor that zygotes and workers have: those that they read, and places of files and
/// programs. A guest that breaks into its VM's process reads all that the process has.
const INHERITED: &[&str] = &[
    "CLADE_BENCH_WORKER",
    "CLADE_LOG",
    "CLADE_QUIRKS",
    "CLADE_RUNTIME_DIR",
    "HOME",
    "LD_LIBRARY_PATH",
    "LLVM_PROFILE_FILE",
    "PATH",
    "RUST_BACKTRACE",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
];

impl Zygote {
    /// Returns how often a zygote that had ended was replaced.
    pub fn restarts(&self) -> u64 {
        // Relaxed: a number to show.
        self.restarts.load(Ordering::Relaxed)
    }

    /// Starts the zygote, which sends the ends of its workers to `exits`. Workers have the variables `env`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        exits: Sender<WorkerExit>,
        confinement: Confinement,
        huge_text: bool,
        env: &[(&'static str, &'static str)],
    ) -> Result<Self, DaemonError> {
        let env = env.to_vec();
        let (started, restarts) = (Mutex::new(None), AtomicU64::new(0));
        // A failure is already logged.
        let mount = HugeTmpfs::mount_or_warn().ok();
        let zygote = Self { started, exits, confinement, huge_text, env, mount, restarts };
        let started = zygote.process().map_err(|source| DaemonError::Worker { source })?;
        *zygote.started.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
        Ok(zygote)
    }

    fn process(&self) -> io::Result<ZygoteProcess> {
        let (socket, theirs) = seqpacket::pair()?;
        let mut command = Command::new(PathBuf::from("/proc/self/exe"));
        // The program's path is of little use in a process list.
        command
            .arg0("clade")
            .arg(ZYGOTE)
            .arg("--confine")
            .arg(self.confinement.to_string())
            // Others may hold secrets of whoever started the supervisor.
            .env_clear()
            .envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .envs(self.env.iter().copied())
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null());
        if self.huge_text {
            command.arg(HUGE_TEXT);
        }
        for which in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, which, Some(PATIENCE))?;
        }
        // From here on the process is killed if a step fails.
        let mut started = ZygoteProcess { socket, process: command.spawn()?, is_wanted: false };
        // Its end of the socket, so that its death is seen.
        drop(command);
        let mount: Vec<_> = self.mount.iter().map(AsFd::as_fd).collect();
        seqpacket::send(&started.socket, &[1], &mount)?;
        let begun = seqpacket::receive(&started.socket, 1)?.files.pop();
        let ended = PipeReader::from(begun.ok_or(io::ErrorKind::InvalidData)?);
        let exits = self.exits.clone();
        let forward = move || {
            while let Ok(exit) = read_exit(&ended) {
                if exits.send(exit).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("clade-exits".to_owned()).spawn(forward)?;
        started.is_wanted = true;
        Ok(started)
    }

    /// Makes `count` workers.
    ///
    /// # Errors
    /// When one cannot be made. Those that were made end.
    pub fn workers(&self, count: usize) -> Result<Vec<Worker>, DaemonError> {
        let failed = |source| DaemonError::Worker { source };
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::with_capacity(count);
        if let Some(zygote) = &*started {
            match zygote.fork(count, &mut all) {
                Err(ForkError::Broken(error)) => {
                    tracing::warn!(%error, "the zygote does not answer, and another is started");
                }
                Err(ForkError::Refused(error)) => return Err(failed(error)),
                Ok(()) => return Ok(all),
            }
        }
        // Its later answers belong to forgotten requests.
        if let Some(mut broken) = started.take() {
            broken.is_wanted = false;
        }
        let zygote = started.insert(self.process().map_err(failed)?);
        self.restarts.fetch_add(1, Ordering::Relaxed);
        let left = count - all.len();
        zygote.fork(left, &mut all).map_err(|error| match error {
            ForkError::Broken(error) | ForkError::Refused(error) => failed(error),
        })?;
        Ok(all)
    }
}

impl ZygoteProcess {
    fn fork(&self, count: usize, to: &mut Vec<Worker>) -> Result<(), ForkError> {
        for at in (0..count).step_by(MAX_WAITING) {
            // Everything that this process may lack resources for, before the first request.
            let pairs = (at..count.min(at + MAX_WAITING)).map(|_| seqpacket::pair());
            let pairs: Vec<_> = pairs.collect::<io::Result<_>>().map_err(ForkError::Refused)?;
            for (_, theirs) in &pairs {
                seqpacket::send(&self.socket, &[1], &[theirs.as_fd()]).map_err(ForkError::Broken)?;
            }
            // Every answer is taken, even after a refusal: each belongs to its request.
            let mut refused = None;
            for (socket, theirs) in pairs {
                // Its end of the socket, so that its death is seen.
                drop(theirs);
                let Message { bytes, mut files } = seqpacket::receive(&self.socket, 8).map_err(ForkError::Broken)?;
                let answer = u64::from_ne_bytes(*bytes.first_chunk().unwrap_or(&[0; 8]));
                let Some(pidfd) = files.pop() else {
                    refused = Some(io::Error::from_raw_os_error((answer >> 32) as i32));
                    continue;
                };
                let process = WorkerProcess { pid: answer as u32, pidfd };
                match Worker::new(socket, process) {
                    Ok(worker) => to.push(worker),
                    Err(error) => refused = Some(io::Error::other(error)),
                }
            }
            if let Some(refused) = refused {
                return Err(ForkError::Refused(refused));
            }
        }
        Ok(())
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // The zygote ends when its socket is closed and its last worker has ended. No wait for
        // that.
        drop(self.started.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_read_as_the_kernel_writes_it() {
        let read = |status: u64| {
            let (from, mut to) = io::pipe().unwrap();
            to.write_all(&(7 | status << 32).to_ne_bytes()).unwrap();
            read_exit(&from).unwrap()
        };
        assert_eq!(read(3 << 8), WorkerExit { pid: 7, signal: None, code: Some(3) });
        assert_eq!(read(9), WorkerExit { pid: 7, signal: Some(9), code: None });
        let (from, mut to) = io::pipe().unwrap();
        to.write_all(&[0; 5]).unwrap();
        drop(to);
        assert!(read_exit(&from).is_err());
    }

    #[test]
    fn a_process_with_threads_forks_nobody() {
        // The test harness has threads.
        let (ours, theirs) = seqpacket::pair().unwrap();
        let refused = serve(ours, Confinement::Off, false).unwrap_err().to_string();
        assert!(refused.contains("threads"), "{refused}");
        assert!(seqpacket::receive(&theirs, 1).is_err(), "nothing was promised");
    }
}
