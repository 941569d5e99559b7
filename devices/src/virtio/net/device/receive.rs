//! Packets from the host to the guest: into posted buffers, while the interface is readable.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use clade_host_io::{Fragment, VNET_HEADER, total_len};
use clade_memory::Access;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{BATCH, DOWN_RETRY, MAX_PACKET, MAX_PAIRS, MIN_PACKET, Net, OWNER};
use crate::virtio::YieldRequest;
use crate::virtio::dma;
use crate::virtio::net::posted::{Posted, Room, write_at};
use crate::virtio::sync_device::{FatalError, QueueCtx};

impl Net {
    /// Pops posted chains until a packet of any size fits, or up to the maximum number of chains
    /// for a packet.
    fn gather(io: &mut QueueCtx, queue: usize, posted: &mut VecDeque<Posted>) -> Result<bool, FatalError> {
        let merges = io.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let mut room = Room::default();
        posted.iter().for_each(|chain| room.add(chain));
        while !room.is_enough(merges) {
            let Some(chain) = io.pop(queue)? else { break };
            // A pin unshares its pages, and a fork waits for that: never more than a packet needs.
            let needed = dma::prefix(&chain.writable, MAX_PACKET);
            match dma::pin(&io.ram, OWNER, &needed, Access::Write) {
                Ok(memory) => {
                    let chain = Posted { head: chain.head, memory };
                    room.add(&chain);
                    posted.push_back(chain);
                }
                Err(error) => {
                    io.undo_pop(queue);
                    return Err(error.into());
                }
            }
        }
        Ok(room.bytes >= MIN_PACKET)
    }

    pub(super) fn receive_some(
        &mut self,
        io: &mut QueueCtx,
        pair: usize,
        should_yield: &YieldRequest<'_>,
    ) -> Result<bool, FatalError> {
        let queue = 2 * pair;
        let mut posted = VecDeque::new();
        let more = self.receive_into(io, pair, &mut posted, should_yield);
        // Chains that were popped and not filled stay posted.
        for _ in posted {
            io.undo_pop(queue);
        }
        match more {
            Err(FatalError::Dma(error)) if error.is_transient() => {
                self.pin_later(&error);
                Ok(false)
            }
            more => more,
        }
    }

    fn receive_into(
        &mut self,
        io: &mut QueueCtx,
        pair: usize,
        posted: &mut VecDeque<Posted>,
        should_yield: &YieldRequest<'_>,
    ) -> Result<bool, FatalError> {
        let queue = 2 * pair;
        for _ in 0..BATCH {
            if !self.readable[pair] {
                return Ok(false);
            }
            if !Self::gather(io, queue, posted)? {
                // Continued when the driver has posted more buffers.
                return Ok(false);
            }
            if let Err(until) = self.receive.ready() {
                self.wait_until(until);
                return Ok(false);
            }
            let memory: Vec<Fragment> = posted.iter().flat_map(|chain| chain.memory.iter().cloned()).collect();
            match self.backend.receive(pair, &memory) {
                Ok(Some(len)) => self.hand_over(io, queue, posted, len)?,
                Ok(None) => {
                    self.readable[pair] = false;
                    self.arm(pair);
                }
                Err(error) => {
                    self.readable[pair] = false;
                    self.nothing_received(io, pair, &error);
                }
            }
            if should_yield.is_set() {
                break;
            }
        }
        Ok(true)
    }

    fn nothing_received(&mut self, io: &QueueCtx, pair: usize, error: &io::Error) {
        if self.backend.has_ended() {
            // The descriptor stays readable for ever, without data.
            tracing::warn!(%error, mac = %self.mac, "a network device's backend has ended");
            self.set_status(0);
            io.config_changed();
            return;
        }
        // Most likely the interface is down; continued when it has a packet.
        tracing::debug!(%error, interface = self.backend.name(), "nothing is received");
        self.wait_until(Instant::now() + DOWN_RETRY);
        self.arm(pair);
    }

    /// Gives a packet of `len` bytes to the driver, in as many chains as it is spread over.
    fn hand_over(
        &mut self,
        io: &mut QueueCtx,
        queue: usize,
        posted: &mut VecDeque<Posted>,
        len: usize,
    ) -> Result<(), FatalError> {
        let mut parts = Vec::new();
        let mut left = len;
        while left > 0 {
            let Some(chain) = posted.pop_front() else { break };
            let part = total_len(&chain.memory).min(left);
            left -= part;
            parts.push((chain, part));
        }
        if let Some((first, _)) = parts.first() {
            // The last two bytes of the header count the chains, at any place in the driver's
            // buffers.
            write_at(&first.memory, VNET_HEADER - 2, (parts.len() as u16).to_le_bytes());
        }
        let used: Vec<(u16, u32)> = parts.iter().map(|(chain, part)| (chain.head, *part as u32)).collect();
        io.add_all_used(queue, &used)?;
        let bytes = len.saturating_sub(VNET_HEADER) as u64;
        // A token was available before; a packet's size is known only now.
        let _ = self.receive.take(bytes);
        self.stats.received += 1;
        self.stats.received_bytes += bytes;
        Ok(())
    }

    pub(super) fn arm(&self, pair: usize) {
        let Some(fd) = self.backend.descriptor(pair) else { return };
        let event = EpollEvent::new(EventSet::IN | EventSet::ONE_SHOT, pair as u64);
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            tracing::warn!(%error, interface = self.backend.name(), "an interface cannot be waited for");
        }
    }

    pub(super) fn look(&mut self) {
        let mut events = [EpollEvent::default(); MAX_PAIRS as usize];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            if let Some(readable) = self.readable.get_mut(event.data() as usize) {
                *readable = true;
            }
        }
    }
}
