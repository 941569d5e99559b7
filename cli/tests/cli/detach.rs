//! Detached checkpoints stay as they are, whatever is written by the process of the VM that they were
//! taken of.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use clade_guests::abi::disk::What;
use clade_harness::GuestWords;
use clade_test_support::wait_until;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::machine::BareVm;
use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::{expect_problem, hold, kill, kvm};

const PAGE: u64 = 4096;
/// Pages that are written beside the first three.
const MANY: u64 = 1000;
/// A word that no other page has, for page `page`.
const fn mark(page: u64) -> u64 {
    0x7c1a_de00_51fe_0000 + page
}
const OVERWRITTEN: u64 = 0x0bad_0bad_0bad_0bad;

fn words(all: &Supervised, vm: &str) -> [u64; 3] {
    [0, 1, 2].map(|page| all.word(vm, page))
}

/// An image of 1 MiB of zeros, and its path.
pub(crate) fn image(dir: &TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The files without a name that a process has open for writing: what a guest that has broken into it
/// can change.
fn writable(pid: u32) -> Vec<File> {
    let mut files = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
        let Ok(found) = fs::metadata(entry.path()) else { continue };
        if flags & libc::O_ACCMODE != libc::O_RDONLY && found.is_file() && found.nlink() == 0 {
            files.push(File::options().read(true).write(true).open(entry.path()).unwrap());
        }
    }
    files
}

/// Overwrites each page that begins with a word of `old`. Returns the pages found.
fn overwrite(files: &[File], old: &[u64]) -> usize {
    let mut found = 0;
    for file in files {
        let len = file.metadata().unwrap().len();
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (page, bytes) in bytes.chunks_exact(PAGE as usize).enumerate() {
            if old.contains(&u64::from_le_bytes(*bytes.first_chunk().unwrap())) {
                file.write_all_at(&OVERWRITTEN.to_le_bytes(), page as u64 * PAGE).unwrap();
                found += 1;
            }
        }
    }
    found
}

pub(crate) fn checkpoint(all: &Supervised, vm: &str, name: &str, more: &[&str]) -> Value {
    all.runtime.clade(&[&["checkpoint", vm, name, "--json"], more].concat()).json()
}

#[test]
fn a_detached_checkpoint_is_as_it_was_whatever_its_vms_process_writes() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    // Page 0 and many others are in the base file from the first checkpoint on, and page 1 is in a delta.
    let many: Vec<u8> = (0..MANY).flat_map(|page| [mark(MANY + page).to_le_bytes(), [0; 8]].concat()).collect();
    let spread: Vec<u8> = many.chunks(16).flat_map(|word| [word, &[0; PAGE as usize - 16]].concat()).collect();
    BareVm::of(&all.runtime, "web").write(GuestMemory::AT + 8 * PAGE, &spread).unwrap();
    all.put("web", 0, mark(0));
    checkpoint(&all, "web", "first", &[]);
    all.put("web", 1, mark(1));
    assert_eq!(checkpoint(&all, "web", "shared", &[])["detached"], Value::Null);
    let safe = checkpoint(&all, "web", "safe", &["--detach"]);
    let (copied, pages) = (safe["detached"]["copied_layers"].as_u64(), safe["detached"]["copied_pages"].as_u64());
    assert!(copied >= Some(2) && pages >= Some(MANY), "{safe}");
    // The next checkpoint of the VM shares the copies of this one.
    all.put("web", 2, mark(3));
    let next = checkpoint(&all, "web", "next", &["--detach"]);
    assert!(next["detached"]["copied_pages"].as_u64() < Some(MANY / 10), "{next}");
    assert!(next["detached"]["shared_layers"].as_u64() >= Some(1), "{next}");
    let listed = all.runtime.clade(&["checkpoints"]).stdout;
    assert_eq!(listed.lines().filter(|line| line.contains(" yes")).count(), 2, "{listed}");

    let files = writable(all.pid_of("web"));
    let marks: Vec<u64> = (0..2 * MANY).map(mark).collect();
    assert!(overwrite(&files, &marks) >= MANY as usize, "the attempt reaches the VM's own layers");
    all.fork(&["shared", "--name", "broken"]);
    assert_eq!(words(&all, "broken"), [OVERWRITTEN, OVERWRITTEN, 0], "and its children, without the copies");
    all.fork(&["safe", "--name", "safe-1"]);
    assert_eq!(words(&all, "safe-1"), [mark(0), mark(1), 0]);
    all.fork(&["next", "--name", "next-1"]);
    assert_eq!(words(&all, "next-1"), [mark(0), mark(1), mark(3)]);
    for vm in ["safe-1", "next-1"] {
        let mut bytes = vec![0; spread.len()];
        BareVm::of(&all.runtime, vm).read(GuestMemory::AT + 8 * PAGE, &mut bytes).unwrap();
        assert!(bytes == spread, "{vm}");
    }
    // A child of the other checkpoint would be killed by this.
    // The record of the VM's end and the like are sealed.
    let cut = files.iter().filter(|file| file.set_len(0).is_ok()).count();
    assert!(cut >= 2, "{cut}");
    all.fork(&["safe", "--name", "safe-2"]);
    ["safe-1", "safe-2"].iter().for_each(|vm| assert_eq!(words(&all, vm), [mark(0), mark(1), 0]));
    drop(files);
    ["web", "broken", "next-1"].iter().for_each(|vm| all.stop(vm));

    // A child has its parent's copies for reading, and its own pages for writing. Its checkpoint shares
    // the copies.
    all.put("safe-1", 2, mark(2));
    let again = checkpoint(&all, "safe-1", "again", &["--detach"]);
    let again = &again["detached"];
    assert_eq!((again["copied_layers"].as_u64(), again["shared_layers"].as_u64()), (Some(1), copied), "{again}");
    assert!(again["copied_pages"].as_u64() < Some(64), "{again}");
    let files = writable(all.pid_of("safe-1"));
    assert_eq!(overwrite(&files, &[mark(0), mark(1)]), 0, "no copy can be written by a child's process");
    assert_eq!(overwrite(&files, &[mark(2)]), 1);
    drop(files);
    all.fork(&["again", "--name", "last"]);
    assert_eq!(words(&all, "last"), [mark(0), mark(1), mark(2)]);
    // The copies of a checkpoint that has gone belong to those that are left.
    ["first", "shared", "safe"].iter().for_each(|name| drop(all.runtime.clade(&["rm", name, "--json"]).json()));
    all.fork(&["again", "--name", "later"]);
    assert_eq!(words(&all, "later"), [mark(0), mark(1), mark(2)]);
    let third = checkpoint(&all, "later", "third", &["--detach"]);
    assert_eq!(third["detached"]["copied_pages"], 0, "{third}");
    all.end();
}

/// Both the image that the VM writes in place, and its overlays.
#[test]
fn disks_of_a_detached_checkpoint_are_as_they_were() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (written, read, kept_apart) =
        (image(&dir, "written.img"), image(&dir, "read.img"), image(&dir, "ephemeral.img"));
    let (read, kept_apart) = (format!("{read},ro"), format!("{kept_apart},ephemeral"));
    let all = Supervised::start("0");
    all.boot("web", &["--disk", &written, "--disk", &read, "--disk", &kept_apart]);
    let vm = |name: &str| BareVm::of(&all.runtime, name);
    vm("web").open_disk();
    vm("web").disk(What::Write, 0, 96, 1);
    // The image alone: no overlay is there.
    let first = checkpoint(&all, "web", "first", &["--detach"]);
    assert_eq!(first["detached"]["disk_files"], 1, "{first}");
    vm("web").disk(What::Write, 32, 32, 2);
    let second = checkpoint(&all, "web", "second", &["--detach"]);
    assert_eq!(second["detached"]["disk_files"], 2, "{second}");
    for file in writable(all.pid_of("web")) {
        let len = file.metadata().unwrap().len();
        if len == 1 << 20 {
            file.write_all_at(&vec![0xee; len as usize], 0).unwrap();
        }
    }
    fs::write(&written, vec![0xee; 1 << 20]).unwrap();
    all.fork(&["first", "--name", "one"]);
    vm("one").disk(What::Verify, 0, 96, 1);
    all.fork(&["second", "--name", "two"]);
    vm("two").disk(What::Verify, 0, 32, 1);
    vm("two").disk(What::Verify, 32, 32, 2);
    vm("two").disk(What::Verify, 64, 32, 1);
    // Children write to overlays of their own.
    vm("two").disk(What::Write, 64, 32, 3);
    all.fork(&["second", "--name", "three"]);
    vm("three").disk(What::Verify, 64, 32, 1);
    // A child's image has the copies, and its own overlay is copied.
    let third = checkpoint(&all, "two", "third", &["--detach"]);
    assert_eq!(third["detached"]["disk_files"], 1, "{third}");
    all.fork(&["third", "--name", "four"]);
    vm("four").disk(What::Verify, 32, 32, 2);
    vm("four").disk(What::Verify, 64, 32, 3);
    all.end();
}

/// A file of another process is copied whatever name that process gives it.
#[test]
fn an_overlay_that_its_process_has_named_is_copied() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let all = Supervised::start("0");
    all.boot("web", &["--disk", &format!("{},ephemeral", image(&dir, "disk.img"))]);
    let vm = |name: &str| BareVm::of(&all.runtime, name);
    vm("web").open_disk();
    vm("web").disk(What::Write, 0, 96, 1);
    all.fork(&["web", "--name", "child"]);
    let overlays: Vec<File> =
        writable(all.pid_of("web")).into_iter().filter(|file| file.metadata().unwrap().len() == 1 << 20).collect();
    assert!(!overlays.is_empty());
    let name = |at: usize| dir.path().join(format!("named-{at}"));
    for (at, file) in overlays.iter().enumerate() {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        rustix::fs::linkat(rustix::fs::CWD, path, rustix::fs::CWD, name(at), rustix::fs::AtFlags::SYMLINK_FOLLOW)
            .unwrap();
    }
    let safe = checkpoint(&all, "child", "safe", &["--detach"]);
    assert!(safe["detached"]["disk_files"].as_u64() >= Some(1), "{safe}");
    overlays.iter().for_each(|file| file.write_all_at(&[0xee; 1 << 20], 0).unwrap());
    all.fork(&["safe", "--name", "later"]);
    vm("later").disk(What::Verify, 0, 96, 1);
    (0..overlays.len()).for_each(|at| fs::remove_file(name(at)).unwrap());
    all.end();
}

/// The image that the VM writes in place has its writes, and is unlocked, while the checkpoint is there.
#[test]
fn a_detached_checkpoint_holds_no_disk_of_its_vm() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (written, shared) = (image(&dir, "written.img"), format!("{},ephemeral", image(&dir, "shared.img")));
    let all = Supervised::start("0");
    all.boot("web", &["--disk", &written, "--disk", &shared]);
    let vm = |name: &str| BareVm::of(&all.runtime, name);
    vm("web").open_disk();
    vm("web").disk(What::Write, 0, 96, 1);
    checkpoint(&all, "web", "safe", &["--detach"]);
    all.fork(&["safe", "--name", "child"]);
    vm("web").disk(What::Write, 0, 96, 2);
    // The process waits for a child until it is held: it has not merged its writes when the child has ended.
    all.fork(&["web", "--name", "live"]);
    let process = all.runtime.worker("web");
    all.stop("web");
    hold(process);
    all.stop("live");
    wait_until("no other VM and no checkpoint uses the image", || {
        let merging = all.http("GET", "/v1/supervisor", "").1["merging"].clone();
        merging[0]["name"] == "web" && merging[0]["waits"] == false
    });
    kill(process, Signal::CONT);
    // A VM that is booted with the image is refused while another has it locked.
    all.boot("again", &["--disk", &written]);
    vm("again").open_disk();
    vm("again").disk(What::Verify, 0, 96, 2);
    vm("child").disk(What::Verify, 0, 96, 1);
    all.fork(&["safe", "--name", "second"]);
    vm("second").disk(What::Verify, 0, 96, 1);
    all.end();
}

#[test]
fn a_checkpoint_that_cannot_be_detached_leaves_nothing() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let all = Supervised::start("0");
    let (status, refused) = all.http("POST", "/v1/vms/none/checkpoint", "{\"detach\":true}");
    assert_eq!(status, 404);
    expect_problem(&refused, 404);
    all.boot("web", &["--disk", &image(&dir, "disk.img")]);
    all.put("web", 0, mark(0));
    // No copy of the disk can be made: a file is in the directory's place.
    let overlays = dir.path().join(".clade-overlays");
    let _ = fs::remove_dir(&overlays);
    fs::write(&overlays, "a file").unwrap();
    let refused = all.runtime.clade(&["checkpoint", "web", "safe", "--detach"]);
    assert!(refused.code == Some(2) && refused.stderr.contains(".clade-overlays"), "{refused:?}");
    assert_eq!(all.runtime.clade(&["checkpoints", "--json"]).json().as_array().unwrap().len(), 0);
    assert_eq!(all.zygotes().len(), 1, "no process stays");
    assert_eq!(words(&all, "web"), [mark(0), 0, 0]);
    // The name is free, and nothing stays held.
    fs::remove_file(&overlays).unwrap();
    checkpoint(&all, "web", "safe", &["--detach"]);
    all.runtime.clade(&["checkpoint", "web", "safe", "--detach"]).expect_refusal("safe");
    all.fork(&["safe"]);
    assert_eq!(words(&all, "safe-1"), [mark(0), 0, 0]);
    all.end();
    assert!(!overlays.exists());
}

#[test]
fn children_of_a_detached_fork_are_as_they_were_whatever_their_parents_process_writes() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("2");
    all.boot("web", &[]);
    (0..2).for_each(|page| all.put("web", page, mark(page)));
    all.fork(&["web", "--name", "trusts"]);
    all.put("web", 2, mark(2));
    assert_eq!(all.fork(&["web", "--detach", "--count", "2", "--name", "apart-{n}"]), ["apart-1", "apart-2"]);
    all.fork(&["web", "--detach", "--name", "alone"]);
    let files = writable(all.pid_of("web"));
    assert!(overwrite(&files, &[mark(0), mark(1), mark(2)]) >= 3, "the attempt reaches the VM's own layers");
    drop(files);
    assert_eq!(words(&all, "trusts"), [OVERWRITTEN, OVERWRITTEN, 0], "a plain fork trusts its parent's process");
    for vm in ["apart-1", "apart-2", "alone"] {
        assert_eq!(words(&all, vm), [mark(0), mark(1), mark(2)], "{vm}");
    }
    // Only the fork of a VM is detached.
    checkpoint(&all, "web", "held", &[]);
    all.runtime.clade(&["fork", "held", "--detach"]).expect_refusal("detach");
    let saved = all.runtime.dir().join("saved");
    let body = format!(r#"{{"saved": {{"dir": "{}"}}, "vms": {{"detach": true}}}}"#, saved.display());
    let (status, refused) = all.http("POST", "/v1/restore", &body);
    expect_problem(&refused, status);
    assert_eq!((status, refused["type"].as_str()), (400, Some("urn:clade:bad-config")), "{refused}");
    all.end();
}

#[test]
fn the_file_of_a_suspended_vm_is_copied_too() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    (0..2).for_each(|page| all.put("web", page, mark(page)));
    let suspended = all.runtime.clade(&["suspend", "web", "--json"]).json();
    assert!(suspended["written_pages"].as_u64() >= Some(2), "{suspended}");
    checkpoint(&all, "web", "shared", &[]);
    checkpoint(&all, "web", "safe", &["--detach"]);
    let files = writable(all.pid_of("web"));
    assert!(overwrite(&files, &[mark(0), mark(1)]) >= 2, "the attempt reaches the file");
    drop(files);
    all.fork(&["shared", "--name", "trusts"]);
    assert_eq!(words(&all, "trusts"), [OVERWRITTEN, OVERWRITTEN, 0]);
    all.fork(&["safe", "--name", "safe-1"]);
    assert_eq!(words(&all, "safe-1"), [mark(0), mark(1), 0]);
    ["shared", "safe"].iter().for_each(|name| drop(all.runtime.clade(&["rm", name, "--json"]).json()));
    all.end();
}
