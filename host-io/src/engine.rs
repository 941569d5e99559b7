//! The engine: an io_uring and the operations in it.
//!
//! ```text
//!  submit ──► backlog ──flush──► kernel ──reap──► Completion (memory and token come back)
//!                ▲                  │ short, EINTR, EAGAIN
//!                └──────────────────┘
//! ```
//!
//! At most `depth` operations are in the kernel. Each takes up to two entries, because a timer may
//! precede it. The completion queue has room for all of them, so it never overflows.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::buffer::Fragment;
use crate::op::{Op, OpError, Request, Step, Way};

/// The user data of completions that belong to no operation: of timers and of cancellations.
const NO_OPERATION: u64 = u64::MAX;
/// How long a dropped engine waits for the kernel. After that it leaks the operations and their
/// memory.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// Why an engine cannot be made, or cannot submit.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// io_uring is not available.
    #[error("no io_uring of {depth} operations (kernel.io_uring_disabled, or a seccomp filter?)")]
    Setup {
        /// The depth that was wanted, in operations.
        depth: u32,
        /// Why the ring cannot be made.
        #[source]
        source: io::Error,
    },
    /// The kernel takes no operations.
    #[error("the kernel takes no operations")]
    Enter(#[source] io::Error),
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion<T> {
    /// The token it was submitted with.
    pub token: T,
    /// Its result.
    pub result: Result<(), OpError>,
    /// The memory that it owned.
    pub buffers: Vec<Fragment>,
}

/// How transfers were done, in steps given to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Steps through the page cache.
    pub cached: u64,
    /// Steps past the page cache.
    pub direct: u64,
    /// Steps past the page cache through a bounce buffer.
    pub bounced: u64,
    /// Steps repeated: short transfers, EINTR, EAGAIN.
    pub continued: u64,
    /// Syncs that succeeded.
    pub synced: u64,
}

/// Operations allowed in a ring: those of [`Op`], their timers, and cancellation.
fn allowed() -> Vec<Restriction> {
    vec![
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_op(opcode::Timeout::CODE),
        Restriction::sqe_op(opcode::AsyncCancel2::CODE),
        #[cfg(feature = "gate")]
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_flags_allowed(squeue::Flags::IO_LINK.bits()),
    ]
}

/// A ring that takes nothing yet.
fn ring(depth: u32) -> io::Result<IoUring> {
    // Two entries for an operation, and one to cancel. The kernel doubles that for completions.
    let ring = IoUring::builder().setup_clamp().setup_r_disabled().build(2 * depth + 2)?;
    // Permanent, and done before the ring is shared: seccomp filters do not see a ring's
    // operations, so a compromised process could open files and sockets through it.
    ring.submitter().register_restrictions(&mut allowed())?;
    Ok(ring)
}

/// Rings that were made ahead, by the depth of their engines.
fn prepared() -> MutexGuard<'static, Vec<(u32, IoUring)>> {
    static PREPARED: Mutex<Vec<(u32, IoUring)>> = Mutex::new(Vec::new());
    PREPARED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs operations; see the module's documentation.
pub struct Engine<T> {
    ring: IoUring,
    event: EventFd,
    depth: usize,
    /// Operations, by their user data in the kernel. Boxed, because the kernel holds addresses
    /// inside.
    ops: Vec<Option<Box<Op<T>>>>,
    free: Vec<usize>,
    /// Operations to be given to the kernel, for the first time or again.
    backlog: VecDeque<usize>,
    /// Operations in the kernel.
    in_kernel: usize,
    /// Completions of timers and cancellations that the kernel has not delivered.
    owed: usize,
    latency: Option<Duration>,
    stats: Stats,
}

impl<T> fmt::Debug for Engine<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({} in the kernel, {} behind)", self.in_kernel, self.backlog.len())
    }
}

impl<T> Engine<T> {
    /// An engine with at most `depth` operations in the kernel at a time. `event` is signalled at
    /// each completion.
    ///
    /// # Errors
    /// When io_uring is not available.
    pub fn new(depth: u32, event: EventFd) -> Result<Self, EngineError> {
        let failed = |source| EngineError::Setup { depth, source };
        let prepared = {
            let mut rings = prepared();
            let at = rings.iter().position(|(of, _)| *of == depth);
            at.map(|at| rings.swap_remove(at).1)
        };
        let ring = prepared.map_or_else(|| ring(depth), Ok).map_err(failed)?;
        ring.submitter().register_eventfd(event.as_raw_fd()).map_err(failed)?;
        ring.submitter().register_enable_rings().map_err(failed)?;
        Ok(Self {
            ring,
            event,
            depth: depth.max(1) as usize,
            ops: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            in_kernel: 0,
            owed: 0,
            latency: None,
            stats: Stats::default(),
        })
    }

    /// Makes the rings of `count` engines of `depth` now: for a process that may make none later.
    ///
    /// # Errors
    /// When io_uring is not available.
    pub fn prepare(depth: u32, count: usize) -> Result<(), EngineError> {
        for _ in 0..count {
            let ring = ring(depth).map_err(|source| EngineError::Setup { depth, source })?;
            prepared().push((depth, ring));
        }
        Ok(())
    }

    /// Delays every operation submitted from now on, as a slow disk would, for tests. The operation
    /// is in the kernel meanwhile.
    pub fn set_latency(&mut self, latency: Option<Duration>) {
        self.latency = latency.filter(|l| !l.is_zero());
    }

    /// Takes an operation. It begins at the next [`Engine::flush`].
    pub fn submit(&mut self, request: Request, token: T) {
        let op = Box::new(Op::new(request, token, self.latency));
        let at = self.free.pop().unwrap_or_else(|| {
            self.ops.push(None);
            self.ops.len() - 1
        });
        self.ops[at] = Some(op);
        self.backlog.push_back(at);
    }

    /// Operations that were submitted and not reaped.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_kernel + self.backlog.len()
    }

    /// Operations that wait for room in the kernel.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.backlog.len()
    }

    /// How transfers were done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Gives the kernel the operations it has room for. A cached transfer may be done within this
    /// call.
    ///
    /// # Errors
    /// When it takes nothing. The operations stay, and the next call tries again.
    pub fn flush(&mut self) -> Result<(), EngineError> {
        while self.in_kernel < self.depth {
            let Some(at) = self.backlog.pop_front() else { break };
            if !self.push(at) {
                self.backlog.push_front(at);
                break;
            }
        }
        self.enter()
    }

    /// Puts an operation into the submission queue. Returns false when the queue is full.
    fn push(&mut self, at: usize) -> bool {
        let Some(op) = self.ops[at].as_mut() else { return true };
        let mut queue = self.ring.submission();
        if queue.capacity() - queue.len() < 2 {
            return false;
        }
        let timer = op.timer().map(|timer| timer.user_data(NO_OPERATION));
        let (entry, way) = op.entry();
        let entry = entry.user_data(at as u64);
        let pushed = match &timer {
            None => push_entry(&mut queue, &entry),
            // Both fit, as was checked above: a timer is never without the operation it is linked
            // to.
            Some(timer) => push_entry(&mut queue, timer) && push_entry(&mut queue, &entry),
        };
        drop(queue);
        if timer.is_some() {
            self.owed += 1;
            // A timer is submitted once: the rest of a short transfer is not delayed again. The kernel reads the
            // timer's time when it takes the entry, before `entry` is called again for this operation.
        }
        match way {
            Way::Cached => self.stats.cached += 1,
            Way::Direct => self.stats.direct += 1,
            Way::Bounced => self.stats.bounced += 1,
        }
        self.in_kernel += 1;
        pushed
    }

    fn enter(&mut self) -> Result<(), EngineError> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Out of memory for now: the entries stay in the queue.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => return Ok(()),
                Err(error) => return Err(EngineError::Enter(error)),
            }
        }
    }

    /// Whether the kernel had no memory to take entries. The caller should flush again soon.
    #[must_use]
    pub fn is_stalled(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Calls `each` with every operation that has ended, and gives the kernel others.
    ///
    /// # Errors
    /// As [`Engine::flush`].
    pub fn reap(&mut self, mut each: impl FnMut(Completion<T>)) -> Result<(), EngineError> {
        // Before the queue is read: a completion that comes meanwhile signals again.
        let _ = self.event.read();
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { break };
            if entry.user_data() == NO_OPERATION {
                self.owed -= 1;
                continue;
            }
            let at = entry.user_data() as usize;
            self.in_kernel -= 1;
            let Some(mut op) = self.ops.get_mut(at).and_then(Option::take) else { continue };
            match op.step(entry.result()) {
                Step::Again => {
                    op.delay = None;
                    #[cfg(feature = "gate")]
                    {
                        op.held = None;
                    }
                    self.stats.continued += 1;
                    self.ops[at] = Some(op);
                    self.backlog.push_back(at);
                }
                Step::Over(result) => {
                    self.stats.synced += u64::from(op.is_sync() && result.is_ok());
                    self.free.push(at);
                    let (token, buffers) = op.into_parts();
                    each(Completion { token, result, buffers });
                }
            }
        }
        if self.backlog.is_empty() { Ok(()) } else { self.flush() }
    }

    /// Cancels all operations. Those that can be cancelled end as [`OpError::Cancelled`]. Transfers
    /// that a device is busy with end as they would have. All of them must still be reaped.
    pub fn cancel(&mut self, mut each: impl FnMut(Completion<T>)) {
        for at in mem::take(&mut self.backlog) {
            if let Some(op) = self.ops[at].take() {
                self.free.push(at);
                let (token, buffers) = op.into_parts();
                each(Completion { token, result: Err(OpError::Cancelled), buffers });
            }
        }
        if self.in_kernel == 0 {
            return;
        }
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(NO_OPERATION);
        let mut queue = self.ring.submission();
        let pushed = push_entry(&mut queue, &cancel);
        drop(queue);
        self.owed += usize::from(pushed);
        if let Err(error) = self.enter() {
            tracing::warn!(%error, "operations could not be cancelled");
        }
    }

    /// Waits up to `patience` for a completion.
    ///
    /// # Errors
    /// When the wait has failed.
    pub fn wait(&mut self, patience: Duration) -> Result<(), EngineError> {
        let time = Timespec::from(patience);
        let args = SubmitArgs::new().timespec(&time);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(EngineError::Enter(error)),
            },
        }
    }
}

impl<T> Drop for Engine<T> {
    fn drop(&mut self) {
        self.cancel(drop);
        let deadline = Instant::now() + LAST_PATIENCE;
        while self.in_kernel > 0 && Instant::now() < deadline {
            if self.wait(Duration::from_millis(100)).is_err() || self.reap(drop).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Operations that would be continued end here.
            self.cancel(drop);
        }
        if self.in_kernel > 0 {
            // The kernel may still write to this memory, so the memory is leaked with its pins:
            // freeing it would let the kernel write to memory of another owner.
            tracing::error!(
                operations = self.in_kernel,
                "the kernel does not let go of operations; their memory is left to it"
            );
            mem::forget(mem::take(&mut self.ops));
        }
    }
}

fn push_entry(queue: &mut squeue::SubmissionQueue<'_>, entry: &squeue::Entry) -> bool {
    // SAFETY: the entry points at nothing (a cancellation), or into an operation that is boxed in
    // `ops` and stays there until its completion is reaped, or for ever if the engine is dropped
    // first; its file and memory are owned by that operation.
    unsafe { queue.push(entry) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_was_made_ahead_does_transfers_and_opens_no_socket() {
        let mut ring = ring(4).unwrap();
        ring.submitter().register_enable_rings().unwrap();
        let mut result = |entry: squeue::Entry| {
            // SAFETY: neither operation works on memory.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        let file = tempfile::tempfile().unwrap();
        assert_eq!(result(opcode::Fsync::new(io_uring::types::Fd(file.as_raw_fd())).build()), 0);
        assert_eq!(result(opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build()), -libc::EACCES);
        assert!(ring.submitter().register_files(&[0]).is_err(), "nor is more registered");
        assert!(ring.submitter().register_restrictions(&mut allowed()).is_err());
    }
}
