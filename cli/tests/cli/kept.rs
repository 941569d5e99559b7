//! Checkpoints that are kept on disk outlive their supervisor.

use std::fs;

use clade_guests::abi::disk::What;
use serde_json::Value;

use crate::machine::BareVm;
use crate::supervisor::Supervised;
use crate::tool::kvm;

/// The checkpoints, as `name kept descriptors`.
fn listed(all: &Supervised) -> Vec<String> {
    let list = all.runtime.clade(&["checkpoints", "--json"]).json();
    let shown = |one: &Value| {
        let opened = if one["descriptors"].as_u64().unwrap() > 0 { "opened" } else { "closed" };
        let kept = if one["kept"].as_bool().unwrap() { "kept" } else { "held" };
        format!("{} {kept} {opened}", one["name"].as_str().unwrap())
    };
    list.as_array().unwrap().iter().map(shown).collect()
}

fn restart(all: &mut Supervised) {
    all.runtime.clade(&["serve", "--stop"]);
    assert_eq!(all.runtime.ended(), Some(143));
    all.serve("1");
}

/// Ends all, with the directory of kept checkpoints.
fn end(all: Supervised) {
    let _ = fs::remove_dir_all(all.runtime.kept());
    all.end();
}

#[test]
fn a_kept_checkpoint_is_there_for_later_supervisors() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &["--label", "tier=front"]);
    (0..3).for_each(|page| all.put("web", page, 10 + page));
    let taken = all.runtime.clade(&["checkpoint", "web", "base", "--keep", "--json"]).json();
    assert_eq!((&taken["kept"], &taken["vm"]), (&true.into(), &"web".into()), "{taken}");
    all.runtime.clade(&["checkpoint", "web", "lost", "--json"]).json();
    // A checkpoint may be kept later, too, and more than once.
    all.runtime.clade(&["checkpoint", "web", "later", "--json"]).json();
    for _ in 0..2 {
        assert_eq!(all.runtime.clade(&["keep", "later", "--json"]).json()["kept"], true);
    }
    all.runtime.clade(&["keep", "none"]).expect_refusal("none");
    // Written after both.
    all.put("web", 1, 99);
    assert_eq!(listed(&all), ["base kept opened", "later kept opened", "lost held opened"]);
    // From memory, as any other.
    assert_eq!(all.fork(&["base", "--name", "first"]), ["first"]);
    assert_eq!(all.word("first", 1), 11);

    // Killed, then ended in order. The VMs run on.
    all.runtime.crash();
    all.serve("1");
    assert_eq!(listed(&all), ["base kept closed", "later kept closed"]);
    assert_eq!(all.fork(&["later", "--name", "of-later"]), ["of-later"]);
    assert_eq!(all.word("of-later", 1), 11);
    all.stop("of-later");
    assert_eq!(all.runtime.clade(&["rm", "later"]).code, Some(0));
    restart(&mut all);
    assert_eq!(listed(&all), ["base kept closed"]);
    assert_eq!(all.runtime.names(), ["first", "web"]);
    let shown = all.runtime.clade(&["checkpoints"]).stdout;
    assert!(shown.contains("on disk") && shown.contains("web"), "{shown}");
    all.runtime.clade(&["checkpoint", "web", "base", "--keep"]).expect_refusal("base");
    all.runtime.clade(&["checkpoint", "web", "base"]).expect_refusal("base");

    assert_eq!(all.fork(&["base", "--count", "2"]), ["base-1", "base-2"]);
    assert_eq!(listed(&all), ["base kept opened"]);
    all.put("base-1", 0, 50);
    for (vm, words) in [("base-1", [50, 11, 12]), ("base-2", [10, 11, 12]), ("web", [10, 99, 12])] {
        assert_eq!([0, 1, 2].map(|page| all.word(vm, page)), words, "{vm}");
    }
    let found = all.runtime.clade(&["ps", "--filter", "label=tier=front", "--json"]).json();
    assert_eq!(found.as_array().unwrap().len(), 4, "children have the labels of the checkpoint: {found}");

    // Removed: from the disk too, and its children run on.
    let removed = all.runtime.clade(&["rm", "base", "--json"]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
    all.runtime.clade(&["fork", "base"]).expect_refusal("base");
    restart(&mut all);
    assert_eq!(listed(&all), [""; 0]);
    assert_eq!([0, 1, 2].map(|page| all.word("base-2", page)), [10, 11, 12]);
    assert_eq!(all.fork(&["base-2"]), ["base-2-1"]);
    assert_eq!(all.word("base-2-1", 2), 12);
    // The name is free again.
    all.runtime.clade(&["checkpoint", "base-2", "base", "--keep", "--json"]).json();
    end(all);
}

/// Two first forks of a checkpoint on disk are two children of one checkpoint.
#[test]
fn a_kept_checkpoint_is_opened_once() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    all.put("web", 0, 7);
    all.runtime.clade(&["checkpoint", "web", "base", "--keep", "--json"]).json();
    restart(&mut all);
    std::thread::scope(|threads| {
        let fork = |name: &'static str| {
            let all = &all;
            threads.spawn(move || assert_eq!(all.fork(&["base", "--name", name]), [name]))
        };
        let forks = ["one", "two", "three"].map(fork);
        forks.into_iter().for_each(|fork| fork.join().unwrap());
    });
    ["one", "two", "three"].iter().for_each(|vm| assert_eq!(all.word(vm, 0), 7));
    assert_eq!(listed(&all), ["base kept opened"]);
    // Prepared processes are for a checkpoint on disk too.
    restart(&mut all);
    let prepared = all.http("POST", "/v1/checkpoints/base/prepare", "{\"count\":1}");
    assert_eq!((prepared.0, prepared.1["prepared"].as_u64()), (200, Some(1)), "{prepared:?}");
    end(all);
}

#[test]
fn a_checkpoint_that_cannot_be_kept_leaves_nothing() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    // The directory cannot be made: a file is in its place.
    fs::write(all.runtime.kept(), "a file").unwrap();
    let refused = all.runtime.clade(&["checkpoint", "web", "base", "--keep"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("checkpoint \"base\" on the disk"), "{refused:?}");
    assert_eq!(listed(&all), [""; 0]);
    all.runtime.clade(&["checkpoint", "web", "base", "--json"]).json();
    all.runtime.clade(&["rm", "base", "--json"]).json();
    fs::remove_file(all.runtime.kept()).unwrap();
    // A damaged snapshot refuses its own forks, and is removed like any other.
    all.runtime.clade(&["checkpoint", "web", "base", "--keep", "--json"]).json();
    restart(&mut all);
    let dirs: Vec<_> = fs::read_dir(all.runtime.kept()).unwrap().flatten().collect();
    let [dir] = dirs.as_slice() else { panic!("{dirs:?}") };
    let manifest = dir.path().join("base/data/snapshot/manifest.json");
    let whole = fs::read(&manifest).unwrap();
    fs::write(&manifest, &whole[..whole.len() / 2]).unwrap();
    all.runtime.clade(&["fork", "base"]).expect_refusal("manifest");
    assert_eq!(listed(&all), ["base kept closed"]);
    fs::write(&manifest, &whole).unwrap();
    assert_eq!(all.fork(&["base"]), ["base-1"]);
    all.runtime.clade(&["rm", "base", "--json"]).json();
    assert!(!dir.path().join("base").exists());
    end(all);
}

/// A supervisor that a command started ends when it is idle, also with kept checkpoints.
#[test]
fn kept_checkpoints_keep_no_supervisor_running() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start_with("0", &["--until-idle"]);
    all.boot("web", &[]);
    all.put("web", 0, 3);
    all.runtime.clade(&["checkpoint", "web", "base", "--keep", "--json"]).json();
    all.stop("web");
    assert_eq!(all.runtime.ended(), Some(0));
    all.serve("0");
    assert_eq!(all.fork(&["base"]), ["base-1"]);
    assert_eq!(all.word("base-1", 0), 3);
    end(all);
}

/// Children's overlays stay where they are when the checkpoint is removed.
#[test]
fn disks_of_a_kept_checkpoint_are_its_childrens() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut all = Supervised::start("0");
    all.boot("web", &["--disk", image.to_str().unwrap()]);
    let vm = |name: &str| BareVm::of(&all.runtime, name);
    vm("web").open_disk();
    vm("web").disk(What::Write, 0, 96, 1);
    all.runtime.clade(&["checkpoint", "web", "base", "--keep", "--json"]).json();
    vm("web").disk(What::Write, 0, 96, 2);
    restart(&mut all);
    let vm = |name: &str| BareVm::of(&all.runtime, name);
    assert_eq!(all.fork(&["base"]), ["base-1"]);
    vm("base-1").disk(What::Verify, 0, 96, 1);
    vm("base-1").disk(What::Write, 32, 32, 3);
    all.runtime.clade(&["rm", "base", "--json"]).json();
    assert_eq!(all.fork(&["base-1"]), ["base-1-1"]);
    vm("base-1-1").disk(What::Verify, 0, 32, 1);
    vm("base-1-1").disk(What::Verify, 32, 32, 3);
    vm("web").disk(What::Verify, 0, 96, 2);
    end(all);
}
