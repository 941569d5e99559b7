//! Any index: it is refused, or its runs and chunks agree with each other and make the same bytes
//! again.
#![no_main]

use clade_memory::PageRange;
use clade_snapshot::format::{Index, with_checksum};
use libfuzzer_sys::fuzz_target;

/// Makes an index whose lengths are right, so that the code behind them is reached: a byte of
/// flags, one with the number of runs among the entries, two for the pages of the space; then four
/// bytes an entry.
fn made(bytes: &[u8]) -> Option<Vec<u8>> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    let entries: Vec<(u64, u64)> = rest
        .chunks_exact(4)
        .map(|e| (u64::from(u16::from_le_bytes([e[0], e[1]])), u64::from(u16::from_le_bytes([e[2], e[3]]))))
        .collect();
    let runs = usize::from(head[1]).min(entries.len());
    let pages = u64::from(u16::from_le_bytes([head[2], head[3]]));
    let packed = head[0] & 1 == 1;
    let stored: u64 = entries[runs..].iter().map(|(stored, _)| stored * 8).sum();
    let data = if packed { stored } else { pages * 4096 } + u64::from(head[0] >> 7);
    let mut out = b"CLADEIDX".to_vec();
    out.extend_from_slice(&(1u32 << 16).to_le_bytes());
    out.extend_from_slice(&u32::from(head[0] & 3).to_le_bytes());
    for number in [pages * 4096 - pages.min(7), data, runs as u64, (entries.len() - runs) as u64] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for (at, (a, b)) in entries.into_iter().enumerate() {
        let a = if at < runs { a } else { a * 8 };
        out.extend_from_slice(&a.to_le_bytes());
        out.extend_from_slice(&b.to_le_bytes());
    }
    Some(with_checksum(out))
}

fuzz_target!(|bytes: &[u8]| {
    let sealed = Index::decode(&with_checksum(bytes.to_vec()));
    let made = made(bytes).and_then(|made| Index::decode(&made).ok());
    for index in [Index::decode(bytes).ok(), sealed.ok(), made].into_iter().flatten() {
        assert_eq!(Index::decode(&index.encode()).as_ref(), Ok(&index));
        let mut end = 0;
        for run in &index.runs {
            assert!(run.range.start() >= end && run.range.end() <= index.pages());
            end = run.range.end();
        }
        for chunk in &index.chunks {
            let data: u64 = index.data_of(chunk.number).map(PageRange::len).sum();
            assert!(data > 0 && u64::from(chunk.stored) <= data << 12);
            assert_eq!(index.chunk(chunk.number), Some(chunk));
            assert!(chunk.offset < index.data_bytes);
        }
        assert!(index.first_missing().is_none_or(|page| page < index.pages()));
    }
});
