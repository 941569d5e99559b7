//! `clade-lab bench live`: children of a running VM, which all live and answer at once.
//!
//! The parent is a bare guest that has written all its RAM and has halted. Each child runs in a process of its own. It
//! writes 256 KiB, reports a checksum of as much that it has inherited, and halts. A time runs from the request until
//! the last child has answered: none is paused meanwhile. Every checksum is compared.
//!
//! The limit is as many processes made by fork, each with a VM that writes 256 KiB: cold, and with the VM made before.

use std::time::{Duration, Instant};

use clade_api::{ForkAnswer, ForkRequest, VmInfo};
use clade_guests::abi::{PAGE_SIZE, PAGE_WORDS, WORK_BASE, fill_word, mailbox_gpa, offset};
use clade_harness::FILL_SEED;
use clade_vmm::vm::VmConfig;
use hyper::Method;

use crate::args::BenchArgs;
use crate::bench::clones::{COUNT, FEW, RUNS, beside_processes, push_limits};
use crate::bench::supervisor::{BenchSupervisor, boot_request, settled_kib};
use crate::bench::{BenchRow, Sample, label};
use clade::{ANSWER_PAGES, ANSWER_SEED, ANSWERING, Failure, MEASURE};

const VM: &str = "parent";

/// Figures of one number of children.
#[derive(Default)]
struct Figures {
    cold: Sample,
    prepared: Sample,
    limit_cold: Sample,
    limit_prepared: Sample,
    pause: Sample,
    private: Sample,
    available: Sample,
}

/// Runs `clade-lab bench live`.
pub(crate) fn run(args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let (mem, most) = (args.mem[0], args.count.unwrap_or(COUNT));
    let config = VmConfig::bare(mem, 1).map_err(Failure::input)?;
    config.check_host_memory().map_err(Failure::input)?;
    let least = WORK_BASE + 2 * ANSWER_PAGES * PAGE_SIZE;
    if mem < least || most == 0 {
        return Err(Failure::Input(anyhow::anyhow!("{most} children of {mem} bytes: one of {least} bytes at least")));
    }
    let last = measure(most, &config)?;
    let mut rows = totals(most, &last).to_vec();
    if most > FEW {
        let few = measure(FEW, &config)?;
        rows.extend(totals(FEW, &few));
        let mut growth = Sample::default();
        growth.push(last.cold.spread().p50 / most as f64 / (few.cold.spread().p50 / FEW as f64));
        rows.push(BenchRow::new("live_growth", "x", &growth).target("<= 1.1", |row| row.p50() <= 1.1));
    }
    let within = |name: &str, unit, sample: &Sample, most: f64| {
        BenchRow::new(name, unit, sample).target(format!("<= {most}"), |row| row.p50() <= most)
    };
    rows.push(within("live_pause", "us", &last.pause, 1000.0));
    rows.push(within("live_private_kib", "KiB", &last.private, 512.0));
    rows.push(within("live_available_kib", "KiB", &last.available, 1228.8));
    if args.mem.len() > 1 {
        rows.iter_mut().for_each(|row| row.name = format!("{}_{}", row.name, label(mem)));
    }
    Ok(rows)
}

fn totals(count: usize, figures: &Figures) -> [BenchRow; 2] {
    let names = [&*format!("live_{count}_answers"), &*format!("live_{count}_answers_prepared")];
    let totals = [[&figures.cold, &figures.limit_cold], [&figures.prepared, &figures.limit_prepared]];
    beside_processes(names, count, totals)
}

fn measure(count: usize, config: &VmConfig) -> Result<Figures, Failure> {
    let mut figures = Figures::default();
    for _ in 0..RUNS {
        let live = Live::start(config)?;
        let free = settled_kib();
        let (children, took) = live.fork(count, &mut figures.pause)?;
        figures.cold.push(took.as_secs_f64() * 1e3);
        figures.available.push((free as f64 - settled_kib() as f64) / count as f64);
        live.check(&children)?;
        figures.private = live.0.private_kib(&children)?;
        live.0.stop(&children, 1)?;
        // They have the configuration of the checkpoint's VM, which is forked.
        live.0.checkpoint(VM, "cp")?;
        live.0.prepare("cp", count)?;
        let (children, took) = live.fork(count, &mut figures.pause)?;
        figures.prepared.push(took.as_secs_f64() * 1e3);
        live.check(&children)?;
        live.0.stop(&children, 1)?;
        let limits = [&mut figures.limit_cold, &mut figures.limit_prepared];
        push_limits(limits, count, config.layout().bytes(), ANSWER_PAGES)?;
    }
    Ok(figures)
}

/// A supervisor, and the parent that runs.
struct Live(BenchSupervisor);

impl Live {
    fn start(config: &VmConfig) -> Result<Self, Failure> {
        // A larger pool would prepare workers for the next fork while this one is measured.
        let supervisor = BenchSupervisor::start(&["--pool", "0"], &[(MEASURE, ANSWERING)])?;
        let _: VmInfo = supervisor.ask(Method::POST, "/v1/vms", Some(&boot_request(VM, config)))?;
        Ok(Self(supervisor))
    }

    /// Returns the children, and the time until the last one has answered.
    fn fork(&self, count: usize, pause: &mut Sample) -> Result<(Vec<String>, Duration), Failure> {
        let name = Some("live-{n}".to_owned());
        let request = ForkRequest { count, name, overcommit: true, ..ForkRequest::default() };
        let begun = Instant::now();
        let answer: ForkAnswer = self.0.ask(Method::POST, &format!("/v1/vms/{VM}/fork"), Some(&request))?;
        let took = begun.elapsed();
        pause.push(answer.pause_us);
        Ok((answer.children, took))
    }

    /// Compares each child's report and its writes.
    fn check(&self, children: &[String]) -> Result<(), Failure> {
        let inherited = WORK_BASE + ANSWER_PAGES * PAGE_SIZE;
        let words = (0..ANSWER_PAGES * PAGE_WORDS).map(|at| fill_word(FILL_SEED, inherited + at * 8));
        let expected = words.fold(0, u64::wrapping_add);
        let last = inherited - 8;
        for child in children {
            let found = [self.word(child, mailbox_gpa(0) + offset::RESULT)?, self.word(child, last)?];
            if found != [expected, fill_word(ANSWER_SEED, last)] {
                return Err(Failure::Run(anyhow::anyhow!(
                    "{child} reports {:#x}, and has written {:#x}",
                    found[0],
                    found[1]
                )));
            }
        }
        Ok(())
    }

    fn word(&self, name: &str, address: u64) -> Result<u64, Failure> {
        let mut bytes = [0; 8];
        self.0.runtime.block_on(self.0.client.read_memory(name, address, &mut bytes)).map_err(Failure::run)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
