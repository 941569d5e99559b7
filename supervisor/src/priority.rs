//! Real-time priority of a VM's process while its image is taken.
//!
//! A VM is paused once each of its vCPU threads has left the guest. A vCPU that computes has used up
//! its share of the processor, so the fair scheduler lets it wait for others, for milliseconds, in
//! the pause. A worker may not change that: a filter of system calls cannot tell its own threads from
//! others'. So the supervisor raises the threads of a worker before it requests an image, and gives
//! their priority back when it has the answer.
//!
//! A compromised process must not take the host's processors by that:
//!
//! - One process at a time is raised, for at most [`HOLD`]. A thread of higher priority ends it.
//! - Raises take a tenth of the time. Up to [`BURST`] of the rest may be put off, because forks come in
//!   bursts and take half a millisecond: so at most 18 ms come at once.
//!
//! | thread | priority |
//! |---|---|
//! | that ends the raise | 3 |
//! | of the supervisor, while it raises others and sends the request | 3 |
//! | of the worker, except vCPUs | 2: it runs before a guest that computes |
//! | vCPU | 1, until it enters the guest again |
//!
//! The thread that answers an image request exists from a VM's first one on (`IMAGE_THREAD`). The first is
//! not raised: a thread made for it would be an ordinary one, behind the raised vCPUs.
//!
//! Whoever holds the lock here has the first priority too, or a raised process could keep a processor
//! from it, and so the lock from the thread that ends the raise.
//!
//! On a host with a processor for each thread that wants one nothing is raised: that would take longer
//! than it saves.
//!
//! All of it is best effort. It needs CAP_SYS_NICE, and a supervisor that nobody has given another
//! priority.

use std::fs;
use std::io;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clade_host_io::realtime::Scheduling;

use super::processes::ProcessId;
use clade_worker::image::IMAGE_THREAD;

/// The longest time for which a process has real-time priority.
const HOLD: Duration = Duration::from_millis(10);
/// The time from the start of a raise until the next may start, in multiples of the time that it took.
const SHARE: u32 = 10;
/// Raises go on while less than this has been put off.
const BURST: Duration = Duration::from_millis(80);
/// The most threads of a worker that are raised: a worker with more is left alone.
const MAX_THREADS: usize = 256;

const FIRST: u32 = 3;
const WORKER: u32 = 2;
const VCPU: u32 = 1;

/// The prefix of the names of vCPU threads.
const VCPU_NAME: &str = "clade-vcpu";

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
    rests_end: Option<Instant>,
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
    begun: Instant,
    /// The raised threads, with what they had before.
    threads: Vec<(u32, Scheduling)>,
}

/// A raised process. A drop gives its priority back.
#[derive(Debug)]
pub(super) struct Raised {
    shared: Arc<Shared>,
    raise: u64,
}

impl Default for Priority {
    fn default() -> Self {
        Self::new(HOLD)
    }
}

impl Priority {
    fn new(hold: Duration) -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
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
        self.raise_now(process.filter(|_| self.0.is_busy()), send)
    }

    fn raise_now<T>(&self, process: Option<ProcessId>, send: impl FnOnce() -> T) -> (T, Option<Raised>) {
        // This thread first, until the request is sent: a raised vCPU that computes would take its
        // processor.
        let Some((process, _own)) = process.and_then(|process| Some((process, OwnRaise::new()?))) else {
            return (send(), None);
        };
        let raised = self.raise_threads(process);
        (send(), raised)
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

    fn raise_threads(&self, process: ProcessId) -> Option<Raised> {
        let mut state = self.0.state();
        if !state.may_raise() {
            return None;
        }
        let threads = threads_of(process)?;
        // Its threads were listed while it lived.
        process.open()?;
        if !threads.iter().any(|thread| thread.answers_images) {
            return None;
        }
        state.raises += 1;
        let raise = state.raises;
        let begun = Instant::now();
        let raised = threads.into_iter().filter_map(|Thread { tid, priority, .. }| {
            // One that has a priority has chosen it, until the end of a pause.
            let before = Scheduling::of(tid).ok().filter(Scheduling::is_ordinary)?;
            before.raise(tid, priority).ok()?;
            if !exists(process, tid) {
                // Its id may be that of another process's thread by now.
                let _ = before.give_back(tid, &[priority]);
                return None;
            }
            Some((tid, before))
        });
        state.held = Some(Held { raise, begun, threads: raised.collect() });
        if state.ending == Ending::Waits {
            self.0.changed.notify_all();
        }
        Some(Raised { shared: Arc::clone(&self.0), raise })
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
        if state.held.as_ref().is_some_and(|held| held.raise == self.raise) {
            state.give_back();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether more threads of the host want a processor than it has.
    fn is_busy(&self) -> bool {
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        runnable(&load).is_some_and(|runnable| runnable > self.processors)
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
    fn may_raise(&self) -> bool {
        matches!(self.ending, Ending::Waits | Ending::Watches)
            && self.held.is_none()
            && self.rests_end.is_none_or(|end| end <= Instant::now() + BURST)
    }

    /// Gives the priority of the raised threads back.
    fn give_back(&mut self) {
        let Some(held) = self.held.take() else { return };
        for (tid, before) in &held.threads {
            // Fails for a thread that has ended.
            let _ = before.give_back(*tid, &[WORKER, VCPU]);
        }
        // The raise itself is not a part of its rest.
        let rests_end = self.rests_end.map_or(held.begun, |end| end.max(held.begun));
        self.rests_end = Some(rests_end + held.begun.elapsed() * SHARE);
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

/// Returns the number of runnable threads from the text of /proc/loadavg.
fn runnable(load: &str) -> Option<usize> {
    load.split(' ').nth(3)?.split_once('/')?.0.parse().ok()
}

/// A thread of a worker.
struct Thread {
    tid: u32,
    /// The priority that it is raised to.
    priority: u32,
    answers_images: bool,
}

/// Returns the directory of the threads of `process`.
fn threads_dir(process: ProcessId) -> PathBuf {
    PathBuf::from(format!("/proc/{}/task", process.pid()))
}

/// Returns the ids of the threads of `process`. None if it has ended.
fn thread_ids(process: ProcessId) -> Option<impl Iterator<Item = u32>> {
    let entries = fs::read_dir(threads_dir(process)).ok()?;
    Some(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// Returns the threads of `process`. None if it has ended, or has too many.
fn threads_of(process: ProcessId) -> Option<Vec<Thread>> {
    let dir = threads_dir(process);
    let ids: Vec<u32> = thread_ids(process)?.take(MAX_THREADS + 1).collect();
    if ids.len() > MAX_THREADS {
        return None;
    }
    let named = |tid: u32| {
        // A thread may have ended since.
        let name = fs::read(dir.join(format!("{tid}/comm"))).ok()?;
        let priority = if name.starts_with(VCPU_NAME.as_bytes()) { VCPU } else { WORKER };
        Some(Thread { tid, priority, answers_images: name.trim_ascii_end() == IMAGE_THREAD.as_bytes() })
    };
    Some(ids.into_iter().filter_map(named).collect())
}

/// Returns whether `process` has the thread `tid`.
fn exists(process: ProcessId, tid: u32) -> bool {
    fs::exists(threads_dir(process).join(tid.to_string())).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use clade_test_support::{skipped, wait_for, wait_until};

    use super::*;

    /// A raise that only its drop ends.
    const LONG: Duration = Duration::from_secs(3600);

    /// A process that does nothing, until this is dropped, and looks as if it answered image requests.
    struct Idle(Child);

    impl Idle {
        fn new() -> Self {
            Self::with(&[])
        }

        fn with(program: &[&str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            // A process is called as its program's file.
            let sleep = dir.path().join(IMAGE_THREAD);
            std::os::unix::fs::symlink("/bin/sleep", &sleep).unwrap();
            let mut args = program.iter().map(AsRef::as_ref).chain([sleep.as_os_str(), "3600".as_ref()]);
            let process = Command::new(args.next().unwrap()).args(args).spawn().unwrap();
            let idle = Self(process);
            let name = || fs::read_to_string(format!("/proc/{}/comm", idle.0.id())).unwrap();
            wait_until("the program", || name().trim_end() == IMAGE_THREAD);
            idle
        }

        fn process(&self) -> Option<ProcessId> {
            ProcessId::of(self.0.id())
        }

        fn is_raised(&self) -> bool {
            !Scheduling::of(self.0.id()).unwrap().is_default()
        }
    }

    impl Drop for Idle {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Returns the priority of a supervisor that may raise workers, for `hold`. None if this process
    /// may not.
    fn priority(hold: Duration) -> Option<Priority> {
        let before = Scheduling::of(0).unwrap();
        if let Err(error) = before.raise(0, FIRST) {
            skipped(&format!("no real-time priority: {error}"));
            return None;
        }
        before.give_back(0, &[FIRST]).unwrap();
        if !before.is_default() {
            skipped("the tests have another priority");
            return None;
        }
        Some(Priority::new(hold))
    }

    /// Raises `idle` as soon as a raise is possible.
    fn raise(priority: &Priority, idle: &Idle) -> Raised {
        wait_for("a raise", || priority.raise_now(idle.process(), || ()).1)
    }

    fn held(priority: &Priority) -> Option<u64> {
        priority.0.state().held.as_ref().map(|held| held.raise)
    }

    #[test]
    fn a_process_is_raised_before_the_request_and_until_the_answer() {
        let Some(priority) = priority(LONG) else { return };
        let idle = Idle::new();
        drop(raise(&priority, &idle));
        assert!(!idle.is_raised());
        priority.0.state().rests_end = None;
        let (at_request, raised) = priority.raise_now(idle.process(), || idle.is_raised());
        assert!(at_request);
        assert!(Scheduling::of(0).unwrap().is_default(), "the calling thread is as before");
        assert!(idle.is_raised());
        drop(raised);
        assert!(!idle.is_raised());
    }

    #[test]
    fn the_runnable_threads_are_read_from_the_load() {
        assert_eq!(runnable("0.76 0.97 0.91 12/81 5223\n"), Some(12));
        assert_eq!(runnable(""), None);
        let load = fs::read_to_string("/proc/loadavg").unwrap();
        // This thread is one.
        assert!(runnable(&load).unwrap() > 0, "{load}");
    }

    #[test]
    fn a_raise_ends_by_time() {
        let Some(priority) = priority(HOLD) else { return };
        let idle = Idle::new();
        let raised = raise(&priority, &idle);
        wait_until("the end of the raise", || !idle.is_raised());
        assert_eq!(held(&priority), None);
        drop(raised);
    }

    #[test]
    fn the_drop_of_an_ended_raise_ends_no_other() {
        let Some(priority) = priority(LONG) else { return };
        let (one, other) = (Idle::new(), Idle::new());
        let raised = raise(&priority, &one);
        // As by time.
        priority.0.state().give_back();
        assert!(!one.is_raised());
        priority.0.state().rests_end = None;
        let next = raise(&priority, &other);
        drop(raised);
        assert_eq!(held(&priority), Some(next.raise));
        assert!(other.is_raised());
    }

    #[test]
    fn one_process_at_a_time_is_raised_for_a_tenth_of_the_time() {
        let Some(priority) = priority(LONG) else { return };
        let (one, other) = (Idle::new(), Idle::new());
        let raised = raise(&priority, &one);
        assert!(priority.raise_now(other.process(), || ()).1.is_none(), "two at a time");
        assert!(!other.is_raised());
        // As if it had taken a minute.
        let begun = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        priority.0.state().held.as_mut().unwrap().begun = begun;
        drop(raised);
        let rests_end = priority.0.state().rests_end.unwrap();
        assert!(rests_end >= begun + Duration::from_secs(600));
        assert!(priority.raise_now(other.process(), || ()).1.is_none(), "no rest");
        // Minutes later there is a rest to put off, and each raise adds to it.
        let begun = Instant::now();
        priority.0.state().rests_end = Some(begun + BURST);
        drop(priority.raise_now(other.process(), || ()).1.unwrap());
        assert!(priority.0.state().rests_end.unwrap() > begun + BURST);
    }

    #[test]
    fn a_process_that_has_ended_or_has_another_priority_is_left_alone() {
        let Some(priority) = priority(LONG) else { return };
        drop(raise(&priority, &Idle::new()));
        priority.0.state().rests_end = None;
        let idle = Idle::new();
        let process = idle.process();
        drop(idle);
        assert!(priority.raise_now(process, || ()).1.is_none());
        assert!(priority.raise_now(None, || ()).1.is_none());
        let sleep = Idle(Command::new("sleep").arg("3600").spawn().unwrap());
        assert!(priority.raise_now(sleep.process(), || ()).1.is_none(), "it answers no image requests");
        let nice = Idle::with(&["nice", "-n", "5"]);
        assert!(nice.is_raised());
        let raised = priority.raise_now(nice.process(), || ()).1.unwrap();
        assert!(priority.0.state().held.as_ref().unwrap().threads.is_empty());
        drop(raised);
    }

    #[test]
    fn the_next_supervisor_gives_back_what_one_that_was_killed_has_raised() {
        let Some(_) = priority(LONG) else { return };
        let (idle, other) = (Idle::new(), Idle::new());
        for (process, priority) in [(&idle, WORKER), (&other, FIRST)] {
            Scheduling::of(process.0.id()).unwrap().raise(process.0.id(), priority).unwrap();
            Priority::give_back(process.process().unwrap());
        }
        assert!(!idle.is_raised());
        assert!(other.is_raised(), "no supervisor raises a worker to that");
    }

    #[test]
    fn a_supervisor_that_ends_leaves_no_process_raised() {
        let Some(priority) = priority(LONG) else { return };
        let idle = Idle::new();
        let raised = raise(&priority, &idle);
        drop(priority);
        assert!(!idle.is_raised());
        drop(raised);
    }
}
