//! The console device.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use super::state::ConsoleState;
use crate::console::Console;
use crate::virtio::sync_device::{ConfigSpace, DeviceOps, FatalError, OWN, QueueCtx};
use crate::virtio::{ActivateError, Backend, DeviceState, Turn, Wake, YieldRequest, dma};

const RX: usize = 0;
const TX: usize = 1;
/// Maximum bytes of input kept for a driver that does not read.
const MAX_TYPED: usize = 64 << 10;
/// Maximum bytes taken from one chain of output. The rest of the chain is dropped, as on a console
/// that loses output.
const MAX_OUT: usize = 64 << 10;
/// Chains in a turn.
const BATCH: usize = 16;

/// The input side of a console, on the host. Clones write to the same console.
#[derive(Clone, Debug)]
pub struct Typist(Arc<(Mutex<VecDeque<u8>>, EventFd)>);

impl Typist {
    fn typed(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds input. Returns the number of bytes that fitted.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut typed = self.typed();
        let room = MAX_TYPED.saturating_sub(typed.len()).min(bytes.len());
        typed.extend(&bytes[..room]);
        drop(typed);
        // A full counter wakes the device as well.
        let _ = self.0.1.write(1);
        room
    }
}

/// A console device.
#[derive(Debug)]
pub struct ConsoleDevice {
    config: ConfigSpace,
    output: Console,
    typist: Typist,
}

impl ConsoleDevice {
    /// A device that writes to `output`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(output: Console) -> io::Result<Self> {
        let typist = Typist(Arc::new((Mutex::default(), clade_host_io::eventfd()?)));
        // Columns, rows, ports and emergency write are not offered.
        Ok(Self { config: ConfigSpace::new(vec![0; 12]), output, typist })
    }

    /// The input side of the console.
    #[must_use]
    pub fn typist(&self) -> Typist {
        self.typist.clone()
    }

    /// Gives input to the driver, as far as it has posted buffers. Returns whether there may be more.
    fn receive(&self, io: &mut QueueCtx) -> Result<bool, FatalError> {
        for _ in 0..BATCH {
            let mut typed = self.typist.typed();
            if typed.is_empty() {
                return Ok(false);
            }
            let Some(chain) = io.pop(RX)? else { return Ok(false) };
            let len = (dma::len_of(&chain.writable) as usize).min(typed.len());
            let bytes: Vec<u8> = typed.drain(..len).collect();
            drop(typed);
            let written = dma::copy_out(&io.ram, &chain.writable, &bytes)?;
            io.add_used(RX, chain.head, written as u32)?;
        }
        Ok(true)
    }
}

impl DeviceOps for ConsoleDevice {
    const NAME: &'static str = "clade-hvc";
    const TYPE: u32 = VIRTIO_ID_CONSOLE;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64; 2]
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.typist.0.1.as_raw_fd(), OWN)]
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Console(ConsoleState {}) = state else {
            return Err(ActivateError::Kind { found: state.kind() });
        };
        // The input was meant for the guest before the rewind.
        self.typist.typed().clear();
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, should_yield: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        if wake == Wake::Source(OWN) {
            // Before the input is read.
            let _ = self.typist.0.1.read();
        }
        let more = self.receive(io)?;
        for _ in 0..BATCH {
            let Some(chain) = io.pop(TX)? else { return Ok(if more { Turn::Again } else { Turn::Done }) };
            let mut bytes = vec![0; (dma::len_of(&chain.readable) as usize).min(MAX_OUT)];
            dma::copy_in(&io.ram, &chain.readable, &mut bytes)?;
            // A console in this process never refuses output.
            let _ = self.output.write_all(&bytes);
            io.add_used(TX, chain.head, 0)?;
            if should_yield.is_set() {
                break;
            }
        }
        Ok(Turn::Again)
    }

    fn save(&self) -> (DeviceState, Backend) {
        (DeviceState::Console(ConsoleState {}), Backend::None)
    }
}
