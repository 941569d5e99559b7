//! The warm file: which pages of memory a VM touched after it was started from the snapshot.
//!
//! ```text
//! "CLADEWRM"  u32 version  u32 0  u128 the snapshot  u64 runs
//! runs × { u64 first page, u64 pages }   as they were given: the first touched first
//! u64 checksum of all that
//! ```

use clade_memory::PageRange;

use super::{Damage, SnapshotId, VERSION, seal, unseal};

const MAGIC: &[u8; 8] = b"CLADEWRM";
/// No memory is larger, so that no sum overflows.
const MOST_PAGES: u64 = 1 << 48;

/// A hint, and nothing but that: it may be missing, of another snapshot or damaged, and all that is lost is time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warm {
    /// Of which snapshot.
    pub id: SnapshotId,
    /// Pages of memory, all regions one after another.
    pub runs: Vec<PageRange>,
}

impl Warm {
    /// As bytes.
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
        seal(out)
    }

    /// From bytes.
    ///
    /// # Errors
    /// When they are not such a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let mut reader = unseal(bytes, MAGIC, "warm")?;
        let _reserved = reader.u32()?;
        let (id, count) = (SnapshotId::new(reader.u128()?), reader.u64()?);
        let mut runs = Vec::new();
        for _ in 0..count {
            let (start, len) = (reader.u64()?, reader.u64()?);
            if start > MOST_PAGES || len > MOST_PAGES || len == 0 {
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
        let warm = Warm { id: SnapshotId::new(77), runs: vec![PageRange::new(9, 12), PageRange::new(1, 2)] };
        assert_eq!(Warm::decode(&warm.encode()), Ok(warm.clone()));
        let empty = Warm { id: warm.id, runs: vec![PageRange::new(5, 5)] };
        assert!(matches!(Warm::decode(&empty.encode()), Err(Damage::Value { .. })));
    }
}
