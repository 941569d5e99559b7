//! VMs with a time to live.

use std::time::{Duration, Instant};

use clade_test_support::Cid;
use serde_json::json;

use crate::supervisor::Supervised;
use crate::tool::{kvm, wait_until};

#[test]
fn a_vm_is_stopped_when_its_time_is_over_unless_that_is_put_off() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &["--ttl", "1h"]);
    let left = |name: &str| all.http("GET", &format!("/v1/vms/{name}/ttl"), "").1["seconds_left"].as_f64();
    assert!(left("web").is_some_and(|left| left > 3500.0 && left <= 3600.0), "{:?}", left("web"));
    assert_eq!(all.fork(&["web", "--ttl", "50m"]), ["web-1"]);
    assert!(left("web-1").is_some_and(|left| left > 2900.0 && left <= 3000.0));
    all.stop("web-1");
    // A busy machine may be too slow to put the ends off: then the test begins anew with twice the
    // time.
    let mut seconds = 1;
    let begun = loop {
        let begun = Instant::now();
        let put = |vm: &str, seconds: u64| {
            all.http("PUT", &format!("/v1/vms/{vm}/ttl"), &format!(r#"{{"seconds": {seconds}}}"#))
        };
        for name in ["web-1", "web-2", "web-3"] {
            all.fork(&["web", "--name", name]);
        }
        for name in ["web-2", "web-3", "web-1"] {
            put(name, seconds);
        }
        let (status, answer) = put("web-2", 3600);
        let never = all.http("DELETE", "/v1/vms/web-3/ttl", "");
        if (status, never.0) == (200, 200) {
            assert!(answer["seconds_left"].as_f64() > Some(3500.0), "{answer}");
            assert!(never.1["seconds_left"].is_null(), "{}", never.1);
            break begun;
        }
        for name in ["web-1", "web-2", "web-3"] {
            all.http("POST", &format!("/v1/vms/{name}/stop"), "");
        }
        wait_until("the end of the three", || all.runtime.names() == ["web"]);
        seconds *= 2;
    };
    wait_until("the end of its time", || !all.runtime.names().contains(&"web-1".to_owned()));
    assert!(begun.elapsed() >= Duration::from_secs(seconds));
    // Their time began before that of the first, and is over.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(all.runtime.names(), ["web", "web-2", "web-3"]);
    assert_eq!(left("web-3"), None);
    let ended = all.runtime.clade(&["ps", "-a", "--json"]).json()["ended"].clone();
    let [end] = ended.as_array().unwrap().as_slice() else { panic!("{ended}") };
    assert_eq!((&end["name"], &end["reason"]), (&json!("web-1"), &json!("its time to live is over")));
    // A new VM of the name does not inherit the earlier one's time.
    all.fork(&["web", "--name", "web-1"]);
    assert_eq!(left("web-1"), None);
    for (body, named) in
        [(r#"{"seconds": 0}"#, "0"), (r#"{"seconds": -1}"#, "-1"), (r#"{"seconds": 1e300}"#, "seconds")]
    {
        let (status, answer) = all.http("PUT", "/v1/vms/web/ttl", body);
        assert!(status == 400 && answer.to_string().contains(named), "{answer}");
    }
    assert_eq!(all.http("GET", "/v1/vms/nobody/ttl", "").0, 404);
    for bad in [&["fork", "web", "--ttl", "soon"][..], &["run", "--kernel", "bare", "--ttl", "5s"]] {
        assert_eq!(all.runtime.clade(bad).code, Some(2), "{bad:?}");
    }
    all.end();
}

#[test]
fn a_vm_whose_agent_does_not_answer_in_time_has_its_times_and_its_name_is_printed() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let cid = Cid::take();
    let vsock = format!("cid={},socket={}", cid.number(), all.runtime.dir().join("web.vsock").display());
    let vm = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "web", "--vsock", &vsock];
    let times = ["--ttl", "1h", "--suspend-after", "2h", "--wait=100ms"];
    let started = all.runtime.clade(&[&vm[..], &times[..]].concat());
    assert_eq!((started.code, started.stdout.as_str()), (Some(1), "web\n"), "{started:?}");
    assert!(started.stderr.contains("the agent of web has not answered for 0.1 s"), "{started:?}");
    let get = |what: &str| all.http("GET", &format!("/v1/vms/web/{what}"), "");
    let (status, ttl) = get("ttl");
    assert!(status == 200 && ttl["seconds_left"].as_f64().is_some_and(|left| left > 3000.0), "{ttl}");
    let (status, idle) = get("suspend-after");
    assert_eq!((status, idle["seconds"].as_f64()), (200, Some(7200.0)), "{idle}");
    all.end();
}

#[test]
fn times_are_shown_and_changed_by_commands() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let said = |args: &[&str]| {
        let answer = all.runtime.clade(args);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        answer.stdout
    };
    assert_eq!(said(&["ttl", "web"]), "web has no time to live\n");
    assert!(said(&["ttl", "web", "1h"]).starts_with("web is stopped in "));
    let left = all.runtime.clade(&["ttl", "web", "--json"]).json()["seconds_left"].as_f64();
    assert!(left > Some(3500.0) && left <= Some(3600.0), "{left:?}");
    assert_eq!(said(&["ttl", "web", "none"]), "web has no time to live\n");
    assert_eq!(said(&["suspend-after", "web"]), "web is not suspended by itself\n");
    assert_eq!(said(&["suspend-after", "web", "90m"]), "web is suspended after 1h30m without work\n");
    assert_eq!(all.runtime.clade(&["suspend-after", "web", "--json"]).json(), json!({ "seconds": 5400.0 }));
    assert_eq!(said(&["suspend-after", "web", "none"]), "web is not suspended by itself\n");
    for command in ["ttl", "suspend-after"] {
        let refused = all.runtime.clade(&[command, "web", "soon"]);
        assert!(refused.code == Some(2) && refused.stderr.contains("\"soon\" is not a time"), "{refused:?}");
        all.runtime.clade(&[command, "nobody", "1h"]).expect_refusal("nobody");
    }
    all.end();
}

#[test]
fn restored_vms_have_the_labels_and_the_times_of_their_command() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &["--label", "tier=first", "--ttl", "1h"]);
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved");
    let saved = saved.to_str().unwrap();
    all.runtime.clade(&["snapshot", "web", saved, "--json"]).json();
    let vms = ["restore", saved, "-d", "--json", "--count", "2", "--name", "again-{n}"];
    let chosen = ["--label", "tier=second", "--label", "of=web", "--ttl", "2h", "--suspend-after", "3h"];
    let made = all.runtime.clade(&[&vms[..], &chosen[..]].concat()).json();
    assert_eq!(made["children"], json!(["again-1", "again-2"]), "{made}");
    for name in ["again-1", "again-2"] {
        let get = |what: &str| all.http("GET", &format!("/v1/vms/{name}{what}"), "").1;
        assert_eq!(get("")["labels"], json!({ "tier": "second", "of": "web" }));
        assert!(get("/ttl")["seconds_left"].as_f64().is_some_and(|left| left > 7000.0 && left <= 7200.0));
        assert_eq!(get("/suspend-after")["seconds"], 10800.0);
    }
    let plain = all.runtime.clade(&["restore", saved, "-d", "--name", "plain"]);
    assert_eq!((plain.code, plain.stdout.as_str()), (Some(0), "plain\n"), "{plain:?}");
    let get = |what: &str| all.http("GET", &format!("/v1/vms/plain{what}"), "").1;
    assert!(get("")["labels"].is_null(), "a snapshot has no labels");
    assert!(get("/ttl")["seconds_left"].is_null(), "nor times");
    for needs in [&["--ttl", "1h"][..], &["--suspend-after", "1h"], &["--json"]] {
        let refused = all.runtime.clade(&[&["restore", saved], needs].concat());
        assert!(refused.code == Some(2) && refused.stderr.contains("--detach"), "{refused:?}");
    }
    all.end();
}
