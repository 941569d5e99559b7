//! Deaths and returns of processes: of workers, of the zygote, of the supervisor.

use super::*;

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
    // All of its threads: the first may be a zombie while another keeps the socket open. Then an
    // order still gets there, is lost, and all workers of the request are made anew.
    wait_until("its end", || !Path::new(&format!("/proc/{}/task", prepared[0])).exists());
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

/// Returns the file systems of a process's files in huge pages: one, if huge pages are available.
fn memory_mounts(pid: u32) -> BTreeSet<u64> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().map(|entry| entry.path());
    // The files have no name, and their mount is nowhere.
    let is_memory = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/#"));
    descriptors.filter(is_memory).map(|path| fs::metadata(path).unwrap().dev()).collect()
}

/// Returns whether a supervisor has mounted a file system for memory, which is mounted nowhere.
fn has_mount(supervisor: u32) -> bool {
    let mut descriptors = fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().flatten();
    let host = fs::metadata("/").unwrap().dev();
    descriptors.any(|entry| {
        let is_root = fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("/"));
        is_root && fs::metadata(entry.path()).is_ok_and(|found| found.dev() != host)
    })
}

fn mounts(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count()
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
    let (supervisor, before) = (all.info("pid") as u32, memory_mounts(all.pid_of("web-1")));
    let mounted = mounts(supervisor);
    kill(zygotes[0], Signal::KILL);
    wait_until("its end", || !runs(zygotes[0]));
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-2", "web-3"]);
    assert_eq!(all.runtime.names().len(), 4);
    // The mount is the supervisor's, and no other is made.
    let pids = ["web", "web-1", "web-2", "web-3"].map(|name| all.pid_of(name));
    let now: BTreeSet<u64> = pids.iter().flat_map(|pid| memory_mounts(*pid)).collect();
    assert_eq!((&now, now.len()), (&before, usize::from(has_mount(supervisor))));
    let next = all.zygotes();
    assert_eq!(next.len(), 1, "{next:?}");
    for pid in [supervisor, next[0]].iter().chain(&pids) {
        assert_eq!(mounts(*pid), mounted, "mounts that {pid} sees");
    }
    // The first one's VMs are not this process's children, and end as well.
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
    // Prepared workers go with it, and VMs run on.
    wait_until("the end of the others", || all.processes().len() == 3);
    assert_eq!([all.pid_of("web"), all.pid_of("cp-1")], workers);
    all.runtime.clade(&["checkpoints"]).expect_refusal("clade serve");
    all.serve("0");
    assert_eq!(all.runtime.names(), ["cp-1", "web"]);
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    all.runtime.clade(&["fork", "cp"]).expect_refusal("cp");
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

/// `clade serve` shows and ends the running supervisor; its VMs run on. A second one is refused
/// with the first one's pid.
#[test]
fn a_supervisor_is_shown_and_ended_by_a_command() {
    if !kvm() {
        return;
    }
    let all = Supervised { runtime: Runtime::new() };
    for option in ["--status", "--stop"] {
        all.runtime.clade(&["serve", option]).expect_refusal("clade.api");
    }
    all.boot("web", &[]);
    let pid = all.info("pid").to_string();
    all.runtime.clade(&["serve"]).expect_refusal(&format!("process {pid} supervises"));
    let status = all.runtime.clade(&["serve", "--status"]);
    assert!(status.code == Some(0) && status.stdout.starts_with(&format!("process {pid}, version ")), "{status:?}");
    assert!(status.stdout.contains("1 VMs, 0 checkpoints"), "{status:?}");
    let stopped = all.runtime.clade(&["serve", "--stop"]);
    assert_eq!(stopped.stdout, format!("the supervisor has ended: process {pid}\n"), "{stopped:?}");
    assert!(!runs(pid.parse().unwrap()));
    // The next supervisor finds the VM; `ps` and `stop` see it as another's.
    let mut all = all;
    all.serve("0");
    assert!(all.runtime.clade(&["list"]).stdout.contains("web"));
    assert_eq!(all.runtime.clade(&["kill", "web"]).code, Some(0));
    all.end();
}

/// Stops a VM of this supervisor and one of an earlier one, at once, whose processes `spoil` keeps from stopping them.
/// Each process is killed, and the name is then free.
fn stop_by_force(spoil: impl Fn(&Supervised, &str, u32)) {
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    // Another supervisor, which has not started it.
    all.runtime.crash();
    all.serve("0");
    all.fork(&["web"]);
    let names = ["web", "web-1"];
    let pids = names.map(|name| all.pid_of(name));
    for (name, pid) in names.into_iter().zip(pids) {
        spoil(&all, name, pid);
    }
    let stop = |name| all.runtime.clade(&["stop", name, "--json"]).json();
    let stopped = std::thread::scope(|scope| {
        names.map(|name| scope.spawn(move || stop(name))).map(|stopping| stopping.join().unwrap())
    });
    for ((name, pid), stopped) in names.into_iter().zip(pids).zip(stopped) {
        assert_eq!((&stopped["killed"], &stopped["state"]), (&true.into(), &"stopped".into()), "{stopped}");
        assert_eq!(stopped["pid"], pid);
        assert!(!runs(pid));
        assert!(!all.files().iter().any(|file| file.starts_with(&format!("{name}."))), "{:?}", all.files());
        all.boot(name, &[]);
    }
    all.end();
}

#[test]
fn a_vm_whose_process_does_not_answer_is_stopped_all_the_same() {
    if kvm() {
        stop_by_force(|_, _, pid| kill(pid, Signal::STOP));
    }
}

/// Answers each request at the socket of a VM in place of its process.
fn answer_at(socket: &Path, status: &'static str, body: String) {
    fs::remove_file(socket).unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}");
            let _ = write!(stream, "{head}\r\n\r\n{body}");
        }
    });
}

/// A process that a guest has broken into may answer anything but that its VM has stopped.
#[test]
fn a_vm_whose_process_refuses_to_stop_is_stopped_all_the_same() {
    if !kvm() {
        return;
    }
    stop_by_force(|all, name, pid| {
        let refusal = r#"{"type": "urn:clade:wrong-state", "title": "no", "status": 409, "detail": "I run on"}"#;
        answer_at(&all.runtime.socket(name), "409 Conflict", refusal.to_owned());
        // The guest of an honest process may refuse that.
        let (status, answer) = all.http("POST", &format!("/v1/vms/{name}/stop"), r#"{"graceful_s": 1}"#);
        assert!(status == 409 && runs(pid), "{answer}");
    });
}

/// Nor are its word that it has stopped and the number in its lock believed.
#[test]
fn a_vm_whose_process_lies_about_its_end_is_stopped_all_the_same() {
    if !kvm() {
        return;
    }
    stop_by_force(|all, name, pid| {
        let info = all.http("GET", &format!("/v1/vms/{name}"), "").1;
        fs::write(all.runtime.dir().join(format!("{name}.lock")), "1").unwrap();
        answer_at(&all.runtime.socket(name), "200 OK", info.to_string());
        assert!(runs(pid));
    });
}

/// The name of a VM that was reported stopped is free at once.
#[test]
fn a_name_is_free_as_soon_as_its_vm_is_stopped() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("1");
    all.boot("web", &[]);
    for _ in 0..40 {
        let (status, answer) = all.http("POST", "/v1/vms/web/fork", r#"{"name": "child", "paused": true}"#);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(all.http("POST", "/v1/vms/child/stop", "").0, 200);
    }
    all.end();
}

/// Returns whether a VM waits to be ready, or was made paused.
fn is_waiting(vm: &Value) -> bool {
    vm["state"] == "paused" && vm["name"] != "deaf"
}

/// Sends a fork of `deaf` into ready children, waits until `count` are made, and does not wait for the answer. Returns
/// the last child that waits, too. On a slow host the request may have failed before they are seen: it is repeated.
fn begin_ready_fork(all: &Supervised, count: usize) -> (UnixStream, Value) {
    let before = all.vms().len();
    let begin = || {
        let stream = all.runtime.begin("/v1/vms/deaf/fork", &format!(r#"{{"count":{count},"ready":true}}"#));
        stream.set_nonblocking(true).unwrap();
        stream
    };
    let mut stream = begin();
    let waiting = wait_for("children that wait", || {
        let vms = all.vms();
        if vms.len() == before + count {
            return vms.into_iter().rfind(is_waiting);
        }
        if stream.read(&mut [0; 4096]).is_ok() {
            wait_until("the children of the request that has failed to go", || all.vms().len() == before);
            stream = begin();
        }
        None
    });
    (stream, waiting)
}

#[test]
fn vms_that_wait_to_be_ready_end_with_their_client_and_with_their_supervisor() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let cid = Cid::take();
    // No agent answers: the first few have a permit, and the others stay paused.
    let vsock = format!("cid={},socket={}", cid.number(), all.runtime.dir().join("deaf.vsock").display());
    all.boot("deaf", &["--vsock", &vsock]);
    let count = (2 * std::thread::available_parallelism().unwrap().get()).min(16) + 2;
    let (client, waiting) = begin_ready_fork(&all, count);
    // Another VM gets the name of one that waits.
    let name = waiting["name"].as_str().unwrap();
    all.stop(name);
    assert_eq!(all.fork(&["deaf", "--name", name]), [name]);
    drop(client);
    wait_until("the children to go", || all.vms().len() == 2);
    assert!(all.vms().iter().any(|vm| is_waiting(vm) && vm["name"] == name), "another request's VM stays as it is");
    // And at the supervisor's end.
    let (client, _) = begin_ready_fork(&all, count - 1);
    // The processes of two do not answer. That keeps none of the others.
    let children = all.vms().into_iter().filter(|vm| vm["name"] != "deaf" && vm["name"] != name);
    for child in children.take(2) {
        kill(child["pid"].as_u64().unwrap() as u32, Signal::STOP);
    }
    let stopped = all.runtime.clade(&["serve", "--stop"]);
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    drop(client);
    let mut all = all;
    all.runtime.ended();
    all.serve("0");
    assert_eq!(all.runtime.names(), ["deaf", name]);
    all.end();
}
