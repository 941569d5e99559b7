//! `clade demo`: boots a guest, forks it while it runs, and checks every byte. Each VM has a process
//! of its own, and is driven and read by the API.

mod bare;
mod linux;
mod progress;

use std::io::{self, Write};

use serde::Serialize;

use crate::commands::{DemoArgs, DevSupervisor, Failure, Table, print_json};
use clade_harness::Spread;

/// The demo's results.
#[derive(Debug, Serialize)]
struct DemoReport {
    forks: usize,
    generations: usize,
    wrong_bytes: u64,
    bytes_checked: u64,
    parent_pause_us: Spread,
    first_fork_pause_us: f64,
    first_instruction_us: Spread,
    private_kib_per_child: f64,
    private_kib_per_child_after_work: f64,
    layer_backing: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    linux: Option<linux::LinuxReport>,
}

pub(crate) fn main(args: &DemoArgs) -> Result<(), Failure> {
    let vms = DevSupervisor::begin_announcing("demo")?;
    let bare = bare::run(&vms, args)?;
    let linux = linux::run(&vms, args)?;
    drop(vms);
    let report = DemoReport {
        forks: bare.forks,
        generations: bare.generations,
        wrong_bytes: bare.wrong_bytes + linux.as_ref().map_or(0, |l| l.wrong_answers),
        bytes_checked: bare.bytes_checked,
        parent_pause_us: bare.pause.spread(),
        first_fork_pause_us: bare.first_pause_us,
        first_instruction_us: bare.first_instruction.spread(),
        private_kib_per_child: bare.private_kib,
        private_kib_per_child_after_work: bare.private_kib_after,
        layer_backing: bare.backing,
        linux,
    };
    if args.json {
        print_json(&report).map_err(Failure::run)?;
    } else {
        print(args, &report)?;
    }
    match report.wrong_bytes {
        0 => Ok(()),
        wrong => Err(Failure::Run(anyhow::anyhow!("{wrong} bytes differ from the expected ones"))),
    }
}

fn print(args: &DemoArgs, report: &DemoReport) -> Result<(), Failure> {
    let mut stdout = io::stdout();
    writeln!(stdout).map_err(Failure::run)?;
    let mut table = Table::new(["a running microVM, forked", ""]);
    let spread = |s: &Spread| format!("{:.0} us  (p99 {:.0})", s.p50, s.p99);
    let mut row = |name: &str, value: String| table.row([name.into(), value]);
    row("guest", format!("{} MiB, {} vCPUs", args.mem >> 20, args.cpus));
    row("forks while it ran", report.forks.to_string());
    row("generations nested", report.generations.to_string());
    row("parent paused for", spread(&report.parent_pause_us));
    row("  the first time", format!("{:.0} us", report.first_fork_pause_us));
    row("fork request to child's first instruction", spread(&report.first_instruction_us));
    row("a child's private memory", format!("{:.0} KiB", report.private_kib_per_child));
    row("  after it has worked", format!("{:.0} KiB", report.private_kib_per_child_after_work));
    row("shared memory lives in", format!("{} pages", report.layer_backing));
    row("bytes checked", format!("{:.1} GiB", report.bytes_checked as f64 / f64::from(1 << 30)));
    row("wrong bytes", report.wrong_bytes.to_string());
    table.print().map_err(Failure::run)?;
    match &report.linux {
        Some(linux) => linux.print().map_err(Failure::run),
        None => {
            if !args.no_linux {
                return writeln!(
                    stdout,
                    "\nThe Linux guest is not built: `clade demo --linux` builds it, boots it and forks its shell."
                )
                .map_err(Failure::run);
            }
            Ok(())
        }
    }
}
