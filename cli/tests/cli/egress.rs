//! Egress rules: of a VM, and of all its descendants.

use clade_test_support::TapName;
use serde_json::Value;

use crate::metrics::full_scrape;
use crate::supervisor::Supervised;
use crate::tool::{expect_problem, kvm, stem, taps};

/// Returns the rules of a VM's devices, which are the same: layers separated by semicolons, and
/// rules by commas.
fn rules(all: &Supervised, name: &str) -> String {
    let (status, vm) = all.http("GET", &format!("/v1/vms/{name}"), "");
    assert_eq!(status, 200, "{vm}");
    let of_net = |net: &Value| {
        let layers = net["egress"].as_array().cloned().unwrap_or_default();
        let rules = |layer: &Value| {
            let rules = layer.as_array().unwrap().iter();
            rules.map(|rule| rule["rule"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join(",")
        };
        layers.iter().map(rules).collect::<Vec<_>>().join(";")
    };
    let nets: Vec<String> = vm["nets"].as_array().unwrap().iter().map(of_net).collect();
    assert!(nets.iter().all(|net| *net == nets[0]), "{vm}");
    nets[0].clone()
}

#[test]
fn egress_rules_are_inherited_and_a_child_only_narrows_them() {
    if !kvm() || !taps() {
        return;
    }
    let all = Supervised::start("0");
    let name = TapName::take();
    let stem = stem(&name);
    let nets = [format!("tap={stem}%d"), format!("tap={stem}%d")];
    let web = ["--egress", "deny:10.0.0.5", "--egress", "allow:10.0.0.0/8:80-90/tcp"];
    all.boot("web", &[&["--net", &nets[0], "--net", &nets[1]], &web[..]].concat());
    let parents = "deny:10.0.0.5/32,allow:10.0.0.0/8:80-90/tcp";
    all.fork(&["web", "--name", "same"]);
    all.fork(&["web", "--name", "less", "--egress", "deny:10.1.0.0/16"]);
    all.fork(&["less", "--name", "least", "--egress", "allow:10.2.0.0/16"]);
    assert_eq!(all.runtime.clade(&["checkpoint", "less", "held"]).code, Some(0));
    let body = r#"{"name": "of-held", "paused": true, "egress": ["allow:[fd00::/8]:443"]}"#;
    assert_eq!(all.http("POST", "/v1/checkpoints/held/fork", body).0, 200);
    let saved = all.runtime.dir().join("saved");
    let saved = saved.to_str().unwrap();
    all.runtime.clade(&["snapshot", "less", saved, "--json"]).json();
    for (name, more) in [("restored", &[][..]), ("tight", &["--egress", "deny:0.0.0.0/0"])] {
        let restore = [&["restore", "-d", "--paused", saved, "--name", name], more].concat();
        let restored = all.runtime.clade(&restore);
        assert_eq!(restored.code, Some(0), "{restored:?}");
    }
    std::fs::remove_dir_all(saved).unwrap();
    all.runtime.clade(&["reset", "less", "--json"]).json();
    for (name, more) in [
        ("web", ""),
        ("same", ""),
        ("less", ";deny:10.1.0.0/16"),
        ("least", ";deny:10.1.0.0/16;allow:10.2.0.0/16"),
        ("of-held", ";deny:10.1.0.0/16;allow:[fd00::/8]:443"),
        ("restored", ";deny:10.1.0.0/16"),
        ("tight", ";deny:10.1.0.0/16;deny:0.0.0.0/0"),
    ] {
        assert_eq!(rules(&all, name), format!("{parents}{more}"), "{name}");
    }
    // A child's own rules are listed apart from its parent's, and replaced without them.
    let inherited =
        |name: &str| all.http("GET", &format!("/v1/vms/{name}"), "").1["nets"][1]["egress_inherited"].clone();
    assert_eq!(["web", "same", "less", "tight"].map(inherited), [0, 1, 1, 2]);
    let body = r#"{"egress": ["deny:10.4.0.0/16"], "keep": 1}"#;
    assert_eq!(all.http("POST", "/v1/vms/tight/network", body).0, 200);
    assert_eq!((rules(&all, "tight"), inherited("tight")), (format!("{parents};deny:10.4.0.0/16"), 1.into()));
    let more = ["network", "tight", "--egress", "deny:10.5.0.0/16", "--keep", "2"];
    assert_eq!(all.runtime.clade(&more).code, Some(0));
    assert_eq!(rules(&all, "tight"), format!("{parents};deny:10.4.0.0/16;deny:10.5.0.0/16"));
    let many = vec![r#""deny:10.3.0.0/16""#; 255].join(",");
    let (status, refused) = all.http("POST", "/v1/vms/tight/network", &format!(r#"{{"egress": [{many}], "keep": 1}}"#));
    assert!(status == 400 && refused["detail"].as_str().unwrap().contains("257 egress rules"), "{refused}");
    assert_eq!(all.http("POST", "/v1/vms/tight/network", r#"{"network": "open", "keep": 1}"#).0, 400);
    assert_eq!(all.http("POST", "/v1/vms/tight/network", r#"{"egress": [], "keep": 1}"#).0, 200);
    assert_eq!(rules(&all, "tight"), parents);
    // At run time they are replaced without a change of the network; and the other way round.
    let changed = all.runtime.clade(&["network", "least", "--egress", "allow:192.0.2.0/24", "--json"]).json();
    assert_eq!(changed["nets"][0]["network"], "open", "{changed}");
    assert_eq!(all.runtime.clade(&["network", "least", "closed"]).code, Some(0));
    assert_eq!(rules(&all, "least"), "allow:192.0.2.0/24");
    let (_, least) = all.http("POST", "/v1/vms/least/network", r#"{"egress": []}"#);
    assert_eq!((least["nets"][1]["network"].as_str(), rules(&all, "least")), (Some("closed"), String::new()));
    assert_eq!(all.runtime.clade(&["network", "same", "open", "--no-egress"]).code, Some(0));
    assert_eq!((rules(&all, "same").as_str(), rules(&all, "web").as_str()), ("", parents));
    let dropped = full_scrape(&all).value("clade_vm_network_egress_dropped_total", &[("vm", "web")]);
    assert_eq!(dropped, Some(0.0), "it is paused");
    // An invalid rule is refused by its text, without a change.
    let (status, refused) = all.http("POST", "/v1/vms/web/network", r#"{"egress": ["allow:example.com"]}"#);
    expect_problem(&refused, status);
    assert!(status == 400 && refused["detail"].as_str().unwrap().contains("example.com"), "{refused}");
    let (status, refused) = all.http("POST", "/v1/vms/web/network", "{}");
    expect_problem(&refused, status);
    assert_eq!(status, 400, "{refused}");
    for of in [&["fork", "web"][..], &["network", "web"], &["run", "--kernel", "bare", "--net", "tap=x"]] {
        let refused = all.runtime.clade(&[of, &["--egress", "allow:10.0.0.1/8"]].concat());
        assert!(refused.code == Some(2) && refused.stderr.contains("10.0.0.1/8"), "{refused:?}");
    }
    let many = vec![r#""deny:10.3.0.0/16""#; 255].join(",");
    let (status, refused) = all.http("POST", "/v1/vms/web/fork", &format!(r#"{{"egress": [{many}]}}"#));
    expect_problem(&refused, status);
    assert!(status == 400 && refused["detail"].as_str().unwrap().contains("257 egress rules"), "{refused}");
    assert_eq!(rules(&all, "web"), parents);
    assert_eq!(all.runtime.clade(&["rm", "held"]).code, Some(0));
    all.end();
}
