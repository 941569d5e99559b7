//! Virtio 1.2 devices over MMIO, whose DMA survives a fork.
//!
//! # How a device is made
//!
//! 1. A *device* implements [`VirtioDevice`]: its features, its configuration space, its activation
//!    by a driver ([`Activation`]), its reset, and how it is paused and saved. A device has a
//!    folder here, laid out as [`block`]: `device.rs` (that trait), `request.rs` (requests,
//!    parsed), `service.rs` (the work), `state.rs` (saved state).
//! 2. Its work is a `Service` on a `DeviceThread`, a thread that sleeps until a queue's eventfd or
//!    one of the device's own is readable. A turn pops chains from a [`Virtqueue`], and adds them
//!    to the used ring.
//! 3. Memory that is given to the kernel is pinned by `dma::pin`, and the operation owns the pins.
//!    Memory that the processor copies needs no pin.
//! 4. [`VirtioMmio`] is the transport in front of it: registers, status, interrupt, and the state
//!    of both.
//!
//! # A fork
//!
//! vCPUs are parked first, because they activate and reset devices. Then [`VirtioMmio::quiesce`]
//! lets each worker finish its turn. From then on no chain is popped and none is added to a used
//! ring. Transfers that the kernel is busy with continue, into pinned pages.
//!
//! The state that [`VirtioDevice::save`] returns is a [`SavedDevice`]: a plain [`DeviceState`], and
//! a [`Backend`], the part that cannot be serialized (files, sockets). A new device adds a variant
//! to both.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod device_thread;
mod dma;
mod interrupt;
pub mod limiter;
pub mod net;
mod queue;
mod queue_set;
pub mod regs;
pub mod rng;
pub mod sync_device;
mod transport;
pub mod vsock;

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use clade_memory::GuestRam;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::irq::Irq;

pub use chain::{Chain, Segment};
pub(crate) use device_thread::{DeviceThread, Service};
pub use device_thread::{Turn, Wake, YieldRequest};
pub use dma::DmaError;
pub use interrupt::{Interrupt, InterruptState};
pub use queue::{QueueError, QueueState, Virtqueue};
pub use transport::{MMIO_LEN, RestoreError, TransportState, VirtioMmio};

/// Resources that a device gets when its driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// Every queue of the device; the ones not in use by the driver are absent.
    pub queues: Vec<Option<Virtqueue>>,
    /// The negotiated features, by bit.
    pub features: u64,
    /// The interrupt for used chains.
    pub interrupt: Arc<Interrupt>,
    /// Whether the VM is paused: the device waits for [`VirtioDevice::resume`].
    pub held: bool,
}

/// Why a device cannot be activated. It then asks its driver for a reset.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The driver has not set up a queue that the device needs.
    #[error("queue {index} is not set up")]
    NoQueue {
        /// The queue's number.
        index: u16,
    },
    /// A queue's state is not valid.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The worker's thread or its events cannot be made.
    #[error("no thread or no events for the device")]
    Worker(#[source] io::Error),
    /// The state is of another kind of device.
    #[error("the state of another kind of device: {found}")]
    Kind {
        /// The kind of device that the state is of.
        found: &'static str,
    },
    /// The device is active already, or has lost its worker.
    #[error("the device is not ready to be activated")]
    NotReady,
}

/// Saved state of any device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DeviceState {
    /// Block device.
    Block(block::BlockState),
    /// Entropy device.
    Rng(rng::RngState),
    /// Console.
    Console(console::ConsoleState),
    /// Memory balloon.
    Balloon(balloon::BalloonState),
    /// Socket device.
    Vsock(vsock::VsockState),
    /// Network device.
    Net(net::NetState),
}

impl DeviceState {
    /// The kind of device, as used in messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Block(_) => "block",
            Self::Rng(_) => "entropy",
            Self::Console(_) => "console",
            Self::Balloon(_) => "balloon",
            Self::Vsock(_) => "socket",
            Self::Net(_) => "network",
        }
    }

    /// Number of requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Block(state) => state.in_flight.len(),
            // These devices finish a request in the turn in which it begins.
            Self::Rng(_) | Self::Console(_) | Self::Balloon(_) | Self::Vsock(_) | Self::Net(_) => 0,
        }
    }
}

/// The part of a saved device that cannot be serialized.
#[derive(Clone, Debug)]
pub enum Backend {
    /// A disk at the same instant.
    Disk(clade_block::DiskImage),
    /// The device has no such part.
    None,
}

/// A device at one instant.
#[derive(Debug)]
pub struct SavedDevice {
    /// The part that can be serialized.
    pub state: DeviceState,
    /// The part that cannot be serialized.
    pub backend: Backend,
    /// The queues of an active device; see [`Virtqueue::save`]. Absent as in
    /// [`Activation::queues`].
    pub queues: Vec<Option<QueueState>>,
}

/// Why a device cannot be saved: its worker could not be ended, or could not be started.
#[derive(Debug, Error)]
#[error("{what} has lost its worker, and cannot be saved")]
pub struct SaveError {
    /// The device's name.
    pub what: &'static str,
}

/// A virtio device behind a transport; see the module's documentation.
///
/// The transport calls one method at a time.
pub trait VirtioDevice: Send + fmt::Debug {
    /// The device type, as the specification numbers them.
    fn device_type(&self) -> u32;

    /// The features offered, without VIRTIO_F_VERSION_1 and VIRTIO_F_INDIRECT_DESC, which the
    /// transport adds.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space, which continues in zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices have no writable fields.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Begins to work for a driver. A device that was made from a saved state first repeats the
    /// chains that were in flight then.
    ///
    /// # Errors
    /// When it cannot work. The device is then unchanged.
    fn activate(&mut self, with: Activation) -> Result<(), ActivateError>;

    /// Stops working for the driver. Returns whether the device has stopped accessing guest memory;
    /// if not, the transport calls this again.
    #[must_use]
    fn deactivate(&mut self) -> bool;

    /// Stops all changes of guest memory, except by transfers that the kernel is busy with.
    /// Bounded: does not wait for I/O.
    fn quiesce(&mut self);

    /// Undoes [`VirtioDevice::quiesce`].
    fn resume(&mut self);

    /// Cancels the kernel's transfers in guest memory, or waits for them, up to `patience`. Only
    /// called while the device is quiesced. Returns whether all have ended. No chain is added to a
    /// used ring: a device that is then resumed repeats all of them, as after a fork.
    #[must_use]
    fn halt(&mut self, _patience: Duration) -> bool {
        // Most devices never have a transfer in flight.
        true
    }

    /// Goes back to a saved state, in place, after [`VirtioDevice::halt`]. `with` is given if a
    /// driver used the device then. Resources of this VM alone stay (its sockets, its interface),
    /// and the guest is notified as a child's guest is.
    ///
    /// # Errors
    /// When the state is of another kind of device, or the device cannot work. The device is then
    /// in no consistent state, and must be rewound again.
    fn rewind(&mut self, state: &DeviceState, backend: &Backend, with: Option<Activation>)
    -> Result<(), ActivateError>;

    /// The device's state. Only called while the device is quiesced.
    ///
    /// # Errors
    /// When it has lost its worker.
    fn save(&mut self) -> Result<SavedDevice, SaveError>;

    /// The device itself, for callers that know its type.
    fn as_any(&mut self) -> &mut dyn Any;
}

/// The eventfds between a device and its VM. Made before the device, so that a VM can be prepared
/// before its devices are known.
#[derive(Clone, Debug)]
pub struct EventFds {
    /// The interrupt line.
    pub irq: Arc<Irq>,
    /// For each queue, the eventfd signalled by notifications.
    pub notify: Vec<Arc<EventFd>>,
}

impl EventFds {
    /// Eventfds for a device with `queues` queues, not connected yet.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(queues: usize) -> io::Result<Self> {
        let notify = (0..queues).map(|_| clade_host_io::eventfd().map(Arc::new)).collect::<io::Result<_>>()?;
        Ok(Self { irq: Arc::new(Irq::new()?), notify })
    }
}
