//! A worker, on its starter's side.

use std::cell::Cell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use clade_io::seqpacket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Signal, pidfd_send_signal};

use super::pace::{Pace, in_groups};
use super::{Answer, EnterOrder, Inherited, Made, OpenOrder, Order, SaveOrder, SavedFiles, failed, receive, send};
use crate::fleet::FleetError;
use clade_vmm::vm::SealedParts;

/// Time limit of a worker to make its VM.
const PATIENCE: Duration = Duration::from_secs(60);
/// Interval of the checks for cancellation while a request waits for workers.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Time limit for the end of an unwanted worker.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A worker's process, a child of the zygote, which reaps it.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its pid, for display.
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
}

impl Process {
    /// Waits until the process has ended, and kills it if it does not.
    fn end(self) {
        if !has_ended(&self.pidfd, END_TIMEOUT) {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            has_ended(&self.pidfd, END_TIMEOUT);
        }
    }
}

/// Waits up to `timeout` for the end of a process.
pub(crate) fn has_ended(pidfd: &OwnedFd, timeout: Duration) -> bool {
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

/// A worker whose VM does not run yet. Ended when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    socket: OwnedFd,
    process: Option<Process>,
    /// Whether its VM runs. It does not read its socket any more then.
    is_running: Cell<bool>,
}

impl Worker {
    /// Makes a worker from `process`, which has the other end of `socket`.
    ///
    /// # Errors
    /// When the socket cannot be set up. The process ends then.
    pub(crate) fn new(socket: OwnedFd, process: Process) -> Result<Self, FleetError> {
        let worker = Self { socket, process: Some(process), is_running: Cell::new(false) };
        for (which, timeout) in [(Timeout::Recv, POLL_INTERVAL), (Timeout::Send, PATIENCE)] {
            set_socket_timeout(&worker.socket, which, Some(timeout)).map_err(|errno| failed(errno.into()))?;
        }
        Ok(worker)
    }

    /// Returns its pid, or 0 once it has been let go.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.pid)
    }

    /// Returns a pidfd of its process, or None once it has been let go.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn pidfd(&self) -> Result<Option<OwnedFd>, FleetError> {
        self.process.as_ref().map(|process| process.pidfd.try_clone()).transpose().map_err(failed)
    }

    /// Sends it an order.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn order(&self, order: &Order, files: &[BorrowedFd<'_>]) -> Result<(), FleetError> {
        send(&self.socket, order, files).map_err(failed)
    }

    /// Sends the first order, with its grants.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn enter(&self, order: EnterOrder) -> Result<(), FleetError> {
        self.order(&Order::Enter(Box::new(order)), &[])
    }

    /// Sends the parts that it starts a child from, after [`Order::Fork`], with the files of the
    /// copies `ahead`.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn give_image(
        &self,
        inherited: &Inherited,
        ahead: &[BorrowedFd<'_>],
        parts: &SealedParts,
    ) -> Result<(), FleetError> {
        let given = send(&self.socket, inherited, ahead);
        let given = given.and_then(|()| parts.send(&self.socket).map_err(io::Error::other));
        // A worker that has gone left its reason.
        given.map_err(|error| match self.last_words() {
            Some(Answer::Failed { kind, text }) => FleetError::Refused { kind, text },
            _ => failed(error),
        })
    }

    /// Returns its last answers that no code has received.
    fn last_words(&self) -> Option<Answer> {
        // A process that has closed its end with something unread resets the connection first.
        let heard = (0..2).find_map(|_| receive(&self.socket).ok());
        heard.map(|(answer, _)| answer)
    }

    /// Has it write a snapshot of `parts`, which may be based on one of `base`.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn save(
        &self,
        order: SaveOrder,
        base: Option<&SealedParts>,
        parts: &SealedParts,
    ) -> Result<(), FleetError> {
        self.order(&Order::Save(Box::new(order)), &[])?;
        base.map_or(Ok(()), |base| base.send(&self.socket))?;
        Ok(parts.send(&self.socket)?)
    }

    /// Has it open a snapshot.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn open(&self, order: OpenOrder) -> Result<(), FleetError> {
        self.order(&Order::Open(Box::new(order)), &[])
    }

    /// Waits for the image of the snapshot that it opens. `check` is called every
    /// [`POLL_INTERVAL`].
    ///
    /// # Errors
    /// That of `check`. When the worker refuses, or has ended.
    pub(crate) fn opened(self, check: impl Fn() -> Result<(), FleetError>) -> Result<SealedParts, FleetError> {
        // All of memory may be read.
        match self.answer_within(Duration::MAX, &check)? {
            Answer::Opened => {}
            other => return Err(failed(unexpected(&other))),
        }
        let parts = SealedParts::receive_while(&self.socket, &|| check().is_ok())?;
        self.kill();
        Ok(parts)
    }

    /// Kills it, without a wait: its work is done.
    fn kill(mut self) {
        self.send_kill();
        self.let_go();
    }

    /// Sends it SIGKILL.
    fn send_kill(&self) {
        if let Some(process) = &self.process
            && let Err(errno) = pidfd_send_signal(&process.pidfd, Signal::KILL)
        {
            // The process has ended by itself.
            tracing::debug!(%errno, pid = process.pid, "a worker is not killed");
        }
    }

    /// Lets the worker go: its process no longer ends with this value.
    fn let_go(&mut self) {
        self.process = None;
    }

    /// Waits until its snapshot is written. Calls `watch` with the bytes done and in all; once that
    /// returns true, the worker stops, which is an error.
    ///
    /// # Errors
    /// When the worker refuses, or has ended.
    pub(crate) fn saved(&self, watch: impl Fn(Option<(u64, u64)>) -> bool) -> Result<SavedFiles, FleetError> {
        let mut stopped: Option<Instant> = None;
        loop {
            if stopped.is_some_and(|at| at.elapsed() > END_TIMEOUT) {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            let progress = match receive(&self.socket) {
                Ok((Answer::Saved(saved), _)) => return Ok(*saved),
                Ok((Answer::Failed { kind, text }, _)) => return Err(FleetError::Refused { kind, text }),
                Ok((Answer::Saving { done, total }, _)) => Some((done, total)),
                Ok((other, _)) => return Err(failed(unexpected(&other))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
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
    pub(crate) fn answer(&self, check: impl Fn() -> Result<(), FleetError>) -> Result<Answer, FleetError> {
        self.answer_within(PATIENCE, check)
    }

    fn answer_within(
        &self,
        patience: Duration,
        check: impl Fn() -> Result<(), FleetError>,
    ) -> Result<Answer, FleetError> {
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
                Ok((Answer::Failed { kind, text }, _)) => return Err(FleetError::Refused { kind, text }),
                answer => return answer.map(|(answer, _)| answer).map_err(failed),
            }
        }
    }

    /// Waits until the worker is ready for the next order.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub(crate) fn ready(&self) -> Result<(), FleetError> {
        match self.answer(|| Ok(()))? {
            Answer::Ready => Ok(()),
            other => Err(failed(unexpected(&other))),
        }
    }

    /// Waits until its VM is made.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub(crate) fn made(&self, check: impl Fn() -> Result<(), FleetError>) -> Result<Made, FleetError> {
        match self.answer(check)? {
            Answer::Made { name, identity, erased } => Ok(Made { name, identity, erased }),
            other => Err(failed(unexpected(&other))),
        }
    }

    /// The same for a worker that may run at once. When `check` fails, its socket is closed. Then
    /// the worker has either already reported its VM as made, or never will, and ends.
    fn made_or_never(&self, check: impl Fn() -> Result<(), FleetError>) -> Result<Made, FleetError> {
        self.made(check).or_else(|error| {
            self.dismiss();
            self.made(|| Ok(())).map_err(|_| error)
        })
    }

    /// Lets its VM run.
    pub(crate) fn run(&self) {
        // A send to a worker that has gone fails later, at the wait for its answer.
        let _ = seqpacket::send(&self.socket, &[1], &[]);
    }

    /// Waits until its VM runs.
    fn wait_running(&self, name: &str) {
        match self.answer(|| Ok(())) {
            Ok(Answer::Running) => self.is_running.set(true),
            other => tracing::warn!(name, ?other, "a VM has ended before it ran"),
        }
    }

    /// Has the worker end, without waiting for that.
    fn dismiss(&self) {
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

/// The workers of a request that has not succeeded yet. Ended when dropped.
#[derive(Debug)]
pub(crate) struct Workers(pub(crate) Vec<Worker>);

impl Workers {
    /// Waits until all have made their VMs, then lets all run at `pace`, and lets them go. Calls
    /// `check` with the number made so far, and again between the groups of a pace.
    ///
    /// # Errors
    /// That of `check` or of a worker. The drop of the workers then ends the VMs of earlier groups,
    /// and the others have not run.
    pub(crate) fn run_together(
        &mut self,
        pace: Pace,
        check: impl Fn(usize) -> Result<(), FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        let mut made = Vec::with_capacity(self.0.len());
        let is_single = self.0.len() == 1;
        if let [worker] = self.0.as_slice() {
            // A single VM waits for no other: every wait of one process for another costs a
            // wake-up.
            worker.run();
            made.push(worker.made_or_never(|| check(0))?);
        } else {
            for worker in &self.0 {
                let child = worker.made(|| check(made.len()))?;
                made.push(child);
            }
            check(made.len())?;
        }
        // All VMs are made, so all may run. From here on a failure ends only its own VM.
        let mut started = 0;
        let start = |group: &[Worker]| {
            if !is_single {
                group.iter().for_each(Worker::run);
            }
            group.iter().zip(&made[started..]).for_each(|(worker, child)| worker.wait_running(&child.name));
            started += group.len();
        };
        in_groups(&self.0, pace, start, || check(made.len()))?;
        self.0.iter_mut().for_each(Worker::let_go);
        Ok(made)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // All at once. Then the drops wait for one after the other.
        for worker in &self.0 {
            if worker.is_running.get() { worker.send_kill() } else { worker.dismiss() }
        }
    }
}

fn unexpected(answer: &Answer) -> io::Error {
    io::Error::other(format!("it answered {answer:?}"))
}
