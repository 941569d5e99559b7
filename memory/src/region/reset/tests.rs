use super::*;
use crate::{Access, GuestRam, PAGE_SIZE, PinLifetime, Quiesced, RamLayout, Store};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 2048;
/// A wait that ends when the device drops its pin.
const UNTIL_UNPINNED: Duration = Duration::from_secs(3600);

fn frozen(store: &Store) -> (GuestRam, crate::RamImage) {
    let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    (0..PAGES).for_each(|p| put(&ram, p, p + 1));
    let (image, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
    (ram, image)
}

fn put(ram: &GuestRam, page: u64, word: u64) {
    ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
}

fn word(ram: &GuestRam, page: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
}

#[test]
fn only_what_was_written_is_dropped() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    [3, 4, 5, 6, 7, 8, 9].iter().for_each(|p| put(&ram, *p, 0));
    let report = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert_eq!(report, RamResetReport { dropped: 7, restored: 0, remapped: 0 });
    assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
    assert_eq!(ram.stats().unwrap().private_kib, 0);
}

/// Whether nothing holds the lease any more.
fn is_over(end: &std::io::PipeReader) -> bool {
    let mut polled = [rustix::event::PollFd::new(end, rustix::event::PollFlags::empty())];
    rustix::event::poll(&mut polled, Some(&rustix::event::Timespec::default())).unwrap();
    polled[0].revents().contains(rustix::event::PollFlags::HUP)
}

/// An image of another process, published twice. The VM holds the lease of the image that it was
/// reset to last, and the other one's no longer, though no page was mapped anew.
#[test]
fn a_reset_to_the_same_pages_takes_the_later_lease() {
    let (giver, store) = (Store::open().unwrap(), Store::open().unwrap());
    let (_ram, given) = frozen(&giver);
    let source = given.maps().next().unwrap().get(0).unwrap().layer;
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    let image_of = |layer: crate::LayerHandle| {
        let mut map = crate::ImageMap::new();
        map.insert(PageRange::new(0, PAGES), crate::LayerSource { layer, at: 0 });
        crate::RamImage::from_parts(&store, &layout, vec![(map, Vec::new())]).unwrap()
    };
    let lease = || std::io::pipe().map(|(end, lease)| (end, Arc::new(lease.into()))).unwrap();
    let ((first_end, first_lease), (later_end, later_lease)) = (lease(), lease());
    let first = store.foreign_layer(source.read_only_file().unwrap(), source.pages(), first_lease).unwrap();
    let later = store.foreign_layer_again(&first, source.read_only_file().unwrap(), later_lease).unwrap();
    assert_eq!(first.id(), later.id());
    let first = image_of(first);
    let ram = GuestRam::reserve(first.layout(), &store).unwrap();
    ram.adopt(&first).unwrap();
    put(&ram, 3, 0);
    let later = image_of(later);
    let reset = |image: &crate::RamImage| ram.reset(image, &Quiesced::by(&crate::NoWriters), Duration::ZERO);
    assert_eq!(reset(&later).unwrap(), RamResetReport { dropped: 0, restored: 1, remapped: 0 });
    assert!(!is_over(&first_end), "its image is there");
    drop((first, later));
    // A sweep of either store holds every view for a moment.
    clade_test_support::wait_until("the first image's lease is over", || is_over(&first_end));
    assert!(!is_over(&later_end));
    assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
    drop(ram);
    clade_test_support::wait_until("the VM's lease is over", || is_over(&later_end));
    let file = std::fs::File::from(std::os::fd::AsFd::as_fd(&source).try_clone_to_owned().unwrap());
    let known = store.foreign_layer(source.read_only_file().unwrap(), source.pages(), lease().1).unwrap();
    store.foreign_layer_again(&known, file, lease().1).unwrap_err();
}

#[test]
fn what_was_reset_of_two_regions_is_added_up() {
    let mut report = RamResetReport { dropped: 3, restored: 1, remapped: 5 };
    report += RamResetReport { dropped: 4, restored: 1, remapped: 6 };
    assert_eq!(report, RamResetReport { dropped: 7, restored: 2, remapped: 11 });
}

#[test]
fn only_what_shows_something_else_is_mapped_anew() {
    let store = Store::open_small().unwrap();
    let layer = Arc::new(store.layer(100, crate::Backing::Small).unwrap());
    let private = |at| Mapping::Private(crate::layer::LayerOffset { layer: Arc::clone(&layer), at });
    assert!(shows(&Mapping::Zero, &Mapping::Zero) && shows(&private(7), &private(7)));
    assert!(shows(&Mapping::Absent, &Mapping::Zero) && shows(&Mapping::Absent, &private(7)), "R19");
    assert!(!shows(&Mapping::Zero, &private(7)) && !shows(&private(7), &Mapping::Zero));
    assert!(!shows(&private(8), &private(7)));
    let mut mappings = Mappings::default();
    mappings.insert(PageRange::new(0, 20), private(50));
    mappings.insert(PageRange::new(30, 40), private(80));
    mappings.insert(PageRange::new(20, 30), Mapping::Zero);
    let differ = |range, want: &Mapping| -> Vec<PageRange> {
        differing(&mappings, range, want, false).into_iter().map(|(run, _)| run).collect()
    };
    assert_eq!(differ(PageRange::new(10, 40), &private(60)), [PageRange::new(20, 30)]);
    assert_eq!(differ(PageRange::new(10, 30), &Mapping::Zero), [PageRange::new(10, 20)]);
    let anew = differing(&mappings, PageRange::new(10, 40), &private(61), false);
    assert_eq!(anew.len(), 1, "runs are joined");
    assert!(anew[0].0 == PageRange::new(10, 40) && shows(&anew[0].1, &private(61)));
    // Joined, but for a range that stays absent.
    mappings.insert(PageRange::new(40, 50), private(90));
    mappings.insert(PageRange::new(45, 46), Mapping::Absent);
    let joined = |range, want: &Mapping| -> Vec<PageRange> {
        differing(&mappings, range, want, true).into_iter().map(|(run, _)| run).collect()
    };
    assert_eq!(joined(PageRange::new(30, 50), &private(80)), [PageRange::new(30, 45), PageRange::new(46, 50)]);
    assert_eq!(joined(PageRange::new(30, 40), &private(80)), [], "one mapping already");
}

/// Maps every second page anew to what it shows already: each becomes a mapping of its own.
fn split(region: &GuestRegion, map: &Arc<LayerMap>) {
    let mut state = region.live_state().unwrap();
    let page = |n| PageRange::with_len(2 * n, 1);
    let source = |n| Mapping::Private(map.get(2 * n).unwrap());
    let todo: Vec<_> = (0..PAGES / 2).map(|n| (page(n), source(n))).collect();
    state.space.reserve_runs(todo.len()).unwrap();
    region.put_back(&mut state, map, &[], &[], &todo).unwrap();
    assert_eq!(state.space.mappings().len() as u64, PAGES);
}

#[test]
fn a_reset_joins_mappings_in_pieces() {
    let store = Store::open_small().unwrap();
    let (ram, image) = frozen(&store);
    let region = &ram.regions()[0];
    let mappings = || region.live_state().unwrap().space.mappings().len();
    split(region, image.regions()[0].map.map());
    put(&ram, 9, 0);
    let report = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert_eq!((report, mappings()), (RamResetReport { dropped: 1, restored: 0, remapped: PAGES }, 1));
    assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}

/// Near the host's limit, a reset maps what differs alone.
#[test]
fn d5_a_reset_that_may_not_join_is_not_refused() {
    let store = Store::open_with_budget(crate::MappingBudget::with_limit(2 * PAGES));
    let (ram, image) = frozen(&store);
    let region = &ram.regions()[0];
    split(region, image.regions()[0].map.map());
    let mut map = LayerMap::clone(image.regions()[0].map.map());
    (0..100).for_each(|n| map.remove(PageRange::with_len(20 * n, 1)));
    let prepared = |left: u64| {
        let mut state = region.live_state().unwrap();
        state.space.trim();
        let other = store.budget().promise(store.budget().left() - left).unwrap();
        let todo = region.prepare(&mut state, &map).map(|todo| todo.len());
        drop(other);
        todo
    };
    // One mapping more for each run, and one for what it splits.
    assert_eq!(prepared(2 * 201).unwrap(), 200);
    assert_eq!(prepared(2 * 201 - 3).unwrap(), 100);
    assert!(prepared(2 * 100 - 1).is_err());
}

#[test]
fn what_lies_between_pages_that_are_dropped_stays_as_it_was() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    // One in three, five of sixty; and one page in no layer.
    let some = |p: &u64| if *p < 1000 { p.is_multiple_of(3) } else { p % 60 < 5 };
    (0..PAGES).filter(some).for_each(|p| put(&ram, p, 0));
    ram.regions()[0].discard(PageRange::with_len(1001, 1)).unwrap();
    let report = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert_eq!(report.dropped, (0..PAGES).filter(some).count() as u64);
    assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
    assert_eq!(ram.stats().unwrap().private_kib, 0);
}

#[test]
fn back_over_a_freeze_that_came_between() {
    let store = Store::open().unwrap();
    let (ram, first) = frozen(&store);
    // A few pages, which a freeze copies in place; and many, which it remaps.
    put(&ram, 7, 0);
    (1000..1600).for_each(|p| put(&ram, p, 0));
    let (second, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
    put(&ram, 7, 1);
    ram.reset(&second, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert_eq!((word(&ram, 7), word(&ram, 1000)), (0, 0), "not the first image's");
    ram.reset(&first, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert!((0..PAGES).all(|p| word(&ram, p) == p + 1));
    ram.reset(&second, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert_eq!((word(&ram, 7), word(&ram, 1599), word(&ram, 1600)), (0, 0, 1601));
}

#[test]
fn i7_a_pinned_page_refuses_the_reset_and_nothing_changes() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    put(&ram, 5, 55);
    put(&ram, 6, 66);
    let pin = ram.regions()[0].pin(PageRange::with_len(5, 1), Access::Write, PinLifetime::LongTerm).unwrap();
    let refused = ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::from_millis(5));
    assert!(matches!(refused, Err(RamError::Pinned { pages: 1, .. })));
    // A pin after the first check is detected by the region itself.
    let late = GuestRegion::reset_all(ram.regions(), image.regions(), &mut RamResetReport::default());
    assert!(matches!(late, Err(ResetError::Refused(RamError::Pinned { pages: 1, .. }))));
    assert_eq!((word(&ram, 5), word(&ram, 6)), (55, 66));
    assert!(ram.regions()[0].ownership().get(6).0, "what was the VM's own is so again");
    drop(pin);
    ram.reset(&image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    assert_eq!((word(&ram, 5), word(&ram, 6)), (6, 7));
}

#[test]
fn i7_pages_that_are_read_without_a_count_refuse_the_reset() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    put(&ram, 700, 7);
    let pin = ram.regions()[0].pin(PageRange::with_len(5, 2), Access::Read, PinLifetime::Transient).unwrap();
    assert_eq!(ram.regions()[0].ownership().get(5), (false, 0), "not counted");
    // A read after the first check is detected by the region itself.
    let late = GuestRegion::reset_all(ram.regions(), image.regions(), &mut RamResetReport::default());
    assert!(matches!(late, Err(ResetError::Refused(RamError::Pinned { pages: 2, .. }))), "{late:?}");
    assert_eq!(word(&ram, 700), 7, "nothing has changed");
    let device = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        drop(pin);
    });
    ram.reset(&image, &Quiesced::by(&crate::NoWriters), UNTIL_UNPINNED).expect("waited for the device");
    device.join().unwrap();
    assert_eq!(word(&ram, 700), 701);
}

#[test]
fn a_reset_waits_for_a_device_that_is_nearly_done() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    let pin = ram.regions()[0].pin(PageRange::with_len(5, 1), Access::Write, PinLifetime::Transient).unwrap();
    let device = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        pin.slice().write_obj(1u64, 0).unwrap();
        drop(pin);
    });
    ram.reset(&image, &Quiesced::by(&crate::NoWriters), UNTIL_UNPINNED).unwrap();
    device.join().unwrap();
    assert_eq!(word(&ram, 5), 6, "the device was done before its page went");
}

#[test]
fn d5_all_mappings_of_a_reset_are_promised_before_the_first_is_made() {
    let store = Store::open_small().unwrap();
    let (ram, image) = frozen(&store);
    let region = &ram.regions()[0];
    // Every second page of the image has another source: each is mapped anew in the middle of
    // one mapping.
    let mut map = LayerMap::clone(image.regions()[0].map.map());
    (0..40).for_each(|n| map.remove(PageRange::with_len(100 + 2 * n, 1)));
    let mut state = region.live_state().unwrap();
    let todo = region.prepare(&mut state, &map).unwrap();
    let (before, promised) = (state.space.mappings().len(), state.space.promised());
    region.put_back(&mut state, &Arc::new(map), &[], &[], &todo).unwrap();
    let made = state.space.mappings().len() as u64;
    assert_eq!((before as u64, made), (1, 81));
    assert!(promised >= made, "{made} mappings were made, and {promised} promised");
    drop(state);
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}
