//! Deliberate breaks, and whether the validator alone detects them: the scenario's own assertions
//! come later, or are ignored. Each break runs in a process of its own, with its own trace.

use std::process::Command;

use crate::testing::sabotage::Break;
use crate::testing::sabotage::tests::{scenario_of, with_break};

const NAME: &str = "CLADE_TRACE_BREAK";

/// For each break: the validator's message.
const TABLE: [(Break, &str); 14] = [
    (Break::PinInPlace, "I2: a page is called exclusive and is not the VM's own"),
    (Break::KeepBits, "Take: I8: a page is taken away before its bit is"),
    (Break::RemapPinned, "Take: I3, I7: a pinned page is taken away"),
    (Break::ForgetPinned, "FreezePrepare: I5, ChildSees: an image has not the bytes"),
    (Break::WriteLayer, "I1, I4: a page is shown that a VM writes in place"),
    (Break::BelieveTable, "FreezePrepare: I5, ChildSees: an image has not the bytes"),
    (Break::CountBlock, "PinBlock: I6: a device counts"),
    (Break::DropPinned, "Take: I3, I7: a pinned page is taken away"),
    (Break::ReadInPlace, "PinSection: I9: a page is written or kept that was not unshared"),
    (Break::OwnReference, "I2: a page is called exclusive and is not the VM's own"),
    (Break::InheritAll, "FreezeCommit: I11: an image shows a page that is not inherited"),
    (Break::SplitBare, "OpenPage(0): I6, I12: the record becomes x0"),
    (Break::ForgetUndo, "FreezeFails: I13: a refused freeze does not give back a bit"),
    (Break::LeaveMap, "I14: the map says None of a page that is mapped otherwise"),
];

/// The other half of the test below, in its own process.
#[test]
#[ignore = "a part of every_break_is_refused"]
fn one_break() {
    let how: usize = std::env::var(NAME).unwrap().parse().unwrap();
    let work = scenario_of(TABLE[how % 100].0);
    if how < 100 {
        let _ = with_break(TABLE[how].0, work);
    } else {
        work();
    }
}

fn replay(how: usize) -> (bool, String) {
    let exe = std::env::current_exe().unwrap();
    let args = ["--exact", "trace::tests::one_break", "--ignored", "--nocapture"];
    let output = Command::new(exe).args(args).env(NAME, how.to_string()).env("CLADE_TRACE", "1").output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn every_break_is_refused() {
    for (n, (how, expected)) in TABLE.iter().enumerate() {
        let (fine, said) = replay(n + 100);
        assert!(fine && said.contains(" 0 refused"), "{how:?}, unbroken: {said}");
        let (fine, said) = replay(n);
        let refused = said.lines().find(|line| line.starts_with("trace: step")).unwrap_or_default();
        assert!(!fine && refused.contains(expected), "{how:?}: {said}");
        println!("{how:?}: {refused}");
    }
}
