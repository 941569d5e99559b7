//! The network device.

mod link;
mod outward;
mod receive;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_host_io::{AlignedBuf, NetBackend, Offload, VNET_HEADER};
use clade_memory::Access;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::{self, ControlCommand};
use super::egress::{Egress, Filter};
use super::mac::Mac;
use super::state::{Link, NetState};
use crate::virtio::dma::DmaError;
use crate::virtio::limiter::{Limiter, Limits};
use crate::virtio::sync_device::{ConfigSpace, DeviceOps, FatalError, OWN, QueueCtx};
use crate::virtio::{ActivateError, Backend, DeviceState, Turn, Wake, YieldRequest, dma};

/// The most pairs of queues.
pub const MAX_PAIRS: u16 = 8;
/// Largest size of a queue for packets, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Bytes of the largest packet with its header: 64 KiB and an Ethernet header.
pub(super) const MAX_PACKET: usize = VNET_HEADER + 14 + 65_536;
/// Bytes of the smallest packet with its header: an Ethernet header.
const MIN_PACKET: usize = VNET_HEADER + 14;
/// Features that need a backend with offloads.
const OFFLOADS: [u32; 6] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
];
/// Packets in a turn, for each direction of each pair of queues.
const BATCH: usize = 32;
/// Delay before a packet that the interface did not accept is sent again.
const RETRY: Duration = Duration::from_millis(1);
/// Delay before an interface that gives no packets, because it is down, is tried again.
const DOWN_RETRY: Duration = Duration::from_millis(100);
/// Delay before memory that could not be pinned is tried again, and minimum time between two log
/// messages about it.
const PIN_RETRY: Duration = Duration::from_millis(10);
const PIN_WARN: Duration = Duration::from_secs(60);
const OWNER: &str = "virtio-net";

/// The configuration of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Whether packets pass. None: as in the saved state; without one, open.
    pub link: Option<Link>,
    /// The addresses that the guest may send to. None: as in the saved state; without one, all.
    pub egress: Option<Egress>,
    /// Limits of receiving.
    pub receive: Limits,
    /// Limits of sending.
    pub send: Limits,
}

/// Counters of a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Packets received.
    pub received: u64,
    /// Bytes in packets received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent: u64,
    /// Bytes in packets sent.
    pub sent_bytes: u64,
    /// Packets that the interface or the driver refused.
    pub dropped: u64,
    /// Packets from the interface that were dropped because the device is closed.
    pub blocked_received: u64,
    /// Packets from the driver that were dropped because the device is closed.
    pub blocked_sent: u64,
    /// Packets from the driver that were dropped by egress rules.
    pub egress_dropped: u64,
    /// Number of retries because memory could not be pinned.
    pub pin_retries: u64,
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    config: ConfigSpace,
    mac: Mac,
    link: Link,
    backend: NetBackend,
    epoll: Epoll,
    pairs: u16,
    /// Pairs whose interface may have a packet.
    readable: Vec<bool>,
    receive: Limiter,
    send: Limiter,
    /// When to try again, after a limit or a full interface.
    until: Option<Instant>,
    /// The time at which the link went down, if it is down.
    down_since: Option<Instant>,
    /// Whether the link must go down first.
    renew: bool,
    /// Time of the last log message that memory cannot be pinned.
    warned: Option<Instant>,
    /// Packets received at the last call of [`DeviceOps::has_input`].
    asked_at: Option<u64>,
    stats: NetStats,
    filter: Filter,
    /// Number of layers of the policy that came from a parent.
    inherited: usize,
    /// The copy of the packet to be judged. None without rules.
    copy: Option<Arc<AlignedBuf>>,
}

impl Net {
    /// A device on `backend`, in the saved `state` if there is one. With `renew`, its link goes
    /// down and up, so that the guest renews its network configuration.
    ///
    /// # Errors
    /// When epoll cannot watch the interface.
    pub fn new(
        backend: impl Into<NetBackend>,
        options: &NetOptions,
        state: Option<&NetState>,
        renew: bool,
    ) -> io::Result<Self> {
        let backend = backend.into();
        let most = backend.queues() as u16;
        let link = options.link.or(state.map(|state| state.link)).unwrap_or_default();
        let egress = options.egress.clone().or_else(|| state.map(|state| state.egress.clone())).unwrap_or_default();
        let mut config = vec![0; 10];
        config[..6].copy_from_slice(&options.mac.0);
        config[6..8].copy_from_slice(&link::initial_status(link).to_le_bytes());
        config[8..10].copy_from_slice(&most.to_le_bytes());
        let epoll = Epoll::new()?;
        for pair in 0..backend.queues() {
            let fd = backend.descriptor(pair).ok_or(io::ErrorKind::NotFound)?;
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::ONE_SHOT, pair as u64))?;
        }
        let pairs = state.map_or(1, |state| state.pairs).clamp(1, most.clamp(1, MAX_PAIRS));
        Ok(Self {
            config: ConfigSpace::new(config),
            mac: options.mac,
            link,
            epoll,
            pairs,
            readable: vec![true; backend.queues()],
            backend,
            receive: Limiter::new(&options.receive),
            send: Limiter::new(&options.send),
            until: None,
            down_since: None,
            renew,
            warned: None,
            asked_at: None,
            stats: NetStats::default(),
            inherited: state.map_or(0, |state| state.egress.layers().len().min(egress.layers().len())),
            copy: outward::copy_for(&egress),
            filter: Filter::new(egress),
        })
    }

    /// The interface's name; empty without an interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        self.backend.name()
    }

    /// The counters so far.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        self.stats
    }

    fn use_pairs(&mut self, pairs: u16) -> bool {
        if pairs == 0 || usize::from(pairs) > self.backend.queues() {
            return false;
        }
        match self.backend.use_queues(usize::from(pairs)) {
            Ok(()) => {
                self.pairs = pairs;
                true
            }
            Err(error) => {
                tracing::warn!(%error, interface = self.backend.name(), pairs, "queues of an interface");
                false
            }
        }
    }

    /// The number of the control queue: after all pairs if the driver supports more than one,
    /// otherwise after the first.
    fn control(&self, io: &QueueCtx) -> usize {
        if io.features & (1 << VIRTIO_NET_F_MQ) != 0 { 2 * self.backend.queues() } else { 2 }
    }

    /// Obeys a few commands of the driver. Returns whether there may be more.
    fn obey_some(&mut self, io: &mut QueueCtx) -> Result<bool, FatalError> {
        let queue = self.control(io);
        for _ in 0..BATCH {
            let Some(chain) = io.pop(queue)? else { return Ok(false) };
            let done = match control::parse(io, &chain)? {
                ControlCommand::Pairs(pairs) => self.use_pairs(pairs),
                ControlCommand::Announced => {
                    self.announced();
                    true
                }
                ControlCommand::Address(address) => {
                    self.config.write(0, &address);
                    true
                }
                ControlCommand::Filter => true,
                ControlCommand::Unknown => false,
            };
            let written = dma::copy_out(&io.ram, &chain.writable, &[u8::from(!done)])?;
            io.add_used(queue, chain.head, written as u32)?;
        }
        Ok(true)
    }

    fn send_some(
        &mut self,
        io: &mut QueueCtx,
        pair: usize,
        should_yield: &YieldRequest<'_>,
    ) -> Result<bool, FatalError> {
        let queue = 2 * pair + 1;
        for _ in 0..BATCH {
            let Some(chain) = io.pop(queue)? else { return Ok(false) };
            let len = dma::len_of(&chain.readable) as usize;
            if !(MIN_PACKET..=MAX_PACKET).contains(&len) {
                self.stats.dropped += 1;
                io.add_used(queue, chain.head, 0)?;
                continue;
            }
            // Before the limiter, which does not take tokens back.
            let pinned = match dma::pin(&io.ram, OWNER, &chain.readable, Access::Read) {
                Err(error) if error.is_transient() => {
                    io.undo_pop(queue);
                    self.pin_later(&error);
                    return Ok(false);
                }
                pinned => pinned?,
            };
            let (memory, judgement) = self.judged(pinned, len);
            if !judgement.passes {
                self.filter.count(&judgement);
                self.stats.egress_dropped += 1;
                io.add_used(queue, chain.head, 0)?;
                continue;
            }
            if let Err(until) = self.send.ready() {
                io.undo_pop(queue);
                self.wait_until(until);
                return Ok(false);
            }
            match self.backend.send(pair, &memory) {
                Ok(Some(_)) => {
                    self.stats.sent += 1;
                    self.stats.sent_bytes += (len - VNET_HEADER) as u64;
                }
                Ok(None) => {
                    io.undo_pop(queue);
                    self.wait_until(Instant::now() + RETRY);
                    return Ok(false);
                }
                // The interface is down, or the packet is invalid: the packet is lost, as on a
                // wire.
                Err(_) => self.stats.dropped += 1,
            }
            // Of a packet that is not sent yet, nothing is taken. A token was available before.
            let _ = self.send.take((len - VNET_HEADER) as u64);
            self.filter.count(&judgement);
            io.add_used(queue, chain.head, 0)?;
            if should_yield.is_set() {
                break;
            }
        }
        Ok(true)
    }

    fn wait_until(&mut self, until: Instant) {
        self.until = Some(self.until.map_or(until, |earlier| earlier.min(until)));
    }

    /// Notes that there is no memory for a pin now. The chains stay in the queue, and are tried
    /// again soon.
    fn pin_later(&mut self, error: &DmaError) {
        self.stats.pin_retries += 1;
        let now = Instant::now();
        if self.warned.is_none_or(|warned| now - warned >= PIN_WARN) {
            self.warned = Some(now);
            tracing::warn!(%error, interface = self.backend.name(), "packets wait for memory");
        }
        self.wait_until(now + PIN_RETRY);
    }
}

impl DeviceOps for Net {
    const NAME: &'static str = "clade-net";
    const TYPE: u32 = VIRTIO_ID_NET;

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        if self.backend.has_offloads() {
            bits.extend(OFFLOADS);
        }
        if self.backend.queues() > 1 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.backend.queues()];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.epoll.as_raw_fd(), OWN)]
    }

    fn begin(&mut self, io: &mut QueueCtx) {
        let has = |bit: u32| io.features & (1 << bit) != 0;
        let offload = Offload {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        };
        if let Err(error) = self.backend.set_offload(offload) {
            tracing::warn!(%error, interface = self.backend.name(), "an interface's offloads");
        }
        let pairs = self.pairs;
        self.use_pairs(pairs);
        self.readable.fill(true);
    }

    fn end(&mut self) {
        self.use_pairs(1);
        self.set_status(link::initial_status(self.link));
        (self.until, self.down_since, self.renew) = (None, None, false);
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Net(state) = state else { return Err(ActivateError::Kind { found: state.kind() }) };
        self.pairs = state.pairs.clamp(1, (self.backend.queues() as u16).clamp(1, MAX_PAIRS));
        // The driver may have set another address meanwhile.
        self.config.write(0, &self.mac.0);
        // As for a child: its guest may have another address.
        self.renew = true;
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, _wake: Wake, should_yield: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        self.until = None;
        self.look();
        self.renew(io);
        let mut more = self.obey_some(io)?;
        for pair in 0..usize::from(self.pairs) {
            if self.link == Link::Closed {
                more |= self.refuse_some(io, pair, should_yield)?;
                more |= self.readable[pair] && self.discard(pair, BATCH);
                continue;
            }
            more |= self.send_some(io, pair, should_yield)?;
            more |= self.receive_some(io, pair, should_yield)?;
        }
        // The rest of a partly accepted packet, even of a device that was closed since.
        if !self.backend.flush().unwrap_or(true) {
            self.wait_until(Instant::now() + RETRY);
        }
        Ok(if more { Turn::Again } else { Turn::Done })
    }

    fn deadline(&self) -> Option<Instant> {
        [self.until, self.link_deadline()].into_iter().flatten().min()
    }

    fn has_input(&mut self) -> bool {
        // Sources are one-shot: a queue that the device believes readable is not watched.
        let waits = |pair: usize| self.readable.get(pair) == Some(&true) && self.backend.has_packet(pair);
        let has_input = self.link != Link::Closed && (0..usize::from(self.pairs)).any(waits);
        let has_progress = self.asked_at.replace(self.stats.received) != Some(self.stats.received);
        has_input && has_progress
    }

    fn save(&self) -> (DeviceState, Backend) {
        (
            DeviceState::Net(NetState { pairs: self.pairs, link: self.link, egress: self.egress().clone() }),
            Backend::None,
        )
    }
}
