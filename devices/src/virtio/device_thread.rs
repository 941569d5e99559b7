//! The thread that does a device's work.
//!
//! The thread runs an [`EventManager`] with one subscriber, which owns the device's sources. For a
//! readable source, and when its timer is due, the subscriber gives its [`Service`] a *turn*. A turn
//! is short, because pausing the VM waits for its end. Between two turns the subscriber checks
//! whether it is paused.
//!
//! ```text
//!   event ──► paused? ──► turn (service locked) ──► again? ──► next event
//!                ▲   quiesce: no turn begins, and the one that runs is waited for
//! ```

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use clade_host_io::thread::serves_guest;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of a worker's stack; workers need little.
const STACK: usize = 256 << 10;
/// Events taken from the kernel at once.
const EVENTS: usize = 16;

/// Why a device is given a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The worker has begun, or continues after a pause. All queues must be read: a notification
    /// that went to a parent is not repeated for its child.
    Start,
    /// The source with this number is readable. It stays readable until the device reads it.
    Source(u32),
    /// The deadline that the device has set is past.
    Timer,
    /// The last turn ended with [`Turn::Again`].
    Again,
}

/// The worker's action after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Sleep until there is a reason for a turn.
    Done,
    /// Give another turn: there is more work, but other threads may want the lock.
    Again,
}

/// Whether another thread waits for the end of a turn.
#[derive(Debug)]
pub struct YieldRequest<'a>(&'a AtomicBool);

impl<'a> YieldRequest<'a> {
    /// The request given by `flag`.
    #[cfg(test)]
    pub(crate) fn of(flag: &'a AtomicBool) -> Self {
        Self(flag)
    }

    /// Whether the turn should end as soon as possible, with [`Turn::Again`] if there is more work.
    #[must_use]
    pub(crate) fn is_set(&self) -> bool {
        // Relaxed: a hint. The lock makes a turn's end visible.
        self.0.load(Ordering::Relaxed)
    }
}

/// The work of a device.
pub(crate) trait Service: Send + fmt::Debug + 'static {
    /// Does part of the work. Called on the worker's thread, and never while the VM is paused.
    fn turn(&mut self, wake: Wake, should_yield: &YieldRequest<'_>) -> Turn;

    /// The latest time of the next turn.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Notes that a turn has panicked. The service gets no further turn.
    fn broken(&mut self);
}

struct WorkerShared<S> {
    service: Mutex<S>,
    /// Number of times the worker has reached the gate, and has passed it.
    #[cfg(test)]
    gate_steps: std::sync::atomic::AtomicU64,
    gate: Mutex<GateState>,
    opened: Condvar,
    should_yield: AtomicBool,
    control: EventFd,
}

#[derive(Debug, Default)]
struct GateState {
    shut: bool,
    stop: bool,
    /// Whether the next turn must read everything, because the service was rewound.
    start: bool,
}

/// The owner of a worker. Dropping it ends the worker and drops the service.
pub(crate) struct DeviceThread<S: Service> {
    shared: Arc<WorkerShared<S>>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Service> fmt::Debug for DeviceThread<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({:?})", self.thread.as_ref().and_then(|t| t.thread().name()))
    }
}

impl<S: Service> DeviceThread<S> {
    /// Starts a worker for `service`. With `held`, it is paused until [`DeviceThread::resume`].
    /// `sources` are descriptors that the service keeps open, with their numbers.
    ///
    /// # Errors
    /// When there is no descriptor or no thread. The service comes back, if it can.
    pub(crate) fn spawn(
        name: &str,
        service: S,
        sources: &[(RawFd, u32)],
        held: bool,
    ) -> Result<Self, Box<(io::Error, Option<S>)>> {
        let control = match clade_host_io::eventfd() {
            Ok(control) => control,
            Err(error) => return Err(Box::new((error, Some(service)))),
        };
        let shared = Arc::new(WorkerShared {
            service: Mutex::new(service),
            #[cfg(test)]
            gate_steps: std::sync::atomic::AtomicU64::new(0),
            gate: Mutex::new(GateState { shut: held, ..GateState::default() }),
            opened: Condvar::new(),
            should_yield: AtomicBool::new(false),
            control,
        });
        let (mut events, subscriber) = match Self::watch(&shared, sources) {
            Ok(both) => both,
            Err(error) => return Err(Box::new((error, Self::take_apart(shared)))),
        };
        let on_thread = Arc::clone(&shared);
        let life = move || {
            serves_guest();
            let lived = catch_unwind(AssertUnwindSafe(|| run(&mut events, subscriber)));
            if lived.is_err() {
                // The service gets no further turn, and the driver is interrupted.
                on_thread.service().broken();
            }
        };
        match thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(life) {
            Ok(thread) => Ok(Self { shared, thread: Some(thread) }),
            // The closure was dropped with the attempt, so this is the last handle.
            Err(error) => Err(Box::new((error, Self::take_apart(shared)))),
        }
    }

    /// Returns the events of a worker, and their subscriber.
    fn watch(shared: &Arc<WorkerShared<S>>, sources: &[(RawFd, u32)]) -> io::Result<(WorkerEvents<S>, SubscriberId)> {
        let mut events = EventManager::new_with_capacity(EVENTS).map_err(errno)?;
        let subscriber =
            events.add_subscriber(Subscriber { shared: Arc::clone(shared), deadline: None, has_ended: false });
        let mut ops = events.event_ops(subscriber).map_err(errno)?;
        ops.add(Events::new(&shared.control, EventSet::IN)).map_err(errno)?;
        for (fd, number) in sources {
            ops.add(Events::with_data_raw(*fd, *number, EventSet::IN)).map_err(errno)?;
        }
        Ok((events, subscriber))
    }

    fn take_apart(shared: Arc<WorkerShared<S>>) -> Option<S> {
        Arc::into_inner(shared).map(|shared| shared.service.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Pauses the worker. When this returns, no turn runs, and none begins before
    /// [`DeviceThread::resume`].
    pub(crate) fn quiesce(&self) {
        self.shared.gate().shut = true;
        // Relaxed: see YieldRequest.
        self.shared.should_yield.store(true, Ordering::Relaxed);
        // The gate before the lock: a worker checks the gate with the service locked. So a thread
        // that gets the lock after it has shut the gate knows that no turn runs or begins.
        drop(self.shared.service());
        self.shared.should_yield.store(false, Ordering::Relaxed);
    }

    /// Undoes [`DeviceThread::quiesce`].
    pub(crate) fn resume(&self) {
        self.shared.gate().shut = false;
        self.shared.opened.notify_all();
    }

    /// Makes the next turn read everything, as the first one does, because the service was rewound.
    pub(crate) fn start_over(&self) {
        self.shared.gate().start = true;
        // Fails only if the counter is full; the worker wakes up in that case too.
        let _ = self.shared.control.write(1);
    }

    /// Whether the thread is running: a turn that panicked ends it.
    #[must_use]
    pub(crate) fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Runs `with` on the service, between two turns.
    pub(crate) fn with<T>(&self, with: impl FnOnce(&mut S) -> T) -> T {
        // Relaxed: see YieldRequest.
        self.shared.should_yield.store(true, Ordering::Relaxed);
        let result = with(&mut self.shared.service());
        self.shared.should_yield.store(false, Ordering::Relaxed);
        result
    }

    /// Ends the worker and returns its service.
    #[must_use]
    pub(crate) fn stop(mut self) -> Option<S> {
        self.end();
        let shared = Arc::clone(&self.shared);
        drop(self);
        // The thread has ended, so this is the last handle.
        Self::take_apart(shared)
    }

    fn end(&mut self) {
        self.shared.gate().stop = true;
        self.shared.opened.notify_all();
        // Fails only if the counter is full; the worker wakes up in that case too.
        let _ = self.shared.control.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic was caught on the thread itself.
            let _ = thread.join();
        }
    }
}

impl<S: Service> Drop for DeviceThread<S> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<S: Service> WorkerShared<S> {
    fn gate(&self) -> MutexGuard<'_, GateState> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn service(&self) -> MutexGuard<'_, S> {
        // After a panic the service gets no further turn.
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is shut. Returns whether it was shut, or `None` when the worker should
    /// end.
    fn pass(&self) -> Option<bool> {
        let mut gate = self.gate();
        let stood = gate.shut;
        while gate.shut && !gate.stop {
            gate = self.opened.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        (!gate.stop).then_some(stood)
    }
}

/// The subscriber of a worker's sources.
struct Subscriber<S> {
    shared: Arc<WorkerShared<S>>,
    /// The latest time of the next turn. Kept across interrupted waits, which are not followed by a
    /// turn that sets it again.
    deadline: Option<Instant>,
    /// Whether the worker should end, or has.
    has_ended: bool,
}

type WorkerEvents<S> = EventManager<Subscriber<S>>;

impl<S: Service> Subscriber<S> {
    /// Gives the service turns for `wake`, until there is no more work.
    fn give_turns(&mut self, mut wake: Wake) {
        let shared = &self.shared;
        while !self.has_ended {
            #[cfg(test)]
            shared.gate_steps.fetch_add(1, Ordering::SeqCst);
            match shared.pass() {
                None => {
                    self.has_ended = true;
                    return;
                }
                Some(true) => wake = Wake::Start,
                Some(false) => {}
            }
            #[cfg(test)]
            shared.gate_steps.fetch_add(1, Ordering::SeqCst);
            let mut service = shared.service();
            // With the service locked: see DeviceThread::quiesce.
            if shared.gate().shut {
                continue;
            }
            let turn = service.turn(wake, &YieldRequest(&shared.should_yield));
            self.deadline = service.deadline();
            drop(service);
            if shared.should_yield.load(Ordering::Relaxed) {
                // Locks are not fair: a thread that waits for this one gets it now.
                thread::yield_now();
            }
            match turn {
                Turn::Done => return,
                Turn::Again => wake = Wake::Again,
            }
        }
    }

    /// Takes notice of a call of the owner.
    fn control(&mut self) {
        // EAGAIN is fine. Read before the gate is checked; otherwise a call that comes in between is
        // lost.
        let _ = self.shared.control.read();
        let mut gate = self.shared.gate();
        let (stop, start) = (gate.stop, std::mem::take(&mut gate.start));
        drop(gate);
        self.has_ended |= stop;
        if start {
            self.give_turns(Wake::Start);
        }
    }

    /// Gives the service a turn if its deadline is past. A wait that was interrupted ends early.
    fn timer(&mut self) {
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.give_turns(Wake::Timer);
        }
    }
}

impl<S: Service> MutEventSubscriber for Subscriber<S> {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.fd() == self.shared.control.as_raw_fd() {
            self.control();
        } else {
            self.give_turns(Wake::Source(events.data()));
        }
    }

    /// Its sources are registered by [`DeviceThread::watch`], which reports errors.
    fn init(&mut self, _: &mut EventOps<'_>) {}
}

/// Runs the events of a worker until its owner ends it.
fn run<S: Service>(events: &mut WorkerEvents<S>, subscriber: SubscriberId) {
    let mut wake = Some(Wake::Start);
    // The subscriber is never removed.
    while let Ok(own) = events.subscriber_mut(subscriber) {
        match wake.take() {
            Some(wake) => own.give_turns(wake),
            None => own.timer(),
        }
        if own.has_ended {
            return;
        }
        let timeout = timeout(own.deadline);
        if let Err(error) = events.run_with_timeout(timeout) {
            tracing::error!(%error, "a device's worker cannot wait for events, and ends");
            return;
        }
    }
}

/// Returns the system call's error.
fn errno(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other),
    }
}

/// Milliseconds until `deadline`, rounded up; -1, which waits for ever, without a deadline.
fn timeout(deadline: Option<Instant>) -> i32 {
    let Some(deadline) = deadline else { return -1 };
    let left = deadline.saturating_duration_since(Instant::now());
    i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use clade_test_support::{receive, wait_until};

    #[derive(Debug)]
    struct Counter {
        event: EventFd,
        told: Sender<Wake>,
        panics: bool,
        broken: bool,
        again: u32,
        /// When the turn after the next one is due.
        due: Option<Duration>,
        deadline: Option<Instant>,
    }

    impl Service for Counter {
        fn turn(&mut self, wake: Wake, _should_yield: &YieldRequest<'_>) -> Turn {
            let _ = self.event.read();
            assert!(!self.panics, "as asked");
            self.deadline = self.due.take().map(|due| Instant::now() + due);
            let _ = self.told.send(wake);
            self.again = self.again.saturating_sub(1);
            if self.again > 0 { Turn::Again } else { Turn::Done }
        }
        fn deadline(&self) -> Option<Instant> {
            self.deadline
        }
        fn broken(&mut self) {
            self.broken = true;
        }
    }

    fn worker(held: bool) -> (DeviceThread<Counter>, EventFd, Receiver<Wake>) {
        let event = clade_host_io::eventfd().unwrap();
        let (told, heard) = channel();
        let ours = event.try_clone().unwrap();
        let fd = event.as_raw_fd();
        let service = Counter { event, told, panics: false, broken: false, again: 0, due: None, deadline: None };
        (DeviceThread::spawn("test", service, &[(fd, 7)], held).unwrap(), ours, heard)
    }

    const A_WHILE: Duration = Duration::from_millis(30);

    #[test]
    fn stands_still_until_it_is_let_go() {
        let (worker, event, heard) = worker(true);
        event.write(1).unwrap();
        assert!(heard.recv_timeout(A_WHILE).is_err(), "held from the beginning");
        worker.resume();
        assert_eq!(receive("a turn", &heard), Wake::Start);
        worker.quiesce();
        while heard.try_recv().is_ok() {}
        event.write(1).unwrap();
        assert!(heard.recv_timeout(A_WHILE).is_err(), "quiesced");
        worker.resume();
        assert_eq!(receive("a turn", &heard), Wake::Start, "what came meanwhile is looked at");
        event.write(1).unwrap();
        assert_eq!(receive("a turn", &heard), Wake::Source(7));
    }

    /// The gate is shut after the worker has gone through it, and before it has the service.
    #[test]
    fn no_turn_begins_behind_a_gate_that_was_shut_meanwhile() {
        let (worker, event, heard) = worker(false);
        assert_eq!(receive("a turn", &heard), Wake::Start);
        let wait_for = |steps: u64| {
            wait_until(&format!("it comes to its step {steps}"), || {
                assert!(heard.try_recv().is_err(), "a turn began while it was to stand still");
                worker.shared.gate_steps.load(Ordering::SeqCst) >= steps
            });
        };
        let service = worker.shared.service();
        // The worker has passed the gate for its first turn, and now for its second.
        event.write(1).unwrap();
        wait_for(4);
        // The worker waits for the service, or is about to. These are the steps of `quiesce`: the
        // gate, then the service; after that it returns.
        worker.shared.gate().shut = true;
        drop(service);
        // The worker checks the gate again instead.
        wait_for(5);
        assert!(heard.try_recv().is_err(), "a turn began while it was to stand still");
        worker.resume();
        receive("a turn", &heard);
    }

    #[test]
    fn goes_on_when_there_is_more_and_when_it_is_time() {
        let (worker, event, heard) = worker(false);
        assert_eq!(receive("a turn", &heard), Wake::Start);
        worker.with(|service| service.again = 3);
        event.write(1).unwrap();
        assert_eq!(receive("a turn", &heard), Wake::Source(7));
        assert_eq!(receive("a turn", &heard), Wake::Again);
        assert_eq!(receive("a turn", &heard), Wake::Again);
        worker.with(|service| service.due = Some(Duration::from_millis(5)));
        event.write(1).unwrap();
        assert_eq!(receive("a turn", &heard), Wake::Source(7));
        assert_eq!(receive("a turn", &heard), Wake::Timer);
        assert!(worker.stop().is_some());
    }

    #[test]
    fn starts_over_when_it_is_told_and_not_before_it_may() {
        let (worker, _event, heard) = worker(false);
        assert_eq!(receive("a turn", &heard), Wake::Start);
        worker.quiesce();
        worker.start_over();
        assert!(heard.recv_timeout(A_WHILE).is_err(), "quiesced");
        worker.resume();
        assert_eq!(receive("a turn", &heard), Wake::Start);
        worker.start_over();
        assert_eq!(receive("a turn", &heard), Wake::Start);
        assert!(worker.is_alive());
        assert!(worker.stop().is_some());
    }

    #[test]
    fn a_panic_breaks_the_service_and_not_the_process() {
        let (worker, event, heard) = worker(false);
        assert_eq!(receive("a turn", &heard), Wake::Start);
        worker.with(|service| service.panics = true);
        event.write(1).unwrap();
        wait_until("the service is told", || worker.with(|service| service.broken));
        worker.quiesce();
        worker.resume();
        wait_until("its thread ends", || !worker.is_alive());
        assert!(worker.stop().unwrap().broken);
    }
}
