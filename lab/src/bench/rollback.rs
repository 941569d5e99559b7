//! `clade-lab bench rollback`: a VM back at a checkpoint, by the supervisor's API, by the pages written
//! since.
//!
//! A supervisor is started as by a user. The VM is a bare guest that has written all its RAM, and has two
//! checkpoints that differ in 1,000 pages. The host writes pages, and the VM is rolled back to the
//! checkpoint that it has left (`same`), or to the other one. The baseline is another VM forked from the
//! checkpoint, in a prepared process: what a user without rollbacks would do. Both alternate.
//! `process` is the time in the VM's process. The limit is a vCPU parked, its pages discarded or copied back, and
//! its registers set.

use std::time::{Duration, Instant};

use clade_api::{ForkAnswer, ForkRequest, ResetAnswer, RollbackRequest};
use clade_guests::abi::{PAGE_SIZE, WORK_BASE};
use clade_vmm::vm::VmConfig;
use hyper::Method;
use hyper::body::Bytes;

use crate::args::BenchArgs;
use crate::bench::supervisor::{BenchSupervisor, boot_request};
use crate::bench::{BenchRow, Sample};
use crate::limit::{EitherWay, Limits, Pages, Spinning};
use clade::{Failure, MEASURE};

/// Pages written before a rollback.
const DIRTY: [u64; 4] = [0, 100, 1_000, 10_000];
/// Pages in which the two checkpoints differ.
const DIFFERENCE: u64 = 1_000;
/// The pages for which the design sets a limit, and the limit in microseconds.
const TARGET: (u64, f64) = (1_000, 1_000.0);
/// Most pages of one write of the host's: a request's body has a bound.
const MOST_WRITTEN: u64 = 512;
const VM: &str = "vm";
const LIMIT: &str = "park, discard or copy, run";
const ANOTHER: &str = "forked from it, prepared";

#[derive(Default)]
struct Samples {
    same: Sample,
    same_process: Sample,
    other: Sample,
    other_process: Sample,
    another: Sample,
    limit: EitherWay,
}

/// Runs `clade-lab bench rollback`.
pub(crate) fn run(args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let mem = args.mem[0];
    let least = WORK_BASE + DIRTY[DIRTY.len() - 1] * PAGE_SIZE;
    if mem < least {
        return Err(Failure::Input(anyhow::anyhow!("{mem} bytes are no size for this benchmark: {least} at least")));
    }
    let config = VmConfig::bare(mem, 1).map_err(Failure::input)?;
    config.check_host_memory().map_err(Failure::input)?;
    let limit = Limits::new(mem).and_then(|limits| limits.spinning()).map_err(Failure::Run)?;
    let bench = Bench(BenchSupervisor::start(&["--pool", "0"], &[(MEASURE, "idle")])?);
    bench.0.ask::<clade_api::VmInfo>(Method::POST, "/v1/vms", Some(&boot_request(VM, &config)))?;
    bench.0.checkpoint(VM, "one")?;
    bench.write(DIFFERENCE, 1)?;
    bench.0.checkpoint(VM, "two")?;
    let mut rows = Vec::new();
    for pages in DIRTY {
        rows.extend(rows_of(pages, &bench.measure(pages, args.samples, &limit)?));
    }
    Ok(rows)
}

fn rows_of(pages: u64, samples: &Samples) -> [BenchRow; 4] {
    let (of, limit) = TARGET;
    let within = |row: BenchRow| {
        if pages == of { row.target(format!("p50 <= {limit}"), |row| row.p50() <= limit) } else { row }
    };
    let row = |name: String, sample: &Sample| BenchRow::new(name, "us", sample).limit(LIMIT, samples.limit.best());
    [
        within(row(format!("rollback_{pages}"), &samples.same).against(ANOTHER, &samples.another)),
        within(row(format!("rollback_{pages}_process"), &samples.same_process)),
        row(format!("rollback_{pages}_other"), &samples.other).against(ANOTHER, &samples.another),
        within(row(format!("rollback_{pages}_other_process"), &samples.other_process)),
    ]
}

struct Bench(BenchSupervisor);

impl Bench {
    /// Writes `pages` pages of the guest's, each with `word` at its start.
    fn write(&self, pages: u64, word: u64) -> Result<(), Failure> {
        let mut page = vec![0; PAGE_SIZE as usize];
        page[..8].copy_from_slice(&word.to_le_bytes());
        for first in (0..pages).step_by(MOST_WRITTEN as usize) {
            let bytes = Bytes::from(page.repeat(MOST_WRITTEN.min(pages - first) as usize));
            let write = self.0.client.write_memory(VM, WORK_BASE + first * PAGE_SIZE, bytes);
            self.0.runtime.block_on(write).map_err(Failure::run)?;
        }
        Ok(())
    }

    /// Rolls the VM back. Returns the time of the request, and that in the VM's process.
    fn roll_back(&self, to: &str) -> Result<(Duration, f64), Failure> {
        let request = RollbackRequest { checkpoint: to.to_owned(), ready: false };
        let begun = Instant::now();
        let answer: ResetAnswer = self.0.ask(Method::POST, &format!("/v1/vms/{VM}/rollback"), Some(&request))?;
        Ok((begun.elapsed(), answer.total_us))
    }

    /// Forks another VM from a checkpoint, in a prepared process, and stops it.
    fn another(&self, of: &str) -> Result<Duration, Failure> {
        self.0.prepare(of, 1)?;
        let path = format!("/v1/checkpoints/{of}/fork");
        let begun = Instant::now();
        let answer: ForkAnswer = self.0.ask(Method::POST, &path, Some(&ForkRequest::default()))?;
        let took = begun.elapsed();
        self.0.stop(&answer.children, 1)?;
        Ok(took)
    }

    fn measure(&self, pages: u64, samples: usize, limit: &Spinning) -> Result<Samples, Failure> {
        let mut all = Samples::default();
        for at in 0..samples as u64 {
            // The VM is at the first one each time.
            self.roll_back("one")?;
            self.write(pages, 2 + at)?;
            let (took, in_process) = self.roll_back("one")?;
            all.same.push_us(took);
            all.same_process.push(in_process);
            self.write(pages, 2 + at)?;
            let (took, in_process) = self.roll_back("two")?;
            all.other.push_us(took);
            all.other_process.push(in_process);
            all.another.push_us(self.another("one")?);
            // A vCPU that has written nothing is parked and set back too.
            let written = Pages { count: pages.max(1), step: 1 };
            limit.reset(written, &mut all.limit).map_err(Failure::Run)?;
        }
        Ok(all)
    }
}
