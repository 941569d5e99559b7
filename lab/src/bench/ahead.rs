//! `clade-lab bench ahead`: children that write the same pages as their siblings, with copies made
//! ahead and without, in turn.
//!
//! The parent is a bare guest that has written all its RAM. The written pages of each child are
//! learned at its end, and copied for the next child while it is prepared. Half-way the children
//! begin to write other pages. Everything is by the library, in this process. The limit is the same child's next
//! write of these pages, which it owns by then.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clade_guests::abi::{Command, Event, PAGE_SIZE, WORK_BASE};
use clade_harness::{BareMailbox, BareVcpu};
use clade_memory::{AheadUse, GuestRam, Learned, NoWriters, Quiesced};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, Vm, VmConfig};

use crate::args::BenchArgs;
use crate::bench::{BenchRow, Sample, low_pages, written};
use clade::Failure;

/// Pages that a child writes.
const PAGES: u64 = 1_000;
/// Limit of pages copied ahead: 16 MiB.
const BUDGET: u64 = 4_096;
/// Children after the change whose copies have rows of their own.
const CHANGED: usize = 6;

const OWNED: &str = "pages that it owns";
const WITHOUT: &str = "without copies ahead";

/// The time at which a child's copies are made.
#[derive(Clone, Copy, PartialEq)]
enum When {
    /// Not at all.
    Never,
    /// While the child is prepared, before its request.
    Prepared,
    /// Between the request and its first instruction.
    AtFork,
    /// By a thread beside the child.
    Beside,
}

/// The measured times of one child.
struct Times {
    /// From the request to its first instruction.
    first: Duration,
    /// Time to copy ahead.
    copy: Duration,
    /// Time to write all its pages.
    write: Duration,
    /// Time to write them once more.
    again: Duration,
    came: AheadUse,
}

struct Bench<'a> {
    context: &'a Context,
    image: Arc<ForkImage>,
    learned: Learned,
}

/// Runs `clade-lab bench ahead`.
pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let mem = args.mem[0];
    let config = Arc::new(VmConfig::bare(mem, 1).map_err(Failure::input)?);
    config.check_host_memory().map_err(Failure::input)?;
    let (pages, least) = (PAGES, WORK_BASE + 2 * PAGES * PAGE_SIZE);
    if low_pages(config.layout().bytes()) < 2 * pages {
        return Err(Failure::Input(anyhow::anyhow!("{mem} bytes are too few for this benchmark: {least} at least")));
    }
    let mut bench = Bench::new(context, &config)?;
    let (mut never, mut prepared, mut owned) = <(Sample, Sample, Sample)>::default();
    let (mut at_fork, mut beside, mut copy) = (Sample::default(), Sample::default(), Sample::default());
    let (mut first, mut first_at_fork, mut first_beside) = <(Sample, Sample, Sample)>::default();
    let (mut hits, mut waste) = (Sample::default(), Sample::default());
    // The first child has nothing to learn from.
    bench.child(When::Never, 0)?;
    for _ in 0..args.samples {
        let times = bench.child(When::Never, 0)?;
        never.push_us(times.write);
        first.push_us(times.first);
        let times = bench.child(When::Prepared, 0)?;
        prepared.push_us(times.write);
        owned.push_us(times.again);
        copy.push_us(times.copy);
        push_use(&mut hits, &mut waste, times.came);
        let times = bench.child(When::AtFork, 0)?;
        at_fork.push_us(times.write);
        first_at_fork.push_us(times.first);
        let times = bench.child(When::Beside, 0)?;
        beside.push_us(times.write);
        first_beside.push_us(times.first);
    }
    let mut rows = vec![
        BenchRow::new(format!("write_siblings_{pages}"), "us", &prepared)
            .limit(OWNED, &owned)
            .against(WITHOUT, &never)
            .target_ratio("ratio <= 0.33", |ratio| ratio <= 0.33),
        BenchRow::new(format!("write_siblings_{pages}_at_fork"), "us", &at_fork)
            .limit(OWNED, &owned)
            .against(WITHOUT, &never),
        BenchRow::new(format!("write_siblings_{pages}_beside"), "us", &beside)
            .limit(OWNED, &owned)
            .against(WITHOUT, &never),
        BenchRow::new(format!("copy_ahead_{pages}"), "us", &copy),
        BenchRow::new("first_instruction_at_fork", "us", &first_at_fork).against(WITHOUT, &first),
        BenchRow::new("first_instruction_beside", "us", &first_beside).against(WITHOUT, &first),
        BenchRow::new("ahead_hits", "%", &hits),
        BenchRow::new("ahead_waste", "%", &waste),
    ];
    // From here on the children write other pages.
    let (mut last_hits, mut changed) = (Sample::default(), Sample::default());
    for nth in 0..CHANGED {
        let times = bench.child(When::Prepared, pages)?;
        changed.push_us(times.write);
        if nth + 1 == CHANGED {
            push_use(&mut last_hits, &mut Sample::default(), times.came);
        }
    }
    rows.push(BenchRow::new(format!("write_changed_first_{CHANGED}"), "us", &changed).against(WITHOUT, &never));
    rows.push(BenchRow::new(format!("ahead_hits_child_{CHANGED}_after_a_change"), "%", &last_hits));
    Ok(rows)
}

fn push_use(hits: &mut Sample, waste: &mut Sample, came: AheadUse) {
    let of = |pages: u64| 100.0 * pages as f64 / came.copied.max(1) as f64;
    hits.push(of(came.hits));
    waste.push(of(came.waste));
}

impl<'a> Bench<'a> {
    fn new(context: &'a Context, config: &Arc<VmConfig>) -> Result<Self, Failure> {
        let parent = written(context, config)?;
        parent.pause().map_err(Failure::run)?;
        BareMailbox::new(&parent, 0).order(Command::Announce).map_err(Failure::run)?;
        let image = parent.fork().map_err(Failure::run)?.0;
        let learned = Learned::new(image.ram().layout());
        Ok(Self { context, image, learned })
    }

    /// Runs one child that writes its pages from `skip` on, and ends.
    fn child(&mut self, when: When, skip: u64) -> Result<Times, Failure> {
        self.context.prefill(self.image.config(), 1).map_err(Failure::run)?;
        let likely = self.learned.likely(BUDGET);
        let copied = |ram: &GuestRam| {
            if let Err(error) = ram.copy_ahead(&likely, BUDGET) {
                tracing::warn!(%error, "nothing is copied ahead");
            }
        };
        let mut copy = Duration::ZERO;
        let begun = Instant::now();
        let before_start = (when == When::AtFork).then_some(&copied as &dyn Fn(&GuestRam));
        let options = ChildOptions { paused: when == When::Prepared, before_start, ..ChildOptions::default() };
        let vm = Vm::from_image(self.context, "child", &self.image, options).map_err(Failure::run)?;
        let vcpu = BareVcpu::new(&vm, 0);
        let write = Command::Touch { start: WORK_BASE + skip * PAGE_SIZE, pages: PAGES, value: 9 };
        let (first, write, again) = thread::scope(|scope| {
            if when == When::Prepared {
                let begun = Instant::now();
                copied(vm.ram());
                copy = begun.elapsed();
                vm.resume().map_err(Failure::run)?;
            } else if when == When::Beside {
                scope.spawn(|| copied(vm.ram()));
            }
            let first = vcpu.await_event(Event::Announce).map_err(Failure::run)? - begun;
            let begun = Instant::now();
            vcpu.run(write).map_err(Failure::run)?;
            let written = begun.elapsed();
            vcpu.run(write).map_err(Failure::run)?;
            Ok::<_, Failure>((first, written, begun.elapsed() - written))
        })?;
        vm.pause().map_err(Failure::run)?;
        let (written, came) = vm.ram().written_set(&Quiesced::by(&NoWriters)).map_err(Failure::run)?;
        self.learned.record(&written).map_err(Failure::run)?;
        Ok(Times { first, copy, write, again, came })
    }
}
