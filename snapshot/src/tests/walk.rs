//! Every step of every operation that writes, with every fault.

use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::faults::{Fault, Plan};
use super::support::*;
use crate::files::{FileOp, FileOps};
use crate::{Error, ParentDirs};

fn with(plan: &Arc<Plan>) -> FileOps {
    FileOps { plan: Some(Arc::clone(plan)) }
}

/// The steps of a deed without faults.
fn trace(cast: &Cast, deed: Deed) -> (tempfile::TempDir, Vec<(FileOp, std::path::PathBuf)>) {
    let plan = Arc::new(Plan::default());
    let stage = cast.stage();
    cast.act(deed, &with(&plan), stage.path()).unwrap();
    (stage, plan.trace())
}

fn faulty(cast: &Cast, deed: Deed, step: u64, fault: Fault) {
    let stage = cast.stage();
    let plan = Arc::new(Plan::new(step, fault));
    let done = cast.act(deed, &with(&plan), stage.path());
    let what = format!("{deed:?}, {:?} at step {step}: {done:?}", (fault, plan.trace().get(step as usize)));
    match fault {
        Fault::Errno(Errno::INTR) | Fault::Short => assert!(done.is_ok(), "{what}"),
        _ => {}
    }
    let new = cast.check(deed, stage.path(), &what);
    assert!(done.is_err() || new, "{what}: it was said to be saved");
    // Once more, with nothing wrong.
    cast.act(deed, &FileOps::default(), stage.path()).unwrap_or_else(|error| panic!("{what}: the retry: {error:?}"));
    assert!(cast.check(deed, stage.path(), &what), "{what}: the retry");
    // A working-set file sweeps only its own kind.
    let mut expected = vec!["one", "two"];
    match deed {
        Deed::Fresh => expected.insert(1, "three"),
        Deed::WorkingSet => expected.insert(0, ".two.clade-0123456789abcdef"),
        // A chain that was merged already is not written again.
        Deed::Compact if done.is_ok() || new => {
            let swept = names(stage.path()).iter().all(|name| !name.starts_with('.'));
            if !swept {
                cast.act(Deed::Over, &FileOps::default(), stage.path()).unwrap();
            }
        }
        _ => {}
    }
    assert_eq!(names(stage.path()), expected, "{what}: left over");
    let inside = names(&stage.path().join(Cast::target(deed)));
    assert!(inside.iter().all(|name| !name.starts_with('.')), "{what}: left over in it: {inside:?}");
}

#[test]
fn a_fault_at_any_step_leaves_the_old_or_the_new_and_a_retry_is_complete() {
    let _alone = alone();
    let cast = Cast::new();
    let stride = clade_test_support::stride();
    for (number, deed) in DEEDS.into_iter().enumerate() {
        let steps = trace(&cast, deed).1.len() as u64;
        assert!(steps > 5, "{deed:?} takes {steps} steps");
        // Each deed begins at another step.
        for step in ((number % stride) as u64..steps).step_by(stride) {
            for fault in [Errno::NOSPC, Errno::IO, Errno::INTR].map(Fault::Errno) {
                faulty(&cast, deed, step, fault);
            }
            for fault in [Fault::Dead, Fault::Short] {
                faulty(&cast, deed, step, fault);
            }
        }
    }
}

#[test]
fn no_space_is_said_by_name_and_a_failed_sync_is_final() {
    let _alone = alone();
    let cast = Cast::new();
    let (_, steps) = trace(&cast, Deed::Over);
    for (step, (op, path)) in steps.iter().enumerate() {
        let fail = |errno| {
            let stage = cast.stage();
            let plan = Arc::new(Plan::new(step as u64, Fault::Errno(errno)));
            (cast.act(Deed::Over, &with(&plan), stage.path()), plan.trace(), stage)
        };
        match op {
            FileOp::Write | FileOp::SetLen | FileOp::Create => {
                let (failed, ..) = fail(Errno::NOSPC);
                let named = |at: &Path| at.file_name() == path.file_name();
                assert!(matches!(&failed, Err(Error::Full { path, .. }) if named(path)), "{step}: {failed:?}");
            }
            FileOp::Sync => {
                let (failed, trace, _stage) = fail(Errno::IO);
                assert!(matches!(failed, Err(Error::File { what: "synced", .. })), "{step}: {failed:?}");
                let after: Vec<_> = trace[step + 1..].iter().map(|(op, _)| *op).collect();
                // The directory is opened to be cleaned up.
                let cleaning = |op: &FileOp| matches!(op, FileOp::Open | FileOp::List | FileOp::Remove);
                assert!(after.iter().all(cleaning), "nothing but cleaning up after a failed sync: {after:?}");
            }
            _ => {}
        }
    }
}

#[test]
fn what_is_published_has_been_synced_and_what_is_removed_is_known_to_be_replaced() {
    let cast = Cast::new();
    for deed in [Deed::Fresh, Deed::Over, Deed::Incremental, Deed::Packed, Deed::Compact] {
        let (stage, steps) = trace(&cast, deed);
        let renames: Vec<usize> = (0..steps.len()).filter(|at| steps[*at].0 == FileOp::Rename).collect();
        let [first, .., last] = [renames[0], renames[renames.len() - 1]];
        let created: Vec<_> = steps.iter().filter(|(op, _)| *op == FileOp::Create).map(|(_, path)| path).collect();
        assert!(created.len() >= 4, "{deed:?}: {created:?}");
        for path in created {
            let of = |wanted: &[FileOp]| {
                steps.iter().rposition(|(op, at)| wanted.contains(op) && at == path).unwrap_or(usize::MAX)
            };
            let written = steps.iter().rposition(|(op, at)| matches!(op, FileOp::Write | FileOp::SetLen) && at == path);
            assert!(of(&[FileOp::Sync]) < first, "{deed:?}: {path:?} is synced before it is published");
            assert!(
                written.is_none_or(|written| written < of(&[FileOp::Sync])),
                "{deed:?}: {path:?} is not written after"
            );
        }
        let aside = steps.iter().rposition(|(op, _)| *op == FileOp::MakeDir).map(|at| &steps[at].1).unwrap();
        let synced = |dir: &Path| steps.iter().rposition(|(op, at)| *op == FileOp::SyncDir && at == dir).unwrap();
        assert!(synced(aside) < first, "{deed:?}: the directory is synced before it is published");
        if deed == Deed::Incremental {
            let note = steps.iter().position(|(op, at)| {
                *op == FileOp::Create
                    && at.file_name().unwrap().to_string_lossy().starts_with(crate::staging::NEEDED_BY)
            });
            let base = synced(&stage.path().canonicalize().unwrap().join("one"));
            assert!(note.unwrap() < base && base < first, "the note is on the disk before its dependent is");
        }
        let parent = synced(&stage.path().canonicalize().unwrap());
        assert!(parent > last, "{deed:?}: its parent is synced after");
        let removed = steps.iter().position(|(op, at)| *op == FileOp::Remove && at.starts_with(aside));
        assert!(removed.is_none_or(|removed| removed > parent), "{deed:?}: the old one stays until then");
    }
}

#[test]
fn a_disk_that_lies_is_found_out_by_verify() {
    let cast = Cast::new();
    let (_, steps) = trace(&cast, Deed::Packed);
    let writes: Vec<u64> =
        (0..).zip(&steps).filter(|(_, (op, _))| *op == FileOp::Write).map(|(step, _)| step).collect();
    assert!(writes.len() >= 6);
    for step in writes {
        let stage = cast.stage();
        let plan = Arc::new(Plan::new(step, Fault::Lie));
        cast.act(Deed::Packed, &with(&plan), stage.path()).unwrap();
        let verified = crate::verify(&stage.path().join("two"), &ParentDirs::siblings());
        assert!(matches!(verified, Err(Error::Damaged { .. })), "{:?}: {verified:?}", steps[step as usize]);
    }
}

#[test]
fn one_that_is_being_written_is_not_swept() {
    let _alone = alone();
    let cast = Cast::new();
    let stage = cast.stage();
    let files = FileOps::default();
    let place = stage.path().canonicalize().unwrap().join("two");
    let live = crate::staging::StagingDir::create(&files, place.clone()).unwrap();
    files.write(&live.path().join("state"), b"half").unwrap();
    cast.act(Deed::Over, &files, stage.path()).unwrap();
    assert!(live.path().join("state").exists(), "another save's directory stays");
    assert_eq!(names(stage.path()).len(), 3);
    drop(live);
    assert_eq!(names(stage.path()), ["one", "two"]);
}

#[test]
fn an_old_snapshot_is_not_removed_before_its_successor_is_known_to_be_on_the_disk() {
    let _alone = alone();
    let cast = Cast::new();
    for deed in [Deed::Over, Deed::Compact] {
        let (stage, steps) = trace(&cast, deed);
        let parent = stage.path().canonicalize().unwrap();
        // A leftover of a crash may be an old snapshot: its removal waits for a sync too.
        let first = steps.iter().position(|(op, _)| *op == FileOp::Remove).unwrap();
        assert!(
            steps[..first].iter().any(|(op, path)| *op == FileOp::SyncDir && path.canonicalize().unwrap() == parent)
        );
        let last = steps.iter().rposition(|(op, _)| *op == FileOp::SyncDir).unwrap();
        let stage = cast.stage();
        let plan = Arc::new(Plan::new(last as u64, Fault::Errno(Errno::IO)));
        let failed = cast.act(deed, &with(&plan), stage.path());
        assert!(matches!(failed, Err(Error::File { what: "synced", .. })), "{failed:?}");
        let aside: Vec<_> = names(stage.path()).into_iter().filter(|name| name.starts_with('.')).collect();
        let [aside] = aside.as_slice() else { panic!("{aside:?}") };
        let old = restored(&stage.path().join(aside), &cast.store, &crate::Load::Preload);
        assert!(old == cast.two, "{deed:?}: the old one is whole, in case the rename is not on the disk");
    }
}
