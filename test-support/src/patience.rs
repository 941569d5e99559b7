//! The patience of a test that waits for an event.
//!
//! No test is decided by elapsed time: a wait ends when its condition holds. [`Patience`] only
//! bounds a wait whose condition never holds. It counts time in which this process ran: a tick
//! counts at most [`MAX_TICK`], however long the machine stood still between two ticks.

use std::env;
use std::fmt::Debug;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(100);
/// The most that one tick counts.
const MAX_TICK: Duration = Duration::from_millis(200);
/// The time between the first two looks at a condition. It doubles until [`MAX_POLL_INTERVAL`].
const MIN_POLL_INTERVAL: Duration = Duration::from_micros(50);
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Patience of a wait on an idle host of the reference speed.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);

/// The host's factor, if the environment has it: a number of at least 1.
const FACTOR_ENV: &str = "CLADE_HOST_FACTOR";
/// Time of the reference host for [`probe`].
const REFERENCE_PROBE: Duration = Duration::from_millis(12);
/// Time of the reference host to boot the bare guest.
const REFERENCE_BOOT: Duration = Duration::from_millis(40);
/// Largest factor: slower hosts get no more time.
const MAX_FACTOR: f64 = 20.0;

/// The time of the first boot of the bare guest in microseconds, or 0.
static BARE_BOOT_US: AtomicU64 = AtomicU64::new(0);

/// Reports how long a boot of the bare guest took. The first report before [`host_factor`] is
/// measured counts.
pub fn report_bare_boot(took: Duration) {
    let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let _ = BARE_BOOT_US.compare_exchange(0, us, Ordering::Relaxed, Ordering::Relaxed);
}

/// Returns how much slower this host is than the reference host: 1 to 20. Measured once a process,
/// by a boot of the bare guest if one was reported, otherwise by starting threads and filling
/// memory. `CLADE_HOST_FACTOR` overrides it.
pub fn host_factor() -> f64 {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        let given = env::var(FACTOR_ENV).ok().and_then(|text| text.parse::<f64>().ok());
        let boot = Duration::from_micros(BARE_BOOT_US.load(Ordering::Relaxed));
        let measured = || {
            if boot.is_zero() { ratio(probe(), REFERENCE_PROBE) } else { ratio(boot, REFERENCE_BOOT) }
        };
        given.unwrap_or_else(measured).clamp(1.0, MAX_FACTOR)
    })
}

fn ratio(took: Duration, reference: Duration) -> f64 {
    took.as_secs_f64() / reference.as_secs_f64()
}

/// A fixed piece of work: threads that start and end, and memory that is touched first.
fn probe() -> Duration {
    let begun = Instant::now();
    for _ in 0..20 {
        let touched = thread::spawn(|| vec![1_u8; 1 << 20].iter().map(|byte| u64::from(*byte)).sum::<u64>());
        assert_eq!(touched.join().ok(), Some(1 << 20), "a thread adds up what it has written");
    }
    begun.elapsed()
}

/// Number of looks at a count that may fall.
const LOOKS: u32 = 20;

/// The time that a wait may still take.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    left: Duration,
    last: Instant,
}

impl Default for Patience {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl Patience {
    /// Patience of `limit` on the reference host, and of more on a slower one.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self::exactly(limit.mul_f64(host_factor()))
    }

    fn exactly(limit: Duration) -> Self {
        Self { limit, left: limit, last: Instant::now() }
    }

    /// Counts the time since the last call, at most 200 ms. Returns whether some is left. Call
    /// it at least every 100 ms.
    pub fn tick(&mut self) -> bool {
        let elapsed = self.last.elapsed();
        self.count(elapsed)
    }

    fn count(&mut self, elapsed: Duration) -> bool {
        self.last = Instant::now();
        self.left = self.left.saturating_sub(elapsed.min(MAX_TICK));
        !self.left.is_zero()
    }

    /// Returns the whole limit, scaled.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.limit
    }
}

/// Waits until `done` returns a value.
///
/// # Panics
/// When patience ends first, with `what` in the message.
pub fn wait_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_for_within(DEFAULT_LIMIT, what, done)
}

/// The same, for much work: with patience of `limit` on the reference host.
///
/// # Panics
/// As [`wait_for`].
pub fn wait_for_within<T>(limit: Duration, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let (mut patience, mut interval) = (Patience::new(limit), MIN_POLL_INTERVAL);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(patience.tick(), "{what}: waited {:?} of running time", patience.limit());
        thread::sleep(interval);
        interval = (interval * 2).min(MAX_POLL_INTERVAL);
    }
}

/// Returns the lowest of the values that `read` returns within a second: of a count that still falls, as another
/// process closes descriptors.
pub fn lowest<T: Ord>(mut read: impl FnMut() -> T) -> T {
    let mut value = read();
    for _ in 0..LOOKS {
        thread::sleep(Duration::from_secs(1) / LOOKS);
        value = value.min(read());
    }
    value
}

/// Waits until `read` returns `expected`.
///
/// # Panics
/// When patience ends first, with `what` and the last value in the message.
pub fn wait_eq<T: PartialEq + Debug>(what: &str, expected: &T, mut read: impl FnMut() -> T) {
    let (mut patience, mut interval) = (Patience::default(), MIN_POLL_INTERVAL);
    loop {
        let value = read();
        if value == *expected {
            return;
        }
        let limit = patience.limit();
        assert!(patience.tick(), "{what}: {value:?} and not {expected:?} after {limit:?} of running time");
        thread::sleep(interval);
        interval = (interval * 2).min(MAX_POLL_INTERVAL);
    }
}

/// Waits until `done` returns true.
///
/// # Panics
/// As [`wait_for`].
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    wait_for(what, || done().then_some(()));
}

/// Receives a message.
///
/// # Panics
/// When patience ends first or all senders are gone, with `what` in the message.
pub fn receive<T>(what: &str, from: &Receiver<T>) -> T {
    let mut patience = Patience::default();
    loop {
        match from.recv_timeout(TICK) {
            Ok(value) => return value,
            Err(RecvTimeoutError::Disconnected) => panic!("{what}: the sender is gone"),
            Err(RecvTimeoutError::Timeout) => {
                assert!(patience.tick(), "{what}: waited {:?} of running time", patience.limit());
            }
        }
    }
}

/// The same, for much work: with patience of `limit` on the reference host.
///
/// # Panics
/// As [`wait_for`].
pub fn wait_until_within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    wait_for_within(limit, what, || done().then_some(()));
}

/// Aborts the process when it is still held after its time: a test that hangs must fail with a
/// message.
#[derive(Debug)]
pub struct Watchdog(Option<(Sender<()>, JoinHandle<()>)>);

impl Watchdog {
    /// Starts the watchdog of the current test. `about` is printed when it ends the process.
    ///
    /// # Panics
    /// When no thread can be started.
    #[must_use]
    pub fn new(limit: Duration, about: impl FnOnce() -> String + Send + 'static) -> Self {
        let (done, finished) = mpsc::channel::<()>();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        // Here and not on the watchdog's thread: the first call starts threads, and the test may
        // count the process's.
        let mut patience = Patience::new(limit);
        let watch = move || {
            while finished.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                if !patience.tick() {
                    eprintln!("{test} hangs: not done after {:?} of running time; {}", patience.limit(), about());
                    process::abort();
                }
            }
        };
        Self(Some((done, thread::spawn(watch))))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.0.take() {
            drop(done);
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stalled_machine_costs_one_tick() {
        let mut patience = Patience::exactly(Duration::from_millis(500));
        assert!(patience.count(Duration::from_secs(3600)));
        assert_eq!(patience.left, Duration::from_millis(300));
        assert!(patience.count(Duration::from_millis(50)));
        assert_eq!(patience.left, Duration::from_millis(250));
        assert!(patience.count(Duration::from_secs(1)));
        assert!(!patience.count(Duration::from_secs(1)), "the fourth long tick ends it");
    }

    #[test]
    fn the_factor_never_shortens_a_wait() {
        assert!((1.0..=MAX_FACTOR).contains(&host_factor()));
        assert!(Patience::new(Duration::from_secs(1)).limit() >= Duration::from_secs(1));
    }

    #[test]
    fn a_wait_returns_what_its_condition_returns() {
        let mut looks = 0;
        let value = wait_for("the third look", || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(value, 3);
    }

    #[test]
    #[should_panic(expected = "a condition that never holds")]
    fn a_wait_without_an_end_names_its_condition() {
        let mut patience = Patience::exactly(Duration::from_millis(1));
        thread::sleep(Duration::from_millis(5));
        assert!(patience.tick(), "a condition that never holds");
    }

    #[test]
    fn a_watchdog_lets_a_test_end() {
        drop(Watchdog::new(Duration::from_secs(1), String::new));
    }
}
