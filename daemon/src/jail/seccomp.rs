//! System calls that a worker may make.
//!
//! The lists are in `resources/seccomp`, each entry with its reason. A call that is in none ends the
//! process at once (SIGSYS), and its record says so.
//!
//! The kernel takes 0.8 ms for the long list of what a worker may do: it compiles it, and tries it with
//! each call there is. So the zygote takes it, for itself and with what it needs besides, and
//! workers inherit it. A worker takes short lists of what it may not do: first of all what was
//! allowed for the zygote's sake.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use clade_io::thread::set_guest_hook;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, compile_from_json,
};
use serde_json::{Value, json};

pub(super) const LISTS: &str = include_str!("../../../resources/seccomp/worker.json");

/// Compiled once, before workers are copied from the zygote.
static PROGRAMS: OnceLock<HashMap<String, BpfProgram>> = OnceLock::new();
/// Whether this process has the long list, by itself or from its zygote.
static HAS_LONG_LIST: AtomicBool = AtomicBool::new(false);

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;

/// What the kernel is given, as lists of the same form: `long` is what a worker and the zygote may
/// do, the others what workers of each kind may not. One list for what several forbid: each costs
/// the kernel as much again.
pub(super) fn programs() -> io::Result<Value> {
    let lists: Value = serde_json::from_str(LISTS).map_err(io::Error::other)?;
    let entries = |names: &[&str]| -> Vec<Value> {
        names.iter().flat_map(|name| lists[name]["filter"].as_array().into_iter().flatten().cloned()).collect()
    };
    let kill =
        |names: &[&str]| json!({"mismatch_action": "allow", "match_action": "kill_process", "filter": entries(names)});
    let long = entries(&["worker", "zygote"]);
    Ok(json!({
        "long": {"mismatch_action": "kill_process", "match_action": "allow", "filter": long},
        "names": kill(&["zygote"]),
        "locks": kill(&["zygote", "no_names"]),
        "child": kill(&["zygote", "no_names", "no_locks"]),
        "guest": lists["guest"],
        "absent": lists["absent"],
        "made_before": lists["made_before"],
    }))
}

/// Compiles the lists.
pub(super) fn prepare() -> io::Result<()> {
    if PROGRAMS.get().is_none() {
        let programs = compile_from_json(programs()?.to_string().as_bytes(), ARCH).map_err(io::Error::other)?;
        // Another thread may have been quicker, with the same.
        let _ = PROGRAMS.set(programs);
    }
    Ok(())
}

fn apply(list: &str) -> io::Result<()> {
    let program = PROGRAMS.get().and_then(|programs| programs.get(list));
    apply_filter(program.ok_or(io::ErrorKind::NotFound)?).map_err(io::Error::other)
}

/// Restricts this process, which has one thread and may not gain privileges, to what the zygote and
/// its workers need.
pub(super) fn enter_zygote() -> io::Result<()> {
    prepare()?;
    apply("absent")?;
    apply("long")?;
    // Relaxed: there is one thread.
    HAS_LONG_LIST.store(true, Ordering::Relaxed);
    Ok(())
}

/// Restricts this process, which has one thread, to what any thread of a worker needs. Threads that
/// serve the guest are restricted further when they start. Only a worker that `names_files` makes
/// names, and changes what files are; only one that does so or `locks_files` locks them.
pub(super) fn enter(names_files: bool, locks_files: bool) -> io::Result<()> {
    // Relaxed: there is one thread.
    if !HAS_LONG_LIST.load(Ordering::Relaxed) {
        enter_zygote()?;
    }
    signals_to_itself()?;
    apply("made_before")?;
    apply(match (names_files, locks_files) {
        (true, _) => "names",
        (false, true) => "locks",
        (false, false) => "child",
    })?;
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
