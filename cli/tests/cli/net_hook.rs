//! The program that connects interfaces to the host's network.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use clade_test_support::{TapName, skip, write_program};

use crate::supervisor::Supervised;
use crate::tool::{Runtime, expect_problem, kvm, stem, taps, wait_until};

/// Writes a hook that logs its variables and whether the interface exists, and fails for VMs called
/// `bad`.
fn write_hook(dir: &Path) -> (PathBuf, PathBuf) {
    let (hook, log) = (dir.join("hook"), dir.join("log"));
    let text = format!(
        "#!/bin/sh\n[ -e /sys/class/net/$CLADE_TAP ] && there=there || there=gone\n\
         echo \"$CLADE_EVENT $CLADE_VM $CLADE_TAP ${{CLADE_PARENT-none}} $there\" >>{}\n\
         case $CLADE_EVENT$CLADE_VM in upbad*) echo 'no address is left' >&2; exit 1;; esac\n",
        log.display()
    );
    write_program(&hook, &text, 0o755);
    (hook, log)
}

#[test]
fn interfaces_are_connected_before_their_vms_run_and_taken_down_after() {
    if !kvm() || !taps() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (hook, log) = write_hook(dir.path());
    let mut all = Supervised { runtime: Runtime::new() };
    all.runtime.spawn(&["serve", "--pool", "1", "--net-hook", hook.to_str().unwrap()]);
    let socket = all.runtime.dir().join("clade.api");
    wait_until("the supervisor", || UnixStream::connect(&socket).is_ok());
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>();
    let name = TapName::take();
    let stem = stem(&name);
    all.boot("web", &["--net", &format!("tap={stem}%d")]);
    assert_eq!(lines(), [format!("up web {stem}0 none there")]);
    all.fork(&["web", "--count", "2"]);
    assert_eq!(lines()[1..], [format!("up web-1 {stem}1 web there"), format!("up web-2 {stem}2 web there")]);
    // A child that cannot be connected is not made, and neither are its siblings.
    let (status, refused) = all.http("POST", "/v1/vms/web/fork", r#"{"count": 2, "name": "bad-{n}", "paused": true}"#);
    expect_problem(&refused, status);
    assert_eq!((status, refused["type"].as_str()), (409, Some("urn:clade:identity-taken")));
    assert!(refused["detail"].as_str().unwrap().ends_with("exit code 1: no address is left"), "{refused}");
    assert_eq!(all.runtime.names(), ["web", "web-1", "web-2"]);
    assert!(lines()[3..].iter().all(|line| line.contains(" bad-1 ")), "{:?}", lines());
    assert!(!fs::exists(format!("/sys/class/net/{stem}3")).unwrap());
    // The parent runs on, and a boot is refused in the same way.
    let begun = lines().len();
    let net = format!("tap={stem}%d");
    let bad = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "bad", "--net", &net];
    all.runtime.clade(&bad).expect_refusal("no address is left");
    all.fork(&["web", "--name", "last"]);
    assert!(lines()[begun..].iter().any(|line| line.starts_with("up last ")), "{:?}", lines());
    for (vm, how) in [("web-1", true), ("web-2", false)] {
        match how {
            true => all.stop(vm),
            false => crate::tool::kill(all.pid_of(vm), rustix::process::Signal::KILL),
        }
        wait_until("it to be taken down", || {
            lines().iter().any(|line| line.starts_with(&format!("down {vm} ")) && line.ends_with(" web gone"))
        });
    }
    all.end();
}

#[test]
fn a_hook_that_is_none_is_refused() {
    let runtime = Runtime::new();
    for none in ["/nonexistent/hook", "/"] {
        runtime.clade(&["serve", "--net-hook", none]).expect_refusal(none);
    }
}

/// The addresses of the host's network and of metadata services belong to no guest.
#[test]
fn vms_behind_the_shipped_bridge_reach_public_addresses_alone() {
    if !rustix::process::geteuid().is_root() {
        return skip("nft", "network namespaces need root");
    }
    for tool in ["nft", "dnsmasq", "ip", "bridge", "unshare", "nsenter"] {
        let found = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().unwrap();
        if !found.status.success() {
            return skip("nft", &format!("{tool} is missing"));
        }
    }
    let check = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/net/check");
    let checked = Command::new(check).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}
