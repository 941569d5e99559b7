//! Any index: it is refused, or its runs and chunks agree with each other and make the same bytes again.
#![no_main]

use clade_memory::PageRange;
use clade_snapshot::format::{Index, seal};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let raw = Index::decode(bytes);
    let sealed = seal(bytes.to_vec());
    for index in [raw, Index::decode(&sealed)].into_iter().flatten() {
        assert_eq!(Index::decode(&index.encode()).as_ref(), Ok(&index));
        let mut end = 0;
        for run in &index.runs {
            assert!(run.range.start >= end && run.range.end <= index.pages());
            end = run.range.end;
        }
        for chunk in &index.chunks {
            let data: u64 = index.data_of(chunk.number).map(PageRange::len).sum();
            assert!(data > 0 && u64::from(chunk.stored) <= data << 12);
            assert_eq!(index.chunk(chunk.number), Some(chunk));
            assert!(chunk.offset + u64::from(chunk.stored) <= index.data_bytes.next_multiple_of(1 << 18));
        }
        assert!(index.first_missing().is_none_or(|page| page < index.pages()));
    }
});
