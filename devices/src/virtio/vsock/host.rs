//! The host's side of the socket device: Unix sockets and their events.
//!
//! No call here blocks. Pausing or forking the VM waits for the end of a turn, which a slow, full
//! or dead host must not delay.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::connection::{ConnectionState, Greeting, VsockConnection};
use super::device::{FIRST_PORT, Key, LISTENER, Vsock};
use super::packet::{PacketHeader, PacketOp, SHUT_RECEIVE, SHUT_SEND};
use super::socket::Attempt;
use crate::virtio::YieldRequest;

/// Maximum number of connections in all stages. Further ones are refused.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Connections accepted in a turn.
const MAX_ACCEPTS: usize = 64;
/// Delay before a host whose backlog is full is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// Number of retries before the guest's connection is refused: two seconds in all.
const MAX_RETRIES: u32 = 200;
/// Maximum number of requests to a guest that accepts a connection with an address which is not its
/// own.
const MAX_ASKED: u32 = 100;
/// Connections tried again in a turn.
const MAX_RETRIED: usize = 64;
/// Delay before the listener is watched again, after there was no descriptor for a connection.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);
/// Minimum time between two log messages about that.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// A connection of the guest to a host whose backlog is full, or whose broker has not answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingConnect {
    retries: u32,
    /// The guest's buffer size.
    pub(super) room: u32,
    pub(super) forwarded: u32,
}

impl Vsock {
    /// Watches `socket` for one event: readable or writable, as given, or hung up.
    fn arm(&self, socket: &UnixStream, how: ControlOperation, read: bool, write: bool) -> io::Result<()> {
        let mut events = EventSet::ONE_SHOT;
        events.set(EventSet::IN, read);
        events.set(EventSet::OUT, write);
        let fd = socket.as_raw_fd();
        self.epoll.ctl(how, fd, EpollEvent::new(events, fd as u64))
    }

    /// As `arm`, for a socket that is watched already.
    fn rearm(&self, connection: &VsockConnection, write: bool) -> io::Result<()> {
        self.arm(connection.socket(), ControlOperation::Modify, connection.wants_input(), write)
    }

    /// Removes a connection. With `tell`, also resets it for the guest.
    pub(super) fn close(&mut self, key: Key, tell: bool) {
        if tell {
            let header = self.header(key, PacketOp::Reset);
            self.reply(header);
        }
        if self.pending.remove(&key).is_some() {
            self.socket.forget(key);
        }
        if let Some(connection) = self.remove(key) {
            self.keys.remove(&connection.socket().as_raw_fd());
            // Closing the socket removes it from epoll as well.
            connection.close();
            self.accept_soon();
        }
    }

    /// Removes a connection, also from those with input. A guest without buffers would make that queue grow for ever.
    fn remove(&mut self, key: Key) -> Option<VsockConnection> {
        let connection = self.connections.remove(&key)?;
        self.ready.retain(|queued| *queued != key);
        Some(connection)
    }

    /// The guest has closed a connection. Data sent before that still goes to the host.
    pub(super) fn finish(&mut self, key: Key, tell: bool) {
        if let Some(mut connection) = self.remove(key) {
            let fd = connection.socket().as_raw_fd();
            self.keys.remove(&fd);
            connection.shut_down(SHUT_RECEIVE | SHUT_SEND);
            self.drain(fd, connection);
        }
        self.close(key, tell);
    }

    /// Writes the data left of a connection that the guest has closed, as far as the host accepts
    /// it.
    fn drain(&mut self, fd: RawFd, mut connection: VsockConnection) {
        // Further data from the host is dropped without waiting for it.
        connection.ended = true;
        if connection.flush() && self.rearm(&connection, true).is_ok() {
            self.draining.insert(fd, connection);
            return;
        }
        connection.close();
        self.accept_soon();
    }

    /// Notes that a descriptor has become free.
    fn accept_soon(&mut self) {
        self.accept_at = self.accept_at.map(|_| Instant::now());
    }

    fn watch_listener(&self, events: EventSet) {
        let event = EpollEvent::new(events, LISTENER);
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, self.socket.listener.as_raw_fd(), event) {
            tracing::warn!(%error, socket = %self.socket().display(), "a socket cannot be waited for");
        }
    }

    fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTS {
            let socket = match self.socket.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The client has disconnected already, or a signal arrived.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR)) => continue,
                Err(error) => return self.accept_later(&error),
            };
            if self.connections() >= MAX_CONNECTIONS {
                // The host reads the end of the stream.
                continue;
            }
            let fd = socket.as_raw_fd();
            let armed = self.arm(&socket, ControlOperation::Add, true, false);
            if let (Ok(()), Ok(connection)) = (armed, VsockConnection::new(socket, ConnectionState::Greeting)) {
                self.greeting.insert(fd, connection);
            }
        }
    }

    /// Notes that there is no descriptor or memory for a connection. It stays in the backlog, and
    /// the listener is not watched for some time.
    fn accept_later(&mut self, error: &io::Error) {
        self.stats.accept_failures += 1;
        let now = Instant::now();
        if self.warned.is_none_or(|warned| now - warned >= WARN_INTERVAL) {
            self.warned = Some(now);
            tracing::warn!(%error, socket = %self.socket().display(), "connections are not accepted for now");
        }
        self.watch_listener(EventSet::empty());
        self.accept_at = Some(now + ACCEPT_INTERVAL);
    }

    fn greet(&mut self, fd: RawFd) {
        let Some(mut connection) = self.greeting.remove(&fd) else { return };
        match connection.greeting() {
            Greeting::Partial => {
                if self.rearm(&connection, false).is_ok() {
                    self.greeting.insert(fd, connection);
                }
            }
            Greeting::Port(port) => {
                connection.stage = ConnectionState::Asked;
                self.ask(connection, port);
            }
            // The host reads the end of the stream.
            Greeting::Bad => self.accept_soon(),
        }
    }

    /// Requests a connection to `port` from the guest.
    fn ask(&mut self, mut connection: VsockConnection, port: u32) {
        let key = (self.free_port(port), port);
        connection.asked += 1;
        self.keys.insert(connection.socket().as_raw_fd(), key);
        self.connections.insert(key, connection);
        let header = self.header(key, PacketOp::Request);
        self.reply(header);
    }

    /// Requests a connection again that the guest has accepted with an address which is not its
    /// own: a child that has not read its new address yet. It drops the accepted connection once it
    /// reads it, so the new request uses another host port.
    pub(super) fn ask_again(&mut self, key: Key) {
        let Some(connection) =
            self.connections.get(&key).filter(|connection| connection.stage == ConnectionState::Asked)
        else {
            return;
        };
        if connection.asked >= MAX_ASKED {
            // The host reads the end of the stream.
            return self.close(key, false);
        }
        if let Some(connection) = self.remove(key) {
            self.ask(connection, key.1);
        }
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port >= u32::MAX - 1 { FIRST_PORT } else { port + 1 };
            let key = (port, guest);
            if !self.connections.contains_key(&key) && !self.pending.contains_key(&key) {
                return port;
            }
        }
    }

    /// Processes the events of all sockets.
    pub(super) fn look(&mut self) -> io::Result<()> {
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
            } else if let Some(connection) = self.draining.remove(&fd) {
                self.drain(fd, connection);
            } else {
                self.greet(fd);
            }
        }
        Ok(())
    }

    /// Processes an event of a connection's socket.
    fn woken(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.ended {
            if connection.shut_for_guest & SHUT_RECEIVE == 0 {
                if connection.has_hung_up() {
                    self.shut_for_guest(key, SHUT_RECEIVE | SHUT_SEND);
                } else {
                    // The socket was writable. Watched again for the host's hangup.
                    return self.listen_to(key);
                }
            }
        } else if !connection.readable {
            connection.readable = true;
            self.ready.push_back(key);
        }
        self.flush(key);
    }

    /// Writes as much to a socket as it accepts, and watches it if bytes are left.
    pub(super) fn flush(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.flush() {
            let Some(connection) = self.connections.get(&key) else { return };
            if self.rearm(connection, true).is_err() {
                return self.close(key, true);
            }
        }
        self.report_flush(key);
    }

    /// Sends the guest its credit for bytes that the host has taken, or a shutdown when the host no
    /// longer receives.
    fn report_flush(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.owes_shutdown() {
            let directions = SHUT_RECEIVE | if connection.ended { SHUT_SEND } else { 0 };
            self.shut_for_guest(key, directions);
        }
        if self.connections.get(&key).is_some_and(VsockConnection::owes_credit) {
            let header = self.header(key, PacketOp::CreditUpdate);
            self.reply(header);
            self.connections.get_mut(&key).into_iter().for_each(VsockConnection::told);
        }
    }

    /// Sends the guest a shutdown of directions that the host has ended.
    fn shut_for_guest(&mut self, key: Key, directions: u32) {
        let header = PacketHeader { flags: directions, ..self.header(key, PacketOp::Shutdown) };
        self.reply(header);
        self.connections.get_mut(&key).into_iter().for_each(|connection| connection.shut_for_guest |= directions);
    }

    /// Watches a socket whose input was read.
    pub(super) fn listen_to(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let write = connection.flush();
        let Some(connection) = self.connections.get(&key) else { return };
        if self.rearm(connection, write).is_err() {
            return self.close(key, true);
        }
        self.report_flush(key);
    }

    /// Connects for the guest, to the socket's path with the port as suffix.
    pub(super) fn connect(&mut self, key: Key, header: &PacketHeader) {
        let pending = PendingConnect { retries: 0, room: header.buffer, forwarded: header.forwarded };
        if self.connections() >= MAX_CONNECTIONS {
            tracing::debug!(port = key.0, "a guest has as many connections as it may have");
            return self.close(key, true);
        }
        self.try_connect(key, pending);
    }

    fn try_connect(&mut self, key: Key, pending: PendingConnect) {
        let mut retries = pending.retries;
        let opened = self.socket.dial(key).and_then(|attempt| match attempt {
            Attempt::Connected(socket) => {
                self.arm(&socket, ControlOperation::Add, true, false)?;
                VsockConnection::new(socket, ConnectionState::Open).map(Some)
            }
            // The wait for a stuck broker lasts as long as the guest waits.
            Attempt::Waiting => Ok(None),
            Attempt::Full if retries < MAX_RETRIES => {
                retries += 1;
                Ok(None)
            }
            Attempt::Full => Err(io::ErrorKind::TimedOut.into()),
        });
        match opened {
            Ok(Some(mut connection)) => {
                connection.credit(pending.room, pending.forwarded);
                self.keys.insert(connection.socket().as_raw_fd(), key);
                self.connections.insert(key, connection);
                let response = self.header(key, PacketOp::Response);
                self.reply(response);
            }
            Ok(None) => {
                self.stats.connect_retries += 1;
                self.pending.insert(key, PendingConnect { retries, ..pending });
                self.retry_at.get_or_insert_with(|| Instant::now() + RETRY_INTERVAL);
            }
            Err(error) => {
                tracing::debug!(%error, port = key.0, "no listener on the host for the guest's connection");
                self.close(key, true);
            }
        }
    }

    /// Retries connections to hosts whose backlog was full, and the listener, once they are due. Ends after one
    /// connection if the turn should end: a broker may take its time for each.
    pub(super) fn retry(&mut self, now: Instant, should_yield: &YieldRequest<'_>) {
        if self.accept_at.is_some_and(|at| now >= at) {
            self.accept_at = None;
            self.watch_listener(EventSet::IN);
            self.accept();
        }
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = None;
            // Those with the fewest attempts first, so that each is tried even if more are due than
            // fit in a turn.
            let mut due: Vec<(u32, Key)> = self.pending.iter().map(|(key, pending)| (pending.retries, *key)).collect();
            due.sort_unstable();
            for (_, key) in due.into_iter().take(MAX_RETRIED) {
                if let Some(pending) = self.pending.remove(&key) {
                    self.try_connect(key, pending);
                }
                if should_yield.is_set() {
                    break;
                }
            }
            if !self.pending.is_empty() {
                self.retry_at.get_or_insert(now + RETRY_INTERVAL);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::super::device::VsockOptions;
    use super::super::socket::VsockSocket;
    use super::*;

    #[test]
    fn retries_of_connections_give_way_to_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let options = VsockOptions { cid: 42, socket: dir.path().join("vm.sock") };
        let mut vsock = Vsock::new(VsockSocket::bind(&options).unwrap(), false).unwrap();
        let now = Instant::now();
        for port in 0..3 {
            vsock.pending.insert((port, 1), PendingConnect { retries: 1, room: 1, forwarded: 0 });
        }
        let waits = AtomicBool::new(true);
        for left in [2, 1] {
            vsock.retry_at = Some(now);
            vsock.retry(now, &YieldRequest::of(&waits));
            // Each attempt is refused: there is no listener.
            assert_eq!(vsock.pending.len(), left);
            assert!(vsock.retry_at.is_some_and(|at| at > now), "the others are tried later");
        }
    }

    /// Data that the host has taken late is written before the socket is watched again.
    #[test]
    fn the_guest_gets_its_credit_also_when_a_read_writes_its_data() {
        let dir = tempfile::tempdir().unwrap();
        let options = VsockOptions { cid: 42, socket: dir.path().join("vm.sock") };
        let mut vsock = Vsock::new(VsockSocket::bind(&options).unwrap(), false).unwrap();
        let (socket, _host) = UnixStream::pair().unwrap();
        let (fd, key) = (socket.as_raw_fd(), (7, 5));
        vsock.arm(&socket, ControlOperation::Add, true, false).unwrap();
        let mut connection = VsockConnection::new(socket, ConnectionState::Open).unwrap();
        connection.take(&[1; 150 << 10]);
        vsock.keys.insert(fd, key);
        vsock.connections.insert(key, connection);
        vsock.listen_to(key);
        let [update] = vsock.replies.make_contiguous() else { panic!("{:?}", vsock.replies) };
        assert_eq!((update.op, update.forwarded), (PacketOp::CreditUpdate, 150 << 10));
        vsock.listen_to(key);
        assert_eq!(vsock.replies.len(), 1, "once");
    }

    /// A guest without buffers connects and closes without end.
    #[test]
    fn a_connection_that_has_ended_is_not_queued_for_its_input() {
        let dir = tempfile::tempdir().unwrap();
        let options = VsockOptions { cid: 42, socket: dir.path().join("vm.sock") };
        let mut vsock = Vsock::new(VsockSocket::bind(&options).unwrap(), false).unwrap();
        let ends: [fn(&mut Vsock, Key); 3] =
            [|vsock, key| vsock.close(key, false), |vsock, key| vsock.finish(key, false), Vsock::ask_again];
        for (port, end) in (0..).zip(ends) {
            let (socket, _host) = UnixStream::pair().unwrap();
            let (fd, key) = (socket.as_raw_fd(), (7, port));
            vsock.arm(&socket, ControlOperation::Add, true, false).unwrap();
            let connection = VsockConnection::new(socket, ConnectionState::Asked).unwrap();
            vsock.keys.insert(fd, key);
            vsock.connections.insert(key, connection);
            vsock.woken(key);
            assert_eq!(vsock.ready, [key]);
            end(&mut vsock, key);
            assert!(vsock.ready.is_empty() && !vsock.connections.contains_key(&key), "{port}");
        }
    }
}
