//! The reported memory of VMs, compared with the kernel's accounts of their processes.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use clade_test_support::{wait_for, wait_until};
use serde_json::Value;

use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::kvm;

const PAGE: u64 = 4096;
/// The first page that the tests write: the bare guest does not touch it.
const FIRST: u64 = GuestMemory::AT / PAGE;

/// Returns the pages of guest memory that are private copies, by the process's pagemap.
fn copies(pid: u32) -> BTreeSet<u64> {
    let memory = GuestMemory::of(pid);
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let is_copy = |page: &u64| {
        let mut word = [0; 8];
        pagemap.read_exact_at(&mut word, (memory.base() / PAGE + page) * 8).unwrap();
        let word = u64::from_le_bytes(word);
        // Present or swapped, and not a file's.
        word >> 62 != 0 && word & 1 << 61 == 0
    };
    (0..GuestMemory::BYTES / PAGE).filter(is_copy).collect()
}

fn pages_of(map: &Value, kinds: &[&str]) -> BTreeSet<u64> {
    let runs = map["runs"].as_array().unwrap().iter().filter(|run| kinds.contains(&run["kind"].as_str().unwrap()));
    runs.flat_map(|run| {
        let first = run["first"].as_u64().unwrap();
        first..first + run["count"].as_u64().unwrap()
    })
    .collect()
}

#[test]
fn the_map_of_a_child_shows_what_it_has_written_and_nothing_else_as_its_own() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let parent = GuestMemory::of(all.pid_of("web"));
    (0..40).for_each(|page| parent.write(page, 7));
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    let map = |name: &str| all.runtime.clade(&["pages", name, "--json"]).json();
    let pid = all.pid_of("web-1");
    let before = pages_of(&map("web-1"), &["exclusive", "pinned"]);
    assert_eq!(before, copies(pid));
    let written: Vec<u64> = vec![0, 1, 2, 39, 40, 511, 700];
    let child = GuestMemory::of(pid);
    written.iter().for_each(|page| child.write(*page, 9));
    let after = map("web-1");
    let own = pages_of(&after, &["exclusive", "pinned"]);
    let new: Vec<u64> = own.difference(&before).map(|page| page - FIRST).collect();
    assert_eq!(new, written);
    assert_eq!(own, copies(pid));
    // Each page has one kind, and the rest are of layers or zeros.
    let pages = GuestMemory::BYTES / PAGE;
    let others = pages_of(&after, &["shared", "reference", "absent"]);
    assert!(own.is_disjoint(&others) && (own.len() + others.len()) as u64 == pages);
    assert_eq!(after["runs"].as_array().unwrap().iter().map(|run| run["count"].as_u64().unwrap()).sum::<u64>(), pages);
    let shared = pages_of(&after, &["shared"]);
    assert!((3..39).all(|page| shared.contains(&(FIRST + page))), "what the parent has written");
    assert_eq!(after["totals"]["shared"].as_u64(), Some(shared.len() as u64));
    let layers = after["layers"].as_array().unwrap();
    assert_eq!(layers.iter().map(|layer| layer["shown_pages"].as_u64().unwrap()).sum::<u64>(), shared.len() as u64);
    // Its layers are the parent's: the same files, which another process holds.
    let of_parent = map("web");
    let files = |map: &Value| -> BTreeSet<String> {
        map["layers"].as_array().unwrap().iter().map(|layer| layer["file"].as_str().unwrap().to_owned()).collect()
    };
    assert!(files(&after).is_subset(&files(&of_parent)), "{after}\n{of_parent}");
    assert!(layers.iter().all(|layer| layer["home"] == "foreign" && layer["alone"].is_null()), "{layers:?}");
    assert_eq!(of_parent["layers"][0]["alone"], false, "the child has it: {}", of_parent["layers"]);
    all.stop("web-1");
    crate::tool::wait_until("the lease's end", || map("web")["layers"][0]["alone"] == true);
    all.end();
}

#[test]
fn pages_are_drawn_and_counted_in_cells_of_equal_size() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web"]);
    let (status, cells) = all.http("GET", "/v1/vms/web-1/pages?cells=16", "");
    assert_eq!(status, 200, "{cells}");
    let kinds = ["absent", "reference", "shared", "exclusive", "pinned"];
    for cell in cells["cells"].as_array().unwrap() {
        assert_eq!(kinds.iter().map(|kind| cell[kind].as_u64().unwrap()).sum::<u64>(), 512, "{cell}");
    }
    GuestMemory::of(all.pid_of("web-1")).write(3, 1);
    let (_, page) = all.http("GET", "/v1/vms/web-1/pages?max_runs=1", "");
    assert_eq!(page["runs"].as_array().unwrap().len(), 1);
    assert_eq!(page["next"], page["runs"][0]["count"]);
    for (query, named) in [("cells=0", "cells=0"), ("max_runs=x", "\"x\""), ("what=1", "\"what\"")] {
        let (status, answer) = all.http("GET", &format!("/v1/vms/web-1/pages?{query}"), "");
        assert_eq!(status, 400, "{answer}");
        assert!(answer.to_string().contains(&named.replace('"', "\\\"")), "{answer}");
    }
    let drawn = all.runtime.clade(&["pages", "web-1", "--width", "32"]);
    assert_eq!(drawn.code, Some(0), "{drawn:?}");
    let lines: Vec<&str> = drawn.stdout.lines().collect();
    assert!(lines[0].starts_with("web-1: 32M in 8192 pages"), "{drawn:?}");
    assert!(lines[1..25].iter().all(|line| line.chars().count() == 32), "{drawn:?}");
    assert!(!drawn.stdout.contains('\x1b') && drawn.stdout.contains("of layer "), "{drawn:?}");
    let svg = all.runtime.clade(&["pages", "web-1", "--svg", "-"]);
    assert!(svg.stdout.starts_with("<svg ") && svg.stdout.ends_with("</svg>\n"), "{svg:?}");
    all.runtime.clade(&["pages", "nobody"]).expect_refusal("nobody");
    all.runtime.clade(&["pages", "web-1", "--svg", "/nonexistent/x.svg"]).expect_refusal("/nonexistent/x.svg");
    all.end();
}

#[test]
fn numbers_of_a_vm_count_copies_pins_and_pauses() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web", "--count", "2"]);
    // On a busy host a VM may be silent once.
    let stats = |name: &str| {
        let vms = || all.runtime.clade(&["stats", name, "--json"]).json()["vms"].as_array().unwrap().clone();
        wait_for("its numbers", || vms().pop())
    };
    let before = stats("web-1");
    let child = GuestMemory::of(all.pid_of("web-1"));
    (0..25).for_each(|page| child.write(page, 1));
    let after = stats("web-1");
    let grown = |what: &str, of: &str| after[what][of].as_u64().unwrap() - before[what][of].as_u64().unwrap();
    assert_eq!(grown("copies", "guest"), 25, "{after}");
    assert_eq!(grown("memory", "private_kib"), 100, "{after}");
    assert!(after["process"]["page_tables_kib"].as_u64() > Some(0), "{after}");
    assert!(after["process"]["anonymous_kib"].as_u64() >= after["memory"]["private_kib"].as_u64(), "{after}");
    all.runtime.clade(&["reset", "web-1", "--json"]).json();
    let reset = stats("web-1");
    assert_eq!(
        (reset["pauses"]["reset"]["count"].as_u64(), reset["pauses"]["fork"]["count"].as_u64()),
        (Some(1), Some(0))
    );
    assert!(reset["copies"]["guest"].as_u64() >= after["copies"]["guest"].as_u64(), "it only grows: {reset}");
    assert_eq!(stats("web")["pauses"]["fork"]["count"], 1, "one pause for both");
    wait_until("a line for each", || {
        let everyone = all.runtime.clade(&["stats"]);
        assert_eq!(everyone.code, Some(0), "{everyone:?}");
        everyone.stdout.lines().count() == 4
    });
    all.runtime.clade(&["stats", "web", "nobody"]).expect_refusal("nobody");
    all.end();
}

#[test]
fn a_tree_has_vms_checkpoints_and_parents_that_have_ended() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.boot("other", &[]);
    all.fork(&["web", "--count", "2"]);
    all.runtime.clade(&["checkpoint", "web-1", "warm", "--json"]).json();
    all.fork(&["web-1", "--name", "deep"]);
    all.stop("web");
    let tree = all.runtime.clade(&["tree", "--json"]).json();
    let roots: Vec<&str> =
        tree.as_array().unwrap().iter().map(|clade| clade["root"]["name"].as_str().unwrap()).collect();
    assert_eq!(roots, ["other", "web"]);
    let web = &tree[1];
    assert_eq!((&web["root"]["kind"], &web["vms"], &web["checkpoints"]), (&"ended".into(), &3.into(), &1.into()));
    let first = &web["root"]["children"][0];
    assert_eq!((&first["name"], &first["children"][0]["name"]), (&"web-1".into(), &"deep".into()), "{web}");
    assert_eq!(first["children"][1]["kind"], "checkpoint", "{web}");
    let drawn = all.runtime.clade(&["tree"]).stdout;
    for line in ["web ", "├─ web-1", "│  ├─ deep", "│  └─ warm", "└─ web-2", "web: 3 VMs, 1 checkpoint,"]
    {
        assert!(drawn.lines().any(|drawn| drawn.starts_with(line)), "{line}:\n{drawn}");
    }
    all.end();
}
