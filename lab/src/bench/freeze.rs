//! `clade-lab bench freeze`: how long a freeze stops a VM's memory, by the pages written since the last
//! one.
//!
//! Ours leaves the copying to the background; the baseline copies before it returns. Both alternate
//! on one memory, which a thread writes in place of a guest. A second row is the time until the
//! background has copied everything. Until then, the parent's write to a page not yet copied waits
//! for the copy, and so does a child's read. The limit of the pause is one `mprotect` of as many pages.

use std::thread;
use std::time::{Duration, Instant};

use clade_memory::{FreezeMode, GAP_START, GuestRam, PAGE_SIZE, Quiesced, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

use crate::args::BenchArgs;
use crate::bench::{BenchRow, Sample};
use crate::limit::Protected;
use clade::Failure;

/// Pages written between two freezes, after the suffix of the row's name.
const DIRTY: [(&str, u64); 4] = [("0", 0), ("1k", 1 << 10), ("16k", 16 << 10), ("64k", 64 << 10)];
/// First page written, inside a block, so that the first and the last block are split.
const FIRST: u64 = 64;
/// Warm spare layers that an eager freeze copies into, as for a template.
const SPARES: usize = 2;
/// Interval at which the background copy is polled: far less than copying 1,024 pages takes.
const POLL_INTERVAL: Duration = Duration::from_micros(20);
/// Longer than any copy. A background copy that takes longer is a failure, not a figure.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn run(store: &Store, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    store.start_background().map_err(Failure::input)?;
    let mut rows = Vec::new();
    for &mem in &args.mem {
        let least = (DIRTY[DIRTY.len() - 1].1 + FIRST) * PAGE_SIZE;
        if mem < least || mem > GAP_START {
            return Err(Failure::Input(anyhow::anyhow!(
                "{mem} bytes are no size for this benchmark: between {least} and {GAP_START}"
            )));
        }
        let suffix = if args.mem.len() == 1 { String::new() } else { format!("_{}M", mem >> 20) };
        for (name, pages) in DIRTY {
            rows.extend(measure(store, mem, pages, args.samples)?.rows(&format!("{name}{suffix}"), pages));
        }
    }
    Ok(rows)
}

#[derive(Default)]
struct Samples {
    background: Sample,
    eager: Sample,
    limit: Sample,
    complete: Sample,
}

impl Samples {
    fn rows(&self, name: &str, pages: u64) -> Vec<BenchRow> {
        let pause = BenchRow::new(format!("pause_dirty_{name}"), "us", &self.background)
            .limit("mprotect", &self.limit)
            .against("copied at once", &self.eager);
        // The design limits the pause at 64 MiB.
        let pause =
            if pages * PAGE_SIZE == 64 << 20 { pause.target("p99 <= 5000", |r| r.p99() <= 5_000.0) } else { pause };
        let mut rows = vec![pause];
        // Without written pages the background has nothing to copy.
        if pages > 0 {
            let complete = BenchRow::new(format!("complete_dirty_{name}"), "us", &self.complete);
            rows.push(complete.against("copied at once", &self.eager));
        }
        rows
    }
}

/// Memory whose pages are all written and frozen once. Pages private from here on were written
/// since.
fn parent(store: &Store, mem: u64) -> Result<GuestRam, Failure> {
    let ram = GuestRam::reserve(&RamLayout::new(mem).map_err(Failure::run)?, store).map_err(Failure::run)?;
    ram.populate().map_err(Failure::run)?;
    dirty(&ram, 0, mem / PAGE_SIZE, 1)?;
    ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).map_err(Failure::run)?;
    Ok(ram)
}

fn dirty(ram: &GuestRam, first: u64, pages: u64, word: u64) -> Result<(), Failure> {
    let write = |page| ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).map_err(Failure::run);
    (first..first + pages).try_for_each(write)
}

fn measure(store: &Store, mem: u64, pages: u64, samples: usize) -> Result<Samples, Failure> {
    let ram = parent(store, mem)?;
    let mut s = Samples::default();
    let protected = if pages > 0 { Some(Protected::new(pages).map_err(Failure::Run)?) } else { None };
    for round in 0..samples as u64 {
        if let Some(protected) = &protected {
            s.limit.push_us(protected.measure().map_err(Failure::Run)?);
        }
        store.prefill(SPARES).map_err(Failure::run)?;
        dirty(&ram, FIRST, pages, 2 * round)?;
        let begun = Instant::now();
        let (image, report) =
            ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters)).map_err(Failure::run)?;
        s.eager.push_us(begun.elapsed());
        check(report.copied >= pages && report.pending == 0, "an eager freeze left something out")?;
        drop(image);

        dirty(&ram, FIRST, pages, 2 * round + 1)?;
        let begun = Instant::now();
        let (image, report) =
            ram.freeze_in(FreezeMode::Background, &Quiesced::by(&clade_memory::NoWriters)).map_err(Failure::run)?;
        s.background.push_us(begun.elapsed());
        check(
            report.copied >= pages && report.pending == report.copied,
            "a background freeze copied something itself",
        )?;
        while image.is_pending() {
            check(begun.elapsed() < TIMEOUT, "the background does not end")?;
            thread::sleep(POLL_INTERVAL);
        }
        s.complete.push_us(begun.elapsed());
        // Outside both pauses: reap the background's copies, and free their leftovers, before the
        // next freeze.
        ram.finish_background().map_err(Failure::run)?;
    }
    store.drain();
    Ok(s)
}

fn check(right: bool, what: &'static str) -> Result<(), Failure> {
    if right { Ok(()) } else { Err(Failure::Run(anyhow::anyhow!(what))) }
}
