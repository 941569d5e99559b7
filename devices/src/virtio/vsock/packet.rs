//! Packet headers, as the specification's `struct virtio_vsock_hdr` lays them out.

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The socket type of a stream, the only one supported.
const STREAM: u16 = 1;

/// The operation of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PacketOp {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

const OPS: [PacketOp; 7] = [
    PacketOp::Request,
    PacketOp::Response,
    PacketOp::Reset,
    PacketOp::Shutdown,
    PacketOp::Data,
    PacketOp::CreditUpdate,
    PacketOp::CreditRequest,
];

/// Flags of a shutdown: the sender receives no more, and sends no more.
pub(super) const SHUT_RECEIVE: u32 = 1;
pub(super) const SHUT_SEND: u32 = 2;

/// The header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PacketHeader {
    pub(super) from_cid: u64,
    pub(super) to_cid: u64,
    pub(super) from_port: u32,
    pub(super) to_port: u32,
    pub(super) len: u32,
    pub(super) op: PacketOp,
    pub(super) flags: u32,
    /// The sender's buffer size in bytes.
    pub(super) buffer: u32,
    /// Bytes the sender has taken out of its buffer since the connection began, modulo 2^32.
    pub(super) forwarded: u32,
    /// Whether the socket type is a stream.
    pub(super) stream: bool,
}

fn word<const N: usize>(bytes: &[u8; HEADER], at: usize) -> [u8; N] {
    let mut word = [0; N];
    word.copy_from_slice(&bytes[at..at + N]);
    word
}

impl PacketHeader {
    /// Parses a header. Returns None for an unknown operation.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Option<Self> {
        let op = usize::from(u16::from_le_bytes(word(bytes, 30))).checked_sub(1)?;
        Some(Self {
            from_cid: u64::from_le_bytes(word(bytes, 0)),
            to_cid: u64::from_le_bytes(word(bytes, 8)),
            from_port: u32::from_le_bytes(word(bytes, 16)),
            to_port: u32::from_le_bytes(word(bytes, 20)),
            len: u32::from_le_bytes(word(bytes, 24)),
            stream: u16::from_le_bytes(word(bytes, 28)) == STREAM,
            op: *OPS.get(op)?,
            flags: u32::from_le_bytes(word(bytes, 32)),
            buffer: u32::from_le_bytes(word(bytes, 36)),
            forwarded: u32::from_le_bytes(word(bytes, 40)),
        })
    }

    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, word: &[u8]| bytes[at..at + word.len()].copy_from_slice(word);
        let op = OPS.iter().position(|op| *op == self.op).map_or(0, |at| at as u16 + 1);
        put(0, &self.from_cid.to_le_bytes());
        put(8, &self.to_cid.to_le_bytes());
        put(16, &self.from_port.to_le_bytes());
        put(20, &self.to_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        put(30, &op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_parsed(cids: (u64, u64), ports: (u32, u32), op in 0usize..7, words: [u32; 4]) {
            let header = PacketHeader {
                from_cid: cids.0,
                to_cid: cids.1,
                from_port: ports.0,
                to_port: ports.1,
                len: words[0],
                op: OPS[op],
                flags: words[1],
                buffer: words[2],
                forwarded: words[3],
                stream: true,
            };
            prop_assert_eq!(PacketHeader::parse(&header.bytes()), Some(header));
        }

        #[test]
        fn any_bytes_are_a_header_or_none(bytes: [u8; 32], rest: [u8; 12]) {
            let mut all = [0; HEADER];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            if let Some(header) = PacketHeader::parse(&all) {
                let mut again = header.bytes();
                again[28..30].copy_from_slice(&all[28..30]);
                prop_assert_eq!(again, all);
            }
        }
    }
}
