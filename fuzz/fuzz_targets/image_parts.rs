//! Any description of an image from another process, with four descriptors: it is refused, or
//! becomes memory.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use clade_memory::Store;
use libfuzzer_sys::fuzz_target;

const PAGES: u64 = 16;

/// Two files of layers that can be read only, and two leases.
fn files() -> Vec<OwnedFd> {
    static LAYER: OnceLock<tempfile::NamedTempFile> = OnceLock::new();
    let layer = LAYER.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(PAGES * 4096).expect("a length");
        file
    });
    let layers = (0..2).map(|_| File::open(layer.path()).expect("the file").into());
    layers.chain((0..2).map(|_| File::open("/dev/null").expect("/dev/null").into())).collect()
}

fuzz_target!(|description: &[u8]| {
    static STORE: OnceLock<Store> = OnceLock::new();
    let store = STORE.get_or_init(|| Store::open_small().expect("a store"));
    let mut bytes = (description.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(description);
    clade_vmm::fuzzing::image_memory(store, &bytes, files());
});
