//! The index of a layer: the pages of a space that it has, and a checksum for each chunk of them.
//!
//! ```text
//! "CLADEIDX"  u32 version  u32 flags (1: packed)  u64 bytes of the space
//!             u64 bytes of the data file  u64 runs  u64 chunks
//! runs   × { u64 first page, u64 pages << 1 | zeros }          ascending, disjoint, and
//!                                                              joined where they touch
//! chunks × { u32 bytes stored, u32 0, u64 checksum of them }   those that hold data, ascending
//! u64 checksum of all that
//! ```

use clade_memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};

use super::{Damage, Reader, VERSION, with_checksum, without_checksum};
use crate::content::PageContent;

/// Pages in a chunk, the unit of checksums and compression.
pub(crate) const CHUNK_PAGES: u64 = 64;
/// Bytes in a chunk.
pub(crate) const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_SIZE;
const MAGIC: &[u8; 8] = b"CLADEIDX";
const PACKED: u32 = 1;
/// Most bytes of a space, so that no offset overflows.
const MAX_BYTES: u64 = 1 << 60;

/// A run of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The pages, counted from the beginning of the space.
    pub range: PageRange,
    /// Data, which the data file has, or zeros, which it has not.
    pub kind: PageContent,
}

/// The stored data of one chunk: the data pages among the 64 from a multiple of 64 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The chunk's number: its first page divided by 64.
    pub number: u64,
    /// The offset in the data file, if the layer is packed.
    pub offset: u64,
    /// Bytes stored. Fewer than the chunk's data pages have: it is compressed.
    pub stored: u32,
    /// The checksum of the stored bytes.
    pub sum: u64,
}

/// The index of a layer. A page in no run is not in this layer; that does not mean zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Whether chunks are stored one behind the other, and may be compressed. Otherwise each page
    /// is at its own offset.
    pub packed: bool,
    /// Length of the space in bytes.
    pub bytes: u64,
    /// Length of the data file in bytes.
    pub data_bytes: u64,
    /// The layer's runs, ascending.
    pub runs: Vec<Run>,
    /// The layer's chunks, ascending.
    pub chunks: Vec<Chunk>,
}

/// Entries of a table that are allocated before they are read.
const FIRST_ENTRIES: usize = 1 << 16;

/// Appends a run, joined to the last one where they are adjacent and of one kind.
pub(crate) fn push_run(runs: &mut Vec<Run>, range: PageRange, kind: PageContent) {
    if range.is_empty() {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.range.end() == range.start() && last.kind == kind => {
            last.range = PageRange::new(last.range.start(), range.end());
        }
        _ => runs.push(Run { range, kind }),
    }
}

/// The parts of ascending runs that lie in `within`.
fn runs_within(runs: &[Run], within: PageRange) -> impl Iterator<Item = Run> {
    let first = runs.partition_point(|run| run.range.end() <= within.start());
    let touching = runs[first..].iter().take_while(move |run| run.range.start() < within.end());
    touching.map(move |run| Run { range: run.range.intersect(within), kind: run.kind })
}

impl Index {
    /// Pages in the space; the last one may be used in part.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE)
    }

    /// The first page that is in no run.
    #[must_use]
    pub fn first_missing(&self) -> Option<u64> {
        let mut at = 0;
        for run in &self.runs {
            if run.range.start() != at {
                return Some(at);
            }
            at = run.range.end();
        }
        (at < self.pages()).then_some(at)
    }

    /// The number of pages of a kind.
    #[must_use]
    pub fn count(&self, kind: PageContent) -> u64 {
        self.runs.iter().filter(|run| run.kind == kind).map(|run| run.range.len()).sum()
    }

    /// The runs of data pages within `within`.
    pub(crate) fn data_within(&self, within: PageRange) -> impl Iterator<Item = PageRange> {
        runs_within(&self.runs, within).filter(|run| run.kind == PageContent::Data).map(|run| run.range)
    }

    /// The data pages of a chunk.
    pub fn data_of(&self, chunk: u64) -> impl Iterator<Item = PageRange> {
        self.data_within(PageRange::with_len(chunk * CHUNK_PAGES, CHUNK_PAGES))
    }

    /// The chunk of this number, if it has data.
    #[must_use]
    pub fn chunk(&self, number: u64) -> Option<&Chunk> {
        self.chunks.binary_search_by_key(&number, |chunk| chunk.number).ok().map(|at| &self.chunks[at])
    }

    /// Encodes the index.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(56 + 16 * (self.runs.len() + self.chunks.len()));
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.bits().to_le_bytes());
        out.extend_from_slice(&u32::from(self.packed).to_le_bytes());
        for number in [self.bytes, self.data_bytes, self.runs.len() as u64, self.chunks.len() as u64] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for run in &self.runs {
            out.extend_from_slice(&run.range.start().to_le_bytes());
            out.extend_from_slice(&(run.range.len() << 1 | u64::from(run.kind == PageContent::Zero)).to_le_bytes());
        }
        for chunk in &self.chunks {
            out.extend_from_slice(&u64::from(chunk.stored).to_le_bytes());
            out.extend_from_slice(&chunk.sum.to_le_bytes());
        }
        with_checksum(out)
    }

    /// Decodes an index. The result is consistent: runs ascend within the space, and the chunks are
    /// those of the runs.
    ///
    /// # Errors
    /// When the bytes are not an index.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let mut reader = without_checksum(bytes, MAGIC, "index")?;
        let flags = reader.u32()?;
        if flags & !PACKED != 0 {
            return Err(Damage::value("flags", &format!("{flags:#x}")));
        }
        let mut index = Self { packed: flags & PACKED != 0, bytes: reader.u64()?, ..Self::default() };
        if index.bytes > MAX_BYTES {
            return Err(Damage::value("the length of the space", &index.bytes));
        }
        index.data_bytes = reader.u64()?;
        let (runs, chunks) = (reader.u64()?, reader.u64()?);
        let tables = runs.checked_add(chunks).and_then(|entries| entries.checked_mul(16));
        if tables != Some(reader.0.len() as u64) {
            let wanted = tables.unwrap_or(u64::MAX);
            return Err(Damage::Length { what: "its tables".to_owned(), wanted, found: reader.0.len() as u64 });
        }
        index.read_runs(&mut reader, runs)?;
        index.read_chunks(&mut reader, chunks)?;
        reader.end()?;
        Ok(index)
    }

    fn read_runs(&mut self, reader: &mut Reader<'_>, runs: u64) -> Result<(), Damage> {
        let pages = self.pages();
        // The table is checked entry by entry, and allocated as it grows.
        self.runs.reserve((runs as usize).min(FIRST_ENTRIES));
        for _ in 0..runs {
            let (start, packed) = (reader.u64()?, reader.u64()?);
            let len = packed >> 1;
            let kind = if packed & 1 == 1 { PageContent::Zero } else { PageContent::Data };
            let (least, joined) = self
                .runs
                .last()
                .map_or((0, false), |last| (last.range.end(), last.range.end() == start && last.kind == kind));
            let end = start.checked_add(len).filter(|end| len > 0 && *end <= pages && start >= least && !joined);
            let Some(end) = end else {
                return Err(Damage::value("a run", &format!("{len:#x} pages at {start:#x} of {pages:#x}")));
            };
            self.runs.push(Run { range: PageRange::new(start, end), kind });
        }
        Ok(())
    }

    fn read_chunks(&mut self, reader: &mut Reader<'_>, chunks: u64) -> Result<(), Damage> {
        let mut next = 0;
        let mut offset = 0;
        self.chunks.reserve((chunks as usize).min(FIRST_ENTRIES));
        for at in 0..chunks {
            // The next chunk that a run reaches into.
            let first = self.runs.partition_point(|run| run.range.end() <= next * CHUNK_PAGES);
            let Some(run) = self.runs[first..].iter().find(|run| run.kind == PageContent::Data) else {
                return Err(Damage::value("the number of chunks", &format!("{chunks}: there is data for {at}")));
            };
            let number = next.max(run.range.start() / CHUNK_PAGES);
            next = number + 1;
            let (stored, sum) = (reader.u64()?, reader.u64()?);
            let most = self.data_of(number).map(|data| data.len() << PAGE_SHIFT).sum::<u64>();
            if stored == 0 || stored > most || (!self.packed && stored != most) {
                return Err(Damage::value("the length of a chunk", &format!("{stored}, with {most} bytes of data")));
            }
            let place = if self.packed { offset } else { number * CHUNK_BYTES };
            offset += stored;
            self.chunks.push(Chunk { number, offset: place, stored: stored as u32, sum });
        }
        if let Some(left) = self.data_within(PageRange::new(next * CHUNK_PAGES, self.pages())).next() {
            return Err(Damage::value("the number of chunks", &format!("{chunks}: there is data at {left}")));
        }
        let wanted = if self.packed { offset } else { self.pages() << PAGE_SHIFT };
        if self.data_bytes != wanted {
            return Err(Damage::Length { what: "the data file".to_owned(), wanted, found: self.data_bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(packed: bool) -> Index {
        let run = |start, end, kind| Run { range: PageRange::new(start, end), kind };
        let chunk = |number: u64, offset, stored| Chunk {
            number,
            offset: if packed { offset } else { number * CHUNK_BYTES },
            stored,
            sum: number + 7,
        };
        Index {
            packed,
            bytes: 300 * PAGE_SIZE - 5,
            data_bytes: if packed { 6 * PAGE_SIZE } else { 300 * PAGE_SIZE },
            runs: vec![
                run(0, 3, PageContent::Zero),
                run(3, 5, PageContent::Data),
                run(62, 65, PageContent::Data),
                run(65, 299, PageContent::Zero),
                run(299, 300, PageContent::Data),
            ],
            chunks: vec![chunk(0, 0, 4 * 4096), chunk(1, 4 * PAGE_SIZE, 4096), chunk(4, 5 * PAGE_SIZE, 4096)],
        }
    }

    #[test]
    fn it_comes_back_as_it_was() {
        let sparse = index(false);
        assert_eq!(Index::decode(&sparse.encode()), Ok(sparse.clone()));
        let packed = index(true);
        assert_eq!(Index::decode(&packed.encode()), Ok(packed));
        assert_eq!(
            (sparse.first_missing(), sparse.count(PageContent::Data), sparse.count(PageContent::Zero)),
            (Some(5), 6, 237)
        );
        assert_eq!(sparse.chunk(1).map(|chunk| chunk.offset), Some(CHUNK_BYTES));
        assert_eq!(sparse.chunk(2), None);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let wrong = |change: &dyn Fn(&mut Index)| {
            let mut index = index(false);
            change(&mut index);
            let refused = Index::decode(&index.encode());
            assert!(matches!(refused, Err(Damage::Value { .. } | Damage::Length { .. })), "{refused:?}");
        };
        wrong(&|i| i.runs.swap(0, 1));
        wrong(&|i| i.runs[4].range = PageRange::new(i.runs[4].range.start(), 301));
        wrong(&|i| i.runs[0].range = PageRange::new(i.runs[0].range.start(), 4));
        wrong(&|i| i.runs[0].kind = PageContent::Data);
        wrong(&|i| i.chunks.truncate(2));
        wrong(&|i| i.chunks[0].stored = 4096);
        wrong(&|i| i.chunks.push(Chunk { number: 9, offset: 0, stored: 4096, sum: 0 }));
        wrong(&|i| i.data_bytes += 1);
        wrong(&|i| i.bytes = u64::MAX);
        wrong(&|i| i.runs[4].range = PageRange::new(1 << 62, (1 << 62) + 1));
    }
}
