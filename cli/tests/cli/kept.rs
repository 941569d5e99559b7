//! Checkpoints that are kept on disk outlive their supervisor.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use clade_guests::abi::disk::What;
use clade_snapshot::format::Manifest;
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

/// The directory of the runtime directory's checkpoints.
fn kept_dir(all: &Supervised) -> PathBuf {
    let dirs: Vec<_> = fs::read_dir(all.runtime.kept()).unwrap().flatten().collect();
    let [dir] = dirs.as_slice() else { panic!("{dirs:?}") };
    dir.path()
}

/// The directories of the data that a kept checkpoint consists of, its own first.
fn data_of(all: &Supervised, name: &str) -> Vec<PathBuf> {
    let dir = kept_dir(all);
    let record: Value = serde_json::from_slice(&fs::read(dir.join(name).join("record.json")).unwrap()).unwrap();
    let chain = record["chain"].as_array().unwrap();
    chain.iter().map(|id| dir.join(".data").join(id.as_str().unwrap())).collect()
}

/// The number of directories of data.
fn data_count(all: &Supervised) -> usize {
    fs::read_dir(kept_dir(all).join(".data")).unwrap().count()
}

/// Bytes on the disk of a checkpoint's own data.
fn own_bytes(all: &Supervised, name: &str) -> u64 {
    let files = fs::read_dir(data_of(all, name)[0].join("snapshot")).unwrap().flatten();
    files.map(|file| file.metadata().unwrap().blocks() * 512).sum()
}

fn keep(all: &Supervised, vm: &str, name: &str) {
    let taken = all.runtime.clade(&["checkpoint", vm, name, "--keep", "--json"]).json();
    assert_eq!(taken["kept"], true, "{taken}");
}

fn remove(all: &Supervised, name: &str) {
    assert_eq!(all.runtime.clade(&["rm", name]).code, Some(0));
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

/// The process that writes a snapshot has the directory that the snapshot is in.
#[test]
fn a_link_in_the_place_of_a_kept_snapshot_is_not_followed() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    all.put("web", 1, 11);
    keep(&all, "web", "base");
    let own = data_of(&all, "base").remove(0).join("snapshot");
    let aside = all.runtime.kept().join("aside");
    restart(&mut all);
    fs::rename(&own, &aside).unwrap();
    std::os::unix::fs::symlink(&aside, &own).unwrap();
    let refused = all.runtime.clade(&["fork", "base"]);
    assert!(refused.code != Some(0) && refused.stderr.contains("snapshot"), "{refused:?}");
    assert_eq!(all.runtime.names(), ["web"]);
    fs::remove_file(&own).unwrap();
    fs::rename(&aside, &own).unwrap();
    assert_eq!(all.fork(&["base", "--name", "first"]), ["first"]);
    assert_eq!(all.word("first", 1), 11);
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
    let manifest = data_of(&all, "base")[0].join("snapshot/manifest.json");
    let whole = fs::read(&manifest).unwrap();
    fs::write(&manifest, &whole[..whole.len() / 2]).unwrap();
    all.runtime.clade(&["fork", "base"]).expect_refusal("manifest");
    assert_eq!(listed(&all), ["base kept closed"]);
    fs::write(&manifest, &whole).unwrap();
    assert_eq!(all.fork(&["base"]), ["base-1"]);
    all.runtime.clade(&["rm", "base", "--json"]).json();
    assert!(!manifest.exists() && !kept_dir(&all).join("base").exists());
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

/// A later checkpoint has the pages that changed since the nearest kept one of its line.
#[test]
fn later_checkpoints_of_a_line_have_only_what_changed() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    (0..1_000).step_by(100).for_each(|page| all.put("web", page, 1 + page));
    keep(&all, "web", "first");
    all.put("web", 100, 7);
    keep(&all, "web", "second");
    // A child of a kept checkpoint, and a child of the VM.
    all.fork(&["first", "--name", "of-first"]);
    all.put("of-first", 200, 8);
    keep(&all, "of-first", "third");
    all.fork(&["web", "--name", "of-web"]);
    all.put("of-web", 300, 9);
    keep(&all, "of-web", "fourth");
    let chain = |all: &Supervised, name: &str| data_of(all, name).len();
    assert_eq!(["first", "second", "third", "fourth"].map(|name| chain(&all, name)), [1, 2, 2, 3]);
    let [first, second, third, fourth] = ["first", "second", "third", "fourth"].map(|name| own_bytes(&all, name));
    for later in [second, third, fourth] {
        assert!(later + (8 << 12) < first, "{first} bytes in full, {later} on another");
    }
    // Copies build on copies.
    let detached = |name: &str, page: u64| {
        all.put("of-web", page, 9);
        all.runtime.clade(&["checkpoint", "of-web", name, "--keep", "--detach", "--json"]).json();
        own_bytes(&all, name)
    };
    let copies = [detached("copy", 500), detached("next-copy", 600)];
    assert_eq!([chain(&all, "copy"), chain(&all, "next-copy")], [1, 2]);
    assert!(copies[1] + (8 << 12) < copies[0], "{copies:?}");
    remove(&all, "copy");
    all.fork(&["next-copy", "--name", "of-copy"]);
    all.put("of-copy", 0, 12);
    keep(&all, "of-copy", "after-copy");
    remove(&all, "next-copy");
    assert_eq!(chain(&all, "after-copy"), 3);
    // One that was taken before, and is kept later.
    all.runtime.clade(&["checkpoint", "web", "late", "--json"]).json();
    all.put("web", 400, 10);
    keep(&all, "web", "fifth");
    all.runtime.clade(&["keep", "late", "--json"]).json();
    assert_eq!([chain(&all, "fifth"), chain(&all, "late")], [3, 3], "both on the second");
    let full = all.runtime.clade(&["checkpoint", "web", "whole", "--keep", "--full", "--json"]).json();
    assert_eq!((full["kept"].as_bool(), chain(&all, "whole")), (Some(true), 1));
    remove(&all, "whole");
    all.runtime.clade(&["checkpoint", "web", "whole", "--json"]).json();
    assert_eq!(all.runtime.clade(&["keep", "whole", "--full", "--json"]).json()["kept"], true);
    assert_eq!(chain(&all, "whole"), 1);
    remove(&all, "whole");
    let wrong = [("/v1/vms/web/checkpoint", r#"{"full":true}"#), ("/v1/checkpoints/first/keep", r#"{"full":1}"#)];
    for (path, body) in wrong {
        let refused = all.http("POST", path, body);
        assert_eq!(refused.0, 400, "{refused:?}");
    }

    // Removed from the middle: data stays as long as another needs it.
    remove(&all, "first");
    remove(&all, "second");
    assert_eq!(data_count(&all), 6 + 3);
    restart(&mut all);
    all.fork(&["after-copy", "--name", "of-copies"]);
    assert_eq!([0, 100, 300, 500, 600].map(|page| all.word("of-copies", page)), [12, 7, 9, 9, 9]);
    remove(&all, "after-copy");
    remove(&all, "fifth");
    remove(&all, "late");
    assert_eq!(data_count(&all), 4, "of the first, second, third and fourth");
    // The directory may be at another place by then.
    all.runtime.clade(&["serve", "--stop"]);
    let (here, there) = (all.runtime.kept(), all.runtime.kept().with_extension("moved"));
    fs::rename(&here, &there).unwrap();
    std::os::unix::fs::symlink(&there, &here).unwrap();
    assert_eq!(all.runtime.ended(), Some(143));
    all.serve("0");
    all.fork(&["fourth", "--name", "again"]);
    all.fork(&["third", "--name", "other"]);
    for (vm, words) in [("again", [1, 7, 201, 9]), ("other", [1, 101, 8, 301])] {
        assert_eq!([0, 100, 200, 300].map(|page| all.word(vm, page)), words, "{vm}");
    }
    // On the opened one.
    all.put("again", 0, 11);
    keep(&all, "again", "sixth");
    assert_eq!(chain(&all, "sixth"), 4);
    remove(&all, "third");
    remove(&all, "fourth");
    assert_eq!(data_count(&all), 4, "the first, second, fourth and sixth");
    restart(&mut all);
    all.fork(&["sixth", "--name", "last"]);
    assert_eq!([0, 100, 200, 300].map(|page| all.word("last", page)), [11, 7, 201, 9]);
    remove(&all, "sixth");
    assert_eq!(data_count(&all), 0);
    assert_eq!(all.word("last", 100), 7);
    fs::remove_file(&here).unwrap();
    fs::rename(&there, &here).unwrap();
    end(all);
}

#[test]
fn chains_are_bounded_and_a_damaged_base_costs_only_space() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    for at in 0..18 {
        all.put("web", at, 1 + at);
        keep(&all, "web", &format!("c{at}"));
    }
    let depths: Vec<usize> = (0..18).map(|at| data_of(&all, &format!("c{at}")).len()).collect();
    assert_eq!(depths, (1..=16).chain(1..=2).collect::<Vec<_>>());
    // The base's data is damaged: the next one is written in full.
    let data = data_of(&all, "c17")[0].join("snapshot");
    fs::rename(data.join("memory.index"), data.join("away")).unwrap();
    all.put("web", 20, 99);
    keep(&all, "web", "full");
    assert_eq!(data_of(&all, "full").len(), 1);
    restart(&mut all);
    all.runtime.clade(&["fork", "c17"]).expect_refusal("memory.index");
    all.fork(&["full", "--name", "full"]);
    all.fork(&["c15", "--name", "deep"]);
    for (vm, last) in [("full", 18), ("deep", 16)] {
        (0..last).for_each(|at| assert_eq!(all.word(vm, at), 1 + at, "{vm}"));
    }
    end(all);
}

/// The processes of children read all files of a checkpoint: none has what was withheld from the VM.
#[test]
fn a_checkpoint_without_secrets_builds_on_none_with_them() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    let file = all.runtime.dir().with_extension("secret");
    fs::write(&file, "a secret of sixteen bytes and more").unwrap();
    all.boot("web", &["--secret", file.to_str().unwrap()]);
    fs::remove_file(&file).unwrap();
    keep(&all, "web", "base");
    all.put("web", 1, 1);
    keep(&all, "web", "next");
    all.fork(&["base", "--name", "bare", "--without-secrets"]);
    all.put("bare", 1, 2);
    keep(&all, "bare", "bare");
    all.put("bare", 2, 3);
    keep(&all, "bare", "bare-next");
    let chains = ["base", "next", "bare", "bare-next"].map(|name| data_of(&all, name).len());
    assert_eq!(chains, [1, 2, 1, 2]);
    // A forged parent: another checkpoint's data is not read, wherever the manifest leads.
    let manifest = |name: &str| data_of(&all, name)[0].join("snapshot/manifest.json");
    let (file, other) = (manifest("bare-next"), manifest("base"));
    let whole = fs::read(&file).unwrap();
    let mut forged = Manifest::decode(&whole).unwrap();
    let parent = forged.parent.as_mut().unwrap();
    assert!(parent.path.starts_with("../../"), "{parent:?}");
    parent.id = Manifest::decode(&fs::read(&other).unwrap()).unwrap().id;
    parent.path = other.parent().unwrap().to_str().unwrap().to_owned();
    restart(&mut all);
    fs::write(&file, forged.encode()).unwrap();
    all.runtime.clade(&["fork", "bare-next"]).expect_refusal("--parents");
    fs::write(&file, whole).unwrap();
    all.fork(&["bare-next", "--name", "again"]);
    assert_eq!([1, 2].map(|page| all.word("again", page)), [2, 3]);
    end(all);
}

/// A random history of VMs and kept checkpoints against a model of words.
#[test]
fn kept_checkpoints_have_their_words_in_any_history() {
    if !kvm() {
        return;
    }
    const PAGES: usize = 8;
    const FAR: u64 = 97;
    let seed = std::env::var("CLADE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    let mut random = seed;
    let mut below = move |most: usize| {
        random = u64::wrapping_add(u64::wrapping_mul(random, 6_364_136_223_846_793_005), 1_442_695_040_888_963_407);
        (random >> 33) as usize % most
    };
    let mut all = Supervised::start("0");
    all.boot("v0", &[]);
    let mut vms = vec![("v0".to_owned(), [0_u64; PAGES])];
    let mut kept: Vec<(String, [u64; PAGES])> = Vec::new();
    let read = |all: &Supervised, vm: &str| std::array::from_fn(|page| all.word(vm, page as u64 * FAR));
    for step in 1..=60 {
        let at = below(vms.len());
        let name = format!("n{step}");
        match below(10) {
            0..=3 => {
                let page = below(PAGES);
                all.put(&vms[at].0, page as u64 * FAR, step);
                vms[at].1[page] = step;
            }
            4..=6 => {
                keep(&all, &vms[at].0, &name);
                kept.push((name, vms[at].1));
            }
            7 if !kept.is_empty() => {
                let at = below(kept.len());
                remove(&all, &kept.swap_remove(at).0);
            }
            8 if !kept.is_empty() => {
                let at = below(kept.len());
                all.fork(&[&kept[at].0, "--name", &name]);
                assert_eq!(read(&all, &name), kept[at].1, "step {step}, seed {seed}");
                vms.push((name, kept[at].1));
            }
            _ if step % 4 == 0 => restart(&mut all),
            _ => {
                all.fork(&[&vms[at].0, "--name", &name]);
                vms.push((name, vms[at].1));
            }
        }
    }
    restart(&mut all);
    for (name, words) in &kept {
        let child = format!("last-{name}");
        all.fork(&[name, "--name", &child]);
        assert_eq!(read(&all, &child), *words, "{name}, seed {seed}");
    }
    let depths: Vec<usize> = kept.iter().map(|(name, _)| data_of(&all, name).len()).collect();
    assert!(depths.iter().any(|depth| *depth > 1), "{depths:?}");
    kept.iter().for_each(|(name, _)| remove(&all, name));
    assert_eq!(data_count(&all), 0);
    end(all);
}

/// Disks of a chain: each checkpoint has the clusters at its instant.
#[test]
fn disks_of_later_checkpoints_build_on_earlier_ones() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut all = Supervised::start("0");
    all.boot("web", &["--disk", image.to_str().unwrap()]);
    BareVm::of(&all.runtime, "web").open_disk();
    BareVm::of(&all.runtime, "web").disk(What::Write, 0, 512, 1);
    keep(&all, "web", "base");
    BareVm::of(&all.runtime, "web").disk(What::Write, 64, 16, 2);
    keep(&all, "web", "next");
    assert_eq!(data_of(&all, "next").len(), 2);
    assert!(own_bytes(&all, "next") + (128 << 10) < own_bytes(&all, "base"));
    remove(&all, "base");
    restart(&mut all);
    all.fork(&["next", "--name", "again"]);
    let vm = BareVm::of(&all.runtime, "again");
    vm.disk(What::Verify, 0, 64, 1);
    vm.disk(What::Verify, 64, 16, 2);
    vm.disk(What::Verify, 80, 432, 1);
    drop(vm);
    end(all);
}

/// A checkpoint that was written in full ends the line: later ones of its children build on none before it.
#[test]
fn nothing_builds_on_what_a_full_checkpoint_leaves_behind() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.put("web", 0, 1);
    keep(&all, "web", "before");
    all.put("web", 0, 2);
    all.runtime.clade(&["checkpoint", "web", "full", "--keep", "--full", "--json"]).json();
    all.fork(&["full", "--name", "child"]);
    remove(&all, "full");
    all.put("child", 1, 3);
    keep(&all, "child", "of-child");
    assert_eq!(data_of(&all, "of-child").len(), 1);
    // The VM itself too.
    all.put("web", 1, 4);
    keep(&all, "web", "after");
    assert_eq!(data_of(&all, "after").len(), 1);
    keep(&all, "web", "next");
    all.runtime.clade(&["keep", "next", "--full"]).expect_refusal("builds on others");
    // A rolled back VM does not descend from what it has left.
    all.runtime.clade(&["checkpoint", "web", "clean", "--json"]).json();
    all.put("web", 1, 5);
    all.runtime.clade(&["checkpoint", "web", "left", "--json"]).json();
    all.runtime.clade(&["rollback", "web", "clean", "--json"]).json();
    all.runtime.clade(&["keep", "left", "--json"]).json();
    keep(&all, "web", "back");
    assert_eq!(
        [data_of(&all, "left"), data_of(&all, "back")].map(|chain| chain[1..].to_vec()),
        [(); 2].map(|()| data_of(&all, "next"))
    );
    end(all);
}
