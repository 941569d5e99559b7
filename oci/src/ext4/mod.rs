//! An ext4 file system of a tree. The same tree and seed make the same bytes.
//!
//! Blocks are allocated in sequence: superblock and group descriptors, bitmaps, inode tables, then
//! content. Free space follows, so a bitmap is determined by a number. There is no journal: a VM's
//! writes go to an overlay that ends with it. Metadata has no checksums, which the tool that checks
//! the result does not need.
//!
//! | structure | file |
//! |---|---|
//! | superblock, group descriptors, bitmaps | `layout.rs` |
//! | inodes, extents | `inode.rs` |
//! | directories | `dir.rs` |
//! | extended attributes | `xattr.rs` |

mod dir;
mod inode;
mod layout;
mod xattr;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::tree::{Content, NodeId, ROOT, Tree};
use crate::xattr_rules::XATTR_BLOCK;
use dir::{DirName, blocks_of_directory, write_directory};
use inode::{Inode, MAX_EXTENTS, extent_leaves, write_leaves};
use layout::{Geometry, UsedBlocks};

/// Bytes of a block.
const BLOCK: usize = XATTR_BLOCK;
const ROOT_INODE: u32 = 2;
/// The first inode that is not reserved: `lost+found`.
const FIRST_INODE: u32 = 11;
const LOST_FOUND: &[u8] = b"lost+found";
/// Shorter link targets are in the inode.
const FAST_LINK: usize = 60;
/// Free space for a guest, beside the image's content.
pub(crate) const FREE: u64 = 1 << 30;
/// Free bytes per free inode.
const BYTES_PER_INODE: u64 = 16 << 10;
const CHUNK: usize = 1 << 20;

/// Why a tree cannot be written as a file system.
#[derive(Debug, Error)]
pub enum Ext4Error {
    /// The disk cannot be written.
    #[error("the disk cannot be written")]
    Write(#[source] io::Error),
    /// The tree exceeds a limit of the format.
    #[error("the disk would have {what} {found}; {limit} are possible")]
    TooLarge {
        /// The item.
        what: &'static str,
        /// Its number.
        found: u64,
        /// The limit.
        limit: u64,
    },
}

/// Blocks of one node, in order: of its attributes, its content, its extents.
#[derive(Clone, Copy, Debug, Default)]
struct NodeBlocks {
    xattr: u32,
    content: u32,
    blocks: u32,
    leaves: u32,
}

/// The planned form of a node.
struct Planned {
    node: NodeId,
    inode: u32,
    parent: u32,
    place: NodeBlocks,
}

/// All nodes in a fixed order, and the positions of their blocks, counted from the first block of
/// content.
struct Ext4Plan {
    nodes: Vec<Planned>,
    inodes: HashMap<NodeId, u32>,
    /// Number of content blocks.
    blocks: u32,
    directories: u32,
    lost_found: Option<u32>,
}

fn needed(bytes: u64) -> Result<u32, Ext4Error> {
    let blocks = bytes.div_ceil(BLOCK as u64);
    let limit = u64::from(u32::MAX) >> 1;
    let too_large = Ext4Error::TooLarge { what: "blocks", found: blocks, limit };
    u32::try_from(blocks).ok().filter(|_| blocks <= limit).ok_or(too_large)
}

impl Ext4Plan {
    fn new(tree: &Tree) -> Result<Self, Ext4Error> {
        let own = tree.names(ROOT).is_none_or(|names| !names.contains_key(LOST_FOUND));
        let mut plan = Self {
            nodes: Vec::new(),
            inodes: HashMap::from([(ROOT, ROOT_INODE)]),
            blocks: 0,
            directories: u32::from(own),
            lost_found: own.then_some(FIRST_INODE),
        };
        let mut next = FIRST_INODE + u32::from(own);
        if own {
            plan.blocks = 1;
        }
        let mut left = std::collections::VecDeque::from([(ROOT, ROOT_INODE, ROOT_INODE)]);
        while let Some((id, inode, parent)) = left.pop_front() {
            let place = plan.place(tree, id)?;
            plan.nodes.push(Planned { node: id, inode, parent, place });
            for child in tree.names(id).into_iter().flat_map(|names| names.values()) {
                if plan.inodes.contains_key(&child.node) {
                    // Another name of the same file.
                    continue;
                }
                plan.inodes.insert(child.node, next);
                left.push_back((child.node, next, inode));
                next += 1;
            }
        }
        Ok(plan)
    }

    fn take(&mut self, blocks: u32) -> Result<u32, Ext4Error> {
        let first = self.blocks;
        self.blocks = needed((u64::from(first) + u64::from(blocks)) * BLOCK as u64)?;
        Ok(first)
    }

    fn place(&mut self, tree: &Tree, id: NodeId) -> Result<NodeBlocks, Ext4Error> {
        let node = tree.node(id);
        let xattr = if node.meta.xattrs.is_empty() { 0 } else { self.take(1)? };
        let blocks = match &node.content {
            Content::Dir(names) => {
                self.directories += 1;
                let more = (id == ROOT && self.lost_found.is_some()).then_some(LOST_FOUND);
                blocks_of_directory(names.keys().map(|name| &**name).chain(more))
            }
            Content::File { size, .. } => needed(*size)?,
            Content::Symlink(target) => u32::from(target.len() >= FAST_LINK),
            Content::Char(..) | Content::Block(..) | Content::Fifo => 0,
        };
        let leaves = extent_leaves(blocks);
        if leaves > MAX_EXTENTS {
            let limit = u64::from(MAX_EXTENTS) * inode::LEAF_BLOCKS;
            return Err(Ext4Error::TooLarge { what: "a file with blocks", found: u64::from(blocks), limit });
        }
        let content = self.take(blocks)?;
        let leaves_at = self.take(leaves)?;
        debug_assert_eq!(leaves_at, content + blocks);
        Ok(NodeBlocks { xattr, content, blocks, leaves })
    }
}

/// Writes the file system. `spool` has the content of files. Returns the length of the disk.
pub(crate) fn write(tree: &Tree, spool: &File, seed: &[u8; 32], free: u64, disk: &File) -> Result<u64, Ext4Error> {
    let plan = Ext4Plan::new(tree)?;
    let inodes = plan.inodes.len() as u64 + u64::from(FIRST_INODE);
    let geometry = Geometry::new(u64::from(plan.blocks), free / BLOCK as u64, inodes, free / BYTES_PER_INODE)?;
    let bytes = geometry.blocks() * BLOCK as u64;
    let writer = Ext4Writer { tree, plan: &plan, geometry: &geometry, spool, disk };
    disk.set_len(bytes).map_err(Ext4Error::Write)?;
    writer.nodes().map_err(Ext4Error::Write)?;
    let used = UsedBlocks {
        blocks: geometry.content() + u64::from(plan.blocks),
        inodes: FIRST_INODE - 1 + u32::from(plan.lost_found.is_some()) + plan.inodes.len() as u32 - 1,
        directories: plan.directories,
    };
    // Directories may be anywhere; the per-group counts attribute each to the group of its inode.
    let dirs = writer.directories();
    geometry.write(&used, &dirs, seed, disk).map_err(Ext4Error::Write)?;
    Ok(bytes)
}

struct Ext4Writer<'a> {
    tree: &'a Tree,
    plan: &'a Ext4Plan,
    geometry: &'a Geometry,
    spool: &'a File,
    disk: &'a File,
}

impl Ext4Writer<'_> {
    fn at(&self, block: u32) -> u32 {
        // The geometry has room for all of the plan's blocks.
        (self.geometry.content() + u64::from(block)) as u32
    }

    fn write_block(&self, block: u32, bytes: &[u8]) -> io::Result<()> {
        self.disk.write_all_at(bytes, u64::from(block) * BLOCK as u64)
    }

    fn write_inode(&self, number: u32, inode: &Inode) -> io::Result<()> {
        let at = self.geometry.inode_offset(number);
        self.disk.write_all_at(inode.bytes(), at)
    }

    fn nodes(&self) -> io::Result<()> {
        if let Some(number) = self.plan.lost_found {
            let block = self.at(0);
            let names = [DirName::dot(number), DirName::dot_dot(ROOT_INODE)];
            write_directory(&names, |index, bytes| self.write_block(block + index, bytes))?;
            self.write_inode(number, &Inode::directory(0o700, 2, block, 1))?;
        }
        self.plan.nodes.iter().try_for_each(|planned| self.node(planned))
    }

    fn node(&self, planned: &Planned) -> io::Result<()> {
        let node = self.tree.node(planned.node);
        let place = planned.place;
        let first = self.at(place.content);
        let mut inode = Inode::new(&node.meta);
        match &node.content {
            Content::Dir(names) => {
                let mut list = vec![DirName::dot(planned.inode), DirName::dot_dot(planned.parent)];
                let mut subdirectories = 0;
                for (name, entry) in names {
                    let content = &self.tree.node(entry.node).content;
                    subdirectories += u32::from(matches!(content, Content::Dir(_)));
                    list.push(DirName::new(self.plan.inodes[&entry.node], name, content));
                }
                if let Some(number) = self.plan.lost_found.filter(|_| planned.node == ROOT) {
                    subdirectories += 1;
                    list.push(DirName::new_directory(number, LOST_FOUND));
                }
                write_directory(&list, |index, bytes| self.write_block(first + index, bytes))?;
                inode.set_directory(subdirectories + 2);
                inode.set_extents(first, place.blocks, u64::from(place.blocks) * BLOCK as u64);
            }
            Content::File { offset, size } => {
                self.copy(*offset, *size, first)?;
                inode.set_file(node.links);
                inode.set_extents(first, place.blocks, *size);
            }
            Content::Symlink(target) if target.len() < FAST_LINK => inode.set_fast_link(target, node.links),
            Content::Symlink(target) => {
                self.write_block(first, target)?;
                inode.set_link(node.links);
                inode.set_extents(first, place.blocks, target.len() as u64);
            }
            Content::Char(major, minor) => inode.set_device(false, *major, *minor, node.links),
            Content::Block(major, minor) => inode.set_device(true, *major, *minor, node.links),
            Content::Fifo => inode.set_fifo(node.links),
        }
        if place.leaves > 0 {
            let leaves = first + place.blocks;
            write_leaves(first, place.blocks, |index, bytes| self.write_block(leaves + index, bytes))?;
            inode.add_blocks(place.leaves);
        }
        if !node.meta.xattrs.is_empty() {
            let block = self.at(place.xattr);
            self.write_block(block, &xattr::block(&node.meta.xattrs))?;
            inode.set_xattrs(block);
        }
        self.write_inode(planned.inode, &inode)
    }

    /// Copies a file. Blocks of zeros stay holes in the disk's file.
    fn copy(&self, mut offset: u64, mut left: u64, first: u32) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
        let mut at = u64::from(first) * BLOCK as u64;
        while left > 0 {
            let length = chunk.len().min(usize::try_from(left).unwrap_or(CHUNK));
            let bytes = &mut chunk[..length];
            self.spool.read_exact_at(bytes, offset)?;
            for (index, block) in bytes.chunks(BLOCK).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    self.disk.write_all_at(block, at + (index * BLOCK) as u64)?;
                }
            }
            (offset, at, left) = (offset + length as u64, at + length as u64, left - length as u64);
        }
        Ok(())
    }

    /// The inodes of all directories.
    fn directories(&self) -> Vec<u32> {
        let of_nodes = self.plan.nodes.iter().filter(|planned| self.tree.names(planned.node).is_some());
        of_nodes.map(|planned| planned.inode).chain(self.plan.lost_found).collect()
    }
}
