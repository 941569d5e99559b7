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

/// Pages that a freeze copies and leaves in place: those used by devices since the last freeze.
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

/// A pin since the load of the word ends a merge, and a split starts over.
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
