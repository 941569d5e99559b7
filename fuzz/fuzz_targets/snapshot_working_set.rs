//! Any working-set file: it is refused, or it makes the same bytes again.
#![no_main]

use clade_snapshot::format::{WorkingSet, with_checksum};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // With a valid head and checksum, or the code behind them is seldom reached; and with a number
    // of runs that fits.
    let head = [&b"CLADEWRM"[..], &(1u32 << 16).to_le_bytes()].concat();
    let with_head = with_checksum([&head, bytes].concat());
    let fits = (bytes.len() as u64 / 16).to_le_bytes();
    let runs = with_checksum([&head, &[0; 20][..], &fits, &bytes[..bytes.len() & !15]].concat());
    for warm in [bytes, &with_head, &runs].map(WorkingSet::decode).into_iter().flatten() {
        assert_eq!(WorkingSet::decode(&warm.encode()).as_ref(), Ok(&warm));
    }
});
