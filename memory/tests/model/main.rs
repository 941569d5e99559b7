//! Random schedules of all operations on a VM's memory, against a byte-level model of every VM.
//! Devices are real: io_uring with registered buffers, and splices for short reads. Both hold
//! frames, not addresses. Memory is two regions with a gap between.
//!
//! | variable | |
//! |---|---|
//! | `CLADE_MODEL_OPS` | total operations, half in huge pages; default 30,000, a million in CI |
//! | `CLADE_MODEL_SEED` | seed of the first schedules, as a failure prints it; default random |
//!
//! Only operations that take place are counted: an unpin without a pin is not.

#![allow(
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    reason = "a test, although not every function of it is one"
)]

#[path = "../dma/mod.rs"]
mod dma;
mod ops;
mod pages;
mod reach;
mod regions;
mod world;

use std::cell::{Cell, RefCell};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clade_memory::{Backing, Store};
use clade_test_support::{Watchdog, wait_eq};
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use ops::Op;
use world::World;

const OPS: u64 = 30_000;
/// Schedules of one seed.
const BATCH: u32 = 16;
/// A schedule takes milliseconds.
const HANG_LIMIT: Duration = Duration::from_secs(600);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")))
}

fn open(backing: Backing) -> Store {
    match backing {
        Backing::Huge => Store::open(),
        Backing::Small => Store::open_small(),
    }
    .unwrap()
}

/// Returns how many operations were carried out.
fn schedule(store: &Store, pages: u64, ops: &[Op]) -> u64 {
    let mut world = World::new(store, pages);
    ops.iter().cloned().for_each(|op| world.run(op));
    world.check_all();
    let done = world.done();
    drop(world);
    // A thread of the store frees layers.
    wait_eq("a layer or a promised mapping outlived its last user", &(0, 0), || {
        (store.live_layers(), store.budget().used())
    });
    done
}

/// Panics since the last verdict.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Shrinking a schedule fails a thousand times: only the first few panics are printed.
fn panic_quietly() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let aloud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if PANICS.fetch_add(1, Ordering::Relaxed) < 3 {
                aloud(info);
            }
        }));
    });
}

/// Runs a batch of schedules. A failing schedule is shrunk, and printed.
fn batch(backing: Backing, store: &RefCell<Option<Store>>, seed: u64) -> u64 {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8] = u8::from(backing == Backing::Small);
    let config = Config {
        cases: BATCH,
        max_shrink_iters: 8192,
        max_shrink_time: 240_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let done = Cell::new(0);
    let outcome = runner.run(&ops::schedule(), |(pages, ops)| {
        // Only a successful schedule returns its store: the leftovers of a failed one must not
        // affect the next.
        let _watchdog = Watchdog::new(HANG_LIMIT, move || format!("CLADE_MODEL_SEED={seed}, {} pages", backing.name()));
        let mine = store.take().unwrap_or_else(|| open(backing));
        done.set(done.get() + schedule(&mine, pages, &ops));
        store.replace(Some(mine));
        Ok(())
    });
    match outcome {
        Ok(()) => done.get(),
        Err(TestError::Fail(reason, (pages, ops))) => {
            PANICS.store(0, Ordering::Relaxed);
            let ops: String = ops.iter().map(|op| format!("    {op:?}\n")).collect();
            panic!("CLADE_MODEL_SEED={seed}, {} pages of memory, {pages} of them: {reason}\n{ops}", backing.name());
        }
        Err(TestError::Abort(reason)) => panic!("CLADE_MODEL_SEED={seed}: {reason}"),
    }
}

fn run(backing: Backing) {
    let ops = number("CLADE_MODEL_OPS").unwrap_or(OPS) / 2;
    let fresh = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 >> 10 << 20;
    let first = number("CLADE_MODEL_SEED").unwrap_or_else(fresh);
    panic_quietly();
    let (store, begun) = (RefCell::new(None), Instant::now());
    let (mut done, mut seed) = (0, first);
    while done < ops {
        done += batch(backing, &store, seed);
        seed += 1;
    }
    let took = begun.elapsed();
    println!(
        "{} pages: {done} operations in {} schedules, seeds {first} to {}, {:.1} s, {:.0} us each",
        backing.name(),
        (seed - first) * u64::from(BATCH),
        seed - 1,
        took.as_secs_f64(),
        took.as_secs_f64() * 1e6 / done as f64
    );
    assert!(done >= ops, "{done} of {ops} operations");
}

#[test]
fn memory_agrees_with_a_byte_model_in_huge_pages() {
    run(Backing::Huge);
}

#[test]
fn memory_agrees_with_a_byte_model_in_small_pages() {
    run(Backing::Small);
}
