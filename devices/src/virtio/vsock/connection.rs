//! One connection: a Unix socket on one side, credit on the other.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

use super::packet::{SHUT_RECEIVE, SHUT_SEND};

/// Bytes from the guest kept for a socket that does not take them; the guest is told so.
pub(super) const ROOM: u32 = 256 << 10;
/// Longest first line a host may send.
const LINE: usize = 32;
/// Longest first line a host is answered with: `OK `, a port and the end of the line.
const MAX_ANSWER: usize = 14;
/// Reads of what nobody wants any more, before a socket is closed.
const MAX_DISCARDS: usize = 64;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host has connected, and has not said to which port.
    Greeting,
    /// The guest has been asked, and has not answered.
    Asked,
    /// Open.
    Open,
}

/// What the host's first line says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// To this port.
    Port(u32),
    /// Nothing yet.
    Partial,
    /// Not what is spoken here, or nobody there.
    Bad,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    pub(super) stage: Stage,
    line: Vec<u8>,
    /// From the guest, not taken by the socket yet.
    out: VecDeque<u8>,
    /// Bytes the socket has taken since the beginning.
    pub(super) forwarded: u32,
    /// What of it the guest was told last.
    told: u32,
    /// Bytes sent to the guest since the beginning, the room it has, and what it has taken out of it.
    sent: u32,
    peer_room: u32,
    peer_forwarded: u32,
    /// Directions the guest has shut.
    shut: u32,
    /// The socket is at its end: the host sends no more.
    pub(super) ended: bool,
    /// The guest was told that the host receives no more.
    pub(super) told_hung_up: bool,
    /// The host takes no more. What the guest still sends is dropped, what the host sent is still
    /// read.
    sink_gone: bool,
    /// The socket may have something to read.
    pub(super) readable: bool,
}

impl Connection {
    pub(super) fn new(socket: UnixStream, stage: Stage) -> io::Result<Self> {
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
            told_hung_up: false,
            sink_gone: false,
            readable: false,
        })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Reads the host's first line, a byte at a time: what is behind it is the stream's.
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

    /// The guest has accepted: tells the host its port.
    pub(super) fn accepted(&mut self, host_port: u32) {
        self.stage = Stage::Open;
        self.out.extend(format!("OK {host_port}\n").as_bytes());
        // Not the guest's bytes: they are not counted against its room.
        self.forwarded = self.forwarded.wrapping_sub(self.out.len() as u32);
    }

    /// What the guest says of its room.
    pub(super) fn credit(&mut self, room: u32, forwarded: u32) {
        (self.peer_room, self.peer_forwarded) = (room, forwarded);
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn may_send(&self) -> u32 {
        if self.shut & SHUT_RECEIVE != 0 {
            return 0;
        }
        // A guest that says it has taken more than it was sent has no room.
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_room.saturating_sub(under_way)
    }

    /// Reads what is for the guest. `None` when there is nothing now; no bytes at the end.
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

    /// Whether the guest may send `len` bytes: it was told of the room there is. Asked before
    /// memory
    /// is had for them.
    pub(super) fn has_room_for(&self, len: u32) -> bool {
        // The answer to the host's first line is not the guest's.
        let most = ROOM as usize + MAX_ANSWER;
        self.shut & SHUT_SEND == 0 && len <= ROOM && self.out.len() + len as usize <= most
    }

    /// Takes bytes from the guest, for which there is room.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }

    /// Gives the socket what it takes. Returns whether something is left.
    ///
    /// A host that takes no more is no error: it may have sent something before, which the guest is
    /// still to get.
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
            // The host reads the end; it may already be gone.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        false
    }

    /// Whether the host has closed its end, and not only ended its stream.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = poll(&mut socket, Some(&now)).is_ok();
        self.sink_gone || (found && socket[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// Closes the socket. The host reads what it was sent, and then the end.
    pub(super) fn close(mut self) {
        // Both ways first, so that nothing comes after what is discarded.
        let _ = self.socket.shutdown(Shutdown::Both);
        // A Unix socket that is closed with something unread is an error to the other end, not an
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

    /// Whether the guest should be told of the room it has: before it thinks that it has none.
    pub(super) fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= ROOM / 2 && self.forwarded.wrapping_sub(self.told) <= ROOM
    }

    /// The guest is being told.
    pub(super) fn told(&mut self) {
        self.told = self.forwarded;
    }

    /// The guest shuts directions down. Returns whether both are.
    pub(super) fn shut_down(&mut self, directions: u32) -> bool {
        self.shut |= directions & (SHUT_RECEIVE | SHUT_SEND);
        self.shut == SHUT_RECEIVE | SHUT_SEND
    }

    /// Whether it is of use to wait for input: it is neither known to be there nor over.
    pub(super) fn wants_input(&self) -> bool {
        !self.readable && !self.ended
    }
}
