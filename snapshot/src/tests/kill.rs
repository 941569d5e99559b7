//! The process is killed at every step: afterwards the old snapshot is there, or the new one.

use std::os::unix::fs::chown;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use clade_memory::Store;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::faults::{Fault, Plan};
use super::support::*;
use crate::files::FileOps;
use crate::{Compression, Load, ParentDirs, Snapshot};

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

/// A user that has no process.
const NOBODY: u32 = 0x7ead_0001;

/// Not a test of its own: the next test starts it as a user who may have no further thread.
#[test]
#[ignore = "is started by `a_host_without_a_further_thread_ends_no_process`"]
fn threadless() {
    let dir = std::env::var(HOW).unwrap();
    let at = Path::new(&dir);
    let store = Store::open_small().unwrap();
    let ram = born(&layout(), &store);
    // In several chunks, which threads share.
    [2, 3, 60, 100, 150].into_iter().for_each(|page| put(&ram, page, page as u8));
    let packed = Saving { compression: Compression::Zstd, ..Saving::default() };
    packed.save(&freeze(&ram), &at.join("packed")).unwrap();
    let hard = getrlimit(Resource::Nproc).maximum;
    let limit = |threads| setrlimit(Resource::Nproc, Rlimit { current: Some(threads), maximum: hard }).unwrap();
    let spawn = || std::thread::Builder::new().spawn(std::thread::park);
    // A thread counts until its directory has gone, which is after its join.
    let tasks = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let own = tasks();
    // Measures the host, by a thread: not under the limit.
    let _measured = clade_test_support::Patience::default();
    // The thread that writes, and none that compresses.
    let one_more = (1..100).find(|threads| {
        limit(*threads);
        let further = spawn().ok().map(|thread| (spawn().is_err(), thread));
        further.is_some_and(|(is_last, thread)| {
            thread.thread().unpark();
            thread.join().unwrap();
            clade_test_support::wait_until("the end of the thread", || tasks() == own);
            is_last
        })
    });
    let one_more = one_more.expect("a number of threads that leaves one");
    packed.save(&freeze(&ram), &at.join("alone")).unwrap();
    let alone = Snapshot::open(&at.join("alone"), &ParentDirs::siblings()).unwrap();
    assert_eq!(contents(&child(&alone.restore_ram(&store, &Load::Lazy).unwrap(), &store)), contents(&ram));
    limit(one_more - 1);
    assert!(spawn().is_err(), "the limit is not there");
    let refused = packed.save(&freeze(&ram), &at.join("new")).unwrap_err();
    assert!(refused.to_string().contains("written by a thread of its own"), "{refused}");
    assert_eq!(names(at), ["alone", "packed"], "nothing is left beside it");
    // What one thread can do as well is done.
    let snapshot = Snapshot::open(&at.join("packed"), &ParentDirs::siblings()).unwrap();
    let image = snapshot.restore_ram(&store, &Load::Preload).unwrap();
    assert_eq!(contents(&child(&image, &store)), contents(&ram));
}

#[test]
fn a_host_without_a_further_thread_ends_no_process() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (program, own) = (dir.path().join("program"), dir.path().join("own"));
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::create_dir(&own).unwrap();
    let owned = chown(dir.path(), Some(NOBODY), Some(NOBODY)).and_then(|()| chown(&own, Some(NOBODY), Some(NOBODY)));
    let as_other = || {
        let mut child = Command::new(&program);
        child.current_dir("/").uid(NOBODY).gid(NOBODY);
        child
    };
    // Not by another user than root, in some containers, and from a directory that is not everyone's.
    if let Err(error) = owned.and_then(|()| as_other().arg("--list").output().map(drop)) {
        return clade_test_support::skip("root", &format!("no program runs as a user without processes: {error}"));
    }
    let mut child = as_other();
    child.args(["--exact", "tests::kill::threadless", "--ignored", "--test-threads=1", "--nocapture"]);
    child.env(HOW, &own).env(SCRATCH, &own);
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
