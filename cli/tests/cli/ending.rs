//! Ends of processes on request: everything ends properly, and no files stay.

use std::path::Path;
use std::process::Stdio;

use clade_test_support::{Cid, wait_until_within};
use rustix::process::Signal;

use crate::tool::{Runtime, kill, kvm, runs, wait_until};

/// Returns the files in `dir`, without the log of a supervisor.
fn entries(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name != "clade.log").collect()
}

/// Waits until `dir` has exactly these entries. The last process of a session, and the supervisor
/// without one, may end after it.
fn wait_for_entries(dir: &Path, expected: &[&str]) {
    wait_until(&format!("{expected:?} alone in {}", dir.display()), || entries(dir) == expected);
}

/// A bare VM with sockets of every kind and a disk in `dir`, and two children.
fn family(runtime: &mut Runtime, dir: &Path, claim: &Cid) {
    let cid = claim.number();
    let disk = dir.join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let (disk, vsock) = (disk.display().to_string(), format!("cid={cid},socket={}/web.vsock", dir.display()));
    let run = ["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "web", "--virtio-console"];
    runtime.spawn_heard(&[&run[..], &["--disk", &disk, "--vsock", &vsock]].concat());
    wait_until("the VM's socket", || {
        runtime.socket("web").exists() && runtime.clade(&["pause", "web"]).code == Some(0)
    });
    runtime.clade(&["fork", "web", "--count", "2", "--json"]).json();
    assert_eq!(runtime.names(), ["web", "web-1", "web-2"]);
    // For each VM: a lock, its HTTP and its image socket, two consoles, the supervisor's record,
    // and the file for its end; its vsock beside the disk, where the children's overlays are too.
    assert_eq!((runtime.files().len(), entries(dir).len()), (21, 5), "{:?} {:?}", entries(runtime.dir()), entries(dir));
}

/// A bare VM's snapshot in `dir`.
fn saved_and_stopped(runtime: &mut Runtime, dir: &Path) -> String {
    let saved = dir.join("saved").display().to_string();
    runtime.start("web");
    runtime.clade(&["snapshot", "web", &saved, "--json"]).json();
    runtime.clade(&["stop", "web"]);
    assert_eq!(runtime.ended(), Some(0));
    saved
}

#[test]
fn a_signal_ends_all_vms_and_leaves_nothing_behind() {
    if !kvm() {
        return;
    }
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let dir = tempfile::tempdir().unwrap();
        let mut runtime = Runtime::new();
        family(&mut runtime, dir.path(), &Cid::take());
        runtime.signal(signal);
        let said = runtime.heard();
        assert_eq!(runtime.ended(), Some(code), "{said}");
        wait_for_entries(runtime.dir(), &[]);
        // Neither sockets nor overlays.
        wait_for_entries(dir.path(), &["disk"]);
        // The parent's disk, which it alone uses in the end.
        let log = runtime.log();
        assert!(log.contains("disk has been given the 0 bytes written since the VM was forked"), "{log}");
        assert!(said.contains(&format!("clade: ended by signal {}", signal.as_raw())), "{said}");
        assert!(!said.contains("run on"), "{said}");
        assert!(std::fs::read(dir.path().join("disk")).unwrap() == vec![7; 1 << 20]);
    }
}

#[test]
fn a_signal_ends_children_whose_parent_has_gone() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut runtime = Runtime::new();
    family(&mut runtime, dir.path(), &Cid::take());
    runtime.clade(&["stop", "web"]);
    wait_until("the parent has gone", || runtime.names() == ["web-1", "web-2"]);
    runtime.signal(Signal::TERM);
    assert_eq!(runtime.ended(), Some(143));
    wait_for_entries(runtime.dir(), &[]);
    wait_for_entries(dir.path(), &["disk"]);
}

/// A family whose parent has ended, with its process stopped: it has not yet merged the writes
/// since the fork into its disk. Returns its pid.
fn held_back(runtime: &mut Runtime, dir: &Path, claim: &Cid) -> u32 {
    family(runtime, dir, claim);
    let parent = runtime.worker("web");
    runtime.clade(&["stop", "web"]);
    wait_until("the parent has gone", || runtime.names() == ["web-1", "web-2"]);
    // It waits for its children.
    kill(parent, Signal::STOP);
    parent
}

/// The same after a signal to the command, which waits for that process alone.
fn held_at_its_end(runtime: &mut Runtime, dir: &Path, claim: &Cid) -> u32 {
    let parent = held_back(runtime, dir, claim);
    runtime.signal(Signal::TERM);
    wait_until("the end of its VMs", || runtime.names().is_empty());
    parent
}

#[test]
fn a_command_ends_when_its_disks_have_what_was_written_however_late() {
    if !kvm() {
        return;
    }
    for signal in [None, Some(Signal::TERM)] {
        let claim = Cid::take();
        let dir = tempfile::tempdir().unwrap();
        let mut runtime = Runtime::new();
        let parent = held_back(&mut runtime, dir.path(), &claim);
        match signal {
            Some(signal) => runtime.signal(signal),
            None => drop(runtime.clade(&["stop", "web-1", "web-2"])),
        }
        wait_until("the end of its VMs", || runtime.names().is_empty());
        // The process reports that it waits.
        let mut said = runtime.heard_until("disks are given what was written");
        assert!(runtime.runs() && runs(parent), "{signal:?}: it has ended its VM's process");
        kill(parent, Signal::CONT);
        said += &runtime.heard();
        assert_eq!(runtime.ended(), Some(signal.map_or(0, |_| 143)), "{said}");
        assert!(runtime.log().contains("disk has been given the 0 bytes written"), "{signal:?}: {}", runtime.log());
        wait_for_entries(dir.path(), &["disk"]);
        wait_until("the end of all processes", || runtime.clades().is_empty());
    }
}

#[test]
fn a_disk_that_cannot_be_given_the_writes_is_named() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut runtime, claim) = (Runtime::new(), Cid::take());
    let parent = held_at_its_end(&mut runtime, dir.path(), &claim);
    kill(parent, Signal::KILL);
    let said = runtime.heard();
    assert_eq!(runtime.ended(), Some(143), "{said}");
    assert!(said.contains("a disk of web lacks writes since a fork"), "{said}");
}

#[test]
fn another_signal_ends_the_wait_for_disks() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut runtime, claim) = (Runtime::new(), Cid::take());
    let parent = held_at_its_end(&mut runtime, dir.path(), &claim);
    assert!(runtime.runs());
    runtime.signal(Signal::INT);
    assert_eq!(runtime.ended(), Some(130));
    // Its disk gets the writes without the command, and the supervisor ends after that.
    assert!(runs(parent));
    kill(parent, Signal::CONT);
    wait_until("the end of its processes", || runtime.clades().is_empty());
    assert!(runtime.log().contains("disk has been given the 0 bytes written"), "{}", runtime.log());
}

#[test]
fn a_signal_ends_vms_that_were_restored_together() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut runtime = Runtime::new();
    let saved = &saved_and_stopped(&mut runtime, dir.path());
    runtime.spawn(&["restore", saved, "--count", "3", "--name", "w-{n}", "--paused", "--detached"]);
    wait_until("all three", || runtime.names() == ["w-1", "w-2", "w-3"]);
    runtime.signal(Signal::TERM);
    assert_eq!(runtime.ended(), Some(143));
    wait_for_entries(runtime.dir(), &[]);
}

#[test]
fn a_restore_of_several_vms_fails_with_one_of_them() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut runtime = Runtime::new();
    let saved = &saved_and_stopped(&mut runtime, dir.path());
    runtime.spawn(&["restore", saved, "--count", "2", "--name", "w-{n}", "--paused", "--detached"]);
    wait_until("both", || runtime.names() == ["w-1", "w-2"]);
    let pid = runtime.http("GET", "/v1/vms/w-1", "").1["pid"].as_u64().unwrap();
    kill(pid as u32, Signal::KILL);
    runtime.clade(&["stop", "w-2"]);
    assert_eq!(runtime.ended(), Some(1));
}

#[test]
fn a_second_signal_ends_it_at_once_and_its_name_is_free() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.signal(Signal::TERM);
    runtime.signal(Signal::INT);
    // Either, depending on whether the first was quicker.
    let code = runtime.ended();
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    // Its VM's process ends with it, and answers until then.
    wait_until("the end of its processes", || runtime.clades().is_empty());
    runtime.start("web");
    assert_eq!(runtime.names(), ["web"]);
}

#[test]
fn a_signal_that_was_ignored_stays_so() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let script = "trap '' HUP INT; exec \"$0\" run --detached --kernel bare --mem 32M --name web";
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script, crate::tool::CLADE]).env("CLADE_RUNTIME_DIR", runtime.dir()).stdin(Stdio::null());
    runtime.adopt(shell.stdout(Stdio::null()).spawn().unwrap());
    wait_until("the VM's socket", || {
        runtime.socket("web").exists() && runtime.clade(&["pause", "web"]).code == Some(0)
    });
    runtime.signal(Signal::HUP);
    runtime.signal(Signal::INT);
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert!(runtime.runs() && runtime.names() == ["web"]);
    runtime.signal(Signal::TERM);
    assert_eq!(runtime.ended(), Some(143));
    wait_for_entries(runtime.dir(), &[]);
}

#[test]
fn a_signal_breaks_off_the_making_of_vms() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut runtime = Runtime::new();
    let saved = &saved_and_stopped(&mut runtime, dir.path());
    runtime.spawn_heard(&["restore", saved, "--count", "500", "--name", "w-{n}", "--detached"]);
    // All names are taken before the first VM is made.
    let limit = std::time::Duration::from_secs(1200);
    wait_until_within(limit, "the names", || entries(runtime.dir()).len() >= 500);
    runtime.signal(Signal::TERM);
    let heard = runtime.heard();
    assert_eq!(runtime.ended(), Some(143), "{heard}");
    assert!(!heard.contains("VMs restored"), "it made all of them first: {heard}");
    wait_for_entries(runtime.dir(), &[]);
}
