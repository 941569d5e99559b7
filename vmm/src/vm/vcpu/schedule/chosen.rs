//! The schedules that tests choose.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Relaxed throughout: these publish no other data.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// The longest delay before a kick, in nanoseconds.
    longest: AtomicU64,
    random: AtomicU64,
    early: AtomicBool,
}

impl Schedule {
    /// Waits a random time up to `longest` before each kick.
    pub(crate) fn delay_kicks(&self, longest: Duration, seed: u64) {
        self.longest.store(longest.as_nanos() as u64, Ordering::Relaxed);
        self.random.store(seed, Ordering::Relaxed);
    }

    /// Disables the rule that no vCPU saves before all are parked.
    pub(crate) fn save_early(&self) {
        self.early.store(true, Ordering::Relaxed);
    }

    pub(crate) fn saves_early(&self) -> bool {
        self.early.load(Ordering::Relaxed)
    }

    pub(crate) fn before_kick(&self) {
        let longest = self.longest.load(Ordering::Relaxed);
        if longest == 0 {
            return;
        }
        let seed = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let end = Instant::now() + Duration::from_nanos((mixed ^ mixed >> 27) % longest);
        // Busy-waits, because the delays of interest are shorter than a timer's slack.
        while Instant::now() < end {
            std::hint::spin_loop();
        }
    }
}
