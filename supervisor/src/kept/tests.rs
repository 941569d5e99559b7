use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use super::*;

pub(crate) fn record(name: &str) -> KeptRecord {
    record_of(name, &[])
}

fn record_of(name: &str, chain: &[DataId]) -> KeptRecord {
    let info = CheckpointInfo {
        name: name.to_owned(),
        vm: Some("web".to_owned()),
        snapshot: None,
        generation: 1,
        cpus: 1,
        mib: 64,
        network: Some(Link::Closed),
        age_s: 5.0,
        descriptors: 7,
        pause_us: 300.0,
        forked: None,
        ahead: clade_api::AheadInfo::default(),
        kept: false,
        detached: None,
    };
    let bounds = Bounds { memory_mib: Some(512), cpus: Some(0.5) };
    KeptRecord::of(
        info,
        Labels::of(&["tier=web".parse().unwrap()]).unwrap(),
        bounds,
        (chain.to_vec(), ChainBytes::default()),
    )
}

fn kept(dir: &KeptDir, name: &str) -> Vec<DataId> {
    kept_on(dir, name, &[])
}

fn kept_on(dir: &KeptDir, name: &str, base: &[DataId]) -> Vec<DataId> {
    let chain = dir.prepare(name, base).unwrap();
    fs::create_dir(dir.snapshot(name, &chain)).unwrap();
    dir.commit(name, &record_of(name, &chain)).unwrap();
    chain
}

/// Opens the directory as the next supervisor does. Returns names with and without records.
fn reopened(dir: KeptDir) -> (KeptDir, Vec<String>, Vec<String>) {
    let root = dir.root.clone();
    drop(dir);
    let (dir, Found { records, unreadable }) = KeptDir::open(&root).unwrap();
    (dir, records.into_keys().collect(), unreadable.into_keys().collect())
}

/// The data that is there.
fn data(dir: &KeptDir) -> BTreeSet<String> {
    let entries = fs::read_dir(dir.root().join(DATA)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_checkpoint_is_kept_from_its_record_on_until_it_is_removed() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("deep/checkpoints");
    let (dir, found) = KeptDir::open(&root).unwrap();
    assert!(found == Found::default() && !root.exists(), "a missing directory has none, and is not made");
    let chain = dir.prepare("base", &[]).unwrap();
    fs::create_dir(dir.snapshot("base", &chain)).unwrap();
    let (dir, names, _) = reopened(dir);
    assert!(names.is_empty() && !dir.of("base").exists(), "an incomplete checkpoint is none");
    assert!(!dir.data(&chain[0]).exists(), "and its data is needed by none");
    kept(&dir, "base");
    kept(&dir, "record.json");
    let again = dir.prepare("base", &[]).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    drop(dir);
    let (dir, found) = KeptDir::open(&root).unwrap();
    assert_eq!(found.records.keys().collect::<Vec<_>>(), ["base", "record.json"]);
    let read = &found.records["base"];
    assert_eq!((read.labels.text().as_str(), read.vm(), read.network()), ("tier=web", Some("web"), Some(Link::Closed)));
    assert_eq!(read.bounds, Bounds { memory_mib: Some(512), cpus: Some(0.5) });
    let shown = read.info();
    assert!(shown.kept && shown.age_s >= 5.0 && shown.age_s < 3600.0, "{shown:?}");
    assert_eq!((shown.name.as_str(), shown.mib, shown.descriptors), ("base", 64, 0));
    dir.remove("base").unwrap();
    dir.remove("base").unwrap();
    let (dir, names, _) = reopened(dir);
    assert_eq!(names, ["record.json"]);
    assert_eq!(fs::read_dir(dir.root()).unwrap().count(), 2, "no files of the other are left");
    assert_eq!(data(&dir).len(), 1);
}

#[test]
fn unreadable_records_take_their_names_and_cost_no_other_checkpoint() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = KeptDir::open(scratch.path()).unwrap().0;
    ["good", "cut", "other", "dir"].iter().for_each(|name| drop(kept(&dir, name)));
    let record = |name: &str| scratch.path().join(name).join(RECORD);
    let whole = fs::read(record("cut")).unwrap();
    fs::write(record("cut"), &whole[..whole.len() / 2]).unwrap();
    // Of another name: a copied directory would hide the checkpoint of that name.
    fs::copy(record("good"), record("other")).unwrap();
    fs::remove_file(record("dir")).unwrap();
    fs::create_dir(record("dir")).unwrap();
    fs::create_dir(scratch.path().join(format!("{GONE}old-0"))).unwrap();
    fs::create_dir(scratch.path().join(".clade-overlays")).unwrap();
    // A checkpoint in a subdirectory is not an incomplete one.
    fs::create_dir_all(scratch.path().join("moved/good")).unwrap();
    let (dir, names, unreadable) = reopened(dir);
    assert_eq!(
        (names, unreadable),
        (vec!["good".to_owned()], ["cut", "dir", "moved", "other"].map(str::to_owned).to_vec())
    );
    assert!(scratch.path().join("moved/good").exists());
    for name in ["cut", "dir", "other"] {
        assert!(dir.prepare(name, &[]).is_err() && dir.of(name).exists(), "{name}: its files stay");
    }
    // The unreadable records may need any data.
    dir.remove("good").unwrap();
    assert_eq!(data(&dir).len(), 4);
    assert!(!scratch.path().join(format!("{GONE}old-0")).exists());
    assert!(scratch.path().join(".clade-overlays").exists(), "children's overlays are there");
}

#[test]
fn the_directory_is_its_owners_alone_and_one_supervisors() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("checkpoints");
    let dir = KeptDir::open(&root).unwrap().0;
    kept(&dir, "base");
    for path in [root.clone(), root.join("base")] {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700, "{}", path.display());
    }
    let half = dir.prepare("half", &[]).unwrap();
    let second = KeptDir::open(&root).unwrap_err();
    assert_eq!(second.kind(), ErrorKind::WouldBlock, "{second}");
    assert!(dir.data(&half[0]).exists(), "another's checkpoint is no leftover");
    drop(dir);
    fs::set_permissions(&root, PermissionsExt::from_mode(0o777)).unwrap();
    assert_eq!(KeptDir::open(&root).unwrap_err().kind(), ErrorKind::PermissionDenied);
}

/// The worker that writes a snapshot may make directories.
#[test]
fn nested_directories_end_no_supervisor() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("checkpoints");
    let dir = KeptDir::open(&root).unwrap().0;
    let of = dir.prepare("shallow", &[]).unwrap();
    fs::create_dir_all(dir.data(&of[0]).join("a/b/c")).unwrap();
    fs::write(dir.data(&of[0]).join("a/b/c/file"), "x").unwrap();
    std::os::unix::fs::symlink(scratch.path(), dir.data(&of[0]).join("link")).unwrap();
    dir.remove("shallow").unwrap();
    assert_eq!((fs::read_dir(&root).unwrap().count(), data(&dir).len()), (1, 0));
    let of = dir.prepare("deep", &[]).unwrap();
    let mut at = File::open(dir.data(&of[0])).unwrap();
    for _ in 0..4_000 {
        rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
        at = openat(&at, "d", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap().into();
    }
    // A function that calls itself at each level overflows this stack.
    let removed = move || {
        dir.remove("deep").unwrap();
        reopened(dir)
    };
    let removed = std::thread::Builder::new().stack_size(512 << 10).spawn(removed).unwrap();
    let (dir, names, unreadable) = removed.join().unwrap();
    assert!(names.is_empty() && unreadable.is_empty());
    // Its name is free all the same.
    kept(&dir, "deep");
    // As a shell would, for the test's own directory.
    let is_gone = |entry: &fs::DirEntry| entry.file_name().to_str().unwrap().starts_with(GONE);
    let gone = fs::read_dir(&root).unwrap().flatten().find(is_gone).unwrap();
    let removed = std::process::Command::new("rm").arg("-rf").arg(gone.path()).status().unwrap();
    assert!(removed.success());
}

#[test]
fn two_first_checkpoints_at_once_are_both_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = KeptDir::open(&scratch.path().join("checkpoints")).unwrap().0;
    thread::scope(|threads| {
        for name in ["one", "two", "three", "four"] {
            let dir = &dir;
            threads.spawn(move || drop(kept(dir, name)));
        }
    });
    assert_eq!(reopened(dir).1, ["four", "one", "three", "two"]);
}

#[test]
fn data_stays_until_no_checkpoint_builds_on_it() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("checkpoints");
    let dir = KeptDir::open(&root).unwrap().0;
    let first = kept(&dir, "first");
    let second = kept_on(&dir, "second", &first);
    let third = kept_on(&dir, "third", &second);
    assert_eq!(third[1..], second);
    assert_eq!(dir.parents(&third), [dir.data(&second[0]), dir.data(&first[0])]);
    dir.remove("first").unwrap();
    dir.remove("second").unwrap();
    assert_eq!(data(&dir).len(), 3);
    // One that is being written needs its base too.
    let fourth = dir.prepare("fourth", &second).unwrap();
    dir.remove("third").unwrap();
    assert_eq!((fourth.len(), data(&dir).len()), (3, 3));
    dir.commit("fourth", &record_of("fourth", &fourth)).unwrap();
    let (dir, names, _) = reopened(dir);
    assert_eq!((names, data(&dir).len()), (vec!["fourth".to_owned()], 3));
    // Removed data is not a base.
    assert_eq!(dir.prepare("fifth", &third).unwrap().len(), 1);
    // A record of data somewhere else is refused.
    let record = root.join("fourth").join(RECORD);
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace(first[0].as_str(), "../../../../etc")).unwrap();
    let (dir, names, unreadable) = reopened(dir);
    assert_eq!((names.len(), unreadable), (0, vec!["fourth".to_owned()]));
    fs::write(&record, text).unwrap();
    let (dir, ..) = reopened(dir);
    dir.remove("fourth").unwrap();
    assert!(data(&dir).is_empty());
}

#[test]
fn data_that_cannot_be_put_away_costs_no_other_its_removal() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("checkpoints");
    let dir = KeptDir::open(&root).unwrap().0;
    let first = kept(&dir, "first");
    let second = kept_on(&dir, "second", &first);
    let third = kept_on(&dir, "third", &second);
    dir.remove("first").unwrap();
    dir.remove("second").unwrap();
    // No directory takes the place of a file.
    let taken = root.join(format!("{GONE}{}-0", second[0].as_str()));
    fs::write(&taken, "").unwrap();
    dir.remove("third").unwrap();
    assert_eq!(data(&dir), BTreeSet::from([second[0].as_str().to_owned()]));
    let put_away = |id: &DataId| root.join(format!("{GONE}{}-0", id.as_str())).exists();
    assert!(!put_away(&first[0]) && !put_away(&third[0]), "they are removed");
    fs::remove_file(&taken).unwrap();
    kept(&dir, "later");
    dir.remove("later").unwrap();
    assert!(data(&dir).is_empty());
    // A directory that an earlier supervisor could not remove keeps its name.
    let left = root.join(format!("{GONE}again-0"));
    fs::create_dir_all(left.join("x")).unwrap();
    kept(&dir, "again");
    dir.remove("again").unwrap();
    assert!(left.exists() && !root.join("again").exists());
}

/// A supervisor that was killed while it wrote a checkpoint, beside others.
#[test]
fn incomplete_checkpoints_cost_no_other_its_data() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("checkpoints");
    let dir = KeptDir::open(&root).unwrap().0;
    let base = kept(&dir, "base");
    kept_on(&dir, "next", &base);
    dir.remove("base").unwrap();
    let half = dir.prepare("half", &base).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    let (dir, names, unreadable) = reopened(dir);
    assert_eq!((names, unreadable.len()), (vec!["next".to_owned()], 0));
    assert_eq!(data(&dir).len(), 2, "the base's and the next one's");
    assert!(!data(&dir).contains(half[0].as_str()) && !root.join("empty").exists());
    // Beside a record that cannot be read: data from before it stays, new data goes.
    kept(&dir, "later");
    fs::write(dir.of("later").join(RECORD), "cut").unwrap();
    let half = dir.prepare("half", &base).unwrap();
    let (dir, names, unreadable) = reopened(dir);
    assert_eq!((names, unreadable), (vec!["next".to_owned()], vec!["later".to_owned()]));
    assert_eq!(data(&dir).len(), 4, "nothing is known of {half:?}");
    let failed = dir.prepare("failed", &base).unwrap();
    dir.remove("failed").unwrap();
    assert!(failed.len() == 2 && data(&dir).len() == 4);
    dir.remove("next").unwrap();
    assert_eq!(data(&dir).len(), 4);
}

/// The file system with the directory is mounted after the supervisor's start.
#[test]
fn data_that_appears_later_is_not_removed() {
    let scratch = tempfile::tempdir().unwrap();
    let (root, away) = (scratch.path().join("checkpoints"), scratch.path().join("away"));
    kept(&KeptDir::open(&root).unwrap().0, "base");
    fs::rename(&root, &away).unwrap();
    let (dir, found) = KeptDir::open(&root).unwrap();
    assert_eq!(found, Found::default());
    fs::rename(&away, &root).unwrap();
    assert_eq!(dir.prepare("base", &[]).unwrap_err().kind(), ErrorKind::AlreadyExists);
    kept(&dir, "new");
    assert_eq!(data(&dir).len(), 2);
    dir.remove("new").unwrap();
    assert_eq!(reopened(dir).1, ["base"]);
}

#[test]
fn chains_grow_to_three_times_a_full_one_at_most() {
    let full = ChainBytes { full: 1 << 30, all: 1 << 30 };
    assert!(full.may_grow());
    let (mut chain, mut most) = (full, 0);
    while chain.may_grow() {
        // All memory has changed.
        chain = chain.with(full.full);
        most = chain.all;
    }
    assert_eq!(most, 3 << 30);
    assert!(ChainBytes { full: 4096, all: 15 << 20 }.may_grow(), "small ones may");
    assert!(!ChainBytes { full: 4096, all: 17 << 20 }.may_grow());
    assert!(!ChainBytes::default().may_grow(), "of an earlier version");
}

/// The data of an earlier version is beside its record.
#[test]
fn checkpoints_of_an_earlier_version_stay_usable() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = KeptDir::open(scratch.path()).unwrap().0;
    kept(&dir, "base");
    let record = dir.of("base").join(RECORD);
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("chain").unwrap();
    fs::write(&record, json.to_string()).unwrap();
    fs::create_dir_all(dir.of("base").join("data/snapshot")).unwrap();
    let root = dir.root.clone();
    drop(dir);
    let (dir, found) = KeptDir::open(&root).unwrap();
    let chain = found.records["base"].chain();
    assert!(chain.is_empty() && dir.parents(chain).is_empty());
    assert_eq!(dir.snapshot("base", chain), dir.of("base").join("data/snapshot"));
    dir.remove("base").unwrap();
    assert!(!root.join("base").exists() && data(&dir).is_empty());
}
