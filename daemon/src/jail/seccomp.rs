//! System calls that a worker may make.
//!
//! The lists are in `resources/seccomp`, each entry with its reason. A call that is in none ends the
//! process at once (SIGSYS), and its record says so.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::OnceLock;

use clade_io::thread::set_guest_hook;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, compile_from_json,
};

pub(super) const LISTS: &str = include_str!("../../../resources/seccomp/worker.json");

/// Compiled once, before workers are copied from the zygote.
static PROGRAMS: OnceLock<HashMap<String, BpfProgram>> = OnceLock::new();

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;

/// Compiles the lists.
pub(super) fn prepare() -> io::Result<()> {
    if PROGRAMS.get().is_none() {
        let programs = compile_from_json(LISTS.as_bytes(), ARCH).map_err(io::Error::other)?;
        // Another thread may have been quicker, with the same.
        let _ = PROGRAMS.set(programs);
    }
    Ok(())
}

fn apply(list: &str) -> io::Result<()> {
    let program = PROGRAMS.get().and_then(|programs| programs.get(list));
    apply_filter(program.ok_or(io::ErrorKind::NotFound)?).map_err(io::Error::other)
}

/// Restricts this process, which has one thread, to what any thread of a worker needs. Threads that
/// serve the guest are restricted further when they start. Only a worker that `names_files` makes
/// names, and changes what files are; only one that does so or `locks_files` locks them.
pub(super) fn enter(names_files: bool, locks_files: bool) -> io::Result<()> {
    prepare()?;
    for list in ["absent", "made_before"] {
        apply(list)?;
    }
    if !names_files {
        apply("no_names")?;
    }
    if !(names_files || locks_files) {
        apply("no_locks")?;
    }
    signals_to_itself()?;
    apply("worker")?;
    set_guest_hook(restrict_guest_thread);
    Ok(())
}

/// Takes from the calling thread what it does not need while it serves the guest. vCPU threads start
/// those of devices, which inherit it: so there is one list for both. It is short, because each
/// thread has it compiled by the kernel once more; what a worker may not do it inherits.
///
/// # Panics
/// When the kernel refuses the filter: a thread that cannot be restricted does not run.
fn restrict_guest_thread() {
    if let Err(error) = apply("guest") {
        panic!("a thread that serves a guest cannot be confined: {error}");
    }
}

/// Signals to no process but this one, whose number is in no list.
fn signals_to_itself() -> io::Result<()> {
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(std::process::id()));
    let rule = other.and_then(|other| SeccompRule::new(vec![other])).map_err(io::Error::other)?;
    let rules = BTreeMap::from([(libc::SYS_tgkill, vec![rule])]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::KillProcess, ARCH);
    let program: BpfProgram = filter.and_then(BpfProgram::try_from).map_err(io::Error::other)?;
    apply_filter(&program).map_err(io::Error::other)
}
