//! `clade-lab check host`: every line has an outcome, and the checklist a heading for each.

use std::process::Command;

use crate::{Answer, LAB, kvm};

#[test]
fn the_host_is_checked_and_each_line_is_in_the_checklist() {
    if !kvm() {
        return;
    }
    let answer = Answer::from(Command::new(LAB).args(["check", "host", "--forks", "3", "--json"]).output().unwrap());
    let report = answer.json();
    let list = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vtx-checklist.md")).unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 9, "{report}");
    for check in checks {
        let (name, outcome) = (check["name"].as_str().unwrap(), check["outcome"].as_str().unwrap());
        assert!(list.contains(&format!("## {name}\n")), "no heading for {name}");
        let said = if outcome == "passed" { "seen" } else { "why" };
        assert!(["passed", "skipped"].contains(&outcome), "{check}");
        assert!(check[said].as_str().is_some_and(|text| !text.is_empty()), "{check}");
        assert!(check["facts"].as_array().is_some_and(|facts| !facts.is_empty()), "{check}");
    }
    for must in ["IPI storms", "forks while APs are started", "MSRs", "nested virtualization"] {
        assert!(checks.iter().any(|c| c["name"] == must && c["outcome"] == "passed"), "{must}: {report}");
    }
    assert_eq!(list.matches("\n## ").count(), checks.len() + 1, "a heading for each check, and one for the others");
}

#[test]
fn a_table_for_people() {
    if !kvm() {
        return;
    }
    let answer = Answer::from(Command::new(LAB).args(["check", "host", "--forks", "1"]).output().unwrap());
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(answer.stdout.contains("IPI storms") && answer.stdout.contains("passed"), "{answer:?}");
}
