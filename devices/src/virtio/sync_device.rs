//! The frame of a synchronous device: one that finishes each request in the turn in which the request
//! begins, so that none is ever in flight.
//!
//! Such a device is a [`DeviceOps`], the handler. While a driver uses the device, a worker owns the
//! handler, and gives it a turn when a queue's eventfd or one of the handler's own descriptors is
//! readable. At other times the device owns the handler. A fork pauses the handler between two
//! turns, so the saved state is the handler's own and its queues'.

use std::any::Any;
use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clade_memory::GuestRam;
use thiserror::Error;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::dma::DmaError;
use super::queue_set::QueueSet;
use super::{
    ActivateError, Activation, Backend, Chain, DeviceState, DeviceThread, QueueError, SaveError, SavedDevice, Service,
    Turn, VirtioDevice, Wake, YieldRequest,
};

/// The first number of a handler's own sources; smaller numbers belong to its queues.
pub(crate) const OWN: u32 = 1 << 16;

/// Why a device stops working until it is reset.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FatalError {
    /// The driver has broken the rules of a queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver has named memory that does not exist.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// A device's configuration space, shared by the transport, the handler, and callers on the host
/// that change it.
#[derive(Clone, Debug)]
pub struct ConfigSpace(Arc<Mutex<ConfigBytes>>);

#[derive(Debug)]
struct ConfigBytes {
    bytes: Vec<u8>,
    /// For each byte, whether the driver has read it since it was last written.
    seen: Vec<bool>,
}

impl ConfigSpace {
    /// A configuration space with these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        let seen = vec![false; bytes.len()];
        Self(Arc::new(Mutex::new(ConfigBytes { bytes, seen })))
    }

    fn space(&self) -> MutexGuard<'_, ConfigBytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from `offset` on. The space continues in zeros beyond its end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let ConfigBytes { bytes, .. } = &*self.space();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let there = &bytes[start..bytes.len().min(start.saturating_add(data.len()))];
        data[..there.len()].copy_from_slice(there);
    }

    /// As [`ConfigSpace::read`], for the driver.
    fn read_by_driver(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
        let ConfigBytes { seen, .. } = &mut *self.space();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        seen.iter_mut().skip(start).take(data.len()).for_each(|seen| *seen = true);
    }

    /// Whether the driver has read the byte at `offset` since it was last written.
    #[must_use]
    pub(crate) fn is_seen(&self, offset: u64) -> bool {
        let ConfigBytes { seen, .. } = &*self.space();
        usize::try_from(offset).is_ok_and(|at| seen.get(at) == Some(&true))
    }

    /// Writes at `offset`. Data that does not fit is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let ConfigBytes { bytes, seen } = &mut *self.space();
        let Ok(start) = usize::try_from(offset) else { return };
        if let Some(there) = start.checked_add(data.len()).and_then(|end| bytes.get_mut(start..end)) {
            there.copy_from_slice(data);
            seen[start..start + data.len()].fill(false);
        }
    }

    /// The little-endian number of 32 bits at `offset`.
    #[must_use]
    pub fn u32(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }
}

/// The queues and the memory that a handler's turn works with.
#[derive(Debug)]
pub struct QueueCtx {
    /// Guest memory.
    pub(crate) ram: GuestRam,
    /// The negotiated features, by bit.
    pub(crate) features: u64,
    queues: QueueSet,
}

impl QueueCtx {
    fn new(with: Activation) -> Self {
        let Activation { ram, queues, features, interrupt, held: _ } = with;
        Self { ram, features, queues: QueueSet::new(queues, interrupt) }
    }

    /// Pops the next chain of queue `index`, read once and checked. Returns None if the queue is
    /// empty or absent: the driver then notifies the device of the next chain.
    ///
    /// # Errors
    /// When the driver has broken the rules.
    pub(crate) fn pop(&mut self, index: usize) -> Result<Option<Chain>, QueueError> {
        let Some(queue) = self.queues.get_mut(index) else { return Ok(None) };
        loop {
            if let Some(head) = queue.pop()? {
                return queue.chain(head).map(Some);
            }
            // Notifications are enabled before the last check; otherwise one that arrives in
            // between is lost.
            if !queue.enable_notifications() {
                return Ok(None);
            }
        }
    }

    /// The number of available chains. The driver notifies the device of the next one.
    ///
    /// # Errors
    /// When the driver has broken the rules.
    pub(crate) fn offered(&mut self, index: usize) -> Result<u16, QueueError> {
        let mut count = 0;
        // The counted chains are given back, even after an error.
        let end = loop {
            match self.pop(index) {
                Ok(Some(_)) => count += 1,
                Ok(None) => break Ok(count),
                Err(error) => break Err(error),
            }
        };
        (0..count).for_each(|_| self.undo_pop(index));
        end
    }

    /// Undoes the last pop.
    pub(crate) fn undo_pop(&mut self, index: usize) {
        if let Some(queue) = self.queues.get_mut(index) {
            queue.undo_pop();
        }
    }

    /// Adds a chain, with `len` bytes written, to the used ring.
    ///
    /// # Errors
    /// When the used ring is not in RAM.
    pub(crate) fn add_used(&mut self, index: usize, head: u16, len: u32) -> Result<(), QueueError> {
        if self.has(index) { self.queues.add_used(index, head, len) } else { Ok(()) }
    }

    /// The same for several chains, which the driver sees at once.
    pub(crate) fn add_all_used(&mut self, index: usize, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        if self.has(index) { self.queues.add_all_used(index, chains) } else { Ok(()) }
    }

    /// Counts a chain as popped, because it was in flight when the device was saved.
    pub(crate) fn restore_in_flight(&mut self, index: usize) {
        if let Some(queue) = self.queues.get_mut(index) {
            queue.restore_in_flight();
        }
    }

    /// Whether the driver has set up queue `index`.
    #[must_use]
    pub(crate) fn has(&self, index: usize) -> bool {
        self.queues.get(index).is_some()
    }

    /// Interrupts the driver because the configuration space has changed.
    pub(crate) fn config_changed(&self) {
        self.queues.interrupt().config_changed();
    }
}

/// The handler of a synchronous device; see the module's documentation.
pub trait DeviceOps: Send + fmt::Debug + 'static {
    /// The name of the device's thread, also used in messages.
    const NAME: &'static str;
    /// The device type, as the specification numbers them.
    const TYPE: u32;

    /// The features offered. Default: VIRTIO_F_EVENT_IDX alone.
    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The configuration space.
    fn config(&self) -> &ConfigSpace;

    /// The bytes of the configuration space that the driver may write.
    fn writable_config(&self) -> std::ops::Range<u64> {
        0..0
    }

    /// Descriptors that wake the device, with numbers from `OWN` (1 << 16) on. The handler keeps
    /// them open.
    fn sources(&self) -> Vec<(RawFd, u32)> {
        Vec::new()
    }

    /// A driver has activated the device. Called before the first turn.
    fn begin(&mut self, _io: &mut QueueCtx) {}

    /// The driver has reset the device.
    fn end(&mut self) {}

    /// Goes back to a saved state, after [`DeviceOps::end`] and before [`DeviceOps::begin`].
    /// Resources of this VM alone stay.
    ///
    /// # Errors
    /// When the state is of another kind of device.
    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError>;

    /// Does part of the work in all queues and sources. `wake` is the reason for the turn, if it is
    /// known.
    ///
    /// # Errors
    /// When the driver has broken the rules: it must reset the device.
    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, should_yield: &YieldRequest<'_>) -> Result<Turn, FatalError>;

    /// The latest time of the next turn.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Whether the device has input for the guest that no source announces: a packet behind a
    /// limiter or a full ring, or a connection that waits for credit. Input that was there at the
    /// last call counts again only if the guest has taken some since: a driver that takes no input
    /// must not keep its VM awake.
    fn has_input(&mut self) -> bool {
        false
    }

    /// The handler's state, and the part of it that cannot be serialized.
    fn save(&self) -> (DeviceState, Backend);
}

#[derive(Debug)]
struct SyncService<H: DeviceOps> {
    handler: H,
    io: QueueCtx,
    broken: bool,
}

impl<H: DeviceOps> SyncService<H> {
    fn fail(&mut self, error: &dyn fmt::Display) {
        if !self.broken {
            tracing::warn!(%error, device = H::NAME, "a device needs a reset");
            self.broken = true;
            self.io.queues.interrupt().fail();
        }
    }
}

impl<H: DeviceOps> SyncService<H> {
    fn rewind(&mut self, state: &DeviceState, with: Activation) -> Result<(), ActivateError> {
        self.handler.end();
        self.handler.rewind(state)?;
        self.io = QueueCtx::new(with);
        self.handler.begin(&mut self.io);
        self.broken = false;
        Ok(())
    }
}

impl<H: DeviceOps> Service for SyncService<H> {
    fn turn(&mut self, wake: Wake, should_yield: &YieldRequest<'_>) -> Turn {
        if let Wake::Source(index) = wake {
            self.io.queues.acknowledge(index as usize);
        }
        if self.broken {
            return Turn::Done;
        }
        let turn = self.handler.turn(&mut self.io, wake, should_yield).unwrap_or_else(|error| {
            self.fail(&error);
            Turn::Done
        });
        self.io.queues.notify();
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
enum HandlerOwner<H: DeviceOps> {
    Inactive(H),
    Working(DeviceThread<SyncService<H>>),
    /// No owner: the thread could not be ended, or could not be started.
    Lost,
}

/// A synchronous device behind a transport.
#[derive(Debug)]
pub struct SyncDevice<H: DeviceOps> {
    features: u64,
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
    writable: std::ops::Range<u64>,
    owner: HandlerOwner<H>,
}

impl<H: DeviceOps> SyncDevice<H> {
    /// A device with this handler.
    #[must_use]
    pub fn new(handler: H) -> Self {
        Self {
            features: handler.features(),
            queue_sizes: handler.queue_sizes(),
            config: handler.config().clone(),
            writable: handler.writable_config(),
            owner: HandlerOwner::Inactive(handler),
        }
    }

    /// Runs `with` on the handler, between two turns. Returns None if the handler is lost.
    pub fn with<T>(&mut self, with: impl FnOnce(&mut H) -> T) -> Option<T> {
        match &mut self.owner {
            HandlerOwner::Inactive(handler) => Some(with(handler)),
            HandlerOwner::Working(worker) => Some(worker.with(|service| with(&mut service.handler))),
            HandlerOwner::Lost => None,
        }
    }

    /// Whether a driver uses the device, so that its sources are watched.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        matches!(self.owner, HandlerOwner::Working(_))
    }

    /// Interrupts the driver, if there is one, because the configuration space has changed.
    pub fn config_changed(&mut self) {
        if let HandlerOwner::Working(worker) = &self.owner {
            worker.with(|service| service.io.config_changed());
        }
    }
}

impl<H: DeviceOps> SyncDevice<H> {
    /// Gives the handler a turn soon, if a driver uses the device: for changes other than of a
    /// queue or a descriptor.
    pub fn wake(&mut self) {
        if let HandlerOwner::Working(worker) = &self.owner {
            worker.start_over();
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
        let HandlerOwner::Inactive(mut handler) = std::mem::replace(&mut self.owner, HandlerOwner::Lost) else {
            return Err(ActivateError::NotReady);
        };
        let mut sources = handler.sources();
        sources.extend(with.queues.iter().flatten().map(|queue| (queue.event().as_raw_fd(), u32::from(queue.index()))));
        let held = with.held;
        let mut io = QueueCtx::new(with);
        handler.begin(&mut io);
        let service = SyncService { handler, io, broken: false };
        match DeviceThread::spawn(H::NAME, service, &sources, held) {
            Ok(worker) => {
                self.owner = HandlerOwner::Working(worker);
                Ok(())
            }
            Err(failed) => {
                let (error, service) = *failed;
                self.owner = service.map_or(HandlerOwner::Lost, |service| HandlerOwner::Inactive(service.handler));
                Err(ActivateError::Worker(error))
            }
        }
    }

    fn deactivate(&mut self) -> bool {
        self.owner = match std::mem::replace(&mut self.owner, HandlerOwner::Lost) {
            HandlerOwner::Working(worker) => {
                worker.stop().map_or(HandlerOwner::Lost, |service| HandlerOwner::Inactive(service.handler))
            }
            other => other,
        };
        if let HandlerOwner::Inactive(handler) = &mut self.owner {
            handler.end();
        }
        true
    }

    fn quiesce(&mut self) {
        if let HandlerOwner::Working(worker) = &self.owner {
            worker.quiesce();
        }
    }

    fn resume(&mut self) {
        if let HandlerOwner::Working(worker) = &self.owner {
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
            // A synchronous device always resets at once.
            let _over = self.deactivate();
            let HandlerOwner::Inactive(handler) = &mut self.owner else { return Err(ActivateError::NotReady) };
            return handler.rewind(state);
        };
        // In place if the worker has waited for the same queues' events: starting a thread costs
        // more than all the rest.
        if let HandlerOwner::Working(worker) = &self.owner
            && worker.is_alive()
            && worker.with(|service| service.io.queues.is_same_as(&with.queues))
        {
            worker.with(|service| service.rewind(state, with))?;
            worker.start_over();
            return Ok(());
        }
        self.rewind(state, &Backend::None, None)?;
        self.activate(with)
    }

    fn save(&mut self) -> Result<SavedDevice, SaveError> {
        let ((state, backend), queues) = match &mut self.owner {
            HandlerOwner::Inactive(handler) => (handler.save(), vec![None; self.queue_sizes.len()]),
            HandlerOwner::Working(worker) => worker.with(|service| (service.handler.save(), service.io.queues.save())),
            HandlerOwner::Lost => return Err(SaveError { what: H::NAME }),
        };
        Ok(SavedDevice { state, backend, queues })
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}
