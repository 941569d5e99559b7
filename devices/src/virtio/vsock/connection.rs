//! One connection: a Unix socket on one side, credit on the other.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

use super::packet::{SHUT_RECEIVE, SHUT_SEND};

/// Bytes from the guest that a connection keeps for a slow socket: the buffer size announced to the
/// guest.
pub(super) const ROOM: u32 = 256 << 10;
/// Maximum length of a host's first line.
const LINE: usize = 32;
/// Maximum length of the answer to it: `OK `, a port and the end of the line.
const MAX_ANSWER: usize = 14;
/// Reads that discard input before a socket is closed.
const MAX_DISCARDS: usize = 64;

/// The stage of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionState {
    /// The host has connected, and has not sent a port yet.
    Greeting,
    /// The guest has received the request, and has not answered yet.
    Asked,
    /// Open.
    Open,
}

/// The content of the host's first line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// To connect to this port.
    Port(u32),
    /// The line is not complete.
    Partial,
    /// The line is invalid, or the host is gone.
    Bad,
}

/// A connection, and the credit of both sides.
#[derive(Debug)]
pub(super) struct VsockConnection {
    socket: UnixStream,
    pub(super) stage: ConnectionState,
    line: Vec<u8>,
    /// Bytes from the guest that the socket has not accepted yet.
    out: VecDeque<u8>,
    /// Bytes that the socket has accepted since the beginning.
    pub(super) forwarded: u32,
    /// The last value of `forwarded` sent to the guest.
    told: u32,
    /// Bytes sent to the guest since the beginning, the guest's buffer size, and the bytes it has
    /// taken out of its buffer.
    sent: u32,
    peer_room: u32,
    peer_forwarded: u32,
    /// Directions that the guest has shut down.
    shut: u32,
    /// Whether the host has ended its stream.
    pub(super) ended: bool,
    /// Directions whose shutdown was sent to the guest.
    pub(super) shut_for_guest: u32,
    /// Whether the host no longer receives. Later data from the guest is dropped; earlier data from
    /// the host is still read.
    sink_gone: bool,
    /// Whether the socket may have input.
    pub(super) readable: bool,
    /// Number of connection requests sent to the guest for this connection.
    pub(super) asked: u32,
}

impl VsockConnection {
    pub(super) fn new(socket: UnixStream, stage: ConnectionState) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            stage,
            line: Vec::new(),
            out: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_room: 0,
            peer_forwarded: 0,
            shut: 0,
            ended: false,
            shut_for_guest: 0,
            sink_gone: false,
            readable: false,
            asked: 0,
        })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Reads the host's first line, a byte at a time, because the next bytes belong to the stream.
    pub(super) fn greeting(&mut self) -> Greeting {
        let mut byte = [0];
        loop {
            match self.socket.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) if self.line.len() < LINE => self.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeting::Partial,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return Greeting::Bad,
            }
        }
        let line = std::str::from_utf8(&self.line).unwrap_or_default();
        let port = line.trim_end_matches('\r').strip_prefix("CONNECT ").and_then(|port| port.parse().ok());
        port.map_or(Greeting::Bad, Greeting::Port)
    }

    /// Notes that the guest has accepted, and sends the port to the host.
    pub(super) fn accepted(&mut self, host_port: u32) {
        self.stage = ConnectionState::Open;
        self.out.extend(format!("OK {host_port}\n").as_bytes());
        // These bytes are not from the guest, and do not count against its credit.
        self.forwarded = self.forwarded.wrapping_sub(self.out.len() as u32);
    }

    /// Notes the credit that the guest has sent.
    pub(super) fn credit(&mut self, room: u32, forwarded: u32) {
        (self.peer_room, self.peer_forwarded) = (room, forwarded);
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn may_send(&self) -> u32 {
        if self.shut & SHUT_RECEIVE != 0 {
            return 0;
        }
        // A guest that claims to have taken more than was sent gets no room.
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_room.saturating_sub(under_way)
    }

    /// Reads bytes for the guest. Returns `None` if the socket has no input now, and no bytes at
    /// the end of the stream.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.socket.read(bytes) {
                Ok(got) => {
                    self.ended = got == 0;
                    self.sent = self.sent.wrapping_add(got as u32);
                    return Ok(Some(got));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the guest has credit to send `len` bytes. Checked before memory is allocated for
    /// them.
    pub(super) fn has_room_for(&self, len: u32) -> bool {
        // The answer to the host's first line does not count against the guest's credit.
        let most = ROOM as usize + MAX_ANSWER;
        self.shut & SHUT_SEND == 0 && len <= ROOM && self.out.len() + len as usize <= most
    }

    /// Takes bytes from the guest, which must fit.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }

    /// Writes as much to the socket as it accepts. Returns whether bytes are left.
    ///
    /// A host that no longer receives is not an error: its earlier bytes still go to the guest.
    pub(super) fn flush(&mut self) -> bool {
        while !self.out.is_empty() && !self.sink_gone {
            let (first, _) = self.out.as_slices();
            match send(&self.socket, first, SendFlags::NOSIGNAL) {
                Ok(wrote) => {
                    self.out.drain(..wrote);
                    self.forwarded = self.forwarded.wrapping_add(wrote as u32);
                }
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::debug!(%error, "a host takes no more from a guest");
                    self.sink_gone = true;
                }
            }
        }
        self.forwarded = self.forwarded.wrapping_add(self.out.len() as u32);
        self.out.clear();
        if self.shut & SHUT_SEND != 0 {
            // The host reads the end of the stream. The host may already be gone.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        false
    }

    /// Whether the guest must get a shutdown, because the host no longer receives.
    pub(super) fn owes_shutdown(&self) -> bool {
        self.sink_gone && self.shut_for_guest & SHUT_RECEIVE == 0
    }

    /// Whether the host has closed its socket, and not only ended its stream.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = poll(&mut socket, Some(&now)).is_ok();
        self.sink_gone || (found && socket[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// Closes the socket. The host reads all data sent to it, and then the end.
    pub(super) fn close(mut self) {
        // Both directions are shut down first, so that no bytes arrive after those discarded here.
        let _ = self.socket.shutdown(Shutdown::Both);
        // If a Unix socket is closed with unread input, the other side gets an error, and not the
        // end.
        let mut bytes = vec![0; ROOM as usize / 4];
        for _ in 0..MAX_DISCARDS {
            match self.socket.read(&mut bytes) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
            }
        }
    }

    /// Whether the guest should get a credit update, before it runs out of credit.
    pub(super) fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= ROOM / 2 && self.forwarded.wrapping_sub(self.told) <= ROOM
    }

    /// Notes that a credit update is being sent.
    pub(super) fn told(&mut self) {
        self.told = self.forwarded;
    }

    /// Shuts down directions that the guest has shut down. Returns whether both are.
    pub(super) fn shut_down(&mut self, directions: u32) -> bool {
        self.shut |= directions & (SHUT_RECEIVE | SHUT_SEND);
        self.shut == SHUT_RECEIVE | SHUT_SEND
    }

    /// Whether to wait for input: none is known to be there, and the stream has not ended.
    pub(super) fn wants_input(&self) -> bool {
        !self.readable && !self.ended
    }
}
