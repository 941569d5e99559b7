//! The supervisor: VMs in processes of their own, checkpoints, and deaths.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use clade_harness::GuestWords;
use clade_host_io::seqpacket;
use clade_test_support::{Cid, TapName, lowest, wait_for};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::Signal;
use serde_json::Value;

use crate::machine::BareVm;
use crate::tool::{Runtime, expect_problem, kill, kvm, runs, stem, taps, wait_until};

mod ends;
mod storm;

/// A runtime directory with a supervisor.
pub(crate) struct Supervised {
    pub(crate) runtime: Runtime,
}

impl Supervised {
    pub(crate) fn start(pool: &str) -> Self {
        Self::start_with(pool, &[])
    }

    pub(crate) fn start_with(pool: &str, more: &[&str]) -> Self {
        let mut supervised = Self { runtime: Runtime::new() };
        supervised.serve_with(pool, more);
        supervised
    }

    /// The same, with what `directives` select of its log in `file`.
    pub(crate) fn start_logging(pool: &str, directives: &str, file: File) -> Self {
        let mut supervised = Self { runtime: Runtime::new() };
        supervised.runtime.spawn_logging(&["serve", "--pool", pool], directives, file);
        supervised.await_socket();
        supervised
    }

    pub(crate) fn serve(&mut self, pool: &str) {
        self.serve_with(pool, &[]);
    }

    fn serve_with(&mut self, pool: &str, more: &[&str]) {
        self.runtime.spawn(&[&["serve", "--pool", pool], more].concat());
        self.await_socket();
    }

    pub(crate) fn await_socket(&self) {
        let socket = self.runtime.dir().join("clade.api");
        wait_until("the supervisor", || UnixStream::connect(&socket).is_ok());
    }

    /// Boots a VM, and pauses it.
    pub(crate) fn boot(&self, name: &str, more: &[&str]) {
        let args = [&["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", name], more].concat();
        let booted = self.runtime.clade(&args);
        assert_eq!((booted.code, booted.stdout.trim()), (Some(0), name), "{booted:?}");
        self.runtime.clade(&["pause", name, "--json"]).json();
    }

    pub(crate) fn fork(&self, args: &[&str]) -> Vec<String> {
        let answer = self.runtime.clade(&[&["fork", "--paused", "--json"], args].concat()).json();
        names(&answer["children"])
    }

    fn vms(&self) -> Vec<Value> {
        self.runtime.clade(&["ps", "--json"]).json().as_array().unwrap().clone()
    }

    pub(crate) fn pid_of(&self, name: &str) -> u32 {
        let vms = self.vms();
        let vm = vms.iter().find(|vm| vm["name"] == name).unwrap_or_else(|| panic!("no {name} in {vms:?}"));
        vm["pid"].as_u64().unwrap() as u32
    }

    /// One HTTP request to the supervisor.
    pub(crate) fn http(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        self.runtime.http(method, path, body)
    }

    pub(crate) fn info(&self, what: &str) -> u64 {
        self.http("GET", "/v1/supervisor", "").1[what].as_u64().unwrap()
    }

    fn processes(&self) -> BTreeSet<u32> {
        self.runtime.clades()
    }

    pub(crate) fn zygotes(&self) -> Vec<u32> {
        let workers: BTreeSet<u32> = self.vms().iter().map(|vm| vm["pid"].as_u64().unwrap() as u32).collect();
        let supervisor = self.info("pid") as u32;
        self.processes().into_iter().filter(|pid| *pid != supervisor && !workers.contains(pid)).collect()
    }

    /// Returns all files except the log.
    fn files(&self) -> Vec<String> {
        let all = fs::read_dir(self.runtime.dir()).unwrap().flatten();
        all.map(|entry| entry.file_name().into_string().unwrap()).filter(|name| name != "clade.log").collect()
    }

    /// Writes a word at the beginning of a page of a VM's memory that the guest does not use.
    pub(crate) fn put(&self, vm: &str, page: u64, word: u64) {
        BareVm::of(&self.runtime, vm).write(GuestMemory::AT + page * 4096, &word.to_le_bytes()).unwrap();
    }

    /// The word at the beginning of such a page.
    pub(crate) fn word(&self, vm: &str, page: u64) -> u64 {
        let mut bytes = [0; 8];
        BareVm::of(&self.runtime, vm).read(GuestMemory::AT + page * 4096, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn stop(&self, name: &str) {
        let stopped = self.runtime.clade(&["stop", name]);
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
    }

    /// Stops the remaining VMs, and checks that nothing stays.
    pub(crate) fn end(mut self) {
        for vm in self.vms() {
            self.stop(vm["name"].as_str().unwrap());
        }
        self.runtime.signal(Signal::TERM);
        self.runtime.ended();
        wait_until("the end of all processes", || self.processes().is_empty());
        let left: Vec<_> = self.files().into_iter().filter(|file| !file.ends_with(".ended")).collect();
        assert_eq!(left, [""; 0]);
    }
}

fn names(array: &Value) -> Vec<String> {
    array.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

#[test]
fn each_vm_has_a_process_and_a_checkpoint_outlives_its_vm() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    assert_eq!(all.fork(&["web", "--count", "3"]), ["web-1", "web-2", "web-3"]);
    let vms = all.vms();
    let pids: BTreeSet<u64> = vms.iter().map(|vm| vm["pid"].as_u64().unwrap()).collect();
    assert_eq!((vms.len(), pids.len()), (4, 4), "{vms:?}");
    for vm in vms.iter().filter(|vm| vm["name"] != "web") {
        assert_eq!((vm["parent"].as_str(), vm["generation"].as_u64()), (Some("web"), Some(1)), "{vm}");
        assert_eq!(vm["state"], "paused", "{vm}");
    }
    let checkpoint = all.runtime.clade(&["checkpoint", "web", "warm", "--json"]).json();
    assert_eq!((&checkpoint["name"], &checkpoint["vm"]), (&"warm".into(), &"web".into()), "{checkpoint}");
    let second = all.runtime.clade(&["checkpoint", "web-1", "--json"]).json();
    assert_eq!((&second["name"], second["generation"].as_u64()), (&"web-1.1".into(), Some(2)), "{second}");
    all.stop("web");
    assert_eq!(all.fork(&["warm", "--count", "2"]), ["warm-1", "warm-2"]);
    assert_eq!(all.fork(&["web-1.1", "--name", "grandchild"]), ["grandchild"]);
    let vms = all.vms();
    let child = vms.iter().find(|vm| vm["name"] == "grandchild").unwrap();
    assert_eq!((child["parent"].as_str(), child["generation"].as_u64()), (Some("web-1"), Some(2)), "{child}");
    // They run, and have children.
    for command in ["resume", "pause"] {
        assert_eq!(all.runtime.clade(&[command, "grandchild"]).code, Some(0));
    }
    assert_eq!(all.fork(&["grandchild"]), ["grandchild-1"]);
    // Through the supervisor's socket as through their own.
    assert_eq!(all.http("POST", "/v1/vms/grandchild/resume", "").1["state"], "running");
    assert_eq!(all.http("GET", "/v1/vms", "").1.as_array().unwrap().len(), 7);
    let listed = all.runtime.clade(&["checkpoints", "--json"]).json();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    all.runtime.clade(&["rm", "warm", "--json"]).json();
    all.runtime.clade(&["fork", "warm"]).expect_refusal("warm");
    all.end();
}

/// Guest memory of a VM's process, as the process itself sees it.
pub(crate) struct GuestMemory {
    file: fs::File,
    base: u64,
}

impl GuestMemory {
    pub(crate) const BYTES: u64 = 32 << 20;
    /// Guest-physical: the bare guest does not touch it.
    pub(crate) const AT: u64 = 24 << 20;

    pub(crate) fn of(pid: u32) -> Self {
        // Adjacent mappings, and the starts of those of memory files. Restored pages of zeros are
        // in no file.
        let (mut spans, mut starts): (Vec<(u64, u64)>, Vec<u64>) = (Vec::new(), Vec::new());
        for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
            let (range, rest) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
            if !rest.starts_with("rw-") {
                continue;
            }
            match spans.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => spans.push((start, end)),
            }
            if rest.contains(" /memfd:clade") || rest.contains("/#") {
                starts.push(start);
            }
        }
        let holds = |start: &&u64| spans.iter().any(|(from, to)| from <= *start && **start + Self::BYTES <= *to);
        let base = *starts.iter().find(holds).unwrap_or_else(|| panic!("no guest memory in {spans:x?}"));
        let file = fs::File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        Self { file, base }
    }

    /// Returns its address in the process.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn write(&self, page: u64, value: u64) {
        self.file.write_all_at(&value.to_le_bytes(), self.base + Self::AT + page * 4096).unwrap();
    }

    pub(crate) fn read(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.base + Self::AT + page * 4096).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// Each fork shows the writes since the previous one, through three generations of processes, and a
/// reset drops them.
#[test]
fn i4_children_show_what_was_written_since_the_last_fork() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("1");
    all.boot("web", &[]);
    let memory = |name: &str| GuestMemory::of(all.pid_of(name));
    let web = memory("web");
    web.write(0, 1);
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    assert_eq!(memory("web-1").read(0), 1);
    web.write(0, 2);
    web.write(7, 20);
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-2", "web-3"]);
    for name in ["web-2", "web-3"] {
        assert_eq!((memory(name).read(0), memory(name).read(7)), (2, 20), "{name}");
    }
    assert_eq!((memory("web-1").read(0), memory("web-1").read(7)), (1, 0));
    // A child's own writes, in its children and theirs.
    memory("web-2").write(7, 21);
    assert_eq!(all.fork(&["web-2"]), ["web-2-1"]);
    memory("web-2-1").write(0, 3);
    all.runtime.clade(&["checkpoint", "web-2-1", "cp", "--json"]).json();
    memory("web-2-1").write(0, 4);
    all.stop("web-2");
    assert_eq!(all.fork(&["cp"]), ["cp-1"]);
    assert_eq!((memory("cp-1").read(0), memory("cp-1").read(7)), (3, 21));
    assert_eq!((memory("web-2-1").read(0), memory("web-3").read(0), web.read(0)), (4, 2, 2));
    let reset = all.runtime.clade(&["reset", "web-2-1", "--json"]).json();
    assert!(reset["dropped_pages"].as_u64().max(reset["restored_pages"].as_u64()) > Some(0), "{reset}");
    assert_eq!((memory("web-2-1").read(0), memory("web-2-1").read(7)), (2, 21));
    let exclusive = || {
        let vms = all.vms();
        vms.iter().find(|vm| vm["name"] == "web").unwrap()["memory"]["exclusive_pages"].as_u64().unwrap()
    };
    // Pages copied in the background are shared again after a while.
    let before = lowest(exclusive);
    web.write(9, 1);
    assert_eq!(exclusive(), before + 1);
    all.end();
}

/// Returns the lines of `/proc/PID/task/TID/status` of each thread.
fn statuses(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok()).collect()
}

#[test]
fn all_threads_of_a_worker_are_confined() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("1");
    all.boot("web", &["--rng", "--balloon"]);
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-1", "web-2"]);
    let own = |pid: u32, of: &str| fs::read_link(format!("/proc/{pid}/ns/{of}")).unwrap();
    for name in ["web", "web-1", "web-2"] {
        let pid = all.pid_of(name);
        let threads = statuses(pid);
        assert!(threads.len() > 2, "{threads:?}");
        for status in threads {
            let has = |line: &str| status.lines().any(|found| found.split_whitespace().eq(line.split_whitespace()));
            for line in ["NoNewPrivs: 1", "Seccomp: 2", "CapEff: 0000000000000000", "CapPrm: 0000000000000000"] {
                assert!(has(line), "{name} lacks {line}: {status}");
            }
        }
        for namespace in ["net", "ipc", "uts"] {
            assert_ne!(own(pid, namespace), own(std::process::id(), namespace), "{name}: {namespace}");
        }
    }
    all.end();
}

/// Returns the interfaces of this host that begin with `stem`.
fn interfaces(stem: &str) -> BTreeSet<String> {
    let all = fs::read_dir("/sys/class/net").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with(stem)).collect()
}

/// The supervisor opens interfaces and binds sockets, and a killed worker leaves none.
#[test]
fn interfaces_and_sockets_are_handed_in_and_go_with_their_vm() {
    if !kvm() || !taps() {
        return;
    }
    let all = Supervised::start("1");
    let dir = tempfile::tempdir().unwrap();
    let claim = Cid::take();
    let cid = claim.number();
    let name = TapName::take();
    let stem = stem(&name);
    let vsock = format!("cid={cid},socket={}", dir.path().join("web.vsock").display());
    all.boot("web", &["--net", &format!("tap={stem}%d"), "--vsock", &vsock]);
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-1", "web-2"]);
    assert_eq!(all.fork(&["web-1", "--name", "deep"]), ["deep"]);
    let sockets = || -> BTreeSet<String> {
        fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect()
    };
    let there = |names: &[&str]| names.iter().map(|name| format!("{name}.vsock")).collect::<BTreeSet<_>>();
    assert_eq!(sockets(), there(&["web", "web-1", "web-2", "deep"]));
    assert_eq!(interfaces(&stem).len(), 4);
    let vms = all.vms();
    let cids: BTreeSet<u64> = vms.iter().map(|vm| vm["vsock"]["cid"].as_u64().unwrap()).collect();
    let macs: BTreeSet<&str> = vms.iter().map(|vm| vm["nets"][0]["mac"].as_str().unwrap()).collect();
    assert_eq!((cids.len(), macs.len()), (4, 4), "{vms:?}");
    // Each socket has a listener.
    for socket in sockets() {
        UnixStream::connect(dir.path().join(socket)).unwrap();
    }
    // The CID is claimed on the host, not in the workers' namespace.
    let taken = format!("cid={cid},socket={}", dir.path().join("other.vsock").display());
    let other = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "other", "--vsock", &taken];
    all.runtime.clade(&other).expect_refusal(&cid.to_string());
    kill(all.pid_of("web-2"), Signal::KILL);
    wait_until("its socket to go", || sockets() == there(&["web", "web-1", "deep"]));
    wait_until("its interface to go", || interfaces(&stem).len() == 3);
    all.end();
    assert_eq!((sockets(), interfaces(&stem)), (BTreeSet::new(), BTreeSet::new()));
}

/// A worker may write no files: another process writes its snapshots, from its image.
#[test]
fn a_confined_vm_is_saved_and_what_changed_since_is_saved_alone() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    all.boot("web", &[]);
    let memory = |name: &str| GuestMemory::of(all.pid_of(name));
    memory("web").write(0, 1);
    memory("web").write(3, 30);
    all.runtime.clade(&["snapshot", "web", &at("inc"), "--incremental"]).expect_refusal("save it in full first");
    all.runtime.clade(&["snapshot", "working-set", "web"]).expect_refusal("not saved before");
    all.runtime.clade(&["snapshot", "web", &at("no/where")]).expect_refusal("no/where");
    let full = all.runtime.clade(&["snapshot", "web", &at("full"), "--json"]).json();
    memory("web").write(0, 2);
    let part = all.runtime.clade(&["snapshot", "web", &at("part"), "--incremental", "--json"]).json();
    let pages = |answer: &Value| answer["data_pages"].as_u64().unwrap();
    assert!(pages(&part) >= 1 && pages(&part) < pages(&full) && pages(&part) <= 4, "{full} {part}");
    memory("web").write(7, 70);
    let more = all.runtime.clade(&["snapshot", "web", &at("more"), "--incremental", "--zstd", "--json"]).json();
    assert!(pages(&more) <= 4, "{more}");
    for name in ["full", "part", "more"] {
        assert_eq!(all.runtime.clade(&["snapshot", "verify", &at(name)]).code, Some(0), "{name}");
    }
    let recorded = all.runtime.clade(&["snapshot", "working-set", "web", "--json"]).json();
    assert!(recorded["pages"].as_u64() > Some(0), "{recorded}");
    let shown = all.runtime.clade(&["snapshot", "show", &at("more"), "--json"]).json();
    assert_eq!(shown["working_set"], true, "{shown}");
    // No other file is there, and the supervisor has no other worker left.
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["full", "more", "part"]);
    // A restored VM shows it.
    all.stop("web");
    for (name, shown) in [("full", (1, 30, 0)), ("part", (2, 30, 0)), ("more", (2, 30, 70))] {
        // In memory files, where the test looks for it.
        all.runtime.spawn(&["restore", &at(name), "--preload", "--paused", "--detached", "--name", name]);
        wait_until("the restored VM", || all.runtime.names().contains(&name.to_owned()));
        let there = GuestMemory::of(all.pid_of(name));
        assert_eq!((there.read(0), there.read(3), there.read(7)), shown, "{name}");
        all.stop(name);
    }
    all.end();
}

#[test]
fn i13_all_children_of_a_request_are_made_or_none() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.runtime.clade(&["checkpoint", "web", "cp", "--json"]).json();
    let (before, files) = (all.processes(), all.files().len());
    let refused = |args: &[&str], why: &str| {
        all.runtime.clade(args).expect_refusal(why);
        wait_until("the end of the workers", || all.processes() == before);
        assert_eq!((all.runtime.names(), all.files().len()), (vec!["web".to_owned()], files), "{args:?}");
    };
    for of in ["web", "cp"] {
        refused(&["fork", of, "--name", "web"], "taken");
        refused(&["fork", of, "--count", "3", "--name", "same"], "names every child the same");
        refused(&["fork", of, "--count", "0"], "0 children");
        refused(&["fork", of, "--count", "10001"], "10001 children");
        refused(&["fork", of, "--name", "no/name"], "is not a name");
        refused(&["fork", of, "--count", "2", "--net", "tap=none"], "network interfaces");
    }
    refused(&["fork", "nobody"], "nobody");
    refused(&["checkpoint", "nobody"], "nobody");
    refused(&["checkpoint", "web", "cp"], "taken by a checkpoint");
    refused(&["checkpoint", "web", "../cp"], "is not a name");
    refused(&["rm", "nobody"], "nobody");
    refused(&["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "web"], "taken");
    refused(&["run", "-d", "--kernel", "/nonexistent/kernel", "--name", "other"], "/nonexistent/kernel");
    let disk = ["run", "-d", "--kernel", "bare", "--name", "other", "--disk", "/nonexistent/disk"];
    refused(&disk, "/nonexistent/disk");
    // Another supervisor of the same directory.
    refused(&["serve"], "supervises");
    for (method, path, body, wanted) in [
        ("POST", "/v1/vms/web/fork", "{", 400),
        ("POST", "/v1/vms/web/fork", r#"{"unknown": 1}"#, 400),
        ("POST", "/v1/vms", r#"{"name": "x"}"#, 400),
        ("GET", "/v1/vms/nobody", "", 404),
        ("GET", "/v1/vms/..%2fweb", "", 400),
        ("GET", "/v1/checkpoints/nobody", "", 404),
        ("GET", "/v1/nothing", "", 404),
        ("PUT", "/v1/checkpoints", "", 405),
    ] {
        let (status, answer) = all.http(method, path, body);
        assert_eq!(status, wanted, "{method} {path}: {answer}");
        expect_problem(&answer, status);
    }
    // The parent is unchanged.
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.end();
}

/// Clients that connect to a VM's image socket and send nothing, or too much, or go away.
#[test]
fn broken_clients_of_the_image_socket_cost_nothing() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let connected = |path: &Path| {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        socket
    };
    let path = all.runtime.dir().join("web.image");
    let open = fs::read_dir(format!("/proc/{}/fd", all.pid_of("web"))).unwrap().count();
    let silent: Vec<_> = (0..3).map(|_| connected(&path)).collect();
    let long = connected(&path);
    seqpacket::send(&long, &[0; 4096], &[]).unwrap();
    assert!(seqpacket::receive(&long, 4096).is_err(), "it is not answered");
    // A client that sends a request, and goes away in the middle of the answer.
    for _ in 0..20 {
        let gone = connected(&path);
        seqpacket::send(&gone, &[1], &[]).unwrap();
    }
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.stop("web-1");
    drop((silent, long));
    let held = || fs::read_dir(format!("/proc/{}/fd", all.pid_of("web"))).unwrap().count();
    wait_until("what they had to be given back", || held() <= open + 4);
    all.end();
}

/// The booted VM's writes since a checkpoint are merged into its image once the checkpoint has
/// gone.
#[test]
fn a_disk_is_given_what_was_written_when_no_checkpoint_needs_it() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let all = Supervised::start("0");
    all.boot("web", &["--disk", &image.display().to_string()]);
    let pid = all.pid_of("web");
    all.runtime.clade(&["checkpoint", "web", "cp", "--json"]).json();
    all.stop("web");
    assert_eq!(all.fork(&["cp"]), ["cp-1"]);
    let waits = || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(runs(pid), "its process waits for whoever reads the image");
    };
    waits();
    all.stop("cp-1");
    waits();
    all.runtime.clade(&["rm", "cp", "--json"]).json();
    wait_until("the end of the VM's process", || !runs(pid));
    assert!(fs::read(&image).unwrap() == vec![7; 1 << 20]);
    all.end();
}
