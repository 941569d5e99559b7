//! Invalid chains.

use std::fs;
use std::path::{Path, PathBuf};

use clade_memory::{RamImage, Store};

use super::faults::Plan;
use super::support::*;
use crate::ParentDirs;
use crate::chain::MAX_DEPTH;
use crate::files::{FileOp, FileOps};
use crate::format::{Damage, Manifest, Parent};
use crate::*;

/// `a`, `b` on it, `c` on that, and their images; page 1 of each is another.
fn chain(store: &Store, dir: &Path) -> Vec<(SnapshotId, RamImage)> {
    let ram = born(&layout(), store);
    let mut made: Vec<(SnapshotId, RamImage)> = Vec::new();
    for (at, name) in ["a", "b", "c"].iter().enumerate() {
        put(&ram, 1, at as u8 + 1);
        put(&ram, 10 + at as u64, 7);
        let image = freeze(&ram);
        let before = at.checked_sub(1).map(|before| (dir.join(["a", "b"][before]), &made[before]));
        let base = before.as_ref().map(|(dir, (id, image))| (dir.as_path(), *id, image));
        let saved = Saving { base, ..Saving::default() }.save(&image, &dir.join(name)).unwrap();
        made.push((saved.id, image));
    }
    made
}

fn rewrite(dir: &Path, change: impl FnOnce(&mut Manifest)) {
    let path = dir.join("manifest.json");
    let mut manifest = Manifest::decode(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(&path, manifest.encode()).unwrap();
}

#[test]
fn parents_that_are_missing_or_others_are_refused_by_name() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    assert_eq!(Snapshot::open(&at("c"), &ParentDirs::siblings()).unwrap().depth(), 3);

    // Reordered: a stands where b should.
    fs::rename(at("b"), at("x")).unwrap();
    fs::rename(at("a"), at("b")).unwrap();
    let refused = Snapshot::open(&at("c"), &ParentDirs::siblings()).unwrap_err();
    let Error::Parent { source, .. } = &refused else { panic!("{refused:?}") };
    let found = matches!(**source, Error::WrongId { wanted, found, .. } if (wanted, found) == (made[1].0, made[0].0));
    assert!(found, "{refused:?}");
    fs::rename(at("b"), at("a")).unwrap();

    let refused = Snapshot::open(&at("c"), &ParentDirs::siblings()).unwrap_err();
    assert!(matches!(&refused, Error::Parent { parent, .. } if parent.ends_with("../b")), "{refused:?}");
    let shown = show(&at("c"), &ParentDirs::siblings()).unwrap();
    assert!(shown.broken.is_some_and(|broken| broken.contains("../b")) && shown.parents.is_empty());
    fs::rename(at("x"), at("b")).unwrap();

    // Damage of a parent is an error of the child.
    let state = fs::read(at("a").join("state")).unwrap();
    fs::write(at("a").join("state"), &state[1..]).unwrap();
    assert!(matches!(
        Snapshot::open(&at("c"), &ParentDirs::siblings()),
        Err(Error::Damaged { damage: Damage::Length { .. }, .. })
    ));
    fs::write(at("a").join("state"), &state).unwrap();
    verify(&at("c"), &ParentDirs::siblings()).unwrap();

    // Siblings move together.
    let other = scratch();
    for name in ["a", "b", "c"] {
        copy_dir(&at(name), &other.path().join(name));
    }
    assert_eq!(verify(&other.path().join("c"), &ParentDirs::siblings()).unwrap().snapshots, 3);
    let links: Vec<_> = show(&at("c"), &ParentDirs::siblings()).unwrap().parents.iter().map(|link| link.id).collect();
    assert_eq!(links, [made[1].0, made[0].0]);
}

fn dirs_in<const N: usize>(parent: &Path, names: [&str; N]) -> [PathBuf; N] {
    names.map(|name| {
        let dir = parent.join(name);
        fs::create_dir(&dir).unwrap();
        dir
    })
}

/// A hostile snapshot names another user's as its parent, whose pages its guest would read.
#[test]
fn parents_elsewhere_are_refused_unless_their_directory_is_allowed() {
    let store = Store::open_small().unwrap();
    let scratch = scratch();
    let [victim, hostile] = dirs_in(scratch.path(), ["victims", "mine"]);
    let made = chain(&store, &victim);
    let own = hostile.join("b");
    copy_dir(&victim.join("b"), &own);
    let names = |path: &str| rewrite(&own, |b| b.parent = Some(Parent { id: made[0].0, path: path.to_owned() }));
    let refused = |what: &str| {
        for (operation, result) in [
            ("open", Snapshot::open(&own, &ParentDirs::siblings()).map(drop)),
            ("verify", verify(&own, &ParentDirs::siblings()).map(drop)),
            ("compact", compact(&own, &ParentDirs::siblings(), &SaveProgress::none()).map(drop)),
            ("open with others allowed", Snapshot::open(&own, &ParentDirs::beneath(vec![hostile.clone()])).map(drop)),
        ] {
            let Err(Error::Parent { source, .. }) = &result else { panic!("{what}: {operation}: {result:?}") };
            let found = matches!(&**source, Error::Elsewhere { path, beside }
                if *path == victim.join("a") && *beside == hostile);
            assert!(found, "{what}: {operation}: {source:?}");
        }
        let shown = show(&own, &ParentDirs::siblings()).unwrap();
        assert!(shown.parents.is_empty() && shown.broken.is_some_and(|why| why.contains("--parents")), "{what}");
    };
    let absolute = victim.join("a");
    names(absolute.to_str().unwrap());
    refused("an absolute path");
    names("../../victims/a");
    refused("a relative path");
    std::os::unix::fs::symlink(&absolute, hostile.join("a")).unwrap();
    names("../a");
    refused("a link beside it");
    std::os::unix::fs::symlink(&victim, own.join("up")).unwrap();
    names("up/a");
    refused("a link in it");
    // Opened by a link beside the victim's, it is still where it is.
    let by_link = victim.join("link");
    std::os::unix::fs::symlink(&own, &by_link).unwrap();
    assert!(matches!(Snapshot::open(&by_link, &ParentDirs::siblings()), Err(Error::Parent { .. })));

    let to_victims = scratch.path().join("to-victims");
    std::os::unix::fs::symlink(&victim, &to_victims).unwrap();
    for allowed in [victim.clone(), absolute, scratch.path().to_owned(), to_victims] {
        let parents = ParentDirs::beneath(vec![hostile.clone(), allowed.clone()]);
        assert_eq!(Snapshot::open(&own, &parents).unwrap().depth(), 2, "{}", allowed.display());
    }
    let missing = ParentDirs::beneath(vec![scratch.path().join("missing")]);
    assert!(matches!(Snapshot::open(&own, &missing), Err(Error::Parent { .. })));
    // A link to a sibling leads to a sibling.
    copy_dir(&victim.join("a"), &hostile.join("other"));
    fs::remove_file(hostile.join("a")).unwrap();
    std::os::unix::fs::symlink("other", hostile.join("a")).unwrap();
    names("../a");
    assert_eq!(Snapshot::open(&own, &ParentDirs::siblings()).unwrap().depth(), 2);
}

/// A link of procfs may lead into a mount namespace in which `..` leads elsewhere.
#[test]
fn snapshots_and_parents_behind_links_of_procfs_are_refused() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    let sibling = at("a");
    for root in ["/proc/self/root", "/proc/thread-self/root"] {
        let path = format!("{root}{}", sibling.display());
        rewrite(&at("b"), |b| b.parent = Some(Parent { id: made[0].0, path }));
        let refused = Snapshot::open(&at("b"), &ParentDirs::siblings()).unwrap_err();
        let Error::Parent { source, .. } = &refused else { panic!("{refused:?}") };
        assert!(matches!(**source, Error::File { .. }), "{refused:?}");
        // The opened snapshot itself, by a link that another user may have made.
        let link = at("link");
        std::os::unix::fs::symlink(format!("{root}{}", sibling.display()), &link).unwrap();
        for result in [
            Snapshot::open(&link, &ParentDirs::siblings()).map(drop),
            verify(&link, &ParentDirs::siblings()).map(drop),
            show(&link, &ParentDirs::siblings()).map(drop),
            compact(&link, &ParentDirs::siblings(), &SaveProgress::none()).map(drop),
        ] {
            assert!(matches!(result, Err(Error::File { .. } | Error::NotAFile { .. })), "{root}: {result:?}");
        }
        fs::remove_file(&link).unwrap();
    }
    rewrite(&at("b"), |b| b.parent = Some(Parent { id: made[0].0, path: sibling.to_str().unwrap().to_owned() }));
    assert_eq!(Snapshot::open(&at("b"), &ParentDirs::siblings()).unwrap().depth(), 2);
}

/// A save over a base with parents elsewhere succeeds, and reports them.
#[test]
fn a_base_or_its_parents_elsewhere_are_reported() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let [bases, mine] = dirs_in(dir.path(), ["bases", "mine"]);
    let ram = born(&layout(), &store);
    let mut base: Option<(PathBuf, crate::SnapshotId, clade_memory::RamImage)> = None;
    for (page, (at, elsewhere)) in
        [(bases.join("full"), false), (bases.join("next"), false), (mine.join("one"), true), (mine.join("two"), true)]
            .into_iter()
            .enumerate()
    {
        put(&ram, page as u64, 9);
        let image = freeze(&ram);
        let on = base.as_ref().map(|(dir, id, image)| (dir.as_path(), *id, image));
        let saved = Saving { base: on, ..Saving::default() }.save(&image, &at).unwrap();
        assert_eq!(saved.base_elsewhere, elsewhere, "{}", at.display());
        base = Some((at, saved.id, image));
    }
    assert!(matches!(Snapshot::open(&mine.join("two"), &ParentDirs::siblings()), Err(Error::Parent { .. })));
    assert_eq!(Snapshot::open(&mine.join("two"), &ParentDirs::beneath(vec![bases])).unwrap().depth(), 4);
}

/// The supervisor checks a chain, and a worker opens it again.
#[test]
fn directories_exchanged_after_the_check_are_refused() {
    let store = Store::open_small().unwrap();
    let scratch = scratch();
    let [victim, mine] = dirs_in(scratch.path(), ["victims", "mine"]);
    let theirs = chain(&store, &victim);
    chain(&store, &mine);
    let (one, two) = (mine.join("a"), mine.join("b"));
    let known = Snapshot::open(&two, &ParentDirs::siblings()).unwrap().known_dirs().unwrap();
    assert_eq!(Snapshot::open(&two, &ParentDirs::known(&known)).unwrap().depth(), 2);
    // The parent, with the manifest changed to fit: as a link, and as another sibling.
    let id = theirs[0].0;
    rewrite(&two, |two| two.parent = Some(Parent { id, path: "../a".to_owned() }));
    fs::rename(&one, mine.join("kept")).unwrap();
    std::os::unix::fs::symlink(victim.join("a"), &one).unwrap();
    let refused = Snapshot::open(&two, &ParentDirs::known(&known)).unwrap_err();
    let exchanged = |error: &Error| matches!(error, Error::Exchanged { .. });
    assert!(matches!(&refused, Error::Parent { source, .. } if exchanged(source)), "{refused:?}");
    fs::remove_file(&one).unwrap();
    copy_dir(&victim.join("a"), &one);
    let refused = Snapshot::open(&two, &ParentDirs::known(&known)).unwrap_err();
    assert!(matches!(&refused, Error::Parent { source, .. } if exchanged(source)), "{refused:?}");
    // The snapshot itself.
    fs::rename(&two, mine.join("moved")).unwrap();
    std::os::unix::fs::symlink(victim.join("b"), &two).unwrap();
    let refused = Snapshot::open(&two, &ParentDirs::known(&known)).unwrap_err();
    assert!(exchanged(&refused), "{refused:?}");
}

/// The directories that are handed to other processes are the checked ones.
#[test]
fn known_directories_are_the_open_ones() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    std::os::unix::fs::symlink("c", at("link")).unwrap();
    let opened = Snapshot::open(&at("link"), &ParentDirs::siblings()).unwrap();
    fs::rename(at("b"), at("moved")).unwrap();
    std::os::unix::fs::symlink("/", at("b")).unwrap();
    let known = opened.known_dirs().unwrap();
    assert_eq!(known.iter().map(|dir| dir.path.clone()).collect::<Vec<_>>(), [at("c"), at("moved"), at("a")]);
    fs::remove_dir_all(at("moved")).unwrap();
    assert!(matches!(opened.known_dirs(), Err(Error::File { .. })));
    // Another process gets them as JSON, and an earlier version recorded paths alone.
    let text = serde_json::to_string(&known).unwrap();
    assert_eq!(serde_json::from_str::<Vec<crate::KnownDir>>(&text).unwrap(), known);
    let earlier: crate::KnownDir = serde_json::from_str("\"/srv/web\"").unwrap();
    assert_eq!(earlier, crate::KnownDir { path: "/srv/web".into(), id: None });
}

#[test]
fn cycles_and_shapes_that_do_not_fit_are_refused() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    rewrite(&at("a"), |a| a.parent = Some(Parent { id: made[2].0, path: "../c".to_owned() }));
    let refused = Snapshot::open(&at("c"), &ParentDirs::siblings()).unwrap_err();
    assert!(matches!(refused, Error::Cycle { id, .. } if id == made[2].0), "{refused:?}");
    rewrite(&at("a"), |a| a.parent = Some(Parent { id: a.id, path: ".".to_owned() }));
    assert!(matches!(Snapshot::open(&at("a"), &ParentDirs::siblings()), Err(Error::Cycle { .. })));
    rewrite(&at("a"), |a| {
        a.parent = None;
        a.memory.regions[0].guest_address = 0;
    });
    assert!(matches!(Snapshot::open(&at("c"), &ParentDirs::siblings()), Err(Error::Shape { .. })));
    // A full snapshot in name only.
    rewrite(&at("b"), |b| b.parent = None);
    let refused = Snapshot::open(&at("b"), &ParentDirs::siblings()).unwrap_err();
    assert!(matches!(refused, Error::Damaged { damage: Damage::Hole { page: 0 }, .. }), "{refused:?}");
}

#[test]
fn a_thousand_deep_is_refused_at_once_and_so_is_one_too_many() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |number: usize| dir.path().join(format!("{number:04}"));
    copy_dir(&dir.path().join("a"), &at(0));
    for number in 1..1000 {
        copy_dir(&dir.path().join("b"), &at(number));
        let parent = if number == 1 { made[0].0 } else { SnapshotId::new(number as u128 - 1) };
        rewrite(&at(number), |manifest| {
            manifest.id = SnapshotId::new(number as u128);
            manifest.parent = Some(Parent { id: parent, path: format!("../{:04}", number - 1) });
        });
    }
    let plan = std::sync::Arc::new(Plan::default());
    let refused = Snapshot::with(&FileOps { plan: Some(plan.clone()) }, &at(999), &ParentDirs::siblings()).unwrap_err();
    assert!(matches!(&refused, Error::TooDeep { path, most: MAX_DEPTH } if *path == at(999)), "{refused:?}");
    let is_manifest = |(op, path): &(FileOp, PathBuf)| *op == FileOp::Open && path.ends_with("manifest.json");
    let opened = plan.trace().iter().filter(|step| is_manifest(step)).count();
    assert!((MAX_DEPTH..=MAX_DEPTH + 1).contains(&opened), "{opened} manifests of 1000 were opened");
    assert_eq!(Snapshot::open(&at(MAX_DEPTH - 1), &ParentDirs::siblings()).unwrap().depth(), MAX_DEPTH);
    assert!(matches!(Snapshot::open(&at(MAX_DEPTH), &ParentDirs::siblings()), Err(Error::TooDeep { .. })));
    let deepest = at(MAX_DEPTH - 1);
    let base = Some((deepest.as_path(), SnapshotId::new(MAX_DEPTH as u128 - 1), &made[1].1));
    let refused = Saving { base, ..Saving::default() }.save(&made[2].1, &dir.path().join("new")).unwrap_err();
    assert!(matches!(refused, Error::TooDeep { .. }), "{refused:?}");
    // Merged, it can be saved on top of.
    compact(&deepest, &ParentDirs::siblings(), &SaveProgress::none()).unwrap();
    Saving { base, ..Saving::default() }.save(&made[2].1, &dir.path().join("new")).unwrap();
}

#[test]
fn an_incremental_save_over_its_own_chain_is_refused() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    std::os::unix::fs::symlink(at("a"), at("link")).unwrap();
    let c = at("c");
    let incremental = Saving { base: Some((&c, made[2].0, &made[2].1)), ..Saving::default() };
    for target in ["c", "b", "a", "link", "../a/../c"] {
        let target = at("a").join("..").join(target.trim_start_matches("../"));
        let refused = incremental.save(&made[2].1, &target).unwrap_err();
        assert!(matches!(refused, Error::OwnChain { .. }), "{target:?}: {refused:?}");
    }
    let other = Saving { base: Some((&c, made[1].0, &made[2].1)), ..Saving::default() };
    let refused = other.save(&made[2].1, &at("d")).unwrap_err();
    assert!(matches!(refused, Error::WrongId { wanted, found, .. } if (wanted, found) == (made[1].0, made[2].0)));
    // A full save may go anywhere: nothing it needs is there.
    Saving::default().save(&made[2].1, &at("c")).unwrap();
    assert_eq!(verify(&at("c"), &ParentDirs::siblings()).unwrap().snapshots, 1);
}

#[test]
fn what_is_no_snapshot_is_not_replaced() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    let refused = |name: &str, why: &str| {
        let error = Saving::default().save(&made[0].1, &at(name)).unwrap_err();
        assert!(matches!(&error, Error::NotASnapshot { found, .. } if found.contains(why)), "{error:?}");
    };
    fs::create_dir(at("home")).unwrap();
    fs::write(at("home").join("letters.txt"), "dear").unwrap();
    refused("home", "letters.txt");
    fs::write(at("a").join("notes"), "mine").unwrap();
    refused("a", "notes");
    fs::write(at("file"), "").unwrap();
    refused("file", "no directory");
    fs::create_dir(at("half")).unwrap();
    fs::write(at("half").join("state"), "").unwrap();
    refused("half", "manifest.json");
    assert_eq!(fs::read(at("home").join("letters.txt")).unwrap(), b"dear");
    fs::create_dir(at("empty")).unwrap();
    Saving::default().save(&made[0].1, &at("empty")).unwrap();
    assert!(matches!(Saving::default().save(&made[0].1, Path::new("/")), Err(Error::Path { .. })));
    assert!(matches!(Saving::default().save(&made[0].1, &at("no/where")), Err(Error::File { .. })));
}

#[test]
fn children_outlive_the_merging_of_their_parent() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    record(&at("b"), &[clade_memory::PageRange::new(0, 2)]).unwrap();
    let before: Vec<_> = ["a", "b", "c"].map(|name| restored(&at(name), &store, &Load::Lazy)).into();
    let vm = child(
        &Snapshot::open(&at("c"), &ParentDirs::siblings()).unwrap().restore_ram(&store, &Load::Lazy).unwrap(),
        &store,
    );
    let merged = compact(&at("b"), &ParentDirs::siblings(), &SaveProgress::none()).unwrap();
    assert_eq!(merged.id, made[1].0, "the contents are the same, and so is its identity");
    let b = Snapshot::open(&at("b"), &ParentDirs::siblings()).unwrap();
    assert!(b.depth() == 1 && b.working_set().unwrap().is_some() && b.section("vcpus").is_some());
    fs::remove_dir_all(at("a")).unwrap();
    for (name, before) in [("b", &before[1]), ("c", &before[2])] {
        verify(&at(name), &ParentDirs::siblings()).unwrap();
        assert!(restored(&at(name), &store, &Load::Preload) == *before, "{name}");
    }
    assert!(contents(&vm) == before[2], "who runs from the old files runs on");
    assert_eq!(
        compact(&at("b"), &ParentDirs::siblings(), &SaveProgress::none()).unwrap().id,
        made[1].0,
        "of a full one nothing is changed"
    );
}

#[test]
fn a_base_that_is_replaced_meanwhile_is_noticed() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let at = |name: &str| dir.path().join(name);
    // While the snapshot is being written, another save replaces its base, or its own directory.
    let replace = |name: &'static str| {
        let (target, image) = (at(name), made[0].1.clone());
        move |done, total| {
            if done == total {
                Saving::default().save(&image, &target).unwrap();
            }
        }
    };
    let over_c = replace("c");
    let base = Some(Base { dir: &at("c"), id: made[2].0, image: &made[0].1, is_fixed: false });
    let save =
        Save { memory: &made[2].1, disks: &[], sections: &[], base, compression: Compression::None, replace: true };
    let refused = save.to(&at("d"), &SaveProgress { progress: &over_c, ..SaveProgress::none() }).unwrap_err();
    assert!(matches!(refused, Error::WrongId { wanted, .. } if wanted == made[2].0), "{refused:?}");
    let over_b = replace("b");
    let watch = SaveProgress { progress: &over_b, ..SaveProgress::none() };
    let refused = compact(&at("b"), &ParentDirs::siblings(), &watch).unwrap_err();
    assert!(matches!(refused, Error::WrongId { wanted, .. } if wanted == made[1].0), "{refused:?}");
    assert_eq!(names(dir.path()), ["a", "b", "c"]);
    verify(&at("b"), &ParentDirs::siblings()).unwrap();
}

#[test]
fn a_snapshot_that_others_depend_on_is_not_replaced_without_being_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let store = Store::open().unwrap();
    let ram = born(&layout(), &store);
    put(&ram, 1, 1);
    let first = freeze(&ram);
    let keeping = || Saving { replace: false, ..Saving::default() };
    let base = keeping().save(&first, &at("base")).unwrap();
    put(&ram, 3, 7);
    let second = freeze(&ram);
    fn on<'a>(dir: &'a Path, id: SnapshotId, image: &'a RamImage) -> Saving<'a> {
        Saving { base: Some((dir, id, image)), replace: false, ..Saving::default() }
    }
    on(&at("base"), base.id, &first).save(&second, &at("top")).unwrap();
    let needed = |outcome: Result<_, Error>| match outcome.map(|saved: crate::Saved| saved.id) {
        Err(Error::Needed { path, by }) => (path, by),
        other => panic!("{other:?}"),
    };
    let refused = || needed(keeping().save(&second, &at("base")));
    let canonical = dir.path().canonicalize().unwrap();
    assert_eq!(refused(), (canonical.join("base"), canonical.join("top")));
    crate::verify(&at("top"), &ParentDirs::siblings()).unwrap();
    // Compacting keeps its identity, and its dependents.
    crate::compact(&at("base"), &ParentDirs::siblings(), &SaveProgress::none()).unwrap();
    assert_eq!(refused().1, canonical.join("top"));
    // Saved again on top: one note stays one.
    on(&at("base"), base.id, &first).save(&second, &at("top")).unwrap();
    let notes = || {
        std::fs::read_dir(at("base"))
            .unwrap()
            .filter(|entry| {
                entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(crate::staging::NEEDED_BY)
            })
            .count()
    };
    assert_eq!(notes(), 1);
    // After its compaction the dependent needs the base no more, and its stale note is ignored.
    crate::compact(&at("top"), &ParentDirs::siblings(), &SaveProgress::none()).unwrap();
    let again = keeping().save(&second, &at("base")).unwrap();
    assert_eq!(notes(), 0);
    // With an explicit request the base is replaced, and the dependent's error names it.
    on(&at("base"), again.id, &second).save(&second, &at("top")).unwrap();
    Saving::default().save(&second, &at("base")).unwrap();
    assert!(matches!(crate::verify(&at("top"), &ParentDirs::siblings()), Err(Error::Parent { .. })));
    // A note of nothing, or of a link to nothing, blocks no save.
    std::fs::write(at("base").join(".needed-by-0123456789abcdef"), "/nonexistent").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", at("base").join(".needed-by-1123456789abcdef")).unwrap();
    keeping().save(&second, &at("base")).unwrap();
}

#[test]
fn a_fixed_base_gets_no_note_and_moves_together_with_the_snapshot() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let made = chain(&store, dir.path());
    let tree = dir.path().join("tree");
    let [below, above] = ["below", "above"].map(|name| tree.join(name).join("s"));
    [&below, &above].iter().for_each(|dir| fs::create_dir_all(dir.parent().unwrap()).unwrap());
    let id = Saving::default().save(&made[0].1, &below).unwrap().id;
    let base = Some(Base { dir: &below, id, image: &made[0].1, is_fixed: true });
    let save = Save {
        memory: &made[1].1,
        disks: &[],
        sections: SECTIONS,
        base,
        compression: Compression::None,
        replace: false,
    };
    let before = names(&below);
    let saved = save.to(&above, &SaveProgress::none()).unwrap();
    assert!(saved.base_elsewhere && !saved.base_untold);
    assert_eq!(names(&below), before);
    let parent = Manifest::decode(&fs::read(above.join("manifest.json")).unwrap()).unwrap().parent.unwrap();
    assert_eq!(parent.path, "../../below/s");
    let moved = dir.path().join("moved");
    fs::rename(&tree, &moved).unwrap();
    let parents = ParentDirs::beneath(vec![moved.join("below")]);
    let image = Snapshot::open(&moved.join("above/s"), &parents).unwrap().restore_ram(&store, &Load::Lazy).unwrap();
    assert_eq!(contents(&child(&image, &store)), contents(&child(&made[1].1, &store)));
}
