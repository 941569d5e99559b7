//! Extended attributes: one block for each node with attributes.

use super::BLOCK;
use super::layout::{put16, put32};
use crate::tar::Xattr;

const HEAD: usize = 32;
const ENTRY: usize = 16;
/// Room for all attributes of a node: a block without its head and the end of its list.
pub(crate) const XATTR_ROOM: usize = BLOCK - HEAD - 4;

const USER: (u8, &[u8]) = (1, b"user.");
const SECURITY: (u8, &[u8]) = (6, b"security.");
/// The only attribute of the kernel's own that an image may set.
const CAPABILITY: &[u8] = b"security.capability";

/// The number of a name's prefix, and the rest. None if an image may not set it.
pub(crate) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, prefix) = if name == CAPABILITY { SECURITY } else { USER };
    name.strip_prefix(prefix).filter(|rest| !rest.is_empty()).map(|rest| (index, rest))
}

/// Bytes of an attribute.
pub(crate) fn xattr_room(name: &[u8], value: &[u8]) -> usize {
    let rest = xattr_index(name).map_or(0, |(_, rest)| rest.len());
    ENTRY + rest.next_multiple_of(4) + value.len().next_multiple_of(4)
}

fn hash(name: &[u8], value: &[u8]) -> u32 {
    let of_name = name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
    value.chunks(4).fold(of_name, |hash, word| {
        let mut bytes = [0; 4];
        bytes[..word.len()].copy_from_slice(word);
        hash.rotate_left(16) ^ u32::from_le_bytes(bytes)
    })
}

/// The block. The attributes fit, as was checked when they were read.
pub(super) fn block(xattrs: &[Xattr]) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut sorted: Vec<_> = xattrs.iter().filter_map(|(name, value)| Some((xattr_index(name)?, &**value))).collect();
    sorted.sort_by_key(|((index, name), _)| (*index, name.len(), *name));
    let (mut at, mut end, mut of_all) = (HEAD, BLOCK, 0u32);
    for ((index, name), value) in sorted {
        end -= value.len().next_multiple_of(4);
        block[end..end + value.len()].copy_from_slice(value);
        let hash = hash(name, value);
        block[at] = name.len() as u8;
        block[at + 1] = index;
        put16(&mut block, at + 2, if value.is_empty() { 0 } else { end as u16 });
        put32(&mut block, at + 8, value.len() as u64);
        put32(&mut block, at + 12, u64::from(hash));
        block[at + ENTRY..at + ENTRY + name.len()].copy_from_slice(name);
        at += ENTRY + name.len().next_multiple_of(4);
        of_all = of_all.rotate_left(16) ^ hash;
    }
    put32(&mut block, 0, 0xea02_0000);
    put32(&mut block, 4, 1);
    put32(&mut block, 8, 1);
    put32(&mut block, 12, u64::from(of_all));
    block
}
