//! Rate limits of the calls of a key.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Sustained calls a second for a key.
const PER_SECOND: f64 = 100.0;
/// Burst of calls for a key.
const BURST: f64 = 400.0;

#[derive(Debug)]
struct CallBucket {
    calls: f64,
    at: Instant,
}

/// The calls that each key has left.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<BTreeMap<String, CallBucket>>);

impl Rates {
    /// Returns whether `key` may make one more call at `now`. Names are those of keys, so there are
    /// few.
    pub(crate) fn admit(&self, key: &str, now: Instant) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = all.entry(key.to_owned()).or_insert(CallBucket { calls: BURST, at: now });
        let earned = now.saturating_duration_since(bucket.at).as_secs_f64() * PER_SECOND;
        bucket.calls = (bucket.calls + earned).min(BURST);
        bucket.at = now;
        let admitted = bucket.calls >= 1.0;
        if admitted {
            bucket.calls -= 1.0;
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_key_has_its_burst_and_then_its_rate_alone() {
        let (rates, start) = (Rates::default(), Instant::now());
        let admitted = (0..1000).filter(|_| rates.admit("one", start)).count();
        assert_eq!(admitted, BURST as usize);
        assert!(rates.admit("two", start));
        let later = start + Duration::from_millis(105);
        assert_eq!((0..1000).filter(|_| rates.admit("one", later)).count(), 10);
        let much_later = start + Duration::from_secs(3600);
        assert_eq!((0..1000).filter(|_| rates.admit("one", much_later)).count(), BURST as usize);
    }
}
