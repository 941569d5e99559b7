//! Transfers: reads and writes of any length, and the pieces that they are cut into.

use std::collections::VecDeque;

use super::map::CLUSTER;

/// Maximum bytes in pieces that have not ended. Their pages are pinned, and a fork copies pinned
/// pages.
pub const MAX_TRANSFER_BYTES: u64 = 8 << 20;
/// Maximum number of pieces that have not ended.
pub(super) const MAX_PIECES: usize = 256;

/// A read or a write. The piece of a transfer is a transfer too. Offsets and lengths are in bytes,
/// and multiples of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The request's token.
    pub token: u64,
    /// Whether the transfer writes to the disk.
    pub is_write: bool,
    /// First byte on the disk.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Transfer {
    /// Cuts off the next piece: at most `most` bytes, which are whole sectors. The piece ends at a
    /// cluster's end if possible, because a write of part of a cluster may have to read the rest.
    fn cut(&mut self, most: u64) -> Self {
        let end = (self.offset + most) / CLUSTER * CLUSTER;
        let most = if end > self.offset { end - self.offset } else { most };
        let piece = Self { len: self.len.min(most), ..*self };
        self.offset += piece.len;
        self.len -= piece.len;
        piece
    }
}

/// The rests of transfers, and the size of their unfinished pieces.
///
/// Invariants:
///
/// - `rests` has a transfer at most once, and as long as bytes of it are in no piece.
/// - `pieces` and `bytes` count the pieces whose jobs have not ended.
#[derive(Debug, Default)]
pub(super) struct TransferQueue {
    /// The next piece is of the first one.
    rests: VecDeque<Transfer>,
    pub(super) pieces: usize,
    pub(super) bytes: u64,
}

impl TransferQueue {
    /// Transfers with bytes that are in no piece yet.
    pub(super) fn unissued(&self) -> usize {
        self.rests.len()
    }

    pub(super) fn push(&mut self, transfer: Transfer) {
        self.rests.push_back(transfer);
    }

    /// The next piece, of at most `most` bytes. It stays in the rest of its transfer until
    /// [`Self::issued`].
    pub(super) fn next_piece(&self, most: u64) -> Option<Transfer> {
        let room = MAX_TRANSFER_BYTES - self.bytes;
        let mut rest = *self.rests.front().filter(|_| self.may_issue())?;
        Some(rest.cut(most.min(room)))
    }

    /// Removes `piece`, the next one, from the rest of its transfer, and counts it. Returns whether
    /// it is the last piece.
    pub(super) fn issued(&mut self, piece: &Transfer) -> bool {
        let Some(mut rest) = self.rests.pop_front() else { return false };
        rest.offset += piece.len;
        rest.len -= piece.len;
        self.pieces += 1;
        self.bytes += piece.len;
        if rest.len == 0 {
            return true;
        }
        // Behind the others, so that a long transfer does not delay short ones.
        self.rests.push_back(rest);
        false
    }

    pub(super) fn may_issue(&self) -> bool {
        !self.rests.is_empty() && self.pieces < MAX_PIECES && self.bytes < MAX_TRANSFER_BYTES
    }

    pub(super) fn piece_ended(&mut self, bytes: u64) {
        self.pieces -= 1;
        self.bytes -= bytes;
    }

    /// Drops the rest of a transfer. Returns whether the transfer had one.
    pub(super) fn drop_rest(&mut self, token: u64) -> bool {
        let count = self.rests.len();
        self.rests.retain(|rest| rest.token != token);
        self.rests.len() < count
    }

    /// Drops the rests of all transfers. Returns their tokens.
    pub(super) fn drop_rests(&mut self) -> Vec<u64> {
        self.rests.drain(..).map(|rest| rest.token).collect()
    }
}
