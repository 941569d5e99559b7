use serde_json::json;

use super::*;

fn vm(name: &str, parent: Option<&str>, generation: u32, age_s: f64) -> VmStats {
    let histogram = json!({"count": 0, "sum_us": 0, "buckets": []});
    let layer = |file: &str, kib: u64| json!({"id": 1, "file": file, "home": "memory", "shown_pages": 2, "resident_kib": kib, "alone": null});
    serde_json::from_value(json!({
        "name": name, "pid": 1, "state": "running", "parent": parent, "generation": generation, "age_s": age_s,
        "memory": {
            "pages": {"absent": 0, "reference": 0, "shared": 256, "exclusive": 10, "pinned": 0},
            "private_kib": 1024, "alone_pages": 0, "unknown_pages": 0, "mappings": 1, "table_kib": 1,
            "layers": [layer("1:7", 2048), layer(&format!("1:{name}"), 4)],
        },
        "copies": {"guest": 0, "pin": 0, "adopt": 0, "freeze": 0, "freeze_pinned": 0, "freeze_ahead": 0},
        "pins": {"now": 0, "reading": 0, "locked": 0, "long": 0, "long_total": 0, "longest_s": 0.0},
        "pauses": {"fork": histogram, "snapshot": histogram, "reset": histogram},
    }))
    .unwrap()
}

fn ended(name: &str, parent: Option<&str>, generation: u32) -> EndedVm {
    serde_json::from_value(json!({
        "name": name, "stopped": clade_vmm::vm::StopReason::Reset, "reason": "reset", "parent": parent,
        "generation": generation, "age_s": 5.0, "ended_at": 1, "pid": 1, "console": "",
    }))
    .unwrap()
}

fn checkpoint(name: &str, vm: &str, generation: u32) -> CheckpointInfo {
    serde_json::from_value(json!({
        "name": name, "vm": vm, "generation": generation, "cpus": 1, "mib": 32, "age_s": 3.0, "descriptors": 1,
        "pause_us": 1.0,
    }))
    .unwrap()
}

fn names(node: &TreeNode) -> Vec<String> {
    let mut all = vec![node.name.clone()];
    node.children.iter().for_each(|child| all.extend(names(child)));
    all
}

#[test]
fn descent_goes_through_those_that_have_ended() {
    let vms = [
        vm("web", None, 0, 100.0),
        vm("web-10", Some("web"), 1, 50.0),
        vm("web-2", Some("web"), 1, 50.0),
        vm("deep", Some("gone"), 3, 20.0),
        vm("other", None, 0, 10.0),
    ];
    let records = [ended("gone", Some("web-2"), 2), ended("unrelated", Some("web"), 1)];
    let checkpoints = [checkpoint("warm", "web", 1), checkpoint("late", "lost", 2)];
    let clades = Known { vms: &vms, ended: &records, checkpoints: &checkpoints }.clades();
    let all: Vec<Vec<String>> = clades.iter().map(|clade| names(&clade.root)).collect();
    assert_eq!(all, [vec!["lost", "late"], vec!["other"], vec!["web", "warm", "web-2", "gone", "deep", "web-10"]]);
    let web = &clades[2];
    assert_eq!((web.vms, web.checkpoints, web.private_kib), (4, 1, 4096));
    assert_eq!((web.layers, web.layers_kib), (5, 2048 + 4 * 4), "a layer that all show counts once");
    let text = drawn(&clades);
    for line in ["├─ warm", "├─ web-2", "│  └─ gone", "│     └─ deep", "└─ web-10"] {
        assert!(text.lines().any(|drawn| drawn.starts_with(line)), "{line}:\n{text}");
    }
    assert!(text.contains("web: 4 VMs, 1 checkpoint, 4M private, 2M in 5 layers"), "{text}");
}

#[test]
fn a_vm_that_has_an_ancestors_name_by_now_is_not_it() {
    let vms = [vm("web", None, 0, 5.0), vm("old", Some("web"), 1, 50.0), vm("young", Some("web"), 1, 1.0)];
    let clades = Known { vms: &vms, ended: &[], checkpoints: &[] }.clades();
    let kinds: Vec<(NodeKind, Vec<String>)> =
        clades.iter().map(|clade| (clade.root.kind, names(&clade.root))).collect();
    let named = |names: [&str; 2]| names.map(String::from).to_vec();
    assert_eq!(kinds, [(NodeKind::Running, named(["web", "young"])), (NodeKind::Ended, named(["web", "old"]))]);
}

#[test]
fn names_that_go_in_a_circle_end() {
    let vms = [vm("a", Some("b"), 1, 5.0), vm("b", Some("a"), 1, 5.0)];
    let records = [ended("a", Some("b"), 1), ended("b", Some("a"), 1)];
    let clades = Known { vms: &vms, ended: &records, checkpoints: &[] }.clades();
    assert!(!clades.is_empty());
}
