//! `clade-lab bench pin`: the cost of pinning memory for a device.
//!
//! Exclusive memory is pinned and unpinned by one thread, by two, and beside 100 freezes a second.
//! The baseline is the obvious way: a count per page in a table behind a mutex.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clade_memory::{Access, BLOCK_PAGES, GuestRam, GuestRegion, PageRange, PinLifetime, Quiesced, RamLayout, Store};

use crate::args::BenchArgs;
use crate::bench::{BenchRow, Sample};
use clade::Failure;

const BYTES: u64 = 64 << 20;
/// Pins in one measurement; their mean is one sample.
const BATCH: u32 = 2_000;
const MUTEX: &str = "mutex and counts";
const FREEZE_PACE: Duration = Duration::from_millis(10);

pub(crate) fn run(store: &Store, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let ram = GuestRam::reserve(&RamLayout::new(BYTES).map_err(Failure::run)?, store).map_err(Failure::run)?;
    ram.populate().map_err(Failure::run)?;
    let region = &ram.regions()[0];
    let sizes = [("page", 1), ("64K", 16), ("2M", BLOCK_PAGES)];
    let mut rows = Vec::new();
    for (name, pages) in sizes {
        for threads in [1, 2] {
            let ours = on_threads(threads, args.samples, |n| {
                let range = own_range(n, pages);
                pins(region, range, Access::Write)
            })?;
            let table = Locked::new(region.pages());
            let baseline = on_threads(threads, args.samples, |n| Ok(locked(&table, own_range(n, pages))))?;
            let suffix = if threads == 1 { String::new() } else { format!("_{threads}_threads") };
            let row = BenchRow::new(format!("pin_unpin_{name}{suffix}"), "ns", &ours).against(MUTEX, &baseline);
            // Without contention, and with one count.
            let judged = pages == 1 && threads == 1;
            rows.push(if judged { row.limit(MUTEX, &baseline).target("p50 <= 50", |r| r.p50() <= 50.0) } else { row });
        }
    }
    rows.extend(read_pins(store, &ram, args.samples)?);
    let beside = with_freezes(&ram)?;
    rows.push(BenchRow::new("pin_unpin_page_100_freezes_per_s", "ns", &beside));
    Ok(rows)
}

/// Short read pins of pages that a child shares with its parent. Each disk write from such a page
/// takes one.
fn read_pins(store: &Store, ram: &GuestRam, samples: usize) -> Result<Vec<BenchRow>, Failure> {
    let (image, _) = ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).map_err(Failure::run)?;
    let child = GuestRam::reserve(ram.layout(), store).map_err(Failure::run)?;
    child.adopt(&image).map_err(Failure::run)?;
    let region = &child.regions()[0];
    let table = Locked::new(region.pages());
    let mut rows = Vec::new();
    for threads in [1, 2] {
        let ours = on_threads(threads, samples, |n| pins(region, own_range(n, 1), Access::Read))?;
        let baseline = on_threads(threads, samples, |n| Ok(locked(&table, own_range(n, 1))))?;
        let suffix = if threads == 1 { "" } else { "_2_threads" };
        let row = BenchRow::new(format!("read_pin_shared_page{suffix}"), "ns", &ours).against(MUTEX, &baseline);
        rows.push(if threads == 1 {
            row.limit(MUTEX, &baseline).target("p50 <= 150", |r| r.p50() <= 150.0)
        } else {
            row
        });
    }
    Ok(rows)
}

/// Each thread has its own blocks, as devices have their own buffers. Pins of whole blocks use
/// blocks that smaller pins have not split.
fn own_range(thread: u64, pages: u64) -> PageRange {
    let whole = u64::from(pages == BLOCK_PAGES);
    PageRange::with_len((1 + 2 * thread + 8 * whole) * BLOCK_PAGES, pages)
}

fn pins(region: &Arc<GuestRegion>, range: PageRange, access: Access) -> Result<f64, Failure> {
    let begun = Instant::now();
    for _ in 0..BATCH {
        let pin = region.pin(black_box(range), access, PinLifetime::Transient).map_err(Failure::run)?;
        drop(black_box(pin));
    }
    Ok(begun.elapsed().as_nanos() as f64 / f64::from(BATCH))
}

struct Locked(Mutex<Vec<u32>>);

impl Locked {
    fn new(pages: u64) -> Self {
        Self(Mutex::new(vec![0; pages as usize]))
    }

    fn change(&self, range: PageRange, by: i32) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for count in &mut counts[range.start() as usize..range.end() as usize] {
            *count = count.wrapping_add_signed(by);
        }
    }
}

fn locked(table: &Locked, range: PageRange) -> f64 {
    let begun = Instant::now();
    for _ in 0..BATCH {
        table.change(black_box(range), 1);
        table.change(black_box(range), -1);
    }
    begun.elapsed().as_nanos() as f64 / f64::from(BATCH)
}

fn on_threads(
    threads: u64,
    samples: usize,
    measure: impl Fn(u64) -> Result<f64, Failure> + Sync,
) -> Result<Sample, Failure> {
    let run = |n| (0..samples).map(|_| measure(n)).collect::<Result<Vec<f64>, Failure>>();
    let run = &run;
    let all = thread::scope(|scope| {
        let started: Vec<_> = (0..threads).map(|n| scope.spawn(move || run(n))).collect();
        let join = |t: thread::ScopedJoinHandle<'_, _>| {
            t.join().map_err(|_| Failure::Run(anyhow::anyhow!("a thread panicked")))?
        };
        started.into_iter().map(join).collect::<Result<Vec<Vec<f64>>, Failure>>()
    })?;
    let mut sample = Sample::default();
    all.into_iter().flatten().for_each(|value| sample.push(value));
    Ok(sample)
}

/// Every freeze shares the page again, so some pins must make it exclusive first. The p99 shows
/// that cost.
fn with_freezes(ram: &GuestRam) -> Result<Sample, Failure> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let freezer = scope.spawn(|| -> Result<(), Failure> {
            while !stop.load(Ordering::Relaxed) {
                ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).map_err(Failure::run)?;
                thread::sleep(FREEZE_PACE);
            }
            Ok(())
        });
        let mut sample = Sample::default();
        let mut failed = Ok(());
        // Long enough for several freezes.
        let until = Instant::now() + FREEZE_PACE * 20;
        while failed.is_ok() && Instant::now() < until {
            match pins(&ram.regions()[0], own_range(0, 1), Access::Write) {
                Ok(value) => sample.push(value),
                Err(error) => failed = Err(error),
            }
        }
        stop.store(true, Ordering::Relaxed);
        freezer.join().map_err(|_| Failure::Run(anyhow::anyhow!("the freezer panicked")))??;
        failed.map(|()| sample)
    })
}
