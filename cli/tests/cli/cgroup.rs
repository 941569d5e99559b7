//! Limits of VMs' processes.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::supervisor::Supervised;
use crate::tool::{Runtime, kill, kvm, wait_until};

/// A control group (v2) of this test, removed with all groups below it. Its controllers are the
/// host's.
struct Group(PathBuf);

impl Group {
    fn make() -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let root = roots.into_iter().find(|root| root.join("cgroup.controllers").exists());
        let dir = root.map(|root| root.join(format!("clade-cli-{}", std::process::id())));
        let made = dir.filter(|dir| fs::create_dir(dir).is_ok());
        if made.is_none() {
            clade_test_support::skipped("no control group (v2) can be made here");
        }
        made.map(Self)
    }

    fn groups(&self) -> Vec<String> {
        let all = fs::read_dir(&self.0).unwrap().flatten().filter(|entry| entry.path().is_dir());
        let mut names: Vec<String> = all.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    fn processes(&self, group: &str) -> Vec<u32> {
        let text = fs::read_to_string(self.0.join(group).join("cgroup.procs")).unwrap();
        text.lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for group in self.groups() {
            let _ = fs::remove_dir(self.0.join(group));
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn each_vm_is_in_a_group_that_goes_with_it() {
    if !kvm() {
        return;
    }
    let Some(group) = Group::make() else { return };
    let dir = group.0.display().to_string();
    let mut all = Supervised { runtime: Runtime::new() };
    let serve = ["serve", "--pool", "1", "--cgroup", &dir];
    all.runtime.spawn(&serve);
    let socket = all.runtime.dir().join("clade.api");
    let up = || wait_until("the supervisor", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    up();
    all.boot("web", &[]);
    // The second time includes a prepared worker.
    for name in ["a{n}", "b{n}"] {
        all.fork(&["web", "--count", "2", "--name", name]);
    }
    assert_eq!(group.groups(), ["vm-a1", "vm-a2", "vm-b1", "vm-b2", "vm-web"]);
    for name in ["web", "a1", "b1", "b2"] {
        assert_eq!(group.processes(&format!("vm-{name}")), [all.pid_of(name)], "{name}");
    }
    all.stop("a1");
    kill(all.pid_of("a2"), Signal::KILL);
    wait_until("their groups to go", || group.groups() == ["vm-b1", "vm-b2", "vm-web"]);
    // VMs and their groups outlive the supervisor, and the next one tidies up after them.
    all.runtime.crash();
    assert_eq!(group.processes("vm-web"), [all.pid_of("web")]);
    all.runtime.spawn(&serve);
    up();
    all.stop("b1");
    wait_until("its group to go", || group.groups() == ["vm-b2", "vm-web"]);
    // A limit that no controller enforces is refused.
    if !fs::read_to_string(group.0.join("cgroup.controllers")).unwrap().contains("memory") {
        let limited = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "x", "--memory-limit", "64M"];
        all.runtime.clade(&limited).expect_refusal("cgroup");
    }
    for name in ["b2", "web"] {
        all.stop(name);
    }
    wait_until("all groups to go", || group.groups().is_empty());
    all.end();
}

#[test]
fn a_group_that_is_none_is_refused() {
    if !kvm() {
        return;
    }
    let all = Supervised { runtime: Runtime::new() };
    let runtime = &all.runtime;
    runtime.clade(&["serve", "--cgroup", "/nonexistent"]).expect_refusal("/nonexistent");
    assert_eq!(runtime.clade(&["serve", "--cgroup", "here"]).code, Some(2));
    for bad in [["--memory-limit", "1M"], ["--cpu-limit", "0"]] {
        let args = [&["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "x"][..], &bad].concat();
        assert_eq!(runtime.clade(&args).code, Some(2), "{bad:?}");
    }
}

/// A directory that looks like a group with all controllers: the test takes the kernel's part in
/// it.
#[test]
fn a_vm_that_is_killed_for_its_memory_says_so_and_its_children_have_its_limit() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cgroup.procs"), "").unwrap();
    fs::write(dir.path().join("cgroup.controllers"), "cpu io memory pids\n").unwrap();
    let mut all = Supervised { runtime: Runtime::new() };
    all.runtime.spawn(&["serve", "--pool", "0", "--cgroup", dir.path().to_str().unwrap()]);
    let socket = all.runtime.dir().join("clade.api");
    wait_until("the supervisor", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    all.boot("web", &["--memory-limit", "96M", "--cpu-limit", "0.5"]);
    all.fork(&["web"]);
    let (status, refused) = all.http("POST", "/v1/vms/web/fork", r#"{"limits": {"memory_mib": 1}}"#);
    assert_eq!(status, 400, "children have their parent's: {refused}");
    let child = dir.path().join("vm-web-1");
    assert_eq!(fs::read_to_string(child.join("cgroup.procs")).unwrap(), all.pid_of("web-1").to_string());
    fs::write(child.join("memory.events"), "max 12\noom 1\noom_kill 1\n").unwrap();
    kill(all.pid_of("web-1"), Signal::KILL);
    let ended = || all.runtime.clade(&["ps", "--all", "--json"]).json()["ended"].clone();
    wait_until("its record", || !ended().as_array().unwrap().is_empty());
    assert_eq!(ended()[0]["stopped"], serde_json::json!({"kind": "over_limit", "mib": 96}), "{}", ended());
    assert_eq!(all.runtime.names(), ["web"]);
    all.end();
}
