//! Host properties, and checks that need no guest.

use std::fs;
use std::path::Path;

use super::{Check, CheckOutcome};
use clade::Failure;
use clade_vmm::kvm::{Clock, CpuHide, CpuidState, Host, MAX_MSRS, StateLayout, VcpuState};

const MODULES: [&str; 3] = ["kvm_intel", "kvm_amd", "kvm_pvm"];
/// CPUID leaf 1 ECX: the TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;

pub(super) fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

pub(super) fn module() -> &'static str {
    MODULES.into_iter().find(|name| Path::new("/sys/module").join(name).exists()).unwrap_or("no module that is known")
}

/// A parameter of the vendor's module.
fn parameter(name: &str) -> String {
    let path = Path::new("/sys/module").join(module()).join("parameters").join(name);
    fs::read_to_string(path).map_or_else(|_| "not there".to_owned(), |text| text.trim().to_owned())
}

fn skipped(why: &str) -> CheckOutcome {
    CheckOutcome::Skipped { why: why.to_owned() }
}

/// Returns a pass with the observations, or a failure with the error.
fn tried(result: Result<String, Box<dyn std::error::Error>>) -> CheckOutcome {
    match result {
        Ok(seen) => CheckOutcome::Passed { seen },
        Err(error) => CheckOutcome::Failed { why: clade_vmm::error_chain(error.as_ref()) },
    }
}

pub(super) fn checks(host: &Host) -> Result<Vec<Check>, Failure> {
    let layout = StateLayout::new(host).map_err(Failure::run)?;
    let msrs = host.msrs().map_err(Failure::run)?.indices();
    let cpuid = host.cpuid(0, 1, &CpuHide::none()).map_err(Failure::run)?;
    let leaf = |function, index| cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index));
    let bit = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let tsc = host.tsc_khz().map_err(Failure::run)?;
    let amx = leaf(0xd, 18).is_some_and(|e| e.eax != 0);
    let kvm_features = leaf(0x4000_0001, 0).map_or(0, |e| e.eax);
    let count = |pmu| host.msrs_of(pmu).map(|set| set.indices().len());
    Ok(vec![
        Check {
            name: "MSRs",
            facts: vec![
                ("saved", count(false).map_err(Failure::run)?.to_string()),
                ("saved, with --pmu", count(true).map_err(Failure::run)?.to_string()),
                ("most in one call", MAX_MSRS.to_string()),
            ],
            outcome: tried(there_and_back(host, &layout).map(|()| format!("{} MSRs there and back", msrs.len()))),
        },
        Check {
            name: "XSAVE2 and AMX",
            facts: vec![
                ("bytes of the area", host.xsave_size().to_string()),
                ("KVM_CAP_XSAVE2", bit(host.has_xsave2())),
                ("AMX tiles for guests", bit(amx)),
            ],
            outcome: match (host.has_xsave2(), amx) {
                (true, false) => CheckOutcome::Passed { seen: format!("{} bytes", host.xsave_size()) },
                (true, true) => skipped("tiles need a guest that uses them: see the checklist"),
                (false, _) => skipped("this KVM has no area beyond 4096 bytes"),
            },
        },
        Check {
            name: "TSC",
            facts: vec![
                ("kHz", tsc.map_or_else(|| "KVM does not say".to_owned(), |khz| khz.to_string())),
                ("can be scaled", bit(host.has_tsc_control())),
                ("deadline timer", bit(leaf(1, 0).is_some_and(|e| e.ecx & TSC_DEADLINE != 0))),
            ],
            outcome: tsc_counts_on(host, &layout),
        },
        Check {
            name: "APICv",
            facts: vec![("enable_apicv", parameter("enable_apicv")), ("avic", parameter("avic"))],
            outcome: skipped("run the storms with it on and off: see the checklist"),
        },
        Check {
            name: "unrestricted guest",
            facts: vec![
                ("unrestricted_guest", parameter("unrestricted_guest")),
                ("ept", parameter("ept")),
                ("npt", parameter("npt")),
            ],
            outcome: skipped("boot with it off: see the checklist"),
        },
        Check {
            name: "nested virtualization",
            facts: vec![("nested", parameter("nested"))],
            outcome: match cpuid_is_bare(host) {
                true => CheckOutcome::Passed { seen: "no guest is given it".to_owned() },
                false => CheckOutcome::Failed { why: "guests would be given vmx or svm".to_owned() },
            },
        },
        Check {
            name: "asynchronous page faults",
            facts: vec![
                ("for guests", bit(kvm_features & 1 << 4 != 0)),
                ("by interrupt", bit(kvm_features & 1 << 14 != 0)),
            ],
            outcome: skipped("needs a Linux guest restored lazily: see the checklist"),
        },
    ])
}

fn cpuid_is_bare(host: &Host) -> bool {
    host.cpuid(0, 1, &CpuHide::none()).is_ok_and(|cpuid| {
        let ecx = |leaf| cpuid.as_slice().iter().find(|e| e.function == leaf).map_or(0, |e| e.ecx);
        ecx(1) & 1 << 5 == 0 && ecx(0x8000_0001) & 1 << 2 == 0
    })
}

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Copies a vCPU's whole state to another vCPU and compares their MSRs, except the TSC.
fn there_and_back(host: &Host, layout: &StateLayout) -> Fallible<()> {
    let (before, after) = pass_on(host, layout, Clock::Resume, |_| {})?;
    let moving = |index: u32| index == 0x10;
    for (was, is) in before.msrs.as_slice().iter().zip(after.msrs.as_slice()) {
        if (was.index, was.data) != (is.index, is.data) && !moving(was.index) {
            return Err(format!("MSR {:#x} was {:#x} and is {:#x}", was.index, was.data, is.data).into());
        }
    }
    Ok(())
}

/// Checks that a TSC set ahead stays ahead.
fn tsc_counts_on(host: &Host, layout: &StateLayout) -> CheckOutcome {
    const AHEAD: u64 = 1 << 50;
    let tsc = |state: &VcpuState| state.msrs.as_slice().iter().find(|e| e.index == 0x10).map(|e| e.data);
    let set = |state: &mut VcpuState| {
        let entries = state.msrs.as_mut_slice().iter_mut().filter(|e| e.index == 0x10);
        entries.for_each(|e| e.data += AHEAD);
    };
    match pass_on(host, layout, Clock::Resume, set) {
        Ok((before, after)) => match (tsc(&before), tsc(&after)) {
            (Some(was), Some(is)) if is >= was => CheckOutcome::Passed { seen: format!("{} cycles on", is - was) },
            (Some(_), Some(_)) => skipped("guests read the host's TSC here, whatever is written"),
            _ => CheckOutcome::Failed { why: "KVM does not read the TSC".to_owned() },
        },
        Err(error) => CheckOutcome::Failed { why: clade_vmm::error_chain(error.as_ref()) },
    }
}

/// Restores a fresh vCPU's state, modified by `change`, to another vCPU. Returns that state, and
/// the state read back from the other.
fn pass_on(
    host: &Host,
    layout: &StateLayout,
    clock: Clock,
    change: impl FnOnce(&mut VcpuState),
) -> Fallible<(VcpuState, VcpuState)> {
    let cpuid = host.cpuid(0, 1, &CpuHide::none())?;
    let [from, to] = [host.lone_vcpu()?, host.lone_vcpu()?];
    let mut before = VcpuState::save(&from.1, layout, &cpuid)?;
    change(&mut before);
    before.restore(&to.1, layout, CpuidState::Set, clock, None)?;
    let after = VcpuState::save(&to.1, layout, &cpuid)?;
    Ok((before, after))
}
