//! The order in which a journal is removed, with a crash after each step.

use super::*;

/// A left-behind journal with one written cluster and one of zeros.
fn left_behind() -> Bench {
    let bench = Bench::new();
    let mut disk = bench.forked();
    disk.submit(DiskOp::Zero { offset: 7 * CLUSTER, len: CLUSTER, unmap: true }, 1).unwrap();
    finish(&mut disk);
    write(&mut disk, 20 * CLUSTER, &[9; 9 * 4096]);
    flush(&mut disk);
    bench
}

fn expected() -> Vec<u8> {
    let mut model = vec![1; SIZE as usize];
    model[..4096].fill(2);
    model[7 * 4096..8 * 4096].fill(0);
    model[20 * 4096..29 * 4096].fill(9);
    model
}

#[test]
fn what_is_put_in_is_durable_before_the_journal_says_so_and_that_before_its_room_is_given_back() {
    let bench = left_behind();
    let (disk, steps) = traced(None, || bench.open());
    drop(disk);
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    let syncs = ["sync disk.img", "write journal", "sync journal"];
    let position = |wanted: &str| steps.iter().position(|step| step.starts_with(wanted)).unwrap();
    assert_eq!(position("write journal"), 0, "that the image is being written is said first: {steps:?}");
    assert_eq!(steps[1], "sync journal");
    // Each batch is synced, then recorded durably; the last one before the journal is removed.
    let batches = steps.iter().filter(|step| **step == "sync disk.img").count();
    assert_eq!(batches, 4, "10 clusters in batches of 4, and the id: {steps:?}");
    for (at, _) in steps.iter().enumerate().filter(|(_, step)| step.starts_with("write journal")).skip(1) {
        assert_eq!(steps[at - 1], "sync disk.img", "{steps:?}");
        assert_eq!(steps[at + 1], "sync journal", "{steps:?}");
    }
    let gone = position("rename journal journal.next");
    let after: Vec<&str> = steps[gone - syncs.len()..].to_vec();
    let written = format!("write journal {}", after[1].rsplit_once(' ').unwrap().1);
    let want = [
        "sync disk.img",
        &written,
        "sync journal",
        "rename journal journal.next",
        "sync disk.img.clade-journal",
        "unmark image",
        "sync disk.img",
    ];
    assert_eq!(after[..want.len()], want, "{steps:?}");
    let mut removed = after[want.len()..].to_vec();
    assert_eq!(removed.pop(), Some("remove disk.img.clade-journal"));
    removed.sort_unstable();
    assert_eq!(removed, ["remove journal.next", "remove overlay.0"]);
    assert!(bench.image() == expected());
}

/// The process ends after any step of an application, and of the one that continues it. This image
/// is never refused, though another would be.
#[test]
fn putting_in_can_end_after_any_step_and_be_gone_on_with() {
    let all = {
        let bench = left_behind();
        traced(None, || drop(bench.open())).1.len()
    };
    assert!(all > 15, "{all}");
    for first in 0..all {
        for second in [0, 1, 4, 8] {
            let bench = left_behind();
            let open = || Disk::open(&DiskConfig::new(&bench.path)).map(drop);
            let (ended, steps) = traced(Some(first), open);
            // Failures to remove harmless files are tolerated.
            let committed = steps.iter().filter(|step| step.starts_with("sync disk.img")).count() >= 5;
            assert!(ended.is_err() || committed, "{first}: {steps:?}");
            let (_, again) = traced(Some(second), open);
            open().unwrap_or_else(|error| panic!("{first}, {second}: {error} after {steps:?}, {again:?}"));
            assert!(bench.image() == expected(), "{first}, {second}: {steps:?}, {again:?}");
            assert!(!bench.journal.exists() && bench.mark().is_none(), "{first}, {second}");
        }
    }
}

/// The same for the first flush after a fork: it has promised nothing yet, so the image is not
/// refused.
#[test]
fn making_a_journal_can_end_after_any_step() {
    let flushed = |disk: &mut Disk| disk.flush_now();
    for steps in 0.. {
        let bench = Bench::new();
        let mut disk = bench.forked();
        let (ended, done) = traced(Some(steps), || flushed(&mut disk));
        drop(disk);
        drop(bench.open());
        let want = if ended.is_ok() { 2 } else { 1 };
        assert_eq!(bench.image()[0], want, "{steps}: {done:?}");
        assert!(!bench.journal.exists() && bench.mark().is_none(), "{steps}: {done:?}");
        if ended.is_ok() {
            assert!(done.len() >= 5, "{done:?}");
            return;
        }
    }
}

/// A copy of 9 clusters duplicates at most 4 of them at a time.
#[test]
fn the_room_is_not_needed_twice() {
    let bench = left_behind();
    let all = traced(None, || ()).1.len();
    assert_eq!(all, 0);
    let overlay = bench.journal.join("overlay.0");
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&overlay).unwrap()) * 512;
    let before = blocks();
    // Up to the record that the last batch is in the image.
    for steps in 0..100 {
        let (_, done) = traced(Some(steps), || Disk::open(&DiskConfig::new(&bench.path)).map(drop));
        if done.iter().any(|step| step.starts_with("rename")) {
            break;
        }
        if !overlay.exists() {
            break;
        }
        if done.iter().filter(|step| step.starts_with("write disk.img ")).count() >= 1 && blocks() < before {
            // Some of its room was freed before all of it was copied.
            return;
        }
    }
    panic!("nothing was given back before the end");
}
