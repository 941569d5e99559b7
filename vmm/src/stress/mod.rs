//! `clade stress dma`: devices do DMA into a guest, and out of it, while its CPUs write beside, and the guest is forked, again and again, and
//! every byte of every VM and disk is compared with what it must be.
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
//! The host forks, on the beat; writes and discards pages nobody else uses; and on another thread lets children run on with the requests that
//! were in flight, puts them back to their fork, stops, forks, resets their disk or destroys them in the middle, and compares. What a child must have
//! is known: the round and how far it has come are in its own memory.
//!
//! With `--without-unshare` freezes no longer spare pinned pages. Then bytes are wrong, and must be found: a check that cannot fail proves nothing.

mod checker;
mod rig;

use std::sync::mpsc::{TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use clade_io::CachePolicy;
use serde::Serialize;

use crate::bench::{Sample, Spread};
use crate::cli::{Failure, StressArgs, StressName, Table, print_json};
use crate::vm::{Context, ForkReport};

use checker::{Checker, Forked};
use rig::{Random, Rig};

/// Forks that wait to be looked at. When as many do, the next is only made.
const WAITING: usize = 4;
/// How long throughput is measured, each way, at most and at least.
const MEASURED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];
/// Between two looks at the parent.
const LOOK: Duration = Duration::from_micros(500);

/// What was found and counted.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Tally {
    bytes_checked: u64,
    wrong_bytes: u64,
    /// Times a device gave back what it did not have, or not what it said.
    violations: u64,
    children: u64,
    nested: u64,
    /// VMs put back to their fork, in place.
    resets: u64,
    disk_resets: u64,
    destroyed_running: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.bytes_checked += other.bytes_checked;
        self.wrong_bytes += other.wrong_bytes;
        self.violations += other.violations;
        self.children += other.children;
        self.nested += other.nested;
        self.resets += other.resets;
        self.disk_resets += other.disk_resets;
        self.destroyed_running += other.destroyed_running;
    }
}

/// MiB a second that vCPU 0 reads from its disk.
#[derive(Debug, Default, Serialize)]
struct Throughput {
    without_forks: f64,
    /// While it is forked, and the forks are dropped.
    with_forks: f64,
    /// While it is forked and its children run and are compared on the same processors.
    with_children: f64,
    ratio: f64,
    ratio_with_children: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    seconds: f64,
    seed: u64,
    unshare: bool,
    disk: &'static str,
    forks: u64,
    forks_per_second: f64,
    in_flight_at_fork: u64,
    discards: u64,
    rounds_written: u64,
    #[serde(flatten)]
    tally: Tally,
    pause_us: Spread,
    throughput_mib_s: Throughput,
}

/// What happens to the parent.
struct Stress<'a> {
    rig: Rig,
    args: &'a StressArgs,
    random: Random,
    forks: u64,
    in_flight: u64,
    pause: Sample,
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
    let context = Context::open().map_err(Failure::input)?;
    let seed = args.seed.unwrap_or_else(|| u64::from(std::process::id()) ^ u64::from(rig::clock()));
    let rig = Rig::boot(&context, args)?;
    let mut stress = Stress { rig, args, random: Random::new(seed), forks: 0, in_flight: 0, pause: Sample::default() };
    let report = stress.run(&context, seed)?;
    if args.json {
        print_json(&report).map_err(Failure::run)?;
    } else {
        print(&report)?;
    }
    match (report.tally.wrong_bytes, report.tally.violations) {
        (0, 0) => Ok(()),
        (wrong, violations) => Err(Failure::Run(anyhow::anyhow!(
            "{wrong} bytes are not what they must be, and devices broke the rules {violations} times (seed {seed})"
        ))),
    }
}

impl Stress<'_> {
    fn run(&mut self, context: &Context, seed: u64) -> Result<Report, Failure> {
        let whole = Duration::from_secs(self.args.seconds);
        let [least, most] = MEASURED;
        let measured = (whole / 8).clamp(least, most);
        let begun = Instant::now();
        let mut throughput = Throughput { without_forks: self.quiet(measured)?, ..Throughput::default() };
        throughput.with_forks = self.forking(measured, |_, _, _| {})?;

        let (queue, waiting) = sync_channel::<Forked>(WAITING);
        let mut checker = Checker::new(context.clone(), self.args.without_unshare, self.random.fork());
        let thread = thread::Builder::new().name("checker".to_owned());
        let checking = thread.spawn(move || {
            for forked in waiting {
                checker.check(&forked)?;
            }
            Ok(checker.tally())
        });
        let checking = checking.map_err(Failure::run)?;
        let left = whole.saturating_sub(begun.elapsed()).max(least);
        let mut gone = false;
        throughput.with_children = self.forking(left, |rig, image, forked| {
            let forked = Forked { image, expect: rig.expectation(), report: forked };
            // The checker has ended: the reason is its result.
            gone |= matches!(queue.try_send(forked), Err(TrySendError::Disconnected(_)));
        })?;
        drop(queue);
        let checked: Result<Tally, Failure> =
            checking.join().map_err(|_| Failure::Run(anyhow::anyhow!("the checker panicked")))?;
        let mut tally = checked?;
        self.rig.finish(&mut tally)?;
        throughput.ratio = throughput.with_forks / throughput.without_forks;
        throughput.ratio_with_children = throughput.with_children / throughput.without_forks;
        let seconds = begun.elapsed().as_secs_f64();
        Ok(Report {
            seconds,
            seed,
            unshare: !self.args.without_unshare,
            disk: match self.rig.policy() {
                CachePolicy::Direct => "direct",
                CachePolicy::Host => "host cache",
            },
            forks: self.forks,
            forks_per_second: self.forks as f64 / (seconds - measured.as_secs_f64()),
            in_flight_at_fork: self.in_flight,
            discards: self.rig.discards(),
            rounds_written: self.rig.rounds(),
            tally,
            pause_us: self.pause.spread(),
            throughput_mib_s: throughput,
        })
    }

    /// MiB a second without forks.
    fn quiet(&mut self, time: Duration) -> Result<f64, Failure> {
        let (begun, from) = (Instant::now(), self.rig.read_bytes()?);
        while begun.elapsed() < time {
            self.rig.step(&mut self.random)?;
            thread::sleep(LOOK);
        }
        Ok(mib_s(self.rig.read_bytes()? - from, begun.elapsed()))
    }

    /// MiB a second while the parent is forked on the beat; what is made of a fork is up to `then`.
    fn forking(
        &mut self,
        time: Duration,
        mut then: impl FnMut(&Rig, std::sync::Arc<crate::vm::ForkImage>, ForkReport),
    ) -> Result<f64, Failure> {
        let beat = Duration::from_secs(1) / self.args.forks_per_second;
        let (begun, from) = (Instant::now(), self.rig.read_bytes()?);
        let mut next = begun;
        while begun.elapsed() < time {
            self.rig.step(&mut self.random)?;
            let now = Instant::now();
            if now < next {
                thread::sleep((next - now).min(LOOK));
                continue;
            }
            // A beat that was missed is not made up for.
            next = (next + beat).max(now);
            let (image, report) = self.rig.fork()?;
            self.forks += 1;
            self.in_flight += report.in_flight as u64;
            self.pause.push_us(report.times.pause);
            then(&self.rig, image, report);
        }
        Ok(mib_s(self.rig.read_bytes()? - from, begun.elapsed()))
    }
}

fn mib_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}

fn print(report: &Report) -> Result<(), Failure> {
    let mut table = Table::new(["DMA under forks", ""]);
    let mut row = |name: &str, value: String| table.row([name.into(), value]);
    let (t, tally) = (&report.throughput_mib_s, &report.tally);
    row("time", format!("{:.0} s, seed {}", report.seconds, report.seed));
    row("pinned pages are spared by freezes", if report.unshare { "yes" } else { "NO" }.into());
    row("disk", report.disk.into());
    row("forks", format!("{} ({:.0} a second)", report.forks, report.forks_per_second));
    row("requests in flight at a fork", format!("{:.1}", report.in_flight_at_fork as f64 / report.forks.max(1) as f64));
    row("parent paused for", format!("{:.0} us  (p99 {:.0})", report.pause_us.p50, report.pause_us.p99));
    row("children compared", format!("{}, {} of them nested", tally.children, tally.nested));
    row("put back to their fork in place", tally.resets.to_string());
    row("disk resets, destroyed running", format!("{}, {}", tally.disk_resets, tally.destroyed_running));
    row("pages discarded, rounds written", format!("{}, {}", report.discards, report.rounds_written));
    row("disk reads without forks", format!("{:.1} MiB/s", t.without_forks));
    row("  with forks", format!("{:.1} MiB/s ({:.0} %)", t.with_forks, t.ratio * 100.0));
    row("  with running children", format!("{:.1} MiB/s ({:.0} %)", t.with_children, t.ratio_with_children * 100.0));
    row("bytes checked", format!("{:.2} GiB", tally.bytes_checked as f64 / f64::from(1 << 30)));
    row("wrong bytes", tally.wrong_bytes.to_string());
    table.print().map_err(Failure::run)
}
