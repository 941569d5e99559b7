//! The interrupt of a virtio device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vm_superio::Trigger;

use crate::irq::Irq;

/// Bit of InterruptStatus: the device has used buffers.
const USED: u32 = 1;
/// Bit of InterruptStatus: the device's configuration or status has changed.
const CONFIG: u32 = 2;

/// The interrupt of a device, shared by the transport, whose registers the guest reads, and by the
/// device's worker, which raises it.
///
/// `pending` is set before the line is raised, and cleared by the guest's acknowledgement. All
/// accesses are SeqCst, because the line reaches the guest by another path than memory.
#[derive(Debug)]
pub struct Interrupt {
    irq: Arc<Irq>,
    pending: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

/// The saved state of an interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InterruptState {
    pending: u32,
    generation: u32,
    needs_reset: bool,
}

impl InterruptState {
    pub(crate) fn needs_reset(self) -> bool {
        self.needs_reset
    }
}

impl Interrupt {
    pub(crate) fn new(irq: &Arc<Irq>, state: InterruptState) -> Self {
        Self {
            irq: Arc::clone(irq),
            pending: AtomicU32::new(state.pending),
            generation: AtomicU32::new(state.generation),
            needs_reset: AtomicBool::new(state.needs_reset),
        }
    }

    pub(crate) fn save(&self) -> InterruptState {
        InterruptState { pending: self.pending(), generation: self.generation(), needs_reset: self.needs_reset() }
    }

    /// Goes back to a saved state. The line is not raised: see [`Interrupt::reraise`].
    pub(crate) fn rewind(&self, state: InterruptState) {
        self.generation.store(state.generation, Ordering::SeqCst);
        self.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        self.pending.store(state.pending, Ordering::SeqCst);
    }

    /// Interrupts the driver because there are used buffers.
    pub fn used(&self) {
        self.raise(USED);
    }

    /// Interrupts the driver because the configuration space has changed. Call it after the change.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG);
    }

    /// Marks the device as in need of a reset, and interrupts the driver.
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::SeqCst);
        self.trigger();
    }

    fn trigger(&self) {
        // A full counter is a pending interrupt.
        if let Err(error) = self.irq.trigger() {
            tracing::debug!(%error, "a device's interrupt");
        }
    }

    /// Raises the line again if an interrupt is pending. A spurious interrupt is harmless; a lost
    /// one hangs the driver.
    pub(crate) fn reraise(&self) {
        if self.pending() != 0 {
            self.trigger();
        }
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(crate) fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Clears the interrupt at a reset. The generation continues: a change of it only means that
    /// the configuration has changed.
    pub(crate) fn clear(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.pending.store(0, Ordering::SeqCst);
    }
}
