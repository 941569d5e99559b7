//! VMs on disk, from the command line: saved, shown, merged, restored, and refused.

use std::fs;
use std::path::Path;

use clade_guests::abi::{Command, WORK_BASE};
use rustix::process::Signal;
use serde_json::json;

use crate::machine::BareVm;
use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::{Runtime, expect_problem, hold, kill, kvm, wait_until};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_vm_is_saved_and_restored_as_several() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (full, more, small) = (dir.path().join("full"), dir.path().join("more"), dir.path().join("small"));
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.clade(&["snapshot", "web", text(&more), "--incremental"]).expect_refusal("web");
    let saved = runtime.clade(&["snapshot", "web", text(&full), "--json"]).json();
    assert!(saved["data_pages"].as_u64().unwrap() > 0 && saved["zero_pages"].as_u64().unwrap() > 0, "{saved}");
    assert!(saved["pause_us"].as_f64().unwrap() > 0.0, "{saved}");
    let line = runtime.clade(&["snapshot", "web", text(&more), "--incremental"]);
    assert_eq!(line.code, Some(0), "{line:?}");
    assert!(line.stdout.contains("MiB of data") && line.stdout.contains("was paused for"), "{line:?}");
    runtime.clade(&["snapshot", "web", text(&small), "--zstd", "--json"]).json();
    assert_eq!(runtime.names(), ["web"]);
    runtime.clade(&["stop", "web"]);
    assert_eq!(runtime.ended(), Some(0));

    let shown = runtime.clade(&["snapshot", "show", text(&more), "--json"]).json();
    assert_eq!((&shown["full"], shown["parents"].as_array().unwrap().len()), (&json!(false), 1), "{shown}");
    assert_eq!(shown["parents"][0]["id"], saved["id"]);
    let table = runtime.clade(&["snapshot", "show", text(&more)]);
    assert!(table.stdout.contains("memory") && table.stdout.contains("incremental"), "{table:?}");
    let verified = runtime.clade(&["snapshot", "verify", text(&more), "--json"]).json();
    assert_eq!(verified["snapshots"], 2, "{verified}");
    let compacted = runtime.clade(&["snapshot", "compact", text(&more), "--json"]).json();
    assert_eq!((&compacted["full"], &compacted["id"]), (&json!(true), &shown["id"]), "{compacted}");
    fs::remove_dir_all(&full).unwrap();

    let paused = ["--paused", "--detached"];
    runtime.spawn(&[&["restore", text(&more), "--count", "2", "--name", "w-{n}"], paused.as_slice()].concat());
    wait_until("two VMs", || runtime.socket("w-1").exists() && runtime.socket("w-2").exists());
    wait_until("both are listed", || runtime.names() == ["w-1", "w-2"]);
    let one = runtime.http("GET", "/v1/vms/w-1", "").1;
    assert_eq!((&one["state"], &one["parent"], &one["memory"]["mib"]), (&json!("paused"), &json!(null), &json!(32)));
    // The pages that its guest touches are recorded.
    BareVm::of(&runtime, "w-1").run(Command::Touch { start: WORK_BASE, pages: 4, value: 1 });
    assert_eq!(runtime.http("GET", "/v1/vms/w-1", "").1["state"], "paused");
    let warm = runtime.clade(&["snapshot", "working-set", "w-1", "--json"]).json();
    assert!(warm["pages"].as_u64().unwrap() > 0, "{warm}");
    assert_eq!(runtime.clade(&["reset", "w-2", "--json"]).json()["vm"]["state"], "paused");
    for name in ["w-1", "w-2"] {
        assert_eq!(runtime.clade(&["stop", name, "--json"]).json()["state"], "stopped");
    }
    assert_eq!(runtime.ended(), Some(0));

    for (at, args) in [(&more, ["--working-set"]), (&more, ["--preload"]), (&small, ["--paused"])] {
        let name = at.file_name().unwrap().to_str().unwrap();
        runtime.spawn(&[&["restore", text(at)], args.as_slice(), &["--detached"]].concat());
        // By the directory's name.
        wait_until("the VM", || runtime.socket(name).exists() && runtime.names() == [name]);
        assert_eq!(runtime.clade(&["stop", name, "--json"]).json()["state"], "stopped");
        assert_eq!(runtime.ended(), Some(0));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside the snapshots");
}

/// A forged manifest may name any parent. Only directories that the user allows are read.
#[test]
fn a_snapshot_with_its_parent_elsewhere_needs_a_word_of_the_user() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (bases, mine) = (dir.path().join("bases"), dir.path().join("mine"));
    [&bases, &mine].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let (full, more) = (bases.join("full"), mine.join("more"));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&bases, &link).unwrap();
    let all = Supervised::start("1");
    all.boot("web", &[]);
    all.runtime.clade(&["snapshot", "web", text(&full), "--json"]).json();
    GuestMemory::of(all.pid_of("web")).write(7, 70);
    let saved = all.runtime.clade(&["snapshot", "web", text(&more), "--incremental"]);
    assert!(saved.code == Some(0) && saved.stderr.contains("--parents"), "{saved:?}");
    all.stop("web");

    let elsewhere = text(&full).to_owned();
    let restore = ["restore", text(&more), "--detach", "--preload", "--paused"];
    all.runtime.clade(&restore).expect_refusal(&elsewhere);
    all.runtime.clade(&[&restore, ["--parents", text(&mine)].as_slice()].concat()).expect_refusal(&elsewhere);
    for command in ["verify", "compact"] {
        all.runtime.clade(&["snapshot", command, text(&more)]).expect_refusal(&elsewhere);
    }
    let shown = all.runtime.clade(&["snapshot", "show", text(&more)]);
    assert!(shown.code == Some(2) && shown.stderr.contains(&elsewhere), "{shown:?}");
    for allowed in [&bases, &full, &link] {
        let parents = ["--parents", text(allowed)];
        let made = all.runtime.clade(&[&restore, parents.as_slice()].concat());
        assert_eq!(made.code, Some(0), "{made:?}");
        assert_eq!(GuestMemory::of(all.pid_of("more")).read(7), 70);
        all.stop("more");
        let verified =
            all.runtime.clade(&[&["snapshot", "verify", text(&more), "--json"], parents.as_slice()].concat());
        assert_eq!(verified.json()["snapshots"], 2);
    }
    let saved = json!({"saved": {"dir": more, "parents": ["bases"]}});
    let (code, problem) = all.runtime.http("POST", "/v1/restore", &saved.to_string());
    expect_problem(&problem, 400);
    assert!(code == 400 && problem["detail"].as_str().unwrap().contains("bases"), "{problem}");
    let saved = json!({"saved": {"dir": more, "parents": vec![&bases; 17]}});
    let (code, problem) = all.runtime.http("POST", "/v1/restore", &saved.to_string());
    expect_problem(&problem, 400);
    assert!(code == 400 && problem["detail"].as_str().unwrap().contains("17"), "{problem}");
    let compacted = all.runtime.clade(&["snapshot", "compact", text(&more), "--json", "--parents", text(&bases)]);
    assert_eq!(compacted.json()["full"], true);
    assert_eq!(all.runtime.clade(&restore).code, Some(0));
    all.stop("more");
}

#[test]
fn snapshots_that_cannot_be() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut runtime = Runtime::new();
    runtime.start("vm");
    runtime.clade(&["snapshot", "vm", text(&at("good")), "--json"]).json();
    for command in ["verify", "show", "compact"] {
        runtime.clade(&["snapshot", command, text(&at("none"))]).expect_refusal("none");
    }
    runtime.clade(&["snapshot", "nobody", text(&at("x"))]).expect_refusal("nobody");
    runtime.clade(&["snapshot", "working-set", "nobody"]).expect_refusal("nobody");
    runtime.clade(&["restore", text(&at("none"))]).expect_refusal("none");
    runtime.clade(&["restore", text(dir.path())]).expect_refusal("manifest.json");
    runtime.clade(&["restore", text(&at("good")), "--count", "0"]).expect_refusal("0 children");
    runtime.clade(&["restore", text(&at("good")), "--count", "2", "--name", "same"]).expect_refusal("same");
    runtime.clade(&["restore", text(&at("good")), "--name", "vm"]).expect_refusal("vm");
    runtime.clade(&["restore", text(&at("good")), "--name", "../up"]).expect_refusal("../up");
    runtime.clade(&["restore", text(&at("good")), "--net", "tap=x"]).expect_refusal("1");
    runtime.clade(&["restore", text(&at("good")), "--working-set", "--name", "w"]).expect_refusal("good");
    for args in [&["restore"][..], &["restore", "x", "--working-set", "--preload"], &["snapshot", "vm"], &["snapshot"]]
    {
        assert_eq!(runtime.clade(args).code, Some(2), "{args:?}");
    }
    // Other directories are not replaced, and errors name the damaged file.
    fs::create_dir(at("letters")).unwrap();
    fs::write(at("letters").join("one"), "dear").unwrap();
    runtime.clade(&["snapshot", "vm", text(&at("letters"))]).expect_refusal("letters");
    fs::write(at("file"), "no directory").unwrap();
    runtime.clade(&["snapshot", "vm", text(&at("file"))]).expect_refusal("file");
    runtime.clade(&["snapshot", "vm", text(&at("good")), "--incremental"]).expect_refusal("good");
    let state = at("good").join("state");
    let mut bytes = fs::read(&state).unwrap();
    bytes[100] ^= 1;
    fs::write(&state, &bytes).unwrap();
    runtime.clade(&["restore", text(&at("good"))]).expect_refusal("state");
    // Their workers already run when the error appears.
    runtime.clade(&["restore", text(&at("good")), "--count", "3"]).expect_refusal("state");
    runtime.clade(&["snapshot", "verify", text(&at("good"))]).expect_refusal("state");

    let path = "/v1/vms/vm/snapshot";
    let absolute = format!(r#"{{"dir":{:?},"lossy":true}}"#, at("y"));
    let rows = [
        (400, "POST", path, ""),
        (400, "POST", path, "{}"),
        (400, "POST", path, r#"{"dir":"relative"}"#),
        (400, "POST", path, r#"{"dir":7}"#),
        (400, "POST", path, absolute.as_str()),
        (404, "POST", "/v1/vms/nobody/snapshot", r#"{"dir":"/x"}"#),
        (404, "GET", "/v1/vms/nobody/snapshot", ""),
        (404, "POST", "/v1/vms/nobody/working-set", ""),
        (405, "PUT", path, ""),
    ];
    for (status, method, path, body) in rows {
        let (got, answer) = runtime.http(method, path, body);
        assert_eq!(got, status, "{method} {path} {body}: {answer}");
        expect_problem(&answer, status);
    }
    let none = json!({ "running": false, "done": 0, "total": 0 });
    assert_eq!(runtime.http("GET", path, "").1["running"], none["running"]);
    assert_eq!(runtime.http("DELETE", path, "").0, 200, "ending what is not going on is no error");
    assert_eq!(runtime.names(), ["vm"], "no refusal made or ended a VM");
    runtime.clade(&["snapshot", "vm", text(&at("good")), "--json"]).json();
    assert_eq!(
        runtime.clade(&["snapshot", "verify", text(&at("good"))]).code,
        Some(0),
        "and it is saved after all that"
    );
    assert!(!at("y").exists() && !at("x").exists());
    runtime.clade(&["stop", "vm"]);
}

/// The worker kept for the next restore may reach only the directory that was there.
#[test]
fn a_snapshot_that_was_replaced_is_restored_as_it_is_now() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (saved, disk) = (dir.path().join("saved"), dir.path().join("disk"));
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let all = Supervised::start("1");
    all.boot("web", &["--disk", text(&disk)]);
    let memory = GuestMemory::of(all.pid_of("web"));
    let save = || all.runtime.clade(&["snapshot", "web", text(&saved), "--replace", "--json"]).json();
    let restore = |name: &str| {
        let before = all.runtime.clades();
        // In memory files, where the test looks for it.
        let started = all.runtime.clade(&["restore", text(&saved), "--preload", "-d", "--paused", "--name", name]);
        assert_eq!(started.code, Some(0), "{started:?}");
        let read = GuestMemory::of(all.pid_of(name)).read(0);
        all.stop(name);
        // A worker for the next VM, and one that opens the snapshot.
        wait_until("what is kept", || all.runtime.clades().len() == before.len().max(5));
        read
    };
    for (value, name) in (1..).zip(["one", "two", "three"]) {
        memory.write(0, value);
        save();
        for again in ["", "-again"] {
            assert_eq!(restore(&format!("{name}{again}")), value, "{name}{again}");
        }
    }
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(") ").next().unwrap().split(' ').nth(1).unwrap().parse::<u32>().unwrap()
    };
    let kept = || {
        let (supervisor, vm, all_pids) = (all.runtime.pid(), all.pid_of("web"), all.runtime.clades());
        // Children of the zygote, which is the supervisor's.
        let is_kept = |pid: &u32| ![supervisor, vm].contains(pid) && parent(*pid) != supervisor;
        let kept: Vec<u32> = all_pids.iter().copied().filter(is_kept).collect();
        assert_eq!(kept.len(), 2, "{kept:?} of {all_pids:?}");
        kept
    };
    // Both have died while waiting.
    kept().into_iter().for_each(|pid| kill(pid, Signal::KILL));
    assert_eq!(restore("after"), 3);
    // Both die with their requests, which they have not read.
    let held = kept();
    held.iter().for_each(|pid| hold(*pid));
    let ends = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        held.into_iter().for_each(|pid| kill(pid, Signal::KILL));
    });
    assert_eq!(restore("late"), 3);
    ends.join().unwrap();
    all.end();
}
