//! Where the vCPU threads of a VM meet whoever starts, pauses, saves, resets or stops it.
//!
//! ```text
//!          order            want=Run               kick            last vCPU parked
//!   idle ────────► running ◄──────── parked ◄──────────── running ────────────────► the pauser goes on
//!                                      │ save asked for: each saves its own vCPU, all at once,
//!                                      │ while the pauser freezes memory
//! ```
//!
//! # The order of a save
//!
//! 1. The wish to park is set, then each vCPU is kicked, one after the other.
//! 2. Each vCPU leaves the guest and parks. It saves nothing yet.
//! 3. The last vCPU parks. From here on no vCPU sends an interrupt to another.
//! 4. Each vCPU saves itself.
//! 5. The owner collects the states, then saves the interrupt controllers, then resumes.
//!
//! A vCPU that saved in step 2 would lose interrupts. A sibling still in the guest may send it an IPI, NMI, INIT or SIPI
//! after its local APIC was read. That interrupt is in nobody's state. The sender has done its part, so nobody sends it
//! again, and a child whose vCPU waits for it waits for ever.
//!
//! Loading another state in place (a reset) keeps the same order: no vCPU loads before all are parked, and none runs
//! before all have loaded.
//!
//! # The order of a start
//!
//! 1. Each vCPU takes its state.
//! 2. The last one to do so does what the VM as a whole needs ([`VcpuControl::begin`]).
//! 3. All enter the guest, or none does. The owner is answered at this moment, with the first failure if there is one.
//!
//! Nothing here waits for a fixed number of threads: a vCPU that fails or panics stops the VM, and that wakes every waiter.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::vm::error::{VmError, catch_panic};
use crate::vm::stop::StopReason;
use crate::vm::vcpu::kick::Kicker;
use crate::vm::vcpu::schedule::Schedule;

/// How long a vCPU may take to come out of the guest. It takes microseconds; past this the host is broken.
const TIMEOUT: Duration = Duration::from_secs(10);

const RUN: u8 = 0;
const PARK: u8 = 1;
const EXIT: u8 = 2;

/// How far the start of the vCPUs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Startup {
    /// So many vCPUs have taken their state.
    Preparing(usize),
    /// All have. They may enter the guest.
    Begun,
    /// One could not, or the VM as a whole could not. Nobody enters the guest.
    Failed,
}

struct Inner<O, S> {
    startup: Startup,
    /// Why the start failed, until the owner takes it.
    failure: Option<VmError>,
    /// What each idle vCPU is to start with, or a parked one to load.
    orders: Vec<Option<O>>,
    /// Pauses held. Running means none.
    pauses: u32,
    parked: usize,
    idle: usize,
    exited: usize,
    /// Raised by each request to save; a vCPU that has seen the newest has saved.
    save_asked: u64,
    save_done: Vec<u64>,
    saved: Vec<Option<Result<S, VmError>>>,
    /// Raised by each request to load.
    load_asked: u64,
    /// How each parked vCPU took the state it was given last. None while it has not.
    loaded: Vec<Option<Result<(), VmError>>>,
    stop: Option<StopReason>,
}

/// See the module's documentation. `O` is what a vCPU starts with, `S` what it saves.
pub(crate) struct VcpuControl<O, S> {
    want: AtomicU8,
    inner: Mutex<Inner<O, S>>,
    to_vcpus: Condvar,
    to_owner: Condvar,
    kickers: Vec<Kicker>,
    pub(crate) schedule: Schedule,
}

/// Which request to save or to load a vCPU works on. An answer to an older one is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request(u64);

/// What a parked or idle vCPU is to do next.
#[derive(Debug)]
pub(crate) enum Next<O> {
    Start(O),
    Run,
    Save(Request),
    /// Take another state, in place.
    Load(Request, O),
    Exit,
}

impl<O, S> VcpuControl<O, S> {
    pub(crate) fn new(vcpus: usize) -> Self {
        let inner = Inner {
            startup: Startup::Preparing(0),
            failure: None,
            orders: (0..vcpus).map(|_| None).collect(),
            pauses: 0,
            parked: 0,
            idle: 0,
            exited: 0,
            save_asked: 0,
            save_done: vec![0; vcpus],
            saved: (0..vcpus).map(|_| None).collect(),
            load_asked: 0,
            loaded: (0..vcpus).map(|_| None).collect(),
            stop: None,
        };
        Self {
            want: AtomicU8::new(RUN),
            inner: Mutex::new(inner),
            to_vcpus: Condvar::new(),
            to_owner: Condvar::new(),
            kickers: (0..vcpus).map(|_| Kicker::default()).collect(),
            schedule: Schedule::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<O, S>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vcpus(&self) -> usize {
        self.kickers.len()
    }

    pub(crate) fn kicker(&self, index: usize) -> &Kicker {
        &self.kickers[index]
    }

    // --- the vCPU threads' side ---

    /// Waits for an order to start, or to exit.
    pub(crate) fn wait_for_order(&self, index: usize) -> Next<O> {
        let mut inner = self.inner();
        inner.idle += 1;
        self.to_owner.notify_all();
        let next = loop {
            if self.want.load(Ordering::SeqCst) == EXIT {
                break Next::Exit;
            }
            if let Some(order) = inner.orders[index].take() {
                break Next::Start(order);
            }
            inner = self.to_vcpus.wait(inner).unwrap_or_else(PoisonError::into_inner);
        };
        inner.idle -= 1;
        next
    }

    /// Says how vCPU `index` took the state it starts with, and waits until the start is decided. True when the guest may
    /// be entered.
    ///
    /// The last vCPU to come runs `lead`, which does what the VM as a whole needs. Nobody enters the guest before it is
    /// done. A failure or a panic of any of them stops the VM, is the owner's answer, and strands nobody.
    pub(crate) fn begin(
        &self,
        index: usize,
        own: Result<(), VmError>,
        lead: impl FnOnce() -> Result<(), VmError>,
    ) -> bool {
        if let Err(error) = own {
            self.fail_start(index, error);
            return false;
        }
        let mut inner = self.inner();
        let Startup::Preparing(before) = inner.startup else { return false };
        inner.startup = Startup::Preparing(before + 1);
        if before + 1 < self.vcpus() {
            while matches!(inner.startup, Startup::Preparing(_)) && self.want.load(Ordering::SeqCst) != EXIT {
                inner = self.to_vcpus.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            return inner.startup == Startup::Begun;
        }
        // Not under the lock: a device that goes on may stop the VM.
        drop(inner);
        if let Err(error) = catch_panic(index, lead) {
            self.fail_start(index, error);
            return false;
        }
        self.inner().startup = Startup::Begun;
        self.to_vcpus.notify_all();
        self.to_owner.notify_all();
        true
    }

    fn fail_start(&self, vcpu: usize, error: VmError) {
        let reason = match &error {
            VmError::Panicked { message, .. } => StopReason::Panic { vcpu, message: message.clone() },
            error => StopReason::Start { vcpu, error: crate::error_chain(error) },
        };
        let mut inner = self.inner();
        inner.startup = Startup::Failed;
        // The first stays.
        inner.failure.get_or_insert(error);
        drop(inner);
        self.stop(reason);
    }

    /// Whether the vCPU may enter the guest. Called after [`Kicker::clear_immediate_exit`].
    pub(crate) fn may_run(&self) -> bool {
        // SeqCst: see Kicker::clear_immediate_exit.
        self.want.load(Ordering::SeqCst) == RUN
    }

    /// Parks the vCPU until there is something to do. Call with `parked` false the first time, true after a [`Next::Save`] or
    /// [`Next::Load`].
    pub(crate) fn park(&self, index: usize, parked: bool) -> Next<O> {
        let mut inner = self.inner();
        if !parked {
            inner.parked += 1;
            self.to_owner.notify_all();
            if inner.parked == self.vcpus() {
                // Those that parked before have waited for this one.
                self.to_vcpus.notify_all();
            }
        }
        loop {
            // Nobody saves or loads before all are parked: see the module's documentation.
            let all_parked = inner.parked == self.vcpus() || self.schedule.saves_early();
            match self.want.load(Ordering::SeqCst) {
                EXIT => {
                    inner.parked -= 1;
                    return Next::Exit;
                }
                PARK if all_parked && inner.save_done[index] != inner.save_asked => {
                    return Next::Save(Request(inner.save_asked));
                }
                PARK if all_parked && inner.orders[index].is_some() => {
                    if let Some(order) = inner.orders[index].take() {
                        return Next::Load(Request(inner.load_asked), order);
                    }
                }
                PARK => inner = self.to_vcpus.wait(inner).unwrap_or_else(PoisonError::into_inner),
                _ => {
                    inner.parked -= 1;
                    return Next::Run;
                }
            }
        }
    }

    /// Hands in what a vCPU has saved for `request`. Dropped if that was given up and another was made since: the vCPU's
    /// siblings may have run in between.
    pub(crate) fn submit_state(&self, index: usize, request: Request, state: Result<S, VmError>) {
        let mut inner = self.inner();
        if request == Request(inner.save_asked) {
            inner.save_done[index] = inner.save_asked;
            inner.saved[index] = Some(state);
            self.to_owner.notify_all();
        }
    }

    /// Tells how a vCPU took the state it was given for `request`.
    pub(crate) fn has_loaded(&self, index: usize, request: Request, result: Result<(), VmError>) {
        let mut inner = self.inner();
        if request == Request(inner.load_asked) {
            inner.loaded[index] = Some(result);
            self.to_owner.notify_all();
        }
    }

    /// A vCPU's thread ends.
    pub(crate) fn thread_exited(&self, _index: usize) {
        self.inner().exited += 1;
        self.to_owner.notify_all();
    }

    // --- the owner's side ---

    /// Starts the vCPUs, one order each. Returns once all of them have taken their state and may enter the guest.
    pub(crate) fn start(&self, orders: impl IntoIterator<Item = O>) -> Result<(), VmError> {
        self.give(orders);
        self.to_vcpus.notify_all();
        let mut inner = self.wait(|inner| !matches!(inner.startup, Startup::Preparing(_)))?;
        match (inner.failure.take(), &inner.stop) {
            (Some(error), _) => Err(error),
            (None, Some(reason)) => Err(VmError::Stopped(reason.clone())),
            (None, None) => Ok(()),
        }
    }

    /// Puts an order before each vCPU. One that nobody takes any more is dropped, not kept: it has the VM's devices.
    fn give(&self, orders: impl IntoIterator<Item = O>) {
        let orders: Vec<O> = orders.into_iter().collect();
        let mut inner = self.inner();
        if inner.stop.is_none() {
            for (slot, order) in inner.orders.iter_mut().zip(orders) {
                *slot = Some(order);
            }
        }
    }

    /// Takes a pause before the vCPUs are started: they will park before their first instruction.
    pub(crate) fn start_paused(&self) {
        self.inner().pauses += 1;
        self.want.store(PARK, Ordering::SeqCst);
    }

    /// Waits until every thread is there to take an order.
    pub(crate) fn wait_idle(&self) -> Result<(), VmError> {
        self.wait(|inner| inner.idle == self.vcpus()).map(drop)
    }

    fn wait(&self, done: impl Fn(&Inner<O, S>) -> bool) -> Result<MutexGuard<'_, Inner<O, S>>, VmError> {
        let deadline = Instant::now() + TIMEOUT;
        let mut inner = self.inner();
        while !done(&inner) {
            if let Some(reason) = &inner.stop {
                return Err(VmError::Stopped(reason.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VmError::Stuck { seconds: TIMEOUT.as_secs() });
            }
            inner = self.to_owner.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(inner)
    }

    /// Takes a pause: returns once no vCPU is in the guest. With `save`, each vCPU goes on to save itself.
    pub(crate) fn pause(&self, save: bool) -> Result<(), VmError> {
        let mut inner = self.inner();
        if let Some(reason) = &inner.stop {
            return Err(VmError::Stopped(reason.clone()));
        }
        inner.pauses += 1;
        if save {
            inner.save_asked += 1;
        }
        // SeqCst, and before the kick: see Kicker::clear_immediate_exit.
        self.want.store(PARK, Ordering::SeqCst);
        let first = inner.pauses == 1;
        drop(inner);
        if first {
            for kicker in &self.kickers {
                self.schedule.before_kick();
                kicker.kick();
            }
        } else {
            self.to_vcpus.notify_all();
        }
        match self.wait(|inner| inner.parked == self.vcpus()) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.resume();
                Err(error)
            }
        }
    }

    /// The vCPUs' states, asked for by [`VcpuControl::pause`].
    pub(crate) fn collect(&self) -> Result<Vec<S>, VmError> {
        let mut inner = self.wait(|inner| inner.save_done.iter().all(|done| *done == inner.save_asked))?;
        inner.saved.iter_mut().map(|s| s.take().unwrap_or(Err(VmError::NotSaved))).collect()
    }

    /// Gives vCPUs that are all parked another state, each an order.
    pub(crate) fn load(&self, orders: impl IntoIterator<Item = O>) {
        let mut inner = self.inner();
        inner.load_asked += 1;
        inner.loaded.fill_with(|| None);
        drop(inner);
        self.give(orders);
        self.to_vcpus.notify_all();
    }

    /// Waits until every vCPU has taken what [`VcpuControl::load`] gave it.
    pub(crate) fn await_loaded(&self) -> Result<(), VmError> {
        let mut inner = self.wait(|inner| inner.loaded.iter().all(Option::is_some))?;
        inner.loaded.iter_mut().try_for_each(|result| result.take().unwrap_or(Err(VmError::NotSaved)))
    }

    /// Gives a pause back; the last one lets the vCPUs run.
    pub(crate) fn resume(&self) {
        let mut inner = self.inner();
        inner.pauses = inner.pauses.saturating_sub(1);
        if inner.pauses == 0 && self.want.load(Ordering::SeqCst) == PARK {
            self.want.store(RUN, Ordering::SeqCst);
            drop(inner);
            self.to_vcpus.notify_all();
        }
    }

    /// Stops the VM for `reason`; the first reason stays.
    pub(crate) fn stop(&self, reason: StopReason) {
        let mut inner = self.inner();
        inner.stop.get_or_insert(reason);
        self.want.store(EXIT, Ordering::SeqCst);
        let untaken: Vec<Option<O>> = inner.orders.iter_mut().map(Option::take).collect();
        drop(inner);
        // Not under the lock: with the last of them go the devices.
        drop(untaken);
        self.to_vcpus.notify_all();
        self.to_owner.notify_all();
        self.kickers.iter().for_each(Kicker::kick);
    }

    /// Why the VM stopped, if it has.
    pub(crate) fn stopped(&self) -> Option<StopReason> {
        self.inner().stop.clone()
    }

    /// Waits until every vCPU's thread has left, up to `patience`.
    pub(crate) fn wait_exited(&self, patience: Duration) -> Option<StopReason> {
        let inner = self.inner();
        let left = self
            .to_owner
            .wait_timeout_while(inner, patience, |inner| inner.exited < self.vcpus())
            .unwrap_or_else(PoisonError::into_inner);
        if left.1.timed_out() { None } else { left.0.stop.clone() }
    }
}

impl<O, S> std::fmt::Debug for VcpuControl<O, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.inner();
        write!(f, "{} vCPUs: {} idle, {} parked, {} left", self.vcpus(), inner.idle, inner.parked, inner.exited)
    }
}

#[cfg(test)]
mod tests;
