//! Any manifest: it is refused, or keeps its value when it is written again.
#![no_main]

use clade_snapshot::format::Manifest;
use libfuzzer_sys::fuzz_target;

fn check(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::decode(bytes) {
        assert!(manifest.layout().is_ok());
        assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest));
    }
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // With the right checksum, or the code behind it is never reached.
    if let Ok(text) = std::str::from_utf8(bytes) {
        check(&Manifest::sealed(text));
    }
});
