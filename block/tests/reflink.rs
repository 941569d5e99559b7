//! Disks on XFS and Btrfs: a flush after a fork makes a new image that shares its blocks, without a
//! journal.
//!
//! Without root, loop devices or mkfs it prints `skipped: REASON`, unless the environment's
//! CLADE_REQUIRE names `mount`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clade_block::{CommitError, Disk, DiskConfig, DiskOp};
use clade_host_io::{AlignedBuf, Fragment};

const CLUSTER: u64 = 4096;
/// The last cluster is short.
const SIZE: u64 = 200 * CLUSTER - 512;
const SOON: Duration = Duration::from_secs(10);

/// A file system on a loop device, unmounted on drop.
struct Mounted {
    dir: tempfile::TempDir,
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {args:?}: {text}")) }
}

impl Mounted {
    fn new(mkfs: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (device, at) = (dir.path().join("device"), dir.path().join("mnt"));
        fs::create_dir(&at).unwrap();
        fs::File::create(&device).unwrap().set_len(400 << 20).unwrap();
        let made = run(mkfs, &["-q", device.to_str().unwrap()])
            .and_then(|()| run("mount", &["-o", "loop", device.to_str().unwrap(), at.to_str().unwrap()]));
        if let Err(error) = made {
            clade_test_support::skip("mount", &error);
            return None;
        }
        Some(Self { dir })
    }

    /// An empty directory on it.
    fn room(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("mnt").join(name);
        fs::create_dir(&path).unwrap();
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", self.dir.path().join("mnt").to_str().unwrap()]);
    }
}

fn image(room: &Path) -> PathBuf {
    let path = room.join("disk.img");
    fs::write(&path, vec![1; SIZE as usize]).unwrap();
    path
}

fn open(path: &Path) -> Disk {
    Disk::open(&DiskConfig::new(path)).unwrap()
}

fn finish(disk: &mut Disk) {
    disk.kick().unwrap();
    loop {
        for done in disk.take_done().into_iter().chain(disk.reap().unwrap()) {
            done.result.unwrap();
        }
        if disk.in_flight() == 0 {
            return;
        }
        disk.wait(SOON).unwrap();
    }
}

fn write(disk: &mut Disk, offset: u64, len: u64, byte: u8) {
    let bytes = Arc::new(AlignedBuf::new(len as usize));
    let buffer = Fragment::owned(&bytes, 0, len as usize).unwrap();
    buffer.slice().copy_from(&vec![byte; len as usize]);
    disk.submit(DiskOp::Write { offset, buffers: vec![buffer] }, 1).unwrap();
    finish(disk);
}

fn zero(disk: &mut Disk, offset: u64, len: u64) {
    disk.submit(DiskOp::Zero { offset, len, unmap: true }, 1).unwrap();
    finish(disk);
}

fn flush(disk: &mut Disk) {
    disk.submit(DiskOp::Flush, 1).unwrap();
    finish(disk);
}

fn read(disk: &mut Disk) -> Vec<u8> {
    let bytes = Arc::new(AlignedBuf::new(SIZE as usize));
    let buffer = Fragment::owned(&bytes, 0, SIZE as usize).unwrap();
    disk.submit(DiskOp::Read { offset: 0, buffers: vec![buffer.clone()] }, 1).unwrap();
    finish(disk);
    let mut found = vec![0; SIZE as usize];
    buffer.slice().copy_to(&mut found[..]);
    found
}

fn names(room: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(room).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

fn on_each(test: impl Fn(&Mounted)) {
    // One after the other: a process started elsewhere in this one would inherit locks.
    for mkfs in ["mkfs.xfs", "mkfs.btrfs"] {
        if let Some(mounted) = Mounted::new(mkfs) {
            println!("{mkfs}");
            test(&mounted);
        }
    }
}

fn a_flush_after_a_fork_is_in_the_image_itself(mounted: &Mounted) {
    let room = mounted.room("flush");
    let path = image(&room);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    rustix::fs::setxattr(&path, "user.note", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    let before = fs::metadata(&path).unwrap().ino();
    let mut disk = open(&path);
    let first = disk.fork();
    let mut child = first.open().unwrap();
    flush(&mut disk);
    assert_eq!(fs::metadata(&path).unwrap().ino(), before, "nothing was written");
    let mut model = vec![1; SIZE as usize];
    write(&mut disk, 700, 5000, 2);
    model[700..5700].fill(2);
    write(&mut disk, SIZE - 512, 512, 3);
    model[SIZE as usize - 512..].fill(3);
    zero(&mut disk, 50 * CLUSTER, 3 * CLUSTER);
    model[50 * 4096..53 * 4096].fill(0);
    flush(&mut disk);
    assert_eq!(names(&room), ["disk.img"], "no journal, and nothing else");
    assert!(fs::read(&path).unwrap() == model);
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.ino() != before && metadata.mode() & 0o7777 == 0o640);
    let mut note = [0; 8];
    let len = rustix::fs::getxattr(&path, "user.note", &mut note).unwrap();
    assert_eq!(&note[..len], b"kept");
    assert!(read(&mut child) == vec![1; SIZE as usize], "a clone has the old one");
    let locked = Disk::open(&DiskConfig::new(&path)).map(drop).unwrap_err().to_string();
    assert!(locked.contains("in use"), "{locked}");
    // In place in the overlay, without a flush, with one, and after another fork.
    write(&mut disk, 1000, 100, 4);
    assert!(fs::read(&path).unwrap() == model, "not flushed");
    model[1000..1100].fill(4);
    flush(&mut disk);
    assert!(fs::read(&path).unwrap() == model);
    let second = disk.fork();
    write(&mut disk, 0, 512, 5);
    model[..512].fill(5);
    flush(&mut disk);
    assert!(fs::read(&path).unwrap() == model && read(&mut disk) == model);
    // A child has no image to commit to.
    drop((first, second));
    write(&mut child, 0, 512, 9);
    let (child, error) = *child.commit().unwrap_err();
    assert!(matches!(error, CommitError::Replaced { .. }), "{error}");
    // The process ends.
    drop((disk, child));
    let mut disk = open(&path);
    assert!(read(&mut disk) == model);
    assert_eq!(names(&room), ["disk.img"]);
}

fn a_commit_needs_nobody_to_end(mounted: &Mounted) {
    let room = mounted.room("commit");
    let path = image(&room);
    let mut disk = open(&path);
    let image = disk.fork();
    write(&mut disk, 0, 4096, 2);
    let report = disk.commit().map_err(|refused| refused.1).unwrap();
    assert_eq!((report.copied, report.zeroed, report.journaled), (4096, 0, true));
    assert!(fs::read(&path).unwrap()[..4097] == [vec![2; 4096], vec![1]].concat());
    assert!(read(&mut image.open().unwrap()) == vec![1; SIZE as usize]);
}

fn a_disk_that_is_alone_is_as_if_never_forked(mounted: &Mounted) {
    let room = mounted.room("alone");
    let path = image(&room);
    let mut disk = open(&path);
    let child = disk.fork();
    write(&mut disk, 0, 4096, 2);
    flush(&mut disk);
    assert!(disk.is_forked());
    drop(child);
    for round in 0..3u8 {
        write(&mut disk, 4096, 4096, 3 + round);
        flush(&mut disk);
        assert!(!disk.is_forked());
        assert_eq!(disk.extents_and_files(), (1, 1));
        write(&mut disk, 8192, 4096, 7 + round);
        flush(&mut disk);
        let want = [[2; 4096], [3 + round; 4096], [7 + round; 4096]].concat();
        assert!(fs::read(&path).unwrap()[..12288] == want);
        drop(disk.fork());
    }
    assert_eq!(names(&room), ["disk.img"]);
}

fn an_image_with_two_names_has_a_journal(mounted: &Mounted) {
    let room = mounted.room("links");
    let path = image(&room);
    fs::hard_link(&path, room.join("other.img")).unwrap();
    let mut disk = open(&path);
    drop(disk.fork());
    write(&mut disk, 0, 4096, 2);
    flush(&mut disk);
    assert_eq!(names(&room), ["disk.img", "disk.img.clade-journal", "other.img"]);
    drop(disk);
    drop(open(&path));
    assert!(fs::read(room.join("other.img")).unwrap()[..4096] == [2; 4096]);
    // Another file took the name while the VM ran: it is not replaced.
    let path = image(&mounted.room("taken"));
    let mut disk = open(&path);
    drop(disk.fork());
    write(&mut disk, 0, 4096, 2);
    fs::rename(&path, path.with_file_name("was.img")).unwrap();
    fs::write(&path, b"another").unwrap();
    flush(&mut disk);
    assert_eq!(fs::read(&path).unwrap(), b"another");
}

/// For any schedule: when the process ends, the image has its state at the last flush, or a later
/// one.
fn a_model_agrees(mounted: &Mounted) {
    let room = mounted.room("model");
    let path = image(&room);
    let (mut random, mut model) = (0x1234_5678_9abc_def1_u64, vec![1; SIZE as usize]);
    let mut below = move |end: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) % end
    };
    let mut disk = open(&path);
    let mut images = Vec::new();
    for round in 0..600u64 {
        let sector = below(SIZE / 512);
        let (offset, len) = (sector * 512, (1 + below(40)).min(SIZE / 512 - sector) * 512);
        let range = offset as usize..(offset + len) as usize;
        match below(16) {
            0..7 => {
                write(&mut disk, offset, len, round as u8);
                model[range].fill(round as u8);
            }
            7 => {
                zero(&mut disk, offset, len);
                model[range].fill(0);
            }
            8..11 => images.push((disk.fork(), model.clone())),
            11 => images.clear(),
            12 if !images.is_empty() => {
                let (image, then) = images.last().unwrap();
                // Only to instants of the same image: another one is a disk of its own.
                if image.size() == disk.size() && disk.is_forked() && disk.rewind(image) {
                    model.clone_from(then);
                }
            }
            13 => {
                flush(&mut disk);
                drop(disk);
                images.clear();
                disk = open(&path);
            }
            _ => {
                flush(&mut disk);
                assert!(fs::read(&path).unwrap() == model, "round {round}");
            }
        }
        assert!(read(&mut disk) == model, "round {round}");
        for (image, then) in images.iter().rev().take(2) {
            assert!(read(&mut image.open().unwrap()) == *then, "round {round}");
        }
    }
    assert_eq!(names(&room), ["disk.img"]);
}

#[test]
fn where_there_are_reflinks_the_image_is_replaced() {
    on_each(|mounted| {
        a_flush_after_a_fork_is_in_the_image_itself(mounted);
        a_commit_needs_nobody_to_end(mounted);
        a_disk_that_is_alone_is_as_if_never_forked(mounted);
        an_image_with_two_names_has_a_journal(mounted);
        a_model_agrees(mounted);
    });
}
