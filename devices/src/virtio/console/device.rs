//! The console device.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::state::ConsoleState;
use crate::console::Console;
use crate::virtio::plain::{Config, DeviceOps, FatalError, OWN, QueueCtx};
use crate::virtio::{ActivateError, Backend, DeviceState, Turn, Wake, YieldRequest, dma};

const RX: usize = 0;
const TX: usize = 1;
/// Typed bytes kept for a driver that does not read.
const MAX_TYPED: usize = 64 << 10;
/// Bytes taken from one chain of output at most: the rest of it is given back unread, which a driver sees as a console that loses output.
const MAX_OUT: usize = 64 << 10;
/// Chains in a turn.
const BATCH: usize = 16;

/// The host's end for typing. Clones type at the same console.
#[derive(Clone, Debug)]
pub struct Typist(Arc<(Mutex<VecDeque<u8>>, EventFd)>);

impl Typist {
    fn typed(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Types; returns how many bytes there was room for.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut typed = self.typed();
        let room = MAX_TYPED.saturating_sub(typed.len()).min(bytes.len());
        typed.extend(&bytes[..room]);
        drop(typed);
        // Full is as good as rung.
        let _ = self.0.1.write(1);
        room
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct ConsoleDevice {
    queue_sizes: [u16; 2],
    config: Config,
    output: Console,
    typist: Typist,
}

impl ConsoleDevice {
    /// A device that writes to `output`.
    ///
    /// # Errors
    /// When there is no eventfd to be had.
    pub fn new(output: Console) -> io::Result<Self> {
        let typist = Typist(Arc::new((Mutex::default(), EventFd::new(EFD_NONBLOCK)?)));
        // Columns, rows, ports and the emergency register: none is offered.
        Ok(Self { queue_sizes: [64, 64], config: Config::new(vec![0; 12]), output, typist })
    }

    /// The host's end for typing.
    #[must_use]
    pub fn typist(&self) -> Typist {
        self.typist.clone()
    }

    /// Gives the driver what was typed, as far as it has posted buffers.
    fn receive(&self, io: &mut QueueCtx) -> Result<(), FatalError> {
        loop {
            let mut typed = self.typist.typed();
            if typed.is_empty() {
                return Ok(());
            }
            let Some(chain) = io.pop(RX)? else { return Ok(()) };
            let len = (dma::len_of(&chain.writable) as usize).min(typed.len());
            let bytes: Vec<u8> = typed.drain(..len).collect();
            drop(typed);
            let written = dma::copy_out(&io.ram, &chain.writable, &bytes)?;
            io.add_used(RX, chain.head, written as u32)?;
        }
    }
}

impl DeviceOps for ConsoleDevice {
    const NAME: &'static str = "clade-hvc";
    const TYPE: u32 = VIRTIO_ID_CONSOLE;

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.typist.0.1.as_raw_fd(), OWN)]
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Console(ConsoleState {}) = state else {
            return Err(ActivateError::Kind { found: state.kind() });
        };
        // Typed for the guest as it was.
        self.typist.typed().clear();
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, hurry: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        if wake == Wake::Source(OWN) {
            // Before looking at what was typed.
            let _ = self.typist.0.1.read();
        }
        self.receive(io)?;
        for _ in 0..BATCH {
            let Some(chain) = io.pop(TX)? else { return Ok(Turn::Done) };
            let mut bytes = vec![0; (dma::len_of(&chain.readable) as usize).min(MAX_OUT)];
            dma::copy_in(&io.ram, &chain.readable, &mut bytes)?;
            // A console of this process takes everything.
            let _ = self.output.write_all(&bytes);
            io.add_used(TX, chain.head, 0)?;
            if hurry.is_set() {
                break;
            }
        }
        Ok(Turn::Again)
    }

    fn save(&self) -> (DeviceState, Backend) {
        (DeviceState::Console(ConsoleState {}), Backend::None)
    }
}
