//! The bare guest's disk driver: what it is told, and where it keeps its queue.
//!
//! # The area
//!
//! | offset | what |
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
/// From one header to the next.
pub const HEADER_STRIDE: u64 = 32;
/// Most operations in flight: three descriptors each.
pub const MOST_DEPTH: u64 = 85;
/// In the count of wrong words: the device gave back what it did not have, or gave it back twice.
pub const VIOLATION: u64 = 1 << 63;
/// Bytes in a sector.
pub const SECTOR: u64 = 512;

/// The driver's own words, by index.
pub mod state {
    /// Where the device's registers are; 0 when it was reset.
    pub const REGISTERS: u64 = 0;
    /// Descriptors in the queue.
    pub const SIZE: u64 = 1;
    /// Entries of the available ring that were filled, ever.
    pub const AVAILABLE: u64 = 2;
    /// Entries of the used ring that were looked at, ever.
    pub const USED: u64 = 3;
    /// Features negotiated.
    pub const FEATURES: u64 = 4;
    /// Times the device was notified.
    pub const KICKS: u64 = 5;
    /// Times a word between two operations' memory was counted up, see [`super::touched`].
    pub const TOUCHED: u64 = 6;
    /// The first of the words that say for each operation in flight which it is, plus 1.
    pub const FLIGHT: u64 = 16;
}

/// Whether a queue can be there.
pub const fn is_place(slot: u64, area: u64, size: u64) -> bool {
    slot < 512 && area.is_multiple_of(PAGE_SIZE) && area != 0 && size <= 256 && size >= 4 && size.is_power_of_two()
}

numbered! {
    /// What an operation does.
    What: u64 {
        /// Reads, and does not look.
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
        /// Writes what is in the buffers.
        WriteRaw = 7,
    }
}

numbered! {
    /// In which order the blocks come.
    Order: u64 {
        /// One after the other, and again from the beginning.
        Sequential = 0,
        /// Drawn from the seed.
        Random = 1,
    }
}

/// Operations on a disk, `depth` at a time. The device is notified once for as many as could be started at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRun {
    /// The driver's area.
    pub area: u64,
    /// Memory for the data: `depth` times `block` sectors, or `depth` times `stride` bytes. A multiple of 8.
    pub buffer: u64,
    /// Bytes from one operation's memory to the next's; 0 stands for as many as it has. The first word of what is between is counted up
    /// by the CPU, slot after slot, for as long as the run goes on: neighbours of what the device reads and writes. See [`touched`].
    pub stride: u64,
    /// What to do.
    pub what: What,
    /// In which order.
    pub order: Order,
    /// How many at a time.
    pub depth: u64,
    /// First sector.
    pub sector: u64,
    /// Sectors from there on that are used; whole blocks of them.
    pub sectors: u64,
    /// Sectors an operation.
    pub block: u64,
    /// Operations; 0 is for ever.
    pub count: u64,
    /// Of the data, and of the order.
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

    /// The first sector of operation `i`.
    pub const fn sector_of(&self, i: u64) -> u64 {
        let blocks = self.sectors / self.block;
        let block = match self.order {
            Order::Sequential => i % blocks,
            Order::Random => scale(mix(self.seed ^ mix(i)), blocks),
        };
        self.sector + block * self.block
    }

    /// Where the memory of operation `slot` in flight is.
    pub const fn memory_of(&self, slot: u64) -> u64 {
        let stride = if self.stride == 0 { self.block_bytes() } else { self.stride };
        self.buffer + slot * stride
    }

    /// Where the word behind the memory of operation `slot` is, which the CPU counts up. None without a stride.
    pub const fn neighbour_of(&self, slot: u64) -> Option<u64> {
        if self.stride > self.block_bytes() { Some(self.memory_of(slot) + self.block_bytes()) } else { None }
    }

    /// Bytes an operation.
    pub const fn block_bytes(&self) -> u64 {
        self.block * SECTOR
    }
}

/// How often the word of slot `slot` of `depth` was counted up when all together were `count` times.
pub const fn touched(count: u64, slot: u64, depth: u64) -> u64 {
    (count + depth - 1 - slot) / depth
}

/// The word that a write of `seed` puts at byte `offset` of the disk.
#[inline(always)]
pub const fn word_at(seed: u64, offset: u64) -> u64 {
    fill_word(seed, offset)
}

/// What `sectors` sectors from `sector` on hold after a write of `seed`, on the host.
pub fn pattern(bytes: &mut [u8], seed: u64, sector: u64) {
    for (word, offset) in bytes.chunks_exact_mut(8).zip((sector * SECTOR..).step_by(8)) {
        word.copy_from_slice(&word_at(seed, offset).to_le_bytes());
    }
}
