//! The extended attributes that an image may set: their names, and their room in a file system.

/// Bytes of the block for all attributes of a node.
pub(crate) const XATTR_BLOCK: usize = 4096;
/// Bytes at the beginning of the block, and at the beginning of each attribute.
pub(crate) const HEAD: usize = 32;
pub(crate) const ENTRY: usize = 16;
/// Room for all attributes of a node: a block without its head and the end of its list.
pub(crate) const XATTR_ROOM: usize = XATTR_BLOCK - HEAD - 4;

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
