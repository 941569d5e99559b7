//! Any state file: it is refused, or its sections make the same file again.
#![no_main]

use clade_snapshot::format::{Sections, encode_sections, with_checksum};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    assert!(Sections::decode(bytes).is_err() || bytes.len() >= 24);
    // With the right checksum of the whole file.
    let head = [&b"CLADESTA"[..], &(1u32 << 16).to_le_bytes()].concat();
    for sections in [with_checksum(bytes.to_vec()), with_checksum([&head, bytes].concat())]
        .iter()
        .flat_map(|file| Sections::decode(file))
    {
        let list: Vec<(&str, &[u8])> = sections.iter().collect();
        assert_eq!(Sections::decode(&encode_sections(&list)).as_ref(), Ok(&sections));
    }
    // And any sections cut from the bytes come back unchanged.
    let (name, body) = bytes.split_at(bytes.len() / 2);
    let name: String = String::from_utf8_lossy(name).chars().take(60).collect();
    let list = [(name.as_str(), body), ("another one", bytes)];
    let again = Sections::decode(&encode_sections(&list));
    assert!(name == "another one" || again.as_ref().is_ok_and(|again| again.get(&name) == Some(body)));
});
