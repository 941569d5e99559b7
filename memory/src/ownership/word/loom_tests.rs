use loom::sync::{Arc, Mutex};
use loom::thread;

use super::*;

/// A freeze, on a thread of its own: shares the page, and on success puts another frame behind it.
fn freeze_and_remap(word: &Arc<Word>, frame: &Arc<Mutex<u32>>) -> thread::JoinHandle<()> {
    let (word, frame) = (word.clone(), frame.clone());
    thread::spawn(move || {
        let mut frame = frame.lock().unwrap();
        if word.try_share().is_ok() {
            *frame = 1;
        }
    })
}

/// A pin races a freeze that shares and then "remaps". If the pin got in without the lock, the
/// freeze must not have taken the page; if the freeze took it, the pin must go through the lock
/// and unshare (I3, I8).
#[test]
fn pin_against_freeze() {
    loom::model(|| {
        let word = Arc::new(Word::new(Ownership::new(true, 0)));
        // The frame behind the page: 0 before, 1 after the freeze's remap, 2 after an unshare.
        // Guarded by the table's lock.
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

/// The device's write through a pin happens before the freeze that takes the page copies or
/// shares it.
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
                // SAFETY: the pin is held, so the bytes have no other user.
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

/// I8 broken on purpose: a pin that checks the bit in one step and counts in another. The model
/// finds the freeze in between.
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

/// A device ends its use while a reset drops written pages: either the reset is refused, or the
/// device's last write came before it and is dropped with the page. A device that pins during the
/// reset gets the page as it is afterwards, never the dropped one.
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
        // The page's contents: 1 as the VM wrote it, 0 as in the image, 7 and 8 as devices write
        // it. And the number of its frame.
        let bytes = Arc::new(Frame(UnsafeCell::new(1)));
        let dropped = Arc::new(Mutex::new(false));
        let device = {
            let (word, bytes) = (word.clone(), bytes.clone());
            thread::spawn(move || {
                // SAFETY: the pin is held, so the bytes have no other user.
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
        // SAFETY: all threads have ended.
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

/// A page pinned while its block is merged and split again: the pin stops the merge, or is
/// counted after it.
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
