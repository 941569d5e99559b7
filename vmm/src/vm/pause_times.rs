//! Durations of a VM's pauses for forks, snapshots and resets: histograms of fixed buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The upper bound of the first bucket, in microseconds. Each further bound is twice the previous
/// one.
const FIRST_BOUND_US: u64 = 16;
/// Buckets with an upper bound: the last is 16.8 s.
const BOUNDS: usize = 21;

/// Counts of durations in buckets whose bounds double, from 16 us to 16.8 s. Counting takes no
/// lock.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS + 1],
    sum_us: AtomicU64,
}

/// A histogram at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistogramCounts {
    /// Upper bounds in microseconds, and the number of durations between the previous bound and
    /// each.
    pub buckets: Vec<(u64, u64)>,
    /// Durations above the last bound.
    pub above: u64,
    /// All durations together, in microseconds.
    pub sum_us: u64,
}

impl HistogramCounts {
    /// Durations counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum::<u64>() + self.above
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let at = (0..BOUNDS).find(|at| us <= FIRST_BOUND_US << at).unwrap_or(BOUNDS);
        // Relaxed: numbers for display, on which no ordering depends.
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// The counts now.
    #[must_use]
    pub fn counts(&self) -> HistogramCounts {
        let of = |at: usize| self.buckets[at].load(Ordering::Relaxed);
        HistogramCounts {
            buckets: (0..BOUNDS).map(|at| (FIRST_BOUND_US << at, of(at))).collect(),
            above: of(BOUNDS),
            sum_us: self.sum_us.load(Ordering::Relaxed),
        }
    }
}

/// The pauses of a VM, by cause.
#[derive(Debug, Default)]
pub struct Pauses {
    /// Forks and checkpoints.
    pub fork: Histogram,
    /// Snapshots.
    pub snapshot: Histogram,
    /// Resets.
    pub reset: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        [0, 16, 17, 32, 1000, 16 << 20, (16 << 20) + 1, u64::from(u32::MAX)]
            .iter()
            .for_each(|us| histogram.record(Duration::from_micros(*us)));
        let counts = histogram.counts();
        let filled: Vec<_> = counts.buckets.iter().copied().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(16, 2), (32, 2), (1024, 1), (16 << 20, 1)]);
        assert_eq!((counts.above, counts.count(), counts.buckets.len()), (2, 8, BOUNDS));
        assert_eq!(counts.sum_us, 16 + 17 + 32 + 1000 + (16 << 20) + (16 << 20) + 1 + u64::from(u32::MAX));
    }
}
