//! The time elapsed since a state was saved, by the host's clocks.
//!
//! | state saved | clock | reason |
//! |---|---|---|
//! | in this boot of the host | `CLOCK_BOOTTIME` | never stepped, counts during host suspend |
//! | in another boot or on another host | the wall clock | the only clock both have in common |
//!
//! The boot id (`/proc/sys/kernel/random/boot_id`) selects the clock.

use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A time of the host's wall clock, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WallClock(u64);

impl WallClock {
    /// The current time; 0 if it is not representable.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(0))
    }

    /// This time less `by`.
    #[cfg(test)]
    pub(super) fn earlier(self, by: Duration) -> Self {
        Self(self.0 - by.as_nanos() as u64)
    }
}

/// A time of `CLOCK_BOOTTIME`, comparable within one boot of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTime {
    /// The boot id: upper and lower 64 bits.
    boot: (u64, u64),
    /// `CLOCK_BOOTTIME` in nanoseconds. Negative for a time before the boot.
    nanoseconds: i64,
}

impl BootTime {
    /// The current time. `None` if the boot id or the clock cannot be read.
    #[must_use]
    pub fn now() -> Option<Self> {
        let boot = boot_id()?;
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is a timespec that the call may write.
        let rc = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
        (rc == 0).then(|| Self { boot, nanoseconds: now.tv_sec * 1_000_000_000 + now.tv_nsec })
    }

    /// This time less `by`.
    #[cfg(test)]
    pub(super) fn earlier(self, by: Duration) -> Self {
        Self { nanoseconds: self.nanoseconds - by.as_nanos() as i64, ..self }
    }

    fn until(self, now: Self) -> Option<Duration> {
        let passed = now.nanoseconds.saturating_sub(self.nanoseconds);
        (self.boot == now.boot).then(|| Duration::from_nanos(u64::try_from(passed).unwrap_or(0)))
    }
}

fn boot_id() -> Option<(u64, u64)> {
    static ID: OnceLock<Option<(u64, u64)>> = OnceLock::new();
    *ID.get_or_init(|| parse_id(&fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?))
}

fn parse_id(text: &str) -> Option<(u64, u64)> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let (high, low) = digits.split_at_checked(16).filter(|(_, low)| low.len() == 16)?;
    Some((u64::from_str_radix(high, 16).ok()?, u64::from_str_radix(low, 16).ok()?))
}

/// The time elapsed since a save at `wall` and `boot`, two readings of the same instant. Zero if
/// the instant is unknown, or if the wall clock applies and was stepped back since.
pub(super) fn elapsed(wall: WallClock, boot: Option<BootTime>) -> Duration {
    elapsed_at(wall, boot, WallClock::now(), BootTime::now())
}

fn elapsed_at(wall: WallClock, boot: Option<BootTime>, wall_now: WallClock, boot_now: Option<BootTime>) -> Duration {
    let in_boot = boot.zip(boot_now).and_then(|(then, now)| then.until(now));
    let by_wall = || if wall.0 == 0 { 0 } else { wall_now.0.saturating_sub(wall.0) };
    in_boot.unwrap_or_else(|| Duration::from_nanos(by_wall()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn wall(seconds: u64) -> WallClock {
        WallClock(seconds * SECOND)
    }

    fn boot(id: u64, seconds: i64) -> Option<BootTime> {
        Some(BootTime { boot: (id, 0), nanoseconds: seconds * SECOND as i64 })
    }

    #[test]
    fn a_step_of_the_wall_clock_moves_nobody_within_one_boot() {
        for stepped in [10, 1_000, 1_000_000] {
            let passed = elapsed_at(wall(1_000), boot(1, 50), wall(stepped), boot(1, 57));
            assert_eq!(passed, Duration::from_secs(7));
        }
        assert_eq!(elapsed_at(wall(1), boot(1, 50), wall(9), boot(1, 40)), Duration::ZERO, "never backwards");
    }

    #[test]
    fn another_boot_counts_by_the_wall_clock() {
        let passed = |then, now| elapsed_at(wall(1_000), then, wall(1_060), now);
        assert_eq!(passed(boot(1, 50), boot(2, 5_000)), Duration::from_secs(60));
        assert_eq!(passed(None, boot(2, 5_000)), Duration::from_secs(60), "saved before there was this");
        assert_eq!(passed(boot(1, 50), None), Duration::from_secs(60));
        assert_eq!(elapsed_at(WallClock(0), None, wall(1_060), None), Duration::ZERO, "not known");
    }

    #[test]
    fn this_host_says_which_boot_it_is() {
        assert_eq!(parse_id("0123456789abcdef-0000-00000000001\n"), None);
        let id = parse_id("01234567-89ab-cdef-0000-000000000010\n");
        assert_eq!(id, Some((0x0123_4567_89ab_cdef, 16)));
        let (then, now) = (BootTime::now().unwrap(), BootTime::now().unwrap());
        assert!(then.until(now).unwrap() < Duration::from_secs(60));
    }
}
