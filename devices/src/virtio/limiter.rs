//! Limits of a device's throughput: token buckets, one for bytes and one for operations.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A token bucket's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Rate {
    /// Tokens added per second.
    pub per_second: u64,
    /// The bucket's size in tokens. Default: the tokens of one second.
    pub burst: Option<u64>,
    /// Additional tokens at the beginning, which are not refilled.
    pub once: u64,
}

impl Rate {
    /// `per_second` tokens a second, with a bucket of one second.
    #[must_use]
    pub fn per_second(per_second: u64) -> Self {
        Self { per_second, burst: None, once: 0 }
    }
}

/// The limits of a device. An absent limit means unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Limits {
    /// Limit in bytes.
    pub bytes: Option<Rate>,
    /// Limit in operations.
    pub operations: Option<Rate>,
}

#[derive(Clone, Copy, Debug)]
struct TokenBucket {
    rate: Rate,
    /// Tokens in the bucket. Negative after an operation larger than the bucket, which passes at
    /// once; later operations wait for it.
    level: i128,
    once: u64,
    /// The instant of `level`, advanced by whole tokens only, so that fractions are kept.
    at: Instant,
}

impl TokenBucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: i128::from(Self::most(&rate)), once: rate.once, at: now }
    }

    fn most(rate: &Rate) -> u64 {
        rate.burst.unwrap_or(rate.per_second).max(1)
    }

    fn refill(&mut self, now: Instant) {
        let per_second = u128::from(self.rate.per_second.max(1));
        let tokens = now.saturating_duration_since(self.at).as_nanos() * per_second / 1_000_000_000;
        let level = self.level + tokens as i128;
        let most = i128::from(Self::most(&self.rate));
        if level >= most {
            (self.level, self.at) = (most, now);
        } else {
            self.level = level;
            self.at += nanos(tokens * 1_000_000_000 / per_second);
        }
    }

    /// The wait before an operation may begin; zero if it may begin now.
    fn wait(&self) -> Duration {
        if self.once > 0 || self.level > 0 {
            return Duration::ZERO;
        }
        let missing = 1 - self.level;
        nanos((missing as u128 * 1_000_000_000).div_ceil(u128::from(self.rate.per_second.max(1))))
    }

    fn take(&mut self, tokens: u64) {
        let once = self.once.min(tokens);
        self.once -= once;
        self.level -= i128::from(tokens - once);
    }
}

fn nanos(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Keeps a device within its [`Limits`].
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl Limiter {
    /// A limiter with full buckets.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let now = Instant::now();
        let bucket = |rate: Option<Rate>| rate.map(|rate| TokenBucket::new(rate, now));
        Self { bytes: bucket(limits.bytes), operations: bucket(limits.operations) }
    }

    /// Takes one operation of `bytes` bytes, or takes nothing and returns when to try again.
    ///
    /// # Errors
    /// The instant at which to try again.
    pub fn take(&mut self, bytes: u64) -> Result<(), Instant> {
        self.take_at(bytes, Instant::now())
    }

    /// Whether an operation may begin now. Takes no tokens: for operations whose size is known only
    /// afterwards.
    ///
    /// # Errors
    /// The instant at which to try again.
    pub fn ready(&mut self) -> Result<(), Instant> {
        self.ready_at(Instant::now())
    }

    fn ready_at(&mut self, now: Instant) -> Result<(), Instant> {
        let buckets = [self.bytes.as_mut(), self.operations.as_mut()];
        let wait = buckets.into_iter().flatten().map(|bucket| {
            bucket.refill(now);
            bucket.wait()
        });
        wait.max().filter(|wait| !wait.is_zero()).map_or(Ok(()), |wait| Err(now + wait))
    }

    fn take_at(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
        self.ready_at(now)?;
        self.bytes.iter_mut().for_each(|bucket| bucket.take(bytes));
        self.operations.iter_mut().for_each(|bucket| bucket.take(1));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of operations of `bytes` that pass within `span`, with an attempt every 100 us.
    fn through(limiter: &mut Limiter, start: Instant, span: Duration, bytes: u64) -> u64 {
        let steps = (span.as_micros() / 100) as u32;
        (0..steps).filter(|n| limiter.take_at(bytes, start + Duration::from_micros(100) * *n).is_ok()).count() as u64
    }

    #[test]
    fn the_rate_holds_after_the_burst() {
        let rate = Rate { per_second: 1000, burst: Some(10), once: 5 };
        let mut limiter = Limiter::new(&Limits { operations: Some(rate), bytes: None });
        let start = limiter.operations.unwrap().at;
        assert_eq!(through(&mut limiter, start, Duration::from_millis(1), 1), 10, "at most one each 100 us");
        let later = start + Duration::from_millis(1);
        let count = 10 + through(&mut limiter, later, Duration::from_secs(2), 1);
        // The burst, the one-time tokens, and two seconds.
        assert!((2014..=2017).contains(&count), "{count}");
        let much_later = start + Duration::from_secs(60);
        let count = (0..100).filter(|_| limiter.take_at(1, much_later).is_ok()).count();
        assert_eq!(count, 10, "a bucket does not overflow");
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_paid_for_later() {
        let mut limiter = Limiter::new(&Limits { bytes: Some(Rate::per_second(1 << 20)), operations: None });
        let start = limiter.bytes.unwrap().at;
        assert!(limiter.take_at(4 << 20, start).is_ok());
        let when = limiter.take_at(1, start).unwrap_err();
        let wait = when - start;
        assert!(wait > Duration::from_millis(2999) && wait < Duration::from_millis(3001), "{wait:?}");
        assert!(limiter.take_at(1, when).is_ok());
    }

    #[test]
    fn the_slower_limit_counts_and_nothing_is_taken_while_waiting() {
        let limits = Limits { bytes: Some(Rate::per_second(1 << 30)), operations: Some(Rate::per_second(10)) };
        let mut limiter = Limiter::new(&limits);
        let start = limiter.bytes.unwrap().at;
        assert_eq!(through(&mut limiter, start, Duration::from_secs(1), 4096), 19);
        assert!(limiter.bytes.unwrap().level > (1 << 30) - 20 * 4096);
        assert!(Limiter::new(&Limits::default()).take(u64::MAX).is_ok());
    }
}
