//! VMs through their sockets: listed, forked, paused, resumed and stopped.

use std::collections::BTreeSet;
use std::fs;
use std::thread;

use clade_test_support::{Cid, TapName, wait_for};
use serde_json::{Value, json};

use crate::tool::{Runtime, expect_problem, kvm, stem, taps, wait_until};

#[test]
fn a_fleet_from_its_first_vm_to_its_last() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    let all = runtime.clade(&["ps", "--json"]).json();
    let web = &all[0];
    assert_eq!((&web["name"], &web["state"], &web["parent"]), (&json!("web"), &json!("paused"), &Value::Null));
    assert_eq!((&web["generation"], &web["cpus"], &web["memory"]["mib"]), (&json!(0), &json!(1), &json!(32)));
    let table = runtime.clade(&["ps"]);
    assert!(table.stdout.contains("web") && table.stdout.contains("paused"), "{table:?}");

    let forked = runtime.clade(&["fork", "web", "--count", "3", "--name", "w-{n}", "--paused", "--json"]).json();
    assert_eq!(forked["children"], json!(["w-1", "w-2", "w-3"]));
    assert!(forked["pause_us"].as_f64().unwrap() > 0.0);
    assert!(forked["remapped_pages"].as_u64().unwrap() > 0, "the first fork shares what was born: {forked}");
    assert_eq!(runtime.names(), ["w-1", "w-2", "w-3", "web"]);
    let child = runtime.http("GET", "/v1/vms/w-1", "").1;
    assert_eq!((&child["parent"], &child["generation"], &child["state"]), (&json!("web"), &json!(1), &json!("paused")));

    let resumed = runtime.clade(&["resume", "w-2", "--json"]).json();
    assert_eq!(resumed["state"], "running");
    // A fork of a running child, by its default name; a line for each on standard output.
    let lines = runtime.clade(&["fork", "w-2", "--paused"]);
    assert_eq!((lines.code, lines.stdout.as_str()), (Some(0), "w-2-1\n"), "{lines:?}");
    assert_eq!(runtime.clade(&["pause", "w-2", "--json"]).json()["state"], "paused");

    // Reset to the fork: paused or running as then. The first VM was never forked.
    let reset = runtime.clade(&["reset", "w-1", "--json"]).json();
    assert_eq!((&reset["vm"]["name"], &reset["vm"]["state"]), (&json!("w-1"), &json!("paused")));
    assert!(reset["total_us"].as_f64().unwrap() > 0.0 && reset["vm"]["memory"].is_null(), "{reset}");
    runtime.clade(&["resume", "w-2"]);
    let line = runtime.clade(&["reset", "w-2"]);
    assert_eq!((line.code, line.stdout.as_str()), (Some(0), "w-2 is running\n"), "{line:?}");
    assert_eq!(runtime.clade(&["pause", "w-2", "--json"]).json()["state"], "paused");
    runtime.clade(&["reset", "web"]).expect_refusal("no image");

    // The numbers continue behind those in use.
    let more = runtime.clade(&["fork", "web", "--name", "w-{n}", "--paused", "--json"]).json();
    assert_eq!(more["children"], json!(["w-4"]));
    runtime.clade(&["fork", "web", "--name", "w-4", "--json"]).expect_refusal("w-4");
    runtime.clade(&["fork", "web", "--count", "0"]).expect_refusal("0 children");
    runtime.clade(&["fork", "web", "--count", "10001"]).expect_refusal("10001");
    runtime.clade(&["fork", "web", "--count", "2", "--name", "same"]).expect_refusal("same");
    runtime.clade(&["fork", "web", "--name", "{n}/../x"]).expect_refusal("1/../x");
    runtime.clade(&["run", "--kernel", "bare", "--detached", "--name", "w-1"]).expect_refusal("w-1");
    assert_eq!(runtime.names(), ["w-1", "w-2", "w-2-1", "w-3", "w-4", "web"], "no refusal made or ended a VM");

    // The children run on when the parent stops, and its name is free again.
    assert_eq!(runtime.clade(&["stop", "web", "--json"]).json()["state"], "stopped");
    wait_until("the parent's sockets to go", || !runtime.socket("web").exists());
    assert!(runtime.runs());
    assert_eq!(runtime.clade(&["resume", "w-3", "--json"]).json()["state"], "running");
    runtime.start("web");
    runtime.clade(&["stop", "web"]);

    for name in ["w-1", "w-2", "w-2-1", "w-3", "w-4"] {
        assert_eq!(runtime.clade(&["stop", name]).code, Some(0));
    }
    assert_eq!(runtime.ended(), Some(0));
    assert_eq!(runtime.ended(), Some(0));
    assert_eq!(runtime.files(), BTreeSet::new(), "sockets and locks are gone");
}

#[test]
fn requests_that_cannot_be_right() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("api");
    let fork = "/v1/vms/api/fork";
    let huge = "x".repeat(3 << 20);
    let huge = format!(r#"{{"name":"{huge}"}}"#);
    let rows: [(u16, &str, &str, &str); 24] = [
        (400, "POST", fork, ""),
        (400, "POST", fork, "{"),
        (400, "POST", fork, "\"text\""),
        (400, "POST", fork, "null"),
        (400, "POST", fork, r#"{"count":"two"}"#),
        (400, "POST", fork, r#"{"count":-1}"#),
        (400, "POST", fork, r#"{"count":1.5}"#),
        (400, "POST", fork, r#"{"count":0}"#),
        (400, "POST", fork, r#"{"count":10001}"#),
        (400, "POST", fork, r#"{"count":18446744073709551615}"#),
        (400, "POST", fork, r#"{"count":99999999999999999999999999}"#),
        (400, "POST", fork, r#"{"counts":1}"#),
        (400, "POST", fork, r#"{"count":2,"name":"same"}"#),
        (400, "POST", fork, r#"{"name":"../up"}"#),
        (413, "POST", fork, &huge),
        (409, "POST", fork, r#"{"name":"api"}"#),
        (404, "POST", "/v1/vms/nobody/fork", "{}"),
        (409, "POST", "/v1/vms/api/reset", ""),
        (404, "POST", "/v1/vms/nobody/reset", ""),
        (405, "GET", "/v1/vms/api/reset", ""),
        (404, "GET", "/v1/vms/nobody", ""),
        (404, "GET", "/v2/vms", ""),
        (405, "GET", fork, ""),
        (405, "DELETE", "/v1/vms/api", ""),
    ];
    for (status, method, path, body) in rows {
        let (got, answer) = runtime.http(method, path, body);
        let body = &body[..body.len().min(60)];
        assert_eq!(got, status, "{method} {path} {body}: {answer}");
        expect_problem(&answer, status);
    }
    assert_eq!(runtime.names(), ["api"]);
    let (status, answer) = runtime.http("POST", fork, "{}");
    assert_eq!((status, &answer["children"]), (200, &json!(["api-1"])), "after all that: {answer}");
    runtime.http("POST", "/v1/vms/api-1/pause", "");
    // A VM's own socket reaches that VM only.
    let own = runtime.socket("api-1");
    let (status, all) = runtime.http_at(&own, "GET", "/v1/vms", "");
    assert_eq!((status, all.as_array().unwrap().len()), (200, 1), "{all}");
    for (status, method, path) in [
        (404, "GET", "/v1/vms/api"),
        (404, "POST", "/v1/vms/api/stop"),
        (404, "POST", "/v1/vms/api-1/fork"),
        (404, "POST", "/v1/vms/api-1/snapshot"),
        (404, "GET", "/v1/checkpoints"),
        (200, "GET", "/v1/vms/api-1"),
    ] {
        assert_eq!(runtime.http_at(&own, method, path, "{}").0, status, "{method} {path}");
    }
}

/// Statuses of a request that a busy host refuses for now, or whose VM's process does not answer.
const FOR_NOW: [u16; 3] = [503, 504, 507];

/// Sends a request again and again while it is refused for now.
fn patient(runtime: &Runtime, path: &str, body: &str) -> (u16, Value) {
    wait_for(&format!("an answer to {path}"), || {
        let (status, answer) = runtime.http("POST", path, body);
        if FOR_NOW.contains(&status) {
            println!("{path} again: {answer}");
            return None;
        }
        Some((status, answer))
    })
}

#[test]
fn many_forks_are_asked_for_at_once() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("busy");
    runtime.clade(&["resume", "busy", "--json"]).json();
    let answers: Vec<(u16, Value)> = thread::scope(|scope| {
        let ask = || {
            let body = r#"{"count":2,"paused":true}"#;
            (0..5).map(|_| patient(&runtime, "/v1/vms/busy/fork", body)).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let mut names = BTreeSet::new();
    for (status, answer) in &answers {
        assert_eq!(*status, 200, "{answer}");
        names.extend(answer["children"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()));
    }
    let expected: BTreeSet<String> = (1..=80).map(|n| format!("busy-{n}")).collect();
    assert_eq!(names, expected, "each name once, and none left out");
    assert_eq!(runtime.names().len(), 81);
    // Stopped during other requests.
    thread::scope(|scope| {
        let asking = scope
            .spawn(|| (1..=80).map(|n| patient(&runtime, &format!("/v1/vms/busy-{n}/fork"), "{}")).collect::<Vec<_>>());
        for n in 1..=80 {
            let (status, answer) = patient(&runtime, &format!("/v1/vms/busy-{n}/stop"), "");
            assert!([200, 404].contains(&status), "{answer}");
        }
        for (status, answer) in asking.join().unwrap() {
            assert!([200, 404, 409, 410].contains(&status), "a fork of a VM that is being stopped: {answer}");
        }
    });
}

#[test]
fn a_crashed_process_leaves_its_names_to_others() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("crash");
    runtime.clade(&["fork", "crash", "--count", "2", "--paused", "--json"]).json();
    // All VMs of its session end with it.
    runtime.crash_all();
    wait_until("the end of the workers", || runtime.clades().is_empty());
    assert!(runtime.files().contains("crash.sock"), "that is what a crash leaves");
    assert_eq!(runtime.names(), Vec::<String>::new());
    runtime.clade(&["pause", "crash"]).expect_refusal("crash");
    runtime.start("crash");
    assert_eq!(runtime.names(), ["crash"]);
    let forked = runtime.clade(&["fork", "crash", "--paused", "--json"]).json();
    assert_eq!(forked["children"], json!(["crash-1"]));
}

#[test]
fn a_guest_that_reports_is_booting_until_it_is_ready() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("plain");
    let config = json!({"memory": 32 << 20, "cpus": 1, "irqchip": "split", "pit": false, "cpu": "host", "hide": "",
        "pmu": false, "acpi": false, "report_port": true, "disks": [], "nets": [], "vsock": null, "rng": null,
        "balloon": false, "virtio_console": false});
    let body = json!({"name": "slow", "config": config, "kernel": "bare", "reports_ready": true});
    let (status, booted) = runtime.http("POST", "/v1/vms", &body.to_string());
    assert_eq!((status, booted["guest"].as_str()), (200, Some("booting")), "{booted}");
    let guests: Vec<Value> =
        runtime.clade(&["ps", "--json"]).json().as_array().unwrap().iter().map(|vm| vm["guest"].clone()).collect();
    assert_eq!(guests, [Value::Null, json!("booting")]);
    let shown = runtime.clade(&["ps"]).stdout;
    assert!(shown.lines().any(|line| line.starts_with("slow") && line.contains(" booting ")), "{shown}");
    for (vm, is_booting) in [("slow", true), ("plain", false)] {
        let taken = runtime.clade(&["checkpoint", vm]);
        assert_eq!((taken.code, taken.stderr.contains("still booting")), (Some(0), is_booting), "{taken:?}");
    }
    runtime.clade(&["stop", "--all"]);
}

#[test]
fn children_have_interfaces_of_their_own() {
    if !kvm() || !taps() {
        return;
    }
    let mut runtime = Runtime::new();
    let name = TapName::take();
    let stem = stem(&name);
    let interfaces = || {
        let all =
            fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        all.filter(|name| name.starts_with(&stem)).collect::<BTreeSet<_>>()
    };
    let numbered = |numbers: &[u32]| numbers.iter().map(|n| format!("{stem}{n}")).collect::<BTreeSet<_>>();
    runtime.start_with("lan", &["--net", &format!("tap={stem}0,queues=2")]);
    let forked = runtime.clade(&["fork", "lan", "--count", "2", "--paused", "--json"]).json();
    let net = |at: usize, key: &str| forked["identities"][at]["nets"][0][key].as_str().unwrap().to_owned();
    assert_eq!((net(0, "tap"), net(1, "tap")), (format!("{stem}1"), format!("{stem}2")));
    let macs: BTreeSet<String> = [net(0, "mac"), net(1, "mac")].into();
    assert_eq!(macs.len(), 2, "{forked}");
    let own = runtime.clade(&["ps", "--json"]).json()[0]["nets"][0]["mac"].as_str().unwrap().to_owned();
    assert!(!macs.contains(&own), "{forked}");
    // Its process may drop its claim and keep the queues.
    assert!(claims_interface(runtime.supervisor(), &format!("{stem}0")), "the supervisor has no claim");
    // An interface with several queues would accept a second VM.
    let taken = format!("{stem}0");
    runtime.clade(&["fork", "lan", "--net", &format!("tap={taken}")]).expect_refusal(&taken);
    runtime.clade(&["fork", "lan", "--net", &format!("mac={own}")]).expect_refusal(&own);
    // The first child's interface is made, and removed again when the second's fails.
    let mac = "02:77:00:00:00:01";
    runtime.clade(&["fork", "lan", "--count", "2", "--net", &format!("mac={mac}")]).expect_refusal(mac);
    runtime.clade(&["fork", "lan", "--net", "tap=lo"]).expect_refusal("lo");
    assert_eq!(runtime.names(), ["lan", "lan-1", "lan-2"]);
    assert_eq!(interfaces(), numbered(&[0, 1, 2]), "what was refused left nothing");
    assert_eq!(runtime.clade(&["resume", "lan", "--json"]).json()["state"], "running", "the parent runs on");
    runtime.clade(&["stop", "lan-1"]);
    wait_until("its interface to go", || interfaces() == numbered(&[0, 2]));
    runtime.clade(&["stop", "lan-2"]);
    runtime.clade(&["stop", "lan"]);
    // Free at once for the next VM.
    runtime.start_with("next", &["--net", &format!("tap={stem}0,queues=2")]);
    runtime.clade(&["stop", "next"]);
    assert_eq!((runtime.ended(), runtime.ended()), (Some(0), Some(0)));
    assert_eq!(interfaces(), numbered(&[]));
}

/// Returns whether a process has a claim on an interface.
fn claims_interface(pid: u32, interface: &str) -> bool {
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let name = format!("@clade/TAP interface/{interface}");
    let line = sockets.lines().find(|line| line.ends_with(&name)).unwrap();
    let socket = format!("socket:[{}]", line.split_whitespace().nth(6).unwrap());
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    open.filter_map(|file| fs::read_link(file.unwrap().path()).ok()).any(|file| file.as_os_str() == &*socket)
}

#[test]
fn children_have_sockets_and_addresses_of_their_own() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let claim = Cid::take();
    let cid = u64::from(claim.number());
    let socket = |name: &str| runtime.dir().join(name).display().to_string();
    let vsock = format!("cid={cid},socket={}", socket("eve.vsock"));
    let (own, given) = (socket("own.vsock"), socket("given-{name}"));
    let expected = [socket("eve-1.vsock"), socket("eve-2.vsock"), socket("given-eve-3")];
    runtime.start_with("eve", &["--vsock", &vsock, "--balloon", "--virtio-console"]);
    assert!(runtime.files().is_superset(&["eve.vsock".to_owned(), "eve.hvc".to_owned()].into()));

    let forked = runtime.clade(&["fork", "eve", "--count", "2", "--paused", "--json"]).json();
    let identity = |forked: &Value, at: usize| {
        let vsock = &forked["identities"][at]["vsock"];
        (vsock["cid"].as_u64().unwrap(), vsock["socket"].as_str().unwrap().to_owned())
    };
    let (one, two) = (identity(&forked, 0), identity(&forked, 1));
    assert_eq!((&one.1, &two.1), (&expected[0], &expected[1]));
    assert!(cid < one.0 && one.0 < two.0, "{forked}");

    let wish = format!("cid={},socket={given}", cid + 50);
    let forked = runtime.clade(&["fork", "eve", "--vsock", &wish, "--paused", "--json"]).json();
    assert_eq!(identity(&forked, 0), (cid + 50, expected[2].clone()));
    let listed = runtime.clade(&["ps", "-o", "wide"]).stdout;
    assert!(listed.contains("CID") && listed.contains(&(cid + 50).to_string()), "{listed}");

    // The error names the taken resource, and no VM is made or ended.
    let before = runtime.files();
    let names = runtime.names();
    runtime.clade(&["fork", "eve", "--vsock", &format!("cid={cid}")]).expect_refusal(&cid.to_string());
    runtime.clade(&["fork", "eve", "--vsock", &format!("socket={}", one.1)]).expect_refusal(&one.1);
    // The second child's CID would be the first's.
    let twice = cid + 60;
    let both = ["fork", "eve", "--count", "2", "--vsock", &format!("cid={twice},socket={own}")];
    runtime.clade(&both).expect_refusal(&twice.to_string());
    runtime.clade(&["fork", "eve", "--net", "tap=x"]).expect_refusal("1 network interfaces");
    runtime.clade(&["run", "--kernel", "bare", "--mem", "32M", "--vsock", &vsock]).expect_refusal(&cid.to_string());
    assert_eq!((runtime.files(), runtime.names()), (before, names));
    assert_eq!(runtime.clade(&["resume", "eve", "--json"]).json()["state"], "running", "the parent runs on");

    // The balloon has no driver: its target is as requested, and no guest answers.
    let balloon = runtime.clade(&["balloon", "eve", "--target", "8M", "--json"]).json();
    assert_eq!((&balloon["target_mib"], &balloon["actual_mib"]), (&json!(8.0), &json!(0.0)), "{balloon}");
    assert_eq!((&balloon["answered"], &balloon["guest"]), (&json!(false), &Value::Null), "{balloon}");
    runtime.clade(&["balloon", "eve", "--target", "32M"]).expect_refusal("32 MiB");
    assert_eq!(runtime.http("POST", "/v1/vms/eve/balloon", r#"{"target":1}"#).0, 400);
    for name in ["eve", "eve-1", "eve-2", "eve-3"] {
        assert_eq!(runtime.clade(&["stop", name]).code, Some(0));
    }
    assert_eq!(runtime.ended(), Some(0));
    assert_eq!(runtime.files(), BTreeSet::new(), "sockets and locks are gone");

    runtime.start("plain");
    runtime.clade(&["balloon", "plain"]).expect_refusal("balloon");
    runtime.clade(&["fork", "plain", "--vsock", "cid=77"]).expect_refusal("77");
}
