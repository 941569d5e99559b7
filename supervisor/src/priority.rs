//! Real-time priority of a VM's process while its image is taken, and of the only child of a fork while it
//! starts.
//!
//! A VM is paused once each of its vCPU threads has left the guest. A vCPU that computes has used up
//! its share of the processor, so the fair scheduler lets it wait for others, for milliseconds, in
//! the pause. A worker may not change that: a filter of system calls cannot tell its own threads from
//! others'. So the supervisor raises the threads of a worker before it requests an image, and gives
//! their priority back when it has the answer. It raises the worker of a child from the image on, until
//! the child's vCPUs have entered their guest.
//!
//! A compromised process must not take the host's processors by that:
//!
//! - One process at a time is raised, for at most [`HOLD`]. A thread of higher priority ends it.
//! - Raises for images take a tenth of the time, and those of children another tenth: a child's comes just after
//!   its parent's. Up to [`BURST`] of the rest may be put off, because forks come in bursts and take half a
//!   millisecond: so at most 19 ms of each come at once.
//!
//! | thread | priority |
//! |---|---|
//! | that ends the raise | 3 |
//! | of the supervisor, while it raises others and sends the request, or gives the image until the child is made | 3 |
//! | of the worker, except vCPUs | 2: it runs before a guest that computes |
//! | vCPU | 1, until it enters the guest |
//!
//! Threads that a raised thread makes are ordinary ones, behind the raised vCPUs. So a worker is raised only
//! if the thread that does the work exists:
//!
//! - For an image the one that answers image requests. It exists from a VM's first one on (`IMAGE_THREAD`).
//! - For a start the vCPUs'. They exist in prepared workers.
//!
//! A child is raised if someone waits for its first instruction and its start is short: not one that starts
//! paused, nor one without the parent's secrets, whose memory is searched for them first.
//!
//! Whoever holds the lock here has the first priority too, or a raised process could keep a processor
//! from it, and so the lock from the thread that ends the raise.
//!
//! On a host with a processor for each thread that wants one nothing is raised: that would take longer
//! than it saves.
//!
//! All of it is best effort. It needs CAP_SYS_NICE, and a supervisor that nobody has given another
//! priority.

mod threads;

use std::io;
use std::num::NonZero;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clade_host_io::realtime::Scheduling;

use rustix::thread::gettid;

use super::processes::ProcessId;
use clade_worker::host_limits::runnable_threads;
use threads::{Kind, Task, Thread, exists, thread_ids, threads_of};

/// The longest time for which a process has real-time priority.
const HOLD: Duration = Duration::from_millis(10);
/// The time from the start of a raise until the next may start, in multiples of the time that it took.
const SHARE: u32 = 10;
/// Raises go on while less than this has been put off.
const BURST: Duration = Duration::from_millis(80);
/// Checks whether the vCPUs of a child have entered their guest, and the time from one to the next.
const ENTRY_CHECKS: u32 = 8;
const ENTRY_INTERVAL: Duration = Duration::from_micros(30);

const FIRST: u32 = 3;
const WORKER: u32 = 2;
const VCPU: u32 = 1;

/// Raises workers, one at a time.
#[derive(Debug)]
pub(super) struct Priority(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The longest time of a raise.
    hold: Duration,
    /// Processors of the host. They are counted once: that reads files.
    processors: usize,
    state: Mutex<State>,
    /// Notified of a raise when the thread that ends raises sleeps without a limit, and of the end.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ending: Ending,
    held: Option<Held>,
    /// The number of raises: each is one's own.
    raises: u64,
    /// When no rest is left that was put off.
    rests_end: RestsEnd,
}

/// When no rest is left that was put off, of raises for each task.
#[derive(Debug, Default)]
struct RestsEnd {
    image: Option<Instant>,
    start: Option<Instant>,
}

impl RestsEnd {
    fn of(&mut self, task: Task) -> &mut Option<Instant> {
        match task {
            Task::Image => &mut self.image,
            Task::Start => &mut self.start,
        }
    }
}

/// The thread that ends raises.
#[derive(Debug, Default, PartialEq, Eq)]
enum Ending {
    #[default]
    Starts,
    /// It waits for a raise.
    Waits,
    /// It waits for the end of a raise.
    Watches,
    /// This process may not raise threads.
    Refused,
    Closed,
}

#[derive(Debug)]
struct Held {
    raise: u64,
    task: Task,
    begun: Instant,
    /// The raised threads, with what they had before.
    threads: Vec<(u32, Scheduling)>,
    /// The supervisor's thread that stays raised for as long.
    caller: Option<(u32, Scheduling)>,
}

/// A raised process. A drop gives its priority back.
#[derive(Debug)]
pub(super) struct Raised {
    shared: Arc<Shared>,
    raise: u64,
    /// The raised threads of vCPUs.
    vcpus: Vec<u32>,
}

impl Default for Priority {
    fn default() -> Self {
        Self::new(HOLD, thread::available_parallelism().map_or(1, NonZero::get))
    }
}

impl Priority {
    fn new(hold: Duration, processors: usize) -> Self {
        let shared = Arc::new(Shared { hold, processors, state: Mutex::default(), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new().name("clade-priority".to_owned());
        if let Err(error) = thread.spawn(move || own.end_raises()) {
            shared.state().ending = refused(&error);
        }
        Self(shared)
    }

    /// Calls `send`, which sends a request to `process`, after its threads were raised if they can be
    /// and the host is busy.
    pub(super) fn raise<T>(&self, process: Option<ProcessId>, send: impl FnOnce() -> T) -> (T, Option<Raised>) {
        let process = process.filter(|_| self.0.is_busy());
        // This thread first, until the request is sent: a raised vCPU that computes would take its
        // processor.
        let Some((process, _own)) = process.and_then(|process| Some((process, OwnRaise::new()?))) else {
            return (send(), None);
        };
        let raised = self.raise_threads(process, Task::Image, None);
        (send(), raised)
    }

    /// Raises the threads of `process`, which is to start a child, and the calling thread, which then gives it
    /// the image: if they can be and the host is busy.
    pub(super) fn raise_start(&self, process: Option<ProcessId>) -> Option<RaisedStart> {
        let process = process.filter(|_| self.0.is_busy())?;
        let own = OwnRaise::new()?;
        let raised =
            self.raise_threads(process, Task::Start, Some((gettid().as_raw_nonzero().get().cast_unsigned(), own.0)))?;
        (!raised.vcpus.is_empty()).then_some(RaisedStart { raised, _own: own })
    }

    /// Gives back the priority of `process`, whose threads a supervisor had raised that has ended since.
    pub(super) fn give_back(process: ProcessId) {
        let Some(threads) = process.open().and_then(|_| thread_ids(process)) else { return };
        for tid in threads {
            let Ok(now) = Scheduling::of(tid) else { continue };
            if now.is_raised(&[WORKER, VCPU])
                && let Err(error) = now.without_raise().give_back(tid, &[WORKER, VCPU])
            {
                tracing::warn!(%error, pid = process.pid(), tid, "a thread of a worker keeps a real-time priority");
            }
        }
    }

    fn raise_threads(&self, process: ProcessId, task: Task, caller: Option<(u32, Scheduling)>) -> Option<Raised> {
        let mut state = self.0.state();
        if !state.may_raise(task) {
            return None;
        }
        let threads = threads_of(process)?;
        // Its threads were listed while it lived.
        process.open()?;
        if !threads.iter().any(|thread| thread.does(task)) {
            return None;
        }
        state.raises += 1;
        let raise = state.raises;
        let begun = Instant::now();
        let mut vcpus = Vec::new();
        let raised = threads.into_iter().filter_map(|Thread { tid, kind }| {
            let priority = kind.priority();
            // One that has a priority has chosen it, until the end of a pause.
            let before = Scheduling::of(tid).ok().filter(Scheduling::is_ordinary)?;
            before.raise(tid, priority).ok()?;
            if !exists(process, tid) {
                // Its id may be that of another process's thread by now.
                let _ = before.give_back(tid, &[priority]);
                return None;
            }
            vcpus.extend((kind == Kind::Vcpu).then_some(tid));
            Some((tid, before))
        });
        tracing::debug!(pid = process.pid(), ?task, "a worker is raised");
        state.held = Some(Held { raise, task, begun, threads: raised.collect(), caller });
        if state.ending == Ending::Waits {
            self.0.changed.notify_all();
        }
        Some(Raised { shared: Arc::clone(&self.0), raise, vcpus })
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        let _own = OwnRaise::new();
        let mut state = self.0.state();
        state.ending = Ending::Closed;
        // Here: the process may end before its other threads run.
        state.give_back();
        self.0.changed.notify_all();
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        let _own = OwnRaise::new();
        let mut state = self.shared.state();
        // It may have ended by time.
        if let Some(held) = state.held.as_mut().filter(|held| held.raise == self.raise) {
            // Whoever holds the lock has the first priority.
            held.caller = None;
            state.give_back();
        }
    }
}

/// A raised worker that starts a child, and the calling thread. Both are given back by a drop, the worker
/// first.
pub(super) struct RaisedStart {
    raised: Raised,
    _own: OwnRaise,
}

impl RaisedStart {
    /// Gives the worker's priority back: its child is made. Its vCPUs enter the guest next, which ends their
    /// priority. Before that they would lose their processor by it, so this waits for them, a short time.
    pub(super) fn end(self) {
        for _ in 0..ENTRY_CHECKS {
            if !self.has_raised_vcpus() {
                return;
            }
            thread::sleep(ENTRY_INTERVAL);
        }
    }

    /// Returns whether a vCPU thread has the priority still.
    fn has_raised_vcpus(&self) -> bool {
        self.raised.vcpus.iter().any(|tid| Scheduling::of(*tid).is_ok_and(|now| now.is_raised(&[VCPU])))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether more threads of the host want a processor than it has.
    fn is_busy(&self) -> bool {
        runnable_threads().is_some_and(|runnable| runnable > self.processors as u64)
    }

    /// Ends raises by time, until the supervisor ends.
    fn end_raises(&self) {
        let own = Scheduling::of(0).and_then(|before| before.raise(0, FIRST));
        let mut state = self.state();
        if let Err(error) = own {
            state.ending = refused(&error);
            return;
        }
        while state.ending != Ending::Closed {
            let Some(held) = &state.held else {
                state.ending = Ending::Waits;
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = self.hold.saturating_sub(held.begun.elapsed());
            if left.is_zero() {
                state.give_back();
                continue;
            }
            state.ending = Ending::Watches;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn may_raise(&mut self, task: Task) -> bool {
        matches!(self.ending, Ending::Waits | Ending::Watches)
            && self.held.is_none()
            && self.rests_end.of(task).is_none_or(|end| end <= Instant::now() + BURST)
    }

    /// Gives the priority of the raised threads back.
    fn give_back(&mut self) {
        let Some(held) = self.held.take() else { return };
        for (tid, before) in &held.threads {
            // Fails for a thread that has ended.
            let _ = before.give_back(*tid, &[WORKER, VCPU]);
        }
        if let Some((tid, before)) = held.caller {
            let _ = before.give_back(tid, &[FIRST]);
        }
        // The raise itself is not a part of its rest.
        let rests_end = self.rests_end.of(held.task);
        let begun = rests_end.map_or(held.begun, |end| end.max(held.begun));
        *rests_end = Some(begun + held.begun.elapsed() * SHARE);
    }
}

/// The calling thread has the first priority until this is dropped.
struct OwnRaise(Scheduling);

impl OwnRaise {
    fn new() -> Option<Self> {
        let before = Scheduling::of(0).ok().filter(Scheduling::is_default)?;
        before.raise(0, FIRST).ok()?;
        Some(Self(before))
    }
}

impl Drop for OwnRaise {
    fn drop(&mut self) {
        if let Err(error) = self.0.give_back(0, &[FIRST]) {
            tracing::error!(%error, "a thread of the supervisor keeps a real-time priority");
        }
    }
}

fn refused(error: &io::Error) -> Ending {
    tracing::debug!(%error, "workers are not raised");
    Ending::Refused
}

#[cfg(test)]
mod tests;
