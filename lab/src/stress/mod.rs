//! `clade-lab stress dma`: a guest is forked repeatedly while its devices do DMA and its CPUs write to
//! the same pages. Every byte of every VM and disk is compared with its predicted value.
//!
//! ```text
//!            vCPU 0                       vCPU 1
//!   reads disk 0 at random,       writes disk 1 from front to back with the
//!   depth 32, compares every      round's words, then reads and compares it
//!   word it gets
//!        └──── both, while requests are in flight, count up a word in the
//!              page that each request's 30 KiB end in ────┘
//! ```
//!
//! One thread of the host forks at a fixed interval, and writes and discards pages that only the
//! host uses. Another thread takes the children and lets them run on with the requests in flight.
//! It resets, stops or forks them, resets their disk or destroys them meanwhile, and compares. A
//! child's own memory holds the round and its progress, which predict its contents.
//!
//! With more than two vCPUs (`--cpus`), the others wake each other by interrupts, in pairs. A fork
//! or reset that loses one stops its pair for good, and the VM counts as stuck.
//!
//! A run lasts until a child was compared and one was reset in place, also past its seconds: up to
//! [`MAX_OVERTIME`] longer.
//!
//! With `--without-unshare`, freezes no longer spare pinned pages, so bytes become wrong. The run
//! continues until it has found that, and fails after [`MAX_CONTROL_FORKS`] without: a check that
//! cannot fail proves nothing.

mod checker;
mod rig;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use clade_host_io::CachePolicy;
use serde::Serialize;

use crate::args::{StressArgs, StressName};
use clade::{Failure, Table, print_json};
use clade_harness::{Sample, Spread};

use checker::{Checker, Forked};
use rig::{Random, Rig};
use world::{ForkCosts, StressImage, StressVm, World};

/// The longest queue of forks to be checked. While it is full, a fork is made but not checked.
const WAITING: usize = 4;
/// Minimum and maximum time of each of the two throughput measurements.
const MEASURED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// The length of a turn. Measurements with and without forks alternate, so that other load on the
/// host affects both.
const TURN: Duration = Duration::from_millis(500);
/// The most missed forks that are made up for at once.
const MADE_UP: u32 = 10;
/// Forks within which a run without unshare must find wrong bytes. A few hundred have always been
/// enough.
const MAX_CONTROL_FORKS: u64 = 10_000;
/// Longest overtime of a run while no child has been reset in place.
const MAX_OVERTIME: Duration = Duration::from_mins(1);
/// Idle children beside which the parent is measured.
const IDLE_CHILDREN: usize = 10;
/// The interval at which the parent is polled.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

/// Counts of checks, and of errors found.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Tally {
    bytes_checked: u64,
    wrong_bytes: u64,
    /// Times a device returned a request that it did not have or returned one twice, or reported an
    /// error.
    violations: u64,
    children: u64,
    nested: u64,
    /// VMs reset in place to their fork.
    resets: u64,
    disk_resets: u64,
    destroyed_running: u64,
    /// VMs with a pair of vCPUs that no longer wake each other.
    stuck: u64,
}

impl Tally {
    /// Whether an error was found.
    fn is_wrong(&self) -> bool {
        self.wrong_bytes + self.violations + self.stuck > 0
    }

    /// Whether children were compared, and some of them reset in place.
    fn is_complete(&self) -> bool {
        self.children > 0 && self.resets > 0
    }

    fn add(&mut self, other: &Self) {
        self.bytes_checked += other.bytes_checked;
        self.wrong_bytes += other.wrong_bytes;
        self.violations += other.violations;
        self.children += other.children;
        self.nested += other.nested;
        self.resets += other.resets;
        self.disk_resets += other.disk_resets;
        self.destroyed_running += other.destroyed_running;
        self.stuck += other.stuck;
    }
}

/// Reads of vCPU 0 from its disk, in MiB/s.
#[derive(Debug, Default, Serialize)]
struct Throughput {
    without_forks: f64,
    /// While the VM is forked, and the forks are dropped.
    with_forks: f64,
    /// The same beside [`IDLE_CHILDREN`] children, whose guests have halted.
    with_idle_children: f64,
    /// While the VM is forked and its children run and are compared on the same processors.
    with_children: f64,
    ratio: f64,
    ratio_with_idle_children: f64,
    ratio_with_children: f64,
}

/// The cost of a fork to the parent.
#[derive(Debug, Serialize)]
struct Costs {
    /// The whole pause.
    pause_us: Spread,
    /// Part of the pause: until vCPUs and devices are quiesced.
    park_us: Spread,
    /// Part of the pause: freezing memory.
    freeze_us: Spread,
    pages_copied: Spread,
    pages_remapped: Spread,
}

#[derive(Debug, Default)]
struct CostSamples {
    pause: Sample,
    park: Sample,
    freeze: Sample,
    copied: Sample,
    remapped: Sample,
}

impl CostSamples {
    fn push(&mut self, fork: &ForkCosts) {
        self.pause.push(fork.pause_us);
        self.park.push(fork.park_us);
        self.freeze.push(fork.freeze_us);
        self.copied.push(fork.copied as f64);
        self.remapped.push(fork.remapped as f64);
    }

    fn spread(&self) -> Costs {
        Costs {
            pause_us: self.pause.spread(),
            park_us: self.park.spread(),
            freeze_us: self.freeze.spread(),
            pages_copied: self.copied.spread(),
            pages_remapped: self.remapped.spread(),
        }
    }
}

#[derive(Debug, Serialize)]
struct StressReport {
    seconds: f64,
    seed: u64,
    unshare: bool,
    /// Whether all VMs are in this process.
    in_process: bool,
    cpus: u64,
    disk: &'static str,
    forks: u64,
    forks_per_second: f64,
    in_flight_at_fork: u64,
    discards: u64,
    rounds_written: u64,
    #[serde(flatten)]
    tally: Tally,
    /// Costs of the forks that were dropped.
    fork: Costs,
    /// Costs of forks beside idle children.
    fork_with_idle_children: Costs,
    /// Costs of forks while children ran on the same processors.
    fork_with_children: Costs,
    throughput_mib_s: Throughput,
}

/// Drives the parent.
struct Stress<'a> {
    rig: Rig,
    world: Arc<World>,
    args: &'a StressArgs,
    random: Random,
    forks: u64,
    in_flight: u64,
}

pub(crate) fn main(args: &StressArgs) -> Result<(), Failure> {
    let StressName::Dma = args.name;
    if args.seconds == 0 || args.forks_per_second == 0 {
        return Err(Failure::Input(anyhow::anyhow!(
            "{} seconds and {} forks a second are no stress",
            args.seconds,
            args.forks_per_second
        )));
    }
    if args.cpus < 2 || !args.cpus.is_multiple_of(2) {
        return Err(Failure::Input(anyhow::anyhow!("{} vCPUs: there are two for the disks, and pairs", args.cpus)));
    }
    // Only the library has the broken protocol.
    let world = Arc::new(World::new(args.in_process || args.without_unshare, args.without_unshare)?);
    let seed = args.seed.unwrap_or_else(|| u64::from(std::process::id()) ^ u64::from(rig::clock()));
    let rig = Rig::boot(&world, args)?;
    let mut stress = Stress { rig, world, args, random: Random::new(seed), forks: 0, in_flight: 0 };
    let report = stress.run(seed);
    // Before its disks' files go.
    let ended = stress.rig.end();
    let report = report?;
    ended?;
    if args.json {
        print_json(&report).map_err(Failure::run)?;
    } else {
        print(&report)?;
    }
    let tally = &report.tally;
    match (tally.is_wrong(), args.without_unshare) {
        (false, false) | (true, true) => Ok(()),
        (true, false) => Err(Failure::Run(anyhow::anyhow!(
            "{} bytes are not what they must be, devices broke the rules {} times, and {} VMs were stuck (seed {seed})",
            tally.wrong_bytes,
            tally.violations,
            tally.stuck
        ))),
        (false, true) => Err(Failure::Run(anyhow::anyhow!(
            "nothing was wrong in {} forks without unshare: this run proves nothing (seed {seed})",
            report.forks
        ))),
    }
}

impl Stress<'_> {
    fn run(&mut self, seed: u64) -> Result<StressReport, Failure> {
        let whole = Duration::from_secs(self.args.seconds);
        let [least, most] = MEASURED;
        let measured = (whole / 8).clamp(least, most);
        let begun = Instant::now();
        let turn = TURN.min(measured);
        let [mut quiet, mut forking, mut beside_idle] = <[Stretch; 3]>::default();
        let [mut dropped, mut dropped_beside, mut kept] = <[CostSamples; 3]>::default();
        let forget = |world: &World, _: &Rig, image, _| world.forget(image).map(|()| true);
        while quiet.time < measured || forking.time < measured || beside_idle.time < measured {
            quiet.add(&self.quiet(turn)?);
            forking.add(&self.forking(turn, &mut dropped, forget)?);
            let children = self.idle_children()?;
            beside_idle.add(&self.forking(turn, &mut dropped_beside, forget)?);
            children.into_iter().try_for_each(StressVm::destroy)?;
        }
        let (queue, waiting) = sync_channel::<Forked>(WAITING);
        let mut checker = Checker::new(Arc::clone(&self.world), self.args.cpus, self.random.fork());
        let thread = thread::Builder::new().name("checker".to_owned());
        let (found, complete) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (tell_found, tell_complete) = (Arc::clone(&found), Arc::clone(&complete));
        let checking = thread.spawn(move || {
            for forked in waiting {
                checker.check(forked)?;
                // Relaxed: the tally is read after the thread has ended.
                tell_found.store(checker.tally().is_wrong(), Ordering::Relaxed);
                tell_complete.store(checker.tally().is_complete(), Ordering::Relaxed);
            }
            Ok(checker.tally())
        });
        let checking = checking.map_err(Failure::run)?;
        let left = whole.saturating_sub(begun.elapsed()).max(least);
        let mut gone = false;
        let mut check = |world: &World, rig: &Rig, image, costs| {
            let forked = Forked { image, expect: rig.expectation(), costs };
            match queue.try_send(forked) {
                Ok(()) => {}
                Err(TrySendError::Full(forked)) => world.forget(forked.image)?,
                // Its result has the reason.
                Err(TrySendError::Disconnected(_)) => gone = true,
            }
            Ok(!gone)
        };
        let forked = self.forking(left, &mut kept, &mut check).and_then(|mut children| {
            // A busy host checks less than a child a second.
            let late = begun + whole + MAX_OVERTIME;
            while !checking.is_finished()
                && if self.args.without_unshare {
                    !found.load(Ordering::Relaxed) && !self.rig.found_any() && self.forks < MAX_CONTROL_FORKS
                } else {
                    !complete.load(Ordering::Relaxed) && Instant::now() < late
                }
            {
                children.add(&self.forking(TURN, &mut kept, &mut check)?);
            }
            Ok(children)
        });
        drop(queue);
        let checked: Result<Tally, Failure> =
            checking.join().map_err(|_| Failure::Run(anyhow::anyhow!("the checker panicked")))?;
        // After the checker has let go of its VMs.
        let children = forked?;
        let mut tally = checked?;
        self.rig.finish(&mut tally)?;
        let throughput = Throughput {
            without_forks: quiet.mib_s(),
            with_forks: forking.mib_s(),
            with_idle_children: beside_idle.mib_s(),
            with_children: children.mib_s(),
            ratio: forking.mib_s() / quiet.mib_s(),
            ratio_with_idle_children: beside_idle.mib_s() / quiet.mib_s(),
            ratio_with_children: children.mib_s() / quiet.mib_s(),
        };
        let seconds = begun.elapsed().as_secs_f64();
        Ok(StressReport {
            seconds,
            seed,
            unshare: !self.args.without_unshare,
            in_process: matches!(*self.world, World::InProcess { .. }),
            cpus: self.args.cpus,
            disk: match self.rig.policy() {
                CachePolicy::Direct => "direct",
                CachePolicy::Host => "host cache",
            },
            forks: self.forks,
            forks_per_second: self.forks as f64 / (forking.time + beside_idle.time + children.time).as_secs_f64(),
            in_flight_at_fork: self.in_flight,
            discards: self.rig.discards(),
            rounds_written: self.rig.rounds(),
            tally,
            fork: dropped.spread(),
            fork_with_idle_children: dropped_beside.spread(),
            fork_with_children: kept.spread(),
            throughput_mib_s: throughput,
        })
    }

    /// Measures the parent without forks.
    fn quiet(&mut self, time: Duration) -> Result<Stretch, Failure> {
        let (begun, from) = (Instant::now(), self.rig.read_bytes()?);
        while begun.elapsed() < time {
            self.rig.step(&mut self.random)?;
            thread::sleep(POLL_INTERVAL);
        }
        Ok(Stretch { bytes: self.rig.read_bytes()? - from, time: begun.elapsed() })
    }

    /// Makes children whose guests end their work and halt.
    fn idle_children(&mut self) -> Result<Vec<StressVm>, Failure> {
        let (image, _) = self.rig.fork(&self.world)?;
        let children = (0..IDLE_CHILDREN).map(|_| self.world.child(&image)).collect::<Result<Vec<_>, _>>()?;
        self.world.forget(image)?;
        for child in &children {
            child.resume()?;
            self.rig.halt(child)?;
        }
        Ok(children)
    }

    /// Measures the parent while it is forked at the fixed interval. `then` gets each fork, and
    /// returns whether to continue.
    fn forking(
        &mut self,
        time: Duration,
        costs: &mut CostSamples,
        mut then: impl FnMut(&World, &Rig, StressImage, ForkCosts) -> Result<bool, Failure>,
    ) -> Result<Stretch, Failure> {
        let beat = Duration::from_secs(1) / self.args.forks_per_second;
        let (begun, from) = (Instant::now(), self.rig.read_bytes()?);
        let mut next = begun;
        while begun.elapsed() < time {
            self.rig.step(&mut self.random)?;
            let now = Instant::now();
            if now < next {
                thread::sleep((next - now).min(POLL_INTERVAL));
                continue;
            }
            // Make up for missed forks, but not for all those of a host that stalled.
            next = (next + beat).max(now.checked_sub(beat * MADE_UP).unwrap_or(now));
            let (image, cost) = self.rig.fork(&self.world)?;
            self.forks += 1;
            self.in_flight += cost.in_flight;
            costs.push(&cost);
            if !then(&self.world, &self.rig, image, cost)? {
                break;
            }
        }
        Ok(Stretch { bytes: self.rig.read_bytes()? - from, time: begun.elapsed() })
    }
}

/// Bytes that were read, and the time it took.
#[derive(Debug, Default)]
struct Stretch {
    bytes: u64,
    time: Duration,
}

impl Stretch {
    fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.time += other.time;
    }

    fn mib_s(&self) -> f64 {
        self.bytes as f64 / f64::from(1 << 20) / self.time.as_secs_f64()
    }
}

fn print(report: &StressReport) -> Result<(), Failure> {
    let mut table = Table::new(["DMA under forks", ""]);
    let mut row = |name: &str, value: String| table.row([name.into(), value]);
    let (t, tally) = (&report.throughput_mib_s, &report.tally);
    row("time", format!("{:.0} s, seed {}", report.seconds, report.seed));
    row("VMs", if report.in_process { "in this process" } else { "in a process each" }.into());
    row("pinned pages are spared by freezes", if report.unshare { "yes" } else { "NO" }.into());
    row("disk", report.disk.into());
    row("forks", format!("{} ({:.0} a second)", report.forks, report.forks_per_second));
    row("requests in flight at a fork", format!("{:.1}", report.in_flight_at_fork as f64 / report.forks.max(1) as f64));
    let us = |spread: &Spread| format!("{:.0} us  (p99 {:.0})", spread.p50, spread.p99);
    row("parent paused for", us(&report.fork.pause_us));
    row("  until all stands still", us(&report.fork.park_us));
    row("  then for freezing memory", us(&report.fork.freeze_us));
    let pages = |spread: &Spread| format!("{:.0}", spread.p50);
    let (copied, remapped) = (pages(&report.fork.pages_copied), pages(&report.fork.pages_remapped));
    row("pages copied, remapped", format!("{copied}, {remapped}"));
    row("parent paused for, beside idle children", us(&report.fork_with_idle_children.pause_us));
    row("parent paused for, with running children", us(&report.fork_with_children.pause_us));
    row("children compared", format!("{}, {} of them nested", tally.children, tally.nested));
    row("put back to their fork in place", tally.resets.to_string());
    row("disk resets, destroyed running", format!("{}, {}", tally.disk_resets, tally.destroyed_running));
    row("pages discarded, rounds written", format!("{}, {}", report.discards, report.rounds_written));
    row("disk reads without forks", format!("{:.1} MiB/s", t.without_forks));
    row("  with forks", format!("{:.1} MiB/s ({:.0} %)", t.with_forks, t.ratio * 100.0));
    let beside_idle = t.ratio_with_idle_children * 100.0;
    row(
        &format!("  beside {IDLE_CHILDREN} idle children"),
        format!("{:.1} MiB/s ({beside_idle:.0} %)", t.with_idle_children),
    );
    row("  with running children", format!("{:.1} MiB/s ({:.0} %)", t.with_children, t.ratio_with_children * 100.0));
    row("bytes checked", format!("{:.2} GiB", tally.bytes_checked as f64 / f64::from(1 << 30)));
    row("wrong bytes", tally.wrong_bytes.to_string());
    row("stuck VMs", tally.stuck.to_string());
    table.print().map_err(Failure::run)
}
