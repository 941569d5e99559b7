//! Inodes, and the extents of their content, which is always contiguous.

use std::io;

use super::BLOCK;
use super::layout::{INODE_SIZE, put16, put32};
use crate::tree::Meta;

/// Maximum number of blocks in an extent.
const EXTENT: u32 = 32_768;
/// Maximum number of extents in an inode, and of leaves.
pub(super) const MAX_EXTENTS: u32 = 4;
/// Extents in a leaf.
const PER_LEAF: u32 = ((BLOCK - 12) / 12) as u32;
/// Number of blocks in a leaf's extents.
pub(super) const LEAF_BLOCKS: u64 = PER_LEAF as u64 * EXTENT as u64;
const EXTENTS_FLAG: u64 = 0x8_0000;
/// Maximum number of links of a directory. Above it, the field is 1, which means unknown.
const MAX_SUBDIRECTORIES: u32 = 65_000;

const FIFO: u16 = 0o010_000;
const CHAR: u16 = 0o020_000;
const DIRECTORY: u16 = 0o040_000;
const BLOCK_DEVICE: u16 = 0o060_000;
const FILE: u16 = 0o100_000;
const LINK: u16 = 0o120_000;

/// Number of leaves for the extents of so many blocks. 0 if the inode has room.
pub(super) fn extent_leaves(blocks: u32) -> u32 {
    let extents = blocks.div_ceil(EXTENT);
    if extents <= MAX_EXTENTS { 0 } else { extents.div_ceil(PER_LEAF) }
}

fn header(bytes: &mut [u8], entries: u32, most: u32, depth: u16) {
    put16(bytes, 0, 0xf30a);
    put16(bytes, 2, entries as u16);
    put16(bytes, 4, most as u16);
    put16(bytes, 6, depth);
}

/// Writes the extents of `blocks` blocks from `first` on, beginning with extent `from`.
fn extents(bytes: &mut [u8], first: u32, blocks: u32, from: u32, most: u32, depth: u16) {
    let count = (blocks.div_ceil(EXTENT) - from).min(most);
    header(bytes, count, most, depth);
    for index in 0..count {
        let start = (from + index) * EXTENT;
        let entry = &mut bytes[12 + 12 * index as usize..][..12];
        put32(entry, 0, u64::from(start));
        put16(entry, 4, (blocks - start).min(EXTENT) as u16);
        put32(entry, 8, u64::from(first + start));
    }
}

/// Writes the leaves of a file, if needed.
pub(super) fn write_leaves(
    first: u32,
    blocks: u32,
    mut write: impl FnMut(u32, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    (0..extent_leaves(blocks)).try_for_each(|leaf| {
        let mut bytes = [0; BLOCK];
        extents(&mut bytes, first, blocks, leaf * PER_LEAF, PER_LEAF, 0);
        write(leaf, &bytes)
    })
}

/// The bytes of an inode.
#[derive(Clone, Debug)]
pub(super) struct Inode([u8; INODE_SIZE]);

impl Inode {
    pub(super) fn new(meta: &Meta) -> Self {
        let mut inode = Self([0; INODE_SIZE]);
        let bytes = &mut inode.0;
        put16(bytes, 0, meta.mode & 0o7777);
        put16(bytes, 2, meta.uid as u16);
        put16(bytes, 24, meta.gid as u16);
        put16(bytes, 120, (meta.uid >> 16) as u16);
        put16(bytes, 122, (meta.gid >> 16) as u16);
        // 34 bits: the high two are in the extra field.
        let time = meta.mtime.clamp(i64::from(i32::MIN), (3 << 32) + i64::from(i32::MAX));
        let epoch = ((time - i64::from(time as i32)) >> 32) as u64 & 3;
        for (low, extra) in [(8, 140), (12, 132), (16, 136)] {
            put32(bytes, low, time as u64);
            put32(bytes, extra, epoch);
        }
        put16(bytes, 128, 32);
        inode
    }

    /// A directory of root, with its content.
    pub(super) fn directory(mode: u16, links: u32, first: u32, blocks: u32) -> Self {
        let mut inode = Self::new(&Meta { mode, ..Meta::default() });
        inode.set_directory(links);
        inode.set_extents(first, blocks, u64::from(blocks) * BLOCK as u64);
        inode
    }

    pub(super) fn bytes(&self) -> &[u8; INODE_SIZE] {
        &self.0
    }

    fn set_kind(&mut self, kind: u16, links: u32) {
        let mode = u16::from_le_bytes([self.0[0], self.0[1]]);
        put16(&mut self.0, 0, mode & 0o7777 | kind);
        put16(&mut self.0, 26, links as u16);
    }

    pub(super) fn set_directory(&mut self, links: u32) {
        self.set_kind(DIRECTORY, if links >= MAX_SUBDIRECTORIES { 1 } else { links });
    }

    pub(super) fn set_file(&mut self, links: u32) {
        self.set_kind(FILE, links);
    }

    pub(super) fn set_fifo(&mut self, links: u32) {
        self.set_kind(FIFO, links);
    }

    pub(super) fn set_link(&mut self, links: u32) {
        self.set_kind(LINK, links);
    }

    /// A link whose target is in the inode.
    pub(super) fn set_fast_link(&mut self, target: &[u8], links: u32) {
        self.set_link(links);
        self.0[40..40 + target.len()].copy_from_slice(target);
        self.set_size(target.len() as u64);
    }

    pub(super) fn set_device(&mut self, is_block: bool, major: u32, minor: u32, links: u32) {
        self.set_kind(if is_block { BLOCK_DEVICE } else { CHAR }, links);
        if major < 256 && minor < 256 {
            put32(&mut self.0, 40, u64::from(major << 8 | minor));
        } else {
            put32(&mut self.0, 44, u64::from((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)));
        }
    }

    fn set_size(&mut self, size: u64) {
        put32(&mut self.0, 4, size);
        put32(&mut self.0, 108, size >> 32);
    }

    /// Contiguous content.
    pub(super) fn set_extents(&mut self, first: u32, blocks: u32, size: u64) {
        self.set_size(size);
        put32(&mut self.0, 32, EXTENTS_FLAG);
        let leaves = extent_leaves(blocks);
        let tree = &mut self.0[40..100];
        if leaves == 0 {
            extents(tree, first, blocks, 0, MAX_EXTENTS, 0);
        } else {
            header(tree, leaves, MAX_EXTENTS, 1);
            for leaf in 0..leaves {
                let entry = &mut tree[12 + 12 * leaf as usize..][..12];
                put32(entry, 0, u64::from(leaf) * LEAF_BLOCKS);
                put32(entry, 4, u64::from(first + blocks + leaf));
            }
        }
        self.add_blocks(blocks);
    }

    /// Adds the inode's own blocks to its count, in sectors.
    pub(super) fn add_blocks(&mut self, blocks: u32) {
        let low = u32::from_le_bytes([self.0[28], self.0[29], self.0[30], self.0[31]]);
        let sectors = u64::from(low) + u64::from(blocks) * (BLOCK as u64 / 512);
        put32(&mut self.0, 28, sectors);
    }

    pub(super) fn set_xattrs(&mut self, block: u32) {
        put32(&mut self.0, 104, u64::from(block));
        self.add_blocks(1);
    }
}
