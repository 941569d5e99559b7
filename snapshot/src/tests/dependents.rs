//! Notes of dependents: at no moment is a dependent without its note.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use clade_memory::{RamImage, Store};
use rustix::io::Errno;

use super::faults::Plan;
use super::support::*;
use crate::compact::compact_with;
use crate::files::{FileOp, FileOps};
use crate::staging::NEEDED_BY;
use crate::{Error, ParentDirs, SaveProgress, Saved};

/// `one`, `two` on top of it, and the image for `three` on top of that.
struct Scene {
    dir: tempfile::TempDir,
    two: (crate::SnapshotId, RamImage),
    third: RamImage,
}

impl Scene {
    fn new() -> Self {
        let store = Store::open_small().unwrap();
        let dir = scratch();
        let ram = born(&layout(), &store);
        put(&ram, 1, 1);
        let first = freeze(&ram);
        let one = Saving::default().save(&first, &dir.path().join("one")).unwrap().id;
        put(&ram, 2, 2);
        let second = freeze(&ram);
        let base = dir.path().join("one");
        let onto = Saving { base: Some((&base, one, &first)), ..Saving::default() };
        let two = onto.save(&second, &dir.path().join("two")).unwrap().id;
        put(&ram, 3, 3);
        Self { two: (two, second), third: freeze(&ram), dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// Saves `three` on top of `two`.
    fn depend(&self, files: &FileOps) -> Result<Saved, Error> {
        let base = self.at("two");
        let (files, base) = (files.clone(), Some((base.as_path(), self.two.0, &self.two.1)));
        Saving { files, base, replace: false, ..Saving::default() }.save(&self.third, &self.at("three"))
    }

    /// Saves over `two`, unless something depends on it.
    fn replace(&self, files: &FileOps) -> Result<Saved, Error> {
        Saving { files: files.clone(), replace: false, ..Saving::default() }.save(&self.third, &self.at("two"))
    }

    fn merge(&self, files: &FileOps) -> Result<Saved, Error> {
        compact_with(files, &self.at("two"), &ParentDirs::siblings(), &SaveProgress::none())
    }

    fn notes(&self) -> Vec<String> {
        names(&self.at("two")).into_iter().filter(|name| name.starts_with(NEEDED_BY)).collect()
    }
}

/// Files whose locks are not waited for.
fn impatient() -> FileOps {
    FileOps { plan: Some(Arc::new(Plan::impatient())) }
}

/// Stops before `target` is put in place, reports that, and continues at a signal.
fn held(target: PathBuf) -> (FileOps, Receiver<()>, Sender<()>) {
    let ((reached, here), (go, told)) = (channel(), channel());
    let told = Mutex::new(told);
    let plan = Plan::hooked(move |op, path| {
        if op == FileOp::Rename && path == target {
            let _ = reached.send(());
            let _ = told.lock().unwrap().recv();
        }
        Ok(())
    });
    (FileOps { plan: Some(Arc::new(plan)) }, here, go)
}

fn is_locked(outcome: Result<Saved, Error>, wanted: &Path) {
    match outcome {
        Err(Error::Locked { path, seconds }) => assert_eq!((path.as_path(), seconds), (wanted, 0)),
        other => panic!("{other:?}"),
    }
}

/// Runs `first` up to its last step, then `meanwhile`, then the rest of `first`.
fn within<T: Send>(
    scene: &Scene,
    target: &str,
    first: impl FnOnce(&Scene, &FileOps) -> T + Send,
    meanwhile: impl FnOnce(),
) -> T {
    let (files, here, go) = held(scene.at(target));
    std::thread::scope(|scope| {
        let running = scope.spawn(move || first(scene, &files));
        here.recv().unwrap();
        // Dropped also by a panic, so that the other thread continues.
        let go = go;
        meanwhile();
        drop(go);
        running.join().unwrap()
    })
}

#[test]
fn a_base_stays_while_its_dependent_is_put_in_place() {
    let _alone = alone();
    let scene = Scene::new();
    let saved = within(&scene, "three", Scene::depend, || {
        is_locked(scene.replace(&impatient()), &scene.at("two"));
        is_locked(scene.merge(&impatient()), &scene.at("two"));
    });
    saved.unwrap();
    let refused = scene.replace(&FileOps::default());
    assert!(matches!(&refused, Err(Error::Needed { by, .. }) if *by == scene.at("three")), "{refused:?}");
    scene.merge(&FileOps::default()).unwrap();
    assert_eq!(scene.notes().len(), 1, "merging keeps the note");
    crate::verify(&scene.at("three"), &ParentDirs::siblings()).unwrap();
}

#[test]
fn nothing_depends_on_a_base_that_is_being_replaced() {
    let _alone = alone();
    let scene = Scene::new();
    let replaced = within(&scene, "two", Scene::replace, || {
        is_locked(scene.depend(&impatient()), &scene.at("two"));
    });
    replaced.unwrap();
    let refused = scene.depend(&FileOps::default());
    assert!(matches!(refused, Err(Error::WrongId { wanted, .. }) if wanted == scene.two.0), "{refused:?}");
    assert_eq!(names(scene.dir.path()), ["one", "two"]);
}

#[test]
fn a_lock_on_what_was_replaced_meanwhile_counts_for_nothing() {
    let _alone = alone();
    let scene = Scene::new();
    // The base is replaced between its opening and its locking.
    let (target, image) = (scene.at("two"), scene.third.clone());
    let once = std::sync::Once::new();
    let plan = Plan::hooked(move |op, path| {
        if op == FileOp::Lock && path == target {
            once.call_once(|| assert!(Saving::default().save(&image, &target).is_ok()));
        }
        Ok(())
    });
    let refused = scene.depend(&FileOps { plan: Some(Arc::new(plan)) });
    assert!(matches!(refused, Err(Error::WrongId { wanted, .. }) if wanted == scene.two.0), "{refused:?}");
    assert_eq!(names(scene.dir.path()), ["one", "two"]);
}

#[test]
fn a_note_is_not_lost_to_a_merge() {
    let _alone = alone();
    let scene = Scene::new();
    let merged = within(&scene, "two", Scene::merge, || {
        is_locked(scene.depend(&impatient()), &scene.at("two"));
    });
    merged.unwrap();
    scene.depend(&FileOps::default()).unwrap();
    assert!(matches!(scene.replace(&FileOps::default()), Err(Error::Needed { .. })));
    crate::verify(&scene.at("three"), &ParentDirs::siblings()).unwrap();
}

#[test]
fn what_appears_meanwhile_is_not_replaced_unseen() {
    let _alone = alone();
    let scene = Scene::new();
    // Nothing is at `three` when it is locked, and a snapshot with a dependent when it is put
    // there.
    let (from, by) = (scene.at("two"), scene.at("four"));
    let target = scene.at("three");
    let put = std::sync::Once::new();
    let plan = Plan::hooked(move |op, path| {
        if op == FileOp::Rename && path == target {
            put.call_once(|| {
                copy_dir(&from, &target);
                copy_dir(&from, &by);
                let mut manifest =
                    crate::format::Manifest::decode(&fs::read(by.join("manifest.json")).unwrap()).unwrap();
                manifest.parent = Some(crate::format::Parent { id: manifest.id, path: "../three".to_owned() });
                manifest.id = crate::SnapshotId::new(4);
                fs::write(by.join("manifest.json"), manifest.encode()).unwrap();
                fs::write(target.join(format!("{NEEDED_BY}0123456789abcdef")), by.to_str().unwrap()).unwrap();
            });
        }
        Ok(())
    });
    let refused = scene.depend(&FileOps { plan: Some(Arc::new(plan)) });
    assert!(matches!(&refused, Err(Error::Needed { by, .. }) if *by == scene.at("four")), "{refused:?}");
}

#[test]
fn notes_of_what_is_gone_make_room() {
    let scene = Scene::new();
    let note = |number: u64, text: &Path| {
        let name = format!("{NEEDED_BY}{number:016x}");
        fs::write(scene.at("two").join(name), text.to_str().unwrap()).unwrap();
    };
    scene.depend(&FileOps::default()).unwrap();
    fs::rename(scene.at("three"), scene.at("kept")).unwrap();
    note(5000, &scene.at("kept"));
    for number in 0..crate::dependents::PRUNE_AT as u64 {
        note(number, &scene.at(&format!("gone-{number}")));
    }
    scene.depend(&FileOps::default()).unwrap();
    assert_eq!(scene.notes().len(), 2, "one that holds, and the new one: {:?}", scene.notes());
    fs::remove_dir_all(scene.at("kept")).unwrap();
    // And they block no save, however many they are.
    let refused = scene.replace(&FileOps::default());
    assert!(matches!(&refused, Err(Error::Needed { by, .. }) if *by == scene.at("three")), "{refused:?}");
    fs::remove_dir_all(scene.at("three")).unwrap();
    for number in 0..2 * crate::dependents::PRUNE_AT as u64 {
        note(number, &scene.at(&format!("gone-{number}")));
    }
    scene.merge(&FileOps::default()).unwrap();
    assert_eq!(scene.notes().len(), 0, "a merge leaves them behind");
    for number in 0..2 * crate::dependents::PRUNE_AT as u64 {
        note(number, &scene.at(&format!("gone-{number}")));
    }
    scene.replace(&FileOps::default()).unwrap();
}

#[test]
fn a_dependent_that_cannot_be_looked_at_counts() {
    let scene = Scene::new();
    scene.depend(&FileOps::default()).unwrap();
    let manifest = scene.at("three").join("manifest.json");
    let plan = Plan::hooked(
        move |op, path| {
            if op == FileOp::Open && path == manifest { Err(Errno::ACCESS.into()) } else { Ok(()) }
        },
    );
    let refused = scene.replace(&FileOps { plan: Some(Arc::new(plan)) });
    assert!(matches!(&refused, Err(Error::Needed { by, .. }) if *by == scene.at("three")), "{refused:?}");
}

/// Two saves to one path: of both that find no note, one makes it first, and its snapshot may be the one that is put in
/// place.
#[test]
fn a_note_that_another_save_makes_meanwhile_stays() {
    let scene = Scene::new();
    scene.depend(&FileOps::default()).unwrap();
    let note = scene.at("two").join(&scene.notes()[0]);
    fs::remove_dir_all(scene.at("three")).unwrap();
    let text = fs::read(&note).unwrap();
    fs::remove_file(&note).unwrap();
    let (made, theirs) = (note.clone(), text.clone());
    let once = std::sync::Once::new();
    let plan = Plan::hooked(move |op, path| {
        if op == FileOp::Create && path == made {
            once.call_once(|| fs::write(&made, &theirs).unwrap());
        }
        Ok(())
    });
    scene.depend(&FileOps { plan: Some(Arc::new(plan)) }).unwrap();
    assert_eq!(fs::read(&note).unwrap(), text);
    let notes = scene.notes();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes.iter().all(|name| fs::read(scene.at("two").join(name)).unwrap() == text));
    assert!(matches!(scene.replace(&FileOps::default()), Err(Error::Needed { .. })));
}

/// A part of a path may be another directory's.
#[test]
fn a_note_that_cannot_be_written_leaves_no_part_of_it() {
    let scene = Scene::new();
    let plan = Plan::hooked(|op, path| {
        let is_note = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NEEDED_BY));
        if op == FileOp::Write && is_note { Err(Errno::NOSPC.into()) } else { Ok(()) }
    });
    scene.depend(&FileOps { plan: Some(Arc::new(plan)) }).unwrap_err();
    assert_eq!(scene.notes(), [""; 0]);
}

/// Another save to the same path has found the note before its writer fails to make it durable.
#[test]
fn a_note_that_another_save_relies_on_stays_when_its_sync_fails() {
    let scene = Arc::new(Scene::new());
    let (other, once) = (Arc::clone(&scene), std::sync::Once::new());
    let plan = Plan::hooked(move |op, path| {
        let is_note = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NEEDED_BY));
        if op != FileOp::Sync || !is_note || once.is_completed() {
            return Ok(());
        }
        once.call_once(|| assert!(other.depend(&FileOps::default()).is_ok()));
        Err(Errno::IO.into())
    });
    scene.depend(&FileOps { plan: Some(Arc::new(plan)) }).unwrap_err();
    let refused = scene.replace(&FileOps::default());
    assert!(matches!(&refused, Err(Error::Needed { by, .. }) if *by == scene.at("three")), "{refused:?}");
}

/// Its writer may have ended before the sync.
#[test]
fn a_note_that_is_there_is_made_durable() {
    let scene = Scene::new();
    scene.depend(&FileOps::default()).unwrap();
    let notes = scene.notes();
    fs::rename(scene.at("three"), scene.at("kept")).unwrap();
    let plan = Arc::new(Plan::default());
    scene.depend(&FileOps { plan: Some(Arc::clone(&plan)) }).unwrap();
    assert_eq!(scene.notes(), notes);
    assert!(plan.trace().iter().any(|(op, path)| *op == FileOp::Sync && path.ends_with(&notes[0])));
}

/// It may be another user's, or the disk fails.
#[test]
fn a_note_that_cannot_be_read_counts() {
    for (op, errno) in [(FileOp::Open, Errno::ACCESS), (FileOp::Open, Errno::IO), (FileOp::Read, Errno::IO)] {
        let scene = Scene::new();
        scene.depend(&FileOps::default()).unwrap();
        let notes = scene.notes();
        let failing = || {
            let is_note =
                |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NEEDED_BY));
            let plan =
                Plan::hooked(move |now, path| if now == op && is_note(path) { Err(errno.into()) } else { Ok(()) });
            FileOps { plan: Some(Arc::new(plan)) }
        };
        for refused in [scene.replace(&failing()).map(drop), scene.merge(&failing()).map(drop)] {
            assert!(matches!(&refused, Err(Error::File { path, .. }) if path.ends_with(&notes[0])), "{refused:?}");
        }
        crate::dependents::prune(&failing(), &FileOps::default().whole_dir(&scene.at("two")).unwrap()).unwrap();
        assert_eq!(scene.notes(), notes, "{op:?}: {errno:?}");
        crate::verify(&scene.at("three"), &ParentDirs::siblings()).unwrap();
    }
}

#[test]
fn a_base_that_cannot_be_read_has_its_dependents_still() {
    let scene = Scene::new();
    scene.depend(&FileOps::default()).unwrap();
    let manifest = scene.at("two").join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    for damaged in [text.replacen("\"major\": 1", "\"major\": 2", 1), text.replacen('{', "[", 1), String::new()] {
        assert_ne!(damaged, text);
        fs::write(&manifest, damaged).unwrap();
        let refused = scene.replace(&FileOps::default());
        assert!(matches!(&refused, Err(Error::Needed { by, .. }) if *by == scene.at("three")), "{refused:?}");
    }
    fs::write(&manifest, &text).unwrap();
    crate::verify(&scene.at("three"), &ParentDirs::siblings()).unwrap();
    // Without dependents it can be replaced, whatever is in it.
    fs::write(&manifest, "").unwrap();
    fs::remove_dir_all(scene.at("three")).unwrap();
    scene.replace(&FileOps::default()).unwrap();
}

#[test]
fn a_base_that_is_read_only_is_depended_on_untold() {
    let scene = Scene::new();
    let failing = |errno: Errno| {
        let plan = Plan::hooked(move |op, path| {
            let note = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NEEDED_BY));
            if op == FileOp::Create && note { Err(errno.into()) } else { Ok(()) }
        });
        FileOps { plan: Some(Arc::new(plan)) }
    };
    for errno in [Errno::ROFS, Errno::ACCESS, Errno::PERM] {
        assert!(scene.depend(&failing(errno)).unwrap().base_untold, "{errno:?}");
        assert_eq!(scene.notes().len(), 0);
        crate::verify(&scene.at("three"), &ParentDirs::siblings()).unwrap();
        fs::remove_dir_all(scene.at("three")).unwrap();
    }
    let full = scene.depend(&failing(Errno::NOSPC));
    assert!(matches!(&full, Err(Error::Full { path, .. }) if path.starts_with(scene.at("two"))), "{full:?}");
    assert_eq!(names(scene.dir.path()), ["one", "two"]);
    assert!(!scene.depend(&FileOps::default()).unwrap().base_untold);
}

#[test]
fn locks_taken_crosswise_do_not_wait_for_each_other() {
    use crate::lock::{How, lock};
    let _alone = alone();
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (one, two) = (at("one"), at("two"));
    [&one, &two].into_iter().for_each(|path| fs::create_dir(path).unwrap());
    let both = |first: &Path, second: &Path| {
        let wanted = [(first, How::Exclusive), (second, How::Shared)];
        let locked = lock(&FileOps::default(), &wanted, &mut || Ok(())).unwrap();
        assert!(locked.iter().all(Option::is_some));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| (0..200).for_each(|_| both(&one, &two)));
        scope.spawn(|| (0..200).for_each(|_| both(&two, &one)));
    });
    let missing = lock(&FileOps::default(), &[(&at("none"), How::Shared)], &mut || Ok(())).unwrap();
    assert!(missing[0].is_none());
    let held = lock(&FileOps::default(), &[(&one, How::Shared)], &mut || Ok(())).unwrap();
    let cancelled = lock(&FileOps::default(), &[(&one, How::Exclusive)], &mut || Err(Error::Cancelled));
    assert!(matches!(cancelled, Err(Error::Cancelled)), "waiting can be cancelled");
    drop(held);
}
