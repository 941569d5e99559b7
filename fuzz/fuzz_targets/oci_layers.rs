//! Any archives, as layers on each other: each is refused, or a file system is made of them.
#![no_main]

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

/// Gives each header the checksum that its bytes have: few inputs would have one by chance.
fn mend(archive: &[u8]) -> Vec<u8> {
    let mut archive = archive.to_vec();
    for block in archive.chunks_exact_mut(512) {
        // A header says so by these letters.
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    archive
}

fn file() -> File {
    File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"))
}

fuzz_target!(|archives: Vec<&[u8]>| {
    let archives: Vec<Vec<u8>> = archives.iter().take(4).map(|archive| mend(archive)).collect();
    let archives: Vec<&[u8]> = archives.iter().map(Vec::as_slice).collect();
    let disk = file();
    if let Ok(bytes) = clade_image::fuzzing::unpack(&archives, file(), &disk) {
        assert_eq!(disk.metadata().expect("its length").len(), bytes);
    }
});
