//! `clade-lab bench`: ours, the baseline and the ratio from one run.

mod ahead;
mod all;
mod answer;
mod clones;
mod disk;
mod fork;
mod freeze;
mod live;
mod pin;
mod reset;
mod restore;
mod rollback;
mod supervisor;
mod suspend;
mod tti;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_guests::abi::{Command, Event, PAGE_SIZE, WORK_BASE};
use clade_memory::{GAP_START, GuestRam};
use serde::Serialize;

use crate::args::{BenchArgs, BenchName};
use crate::limit;
use clade::{Failure, Table, print_json};
use clade_harness::{BareMailbox, BareVcpu, MOST_FILLED, Sample, Spread, boot_bare, fill};
use clade_vmm::kvm::Quirks;
use clade_vmm::vm::{ChildOptions, Context, ForkImage, Vm, VmConfig};

/// The note on figures that include work of a guest's Linux, where KVM has no hardware
/// virtualization under it.
const INTERPRETED: &str = "kvm-pvm interprets guest kernels: every system call and page fault of a guest costs \
    many times what it costs with hardware virtualization, so these figures are unflattering";

/// A measured figure beside its limit and its baseline.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BenchRow {
    name: String,
    unit: &'static str,
    ours: Spread,
    /// What is left when everything is left out that can be: kernel calls that cannot be avoided, or a guest that is
    /// not disturbed.
    limit: Option<Baseline>,
    /// ours / limit, by p50.
    ratio: Option<f64>,
    baseline: Option<Baseline>,
    /// ours / baseline, by p50.
    baseline_ratio: Option<f64>,
    target: Option<String>,
    met: Option<bool>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Baseline {
    name: &'static str,
    #[serde(flatten)]
    spread: Spread,
}

impl BenchRow {
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, ours: &Sample) -> Self {
        Self {
            name: name.into(),
            unit,
            ours: ours.spread(),
            limit: None,
            ratio: None,
            baseline: None,
            baseline_ratio: None,
            target: None,
            met: None,
        }
    }

    /// Adds the limit, if there is a sample of it.
    pub(crate) fn limit(mut self, name: &'static str, limit: &Sample) -> Self {
        if !limit.is_empty() {
            let spread = limit.spread();
            self.ratio = Some(self.ours.p50 / spread.p50);
            self.limit = Some(Baseline { name, spread });
        }
        self
    }

    /// Adds a baseline that is the limit too: it does nothing that could be left out.
    pub(crate) fn against_limit(self, name: &'static str, both: &Sample) -> Self {
        self.limit(name, both).against(name, both)
    }

    /// Adds a baseline, if there is a sample of it.
    pub(crate) fn against(mut self, name: &'static str, baseline: &Sample) -> Self {
        if baseline.is_empty() {
            return self;
        }
        let spread = baseline.spread();
        self.baseline_ratio = Some(self.ours.p50 / spread.p50);
        self.baseline = Some(Baseline { name, spread });
        self
    }

    pub(crate) fn target(mut self, text: impl Into<String>, met: impl FnOnce(&Self) -> bool) -> Self {
        self.met = Some(met(&self));
        self.target = Some(text.into());
        self
    }

    /// Sets a target of ours / baseline. Without a baseline nothing was compared.
    pub(crate) fn target_ratio(mut self, text: &str, met: impl FnOnce(f64) -> bool) -> Self {
        self.met = self.baseline_ratio.map(met);
        self.target = Some(text.to_owned());
        self
    }

    pub(crate) fn p50(&self) -> f64 {
        self.ours.p50
    }

    pub(crate) fn p99(&self) -> f64 {
        self.ours.p99
    }

    /// Returns the same figure under another name.
    fn called(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }
}

/// The host that a run was made on.
#[derive(Debug, Serialize)]
pub(crate) struct HostInfo {
    cpus: usize,
    memory_mib: u64,
    kernel: String,
    cpu: String,
    kvm: &'static str,
    layer_backing: &'static str,
}

impl HostInfo {
    pub(crate) fn of(context: &Context) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            text.lines().find(|l| l.starts_with(key)).and_then(|l| l.split(':').nth(1)).unwrap_or("").trim().to_owned()
        };
        let memory: u64 = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            kvm: match context.host().quirks() {
                Quirks::None => "kvm",
                Quirks::Pvm => "kvm-pvm",
            },
            layer_backing: context.store().backing().name(),
        }
    }
}

#[derive(Debug, Serialize)]
struct BenchReport {
    host: HostInfo,
    /// The limits of the figures on this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<&'static str>,
    rows: Vec<BenchRow>,
}

pub(crate) fn main(args: &BenchArgs) -> Result<(), Failure> {
    if args.samples == 0 {
        return Err(Failure::Input(anyhow::anyhow!("0 samples measure nothing")));
    }
    if args.name == BenchName::Processes {
        return limit::processes_main(args);
    }
    let context = Context::open().map_err(Failure::input)?.with_report_port();
    let rows = match args.name {
        BenchName::Ahead => ahead::run(&context, args)?,
        BenchName::All => all::run(&context, args)?,
        BenchName::Answer => answer::run(args)?,
        BenchName::Clones => clones::run(&context, args)?,
        BenchName::Disk => disk::run(&context, args)?,
        BenchName::Fork => fork::run(&context, args)?,
        BenchName::Live => live::run(args)?,
        BenchName::Freeze => freeze::run(context.store(), args)?,
        BenchName::Reset => reset::run(&context, args)?,
        BenchName::Rollback => rollback::run(args)?,
        BenchName::Pin => pin::run(context.store(), args)?,
        BenchName::Processes => return limit::processes_main(args),
        BenchName::Restore => restore::restore(&context, args)?,
        BenchName::Restored => return restore::restored(&context, args),
        BenchName::Suspend => suspend::run(&context, args)?,
        BenchName::Save => restore::save(&context, args)?,
        BenchName::Tti => tti::run(args)?,
    };
    let is_interpreted = context.host().quirks() == Quirks::Pvm;
    let note = (matches!(args.name, BenchName::Answer | BenchName::Tti) && is_interpreted).then_some(INTERPRETED);
    let report = BenchReport { host: HostInfo::of(&context), note, rows };
    if args.json { print_json(&report).map_err(Failure::run) } else { print(&report) }
}

/// Formats a size for a row's name.
fn label(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 30) { format!("{}G", bytes >> 30) } else { format!("{}M", bytes >> 20) }
}

/// Returns the number of a bare guest's work pages below the gap, all in one range.
fn low_pages(mem: u64) -> u64 {
    (mem.min(GAP_START) - WORK_BASE) / PAGE_SIZE
}

/// Boots a bare guest with one vCPU and fills its RAM above its own image.
fn written(context: &Context, config: &Arc<VmConfig>) -> Result<Vm, Failure> {
    let vm = boot_bare(context, "bench", config).map_err(Failure::run)?;
    fill(&vm, config).map_err(Failure::run)?;
    Ok(vm)
}

/// Starts a child. Returns the time from `begun` to its report, one of its first instructions.
fn announced(context: &Context, image: &Arc<ForkImage>, begun: Instant) -> Result<Duration, Failure> {
    Ok(announced_clone(context, image)?.1 - begun)
}

/// Starts a child. Returns it, and the time of its report.
fn announced_clone(context: &Context, image: &Arc<ForkImage>) -> Result<(Vm, Instant), Failure> {
    let tell = |ram: &GuestRam| {
        if let Err(error) = BareMailbox::new(ram, 0).order(Command::AnnounceAndHalt) {
            tracing::error!(%error, "no order for the child");
        }
    };
    let options = ChildOptions { before_start: Some(&tell), ..ChildOptions::default() };
    let child = Vm::from_image(context, "child", image, options).map_err(Failure::run)?;
    let at = BareVcpu::new(&child, 0).await_event(Event::Announce).map_err(Failure::run)?;
    Ok((child, at))
}

fn print(report: &BenchReport) -> Result<(), Failure> {
    let h = &report.host;
    println!(
        "{} x {}, {} MiB, Linux {}, {}, layers in {} pages",
        h.cpus, h.cpu, h.memory_mib, h.kernel, h.kvm, h.layer_backing
    );
    if let Some(note) = report.note {
        println!("{note}");
    }
    let mut table = Table::new([
        "", "unit", "p50", "p99", "limit", "p50", "ratio", "baseline", "p50", "p99", "ratio", "target", "met",
    ]);
    let number = |x: f64| if x < 10.0 { format!("{x:.2}") } else { format!("{x:.0}") };
    let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
    for row in &report.rows {
        table.row([
            row.name.clone(),
            row.unit.into(),
            number(row.ours.p50),
            number(row.ours.p99),
            or_dash(row.limit.as_ref().map(|l| l.name.into())),
            or_dash(row.limit.as_ref().map(|l| number(l.spread.p50))),
            or_dash(row.ratio.map(|r| format!("{r:.2}"))),
            or_dash(row.baseline.as_ref().map(|b| b.name.into())),
            or_dash(row.baseline.as_ref().map(|b| number(b.spread.p50))),
            or_dash(row.baseline.as_ref().map(|b| number(b.spread.p99))),
            or_dash(row.baseline_ratio.map(|r| format!("{r:.4}"))),
            or_dash(row.target.clone()),
            or_dash(row.met.map(|met| if met { "yes" } else { "NO" }.into())),
        ]);
    }
    table.print().map_err(Failure::run)
}
