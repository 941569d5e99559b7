//! Buffers that a driver has posted for receiving.

use clade_host_io::Fragment;
use vm_memory::Bytes;

/// A chain posted for receiving, and its memory.
#[derive(Debug)]
pub(super) struct Posted {
    pub(super) head: u16,
    pub(super) memory: Vec<Fragment>,
}

/// Writes two bytes into `memory`, at byte `at`. Bytes beyond the end are not written.
pub(super) fn write_at(memory: &[Fragment], at: usize, bytes: [u8; 2]) {
    let mut skip = at;
    let mut bytes = bytes.as_slice();
    for part in memory {
        if skip < part.len() && !bytes.is_empty() {
            let fits = bytes.len().min(part.len() - skip);
            // Within the fragment, so this cannot fail.
            let _ = part.slice().write_slice(&bytes[..fits], skip);
            bytes = &bytes[fits..];
            skip += fits;
        }
        skip = skip.saturating_sub(part.len());
    }
}
