//! Directories: lists of names in blocks, without an index. The kernel makes an index when a directory of one block
//! grows. One that has more from here stays a list, which the guest searches from its beginning.

use std::io;

use super::BLOCK;
use super::layout::{put16, put32};
use crate::tree::Content;

/// Bytes before a name.
const HEAD: usize = 8;
const DIRECTORY: u8 = 2;

/// One name.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirName<'a> {
    inode: u32,
    name: &'a [u8],
    kind: u8,
}

impl<'a> DirName<'a> {
    pub(super) fn new(inode: u32, name: &'a [u8], content: &Content) -> Self {
        let kind = match content {
            Content::File { .. } => 1,
            Content::Dir(_) => DIRECTORY,
            Content::Char(..) => 3,
            Content::Block(..) => 4,
            Content::Fifo => 5,
            Content::Symlink(_) => 7,
        };
        Self { inode, name, kind }
    }

    pub(super) fn new_directory(inode: u32, name: &'a [u8]) -> Self {
        Self { inode, name, kind: DIRECTORY }
    }

    pub(super) fn dot(inode: u32) -> Self {
        Self::new_directory(inode, b".")
    }

    pub(super) fn dot_dot(inode: u32) -> Self {
        Self::new_directory(inode, b"..")
    }
}

fn room(name: &[u8]) -> usize {
    (HEAD + name.len()).next_multiple_of(4)
}

/// Number of blocks of a directory with these names, `.` and `..`.
pub(super) fn blocks_of_directory<'a>(names: impl Iterator<Item = &'a [u8]>) -> u32 {
    let (mut blocks, mut used) = (1, room(b".") + room(b".."));
    for name in names {
        let more = room(name);
        if used + more > BLOCK {
            (blocks, used) = (blocks + 1, 0);
        }
        used += more;
    }
    blocks
}

/// Writes the blocks of a directory.
pub(super) fn write_directory(
    names: &[DirName<'_>],
    mut write: impl FnMut(u32, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut block = [0; BLOCK];
    let (mut index, mut used, mut last) = (0, 0, 0);
    for name in names {
        let more = room(name.name);
        if used + more > BLOCK {
            // The last entry of a block covers the rest of the block.
            put16(&mut block, last + 4, (BLOCK - last) as u16);
            write(index, &block)?;
            (block, index, used) = ([0; BLOCK], index + 1, 0);
        }
        put32(&mut block, used, u64::from(name.inode));
        put16(&mut block, used + 4, more as u16);
        block[used + 6] = name.name.len() as u8;
        block[used + 7] = name.kind;
        block[used + HEAD..used + HEAD + name.name.len()].copy_from_slice(name.name);
        (last, used) = (used, used + more);
    }
    put16(&mut block, last + 4, (BLOCK - last) as u16);
    write(index, &block)
}
