//! `clade disk`: the leftovers beside an image are shown, merged, or thrown away.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use clade_block::{Disk, DiskConfig, DiskOp};
use clade_guests::abi::disk::What;
use clade_host_io::{AlignedBuf, Fragment};
use rustix::process::Signal;

use crate::machine::BareVm;
use crate::supervisor::Supervised;
use crate::tool::{Answer, Runtime, kill, kvm, wait_until};

fn end(disk: &mut Disk) {
    disk.kick().unwrap();
    while disk.in_flight() > 0 {
        disk.wait(Duration::from_secs(10)).unwrap();
        disk.reap().unwrap().into_iter().for_each(|done| done.result.unwrap());
    }
}

/// An image of ones, and a journal with its second cluster in twos.
fn left(dir: &Path) -> String {
    let path = dir.join("disk.img");
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    drop(disk.fork());
    let bytes = std::sync::Arc::new(AlignedBuf::new(4096));
    let buffer = Fragment::owned(&bytes, 0, 4096).unwrap();
    buffer.slice().copy_from(&[2u8; 4096]);
    disk.submit(DiskOp::Write { offset: 4096, buffers: vec![buffer] }, 1).unwrap();
    end(&mut disk);
    disk.submit(DiskOp::Flush, 2).unwrap();
    end(&mut disk);
    drop(disk);
    // Another test's process may have inherited the descriptors, and so the locks, until it runs
    // its program.
    let inode = |path: &Path| format!(":{} ", fs::metadata(path).unwrap().ino());
    let files = [inode(&path), inode(&dir.join("disk.img.clade-journal"))];
    wait_until("nobody has locks", || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        files.iter().all(|file| !locks.contains(file.as_str()))
    });
    path.to_str().unwrap().to_owned()
}

fn disk(what: &str, image: &str) -> Answer {
    Runtime::new().clade(&["disk", what, image])
}

fn run(args: &[&str]) -> Answer {
    Runtime::new().clade(args)
}

#[test]
fn a_journal_is_shown_and_put_in_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let image = left(dir.path());
    let shown = run(&["disk", "show", "--json", &image]).json();
    assert_eq!((shown["state"].as_str(), shown["data_bytes"].as_u64()), (Some("good"), Some(4096)), "{shown}");
    assert_eq!(shown["journal"].as_str(), Some(format!("{image}.clade-journal").as_str()), "{shown}");
    // Another program has written to the image.
    let mut bytes = fs::read(&image).unwrap();
    bytes[9000] = 7;
    fs::write(&image, &bytes).unwrap();
    let answer = disk("show", &image);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    for named in ["4096 bytes in 1 overlays", "it is not used", "mtime", "clade disk apply", "clade disk discard"] {
        assert!(answer.stdout.contains(named), "{named}: {answer:?}");
    }
    if kvm() {
        run(&["run", "--kernel", "bare", "--mem", "32M", "--disk", &image]).expect_refusal("clade disk show");
    }
    let answer = disk("apply", &image);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    bytes[4096..8192].fill(2);
    let found = fs::read(&image).unwrap();
    let wrong: Vec<_> = (0..bytes.len()).filter(|at| found[*at] != bytes[*at]).map(|at| (at, found[at])).collect();
    assert!(wrong.is_empty(), "{} bytes: {:?}", wrong.len(), &wrong[..wrong.len().min(4)]);
    disk("apply", &image).expect_refusal("clade-journal");
    assert!(disk("show", &image).stdout.contains("no journal"));
}

#[test]
fn a_journal_is_thrown_away_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let image = left(dir.path());
    let renamed = format!("{image}.renamed");
    fs::rename(&image, &renamed).unwrap();
    let answer = disk("show", &renamed);
    assert!(answer.stdout.contains("is not at") && answer.stdout.contains("clade disk discard"), "{answer:?}");
    let done = run(&["disk", "discard", "--json", &renamed]).json();
    assert_eq!(done["discarded"].as_bool(), Some(true), "{done}");
    assert!(disk("show", &renamed).stdout.contains("no journal"));
    assert!(fs::read(&renamed).unwrap() == vec![1; 1 << 20]);
    disk("show", "/no/such/image").expect_refusal("/no/such/image");
}

/// A worker that only reads an image locks it all the same, against writers.
#[test]
fn a_confined_vm_may_have_nothing_but_disks_that_it_does_not_write() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let image = runtime.dir().join("shared.img");
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    let disk = |how: &str| format!("{},{how}", image.display());
    runtime.start_with("one", &["--disk", &disk("ephemeral")]);
    runtime.start_with("two", &["--disk", &disk("ephemeral"), "--disk", &disk("ro")]);
    let third = ["run", "--kernel", "bare", "--mem", "32M", "--detached", "--disk", image.to_str().unwrap()];
    let third = runtime.clade(&third);
    assert!(third.code != Some(0) && third.stderr.contains("shared.img"), "{third:?}");
    let forked = runtime.clade(&["fork", "two", "--json"]).json();
    assert_eq!(forked["children"].as_array().unwrap().len(), 1);
    runtime.clade(&["stop", "--all"]);
}

/// The journal of a VM that crashed holds writes that its guest has flushed. A VM that only reads the
/// image must show them too, and a journal that cannot be read ends its boot.
#[test]
fn a_confined_vm_that_only_reads_an_image_shows_the_journal_beside_it() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let all = Supervised::start("0");
    all.boot("web", &["--disk", image.to_str().unwrap()]);
    let web = BareVm::of(&all.runtime, "web");
    web.open_disk();
    web.disk(What::Write, 0, 96, 1);
    // From here on the disk writes to an overlay, and a flush names it in the journal.
    all.runtime.clade(&["checkpoint", "web", "cp", "--json"]).json();
    web.disk(What::Write, 32, 64, 2);
    web.disk(What::Flush, 0, 8, 0);
    let pid = all.pid_of("web");
    kill(pid, Signal::KILL);
    all.runtime.clade(&["rm", "cp", "--json"]).json();
    let inode = format!(":{} ", fs::metadata(&image).unwrap().ino());
    wait_until("the end of the image's locks", || !fs::read_to_string("/proc/locks").unwrap().contains(&inode));
    let journal = dir.path().join("disk.img.clade-journal/journal");
    assert!(journal.exists());

    for how in ["ro", "ephemeral"] {
        all.boot(how, &["--disk", &format!("{},{how}", image.display())]);
        let reader = BareVm::of(&all.runtime, how);
        reader.open_disk();
        reader.disk(What::Verify, 0, 32, 1);
        reader.disk(What::Verify, 32, 64, 2);
        all.stop(how);
    }
    assert!(journal.exists(), "a reader leaves the journal as it is");

    fs::write(&journal, b"no journal").unwrap();
    for how in ["ro", "ephemeral"] {
        let disk = format!("{},{how}", image.display());
        let refused = all.runtime.clade(&["run", "--kernel", "bare", "--mem", "32M", "--detached", "--disk", &disk]);
        refused.expect_refusal(journal.to_str().unwrap());
    }
    all.end();
}

/// Returns the files of a directory that a process has open, with whether a descriptor of each
/// bypasses the page cache.
fn open_files(pid: u32, dir: &Path) -> BTreeMap<u64, bool> {
    const O_DIRECT: u32 = 0o40000;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let is_there = fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(dir));
        // Through the link, which also leads to files without a name.
        let Some(file) = fs::metadata(entry.path()).ok().filter(|file| is_there && file.is_file()) else { continue };
        let number = entry.file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let is_direct = u32::from_str_radix(flags.trim(), 8).unwrap() & O_DIRECT != 0;
        *files.entry(file.ino()).or_default() |= is_direct;
    }
    files
}

/// A child may not open its ancestors' overlays again, which are in their directories.
#[test]
fn a_confined_child_reads_past_the_page_cache_what_its_parent_does() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let all = Supervised::start("0");
    let vm = |name: &str| BareVm::of(&all.runtime, name);
    let opened = |name: &str| open_files(all.pid_of(name), dir.path());
    all.boot("web", &["--disk", &format!("{},cache=direct", image.display())]);
    if !opened("web").values().any(|is_direct| *is_direct) {
        clade_test_support::skipped(&format!("no file of {} can be read past the page cache", dir.path().display()));
        return all.end();
    }
    let (web, last) = (vm("web"), vm("last"));
    web.open_disk();
    web.disk(What::Write, 0, 96, 1);
    // From here on it writes to an overlay, and its child to another.
    all.runtime.clade(&["checkpoint", "web", "--json"]).json();
    web.disk(What::Write, 32, 64, 2);
    assert_eq!(all.fork(&["web", "--name", "child"]), ["child"]);
    vm("child").disk(What::Write, 64, 32, 3);
    assert_eq!(all.fork(&["child", "--name", "last"]), ["last"]);
    for (name, files) in [("web", 2), ("child", 3), ("last", 3)] {
        let opened = opened(name);
        assert!(opened.len() == files && opened.values().all(|is_direct| *is_direct), "{name}: {opened:?}");
    }
    for (sector, seed) in [(0, 1), (32, 2), (64, 3)] {
        last.disk(What::Verify, sector, 32, seed);
    }
    all.end();
}
