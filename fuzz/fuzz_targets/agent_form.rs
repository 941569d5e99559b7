//! Any form, in any pieces: it is refused, or its parts are parsed as in one piece.
#![no_main]

use clade_agent::{Multipart, PartEvent, boundary};
use libfuzzer_sys::fuzz_target;

type Part = (Option<String>, Option<String>, Vec<u8>, bool);

fn read(bytes: &[u8], cut: usize) -> Option<Vec<Part>> {
    let (mut reader, mut parts) = (Multipart::new("B"), Vec::<Part>::new());
    for chunk in bytes.chunks(cut) {
        reader.push(chunk);
        while let Some(event) = reader.next_event().ok()? {
            match (event, parts.last_mut()) {
                (PartEvent::Part { name, filename }, _) => parts.push((name, filename, Vec::new(), false)),
                (PartEvent::Data(data), Some(part)) => part.2.extend(data),
                (PartEvent::PartEnd, Some(part)) => part.3 = true,
                (_, None) => panic!("data of no part"),
            }
        }
    }
    reader.finish().ok()?;
    assert!(parts.iter().all(|part| part.3));
    Some(parts)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    assert_eq!(read(bytes, usize::from(cut).max(1)), read(bytes, bytes.len().max(1)));
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some(boundary) = boundary(text)
    {
        assert!((1..=70).contains(&boundary.len()));
    }
});
