//! Any bytes as a compressed kernel: refused or unpacked, within the limit.
#![no_main]

use clade_vmm::fuzzing::unpack;
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    if let Some(unpacked) = unpack(input, LIMIT) {
        assert!(unpacked.len() <= LIMIT);
    }
});
