//! Children in processes of their own.

use std::collections::HashSet;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::tool::{Runtime, kvm, wait_until};

/// Processes that are nobody's to wait for. Ended when dropped.
#[derive(Default)]
struct Workers(HashSet<u32>);

impl Workers {
    /// The processes of the VMs that are listed but for `started`, which the test has as its
    /// child; and the VMs.
    fn of(runtime: &Runtime, started: u32) -> (Self, Vec<(String, u32)>) {
        let listed = runtime.clade(&["ps", "--json"]).json();
        let vm = |vm: &Value| (vm["name"].as_str().unwrap().to_owned(), vm["pid"].as_u64().unwrap() as u32);
        let vms: Vec<_> = listed.as_array().unwrap().iter().map(vm).collect();
        (Self(vms.iter().map(|(_, pid)| *pid).filter(|pid| *pid != started).collect()), vms)
    }

    fn running(&self) -> usize {
        self.0.iter().filter(|pid| test_kill_process(process(**pid)).is_ok()).count()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.0.iter().for_each(|pid| _ = kill_process(process(*pid), Signal::KILL));
    }
}

fn process(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).unwrap()
}

/// Processes that were started as workers of a runtime directory and are there.
fn workers_in(runtime: &Runtime) -> usize {
    let dir = runtime.dir().display().to_string();
    let is_ours = |entry: std::fs::DirEntry| {
        let of = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        of("cmdline").split('\0').nth(1) == Some("worker") && of("environ").contains(&dir)
    };
    std::fs::read_dir("/proc").unwrap().flatten().map(is_ours).filter(|ours| *ours).count()
}

#[test]
fn children_in_processes_of_their_own_outlive_their_parents() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    let started = runtime.pid();
    let forked = runtime.clade(&["fork", "web", "--own-process", "--count", "3", "--json"]).json();
    assert_eq!(forked["children"].as_array().unwrap().len(), 3, "{forked}");
    let (workers, vms) = Workers::of(&runtime, started);
    assert_eq!(vms.len(), 4, "{vms:?}");
    assert_eq!(workers.0.len(), 3, "each has a process: {vms:?}");
    let listed = runtime.clade(&["ps", "--json"]).json();
    for vm in listed.as_array().unwrap().iter().filter(|vm| vm["name"] != "web") {
        assert_eq!((vm["parent"].as_str(), vm["generation"].as_u64()), (Some("web"), Some(1)), "{vm}");
    }

    // One is killed: it alone ends.
    let (name, pid) = vms.iter().find(|(name, _)| name == "web-2").unwrap();
    kill_process(process(*pid), Signal::KILL).unwrap();
    wait_until("the end of the worker", || test_kill_process(process(*pid)).is_err());
    runtime.clade(&["pause", name]).expect_refusal("has died");
    // The parent's process is killed: nothing of the children ends.
    runtime.crash();
    for name in ["web-1", "web-3"] {
        for command in ["pause", "resume"] {
            let answer = runtime.clade(&[command, name]);
            assert_eq!(answer.code, Some(0), "{answer:?}");
        }
    }
    // And they are parents, of children here and there.
    let here = runtime.clade(&["fork", "web-1", "--name", "here", "--json"]).json();
    assert_eq!(here["children"][0], "here");
    let there = runtime.clade(&["fork", "web-1", "--own-process", "--name", "there", "--json"]).json();
    assert_eq!(there["children"][0], "there");
    let (others, vms) = Workers::of(&runtime, started);
    assert_eq!(vms.len(), 4, "{vms:?}");
    for (name, _) in &vms {
        let stopped = runtime.clade(&["stop", name]);
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
    }
    wait_until("the end of the workers", || workers.running() + others.running() == 0);
}

#[test]
fn i13_all_children_in_processes_of_their_own_are_made_or_none() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    let started = runtime.pid();
    let refused = |args: &[&str], why: &str| {
        let args = [&["fork", "web", "--own-process"], args].concat();
        runtime.clade(&args).expect_refusal(why);
        wait_until("the end of the workers", || workers_in(&runtime) == 0);
        assert_eq!(runtime.names(), ["web"]);
    };
    refused(&["--name", "web"], "taken");
    refused(&["--count", "3", "--name", "same"], "names every child the same");
    refused(&["--count", "0"], "0 children");
    refused(&["--name", "no/name"], "is not a name");
    refused(&["--count", "2", "--net", "tap=none"], "network interfaces");
    let (status, answer) =
        runtime.http("web", "POST", "/v1/vms/web/fork", r#"{"count": 2, "own_process": true, "paused": true}"#);
    assert_eq!(status, 200, "{answer}");
    let (workers, vms) = Workers::of(&runtime, started);
    assert_eq!((workers.0.len(), vms.len()), (2, 3));
    for vm in runtime.clade(&["ps", "--json"]).json().as_array().unwrap() {
        assert_eq!(vm["state"], "paused", "{vm}");
    }
}

/// What the parent wrote since the fork goes into its image when nobody reads the image as it was.
#[test]
fn a_disk_is_given_what_was_written_when_the_children_elsewhere_have_ended() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let mut runtime = Runtime::new();
    let disk = image.display().to_string();
    runtime.spawn_heard(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "web", "--disk", &disk]);
    wait_until("the VM", || runtime.socket("web").exists() && runtime.clade(&["pause", "web"]).code == Some(0));
    let started = runtime.pid();
    runtime.clade(&["fork", "web", "--own-process", "--name", "child", "--paused", "--json"]).json();
    let (workers, _) = Workers::of(&runtime, started);
    runtime.clade(&["stop", "web"]);
    wait_until("the parent to go", || runtime.names() == ["child"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(runtime.runs(), "its process waits for the child's");
    runtime.clade(&["stop", "child"]);
    wait_until("the end of the worker", || workers.running() == 0);
    let said = runtime.heard();
    assert_eq!(runtime.ended(), Some(0), "{said}");
    assert!(said.contains("disk has been given the 0 bytes written since the VM was forked"), "{said}");
    assert!(std::fs::read(&image).unwrap() == vec![7; 1 << 20]);
}
