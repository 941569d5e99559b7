//! The guest's side of the socket device: packets in queues.
//!
//! A guest may write any header. A length is compared with the descriptors and with the guest's
//! credit before memory is allocated for it.

use super::HOST_CID;
use super::connection::{ConnectionState, ROOM, VsockConnection};
use super::device::{BATCH, Key, RX, Vsock};
use super::notices::{AlreadyOpen, MAX_NOTICE, NOTICE_PORT};
use super::packet::{HEADER, PacketHeader, PacketOp, SHUT_RECEIVE, SHUT_SEND};
use crate::virtio::sync_device::{FatalError, QueueCtx};
use crate::virtio::{Chain, QueueError, Segment, YieldRequest, dma};

/// Maximum bytes of data in a packet to the guest.
const MAX_DATA: usize = 16 << 10;

impl Vsock {
    pub(super) fn header(&self, key: Key, op: PacketOp) -> PacketHeader {
        let (buffer, forwarded) = (ROOM, self.connections.get(&key).map_or(0, |connection| connection.forwarded));
        let (from_port, to_port) = key;
        let (from_cid, to_cid) = (HOST_CID, self.cid);
        PacketHeader { from_cid, to_cid, from_port, to_port, len: 0, op, flags: 0, buffer, forwarded, stream: true }
    }

    /// Queues a packet for the guest. Their number is limited by the turn of [`Vsock`].
    pub(super) fn reply(&mut self, header: PacketHeader) {
        self.replies.push_back(header);
    }

    /// Processes a packet from the guest.
    pub(super) fn transmit(&mut self, io: &QueueCtx, chain: &Chain) -> Result<(), FatalError> {
        let mut bytes = [0; HEADER];
        let rest = dma::copy_in(&io.ram, &chain.readable, &mut bytes)?;
        let Some(header) = PacketHeader::parse(&bytes) else { return Ok(()) };
        if u64::from(header.len) > dma::len_of(&rest) {
            let (head, what) = (chain.head, "is shorter than its packet says");
            return Err(QueueError::Content { head, what }.into());
        }
        let key = (header.to_port, header.from_port);
        if header.from_cid != self.cid || header.to_cid != HOST_CID || !header.stream {
            if header.op != PacketOp::Reset {
                let reset = PacketHeader { from_cid: header.to_cid, ..self.header(key, PacketOp::Reset) };
                self.reply(reset);
            }
            if header.op == PacketOp::Response && header.to_cid == HOST_CID && header.stream {
                self.ask_again(key);
            }
            return Ok(());
        }
        if key.0 == NOTICE_PORT {
            return self.notice(io, key, &header, &rest);
        }
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.credit(header.buffer, header.forwarded);
            // The guest has credit again.
            if connection.readable && !self.ready.contains(&key) {
                self.ready.push_back(key);
            }
        }
        if let Some(pending) = self.pending.get_mut(&key) {
            match header.op {
                PacketOp::CreditUpdate => (pending.room, pending.forwarded) = (header.buffer, header.forwarded),
                // The guest no longer wants the connection, or has sent data before that was
                // allowed.
                op => self.close(key, op != PacketOp::Reset),
            }
            return Ok(());
        }
        match (header.op, self.connections.get_mut(&key).map(|connection| connection.stage)) {
            (PacketOp::Request, None) => self.connect(key, &header),
            (PacketOp::Response, Some(ConnectionState::Asked)) => {
                self.connections.get_mut(&key).into_iter().for_each(|connection| connection.accepted(key.0));
                self.flush(key);
                self.listen_to(key);
            }
            (PacketOp::Data, Some(ConnectionState::Open)) => {
                let room = |connection: &VsockConnection| connection.has_room_for(header.len);
                if !self.connections.get(&key).is_some_and(room) {
                    // The guest has exceeded its credit.
                    self.close(key, true);
                    return Ok(());
                }
                let mut data = vec![0; header.len as usize];
                dma::copy_in(&io.ram, &rest, &mut data)?;
                self.connections.get_mut(&key).into_iter().for_each(|connection| connection.take(&data));
                self.flush(key);
            }
            (PacketOp::Shutdown, Some(_)) => {
                let both = self.connections.get_mut(&key).is_some_and(|connection| connection.shut_down(header.flags));
                if both {
                    self.finish(key, true);
                } else {
                    self.flush(key);
                }
            }
            (PacketOp::CreditRequest, Some(_)) => {
                let update = self.header(key, PacketOp::CreditUpdate);
                self.reply(update);
                self.connections.get_mut(&key).into_iter().for_each(VsockConnection::told);
            }
            (PacketOp::CreditUpdate, Some(_)) | (PacketOp::Reset, None) => {}
            (PacketOp::Reset, Some(_)) => self.finish(key, false),
            // The packet belongs to no connection, or is out of order.
            _ => self.close(key, true),
        }
        Ok(())
    }

    /// Processes a packet of a connection to the device's own port.
    fn notice(&mut self, io: &QueueCtx, key: Key, header: &PacketHeader, rest: &[Segment]) -> Result<(), FatalError> {
        let (_, port) = key;
        let answer = match header.op {
            PacketOp::Request => match self.notices.open(port) {
                Ok(displaced) => {
                    if let Some(other) = displaced {
                        let reset = self.header((NOTICE_PORT, other), PacketOp::Reset);
                        self.reply(reset);
                    }
                    Some(PacketOp::Response)
                }
                Err(AlreadyOpen) => Some(PacketOp::Reset),
            },
            PacketOp::Data if header.len as usize <= MAX_NOTICE && self.notices.is_open(port) => {
                let mut data = vec![0; header.len as usize];
                dma::copy_in(&io.ram, rest, &mut data)?;
                (!self.notices.take(port, &data)).then_some(PacketOp::Reset)
            }
            PacketOp::CreditRequest if self.notices.is_open(port) => Some(PacketOp::CreditUpdate),
            PacketOp::CreditUpdate if self.notices.is_open(port) => None,
            PacketOp::Reset => None,
            // At the end the guest waits for the reset: it may power itself off then.
            PacketOp::Shutdown
            | PacketOp::Response
            | PacketOp::Data
            | PacketOp::CreditRequest
            | PacketOp::CreditUpdate => Some(PacketOp::Reset),
        };
        if matches!(header.op, PacketOp::Reset) || answer == Some(PacketOp::Reset) {
            self.notices.close(port);
        }
        if let Some(op) = answer {
            let header = self.header(key, op);
            self.reply(header);
        }
        Ok(())
    }

    /// Fills the guest's buffers: first with replies, then with data of each connection in turn.
    /// Returns whether there may be more to send.
    pub(super) fn receive(&mut self, io: &mut QueueCtx, should_yield: &YieldRequest<'_>) -> Result<bool, FatalError> {
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
                Some(written) => {
                    io.add_used(RX, chain.head, written)?;
                    self.delivered += 1;
                }
                None => io.undo_pop(RX),
            }
            if should_yield.is_set() {
                break;
            }
        }
        Ok(!self.replies.is_empty() || !self.ready.is_empty())
    }

    fn check_room(chain: &Chain, len: usize) -> Result<(), FatalError> {
        if dma::len_of(&chain.writable) < len as u64 {
            let (head, what) = (chain.head, "has no room for a packet");
            return Err(QueueError::Content { head, what }.into());
        }
        Ok(())
    }

    fn put(io: &QueueCtx, chain: &Chain, header: &PacketHeader, data: &[u8]) -> Result<Option<u32>, FatalError> {
        Self::check_room(chain, HEADER + data.len())?;
        let bytes = [header.bytes().as_slice(), data].concat();
        Ok(Some(dma::copy_out(&io.ram, &chain.writable, &bytes)? as u32))
    }

    /// Sends data of the next connection that has some. Returns None if no data was sent.
    fn send(&mut self, io: &QueueCtx, chain: &Chain) -> Result<Option<u32>, FatalError> {
        let Some(key) = self.ready.pop_front() else { return Ok(None) };
        let Some(connection) = self.connections.get_mut(&key) else { return Ok(None) };
        let may = connection.may_send() as usize;
        if connection.stage != ConnectionState::Open || may == 0 {
            // Continued when the guest has room.
            return Ok(None);
        }
        // A read of no byte would look like the end of the host's stream.
        Self::check_room(chain, HEADER + 1)?;
        let room = (dma::len_of(&chain.writable) as usize).saturating_sub(HEADER);
        let mut data = vec![0; room.min(may).min(MAX_DATA)];
        match connection.read(&mut data) {
            Ok(Some(0)) => {
                connection.readable = false;
                // A host that has only ended its own stream still receives.
                let flags = SHUT_SEND | if connection.has_hung_up() { SHUT_RECEIVE } else { 0 };
                connection.shut_for_guest |= flags;
                let header = PacketHeader { flags, ..self.header(key, PacketOp::Shutdown) };
                let written = Self::put(io, chain, &header, &[])?;
                self.listen_to(key);
                Ok(written)
            }
            Ok(Some(len)) => {
                self.ready.push_back(key);
                let header = PacketHeader { len: len as u32, ..self.header(key, PacketOp::Data) };
                self.connections.get_mut(&key).into_iter().for_each(VsockConnection::told);
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
}
