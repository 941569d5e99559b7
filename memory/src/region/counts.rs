//! Counts over a region's life: copies by cause, and pins.
//!
//! The kernel copies pages for the guest without this process. Such copies are counted when a
//! freeze, a reset or a pin examines the pages, and again when the counts are read. Pins without a
//! lock count no copies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Pages copied for a VM since it was made, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CowCounts {
    /// Written by the guest, or by this process for it, and copied by the kernel. A page that is
    /// given back before it is counted here is missing. The count never decreases.
    pub guest: u64,
    /// Copied for a pin.
    pub pin: u64,
    /// Copied into the VM at its start, because mappings had run out.
    pub adopt: u64,
    /// Copied ahead of a likely write.
    pub ahead: u64,
    /// Copied into layers by freezes, because the VM had written them.
    pub freeze: u64,
    /// Copied into layers because they were pinned: the pages stay the VM's.
    pub freeze_pinned: u64,
    /// Copied into layers because devices had used them recently: the pages stay the VM's, ahead of
    /// the next pin.
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
    /// Pages read by devices now without a count.
    pub reading: u64,
    /// Pins so far that took a lock. Other pins are not counted.
    pub locked: u64,
    /// Long-term pins, now.
    pub long: u64,
    /// Long-term pins so far.
    pub long_total: u64,
    /// The longest time that a long-term pin was or has been held.
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

/// The counters. Relaxed throughout: statistics that order nothing.
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
    /// The guest's count when last shown. Pages freed by a balloon before they are counted stop
    /// being copies, but the count must not decrease.
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

    /// A freeze copied `copied` pages, of which `pinned` were pinned and `ahead` are likely to be.
    pub(crate) fn count_freeze(&self, copied: u64, pinned: u64, ahead: u64) {
        self.freeze.fetch_add(copied.saturating_sub(pinned + ahead), Ordering::Relaxed);
        self.freeze_pinned.fetch_add(pinned, Ordering::Relaxed);
        self.freeze_ahead.fetch_add(ahead, Ordering::Relaxed);
    }

    /// Pins so far that took the lock.
    pub(crate) fn locked(&self) -> u64 {
        self.locked.load(Ordering::Relaxed)
    }

    /// All counts. `unseen`: copies by the kernel that are not counted yet.
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
        // A balloon has freed eight of them.
        assert_eq!(counters.cow(2).guest, 10);
        counters.count_guest(2);
        assert_eq!((counters.cow(0).guest, counters.cow(9).guest), (10, 11));
    }
}
