//! The socket device: routes packets between queues and connections.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::FIRST_GUEST_CID;
use super::connection::{ConnectionState, VsockConnection};
use super::host::PendingConnect;
use super::notices::Notices;
use super::packet::PacketHeader;
use super::socket::VsockSocket;
use super::state::VsockState;
use crate::virtio::sync_device::{ConfigSpace, DeviceOps, FatalError, OWN, QueueCtx};
use crate::virtio::{ActivateError, Backend, DeviceState, Turn, Wake, YieldRequest, dma};

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
const EVENTS: usize = 2;
/// Maximum wait for a driver to handle a transport reset.
const RESET_PATIENCE: Duration = Duration::from_secs(2);
/// Maximum number of packets that wait for the guest to post buffers. At the limit, no packet of
/// the guest is processed.
const MAX_REPLIES: usize = 4096;
/// Packets in a turn, in each direction.
pub(super) const BATCH: usize = 16;
/// First host port of connections begun by the host, above the ports at which hosts listen.
pub(super) const FIRST_PORT: u32 = 1 << 30;
/// The listener's number among epoll events.
pub(super) const LISTENER: u64 = u64::MAX;

/// Why a socket device cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VsockError {
    /// The CID is reserved.
    #[error("invalid guest CID {cid}: guest CIDs begin at {FIRST_GUEST_CID} and end before 2^32 - 1")]
    Cid {
        /// The CID.
        cid: u64,
    },
    /// The socket cannot be made.
    #[error("no socket at {}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// Why it cannot be made.
        #[source]
        source: io::Error,
    },
}

/// The configuration of a socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VsockOptions {
    /// The guest's CID.
    pub cid: u64,
    /// The Unix socket to which programs on the host connect. Removed with the device.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub socket: PathBuf,
}

/// The ports of a connection: the host's, then the guest's.
pub(super) type Key = (u32, u32);

/// Counters of a socket device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VsockStats {
    /// Number of failures to accept a host's connection for lack of descriptors or memory.
    pub accept_failures: u64,
    /// Number of retries of a guest's connection because a host's backlog was full.
    pub connect_retries: u64,
}

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    config: ConfigSpace,
    pub(super) cid: u64,
    pub(super) socket: VsockSocket,
    pub(super) epoll: Epoll,
    pub(super) connections: BTreeMap<Key, VsockConnection>,
    /// The key of a connection, by its socket's descriptor.
    pub(super) keys: HashMap<RawFd, Key>,
    /// Hosts that have connected, and have not sent a port yet.
    pub(super) greeting: HashMap<RawFd, VsockConnection>,
    /// Connections of the guest to hosts whose backlog is full.
    pub(super) pending: BTreeMap<Key, PendingConnect>,
    /// Connections that the guest has closed, with bytes that the host has not read yet.
    pub(super) draining: HashMap<RawFd, VsockConnection>,
    /// Time at which pending connections are tried again.
    pub(super) retry_at: Option<Instant>,
    /// Time at which the listener is watched again, after a failure to accept.
    pub(super) accept_at: Option<Instant>,
    /// Time of the last log message that connections cannot be accepted.
    pub(super) warned: Option<Instant>,
    pub(super) next_port: u32,
    /// Packets without data that wait for the guest's buffers.
    pub(super) replies: VecDeque<PacketHeader>,
    /// Connections with input, in turn.
    pub(super) ready: VecDeque<Key>,
    transport: Transport,
    /// Packets delivered to the guest.
    pub(super) delivered: u64,
    /// `delivered` at the last call of [`DeviceOps::has_input`].
    asked_at: Option<u64>,
    pub(super) stats: VsockStats,
    pub(super) notices: Notices,
}

/// First port of a clone. Differs from its parent's: its guest may be closing a connection of the
/// parent, and would close the clone's connection of the same ports with it.
fn first_port_of_clone(cid: u64) -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // From the time and not from a hasher's keys, which are equal in all processes forked by a
    // zygote.
    let mixed = (now.as_nanos() as u64 ^ cid).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    FIRST_PORT + (mixed >> 34) as u32
}

/// The driver's knowledge of a clone's connections.
#[derive(Clone, Copy, Debug)]
enum Transport {
    /// The driver's connections exist.
    Known,
    /// The driver's connections are gone, and a transport reset is due.
    Reset,
    /// The driver has received a transport reset, when `others` other event buffers were offered.
    /// One more means that the driver has closed its connections. The device waits until `until`,
    /// and begins anew if that time has passed in a pause, in which the driver does not run.
    Told { others: u16, until: Instant },
}

impl Vsock {
    /// A device with `socket` as the host's end. `reset`: the driver knows connections that are
    /// gone.
    ///
    /// # Errors
    /// When epoll cannot watch the socket.
    pub fn new(socket: VsockSocket, reset: bool) -> io::Result<Self> {
        socket.listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let socket_cid = socket.options.cid;
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        epoll.ctl(ControlOperation::Add, socket.listener.as_raw_fd(), event)?;
        Ok(Self {
            config: ConfigSpace::new(socket.options.cid.to_le_bytes().to_vec()),
            cid: socket.options.cid,
            socket,
            epoll,
            connections: BTreeMap::new(),
            keys: HashMap::new(),
            greeting: HashMap::new(),
            pending: BTreeMap::new(),
            draining: HashMap::new(),
            retry_at: None,
            accept_at: None,
            warned: None,
            next_port: if reset { first_port_of_clone(socket_cid) } else { FIRST_PORT },
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            transport: if reset { Transport::Reset } else { Transport::Known },
            delivered: 0,
            asked_at: None,
            stats: VsockStats::default(),
            notices: Notices::default(),
        })
    }

    /// The path of the Unix socket to which hosts connect.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket.options.socket
    }

    /// Number of connections, including those being made and those being ended.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len() + self.greeting.len() + self.pending.len() + self.draining.len()
    }

    /// The counters so far.
    #[must_use]
    pub fn stats(&self) -> VsockStats {
        self.stats
    }

    /// The guest's notices.
    #[must_use]
    pub fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Sends the guest a transport reset, because its connections are gone. Returns whether packets
    /// may be sent to the guest.
    ///
    /// At a transport reset Linux closes *all* its connections, including new ones, and may read a
    /// packet before the event that came first. So a connection that a host makes to a child at
    /// once would be closed. The driver offers its buffer again when it has closed them; until then
    /// no packets are sent to it.
    fn tell_reset(&mut self, io: &mut QueueCtx, wake: Wake) -> Result<bool, FatalError> {
        /// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
        const TRANSPORT_RESET: u32 = 0;
        match self.transport {
            Transport::Known => {}
            Transport::Reset => {
                // A driver without a buffer gets the event when it offers one.
                let Some(chain) = io.pop(EVENTS)? else { return Ok(true) };
                // Counted before the driver has the event; otherwise a buffer offered in response
                // could be among them. This also has the driver notify the device of the next one.
                let others = io.offered(EVENTS)?;
                let written = dma::copy_out(&io.ram, &chain.writable, &TRANSPORT_RESET.to_le_bytes())?;
                io.add_used(EVENTS, chain.head, written as u32)?;
                self.transport = Transport::Told { others, until: Instant::now() + RESET_PATIENCE };
            }
            Transport::Told { others, until } => {
                let now = Instant::now();
                if io.offered(EVENTS)? > others {
                    self.transport = Transport::Known;
                } else if now >= until && matches!(wake, Wake::Start) {
                    // The time may have passed in a pause.
                    self.transport = Transport::Told { others, until: now + RESET_PATIENCE };
                } else if now >= until {
                    tracing::debug!("a guest's driver does not say that it has closed its connections");
                    self.transport = Transport::Known;
                }
            }
        }
        Ok(matches!(self.transport, Transport::Known))
    }
}

impl DeviceOps for Vsock {
    const NAME: &'static str = "clade-vsock";
    const TYPE: u32 = VIRTIO_ID_VSOCK;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 16]
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.epoll.as_raw_fd(), OWN)]
    }

    fn end(&mut self) {
        self.connections.clear();
        self.keys.clear();
        self.greeting.clear();
        for (key, _) in std::mem::take(&mut self.pending) {
            self.socket.forget(key);
        }
        self.replies.clear();
        self.ready.clear();
        self.retry_at = None;
        self.transport = Transport::Known;
        // Connections closed by the guest stay until the host has read the guest's data.
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Vsock(_) = state else { return Err(ActivateError::Kind { found: state.kind() }) };
        // As for a child: all connections known to the driver are gone.
        self.transport = Transport::Reset;
        self.notices.clear();
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, should_yield: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        if let Err(error) = self.look() {
            tracing::warn!(%error, "the sockets of a guest cannot be looked at");
        }
        self.retry(Instant::now(), should_yield);
        let is_known = self.tell_reset(io, wake)?;
        let mut more = false;
        for n in 0..BATCH {
            if self.replies.len() >= MAX_REPLIES {
                // Continued when the guest has posted buffers.
                break;
            }
            let Some(chain) = io.pop(TX)? else { break };
            self.transmit(io, &chain)?;
            io.add_used(TX, chain.head, 0)?;
            more = n + 1 == BATCH;
            if should_yield.is_set() {
                more = true;
                break;
            }
        }
        if is_known {
            more |= self.receive(io, should_yield)?;
        }
        Ok(if more { Turn::Again } else { Turn::Done })
    }

    fn deadline(&self) -> Option<Instant> {
        let told = if let Transport::Told { until, .. } = self.transport { Some(until) } else { None };
        [self.retry_at, self.accept_at, told].into_iter().flatten().min()
    }

    fn has_input(&mut self) -> bool {
        let waits = |connection: &VsockConnection| connection.readable || connection.stage == ConnectionState::Asked;
        // After a failure to accept, the listener is not watched for some time.
        let has_input = !self.replies.is_empty() || self.accept_at.is_some() || self.connections.values().any(waits);
        let has_progress = self.asked_at.replace(self.delivered) != Some(self.delivered);
        has_input && has_progress
    }

    fn save(&self) -> (DeviceState, Backend) {
        (DeviceState::Vsock(VsockState { cid: self.cid }), Backend::None)
    }
}
