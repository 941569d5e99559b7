//! Background freezes under load: vCPUs (threads) and devices (io_uring through pins) write while
//! pages are copied, and children read at once. The model is one byte per page and round: a writer
//! in round r writes r everywhere.

#![allow(clippy::unwrap_used, reason = "a test, although not every function of it is one")]

mod dma;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use clade_memory::{
    Access, Backing, FreezeMode, FreezeReport, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage,
    RamLayout, Store,
};
use clade_test_support::{wait_eq, wait_until};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 12 * 512 + 77;
const BYTES: u64 = PAGES * PAGE_SIZE;

fn parent(store: &Store) -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(BYTES).expect("guest memory"), store).expect("guest memory");
    ram.populate().expect("guest memory");
    ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("guest memory");
    ram
}

fn child(store: &Store, image: &RamImage) -> GuestRam {
    let ram = GuestRam::reserve(image.layout(), store).expect("guest memory");
    ram.adopt(image).expect("guest memory");
    ram
}

fn freeze(ram: &GuestRam, mode: FreezeMode) -> (RamImage, FreezeReport) {
    ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)).expect("guest memory")
}

fn write(ram: &GuestRam, page: u64, value: u64) {
    let bytes: Vec<u8> = value.to_ne_bytes().repeat(PAGE_SIZE as usize / 8);
    ram.memory().write_slice(&bytes, GuestAddress(page * PAGE_SIZE)).expect("guest memory");
}

fn read(ram: &GuestRam, page: u64) -> u64 {
    let mut got = vec![0; PAGE_SIZE as usize];
    ram.memory().read_slice(&mut got, GuestAddress(page * PAGE_SIZE)).expect("guest memory");
    let first = &got[..8];
    assert!(got.chunks(8).all(|word| word == first), "page {page:#x} is torn");
    u64::from_ne_bytes(first.try_into().expect("guest memory"))
}

/// A permutation that visits every page once per round.
fn scattered(n: u64) -> u64 {
    n * 2_777 % PAGES
}

/// The view of another process: no page of the layer may be missing, because it would read as
/// zeros.
#[test]
fn i4_a_layer_for_another_process_is_complete() {
    for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
        let ram = parent(&store);
        (0..PAGES).for_each(|page| write(&ram, page, page + 1));
        let (image, report) = freeze(&ram, FreezeMode::Background);
        assert!(report.pending > 0);
        let map = image.maps().next().unwrap();
        for (range, source) in map.iter() {
            let file = source.layer.read_only_file().unwrap();
            let bytes = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
            assert!(bytes >= range.len() * PAGE_SIZE, "{bytes} bytes behind {range}");
            let lease = std::sync::Arc::new(file.try_clone().unwrap().into());
            let layer = store.foreign_layer(file, source.layer.pages(), lease).unwrap();
            let mut got = vec![0; (range.len() * PAGE_SIZE) as usize];
            layer.read_pages(source.at, &mut got).unwrap();
            for (at, page) in got.chunks(PAGE_SIZE as usize).enumerate() {
                assert_eq!(page[..8], (range.start() + at as u64 + 1).to_ne_bytes(), "page {at} of {range}");
            }
        }
        ram.finish_background().unwrap();
    }
}

/// Rounds: all pages are written, and the VM is frozen. While the delta is filled, the next round's
/// writers run in the parent, and readers in two children. Every image must have exactly the bytes
/// of its round.
fn rounds(store: &Store, rounds: u64, scatter: bool) {
    let ram = parent(store);
    let order = |n: u64| if scatter { scattered(n) } else { n };
    for n in 0..PAGES {
        write(&ram, n, 1);
    }
    for round in 1..=rounds {
        let (image, report) = freeze(&ram, FreezeMode::Background);
        assert!(report.pending > 0);
        let (first, second) = (child(store, &image), child(store, &image));
        thread::scope(|scope| {
            for half in 0..2 {
                let ram = &ram;
                scope.spawn(move || {
                    for n in (half..PAGES).step_by(2) {
                        write(ram, order(n), round + 1);
                    }
                });
            }
            scope.spawn(|| {
                for n in (0..PAGES).rev() {
                    assert_eq!(read(&first, n), round, "a child reads what was frozen: page {n:#x}");
                }
            });
            for n in 0..PAGES {
                let page = scattered(n);
                if n % 3 == 0 {
                    write(&second, page, 0x5ec0);
                }
                let want = if n % 3 == 0 { 0x5ec0 } else { round };
                assert_eq!(read(&second, page), want, "page {page:#x}");
            }
        });
        image.finish_background().expect("a complete copy");
        let late = child(store, &image);
        for n in 0..PAGES {
            assert_eq!(read(&late, n), round, "I4: page {n:#x}");
            assert_eq!(read(&ram, n), round + 1, "no write of the parent is lost: page {n:#x}");
        }
    }
}

#[test]
fn writers_and_readers_at_once_in_huge_pages() {
    rounds(&Store::open().unwrap(), 6, true);
}

#[test]
fn writers_and_readers_at_once_in_small_pages() {
    rounds(&Store::open_small().unwrap(), 6, false);
}

/// A device keeps writing through pins that are taken and dropped while pages are copied: its
/// writes reach no image frozen before, and none of them is lost.
fn devices(store: &Store) {
    const PINNED: u64 = 24;
    let ram = parent(store);
    for round in 1..=12u8 {
        for n in 0..PAGES {
            write(&ram, n, u64::from_ne_bytes([round; 8]));
        }
        // One pin from before the freeze, held across it.
        let region = &ram.regions()[0];
        let held = region.pin(PageRange::with_len(100, PINNED), Access::Write, PinLifetime::LongTerm).expect("a pin");
        let mut held = dma::Device::attach(held);
        let (image, _) = freeze(&ram, FreezeMode::Background);
        let copy = child(store, &image);
        assert_eq!(held.pin().range(), PageRange::with_len(100, PINNED));
        held.write(0xd0);
        let mut at = 200;
        while at + PINNED < PAGES {
            let pin = region.pin(PageRange::with_len(at, PINNED), Access::Write, PinLifetime::LongTerm).expect("a pin");
            let mut device = dma::Device::attach(pin);
            device.write(0xd1);
            write(&ram, at + 1, u64::from_ne_bytes([0xd2; 8]));
            let seen = device.read();
            assert_eq!(seen[0], 0xd1);
            assert_eq!(seen[PAGE_SIZE as usize], 0xd2, "R26: the device sees the CPU's write");
            at += 191;
        }
        for n in 0..PAGES {
            assert_eq!(read(&copy, n), u64::from_ne_bytes([round; 8]), "page {n:#x}");
        }
        ram.finish_background().expect("a complete copy");
        let mut at = 200;
        while at + PINNED < PAGES {
            for n in at..at + PINNED {
                let want = if n == at + 1 { 0xd2 } else { 0xd1 };
                assert_eq!(read(&ram, n), u64::from_ne_bytes([want; 8]), "the guest sees the device's write");
            }
            at += 191;
        }
        assert_eq!(held.read(), vec![0xd0; (PINNED * PAGE_SIZE) as usize]);
        assert_eq!(read(&ram, 100), u64::from_ne_bytes([0xd0; 8]));
    }
}

#[test]
fn devices_write_while_pages_are_copied_in_huge_pages() {
    devices(&Store::open().unwrap());
}

#[test]
fn devices_write_while_pages_are_copied_in_small_pages() {
    devices(&Store::open_small().unwrap());
}

/// A chain of VMs, each frozen in the background while its adopted pages are still pending, and
/// every older VM dropped at once.
#[test]
fn a_chain_of_pending_layers() {
    for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
        let mut ram = parent(&store);
        let mut model = vec![0u64; PAGES as usize];
        for generation in 1..12u64 {
            for n in (generation..PAGES).step_by(5) {
                write(&ram, n, generation);
                model[n as usize] = generation;
            }
            let (image, _) = freeze(&ram, FreezeMode::Background);
            ram = child(&store, &image);
            for n in (0..PAGES).step_by(97) {
                assert_eq!(read(&ram, n), model[n as usize], "generation {generation}, page {n:#x}");
            }
        }
        for n in 0..PAGES {
            assert_eq!(read(&ram, n), model[n as usize], "page {n:#x}");
        }
    }
}

/// VMs are made, frozen and dropped in any order while everything is pending, without hangs or
/// leaks.
#[test]
fn drops_in_any_order() {
    for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
        for order in 0..24usize {
            let ram = parent(&store);
            for n in 0..2000 {
                write(&ram, n, 7);
            }
            let (image, _) = freeze(&ram, FreezeMode::Background);
            let (a, b) = (child(&store, &image), child(&store, &image));
            assert_eq!(read(&a, 1999), 7);
            let mut left: [Option<Box<dyn Send>>; 4] =
                [Some(Box::new(ram)), Some(Box::new(image)), Some(Box::new(a.clone())), Some(Box::new(b))];
            let mut rest = order;
            for n in (1..=4).rev() {
                let at = rest % n;
                rest /= n;
                let some: Vec<usize> = (0..4).filter(|&n| left[n].is_some()).collect();
                drop(left[some[at]].take());
                assert_eq!(read(&a, 1500), 7, "order {order}");
            }
        }
        wait_eq("a layer or a mapping outlived its last user", &(0, 0), || {
            (store.live_layers(), store.budget().used())
        });
    }
}

/// Many freezes in a row beside a writer that is stopped only for each: the load of a template that
/// is forked all the time.
#[test]
fn a_running_counter_is_frozen_at_one_instant() {
    let store = Store::open().unwrap();
    let ram = parent(&store);
    let (pause, paused, stop) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let written = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Every page gets the number of the write, ascending: an image is right if its pages
            // are the last PAGES numbers.
            let mut n = 0;
            while !stop.load(Ordering::Acquire) {
                while pause.load(Ordering::Acquire) {
                    paused.store(true, Ordering::Release);
                    thread::yield_now();
                }
                paused.store(false, Ordering::Release);
                n += 1;
                write(&ram, scattered(n % PAGES), n);
                written.store(n, Ordering::Release);
            }
        });
        while written.load(Ordering::Acquire) < PAGES {
            thread::yield_now();
        }
        for _ in 0..20 {
            pause.store(true, Ordering::Release);
            while !paused.load(Ordering::Acquire) {
                thread::yield_now();
            }
            let last = written.load(Ordering::Acquire);
            let (image, _) = freeze(&ram, FreezeMode::Auto);
            pause.store(false, Ordering::Release);
            let copy = child(&store, &image);
            for n in last + 1 - PAGES..=last {
                assert_eq!(read(&copy, scattered(n % PAGES)), n, "write {n} of {last}");
            }
            // Waits for an acknowledgement of this pause, not of an earlier round's.
            while paused.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Release);
    });
}

/// Figures; run with `--release -- --ignored --nocapture --test-threads=1`.
#[test]
#[ignore = "prints figures"]
fn figures() {
    let store = Store::open().unwrap();
    for (dirty, stride) in [(1 << 10, 1), (16 << 10, 1), (64 << 10, 1), (16 << 10, 2), (16 << 10, 7)] {
        for mode in [FreezeMode::Eager, FreezeMode::Background] {
            let pages = dirty * stride + 64;
            let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), &store).unwrap();
            ram.populate().unwrap();
            ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
            let (mut pauses, mut fills, mut writes, mut again, mut reads) = (vec![], vec![], vec![], vec![], vec![]);
            for round in 0..7 {
                for n in 0..dirty {
                    ram.memory().write_obj(round + 1u64, GuestAddress(n * stride * PAGE_SIZE)).unwrap();
                }
                let begun = Instant::now();
                let (image, _) = freeze(&ram, mode);
                pauses.push(begun.elapsed().as_secs_f64() * 1e6);
                // The parent writes protected pages from the end, which the copier reaches last.
                let begun = Instant::now();
                let some = (dirty / 8).min(1024);
                for n in (dirty - some..dirty).rev() {
                    ram.memory().write_obj(99u64, GuestAddress(n * stride * PAGE_SIZE)).unwrap();
                }
                writes.push(begun.elapsed().as_secs_f64() * 1e6 / some as f64);
                let begun = Instant::now();
                while image.is_pending() {
                    thread::yield_now();
                }
                fills.push(begun.elapsed().as_secs_f64() * 1e6);
                let begun = Instant::now();
                for n in (0..some).rev() {
                    ram.memory().write_obj(99u64, GuestAddress(n * stride * PAGE_SIZE)).unwrap();
                }
                again.push(begun.elapsed().as_secs_f64() * 1e6 / some as f64);
                let copy = child(&store, &image);
                let begun = Instant::now();
                for n in 0..dirty {
                    let _: u64 = copy.memory().read_obj(GuestAddress(n * stride * PAGE_SIZE)).unwrap();
                }
                reads.push(begun.elapsed().as_secs_f64() * 1e6 / dirty as f64);
            }
            let median = |mut v: Vec<f64>| {
                v.sort_by(f64::total_cmp);
                (v[v.len() / 2], v[v.len() - 1])
            };
            let ((pause, worst), (fill, _), (write, _)) = (median(pauses), median(fills), median(writes));
            println!(
                "{dirty:6} dirty, every {stride}: {mode:?}: pause {pause:.0} us (worst {worst:.0}), filled after {fill:.0} us, parent's write {write:.2} us/page, \
                 after it {:.2}, child's read {:.2}",
                median(again).0,
                median(reads).0
            );
        }
    }
}

/// KiB of the mapping at `address` that are mapped 2 MiB at a time.
fn mapped_in_blocks(address: u64) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut here = false;
    for line in smaps.lines() {
        if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-'))
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            here = (start..end).contains(&address);
        } else if here && let Some(kib) = line.strip_prefix("ShmemPmdMapped:") {
            return kib.trim().trim_end_matches(" kB").parse().unwrap();
        }
    }
    0
}

#[test]
fn small_pages_are_put_together_when_all_are_there() {
    let store = Store::open().unwrap();
    if store.backing() != Backing::Huge {
        clade_test_support::skipped("no tmpfs in huge pages");
        return;
    }
    let pages = 4 * 512;
    let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), &store).unwrap();
    ram.populate().unwrap();
    ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
    (0..pages).for_each(|page| ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap());
    let (image, report) = ram.freeze_in(FreezeMode::Background, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
    assert!(report.pending > 0);
    image.finish_background().unwrap();
    // Memory in blocks may be short for a moment: each attempt uses a new child.
    wait_until("the child is mapped in blocks", || {
        let child = GuestRam::reserve(image.layout(), &store).unwrap();
        child.adopt(&image).unwrap();
        let read = |page: u64| child.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap();
        assert!((0..pages).all(|page| read(page) == page + 1));
        mapped_in_blocks(child.regions()[0].host_address()) == pages * 4
    });
}
