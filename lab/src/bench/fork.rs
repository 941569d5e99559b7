//! `clade-lab bench fork`.
//!
//! For each size, a bare guest writes all its RAM, or 4 GiB of it. The guest then keeps writing a
//! hot set of 64 pages and is forked repeatedly. The first baseline copies all RAM: the cost of a
//! fork without copy-on-write. The second restores as other VMMs do: it creates the VM on the path,
//! with a private mapping of a file in 4 KiB pages. Both are measured in the same run, on the same
//! contents. A guest that has written only a part of its RAM has no baselines.
//!
//! The limit is a vCPU parked, its registers saved and the hot set copied; and then a mapping, the registers
//! and the first exit of a VM that was prepared, or is made.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_memory::{Backing, Store};

use crate::args::BenchArgs;
use crate::bench::{BenchRow, MOST_FILLED, Sample, announced, announced_clone, label, low_pages, written};
use crate::limit::{Limits, Spinning, Touch};
use clade::Failure;
use clade_harness::BareVcpu;
use clade_vmm::vm::{ChildOptions, ChildStep, Context, ForkImage, ForkTimes, Vm, VmConfig};

/// Pages the parent keeps writing.
const HOT_PAGES: u64 = 64;
/// Bytes that a child reads, which measures the cost of shared reads.
const READ_BYTES: u64 = 256 << 20;
/// Delay between forks, so that the parent writes its hot set again.
const PACE: Duration = Duration::from_millis(2);
/// The limit of a pause.
const PARK: &str = "park, save, copy the hot set";

pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    // The baseline's VMs share nothing with ours but the host.
    let plain = Context::new(Arc::clone(context.host()), Store::open_small().map_err(Failure::run)?)
        .map_err(Failure::run)?
        .with_report_port();
    let mut rows = Vec::new();
    let mut smallest: Option<(u64, f64)> = None;
    for &mem in &args.mem {
        let config = Arc::new(VmConfig::bare(mem, 1).map_err(Failure::input)?);
        config.check_host_memory().map_err(Failure::input)?;
        if mem < 2 * WORK_BASE {
            return Err(Failure::Input(anyhow::anyhow!("{mem} bytes are too few for this benchmark: at least 32M")));
        }
        let limits = Limits::new(mem).map_err(Failure::Run)?;
        let samples = args.samples;
        let size = OneSize { context, plain: &plain, limits, config, mem, samples, timeline: args.timeline };
        rows.extend(size.measure(&mut smallest)?);
    }
    Ok(rows)
}

struct OneSize<'a> {
    context: &'a Context,
    plain: &'a Context,
    limits: Limits,
    config: Arc<VmConfig>,
    mem: u64,
    samples: usize,
    timeline: bool,
}

#[derive(Default)]
struct Samples {
    first_pause: Sample,
    pause: Sample,
    full_copy: Sample,
    first_instruction: Sample,
    plain_first_instruction: Sample,
    cold_first_instruction: Sample,
    limit_pause: Sample,
    limit_first_instruction: Sample,
    limit_cold: Sample,
    read: Sample,
    read_again: Sample,
    plain_read: Sample,
    timeline: StepSamples,
}

/// The steps from a fork's request to the child's first report, each from the end of the one
/// before.
#[derive(Default)]
struct StepSamples(Vec<(&'static str, Sample)>);

impl StepSamples {
    fn push(&mut self, name: &'static str, time: Duration) {
        let at = self.0.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
            self.0.push((name, Sample::default()));
            self.0.len() - 1
        });
        self.0[at].1.push_us(time);
    }

    /// Adds one fork, that was begun at `begun` and whose child reported at `announced`.
    fn add(&mut self, begun: Instant, times: ForkTimes, child: &Vm, announced: Instant) {
        let Some(timeline) = child.timeline() else { return };
        self.push("parent_park", times.park);
        self.push("parent_freeze", times.freeze);
        self.push("parent_save", times.pause.saturating_sub(times.park + times.freeze));
        self.push("between", (timeline.begun() - begun).saturating_sub(times.pause));
        let mut last = Duration::ZERO;
        for step in ChildStep::ALL {
            let Some(at) = timeline.at(step) else { continue };
            self.push(step.name(), at.saturating_sub(last));
            last = at;
        }
        self.push("guest", announced.saturating_duration_since(timeline.begun() + last));
    }
}

impl OneSize<'_> {
    fn measure(&self, smallest: &mut Option<(u64, f64)>) -> Result<Vec<BenchRow>, Failure> {
        let mut s = Samples::default();
        // A first freeze happens once in a VM's life: a few parents are enough to see it.
        for _ in 0..self.samples.clamp(1, 5) {
            let parent = self.parent()?;
            s.first_pause.push_us(parent.fork().map_err(Failure::run)?.1.times.pause);
        }
        let parent = self.parent()?;
        let limit = self.limits.spinning().map_err(Failure::Run)?;
        let (image, _) = parent.fork().map_err(Failure::run)?;
        // A larger guest is sparse: a copy would fill the host with its zeros.
        let flat = if self.mem <= MOST_FILLED { Some(self.copy(&image, &mut s.full_copy)?) } else { None };
        for _ in 0..self.samples {
            self.context.prefill(&self.config, 1).map_err(Failure::run)?;
            std::thread::sleep(PACE);
            let begun = Instant::now();
            let (image, report) = parent.fork().map_err(Failure::run)?;
            s.pause.push_us(report.times.pause);
            let (child, at) = announced_clone(self.context, &image)?;
            s.first_instruction.push_us(at - begun);
            s.timeline.add(begun, report.times, &child, at);
            drop(child);
            // Alternate, so that both see the same noise. The VM is created cold, as on the path of
            // a restore.
            if let Some(flat) = &flat {
                s.plain_first_instruction.push_us(announced(self.plain, flat, Instant::now())?);
            }
            std::thread::sleep(PACE);
            let begun = Instant::now();
            let (image, _) = parent.fork().map_err(Failure::run)?;
            s.cold_first_instruction.push_us(announced(self.context, &image, begun)?);
            self.measure_limits(&limit, &mut s).map_err(Failure::Run)?;
        }
        drop(parent);
        drop(limit);
        for _ in 0..self.samples.clamp(1, 5) {
            let (read, again) = self.read(self.context, &image)?;
            s.read.push_us(read);
            s.read_again.push_us(again);
            if let Some(flat) = &flat {
                s.plain_read.push_us(self.read(self.plain, flat)?.0);
            }
        }
        self.context.drain();
        Ok(self.rows(&s, smallest))
    }

    fn measure_limits(&self, parent: &Spinning, s: &mut Samples) -> anyhow::Result<()> {
        let mut prepared = self.limits.prepare()?;
        let pause = parent.pause(HOT_PAGES)?;
        s.limit_pause.push_us(pause);
        s.limit_first_instruction.push_us(pause + self.limits.first_instruction(&mut prepared)?);
        s.limit_cold.push_us(parent.pause(HOT_PAGES)? + self.limits.cold(Touch::Write, 1)?);
        Ok(())
    }

    fn rows(&self, s: &Samples, smallest: &mut Option<(u64, f64)>) -> Vec<BenchRow> {
        let label = label(self.mem);
        let copy = "copy all RAM";
        let restore = "cold VM, 4 KiB private file";
        let pause = BenchRow::new(format!("pause_{label}"), "us", &s.pause)
            .limit(PARK, &s.limit_pause)
            .against(copy, &s.full_copy);
        let (base_mem, base) = *smallest.get_or_insert((self.mem, pause.p50()));
        let pause = if base_mem == self.mem {
            pause.target("p50 <= 500, p99 <= 2000", |r| r.p50() <= 500.0 && r.p99() <= 2_000.0)
        } else {
            pause.target(format!("p50 <= 3 x {}'s", super::label(base_mem)), |r| r.p50() <= 3.0 * base)
        };
        let mut rows = vec![
            pause,
            BenchRow::new(format!("first_fork_pause_{label}"), "us", &s.first_pause)
                .limit(PARK, &s.limit_pause)
                .against(copy, &s.full_copy),
            BenchRow::new(format!("first_instruction_{label}"), "us", &s.first_instruction)
                .limit("park, map, run", &s.limit_first_instruction)
                .against(restore, &s.plain_first_instruction)
                .target("p50 <= 500", |r| r.p50() <= 500.0),
            BenchRow::new(format!("first_instruction_cold_{label}"), "us", &s.cold_first_instruction)
                .limit("park, make a VM, run", &s.limit_cold)
                .against(restore, &s.plain_first_instruction),
            BenchRow::new(format!("read_shared_{}_of_{label}", super::label(self.read_bytes())), "us", &s.read)
                .limit("pages that it has mapped", &s.read_again)
                .against(restore, &s.plain_read)
                .target_ratio("ratio <= 0.05", |ratio| ratio <= 0.05),
        ];
        if self.timeline {
            rows.extend(
                s.timeline.0.iter().map(|(name, sample)| BenchRow::new(format!("step_{name}_{label}"), "us", sample)),
            );
        }
        rows
    }

    /// A guest that has written all its RAM and keeps writing its hot set.
    fn parent(&self) -> Result<Vm, Failure> {
        let vm = written(self.context, &self.config)?;
        BareVcpu::new(&vm, 0)
            .mailbox()
            .order(Command::Count { start: WORK_BASE, pages: HOT_PAGES, stride: 0 })
            .map_err(Failure::run)?;
        Ok(vm)
    }

    /// Copies the memory to one file of 4 KiB pages, as a snapshot on tmpfs would hold it. Timed,
    /// because it is also the cost of copying.
    fn copy(&self, image: &Arc<ForkImage>, full_copy: &mut Sample) -> Result<Arc<ForkImage>, Failure> {
        let mut flat = None;
        for _ in 0..self.samples.clamp(1, 3) {
            drop(flat.take());
            let begun = Instant::now();
            flat = Some(image.flatten(self.plain.store(), Backing::Small).map_err(Failure::run)?);
            full_copy.push_us(begun.elapsed());
        }
        flat.ok_or_else(|| Failure::Run(anyhow::anyhow!("no sample was taken")))
    }

    fn read_bytes(&self) -> u64 {
        READ_BYTES.min(low_pages(self.mem) * PAGE_SIZE) & !(PAGE_SIZE - 1)
    }

    /// Returns the time in which a fresh child reads a word of every page, and the time in which it reads
    /// them again.
    fn read(&self, context: &Context, image: &Arc<ForkImage>) -> Result<(Duration, Duration), Failure> {
        let child = Vm::from_image(context, "reader", image, ChildOptions::default()).map_err(Failure::run)?;
        let vcpu = BareVcpu::new(&child, 0);
        vcpu.run(Command::Idle).map_err(Failure::run)?;
        // Read the end of the range, away from the blocks that the parent's hot set has split.
        let pages = self.read_bytes() / PAGE_SIZE;
        let start = WORK_BASE + (low_pages(self.mem) - pages) * PAGE_SIZE;
        let read = || {
            let begun = Instant::now();
            vcpu.run(Command::Read { start, pages, passes: 1, words: 1 }).map_err(Failure::run)?;
            Ok(begun.elapsed())
        };
        Ok((read()?, read()?))
    }
}
