//! The frame of a plain device: one whose requests end in the turn they begin in, so that nothing of it is ever in flight.
//!
//! Such a device is a [`DeviceOps`]. While a driver uses it the handler is with a [`Worker`], which gives it turns when
//! a queue's eventfd or one of the handler's own descriptors is readable; otherwise it is here. At a fork it stands
//! still between two turns, and all there is to save is its own state and its queues'.

use std::any::Any;
use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clade_memory::GuestRam;
use thiserror::Error;

use super::dma::DmaError;
use super::{
    ActivateError, Activation, Backend, Chain, DeviceState, Interrupt, QueueError, QueueState, SaveError, Saved,
    Service, Turn, VirtioDevice, Virtqueue, Wake, Worker, YieldRequest,
};

/// Numbers of a handler's own sources begin here; below are its queues'.
pub const OWN: u32 = 1 << 16;

/// What ends a device's work until it is reset.
#[derive(Debug, Error)]
pub enum FatalError {
    /// The driver breaks the rules of a queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver names memory that is not there.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// A device's configuration space, shared by the transport, the handler and whoever changes it from the host's side.
#[derive(Clone, Debug)]
pub struct Config(Arc<Mutex<Space>>);

#[derive(Debug)]
struct Space {
    bytes: Vec<u8>,
    /// Of each byte, whether the driver has read it since it was written.
    seen: Vec<bool>,
}

impl Config {
    /// A space of these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        let seen = vec![false; bytes.len()];
        Self(Arc::new(Mutex::new(Space { bytes, seen })))
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from `offset` on. Beyond the end there are zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let Space { bytes, .. } = &*self.space();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let there = &bytes[start..bytes.len().min(start.saturating_add(data.len()))];
        data[..there.len()].copy_from_slice(there);
    }

    /// The same, by the driver.
    fn read_by_driver(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
        let Space { seen, .. } = &mut *self.space();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        seen.iter_mut().skip(start).take(data.len()).for_each(|seen| *seen = true);
    }

    /// Whether the driver has read the byte at `offset` since it was written.
    #[must_use]
    pub fn is_seen(&self, offset: u64) -> bool {
        let Space { seen, .. } = &*self.space();
        usize::try_from(offset).is_ok_and(|at| seen.get(at) == Some(&true))
    }

    /// Writes at `offset`; what does not fit is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Space { bytes, seen } = &mut *self.space();
        let Ok(start) = usize::try_from(offset) else { return };
        if let Some(there) = start.checked_add(data.len()).and_then(|end| bytes.get_mut(start..end)) {
            there.copy_from_slice(data);
            seen[start..start + data.len()].fill(false);
        }
    }

    /// A number of 32 bits at `offset`.
    #[must_use]
    pub fn u32(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }
}

/// What a turn works with.
#[derive(Debug)]
pub struct QueueCtx {
    /// Guest memory.
    pub ram: GuestRam,
    /// What was negotiated.
    pub features: u64,
    queues: Vec<Option<Virtqueue>>,
    /// Queues with something given back since the driver was last told.
    used: Vec<bool>,
    interrupt: Arc<Interrupt>,
}

impl QueueCtx {
    fn new(with: Activation) -> Self {
        let Activation { ram, queues, features, interrupt, held: _ } = with;
        Self { ram, features, used: vec![false; queues.len()], queues, interrupt }
    }

    /// The next chain of queue `index`, read once and checked. None when there is none, or no such queue: then the driver will notify.
    ///
    /// # Errors
    /// When the driver breaks the rules.
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain>, QueueError> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(None) };
        loop {
            if let Some(head) = queue.pop()? {
                return queue.chain(head).map(Some);
            }
            // Asked for notifications before the last look, or one that comes in between is lost.
            if !queue.enable_notifications() {
                return Ok(None);
            }
        }
    }

    /// Puts the chain popped last back, as if it had not been.
    pub fn undo_pop(&mut self, index: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            queue.undo_pop();
        }
    }

    /// Gives a chain back with `len` bytes written.
    ///
    /// # Errors
    /// When the used ring has gone.
    pub fn add_used(&mut self, index: usize, head: u16, len: u32) -> Result<(), QueueError> {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            queue.add_used(head, len)?;
            self.used[index] = true;
        }
        Ok(())
    }

    /// Counts a chain that was popped before the device was saved.
    pub fn restore_in_flight(&mut self, index: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            queue.restore_in_flight();
        }
    }

    /// Whether the driver has set up queue `index`.
    #[must_use]
    pub fn has(&self, index: usize) -> bool {
        self.queues.get(index).is_some_and(Option::is_some)
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }

    fn tell(&mut self) {
        let mut tell = false;
        for (used, queue) in self.used.iter_mut().zip(&mut self.queues) {
            if std::mem::take(used) {
                tell |= queue.as_mut().is_some_and(Virtqueue::needs_notification);
            }
        }
        if tell {
            self.interrupt.used();
        }
    }
}

/// A plain device. See the module's documentation.
pub trait DeviceOps: Send + fmt::Debug + 'static {
    /// What its thread and its messages are called.
    const NAME: &'static str;
    /// Its device type.
    const TYPE: u32;

    /// The features it offers.
    fn features(&self) -> u64;

    /// Its queues' largest sizes.
    fn queue_sizes(&self) -> &[u16];

    /// Its configuration space.
    fn config(&self) -> &Config;

    /// Which bytes of it the driver may write.
    fn writable_config(&self) -> std::ops::Range<u64> {
        0..0
    }

    /// Descriptors that wake it, with numbers from [`OWN`] on. It keeps them open.
    fn sources(&self) -> Vec<(RawFd, u32)> {
        Vec::new()
    }

    /// A driver takes it. Called before the first turn.
    fn begin(&mut self, _io: &mut QueueCtx) {}

    /// The driver lets go.
    fn end(&mut self) {}

    /// Goes back to a saved state, after [`DeviceOps::end`] and before [`DeviceOps::begin`]. What is this VM's alone
    /// stays.
    ///
    /// # Errors
    /// When it is another kind of device's state.
    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError>;

    /// Does a part of what there is to do in all queues and sources. `wake` says what it is about, as far as one knows.
    ///
    /// # Errors
    /// When the driver breaks the rules: it must reset the device.
    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, hurry: &YieldRequest<'_>) -> Result<Turn, FatalError>;

    /// When it wants a turn at the latest.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Its own state, and what cannot be written down.
    fn save(&self) -> (DeviceState, Backend);
}

#[derive(Debug)]
struct PlainService<H: DeviceOps> {
    handler: H,
    io: QueueCtx,
    broken: bool,
}

impl<H: DeviceOps> PlainService<H> {
    fn fail(&mut self, error: &dyn fmt::Display) {
        if !self.broken {
            tracing::warn!(%error, device = H::NAME, "a device needs a reset");
            self.broken = true;
            self.io.interrupt.fail();
        }
    }
}

impl<H: DeviceOps> PlainService<H> {
    fn rewind(&mut self, state: &DeviceState, with: Activation) -> Result<(), ActivateError> {
        self.handler.end();
        self.handler.rewind(state)?;
        self.io = QueueCtx::new(with);
        self.handler.begin(&mut self.io);
        self.broken = false;
        Ok(())
    }
}

/// Whether both have the same queues set up.
pub(super) fn same_queues(some: &[Option<Virtqueue>], others: &[Option<Virtqueue>]) -> bool {
    some.iter().map(Option::is_some).eq(others.iter().map(Option::is_some))
}

impl<H: DeviceOps> Service for PlainService<H> {
    fn turn(&mut self, wake: Wake, hurry: &YieldRequest<'_>) -> Turn {
        if let Wake::Source(index) = wake
            && let Some(Some(queue)) = self.io.queues.get_mut(index as usize)
        {
            // Before looking into the queue.
            queue.acknowledge();
            queue.disable_notifications();
        }
        if self.broken {
            return Turn::Done;
        }
        let turn = self.handler.turn(&mut self.io, wake, hurry).unwrap_or_else(|error| {
            self.fail(&error);
            Turn::Done
        });
        self.io.tell();
        turn
    }

    fn deadline(&self) -> Option<Instant> {
        if self.broken { None } else { self.handler.deadline() }
    }

    fn broken(&mut self) {
        self.fail(&"its worker panicked");
    }
}

#[derive(Debug)]
enum Place<H: DeviceOps> {
    Here(H),
    Working(Worker<PlainService<H>>),
    /// The thread could not be ended, or could not begin.
    Lost,
}

/// A plain device behind a transport.
#[derive(Debug)]
pub struct SyncDevice<H: DeviceOps> {
    features: u64,
    queue_sizes: Vec<u16>,
    config: Config,
    writable: std::ops::Range<u64>,
    place: Place<H>,
}

impl<H: DeviceOps> SyncDevice<H> {
    /// A device of `handler`'s.
    #[must_use]
    pub fn new(handler: H) -> Self {
        Self {
            features: handler.features(),
            queue_sizes: handler.queue_sizes().to_vec(),
            config: handler.config().clone(),
            writable: handler.writable_config(),
            place: Place::Here(handler),
        }
    }

    /// Runs `with` on the handler, between two turns. None if it is lost.
    pub fn with<T>(&mut self, with: impl FnOnce(&mut H) -> T) -> Option<T> {
        match &mut self.place {
            Place::Here(handler) => Some(with(handler)),
            Place::Working(worker) => Some(worker.with(|service| with(&mut service.handler))),
            Place::Lost => None,
        }
    }

    /// Tells the driver that the configuration space has changed, if there is one.
    pub fn config_changed(&mut self) {
        if let Place::Working(worker) = &self.place {
            worker.with(|service| service.io.config_changed());
        }
    }
}

impl<H: DeviceOps> VirtioDevice for SyncDevice<H> {
    fn device_type(&self) -> u32 {
        H::TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read_by_driver(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let end = offset.saturating_add(data.len() as u64);
        if self.writable.start <= offset && end <= self.writable.end {
            self.config.write(offset, data);
        }
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let Place::Here(mut handler) = std::mem::replace(&mut self.place, Place::Lost) else {
            return Err(ActivateError::NotReady);
        };
        let mut sources = handler.sources();
        sources.extend(with.queues.iter().flatten().map(|queue| (queue.event().as_raw_fd(), u32::from(queue.index()))));
        let held = with.held;
        let mut io = QueueCtx::new(with);
        handler.begin(&mut io);
        let service = PlainService { handler, io, broken: false };
        match Worker::spawn(H::NAME, service, &sources, held) {
            Ok(worker) => {
                self.place = Place::Working(worker);
                Ok(())
            }
            Err(failed) => {
                let (error, service) = *failed;
                self.place = service.map_or(Place::Lost, |service| Place::Here(service.handler));
                Err(ActivateError::Worker(error))
            }
        }
    }

    fn deactivate(&mut self) -> bool {
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Working(worker) => worker.stop().map_or(Place::Lost, |service| Place::Here(service.handler)),
            other => other,
        };
        if let Place::Here(handler) = &mut self.place {
            handler.end();
        }
        true
    }

    fn quiesce(&mut self) {
        if let Place::Working(worker) = &self.place {
            worker.quiesce();
        }
    }

    fn resume(&mut self) {
        if let Place::Working(worker) = &self.place {
            worker.resume();
        }
    }

    fn rewind(
        &mut self,
        state: &DeviceState,
        _backend: &Backend,
        with: Option<Activation>,
    ) -> Result<(), ActivateError> {
        let Some(with) = with else {
            // Never false for a plain device.
            let _over = self.deactivate();
            let Place::Here(handler) = &mut self.place else { return Err(ActivateError::NotReady) };
            return handler.rewind(state);
        };
        // In place if the worker waits for the same queues' events then and now; threads cost more than all the rest.
        if let Place::Working(worker) = &self.place
            && worker.is_alive()
            && worker.with(|service| same_queues(&service.io.queues, &with.queues))
        {
            worker.with(|service| service.rewind(state, with))?;
            worker.start_over();
            return Ok(());
        }
        self.rewind(state, &Backend::None, None)?;
        self.activate(with)
    }

    fn save(&mut self) -> Result<Saved, SaveError> {
        let ((state, backend), queues) = match &mut self.place {
            Place::Here(handler) => (handler.save(), vec![None; self.queue_sizes.len()]),
            Place::Working(worker) => worker.with(|service| {
                let queues: Vec<Option<QueueState>> =
                    service.io.queues.iter().map(|queue| queue.as_ref().map(Virtqueue::save)).collect();
                (service.handler.save(), queues)
            }),
            Place::Lost => return Err(SaveError { what: H::NAME }),
        };
        Ok(Saved { state, backend, queues })
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}
