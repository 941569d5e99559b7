//! Extended attributes: one block for each node with attributes.

use super::BLOCK;
use super::layout::{put16, put32};
use crate::tar::Xattr;
use crate::xattr_rules::{ENTRY, HEAD, xattr_index};

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
