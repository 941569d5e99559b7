//! The working-set file: the pages that a VM touched after its start from the snapshot.
//!
//! ```text
//! "CLADEWRM"  u32 version  u32 0  u128 the snapshot  u64 runs
//! runs × { u64 first page, u64 pages }   as they were given: the first touched first
//! u64 checksum of all that
//! ```

use clade_memory::{IntervalMap, PageRange, Piece};

use super::{Damage, SnapshotId, VERSION, with_checksum, without_checksum};

const MAGIC: &[u8; 8] = b"CLADEWRM";
/// Most pages of a memory, so that no sum overflows.
const MAX_PAGES: u64 = 1 << 48;
/// Bytes before and behind the runs.
const HEAD: u64 = 8 + 4 + 4 + 16 + 8 + 8;

/// Marks a page that was listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen;

impl Piece for Seen {
    fn advance(&self, _pages: u64) -> Self {
        Self
    }
    fn continues(&self, _pages: u64, _next: &Self) -> bool {
        true
    }
}

/// A working set: a hint only. A file that is missing, damaged or of another snapshot costs only
/// time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    /// The snapshot it was recorded for.
    pub id: SnapshotId,
    /// The pages, in the order of their first access. All regions are one space.
    pub runs: Vec<PageRange>,
}

impl WorkingSet {
    /// The working set of a run with these accesses, in a memory of `pages`. Each page is listed
    /// once, at its first access.
    #[must_use]
    pub fn of(id: SnapshotId, touched: &[PageRange], pages: u64) -> Self {
        let (all, mut seen) = (PageRange::new(0, pages), IntervalMap::new());
        let mut runs = Vec::new();
        for run in touched.iter().map(|run| run.intersect(all)).filter(|run| !run.is_empty()) {
            let mut done = run.start();
            for (known, Seen) in seen.within(run) {
                runs.push(PageRange::new(done, known.start()));
                done = known.end();
            }
            runs.push(PageRange::new(done, run.end()));
            seen.insert(run, Seen);
        }
        runs.retain(|run| !run.is_empty());
        Self { id, runs }
    }

    /// Most bytes of a file that lists each of `pages` at most once.
    pub(crate) fn most_bytes(pages: u64) -> u64 {
        pages.saturating_mul(16).saturating_add(HEAD)
    }

    /// Checks that it lists pages of a memory of `pages`, each at most once.
    ///
    /// # Errors
    /// With the first run that is not valid.
    pub fn check(&self, pages: u64) -> Result<(), Damage> {
        let wrong = |run: &PageRange, why: &str| {
            let value = format!("{:#x} pages at {:#x}, {why}", run.len(), run.start());
            Err(Damage::value("a run", &value))
        };
        if let Some(run) = self.runs.iter().find(|run| run.end() > pages) {
            return wrong(run, &format!("of {pages:#x}"));
        }
        let mut sorted = self.runs.clone();
        sorted.sort_unstable_by_key(|run| run.start());
        match sorted.windows(2).find(|two| two[1].start() < two[0].end()) {
            Some(two) => wrong(&two[1], "of which some are named twice"),
            None => Ok(()),
        }
    }

    /// Encodes the working set.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.bits().to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.id.get().to_le_bytes());
        out.extend_from_slice(&(self.runs.len() as u64).to_le_bytes());
        for run in &self.runs {
            out.extend_from_slice(&run.start().to_le_bytes());
            out.extend_from_slice(&run.len().to_le_bytes());
        }
        with_checksum(out)
    }

    /// Decodes a working set.
    ///
    /// # Errors
    /// When the bytes are not a working-set file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let mut reader = without_checksum(bytes, MAGIC, "warm")?;
        let _reserved = reader.u32()?;
        let (id, count) = (SnapshotId::new(reader.u128()?), reader.u64()?);
        if count.checked_mul(16) != Some(reader.0.len() as u64) {
            let wanted = count.saturating_mul(16);
            return Err(Damage::Length { what: "its runs".to_owned(), wanted, found: reader.0.len() as u64 });
        }
        // As many as there are bytes for.
        let mut runs = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (start, len) = (reader.u64()?, reader.u64()?);
            if start > MAX_PAGES || len > MAX_PAGES || len == 0 {
                return Err(Damage::value("a run", &format!("{len:#x} pages at {start:#x}")));
            }
            runs.push(PageRange::with_len(start, len));
        }
        reader.end()?;
        Ok(Self { id, runs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_was() {
        let warm = WorkingSet { id: SnapshotId::new(77), runs: vec![PageRange::new(9, 12), PageRange::new(1, 2)] };
        assert_eq!(WorkingSet::decode(&warm.encode()), Ok(warm.clone()));
        let empty = WorkingSet { id: warm.id, runs: vec![PageRange::new(5, 5)] };
        assert!(matches!(WorkingSet::decode(&empty.encode()), Err(Damage::Value { .. })));
    }
}
