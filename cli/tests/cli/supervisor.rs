//! The supervisor: VMs in processes of their own, checkpoints, and what dies.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use clade_io::seqpacket;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::tool::{Runtime, kvm, wait_until};

/// A runtime directory with a supervisor. All of its processes are ended when it is dropped.
struct Supervised {
    runtime: Runtime,
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let processes = self.processes();
        processes.iter().for_each(|pid| kill(*pid, Signal::KILL));
    }
}

fn kill(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}

fn runs(pid: u32) -> bool {
    // A zombie is nobody's worry: its parent has died, and whoever has it now reaps it.
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = state.rsplit(") ").next().and_then(|rest| rest.chars().next());
    test_kill_process(Pid::from_raw(pid as i32).unwrap()).is_ok() && !matches!(state, None | Some('Z'))
}

impl Supervised {
    fn start(pool: &str) -> Self {
        let mut supervised = Self { runtime: Runtime::new() };
        supervised.serve(pool);
        supervised
    }

    fn serve(&mut self, pool: &str) {
        self.runtime.spawn(&["serve", "--pool", pool]);
        let socket = self.runtime.dir().join("clade.api");
        wait_until("the supervisor", || UnixStream::connect(&socket).is_ok());
    }

    /// Boots a paused VM: it would spin.
    fn boot(&self, name: &str, more: &[&str]) {
        let args = [&["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", name], more].concat();
        let booted = self.runtime.clade(&args);
        assert_eq!((booted.code, booted.stdout.trim()), (Some(0), name), "{booted:?}");
        self.runtime.clade(&["pause", name, "--json"]).json();
    }

    fn fork(&self, args: &[&str]) -> Vec<String> {
        let answer = self.runtime.clade(&[&["fork", "--paused", "--json"], args].concat()).json();
        names(&answer["children"])
    }

    fn vms(&self) -> Vec<Value> {
        self.runtime.clade(&["ps", "--json"]).json().as_array().unwrap().clone()
    }

    fn pid_of(&self, name: &str) -> u32 {
        let vms = self.vms();
        let vm = vms.iter().find(|vm| vm["name"] == name).unwrap_or_else(|| panic!("no {name} in {vms:?}"));
        vm["pid"].as_u64().unwrap() as u32
    }

    /// One HTTP request to the supervisor.
    fn http(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        self.runtime.http_at(&self.runtime.dir().join("clade.api"), method, path, body)
    }

    fn info(&self, what: &str) -> u64 {
        self.http("GET", "/v1/supervisor", "").1[what].as_u64().unwrap()
    }

    /// Processes of this runtime directory: its supervisor, zygotes and workers.
    fn processes(&self) -> BTreeSet<u32> {
        let dir = self.runtime.dir().display().to_string();
        let is_ours = |entry: &fs::DirEntry| {
            let of = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            ["serve", "zygote"].contains(&of("cmdline").split('\0').nth(1).unwrap_or_default())
                && of("environ").contains(&dir)
        };
        let all = fs::read_dir("/proc").unwrap().flatten().filter(is_ours);
        all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|pid| runs(*pid)).collect()
    }

    fn zygotes(&self) -> Vec<u32> {
        let workers: BTreeSet<u32> = self.vms().iter().map(|vm| vm["pid"].as_u64().unwrap() as u32).collect();
        let supervisor = self.info("pid") as u32;
        self.processes().into_iter().filter(|pid| *pid != supervisor && !workers.contains(pid)).collect()
    }

    /// Files but the log.
    fn files(&self) -> Vec<String> {
        let all = fs::read_dir(self.runtime.dir()).unwrap().flatten();
        all.map(|entry| entry.file_name().into_string().unwrap()).filter(|name| name != "clade.log").collect()
    }

    fn stop(&self, name: &str) {
        let stopped = self.runtime.clade(&["stop", name]);
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
    }

    /// Stops what is left, and sees that nothing of it is.
    fn end(mut self) {
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
    // They run, and are parents.
    for command in ["resume", "pause"] {
        assert_eq!(all.runtime.clade(&[command, "grandchild"]).code, Some(0));
    }
    assert_eq!(all.fork(&["grandchild"]), ["grandchild-1"]);
    // By the supervisor's socket as by their own.
    assert_eq!(all.http("POST", "/v1/vms/grandchild/resume", "").1["state"], "running");
    assert_eq!(all.http("GET", "/v1/vms", "").1.as_array().unwrap().len(), 7);
    let listed = all.runtime.clade(&["checkpoints", "--json"]).json();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    all.runtime.clade(&["rm", "warm", "--json"]).json();
    all.runtime.clade(&["fork", "warm"]).expect_refusal("warm");
    all.end();
}

/// Guest memory of a VM's process, as the process itself sees it.
struct GuestMemory {
    file: fs::File,
    base: u64,
}

impl GuestMemory {
    const BYTES: u64 = 32 << 20;
    /// Guest-physical: the bare guest leaves it alone.
    const AT: u64 = 24 << 20;

    fn of(pid: u32) -> Self {
        // Neighbouring mappings of memory files, together as large as the guest's memory.
        let mut spans: Vec<(u64, u64)> = Vec::new();
        for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
            let (range, rest) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
            if !rest.starts_with("rw-") || !(rest.contains(" /memfd:clade") || rest.contains(" /#")) {
                continue;
            }
            match spans.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => spans.push((start, end)),
            }
        }
        let found = spans.iter().find(|(start, end)| end - start == Self::BYTES);
        let base = found.unwrap_or_else(|| panic!("no guest memory in {spans:x?}")).0;
        let file = fs::File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        Self { file, base }
    }

    fn write(&self, page: u64, value: u64) {
        self.file.write_all_at(&value.to_le_bytes(), self.base + Self::AT + page * 4096).unwrap();
    }

    fn read(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.base + Self::AT + page * 4096).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// Each fork shows what was written since the one before, through three generations of processes,
/// and a reset drops it.
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
    assert!(reset["dropped_pages"].as_u64() > Some(0), "{reset}");
    assert_eq!((memory("web-2-1").read(0), memory("web-2-1").read(7)), (2, 21));
    let exclusive = || {
        let vms = all.vms();
        vms.iter().find(|vm| vm["name"] == "web").unwrap()["memory"]["exclusive_pages"].as_u64().unwrap()
    };
    // What is copied in the background is shared back for a while.
    wait_until("the copy to end", || exclusive() == exclusive());
    let before = exclusive();
    web.write(9, 1);
    assert_eq!(exclusive(), before + 1);
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
        assert!(answer["error"].is_string(), "{method} {path}: {answer}");
    }
    // The parent has lost nothing.
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.end();
}

#[test]
fn prepared_workers_are_used_and_one_that_has_died_costs_nothing() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("2");
    all.boot("web", &[]);
    let before = all.processes();
    all.runtime.clade(&["checkpoint", "web", "cp", "--prepare", "3", "--json"]).json();
    assert_eq!(all.info("prepared"), 3);
    let prepared: Vec<u32> = all.processes().difference(&before).copied().collect();
    assert_eq!(prepared.len(), 3);
    kill(prepared[0], Signal::KILL);
    wait_until("its end", || !runs(prepared[0]));
    let children = all.fork(&["cp", "--count", "4"]);
    assert_eq!(children.len(), 4);
    let pids: BTreeSet<u32> = children.iter().map(|child| all.pid_of(child)).collect();
    assert!(pids.contains(&prepared[1]) && pids.contains(&prepared[2]), "{pids:?} of {prepared:?}");
    // As many as the last fork took, but two at most.
    wait_until("the pool", || all.info("prepared") == 2);
    all.end();
}

#[test]
fn a_killed_worker_is_one_vm_and_is_said() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web", "--count", "2"]);
    let pid = all.pid_of("web-1");
    kill(pid, Signal::KILL);
    wait_until("its files to go", || {
        !all.files().iter().any(|file| file.starts_with("web-1.") && file != "web-1.ended")
    });
    assert_eq!(all.runtime.names(), ["web", "web-2"]);
    let ended = all.runtime.clade(&["ps", "--all", "--json"]).json().to_string();
    assert!(ended.contains("signal 9") && ended.contains(&pid.to_string()), "{ended}");
    // The name is free.
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.end();
}

#[test]
fn a_killed_zygote_is_replaced() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web"]);
    let zygotes = all.zygotes();
    assert_eq!(zygotes.len(), 1, "{zygotes:?}");
    kill(zygotes[0], Signal::KILL);
    wait_until("its end", || !runs(zygotes[0]));
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-2", "web-3"]);
    assert_eq!(all.runtime.names().len(), 4);
    // What the first has made is nobody's child here, and ends as well.
    all.end();
}

#[test]
fn a_supervisor_that_comes_back_finds_its_vms() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("2");
    all.boot("web", &[]);
    all.runtime.clade(&["checkpoint", "web", "cp", "--prepare", "2", "--json"]).json();
    all.fork(&["cp"]);
    let workers = [all.pid_of("web"), all.pid_of("cp-1")];
    all.runtime.crash();
    // Prepared ones go with it, and VMs run on.
    wait_until("the end of the others", || all.processes().len() == 3);
    assert_eq!([all.pid_of("web"), all.pid_of("cp-1")], workers);
    all.runtime.clade(&["checkpoints"]).expect_refusal("clade serve");
    all.serve("0");
    assert_eq!(all.runtime.names(), ["cp-1", "web"]);
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.runtime.clade(&["fork", "cp"]).expect_refusal("cp");
    all.end();
}

/// Whoever connects to a VM's image socket and says nothing, or too much, or goes away.
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
    // It asks, and goes away in the middle of the answer.
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

/// What the booted VM wrote since a checkpoint goes into its image when the checkpoint has gone.
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

#[test]
fn the_first_vm_in_the_background_starts_a_supervisor() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let all = Supervised { runtime };
    all.boot("web", &[]);
    let supervisor = all.info("pid") as u32;
    all.boot("other", &[]);
    assert_eq!((all.info("pid") as u32, all.info("vms")), (supervisor, 2));
    for name in ["web", "other"] {
        all.stop(name);
    }
    kill(supervisor, Signal::TERM);
    wait_until("the end of all processes", || all.processes().is_empty());
    assert_eq!(all.files(), [""; 0]);
}

/// What a storm leaves must be what was there before it.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    files: BTreeSet<String>,
    descriptors: usize,
    threads: usize,
    /// Descriptors of the VM that is left: its layers vary.
    of_vm: usize,
}

impl Left {
    fn now(all: &Supervised) -> Self {
        let count = |pid: u32, what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
        let supervisor = all.info("pid") as u32;
        // A prepared worker is a socket and a process.
        let prepared = 2 * all.info("prepared") as usize;
        Self {
            files: all.files().into_iter().filter(|file| !file.ends_with(".ended")).collect(),
            descriptors: count(supervisor, "fd").saturating_sub(prepared),
            threads: count(supervisor, "task"),
            of_vm: count(all.pid_of("web"), "fd"),
        }
    }

    fn is_back_to(&self, before: &Self) -> bool {
        self.files == before.files
            && self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.of_vm <= before.of_vm + 8
    }
}

/// Forks, checkpoints, stops and kills at random. Answers are counted by status.
fn storm(all: &Supervised, seed: u64, until: std::time::Instant) -> std::collections::BTreeMap<u16, u64> {
    let mut random = seed;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let mut answers = std::collections::BTreeMap::new();
    while std::time::Instant::now() < until {
        let (_, vms) = all.http("GET", "/v1/vms", "");
        let vms: Vec<(String, u32)> = vms.as_array().map_or(Vec::new(), |all| {
            let one = |vm: &Value| (vm["name"].as_str().unwrap().to_owned(), vm["pid"].as_u64().unwrap() as u32);
            all.iter().map(one).filter(|(name, _)| name != "web").collect()
        });
        let (_, checkpoints) = all.http("GET", "/v1/checkpoints", "");
        let checkpoints: Vec<&str> =
            checkpoints.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        let vm = vms.get(below(vms.len().max(1) as u64) as usize);
        let name = vm.map_or("web", |(name, _)| name.as_str());
        let checkpoint = checkpoints.get(below(checkpoints.len().max(1) as u64) as usize).copied().unwrap_or("none");
        let fork = format!(r#"{{"count":{},"paused":{}}}"#, 1 + below(3), below(4) > 0);
        let act = if vms.len() > 12 { 4 } else { below(12) };
        let (method, path, body) = match act {
            0 => ("POST", format!("/v1/vms/{name}/fork"), fork),
            1 => ("POST", "/v1/vms/web/fork".to_owned(), fork),
            2 => ("POST", format!("/v1/checkpoints/{checkpoint}/fork"), fork),
            3 if checkpoints.len() < 6 => ("POST", format!("/v1/vms/{name}/checkpoint"), "{}".to_owned()),
            3 | 9 => ("DELETE", format!("/v1/checkpoints/{checkpoint}"), String::new()),
            4 | 5 => ("POST", format!("/v1/vms/{name}/stop"), String::new()),
            6 => ("POST", format!("/v1/vms/{name}/pause"), String::new()),
            7 => ("POST", format!("/v1/checkpoints/{checkpoint}/prepare"), r#"{"count":2}"#.to_owned()),
            8 => {
                // Not web, and nobody else by a number that was another's.
                if let Some((_, pid)) = vm.filter(|(_, pid)| all.processes().contains(pid)) {
                    kill(*pid, Signal::KILL);
                }
                continue;
            }
            10 if below(8) == 0 => {
                all.zygotes_killed();
                continue;
            }
            _ => ("GET", format!("/v1/vms/{name}"), String::new()),
        };
        if name == "web" && ["/stop", "/pause"].iter().any(|end| path.ends_with(end)) {
            continue;
        }
        let (status, answer) = all.http(method, &path, &body);
        *answers.entry(status).or_default() += 1;
        // Gone, in the wrong state, or its process was killed while it was asked: all of that is an
        // answer. What is 500 must say that a process has ended.
        let killed = answer["error"].as_str().is_some_and(|error| error.contains("process") || error.contains("gone"));
        assert!(
            [200, 404, 409, 502].contains(&status) || status == 500 && killed,
            "{method} {path}: {status} {answer}"
        );
    }
    answers
}

impl Supervised {
    /// Kills the zygote, whichever it is now: the process that is the parent of workers and whose
    /// parent is the supervisor.
    fn zygotes_killed(&self) {
        let supervisor = self.info("pid").to_string();
        let parent = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1).map(str::to_owned))
        };
        let zygote = self.processes().into_iter().find(|pid| parent(*pid).as_ref() == Some(&supervisor));
        if let Some(zygote) = zygote {
            kill(zygote, Signal::KILL);
        }
    }

    fn storm(&self, threads: u64, seconds: u64) {
        let run = |seconds: u64, round: u64| {
            let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
            let answers = std::thread::scope(|scope| {
                let all: Vec<_> =
                    (0..threads).map(|thread| scope.spawn(move || storm(self, thread + 1000 * round, until))).collect();
                all.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            println!("answers: {answers:?}");
            for one in self.http("GET", "/v1/checkpoints", "").1.as_array().unwrap() {
                self.http("DELETE", &format!("/v1/checkpoints/{}", one["name"].as_str().unwrap()), "");
            }
            wait_until("all to be stopped", || {
                let vms = self.vms();
                let left = vms.iter().filter_map(|vm| vm["name"].as_str()).filter(|name| *name != "web");
                left.filter(|name| self.runtime.clade(&["stop", name]).code.is_some()).count() == 0
            });
            assert!(answers.iter().any(|answers| answers.get(&200) > Some(&3)), "{answers:?}");
        };
        run(2, 0);
        // Threads for blocking work go after ten idle seconds, and prepared workers stay for a minute:
        // this one keeps none.
        let settled = |before: Option<&Left>| {
            wait_until("what was taken to be given back", || {
                let left = Left::now(self);
                let is_back = before.is_none_or(|before| left.is_back_to(before));
                if !is_back {
                    println!("{left:?}\nbefore: {before:?}");
                }
                is_back
            });
        };
        // Whether or not the last zygote was killed: there is one now.
        let probe = || {
            self.fork(&["web", "--name", "probe"]);
            self.stop("probe");
        };
        probe();
        std::thread::sleep(std::time::Duration::from_secs(12));
        let before = Left::now(self);
        run(seconds, 1);
        probe();
        settled(Some(&before));
        // Supervisor, zygote, web, and what is prepared.
        wait_until("all other processes to end", || self.processes().len() == 3 + self.info("prepared") as usize);
    }
}

#[test]
fn forks_checkpoints_and_kills_at_random_leave_nothing() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.storm(4, 4);
    all.end();
}
