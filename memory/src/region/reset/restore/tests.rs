use super::*;
use crate::layer::{LayerId, LayerStorage};
use crate::region::reset::LayerWindows;
use crate::region::reset::RamResetReport;
use crate::testing::failpoint::{Call, plan};
use crate::{Access, GuestRam, PAGE_SIZE, PinLifetime, Quiesced, RamImage, RamLayout, Store};
use rustix::fs::{Advice, MemfdFlags, fadvise, memfd_create};
use rustix::io::{ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// Pages of both regions.
const PAGES: u64 = 2048;
/// The first page of the second region.
const SECOND: u64 = 1200;

/// Returns the address of a page.
fn at(page: u64) -> GuestAddress {
    let gap = if page < SECOND { 0 } else { 1 << 32 };
    GuestAddress(gap + page * PAGE_SIZE)
}

fn empty(store: &Store) -> GuestRam {
    let ranges = [(at(0), SECOND), (at(SECOND), PAGES - SECOND)];
    GuestRam::reserve(&RamLayout::of_ranges(&ranges).unwrap(), store).unwrap()
}

fn adopted(image: &RamImage, store: &Store) -> GuestRam {
    let ram = empty(store);
    ram.adopt(image).unwrap();
    ram
}

fn frozen(store: &Store) -> (GuestRam, RamImage) {
    let ram = empty(store);
    ram.populate().unwrap();
    (0..PAGES).for_each(|page| put(&ram, page, page + 1));
    let image = freeze(&ram);
    (ram, image)
}

fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap().0
}

fn reset(ram: &GuestRam, image: &RamImage) -> (u64, u64, u64) {
    let report = ram.reset(image, &Quiesced::by(&crate::NoWriters), Duration::ZERO).unwrap();
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    let RamResetReport { dropped, restored, remapped } = report;
    (dropped, restored, remapped)
}

/// Writes the first and the last word of a page.
fn put(ram: &GuestRam, page: u64, word: u64) {
    ram.memory().write_obj(word, at(page)).unwrap();
    ram.memory().write_obj(word, GuestAddress(at(page).0 + PAGE_SIZE - 8)).unwrap();
}

/// Returns the first and the last word of a page.
fn words(ram: &GuestRam, page: u64) -> (u64, u64) {
    let word = |offset| ram.memory().read_obj(GuestAddress(at(page).0 + offset)).unwrap();
    (word(0), word(PAGE_SIZE - 8))
}

fn is_whole(ram: &GuestRam) -> bool {
    (0..PAGES).all(|page| words(ram, page) == (page + 1, page + 1))
}

fn private_pages(ram: &GuestRam) -> u64 {
    ram.stats().unwrap().private_kib * 1024 / PAGE_SIZE
}

#[test]
fn few_pages_of_a_run_are_restored_and_many_are_dropped() {
    let run = PageRange::new;
    let few = |own: &[PageRange]| split(own).0;
    assert_eq!(split(&[]), (vec![], vec![]));
    let near = [run(0, 1), run(17, 18), run(34, 36)];
    assert_eq!(split(&near), (near.to_vec(), vec![]), "four pages");
    assert_eq!(split(&[run(0, 1), run(17, 18), run(34, 37)]), (vec![], vec![run(0, 37)]), "five, with their gaps");
    assert_eq!(split(&[run(0, 1), run(18, 23)]), (vec![run(0, 1)], vec![run(18, 23)]), "beyond a gap");
    assert_eq!(split(&[run(8, 12), run(512, 517)]), (vec![run(8, 12)], vec![run(512, 517)]));
    // A crowd of one block is dropped with its gaps.
    let far = |count: u64, pages: u64| (0..count).map(|n| run(512 + n * 40, 512 + pages + n * 40)).collect::<Vec<_>>();
    assert_eq!(split(&far(8, 5)), (vec![], far(8, 5)));
    assert_eq!(split(&far(9, 5)), (vec![], vec![run(512, 517 + 8 * 40)]));
    assert_eq!(split(&far(8, 4)), (far(8, 4), vec![]));
    assert_eq!(split(&far(9, 1)), (vec![], vec![run(512, 513 + 8 * 40)]));
    let mut among = far(9, 5);
    among.insert(0, run(480, 481));
    assert_eq!(few(&among), [run(480, 481)], "of another block");
    assert_eq!(split(&[run(500, 520), run(560, 565)]).1, [run(500, 520), run(560, 565)], "of two blocks");
}

#[test]
fn a_restored_page_stays_the_vms_own_until_a_reset_finds_it_unchanged() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    let far = [3, 100, 101, 600, 601, 602, 2047];
    far.iter().for_each(|page| put(&ram, *page, 0));
    assert_eq!(reset(&ram, &image), (0, 7, 0));
    assert!(is_whole(&ram));
    assert_eq!(private_pages(&ram), 7);
    // Written again, in part; and another one is.
    put(&ram, 100, 0);
    put(&ram, 300, 0);
    ram.memory().write_obj(1u8, GuestAddress(at(2047).0 + PAGE_SIZE - 1)).unwrap();
    assert_eq!(reset(&ram, &image), (5, 3, 0));
    assert!(is_whole(&ram));
    assert_eq!(private_pages(&ram), 3);
    assert_eq!(reset(&ram, &image), (3, 0, 0));
    assert!(is_whole(&ram));
    assert_eq!(private_pages(&ram), 0);
    assert_eq!(reset(&ram, &image), (0, 0, 0));
}

/// The bytes are those of the page's layer, at the page's place in it: not those of the first layer.
#[test]
fn restored_bytes_are_of_the_layer_that_the_image_shows() {
    let store = Store::open().unwrap();
    let (ram, first) = frozen(&store);
    // Copied in place: the VM's own, over the first layer. Then many, which are mapped anew.
    [7, 900, 901].iter().for_each(|page| put(&ram, *page, 1 << 32 | page));
    (1000..1600).for_each(|page| put(&ram, page, 1 << 32 | page));
    let second = freeze(&ram);
    assert_eq!(reset(&ram, &second).1, 0);
    [7, 8, 901, 1111, 1700].iter().for_each(|page| put(&ram, *page, 0));
    let (_, restored, _) = reset(&ram, &second);
    assert_eq!(restored, 5);
    for page in 0..PAGES {
        let is_later = [7, 900, 901].contains(&page) || (1000..1600).contains(&page);
        let wanted = if is_later { 1 << 32 | page } else { page + 1 };
        assert_eq!(words(&ram, page), (wanted, wanted), "page {page}");
    }
    // Back over all of it.
    put(&ram, 8, 0);
    reset(&ram, &first);
    assert!(is_whole(&ram));
}

#[test]
fn a_page_without_a_layer_or_that_cannot_be_read_is_dropped() {
    let store = Store::open().unwrap();
    let ram = empty(&store);
    ram.populate().unwrap();
    put(&ram, 5, 6);
    let image = freeze(&ram);
    // No layer has the page any more: it shows zeros.
    let mut map = LayerMap::clone(image.regions()[0].map.map());
    map.remove(PageRange::with_len(40, 1));
    let mut state = ram.regions()[0].live_state().unwrap();
    let own = [PageRange::with_len(5, 1), PageRange::with_len(40, 1)];
    put(&ram, 5, 0);
    put(&ram, 40, 1);
    plan().arm(0, true);
    let (restored, dropped) = ram.regions()[0].restore(&mut state, &map, &own);
    plan().heal();
    assert_eq!((restored, dropped), (vec![], own.to_vec()), "a layer that cannot be read");
    assert_eq!(words(&ram, 5), (0, 0), "nothing was written");
    assert_eq!(ram.regions()[0].restore(&mut state, &map, &own), (vec![own[0]], vec![own[1]]));
    assert_eq!(words(&ram, 5), (6, 6));
}

/// I2, I3: the bit of a restored page is clear. A device's pin finds the VM's own copy, and what the device
/// writes reaches no layer.
#[test]
fn a_restored_page_can_be_pinned_and_no_image_sees_the_write() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    put(&ram, 5, 0);
    assert_eq!(reset(&ram, &image), (0, 1, 0));
    let region = &ram.regions()[0];
    assert_eq!(region.ownership().get(5), (false, 0));
    let before = region.at.addr(5);
    let pin = region.pin(PageRange::with_len(5, 1), Access::Write, PinLifetime::LongTerm).unwrap();
    assert_eq!(region.ownership().get(5), (true, 1));
    pin.slice().write_obj(77u64, 0).unwrap();
    assert_eq!((words(&ram, 5).0, region.at.addr(5)), (77, before));
    let child = adopted(&image, &store);
    assert_eq!(words(&child, 5), (6, 6), "the image has its own bytes");
    drop(pin);
    assert_eq!(reset(&ram, &image), (0, 1, 0));
    assert!(is_whole(&ram));
    // A freeze shares it again.
    let later = freeze(&ram);
    put(&ram, 5, 1);
    let child = adopted(&later, &store);
    assert_eq!(words(&child, 5), (6, 6));
}

/// The kernel copies a page once, however many resets restore it.
#[test]
fn a_write_to_a_restored_page_is_no_further_copy() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    let copies = || ram.regions()[0].cow_counts().unwrap().guest;
    for round in 0..3 {
        put(&ram, 5, round);
        put(&ram, 800, round);
        assert_eq!(copies(), 2, "round {round}");
        assert_eq!(reset(&ram, &image), (0, 2, 0));
        assert_eq!(copies(), 2, "round {round}");
    }
    reset(&ram, &image);
    put(&ram, 5, 9);
    assert_eq!(copies(), 3, "dropped, and copied anew");
}

/// A reset waits for no disk of a layer: pages that the page cache has are restored, and the others are dropped.
#[test]
fn a_page_that_only_a_disk_has_is_dropped() {
    let store = Store::open().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    (0..PAGES).for_each(|page| file.write_all(&(page + 1).to_ne_bytes().repeat(PAGE_SIZE as usize / 8)).unwrap());
    file.sync_all().unwrap();
    let layer = store.file_layer(file.try_clone().unwrap(), PAGES).unwrap();
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    let mut map = crate::ImageMap::new();
    map.insert(PageRange::new(0, PAGES), crate::LayerSource { layer, at: 0 });
    let image = RamImage::from_parts(&store, &layout, vec![(map, Vec::new())]).unwrap();
    let ram = GuestRam::reserve(&layout, &store).unwrap();
    ram.adopt(&image).unwrap();
    let put = |page: u64| ram.memory().write_obj(0u64, GuestAddress(page * PAGE_SIZE)).unwrap();
    // A write has read the page from the disk.
    put(500);
    let can_tell = file_is_cached(&file, 500);
    assert_eq!(reset(&ram, &image), if can_tell { (0, 1, 0) } else { (1, 0, 0) });
    // A look whether it is cached would have the kernel read it again.
    let is_dropped = |_| {
        put(500);
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        reset(&ram, &image) == (1, 0, 0)
    };
    assert!((0..100).any(is_dropped) || !can_tell);
    let word = |page: u64| ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap();
    assert!((0..PAGES).all(|page| word(page) == page + 1));
}

/// Whether the page cache has a page. Not on file systems that cannot tell, such as tmpfs.
fn file_is_cached(file: &File, page: u64) -> bool {
    let mut byte = [0];
    preadv2(file, &mut [IoSliceMut::new(&mut byte)], page * PAGE_SIZE, ReadWriteFlags::NOWAIT).is_ok()
}

/// Another process, or another user of a snapshot's file, may take pages away from under a layer.
#[test]
fn a_truncated_layer_restores_nothing() {
    let store = Store::open().unwrap();
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    for is_foreign in [false, true] {
        let file = if is_foreign {
            File::from(memfd_create("clade-layer", MemfdFlags::CLOEXEC).unwrap())
        } else {
            tempfile::tempfile().unwrap()
        };
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        file.write_all_at(&7u64.to_ne_bytes().repeat(PAGE_SIZE as usize / 8), 500 * PAGE_SIZE).unwrap();
        let given = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let lease = Arc::new(std::io::pipe().unwrap().1.into());
        let layer = if is_foreign { store.foreign_layer(given, PAGES, lease) } else { store.file_layer(given, PAGES) };
        let mut map = crate::ImageMap::new();
        map.insert(PageRange::new(0, PAGES), crate::LayerSource { layer: layer.unwrap(), at: 0 });
        let image = RamImage::from_parts(&store, &layout, vec![(map, Vec::new())]).unwrap();
        let ram = GuestRam::reserve(&layout, &store).unwrap();
        ram.adopt(&image).unwrap();
        ram.memory().write_obj(9u64, GuestAddress(500 * PAGE_SIZE)).unwrap();
        let mut state = ram.regions()[0].live_state().unwrap();
        let own = [PageRange::with_len(500, 1)];
        let map = image.regions()[0].map.map();
        // The kernel drops the VM's copy too, if the page is truncated away: here it is cut in the middle.
        file.set_len(500 * PAGE_SIZE + 8).unwrap();
        let (restored, dropped) = ram.regions()[0].restore(&mut state, map, &own);
        assert_eq!((restored, dropped), (vec![], own.to_vec()), "foreign: {is_foreign}");
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(500 * PAGE_SIZE)).unwrap(), 9, "nothing was written");
    }
}

/// Forty pages of each region, four of them together.
fn far_apart() -> impl Iterator<Item = u64> {
    let of = |first| (0..10).flat_map(move |n| (first + n * 64)..(first + n * 64 + 4));
    of(0).chain(of(SECOND))
}

/// The number of windows that each region has open.
fn windows(ram: &GuestRam) -> Vec<usize> {
    ram.regions().iter().map(|region| region.state().windows.len()).collect()
}

/// From the second reset to an image on, pages are read through mappings, with the same result: the bytes of the layer
/// and of the page's place in it.
#[test]
fn repeated_resets_read_their_layers_through_windows() {
    let store = Store::open().unwrap();
    let (ram, first) = frozen(&store);
    let later = |page: &u64| (100..700).contains(page) || (1500..2000).contains(page);
    (0..PAGES).filter(later).for_each(|page| put(&ram, page, 1 << 32 | page));
    let second = freeze(&ram);
    let without = store.budget().used();
    let child = adopted(&second, &store);
    let before = store.budget().used();
    for round in 0..4 {
        far_apart().for_each(|page| put(&child, page, 7 + round));
        // Written, and equal to its layer.
        child.memory().write_obj(words(&child, SECOND + 700).0, at(SECOND + 700)).unwrap();
        assert_eq!(reset(&child, &second), (1, 80, 0), "round {round}");
        // Both layers of both regions.
        assert_eq!(windows(&child), if round == 0 { [0, 0] } else { [2, 2] }, "round {round}");
        for page in 0..PAGES {
            let wanted = if later(&page) { 1 << 32 | page } else { page + 1 };
            assert_eq!(words(&child, page), (wanted, wanted), "round {round}, page {page}");
        }
    }
    assert_eq!(store.budget().used() - before, 4);
    // They would keep the files of layers from being freed.
    reset(&child, &first);
    assert_eq!(windows(&child), [0, 0]);
    assert!(is_whole(&child));
    for opened in 0..2 {
        put(&child, 3, 7);
        reset(&child, &first);
        assert_eq!(windows(&child), [opened, 0]);
    }
    put(&child, 3, 1);
    // While a device reads the view.
    let pin = child.regions()[0].pin(PageRange::with_len(5, 1), Access::Read, PinLifetime::Transient).unwrap();
    freeze(&child);
    assert_eq!(windows(&child), [0, 0]);
    drop((pin, child, second));
    store.wait_reclaimed();
    assert_eq!(store.budget().used(), without);
}

/// Without room for a mapping; where the kernel refuses it; and of too many layers.
#[test]
fn repeated_resets_do_without_windows_too() {
    let store = Store::open_with_budget(crate::MappingBudget::with_limit(64));
    let (ram, image) = frozen(&store);
    let written = || far_apart().for_each(|page| put(&ram, page, 0));
    written();
    assert_eq!(reset(&ram, &image), (0, 80, 0));
    written();
    let other = store.budget().promise(store.budget().left() - 32).unwrap();
    assert_eq!(reset(&ram, &image), (0, 80, 0));
    assert_eq!(windows(&ram), [0, 0], "half of the mappings are left to others");
    drop(other);
    written();
    // The second region comes first.
    plan().fail_call(Call::Map, 0);
    assert_eq!(reset(&ram, &image), (0, 80, 0));
    assert_eq!(windows(&ram), [1, 0]);
    assert!(is_whole(&ram));
    let opened = |layers: &[Layer]| {
        let mut windows = LayerWindows::default();
        layers.iter().chain(layers).for_each(|layer| windows.note(layer, store.budget(), &ram.regions()[0].failure));
        windows.len()
    };
    let of_tmpfs = |id| {
        let file = File::from(memfd_create("clade-layer", MemfdFlags::CLOEXEC).unwrap());
        Layer::new(LayerId(id), file, 1, LayerStorage::Foreign, Arc::default())
    };
    assert_eq!(opened(&(0..20).map(of_tmpfs).collect::<Vec<_>>()), 8);
}

/// A page of the layer that is gone is never restored as zeros to a VM that runs on, and no further page is touched.
#[test]
fn a_reset_from_a_layer_that_is_gone_ends_at_once_and_loses_the_vm() {
    let store = Store::open().unwrap();
    let (ram, image) = frozen(&store);
    let region = &ram.regions()[0];
    let map = image.regions()[0].map.map();
    let own: Vec<PageRange> = (0..10).map(|n| PageRange::with_len(n * 64, 4)).collect();
    let write = || own.iter().flat_map(|run| run.start..run.end).for_each(|page| put(&ram, page, 9));
    write();
    let mut state = region.live_state().unwrap();
    // In place of the layer's window one of a file that is cut short: the kernel takes the VM's own copies away too
    // if the layer is.
    let file = File::from(memfd_create("clade-layer", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(PAGES * PAGE_SIZE).unwrap();
    let id = map.get(0).unwrap().layer.id();
    let other = Layer::new(id, file.try_clone().unwrap(), PAGES, LayerStorage::Foreign, Arc::default());
    (0..2).for_each(|_| state.windows.note(&other, store.budget(), &region.failure));
    assert_eq!(region.put_back(&mut state, map, &[], &own, &[]).unwrap().restored, 40);
    assert_eq!(words(&ram, 0), (0, 0), "it was read through that window");
    write();
    file.set_len(0).unwrap();
    let back = region.put_back(&mut state, map, &[], &own, &[]);
    assert!(matches!(back, Err(crate::RamError::Lost(_))), "{back:?}");
    assert_eq!([words(&ram, 1), words(&ram, 579)], [(9, 9); 2], "untouched");
    assert!(region.lost().is_some());
}
