//! System calls that a worker may make.
//!
//! The lists are in `resources/seccomp`, each entry with its reason. A call outside the lists ends
//! the process at once (SIGSYS), and the record of the VM names that.
//!
//! The kernel takes 0.8 ms for the long list of a worker's permitted calls: it compiles it, and
//! tries it with every system call. So the zygote installs it, for itself and with the calls of its
//! own, and workers inherit it. A worker installs short lists of forbidden calls, first of all
//! those that only the zygote needs.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use clade_host_io::thread::set_guest_hook;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, compile_from_json,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(super) const LISTS: &str = include_str!("../../../resources/seccomp/worker.json");

/// What a worker does with files, beside reading and writing them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Nothing: all its files were opened by others.
    #[default]
    Child,
    /// Opens and locks disk images.
    Locks,
    /// Makes journals, overlays and reflink images beside disk images too, with names, modes and
    /// attributes.
    Disks,
    /// Writes a snapshot: directories, files and their names.
    Snapshot,
}

/// Compiled once, before workers are copied from the zygote.
static PROGRAMS: OnceLock<HashMap<String, BpfProgram>> = OnceLock::new();
/// Whether this process has the long list, from itself or from its zygote.
static HAS_LONG_LIST: AtomicBool = AtomicBool::new(false);

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;

/// Builds the kernel's filters, as lists of the same form: `long` has the permitted calls of a
/// worker and the zygote, the others the forbidden calls of each kind of worker. A worker gets one
/// merged list: each further one costs the kernel as much again.
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
        "disks": kill(&["zygote", "own_modes", "no_flags"]),
        "snapshot": kill(&["zygote", "no_modes", "no_owners"]),
        "locks": kill(&["zygote", "no_modes", "no_flags", "no_owners", "no_names"]),
        "child": kill(&["zygote", "no_modes", "no_flags", "no_owners", "no_names", "no_locks"]),
        "guest": lists["guest"],
        "absent": lists["absent"],
        "made_before": lists["made_before"],
    }))
}

/// Compiles the lists.
pub(super) fn prepare() -> io::Result<()> {
    if PROGRAMS.get().is_none() {
        let programs = compile_from_json(programs()?.to_string().as_bytes(), ARCH).map_err(io::Error::other)?;
        // Another thread may have set the same before.
        let _ = PROGRAMS.set(programs);
    }
    Ok(())
}

fn apply(list: &str) -> io::Result<()> {
    let program = PROGRAMS.get().and_then(|programs| programs.get(list));
    apply_filter(program.ok_or(io::ErrorKind::NotFound)?).map_err(io::Error::other)
}

/// Restricts this process, which has one thread and may not gain privileges, to the needs of the
/// zygote and its workers.
pub(super) fn enter_zygote() -> io::Result<()> {
    prepare()?;
    apply("absent")?;
    apply("long")?;
    // Relaxed: there is one thread.
    HAS_LONG_LIST.store(true, Ordering::Relaxed);
    Ok(())
}

/// Restricts this process, which has one thread, to the needs of a worker's threads. Threads that
/// serve the guest are restricted further when they start.
pub(super) fn enter(role: Role) -> io::Result<()> {
    // Relaxed: there is one thread.
    if !HAS_LONG_LIST.load(Ordering::Relaxed) {
        enter_zygote()?;
    }
    signals_to_itself()?;
    apply("made_before")?;
    apply(match role {
        Role::Disks => "disks",
        Role::Snapshot => "snapshot",
        Role::Locks => "locks",
        Role::Child => "child",
    })?;
    set_guest_hook(restrict_guest_thread);
    Ok(())
}

/// Restricts the calling thread to the needs of serving the guest. vCPU threads start those of
/// devices, which inherit the filter: so there is one list for both. The list is short, because the
/// kernel compiles it for each thread; the worker's own filters are inherited.
///
/// # Panics
/// When the kernel refuses the filter: a thread that cannot be restricted does not run.
fn restrict_guest_thread() {
    if let Err(error) = apply("guest") {
        panic!("a thread that serves a guest cannot be confined: {error}");
    }
}

/// Forbids signals to other processes. No list has this process's number.
fn signals_to_itself() -> io::Result<()> {
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(std::process::id()));
    let rule = other.and_then(|other| SeccompRule::new(vec![other])).map_err(io::Error::other)?;
    let rules = BTreeMap::from([(libc::SYS_tgkill, vec![rule])]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::KillProcess, ARCH);
    let program: BpfProgram = filter.and_then(BpfProgram::try_from).map_err(io::Error::other)?;
    apply_filter(&program).map_err(io::Error::other)
}
