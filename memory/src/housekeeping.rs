//! The housekeeper: a thread for what nobody waits for. It frees layers, merges chains of them, and gives back pages that no view sees.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::sweep;
use crate::view::Views;

/// What it lets others have first: whoever sends it something is in a hurry, and has just woken this thread on its own processor.
const HURRY: Duration = Duration::from_millis(2);
/// Least time between two sweeps: each walks every view.
const SWEEPS_APART: Duration = Duration::from_millis(500);

/// How long to wait for a chore while there is nothing else to do.
const NO_SWEEP_DUE: Duration = Duration::from_secs(3600);

enum Chore {
    /// Something whose dropping takes long.
    Drop(Box<dyn Send>),
    Do(Box<dyn FnOnce() + Send>),
    Sweep,
}

/// A way to hand something to the housekeeper, for those who must not keep it going.
#[derive(Clone)]
pub(crate) struct Hand(Arc<Mutex<Option<mpsc::Sender<Chore>>>>);

impl fmt::Debug for Hand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hand")
    }
}

impl Hand {
    /// Does `work` some time later; drops it if the housekeeper has gone.
    pub(crate) fn over(&self, work: impl FnOnce() + Send + 'static) {
        if let Some(queue) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // The thread lives as long as the queue.
            let _ = queue.send(Chore::Do(Box::new(work)));
        }
    }
}

/// See the module's documentation. Dropped, it finishes what it was given.
pub(crate) struct Housekeeper {
    queue: Hand,
    /// A sweep is queued already.
    sweeping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Housekeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Housekeeper")
    }
}

impl Housekeeper {
    pub(crate) fn start(views: &Arc<Views>) -> io::Result<Self> {
        let (queue, chores) = mpsc::channel();
        let sweeping = Arc::new(AtomicBool::new(false));
        let (views, queued) = (Arc::clone(views), Arc::clone(&sweeping));
        #[cfg(test)]
        let plan = crate::fault::plan();
        let run = move || {
            #[cfg(test)]
            crate::fault::inherit(plan);
            let mut due: Option<Instant> = None;
            let mut swept: Option<Instant> = None;
            loop {
                let wait = due.map_or(NO_SWEEP_DUE, |due| due.saturating_duration_since(Instant::now()));
                match chores.recv_timeout(wait) {
                    Ok(Chore::Drop(garbage)) => {
                        thread::sleep(HURRY);
                        drop(garbage);
                    }
                    Ok(Chore::Do(work)) => {
                        thread::sleep(HURRY);
                        work();
                    }
                    Ok(Chore::Sweep) => due = Some(swept.map_or_else(Instant::now, |at| at + SWEEPS_APART) + HURRY),
                    Err(RecvTimeoutError::Timeout) if due.is_some() => {
                        due = None;
                        // Before it looks: what changes from here on asks for another.
                        queued.store(false, Ordering::Release);
                        sweep::sweep(&views);
                        swept = Some(Instant::now());
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        let thread = thread::Builder::new().name("clade-house".to_owned()).spawn(run)?;
        Ok(Self { queue: Hand(Arc::new(Mutex::new(Some(queue)))), sweeping, thread: Some(thread) })
    }

    fn send(&self, chore: Chore) {
        if let Some(queue) = &*self.queue.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // The thread lives as long as the queue; did it not, the chore would be dropped here.
            let _ = queue.send(chore);
        }
    }

    /// Drops `garbage` some time later.
    pub(crate) fn dispose(&self, garbage: Box<dyn Send>) {
        self.send(Chore::Drop(garbage));
    }

    /// What may outlive this.
    pub(crate) fn hand(&self) -> Hand {
        self.queue.clone()
    }

    /// Sweeps some time later; asking twice is asking once.
    pub(crate) fn sweep(&self) {
        if !self.sweeping.swap(true, Ordering::AcqRel) {
            self.send(Chore::Sweep);
        }
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        drop(self.queue.0.lock().unwrap_or_else(PoisonError::into_inner).take());
        let Some(thread) = self.thread.take() else { return };
        // Its work may have held the last handle of the store: then this is the thread, and it ends by itself.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the housekeeper ended in a panic");
        }
    }
}
