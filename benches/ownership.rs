//! Cost of memory to a device and to a fork: pins of pages the VM owns, freezing and adopting.

use std::hint::black_box;

use clade_memory::{Access, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage, RamLayout, Store};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vm_memory::{Bytes, GuestAddress};

const BYTES: u64 = 64 << 20;
const PAGES: u64 = BYTES / PAGE_SIZE;
/// Dirty pages come in this many runs, spread evenly.
const RUNS: u64 = 64;

/// 64 MiB, every page written.
fn born(store: &Store) -> GuestRam {
    let layout = RamLayout::new(BYTES).expect("a layout");
    let ram = GuestRam::reserve(&layout, store).expect("addresses");
    ram.populate().expect("memory");
    dirty(&ram, PAGES);
    ram
}

/// Writes a word to each of `pages` pages.
fn dirty(ram: &GuestRam, pages: u64) {
    let run = pages.div_ceil(RUNS);
    for n in 0..pages {
        let page = n / run * (PAGES / RUNS) + n % run;
        ram.memory().write_obj(n, GuestAddress(page * PAGE_SIZE)).expect("a page");
    }
}

fn freeze(ram: &GuestRam) -> RamImage {
    ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("a freeze").0
}

fn pin(c: &mut Criterion) {
    let store = Store::open().expect("a store");
    let mut group = c.benchmark_group("pin_unpin");
    for (name, pages) in [("4K", 1), ("64K", 16), ("2M", 512)] {
        let ram = born(&store);
        let region = &ram.regions()[0];
        // From a block's start: the larger range is one record, the smaller ones split theirs.
        let range = PageRange::with_len(512, pages);
        group.throughput(Throughput::Bytes(pages * PAGE_SIZE));
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| drop(region.pin(black_box(range), Access::Write, PinLifetime::Transient).expect("a pin")));
        });
    }
    group.finish();
}

fn freezing(c: &mut Criterion) {
    let store = Store::open().expect("a store");
    let mut group = c.benchmark_group("freeze_64M");
    group.sample_size(20);
    group.bench_function("first", |b| {
        b.iter_batched_ref(|| born(&store), |ram| freeze(ram), BatchSize::PerIteration);
    });
    for pages in [0, 64, 4096] {
        let ram = born(&store);
        drop(freeze(&ram));
        group.bench_function(BenchmarkId::new("dirty_pages", pages), |b| {
            b.iter_batched(|| dirty(&ram, pages), |()| freeze(&ram), BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn adopting(c: &mut Criterion) {
    let store = Store::open().expect("a store");
    let mut group = c.benchmark_group("adopt_64M");
    group.sample_size(20);
    for pages in [0, 64, 4096] {
        let ram = born(&store);
        drop(freeze(&ram));
        dirty(&ram, pages);
        let image = freeze(&ram);
        let shell = || GuestRam::reserve(image.layout(), &store).expect("addresses");
        group.bench_function(BenchmarkId::new("delta_pages", pages), |b| {
            b.iter_batched_ref(shell, |child| child.adopt(&image).expect("a child"), BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, pin, freezing, adopting);
criterion_main!(benches);
