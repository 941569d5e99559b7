//! Virtio 1.2 devices over MMIO, whose DMA survives a fork.
//!
//! # How a device is made
//!
//! 1. A *device* implements [`VirtioDevice`]: what it is, its configuration space, and what is done when a driver takes it ([`Activation`]),
//!    lets go of it, and when the VM stands still and is saved. It is a folder here, of the shape of [`block`]: `device.rs` (that trait),
//!    `request.rs` (what the driver asks, parsed), `service.rs` (the work), `state.rs` (what is saved).
//! 2. Its work is a [`Service`] on a [`Worker`], which sleeps until a queue's eventfd or one of its own is readable. A turn pops chains from a
//!    [`Virtqueue`], and gives them back.
//! 3. Memory that is given to the kernel is pinned by [`dma::pin`]; the operation owns the pins. Memory that is copied by the processor needs none.
//! 4. [`VirtioMmio`] is the transport around it: registers, status, interrupt, and the state of both.
//!
//! # A fork
//!
//! vCPUs are parked first, because they activate and reset devices; then [`VirtioMmio::quiesce`] lets each worker finish its turn. From then on
//! nothing is popped and nothing is given back. What the kernel is busy with goes on, into pinned pages. [`VirtioMmio::save`]
//! is called with the worker standing still, and has the queues and the chains that were popped and not given back. A chain given back before is
//! in the used ring in memory, and not in that list; one given back after is in the list, and not in the used ring as it is frozen.
//! So whoever restores the state does every chain of the list, and no other, exactly once.
//!
//! [`VirtioDevice::save`] returns a [`Saved`]: a plain [`DeviceState`], and a [`Backend`], which is what cannot be written down (files, sockets).
//! A new device adds a variant to both.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
pub mod dma;
mod interrupt;
pub mod limiter;
pub mod net;
pub mod plain;
mod queue;
pub mod regs;
pub mod rng;
mod transport;
pub mod vsock;
mod worker;

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use clade_memory::GuestRam;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::irq::Irq;

pub use chain::{Chain, Segment};
pub use interrupt::{Interrupt, InterruptState};
pub use queue::{QueueError, QueueState, Virtqueue};
pub use transport::{MMIO_LEN, RestoreError, TransportState, VirtioMmio};
pub use worker::{Service, Turn, Wake, Worker, YieldRequest};

/// What a driver's DRIVER_OK gives to a device.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// Every queue of the device; the ones that the driver does not use are absent.
    pub queues: Vec<Option<Virtqueue>>,
    /// What was negotiated.
    pub features: u64,
    /// How the driver is told.
    pub interrupt: Arc<Interrupt>,
    /// Whether the VM stands still: nothing is done before [`VirtioDevice::resume`].
    pub held: bool,
}

/// A device that cannot be activated. The driver is told to reset it.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// A queue that the device cannot do without.
    #[error("queue {index} is not set up")]
    NoQueue {
        /// Which.
        index: u16,
    },
    /// See [`QueueError`].
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// No worker.
    #[error("no thread or no events for the device")]
    Worker(#[source] io::Error),
    /// The state is not one of such a device.
    #[error("the state of another kind of device: {found}")]
    Kind {
        /// Which kind.
        found: &'static str,
    },
    /// It is active, or has lost what it works on.
    #[error("the device is not ready to be activated")]
    NotReady,
}

/// Saved state of a device of any kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DeviceState {
    /// Block.
    Block(block::BlockState),
    /// Entropy.
    Rng(rng::RngState),
    /// Console.
    Console(console::ConsoleState),
    /// Balloon.
    Balloon(balloon::BalloonState),
    /// Sockets.
    Vsock(vsock::VsockState),
    /// Network.
    Net(net::NetState),
}

impl DeviceState {
    /// What kind of device it is of.
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

    /// Requests that were in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Block(state) => state.in_flight.len(),
            // Their requests end in the turn they begin in.
            Self::Rng(_) | Self::Console(_) | Self::Balloon(_) | Self::Vsock(_) | Self::Net(_) => 0,
        }
    }
}

/// What belongs to a saved device and cannot be written down.
#[derive(Clone, Debug)]
pub enum Backend {
    /// A disk at the same instant.
    Disk(crate::disk::DiskImage),
    /// Nothing.
    None,
}

/// A device at one instant.
#[derive(Debug)]
pub struct Saved {
    /// What can be written down.
    pub state: DeviceState,
    /// What cannot.
    pub backend: Backend,
    /// The queues as the device has them, if it is active; see [`Virtqueue::save`]. Absent as in [`Activation::queues`].
    pub queues: Vec<Option<QueueState>>,
}

/// A device that cannot be saved.
#[derive(Debug, Error)]
#[error("{what} has lost its worker, and cannot be saved")]
pub struct SaveError {
    /// Which device.
    pub what: &'static str,
}

/// A virtio device behind a transport. See the module's documentation.
///
/// The transport calls these one at a time.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Its device type, as the specification numbers them.
    fn device_type(&self) -> u32;

    /// The features it offers, without VIRTIO_F_VERSION_1 and VIRTIO_F_INDIRECT_DESC, which the transport adds.
    fn features(&self) -> u64;

    /// Its queues' largest sizes, each a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration space. Beyond its end there are zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready. If the device was made from a saved state, the chains in flight then are done first.
    ///
    /// # Errors
    /// When it cannot work; it is as before.
    fn activate(&mut self, with: Activation) -> Result<(), ActivateError>;

    /// The driver lets go. Returns whether no byte of guest memory is touched from now on; if not, it is called again.
    #[must_use]
    fn deactivate(&mut self) -> bool;

    /// Lets nothing more happen in guest memory but transfers the kernel is busy with. Bounded: it waits for no I/O.
    fn quiesce(&mut self);

    /// Lets it go on.
    fn resume(&mut self);

    /// Has the kernel give up what it is busy with in guest memory, or waits for it, up to `patience`. Only called while it is quiesced. Returns
    /// whether that is over. Nothing is given back: if the device is then resumed it does all of it again, as after a fork.
    #[must_use]
    fn halt(&mut self, _patience: Duration) -> bool {
        // Of most devices nothing is ever in flight.
        true
    }

    /// Goes back to a saved state, in place, after [`VirtioDevice::halt`]: `with` is there if a driver had it then. What is this VM's alone stays
    /// what it is, and the guest is told as a child's is.
    ///
    /// # Errors
    /// When the state is another kind of device's, or the device cannot work. It is no device of any instant then.
    fn rewind(&mut self, state: &DeviceState, backend: &Backend, with: Option<Activation>)
    -> Result<(), ActivateError>;

    /// Its state. Only called while it is quiesced.
    ///
    /// # Errors
    /// When it has lost what it works on.
    fn save(&mut self) -> Result<Saved, SaveError>;

    /// The device itself, for whoever knows which one it is.
    fn as_any(&mut self) -> &mut dyn Any;
}

/// How a device is wired to its VM: made before the device, so that a VM can have its wires before it is known what for.
#[derive(Clone, Debug)]
pub struct Wiring {
    /// The interrupt line.
    pub irq: Arc<Irq>,
    /// Where notifications of each queue arrive.
    pub notify: Vec<Arc<EventFd>>,
}

impl Wiring {
    /// Wires for a device with `queues` queues, connected to nothing yet.
    ///
    /// # Errors
    /// When there are no eventfds to be had.
    pub fn new(queues: usize) -> io::Result<Self> {
        let notify = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect::<io::Result<_>>()?;
        Ok(Self { irq: Arc::new(Irq::new()?), notify })
    }
}
