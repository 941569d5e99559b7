//! One ownership word: the exclusive bit and the pin count of a page (or of a whole 2 MiB block) in
//! one atomic.
//!
//! ```text
//!   31            8 7      3    2      1        0
//!  +---------------+--------+------+-------+-----------+
//!  |   pin count   |  zero  | used | split | exclusive |
//!  +---------------+--------+------+-------+-----------+
//! ```
//!
//! `used`: pinned since the last freeze. A hint for speed only, set in the step that counts.
//! `split` in a block's record means "ask the pages"; in a page's record, "ask the block, under the
//! lock".
//!
//! Bit and count share a word (R14) so that each of two checks is one atomic step: "exclusive, and
//! count me" (pin) and "not pinned, and no longer exclusive" (share). A pin that loses to a share
//! sees the bit cleared and takes the locked path, where it waits for the freeze to finish. A share
//! that loses to a pin sees the count and spares the page. A sequence count around the sharing
//! would give the same guarantee (I8) at the cost of a second cache line. The model in `loom_tests`
//! explores every interleaving.

use std::fmt;

use crate::sync::{AtomicU32, Ordering};
use crate::testing::sabotage::{Break, broken};

const EXCLUSIVE: u32 = 1;
const SPLIT: u32 = 1 << 1;
const RECENTLY_PINNED: u32 = 1 << 2;
const PIN_SHIFT: u32 = 8;
const PIN: u32 = 1 << PIN_SHIFT;
/// Maximum number of pins of one page. Another one is refused: a count never wraps (I6).
pub const MAX_PINS: u32 = (1 << (32 - PIN_SHIFT)) - 1;

/// A snapshot of a word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ownership(u32);

impl Ownership {
    pub(crate) const fn new(exclusive: bool, pins: u32) -> Self {
        Self((exclusive as u32) | (pins << PIN_SHIFT))
    }
    /// A page's record while the block's record is in force.
    pub(crate) const fn closed() -> Self {
        Self(SPLIT)
    }
    pub(crate) const fn is_exclusive(self) -> bool {
        self.0 & EXCLUSIVE != 0
    }
    /// Whether a device used the page since the last freeze.
    pub(crate) const fn is_used(self) -> bool {
        self.0 & RECENTLY_PINNED != 0
    }
    /// Clears the recently-pinned bit.
    pub(crate) const fn unused(self) -> Self {
        Self(self.0 & !RECENTLY_PINNED)
    }
    pub(crate) const fn is_split(self) -> bool {
        self.0 & SPLIT != 0
    }
    pub(crate) const fn pins(self) -> u32 {
        self.0 >> PIN_SHIFT
    }
}

impl fmt::Debug for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (self.is_split(), self.is_exclusive()) {
            (true, _) => "split",
            (false, true) => "exclusive",
            (false, false) => "not owned",
        };
        write!(f, "{kind}, {} pins", self.pins())
    }
}

/// The reason why a word could not be pinned without the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PinMiss {
    /// Not exclusive: the locked path must unshare first (I3, I9).
    NotExclusive,
    /// A block's record that has been split: ask the pages.
    Split,
    /// [`MAX_PINS`] reached.
    Saturated,
}

/// The reason why a word could not be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShareMiss {
    /// Pinned: the page stays exclusive and the layer gets a copy (I3).
    Pinned,
    /// Was not exclusive to begin with.
    NotExclusive,
    /// A block's record that has been split: ask the pages.
    Split,
}

/// The atomic itself, private to [`crate::ownership`].
#[derive(Debug)]
pub(crate) struct Word(AtomicU32);

impl Word {
    pub(crate) fn new(ownership: Ownership) -> Self {
        Self(AtomicU32::new(ownership.0))
    }

    /// Acquire: pairs with the Release that made the page exclusive or split the block, so
    /// that the copied bytes and the page records are visible to a thread that sees the bit.
    pub(crate) fn load(&self) -> Ownership {
        Ownership(self.0.load(Ordering::Acquire))
    }

    /// Counts one pin if the word is exclusive, in one step (I3, I8).
    ///
    /// Success is Acquire: pairs with [`Word::set_exclusive`]'s Release (the copy is complete
    /// before the device may read it) and with [`Word::unpin`]'s Release in the chain of counts.
    #[inline]
    pub(crate) fn try_pin(&self) -> Result<(), PinMiss> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let now = Ownership(seen);
            if now.is_split() {
                // Acquire, so that the page records behind the split are visible.
                self.0.load(Ordering::Acquire);
                return Err(PinMiss::Split);
            }
            if !now.is_exclusive() {
                return Err(PinMiss::NotExclusive);
            }
            if now.pins() == MAX_PINS {
                return Err(PinMiss::Saturated);
            }
            if broken(Break::CountUnchecked) {
                self.0.fetch_add(PIN, Ordering::Acquire);
                return Ok(());
            }
            match self.0.compare_exchange_weak(
                seen,
                (seen + PIN) | RECENTLY_PINNED,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(()),
                Err(actual) => seen = actual,
            }
        }
    }

    /// Drops one pin. `Err` for a block's record that has been split since, or a page's record that
    /// its block's split has not opened yet.
    ///
    /// Release: the device's use of the page happens before anything a later share does with it.
    #[inline]
    pub(crate) fn unpin(&self) -> Result<(), PinMiss> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let now = Ownership(seen);
            if now.is_split() {
                self.0.load(Ordering::Acquire);
                return Err(PinMiss::Split);
            }
            // R27: an unpinned page was pinned, and has been exclusive throughout.
            assert!(now.pins() > 0 && now.is_exclusive(), "I3: unpin of a page that is {now:?}");
            match self.0.compare_exchange_weak(seen, seen - PIN, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(actual) => seen = actual,
            }
        }
    }

    /// Clears exclusive ownership if there is no pin. Caller holds the table's lock.
    ///
    /// AcqRel: Acquire pairs with [`Word::unpin`] (the device is done before the bytes are frozen);
    /// Release publishes the lost bit before the layer that shares the page.
    pub(crate) fn try_share(&self) -> Result<(), ShareMiss> {
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            let now = Ownership(seen);
            if now.is_split() {
                return Err(ShareMiss::Split);
            }
            if !now.is_exclusive() {
                return Err(ShareMiss::NotExclusive);
            }
            if now.pins() > 0 {
                return Err(ShareMiss::Pinned);
            }
            match self.0.compare_exchange_weak(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(()),
                Err(actual) => seen = actual,
            }
        }
    }

    /// Clears the recently-pinned bit. Returns whether it was set. Relaxed: a hint.
    pub(crate) fn forget_used(&self) -> bool {
        // A closed or split record's bits are meaningless.
        let seen = Ownership(self.0.load(Ordering::Relaxed));
        !seen.is_split() && seen.is_used() && Ownership(self.0.fetch_and(!RECENTLY_PINNED, Ordering::Relaxed)).is_used()
    }

    /// Sets the bit (I2: populate, break-COW, copy on fork). Caller holds the table's lock.
    ///
    /// Release: pairs with [`Word::try_pin`]'s Acquire.
    pub(crate) fn set_exclusive(&self) {
        self.0.fetch_or(EXCLUSIVE, Ordering::Release);
    }

    /// Closes a page's record for a merge into its block's, if it equals `was`, which has no pins.
    /// From here on a pin of this page misses with [`PinMiss::Split`] and takes the locked path,
    /// where the merge is over.
    ///
    /// AcqRel: as [`Word::try_share`].
    pub(crate) fn try_close(&self, was: Ownership) -> bool {
        self.0.compare_exchange(was.0, SPLIT, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Opens a closed page's record, or puts a block's record into force again when all its pages'
    /// records are closed. Caller holds the table's lock; such a word has no other writers.
    ///
    /// Release: pairs with [`Word::try_pin`]'s Acquire.
    pub(crate) fn reopen(&self, ownership: Ownership) {
        self.0.store(ownership.0, Ordering::Release);
    }

    /// Turns a block's record into "ask the pages", if it still equals `was`. The pages' records
    /// stay closed until they are opened with the block's bit and count. Caller holds the table's
    /// lock.
    ///
    /// AcqRel: Acquire, because the block's count is carried over; Release pairs with the Acquire
    /// of a thread that sees the split bit.
    pub(crate) fn try_split(&self, was: Ownership) -> bool {
        self.0.compare_exchange(was.0, SPLIT, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(all(test, loom))]
mod loom_tests;
