//! Transfers to and from a guest whose VM is suspended again and again meanwhile.

use std::fs;
use std::process::Command;
use std::time::Duration;

use clade_test_support::{Cid, TapName, wait_until};

use super::exec;
use crate::cached;
use crate::tool::{Runtime, kvm};

/// Bytes that are copied: seconds' worth where a guest's kernel is interpreted.
const BYTES: usize = 3 << 20;
/// Time between suspensions: the guest makes progress in between.
const TURN: Duration = Duration::from_millis(300);
/// Suspensions during a copy. The guest reads its memory from the file after each.
const SUSPENSIONS: usize = 3;

fn sha256(path: &str) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap().stdout;
    String::from_utf8(output).unwrap().split(' ').next().unwrap().to_owned()
}

fn state(runtime: &Runtime) -> String {
    runtime.http("GET", "/v1/vms/web", "").1["state"].as_str().unwrap_or_default().to_owned()
}

/// Copies a file, and suspends the VM meanwhile. Only the copy wakes the VM. Returns the number of
/// suspensions.
fn copy(runtime: &Runtime, from: &str, to: &str) -> usize {
    let mut copying = runtime.command(&["cp", from, to]).spawn().unwrap();
    let mut suspensions = 0;
    for _ in 0..SUSPENSIONS {
        std::thread::sleep(TURN);
        if copying.try_wait().unwrap().is_some() {
            break;
        }
        let suspended = runtime.clade(&["suspend", "web", "--json"]).json();
        suspensions += usize::from(suspended["was_suspended"] == false);
        wait_until("the copy wakes it", || copying.try_wait().unwrap().is_some() || state(runtime) != "suspended");
    }
    let status = copying.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    suspensions
}

#[test]
fn a_copy_goes_on_through_suspensions() {
    let mut runtime = Runtime::new();
    let (cid, tap) = (Cid::take(), TapName::take());
    if !kvm() || !cached::agent(&mut runtime, &cid, &tap) {
        return;
    }
    let (sent, got) = (runtime.dir().join("sent"), runtime.dir().join("got"));
    let [sent, got] = [&sent, &got].map(|path| path.to_str().unwrap());
    fs::write(sent, (0..BYTES).map(|n| (n / 4096 + n) as u8).collect::<Vec<_>>()).unwrap();
    assert!(copy(&runtime, sent, "web:/tmp/got") > 0);
    let there = exec(&runtime, &["web", "--", "sha256sum", "/tmp/got"]).stdout;
    assert_eq!(there.split(' ').next().unwrap(), sha256(sent));
    assert!(copy(&runtime, "web:/tmp/got", got) > 0);
    assert_eq!(sha256(got), sha256(sent));
}
