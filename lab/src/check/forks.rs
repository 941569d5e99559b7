//! Checks that fork a bare guest under storms of interrupts between its vCPUs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_guests::abi::Command;

use super::{Check, CheckOutcome};
use clade::Failure;
use clade_harness::{BareMailbox, boot_bare};
use clade_vmm::vm::{ChildOptions, Context, Vm, VmConfig};

const MEMORY: u64 = 32 << 20;
/// Longest time without progress of a vCPU. A step takes less than a millisecond, or some seconds
/// on a busy host.
const STUCK: Duration = Duration::from_secs(60);

pub(super) fn checks(forks: u32) -> Result<Vec<Check>, Failure> {
    let context = Context::open().map_err(Failure::input)?.with_report_port();
    let max = u64::from(context.host().max_vcpus());
    let storm = |name, cpus: u64, begin: &dyn Fn(&Vm) -> Result<Vec<u64>, anyhow::Error>| {
        let facts = vec![("vCPUs", cpus.to_string()), ("forks", forks.to_string())];
        let outcome = match run(&context, cpus, forks, begin) {
            Ok(()) => CheckOutcome::Passed { seen: format!("{forks} children, each reset once, none stuck") },
            Err(error) => CheckOutcome::Failed { why: format!("{error:#}") },
        };
        Check { name, facts, outcome }
    };
    Ok(vec![
        storm("IPI storms", max.min(32) & !1, &relays),
        storm("forks while APs are started", max.min(8) & !1, &restarts),
    ])
}

/// Boots a guest, calls `begin` and forks it. In each child, the vCPUs that `begin` returns must
/// make progress, even after a reset.
fn run(
    context: &Context,
    cpus: u64,
    forks: u32,
    begin: &dyn Fn(&Vm) -> Result<Vec<u64>, anyhow::Error>,
) -> Result<(), anyhow::Error> {
    let config = Arc::new(VmConfig::bare(MEMORY, cpus)?);
    let parent = boot_bare(context, "check", &config)?;
    let watched = begin(&parent)?;
    for n in 0..forks {
        let (image, _) = parent.fork()?;
        let child = Vm::from_image(context, "child", &image, ChildOptions::default())?;
        go_on(&child, &watched).map_err(|error| error.context(format!("child {n}")))?;
        child.reset_to_origin()?;
        go_on(&child, &watched).map_err(|error| error.context(format!("child {n}, after a reset")))?;
    }
    go_on(&parent, &watched).map_err(|error| error.context("the parent"))
}

/// Makes pairs of vCPUs wake each other. Returns the first of each pair.
fn relays(vm: &Vm) -> Result<Vec<u64>, anyhow::Error> {
    let firsts: Vec<u64> = (0..u64::from(vm.config().cpus())).step_by(2).collect();
    for first in &firsts {
        // The waiting vCPU must accept interrupts before its peer sends the first.
        BareMailbox::new(vm, first + 1).order(Command::Relay { peer: *first, first: false })?;
        reach(vm, first + 1, 1)?;
        BareMailbox::new(vm, *first).order(Command::Relay { peer: first + 1, first: true })?;
    }
    Ok(firsts)
}

/// Makes the first half of the vCPUs restart the second half, one each.
fn restarts(vm: &Vm) -> Result<Vec<u64>, anyhow::Error> {
    let half = u64::from(vm.config().cpus()) / 2;
    for vcpu in 0..half {
        BareMailbox::new(vm, vcpu).order(Command::Restart { peer: half + vcpu })?;
        reach(vm, vcpu, 1)?;
    }
    Ok((0..half).collect())
}

fn reach(vm: &Vm, vcpu: u64, least: u64) -> Result<(), anyhow::Error> {
    let (mut begun, mut before) = (Instant::now(), None);
    loop {
        let progress = BareMailbox::new(vm, vcpu).progress()?;
        if before != Some(progress) {
            (begun, before) = (Instant::now(), Some(progress));
        }
        if progress >= least {
            return Ok(());
        }
        if let Some(reason) = vm.stopped() {
            anyhow::bail!("stopped: {reason}");
        }
        anyhow::ensure!(begun.elapsed() < STUCK, "vCPU {vcpu} stands still at {progress}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn go_on(vm: &Vm, watched: &[u64]) -> Result<(), anyhow::Error> {
    for vcpu in watched {
        let from = BareMailbox::new(vm, *vcpu).progress()?;
        reach(vm, *vcpu, from + 2)?;
    }
    Ok(())
}
