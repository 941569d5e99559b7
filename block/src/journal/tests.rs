use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::space::STALE;
use clade_host_io::Request;

use super::*;
use crate::relocation::Relocation;
use crate::steps_trace::testing::traced;
use crate::testutil::{SOON, begin_write, finish, read, run, whole, write};
use crate::{CommitError, CommitReport, Disk, DiskConfig, DiskError, DiskOp, SECTOR};

const CLUSTERS: u64 = 40;
/// The last cluster is short.
const SIZE: u64 = CLUSTERS * CLUSTER - 3 * SECTOR;

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    journal: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![1; SIZE as usize]).unwrap();
        let journal = dir.path().join("disk.img.clade-journal");
        Self { _dir: dir, path, journal }
    }

    fn open(&self) -> Disk {
        Disk::open(&DiskConfig::new(&self.path)).unwrap()
    }

    /// A forked disk, with the first cluster written since.
    fn forked(&self) -> Disk {
        let mut disk = self.open();
        drop(disk.fork());
        write(&mut disk, 0, &[2; 4096]);
        disk
    }

    fn image(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    /// The journal's id in the image's attribute.
    fn mark(&self) -> Option<String> {
        let mut text = [0; 64];
        let len = rustix::fs::getxattr(&self.path, image_binding::XATTR, &mut text).ok()?;
        Some(String::from_utf8(text[..len].to_vec()).unwrap())
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.journal)
            .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
            .unwrap_or_default();
        names.sort_unstable();
        names
    }
}

fn flush(disk: &mut Disk) {
    disk.flush_now().unwrap();
}

#[test]
fn what_was_flushed_after_a_fork_is_there_when_the_process_is_not() {
    let bench = Bench::new();
    let mut disk = bench.open();
    flush(&mut disk);
    let image = disk.fork();
    flush(&mut disk);
    assert!(!bench.journal.exists(), "nothing has been written");
    write(&mut disk, 0, &[2; 8192]);
    disk.submit(DiskOp::Zero { offset: 3 * CLUSTER, len: CLUSTER, unmap: true }, 1).unwrap();
    finish(&mut disk);
    flush(&mut disk);
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    // In place, in the last cluster, and after another fork.
    write(&mut disk, 4096, &[3; 512]);
    write(&mut disk, SIZE - 512, &[4; 512]);
    drop(disk.fork());
    write(&mut disk, 5 * CLUSTER, &[5; 4096]);
    flush(&mut disk);
    assert_eq!(bench.names(), ["journal", "overlay.0", "overlay.1"]);
    // Moved but not flushed: may be lost.
    write(&mut disk, 6 * CLUSTER, &[6; 4096]);
    assert!(bench.image() == vec![1; SIZE as usize] && whole(&image) == vec![1; SIZE as usize]);
    drop((disk, image));

    let mut model = vec![1; SIZE as usize];
    model[..8192].fill(2);
    model[4096..4608].fill(3);
    model[3 * 4096..4 * 4096].fill(0);
    model[SIZE as usize - 512..].fill(4);
    model[5 * 4096..6 * 4096].fill(5);
    let config = DiskConfig { read_only: true, ..DiskConfig::new(&bench.path) };
    let mut reader = Disk::open(&config).unwrap();
    assert!(read(&mut reader, 0, SIZE as usize) == model, "a reader is shown it");
    assert!(bench.image() == vec![1; SIZE as usize], "and changes nothing");
    drop(reader);
    let mut disk = bench.open();
    assert!(bench.image() == model && read(&mut disk, 0, SIZE as usize) == model);
    assert!(!bench.journal.exists(), "it has been used up");
}

/// An overlay that an image contains keeps its name when the record goes: a file can be named only once.
#[test]
fn a_flush_after_a_rewind_and_another_is_durable() {
    // A disk that was put back to the first of two images, and flushed.
    let put_back = || {
        let bench = Bench::new();
        let mut disk = bench.open();
        let one = disk.fork();
        write(&mut disk, 0, &[2; 4096]);
        flush(&mut disk);
        let two = disk.fork();
        assert!(disk.rewind(&one));
        flush(&mut disk);
        assert_eq!(bench.names(), ["overlay.0"], "the image has everything");
        (bench, disk, one, two)
    };
    let (bench, mut disk, one, two) = put_back();
    assert!(disk.rewind(&two));
    write(&mut disk, 4096, &[3; 4096]);
    flush(&mut disk);
    assert!(disk.durability.journal().is_some(), "a flush is still durable");
    drop((disk, one, two));
    let mut disk = bench.open();
    assert!(read(&mut disk, 0, 8192) == [[2; 4096], [3; 4096]].concat());

    // The name goes when no image contains the overlay any more.
    let (bench, mut disk, one, two) = put_back();
    drop(two);
    flush(&mut disk);
    assert!(!bench.journal.exists());
    write(&mut disk, 0, &[4; 4096]);
    flush(&mut disk);
    drop((disk, one));
    assert!(read(&mut bench.open(), 0, 4097) == [&[4; 4096][..], &[1]].concat());
}

#[test]
fn a_commit_that_did_not_come_to_its_end_is_finished_by_the_next_to_open_the_image() {
    let mut model = vec![1; SIZE as usize];
    model[..5 * 4096].fill(2);
    for steps in 0.. {
        let bench = Bench::new();
        let mut disk = bench.open();
        drop(disk.fork());
        write(&mut disk, 0, &[2; 5 * 4096]);
        assert!(disk.keep());
        let (committed, done) = traced(Some(steps), || disk.commit());
        if let Err(failed) = committed {
            let (mut disk, refused) = *failed;
            let well = matches!(
                &refused,
                CommitError::Partial { kept: Some(kept), .. } if *kept == bench.journal
            ) || matches!(&refused, CommitError::Journal(_));
            assert!(well, "{refused}");
            assert!(read(&mut disk, 0, SIZE as usize) == model, "what is left is whole: {done:?}");
            drop(disk);
            drop(bench.open());
            assert!(bench.image() == model && !bench.journal.exists(), "{done:?}");
            continue;
        }
        assert!(done.len() > 10, "{done:?}");
        break;
    }

    // The obstacle is gone at the third attempt.
    let bench = Bench::new();
    let mut disk = bench.forked();
    assert!(disk.keep());
    drop(disk);
    let away = bench.journal.join("overlay.0");
    fs::rename(&away, bench.path.with_extension("away")).unwrap();
    let refused = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err().to_string();
    assert!(refused.starts_with(&away.display().to_string()), "{refused}");
    fs::rename(bench.path.with_extension("away"), &away).unwrap();
    let mut disk = bench.open();
    drop(disk.fork());
    write(&mut disk, 0, &[3; 4096]);
    let report = disk.commit().map_err(|refused| refused.1).unwrap();
    assert_eq!(report, CommitReport { copied: 4096, zeroed: 0, journaled: true });
    assert!(bench.image()[..4097] == [vec![3; 4096], vec![1]].concat() && !bench.journal.exists());
}

#[test]
fn what_cannot_be_committed_is_kept() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    let (disk, refused) = *disk.commit().unwrap_err();
    let CommitError::Shared { others: 1, kept: Some(kept), .. } = &refused else { panic!("{refused}") };
    assert_eq!(*kept, bench.journal);
    assert!(refused.to_string().contains("is put in when the image is opened next"), "{refused}");
    drop(disk);
    // The child is alone now, but the image does not belong to it.
    let mut child = image.open().unwrap();
    drop(image);
    write(&mut child, 0, &[3; 4096]);
    let (child, refused) = *child.commit().unwrap_err();
    assert!(matches!(&refused, CommitError::RecoveredJournal { dir, .. } if *dir == bench.journal), "{refused}");
    drop(child);
    drop(bench.open());
    assert!(bench.image()[..4097] == [vec![2; 4096], vec![1]].concat());
}

#[test]
fn a_journal_that_is_damaged_or_anothers_is_refused_and_nothing_is_lost() {
    let bench = Bench::new();
    let mut disk = bench.forked();
    flush(&mut disk);
    drop(disk);
    let journal = bench.journal.join("journal");
    let good = fs::read(&journal).unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    let refused = || {
        let error = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err();
        assert_eq!(bench.names(), ["journal", "overlay.0"]);
        match error {
            DiskError::Journal { path, source } if path == journal || path == bench.journal => source,
            other => panic!("{other}"),
        }
    };
    fs::write(&journal, &bad).unwrap();
    assert_eq!(refused(), JournalError::Damaged);
    fs::write(&journal, &good).unwrap();
    // Another user could have put the journal there.
    let mode = |mode| fs::set_permissions(&bench.journal, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    assert_eq!(refused(), JournalError::NotOurs);
    mode(0o700);
    // Another VM holds the lock.
    let other = File::open(&bench.journal).unwrap();
    other.lock().unwrap();
    let error = Disk::open(&DiskConfig::new(&bench.path)).unwrap_err().to_string();
    assert!(error.starts_with(bench.journal.to_str().unwrap()), "{error}");
    drop(other);
    drop(bench.open());
    assert!(bench.image()[..4096] == [2; 4096]);
}

#[test]
fn names_without_a_journal_are_nothing_and_a_link_leads_to_the_same_one() {
    let bench = Bench::new();
    fs::create_dir(&bench.journal).unwrap();
    fs::write(bench.journal.join("overlay.7"), [9; 4096]).unwrap();
    fs::write(bench.journal.join("journal.next"), [9; 100]).unwrap();
    let link = bench.path.with_extension("link");
    std::os::unix::fs::symlink(&bench.path, &link).unwrap();
    let mut disk = Disk::open(&DiskConfig::new(&link)).unwrap();
    assert!(!bench.journal.exists() && bench.image() == vec![1; SIZE as usize]);
    drop(disk.fork());
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    drop(disk);
    drop(bench.open());
    assert!(bench.image()[..4096] == [2; 4096]);
}

/// A read-only directory does not fail a flush, unless a journal is there already.
#[test]
fn what_cannot_be_is_told_from_what_failed() {
    let bench = Bench::new();
    let mut disk = bench.open();
    drop(disk.fork());
    let error = |errno| FileError { path: PathBuf::new(), what: "made", source: io::Error::from_raw_os_error(errno) };
    let journal = disk.durability.journal().unwrap();
    for errno in [libc::EACCES, libc::EROFS, libc::EPERM, libc::EXDEV, libc::EOPNOTSUPP] {
        assert!(journal.is_impossible(&error(errno)), "{errno}");
    }
    assert!(!journal.is_impossible(&error(libc::ENOSPC)) && !journal.is_impossible(&error(libc::EIO)));
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    assert!(!disk.durability.journal().unwrap().is_impossible(&error(libc::EACCES)), "what is there needs a flush");
}

/// Overlays on another file system cannot be given names beside the image.
#[test]
fn without_a_journal_a_flush_and_a_commit_are_what_they_can_be() {
    let bench = Bench::new();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = DiskConfig { overlays: Some(elsewhere.path().to_owned()), ..DiskConfig::new(&bench.path) };
    let device = |path: &Path| std::os::unix::fs::MetadataExt::dev(&fs::metadata(path).unwrap());
    if device(elsewhere.path()) == device(&bench.path) {
        clade_test_support::skipped("/dev/shm is the file system of the temporary directory");
        return;
    }
    let mut disk = Disk::open(&config).unwrap();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    flush(&mut disk);
    let (disk, refused) = *disk.commit().unwrap_err();
    assert!(matches!(refused, CommitError::Shared { others: 1, kept: None, .. }), "{refused}");
    drop(image);
    let report = disk.commit().map_err(|refused| refused.1).unwrap();
    assert_eq!(report, CommitReport { copied: 4096, zeroed: 0, journaled: false });
    assert!(!bench.journal.exists() && bench.image()[..4096] == [2; 4096]);
}

#[test]
fn the_journal_and_its_overlays_stay_few() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let mut model = vec![1; SIZE as usize];
    let mut most = (0, 0);
    for round in 0..200u64 {
        drop(disk.fork());
        let at = (round * 7 % 20) as usize * 4096;
        write(&mut disk, at as u64, &[round as u8; 4096]);
        model[at..at + 4096].fill(round as u8);
        flush(&mut disk);
        let journal = fs::metadata(bench.journal.join("journal")).unwrap().len();
        most = (most.0.max(bench.names().len()), most.1.max(journal));
    }
    // One for each cluster, and those that only the journal names.
    assert!(most.0 > STALE && most.0 <= 1 + 20 + STALE + 2, "{most:?}");
    assert!(most.1 < 16 << 10, "{most:?}");
    drop(disk);
    drop(bench.open());
    assert!(bench.image() == model);
}

/// Executes the request as the kernel would, and describes it.
fn carry_out(request: &Request) -> String {
    let name = |file: &IoFile| file.path().file_name().unwrap().to_str().unwrap().to_owned();
    match request {
        Request::Sync { file, all } => {
            file.sync_now().unwrap();
            format!("sync {}{}", name(file), if *all { ", all" } else { "" })
        }
        Request::Write { file, offset, buffers } => {
            let mut bytes = vec![0; buffers[0].len()];
            buffers[0].slice().copy_to(&mut bytes);
            file.write_now(&bytes, *offset).unwrap();
            format!("write {} at {offset}", name(file))
        }
        other => panic!("{other:?}"),
    }
}

/// Stopped after any step, and reopened.
#[test]
fn a_flush_is_in_order_and_one_step() {
    for stop in 0..9 {
        let bench = Bench::new();
        let beside = bench.path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let mut disk = bench.forked();
        let run = |disk: &mut Disk, most: usize| {
            let (map, mut done) = (disk.chain.map().clone(), Vec::new());
            let journal = disk.durability.journal_mut().unwrap();
            let first = journal.begin(&map, FlushState::default()).unwrap();
            done.extend(first.iter().map(carry_out));
            for _ in 0..most {
                match journal.next().unwrap() {
                    Some(request) => done.push(carry_out(&request)),
                    None => return (done, true),
                }
            }
            (done, false)
        };
        // The first journal, and one that is appended to.
        let (done, durable) = run(&mut disk, stop);
        let all = [
            &format!("sync {beside}, all"),
            "sync disk.img.clade-journal, all",
            "sync journal.next",
            "sync disk.img.clade-journal, all",
            // The overlay, known by the directory it was made in.
            &format!("sync {beside}"),
            "sync disk.img, all",
            "write journal.next at 56",
            "sync journal.next",
            "sync disk.img.clade-journal, all",
        ];
        assert_eq!(done, all[..(5 + stop).min(9)], "{stop}");
        assert_eq!(durable, stop > 4);
        if durable {
            drop(disk.fork());
            write(&mut disk, 4096, &[3; 4096]);
            let (done, _) = run(&mut disk, stop - 5);
            let all = [
                "sync disk.img.clade-journal, all",
                &format!("sync {beside}"),
                "write journal.next at 136",
                "sync journal.next",
            ];
            assert_eq!(done, all[..(2 + stop - 5).min(4)]);
        }
        drop(disk);
        drop(bench.open());
        let first = if stop >= 4 { 2 } else { 1 };
        let second = if stop >= 6 { 3 } else { 1 };
        assert_eq!((bench.image()[0], bench.image()[4096]), (first, second), "{stop}");
        assert!(!bench.journal.exists() && bench.mark().is_none(), "{stop}");
    }
}

#[test]
fn a_flush_that_failed_is_done_again_from_the_beginning() {
    let bench = Bench::new();
    let mut disk = bench.forked();
    let map = disk.chain.map().clone();
    let journal = disk.durability.journal_mut().unwrap();
    let told = |requests: Vec<Request>| requests.iter().map(carry_out).collect::<Vec<_>>();
    let first = told(journal.begin(&map, FlushState::default()).unwrap());
    assert_eq!(first.len(), 5);
    journal.give_up(false);
    assert_eq!(told(journal.begin(&map, FlushState::default()).unwrap()), first, "with the names, which are there");
    while let Some(request) = journal.next().unwrap() {
        carry_out(&request);
    }
    assert!(told(journal.begin(&map, FlushState::default()).unwrap()).is_empty() && journal.next().unwrap().is_none());
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    // The system reports a lost write only once.
    let _ = journal.begin(&map, FlushState::default()).unwrap();
    journal.give_up(true);
    let refused = journal.begin(&map, FlushState::default()).unwrap_err().to_string();
    assert!(refused.contains("a write to an overlay was lost"), "{refused}");
}

/// The journal keeps its overlays even if every other reference was dropped while it was written.
#[test]
fn an_overlay_that_the_journal_alone_has_stays() {
    let bench = Bench::new();
    let mut disk = bench.forked();
    flush(&mut disk);
    // A whole journal again, with no data to sync.
    let map = disk.chain.map().clone();
    let journal = disk.durability.journal_mut().unwrap();
    journal.replaced();
    assert!(journal.begin(&map, FlushState::default()).unwrap().is_empty());
    drop((map, disk.fork()));
    write(&mut disk, 0, &[3; 4096]);
    let journal = disk.durability.journal_mut().unwrap();
    assert!(journal.overlays[0].is_stale(), "the cluster is in another now");
    while let Some(request) = journal.next().unwrap() {
        carry_out(&request);
    }
    assert_eq!(bench.names(), ["journal", "overlay.0"]);
    drop(disk);
    drop(bench.open());
    assert!(bench.image()[..4096] == [2; 4096], "as it was flushed");
}

/// If the journal has its name, durably or not, the next flush has to retire it.
#[test]
fn a_journal_that_may_be_there_is_replaced_even_by_nothing() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    let map = disk.chain.map().clone();
    let journal = disk.durability.journal_mut().unwrap();
    journal.begin(&map, FlushState::default()).unwrap().iter().for_each(|request| drop(carry_out(request)));
    while bench.names().binary_search(&JOURNAL.to_owned()).is_err() {
        journal.next().unwrap().iter().for_each(|request| drop(carry_out(request)));
    }
    journal.give_up(false);
    assert_eq!(journal.kept_in(), Some(bench.journal.clone()));
    assert!(disk.rewind(&image));
    flush(&mut disk);
    drop((disk, image, map));
    drop(bench.open());
    assert!(bench.image() == vec![1; SIZE as usize], "it was put back");
}

/// The first flush has taken the data to sync; the second must not finish before it.
#[test]
fn a_flush_waits_for_the_one_before_it() {
    let bench = Bench::new();
    let latency = Some(Duration::from_millis(500));
    let mut disk = Disk::open(&DiskConfig { latency, ..DiskConfig::new(&bench.path) }).unwrap();
    write(&mut disk, 0, &[2; 4096]);
    disk.submit(DiskOp::Flush, 1).unwrap();
    drop(disk.fork());
    disk.submit(DiskOp::Flush, 2).unwrap();
    disk.kick().unwrap();
    assert!(disk.take_done().is_empty(), "neither is done");
    let mut order = Vec::new();
    while disk.in_flight() > 0 {
        disk.wait(SOON).unwrap();
        order.extend(disk.reap().unwrap().iter().map(|done| done.token));
    }
    assert_eq!(order, [1, 2]);
}

mod binding;
mod order;
mod survival;

/// An overlay that another process gets for reading is never opened for writing again. An overlay
/// of a disk with a journal gets a name, by which it can be opened and written.
#[test]
fn overlays_are_written_again_only_where_a_journal_names_them() {
    let bench = Bench::new();
    let mode = |disk: &Disk| rustix::fs::fstat(&**disk.chain.active().unwrap()).unwrap().st_mode & 0o7777;
    let mut disk = bench.open();
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    assert_eq!(mode(&disk), 0o600);
    drop(image);
    // In another process a disk has layers, and no writable image.
    let config = DiskConfig::new(&bench.path);
    let mut child = crate::DiskImage::from_layers(&config, SIZE, &[]).unwrap().open().unwrap();
    write(&mut child, 0, &[2; 4096]);
    assert_eq!(mode(&child), 0o400);
    let mut grandchild = child.fork().open().unwrap();
    write(&mut grandchild, 0, &[3; 4096]);
    assert_eq!(mode(&grandchild), 0o400);
}

/// A loop device over a file, until it is dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let made = made.map_err(|error| error.to_string()).and_then(|made| match made.status.success() {
            true => Ok(String::from_utf8_lossy(&made.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&made.stderr).into_owned()),
        });
        match made {
            Ok(device) => Some(Self(device)),
            Err(error) => {
                clade_test_support::skip("mount", &format!("no loop device: {error}"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// The image of a disk without a journal may be writable: a block device's overlays never get a
/// name either.
#[test]
fn overlays_of_a_block_device_are_never_written_again() {
    // A program that is started inherits the locks of tests that run beside it, for a moment.
    if std::env::var_os("NEXTEST").is_none() {
        return clade_test_support::skipped("only in a process of its own, as cargo nextest runs it");
    }
    let bench = Bench::new();
    let Some(device) = Loop::over(&bench.path) else { return };
    let mut disk = Disk::open(&DiskConfig::new(Path::new(&device.0))).unwrap();
    write(&mut disk, 0, &[1; 4096]);
    let image = disk.fork();
    write(&mut disk, 0, &[2; 4096]);
    let active = disk.chain.active().unwrap();
    assert_eq!(rustix::fs::fstat(&**active).unwrap().st_mode & 0o7777, 0o400);
    drop((disk, image));
}
