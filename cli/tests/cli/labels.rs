//! Labels: given, inherited, filtered by.

use crate::supervisor::Supervised;
use crate::tool::{Runtime, kvm};

fn listed(runtime: &Runtime, filters: &[&str]) -> Vec<String> {
    let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
    let args: Vec<&str> = ["ps", "--json"].into_iter().chain(filters).collect();
    let vms = runtime.clade(&args).json();
    vms.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn children_have_their_parents_labels_unless_they_are_given_others() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &["--label", "tier=front", "--label", "team=a"]);
    all.boot("plain", &[]);
    all.fork(&["web"]);
    all.runtime.clade(&["checkpoint", "web", "warm", "--json"]).json();
    all.fork(&["web", "--name", "other", "--label", "tier=back"]);
    all.stop("web");
    // Even when the parent has gone, and in the next generation.
    all.fork(&["warm"]);
    all.fork(&["web-1"]);
    assert_eq!(listed(&all.runtime, &["label=tier=front"]), ["warm-1", "web-1", "web-1-1"]);
    assert_eq!(listed(&all.runtime, &["label=tier=front", "label=team=a"]).len(), 3);
    assert_eq!(listed(&all.runtime, &["label=tier=back"]), ["other"]);
    assert_eq!(listed(&all.runtime, &["label=tier=back", "label=team=a"]), [""; 0], "others, not more");
    assert_eq!(listed(&all.runtime, &[]).len(), 5);
    let wide = all.runtime.clade(&["ps", "-o", "wide"]).stdout;
    assert!(wide.lines().any(|line| line.starts_with("web-1 ") && line.ends_with(" team=a,tier=front")), "{wide}");
    assert!(wide.lines().any(|line| line.starts_with("plain ") && line.ends_with(" -")), "{wide}");
    for (args, named) in [
        (&["fork", "plain", "--label", "a b=c"][..], "a b"),
        (&["fork", "plain", "--label", "none"], "none"),
        (&["ps", "--filter", "tier=front"], "tier=front"),
    ] {
        let refused = all.runtime.clade(args);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(named), "{refused:?}");
    }
    let (status, answer) = all.http("POST", "/v1/vms/plain/fork", r#"{"labels": {"-": "x"}}"#);
    assert_eq!(status, 400, "{answer}");
    all.end();
}
