//! The interface of the bare guest's disk driver: its commands, and the layout of its queue.
//!
//! # The area
//!
//! | offset | content |
//! |---|---|
//! | [`STATE`] | the driver's own words, see [`state`] |
//! | [`DESCRIPTORS`] | the descriptor table: operation `n` in flight has descriptors `3n`, `3n + 1` and `3n + 2` |
//! | [`AVAILABLE`], [`USED`] | the rings |
//! | [`HEADERS`] | for operation `n` in flight, [`HEADER_STRIDE`] bytes: the request's header, and its status at 16 |

use super::{PAGE_SIZE, fill_word, mix, scale};

/// Pages of an area.
pub const AREA_PAGES: u64 = 6;
/// The driver's own words.
pub const STATE: u64 = 0;
/// Descriptors.
pub const DESCRIPTORS: u64 = PAGE_SIZE;
/// The available ring.
pub const AVAILABLE: u64 = 2 * PAGE_SIZE;
/// The used ring.
pub const USED: u64 = 3 * PAGE_SIZE;
/// Headers and status bytes.
pub const HEADERS: u64 = 4 * PAGE_SIZE;
/// Distance between headers.
pub const HEADER_STRIDE: u64 = 32;
/// Most operations in flight: three descriptors each.
pub const MOST_DEPTH: u64 = 85;
/// A flag in the count of wrong words: the device returned an operation that it did not have, or
/// returned one twice.
pub const VIOLATION: u64 = 1 << 63;
/// Bytes in a sector.
pub const SECTOR: u64 = 512;

/// The driver's own words, by index.
pub mod state {
    /// Address of the device's registers; 0 after a reset.
    pub const REGISTERS: u64 = 0;
    /// Descriptors in the queue.
    pub const SIZE: u64 = 1;
    /// Entries of the available ring filled so far.
    pub const AVAILABLE: u64 = 2;
    /// Entries of the used ring read so far.
    pub const USED: u64 = 3;
    /// Features negotiated.
    pub const FEATURES: u64 = 4;
    /// Notifications of the device.
    pub const KICKS: u64 = 5;
    /// Increments of the words between two operations' memory, see [`super::touched`].
    pub const TOUCHED: u64 = 6;
    /// The first of the words with the number of each operation in flight, plus 1.
    pub const FLIGHT: u64 = 16;
}

/// Returns whether a queue may be there.
pub const fn is_place(slot: u64, area: u64, size: u64) -> bool {
    slot < 512 && area.is_multiple_of(PAGE_SIZE) && area != 0 && size <= 256 && size >= 4 && size.is_power_of_two()
}

numbered! {
    /// The kind of an operation.
    What: u64 {
        /// Reads, without a check.
        Read = 0,
        /// Writes [`word_at`] for each word.
        Write = 1,
        /// Reads, and compares with [`word_at`].
        Verify = 2,
        /// Makes everything durable.
        Flush = 3,
        /// Makes zeros.
        Zero = 4,
        /// Discards.
        Discard = 5,
        /// Reads, and compares with zeros.
        VerifyZero = 6,
        /// Writes the buffers' contents.
        WriteRaw = 7,
    }
}

numbered! {
    /// The order of the blocks.
    Order: u64 {
        /// One after the other, and again from the beginning.
        Sequential = 0,
        /// Drawn from the seed.
        Random = 1,
    }
}

/// Operations on a disk, `depth` at a time. The device is notified once for all operations started
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRun {
    /// The driver's area.
    pub area: u64,
    /// Memory for the data: `depth` times `block` sectors, or `depth` times `stride` bytes. A
    /// multiple of 8.
    pub buffer: u64,
    /// Bytes from one operation's memory to the next's; 0 stands for its length. The CPU increments
    /// the first word in between, slot after slot, for as long as the run goes on: neighbours of
    /// the device's data. See [`touched`].
    pub stride: u64,
    /// The kind of the operations.
    pub what: What,
    /// Their order.
    pub order: Order,
    /// Operations in flight.
    pub depth: u64,
    /// First sector.
    pub sector: u64,
    /// Sectors in use from there on; whole blocks of them.
    pub sectors: u64,
    /// Sectors an operation.
    pub block: u64,
    /// Operations; 0 is for ever.
    pub count: u64,
    /// Seed of the data, and of the order.
    pub seed: u64,
}

impl DiskRun {
    pub(super) const fn encode(self) -> [u64; 8] {
        let how = self.what as u64 | (self.order as u64) << 8 | self.depth << 16 | self.block << 32;
        [self.area, self.buffer, how, self.sector, self.sectors, self.count, self.seed, self.stride]
    }

    pub(super) const fn decode(args: [u64; 8]) -> Option<Self> {
        let [area, buffer, how, sector, sectors, count, seed, stride] = args;
        let (depth, block) = (how >> 16 & 0xffff, how >> 32);
        let (Some(what), Some(order)) = (What::from_number(how & 0xff), Order::from_number(how >> 8 & 0xff)) else {
            return None;
        };
        let fits = depth >= 1 && depth <= MOST_DEPTH && block >= 1 && block <= sectors && sectors <= 1 << 40;
        let apart = stride == 0 || (stride.is_multiple_of(8) && stride >= block * SECTOR && stride <= 1 << 20);
        if fits && apart && area != 0 && area.is_multiple_of(PAGE_SIZE) && buffer.is_multiple_of(8) {
            Some(Self { area, buffer, stride, what, order, depth, sector, sectors, block, count, seed })
        } else {
            None
        }
    }

    /// Returns the first sector of operation `i`.
    pub const fn sector_of(&self, i: u64) -> u64 {
        let blocks = self.sectors / self.block;
        let block = match self.order {
            Order::Sequential => i % blocks,
            Order::Random => scale(mix(self.seed ^ mix(i)), blocks),
        };
        self.sector + block * self.block
    }

    /// Returns the address of the memory of operation `slot` in flight.
    pub const fn memory_of(&self, slot: u64) -> u64 {
        let stride = if self.stride == 0 { self.block_bytes() } else { self.stride };
        self.buffer + slot * stride
    }

    /// Returns the address of the word behind the memory of operation `slot`, which the CPU
    /// increments. None without a stride.
    pub const fn neighbour_of(&self, slot: u64) -> Option<u64> {
        if self.stride > self.block_bytes() { Some(self.memory_of(slot) + self.block_bytes()) } else { None }
    }

    /// Bytes an operation.
    pub const fn block_bytes(&self) -> u64 {
        self.block * SECTOR
    }
}

/// Returns how often the word of slot `slot` of `depth` was incremented after `count` increments in
/// all.
pub const fn touched(count: u64, slot: u64, depth: u64) -> u64 {
    (count + depth - 1 - slot) / depth
}

/// Returns the word that a write of `seed` puts at byte `offset` of the disk.
#[inline(always)]
pub const fn word_at(seed: u64, offset: u64) -> u64 {
    fill_word(seed, offset)
}

/// Computes, on the host, the contents of the sectors from `sector` on after a write of `seed`.
pub fn pattern(bytes: &mut [u8], seed: u64, sector: u64) {
    for (word, offset) in bytes.chunks_exact_mut(8).zip((sector * SECTOR..).step_by(8)) {
        word.copy_from_slice(&word_at(seed, offset).to_le_bytes());
    }
}
