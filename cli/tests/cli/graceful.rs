//! Stopping by the power button.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::guest::{write_button_guest, write_guest};
use crate::supervisor::Supervised;
use crate::tool::{Runtime, expect_problem, kvm, wait_until};

/// Has the supervisor boot the guest at `kernel`, and waits for its `ready`.
fn boot(runtime: &Runtime, name: &str, kernel: &Path) {
    let kernel = kernel.display().to_string();
    let booted = runtime.clade(&["run", "-d", "--kernel", &kernel, "--mem", "32M", "--name", name]);
    assert_eq!(booted.code, Some(0), "{booted:?}");
    wait_until("the guest", || runtime.clade(&["logs", name]).stdout.contains("ready"));
}

fn reason(runtime: &Runtime, name: &str) -> Option<String> {
    let all = runtime.clade(&["ps", "--all", "--json"]).json();
    let ended = all["ended"].as_array().unwrap().iter().find(|vm| vm["name"] == name)?;
    Some(ended["reason"].as_str().unwrap().to_owned())
}

#[test]
fn a_guest_that_hears_its_power_button_ends_by_itself_and_its_child_runs_on() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let kernel = all.runtime.dir().join("guest.elf");
    write_button_guest(&kernel);
    boot(&all.runtime, "web", &kernel);
    assert_eq!(all.runtime.clade(&["fork", "web"]).code, Some(0));
    // The guest ends by itself within that time: the answer shows that.
    let stopped = all.runtime.clade(&["stop", "web", "--graceful", "1h", "--json"]).json();
    assert_eq!(stopped["shutdown"], serde_json::json!({"by_itself": true, "noticed": true}), "{stopped}");
    assert_eq!((&stopped["state"], &stopped["stopped"]["kind"]), (&"stopped".into(), &"power_off".into()));
    assert!(reason(&all.runtime, "web").unwrap().contains("powered itself off"));
    // The press reached the parent alone; the child has its own.
    assert_eq!(all.runtime.names(), ["web-1"]);
    assert!(!all.runtime.clade(&["logs", "web-1"]).stdout.contains("bye"));
    let stopped = all.runtime.clade(&["stop", "web-1", "--graceful"]);
    // A stop that takes more than a second shows before that it goes on.
    let last = stopped.stderr.lines().next_back();
    assert_eq!((stopped.code, last), (Some(0), Some("its guest has ended by itself")), "{stopped:?}");
    let waited = all.runtime.clade(&["wait", "web", "web-1"]);
    assert_eq!(waited.code, Some(0), "{waited:?}");
    std::fs::remove_file(kernel).unwrap();
    all.end();
}

#[test]
fn a_guest_that_does_not_listen_is_cut_when_its_time_is_over() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let kernel = all.runtime.dir().join("guest.elf");
    write_guest(&kernel);
    boot(&all.runtime, "deaf", &kernel);
    let begun = Instant::now();
    let (status, stopped) = all.http("POST", "/v1/vms/deaf/stop", r#"{"graceful_s": 1.5}"#);
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1500), "{took:?}");
    assert_eq!(status, 200);
    assert_eq!(stopped["shutdown"], serde_json::json!({"by_itself": false, "noticed": false}), "{stopped}");
    assert_eq!(stopped["stopped"]["kind"], "requested");
    assert_eq!(reason(&all.runtime, "deaf"), None, "it was stopped on request");
    // Without a body it is a power cut, without the button.
    boot(&all.runtime, "deaf", &kernel);
    let (status, stopped) = all.http("POST", "/v1/vms/deaf/stop", "");
    assert_eq!((status, &stopped["shutdown"]), (200, &Value::Null), "{stopped}");
    std::fs::remove_file(kernel).unwrap();
    all.end();
}

#[test]
fn what_cannot_be_done_gracefully_is_refused_and_the_vm_runs_on() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let kernel = all.runtime.dir().join("guest.elf");
    write_button_guest(&kernel);
    boot(&all.runtime, "web", &kernel);
    let running = |body: &str, status: u16, kind: &str| {
        let (got, answer) = all.http("POST", "/v1/vms/web/stop", body);
        expect_problem(&answer, status);
        assert_eq!((got, answer["type"].as_str()), (status, Some(kind)), "{body}");
        assert_eq!(all.runtime.names(), ["web"], "{body}");
    };
    for body in [r#"{"graceful_s": -1}"#, r#"{"graceful_s": 1e9}"#, r#"{"graceful": 1}"#, "{"] {
        running(body, 400, "urn:clade:bad-request");
    }
    all.runtime.clade(&["pause", "web", "--json"]).json();
    running(r#"{"graceful_s": 1}"#, 409, "urn:clade:wrong-state");
    all.runtime.clade(&["stop", "web", "--graceful"]).expect_refusal("paused");
    all.stop("web");
    // The embedded guest has no ACPI.
    all.boot("web", &[]);
    running(r#"{"graceful_s": 1}"#, 409, "urn:clade:no-device");
    std::fs::remove_file(kernel).unwrap();
    all.end();
}
