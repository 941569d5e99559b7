//! Entry points for the fuzz targets, which no embedder needs. Behind the feature `fuzzing`.

use vm_memory::GuestMemoryMmap;

use crate::boot::{self, BootSource, Firmware, GuestRamRanges};

/// Loads `source` into `memory` for `cpus` vCPUs. Returns the end of the kernel, or `None` if the
/// source is refused.
#[must_use]
pub fn load_guest(memory: &GuestMemoryMmap, source: &BootSource, cpus: u8) -> Option<u64> {
    let layout = GuestRamRanges::of_memory(memory).ok()?;
    let loaded = boot::load(memory, &layout, source, &Firmware { cpus, rsdp: None }).ok()?;
    Some(loaded.kernel.end().0)
}

/// Unpacks a compressed kernel, to at most `limit` bytes. `None` if it is refused.
#[must_use]
pub fn unpack(packed: &[u8], limit: usize) -> Option<Vec<u8>> {
    boot::unpack(packed, limit).ok()
}

/// Whether the description in `bytes`, with `files`, is the memory of an image from another
/// process.
pub fn image_memory(store: &clade_memory::Store, bytes: &[u8], files: Vec<std::os::fd::OwnedFd>) -> bool {
    crate::vm::is_memory(store, bytes, files)
}
