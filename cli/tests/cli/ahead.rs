//! Copies ahead: the children of a checkpoint have copies of the pages that earlier children have
//! written.

use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::{kvm, wait_until};
use serde_json::{Value, json};

/// Pages that each child writes.
const PAGES: u64 = 40;
const PAGE: u64 = 4096;

/// Writes pages of `name` from `first` on, full of the byte `with`.
fn write(all: &Supervised, name: &str, first: u64, with: u8) {
    let (at, file) = (format!("{:#x}", GuestMemory::AT + first * PAGE), all.runtime.dir().join("bytes"));
    std::fs::write(&file, vec![with; (PAGES * PAGE) as usize]).unwrap();
    let written = all.runtime.clade(&["memory", "write", name, &at, "--input", file.to_str().unwrap()]);
    assert_eq!(written.code, Some(0), "{written:?}");
    std::fs::remove_file(&file).unwrap();
}

fn learned(all: &Supervised) -> Value {
    let (_, checkpoints) = all.http("GET", "/v1/checkpoints", "");
    checkpoints.as_array().unwrap().iter().find(|one| one["name"] == "base").unwrap()["ahead"].clone()
}

fn copied(all: &Supervised, name: &str) -> u64 {
    all.http("GET", &format!("/v1/vms/{name}/stats"), "").1["copies"]["ahead"].as_u64().unwrap()
}

/// Stops a child, whose written pages are then known.
fn stop(all: &Supervised, name: &str) -> Value {
    let before = learned(all)["children"].as_u64().unwrap();
    assert_eq!(all.runtime.clade(&["stop", name]).code, Some(0));
    wait_until("what it has written", || learned(all)["children"].as_u64().unwrap() > before);
    learned(all)
}

#[test]
fn children_have_copies_of_what_those_before_them_have_written() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    write(&all, "web", 0, 1);
    write(&all, "web", 1000, 2);
    assert_eq!(all.runtime.clade(&["checkpoint", "web", "base"]).code, Some(0));
    let fork = |name: &str, more: &[&str]| {
        let forked = all.runtime.clade(&[&["fork", "base", "--paused", "--name", name], more].concat());
        assert_eq!(forked.code, Some(0), "{forked:?}");
    };

    // The first child has nothing to learn from.
    fork("a", &[]);
    assert_eq!(copied(&all, "a"), 0);
    write(&all, "a", 0, 7);
    let after = stop(&all, "a");
    let pages = after["pages"].as_u64().unwrap();
    assert!(pages >= PAGES, "{after}");
    assert_eq!((&after["copied"], &after["hits"], &after["waste"]), (&json!(0), &json!(0), &json!(0)));

    // The next has copies, with the contents of the checkpoint, and writes them.
    fork("b", &[]);
    wait_until("the copies", || copied(&all, "b") >= PAGES);
    let at = |page: u64| format!("{:#x}", GuestMemory::AT + page * PAGE);
    let first = |name: &str, page| all.runtime.clade(&["memory", "read", name, &at(page), "1"]).stdout;
    assert_eq!((first("b", 0), first("b", 1000)), (first("web", 0), first("web", 1000)), "not its sibling's");
    write(&all, "b", 0, 8);
    assert_eq!(
        first("web", 0),
        format!("{:012x}  01                                                |.|\n", GuestMemory::AT)
    );
    let after = stop(&all, "b");
    assert!(after["hits"].as_u64().unwrap() >= PAGES, "{after}");
    let waste = after["waste"].as_u64().unwrap();

    // A child that writes other pages has wasted copies, which are forgotten in time.
    fork("c", &[]);
    wait_until("the copies", || copied(&all, "c") >= PAGES);
    write(&all, "c", 1000, 9);
    let after = stop(&all, "c");
    assert!(after["waste"].as_u64().unwrap() >= waste + PAGES, "{after}");

    // As many as the limit allows, or none.
    fork("none", &["--ahead", "0"]);
    fork("some", &["--ahead", "1"]);
    wait_until("the copies", || copied(&all, "some") >= PAGES);
    assert_eq!(copied(&all, "none"), 0);
    let before = learned(&all);
    all.runtime.clade(&["stop", "none"]);
    // Its process did not have to report.
    wait_until("its end", || !all.runtime.socket("none").exists());
    assert_eq!(learned(&all), before);

    // Forks of a VM learn nothing, and impossible values are refused.
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.runtime.clade(&["fork", "web", "--ahead", "1"]).expect_refusal("ahead_mib: 1");
    all.runtime.clade(&["fork", "base", "--ahead", "5000"]).expect_refusal("5000");

    // The pages written by a forked VM are no longer its own alone.
    fork("d", &[]);
    write(&all, "d", 2000, 3);
    assert_eq!(all.fork(&["d"]), ["d-1"]);
    all.runtime.clade(&["stop", "d"]);
    wait_until("its end", || !all.runtime.socket("d").exists());
    assert_eq!(learned(&all), before);

    // A killed child reports nothing, and a removed checkpoint learns nothing.
    let pid = all.pid_of("some");
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    wait_until("its end", || !all.runtime.socket("some").exists());
    assert_eq!(learned(&all), before);
    fork("last", &[]);
    assert_eq!(all.http("DELETE", "/v1/checkpoints/base", "").0, 200);
    assert_eq!(all.runtime.clade(&["stop", "last"]).code, Some(0));
}

#[test]
fn a_supervisor_may_have_no_copies_made() {
    if !kvm() {
        return;
    }
    let all = Supervised::start_with("0", &["--ahead", "0"]);
    all.boot("web", &[]);
    assert_eq!(all.runtime.clade(&["checkpoint", "web", "base"]).code, Some(0));
    for name in ["a", "b"] {
        assert_eq!(all.runtime.clade(&["fork", "base", "--paused", "--name", name]).code, Some(0));
        write(&all, name, 0, 7);
        assert_eq!(copied(&all, name), 0);
        assert_eq!(all.runtime.clade(&["stop", name]).code, Some(0));
        wait_until("its end", || !all.runtime.socket(name).exists());
    }
    assert_eq!(learned(&all)["children"], json!(0));
}
