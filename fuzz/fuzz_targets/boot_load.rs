//! Any bytes as a kernel: refused or loaded, never a panic, and nothing outside RAM.
#![no_main]

use clade_vmm::boot::{BootSource, Firmware, Image, RamLayout, load};
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const BYTES: usize = 8 << 20;

fuzz_target!(|input: (Vec<u8>, Option<Vec<u8>>, String, u8)| {
    let (kernel, initrd, cmdline, cpus) = input;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), BYTES)]).expect("memory");
    let layout = RamLayout::of_memory(&memory).expect("a layout");
    let initrd = initrd.map(|bytes| Image::Bytes(bytes.into()));
    let source = BootSource { kernel: Image::Bytes(kernel.into()), initrd, cmdline };
    if let Ok(loaded) = load(&memory, &layout, &source, &Firmware { cpus, rsdp: None }) {
        assert!(loaded.kernel.end().0 <= BYTES as u64);
    }
});
