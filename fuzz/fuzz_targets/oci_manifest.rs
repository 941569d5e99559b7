//! Any document: it is refused, or the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| clade_oci::fuzzing::manifest(bytes));
