//! Ranges of clusters that writes hold while they are in flight.

use std::ops::Range;

/// How a write holds its clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Beside other writes in place: the clusters stay in their file.
    Shared,
    /// Exclusively: the write moves clusters to another file, and may have to read bytes around its
    /// own.
    Alone,
}

/// The ranges held: one for each write in flight, so a list is enough.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    held: Vec<(u64, Range<u64>, Hold)>,
    next: u64,
}

pub(crate) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLocks {
    /// Takes `range`, unless another hold forbids it. Returns the hold's number.
    pub(crate) fn take(&mut self, range: &Range<u64>, hold: Hold) -> Option<u64> {
        let alone = |other: Hold| hold == Hold::Alone || other == Hold::Alone;
        if self.held.iter().any(|(_, held, how)| overlap(held, range) && alone(*how)) {
            return None;
        }
        self.next += 1;
        self.held.push((self.next, range.clone(), hold));
        Some(self.next)
    }

    pub(crate) fn release(&mut self, number: u64) {
        self.held.retain(|(held, ..)| *held != number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_moves_clusters_is_alone_with_them() {
        let mut locks = RangeLocks::default();
        let first = locks.take(&(0..4), Hold::Shared).unwrap();
        let second = locks.take(&(2..6), Hold::Shared).unwrap();
        assert_eq!(locks.take(&(5..7), Hold::Alone), None);
        let apart = locks.take(&(6..7), Hold::Alone).unwrap();
        locks.release(second);
        assert_eq!(locks.take(&(3..6), Hold::Alone), None);
        locks.release(first);
        assert!(locks.take(&(3..6), Hold::Alone).is_some());
        assert_eq!(locks.take(&(6..8), Hold::Shared), None);
        locks.release(apart);
        assert!(locks.take(&(6..8), Hold::Shared).is_some());
    }
}
