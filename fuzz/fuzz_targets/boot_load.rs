//! Any bytes as a kernel: refused or loaded, never a panic, and nothing outside RAM.
#![no_main]

use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::fuzzing::load_guest;
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const BYTES: usize = 8 << 20;

fuzz_target!(|input: (Vec<u8>, Option<Vec<u8>>, String, u8)| {
    let (kernel, initrd, cmdline, cpus) = input;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), BYTES)]).expect("memory");
    let initrd = initrd.map(|bytes| BootImage::Bytes(bytes.into()));
    let source = BootSource { kernel: BootImage::Bytes(kernel.into()), initrd, cmdline };
    if let Some(end) = load_guest(&memory, &source, cpus) {
        assert!(end <= BYTES as u64);
    }
});
