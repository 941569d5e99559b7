//! Functions for other VMMs, which the one of Clade does not use: memory that children do not inherit, pages of a
//! pattern, eviction to a disk, a file for a vhost-user backend, and a dirty bitmap.

use std::num::NonZero;

use clade_memory::{Access, PagePattern};
use clade_memory::{
    DontFork, GuestRam, NoWriters, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage, RamLayout, Store,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const PAGES: u64 = 1024;

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_SIZE)
}

fn child(image: &RamImage, store: &Store) -> Result<GuestRam, Box<dyn std::error::Error>> {
    let ram = GuestRam::reserve(image.layout(), store)?;
    ram.adopt(image)?;
    Ok(ram)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::open_small()?;
    let parent = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE)?, &store)?;
    parent.populate()?;
    let region = &parent.regions()[0];
    for page in 0..PAGES {
        parent.memory().write_obj(page, at(page))?;
    }

    // A backend in another process maps the file, and holds a pin of all pages meanwhile.
    let shared = region.share_file()?;
    println!("a vhost-user backend maps {} bytes of one file", shared.len());
    drop(shared);

    // A migration, or another consumer of dirty pages, tracks the writes of rust-vmm crates.
    let page_size = NonZero::new(PAGE_SIZE as usize).ok_or("a page has bytes")?;
    let tracked = parent.tracked(|bytes| AtomicBitmap::new(bytes as usize, page_size))?;
    tracked.write_obj(7u64, at(7))?;
    let bitmap = tracked.iter().next().ok_or("no region")?.bitmap();
    let dirty = (0..PAGES).filter(|page| bitmap.dirty_at((page * PAGE_SIZE) as usize)).count();
    println!("{dirty} page is dirty");
    assert_eq!(dirty, 1);

    // Page 10 is a secret: no child inherits it. Page 11 is a ring, which each child gets fresh.
    let mut ring: PagePattern = [0; PAGE_SIZE as usize];
    ring[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let fresh = store.reference_page(&ring)?;
    region.set_dont_fork(PageRange::with_len(10, 1), Some(DontFork::Zeroed))?;
    region.set_dont_fork(PageRange::with_len(11, 1), Some(DontFork::Fresh(fresh.clone())))?;
    // 256 pages show one page in memory until the guest writes them.
    region.map_reference(PageRange::with_len(512, 256), &fresh)?;

    // The guest is idle: 128 of its pages go to a disk. Those that a device has pinned stay.
    let quiesced = Quiesced::by(&NoWriters);
    let pin = region.pin(PageRange::with_len(100, 1), Access::Write, PinLifetime::LongTerm)?;
    let evicted = region.evict(PageRange::with_len(64, 128), &std::env::temp_dir(), &quiesced)?;
    println!("{} pages are on the disk, page 100 stays for its device", evicted.written);
    assert_eq!(evicted.written, 127);
    drop(pin);

    let (image, _) = parent.freeze(&quiesced)?;
    let child = child(&image, &store)?;
    let word = |ram: &GuestRam, page| ram.memory().read_obj::<u64>(at(page));
    println!("page: parent, child");
    for (page, of_parent, of_child) in
        [(9, 9, 9), (10, 10, 0), (11, 11, u64::MAX), (64, 64, 64), (100, 100, 100), (600, u64::MAX, u64::MAX)]
    {
        println!("{page:4}: {:x}, {:x}", word(&parent, page)?, word(&child, page)?);
        assert_eq!((word(&parent, page)?, word(&child, page)?), (of_parent, of_child));
    }
    Ok(())
}
