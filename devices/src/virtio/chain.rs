//! A chain of buffers, read once.
//!
//! Each descriptor is read once, and an indirect table is copied before it is checked. So the guest
//! cannot change anything between check and use. An invalid chain is an error, not a shorter chain.

use clade_memory::GuestRam;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::queue::QueueError;

/// Maximum bytes in a chain, by the specification.
const MAX_BYTES: u64 = 1 << 32;
/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: u32 = size_of::<Descriptor>() as u32;

/// A guest-physical buffer that was checked to be in one region of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of its first byte.
    pub address: GuestAddress,
    /// Length in bytes; never 0.
    pub len: u32,
}

/// A chain of buffers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The index of its first descriptor, which names it in the used ring.
    pub head: u16,
    /// Buffers that the device reads.
    pub readable: Vec<Segment>,
    /// Buffers that the device writes.
    pub writable: Vec<Segment>,
}

/// A walk along a chain.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    ram: &'a GuestRam,
    /// Descriptors in the queue: also the maximum number of buffers in a chain, in the queue or in
    /// a table.
    size: u16,
    left: u16,
    bytes: u64,
    chain: Chain,
}

impl<'a> Walk<'a> {
    pub(super) fn new(ram: &'a GuestRam, size: u16, head: u16) -> Self {
        Self { ram, size, left: size, bytes: 0, chain: Chain { head, ..Chain::default() } }
    }

    /// The chain of all buffers taken.
    pub(super) fn end(self) -> Chain {
        self.chain
    }

    /// Whether `descriptor` refers to a table, instead of a buffer.
    pub(super) fn is_table(descriptor: &Descriptor) -> bool {
        has(descriptor, VRING_DESC_F_INDIRECT)
    }

    /// Takes a buffer. Returns the index of the next one, if any.
    pub(super) fn buffer(&mut self, descriptor: &Descriptor) -> Result<Option<u16>, QueueError> {
        let (head, size) = (self.chain.head, self.size);
        // This also ends loops.
        self.left = self.left.checked_sub(1).ok_or(QueueError::Endless { head, size })?;
        let segment = self.segment(descriptor)?;
        self.bytes += u64::from(segment.len);
        if self.bytes > MAX_BYTES {
            return Err(QueueError::TooLong { head });
        }
        if has(descriptor, VRING_DESC_F_WRITE) {
            self.chain.writable.push(segment);
        } else if self.chain.writable.is_empty() {
            self.chain.readable.push(segment);
        } else {
            return Err(QueueError::Order { head });
        }
        Ok(has(descriptor, VRING_DESC_F_NEXT).then(|| descriptor.next()))
    }

    /// Takes the buffers of the table that `descriptor` refers to, which end the chain. The write
    /// flag of the descriptor is ignored.
    pub(super) fn table(&mut self, descriptor: &Descriptor) -> Result<(), QueueError> {
        let (head, size, len) = (self.chain.head, self.size, descriptor.len());
        if has(descriptor, VRING_DESC_F_NEXT) {
            return Err(QueueError::BehindTable { head });
        }
        let entries = len / DESCRIPTOR;
        if len == 0 || !len.is_multiple_of(DESCRIPTOR) || entries > u32::from(size) {
            return Err(QueueError::TableLength { head, len, size });
        }
        let Segment { address, .. } = self.segment(descriptor)?;
        let gone = |_| QueueError::Outside { head, address: address.0, len };
        let mut table = vec![Descriptor::default(); entries as usize];
        // At any address: the specification requires no alignment, and a copy needs none.
        self.ram.memory().get_slice(address, len as usize).map_err(gone)?.copy_to(&mut table);
        let mut next = Some(0);
        while let Some(index) = next {
            let entry = table.get(usize::from(index)).ok_or(QueueError::TableIndex { head, index, entries })?;
            if Self::is_table(entry) {
                return Err(QueueError::Nested { head });
            }
            next = self.buffer(entry)?;
        }
        Ok(())
    }

    fn segment(&self, descriptor: &Descriptor) -> Result<Segment, QueueError> {
        let (head, address, len) = (self.chain.head, descriptor.addr(), descriptor.len());
        if len == 0 {
            return Err(QueueError::Empty { head });
        }
        let outside = QueueError::Outside { head, address: address.0, len };
        let Some((region, _)) = self.ram.locate(address) else { return Err(outside) };
        // Regions do not touch, so a buffer that leaves one is in a hole.
        let left = region.len() - (address.0 - region.start_addr().0);
        if u64::from(len) <= left { Ok(Segment { address, len }) } else { Err(outside) }
    }
}

fn has(descriptor: &Descriptor, flag: u32) -> bool {
    u32::from(descriptor.flags()) & flag != 0
}
