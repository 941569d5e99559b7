//! Superblock, group descriptors and bitmaps.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{BLOCK, Ext4Error, FIRST_INODE};

/// Bytes of an inode.
pub(super) const INODE_SIZE: usize = 256;
const INODES_PER_BLOCK: u64 = (BLOCK / INODE_SIZE) as u64;
/// Number of bits in a bitmap of one block.
const PER_GROUP: u64 = 8 * BLOCK as u64;
const DESCRIPTOR: usize = 32;
/// Block and inode numbers have 32 bits.
const MAX_BLOCKS: u64 = u32::MAX as u64 - PER_GROUP;

const COMPAT: u32 = 0x8 | 0x20 | 0x200; // ext_attr, dir_index, sparse_super2: no copies of the superblock
const INCOMPAT: u32 = 0x2 | 0x40 | 0x200; // filetype, extents, flex_bg: bitmaps may be anywhere
const RO_COMPAT: u32 = 0x2 | 0x20 | 0x40; // large_file, dir_nlink, extra_isize

/// The size of each part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    blocks: u64,
    groups: u64,
    inodes_per_group: u64,
}

/// The blocks and inodes in use.
#[derive(Debug)]
pub(super) struct UsedBlocks {
    /// Number of used blocks, from the first on.
    pub(super) blocks: u64,
    /// Number of used inodes, from the first on.
    pub(super) inodes: u32,
    pub(super) directories: u32,
}

impl Geometry {
    pub(super) fn new(content: u64, free: u64, inodes: u64, free_inodes: u64) -> Result<Self, Ext4Error> {
        let inodes = inodes + free_inodes;
        let mut groups = inodes.div_ceil(PER_GROUP).max(1);
        loop {
            let inodes_per_group = inodes.div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
            let mut geometry = Self { blocks: 0, groups, inodes_per_group };
            geometry.blocks = geometry.content() + content + free;
            if geometry.blocks > MAX_BLOCKS {
                return Err(Ext4Error::TooLarge { what: "blocks", found: geometry.blocks, limit: MAX_BLOCKS });
            }
            let needed = geometry.blocks.div_ceil(PER_GROUP);
            if needed <= groups {
                // Groups needed only for their inodes have blocks too.
                geometry.blocks = geometry.blocks.max((groups - 1) * PER_GROUP + PER_GROUP / 2);
                return Ok(geometry);
            }
            groups = needed;
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    fn descriptor_blocks(&self) -> u64 {
        (self.groups * DESCRIPTOR as u64).div_ceil(BLOCK as u64)
    }

    fn block_bitmap(&self, group: u64) -> u64 {
        1 + self.descriptor_blocks() + group
    }

    fn inode_bitmap(&self, group: u64) -> u64 {
        self.block_bitmap(self.groups) + group
    }

    fn inode_table(&self, group: u64) -> u64 {
        self.inode_bitmap(self.groups) + group * (self.inodes_per_group / INODES_PER_BLOCK)
    }

    /// The first block of content.
    pub(super) fn content(&self) -> u64 {
        self.inode_table(self.groups)
    }

    /// The offset of an inode: the tables are contiguous.
    pub(super) fn inode_offset(&self, number: u32) -> u64 {
        self.inode_table(0) * BLOCK as u64 + u64::from(number - 1) * INODE_SIZE as u64
    }

    pub(super) fn write(&self, used: &UsedBlocks, dirs: &[u32], seed: &[u8; 32], disk: &File) -> io::Result<()> {
        debug_assert_eq!(dirs.len(), used.directories as usize);
        let mut dirs_of = vec![0u16; self.groups as usize];
        for inode in dirs {
            // A group has at most 32,768 inodes.
            dirs_of[((u64::from(*inode) - 1) / self.inodes_per_group) as usize] += 1;
        }
        let mut descriptors = vec![0; (self.descriptor_blocks() as usize) * BLOCK];
        for group in 0..self.groups {
            let first = group * PER_GROUP;
            let here = (self.blocks - first).min(PER_GROUP);
            let used_blocks = used.blocks.saturating_sub(first).min(here);
            let first_inode = group * self.inodes_per_group;
            let used_inodes = u64::from(used.inodes).saturating_sub(first_inode).min(self.inodes_per_group);
            let write = |block: u64, used, here| disk.write_all_at(&bitmap(used, here), block * BLOCK as u64);
            write(self.block_bitmap(group), used_blocks, here)?;
            write(self.inode_bitmap(group), used_inodes, self.inodes_per_group)?;
            let descriptor = &mut descriptors[group as usize * DESCRIPTOR..][..DESCRIPTOR];
            put32(descriptor, 0, self.block_bitmap(group));
            put32(descriptor, 4, self.inode_bitmap(group));
            put32(descriptor, 8, self.inode_table(group));
            put16(descriptor, 12, (here - used_blocks) as u16);
            put16(descriptor, 14, (self.inodes_per_group - used_inodes) as u16);
            put16(descriptor, 16, dirs_of[group as usize]);
        }
        disk.write_all_at(&descriptors, BLOCK as u64)?;
        disk.write_all_at(&self.superblock(used, seed), 1024)
    }

    fn superblock(&self, used: &UsedBlocks, seed: &[u8; 32]) -> [u8; 1024] {
        let mut block = [0; 1024];
        let inodes = self.groups * self.inodes_per_group;
        put32(&mut block, 0, inodes);
        put32(&mut block, 4, self.blocks);
        put32(&mut block, 12, self.blocks - used.blocks);
        put32(&mut block, 16, inodes - u64::from(used.inodes));
        put32(&mut block, 24, 2); // 4096 is 1024 << 2
        put32(&mut block, 28, 2);
        put32(&mut block, 32, PER_GROUP);
        put32(&mut block, 36, PER_GROUP);
        put32(&mut block, 40, self.inodes_per_group);
        put16(&mut block, 54, u16::MAX); // never checked for its age
        put16(&mut block, 56, 0xef53);
        put16(&mut block, 58, 1); // clean
        put16(&mut block, 60, 1); // goes on after errors
        put32(&mut block, 76, 1);
        put32(&mut block, 84, u64::from(FIRST_INODE));
        put16(&mut block, 88, INODE_SIZE as u16);
        put32(&mut block, 92, u64::from(COMPAT));
        put32(&mut block, 96, u64::from(INCOMPAT));
        put32(&mut block, 100, u64::from(RO_COMPAT));
        block[104..120].copy_from_slice(&seed[..16]);
        // The version of the UUID is that of random bits.
        block[110] = block[110] & 0x0f | 0x40;
        block[112] = block[112] & 0x3f | 0x80;
        block[120..125].copy_from_slice(b"clade");
        block[236..252].copy_from_slice(&seed[16..]);
        block[252] = 1; // half MD4
        put16(&mut block, 348, 32);
        put16(&mut block, 350, 32);
        put32(&mut block, 352, 1); // signed hashes
        block[372] = 4;
        block
    }
}

/// A bitmap with the first `used` bits set, and all bits beyond the group.
fn bitmap(used: u64, here: u64) -> [u8; BLOCK] {
    let mut bits = [0; BLOCK];
    let (used, here) = (used as usize, here as usize);
    bits[..used / 8].fill(0xff);
    if !used.is_multiple_of(8) {
        bits[used / 8] = (1 << (used % 8)) - 1;
    }
    (here..PER_GROUP as usize).for_each(|bit| bits[bit / 8] |= 1 << (bit % 8));
    bits
}

pub(super) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes the low 32 bits.
pub(super) fn put32(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}
