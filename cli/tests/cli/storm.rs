//! Every action of the API, from eight threads at once; afterwards no resource is held.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clade_test_support::{Cid, Patience, Random, TapName};
use serde_json::Value;

use crate::tool::{Runtime, kvm, stem, taps, wait_until};

const THREADS: u64 = 8;
/// Running time of a storm on the reference host.
const MOST: Duration = Duration::from_secs(3600);
/// VMs at a time: as many as two processors and the default limits allow.
const MAX_VMS: usize = 24;

/// Resources that a VM takes from a process and the host.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Descriptors of files of memory layers.
    layers: usize,
    /// All other descriptors.
    descriptors: usize,
    threads: usize,
    mappings: usize,
    /// Processes of the directory: the supervisor, its zygote and workers.
    processes: usize,
    files: BTreeSet<String>,
    interfaces: BTreeSet<String>,
}

impl Held {
    fn now(runtime: &Runtime, stem: &str) -> Self {
        let pid = runtime.supervisor();
        let names = |dir: &Path| {
            let all = fs::read_dir(dir).unwrap().filter_map(Result::ok);
            all.map(|e| e.file_name().into_string().unwrap()).collect::<BTreeSet<_>>()
        };
        let layers = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().filter(is_layer).count();
        Self {
            layers,
            descriptors: runtime.open_files(pid).saturating_sub(layers),
            threads: fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(),
            mappings: fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count(),
            processes: runtime.clades().len(),
            files: names(runtime.dir()),
            interfaces: names(Path::new("/sys/class/net")).into_iter().filter(|name| name.starts_with(stem)).collect(),
        }
    }

    /// Returns whether no more is held than `before`. Allocators keep some mappings. The remaining
    /// VM has as many layers as its last forks made, and files are made ahead for the next: a
    /// handful at most. A prepared worker stays for a minute, with two descriptors.
    fn is_back_to(&self, before: &Self) -> bool {
        self.layers <= before.layers + 8
            && self.descriptors <= before.descriptors + 2 * self.processes.saturating_sub(before.processes)
            && self.threads <= before.threads
            && self.mappings <= before.mappings + 64
            && (&self.files, &self.interfaces) == (&before.files, &before.interfaces)
    }
}

/// Returns whether a descriptor is of a memory layer: of a memfd, or of a nameless file in the
/// tmpfs of huge pages, which is mounted nowhere.
fn is_layer(descriptor: &fs::DirEntry) -> bool {
    let file = fs::read_link(descriptor.path()).unwrap_or_default();
    let file = file.to_string_lossy();
    file.starts_with("/memfd:clade-layer") || file.starts_with("/#")
}

/// Returns the resident KiB of a process.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Copies a process's smaps to the path in `CLADE_STORM_SMAPS`, if it is set: they show the use of
/// memory.
fn keep_smaps(pid: u32, when: &str) {
    if let Ok(to) = std::env::var("CLADE_STORM_SMAPS") {
        fs::copy(format!("/proc/{pid}/smaps"), format!("{to}.{when}")).unwrap();
    }
}

/// Counts of requests, and of those granted.
#[derive(Debug, Default)]
struct Tally {
    asked: AtomicU64,
    done: AtomicU64,
    forks: AtomicU64,
    snapshots: AtomicU64,
}

struct Storm<'a> {
    runtime: &'a Runtime,
    snapshots: &'a Path,
    tally: &'a Tally,
}

impl Storm<'_> {
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, answer) = self.runtime.http(method, path, body);
        self.tally.asked.fetch_add(1, Ordering::Relaxed);
        self.tally.done.fetch_add(u64::from(status == 200), Ordering::Relaxed);
        // Gone meanwhile, in the wrong state, no balloon, no room: these are valid answers. A
        // failure is not. On a busy machine a request may be refused for now (503), or its VM be
        // silent (504).
        assert!([200, 404, 409, 410, 503, 504, 507].contains(&status), "{method} {path} {body}: {status} {answer}");
        (status, answer)
    }

    /// Returns a random child.
    fn child(&self, random: &mut Random) -> Option<String> {
        let (_, all) = self.ask("GET", "/v1/vms", "");
        let names: Vec<&str> = all.as_array()?.iter().filter_map(|vm| vm["name"].as_str()).collect();
        let children: Vec<&str> = names.into_iter().filter(|name| *name != "web").collect();
        let at = random.below(children.len().max(1) as u64) as usize;
        children.get(at).map(|name| (*name).to_owned())
    }

    fn fork(&self, random: &mut Random) {
        let (_, all) = self.ask("GET", "/v1/vms", "");
        if all.as_array().is_some_and(|all| all.len() > MAX_VMS) {
            return;
        }
        let parent = match random.below(3) {
            0 => self.child(random).unwrap_or_else(|| "web".into()),
            _ => "web".into(),
        };
        let body = format!(r#"{{"count":{},"paused":{}}}"#, 1 + random.below(3), random.below(4) > 0);
        let (status, _) = self.ask("POST", &format!("/v1/vms/{parent}/fork"), &body);
        self.tally.forks.fetch_add(u64::from(status == 200), Ordering::Relaxed);
    }

    fn snapshot(&self, random: &mut Random, thread: u64) {
        let Some(child) = self.child(random) else { return };
        let dir = self.snapshots.join(thread.to_string());
        let body = format!(r#"{{"dir":{:?}}}"#, dir.display().to_string());
        let (status, _) = self.ask("POST", &format!("/v1/vms/{child}/snapshot"), &body);
        self.tally.snapshots.fetch_add(u64::from(status == 200), Ordering::Relaxed);
        // Made anew each time: replacement is another test's.
        let _ = fs::remove_dir_all(&dir);
    }

    fn console(&self, random: &mut Random) {
        let Some(child) = self.child(random) else { return };
        let ending = if random.below(2) == 0 { "console" } else { "hvc" };
        let Ok(mut stream) = UnixStream::connect(self.runtime.dir().join(format!("{child}.{ending}"))) else { return };
        stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        let _ = stream.write_all(b"typed\r");
        let _ = stream.read(&mut [0; 256]);
    }

    fn turn(&self, random: &mut Random, thread: u64) {
        let verb = match random.below(12) {
            0..3 => return self.fork(random),
            3 => return self.snapshot(random, thread),
            4 => return self.console(random),
            5 => "pause",
            6 => "resume",
            7 => "reset",
            8 => return drop(self.ask("GET", "/v1/vms/web/balloon", "")),
            _ => "stop",
        };
        let Some(child) = self.child(random) else { return };
        self.ask("POST", &format!("/v1/vms/{child}/{verb}"), "");
        if verb == "stop" {
            // The name may have a new owner.
            self.ask("GET", &format!("/v1/vms/{child}/logs"), "");
        }
    }
}

fn storm(seconds: u64) {
    if !kvm() || !taps() {
        return;
    }
    let mut runtime = Runtime::new();
    let snapshots = tempfile::tempdir().unwrap();
    let name = TapName::take();
    let stem = stem(&name);
    let claim = Cid::take();
    let cid = claim.number();
    let vsock = format!("cid={cid},socket={}", runtime.dir().join("web.vsock").display());
    let devices = ["--net", &format!("tap={stem}0"), "--vsock", &vsock, "--virtio-console"];
    runtime.start_with("web", &devices);
    let tally = Tally::default();
    let is_enough = || tally.done.load(Ordering::Relaxed) > 50 && tally.forks.load(Ordering::Relaxed) > 5;
    let run = |seconds: Duration, round: u64| {
        let end = Instant::now() + seconds;
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let storm = Storm { runtime: &runtime, snapshots: snapshots.path(), tally: &tally };
                scope.spawn(move || {
                    let mut random = Random::new(0x9e37_79b9 + thread + round * 1000);
                    // At least as long as requested, and until enough requests were made.
                    let mut patience = Patience::new(MOST);
                    while Instant::now() < end || !is_enough() {
                        storm.turn(&mut random, thread);
                        assert!(patience.tick(), "{:?}", storm.tally);
                    }
                });
            }
        });
        for name in runtime.names() {
            if name != "web" {
                assert_eq!(runtime.clade(&["stop", &name]).code, Some(0), "{name}");
            }
        }
    };
    // The supervisor's sweeps record VMs that they find dead.
    let none_has_ended = |files: &BTreeSet<String>| {
        // Not by a request: it would keep the supervisor's threads.
        let Some(file) = files.iter().find(|file| file.ends_with(".ended")) else { return };
        let record = fs::read_to_string(runtime.dir().join(file)).unwrap_or_default();
        panic!("none has ended by itself: {record}\n{}", runtime.log());
    };
    // One-time allocations stay, and are not leaks.
    run(Duration::from_secs(2), 0);
    // Threads for blocking work go after ten idle seconds.
    let settled = |before: &Held| {
        wait_until("what was taken to be given back", || {
            let held = Held::now(&runtime, &stem);
            none_has_ended(&held.files);
            held.is_back_to(before) || {
                println!("{held:?}\nbefore: {before:?}");
                false
            }
        });
    };
    thread::sleep(Duration::from_secs(12));
    let before = Held::now(&runtime, &stem);
    none_has_ended(&before.files);
    let memory = resident(runtime.supervisor());
    keep_smaps(runtime.supervisor(), "before");
    run(Duration::from_secs(seconds), 1);
    settled(&before);
    // Supervisor, zygote, web, and the prepared workers.
    wait_until("all other processes to end", || {
        let prepared = runtime.http("GET", "/v1/supervisor", "").1["prepared"].as_u64();
        prepared.is_some_and(|prepared| runtime.clades().len() as u64 == 3 + prepared)
    });
    let grown = resident(runtime.supervisor()).saturating_sub(memory);
    keep_smaps(runtime.supervisor(), "after");
    println!("{tally:?} in {seconds} s; {grown} KiB more resident; {before:?}");
    assert!(grown < 16 << 10, "{grown} KiB more than before");
    assert_eq!(fs::read_dir(snapshots.path()).unwrap().count(), 0, "nothing of a snapshot is left");
    assert_eq!(runtime.clade(&["stop", "web"]).code, Some(0));
    assert_eq!(runtime.ended(), Some(0));
    assert_eq!(runtime.files(), BTreeSet::new());
}

#[test]
fn the_api_under_eight_threads() {
    storm(5);
}

/// Runs for `CLADE_STORM_SECONDS`; a minute by default.
#[test]
#[ignore = "a minute or more"]
fn the_api_under_eight_threads_for_long() {
    storm(std::env::var("CLADE_STORM_SECONDS").map_or(60, |text| text.parse().unwrap()));
}
