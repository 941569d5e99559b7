//! Virtio over MMIO, version 2 registers. The device's status limits the driver's writes.
//!
//! ```text
//!   0 ──► ACKNOWLEDGE ──► DRIVER ──► FEATURES_OK ──► DRIVER_OK          any ──write 0──► 0
//!                          │ features   │ queues         │ nothing        any ──FAILED──► FAILED
//!                          └ may be     └ may be         └ may be
//!                            chosen       set up           changed
//! ```
//!
//! A write that the status does not allow is ignored. Above all, queues cannot be changed while the
//! device works with them. A device whose driver breaks the rules inside a queue gets
//! DEVICE_NEEDS_RESET and a configuration interrupt.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clade_memory::GuestRam;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::interrupt::{Interrupt, InterruptState};
use super::queue::{QueueState, Virtqueue};
use super::regs;
use super::{ActivateError, Activation, Backend, DeviceState, EventFds, SaveError, VirtioDevice};
use crate::mmio::MmioDevice;

/// Bytes of the register window.
pub const MMIO_LEN: u64 = 0x1000;

/// Vendor ID register: "CLAD".
const VENDOR: u32 = u32::from_le_bytes(*b"CLAD");
const VERSION: u32 = 2;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The saved state of a transport and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueState>,
    interrupt: InterruptState,
    /// Whether a reset by the driver waits for transfers. A copy has none: the driver's next look ends its reset.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    resetting: bool,
    /// The device's state.
    pub device: DeviceState,
}

impl TransportState {
    /// Whether a driver was using the device without having broken the rules.
    fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0 && !self.interrupt.needs_reset()
    }

    /// The queues, by number.
    #[must_use]
    pub fn queues(&self) -> &[QueueState] {
        &self.queues
    }
}

/// Why a saved device cannot be restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state has another number of queues than the device.
    #[error("{found} saved queues for a device with {queues}")]
    Queues {
        /// Queues in the state.
        found: usize,
        /// Queues of the device.
        queues: usize,
    },
    /// A queue of the state has another size than that of the device.
    #[error("saved queue {index} has {found} descriptors, and that of the device up to {max}")]
    QueueSize {
        /// Number of the queue.
        index: usize,
        /// Its saved size.
        found: u16,
        /// The most descriptors of the device's queue.
        max: u16,
    },
    /// The device cannot be activated.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

#[derive(Debug)]
struct TransportRegisters {
    /// The status register, without DEVICE_NEEDS_RESET, which is in [`Interrupt`].
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// The queues as set up by the driver. An active device has its own.
    queues: Vec<QueueState>,
    /// Number of pauses without a matching resume.
    holds: u32,
    /// Whether a reset is unfinished. The status register keeps its value until then.
    resetting: bool,
    device: Box<dyn VirtioDevice>,
}

impl TransportRegisters {
    /// Checks that saved queues are those of this device. A longer one would give its driver more than the device
    /// offers.
    fn expect_queues(&self, state: &TransportState) -> Result<(), RestoreError> {
        let (found, queues) = (state.queues.len(), self.queues.len());
        if found != queues {
            return Err(RestoreError::Queues { found, queues });
        }
        for (index, (saved, max)) in state.queues.iter().zip(self.device.queue_sizes()).enumerate() {
            if saved.max_size > *max || saved.size > *max {
                let (found, max) = (saved.size.max(saved.max_size), *max);
                return Err(RestoreError::QueueSize { index, found, max });
            }
        }
        Ok(())
    }

    fn load(&mut self, state: &TransportState) {
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.queues.clone_from(&state.queues);
        self.resetting = state.resetting;
    }
}

/// A virtio device at its registers.
#[derive(Debug)]
pub struct VirtioMmio {
    ram: GuestRam,
    event_fds: EventFds,
    interrupt: Arc<Interrupt>,
    inner: Mutex<TransportRegisters>,
}

impl VirtioMmio {
    /// A new device, for a VM with memory `ram`. With `held`, the VM is paused.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>, ram: &GuestRam, event_fds: EventFds, held: bool) -> Self {
        let queues = device.queue_sizes().iter().map(|size| QueueState::new(*size)).collect();
        let registers = TransportRegisters {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            holds: u32::from(held),
            resetting: false,
            device,
        };
        let interrupt = Arc::new(Interrupt::new(&event_fds.irq, InterruptState::default()));
        Self { ram: ram.clone(), event_fds, interrupt, inner: Mutex::new(registers) }
    }

    /// A device that was made from the same state, in a paused VM.
    ///
    /// # Errors
    /// When the state is not valid for this device.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        ram: &GuestRam,
        event_fds: EventFds,
        state: &TransportState,
    ) -> Result<Self, RestoreError> {
        let mut transport = Self::new(device, ram, event_fds, true);
        transport.interrupt = Arc::new(Interrupt::new(&transport.event_fds.irq, state.interrupt));
        let mut inner = transport.inner();
        inner.expect_queues(state)?;
        inner.load(state);
        if state.is_active() {
            transport.activate(&mut inner)?;
        }
        drop(inner);
        Ok(transport)
    }

    fn inner(&self) -> MutexGuard<'_, TransportRegisters> {
        // After a panic in a device the registers are still valid, and the driver can reset the
        // device.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops all changes of guest memory, except by transfers that the kernel is busy with. Calls
    /// are counted: each needs its [`VirtioMmio::resume`].
    pub fn quiesce(&self) {
        let mut inner = self.inner();
        inner.holds += 1;
        if inner.holds == 1 {
            inner.device.quiesce();
        }
    }

    /// Undoes one [`VirtioMmio::quiesce`].
    pub fn resume(&self) {
        let mut inner = self.inner();
        inner.holds = inner.holds.saturating_sub(1);
        if inner.holds == 0 {
            inner.device.resume();
        }
    }

    /// Raises the interrupt again if one is pending.
    pub fn reraise(&self) {
        self.interrupt.reraise();
    }

    /// The state of the transport and its device. Only while the device is quiesced.
    ///
    /// # Errors
    /// When the device has lost its worker.
    pub fn save(&self) -> Result<(TransportState, Backend), SaveError> {
        let mut inner = self.inner();
        debug_assert!(inner.holds > 0, "saved while its worker runs");
        let saved = inner.device.save()?;
        let mut queues = inner.queues.clone();
        for (queue, live) in queues.iter_mut().zip(saved.queues) {
            if let Some(live) = live {
                *queue = live;
            }
        }
        let state = TransportState {
            status: inner.status,
            device_features_sel: inner.device_features_sel,
            driver_features_sel: inner.driver_features_sel,
            driver_features: inner.driver_features,
            queue_sel: inner.queue_sel,
            queues,
            interrupt: self.interrupt.save(),
            resetting: inner.resetting,
            device: saved.state,
        };
        Ok((state, saved.backend))
    }

    /// See [`VirtioDevice::halt`].
    #[must_use]
    pub fn halt(&self, patience: Duration) -> bool {
        let mut inner = self.inner();
        debug_assert!(inner.holds > 0, "halted while its worker runs");
        inner.device.halt(patience)
    }

    /// Checks that [`VirtioMmio::rewind`] to `state` can fail only for lack of a thread. Changes
    /// nothing.
    ///
    /// # Errors
    /// When the state is not valid for this device.
    pub fn check(&self, state: &TransportState) -> Result<(), RestoreError> {
        let inner = self.inner();
        inner.expect_queues(state)?;
        if state.is_active() {
            self.activation(&inner, state)?;
        }
        Ok(())
    }

    /// Goes back to a saved state, in place. The device must be quiesced and halted, and the VM's
    /// memory must already be at that instant. Interrupts that were pending are not raised: see
    /// [`VirtioMmio::reraise`].
    ///
    /// # Errors
    /// As [`VirtioMmio::check`], or when there is no thread. The device must then be rewound again
    /// before it is resumed.
    pub fn rewind(&self, state: &TransportState, backend: &Backend) -> Result<(), RestoreError> {
        self.check(state)?;
        let mut inner = self.inner();
        let with = state.is_active().then(|| self.activation(&inner, state)).transpose()?;
        // Before the device, which notifies its driver as a child's device does.
        self.interrupt.rewind(state.interrupt);
        inner.load(state);
        Ok(inner.device.rewind(&state.device, backend, with)?)
    }

    /// Runs `with` on the device.
    pub fn with_device<T>(&self, with: impl FnOnce(&mut dyn VirtioDevice) -> T) -> T {
        with(self.inner().device.as_mut())
    }

    fn offered(inner: &TransportRegisters) -> u64 {
        // The queues handle indirect tables; devices do not see them.
        inner.device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn status(&self, inner: &TransportRegisters) -> u32 {
        inner.status | if self.interrupt.needs_reset() { NEEDS_RESET } else { 0 }
    }

    fn write_status(&self, inner: &mut TransportRegisters, value: u32) {
        if value == 0 {
            return self.reset(inner);
        }
        if value & FAILED != 0 {
            inner.status |= FAILED;
            return;
        }
        let value = value & !NEEDS_RESET;
        let added = value & !inner.status;
        if inner.resetting || inner.status & !value != 0 {
            tracing::debug!(status = inner.status, value, "a status bit is not taken back but by a reset");
            return;
        }
        // One step at a time, and only the next one.
        let allowed = match added {
            0 => return,
            ACKNOWLEDGE => inner.status == 0,
            DRIVER => inner.status == ACKNOWLEDGE,
            FEATURES_OK => inner.status == ACKNOWLEDGE | DRIVER && self.features_fit(inner),
            DRIVER_OK => inner.status == ACKNOWLEDGE | DRIVER | FEATURES_OK,
            _ => false,
        };
        if !allowed {
            tracing::debug!(status = inner.status, value, "a status that does not follow");
            return;
        }
        inner.status = value;
        if added == DRIVER_OK
            && let Err(error) = self.activate(inner)
        {
            tracing::warn!(%error, "a device cannot be activated");
            self.interrupt.fail();
        }
    }

    fn features_fit(&self, inner: &TransportRegisters) -> bool {
        let chosen = inner.driver_features;
        chosen & !Self::offered(inner) == 0 && chosen & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&self, inner: &mut TransportRegisters) -> Result<(), ActivateError> {
        let with = self.activation_of(inner, inner.driver_features, &inner.queues)?;
        inner.device.activate(with)
    }

    /// The resources with which the device continues from `state`.
    fn activation(&self, inner: &TransportRegisters, state: &TransportState) -> Result<Activation, ActivateError> {
        self.activation_of(inner, state.driver_features, &state.queues)
    }

    fn activation_of(
        &self,
        inner: &TransportRegisters,
        features: u64,
        states: &[QueueState],
    ) -> Result<Activation, ActivateError> {
        let mut queues = Vec::with_capacity(states.len());
        for ((index, state), event) in (0u16..).zip(states).zip(&self.event_fds.notify) {
            let queue = state.ready.then(|| Virtqueue::new(index, state, features, &self.ram, event)).transpose()?;
            queues.push(queue);
        }
        let (ram, interrupt) = (self.ram.clone(), Arc::clone(&self.interrupt));
        Ok(Activation { ram, queues, features, interrupt, held: inner.holds > 0 })
    }

    /// Resets the device. While transfers cannot be cancelled, the status stays, and the driver
    /// waits for it to become 0.
    fn reset(&self, inner: &mut TransportRegisters) {
        inner.resetting = !inner.device.deactivate();
        if inner.resetting {
            self.interrupt.fail();
            return;
        }
        inner.status = 0;
        inner.device_features_sel = 0;
        inner.driver_features_sel = 0;
        inner.driver_features = 0;
        inner.queue_sel = 0;
        inner.queues = inner.device.queue_sizes().iter().map(|size| QueueState::new(*size)).collect();
        // After the device's reset, which may have raised the interrupt once more.
        self.interrupt.clear();
    }

    fn read_register(&self, offset: u64) -> u32 {
        let mut inner = self.inner();
        match offset {
            regs::MAGIC_VALUE => regs::MAGIC,
            regs::VERSION => VERSION,
            regs::DEVICE_ID => inner.device.device_type(),
            regs::VENDOR_ID => VENDOR,
            regs::DEVICE_FEATURES => half(Self::offered(&inner), inner.device_features_sel),
            regs::QUEUE_NUM_MAX => selected(&inner).map_or(0, |queue| u32::from(queue.max_size)),
            regs::QUEUE_READY => selected(&inner).map_or(0, |queue| u32::from(queue.ready)),
            regs::INTERRUPT_STATUS => self.interrupt.pending(),
            regs::STATUS => {
                if inner.resetting {
                    self.reset(&mut inner);
                }
                self.status(&inner)
            }
            // The device has no shared memory.
            regs::SHM_LEN_LOW | regs::SHM_LEN_HIGH | regs::SHM_BASE_LOW | regs::SHM_BASE_HIGH => u32::MAX,
            regs::CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        // For hosts without ioeventfd. Takes no lock, since a worker may hold it for long.
        if offset == regs::QUEUE_NOTIFY {
            if let Some(event) = self.event_fds.notify.get(value as usize) {
                // A full counter is a pending notification.
                let _ = event.write(1);
            }
            return;
        }
        if offset == regs::INTERRUPT_ACK {
            return self.interrupt.acknowledge(value);
        }
        let mut inner = self.inner();
        let inner = &mut *inner;
        match offset {
            regs::DEVICE_FEATURES_SEL => inner.device_features_sel = value,
            regs::DRIVER_FEATURES_SEL => inner.driver_features_sel = value,
            regs::DRIVER_FEATURES if inner.status == ACKNOWLEDGE | DRIVER => {
                set_half(&mut inner.driver_features, inner.driver_features_sel, value);
            }
            regs::QUEUE_SEL => inner.queue_sel = value,
            regs::STATUS => self.write_status(inner, value),
            _ if inner.status == ACKNOWLEDGE | DRIVER | FEATURES_OK => write_queue(inner, offset, value),
            _ => tracing::debug!(offset, value, status = inner.status, "a register that may not be written now"),
        }
    }
}

fn selected(inner: &TransportRegisters) -> Option<&QueueState> {
    inner.queues.get(inner.queue_sel as usize)
}

/// Sets up a queue. Allowed only between FEATURES_OK and DRIVER_OK, and only while the queue is not
/// ready.
fn write_queue(inner: &mut TransportRegisters, offset: u64, value: u32) {
    let Some(queue) = inner.queues.get_mut(inner.queue_sel as usize) else { return };
    if offset == regs::QUEUE_READY {
        queue.ready = value == 1;
        return;
    }
    if queue.ready {
        return;
    }
    match offset {
        regs::QUEUE_NUM => {
            // An invalid size is ignored. The driver notices that the queue does not work, and
            // activation checks the rings.
            let size = u16::try_from(value).ok().filter(|size| size.is_power_of_two() && *size <= queue.max_size);
            queue.size = size.unwrap_or(queue.size);
        }
        regs::QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
        regs::QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
        regs::QUEUE_DRIVER_LOW => set_half(&mut queue.available, 0, value),
        regs::QUEUE_DRIVER_HIGH => set_half(&mut queue.available, 1, value),
        regs::QUEUE_DEVICE_LOW => set_half(&mut queue.used, 0, value),
        regs::QUEUE_DEVICE_HIGH => set_half(&mut queue.used, 1, value),
        _ => {}
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = (*value & !0xffff_ffff) | u64::from(half),
        1 => *value = (*value & 0xffff_ffff) | u64::from(half) << 32,
        _ => {}
    }
}

impl MmioDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(regs::CONFIG) {
            self.inner().device.read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(regs::CONFIG) {
            let mut inner = self.inner();
            // Not before the driver has set DRIVER.
            if inner.status & DRIVER != 0 {
                inner.device.write_config(offset, data);
            }
        } else if let (true, Ok(value)) = (offset.is_multiple_of(4), data.try_into()) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests;
