//! Schedules of the real code under shuttle: real regions, mappings and userfaultfd, with locks and
//! atomics that shuttle schedules.
//!
//! A guest writes, devices pin, transfer and unpin, the VM is frozen at once and in the background,
//! and children read their memory. All tasks share one thread, so no access may wait in the kernel.
//! The guest first checks in the page map whether its access would fault, and sends the fault to
//! the task that replaces the background thread, which serves it with the thread's own function.
//! Devices are io_uring's registered buffers and spliced pages, which hold frames and bypass
//! mapping and protection.
//!
//! Assertions: a device reads its guest's latest bytes and its guest sees the device's writes; a
//! short read sees the bytes at the time of the pin, or later ones; a child sees its parent's bytes
//! of the freeze's instant, permanently.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::thread;
use shuttle::{Config, FailurePersistence, Runner};

use crate::dma::{Device, splice::Splice};
use crate::region::pin::{Access, PinLifetime};
use crate::testing::failpoint::{Call, plan};
use crate::testing::sabotage::Break;
use crate::testing::sabotage::tests::with_break;
use crate::units::PageRange;
use crate::{FreezeMode, GuestRam, NoWriters, Quiesced, RamImage};
use world::{At, Instant, PAGES, REGIONS, World, bytes, words};

/// Number of schedules after which an undetected break counts as undetectable.
const MAX_UNNOTICED: usize = 5_000;

fn below(end: u64) -> u64 {
    thread_rng().gen_range(0..end)
}

fn any_page() -> At {
    At { region: below(REGIONS as u64) as usize, page: below(PAGES) }
}

/// One page, a few, a block, or a whole region.
fn any_range() -> PageRange {
    match below(8) {
        0 => PageRange::new(0, PAGES),
        1 => PageRange::with_len(0, crate::units::BLOCK_PAGES),
        2..5 => PageRange::with_len(below(PAGES), 1),
        _ => PageRange::with_len(below(PAGES - 3), 1 + below(3)),
    }
}

/// Retries once: the call that was armed to fail in a freeze may be this one. The failed attempt
/// has changed nothing (I13).
fn twice<T, E>(work: impl Fn() -> Result<T, E>) -> Result<T, E> {
    work().or_else(|_| work())
}

fn guest(world: &World) {
    for _ in 0..5 {
        world.guest(any_page(), below(4) > 0);
    }
}

/// Devices of the parent: takes one pin after another.
fn device(world: &World) {
    for _ in 0..3 {
        let (at, range) = (below(REGIONS as u64) as usize, any_range());
        let region = &world.parent.regions()[at];
        let page = |page: u64| At { region: at, page };
        let (access, term) = match below(5) {
            0 | 1 => (Access::Write, PinLifetime::LongTerm),
            2 => (Access::Write, PinLifetime::Transient),
            3 => (Access::Read, PinLifetime::LongTerm),
            _ => (Access::Read, PinLifetime::Transient),
        };
        let before = world.mark();
        let pin = match twice(|| region.pin(range, access, term)) {
            Ok(pin) => pin,
            Err(error) => {
                world.wrong(format!("{access:?} {term:?} of {range} is refused: {error}"));
                return;
            }
        };
        // Otherwise registering the frames would wait for ever.
        if !World::is_open(region, range, access == Access::Write || term == PinLifetime::LongTerm) {
            world.wrong(format!("{range} is pinned and protected, or not there"));
            return;
        }
        if (access, term) == (Access::Read, PinLifetime::Transient) {
            let splice = Splice::of(&pin);
            thread::yield_now();
            let seen = words(&splice.read());
            let allowed = world.since(&before);
            for (page, seen) in (range.start..).map(page).zip(seen) {
                if !allowed.allows(page).contains(&seen) {
                    world
                        .wrong(format!("a short read of {page:?} sees {seen}, and may see {:?}", allowed.allows(page)));
                }
            }
            continue;
        }
        let mut device = Device::attach(pin);
        // Some pins are held across a freeze.
        let steps = if term == PinLifetime::LongTerm { 100 * below(3) } else { 0 };
        for _ in 0..2 {
            (0..=steps).for_each(|_| thread::yield_now());
            if access == Access::Write && below(3) > 0 {
                let new: Vec<u64> = (range.start..range.end).map(|_| world.fresh()).collect();
                device.put(0, &bytes(&new));
                (range.start..).map(page).zip(new).for_each(|(page, word)| world.given(page, word));
            } else {
                for (page, seen) in (range.start..).map(page).zip(words(&device.read())) {
                    let now = world.now(page);
                    if seen != now {
                        world.wrong(format!("a device reads {seen} from {page:?}, which was given {now}"));
                    }
                }
            }
        }
    }
}

/// A child of an image: reads all pages, writes and pins some, and reads all again.
fn child(world: &World, image: &RamImage, instant: &Instant) -> Option<GuestRam> {
    let child = twice(|| GuestRam::reserve(image.layout(), &world.store)).unwrap();
    twice(|| child.adopt(image)).unwrap();
    let mut own = vec![None; REGIONS * PAGES as usize];
    let index = |at: At| at.region * PAGES as usize + at.page as usize;
    let look = |at: At, own: &mut Vec<Option<u64>>, write: Option<u64>| {
        thread::yield_now();
        let seen = world.child(&child, at, write);
        match own[index(at)] {
            Some(was) if was != seen => world.wrong(format!("a child saw {was} at {at:?}, and now {seen}")),
            None if !instant.allows(at).contains(&seen) => {
                world.wrong(format!("a child sees {seen} at {at:?}, and may see {:?}", instant.allows(at)));
            }
            _ => {}
        }
        own[index(at)] = Some(write.unwrap_or(seen));
    };
    for _ in 0..3 {
        let write = (below(2) == 0).then(|| world.fresh());
        look(any_page(), &mut own, write);
    }
    {
        let (at, range) = (below(REGIONS as u64) as usize, any_range());
        let region = &child.regions()[at];
        let term = if below(2) == 0 { PinLifetime::Transient } else { PinLifetime::LongTerm };
        let pin = twice(|| region.pin(range, Access::Read, term)).unwrap();
        if !World::is_open(region, range, term == PinLifetime::LongTerm) {
            world.wrong(format!("{range} of a child is pinned and not there"));
            return None;
        }
        let seen = words(&Splice::of(&pin).read());
        for (page, seen) in (range.start..range.end).zip(seen) {
            let at = At { region: at, page };
            let right = own[index(at)].map_or_else(|| instant.allows(at).contains(&seen), |was| was == seen);
            if !right {
                world.wrong(format!("a device of a child sees {seen} at {at:?}, and may see {:?}", instant.allows(at)));
            }
            own[index(at)] = Some(seen);
        }
    }
    At::all().for_each(|at| look(at, &mut own, None));
    At::all().for_each(|at| look(at, &mut own, None));
    Some(child)
}

/// Freezes twice; in between, starts a child of the first image.
fn freezer(world: &Arc<World>) {
    let mut children = Vec::new();
    for _ in 0..2 {
        let mode = if below(3) == 0 { FreezeMode::Eager } else { FreezeMode::Background };
        let frozen = {
            let _cpu = world.cpu.lock().unwrap();
            let before = world.mark();
            if below(8) == 0 {
                let calls = [Call::Map, Call::Protect, Call::Scan, Call::Watch];
                plan().fail_call(calls[below(4) as usize], below(2));
            }
            let frozen = world.parent.freeze_in(mode, &Quiesced::by(&NoWriters));
            let failed = plan().disarm();
            if let Err(error) = &frozen
                && failed.is_none()
            {
                world.wrong(format!("a freeze is refused: {error}"));
            }
            frozen.ok().map(|(image, _)| (image, world.since(&before)))
        };
        world.poke();
        let Some((image, instant)) = frozen else { continue };
        let world = Arc::clone(world);
        children.push(thread::spawn(move || drop((child(&world, &image, &instant), image))));
    }
    children.into_iter().for_each(|child| child.join().unwrap());
}

/// One schedule.
fn story() -> Option<String> {
    world::watch();
    plan().disarm();
    let world = Arc::new(World::new());
    for at in At::all() {
        world.base(at);
    }
    // Pages of a layer, private pages over it, and pages that were never shared.
    let mut kept = None;
    if below(4) > 0 {
        kept = Some(world.parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&NoWriters)).unwrap());
        for at in At::all().filter(|_| below(3) > 0) {
            world.guest(at, true);
        }
    }
    let run = |work: fn(&Arc<World>)| {
        let world = Arc::clone(&world);
        thread::spawn(move || work(&world))
    };
    let background = run(|world| world.serve());
    let tasks = [
        run(|world| guest(world)),
        run(|world| device(world)),
        run(|world| device(world)),
        run(freezer),
        run(|world| world.reclaim()),
    ];
    drop(kept);
    tasks.into_iter().for_each(|task| task.join().unwrap());
    world.close();
    background.join().unwrap();
    if let Err(error) = world.parent.check(&Quiesced::by(&NoWriters)) {
        world.wrong(error.to_string());
    }
    At::all().for_each(|at| world.guest(at, false));
    let found = world.found();
    let world = Arc::into_inner(world).unwrap();
    world.reclaim();
    found
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 19;
    config
}

fn schedules() -> usize {
    std::env::var("CLADE_SCHEDULES").map_or(5_000, |count| count.parse().unwrap())
}

fn hold(scheduler: impl Scheduler + 'static) {
    let begun = std::time::Instant::now();
    let ran = Runner::new(scheduler, config()).run(|| {
        if let Some(told) = story() {
            panic!("{told}");
        }
    });
    println!("{ran} schedules in {:?}", begun.elapsed());
}

#[test]
fn shuttle_devices_and_children_see_what_they_must_at_random() {
    hold(RandomScheduler::new(schedules()));
}

#[test]
fn shuttle_devices_and_children_see_what_they_must_by_priorities() {
    hold(PctScheduler::new(5, schedules()));
}

/// Runs schedules until `how` is detected, and returns their number and the failure. Seeded, so
/// that the schedules are always the same.
fn until_noticed(how: Break) -> (usize, String) {
    static RAN: AtomicUsize = AtomicUsize::new(0);
    RAN.store(0, Ordering::Relaxed);
    let mut config = config();
    config.failure_persistence = FailurePersistence::None;
    let scheduler = RandomScheduler::new_from_seed(1, MAX_UNNOTICED);
    let noticed = with_break(how, || {
        Runner::new(scheduler, config).run(|| {
            RAN.fetch_add(1, Ordering::Relaxed);
            if let Some(told) = story() {
                panic!("{told}");
            }
        });
    });
    let Err(told) = noticed else { panic!("{how:?} goes unnoticed") };
    (RAN.load(Ordering::Relaxed), told.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned()))
}

#[test]
fn shuttle_notices_what_is_done_wrong() {
    // PinInPlace is left out: the kernel unshares the pages that io_uring registers, and hides the
    // break.
    for how in [
        Break::KeepBits,
        Break::RemapPinned,
        Break::ForgetPinned,
        Break::ReadInPlace,
        Break::CountUnchecked,
        Break::CopyPinnedLater,
        Break::ReleaseUncopied,
        Break::ShareWritten,
    ] {
        let (schedules, told) = until_noticed(how);
        println!("{how:?} is noticed in schedule {schedules}: {told}");
    }
}
