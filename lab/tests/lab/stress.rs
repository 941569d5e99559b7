//! DMA under forks, for a few seconds: no wrong byte with the protocol, and wrong bytes found
//! without.

use std::process::Command;

use serde_json::Value;

use crate::{Answer, LAB, kvm};

fn stress(args: &[&str]) -> (Answer, Value) {
    let all = [&["stress", "dma", "--json", "--seconds", "4"], args].concat();
    let answer = Answer::from(Command::new(LAB).args(all).output().unwrap());
    let report = serde_json::from_str(&answer.stdout).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    (answer, report)
}

#[test]
fn no_byte_is_wrong_while_a_vm_is_forked_under_dma() {
    if !kvm() {
        return;
    }
    let (answer, report) = stress(&["--forks-per-second", "50"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("no {key}: {report}"));
    assert_eq!((count("wrong_bytes"), count("violations")), (0, 0));
    assert_eq!((&report["in_process"], count("discards")), (&false.into(), 0));
    for key in ["forks", "children", "bytes_checked", "in_flight_at_fork", "resets", "rounds_written"] {
        assert!(count(key) > 0, "{key}: {report}");
    }
    for key in ["without_forks", "with_forks", "with_idle_children", "ratio", "ratio_with_idle_children"] {
        assert!(report["throughput_mib_s"][key].as_f64().is_some_and(|value| value > 0.0), "{key}: {report}");
    }
}

#[test]
fn no_vcpu_is_stuck_while_a_vm_with_four_is_forked_under_dma() {
    if !kvm() {
        return;
    }
    let (answer, report) = stress(&["--forks-per-second", "50", "--cpus", "4", "--in-process"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("no {key}: {report}"));
    assert_eq!((count("wrong_bytes"), count("violations"), count("stuck")), (0, 0, 0));
    assert!(count("children") > 0 && count("resets") > 0 && count("discards") > 0 && count("cpus") == 4, "{report}");
}

#[test]
fn without_unshare_before_protect_wrong_bytes_are_found() {
    if !kvm() {
        return;
    }
    let (answer, report) = stress(&["--forks-per-second", "50", "--without-unshare"]);
    // Success means that it was found: after so many forks without it, the run fails by itself.
    assert_eq!(answer.code, Some(0), "{answer:?}");
    let found = |key: &str| report[key].as_u64().unwrap_or(0);
    assert!(found("wrong_bytes") + found("violations") > 0, "{report}");
}
