//! The path of a request: begun, given to the disk, and returned to the driver.

use std::collections::VecDeque;
use std::time::Instant;

use clade_memory::Access;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::GuestAddress;

use super::request::{BlockRequest, RequestKind};
use super::service::{BlockService, MEMORY_WAIT, MEMORY_WARN};
use super::state::InFlight;
use crate::virtio::chain::Segment;
use crate::virtio::{YieldRequest, dma};
use clade_block::{DiskError, DiskOp, Transfer};

/// The owner of the pins.
const OWNER: &str = "virtio-blk";

/// A request in flight: popped and not used.
#[derive(Debug)]
pub(super) struct InFlightRequest {
    pub(super) queue: u16,
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    /// The memory that the disk has not asked for yet.
    pub(super) data: VecDeque<Segment>,
    /// Bytes that the device writes on success, without the status.
    pub(super) written: u32,
    /// Whether a flush follows the request before it is used, because the driver has not negotiated
    /// flushes.
    pub(super) sync: bool,
    /// Whether operations may have been cancelled, or had no memory. The request is then repeated once it has ended.
    pub(super) redo: bool,
}

impl InFlightRequest {
    /// Cuts off the next `len` bytes of the memory.
    fn cut(&mut self, len: u64) -> Vec<Segment> {
        let (mut left, mut piece) = (len, Vec::new());
        while left > 0
            && let Some(first) = self.data.front_mut()
        {
            let take = left.min(u64::from(first.len)) as u32;
            piece.push(Segment { address: first.address, len: take });
            left -= u64::from(take);
            first.address = GuestAddress(first.address.0 + u64::from(take));
            first.len -= take;
            if first.len == 0 {
                self.data.pop_front();
            }
        }
        piece
    }
}

impl BlockService {
    /// Begins a request. Returns its token, unless it is already complete.
    pub(super) fn begin(&mut self, queue: u16, request: BlockRequest) -> Option<u64> {
        let len = request.len();
        let written = if matches!(request.kind, RequestKind::Read { .. }) { len as u32 } else { 0 };
        let sync = request.changes() && !self.chose(VIRTIO_BLK_F_FLUSH);
        let BlockRequest { head, kind, data, status } = request;
        let mut pending = InFlightRequest { queue, head, status, data: VecDeque::new(), written, sync, redo: false };
        let status = match kind {
            RequestKind::Read { offset } => {
                pending.data = data.into();
                return self.begin_transfer(pending, false, offset, len);
            }
            RequestKind::Write { offset } => {
                pending.data = data.into();
                return self.begin_transfer(pending, true, offset, len);
            }
            RequestKind::Flush => return self.begin_whole(pending, DiskOp::Flush),
            RequestKind::Discard { offset, len } => return self.begin_whole(pending, DiskOp::Discard { offset, len }),
            RequestKind::Zero { offset, len, unmap } => {
                return self.begin_whole(pending, DiskOp::Zero { offset, len, unmap });
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

    /// Begins a read or a write, which the disk cuts into pieces.
    fn begin_transfer(&mut self, pending: InFlightRequest, is_write: bool, offset: u64, len: u64) -> Option<u64> {
        let token = self.insert(pending);
        let begun = self.disk.begin_transfer(Transfer { token, is_write, offset, len });
        self.begun(token, begun)
    }

    /// Begins a request that is one operation without memory.
    fn begin_whole(&mut self, pending: InFlightRequest, operation: DiskOp) -> Option<u64> {
        let token = self.insert(pending);
        let begun = self.disk.submit(operation, token);
        self.begun(token, begun)
    }

    /// Ends a request that the disk refuses. Returns the token of one that it accepts.
    fn begun(&mut self, token: u64, begun: Result<(), DiskError>) -> Option<u64> {
        match begun {
            Ok(()) => Some(token),
            Err(error) => {
                self.finish(token, Err(&error));
                None
            }
        }
    }

    /// Gives the disk the memory of pieces that may begin now.
    pub(super) fn issue(&mut self, should_yield: &YieldRequest<'_>) {
        // The driver may have broken the rules in this turn, after its earlier requests began.
        if self.broken {
            return;
        }
        let (ram, pending) = (&self.ram, &mut self.pending);
        let mut short = None;
        #[cfg(test)]
        let is_short_of_memory = self.is_short_of_memory;
        let memory = |piece: &Transfer| {
            let mut request = pending.get_mut(&piece.token);
            // A request without memory of this length is refused by the disk.
            let data = request.as_mut().map(|request| request.cut(piece.len)).unwrap_or_default();
            // A read makes the device write to memory, so the pages must be this VM's own before
            // the kernel gets their address (I3).
            let access = if piece.is_write { Access::Read } else { Access::Write };
            let pinned = dma::pin(ram, OWNER, &data, access);
            #[cfg(test)]
            let pinned = if is_short_of_memory { Err(dma::out_of_memory()) } else { pinned };
            pinned.map_err(|error| {
                if error.is_transient()
                    && let Some(request) = request
                {
                    // A guest gives up a file system after one error of its disk.
                    request.redo = true;
                    short = Some(error.to_string());
                } else {
                    tracing::warn!(%error, "memory of a request");
                }
                DiskError::Memory(error.into())
            })
        };
        self.disk.issue(memory, || should_yield.is_set());
        if let Some(error) = short {
            self.wait_for_memory(&error);
        }
    }

    /// Notes that requests are to be repeated when there is memory.
    fn wait_for_memory(&mut self, error: &str) {
        let now = Instant::now();
        if self.memory_warned.is_none_or(|warned| now - warned >= MEMORY_WARN) {
            self.memory_warned = Some(now);
            let disk = self.disk.config().path.display();
            tracing::warn!(error, %disk, "requests to a disk wait for memory");
        }
        self.memory_wait = Some(now + MEMORY_WAIT);
    }

    /// Returns a request that has ended in the disk to the driver.
    pub(super) fn finish(&mut self, token: u64, result: Result<(), &DiskError>) {
        let Some(pending) = self.pending.get_mut(&token) else { return };
        if let Err(error) = result {
            tracing::debug!(%error, "a request to a disk failed");
        }
        let goes_on = !self.halting && !self.broken;
        if goes_on && pending.sync && result.is_ok() && !pending.redo {
            pending.sync = false;
            let flush = self.disk.submit(DiskOp::Flush, token);
            self.begun(token, flush);
            return;
        }
        let Some(mut pending) = self.pending.remove(&token) else { return };
        self.replaying.remove(&token);
        if pending.redo && goes_on {
            return self.replay_queue.push_back(InFlight { queue: pending.queue, head: pending.head });
        }
        if result.is_err() {
            pending.written = 0;
        }
        let status = if result.is_ok() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
        self.add_used(&pending, status);
    }
}
