//! A worker, on its starter's side.

use std::cell::Cell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use clade_host_io::seqpacket;
use clade_snapshot::Saved;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Signal, pidfd_send_signal};

use super::detach::unpacked;
use super::{
    ConfineRequest, DetachRequest, Inherited, ReadSnapshotRequest, ReportedVm, WorkerAnswer, WorkerRequest,
    WriteSnapshotRequest, failed, receive, send,
};
use clade_api::{DaemonError, DetachedInfo};
use clade_vmm::vm::{CopiedFile, SealedParts};

/// Time limit of a worker to make its VM, and of a group of workers to report that their VMs run.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Interval of the checks for cancellation while a request waits for workers.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Time limit for the end of an unwanted worker.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A worker's process, a child of the zygote, which reaps it.
#[derive(Debug)]
pub struct WorkerProcess {
    /// Its pid, for display.
    pub pid: u32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

impl WorkerProcess {
    /// Waits until the process has ended, and kills it if it does not.
    fn end(self) {
        if !has_ended(&self.pidfd, END_TIMEOUT) {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            has_ended(&self.pidfd, END_TIMEOUT);
        }
    }
}

/// Waits up to `timeout` for the end of a process.
pub fn has_ended(pidfd: &OwnedFd, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], left.as_ref()) {
            Ok(ended) => return ended > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// An image with copies of the files that a VM's process can write.
#[derive(Debug)]
pub struct DetachedParts {
    /// Counts of the copies.
    pub counts: DetachedInfo,
    /// The image with the copies.
    pub image: SealedParts,
    /// The files of the copies.
    pub made: Vec<CopiedFile>,
}

/// A worker whose VM does not run yet. Ended when dropped.
#[derive(Debug)]
pub struct Worker {
    socket: OwnedFd,
    process: Option<WorkerProcess>,
    /// Whether its VM runs. It does not read its socket any more then.
    pub(crate) is_running: Cell<bool>,
}

impl Worker {
    /// Makes a worker from `process`, which has the other end of `socket`.
    ///
    /// # Errors
    /// When the socket cannot be set up. The process ends then.
    pub fn new(socket: OwnedFd, process: WorkerProcess) -> Result<Self, DaemonError> {
        let worker = Self { socket, process: Some(process), is_running: Cell::new(false) };
        for (which, timeout) in [(Timeout::Recv, POLL_INTERVAL), (Timeout::Send, PATIENCE)] {
            set_socket_timeout(&worker.socket, which, Some(timeout)).map_err(|errno| failed(errno.into()))?;
        }
        Ok(worker)
    }

    /// Returns its pid, or 0 once it has been let go.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.pid)
    }

    /// Returns a pidfd of its process, or None once it has been let go.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn pidfd(&self) -> Result<Option<OwnedFd>, DaemonError> {
        self.process.as_ref().map(|process| process.pidfd.try_clone()).transpose().map_err(failed)
    }

    /// Sends it a request.
    ///
    /// # Errors
    /// When it has ended.
    pub fn request(&self, request: &WorkerRequest, files: &[BorrowedFd<'_>]) -> Result<(), DaemonError> {
        send(&self.socket, request, files).map_err(failed)
    }

    /// Sends the first request, with its grants.
    ///
    /// # Errors
    /// When it has ended.
    pub fn confine(&self, request: ConfineRequest) -> Result<(), DaemonError> {
        self.request(&WorkerRequest::Confine(Box::new(request)), &[])
    }

    /// Sends the parts that it starts a child from, after [`WorkerRequest::Fork`], with the files
    /// of the copies `ahead`.
    ///
    /// # Errors
    /// When it has ended.
    pub fn give_image(
        &self,
        inherited: &Inherited,
        ahead: &[BorrowedFd<'_>],
        parts: &SealedParts,
    ) -> Result<(), DaemonError> {
        let given = send(&self.socket, inherited, ahead);
        let given = given.and_then(|()| parts.send(&self.socket).map_err(io::Error::other));
        // A worker that has gone left its reason.
        given.map_err(|error| match self.read_error() {
            Some(WorkerAnswer::Failed { kind, text }) => DaemonError::Refused { kind, text },
            _ => failed(error),
        })
    }

    /// Returns its last answers that no code has received.
    fn read_error(&self) -> Option<WorkerAnswer> {
        // A process that has closed its end with something unread resets the connection first.
        let heard = (0..2).find_map(|_| receive(&self.socket).ok());
        heard.map(|(answer, _)| answer)
    }

    /// Has it write a snapshot of `parts`, which may be based on one of `base`.
    ///
    /// # Errors
    /// When it has ended.
    pub fn save(
        &self,
        request: WriteSnapshotRequest,
        base: Option<&SealedParts>,
        parts: &SealedParts,
    ) -> Result<(), DaemonError> {
        self.request(&WorkerRequest::Save(Box::new(request)), &[])?;
        base.map_or(Ok(()), |base| base.send(&self.socket))?;
        Ok(parts.send(&self.socket)?)
    }

    /// Has it open a snapshot.
    ///
    /// # Errors
    /// When it has ended.
    pub fn open(&self, request: ReadSnapshotRequest) -> Result<(), DaemonError> {
        self.request(&WorkerRequest::Open(Box::new(request)), &[])
    }

    /// Waits for the image of the snapshot that it opens. `check` is called every
    /// `POLL_INTERVAL`.
    ///
    /// # Errors
    /// That of `check`. When the worker refuses, or has ended.
    pub fn opened(self, check: impl Fn() -> Result<(), DaemonError>) -> Result<SealedParts, DaemonError> {
        // All of memory may be read.
        match self.answer_within(Duration::MAX, &check)? {
            WorkerAnswer::Opened => {}
            other => return Err(failed(unexpected(&other))),
        }
        let parts = SealedParts::receive_while(&self.socket, &|| check().is_ok())?;
        self.kill();
        Ok(parts)
    }

    /// Has it copy the files of `parts` that a VM's process can write, except for `known` ones
    /// ([`KnownFiles`](super::KnownFiles)). Waits for the copies and for the
    /// end of the process, which could write them. `check` is called every `POLL_INTERVAL`.
    ///
    /// # Errors
    /// That of `check`. When the worker refuses, or does not end.
    pub fn detach(
        mut self,
        request: DetachRequest,
        known: &SealedParts,
        parts: &SealedParts,
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<DetachedParts, DaemonError> {
        let copied = self.copied(request, known, parts, check);
        // Also after a failure: it may be in the middle of a long copy.
        self.send_kill();
        let copied = copied?;
        let ended = self.process.take().is_some_and(|process| has_ended(&process.pidfd, END_TIMEOUT));
        if ended { Ok(copied) } else { Err(failed(io::ErrorKind::TimedOut.into())) }
    }

    fn copied(
        &self,
        request: DetachRequest,
        known: &SealedParts,
        parts: &SealedParts,
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<DetachedParts, DaemonError> {
        self.request(&WorkerRequest::Detach(Box::new(request)), &[])?;
        known.send(&self.socket)?;
        parts.send(&self.socket)?;
        // All of memory may be copied.
        let counts = match self.answer_within(Duration::MAX, &check)? {
            WorkerAnswer::Detached(counts) => counts,
            other => return Err(failed(unexpected(&other))),
        };
        let receive = || SealedParts::receive_while(&self.socket, &|| check().is_ok());
        let image = receive()?;
        let (made, _) = unpacked(receive()?)?;
        Ok(DetachedParts { counts, image, made })
    }

    /// Kills it, without a wait: its work is done.
    fn kill(mut self) {
        self.send_kill();
        self.let_go();
    }

    /// Waits up to `timeout` for its end. One that was let go counts as ended.
    pub(crate) fn has_ended(&self, timeout: Duration) -> bool {
        self.process.as_ref().is_none_or(|process| has_ended(&process.pidfd, timeout))
    }

    /// Sends it SIGKILL.
    pub(crate) fn send_kill(&self) {
        if let Some(process) = &self.process
            && let Err(errno) = pidfd_send_signal(&process.pidfd, Signal::KILL)
        {
            // The process has ended by itself.
            tracing::debug!(%errno, pid = process.pid, "a worker is not killed");
        }
    }

    /// Lets the worker go: its process no longer ends with this value.
    pub(crate) fn let_go(&mut self) {
        self.process = None;
    }

    /// Waits until its snapshot is written. Calls `watch` with the bytes done and in all; once that
    /// returns true, the worker stops, which is an error, unless the snapshot is in its place already.
    ///
    /// # Errors
    /// When the worker refuses, has ended, or does not end.
    pub fn saved(&self, watch: impl Fn(Option<(u64, u64)>) -> bool) -> Result<Saved, DaemonError> {
        let mut stopped: Option<Instant> = None;
        loop {
            match stopped.map(|at| at.elapsed()) {
                Some(since) if since > 2 * END_TIMEOUT => return Err(failed(io::ErrorKind::TimedOut.into())),
                // The snapshot may be in its place: the worker's answers so far are read below.
                Some(since) if since > END_TIMEOUT => self.send_kill(),
                _ => {}
            }
            let progress = match receive(&self.socket) {
                Ok((WorkerAnswer::Saved(saved), _)) => return Ok(*saved),
                Ok((WorkerAnswer::Failed { kind, text }, _)) => return Err(DaemonError::Refused { kind, text }),
                Ok((WorkerAnswer::Saving { done, total }, _)) => Some((done, total)),
                Ok((other, _)) => return Err(failed(unexpected(&other))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                // The worker ended without reading the request to stop. Its earlier answer comes next.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
                Err(error) => return Err(failed(error)),
            };
            if watch(progress) && stopped.is_none() {
                stopped = Some(Instant::now());
                self.run();
            }
        }
    }

    /// Waits for its answer. `check` is called every [`POLL_INTERVAL`].
    ///
    /// # Errors
    /// That of `check`. When the worker refuses, has ended, or does not answer in time.
    pub(crate) fn answer(&self, check: impl Fn() -> Result<(), DaemonError>) -> Result<WorkerAnswer, DaemonError> {
        self.answer_within(PATIENCE, check)
    }

    fn answer_within(
        &self,
        patience: Duration,
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<WorkerAnswer, DaemonError> {
        let begun = Instant::now();
        loop {
            match receive(&self.socket) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => {
                    check()?;
                    if begun.elapsed() > patience {
                        return Err(failed(io::ErrorKind::TimedOut.into()));
                    }
                }
                // The worker ended without reading its permission. Its earlier answer comes next.
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset) => {}
                Ok((WorkerAnswer::Failed { kind, text }, _)) => return Err(DaemonError::Refused { kind, text }),
                answer => return answer.map(|(answer, _)| answer).map_err(failed),
            }
        }
    }

    /// Waits until the worker is ready for the next request.
    ///
    /// # Errors
    /// When the worker has ended, or could not make its VM.
    pub fn ready(&self) -> Result<(), DaemonError> {
        match self.answer(|| Ok(()))? {
            WorkerAnswer::Ready => Ok(()),
            other => Err(failed(unexpected(&other))),
        }
    }

    /// Waits until its VM is made.
    ///
    /// # Errors
    /// When the worker has ended, or could not make its VM.
    pub fn made(&self, check: impl Fn() -> Result<(), DaemonError>) -> Result<ReportedVm, DaemonError> {
        self.made_until(Instant::now() + PATIENCE, check)
    }

    /// The same, until `deadline`.
    ///
    /// # Errors
    /// As for [`Self::made`].
    pub(crate) fn made_until(
        &self,
        deadline: Instant,
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<ReportedVm, DaemonError> {
        match self.answer_within(deadline.saturating_duration_since(Instant::now()), check)? {
            WorkerAnswer::Made { identity, erased, network } => Ok(ReportedVm { identity, erased, network }),
            other => Err(failed(unexpected(&other))),
        }
    }

    /// The same for a worker that may run at once. When `check` fails, its socket is closed. Then
    /// the worker has either already reported its VM as made, or never will, and ends.
    pub(crate) fn wait_or_abort(&self, check: impl Fn() -> Result<(), DaemonError>) -> Result<ReportedVm, DaemonError> {
        self.made(check).or_else(|error| {
            self.dismiss();
            self.made(|| Ok(())).map_err(|_| error)
        })
    }

    /// Lets its VM run.
    pub fn run(&self) {
        // A send to a worker that has gone fails later, at the wait for its answer.
        let _ = seqpacket::send(&self.socket, &[1], &[]);
    }

    /// Waits until its VM runs, until `deadline` or the failure of `check`.
    pub(crate) fn wait_running(&self, deadline: Instant, check: impl Fn() -> Result<(), DaemonError>) {
        match self.answer_within(deadline.saturating_duration_since(Instant::now()), check) {
            Ok(WorkerAnswer::Running) => self.is_running.set(true),
            other => tracing::warn!(pid = self.pid(), ?other, "a VM has not reported that it runs"),
        }
    }

    /// Has the worker end, without waiting for that.
    pub(crate) fn dismiss(&self) {
        // The worker then ends by itself, and leaves no sockets behind.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            self.dismiss();
            process.end();
        }
    }
}

/// Called with VMs that are made and have not run.
pub type BeforeTheyRun<'a> = dyn Fn(&[ReportedVm]) -> Result<(), DaemonError> + 'a;

fn unexpected(answer: &WorkerAnswer) -> io::Error {
    io::Error::other(format!("it answered {answer:?}"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::{Child, Command};

    use clade_snapshot::SnapshotId;
    use clade_vmm::vm::VmConfig;
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::super::{KnownFiles, packed};
    use super::*;

    /// A process that does not end by itself, and the other end of its starter's socket.
    fn worker() -> (Worker, OwnedFd, Child) {
        let (ours, theirs) = seqpacket::pair().unwrap();
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        (Worker::new(ours, WorkerProcess { pid, pidfd }).unwrap(), theirs, child)
    }

    /// Sends an image without layers: nothing reads it here.
    fn send_parts(socket: &OwnedFd) {
        let hello = [b"CLADEIMG".as_slice(), &1u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
        let bytes = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
        seqpacket::send(socket, &hello, &[bytes.as_fd()]).unwrap();
    }

    fn parts() -> SealedParts {
        let (ours, theirs) = seqpacket::pair().unwrap();
        send_parts(&theirs);
        SealedParts::receive(&ours).unwrap()
    }

    fn request() -> DetachRequest {
        let config = VmConfig::new(32 << 20, 1).unwrap();
        DetachRequest { config, overlays: Vec::new() }
    }

    #[test]
    fn a_checkpoint_waits_for_the_end_of_the_worker_that_copies_it() {
        let (one, theirs, mut child) = worker();
        let pidfd = one.pidfd().unwrap().unwrap();
        let counts = DetachedInfo { copied_pages: 5, ..DetachedInfo::default() };
        send(&theirs, &WorkerAnswer::Detached(counts), &[]).unwrap();
        send_parts(&theirs);
        let made =
            vec![CopiedFile { of: (0, 1, 2, 3, 4), runs: std::iter::once(5..6).collect(), copy: (0, 1, 7, 8, 9) }];
        packed(&made, Vec::new()).unwrap().send(&theirs).unwrap();
        let known = packed(&KnownFiles::default(), Vec::new()).unwrap();
        let found = one.detach(request(), &known, &parts(), || Ok(())).unwrap();
        assert_eq!((found.counts, found.image.descriptors(), found.made), (counts, 1, made));
        assert!(has_ended(&pidfd, Duration::ZERO), "the copier had the copies open for writing");
        child.wait().unwrap();
    }

    /// A stop that comes too late: the snapshot is in its place, and the VM's next one is based on it.
    #[test]
    fn a_save_that_ends_before_it_reads_the_stop_is_saved() {
        let (one, theirs, mut child) = worker();
        let saved = Saved {
            id: SnapshotId::new(7),
            data_pages: 1,
            zero_pages: 2,
            data_bytes: 4096,
            base_untold: false,
            base_elsewhere: false,
        };
        send(&theirs, &WorkerAnswer::Saving { done: 0, total: 1 }, &[]).unwrap();
        let theirs = Cell::new(Some(theirs));
        let asks = Cell::new(0);
        let found = one.saved(|_| {
            asks.set(asks.get() + 1);
            // The stop is in the socket.
            if asks.get() == 2
                && let Some(theirs) = theirs.take()
            {
                send(&theirs, &WorkerAnswer::Saved(Box::new(saved)), &[]).unwrap();
            }
            true
        });
        assert_eq!(found.unwrap(), saved);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_copier_that_lies_or_ends_is_an_error_and_ends() {
        let cancelled = || DaemonError::Refused { kind: clade_api::ProblemKind::NoRoom, text: "full".to_owned() };
        for wrong in 0..6 {
            let (one, theirs, mut child) = worker();
            let refused = WorkerAnswer::Failed { kind: clade_api::ProblemKind::NoRoom, text: "full".to_owned() };
            match wrong {
                0 => send(&theirs, &refused, &[]).unwrap(),
                1 => send(&theirs, &WorkerAnswer::Running, &[]).unwrap(),
                // Below.
                2 => {}
                // An answer, and other bytes than an image's.
                3 => {
                    send(&theirs, &WorkerAnswer::Detached(DetachedInfo::default()), &[]).unwrap();
                    seqpacket::send(&theirs, b"not an image", &[]).unwrap();
                }
                // No list of copies.
                5 => {
                    send(&theirs, &WorkerAnswer::Detached(DetachedInfo::default()), &[]).unwrap();
                    (0..2).for_each(|_| send_parts(&theirs));
                }
                // An answer, and no image: the request is cancelled.
                _ => send(&theirs, &WorkerAnswer::Detached(DetachedInfo::default()), &[]).unwrap(),
            }
            let theirs = if wrong == 2 {
                drop(theirs);
                None
            } else {
                Some(theirs)
            };
            let check = || if wrong == 4 { Err(cancelled()) } else { Ok(()) };
            one.detach(request(), &parts(), &parts(), check).map(drop).unwrap_err();
            assert!(child.try_wait().unwrap().is_some(), "case {wrong}");
            drop(theirs);
        }
    }
}
