//! The path of a request: begun, given to the disk in pieces, and returned to the driver after the
//! last one.

use clade_memory::Access;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::GuestAddress;

use super::request::{BlockRequest, RequestKind};
use super::service::{BATCH, BlockService};
use super::state::InFlight;
use super::transfer::{Transfer, TransferPiece};
use crate::virtio::{YieldRequest, dma};
use clade_block::{DiskError, DiskOp};

/// Maximum bytes in the pieces of one turn: their pages are pinned, and data in the page cache is
/// copied at once by the kernel.
pub(super) const BATCH_BYTES: u64 = 256 << 10;
/// Maximum number of pieces in the disk at a time, and of bytes in them. Their pages are pinned,
/// and a fork copies pinned pages.
const MAX_PIECES: usize = 256;
pub(super) const MAX_BYTES: u64 = 8 << 20;
/// The owner of the pins.
const OWNER: &str = "virtio-blk";

/// A request in flight: popped and not used.
#[derive(Debug)]
pub(super) struct InFlightRequest {
    pub(super) queue: u16,
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    /// Bytes that the device writes on success, without the status.
    pub(super) written: u32,
    /// The part that the disk does not have yet.
    pub(super) rest: Option<Transfer>,
    /// Pieces in the disk.
    pub(super) running: usize,
    pub(super) failed: bool,
    /// Whether a flush follows the request before it is used, because the driver has not negotiated
    /// flushes.
    pub(super) sync: bool,
    /// Whether pieces may have been cancelled. The request is then repeated once the last one has
    /// ended.
    pub(super) redo: bool,
}

/// A piece in the disk.
#[derive(Debug)]
pub(super) struct Running {
    /// The request's token.
    pub(super) request: u64,
    pub(super) bytes: u64,
}

impl BlockService {
    /// Begins a request. Returns its token, unless it is already complete.
    pub(super) fn begin(&mut self, queue: u16, request: BlockRequest) -> Option<u64> {
        let token = self.token();
        let len = request.len();
        let written = if matches!(request.kind, RequestKind::Read { .. }) { len as u32 } else { 0 };
        let sync = request.changes() && !self.chose(VIRTIO_BLK_F_FLUSH);
        let BlockRequest { head, kind, data, status } = request;
        let mut pending =
            InFlightRequest { queue, head, status, written, rest: None, running: 0, failed: false, sync, redo: false };
        let status = match kind {
            RequestKind::Read { offset } | RequestKind::Write { offset } => {
                // All or nothing: a request beyond the disk's end transfers no piece.
                if offset.checked_add(len).is_some_and(|end| end <= self.disk.size()) {
                    pending.rest = Some(Transfer::new(matches!(kind, RequestKind::Write { .. }), offset, data));
                    self.pending.insert(token, pending);
                    self.issuing.push_back(token);
                    return Some(token);
                }
                VIRTIO_BLK_S_IOERR
            }
            RequestKind::Flush => return self.begin_whole(token, pending, DiskOp::Flush),
            RequestKind::Discard { offset, len } => {
                return self.begin_whole(token, pending, DiskOp::Discard { offset, len });
            }
            RequestKind::Zero { offset, len, unmap } => {
                return self.begin_whole(token, pending, DiskOp::Zero { offset, len, unmap });
            }
            RequestKind::Id => match dma::copy_out(&self.ram, &data, &self.id) {
                Ok(copied) => {
                    pending.written = copied as u32;
                    VIRTIO_BLK_S_OK
                }
                Err(_) => VIRTIO_BLK_S_IOERR,
            },
            RequestKind::Invalid => VIRTIO_BLK_S_IOERR,
            RequestKind::Unknown => VIRTIO_BLK_S_UNSUPP,
        };
        if status != VIRTIO_BLK_S_OK {
            pending.written = 0;
        }
        self.add_used(&pending, status);
        None
    }

    /// Begins a request that is one operation without memory.
    fn begin_whole(&mut self, token: u64, pending: InFlightRequest, operation: DiskOp) -> Option<u64> {
        self.pending.insert(token, pending);
        self.give_disk(token, operation, 0);
        self.pending.contains_key(&token).then_some(token)
    }

    /// Gives the disk a piece of `request`.
    fn give_disk(&mut self, request: u64, operation: DiskOp, bytes: u64) {
        let token = self.token();
        // Before the disk gets the piece, which may end immediately.
        self.running.insert(token, Running { request, bytes });
        self.running_bytes += bytes;
        self.pending.get_mut(&request).into_iter().for_each(|pending| pending.running += 1);
        if let Err(error) = self.disk.submit(operation, token) {
            self.finish(token, Err(&error));
        }
    }

    /// Whether the disk may be given another piece.
    pub(super) fn may_issue(&self) -> bool {
        !self.issuing.is_empty() && self.running.len() < MAX_PIECES && self.running_bytes < MAX_BYTES
    }

    /// Gives the disk pieces of requests, one request after another, up to a batch.
    pub(super) fn issue(&mut self, should_yield: &YieldRequest<'_>) {
        let mut left = BATCH_BYTES;
        for _ in 0..BATCH {
            if left == 0 || self.broken || !self.may_issue() || should_yield.is_set() {
                return;
            }
            let Some(request) = self.issuing.pop_front() else { return };
            left -= self.issue_one(request, left);
        }
    }

    /// Gives the disk the next piece of `request`, of `most` bytes at most. Returns its bytes.
    fn issue_one(&mut self, request: u64, most: u64) -> u64 {
        let Some(pending) = self.pending.get_mut(&request) else { return 0 };
        let Some(rest) = &mut pending.rest else { return 0 };
        let write = rest.is_write();
        let TransferPiece { offset, data, len } = rest.next(most);
        if rest.is_over() {
            pending.rest = None;
        } else {
            // Behind the others, so that a long request does not delay short ones.
            self.issuing.push_back(request);
        }
        // A read makes the device write to memory, so the pages must be this VM's own before the
        // kernel gets their address (I3).
        let access = if write { Access::Read } else { Access::Write };
        match dma::pin(&self.ram, OWNER, &data, access) {
            Ok(buffers) if write => self.give_disk(request, DiskOp::Write { offset, buffers }, len),
            Ok(buffers) => self.give_disk(request, DiskOp::Read { offset, buffers }, len),
            Err(error) => {
                tracing::warn!(%error, "memory of a request");
                self.fail_request(request);
                self.ended(request);
            }
        }
        len
    }

    /// Fails `request`, and begins none of its other pieces.
    fn fail_request(&mut self, request: u64) {
        if let Some(pending) = self.pending.get_mut(&request) {
            (pending.failed, pending.rest) = (true, None);
        }
    }

    /// Ends a piece.
    pub(super) fn finish(&mut self, token: u64, result: Result<(), &DiskError>) {
        let Some(Running { request, bytes }) = self.running.remove(&token) else { return };
        self.running_bytes -= bytes;
        if let Err(error) = result {
            tracing::debug!(%error, "a request to a disk failed");
            self.fail_request(request);
        }
        self.pending.get_mut(&request).into_iter().for_each(|pending| pending.running -= 1);
        self.ended(request);
    }

    /// Returns `request` to the driver if its last piece has ended.
    fn ended(&mut self, request: u64) {
        let Some(pending) = self.pending.get_mut(&request) else { return };
        if pending.running > 0 || (pending.rest.is_some() && !self.halting) {
            return;
        }
        let goes_on = !self.halting && !self.broken;
        if goes_on && pending.sync && !pending.failed && !pending.redo {
            pending.sync = false;
            return self.give_disk(request, DiskOp::Flush, 0);
        }
        let Some(mut pending) = self.pending.remove(&request) else { return };
        self.replaying.remove(&request);
        if pending.redo && goes_on {
            return self.replay_queue.push_back(InFlight { queue: pending.queue, head: pending.head });
        }
        if pending.failed {
            pending.written = 0;
        }
        let status = if pending.failed { VIRTIO_BLK_S_IOERR } else { VIRTIO_BLK_S_OK };
        self.add_used(&pending, status);
    }
}
