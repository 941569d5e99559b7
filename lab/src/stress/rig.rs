//! The VM under stress: what its vCPUs and devices do, and its expected state at any instant.

use std::time::{Duration, Instant};

use clade_block::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_guests::abi::disk::{self, DiskRun, Order, VIOLATION, What};
use clade_guests::abi::{Command, PAGE_SIZE, PAGE_WORDS, WORK_BASE, fill_word};
use clade_host_io::CachePolicy;
use clade_memory::PageRange;
use vm_memory::{Bytes, GuestAddress};

use super::Tally;
use super::world::{ForkCosts, StressImage, StressVm, World};
use crate::args::StressArgs;
use clade::Failure;
use clade_harness::{BareMailbox, BareVcpu, GuestWords, Machine};
use clade_vmm::vm::{DiskSpec, VmConfig};

/// Guest memory in bytes.
const MEMORY: u64 = 64 << 20;
pub(super) const READER: u64 = 0;
pub(super) const WRITER: u64 = 1;
/// The first vCPU without a disk. It and those after it form pairs.
const FIRST_OF_PAIRS: u64 = 2;
/// Longest time without progress of a pair. A pair needs less than a millisecond, or some seconds
/// on a busy host.
const STUCK: Duration = Duration::from_secs(20);

/// The disk drivers' areas.
pub(super) const READ_AREA: u64 = WORK_BASE;
const WRITE_AREA: u64 = WORK_BASE + 0x8000;
/// Memory that devices and CPUs share: the reader's, then the writer's.
const SHARED: u64 = WORK_BASE + 0x1_0000;
const DEPTH: u64 = 32;
/// Bytes of memory of one request: the device's data and, after it in the same page, a word that
/// the CPU increments.
const STRIDE: u64 = 32 << 10;
/// Sectors of a request: all but half a page of its memory. So much is in flight that a fork comes
/// before all of it has completed.
const BLOCK: u64 = 60;
/// Pages only the host writes and discards.
const SCRATCH: u64 = WORK_BASE + (4 << 20);
const SCRATCH_PAGES: u64 = 512;
/// Pages that are not written after boot.
const STILL: u64 = WORK_BASE + (8 << 20);
const STILL_PAGES: u64 = 2048;
const STILL_SEED: u64 = 0x57111;

const READ_BYTES: u64 = 32 << 20;
const READ_SEED: u64 = 0x4ead;
const WRITE_BLOCKS: u64 = 64;
const WRITE_BYTES: u64 = WRITE_BLOCKS * BLOCK * disk::SECTOR;
/// The seed of the writer's disk before its first round. Round `n` uses this seed plus `n`.
const WRITE_SEED: u64 = 0x3117e;

/// A random number generator: splitmix64, so that one seed determines all choices.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        fill_word(self.0, 8)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True one time in `n`.
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(super) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

/// The nanoseconds of the wall clock: the default seed.
pub(super) fn clock() -> u32 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.subsec_nanos())
}

/// The state of the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Writes the round's words over those of the round before.
    Write,
    /// Reads them back.
    Verify,
}

/// The expected state of a VM, or of a child forked at this instant.
#[derive(Clone, Debug)]
pub(super) struct Expectation {
    pub(super) phase: Phase,
    pub(super) round: u64,
    /// The sequence number of the writer's command.
    pub(super) seq: u64,
    /// The first word of every scratch page; the others are zeros.
    scratch: Vec<u64>,
}

/// The parent, its disks' files, and the commands it has.
pub(super) struct Rig {
    vm: StressVm,
    cpus: u64,
    expect: Expectation,
    policy: CachePolicy,
    discards: u64,
    found: Tally,
    _files: tempfile::TempDir,
}

fn spec(dir: &std::path::Path, name: &str, bytes: u64, seed: u64) -> Result<DiskSpec, Failure> {
    let path = dir.join(name);
    let mut all = vec![0; bytes as usize];
    disk::pattern(&mut all, seed, 0);
    std::fs::write(&path, all).map_err(Failure::run)?;
    let disk = DiskConfig { cache: CachePolicy::Direct, ..DiskConfig::new(&path) };
    Ok(DiskSpec { disk, device: BlockOptions::default() })
}

/// The reader's command.
fn reading() -> DiskRun {
    DiskRun {
        area: READ_AREA,
        buffer: SHARED,
        stride: STRIDE,
        what: What::Verify,
        order: Order::Random,
        depth: DEPTH,
        sector: 0,
        sectors: READ_BYTES / disk::SECTOR,
        block: BLOCK,
        count: 0,
        seed: READ_SEED,
    }
}

/// A command for `blocks` blocks of the writer's disk from `first` on, in order, with the words of
/// `round`.
pub(super) fn writing(what: What, round: u64, first: u64, blocks: u64) -> DiskRun {
    DiskRun {
        area: WRITE_AREA,
        buffer: SHARED + DEPTH * STRIDE,
        what,
        order: Order::Sequential,
        sector: first * BLOCK,
        sectors: blocks * BLOCK,
        count: blocks,
        seed: WRITE_SEED + round,
        ..reading()
    }
}

impl Rig {
    pub(super) fn boot(world: &World, args: &StressArgs) -> Result<Self, Failure> {
        let files = match &args.dir {
            Some(dir) => tempfile::tempdir_in(dir),
            None => tempfile::tempdir(),
        };
        let files = files.map_err(Failure::input)?;
        let mut config = VmConfig::bare(MEMORY, args.cpus).map_err(Failure::run)?;
        config.disks = vec![
            spec(files.path(), "read", READ_BYTES, READ_SEED)?,
            spec(files.path(), "write", WRITE_BYTES, WRITE_SEED)?,
        ];
        let vm = world.boot(config)?;
        let run = |vcpu, command| BareVcpu::new(&vm, vcpu).run(command).map_err(Failure::run);
        run(WRITER, Command::Fill { start: STILL, pages: STILL_PAGES, seed: STILL_SEED })?;
        for (vcpu, area, bytes) in [(READER, READ_AREA, READ_BYTES), (WRITER, WRITE_AREA, WRITE_BYTES)] {
            let [sectors, ..] = run(vcpu, Command::DiskOpen { slot: vcpu, area, size: 256 })?;
            if sectors != bytes / disk::SECTOR {
                return Err(Failure::Run(anyhow::anyhow!("the guest sees a disk of {sectors} sectors")));
            }
        }
        let policy = vm.policy()?;
        let expect = Expectation { phase: Phase::Verify, round: 0, seq: 0, scratch: vec![0; SCRATCH_PAGES as usize] };
        let cpus = args.cpus;
        let mut rig = Self { vm, cpus, expect, policy, discards: 0, found: Tally::default(), _files: files };
        rig.order(READER, Command::DiskRun(reading()))?;
        rig.begin(Phase::Write, 1)?;
        for first in pairs(cpus) {
            // The waiting vCPU must accept interrupts before its peer sends the first.
            rig.order(first + 1, Command::Relay { peer: first, first: false })?;
            await_progress(&rig.vm, first + 1, 1)?;
            rig.order(first, Command::Relay { peer: first + 1, first: true })?;
        }
        if !pairs_go_on(&rig.vm, cpus)? {
            return Err(Failure::Run(anyhow::anyhow!("the vCPUs do not wake each other")));
        }
        Ok(rig)
    }

    /// Whether something wrong was found in the parent.
    pub(super) fn found_any(&self) -> bool {
        self.found.is_wrong()
    }

    fn order(&self, vcpu: u64, command: Command) -> Result<u64, Failure> {
        BareMailbox::new(&self.vm, vcpu).order(command).map_err(Failure::run)
    }

    fn begin(&mut self, phase: Phase, round: u64) -> Result<(), Failure> {
        let what = if phase == Phase::Write { What::Write } else { What::Verify };
        let seq = self.order(WRITER, Command::DiskRun(writing(what, round, 0, WRITE_BLOCKS)))?;
        (self.expect.phase, self.expect.round, self.expect.seq) = (phase, round, seq);
        Ok(())
    }

    pub(super) fn policy(&self) -> CachePolicy {
        self.policy
    }

    pub(super) fn discards(&self) -> u64 {
        self.discards
    }

    pub(super) fn rounds(&self) -> u64 {
        self.expect.round
    }

    /// Bytes the reader has read and compared.
    pub(super) fn read_bytes(&self) -> Result<u64, Failure> {
        Ok(reads(&self.vm)? * BLOCK * disk::SECTOR)
    }

    /// The expected state at this instant. (Only this thread changes it.)
    pub(super) fn expectation(&self) -> Expectation {
        self.expect.clone()
    }

    pub(super) fn fork(&self, world: &World) -> Result<(StressImage, ForkCosts), Failure> {
        world.fork(&self.vm)
    }

    /// Starts the writer's next command, if the last one has ended. Then writes or discards scratch
    /// pages.
    pub(super) fn step(&mut self, random: &mut Random) -> Result<(), Failure> {
        if let Some(reason) = self.vm.stopped() {
            return Err(Failure::Run(anyhow::anyhow!("the parent stopped: {reason}")));
        }
        let writer = BareMailbox::new(&self.vm, WRITER);
        if writer.ended().map_err(Failure::run)? >= self.expect.seq {
            note(&writer.results().map_err(Failure::run)?, &mut self.found);
            match self.expect.phase {
                Phase::Write => self.begin(Phase::Verify, self.expect.round)?,
                Phase::Verify => {
                    self.found.bytes_checked += WRITE_BYTES;
                    self.begin(Phase::Write, self.expect.round + 1)?;
                }
            }
        }
        let first = random.below(SCRATCH_PAGES);
        let pages = (1 + random.below(8)).min(SCRATCH_PAGES - first);
        if random.one_in(8) {
            let gpa = GuestAddress(SCRATCH + first * PAGE_SIZE);
            let Some(ram) = self.vm.ram() else { return Ok(()) };
            let Some((region, page)) = ram.locate(gpa) else { return Ok(()) };
            let done = region.discard(PageRange::with_len(page, pages)).map_err(Failure::run)?;
            self.discards += done.discarded;
            // Beyond the VM's share of mappings, a discarded page may not read as zeros.
            if done.unmapped == 0 && done.discarded == pages {
                self.expect.scratch[first as usize..(first + pages) as usize].fill(0);
            } else {
                for page in first..first + pages {
                    let at = GuestAddress(SCRATCH + page * PAGE_SIZE);
                    let seen = ram.memory().read_obj(at).map_err(Failure::run)?;
                    self.expect.scratch[page as usize] = seen;
                }
            }
        } else {
            let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
            for (page, bytes) in (first..).zip(bytes.chunks_mut(PAGE_SIZE as usize)) {
                let word = random.next();
                bytes[..8].copy_from_slice(&word.to_le_bytes());
                self.expect.scratch[page as usize] = word;
            }
            self.vm.write(SCRATCH + first * PAGE_SIZE, &bytes).map_err(words)?;
        }
        Ok(())
    }

    /// Makes the guest of a running child end its work and halt. Notes what it has found.
    pub(super) fn halt(&mut self, child: &StressVm) -> Result<(), Failure> {
        for vcpu in [READER, WRITER] {
            note(&idle(child, vcpu)?, &mut self.found);
        }
        // The other vCPU of a pair then waits for good.
        pairs(self.cpus).try_for_each(|first| idle(child, first).map(drop))
    }

    /// Ends the parent.
    pub(super) fn end(self) -> Result<(), Failure> {
        self.vm.destroy()
    }

    /// Stops the parent's work, and compares it like a child.
    pub(super) fn finish(&mut self, tally: &mut Tally) -> Result<(), Failure> {
        tally.add(&self.found);
        tally.stuck += u64::from(!pairs_go_on(&self.vm, self.cpus)?);
        stop_and_compare(&self.vm, &self.expect, 0, tally)?;
        self.vm.pause()?;
        compare_memory(&self.vm, &self.expect, None, tally)
    }
}

fn words(error: clade_harness::WordsError) -> Failure {
    Failure::Run(anyhow::anyhow!(error))
}

/// The first vCPU of each pair.
fn pairs(cpus: u64) -> impl Iterator<Item = u64> {
    (FIRST_OF_PAIRS..cpus).step_by(2)
}

fn progress(vm: &StressVm, vcpu: u64) -> Result<u64, Failure> {
    BareMailbox::new(vm, vcpu).progress().map_err(Failure::run)
}

/// Waits until `vcpu` has made progress to `least`. Returns false if it does not.
fn await_progress(vm: &StressVm, vcpu: u64, least: u64) -> Result<bool, Failure> {
    let deadline = Instant::now() + STUCK;
    while progress(vm, vcpu)? < least {
        if Instant::now() > deadline || vm.stopped().is_some() {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(true)
}

/// Whether all pairs of a running VM still wake each other.
pub(super) fn pairs_go_on(vm: &StressVm, cpus: u64) -> Result<bool, Failure> {
    let from = pairs(cpus).map(|vcpu| Ok((vcpu, progress(vm, vcpu)?))).collect::<Result<Vec<_>, Failure>>()?;
    for (vcpu, from) in from {
        if !await_progress(vm, vcpu, from + 2)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Operations that the reader has completed.
pub(super) fn reads(vm: &StressVm) -> Result<u64, Failure> {
    BareMailbox::new(vm, READER).progress().map_err(Failure::run)
}

/// All of a paused guest's memory.
pub(super) fn all(vm: &StressVm) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; MEMORY as usize];
    vm.read(0, &mut bytes).map_err(words)?;
    Ok(bytes)
}

/// Adds the results of a disk run to the tally.
fn note(results: &[u64; 4], tally: &mut Tally) {
    let [_, errors, wrong, _] = results;
    tally.violations += errors + u64::from(wrong & VIOLATION != 0);
    tally.wrong_bytes += (wrong & !VIOLATION) * 8;
}

/// Waits until the vCPU has taken its command `seq`, so that the next one does not replace it.
fn await_taken(vm: &StressVm, vcpu: u64, seq: u64) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mailbox = BareMailbox::new(vm, vcpu);
    while mailbox.taken().map_err(Failure::run)? < seq {
        if Instant::now() > deadline || vm.stopped().is_some() {
            return Err(Failure::Run(anyhow::anyhow!("vCPU {vcpu} of {} does not take its command", vm.name())));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// Ends the command of a vCPU of a running VM. Returns its results.
fn idle(vm: &StressVm, vcpu: u64) -> Result<[u64; 4], Failure> {
    BareVcpu::new(vm, vcpu).run(Command::Idle).map_err(Failure::run)
}

/// Stops the disk runs of a running VM, waits for requests in flight, and makes the guest compare
/// all of the writer's disk. A child's run began in its parent, so only the reader's comparisons
/// after `read_before` operations are counted. (Words found wrong before the fork are found in
/// both.)
pub(super) fn stop_and_compare(
    vm: &StressVm,
    expect: &Expectation,
    read_before: u64,
    tally: &mut Tally,
) -> Result<(), Failure> {
    await_taken(vm, WRITER, expect.seq)?;
    let read = idle(vm, READER)?;
    note(&read, tally);
    tally.bytes_checked += read[0].saturating_sub(read_before) * BLOCK * disk::SECTOR;
    let written = idle(vm, WRITER)?;
    note(&written, tally);
    let done = if expect.phase == Phase::Write { written[0].min(WRITE_BLOCKS) } else { WRITE_BLOCKS };
    // Writes start in order, and all that started have ended. So the first `done` blocks are this
    // round's, and the rest are the last round's.
    for (round, first, blocks) in [(expect.round, 0, done), (expect.round - 1, done, WRITE_BLOCKS - done)] {
        if blocks > 0 {
            let run = Command::DiskRun(writing(What::Verify, round, first, blocks));
            note(&BareVcpu::new(vm, WRITER).run(run).map_err(Failure::run)?, tally);
            tally.bytes_checked += blocks * BLOCK * disk::SECTOR;
        }
    }
    // No word is incremented any more, so each must match the count exactly.
    compare_counts(vm, 0, tally)
}

/// Checks the words that CPUs increment beside the devices' bytes. A word must match the count or,
/// at any instant, be up to `ahead` increments further.
pub(super) fn compare_counts(vm: &StressVm, ahead: u64, tally: &mut Tally) -> Result<(), Failure> {
    // All at once: a request for each takes a while if the VM is in another process.
    let mut bytes = vec![0; (2 * DEPTH * STRIDE) as usize];
    vm.read(SHARED, &mut bytes).map_err(words)?;
    let shared = |at: u64| {
        let place = at.checked_sub(SHARED).and_then(|at| bytes.get(at as usize..at as usize + 8));
        let outside = || Failure::Run(anyhow::anyhow!("{at:#x} is not in the shared memory"));
        place.and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?))).ok_or_else(outside)
    };
    for run in [reading(), writing(What::Write, 1, 0, WRITE_BLOCKS)] {
        let count = vm.load(run.area + disk::STATE + disk::state::TOUCHED * 8).map_err(words)?;
        for slot in 0..DEPTH {
            let got = shared(run.neighbour_of(slot).unwrap_or(run.buffer))?;
            if !(disk::touched(count, slot, DEPTH)..=disk::touched(count + ahead, slot, DEPTH)).contains(&got) {
                tally.wrong_bytes += 8;
            }
        }
        tally.bytes_checked += DEPTH * 8;
    }
    Ok(())
}

/// Compares the pages that only the host writes, and those that are not written: a part of the
/// latter, chosen by `some`, or all.
pub(super) fn compare_memory(
    vm: &StressVm,
    expect: &Expectation,
    some: Option<&mut Random>,
    tally: &mut Tally,
) -> Result<(), Failure> {
    let look = |gpa: u64, pages: u64| -> Result<Vec<u64>, Failure> {
        let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
        vm.read(gpa, &mut bytes).map_err(words)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
    };
    let mut wrong = 0;
    let scratch = look(SCRATCH, SCRATCH_PAGES)?;
    for (page, word) in scratch.chunks(PAGE_WORDS as usize).zip(&expect.scratch) {
        wrong += u64::from(page[0] != *word) + page[1..].iter().filter(|word| **word != 0).count() as u64;
    }
    let (first, count) = some.map_or((0, STILL_PAGES), |random| (random.below(STILL_PAGES - 64), 64));
    let gpa = STILL + first * PAGE_SIZE;
    let still = look(gpa, count)?;
    wrong += (gpa..).step_by(8).zip(&still).filter(|(at, word)| fill_word(STILL_SEED, *at) != **word).count() as u64;
    let pages = SCRATCH_PAGES + count;
    tally.wrong_bytes += wrong * 8;
    tally.bytes_checked += pages * PAGE_SIZE;
    Ok(())
}

/// Resets the reader's disk in a running VM while it works, opens it again, and reads some of it.
pub(super) fn reset_and_read(vm: &StressVm, tally: &mut Tally) -> Result<(), Failure> {
    let run = |vcpu, command| BareVcpu::new(vm, vcpu).run(command).map_err(Failure::run);
    let [status, ..] = run(WRITER, Command::DiskReset { area: READ_AREA })?;
    tally.violations += u64::from(status != 0);
    run(READER, Command::Idle)?;
    run(READER, Command::DiskOpen { slot: READER, area: READ_AREA, size: 256 })?;
    let again = DiskRun { count: 256, ..reading() };
    note(&run(READER, Command::DiskRun(again))?, tally);
    tally.bytes_checked += 256 * BLOCK * disk::SECTOR;
    tally.disk_resets += 1;
    Ok(())
}

const _: () = assert!(STILL + STILL_PAGES * PAGE_SIZE <= MEMORY, "the guest has room for all of it");
