//! The rest of a request that the disk does not have yet, and the pieces it is cut into.

use std::collections::VecDeque;

use vm_memory::GuestAddress;

use crate::virtio::chain::Segment;
use clade_block::CLUSTER;

/// The rest of a read or a write.
#[derive(Debug)]
pub(super) struct Transfer {
    write: bool,
    /// The byte on the disk at which the rest begins.
    offset: u64,
    /// The memory of the rest.
    data: VecDeque<Segment>,
}

/// A part of a transfer: one operation of the disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TransferPiece {
    pub(super) offset: u64,
    pub(super) data: Vec<Segment>,
    pub(super) len: u64,
}

impl Transfer {
    pub(super) fn new(write: bool, offset: u64, data: Vec<Segment>) -> Self {
        Self { write, offset, data: data.into() }
    }

    pub(super) fn is_write(&self) -> bool {
        self.write
    }

    pub(super) fn is_over(&self) -> bool {
        self.data.is_empty()
    }

    /// Cuts off the next piece: at most `most` bytes, in whole sectors. The piece ends at a
    /// cluster's end if possible, because a write of part of a cluster may have to read the rest.
    pub(super) fn next(&mut self, most: u64) -> TransferPiece {
        let end = (self.offset + most) / CLUSTER * CLUSTER;
        let most = if end > self.offset { end - self.offset } else { most };
        let mut piece = TransferPiece { offset: self.offset, data: Vec::new(), len: 0 };
        while let Some(first) = self.data.front_mut() {
            let take = (most - piece.len).min(u64::from(first.len)) as u32;
            if take == 0 {
                break;
            }
            piece.data.push(Segment { address: first.address, len: take });
            piece.len += u64::from(take);
            first.address = GuestAddress(first.address.0 + u64::from(take));
            first.len -= take;
            if first.len == 0 {
                self.data.pop_front();
            }
        }
        self.offset += piece.len;
        piece
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use clade_block::SECTOR;

    proptest! {
        /// For buffers split at any place: the pieces are all of the memory, once and in order, and
        /// none is longer than requested.
        #[test]
        fn pieces_are_the_whole_in_order(
            start in 0u64..64,
            cuts in prop::collection::vec(1u32..20_000, 1..20),
            most in prop::collection::vec(1u64..64, 1..5),
        ) {
            let total: u32 = cuts.iter().sum();
            let mut data: Vec<(u64, u32)> = (1u64..).zip(cuts).map(|(n, len)| (n << 32, len)).collect();
            // Whole sectors.
            data.push((1 << 50, total.next_multiple_of(SECTOR as u32) - total + SECTOR as u32));
            let segments = data.iter().map(|&(at, len)| Segment { address: GuestAddress(at), len }).collect();
            let bytes = |(at, len): (u64, u32)| (at..at + u64::from(len)).step_by(SECTOR as usize / 4);
            let mut transfer = Transfer::new(true, start * SECTOR, segments);
            let (mut offset, mut got) = (start * SECTOR, Vec::new());
            for most in most.into_iter().cycle() {
                if transfer.is_over() {
                    break;
                }
                let piece = transfer.next(most * SECTOR);
                prop_assert_eq!(piece.offset, offset);
                prop_assert!(piece.len > 0 && piece.len <= most * SECTOR && piece.len.is_multiple_of(SECTOR));
                let granular = (offset + piece.len).is_multiple_of(CLUSTER);
                prop_assert!(granular || transfer.is_over() || most < 2 * CLUSTER / SECTOR);
                offset += piece.len;
                got.extend(piece.data.iter().map(|part| (part.address.0, part.len)));
            }
            // Joined where they were cut.
            let mut joined: Vec<(u64, u32)> = Vec::new();
            for (at, len) in got {
                match joined.last_mut() {
                    Some(last) if last.0 + u64::from(last.1) == at => last.1 += len,
                    _ => joined.push((at, len)),
                }
            }
            prop_assert_eq!(joined.iter().copied().flat_map(bytes).count(), data.iter().copied().flat_map(bytes).count());
            prop_assert_eq!(joined, data);
        }
    }
}
