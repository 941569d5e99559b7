//! Refusals of a region before it has memory, and the ownership of the rest of its base file.

use std::os::fd::AsFd;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layer::gc::Swept;
use crate::{
    Access, FillError, FreezeMode, GuestRam, NoWriters, PAGE_SIZE, PageRange, PinError, PinLifetime, Quiesced,
    RamError, RamLayout, Store,
};

const PAGES: u64 = 64;

fn reserved(store: &Store) -> GuestRam {
    GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap()
}

fn named(store: &Store) -> GuestRam {
    let ram = reserved(store);
    ram.populate().unwrap();
    (0..PAGES).for_each(|page| ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap());
    ram
}

fn stopped() -> Quiesced<'static> {
    Quiesced::by(&NoWriters)
}

/// As a mapping fails for which the kernel has no memory, after it has removed the one before.
#[test]
fn memory_is_lost_if_a_mapping_of_it_fails_half_way() {
    let store = Store::open_small().unwrap();
    let ram = named(&store);
    let (image, _) = ram.freeze(&stopped()).unwrap();
    assert!(ram.failure().is_none());
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    ram.regions()[0].at.map_private(PageRange::new(3, 7), socket.as_fd(), 0).unwrap_err();
    let lost = |error: &RamError| matches!(error, RamError::Lost(error) if matches!(**error, FillError::Unmapped));
    assert!(ram.failure().is_some_and(|error| matches!(*error, FillError::Unmapped)));
    assert!(lost(&ram.freeze(&stopped()).map(drop).unwrap_err()));
    assert!(lost(&ram.reset(&image, &stopped(), Duration::ZERO).map(drop).unwrap_err()));
    // Its images are whole.
    let child = reserved(&store);
    child.adopt(&image).unwrap();
    assert_eq!(child.memory().read_obj::<u64>(GuestAddress(5 * PAGE_SIZE)).unwrap(), 6);
}

#[test]
fn a_region_without_memory_refuses_all_but_memory() {
    let store = Store::open_small().unwrap();
    let ram = reserved(&store);
    let region = &ram.regions()[0];
    assert!(!region.is_live());
    let pinned = region.pin(PageRange::new(0, 1), Access::Read, PinLifetime::Transient);
    assert!(matches!(pinned, Err(PinError::Empty { .. })), "{pinned:?}");
    assert!(matches!(ram.freeze(&stopped()), Err(RamError::Empty { .. })));
    assert!(matches!(region.discard(PageRange::new(0, 1)), Err(RamError::Empty { .. })));
    assert!(ram.memory().write_obj(1u64, GuestAddress(0)).is_err());
    assert!(ram.memory().get_slice(GuestAddress(0), 8).is_err());
    ram.populate().unwrap();
    assert!(region.is_live());
    ram.memory().write_obj(1u64, GuestAddress(0)).unwrap();
}

#[test]
fn memory_is_given_once() {
    let store = Store::open_small().unwrap();
    let ram = named(&store);
    let (image, _) = ram.freeze(&stopped()).unwrap();
    assert!(matches!(ram.populate(), Err(RamError::NotEmpty { .. })));
    assert!(matches!(ram.adopt(&image), Err(RamError::NotEmpty { .. })));
    let word = |page: u64| ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap();
    assert!((0..PAGES).all(|page| word(page) == page + 1), "what was there is there");
}

/// The rest of a base file is an ordinary layer, though a device keeps a page of it in place.
#[test]
fn a_base_file_is_swept_around_what_devices_hold() {
    let store = Store::open_small().unwrap();
    let ram = named(&store);
    let region = &ram.regions()[0];
    let pin = region.pin(PageRange::new(5, 9), Access::Write, PinLifetime::LongTerm).unwrap();
    drop(ram.freeze_in(FreezeMode::Eager, &stopped()).unwrap());
    assert_eq!(region.state().space.mappings().base_runs(), [PageRange::new(5, 9)]);
    assert_eq!(store.sweep(), Swept::default());
    region.discard(PageRange::new(20, 30)).unwrap();
    store.sweep();
    assert_eq!(store.given_back(), 10);
    assert!((5..9).all(|page| pin.slice().read_obj::<u64>(((page - 5) * PAGE_SIZE) as usize).unwrap() == page + 1));
    drop(pin);
}

#[test]
fn lost_memory_is_not_reset() {
    let store = Store::open_small().unwrap();
    let parent = named(&store);
    parent.freeze(&stopped()).unwrap();
    (0..PAGES).for_each(|page| parent.memory().write_obj(page + 7, GuestAddress(page * PAGE_SIZE)).unwrap());
    let background = store.background().unwrap();
    background.hooks.hold();
    let (image, _) = parent.freeze_in(FreezeMode::Background, &stopped()).unwrap();
    let child = reserved(&store);
    child.adopt(&image).unwrap();
    background.hooks.fail_copies();
    assert!(image.finish_background().is_err());
    let refused = child.reset(&image, &stopped(), Duration::ZERO);
    assert!(matches!(refused, Err(RamError::Lost(_))), "{refused:?}");
}
