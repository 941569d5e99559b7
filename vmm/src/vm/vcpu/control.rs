//! Synchronizes the vCPU threads of a VM with its owner: the thread that starts, pauses, saves,
//! resets or stops it.
//!
//! # The order of a save
//!
//! 1. The state becomes [`State::Pausing`], then each vCPU is kicked, one after the other.
//! 2. Each vCPU leaves the guest and parks, without saving yet.
//! 3. The last vCPU parks: the state becomes [`State::Paused`]. From here on no vCPU sends an
//!    interrupt to another.
//! 4. Each vCPU saves itself.
//! 5. The owner collects the states, then saves the interrupt controllers, then resumes.
//!
//! A vCPU that saved in step 2 would lose interrupts. A sibling still in the guest may send it an
//! IPI, NMI, INIT or SIPI after its local APIC was read. That interrupt is in no saved state, and
//! the sender does not repeat it. A child whose vCPU waits for it would wait for ever.
//!
//! Loading another state in place (a reset) keeps the same order: no vCPU loads before all are
//! parked, and none runs before all have loaded.
//!
//! # The order of a start
//!
//! 1. Each vCPU loads its state.
//! 2. The last one to do so performs the steps for the VM as a whole ([`VcpuControl::begin`]).
//! 3. Either all vCPUs enter the guest, or none. At this moment the owner gets the result: the
//!    first failure, if any.
//!
//! No thread waits for a fixed number of threads: a vCPU that fails or panics stops the VM, and
//! that wakes every waiter.

mod state;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::vm::error::{VmError, catch_panic};
use crate::vm::stop::StopReason;
use crate::vm::vcpu::exits::{Exits, lines_of_all};
use crate::vm::vcpu::kick::Kicker;
use crate::vm::vcpu::schedule::Schedule;
use state::{Inner, Phase, RUN, Startup, State};

/// Timeout for a vCPU to leave the guest. This takes microseconds on an idle processor and seconds
/// on a host that is overcommitted many times; past the timeout the host is broken.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The synchronization point. `O` is the order that a vCPU starts with, `S` its saved state.
///
/// # The VM's state
///
/// | from | to | when |
/// |---|---|---|
/// | Running | Pausing | the first pause is taken, and a vCPU is not parked |
/// | Running | Paused | the first pause is taken, and every vCPU is still parked from the last |
/// | Pausing | Paused | the last vCPU parks |
/// | Pausing, Paused | Running | the last pause is released |
/// | Running, Pausing, Paused | Stopped | [`VcpuControl::stop`]; the first reason stays |
///
/// A pause taken while another is held leaves the state unchanged. Only `set_state` changes the
/// state, and the wish with it.
///
/// # The start
///
/// | from | to | when |
/// |---|---|---|
/// | Preparing(n) | Preparing(n + 1) | a vCPU has its state, and is not the last |
/// | Preparing | Admission | the last vCPU asks whether the VM is admitted, unless it has stopped |
/// | Admission | Answered | it has the answer |
/// | Preparing, Answered | Begun | the last vCPU has its state, and the steps for the whole VM are done |
/// | Preparing, Admission, Answered | Failed | a vCPU cannot take its state, or the last one fails; the VM stops |
///
/// # A vCPU's phase
///
/// | from | to | when |
/// |---|---|---|
/// | Spawned | Idle | [`VcpuControl::wait_for_order`] is entered |
/// | Idle | Started | it takes its start command |
/// | Started | Parked | [`VcpuControl::park`] is entered |
/// | Parked | Parked | it leaves to save or to load, and enters again |
/// | Parked | Started | the state is Running |
/// | Idle, Parked | Leaving | the VM has stopped |
/// | any | Exited | [`VcpuControl::thread_exited`] |
///
/// # Locks and memory order
///
/// One lock protects everything except the wish, which a vCPU reads before it enters the guest. The
/// wish is written under the lock, SeqCst, and before the kick. It pairs with
/// [`Kicker::clear_immediate_exit`].
pub(crate) struct VcpuControl<O, S> {
    wish: AtomicU8,
    inner: Mutex<Inner<O, S>>,
    to_vcpus: Condvar,
    to_owner: Condvar,
    kickers: Vec<Kicker>,
    exits: Vec<Exits>,
    /// Whether a vCPU's thread has said that it has the slice of a start.
    has_starting: AtomicBool,
    pub(crate) schedule: Schedule,
}

/// The number of a request to save or to load. An answer to an older request is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StateRequest(u64);

/// The next action of a parked or idle vCPU.
#[derive(Debug)]
pub(crate) enum Next<O> {
    /// Take this state, and run.
    Start(O),
    /// Enter the guest.
    Run,
    /// Save its state, and park again.
    Save(StateRequest),
    /// Take another state in place, and park again.
    Load(StateRequest, O),
    /// End its thread.
    Exit,
}

impl<O, S> VcpuControl<O, S> {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            wish: AtomicU8::new(RUN),
            inner: Mutex::new(Inner::new(vcpus)),
            to_vcpus: Condvar::new(),
            to_owner: Condvar::new(),
            kickers: (0..vcpus).map(|_| Kicker::default()).collect(),
            exits: (0..vcpus).map(|_| Exits::default()).collect(),
            has_starting: AtomicBool::new(false),
            schedule: Schedule::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<O, S>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one place where the state and the wish change.
    fn set_state(&self, inner: &mut Inner<O, S>, state: State) {
        // SeqCst, and before the kick: see Kicker::clear_immediate_exit.
        self.wish.store(state.wish(), Ordering::SeqCst);
        inner.state = state;
    }

    fn vcpus(&self) -> usize {
        self.kickers.len()
    }

    pub(crate) fn kicker(&self, index: usize) -> &Kicker {
        &self.kickers[index]
    }

    /// The last exits of vCPU `index`.
    pub(crate) fn exits(&self, index: usize) -> &Exits {
        &self.exits[index]
    }

    /// The last exits of all vCPUs, in words.
    pub(crate) fn last_exits(&self) -> Vec<String> {
        lines_of_all(&self.exits)
    }

    // --- the vCPU threads' side ---

    /// Waits for an order to start, or to exit.
    pub(crate) fn wait_for_order(&self, index: usize) -> Next<O> {
        let mut inner = self.inner();
        inner.vcpus[index].phase = Phase::Idle;
        self.to_owner.notify_all();
        loop {
            if let State::Stopped(_) = inner.state {
                inner.vcpus[index].phase = Phase::Leaving;
                return Next::Exit;
            }
            if let Some(order) = inner.vcpus[index].order.take() {
                inner.vcpus[index].phase = Phase::Started;
                return Next::Start(order);
            }
            inner = self.to_vcpus.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reports whether vCPU `index` has loaded its first state, and waits until the start is
    /// decided. Returns true if the vCPU may enter the guest.
    ///
    /// The last vCPU to arrive runs `lead`, the steps for the VM as a whole. No vCPU enters the
    /// guest before that is done. A failure or a panic of any vCPU stops the VM and is returned to
    /// the owner, and the other vCPUs stop waiting.
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
            while !inner.startup.is_decided() && inner.stop_reason().is_none() {
                inner = self.to_vcpus.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            return inner.startup == Startup::Begun;
        }
        // Outside the lock: a device that resumes may stop the VM.
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

    /// Asks whether the VM is admitted, for the last vCPU in its `lead` ([`VcpuControl::begin`]). The owner is not woken
    /// for that, and waits for as long as it takes, also for a VM that stops meanwhile. One that was admitted counts as
    /// started then.
    ///
    /// # Errors
    /// When it is not admitted, or has stopped before.
    pub(crate) fn ask_admission(&self, admit: impl FnOnce() -> bool) -> Result<(), VmError> {
        let mut inner = self.inner();
        if let Some(reason) = inner.stop_reason() {
            return Err(VmError::Stopped(reason.clone()));
        }
        inner.startup = Startup::Admission;
        drop(inner);
        let admitted = admit();
        let mut inner = self.inner();
        (inner.startup, inner.admitted) = (Startup::Answered, admitted);
        if admitted { Ok(()) } else { Err(VmError::Unwanted) }
    }

    fn fail_start(&self, vcpu: usize, error: VmError) {
        let reason = match &error {
            VmError::Panicked { message, .. } => StopReason::Panic { vcpu, message: message.clone() },
            error => StopReason::Start { vcpu, error: crate::error_chain(error) },
        };
        let mut inner = self.inner();
        inner.startup = Startup::Failed;
        // The first failure stays.
        inner.failure.get_or_insert(error);
        drop(inner);
        self.stop(reason);
    }

    /// Whether the vCPU may enter the guest. Called after [`Kicker::clear_immediate_exit`].
    pub(crate) fn may_run(&self) -> bool {
        // SeqCst: see Kicker::clear_immediate_exit.
        self.wish.load(Ordering::SeqCst) == RUN
    }

    /// Parks the vCPU until it must run, save, load or exit. `parked` is false the first time, true
    /// after a [`Next::Save`] or [`Next::Load`].
    pub(crate) fn park(&self, index: usize, parked: bool) -> Next<O> {
        let mut inner = self.inner();
        if !parked {
            inner.vcpus[index].phase = Phase::Parked;
            self.to_owner.notify_all();
            if inner.state == State::Pausing && inner.all_in(Phase::Parked) {
                self.set_state(&mut inner, State::Paused);
                // vCPUs that parked earlier have waited for this one.
                self.to_vcpus.notify_all();
            }
        }
        loop {
            // No vCPU saves or loads before all are parked: see the module's documentation.
            let all_parked = inner.state == State::Paused || self.schedule.saves_early();
            let (save_asked, load_asked) = (inner.save_asked, inner.load_asked);
            let state = inner.state.clone();
            let vcpu = &mut inner.vcpus[index];
            match state {
                State::Stopped(_) => {
                    vcpu.phase = Phase::Leaving;
                    return Next::Exit;
                }
                State::Running => {
                    vcpu.phase = Phase::Started;
                    return Next::Run;
                }
                State::Pausing | State::Paused if all_parked && vcpu.save_done != save_asked => {
                    return Next::Save(StateRequest(save_asked));
                }
                State::Pausing | State::Paused if all_parked && vcpu.order.is_some() => {
                    if let Some(order) = vcpu.order.take() {
                        return Next::Load(StateRequest(load_asked), order);
                    }
                }
                State::Pausing | State::Paused => {
                    inner = self.to_vcpus.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Submits the state that a vCPU has saved for `request`. Dropped if there is a newer request,
    /// because the vCPU's siblings may have run in between.
    pub(crate) fn submit_state(&self, index: usize, request: StateRequest, state: Result<S, VmError>) {
        let mut inner = self.inner();
        if request == StateRequest(inner.save_asked) {
            inner.vcpus[index].save_done = request.0;
            inner.vcpus[index].saved = Some(state);
            self.to_owner.notify_all();
        }
    }

    /// Submits the result of loading the state of `request`.
    pub(crate) fn has_loaded(&self, index: usize, request: StateRequest, result: Result<(), VmError>) {
        let mut inner = self.inner();
        if request == StateRequest(inner.load_asked) {
            inner.vcpus[index].loaded = Some(result);
            self.to_owner.notify_all();
        }
    }

    /// The last call of vCPU `index`'s thread, which has dropped its vCPU.
    pub(crate) fn thread_exited(&self, index: usize) {
        self.inner().vcpus[index].phase = Phase::Exited;
        self.to_owner.notify_all();
    }

    // --- the owner's side ---

    /// Starts the vCPUs, with one order each. Returns once all of them have loaded their state and
    /// may enter the guest. The guest may already have ended by then.
    pub(crate) fn start(&self, orders: impl IntoIterator<Item = O>) -> Result<(), VmError> {
        self.give(orders);
        self.to_vcpus.notify_all();
        let mut inner = self.wait(|inner| inner.startup.is_decided())?;
        match (inner.failure.take(), inner.stop_reason()) {
            (Some(error), _) => Err(error),
            // The guest has begun, run, and ended. A VM that was admitted was reported as made.
            (None, Some(reason)) if inner.startup == Startup::Begun && (inner.admitted || reason.is_by_guest()) => {
                Ok(())
            }
            (None, Some(reason)) => Err(VmError::Stopped(reason.clone())),
            (None, None) => Ok(()),
        }
    }

    /// Gives each vCPU an order. An order to a VM that has stopped is dropped, not kept: it holds
    /// the VM's devices.
    fn give(&self, orders: impl IntoIterator<Item = O>) {
        let orders: Vec<O> = orders.into_iter().collect();
        let mut inner = self.inner();
        if inner.stop_reason().is_none() {
            for (vcpu, order) in inner.vcpus.iter_mut().zip(orders) {
                vcpu.order = Some(order);
            }
        }
    }

    /// Takes a pause, without kicking the vCPUs or waiting for them.
    fn hold(&self, inner: &mut Inner<O, S>) {
        inner.pauses += 1;
        if inner.state == State::Running {
            let state = if inner.all_in(Phase::Parked) { State::Paused } else { State::Pausing };
            self.set_state(inner, state);
        }
    }

    /// Takes a pause before the vCPUs are started: they will park before their first instruction.
    pub(crate) fn start_paused(&self) {
        self.hold(&mut self.inner());
    }

    /// Waits until every thread is ready to take an order.
    pub(crate) fn wait_idle(&self) -> Result<(), VmError> {
        self.wait(|inner| inner.all_in(Phase::Idle)).map(drop)
    }

    fn wait(&self, done: impl Fn(&Inner<O, S>) -> bool) -> Result<MutexGuard<'_, Inner<O, S>>, VmError> {
        self.wait_within(TIMEOUT, done)
    }

    fn wait_within(
        &self,
        timeout: Duration,
        done: impl Fn(&Inner<O, S>) -> bool,
    ) -> Result<MutexGuard<'_, Inner<O, S>>, VmError> {
        let (mut deadline, mut startup) = (Instant::now() + timeout, Startup::Preparing(0));
        let mut inner = self.inner();
        while !done(&inner) {
            if let Some(reason) = inner.stop_reason().filter(|_| !inner.startup.is_asked()) {
                return Err(VmError::Stopped(reason.clone()));
            }
            // The time of an answer does not count, and what follows it has its own.
            if inner.startup == Startup::Admission || startup == Startup::Admission {
                deadline = Instant::now() + timeout;
            }
            startup = inner.startup;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VmError::Stuck { seconds: timeout.as_secs() });
            }
            inner = self.to_owner.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(inner)
    }

    /// Takes a pause: returns once no vCPU is in the guest. With `save`, each vCPU then saves
    /// itself.
    pub(crate) fn pause(&self, save: bool) -> Result<(), VmError> {
        let mut inner = self.inner();
        if let Some(reason) = inner.stop_reason() {
            return Err(VmError::Stopped(reason.clone()));
        }
        if save {
            inner.save_asked += 1;
        }
        self.hold(&mut inner);
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
        match self.wait(|inner| inner.state == State::Paused) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.resume();
                Err(error)
            }
        }
    }

    /// Waits for the vCPUs' states, requested by [`VcpuControl::pause`].
    pub(crate) fn collect(&self) -> Result<Vec<S>, VmError> {
        let mut inner = self.wait(|inner| inner.vcpus.iter().all(|vcpu| vcpu.save_done == inner.save_asked))?;
        inner.vcpus.iter_mut().map(|vcpu| vcpu.saved.take().unwrap_or(Err(VmError::NotSaved))).collect()
    }

    /// Gives each vCPU an order to load another state. All of them must be parked.
    pub(crate) fn load(&self, orders: impl IntoIterator<Item = O>) {
        let mut inner = self.inner();
        inner.load_asked += 1;
        inner.vcpus.iter_mut().for_each(|vcpu| vcpu.loaded = None);
        drop(inner);
        self.give(orders);
        self.to_vcpus.notify_all();
    }

    /// Waits until every vCPU has loaded the state of [`VcpuControl::load`].
    pub(crate) fn await_loaded(&self) -> Result<(), VmError> {
        let mut inner = self.wait(|inner| inner.vcpus.iter().all(|vcpu| vcpu.loaded.is_some()))?;
        inner.vcpus.iter_mut().try_for_each(|vcpu| vcpu.loaded.take().unwrap_or(Err(VmError::NotSaved)))
    }

    /// Releases a pause; after the last one the vCPUs run.
    pub(crate) fn resume(&self) {
        let mut inner = self.inner();
        inner.pauses = inner.pauses.saturating_sub(1);
        if inner.pauses == 0 && matches!(inner.state, State::Pausing | State::Paused) {
            self.set_state(&mut inner, State::Running);
            drop(inner);
            self.to_vcpus.notify_all();
        }
    }

    /// Notes that a vCPU's thread has the slice of a start.
    pub(crate) fn note_start(&self) {
        self.has_starting.store(true, Ordering::Relaxed);
    }

    /// Has the threads of vCPUs leave the guest once if one may have the slice of a start still: a guest that
    /// computes has no exit of its own.
    pub(crate) fn end_starts(&self) {
        if self.has_starting.swap(false, Ordering::Relaxed) {
            self.kickers.iter().for_each(Kicker::kick);
        }
    }

    /// Stops the VM for `reason`; the first reason stays.
    pub(crate) fn stop(&self, reason: StopReason) {
        let mut inner = self.inner();
        if inner.stop_reason().is_none() {
            self.set_state(&mut inner, State::Stopped(reason));
        }
        let untaken: Vec<Option<O>> = inner.vcpus.iter_mut().map(|vcpu| vcpu.order.take()).collect();
        drop(inner);
        // Outside the lock: the last order to be dropped drops the devices.
        drop(untaken);
        self.to_vcpus.notify_all();
        self.to_owner.notify_all();
        self.kickers.iter().for_each(Kicker::kick);
    }

    /// The stop reason, if the VM has stopped.
    pub(crate) fn stopped(&self) -> Option<StopReason> {
        self.inner().stop_reason().cloned()
    }

    /// Waits until every vCPU's thread has exited, up to `timeout`.
    pub(crate) fn wait_exited(&self, timeout: Duration) -> Option<StopReason> {
        let inner = self.inner();
        let left = self
            .to_owner
            .wait_timeout_while(inner, timeout, |inner| !inner.all_in(Phase::Exited))
            .unwrap_or_else(PoisonError::into_inner);
        if left.1.timed_out() { None } else { left.0.stop_reason().cloned() }
    }
}

impl<O, S> std::fmt::Debug for VcpuControl<O, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.inner();
        let phases: Vec<Phase> = inner.vcpus.iter().map(|vcpu| vcpu.phase).collect();
        write!(f, "{:?}, vCPUs {phases:?}", inner.state)
    }
}

#[cfg(test)]
mod tests;
