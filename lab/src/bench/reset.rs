//! `clade-lab bench reset`: the time from a reset request to the VM's first instruction after it, by
//! the number of pages written since the image.
//!
//! A bare guest counts in that many pages, one after another, and is reset while it does. In the
//! image it is about to take a command to announce itself, so its first instructions are a report.
//! The baselines stop the VM and start another from the same image, in a prepared VM or not. They
//! alternate with ours. Two other rows are the worst case, pages as far apart as memory allows: in a VM's first such
//! reset, and in the next.
//!
//! The limit is a vCPU parked, its pages discarded by one call or copied back, and its registers set.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_guests::abi::{Command, Event, PAGE_SIZE, PAGE_WORDS, WORK_BASE};
use clade_memory::GAP_START;

use crate::args::BenchArgs;
use crate::bench::{BenchRow, Sample, written};
use crate::limit::{EitherWay, Limits, Pages, Spinning};
use clade::Failure;
use clade_harness::{BareMailbox, BareVcpu};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, ResetReport, Vm, VmConfig};

/// Pages written before a reset.
const DIRTY: [u64; 4] = [10, 100, 1_000, 10_000];
/// The pages for which the design sets a limit, and the limit in microseconds.
const TARGET: (u64, f64) = (100, 300.0);
/// Largest distance between two scattered pages, in pages: eight written pages per block, none
/// adjacent.
const MAX_STEP: u64 = 64;
const LIMIT: &str = "park, discard or copy, run";
/// A guest that makes no progress for this long is a failure, not a figure.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let mut rows = Vec::new();
    for &mem in &args.mem {
        let least = WORK_BASE + 2 * DIRTY[DIRTY.len() - 1] * PAGE_SIZE;
        if mem < least || mem > GAP_START {
            return Err(Failure::Input(anyhow::anyhow!(
                "{mem} bytes are no size for this benchmark: between {least} and {GAP_START}"
            )));
        }
        let config = Arc::new(VmConfig::bare(mem, 1).map_err(Failure::input)?);
        config.check_host_memory().map_err(Failure::input)?;
        let suffix = if args.mem.len() == 1 { String::new() } else { format!("_{}M", mem >> 20) };
        let image = image(context, &config)?;
        let limit = Limits::new(mem).and_then(|limits| limits.spinning()).map_err(Failure::Run)?;
        let mut subject = Subject { context, image, limit, vm: None };
        for pages in DIRTY {
            rows.extend(subject.measure(pages, args.samples)?.rows(&format!("{pages}{suffix}"), pages));
        }
        context.drain();
    }
    Ok(rows)
}

#[derive(Default)]
struct Samples {
    reset: Sample,
    first_scattered: Sample,
    scattered: Sample,
    limit: EitherWay,
    limit_scattered: EitherWay,
    warm: Sample,
    cold: Sample,
    park: Sample,
    memory: Sample,
    load: Sample,
}

impl Samples {
    fn rows(&self, name: &str, pages: u64) -> Vec<BenchRow> {
        let (warm, cold) = ("ended, started in a warm shell", "ended, started in none");
        let reset = BenchRow::new(format!("reset_{name}"), "us", &self.reset)
            .limit(LIMIT, self.limit.best())
            .against(warm, &self.warm);
        let (target, limit) = TARGET;
        let reset = if pages == target { reset.target(format!("p50 <= {limit}"), |r| r.p50() <= limit) } else { reset };
        vec![
            reset,
            BenchRow::new(format!("reset_{name}_cold"), "us", &self.reset).against(cold, &self.cold),
            BenchRow::new(format!("reset_{name}_scattered"), "us", &self.scattered)
                .limit(LIMIT, self.limit_scattered.best())
                .against(warm, &self.warm),
            BenchRow::new(format!("reset_{name}_scattered_first"), "us", &self.first_scattered)
                .against(warm, &self.warm),
            // Parts of the time. The rest of the total is the way back into the guest.
            BenchRow::new(format!("park_{name}"), "us", &self.park),
            BenchRow::new(format!("memory_{name}"), "us", &self.memory),
            BenchRow::new(format!("state_{name}"), "us", &self.load),
        ]
    }

    fn note(&mut self, report: &ResetReport) {
        self.park.push_us(report.park);
        self.memory.push_us(report.drop);
        self.load.push_us(report.load);
    }
}

/// The image of a guest that has written all its RAM and is about to announce itself.
fn image(context: &Context, config: &Arc<VmConfig>) -> Result<Arc<ForkImage>, Failure> {
    let parent = written(context, config)?;
    parent.pause().map_err(Failure::run)?;
    BareMailbox::new(&parent, 0).order(Command::Announce).map_err(Failure::run)?;
    Ok(parent.fork().map_err(Failure::run)?.0)
}

struct Subject<'a> {
    context: &'a Context,
    image: Arc<ForkImage>,
    limit: Spinning,
    vm: Option<Vm>,
}

impl Subject<'_> {
    fn measure(&mut self, pages: u64, samples: usize) -> Result<Samples, Failure> {
        let mut s = Samples::default();
        let room = (self.image.config().layout().bytes() - WORK_BASE) / PAGE_SIZE;
        let step = (room / pages).min(MAX_STEP);
        self.restart()?;
        for _ in 0..samples {
            // Alternate, so that all see the same noise.
            let (time, report) = self.reset(pages, 1)?;
            s.reset.push_us(time);
            s.note(&report);
            s.first_scattered.push_us(self.reset(pages, step)?.0);
            s.scattered.push_us(self.reset(pages, step)?.0);
            for (step, into) in [(1, &mut s.limit), (step, &mut s.limit_scattered)] {
                self.limit.reset(Pages { count: pages, step }, into).map_err(Failure::Run)?;
            }
            self.dirty(pages, 1)?;
            self.context.prefill(self.image.config(), 1).map_err(Failure::run)?;
            s.warm.push_us(self.restart()?);
            self.dirty(pages, 1)?;
            self.context.drain();
            s.cold.push_us(self.restart()?);
        }
        Ok(s)
    }

    fn vm(&self) -> Result<&Vm, Failure> {
        self.vm.as_ref().ok_or_else(|| Failure::Run(anyhow::anyhow!("there is no VM")))
    }

    /// Makes the running guest write a word in `pages` pages, every `step`-th. It keeps doing so.
    fn dirty(&self, pages: u64, step: u64) -> Result<(), Failure> {
        let vm = self.vm()?;
        let mailbox = BareMailbox::new(vm, 0);
        let count = Command::Count { start: WORK_BASE, pages: pages * step, stride: step * PAGE_WORDS };
        let seq = mailbox.order(count).map_err(Failure::run)?;
        let deadline = Instant::now() + TIMEOUT;
        while mailbox.taken().map_err(Failure::run)? < seq || mailbox.progress().map_err(Failure::run)? < pages {
            if Instant::now() > deadline || vm.stopped().is_some() {
                return Err(Failure::Run(anyhow::anyhow!("the guest does not write {pages} pages")));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn reset(&self, pages: u64, step: u64) -> Result<(Duration, ResetReport), Failure> {
        self.dirty(pages, step)?;
        let vm = self.vm()?;
        let begun = Instant::now();
        let report = vm.reset_to_origin().map_err(Failure::run)?;
        let at = BareVcpu::new(vm, 0).await_event(Event::Announce).map_err(Failure::run)?;
        let back = report.memory.dropped + report.memory.restored;
        if back < pages {
            return Err(Failure::Run(anyhow::anyhow!("{back} pages were reset of {pages} that were written")));
        }
        Ok((at - begun, report))
    }

    /// Stops the VM if there is one, and starts another. Returns the time until its first report.
    fn restart(&mut self) -> Result<Duration, Failure> {
        let begun = Instant::now();
        drop(self.vm.take());
        let vm = Vm::from_image(self.context, "bench", &self.image, ChildOptions::default()).map_err(Failure::run)?;
        let vm = self.vm.insert(vm);
        let at = BareVcpu::new(vm, 0).await_event(Event::Announce).map_err(Failure::run)?;
        Ok(at - begun)
    }
}
