//! Transfers in pieces: the disk asks its caller for the memory of one piece at a time, right before
//! the piece becomes a job.
//!
//! So a long transfer pins few pages, and each call of [`Disk::issue`] is short. A transfer is one
//! request: it ends once, after its last piece.

use clade_host_io::{Fragment, total_len};

use super::DiskError;
use super::job::{Job, JobKind};
use super::live::Disk;
use super::transfers::Transfer;

/// Maximum bytes that one call of [`Disk::issue`] begins. Their pages are pinned, and the kernel
/// copies data of the page cache at once.
pub const ISSUE_BYTES: u64 = 256 << 10;
/// Maximum number of pieces that one call of [`Disk::issue`] begins.
const ISSUE_PIECES: usize = 8;

/// Refuses memory of another length than the piece: the map would show bytes that were not written.
fn checked(buffers: Vec<Fragment>, piece: &Transfer) -> Result<Vec<Fragment>, DiskError> {
    let found = total_len(&buffers) as u64;
    if found == piece.len {
        return Ok(buffers);
    }
    Err(DiskError::Memory(format!("{found} bytes for a piece of {}", piece.len).into()))
}

impl Disk {
    /// Accepts a transfer. [`Disk::issue`] begins its pieces. Its token comes back in one
    /// [`DiskDone`](super::DiskDone); no other request in flight may have it.
    ///
    /// # Errors
    /// When the transfer is invalid for this disk. No byte is transferred then.
    pub fn begin_transfer(&mut self, transfer: Transfer) -> Result<(), DiskError> {
        self.check(transfer.offset, transfer.len, transfer.is_write)?;
        self.requests.begin_transfer(transfer);
        Ok(())
    }

    /// Whether a piece may begin now.
    #[must_use]
    pub fn may_issue(&self) -> bool {
        self.requests.transfers().may_issue()
    }

    /// Transfers with bytes that are in no piece yet.
    #[must_use]
    pub fn unissued(&self) -> usize {
        self.requests.transfers().unissued()
    }

    /// Begins pieces, of one transfer after another, up to the bounds of a call. Stops early if
    /// `should_yield` says so. `memory` returns a piece's memory; the pieces of a transfer come in
    /// order. If it fails, the transfer fails.
    pub fn issue(
        &mut self,
        mut memory: impl FnMut(&Transfer) -> Result<Vec<Fragment>, DiskError>,
        should_yield: impl Fn() -> bool,
    ) {
        let mut left = ISSUE_BYTES;
        for _ in 0..ISSUE_PIECES {
            if left == 0 || should_yield() {
                return;
            }
            let Some(piece) = self.requests.transfers().next_piece(left) else { return };
            left -= piece.len;
            // Before the queue changes: after a panic the piece is still in the rest.
            match memory(&piece).and_then(|buffers| checked(buffers, &piece)) {
                Ok(buffers) => {
                    let is_last = self.requests.transfers_mut().issued(&piece);
                    let work = if piece.is_write { JobKind::Write(buffers) } else { JobKind::Read(buffers) };
                    self.add(Job { is_piece: true, ..Job::new(piece.token, piece.offset, piece.len, work) });
                    if is_last {
                        self.requests.end_rest(piece.token, None);
                    }
                }
                Err(error) => self.requests.end_rest(piece.token, Some(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests;
