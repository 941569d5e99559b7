//! Packets over a stream socket, each behind its length: what QEMU's `stream` backend and passt
//! speak.
//!
//! The other end is another process, and not trusted to keep to that. A length that no packet has
//! ends the stream: where the next packet begins is not known then.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vm_memory::Bytes;

use crate::buffer::{Fragment, for_window, total_len};
use crate::tap::{VNET_HEADER, is_readable};

/// Bytes of the length before each packet.
const LENGTH: usize = 4;
/// Bytes of an Ethernet header, which the smallest packet is.
const MIN_FRAME: usize = 14;
/// Bytes of the largest packet: 64 KiB and an Ethernet header.
const MAX_FRAME: usize = 14 + 65_536;
/// Bytes that are taken from the socket at a time. Two of the largest packets fit.
const CAPACITY: usize = 2 * (LENGTH + MAX_FRAME);

/// One end of a stream of packets.
///
/// Users see packets with a TAP interface's header, which is not on the stream: without negotiation
/// it has no content.
#[derive(Debug)]
pub struct PacketStream {
    socket: OwnedFd,
    /// Received bytes, consumed up to `taken`.
    received: Vec<u8>,
    taken: usize,
    /// A packet of which the socket took only a part; from `sent` on it is still to be sent.
    unsent: Vec<u8>,
    sent: usize,
    /// The reason why no more packets can come.
    ended: Option<io::ErrorKind>,
    /// The error that cut a packet which was sent in part.
    torn: Option<io::ErrorKind>,
}

impl PacketStream {
    /// Packets over `socket`, a connected stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, received: Vec::new(), taken: 0, unsent: Vec::new(), sent: 0, ended: None, torn: None }
    }

    /// The socket, for another process. Received packets that were not consumed are lost.
    #[must_use]
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// The socket's descriptor, which does not become readable for packets received already: the
    /// user must receive until there is no packet.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Whether bytes were received that no packet was given out for, or can be received now.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        !self.has_ended() && (self.taken < self.received.len() || is_readable(&self.socket))
    }

    /// Whether the other end has gone, or has not kept to the protocol.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Receives a packet into `buffers`, after a header of zeros. Excess bytes are cut off. Returns
    /// the length of both. `None` when no packet is available.
    ///
    /// # Errors
    /// When the other end has gone, or does not keep to the protocol; from then on always.
    pub fn receive(&mut self, buffers: &[Fragment]) -> io::Result<Option<usize>> {
        let Some(len) = self.next_packet()? else { return Ok(None) };
        let packet = &self.received[self.taken + LENGTH..][..len];
        let room = total_len(buffers);
        let mut at = 0;
        for_window(buffers, 0, VNET_HEADER, |part| {
            // Within the part, so it cannot fail.
            let _ = part.slice().write_slice(&[0; VNET_HEADER][..part.len], 0);
        });
        for_window(buffers, VNET_HEADER, len, |part| {
            let _ = part.slice().write_slice(&packet[at..at + part.len], 0);
            at += part.len;
        });
        self.taken += LENGTH + len;
        Ok(Some((VNET_HEADER + len).min(room)))
    }

    /// Receives a packet and drops it. Returns false when no packet is available.
    ///
    /// # Errors
    /// As for [`PacketStream::receive`].
    pub fn discard(&mut self) -> io::Result<bool> {
        let len = self.next_packet()?;
        self.taken += len.map_or(0, |len| LENGTH + len);
        Ok(len.is_some())
    }

    /// Sends the packet in `buffers`, without its header. `None` when the socket takes no packet
    /// now. If the socket takes a part, the rest is sent later: see [`PacketStream::flush`].
    ///
    /// # Errors
    /// When the packet is not of a packet's size, or the other end has gone.
    pub fn send(&mut self, buffers: &[Fragment]) -> io::Result<Option<usize>> {
        if !self.flush()? {
            return Ok(None);
        }
        let whole = total_len(buffers);
        let len = whole.saturating_sub(VNET_HEADER);
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        (self.sent, self.unsent) = (0, std::mem::take(&mut self.unsent));
        self.unsent.clear();
        self.unsent.extend((len as u32).to_be_bytes());
        self.unsent.resize(LENGTH + len, 0);
        let mut at = LENGTH;
        // Copied once: the guest may change its memory meanwhile, but not the copy.
        for_window(buffers, VNET_HEADER, len, |part| {
            let _ = part.slice().read_slice(&mut self.unsent[at..at + part.len], 0);
            at += part.len;
        });
        self.flush()?;
        if self.sent == 0 {
            // None of it was sent: the next attempt may use another packet.
            self.unsent.clear();
            return Ok(None);
        }
        Ok(Some(whole))
    }

    /// Sends the rest of a packet. Returns false when the socket takes no more now.
    ///
    /// # Errors
    /// When the other end has gone.
    pub fn flush(&mut self) -> io::Result<bool> {
        if let Some(kind) = self.torn {
            return Err(kind.into());
        }
        while self.sent < self.unsent.len() {
            match send(self.socket.as_fd(), &self.unsent[self.sent..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => self.sent += sent,
                Err(Errno::INTR) => {}
                Err(error) => return self.not_sent(error),
            }
        }
        Ok(true)
    }

    /// Returns false if the rest of a packet is to be sent later.
    fn not_sent(&mut self, error: Errno) -> io::Result<bool> {
        // The system may have no memory for a message.
        if matches!(error, Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) {
            return Ok(false);
        }
        let is_torn = self.sent > 0;
        (self.sent, self.unsent) = (0, Vec::new());
        let error = io::Error::from(error);
        if is_torn {
            // The other end would take the next packet for the rest of this one, and the guest's bytes for lengths.
            self.torn = Some(error.kind());
            return Err(self.end(error.kind()));
        }
        Err(error)
    }

    /// The length of the packet at `taken`. None when it is not there as a whole.
    fn next_packet(&mut self) -> io::Result<Option<usize>> {
        loop {
            let left = &self.received[self.taken..];
            if let Some((length, rest)) = left.split_first_chunk::<LENGTH>() {
                let len = u32::from_be_bytes(*length) as usize;
                if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
                    return Err(self.end(io::ErrorKind::InvalidData));
                }
                if rest.len() >= len {
                    return Ok(Some(len));
                }
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Reads all available bytes from the socket. Returns false if it has no bytes.
    fn fill(&mut self) -> io::Result<bool> {
        if let Some(kind) = self.ended {
            return Err(kind.into());
        }
        self.received.drain(..self.taken);
        self.taken = 0;
        let had = self.received.len();
        self.received.resize(CAPACITY, 0);
        let got = loop {
            match recv(self.socket.as_fd(), &mut self.received[had..], RecvFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                got => break got.map(|(got, _)| got),
            }
        };
        self.received.truncate(had + got.unwrap_or(0));
        match got {
            Ok(0) => Err(self.end(io::ErrorKind::UnexpectedEof)),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(self.end(io::Error::from(error).kind())),
        }
    }

    fn end(&mut self, kind: io::ErrorKind) -> io::Error {
        self.ended = Some(kind);
        self.received.clear();
        self.taken = 0;
        kind.into()
    }
}

#[cfg(test)]
mod tests;
