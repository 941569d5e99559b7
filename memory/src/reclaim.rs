//! The reclaim thread: work that no VM waits for. It frees layers, merges chains of them, allocates
//! files ahead, and punches pages that no view shows.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::layer::gc;
use crate::layer::registry::Views;

/// Delay before the thread starts on tasks: a sender is time-critical, and has just woken this
/// thread on its own processor. One delay for all tasks that arrive meanwhile.
const HEAD_START: Duration = Duration::from_millis(2);
/// Minimum time between two sweeps: each walks every view.
const MIN_SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// Maximum number of queued tasks. Further tasks run on the sender's thread, or are skipped if
/// optional.
const MAX_QUEUED: usize = 4_096;

/// A value to drop is sent as a task that owns it.
pub(crate) type Task = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// A sweep was requested.
    sweep: bool,
    closed: bool,
}

struct Inner {
    queue: Mutex<Queue>,
    more: Condvar,
}

/// A way to send tasks to the thread, for holders that must not keep it alive.
#[derive(Clone)]
pub(crate) struct TaskSender(Arc<Inner>);

impl fmt::Debug for TaskSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskSender({} tasks)", self.0.queue().tasks.len())
    }
}

impl Inner {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Each change to the queue is one step.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TaskSender {
    /// Queues `task`. Returns the task if the thread has ended or its queue is full.
    pub(crate) fn spawn(&self, task: impl FnOnce() + Send + 'static) -> Result<(), Box<dyn FnOnce() + Send>> {
        let task: Task = Box::new(task);
        let mut queue = self.0.queue();
        if queue.closed || queue.tasks.len() >= MAX_QUEUED {
            return Err(task);
        }
        queue.tasks.push_back(task);
        drop(queue);
        self.0.more.notify_one();
        Ok(())
    }
}

impl TaskSender {
    /// Waits until the thread has done every task queued before. Returns at once if the thread has
    /// ended.
    pub(crate) fn barrier(&self) {
        let (passed, pass) = mpsc::channel::<()>();
        {
            let mut queue = self.0.queue();
            if queue.closed {
                return;
            }
            // Exceeds the limit if needed: each caller waits, so barriers are few.
            queue.tasks.push_back(Box::new(move || drop(passed)));
        }
        self.0.more.notify_one();
        // The task is done or dropped: either ends the wait.
        let _ = pass.recv();
    }
}

/// See the module's documentation. On drop, finishes the queued tasks.
pub(crate) struct ReclaimThread {
    sender: TaskSender,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for ReclaimThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReclaimThread")
    }
}

impl ReclaimThread {
    pub(crate) fn start(views: &Arc<Views>) -> io::Result<Self> {
        let inner = Arc::new(Inner { queue: Mutex::default(), more: Condvar::new() });
        if cfg!(shuttle) {
            // In tests under shuttle a task does the thread's work: `take_queued`.
            return Ok(Self { sender: TaskSender(inner), thread: None });
        }
        let (served, views) = (Arc::clone(&inner), Arc::clone(views));
        #[cfg(test)]
        let plan = crate::testing::failpoint::plan();
        let run = move || {
            #[cfg(test)]
            crate::testing::failpoint::inherit(plan);
            serve(&served, &views);
        };
        let thread = thread::Builder::new().name("clade-reclaim".to_owned()).spawn(run)?;
        Ok(Self { sender: TaskSender(inner), thread: Some(thread) })
    }

    /// Whether the caller is the thread.
    pub(crate) fn is_this(&self) -> bool {
        self.thread.as_ref().is_some_and(|handle| handle.thread().id() == thread::current().id())
    }

    /// Takes the queued work, for a task that replaces the thread.
    #[cfg(all(test, shuttle))]
    pub(crate) fn take_queued(&self) -> VecDeque<Task> {
        std::mem::take(&mut self.sender.0.queue().tasks)
    }

    /// A sender, which may outlive this.
    pub(crate) fn sender(&self) -> TaskSender {
        self.sender.clone()
    }

    /// Requests a sweep; requests are merged.
    pub(crate) fn sweep(&self) {
        let first = !std::mem::replace(&mut self.sender.0.queue().sweep, true);
        if first {
            self.sender.0.more.notify_one();
        }
    }
}

/// Waits for work: tasks, if any, and whether a sweep is due. `None` when the queue is closed and
/// empty.
fn wait(inner: &Inner, swept: Option<Instant>) -> Option<(VecDeque<Task>, bool)> {
    let mut queue = inner.queue();
    loop {
        let until_sweep = queue.sweep.then(|| {
            let due =
                swept.map_or(Duration::ZERO, |at| (at + MIN_SWEEP_INTERVAL).saturating_duration_since(Instant::now()));
            if queue.closed { Duration::ZERO } else { due }
        });
        let sweep = until_sweep.is_some_and(|left| left.is_zero());
        if !queue.tasks.is_empty() || sweep {
            if sweep {
                // Before the sweep starts: later changes request another.
                queue.sweep = false;
            }
            return Some((std::mem::take(&mut queue.tasks), sweep));
        }
        if queue.closed {
            return None;
        }
        queue = match until_sweep {
            Some(left) => inner.more.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0,
            None => inner.more.wait(queue).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

fn serve(inner: &Inner, views: &Views) {
    let mut swept = None;
    while let Some((tasks, sweep)) = wait(inner, swept) {
        if !inner.queue().closed {
            thread::sleep(HEAD_START);
        }
        for task in tasks {
            // A panic ends one task; the others still run.
            if catch_unwind(AssertUnwindSafe(task)).is_err() {
                tracing::error!("a task of the reclaim thread panicked");
            }
        }
        // After every batch in which it is due, regardless of new tasks.
        if sweep {
            if catch_unwind(AssertUnwindSafe(|| gc::sweep(views))).is_err() {
                tracing::error!("a sweep panicked");
            }
            swept = Some(Instant::now());
        }
    }
}

impl Drop for ReclaimThread {
    fn drop(&mut self) {
        self.sender.0.queue().closed = true;
        self.sender.0.more.notify_one();
        let Some(thread) = self.thread.take() else { return };
        // The thread's work may have held the last handle of the store. Then this is the thread
        // itself, which ends without being joined.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the reclaim thread ended in a panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn thread() -> ReclaimThread {
        ReclaimThread::start(&Arc::new(Views::new(&Arc::default()))).unwrap()
    }

    #[test]
    fn a_task_that_panics_costs_no_other() {
        let thread = thread();
        let (tell, told) = mpsc::channel();
        for nth in 0..10 {
            let tell = tell.clone();
            let sent = thread.sender().spawn(move || {
                assert!(nth % 2 == 0, "asked to panic");
                tell.send(nth).unwrap();
            });
            assert!(sent.is_ok());
        }
        drop(thread);
        drop(tell);
        assert_eq!(told.iter().collect::<Vec<i32>>(), [0, 2, 4, 6, 8]);
    }

    #[test]
    fn the_queue_has_an_end_and_all_that_is_in_it_is_done() {
        let (thread, done) = (thread(), Arc::new(AtomicUsize::new(0)));
        let (gate, opened) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let first = thread.sender().spawn(move || {
            tell.send(()).unwrap();
            let _ = opened.recv();
        });
        assert!(first.is_ok());
        told.recv().unwrap();
        let mut refused = 0;
        for _ in 0..MAX_QUEUED + 7 {
            let done = Arc::clone(&done);
            refused += usize::from(thread.sender().spawn(move || _ = done.fetch_add(1, Ordering::SeqCst)).is_err());
        }
        assert_eq!(refused, 7);
        drop(gate);
        let sender = thread.sender();
        sender.barrier();
        assert_eq!(done.load(Ordering::SeqCst), MAX_QUEUED, "a barrier passes behind all that came before");
        drop(thread);
        sender.barrier();
        assert_eq!(done.load(Ordering::SeqCst), MAX_QUEUED);
        assert!(sender.spawn(|| {}).is_err(), "closed");
    }
}
