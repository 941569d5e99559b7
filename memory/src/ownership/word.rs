//! One ownership word: the exclusive bit and the pin count of a page (or of a whole 2 MiB block) in one atomic.
//!
//! ```text
//!   31            8 7      3    2      1        0
//!  +---------------+--------+------+-------+-----------+
//!  |   pin count   |  zero  | used | split | exclusive |
//!  +---------------+--------+------+-------+-----------+
//! ```
//!
//! `used` says that it was pinned since the last freeze: a hint, set in the step that counts, on which nothing but speed depends.
//! `split` in a block's record means "ask the pages"; in a page's record, "ask the block, under the lock".
//!
//! Bit and count share a word (R14) so that the two questions that must not be torn apart are each one atomic step:
//! "is it exclusive, and if so count me" (pin) and "is nobody counting, and if so it is no longer exclusive" (share).
//! A pin that loses to a share sees the bit gone and takes the locked path, where it waits for the freeze to finish; a share that
//! loses to a pin sees the count and leaves the page alone. That is what a sequence count around the sharing would give
//! (I8), without a second cache line; the model in `loom_tests` walks every interleaving.

use std::fmt;

use crate::sync::{AtomicU32, Ordering};
use crate::testing::sabotage::{Break, broken};

const EXCLUSIVE: u32 = 1;
const SPLIT: u32 = 1 << 1;
const RECENTLY_PINNED: u32 = 1 << 2;
const PIN_SHIFT: u32 = 8;
const PIN: u32 = 1 << PIN_SHIFT;
/// Most pins one page can have at a time. One more is refused: a count never wraps (I6).
pub const MAX_PINS: u32 = (1 << (32 - PIN_SHIFT)) - 1;

/// A snapshot of a word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ownership(u32);

impl Ownership {
    pub(crate) const fn new(exclusive: bool, pins: u32) -> Self {
        Self((exclusive as u32) | (pins << PIN_SHIFT))
    }
    /// A page's record while its block's stands for it.
    pub(crate) const fn closed() -> Self {
        Self(SPLIT)
    }
    pub(crate) const fn is_exclusive(self) -> bool {
        self.0 & EXCLUSIVE != 0
    }
    /// Whether a device had it since the last freeze.
    pub(crate) const fn is_used(self) -> bool {
        self.0 & RECENTLY_PINNED != 0
    }
    /// But for that.
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

/// Why a word could not be pinned at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PinMiss {
    /// Not exclusive: the locked path must unshare first (I3, I9).
    NotExclusive,
    /// A block's record that has been split: ask the pages.
    Split,
    /// [`MAX_PINS`] reached.
    Saturated,
}

/// Why a word could not be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShareMiss {
    /// Somebody's pin: the page stays exclusive and the layer gets a copy (I3).
    Pinned,
    /// Was not exclusive to begin with.
    NotExclusive,
    /// A block's record that has been split: ask the pages.
    Split,
}

/// The atomic itself. Nothing outside [`crate::ownership`] can reach one.
#[derive(Debug)]
pub(crate) struct Word(AtomicU32);

impl Word {
    pub(crate) fn new(ownership: Ownership) -> Self {
        Self(AtomicU32::new(ownership.0))
    }

    /// Acquire: pairs with the Release of whoever made the page exclusive or split the block, so that the copied bytes and the
    /// page records are visible to whoever sees the bit.
    pub(crate) fn load(&self) -> Ownership {
        Ownership(self.0.load(Ordering::Acquire))
    }

    /// Counts one pin if the word is exclusive, in one step (I3, I8).
    ///
    /// Success is Acquire: pairs with [`Word::set_exclusive`]'s Release (the copy is complete before the device may read it) and with
    /// [`Word::unpin`]'s Release in the chain of counts.
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

    /// Takes one pin back. `Err` when this is a block's record that has been split since, or a page's that its block's split has not opened yet.
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
            // R27: what is unpinned was pinned, and has been exclusive throughout.
            assert!(now.pins() > 0 && now.is_exclusive(), "I3: unpin of a page that is {now:?}");
            match self.0.compare_exchange_weak(seen, seen - PIN, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(actual) => seen = actual,
            }
        }
    }

    /// Gives up exclusive ownership if nobody pins it. Caller holds the table's lock.
    ///
    /// AcqRel: Acquire pairs with [`Word::unpin`] (the device is done before the bytes are frozen); Release publishes the lost bit before the
    /// layer that shares the page.
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

    /// Takes back that a device had it. Returns whether one did. Relaxed: a hint.
    pub(crate) fn forget_used(&self) -> bool {
        // A closed or split record's bits are nobody's.
        let seen = Ownership(self.0.load(Ordering::Relaxed));
        !seen.is_split() && seen.is_used() && Ownership(self.0.fetch_and(!RECENTLY_PINNED, Ordering::Relaxed)).is_used()
    }

    /// Sets the bit (I2: populate, break-COW, copy on fork). Caller holds the table's lock.
    ///
    /// Release: pairs with [`Word::try_pin`]'s Acquire.
    pub(crate) fn set_exclusive(&self) {
        self.0.fetch_or(EXCLUSIVE, Ordering::Release);
    }

    /// Closes a page's record for a merge into its block's, provided it is `was`, which has no pins. From here on a pin of this page
    /// misses with [`PinMiss::Split`] and takes the locked path, where the merge is over.
    ///
    /// AcqRel: as [`Word::try_share`].
    pub(crate) fn try_close(&self, was: Ownership) -> bool {
        self.0.compare_exchange(was.0, SPLIT, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Opens a closed page's record, or makes a block's record, all of whose pages' are closed, stand for them again. Caller holds the table's
    /// lock; nobody else writes to such a word.
    ///
    /// Release: pairs with [`Word::try_pin`]'s Acquire.
    pub(crate) fn reopen(&self, ownership: Ownership) {
        self.0.store(ownership.0, Ordering::Release);
    }

    /// Turns a block's record into "ask the pages", provided it is still `was`; the pages' records are closed until they are opened with the
    /// block's bit and count. Caller holds the table's lock.
    ///
    /// AcqRel: Acquire, because the block's count is carried over; Release pairs with the Acquire of whoever sees the split bit.
    pub(crate) fn try_split(&self, was: Ownership) -> bool {
        self.0.compare_exchange(was.0, SPLIT, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn pin_needs_exclusive() {
        let word = Word::new(Ownership::new(false, 0));
        assert_eq!(word.try_pin(), Err(PinMiss::NotExclusive));
        assert_eq!(word.load().pins(), 0, "a refused pin leaves no count behind");
        word.set_exclusive();
        assert_eq!(word.try_pin(), Ok(()));
        assert_eq!(word.try_share(), Err(ShareMiss::Pinned));
        assert_eq!(word.unpin(), Ok(()));
        assert_eq!(word.try_share(), Ok(()));
        assert_eq!(word.try_share(), Err(ShareMiss::NotExclusive));
    }

    #[test]
    fn i6_a_page_has_24_bits_of_pins() {
        assert_eq!(MAX_PINS, 0xff_ffff);
        let word = Word::new(Ownership::new(true, 0));
        (0..100).for_each(|_| word.try_pin().unwrap());
        assert_eq!(word.load().pins(), 100);
    }

    /// What a freeze copies and leaves in place: pages that devices had since the last one.
    #[test]
    fn a_page_is_used_from_its_first_pin_until_that_is_forgotten() {
        let word = Word::new(Ownership::new(true, 0));
        assert!(!word.load().is_used() && !word.forget_used());
        for pins in 1..4 {
            (0..pins).for_each(|_| word.try_pin().unwrap());
            (0..pins).for_each(|_| word.unpin().unwrap());
            assert!(word.load().is_used(), "after {pins} pins");
            assert!(word.forget_used() && !word.forget_used());
            assert_eq!(word.load(), Ownership::new(true, 0));
        }
        assert!(!Word::new(Ownership::closed()).forget_used());
    }

    /// A pin that came since the word was looked at ends a merge, and a split begins anew.
    #[test]
    fn i12_what_has_changed_is_neither_closed_nor_split() {
        let was = Ownership::new(true, 0);
        let word = Word::new(was);
        word.try_pin().unwrap();
        let now = word.load();
        assert!(!word.try_close(was) && !word.try_split(was));
        assert_eq!(word.load(), now);
        assert!(word.try_split(now));
        assert!(word.load().is_split());
    }

    #[test]
    fn saturation_is_an_error_not_a_wrap() {
        let word = Word::new(Ownership::new(true, MAX_PINS - 1));
        assert_eq!(word.try_pin(), Ok(()));
        assert_eq!(word.try_pin(), Err(PinMiss::Saturated));
        assert_eq!(word.load().pins(), MAX_PINS);
        assert!(word.load().is_exclusive());
    }

    #[test]
    #[should_panic(expected = "I3: unpin")]
    fn unpin_without_a_pin_is_caught() {
        let _ = Word::new(Ownership::new(true, 0)).unpin();
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    use super::*;

    /// A freeze, on a thread of its own: shares the page, and if it may, puts another frame behind it.
    fn freeze_and_remap(word: &Arc<Word>, frame: &Arc<Mutex<u32>>) -> thread::JoinHandle<()> {
        let (word, frame) = (word.clone(), frame.clone());
        thread::spawn(move || {
            let mut frame = frame.lock().unwrap();
            if word.try_share().is_ok() {
                *frame = 1;
            }
        })
    }

    /// A pin races a freeze that shares and then "remaps". If the pin got in without the lock, the freeze must not have taken the
    /// page; if the freeze took it, the pin must go through the lock and unshare (I3, I8).
    #[test]
    fn pin_against_freeze() {
        loom::model(|| {
            let word = Arc::new(Word::new(Ownership::new(true, 0)));
            // The frame behind the page: 0 before, 1 after the freeze's remap, 2 after an unshare. Guarded by the table's lock.
            let frame = Arc::new(Mutex::new(0u32));
            let freezer = freeze_and_remap(&word, &frame);
            let got = match word.try_pin() {
                Ok(()) => None,
                Err(_) => {
                    let mut frame = frame.lock().unwrap();
                    *frame = 2;
                    word.set_exclusive();
                    word.try_pin().unwrap();
                    Some(2)
                }
            };
            let at_pin = got;
            freezer.join().unwrap();
            let frame = *frame.lock().unwrap();
            // The frame pinned is the frame still behind the page.
            assert_eq!(frame, at_pin.unwrap_or(0), "a pinned page was remapped");
            assert!(word.load().is_exclusive());
            word.unpin().unwrap();
            assert_eq!(word.load().pins(), 0);
        });
    }

    /// The device's write through a pin happens before the freeze that takes the page copies or shares it.
    #[test]
    fn unpin_against_freeze() {
        use loom::cell::UnsafeCell;
        struct Bytes(UnsafeCell<u32>);
        // SAFETY: loom's cell checks every access for a race; that check is the point of the model.
        unsafe impl Sync for Bytes {}
        // SAFETY: as above.
        unsafe impl Send for Bytes {}
        loom::model(|| {
            let word = Arc::new(Word::new(Ownership::new(true, 1)));
            let bytes = Arc::new(Bytes(UnsafeCell::new(0)));
            let device = {
                let (word, bytes) = (word.clone(), bytes.clone());
                thread::spawn(move || {
                    // SAFETY: the pin is held: nobody else touches the bytes.
                    bytes.0.with_mut(|b| unsafe { *b = 7 });
                    word.unpin().unwrap();
                })
            };
            if word.try_share().is_ok() {
                // SAFETY: shared means no pin: the device is done.
                assert_eq!(bytes.0.with(|b| unsafe { *b }), 7);
            }
            device.join().unwrap();
        });
    }

    /// I8 broken on purpose: a pin that looks at the bit in one step and counts in another. The model finds the freeze that comes between.
    #[test]
    #[should_panic(expected = "a pinned page was remapped")]
    fn a_pin_in_two_steps_is_caught() {
        loom::model(|| {
            let word = Arc::new(Word::new(Ownership::new(true, 0)));
            let frame = Arc::new(Mutex::new(0u32));
            let freezer = freeze_and_remap(&word, &frame);
            let looked = word.load().is_exclusive();
            if looked {
                word.0.fetch_add(PIN, Ordering::Acquire);
            }
            freezer.join().unwrap();
            assert!(!looked || *frame.lock().unwrap() == 0, "a pinned page was remapped");
        });
    }

    /// A device is done and lets go while a reset drops what was written: either the reset is refused, or the device's last write was before it and
    /// goes with the page. A device that pins during the reset gets the page as it is afterwards, never the one that goes.
    #[test]
    fn unpin_against_reset() {
        use loom::cell::UnsafeCell;
        struct Frame(UnsafeCell<u32>);
        // SAFETY: loom's cell checks every access for a race; that check is the point of the model.
        unsafe impl Sync for Frame {}
        // SAFETY: as above.
        unsafe impl Send for Frame {}
        loom::model(|| {
            let word = Arc::new(Word::new(Ownership::new(true, 1)));
            // What the page holds: 1 as the VM wrote it, 0 as the image has it, 7 and 8 as devices write it. And which frame it is.
            let bytes = Arc::new(Frame(UnsafeCell::new(1)));
            let dropped = Arc::new(Mutex::new(false));
            let device = {
                let (word, bytes) = (word.clone(), bytes.clone());
                thread::spawn(move || {
                    // SAFETY: the pin is held: nobody else touches the bytes.
                    bytes.0.with_mut(|b| unsafe { *b = 7 });
                    word.unpin().unwrap();
                })
            };
            let next = {
                let (word, bytes, dropped) = (word.clone(), bytes.clone(), dropped.clone());
                thread::spawn(move || {
                    let mut taken = word.try_pin().is_ok();
                    if !taken {
                        let _held = dropped.lock().unwrap();
                        // The locked path breaks COW before the bit is set.
                        word.set_exclusive();
                        taken = word.try_pin().is_ok();
                    }
                    assert!(taken);
                    let pinned = *dropped.lock().unwrap();
                    let _ = &bytes;
                    // The frame that was pinned is still there when the device is done with it.
                    assert_eq!(pinned, *dropped.lock().unwrap(), "a pinned page was reset away");
                    word.unpin().unwrap();
                })
            };
            let reset = {
                let mut gone = dropped.lock().unwrap();
                let shared = word.try_share().is_ok();
                if shared {
                    // SAFETY: shared means no pin: the devices are done with this frame.
                    bytes.0.with_mut(|b| unsafe {
                        assert_eq!(*b, 7, "dropped before the device was done");
                        *b = 0;
                    });
                    *gone = true;
                }
                shared
            };
            device.join().unwrap();
            next.join().unwrap();
            // SAFETY: everybody has ended.
            let left = bytes.0.with(|b| unsafe { *b });
            assert_eq!(
                left,
                if reset { 0 } else { 7 },
                "a refused reset changes nothing, one that was not leaves the image's bytes"
            );
            assert_eq!(word.load().pins(), 0);
        });
    }

    /// The two words and the lock of a block of one page, as the table uses them.
    struct Block {
        block: Word,
        page: Word,
        lock: Mutex<()>,
    }

    impl Block {
        fn pin(&self) {
            match self.block.try_pin() {
                Ok(()) => return,
                Err(PinMiss::Split) if self.page.try_pin().is_ok() => return,
                Err(_) => {}
            }
            let _held = self.lock.lock().unwrap();
            if self.block.try_pin().is_err() {
                self.page.try_pin().unwrap();
            }
        }
        fn unpin(&self) {
            if self.block.unpin().is_ok() {
                return;
            }
            while self.page.unpin().is_err() {
                drop(self.lock.lock().unwrap());
            }
        }
        fn split(&self) {
            let _held = self.lock.lock().unwrap();
            loop {
                let was = self.block.load();
                if was.is_split() {
                    return;
                }
                if self.block.try_split(was) {
                    self.page.reopen(was);
                    return;
                }
                thread::yield_now();
            }
        }
        fn merge(&self) {
            let _held = self.lock.lock().unwrap();
            let first = self.page.load();
            if self.block.load().is_split() && first.pins() == 0 && self.page.try_close(first) {
                self.block.reopen(first);
            }
        }
        fn pins(&self) -> u32 {
            let block = self.block.load();
            if block.is_split() { self.page.load().pins() } else { block.pins() }
        }
    }

    /// A block pinned and unpinned while it is split: no count is lost or invented.
    #[test]
    fn split_against_pin_and_unpin() {
        loom::model(|| {
            let both = Arc::new(Block {
                block: Word::new(Ownership::new(true, 1)),
                page: Word::new(Ownership::closed()),
                lock: Mutex::new(()),
            });
            let other = {
                let both = both.clone();
                thread::spawn(move || {
                    both.unpin();
                    both.pin();
                })
            };
            both.split();
            other.join().unwrap();
            assert!(both.block.load().is_split());
            assert_eq!(both.pins(), 1);
        });
    }

    /// A page pinned while its block is merged and split again: the pin stops the merge, or is counted after it.
    #[test]
    fn merge_and_split_against_pin() {
        loom::model(|| {
            let both = Arc::new(Block {
                block: Word::new(Ownership::closed()),
                page: Word::new(Ownership::new(true, 0)),
                lock: Mutex::new(()),
            });
            let other = {
                let both = both.clone();
                thread::spawn(move || {
                    both.merge();
                    both.split();
                })
            };
            both.pin();
            assert_eq!(both.pins().max(1), 1);
            other.join().unwrap();
            assert_eq!(both.pins(), 1, "a pin was lost in a merge or a split");
            both.unpin();
            assert_eq!(both.pins(), 0);
        });
    }
}
