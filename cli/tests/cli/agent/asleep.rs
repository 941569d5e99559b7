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
/// Time between suspensions of the first copy: the guest makes progress in between.
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

/// Copies a file, and suspends the VM meanwhile. Returns how many times the copy has woken the VM.
fn copy(runtime: &Runtime, from: &str, to: &str, turn: Duration) -> usize {
    let mut copying = runtime.command(&["cp", from, to]).spawn().unwrap();
    let mut wakes = 0;
    for _ in 0..SUSPENSIONS {
        std::thread::sleep(turn);
        if copying.try_wait().unwrap().is_some() {
            break;
        }
        let suspended = runtime.clade(&["suspend", "web", "--json"]).json();
        assert_eq!(suspended["was_suspended"], false, "{suspended}");
        let mut is_awake = false;
        wait_until("the copy wakes it", || {
            let has_ended = copying.try_wait().unwrap().is_some();
            is_awake = state(runtime) != "suspended";
            has_ended || is_awake
        });
        wakes += usize::from(is_awake);
    }
    let status = copying.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    wakes
}

/// The same again and again, until a copy has woken the VM: one may be done before it is suspended.
/// `check` is called after each.
fn copy_asleep(runtime: &Runtime, from: &str, to: &str, check: impl Fn()) {
    let mut turn = TURN;
    wait_until("a copy from or to a suspended VM", || {
        let wakes = copy(runtime, from, to, turn);
        check();
        turn /= 2;
        wakes > 0
    });
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
    copy_asleep(&runtime, sent, "web:/tmp/got", || {
        let there = exec(&runtime, &["web", "--", "sha256sum", "/tmp/got"]).stdout;
        assert_eq!(there.split(' ').next().unwrap(), sha256(sent));
    });
    copy_asleep(&runtime, "web:/tmp/got", got, || assert_eq!(sha256(got), sha256(sent)));
}
