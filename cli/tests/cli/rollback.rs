//! Rolling VMs back in place to checkpoints of their line: their own, and those of VMs that they were
//! forked from.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clade_guests::abi::disk::What;
use clade_harness::GuestWords;
use clade_test_support::Random;
use rustix::process::Signal;
use serde_json::Value;

use crate::detach::{checkpoint, image};
use crate::machine::BareVm;
use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::{expect_problem, hold, kill, kvm, wait_until};

const PAGE: u64 = 4096;
/// Pages whose first words the tests follow.
const PAGES: u64 = 900;

fn roll_back(all: &Supervised, vm: &str, name: &str) -> Value {
    all.runtime.clade(&["rollback", vm, name, "--json"]).json()
}

/// Writes words at the beginning of pages, from `first` on.
fn put_at(all: &Supervised, vm: &str, first: u64, words: &[u64]) {
    let bytes: Vec<u8> =
        words.iter().flat_map(|word| [&word.to_le_bytes()[..], &[0; PAGE as usize - 8]].concat()).collect();
    BareVm::of(&all.runtime, vm).write(GuestMemory::AT + first * PAGE, &bytes).unwrap();
}

fn put(all: &Supervised, vm: &str, words: &[u64]) {
    put_at(all, vm, 0, words);
}

fn words(all: &Supervised, vm: &str, count: u64) -> Vec<u64> {
    let mut bytes = vec![0; (count * PAGE) as usize];
    BareVm::of(&all.runtime, vm).read(GuestMemory::AT, &mut bytes).unwrap();
    bytes.chunks(PAGE as usize).map(|page| u64::from_le_bytes(*page.first_chunk().unwrap())).collect()
}

fn state_of(all: &Supervised, vm: &str) -> Value {
    all.http("GET", &format!("/v1/vms/{vm}"), "").1["state"].clone()
}

/// A tree of checkpoints, between which a VM goes to and fro in any order. A model has the
/// words of every page for each of them.
#[test]
fn a_vm_goes_to_and_fro_between_its_checkpoints() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let mut random = Random::new(0x5eed_1dea);
    let mut now: Vec<u64> = (0..PAGES).map(|page| 1 + page).collect();
    put(&all, "web", &now);
    let mut kept = vec![];
    for number in 0..8_u64 {
        let name = format!("at-{number}");
        checkpoint(&all, "web", &name, &[]);
        kept.push((name, now.clone()));
        // Some pages far apart, and a run.
        let first = random.below(PAGES - 100);
        let mut written: Vec<u64> = (0..40).map(|_| random.below(PAGES)).collect();
        written.extend(first..first + 100);
        for page in written {
            now[page as usize] = (number << 32) + random.below(1 << 30) + (1 << 20);
            all.put("web", page, now[page as usize]);
        }
        // Half of the later checkpoints are on another branch.
        if number > 2 && random.below(2) == 0 {
            let (name, then) = &kept[random.below(kept.len() as u64) as usize];
            roll_back(&all, "web", name);
            now.clone_from(then);
        }
        assert!(words(&all, "web", PAGES) == now, "after {number}");
    }
    for _ in 0..24 {
        let (name, then) = &kept[random.below(kept.len() as u64) as usize];
        let answer = roll_back(&all, "web", name);
        assert_eq!(answer["vm"]["name"], "web");
        assert!(words(&all, "web", PAGES) == *then, "{name}: {answer}");
        // A later write stays the VM's own.
        let page = random.below(PAGES);
        all.put("web", page, 7);
        let mut wanted = then.clone();
        wanted[page as usize] = 7;
        assert!(words(&all, "web", PAGES) == wanted, "{name} with a write");
    }
    // Again, without a write: nothing is mapped anew, and pages that were restored are dropped.
    let (name, _) = &kept[0];
    roll_back(&all, "web", name);
    roll_back(&all, "web", name);
    let again = roll_back(&all, "web", name);
    assert_eq!((&again["remapped_pages"], &again["dropped_pages"]), (&Value::from(0), &Value::from(0)), "{again}");
    // No rollback has changed a checkpoint.
    for (at, (name, then)) in kept.iter().enumerate() {
        let child = format!("child-{at}");
        all.fork(&[name.as_str(), "--name", &child]);
        assert!(words(&all, &child, PAGES) == *then, "{name}");
    }
    // A removed checkpoint cannot be used, and the layers of the others stay.
    all.runtime.clade(&["rm", "at-3", "--json"]).json();
    all.runtime.clade(&["rollback", "web", "at-3"]).expect_refusal("at-3");
    for (name, then) in kept.iter().filter(|(name, _)| name != "at-3") {
        roll_back(&all, "web", name);
        assert!(words(&all, "web", PAGES) == *then, "{name}, without at-3");
    }
    all.end();
}

/// The guest runs on from the checkpoint, with its disks as they were: one written in place, and one of
/// its own.
#[test]
fn disks_go_back_with_memory_and_later_writes_reach_the_image() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str| image(&dir, name);
    let written = image("written.img");
    for more in [written.clone(), format!("{},ephemeral", image("shared.img"))] {
        let all = Supervised::start("0");
        all.boot("web", &["--disk", &more]);
        let vm = |name: &str| BareVm::of(&all.runtime, name);
        vm("web").open_disk();
        vm("web").disk(What::Write, 0, 96, 1);
        checkpoint(&all, "web", "one", &[]);
        vm("web").disk(What::Write, 32, 32, 2);
        checkpoint(&all, "web", "two", &[]);
        vm("web").disk(What::Write, 0, 96, 3);
        roll_back(&all, "web", "one");
        assert_eq!(state_of(&all, "web"), "paused", "as it was before");
        vm("web").disk(What::Verify, 0, 96, 1);
        vm("web").disk(What::Write, 0, 16, 4);
        // Forward again, to a state that it has left.
        roll_back(&all, "web", "two");
        vm("web").disk(What::Verify, 0, 32, 1);
        vm("web").disk(What::Verify, 32, 32, 2);
        vm("web").disk(What::Verify, 64, 32, 1);
        all.fork(&["one", "--name", "child"]);
        vm("child").disk(What::Verify, 0, 96, 1);
        // Writes after the rollback are on the disk when the VM has ended.
        roll_back(&all, "web", "one");
        vm("web").disk(What::Write, 64, 32, 5);
        for name in ["one", "two"] {
            all.runtime.clade(&["rm", name, "--json"]).json();
        }
        all.stop("child");
        all.stop("web");
        if more == written {
            all.boot("again", &["--disk", &more]);
            vm("again").open_disk();
            vm("again").disk(What::Verify, 0, 64, 1);
            vm("again").disk(What::Verify, 64, 32, 5);
        }
        all.end();
    }
}

#[test]
fn a_child_goes_back_to_checkpoints_of_its_ancestors_and_to_no_others() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    put(&all, "web", &[1; 600]);
    checkpoint(&all, "web", "old", &[]);
    all.put("web", 5, 2);
    checkpoint(&all, "web", "base", &[]);
    all.put("web", 5, 3);
    all.fork(&["base", "--name", "child"]);
    all.put("child", 6, 4);
    checkpoint(&all, "child", "own", &[]);
    all.fork(&["own", "--name", "grandchild"]);
    checkpoint(&all, "web", "late", &[]);
    all.fork(&["base", "--name", "sibling"]);
    checkpoint(&all, "sibling", "siblings", &[]);
    let both = |vm: &str| (all.word(vm, 5), all.word(vm, 6));
    for vm in ["child", "grandchild"] {
        for _ in 0..2 {
            // One page differs, and the layers of the others are the same.
            let answer = roll_back(&all, vm, "old");
            assert_eq!(both(vm), (1, 1), "{vm}");
            assert!(answer["remapped_pages"].as_u64() < Some(600), "{answer}");
            assert_eq!(words(&all, vm, 600), [1; 600]);
            roll_back(&all, vm, "own");
            assert_eq!(both(vm), (2, 4), "{vm}");
            roll_back(&all, vm, "late");
            assert_eq!(both(vm), (3, 1), "{vm}");
            all.put(vm, 7, 9);
            roll_back(&all, vm, "base");
            assert_eq!((both(vm), all.word(vm, 7)), ((2, 1), 1), "{vm}");
        }
    }
    // The VM keeps the layers that it shows: its ancestors' processes and their checkpoints may go.
    roll_back(&all, "grandchild", "old");
    ["old", "base", "late"].iter().for_each(|name| drop(all.runtime.clade(&["rm", name, "--json"]).json()));
    all.stop("web");
    assert_eq!(words(&all, "grandchild", 600), [1; 600]);
    roll_back(&all, "grandchild", "own");
    assert_eq!(both("grandchild"), (2, 4));
    // Reset still goes to the image that it was started from.
    all.put("grandchild", 5, 8);
    all.runtime.clade(&["reset", "grandchild", "--json"]).json();
    assert_eq!(both("grandchild"), (2, 4));
    // Of another line, of none, and without such a VM: each is unchanged.
    for (vm, name, status, text) in [
        ("child", "siblings", 409, "neither of"),
        ("sibling", "own", 409, "neither of"),
        ("child", "none", 404, "none"),
        ("none", "own", 404, "none"),
    ] {
        let body = format!(r#"{{"checkpoint":"{name}"}}"#);
        let (found, refused) = all.http("POST", &format!("/v1/vms/{vm}/rollback"), &body);
        expect_problem(&refused, status);
        assert!(found == status && refused["detail"].as_str().unwrap().contains(text), "{refused}");
    }
    assert_eq!((both("child"), both("sibling")), ((2, 1), (2, 1)));
    all.end();
}

/// The giver of an image punches pages that no image of it shows. A child that was rolled back shows
/// some that the image it was started from does not show.
#[test]
fn a_child_keeps_the_pages_of_an_ancestors_checkpoint_that_has_gone() {
    /// As many pages as one request writes.
    const PART: u64 = 512;
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    checkpoint(&all, "web", "zero", &[]);
    // More than a block of huge pages each: memory is given back by blocks.
    let fill = |count: u64, word: u64| {
        (0..count).step_by(PART as usize).for_each(|first| put_at(&all, "web", first, &[word; PART as usize]));
    };
    fill(4 * PART, 1);
    checkpoint(&all, "web", "old", &[]);
    fill(3 * PART, 2);
    checkpoint(&all, "web", "base", &[]);
    all.fork(&["base", "--name", "child"]);
    all.fork(&["child", "--name", "grandchild"]);
    for vm in ["child", "grandchild"] {
        let answer = roll_back(&all, vm, "old");
        assert_eq!(answer["remapped_pages"], 3 * PART, "the other pages are the origin's: {answer}");
    }
    for name in ["zero", "old", "base"] {
        all.runtime.clade(&["rm", name, "--json"]).json();
    }
    // Each freeze may give memory back that nothing shows, a second after the last time.
    for number in 0..3 {
        fill(4 * PART, 3 + number);
        checkpoint(&all, "web", "next", &[]);
        all.runtime.clade(&["rm", "next", "--json"]).json();
        std::thread::sleep(std::time::Duration::from_millis(1200));
    }
    all.fork(&["grandchild", "--name", "last"]);
    for vm in ["child", "grandchild", "last"] {
        let far: Vec<u64> = (0..4 * PART).step_by(100).map(|page| all.word(vm, page)).collect();
        assert_eq!(far, vec![1; far.len()], "{vm}");
    }
    all.end();
}

/// A child's disks are its own over an ancestor's files.
#[test]
fn a_childs_disks_go_back_to_an_ancestors_checkpoint() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str| image(&dir, name);
    let (written, shared) = (image("written.img"), image("shared.img"));
    for more in [written, format!("{shared},ephemeral")] {
        let all = Supervised::start("0");
        all.boot("web", &["--disk", &more]);
        let vm = |name: &str| BareVm::of(&all.runtime, name);
        vm("web").open_disk();
        vm("web").disk(What::Write, 0, 96, 1);
        checkpoint(&all, "web", "old", &[]);
        vm("web").disk(What::Write, 32, 32, 2);
        all.fork(&["web", "--name", "child"]);
        vm("child").disk(What::Write, 64, 32, 3);
        checkpoint(&all, "child", "own", &[]);
        vm("child").disk(What::Write, 0, 96, 4);
        for _ in 0..2 {
            roll_back(&all, "child", "old");
            vm("child").disk(What::Verify, 0, 96, 1);
            vm("child").disk(What::Write, 16, 32, 5);
            vm("child").disk(What::Verify, 16, 32, 5);
            vm("child").disk(What::Verify, 48, 48, 1);
            roll_back(&all, "child", "own");
            vm("child").disk(What::Verify, 0, 32, 1);
            vm("child").disk(What::Verify, 32, 32, 2);
            vm("child").disk(What::Verify, 64, 32, 3);
        }
        vm("web").disk(What::Verify, 32, 32, 2);
        all.end();
    }
}

/// A client that was told of a failure goes on with its VM.
#[test]
fn a_request_whose_client_has_gone_rolls_nothing_back() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.put("web", 3, 1);
    checkpoint(&all, "web", "base", &[]);
    all.put("web", 3, 2);
    let (pid, supervisor) = (all.pid_of("web"), all.runtime.supervisor());
    // Not its files: the supervisor opens and closes some on the way.
    let sockets = || -> BTreeSet<PathBuf> {
        let open = std::fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().flatten();
        let targets = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        targets.filter(|target| target.to_string_lossy().starts_with("socket:")).collect()
    };
    // Some may be of earlier requests, and close at any time.
    let before = sockets();
    hold(pid);
    let body = r#"{"checkpoint":"base"}"#;
    let mut client = UnixStream::connect(all.runtime.dir().join("clade.api")).unwrap();
    let head = "POST /v1/vms/web/rollback HTTP/1.1\r\nhost: clade\r\ncontent-type: application/json";
    write!(client, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    // The client's connection, and the one to the VM's process.
    wait_until("the request to be sent on", || sockets().difference(&before).count() >= 2);
    drop(client);
    wait_until("the request to be given up", || sockets().is_subset(&before));
    kill(pid, Signal::CONT);
    checkpoint(&all, "web", "after", &[]);
    assert_eq!(all.word("web", 3), 2);
    all.end();
}

/// Copies are mapped in the place of the VM's own layers. A VM that writes its disk in place does not
/// get another disk for that.
#[test]
fn a_rollback_to_a_detached_checkpoint_shows_its_copies() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let all = Supervised::start("0");
    all.boot("web", &[]);
    // The first image of its process, as the copy is of the copier's.
    put(&all, "web", &[9; 600]);
    checkpoint(&all, "web", "plain", &[]);
    put(&all, "web", &[1; 600]);
    checkpoint(&all, "web", "safe", &["--detach"]);
    put(&all, "web", &[2; 600]);
    roll_back(&all, "web", "safe");
    assert_eq!(words(&all, "web", 600), [1; 600]);
    all.fork(&["web", "--name", "child"]);
    put(&all, "child", &[3; 600]);
    roll_back(&all, "child", "safe");
    assert_eq!(words(&all, "child", 600), [1; 600]);
    // Children of copies get no files that their ancestors' processes may write, even of an ancestor
    // that is a child of copies too.
    all.fork(&["safe", "--name", "safe-1"]);
    checkpoint(&all, "safe-1", "again", &[]);
    all.fork(&["safe-1", "--detach", "--name", "apart"]);
    for plain in ["plain", "again"] {
        all.runtime.clade(&["rollback", "apart", plain]).expect_refusal("may write");
    }
    put(&all, "apart", &[4; 600]);
    roll_back(&all, "apart", "safe");
    assert_eq!(words(&all, "apart", 600), [1; 600]);
    all.boot("disk", &["--disk", &image(&dir, "disk.img")]);
    all.put("disk", 0, 5);
    checkpoint(&all, "disk", "apart", &["--detach"]);
    all.runtime.clade(&["rollback", "disk", "apart"]).expect_refusal("copies");
    assert_eq!(all.word("disk", 0), 5);
    all.end();
}

#[test]
fn a_running_vm_runs_on_and_a_suspended_one_stays_so() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.put("web", 3, 1);
    checkpoint(&all, "web", "base", &[]);
    all.put("web", 3, 2);
    all.runtime.clade(&["resume", "web", "--json"]).json();
    roll_back(&all, "web", "base");
    assert_eq!((state_of(&all, "web"), all.word("web", 3)), (Value::from("running"), 1));
    all.put("web", 3, 3);
    all.runtime.clade(&["suspend", "web", "--json"]).json();
    roll_back(&all, "web", "base");
    assert_eq!((state_of(&all, "web"), all.word("web", 3)), (Value::from("suspended"), 1));
    all.runtime.clade(&["wake", "web", "--json"]).json();
    assert_eq!((state_of(&all, "web"), all.word("web", 3)), (Value::from("running"), 1));
    let plain = all.runtime.clade(&["rollback", "web", "base"]);
    assert!(plain.code == Some(0) && plain.stderr.lines().any(|line| line.starts_with("rolled back in ")), "{plain:?}");
    // Without a way to an agent nothing is rolled back.
    all.put("web", 3, 4);
    all.runtime.clade(&["rollback", "web", "base", "--ready"]).expect_refusal("no vsock device");
    all.runtime.clade(&["pause", "web", "--json"]).json();
    all.runtime.clade(&["rollback", "web", "base", "--ready"]).expect_refusal("web is paused");
    all.runtime.clade(&["resume", "web", "--json"]).json();
    assert_eq!(all.word("web", 3), 4);
    // Nor is anything reset.
    all.runtime.clade(&["fork", "web", "--json"]).json();
    all.put("web-1", 3, 5);
    all.runtime.clade(&["reset", "web-1", "--ready"]).expect_refusal("no vsock device");
    all.runtime.clade(&["pause", "web-1", "--json"]).json();
    all.runtime.clade(&["reset", "web-1", "--ready"]).expect_refusal("web-1 is paused");
    all.runtime.clade(&["resume", "web-1", "--json"]).json();
    assert_eq!(all.word("web-1", 3), 5);
    all.runtime.clade(&["reset", "web-1", "--json"]).json();
    assert_eq!(all.word("web-1", 3), 4);
    all.end();
}

/// A VM without its parent's secrets does not get them from a checkpoint of the parent.
#[test]
fn a_vm_without_secrets_is_not_rolled_back_to_them() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let file = all.runtime.dir().with_extension("secret");
    fs::write(&file, "a secret of sixteen bytes and more").unwrap();
    all.boot("web", &["--secret", file.to_str().unwrap()]);
    fs::remove_file(&file).unwrap();
    all.put("web", 3, 1);
    checkpoint(&all, "web", "base", &[]);
    all.fork(&["base", "--name", "bare", "--without-secrets"]);
    all.put("bare", 3, 2);
    all.runtime.clade(&["rollback", "bare", "base"]).expect_refusal("secrets");
    assert_eq!(all.word("bare", 3), 2);
    checkpoint(&all, "bare", "own", &[]);
    all.put("bare", 3, 4);
    roll_back(&all, "bare", "own");
    assert_eq!(all.word("bare", 3), 2);
    all.end();
}
