//! One connection: a Unix socket on one side, credit on the other.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::packet::{SHUT_RECEIVE, SHUT_SEND};

/// Bytes from the guest kept for a socket that does not take them; the guest is told so.
pub(super) const ROOM: u32 = 256 << 10;
/// Longest first line a host may send.
const LINE: usize = 32;

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
    /// The socket is at its end.
    pub(super) ended: bool,
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

    /// Takes bytes from the guest. False when it sends more than it was told there is room for.
    pub(super) fn take(&mut self, bytes: &[u8]) -> bool {
        if self.shut & SHUT_SEND != 0 || self.out.len() + bytes.len() > ROOM as usize {
            return false;
        }
        self.out.extend(bytes);
        true
    }

    /// Gives the socket what it takes. Returns whether something is left.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while !self.out.is_empty() {
            let (first, _) = self.out.as_slices();
            match self.socket.write(first) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(wrote) => {
                    self.out.drain(..wrote);
                    self.forwarded = self.forwarded.wrapping_add(wrote as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.shut & SHUT_SEND != 0 {
            // The host reads the end; it may already be gone.
            let _ = self.socket.shutdown(std::net::Shutdown::Write);
        }
        Ok(false)
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
}
