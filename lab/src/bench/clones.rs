//! `clade-lab bench clones`: VMs in processes of their own, by the supervisor's API.
//!
//! A supervisor is started as by a user. The parent is a bare guest that has written all its RAM,
//! and is paused. Each child reports that it runs before the answer comes, and is then paused: so a
//! time runs from the request until the last child's first instruction.
//!
//! Two rows are of one child of a VM that computes, beside as many others that compute as there are processors.
//!
//! The baseline is as many VMs in one process, in the same run: this one, by the library. The limit is as many processes
//! made by fork, each with a VM that writes one page: cold, and with the VM made before.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_api::{CheckpointInfo, ForkAnswer, ForkRequest, VmInfo};
use clade_harness::BareVcpu;
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::vm::{Context, ForkImage, Vm, VmConfig};
use hyper::Method;

use crate::args::BenchArgs;
use crate::bench::supervisor::{BenchSupervisor, boot_request, settled_kib};
use crate::bench::{BenchRow, Sample, announced, announced_clone, fill, label};
use crate::limit;
use clade::{Failure, MEASURE, SPINNING};

/// Runs of the larger figures.
pub(super) const RUNS: usize = 3;
/// Default number of clones.
pub(super) const COUNT: usize = 1000;
/// The number of clones that the time of one is compared with.
pub(super) const FEW: usize = 100;
/// Numbers of clones with rows of their own, if below the requested number.
const COUNTS: [usize; 7] = [1, 3, 10, 30, FEW, 300, 1_000];

/// The most clones in one process. With a thousand each change of the process's mappings reaches a thousand VMs: on one
/// host the VMs took minutes, and one had not reported within 30 s.
const MOST_IN_ONE_PROCESS: usize = 300;

const IDLE: &str = "clones that are idle";
const PROCESSES: &str = "processes by fork";
const ONE_PROCESS: &str = "VMs in one process";

/// A supervisor and a parent. A drop ends both.
struct Bench {
    supervisor: BenchSupervisor,
    context: Context,
    /// The library's parent.
    parent: Vm,
    image: Arc<ForkImage>,
    config: Arc<VmConfig>,
}

/// Times of one number of clones.
#[derive(Default)]
struct Times {
    cold: Sample,
    prepared: Sample,
    one_process: Sample,
    limit_cold: Sample,
    limit_prepared: Sample,
    private: Sample,
    kernel: Sample,
}

impl Times {
    fn totals(&self) -> [[&Sample; 2]; 2] {
        [[&self.cold, &self.limit_cold], [&self.prepared, &self.limit_prepared]]
    }
}

/// Runs `clade-lab bench clones`.
pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let (mem, most) = (args.mem[0], args.count.unwrap_or(COUNT));
    let bench = Bench::new(context, mem, "idle")?;
    let mut rows = vec![bench.one(args.samples)?];
    rows.extend(Bench::new(context, mem, SPINNING)?.busy(args.samples)?);
    let counts = COUNTS.into_iter().filter(|count| *count < most).chain([most]);
    let all = counts.map(|count| Ok((count, bench.many(count, true)?))).collect::<Result<Vec<_>, Failure>>()?;
    rows.extend(all.iter().flat_map(|(count, times)| totals(*count, times)));
    let few = all.iter().find(|(count, _)| *count == FEW).map(|(_, times)| times);
    let Some((_, last)) = all.last() else { return Ok(rows) };
    if let Some(few) = few.filter(|_| most > FEW) {
        let each = |sample: &Sample, count: usize| sample.spread().p50 / count as f64;
        let growth = |of: fn(&Times) -> &Sample| {
            let mut sample = Sample::default();
            if !of(last).is_empty() {
                sample.push(each(of(last), most) / each(of(few), FEW));
            }
            sample
        };
        rows.push(
            BenchRow::new("clones_growth", "x", &growth(|times| &times.cold))
                .against(ONE_PROCESS, &growth(|times| &times.one_process))
                .target("<= 1.2", |row| row.p50() <= 1.2),
        );
    }
    if let Some(few) = few {
        // Each running clone takes a processor from those that are still being made.
        let spinning = Bench::new(context, mem, SPINNING)?.many(FEW, false)?;
        let name = format!("clones_{FEW}_total_spinning");
        rows.push(BenchRow::new(name, "ms", &spinning.cold).against(IDLE, &few.cold));
    }
    rows.push(BenchRow::new("clone_private_kib", "KiB", &last.private).target("<= 300", |row| row.p50() <= 300.0));
    rows.push(BenchRow::new("clone_kernel_kib", "KiB", &last.kernel));
    for row in &mut rows {
        if args.mem.len() > 1 {
            row.name = format!("{}_{}", row.name, label(mem));
        }
    }
    Ok(rows)
}

fn totals(count: usize, times: &Times) -> [BenchRow; 2] {
    beside_processes(
        [&format!("clones_{count}_total"), &format!("clones_{count}_total_prepared")],
        count,
        times.totals(),
    )
    .map(|row| row.against(ONE_PROCESS, &times.one_process))
}

/// Returns the rows of `count` clones, cold and prepared: each of ours, in milliseconds, and of the limit.
pub(super) fn beside_processes(names: [&str; 2], count: usize, totals: [[&Sample; 2]; 2]) -> [BenchRow; 2] {
    let row = |name: &str, [ours, limit]: [&Sample; 2], most: f64| {
        let row = BenchRow::new(name, "ms", ours).limit(PROCESSES, limit);
        if count == 1_000 { row.target(format!("<= {most}"), |row| row.p50() <= most) } else { row }
    };
    [row(names[0], totals[0], 1_500.0), row(names[1], totals[1], 600.0)]
}

/// Adds a sample of `count` processes, cold and prepared, whose guests have `ram` bytes and write `pages` pages.
pub(super) fn push_limits(
    [cold, prepared]: [&mut Sample; 2],
    count: usize,
    ram: u64,
    pages: u64,
) -> Result<(), Failure> {
    for limit in limit::measure_processes(count, 1, ram, pages)? {
        cold.push(limit.cold.as_secs_f64() * 1e3);
        prepared.push(limit.prepared.as_secs_f64() * 1e3);
    }
    Ok(())
}

impl Bench {
    /// Starts the bench with clones that do `after` after their first instruction.
    fn new(context: &Context, mem: u64, after: &str) -> Result<Self, Failure> {
        let config = Arc::new(VmConfig::bare(mem, 1).map_err(Failure::input)?);
        config.check_host_memory().map_err(Failure::input)?;
        let supervisor = BenchSupervisor::start(&["--pool", "1"], &[(MEASURE, after)])?;
        let source = BootSource::new(BootImage::Bytes(clade_guests::BARE_ELF.into()));
        let parent = Vm::boot(context, "parent", &config, &source).map_err(Failure::run)?;
        BareVcpu::new(&parent, 0).await_ready().map_err(Failure::run)?;
        fill(&parent, &config).map_err(Failure::run)?;
        parent.pause().map_err(Failure::run)?;
        let image = parent.fork().map_err(Failure::run)?.0;
        let bench = Self { supervisor, context: context.clone(), parent, image, config };
        // Its worker has it write all its memory, and pauses it.
        let boot = boot_request("parent", &bench.config);
        let _: VmInfo = bench.supervisor.ask(Method::POST, "/v1/vms", Some(&boot))?;
        Ok(bench)
    }

    fn fork(&self, of: &str, count: usize) -> Result<(ForkAnswer, Duration), Failure> {
        let request =
            ForkRequest { count, name: Some("clone-{n}".to_owned()), overcommit: true, ..ForkRequest::default() };
        let begun = Instant::now();
        let answer = self.supervisor.ask(Method::POST, &format!("/v1/{of}/fork"), Some(&request))?;
        Ok((answer, begun.elapsed()))
    }

    /// Measures one child of a VM, from a prepared worker.
    fn one(&self, samples: usize) -> Result<BenchRow, Failure> {
        let (mut ours, mut library) = (Sample::default(), Sample::default());
        // No worker is prepared for the first.
        let (first, _) = self.fork("vms/parent", 1)?;
        self.stop(&first.children)?;
        for _ in 0..samples {
            self.supervisor.await_prepared(1)?;
            let (answer, took) = self.fork("vms/parent", 1)?;
            ours.push_us(took);
            self.stop(&answer.children)?;
            self.context.prefill(&self.config, 1).map_err(Failure::run)?;
            let begun = Instant::now();
            let (image, _) = self.parent.fork().map_err(Failure::run)?;
            library.push_us(announced(&self.context, &image, begun)?);
        }
        self.context.drain();
        let mut limit = Sample::default();
        limit::measure_processes(1, samples, self.mem(), 1)?.iter().for_each(|times| limit.push_us(times.prepared));
        Ok(BenchRow::new("fork_api_first_instruction", "us", &ours)
            .limit("a prepared process: map, run", &limit)
            .against("the library, in one process", &library)
            .target("p50 <= 1500", |row| row.p50() <= 1_500.0))
    }

    /// Measures one child, from a prepared worker, of a VM that computes, beside as many VMs that compute as there are
    /// processors.
    fn busy(&self, samples: usize) -> Result<[BenchRow; 2], Failure> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let (busy, _) = self.fork("vms/parent", cpus + 1)?;
        let of = format!("vms/{}", busy.children[0]);
        let (mut first_instruction, mut pause) = (Sample::default(), Sample::default());
        for _ in 0..samples {
            self.supervisor.await_prepared(1)?;
            let (answer, took) = self.fork(&of, 1)?;
            first_instruction.push_us(took);
            pause.push(answer.pause_us);
            // With the parent.
            self.supervisor.stop(&answer.children, cpus + 2)?;
        }
        self.stop(&busy.children)?;
        Ok([
            BenchRow::new("fork_api_first_instruction_busy", "us", &first_instruction)
                .target("p99 <= 10000", |row| row.p99() <= 10_000.0),
            BenchRow::new("fork_api_pause_busy", "us", &pause).target("p99 <= 2000", |row| row.p99() <= 2_000.0),
        ])
    }

    fn mem(&self) -> u64 {
        self.config.layout().bytes()
    }

    /// Measures `count` clones of a checkpoint.
    fn many(&self, count: usize, with_limit: bool) -> Result<Times, Failure> {
        let mut times = Times::default();
        self.supervisor.checkpoint("parent", "cp")?;
        for _ in 0..RUNS {
            let free = settled_kib();
            let (answer, took) = self.fork("checkpoints/cp", count)?;
            times.cold.push(took.as_secs_f64() * 1e3);
            let used = (free as f64 - settled_kib() as f64) / count as f64;
            let private = self.supervisor.private_kib(&answer.children)?;
            // Below zero where memory of earlier processes came back meanwhile: a sample of nothing.
            times.kernel.push(used - private.spread().p50);
            times.private = private;
            self.stop(&answer.children)?;

            self.supervisor.prepare("cp", count)?;
            let (answer, took) = self.fork("checkpoints/cp", count)?;
            times.prepared.push(took.as_secs_f64() * 1e3);
            self.stop(&answer.children)?;

            if count <= MOST_IN_ONE_PROCESS {
                let begun = Instant::now();
                let mut clones = Vec::with_capacity(count);
                for _ in 0..count {
                    let (clone, _) = announced_clone(&self.context, &self.image)?;
                    // Paused like the others: it would take a processor from those still to be made.
                    clone.pause().map_err(Failure::run)?;
                    clones.push(clone);
                }
                times.one_process.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            if with_limit {
                push_limits([&mut times.limit_cold, &mut times.limit_prepared], count, self.mem(), 1)?;
            }
        }
        let _: CheckpointInfo = self.supervisor.ask(Method::DELETE, "/v1/checkpoints/cp", None::<&()>)?;
        Ok(times)
    }

    /// Stops clones: the parent stays.
    fn stop(&self, names: &[String]) -> Result<(), Failure> {
        self.supervisor.stop(names, 1)
    }
}
