//! Buffers that a driver has posted for receiving.

use clade_host_io::{Fragment, total_len};
use vm_memory::Bytes;

use super::device::MAX_PACKET;

/// Pieces of memory after which no more chains are gathered for a packet. A chain adds 256 at most, and a backend
/// takes 1,024.
const MAX_PIECES: usize = 512;

/// A chain posted for receiving, and its memory.
#[derive(Debug)]
pub(super) struct Posted {
    pub(super) head: u16,
    pub(super) memory: Vec<Fragment>,
}

/// The size of the chains gathered for one packet.
#[derive(Debug, Default)]
pub(super) struct Room {
    chains: usize,
    pieces: usize,
    pub(super) bytes: usize,
}

impl Room {
    pub(super) fn add(&mut self, chain: &Posted) {
        self.chains += 1;
        self.pieces += chain.memory.len();
        self.bytes += total_len(&chain.memory);
    }

    /// Whether no further chain is needed. With `merges`, a packet may be spread over chains.
    ///
    /// A driver may post buffers of a byte each, and each is pinned: so their number is bounded as well.
    pub(super) fn is_enough(&self, merges: bool) -> bool {
        self.chains > 0 && (!merges || self.bytes >= MAX_PACKET || self.pieces >= MAX_PIECES)
    }
}

/// Writes two bytes into `memory`, at byte `at`. Bytes beyond the end are not written.
pub(super) fn write_at(memory: &[Fragment], at: usize, bytes: [u8; 2]) {
    let mut skip = at;
    let mut bytes = bytes.as_slice();
    for part in memory {
        if skip < part.len() && !bytes.is_empty() {
            let fits = bytes.len().min(part.len() - skip);
            // Within the fragment, so this cannot fail.
            let _ = part.slice().write_slice(&bytes[..fits], skip);
            bytes = &bytes[fits..];
            skip += fits;
        }
        skip = skip.saturating_sub(part.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_gathered_for_a_packet_of_any_size_and_in_a_bounded_number_of_pieces() {
        let enough = |chains, pieces, bytes, merges| Room { chains, pieces, bytes }.is_enough(merges);
        assert!(!enough(0, 0, 0, false) && !enough(0, 0, 0, true));
        assert!(enough(1, 1, 12, false) && !enough(1, 1, 12, true));
        assert!(enough(40, 40, MAX_PACKET, true) && !enough(40, 40, MAX_PACKET - 1, true));
        assert!(enough(2, 512, 512, true) && !enough(2, 511, 511, true));
    }
}
