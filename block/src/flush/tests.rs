use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_host_io::Gate;

use super::*;
use crate::steps_trace::testing::{fail_syncs_of, traced};
use crate::testutil::{SOON, begin_write, finish, read, write};
use crate::{CLUSTER, CommitError, DiskConfig, DiskHealth, DiskOp};

const SIZE: u64 = 8 << 20;

struct Bench {
    dir: tempfile::TempDir,
    path: PathBuf,
    journal: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![1; SIZE as usize]).unwrap();
        let journal = dir.path().join("disk.img.clade-journal");
        Self { dir, path, journal }
    }

    fn open(&self) -> Disk {
        Disk::open(&DiskConfig::new(&self.path)).unwrap()
    }

    /// Bytes allocated to the journal.
    fn room(&self) -> u64 {
        let entries = fs::read_dir(&self.journal).into_iter().flatten();
        entries.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
    }

    fn image(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

fn flush(disk: &mut Disk) {
    disk.flush_now().unwrap();
}

/// Waits until the moves have ended, as a device's thread does.
fn settle(disk: &mut Disk) {
    finish(disk);
    assert!(disk.chain.relocation().is_idle());
}

fn syncs(steps: &[String]) -> usize {
    steps.iter().filter(|step| *step == "engine: sync disk.img").count()
}

#[test]
fn a_flush_of_the_image_that_failed_is_never_followed_by_one_that_succeeds() {
    let bench = Bench::new();
    let mut disk = bench.open();
    write(&mut disk, 0, &[2; 4096]);
    fail_syncs_of(Some("disk.img"));
    let error = disk.flush_now().unwrap_err();
    assert!(matches!(error, DiskError::Transfer(_)), "{error}");
    fail_syncs_of(None);
    assert_eq!(disk.health(), DiskHealth { no_room: 0, lost: true });
    // The system reports the lost write once: the next sync would succeed.
    for _ in 0..2 {
        let error = disk.flush_now().unwrap_err();
        assert!(matches!(&error, DiskError::Lost { path } if *path == bench.path), "{error}");
    }
    drop(disk.fork());
    write(&mut disk, 0, &[3; 4096]);
    assert!(matches!(disk.flush_now(), Err(DiskError::Lost { .. })));
    let (_, error) = *disk.commit().unwrap_err();
    assert!(matches!(&error, CommitError::Lost { path } if *path == bench.path), "{error}");
}

/// A copy of the disk takes the system's report of the loss, which a flush would have had.
#[test]
fn no_flush_succeeds_after_a_copy_has_found_a_loss() {
    let bench = Bench::new();
    // Of the image, and of overlays before and after their first flush, and of one that is no longer written.
    for (is_forked, is_flushed, is_frozen) in
        [(false, false, false), (true, false, false), (true, true, false), (true, false, true), (true, true, true)]
    {
        let mut disk = bench.open();
        if is_forked {
            drop(disk.fork());
        }
        write(&mut disk, 0, &[2; 4096]);
        if is_flushed {
            flush(&mut disk);
        }
        if is_frozen {
            drop(disk.fork());
            write(&mut disk, CLUSTER, &[3; 4096]);
        }
        let crate::map::ClusterSource::File(file) = disk.chain.map().at(0) else { panic!("no file") };
        file.note_lost_writes();
        for _ in 0..2 {
            let (flushed, steps) = traced(None, || disk.flush_now());
            assert!(flushed.is_err(), "forked: {is_forked}, flushed: {is_flushed}, frozen: {is_frozen}");
            assert!(disk.health().lost && (is_forked || syncs(&steps) == 0), "{steps:?}");
        }
    }
}

/// The rest of a cluster that is written in part is read from a file whose writeback fails meanwhile. The file is not
/// in the disk's map afterwards.
#[test]
fn no_flush_succeeds_after_the_rest_of_a_cluster_was_lost_while_it_was_read() {
    for is_lost in [true, false] {
        let bench = Bench::new();
        let mut disk = bench.open();
        drop(disk.fork());
        write(&mut disk, 0, &[2; 4096]);
        drop(disk.fork());
        let crate::map::ClusterSource::File(file) = disk.chain.map().at(0) else { panic!("no file") };
        let gate = Gate::close(bench.dir.path()).unwrap();
        begin_write(&mut disk, 512, &[3; 512], 1);
        disk.kick().unwrap();
        if is_lost {
            file.note_lost_writes();
        }
        gate.open();
        settle(&mut disk);
        assert!(!disk.chain.map().pieces(0..SIZE / CLUSTER).any(|(_, source)| source.is(&file)));
        assert_eq!(disk.flush_now().is_err(), is_lost);
        assert_eq!(disk.health().lost, is_lost);
    }
}

/// The same for the sync of the image in a flush after a fork.
#[test]
fn a_flush_after_a_fork_syncs_the_image_too_and_its_failure_is_latched() {
    let bench = Bench::new();
    let mut disk = bench.open();
    write(&mut disk, 0, &[2; 4096]);
    drop(disk.fork());
    let (_, steps) = traced(None, || flush(&mut disk));
    assert_eq!(syncs(&steps), 1, "{steps:?}");
    let (_, steps) = traced(None, || flush(&mut disk));
    assert_eq!(syncs(&steps), 0, "nothing was written since: {steps:?}");

    let mut disk =
        Disk::open(&DiskConfig { overlays: Some("/dev/shm".into()), ..DiskConfig::new(&other(&bench)) }).unwrap();
    write(&mut disk, 0, &[2; 4096]);
    drop(disk.fork());
    let (_, steps) = traced(None, || flush(&mut disk));
    assert_eq!(steps, ["engine: sync other.img"], "without a journal as well");

    let bench = Bench::new();
    let mut disk = bench.open();
    write(&mut disk, 0, &[2; 4096]);
    drop(disk.fork());
    write(&mut disk, 0, &[3; 4096]);
    fail_syncs_of(Some("disk.img"));
    assert!(disk.flush_now().is_err());
    fail_syncs_of(None);
    assert!(matches!(disk.flush_now(), Err(DiskError::Lost { .. })));
}

/// A child in the same process shares the image's open file.
#[test]
fn a_childs_flush_leaves_the_parents_writes_to_its_parent() {
    let bench = Bench::new();
    let mut disk = bench.open();
    write(&mut disk, 0, &[2; 4096]);
    let mut child = disk.fork().open().unwrap();
    write(&mut child, 4096, &[3; 4096]);
    let (_, steps) = traced(None, || flush(&mut child));
    assert!(steps.is_empty(), "{steps:?}");
    let (_, steps) = traced(None, || flush(&mut disk));
    assert_eq!(syncs(&steps), 1, "{steps:?}");
}

fn other(bench: &Bench) -> PathBuf {
    let path = bench.path.with_file_name("other.img");
    fs::write(&path, vec![1; 8192]).unwrap();
    path
}

/// Writes of a process that has ended are in the page cache, and can be read.
#[test]
fn the_first_flush_is_about_what_others_have_left_too() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let (_, steps) = traced(None, || flush(&mut disk));
    assert_eq!(steps, ["engine: sync disk.img"]);
    let (_, steps) = traced(None, || flush(&mut disk));
    assert!(steps.is_empty(), "{steps:?}");
}

/// A cancelled flush has promised nothing: the next flush syncs its data.
#[test]
fn a_flush_that_was_cancelled_is_done_by_the_next() {
    for forked in [false, true] {
        let bench = Bench::new();
        let latency = Some(Duration::from_secs(60));
        let mut disk = bench.open();
        write(&mut disk, 0, &[2; 4096]);
        if forked {
            drop(disk.fork());
            write(&mut disk, 0, &[3; 4096]);
        }
        if let Some(engine) = disk.requests.engine_mut() {
            engine.set_latency(latency);
        }
        disk.submit(DiskOp::Flush, 1).unwrap();
        disk.kick().unwrap();
        disk.cancel();
        let mut done = disk.take_done();
        while done.is_empty() {
            disk.wait(SOON).unwrap();
            done.extend(disk.reap().unwrap());
        }
        assert!(done[0].result.is_err());
        if let Some(engine) = disk.requests.engine_mut() {
            engine.set_latency(None);
        }
        let (_, steps) = traced(None, || flush(&mut disk));
        assert!(syncs(&steps) >= 1, "{forked}: {steps:?}");
        assert!(!disk.health().lost);
    }
}

#[test]
fn overlays_go_back_into_the_image_when_nobody_else_needs_it() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let child = disk.fork();
    let mut model = vec![1; SIZE as usize];
    write(&mut disk, 0, &[2; 300 * 4096]);
    model[..300 * 4096].fill(2);
    disk.submit(DiskOp::Zero { offset: 400 * CLUSTER, len: 9 * CLUSTER, unmap: true }, 1).unwrap();
    finish(&mut disk);
    model[400 * 4096..409 * 4096].fill(0);
    for _ in 0..4 {
        flush(&mut disk);
        settle(&mut disk);
    }
    assert!(bench.image() == vec![1; SIZE as usize], "a child has it in its map");
    assert!(bench.room() >= 300 * 4096);
    let mut other = child.open().unwrap();
    drop(child);
    assert!(read(&mut other, 0, 4096) == [1; 4096]);
    drop(other);
    // The disk is alone for the second time: folding begins. Writes, zeros and reads go on
    // meanwhile.
    flush(&mut disk);
    assert!(!disk.chain.is_folding());
    flush(&mut disk);
    assert!(disk.chain.is_folding());
    begin_write(&mut disk, 100 * CLUSTER + 512, &[3; 512], 7);
    model[100 * 4096 + 512..100 * 4096 + 1024].fill(3);
    disk.submit(DiskOp::Zero { offset: 150 * CLUSTER + 512, len: 2 * CLUSTER, unmap: true }, 8).unwrap();
    model[150 * 4096 + 512..152 * 4096 + 512].fill(0);
    disk.submit(DiskOp::Discard { offset: 160 * CLUSTER, len: CLUSTER }, 9).unwrap();
    model[160 * 4096..161 * 4096].fill(0);
    settle(&mut disk);
    assert!(read(&mut disk, 0, SIZE as usize) == model);
    assert!(disk.chain.is_all_base() && disk.is_forked());
    assert!(bench.journal.exists(), "until a flush says that it is over");
    let (_, steps) = traced(None, || flush(&mut disk));
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    let order = [
        "engine: sync disk.img",
        "rename journal journal.next",
        "engine: sync disk.img.clade-journal",
        "unmark image",
        "engine: sync disk.img",
    ];
    assert_eq!(steps[..order.len()], order);
    assert!(!bench.journal.exists() && !disk.is_forked());
    assert!(bench.image() == model);
    // The state of a disk that was never forked; then once more.
    write(&mut disk, 0, &[4; 4096]);
    flush(&mut disk);
    drop(disk.fork());
    write(&mut disk, 4096, &[5; 4096]);
    flush(&mut disk);
    drop(disk);
    drop(bench.open());
    assert!(bench.image()[..8192] == [[4; 4096], [5; 4096]].concat());
}

/// Data written to the image during a fold is durable before the journal refers to it.
#[test]
fn a_flush_after_a_fork_in_the_middle_of_folding_syncs_the_image_first() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    flush(&mut disk);
    assert!(disk.chain.is_folding());
    settle(&mut disk);
    write(&mut disk, 8192, &[3; 4096]);
    drop(disk.fork());
    write(&mut disk, 4096, &[4; 4096]);
    let (_, steps) = traced(None, || flush(&mut disk));
    assert_eq!(steps.iter().position(|step| step == "engine: sync disk.img"), Some(1), "after a name: {steps:?}");
    drop(disk);
    drop(bench.open());
    assert!(bench.image()[..12288] == [[2; 4096], [4; 4096], [3; 4096]].concat());
}

/// A disk that folds and has been reaped `turns` times, and its content.
fn folding(bench: &Bench, turns: usize) -> (Disk, Vec<u8>) {
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 600 * 4096]);
    let mut model = vec![1; SIZE as usize];
    model[..600 * 4096].fill(2);
    flush(&mut disk);
    flush(&mut disk);
    assert!(disk.chain.is_folding());
    for _ in 0..turns {
        disk.wait(SOON).unwrap();
        drop(disk.reap().unwrap());
    }
    (disk, model)
}

/// The process ends in the middle; or a fork comes, whose child sees its instant.
#[test]
fn folding_can_end_or_be_forked_anywhere() {
    for turns in (0..12).step_by(clade_test_support::stride()) {
        for forks in [false, true] {
            let bench = Bench::new();
            let (mut disk, mut model) = folding(&bench, turns);
            if forks {
                let image = disk.fork();
                write(&mut disk, 0, &[7; 4096]);
                settle(&mut disk);
                flush(&mut disk);
                let mut child = image.open().unwrap();
                assert!(read(&mut child, 0, SIZE as usize) == model, "{turns}");
                model[..4096].fill(7);
                assert!(read(&mut disk, 0, SIZE as usize) == model, "{turns}");
            }
            drop(disk);
            drop(bench.open());
            assert!(bench.image() == model, "{turns}, {forks}");
            assert!(!bench.journal.exists());
        }
    }
}

/// A suspension, or a reset of the device, drops the moves that are queued.
#[test]
fn folding_goes_on_after_its_moves_were_dropped() {
    for turns in (0..12).step_by(clade_test_support::stride()) {
        let bench = Bench::new();
        let (mut disk, model) = folding(&bench, turns);
        disk.cancel();
        settle(&mut disk);
        for _ in 0..3 {
            flush(&mut disk);
            settle(&mut disk);
        }
        assert!(!disk.chain.is_folding() && !bench.journal.exists(), "{turns}");
        assert!(bench.image() == model, "{turns}");
    }
}

/// A disk of 8 MiB once had 136 MiB of overlays.
#[test]
fn the_journal_takes_twice_the_disk_at_most() {
    let most = |children: bool, left_out: u64, hasty: bool| {
        let bench = Bench::new();
        let mut disk = bench.open();
        let child = disk.fork();
        let kept = children.then_some(child);
        let (mut most, mut model) = (0, vec![1; SIZE as usize]);
        for round in 0..24u64 {
            drop(disk.fork());
            let byte = round as u8 + 10;
            // This many clusters of each overlay stay in use.
            let start = left_out * round * CLUSTER;
            write(&mut disk, start, &vec![byte; (SIZE - start) as usize]);
            model[start as usize..].fill(byte);
            flush(&mut disk);
            most = most.max(bench.room());
            if !hasty {
                settle(&mut disk);
            }
        }
        flush(&mut disk);
        assert!(read(&mut disk, 0, SIZE as usize) == model);
        drop((disk, kept));
        drop(bench.open());
        assert!(bench.image() == model);
        most
    };
    for (children, left_out) in [(false, 0), (true, 0), (true, 1), (true, 37)] {
        for hasty in [false, true] {
            let most = most(children, left_out, hasty);
            let what = format!("children {children}, {left_out} clusters a round of use, hasty {hasty}");
            println!("{most} bytes with {what}");
            assert!(most <= 2 * SIZE + (4 << 20), "{most} bytes with {what}");
        }
    }
}

#[test]
fn a_guest_that_discards_here_and_there_costs_the_host_a_bounded_map() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    fs::File::create(&path).unwrap().set_len(16 << 30).unwrap();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    drop(disk.fork());
    let all = crate::steps::MAX_EXTENTS as u64;
    for cluster in 0..3 * all {
        disk.submit(DiskOp::Discard { offset: 2 * cluster * CLUSTER, len: CLUSTER }, cluster).unwrap();
        assert!(disk.take_done().pop().unwrap().result.is_ok());
    }
    let (extents, _) = disk.extents_and_files();
    assert!(extents <= all as usize + 2, "{extents}");
    // Zeros read as zeros even over earlier data.
    let at = 10 << 30;
    write(&mut disk, at, &[5; 3 * 4096]);
    disk.submit(DiskOp::Zero { offset: at + CLUSTER, len: CLUSTER, unmap: true }, 1).unwrap();
    disk.submit(DiskOp::Zero { offset: at + 512, len: 512, unmap: true }, 2).unwrap();
    finish(&mut disk);
    let mut want = vec![5; 3 * 4096];
    want[4096..8192].fill(0);
    want[512..1024].fill(0);
    assert!(read(&mut disk, at, 3 * 4096) == want);
    let (before, _) = disk.extents_and_files();
    // A large range becomes an extent: a disk has room for few of them.
    disk.submit(DiskOp::Discard { offset: 11 << 30, len: MIB }, 1).unwrap();
    finish(&mut disk);
    assert_eq!(disk.extents_and_files().0, before + 2);
    // Adjacent extents are merged.
    disk.submit(DiskOp::Discard { offset: 0, len: 12 << 30 }, 1).unwrap();
    finish(&mut disk);
    assert!(disk.extents_and_files().0 < 10);
}

#[test]
fn overlays_that_cannot_be_made_are_known_before_the_vm_boots() {
    let bench = Bench::new();
    for dir in ["/proc", "/no/such/directory"] {
        let config = DiskConfig { overlays: Some(dir.into()), ..DiskConfig::new(&bench.path) };
        let error = Disk::open(&config).map(drop).unwrap_err();
        assert!(matches!(&error, DiskError::Overlays { dir: named, .. } if named == Path::new(dir)), "{error}");
        assert!(error.to_string().contains(dir) && error.to_string().contains("overlays="), "{error}");
        // A read-only disk needs no overlay.
        if dir == "/proc" {
            drop(Disk::open(&DiskConfig { read_only: true, ..config }).unwrap());
        }
    }
}

#[test]
fn an_export_may_be_used_by_whom_the_image_may_be() {
    let bench = Bench::new();
    let mut disk = bench.open();
    for (number, mode) in [0o600, 0o644, 0o660, 0o400].into_iter().enumerate() {
        fs::set_permissions(&bench.path, fs::Permissions::from_mode(mode)).unwrap();
        let to = bench.dir.path().join(format!("exported.{number}"));
        disk.fork().export(&to).unwrap();
        let found = fs::metadata(&to).unwrap().permissions().mode() & 0o7777;
        assert_eq!(found, mode, "{found:o}");
    }
}

#[test]
fn a_commit_of_what_was_lost_does_not_succeed() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    // The overlay has its directory's name.
    let name = bench.dir.path().file_name().unwrap().to_str().unwrap().to_owned();
    fail_syncs_of(Some(&name));
    assert!(disk.flush_now().is_err());
    fail_syncs_of(None);
    assert!(disk.health().lost);
    let (_, error) = *disk.commit().unwrap_err();
    assert!(matches!(error, CommitError::Lost { .. }), "{error}");
    assert!(bench.image() == vec![1; SIZE as usize]);

    // Without a journal the commit is the first to sync the overlay.
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let bench = Bench::new();
    let config = DiskConfig { overlays: Some(elsewhere.path().to_owned()), ..DiskConfig::new(&bench.path) };
    let mut disk = Disk::open(&config).unwrap();
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    let (committed, steps) = traced(Some(0), || disk.commit());
    let (_, error) = *committed.unwrap_err();
    assert!(matches!(error, CommitError::Lost { .. }), "{error}: {steps:?}");
    assert!(bench.image() == vec![1; SIZE as usize]);
}

/// A mount that ends with the test.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn tmpfs(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        if rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, options.as_c_str()).is_ok() {
            return Some(Self(dir));
        }
        clade_test_support::skip("mount", "no tmpfs can be mounted");
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn overlays_without_room_are_counted() {
    let Some(mounted) = Mounted::tmpfs(1 << 20) else { return };
    let bench = Bench::new();
    let config = DiskConfig { overlays: Some(mounted.0.path().to_owned()), ..DiskConfig::new(&bench.path) };
    let mut disk = Disk::open(&config).unwrap();
    drop(disk.fork());
    let before = disk.health();
    for token in 1..6 {
        begin_write(&mut disk, token << 20, &[2; 1 << 20], token);
    }
    let mut failed = 0;
    while disk.in_flight() > 0 {
        disk.wait(SOON).unwrap();
        failed += disk.reap().unwrap().iter().filter(|done| done.result.is_err()).count() as u64;
    }
    assert_eq!(before, DiskHealth::default());
    assert!(failed >= 4, "{failed}");
    assert_eq!(disk.health(), DiskHealth { no_room: failed, lost: false });
}

mod replaced;
mod waits;
