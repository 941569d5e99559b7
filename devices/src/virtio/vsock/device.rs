//! The socket device: routes packets between queues and connections.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Greeting, ROOM, Stage};
use super::packet::{HEADER, Header, Op, SHUT_RECEIVE, SHUT_SEND};
use super::state::VsockState;
use super::{FIRST_GUEST_CID, HOST_CID};
use crate::virtio::plain::{Config, Handler, Io, OWN, Trouble};
use crate::virtio::{ActivateError, Backend, Chain, DeviceState, Hurry, QueueError, Turn, Wake, dma};

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
/// Connections at a time; one more is refused.
const MOST: usize = 1024;
/// Packets that wait for the guest to post buffers; a guest that posts none while it asks for more is not answered.
const MOST_REPLIES: usize = 4096;
/// Bytes in a packet to the guest at most.
const MOST_DATA: usize = 16 << 10;
/// Packets in a turn, each way.
const BATCH: usize = 16;
/// Host ports of connections that the host began: above those that anybody listens at.
const FIRST_PORT: u32 = 1 << 30;
/// Marks the listener among events.
const LISTENER: u64 = u64::MAX;

/// A socket device that cannot be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Reserved.
    #[error("{cid} is no CID for a guest: they begin at {FIRST_GUEST_CID} and end before 2^32 - 1")]
    Cid {
        /// The number.
        cid: u64,
    },
    /// The socket.
    #[error("no socket at {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is chosen for a socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOptions {
    /// The guest's address.
    pub cid: u64,
    /// Where the host connects. Removed when the device goes.
    pub socket: PathBuf,
}

/// Ports of both ends, the host's first.
type Key = (u32, u32);

/// See the module's documentation.
#[derive(Debug)]
pub struct Vsock {
    queue_sizes: [u16; 3],
    config: Config,
    cid: u64,
    socket: PathBuf,
    listener: UnixListener,
    epoll: Epoll,
    connections: BTreeMap<Key, Connection>,
    /// Of sockets, by descriptor.
    keys: HashMap<RawFd, Key>,
    /// Hosts that have connected and not said where to.
    greeting: HashMap<RawFd, Connection>,
    next_port: u32,
    /// Packets without data for the guest.
    replies: VecDeque<Header>,
    /// Connections with something to read, in turn.
    ready: VecDeque<Key>,
    /// The guest is to be told that its connections are gone.
    reset: bool,
}

impl Vsock {
    /// A device that listens at `options.socket`. With `reset`, its driver has connections that are gone.
    ///
    /// # Errors
    /// When the address is reserved, or the socket cannot be made: a stale one is not removed.
    pub fn new(options: &VsockOptions, reset: bool) -> Result<Self, VsockError> {
        if !(FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&options.cid) {
            return Err(VsockError::Cid { cid: options.cid });
        }
        let failed = |source| VsockError::Socket { path: options.socket.clone(), source };
        let listener = UnixListener::bind(&options.socket).map_err(failed)?;
        let watched = (|| {
            listener.set_nonblocking(true)?;
            let epoll = Epoll::new()?;
            epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), EpollEvent::new(EventSet::IN, LISTENER))?;
            Ok(epoll)
        })();
        let epoll = watched.map_err(failed)?;
        Ok(Self {
            queue_sizes: [128, 128, 16],
            config: Config::new(options.cid.to_le_bytes().to_vec()),
            cid: options.cid,
            socket: options.socket.clone(),
            listener,
            epoll,
            connections: BTreeMap::new(),
            keys: HashMap::new(),
            greeting: HashMap::new(),
            next_port: FIRST_PORT,
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            reset,
        })
    }

    /// Where the host connects.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Waits for `socket` to become readable, and writable if something is to be written, once.
    fn arm(&self, socket: &UnixStream, how: ControlOperation, write: bool) -> io::Result<()> {
        let mut events = EventSet::IN | EventSet::ONE_SHOT;
        if write {
            events |= EventSet::OUT;
        }
        let fd = socket.as_raw_fd();
        self.epoll.ctl(how, fd, EpollEvent::new(events, fd as u64))
    }

    fn header(&self, key: Key, op: Op) -> Header {
        let (buffer, forwarded) = (ROOM, self.connections.get(&key).map_or(0, |connection| connection.forwarded));
        let (from_port, to_port) = key;
        let (from_cid, to_cid) = (HOST_CID, self.cid);
        Header { from_cid, to_cid, from_port, to_port, len: 0, op, flags: 0, buffer, forwarded, stream: true }
    }

    fn reply(&mut self, header: Header) {
        if self.replies.len() < MOST_REPLIES {
            self.replies.push_back(header);
        }
    }

    /// Lets go of a connection, and tells the guest if it knows of it.
    fn close(&mut self, key: Key, tell: bool) {
        if tell {
            let header = self.header(key, Op::Reset);
            self.reply(header);
        }
        if let Some(connection) = self.connections.remove(&key) {
            self.keys.remove(&connection.socket().as_raw_fd());
            // Closing the socket takes it out of epoll as well.
        }
    }

    fn accept(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            if self.connections.len() + self.greeting.len() >= MOST {
                // The host reads the end.
                continue;
            }
            let fd = socket.as_raw_fd();
            let armed = self.arm(&socket, ControlOperation::Add, false);
            if let (Ok(()), Ok(connection)) = (armed, Connection::new(socket, Stage::Greeting)) {
                self.greeting.insert(fd, connection);
            }
        }
    }

    fn greet(&mut self, fd: RawFd) {
        let Some(mut connection) = self.greeting.remove(&fd) else { return };
        match connection.greeting() {
            Greeting::Partial => {
                if self.arm(connection.socket(), ControlOperation::Modify, false).is_ok() {
                    self.greeting.insert(fd, connection);
                }
            }
            Greeting::Port(port) => {
                let host_port = self.free_port(port);
                let key = (host_port, port);
                connection.stage = Stage::Asked;
                self.connections.insert(key, connection);
                self.keys.insert(fd, key);
                let header = self.header(key, Op::Request);
                self.reply(header);
            }
            // The host reads the end.
            Greeting::Bad => {}
        }
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port >= u32::MAX - 1 { FIRST_PORT } else { port + 1 };
            if !self.connections.contains_key(&(port, guest)) {
                return port;
            }
        }
    }

    /// Looks at what has happened to the sockets.
    fn look(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                self.accept();
                continue;
            }
            let fd = event.data() as RawFd;
            if let Some(key) = self.keys.get(&fd).copied() {
                self.woken(key);
            } else {
                self.greet(fd);
            }
        }
        Ok(())
    }

    /// A socket can be read or written, or is at its end.
    fn woken(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if !connection.readable {
            connection.readable = true;
            self.ready.push_back(key);
        }
        self.flush(key);
    }

    /// Gives a socket what it takes, and waits for it if something is left.
    fn flush(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match connection.flush() {
            Ok(false) => {}
            // Readable or not: it is looked at again when it can be written.
            Ok(true) => {
                let Some(connection) = self.connections.get(&key) else { return };
                if self.arm(connection.socket(), ControlOperation::Modify, true).is_err() {
                    return self.close(key, true);
                }
            }
            Err(_) => return self.close(key, true),
        }
        if self.connections.get(&key).is_some_and(Connection::owes_credit) {
            let header = self.header(key, Op::CreditUpdate);
            self.reply(header);
            self.connections.get_mut(&key).into_iter().for_each(Connection::told);
        }
    }

    /// A packet of the guest's.
    fn transmit(&mut self, io: &Io, chain: &Chain) -> Result<(), Trouble> {
        let mut bytes = [0; HEADER];
        let rest = dma::copy_in(&io.ram, &chain.readable, &mut bytes)?;
        let Some(header) = Header::parse(&bytes) else { return Ok(()) };
        if u64::from(header.len) > dma::len_of(&rest) {
            let (head, what) = (chain.head, "is shorter than its packet says");
            return Err(QueueError::Content { head, what }.into());
        }
        let key = (header.to_port, header.from_port);
        if header.from_cid != self.cid || header.to_cid != HOST_CID || !header.stream {
            if header.op != Op::Reset {
                let reset = Header { from_cid: header.to_cid, ..self.header(key, Op::Reset) };
                self.reply(reset);
            }
            return Ok(());
        }
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.credit(header.buffer, header.forwarded);
            // Room where there was none.
            if connection.readable && !self.ready.contains(&key) {
                self.ready.push_back(key);
            }
        }
        match (header.op, self.connections.get_mut(&key).map(|connection| connection.stage)) {
            (Op::Request, None) => self.connect(key, &header),
            (Op::Response, Some(Stage::Asked)) => {
                self.connections.get_mut(&key).into_iter().for_each(|connection| connection.accepted(key.0));
                self.flush(key);
                self.listen_to(key);
            }
            (Op::Data, Some(Stage::Open)) => {
                let mut data = vec![0; header.len as usize];
                dma::copy_in(&io.ram, &rest, &mut data)?;
                if self.connections.get_mut(&key).is_some_and(|connection| connection.take(&data)) {
                    self.flush(key);
                } else {
                    self.close(key, true);
                }
            }
            (Op::Shutdown, Some(_)) => {
                let both = self.connections.get_mut(&key).is_some_and(|connection| connection.shut_down(header.flags));
                self.flush(key);
                if both {
                    self.close(key, true);
                }
            }
            (Op::CreditRequest, Some(_)) => {
                let update = self.header(key, Op::CreditUpdate);
                self.reply(update);
                self.connections.get_mut(&key).into_iter().for_each(Connection::told);
            }
            (Op::CreditUpdate, Some(_)) | (Op::Reset, None) => {}
            (Op::Reset, Some(_)) => self.close(key, false),
            // Of no connection, or not in this order.
            _ => self.close(key, true),
        }
        Ok(())
    }

    /// The guest connects: to whoever listens at the socket's path with the port behind it.
    fn connect(&mut self, key: Key, header: &Header) {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{}", key.0));
        let room = self.connections.len() < MOST;
        let connected = if room { UnixStream::connect(path) } else { Err(io::ErrorKind::QuotaExceeded.into()) };
        let opened = connected.and_then(|socket| {
            self.arm(&socket, ControlOperation::Add, false)?;
            Connection::new(socket, Stage::Open)
        });
        match opened {
            Ok(mut connection) => {
                connection.credit(header.buffer, header.forwarded);
                self.keys.insert(connection.socket().as_raw_fd(), key);
                self.connections.insert(key, connection);
                let response = self.header(key, Op::Response);
                self.reply(response);
            }
            Err(error) => {
                tracing::debug!(%error, port = key.0, "nobody listens for the guest");
                self.close(key, true);
            }
        }
    }

    /// Waits for something to read.
    fn listen_to(&mut self, key: Key) {
        let armed = self.connections.get(&key).map(|c| self.arm(c.socket(), ControlOperation::Modify, false));
        if let Some(Err(_)) = armed {
            self.close(key, true);
        }
    }

    /// Fills the guest's buffers: replies first, then data of one connection after another. Returns whether there may be more to send.
    fn receive(&mut self, io: &mut Io, hurry: &Hurry<'_>) -> Result<bool, Trouble> {
        for _ in 0..BATCH {
            if self.replies.is_empty() && self.ready.is_empty() {
                return Ok(false);
            }
            let Some(chain) = io.pop(RX)? else { return Ok(false) };
            let written = match self.replies.pop_front() {
                Some(header) => Self::put(io, &chain, &header, &[])?,
                None => self.send(io, &chain)?,
            };
            match written {
                Some(written) => io.give_back(RX, chain.head, written)?,
                None => io.put_back(RX),
            }
            if hurry.up() {
                break;
            }
        }
        Ok(!self.replies.is_empty() || !self.ready.is_empty())
    }

    fn put(io: &Io, chain: &Chain, header: &Header, data: &[u8]) -> Result<Option<u32>, Trouble> {
        let room = dma::len_of(&chain.writable);
        if room < (HEADER + data.len()) as u64 {
            let (head, what) = (chain.head, "has no room for a packet");
            return Err(QueueError::Content { head, what }.into());
        }
        let bytes = [header.bytes().as_slice(), data].concat();
        Ok(Some(dma::copy_out(&io.ram, &chain.writable, &bytes)? as u32))
    }

    /// Data of the next connection that has some. None when there was none after all.
    fn send(&mut self, io: &Io, chain: &Chain) -> Result<Option<u32>, Trouble> {
        let Some(key) = self.ready.pop_front() else { return Ok(None) };
        let Some(connection) = self.connections.get_mut(&key) else { return Ok(None) };
        let may = connection.may_send() as usize;
        if connection.stage != Stage::Open || may == 0 {
            // Looked at again when the guest has room.
            return Ok(None);
        }
        let room = (dma::len_of(&chain.writable) as usize).saturating_sub(HEADER);
        let mut data = vec![0; room.min(may).min(MOST_DATA)];
        match connection.read(&mut data) {
            Ok(Some(0)) => {
                connection.readable = false;
                let header = Header { flags: SHUT_RECEIVE | SHUT_SEND, ..self.header(key, Op::Shutdown) };
                Self::put(io, chain, &header, &[])
            }
            Ok(Some(len)) => {
                self.ready.push_back(key);
                let header = Header { len: len as u32, ..self.header(key, Op::Data) };
                self.connections.get_mut(&key).into_iter().for_each(Connection::told);
                Self::put(io, chain, &header, &data[..len])
            }
            Ok(None) => {
                self.listen_to(key);
                Ok(None)
            }
            Err(_) => {
                self.close(key, true);
                Ok(None)
            }
        }
    }

    /// Tells the guest that its connections are gone.
    fn tell_reset(&mut self, io: &mut Io) -> Result<(), Trouble> {
        /// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
        const TRANSPORT_RESET: u32 = 0;
        if self.reset
            && let Some(chain) = io.pop(EVENTS)?
        {
            let written = dma::copy_out(&io.ram, &chain.writable, &TRANSPORT_RESET.to_le_bytes())?;
            io.give_back(EVENTS, chain.head, written as u32)?;
            self.reset = false;
        }
        Ok(())
    }
}

impl Handler for Vsock {
    const NAME: &'static str = "clade-vsock";
    const TYPE: u32 = VIRTIO_ID_VSOCK;

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
        vec![(self.epoll.as_raw_fd(), OWN)]
    }

    fn end(&mut self) {
        self.connections.clear();
        self.keys.clear();
        self.greeting.clear();
        self.replies.clear();
        self.ready.clear();
        self.reset = false;
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Vsock(_) = state else { return Err(ActivateError::Kind { found: state.kind() }) };
        // As a child is told: of the connections it knows, none is there.
        self.reset = true;
        Ok(())
    }

    fn turn(&mut self, io: &mut Io, _wake: Wake, hurry: &Hurry<'_>) -> Result<Turn, Trouble> {
        if let Err(error) = self.look() {
            tracing::warn!(%error, "the sockets of a guest cannot be looked at");
        }
        self.tell_reset(io)?;
        let mut more = false;
        for n in 0..BATCH {
            let Some(chain) = io.pop(TX)? else { break };
            self.transmit(io, &chain)?;
            io.give_back(TX, chain.head, 0)?;
            more = n + 1 == BATCH;
            if hurry.up() {
                more = true;
                break;
            }
        }
        more |= self.receive(io, hurry)?;
        Ok(if more { Turn::Again } else { Turn::Done })
    }

    fn save(&self) -> (DeviceState, Backend) {
        (DeviceState::Vsock(VsockState { cid: self.cid }), Backend::None)
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::debug!(%error, socket = %self.socket.display(), "a socket stays behind");
        }
    }
}
