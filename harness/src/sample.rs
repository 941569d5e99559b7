//! Samples and their percentiles.

use std::time::Duration;

use serde::Serialize;

/// Two percentiles of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub p50: f64,
    /// The value that 1 of 100 exceeds.
    pub p99: f64,
}

/// Measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a time, in microseconds.
    pub fn push_us(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1e6);
    }

    /// Whether there is no measurement.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Percentiles by nearest rank: measured values, never interpolated. NaN without samples.
    #[must_use]
    pub fn spread(&self) -> Spread {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |p: f64| {
            let rank = (p * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
        };
        Spread { p50: at(0.50), p99: at(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let mut sample = Sample::default();
        assert!(sample.spread().p50.is_nan());
        sample.push(7.0);
        assert_eq!(sample.spread(), Spread { p50: 7.0, p99: 7.0 });
        let mut hundred = Sample::default();
        (1..=100).rev().for_each(|i| hundred.push(f64::from(i)));
        assert_eq!(hundred.spread(), Spread { p50: 50.0, p99: 99.0 });
    }
}
