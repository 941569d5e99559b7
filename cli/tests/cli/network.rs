//! Closed networks: by a fork, for all descendants, until they are opened.

use clade_test_support::TapName;
use serde_json::Value;

use crate::supervisor::Supervised;
use crate::tool::{expect_problem, kvm, stem, taps};

/// Returns whether the packets of a VM pass, for each device.
fn networks(all: &Supervised, name: &str) -> Vec<String> {
    let (status, vm) = all.http("GET", &format!("/v1/vms/{name}"), "");
    assert_eq!(status, 200, "{vm}");
    vm["nets"].as_array().unwrap().iter().map(|net| net["network"].as_str().unwrap().to_owned()).collect()
}

fn fork(all: &Supervised, of: &str, body: &str) -> (u16, Value) {
    all.http("POST", &format!("/v1/{of}/fork"), body)
}

#[test]
fn a_closed_network_is_inherited_until_it_is_opened() {
    if !kvm() || !taps() {
        return;
    }
    let all = Supervised::start("0");
    let name = TapName::take();
    let stem = stem(&name);
    let nets = [format!("tap={stem}%d"), format!("tap={stem}%d")];
    all.boot("web", &["--net", &nets[0], "--net", &nets[1]]);
    all.fork(&["web", "--name", "child", "--network", "off"]);
    all.fork(&["child"]);
    all.fork(&["child", "--name", "opened", "--network", "open"]);
    assert_eq!(fork(&all, "vms/web", r#"{"name": "api", "paused": true, "network": "closed"}"#).0, 200);
    assert_eq!(all.runtime.clade(&["checkpoint", "child", "held"]).code, Some(0));
    assert_eq!(all.runtime.clade(&["checkpoint", "web", "free"]).code, Some(0));
    for (of, name, body, networks_are) in [
        ("checkpoints/held", "of-held", "", "closed"),
        ("checkpoints/free", "of-free", "", "open"),
        ("checkpoints/free", "shut", r#", "network": "closed""#, "closed"),
        ("checkpoints/held", "wide", r#", "network": "open""#, "open"),
    ] {
        let body = format!(r#"{{"name": "{name}", "paused": true{body}}}"#);
        assert_eq!(fork(&all, of, &body).0, 200, "{name}");
        assert_eq!(networks(&all, name), [networks_are; 2], "{name}");
    }
    let saved = all.runtime.dir().join("saved");
    let saved = saved.to_str().unwrap();
    all.runtime.clade(&["snapshot", "child", saved, "--json"]).json();
    let restored = all.runtime.clade(&["restore", "-d", "--paused", saved, "--name", "restored"]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    std::fs::remove_dir_all(saved).unwrap();
    for (name, network) in [
        ("web", "open"),
        ("child", "closed"),
        ("child-1", "closed"),
        ("opened", "open"),
        ("api", "closed"),
        ("restored", "closed"),
    ] {
        assert_eq!(networks(&all, name), [network; 2], "{name}");
    }
    // Only the host opens and closes it, and a reset does not change that.
    let opened = all.runtime.clade(&["network", "child", "open", "--json"]).json();
    assert_eq!(opened["nets"][1]["network"], "open", "{opened}");
    assert_eq!(all.runtime.clade(&["network", "opened", "closed"]).code, Some(0));
    for name in ["child", "opened", "child-1"] {
        all.runtime.clade(&["reset", name, "--json"]).json();
    }
    let now = ["child", "opened", "child-1"].map(|name| networks(&all, name).concat());
    assert_eq!(now, ["openopen", "closedclosed", "closedclosed"]);
    assert_eq!(all.http("POST", "/v1/vms/child/network", r#"{"network": "closed"}"#).1["nets"][0]["network"], "closed");
    // Other values are refused by name.
    let (status, refused) = fork(&all, "vms/web", r#"{"network": "ajar"}"#);
    expect_problem(&refused, status);
    assert!(status == 400 && refused["detail"].as_str().unwrap().contains("ajar"), "{refused}");
    let refused = all.runtime.clade(&["network", "web", "ajar"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("ajar"), "{refused:?}");
    all.boot("lone", &[]);
    let (status, refused) = all.http("POST", "/v1/vms/lone/network", r#"{"network": "closed"}"#);
    expect_problem(&refused, status);
    assert_eq!((status, refused["type"].as_str()), (409, Some("urn:clade:no-device")), "{refused}");
    // A VM without a network device has nothing to close.
    all.fork(&["lone", "--network", "closed"]);
    for name in ["held", "free"] {
        assert_eq!(all.runtime.clade(&["rm", name]).code, Some(0));
    }
    all.end();
}
