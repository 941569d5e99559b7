//! Counts over a region's life: copies by what made them, and pins.
//!
//! The guest copies pages without this process: the kernel does. What it has copied is counted when
//! it is looked at, at a freeze, a reset or a pin, and once more when the counts are asked for.
//! Nothing is counted where a pin takes no lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Pages that a VM has been given copies of, by cause, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CowCounts {
    /// Written by the guest, or by this process for it: the kernel has copied them. A page that is
    /// given back before it is seen here is missing. It never becomes less.
    pub guest: u64,
    /// Copied for a pin.
    pub pin: u64,
    /// Copied into the VM when it was started, for want of mappings.
    pub adopt: u64,
    /// Copied ahead of a write that was likely.
    pub ahead: u64,
    /// Copied into layers by freezes, because the VM had written them.
    pub freeze: u64,
    /// Copied into layers because they were pinned: they stay the VM's.
    pub freeze_pinned: u64,
    /// Copied into layers because devices had them lately: they stay the VM's, ahead of the next
    /// pin.
    pub freeze_ahead: u64,
}

impl std::ops::AddAssign for CowCounts {
    fn add_assign(&mut self, other: Self) {
        self.guest += other.guest;
        self.pin += other.pin;
        self.adopt += other.adopt;
        self.ahead += other.ahead;
        self.freeze += other.freeze;
        self.freeze_pinned += other.freeze_pinned;
        self.freeze_ahead += other.freeze_ahead;
    }
}

/// Pins of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinCounts {
    /// Pins over all pages, now.
    pub now: u64,
    /// Pages that devices read now without a count.
    pub reading: u64,
    /// Pins so far that took a lock: the others are not counted.
    pub locked: u64,
    /// Long-term pins, now.
    pub long: u64,
    /// Long-term pins so far.
    pub long_total: u64,
    /// The longest that a long-term pin was held, or has been held so far.
    pub longest: Duration,
}

impl std::ops::AddAssign for PinCounts {
    fn add_assign(&mut self, other: Self) {
        self.now += other.now;
        self.reading += other.reading;
        self.locked += other.locked;
        self.long += other.long;
        self.long_total += other.long_total;
        self.longest = self.longest.max(other.longest);
    }
}

/// The counters. Relaxed throughout: numbers to be shown, by which nothing is ordered.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    guest: AtomicU64,
    pin: AtomicU64,
    adopt: AtomicU64,
    ahead: AtomicU64,
    freeze: AtomicU64,
    freeze_pinned: AtomicU64,
    freeze_ahead: AtomicU64,
    locked: AtomicU64,
    /// What was shown last as the guest's. Pages that a balloon gives back unseen are not copies any
    /// more, and what is counted never becomes less.
    shown: AtomicU64,
}

impl Counters {
    /// The kernel has copied `pages` for writes.
    pub(crate) fn count_guest(&self, pages: u64) {
        self.guest.fetch_add(pages, Ordering::Relaxed);
    }

    /// A pin took the lock.
    pub(crate) fn count_locked(&self) {
        self.locked.fetch_add(1, Ordering::Relaxed);
    }

    /// `pages` were copied for a pin.
    pub(crate) fn count_pin(&self, pages: u64) {
        self.pin.fetch_add(pages, Ordering::Relaxed);
    }

    /// `pages` were copied into a new VM.
    pub(crate) fn count_adopted(&self, pages: u64) {
        self.adopt.fetch_add(pages, Ordering::Relaxed);
    }

    /// `pages` were copied ahead.
    pub(crate) fn count_ahead(&self, pages: u64) {
        self.ahead.fetch_add(pages, Ordering::Relaxed);
    }

    /// A freeze copied `copied`, of them `pinned` that were and `ahead` that are likely to be.
    pub(crate) fn count_freeze(&self, copied: u64, pinned: u64, ahead: u64) {
        self.freeze.fetch_add(copied.saturating_sub(pinned + ahead), Ordering::Relaxed);
        self.freeze_pinned.fetch_add(pinned, Ordering::Relaxed);
        self.freeze_ahead.fetch_add(ahead, Ordering::Relaxed);
    }

    /// Pins so far that took the lock.
    pub(crate) fn locked(&self) -> u64 {
        self.locked.load(Ordering::Relaxed)
    }

    /// All of them. `unseen`: what the kernel has copied since that was last counted.
    pub(crate) fn cow(&self, unseen: u64) -> CowCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let guest = of(&self.guest) + unseen;
        CowCounts {
            guest: self.shown.fetch_max(guest, Ordering::Relaxed).max(guest),
            pin: of(&self.pin),
            adopt: of(&self.adopt),
            ahead: of(&self.ahead),
            freeze: of(&self.freeze),
            freeze_pinned: of(&self.freeze_pinned),
            freeze_ahead: of(&self.freeze_ahead),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_has_copied_never_becomes_less() {
        let counters = Counters::default();
        assert_eq!(counters.cow(10).guest, 10);
        // A balloon has taken eight of them.
        assert_eq!(counters.cow(2).guest, 10);
        counters.count_guest(2);
        assert_eq!((counters.cow(0).guest, counters.cow(9).guest), (10, 11));
    }
}
