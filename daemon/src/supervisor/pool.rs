//! Workers that are prepared before they are asked for: each has a VM of one configuration,
//! without memory or state.
//!
//! As many are kept as the last forks took, up to a limit, and none for a configuration that
//! nobody has forked for a while.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::fleet::FleetError;
use crate::worker::{Order, Worker, Workers};
use crate::zygote::Zygote;
use clade_vmm::vm::VmConfig;

/// After this time without a fork, no worker is kept for a configuration.
const IDLE: Duration = Duration::from_secs(60);
/// Workers that are made at a time. While they are made, requests for workers wait.
const STEP: usize = 8;

#[derive(Debug)]
struct Shape {
    config: VmConfig,
    ready: Vec<Worker>,
    wanted: usize,
    used: Instant,
}

#[derive(Debug, Default)]
struct State {
    shapes: Vec<Shape>,
    is_closed: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    zygote: Arc<Zygote>,
    most: usize,
}

/// The pool.
#[derive(Debug)]
pub(super) struct Pool(Arc<Shared>);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Workers that are ready for `config`.
    fn make(&self, config: &VmConfig, count: usize) -> Result<Vec<Worker>, FleetError> {
        let workers = self.zygote.workers(count)?;
        let order = Order::Prepare(Box::new(config.clone()));
        workers.iter().try_for_each(|worker| worker.order(&order, &[]))?;
        workers.iter().try_for_each(Worker::ready)?;
        Ok(workers)
    }

    /// Waits until there is something to be made, and makes a few. Returns whether to go on.
    fn refill(&self) -> bool {
        let (config, count) = {
            let mut state = self.state();
            loop {
                if state.is_closed {
                    return false;
                }
                let idle = state.shapes.extract_if(.., |shape| shape.used.elapsed() > IDLE).collect::<Vec<_>>();
                if !idle.is_empty() {
                    // Not under the lock: they take time to end.
                    drop(state);
                    drop(Workers(idle.into_iter().flat_map(|shape| shape.ready).collect()));
                    return true;
                }
                let short = state.shapes.iter().find(|shape| shape.ready.len() < shape.wanted);
                if let Some(shape) = short {
                    break (shape.config.clone(), (shape.wanted - shape.ready.len()).min(STEP));
                }
                let waited = self.changed.wait_timeout(state, IDLE / 4);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        match self.make(&config, count) {
            Ok(workers) => self.put(&config, workers),
            Err(error) => {
                tracing::warn!(%error, "no workers are prepared");
                // The next fork has it tried again.
                if let Some(shape) = self.state().shapes.iter_mut().find(|shape| shape.config == config) {
                    shape.wanted = 0;
                }
            }
        }
        true
    }

    fn put(&self, config: &VmConfig, workers: Vec<Worker>) {
        let mut state = self.state();
        if state.is_closed {
            drop(state);
            drop(workers);
            return;
        }
        match state.shapes.iter_mut().find(|shape| shape.config == *config) {
            Some(shape) => shape.ready.extend(workers),
            None => {
                let config = config.clone();
                state.shapes.push(Shape { config, wanted: workers.len(), ready: workers, used: Instant::now() });
            }
        }
    }
}

impl Pool {
    /// A pool of at most `most` workers for a configuration, beside those that are asked for.
    ///
    /// # Errors
    /// When the thread that fills it cannot be started.
    pub(super) fn start(zygote: &Arc<Zygote>, most: usize) -> Result<Self, FleetError> {
        let shared =
            Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), zygote: Arc::clone(zygote), most });
        let weak: Weak<Shared> = Arc::downgrade(&shared);
        let fill = move || {
            while let Some(shared) = weak.upgrade() {
                if !shared.refill() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("clade-pool".to_owned())
            .spawn(fill)
            .map_err(|source| FleetError::Worker { source })?;
        Ok(Self(shared))
    }

    /// Takes up to `count` workers for `config`, and has as many made for the next time.
    pub(super) fn take(&self, config: &VmConfig, count: usize) -> Vec<Worker> {
        let mut state = self.0.state();
        let wanted = count.min(self.0.most);
        let taken = match state.shapes.iter_mut().find(|shape| shape.config == *config) {
            Some(shape) => {
                // It goes down by a quarter at a time, so that one small fork in between costs little.
                shape.wanted = wanted.max((shape.wanted * 3 / 4).min(self.0.most));
                shape.used = Instant::now();
                let left = shape.ready.len().saturating_sub(count);
                shape.ready.split_off(left)
            }
            None => {
                let config = config.clone();
                state.shapes.push(Shape { config, wanted, ready: Vec::new(), used: Instant::now() });
                Vec::new()
            }
        };
        drop(state);
        self.0.changed.notify_all();
        taken
    }

    /// Prepares workers for `config` until there are `count`. Returns how many there are.
    ///
    /// # Errors
    /// When one cannot be made, or that of `check`. Those that were made before are kept.
    pub(super) fn prepare(
        &self,
        config: &VmConfig,
        count: usize,
        check: impl Fn() -> Result<(), FleetError>,
    ) -> Result<usize, FleetError> {
        // Others may take them meanwhile: it makes so many, and no more.
        let mut made = 0;
        loop {
            check()?;
            let ready = {
                let mut state = self.0.state();
                if state.is_closed {
                    return Err(FleetError::Ending);
                }
                let shape = state.shapes.iter_mut().find(|shape| shape.config == *config);
                shape.map_or(0, |shape| {
                    shape.used = Instant::now();
                    shape.ready.len()
                })
            };
            if ready >= count || made >= count {
                return Ok(ready);
            }
            let step = (count - ready).min(STEP);
            self.0.put(config, self.0.make(config, step)?);
            made += step;
        }
    }

    /// How many workers are prepared.
    pub(super) fn len(&self) -> usize {
        self.0.state().shapes.iter().map(|shape| shape.ready.len()).sum()
    }

    /// Ends all workers. None is made any more.
    pub(super) fn close(&self) {
        let mut state = self.0.state();
        state.is_closed = true;
        let shapes = std::mem::take(&mut state.shapes);
        drop(state);
        self.0.changed.notify_all();
        drop(Workers(shapes.into_iter().flat_map(|shape| shape.ready).collect()));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}
