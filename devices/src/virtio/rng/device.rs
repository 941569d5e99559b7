//! The entropy device.

use std::time::Instant;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::state::RngState;
use crate::virtio::limiter::{Limiter, Limits};
use crate::virtio::sync_device::{ConfigSpace, DeviceOps, FatalError, QueueCtx};
use crate::virtio::{ActivateError, Backend, Chain, DeviceState, Turn, Wake, YieldRequest, dma};

/// Maximum bytes for one request. A driver that asks for more gets fewer, as the specification
/// allows.
const MAX_BYTES: usize = 4096;
/// Requests in a turn.
const BATCH: usize = 16;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    config: ConfigSpace,
    limiter: Limiter,
    /// The time at which the limiter lets the next request pass, which stays in its queue until
    /// then.
    until: Option<Instant>,
}

impl Rng {
    /// A device limited by `limits`.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let (config, limiter) = (ConfigSpace::new(Vec::new()), Limiter::new(limits));
        Self { config, limiter, until: None }
    }

    fn fill(io: &QueueCtx, chain: &Chain, bytes: &mut [u8]) -> Result<u32, FatalError> {
        let mut done = 0;
        while done < bytes.len() {
            match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
                Ok(got) => done += got,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    // Fewer bytes, but all of them random.
                    tracing::warn!(%error, "no random bytes");
                    break;
                }
            }
        }
        Ok(dma::copy_out(&io.ram, &chain.writable, &bytes[..done])? as u32)
    }
}

impl DeviceOps for Rng {
    const NAME: &'static str = "clade-rng";
    const TYPE: u32 = VIRTIO_ID_RNG;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Rng(RngState {}) = state else { return Err(ActivateError::Kind { found: state.kind() }) };
        self.until = None;
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, _wake: Wake, should_yield: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        self.until = None;
        let mut bytes = [0; MAX_BYTES];
        for _ in 0..BATCH {
            let Some(chain) = io.pop(0)? else { return Ok(Turn::Done) };
            let len = (dma::len_of(&chain.writable) as usize).min(MAX_BYTES);
            if let Err(until) = self.limiter.take(len as u64) {
                io.undo_pop(0);
                self.until = Some(until);
                return Ok(Turn::Done);
            }
            let written = Self::fill(io, &chain, &mut bytes[..len])?;
            io.add_used(0, chain.head, written)?;
            if should_yield.is_set() {
                break;
            }
        }
        Ok(Turn::Again)
    }

    fn deadline(&self) -> Option<Instant> {
        self.until
    }

    fn save(&self) -> (DeviceState, Backend) {
        (DeviceState::Rng(RngState {}), Backend::None)
    }
}
