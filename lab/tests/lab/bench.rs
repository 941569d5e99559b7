//! Benchmarks that a signal ends.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clade_api::{Client, SupervisorInfo};
use clade_supervisor::vms_in;
use clade_test_support::{wait_for, wait_until};
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};

use crate::{LAB, kvm};

/// A benchmark that goes on for hours, with all its files in `dir`.
fn start(dir: &Path) -> Child {
    let args = ["bench", "clones", "--mem", "32M", "--count", "2", "--samples", "100000"];
    let mut command = Command::new(LAB);
    command.args(args).env("TMPDIR", dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// The runtime directory among the files, once the parent and a clone run.
fn runtime_dir(dir: &Path) -> Option<PathBuf> {
    let mut dirs = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    dirs.find(|path| vms_in(path).is_ok_and(|vms| vms.len() > 1))
}

fn pid_of_supervisor(dir: &Path) -> u32 {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let info =
        tokio.block_on(Client::new(dir).supervisor::<SupervisorInfo>(Method::GET, "/v1/supervisor", None::<&()>));
    info.unwrap().pid
}

fn is_gone(pid: u32) -> bool {
    // A process that has ended stays until whoever adopts it reaps it.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

#[test]
fn children_that_all_live_write_and_report_inherited_memory() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(LAB);
    let bench = command.args(["bench", "live", "--mem", "32M", "--count", "3", "--json"]).env("TMPDIR", dir.path());
    let output = bench.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let p50 = |name: &str, of: &str| {
        let row = report["rows"].as_array().unwrap().iter().find(|row| row["name"] == name);
        row.and_then(|row| row[of]["p50"].as_f64()).unwrap_or_else(|| panic!("no {name}: {report}"))
    };
    for name in ["live_3_answers", "live_3_answers_prepared"] {
        assert!(p50(name, "ours") > 0.0 && p50(name, "limit") > 0.0, "{report}");
    }
    assert!(p50("live_pause", "ours") > 0.0, "{report}");
    // Each child has pages of its own: those that it has written.
    assert!(p50("live_private_kib", "ours") >= 256.0, "{report}");
}

#[test]
fn a_bench_that_a_signal_ends_leaves_no_vm() {
    if !kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::KILL] {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = start(dir.path());
        let runtime = wait_for("clones", || runtime_dir(dir.path()));
        let supervisor = pid_of_supervisor(&runtime);
        kill_process(Pid::from_child(&bench), signal).unwrap();
        bench.wait().unwrap();
        wait_until("its VMs end", || vms_in(&runtime).map_or(true, |vms| vms.is_empty()));
        // What nothing can catch leaves the supervisor, without VMs.
        if signal == Signal::KILL {
            let pid = Pid::from_raw(i32::try_from(supervisor).unwrap()).unwrap();
            kill_process(pid, Signal::TERM).unwrap();
        }
        wait_until("its supervisor ends", || is_gone(supervisor));
        assert_eq!(signal == Signal::KILL, runtime.exists(), "{}", runtime.display());
    }
}
