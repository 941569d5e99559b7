//! VMs in the foreground: without a supervisor the command is one, and the VMs end with it.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;

use rustix::process::Signal;

use crate::guest::{write_guest, write_hasty_guest};
use crate::tool::{Runtime, kill, kvm, runs, wait_until};

fn detached(runtime: &Runtime, name: &str) {
    let args = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", name];
    let booted = runtime.clade(&args);
    assert_eq!((booted.code, booted.stdout.trim()), (Some(0), name), "{booted:?}");
    runtime.clade(&["pause", name, "--json"]).json();
}

fn parent_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

#[test]
fn each_vm_has_a_process_and_the_session_ends_with_the_command() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.clade(&["fork", "web", "--paused", "--json"]).json();
    // Outside of its session: others also use the supervisor.
    detached(&runtime, "other");
    runtime.clade(&["fork", "other", "--paused", "--json"]).json();
    let pid = |name: &str| runtime.worker(name);
    let pids = [pid("web"), pid("web-1"), pid("other"), pid("other-1"), runtime.pid()];
    assert_eq!(pids.iter().collect::<std::collections::BTreeSet<_>>().len(), 5, "{pids:?}");
    // A zygote's death ends no VM, and the next one's VMs are of the session too.
    let zygote = parent_of(pids[0]);
    kill(zygote, Signal::KILL);
    wait_until("its end", || !runs(zygote));
    runtime.clade(&["fork", "web", "--paused", "--count", "3", "--name", "late-{n}", "--json"]).json();
    assert_eq!(runtime.names(), ["late-1", "late-2", "late-3", "other", "other-1", "web", "web-1"]);
    let late = ["late-1", "late-2", "late-3"].map(pid);
    // The first one had not prepared all of them.
    assert!(late.iter().any(|pid| runtime.clades().contains(&parent_of(*pid))), "{late:?}");
    // A killed supervisor can stop no VM.
    runtime.crash();
    wait_until("the end of its VMs", || late.iter().chain(&pids[..2]).all(|pid| !runs(*pid)));
    wait_until("its VMs to be dead", || runtime.names() == ["other", "other-1"]);
    assert_eq!(runtime.clade(&["resume", "other", "--json"]).json()["state"], "running");
    // The next supervisor finds them, and clears up.
    runtime.start("web");
    runtime.clade(&["fork", "other", "--paused", "--json"]).json();
    assert_eq!(runtime.names(), ["other", "other-1", "other-2", "web"]);
    runtime.clade(&["pause", "other", "--json"]).json();
    // The first one ends the command, which meanwhile leaves the others to another supervisor.
    for name in ["web", "other", "other-1", "other-2"] {
        let stopped = runtime.clade(&["stop", name]);
        assert_eq!(stopped.code, Some(0), "{name}: {stopped:?}");
    }
    assert_eq!(runtime.ended(), Some(0));
}

#[test]
fn a_command_that_ends_leaves_a_supervisor_to_the_vms_of_others() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    detached(&runtime, "other");
    assert_eq!(runtime.clade(&["stop", "web"]).code, Some(0));
    assert_eq!(runtime.ended(), Some(0));
    assert_eq!(runtime.names(), ["other"]);
    let (status, info) = runtime.http("GET", "/v1/supervisor", "");
    assert_eq!((status, info["vms"].as_u64().is_some()), (200, true), "{info}");
    let supervisor = info["pid"].as_u64().unwrap() as u32;
    assert!(runtime.clades().contains(&supervisor));
    runtime.clade(&["fork", "other", "--paused", "--json"]).json();
    for name in ["other", "other-1"] {
        assert_eq!(runtime.clade(&["stop", name]).code, Some(0));
    }
    kill(supervisor, Signal::TERM);
    wait_until("the end of all", || runtime.clades().is_empty());
}

#[test]
fn a_session_runs_on_when_the_command_that_supervised_it_ends() {
    if !kvm() {
        return;
    }
    for is_killed in [false, true] {
        let mut runtime = Runtime::new();
        runtime.start("web");
        let mut command = runtime.command(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "next"]);
        let mut next = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the VM", || runtime.names() == ["next", "web"]);
        runtime.clade(&["fork", "next", "--paused", "--json"]).json();
        let workers = ["next", "next-1"].map(|name| runtime.worker(name));
        if is_killed {
            runtime.crash();
        } else {
            assert_eq!(runtime.clade(&["stop", "web"]).code, Some(0));
            assert_eq!(runtime.ended(), Some(0));
        }
        wait_until("the end of the first", || runtime.names() == ["next", "next-1"]);
        // A VM that ends with it would have ended by now.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(workers.iter().all(|pid| runs(*pid)) && next.try_wait().unwrap().is_none());
        assert_eq!(runtime.clade(&["resume", "next-1", "--json"]).json()["state"], "running");
        kill(next.id(), Signal::TERM);
        assert_eq!(next.wait().unwrap().code(), Some(143));
        assert_eq!(runtime.names(), [""; 0]);
    }
}

#[test]
fn a_session_under_another_supervisor_ends_its_vms_alone() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the supervisor", || runtime.clade(&["checkpoints"]).code == Some(0));
    detached(&runtime, "other");
    let mut command = runtime.command(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "web"]);
    let mut session = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the VM", || runtime.names() == ["other", "web"]);
    runtime.clade(&["pause", "web", "--json"]).json();
    runtime.clade(&["fork", "web", "--paused", "--count", "2", "--json"]).json();
    kill(session.id(), Signal::TERM);
    assert_eq!(session.wait().unwrap().code(), Some(143));
    assert_eq!(runtime.names(), ["other"]);
    runtime.clade(&["stop", "other", "--json"]).json();
}

#[test]
fn what_a_guest_says_from_its_first_instruction_to_its_last_is_shown() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("guest");
    write_guest(&kernel);
    let mut command = runtime.command(&["run", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", "bell"]);
    let mut run = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut stdin, mut stdout) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("ready") {
        let mut bytes = [0; 64];
        let got = stdout.read(&mut bytes).unwrap();
        assert!(got > 0, "{said:?}");
        said.push_str(&String::from_utf8_lossy(&bytes[..got]));
    }
    // Typed input reaches it. At the end of the input its output goes on.
    stdin.write_all(b"x").unwrap();
    drop(stdin);
    stdout.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("ready") && said.trim_end().ends_with("bye"), "{said:?}");
    assert_eq!(run.wait().unwrap().code(), Some(0));
    wait_until("the end of all", || runtime.clades().is_empty());
    let left = fs::read_dir(runtime.dir()).unwrap().flatten().map(|entry| entry.file_name()).collect::<Vec<_>>();
    assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".ended")), "{left:?}");
    runtime.start("last");
}

#[test]
fn a_guest_that_ends_at_once_is_shown_with_its_output() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("hasty");
    write_hasty_guest(&kernel);
    // The VM may have ended before or after the connection to its console.
    for time in 0..5 {
        let name = format!("hasty-{time}");
        let ran = runtime.clade(&["run", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", &name]);
        assert_eq!((ran.code, ran.stdout.trim()), (Some(0), "bye"), "{ran:?}");
    }
    // The same through another process.
    runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the supervisor", || runtime.clade(&["checkpoints"]).code == Some(0));
    let args = ["run", "-d", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", "hasty"];
    let ran = runtime.clade(&args);
    assert_eq!((ran.code, ran.stdout.trim()), (Some(0), "hasty"), "{ran:?}");
    // The list leaves a VM out as soon as its process has ended; the record follows.
    let waited = runtime.clade(&["wait", "hasty"]);
    assert!(waited.code == Some(0) && waited.stdout.contains("powered itself off"), "{waited:?}");
    let ended = runtime.clade(&["ps", "-a", "--json"]).json();
    assert!(ended.to_string().contains("hasty-4") && ended.to_string().contains("\"hasty\""), "{ended}");
}
