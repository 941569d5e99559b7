//! Devices by ranges of addresses or ports: what both buses have in common.

use std::ops::Range;

/// Values by disjoint ranges, ascending.
#[derive(Clone, Debug)]
pub(crate) struct RangeMap<D>(Vec<(Range<u64>, D)>);

impl<D> Default for RangeMap<D> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<D> RangeMap<D> {
    /// Adds a value, unless its range overlaps another one. Returns the start of that one then.
    pub(crate) fn insert(&mut self, range: Range<u64>, value: D) -> Result<(), u64> {
        if let Some((other, _)) = self.0.iter().find(|(other, _)| range.start < other.end && other.start < range.end) {
            return Err(other.start);
        }
        let at = self.0.partition_point(|(other, _)| other.start <= range.start);
        self.0.insert(at, (range, value));
        Ok(())
    }

    /// The value whose range has all of `len` bytes at `at`, and the offset of `at` in the range.
    pub(crate) fn find(&self, at: u64, len: u64) -> Option<(&D, u64)> {
        let slot = self.0.partition_point(|(range, _)| range.start <= at).checked_sub(1)?;
        let (range, value) = &self.0[slot];
        let inside = at.checked_add(len).is_some_and(|end| end <= range.end);
        inside.then(|| (value, at - range.start))
    }
}
