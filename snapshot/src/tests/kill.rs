//! The process is killed at every step: afterwards the old snapshot is there, or the new one.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::faults::{Fault, Plan};
use super::support::*;
use crate::files::FileOps;

const HOW: &str = "CLADE_SNAPSHOT_KILL";

/// Not a test of its own: the next test starts and kills it.
#[test]
#[ignore = "is started by `killed_at_any_step`, and killed"]
fn victim() {
    let how = std::env::var(HOW).unwrap();
    let mut how = how.splitn(3, ' ');
    let mut next = || how.next().unwrap();
    let (deed, step, stage): (usize, u64, _) = (next().parse().unwrap(), next().parse().unwrap(), next().to_owned());
    let cast = Cast::new();
    let files = FileOps { plan: Some(Arc::new(Plan::new(step, Fault::Kill))) };
    // Its own `one` is not the stage's, whose identity an incremental save is to be on top of.
    cast.act_on_copy(DEEDS[deed], &files, Path::new(&stage)).unwrap();
}

#[test]
fn killed_at_any_step() {
    let _alone = alone();
    let (cast, stride) = (Cast::new(), clade_test_support::stride());
    let left_behind = scratch();
    for (number, deed) in DEEDS.into_iter().enumerate() {
        // Each deed begins at another step.
        let mut step = number % stride;
        loop {
            let stage = cast.stage();
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "tests::kill::victim", "--ignored", "--test-threads=1"]);
            child.env(HOW, format!("{number} {step} {}", stage.path().display())).env(SCRATCH, left_behind.path());
            let status = child.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
            let killed = status.signal() == Some(9);
            assert!(killed || status.success(), "{deed:?} at step {step}: {status:?}");
            let what = format!("{deed:?} killed at step {step}");
            let new = cast.check(deed, stage.path(), &what);
            cast.act(deed, &FileOps::default(), stage.path())
                .unwrap_or_else(|error| panic!("{what}: retry: {error:?}"));
            assert!(cast.check(deed, stage.path(), &what), "{what}: retry");
            if !killed {
                assert!(new && step > 5, "{deed:?} ended after {step} steps");
                break;
            }
            step += stride;
        }
    }
}
