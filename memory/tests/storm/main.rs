//! Everything at once, from many threads: vCPUs that write, devices that hold frames, freezes,
//! forks, resets, discards, evictions, reclaim, compaction, sweeps, and the end of VMs and images.
//!
//! The oracle uses none of the code's records. From the bytes alone (see `stamp.rs`) it determines:
//!
//! * the contents that a device must read from its frames, short or long,
//! * the contents that an image shows to its children, permanently,
//! * the contents that a VM shows to its guest.
//!
//! | variable | |
//! |---|---|
//! | `CLADE_STORM_SECONDS` | duration, over all kinds of pages; default 10, long test 600 |
//! | `CLADE_STORM_SEED` | seed of the threads, as a failure prints it; default random |
//! | `CLADE_STORM_WITHOUT` | operations to leave out, comma-separated, see below |
//!
//! Operations that can be left out, to isolate a cause: `short`, `sweep`, `settle`, `discard`,
//! `evict`, `reclaim`, `compact`, `reset`, `drop`, `background`.
//!
//! A seed determines the actions of each thread, but not their interleaving.

#![allow(clippy::unwrap_used, reason = "a test, although not every function of it is one")]

mod device;
#[path = "../dma/mod.rs"]
mod dma;
mod fleet;
mod stamp;
mod vm;
mod work;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clade_memory::{Backing, Store};
use clade_test_support::{Random, Watchdog, skip, wait_eq};

use fleet::Fleet;
use vm::Vm;

const SHORT_SECONDS: u64 = 10;
const LONG_SECONDS: u64 = 600;
/// Running time that a storm may take beyond its time before the watchdog aborts it.
const HANG_LIMIT: Duration = Duration::from_secs(600);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")))
}

/// The reason why a thread ended.
fn told(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

type Job<'f> = Box<dyn FnOnce(&'f Fleet, Random) -> Result<(), String> + Send>;

/// Runs the threads until the time is over or one of them finds a failure, which is returned.
fn blow(fleet: &Fleet, seed: u64) -> Option<String> {
    let found = Mutex::new(None);
    let mut jobs: Vec<(&str, Job<'_>)> = vec![
        ("reader", Box::new(device::reader)),
        ("reader", Box::new(device::reader)),
        ("writer", Box::new(device::writer)),
        ("freezer", Box::new(work::freezer)),
        ("freezer", Box::new(work::freezer)),
        ("forker", Box::new(work::forker)),
        ("upkeep", Box::new(work::upkeep)),
    ];
    for n in 0..work::VCPUS {
        jobs.push(("vCPU", Box::new(move |fleet, random| work::vcpu(fleet, random, n))));
    }
    thread::scope(|scope| {
        for (stream, (name, job)) in (0..).zip(jobs) {
            let found = &found;
            scope.spawn(move || {
                let random = Random::of_stream(seed, stream);
                let result = catch_unwind(AssertUnwindSafe(|| job(fleet, random)));
                let result = result.unwrap_or_else(|panic| Err(told(&*panic)));
                if let Err(error) = result {
                    // The first failure is the cause of the others.
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.get_or_insert(format!("{name}: {error}"));
                    fleet.stop();
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Checks the remaining VMs and images at the end.
fn look_at_all(fleet: &Fleet) -> Result<(), String> {
    fleet.vms().iter().try_for_each(|vm| vm.look_all())?;
    fleet.store.sweep();
    for image in fleet.images() {
        image.look_through(&Vm::adopt(&fleet.store, &fleet.clock, &image))?;
    }
    fleet.vms().iter().try_for_each(|vm| vm.look_all())
}

fn storm(backing: Backing, lasts: Duration) {
    // One at a time, because each uses all processors.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let fresh = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 >> 10;
    let seed = number("CLADE_STORM_SEED").unwrap_or_else(fresh);
    let store = match backing {
        Backing::Huge => Store::open(),
        Backing::Small => Store::open_small(),
    }
    .unwrap();
    let background = store.start_background();
    if let Err(error) = &background {
        skip("uffd", &format!("freezes in the background: {error}"));
    }
    let begun = Instant::now();
    let _watchdog =
        Watchdog::new(lasts + HANG_LIMIT, move || format!("CLADE_STORM_SEED={seed}, {} pages", backing.name()));
    let without = std::env::var("CLADE_STORM_WITHOUT").unwrap_or_default();
    let fleet = Fleet::new(&store, lasts, background.is_ok(), without);
    let found = blow(&fleet, seed).or_else(|| look_at_all(&fleet).err());
    let took = begun.elapsed().as_secs_f64();
    println!("{} pages, seed {seed}, {took:.1} s: {:?}", backing.name(), fleet.tally);
    if let Some(found) = found {
        panic!("CLADE_STORM_SEED={seed}, {} pages, after {took:.1} s: {found}", backing.name());
    }
    assert!(fleet.tally.is_a_storm(), "nothing was tried: {:?}", fleet.tally);
    fleet.clear();
    // A thread of the store frees layers.
    wait_eq("a layer or a promised mapping outlived its last user", &(0, 0), || {
        (store.live_layers(), store.budget().used())
    });
}

/// Half of the time for each kind of pages.
fn half(seconds: u64) -> Duration {
    Duration::from_millis(number("CLADE_STORM_SECONDS").unwrap_or(seconds) * 500)
}

#[test]
fn a_storm_loses_nothing_in_huge_pages() {
    storm(Backing::Huge, half(SHORT_SECONDS));
}

#[test]
fn a_storm_loses_nothing_in_small_pages() {
    storm(Backing::Small, half(SHORT_SECONDS));
}

#[test]
#[ignore = "long: ten minutes"]
fn a_long_storm_loses_nothing() {
    storm(Backing::Huge, half(LONG_SECONDS));
    storm(Backing::Small, half(LONG_SECONDS));
}
