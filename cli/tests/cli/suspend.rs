//! Suspended VMs in processes of their own: their remaining memory, their wakes, and that no data
//! is lost.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use clade_guests::abi::Command;
use clade_test_support::{Cid, wait_until_within};
use serde_json::Value;

use crate::machine::BareVm;
use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::{kvm, wait_until};

const PAGE: u64 = 4096;
/// Number of written pages.
const PAGES: u64 = 1_500;

/// Returns the private part of a guest's memory in a process, in KiB.
fn private_kib(pid: u32, base: u64) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut is_in, mut kib) = (false, 0);
    for line in smaps.lines() {
        let range = line.split(' ').next().unwrap().split_once('-');
        let range =
            range.and_then(|(from, to)| Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?)));
        if let Some((from, to)) = range {
            is_in = base <= from && to <= base + GuestMemory::BYTES;
        } else if is_in && (line.starts_with("Private_Dirty:") || line.starts_with("Swap:")) {
            kib += line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        }
    }
    kib
}

/// The events of a supervisor from now on, until it ends.
fn follow(all: &Supervised) -> std::thread::JoinHandle<String> {
    let mut stream = UnixStream::connect(all.runtime.api()).unwrap();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nhost: clade\r\n\r\n").unwrap();
    let mut first = [0; 1];
    stream.read_exact(&mut first).unwrap();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    })
}

#[test]
fn a_suspended_vm_has_next_to_no_memory_and_what_needs_it_wakes_it() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let events = follow(&all);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("web.vsock");
    let claim = Cid::take();
    let cid = claim.number();
    all.boot("web", &["--vsock", &format!("cid={cid},socket={}", socket.display())]);
    let (pid, memory) = (all.pid_of("web"), GuestMemory::of(all.pid_of("web")));
    (0..PAGES).for_each(|page| memory.write(page, page + 1));
    assert!(private_kib(pid, memory.base()) >= PAGES * 4, "it is seen");
    let clade = |args: &[&str]| all.runtime.clade(args);
    let state = || all.http("GET", "/v1/vms/web", "").1["state"].as_str().unwrap().to_owned();
    let suspend = || -> Value {
        let answer = clade(&["suspend", "web", "--json"]).json();
        assert_eq!(state(), "suspended");
        answer
    };

    let first = suspend();
    assert!(first["written_pages"].as_u64().unwrap() >= PAGES && first["kept_pages"] == 0, "{first}");
    let left = private_kib(pid, memory.base());
    assert!(left <= 64, "{left} KiB of guest memory are private");
    assert!(clade(&["ps"]).stdout.contains("suspended") && clade(&["tree"]).stdout.contains("suspended"));
    assert!(clade(&["stats", "web"]).code == Some(0) && clade(&["pages", "web"]).code == Some(0));
    assert_eq!(suspend()["was_suspended"], true, "once is enough");
    (0..PAGES).for_each(|page| assert_eq!(memory.read(page), page + 1));

    // A fork, a read of its memory and a snapshot need nothing of its guest.
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    let at = format!("{:#x}", GuestMemory::AT + 7 * PAGE);
    assert!(clade(&["memory", "read", "web", &at, "16"]).stdout.contains("08 00 00 00"));
    let saved = dir.path().join("saved");
    let path = saved.to_str().unwrap();
    assert_eq!(clade(&["snapshot", "web", path]).code, Some(0));
    assert_eq!(clade(&["snapshot", "verify", path]).code, Some(0));
    assert_eq!(state(), "suspended");
    assert!(private_kib(pid, memory.base()) <= 64);
    let child = GuestMemory::of(all.pid_of("web-1"));
    (0..PAGES).for_each(|page| assert_eq!(child.read(page), page + 1));

    // Requests that need the guest wake it: a connection, typing, and an explicit wake.
    let wakes: [(&str, &dyn Fn()); 4] = [
        ("a connection", &|| drop(UnixStream::connect(&socket).unwrap())),
        ("typing", &|| {
            let mut console = UnixStream::connect(all.runtime.dir().join("web.console")).unwrap();
            console.write_all(b"x").unwrap();
        }),
        ("wake", &|| {
            let woken = clade(&["wake", "web", "--json"]).json();
            assert_eq!((&woken["was_suspended"], &woken["state"]), (&true.into(), &"paused".into()), "{woken}");
        }),
        ("resume", &|| {
            clade(&["resume", "web", "--json"]).json();
            clade(&["pause", "web", "--json"]).json();
        }),
    ];
    clade(&["wake", "web", "--json"]).json();
    for (round, (what, wake)) in (0..).zip(wakes) {
        memory.write(round, 100 + round);
        memory.write(700, 100 + round);
        let written = suspend()["written_pages"].as_u64().unwrap();
        // In the last round but one the VM ran for a moment.
        assert!((2..20).contains(&written), "{what}: {written} pages were written, of which two were ours");
        assert!(private_kib(pid, memory.base()) <= 64, "{what}");
        wake();
        wait_until(what, || state() == "paused");
        assert_eq!((memory.read(round), memory.read(700), memory.read(900)), (100 + round, 100 + round, 901));
    }
    (4..700).for_each(|page| assert_eq!((memory.read(page), child.read(page)), (page + 1, page + 1)));
    (0..4).for_each(|page| assert_eq!(child.read(page), page + 1, "the child's are its own"));

    // Its process is killed, another is stopped: both suspended.
    suspend();
    let name = all.fork(&["web", "--name", "other"]);
    clade(&["suspend", &name[0], "--json"]).json();
    all.stop("other");
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    wait_until("its end", || !all.runtime.names().contains(&"web".to_owned()));
    (0..PAGES).for_each(|page| assert_eq!(child.read(page), page + 1));
    restored(&all, path);
    all.end();
    let events = events.join().unwrap();
    let count = |what: &str| events.matches(what).count();
    assert_eq!((count("event: vm.suspended"), count("event: vm.woken")), (7, 5), "{events}");
}

/// Restores a VM from the snapshot of a suspended one.
fn restored(all: &Supervised, path: &str) {
    let started = all.runtime.clade(&["restore", path, "-d", "--paused", "--name", "again"]);
    assert_eq!(started.code, Some(0), "{started:?}");
    let at = format!("{:#x}", GuestMemory::AT + 900 * PAGE);
    assert!(all.runtime.clade(&["memory", "read", "again", &at, "16"]).stdout.contains("85 03 00 00"));
}

#[test]
fn i13_a_vm_that_cannot_be_suspended_runs_on() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let memory = GuestMemory::of(all.pid_of("web"));
    (0..600).for_each(|page| memory.write(page, page + 1));
    let clade = |args: &[&str]| all.runtime.clade(args);
    clade(&["suspend", "nobody"]).expect_refusal("nobody");
    for dir in ["/no/such/directory", "/proc"] {
        clade(&["suspend", "web", "--dir", dir]).expect_refusal(dir);
    }
    let relative = all.http("POST", "/v1/vms/web/suspend", r#"{"dir": "here"}"#);
    assert!(relative.0 == 400 && relative.1["detail"].as_str().unwrap().contains("here"), "{relative:?}");
    // A full disk: the error has the size of the data, and the directory.
    let small = tempfile::tempdir().unwrap();
    let mounted = mount(small.path());
    if mounted {
        let full = clade(&["suspend", "web", "--dir", small.path().to_str().unwrap()]);
        assert_ne!(full.code, Some(0), "{full:?}");
        assert!(full.stderr.contains(small.path().to_str().unwrap()) && full.stderr.contains("pages"), "{full:?}");
    } else {
        clade_test_support::skipped("no file system can be mounted");
    }
    assert_eq!(all.http("GET", "/v1/vms/web", "").1["state"], "paused");
    (0..600).for_each(|page| assert_eq!(memory.read(page), page + 1));
    clade(&["resume", "web", "--json"]).json();
    clade(&["pause", "web", "--json"]).json();
    clade(&["suspend", "web", "--json"]).json();
    (0..600).for_each(|page| assert_eq!(memory.read(page), page + 1));
    if mounted {
        let _ = std::process::Command::new("umount").arg("-l").arg(small.path()).status();
    }
    all.end();
}

/// A file system of 1 MiB.
fn mount(at: &Path) -> bool {
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "small"]).arg(at).output();
    mounted.is_ok_and(|mounted| mounted.status.success())
}

#[test]
fn an_idle_vm_is_suspended_after_its_time_and_again_after_a_wake() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    // Paused, so it is idle.
    all.boot("web", &[]);
    let at = "/v1/vms/web/suspend-after";
    assert!(all.http("GET", at, "").1["seconds"].is_null());
    for (body, named) in [(r#"{"seconds": 0}"#, "seconds=0"), (r#"{"seconds": 1, "dir": "x"}"#, "x is not")] {
        let (status, answer) = all.http("PUT", at, body);
        assert!(status == 400 && answer["detail"].as_str().unwrap().contains(named), "{answer}");
    }
    assert_eq!(all.http("PUT", "/v1/vms/nobody/suspend-after", r#"{"seconds": 1}"#).0, 404);
    let state = |name: &str| all.http("GET", &format!("/v1/vms/{name}"), "").1["state"].as_str().unwrap().to_owned();
    assert_eq!(all.http("PUT", at, r#"{"seconds": 1}"#).1["seconds"], 1.0);
    // A child has a time of its own, or none. A spinning one is never idle.
    let forked = all.runtime.clade(&["fork", "web", "--name", "busy", "--paused", "--json"]);
    assert_eq!(forked.code, Some(0), "{forked:?}");
    BareVm::of(&all.runtime, "busy").begin(Command::Spin);
    assert_eq!(all.http("PUT", "/v1/vms/busy/suspend-after", r#"{"seconds": 1}"#).1["seconds"], 1.0);
    assert_eq!(all.fork(&["web", "--name", "other"]), ["other"]);
    assert!(all.http("GET", "/v1/vms/other/suspend-after", "").1["seconds"].is_null());
    for _ in 0..2 {
        // Each check takes the VM's process some processor time: frequent ones would keep it busy, on a slow host those
        // of each second as well. Patience counts at most 200 ms for each: there are 40 of them.
        let mut pause = Duration::from_millis(500);
        wait_until_within(Duration::from_secs(8), "it is idle", || {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(15));
            state("web") == "suspended"
        });
        assert_eq!((state("busy").as_str(), state("other").as_str()), ("running", "paused"));
        all.runtime.clade(&["wake", "web", "--json"]).json();
    }
    assert!(all.http("DELETE", at, "").1["seconds"].is_null());
    all.end();
}
