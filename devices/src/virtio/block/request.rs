//! Requests of a block device's driver.
//!
//! The specification lets a driver split a request into any buffers. The first 16 readable bytes
//! are the header. The last writable byte is the status. The rest is data.

use clade_memory::GuestRam;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestAddress;

use crate::virtio::chain::{Chain, Segment};
use crate::virtio::dma;
use crate::virtio::queue::QueueError;
use clade_block::SECTOR;

/// Bytes of the header.
const HEADER: usize = 16;
/// Bytes in the description of a range to discard or to zero.
const RANGE: usize = 16;
/// Flag of such a range: its room may be freed.
const UNMAP: u32 = 1;
/// Maximum number of sectors in such a range, and so in one request.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 16;

/// The operation of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RequestKind {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    Id,
    Discard {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    /// Known but invalid: the status is IOERR.
    Invalid,
    /// Unknown: the status is UNSUPP.
    Unknown,
}

/// A parsed request. Every byte of the chain is read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockRequest {
    pub(super) head: u16,
    pub(super) kind: RequestKind,
    /// The data buffers: readable ones for a write, writable ones for a read.
    pub(super) data: Vec<Segment>,
    pub(super) status: GuestAddress,
}

impl BlockRequest {
    /// Length of the data in bytes.
    pub(super) fn len(&self) -> u64 {
        dma::len_of(&self.data)
    }

    /// Bytes for the limiter. Zeroed and discarded ranges count too: they can cost the host as much
    /// as a write.
    pub(super) fn cost(&self) -> u64 {
        match self.kind {
            RequestKind::Read { .. } | RequestKind::Write { .. } => self.len(),
            RequestKind::Discard { len, .. } | RequestKind::Zero { len, .. } => len,
            RequestKind::Flush | RequestKind::Id | RequestKind::Invalid | RequestKind::Unknown => 0,
        }
    }

    /// Whether it changes the disk.
    pub(super) fn changes(&self) -> bool {
        matches!(self.kind, RequestKind::Write { .. } | RequestKind::Discard { .. } | RequestKind::Zero { .. })
    }

    /// Parses the request in `chain`.
    ///
    /// # Errors
    /// When it has no header, or no room for the status: then only the whole device can report an
    /// error.
    pub(super) fn parse(ram: &GuestRam, chain: &Chain) -> Result<Self, QueueError> {
        let head = chain.head;
        let content = |what| QueueError::Content { head, what };
        let mut header = [0; HEADER];
        let data = dma::copy_in(ram, &chain.readable, &mut header).map_err(|_| content("has no header"))?;
        let (status, room) = split_status(&chain.writable).ok_or_else(|| content("has no room for the status"))?;
        let [kind, _reserved, ..] = [word(&header, 0), word(&header, 4)];
        let sector = u64::from(word(&header, 8)) | u64::from(word(&header, 12)) << 32;
        let offset = sector.checked_mul(SECTOR);
        let transfer = |segments: &[Segment]| {
            let len = dma::len_of(segments);
            offset.filter(|_| len > 0 && len.is_multiple_of(SECTOR))
        };
        let (kind, data) = match kind {
            VIRTIO_BLK_T_IN => {
                (transfer(&room).map_or(RequestKind::Invalid, |offset| RequestKind::Read { offset }), room)
            }
            VIRTIO_BLK_T_OUT => {
                (transfer(&data).map_or(RequestKind::Invalid, |offset| RequestKind::Write { offset }), data)
            }
            VIRTIO_BLK_T_FLUSH => (RequestKind::Flush, Vec::new()),
            VIRTIO_BLK_T_GET_ID => (RequestKind::Id, room),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                (range(ram, &data, kind == VIRTIO_BLK_T_DISCARD), Vec::new())
            }
            _ => (RequestKind::Unknown, Vec::new()),
        };
        Ok(Self { head, kind, data, status })
    }
}

fn word(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The address of the last byte of `segments`, and all bytes before it.
fn split_status(segments: &[Segment]) -> Option<(GuestAddress, Vec<Segment>)> {
    let mut room = segments.to_vec();
    let last = room.last_mut()?;
    last.len -= 1;
    let status = GuestAddress(last.address.0 + u64::from(last.len));
    if last.len == 0 {
        room.pop();
    }
    Some((status, room))
}

/// Parses the one range of a discard or of a write of zeros.
fn range(ram: &GuestRam, data: &[Segment], discard: bool) -> RequestKind {
    let mut bytes = [0; RANGE];
    if dma::len_of(data) != RANGE as u64 || dma::copy_in(ram, data, &mut bytes).is_err() {
        return RequestKind::Invalid;
    }
    let sector = u64::from(word(&bytes, 0)) | u64::from(word(&bytes, 4)) << 32;
    let (sectors, flags) = (word(&bytes, 8), word(&bytes, 12));
    // By the specification, a device fails unknown flags, and any flag of a discard, as
    // unsupported.
    if flags & !UNMAP != 0 || (discard && flags != 0) {
        return RequestKind::Unknown;
    }
    let (Some(offset), len) = (sector.checked_mul(SECTOR), u64::from(sectors) * SECTOR) else {
        return RequestKind::Invalid;
    };
    match (sectors, discard) {
        (1..=MAX_RANGE_SECTORS, true) => RequestKind::Discard { offset, len },
        (1..=MAX_RANGE_SECTORS, false) => RequestKind::Zero { offset, len, unmap: flags & UNMAP != 0 },
        _ => RequestKind::Invalid,
    }
}
