//! Activity beside the devices: vCPUs that write, freezes, forks, and all operations that move
//! pages.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clade_memory::{FreezeMode, PAGE_SIZE, PageRange, Quiesced, RamError};
use clade_test_support::Random;
use vm_memory::Bytes;

use crate::fleet::Fleet;
use crate::stamp::{Begun, LANES};
use crate::vm::{CHUNK, CHUNKS, Image, PAGES, Vm, address, chunk};

/// Number of generations after which a VM is born anew.
const DEEPEST: usize = 16;
/// Number of vCPU threads.
pub(crate) const VCPUS: u64 = 2;

/// A thread that acts as a vCPU of any VM. It alone writes the CPU lanes of its chunks.
pub(crate) fn vcpu(fleet: &Fleet, mut random: Random, n: u64) -> Result<(), String> {
    while fleet.goes_on() {
        let Some(vm) = fleet.pick(&mut random) else { break };
        let _running = vm.cpus_run();
        let model = vm.model();
        // Occasionally enough that a freeze shares the pages back; often scattered pages.
        let (chunks, dense) = if random.one_in(3) { (CHUNKS / VCPUS, true) } else { (1 + random.below(12), false) };
        let first = random.below(CHUNKS / VCPUS);
        for at in 0..chunks {
            let of = chunk((first + at) % (CHUNKS / VCPUS) * VCPUS + n);
            let _writing = vm.chunks.writing(of.start());
            let mut written = 0;
            for page in of.start()..of.end() {
                if dense || random.one_in(5) {
                    vm.write(&model, page);
                    written += 1;
                }
            }
            fleet.tally.written(written);
            vm.look(&model, of.start() + random.below(CHUNK))?;
        }
    }
    Ok(())
}

/// Freezes, in every mode, and images that are dropped at once, settled, kept or checked.
pub(crate) fn freezer(fleet: &Fleet, mut random: Random) -> Result<(), String> {
    while fleet.goes_on() {
        let Some(vm) = fleet.pick(&mut random) else { break };
        // Several freezes of one VM in a row.
        for _ in 0..1 + random.below(6) {
            freeze(fleet, &vm, &mut random)?;
            std::thread::sleep(Duration::from_micros(random.below(2_000)));
        }
    }
    Ok(())
}

fn freeze(fleet: &Fleet, vm: &Vm, random: &mut Random) -> Result<(), String> {
    let mode = match random.below(5) {
        0 | 1 if fleet.background && fleet.has("background") => FreezeMode::Background,
        2 if fleet.has("background") => FreezeMode::Auto,
        _ => FreezeMode::Eager,
    };
    let stopped = vm.stop_cpus();
    let model = vm.model();
    let lows = model.lows();
    let (ram, report) = vm
        .ram
        .freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters))
        .map_err(|error| format!("{mode:?}: {error:?}"))?;
    let image = Image { ram, frozen: Arc::new(model.frozen(&lows)) };
    drop(stopped);
    fleet.tally.freeze(report.pending);
    // From here on the vCPUs hit protected pages.
    match random.below(8) {
        0 | 1 if fleet.has("settle") => {
            image.ram.finish_background().map_err(|error| format!("an image: {error:?}"))?;
        }
        2 if fleet.has("settle") => vm.ram.finish_background().map_err(|error| format!("a VM: {error:?}"))?,
        3 => look_through(fleet, &image)?,
        _ => {}
    }
    if random.one_in(4) {
        fleet.keep(image, random);
    }
    Ok(())
}

fn look_through(fleet: &Fleet, image: &Image) -> Result<(), String> {
    let child = Vm::adopt(&fleet.store, &fleet.clock, image);
    fleet.tally.look();
    image.look_through(&child)
}

/// Children of images, some of which are kept.
pub(crate) fn forker(fleet: &Fleet, mut random: Random) -> Result<(), String> {
    while fleet.goes_on() {
        if let Some(image) = fleet.image(&mut random) {
            let child = Vm::adopt(&fleet.store, &fleet.clock, &image);
            fleet.tally.fork();
            image.look_through(&child)?;
            fleet.tally.look();
            if child.depth > DEEPEST {
                fleet.add(Vm::born(&fleet.store, &fleet.clock), &mut random);
                fleet.drop_image(&mut random);
            } else if random.one_in(3) {
                fleet.add(child, &mut random);
            }
        }
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
    }
    Ok(())
}

/// Operations that move pages or layers.
pub(crate) fn upkeep(fleet: &Fleet, mut random: Random) -> Result<(), String> {
    while fleet.goes_on() {
        let Some(vm) = fleet.pick(&mut random) else { break };
        match random.below(24) {
            0..5 if fleet.has("sweep") => {
                fleet.store.sweep();
            }
            5 | 6 if fleet.has("settle") => vm.ram.finish_background().map_err(|error| format!("a VM: {error:?}"))?,
            7 | 8 if fleet.has("settle") => {
                if let Some(image) = fleet.image(&mut random) {
                    image.ram.finish_background().map_err(|error| format!("an image: {error:?}"))?;
                }
            }
            9..13 if fleet.has("discard") => discard(fleet, &vm, &mut random)?,
            13 if fleet.has("evict") => evict(&vm, &mut random)?,
            22 if fleet.has("reclaim") => fleet.tally.reclaim(reclaim(&vm, &mut random)),
            14 | 15 if fleet.has("compact") => {
                let _stopped = vm.stop_cpus();
                vm.ram
                    .compact(&Quiesced::by(&clade_memory::NoWriters))
                    .map_err(|error| format!("compaction: {error:?}"))?;
            }
            16 if fleet.has("compact") => {
                if let Some(image) = fleet.image(&mut random) {
                    let compacted = image.ram.compact(&fleet.store);
                    let (ram, _) = compacted.map_err(|error| format!("an image's compaction: {error:?}"))?;
                    fleet.replace(&Image { ram, ..image });
                }
            }
            17..20 if fleet.has("reset") => reset(fleet, &vm, &mut random)?,
            20 if fleet.has("drop") => fleet.drop_one(&mut random),
            21 if fleet.has("drop") => fleet.drop_image(&mut random),
            _ => {
                vm.look_all()?;
                fleet.tally.look();
            }
        }
        fleet.tally.other();
        drop(vm);
        std::thread::sleep(Duration::from_micros(random.below(6_000)));
    }
    Ok(())
}

/// A balloon takes pages while vCPUs and devices use others.
fn discard(fleet: &Fleet, vm: &Vm, random: &mut Random) -> Result<(), String> {
    let _devices = vm.devices_run();
    let model = vm.model();
    let first = random.below(CHUNKS);
    let chunks = first..(first + 1 + random.below(3)).min(CHUNKS);
    let _taking = vm.chunks.taking(chunks.clone());
    for of in chunks {
        let whole = chunk(of);
        let pages = if random.one_in(2) { whole } else { PageRange::with_len(whole.start() + random.below(CHUNK), 1) };
        let all = pages.start()..pages.end();
        // Under the lock of its chunk the storm drops no pin.
        let held: Vec<bool> = all.clone().map(|page| vm.chunks.is_held(page)).collect();
        let begun: Vec<_> = all.clone().map(|page| LANES.map(|lane| model.zero(page, lane))).collect();
        let (region, range) = vm.region(pages);
        let done = region.discard(range).map_err(|error| format!("a discard: {error:?}"))?;
        let mut kept = 0;
        for ((page, begun), held) in all.zip(begun).zip(held) {
            let mut got = [1; PAGE_SIZE as usize];
            vm.ram.memory().read_slice(&mut got, address(page)).unwrap();
            if got.iter().all(|byte| *byte == 0) && !held {
                begun.into_iter().for_each(Begun::done);
            } else {
                kept += 1;
                begun.into_iter().for_each(Begun::undone);
                vm.look(&model, page)?;
            }
        }
        if kept > done.pinned {
            return Err(format!("a discard of {pages} left {kept} pages, {} for pins", done.pinned));
        }
        fleet.tally.discarded(done.discarded);
    }
    Ok(())
}

/// Cold pages are written to a file. vCPUs are stopped, devices are not.
fn evict(vm: &Vm, random: &mut Random) -> Result<(), String> {
    let _stopped = vm.stop_cpus();
    let first = random.below(CHUNKS);
    for of in first..(first + 1 + random.below(8)).min(CHUNKS) {
        let (region, range) = vm.region(chunk(of));
        let evicted = region.evict(range, Path::new("/dev/shm"), &Quiesced::by(&clade_memory::NoWriters));
        evicted.map_err(|error| format!("an eviction: {error:?}"))?;
    }
    Ok(())
}

/// Makes the kernel reclaim the frames of clean pages, as under memory pressure, while all threads
/// run on.
fn reclaim(vm: &Vm, random: &mut Random) -> u64 {
    let first = random.below(CHUNKS);
    let mut taken = 0;
    for of in first..(first + 1 + random.below(CHUNKS / 2)).min(CHUNKS) {
        let (region, range) = vm.region(chunk(of));
        let at = (region.host_address() + range.offset()) as *mut libc::c_void;
        // SAFETY: the pages keep their contents, wherever the kernel stores them. Absent ranges
        // have no memory, and are refused.
        let done = unsafe { libc::madvise(at, range.bytes(), libc::MADV_PAGEOUT) };
        taken += u64::from(done == 0) * range.len();
    }
    taken
}

fn reset(fleet: &Fleet, vm: &Vm, random: &mut Random) -> Result<(), String> {
    let Some(image) = fleet.image(random) else { return Ok(()) };
    vm.chunks.set_quiet(true);
    // Time for most requests to end. Some never do, and refuse the reset if they hold pages of the
    // VM's own.
    std::thread::sleep(Duration::from_millis(10));
    let (_cpus, _devices) = (vm.stop_cpus(), vm.stop_devices());
    let done = vm.ram.reset(&image.ram, &Quiesced::by(&clade_memory::NoWriters), Duration::from_millis(5));
    vm.chunks.set_quiet(false);
    match done {
        Ok(_) => {
            if let Some(page) = (0..PAGES).find(|page| vm.chunks.is_held(*page)) {
                return Err(format!("I7: page {page:#x} was reset away under its pin"));
            }
            vm.begin_life(&fleet.clock, &image.frozen);
            fleet.tally.reset();
            let model = vm.model();
            (0..PAGES).step_by(7).try_for_each(|page| vm.look(&model, page))
        }
        Err(RamError::Pinned { .. }) => Ok(()),
        Err(error) => Err(format!("a reset: {error:?}")),
    }
}
