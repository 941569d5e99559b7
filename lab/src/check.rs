//! `clade-lab check host`: properties of this host that affect vCPU state, and short checks that need
//! no guest kernel. docs/vtx-checklist.md has the further steps for each line.

mod facts;
mod forks;

use serde::Serialize;

use crate::args::{CheckArgs, CheckName};
use clade::{Failure, Table, print_json};
use clade_vmm::kvm::Host;

/// The outcome of a check.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
#[serde(tag = "outcome", rename_all = "snake_case")]
enum CheckOutcome {
    Passed {
        /// The observations of the check.
        seen: String,
    },
    Failed {
        why: String,
    },
    Skipped {
        why: String,
    },
}

/// A line of the report, and of docs/vtx-checklist.md.
#[derive(Clone, Debug, Serialize)]
struct Check {
    /// The heading in the checklist.
    name: &'static str,
    /// Host properties that the check depends on, as (name, value).
    facts: Vec<(&'static str, String)>,
    #[serde(flatten)]
    outcome: CheckOutcome,
}

#[derive(Debug, Serialize)]
struct CheckReport {
    kernel: String,
    /// The vendor's KVM module, which provides /dev/kvm.
    module: &'static str,
    checks: Vec<Check>,
}

pub(crate) fn main(args: &CheckArgs) -> Result<(), Failure> {
    let CheckName::Host = args.name;
    let host = Host::open().map_err(Failure::input)?;
    let checks = facts::checks(&host)?;
    let checks = checks.into_iter().chain(forks::checks(args.forks)?).collect();
    let report = CheckReport { kernel: facts::kernel(), module: facts::module(), checks };
    if args.json {
        print_json(&report).map_err(Failure::run)?;
    } else {
        print(&report)?;
    }
    let failed: Vec<_> =
        report.checks.iter().filter(|c| matches!(c.outcome, CheckOutcome::Failed { .. })).map(|c| c.name).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::Run(anyhow::anyhow!("{} failed", failed.join(", ")))) }
}

fn print(report: &CheckReport) -> Result<(), Failure> {
    println!("kernel {}, {}", report.kernel, report.module);
    let mut table = Table::new(["check", "outcome"]);
    for check in &report.checks {
        let outcome = match &check.outcome {
            CheckOutcome::Passed { seen } => format!("passed: {seen}"),
            CheckOutcome::Failed { why } => format!("FAILED: {why}"),
            CheckOutcome::Skipped { why } => format!("skipped: {why}"),
        };
        table.row([check.name.to_owned(), outcome]);
        for (name, value) in &check.facts {
            table.row([format!("  {name}"), value.clone()]);
        }
    }
    table.print().map_err(Failure::run)
}
