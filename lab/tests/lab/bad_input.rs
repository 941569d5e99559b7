//! Input that is refused: exit code 2, and the value in one line. The log beside it.

use std::process::{Command, Stdio};

use crate::{Answer, LAB, kvm};

fn lab(args: &[&str]) -> Answer {
    Command::new(LAB).args(args).env_remove("CLADE_LOG").output().unwrap().into()
}

/// Checks that an answer is a refusal of bad input: exit code 2 and one line that names `value`.
fn expect_refusal(answer: &Answer, value: &str) {
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{answer:?}");
    assert_eq!(answer.stderr.trim_end().lines().count(), 1, "one line: {answer:?}");
    assert!(answer.stderr.starts_with("clade-lab: ") && answer.stderr.contains(value), "{value}: {answer:?}");
    for noise in ["panicked", "backtrace", "thread '"] {
        assert!(!answer.stderr.contains(noise), "{answer:?}");
    }
}

/// The argument parser's own errors.
#[test]
fn arguments_that_cannot_be_parsed() {
    for (args, value) in [(&["bench", "nothing"][..], "nothing"), (&["ps"], "ps")] {
        let answer = lab(args);
        assert_eq!(answer.code, Some(2), "{args:?}: {answer:?}");
        assert!(answer.stderr.contains(value), "{args:?}: {answer:?}");
        assert!(!answer.stderr.contains("panicked"), "{answer:?}");
    }
    for args in [["--help"], ["--version"]] {
        assert_eq!(lab(&args).code, Some(0));
    }
}

#[test]
fn benches_and_stress_that_cannot_be() {
    if !kvm() {
        return;
    }
    let rows: [(&[&str], &str); 10] = [
        (&["bench", "fork", "--samples", "0"], "0 samples"),
        (&["stress", "dma", "--seconds", "0"], "0 seconds"),
        (&["stress", "dma", "--cpus", "3"], "3 vCPUs"),
        (&["stress", "dma", "--dir", "/nonexistent-dir"], "/nonexistent-dir"),
        (&["bench", "fork", "--mem", "1M"], "1048576"),
        (&["bench", "freeze", "--mem", "256M"], "268435456"),
        (&["bench", "freeze", "--samples", "0"], "0 samples"),
        (&["bench", "reset", "--mem", "64M"], "67108864"),
        (&["bench", "answer"], "--image"),
        (&["bench", "answer", "--image", "x", "--count", "0"], "0 children"),
    ];
    for (args, value) in rows {
        expect_refusal(&lab(args), value);
    }
}

/// A host without KVM, in a mount namespace where /dev/kvm is missing.
#[test]
fn a_host_without_kvm() {
    let mount = "mount -t tmpfs none /dev";
    let possible = Command::new("unshare").args(["-m", "sh", "-c", mount]).stderr(Stdio::null()).status();
    if !possible.is_ok_and(|status| status.success()) {
        clade_test_support::skipped("no mount namespaces for this user");
        return;
    }
    let script = format!("{mount} && exec {LAB} bench fork");
    let there = Command::new("unshare").args(["-m", "sh", "-c", &script]).stdin(Stdio::null()).output();
    expect_refusal(&there.unwrap().into(), "/dev/kvm is missing");
}

#[test]
fn the_log_is_for_files_too() {
    if !kvm() {
        return;
    }
    let log = Command::new(LAB).args(["check", "host", "--forks", "1"]).env("CLADE_LOG", "debug").output();
    let answer = Answer::from(log.unwrap());
    let lines: Vec<&str> = answer.stderr.lines().filter(|line| line.contains("DEBUG")).collect();
    assert!(!lines.is_empty(), "{answer:?}");
    for line in lines {
        assert!(line.starts_with("20") && line.contains('T') && line.contains("Z "), "no time: {line}");
        assert!(!line.contains('\u{1b}'), "colours: {line}");
    }
}
