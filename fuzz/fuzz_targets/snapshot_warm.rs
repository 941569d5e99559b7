//! Any warm file: it is refused, or it makes the same bytes again.
#![no_main]

use clade_snapshot::format::{Warm, seal};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let sealed = seal(bytes.to_vec());
    for warm in [Warm::decode(bytes), Warm::decode(&sealed)].into_iter().flatten() {
        assert_eq!(Warm::decode(&warm.encode()).as_ref(), Ok(&warm));
    }
});
