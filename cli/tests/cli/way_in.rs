//! The API under misuse: stopped VMs release their resources, descriptors come back, limits hold,
//! and a client that goes cancels its request.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use clade_test_support::{Cid, PatientStream, TapName, lowest, wait_until_within};
use rustix::process::{Pid, Resource, Rlimit};
use serde_json::{Value, json};

use crate::guest::{write_guest, write_login_guest};
use crate::supervisor::Supervised;
use crate::tool::{Runtime, kvm, stem, taps, wait_until};

/// Running time for hundreds of VMs on the reference host.
const HUNDREDS: Duration = Duration::from_secs(1200);

fn interface_exists(name: &str) -> bool {
    std::path::Path::new("/sys/class/net").join(name).exists()
}

#[test]
fn stop_answers_when_all_is_released() {
    if !kvm() || !taps() {
        return;
    }
    let mut runtime = Runtime::new();
    let name = TapName::take();
    let stem = stem(&name);
    let claim = Cid::take();
    let vsock = format!("cid={},socket={}", claim.number(), runtime.dir().join("web.vsock").display());
    runtime.start_with("web", &["--net", &format!("tap={stem}0"), "--vsock", &vsock, "--virtio-console"]);
    let (own, child) = (format!("{stem}0"), format!("{stem}1"));
    for _ in 0..20 {
        // Running, so that its threads are in the guest.
        let forked = runtime.clade(&["fork", "web", "--json"]).json();
        assert_eq!(forked["children"], json!(["web-1"]), "the name is free again each time");
        assert_eq!(forked["identities"][0]["nets"][0]["tap"], json!(child));
        assert!(runtime.dir().join("web-1.vsock").exists() && interface_exists(&child));
        runtime.clade(&["stop", "web-1", "--json"]).json();
        // Checked at once, without a wait.
        assert!(!interface_exists(&child), "the interface is there after the answer");
        let left: Vec<String> = runtime.files().into_iter().filter(|file| file.starts_with("web-1")).collect();
        assert_eq!(left, [""; 0]);
    }
    // A stopped parent releases its own resources, even if its children run on.
    runtime.clade(&["fork", "web", "--paused", "--json"]).json();
    runtime.clade(&["stop", "web", "--json"]).json();
    assert!(!interface_exists(&own) && interface_exists(&child));
    assert!(!runtime.dir().join("web.vsock").exists() && runtime.dir().join("web-1.vsock").exists());
    runtime.start_with("web", &["--net", &format!("tap={own}"), "--vsock", &vsock]);
    for name in ["web", "web-1"] {
        runtime.clade(&["stop", name, "--json"]).json();
    }
    assert_eq!((runtime.ended(), runtime.ended()), (Some(0), Some(0)));
}

#[test]
fn descriptors_and_threads_come_back() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start_with("web", &["--virtio-console"]);
    let (pid, supervisor) = (runtime.worker("web"), runtime.supervisor());
    let console = runtime.dir().join("web.console");
    let turn = || {
        let mut open: Vec<UnixStream> = (0..12).map(|_| UnixStream::connect(&console).unwrap()).collect();
        open.iter_mut().for_each(|stream| stream.write_all(b"x").unwrap());
        drop(open);
        runtime.clade(&["fork", "web", "--count", "3", "--json"]).json();
        for n in 1..=3 {
            runtime.clade(&["stop", &format!("web-{n}"), "--json"]).json();
        }
        let idle: Vec<UnixStream> = (0..12).map(|_| UnixStream::connect(runtime.socket("web")).unwrap()).collect();
        assert_eq!(runtime.names(), ["web"]);
        drop(idle);
    };
    // One-time resources stay: the first layers, threads for blocking work.
    turn();
    let before = (lowest(|| runtime.open_files(pid)), lowest(|| runtime.open_files(supervisor)));
    for _ in 0..6 {
        turn();
    }
    wait_until("descriptors to come back", || runtime.open_files(pid) <= before.0);
    wait_until("the supervisor's descriptors to come back", || runtime.open_files(supervisor) <= before.1);
    wait_until("threads to come back", || fs::read_dir(format!("/proc/{pid}/task")).unwrap().count() <= 12);
}

#[test]
fn a_fork_of_more_than_there_is_room_for_is_refused_before_it_begins() {
    if !kvm() {
        return;
    }
    // Without prepared workers, whose descriptors would be counted before the fork.
    let supervised = Supervised::start("0");
    supervised.boot("web", &[]);
    let runtime = &supervised.runtime;
    let before = (runtime.files(), runtime.open_files(runtime.supervisor()));
    let forks = || crate::metrics::scrape_of(runtime).value("clade_fork_seconds_count", &[]);
    let before_it = forks();
    let refused = runtime.clade(&["fork", "web", "--count", "10000"]);
    // Unless the host is large enough for ten thousand VMs.
    if refused.code == Some(0) {
        return clade_test_support::skipped("this host has room for 10,000 children");
    }
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("10000 children do not fit"), "{refused:?}");
    assert_eq!(forks(), before_it, "the VM was not forked");
    assert_eq!(runtime.files(), before.0);
    // The needs in the message are those of a VM.
    let needed: u64 = refused.stderr.split("about ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    if refused.stderr.contains("descriptors") {
        runtime.clade(&["fork", "web", "--count", "8", "--paused", "--json"]).json();
        // Rounded: there may be a connection or two more, before or after.
        let each = (runtime.open_files(runtime.supervisor()) - before.1 + 4) as u64 / 8;
        let told = needed / 10_000;
        // Until it runs a VM takes its worker's socket, its name's lock and its process once more.
        assert!((each..=each + 3).contains(&told), "{told} are looked for, {each} are taken");
    }
    assert_eq!(runtime.clade(&["pause", "web", "--json"]).json()["state"], "paused");
}

/// Sends a fork of 400 children and does not wait for the answer.
fn begin_large_fork(runtime: &Runtime) -> UnixStream {
    let stream = runtime.begin("/v1/vms/web/fork", r#"{"count":400}"#);
    // Under way once the names are taken.
    wait_until_within(HUNDREDS, "the fork to begin", || runtime.files().len() > 400);
    stream
}

#[test]
fn a_client_that_has_gone_cancels_its_fork() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    let before = (runtime.files(), runtime.open_files(runtime.supervisor()));
    drop(begin_large_fork(&runtime));
    wait_until_within(HUNDREDS, "the names to be free", || runtime.files() == before.0);
    assert_eq!(runtime.names(), ["web"], "no child was left");
    // Workers prepared for the next fork stay for a minute: sixteen, with a socket and a process
    // each.
    wait_until("descriptors to come back", || runtime.open_files(runtime.supervisor()) <= before.1 + 4 + 2 * 16);
    assert_eq!(runtime.clade(&["fork", "web", "--paused", "--json"]).json()["children"], json!(["web-1"]));
}

#[test]
fn the_end_of_a_session_cancels_its_fork() {
    // A fork that is done before the session ends is not cancelled: then the next one is begun.
    assert!(!kvm() || (0..20).any(|_| ends_within_a_fork()), "every fork was done before its session ended");
}

/// Ends a session while it forks. Returns whether that was in time; then the fork is cancelled.
fn ends_within_a_fork() -> bool {
    let mut runtime = Runtime::new();
    runtime.start("web");
    let mut asked = PatientStream::from(begin_large_fork(&runtime));
    assert_eq!(runtime.clade(&["stop", "web", "--json"]).json()["state"], "stopped");
    let mut answer = String::new();
    // The connection stays open behind the answer.
    let mut bytes = [0; 4096];
    while !answer.ends_with('}') {
        let got = asked.read(&mut bytes).unwrap();
        assert!(got > 0, "{answer}");
        answer.push_str(&String::from_utf8_lossy(&bytes[..got]));
        if answer.starts_with("HTTP/1.1 200") {
            return false;
        }
    }
    drop(asked);
    assert_eq!(runtime.ended(), Some(0), "no child is left to wait for");
    wait_until("the children's files to go", || runtime.files().is_empty());
    // The VM may have ended before its image was taken, and the process begun to end before the request came.
    let has_gone = ["HTTP/1.1 404", "HTTP/1.1 410"].iter().any(|status| answer.starts_with(status))
        || answer.contains("urn:clade:ending");
    assert!(has_gone || answer.starts_with("HTTP/1.1 409") && answer.contains("cancelled after"), "{answer}");
    !has_gone
}

#[test]
fn without_descriptors_it_waits_and_does_not_spin() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.spawn(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "web"]);
    wait_until("the VM", || runtime.socket("web").exists() && runtime.clade(&["pause", "web"]).code == Some(0));
    let limit = Some(80);
    let few = Rlimit { current: limit, maximum: limit };
    let worker = Pid::from_raw(runtime.worker("web") as i32).unwrap();
    rustix::process::prlimit(Some(worker), Resource::Nofile, few).unwrap();
    // More than it has descriptors for, on both sockets.
    let connect = |path, count| (0..count).map(|_| UnixStream::connect(&path).unwrap()).collect::<Vec<_>>();
    let mut open = Vec::new();
    let pid = worker.as_raw_nonzero().get();
    let is_full = || (0..80).all(|number| fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_ok());
    let ticks = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    // Once all connections have come. A spinning process would take all the time of a processor
    // that it gets, and one that reports each attempt would write a line for each.
    wait_until("the process rests without descriptors", || {
        // Idle connections are cut after a while: others come in their place.
        if !is_full() {
            open = vec![connect(runtime.dir().join("web.console"), 100), connect(runtime.socket("web"), 100)];
        }
        let (before, said, begun) = (ticks(), runtime.log(), Instant::now());
        std::thread::sleep(Duration::from_millis(500));
        let spent = Duration::from_millis(10 * (ticks() - before));
        let has_said = said.contains("connections cannot be accepted") && runtime.log() == said;
        spent < begun.elapsed() / 2 && has_said && is_full()
    });
    drop(open);
    wait_until("an answer", || runtime.clade(&["ps", "--json"]).code == Some(0) && runtime.names() == ["web"]);
    runtime.clade(&["stop", "web", "--json"]).json();
    assert_eq!(runtime.ended(), Some(0));
}

#[test]
fn idle_and_slow_connections_are_cut_and_others_are_served() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    // A body that does not come.
    let mut slow = PatientStream::from(UnixStream::connect(runtime.socket("web")).unwrap());
    slow.write_all(b"POST /v1/vms/web/fork HTTP/1.1\r\nhost: c\r\ncontent-length: 9\r\nconnection: close\r\n\r\n{")
        .unwrap();
    // More than the limit allows, all silent.
    let mut idle: Vec<UnixStream> = (0..300).map(|_| UnixStream::connect(runtime.socket("web")).unwrap()).collect();
    assert_eq!(runtime.names(), ["web"], "who comes after them is served all the same");
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    // The others were accepted when those were cut, and have as long.
    for stream in idle.drain(..250) {
        let mut stream = PatientStream::from(stream);
        // Cut, with or without an answer.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
    }
}

#[test]
fn an_error_to_a_request_with_a_body_arrives() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    let body = format!(r#"{{"count":1,"name":"{}"}}"#, "x".repeat(60_000));
    for _ in 0..30 {
        let (status, answer) = runtime.http("POST", "/v1/vms/nobody/fork", &body);
        assert_eq!(status, 400, "{answer}");
        assert_eq!(runtime.http("POST", "/v1/nothing", &body).0, 404);
        assert_eq!(runtime.http("DELETE", "/v1/vms/web", &body).0, 405);
    }
    // A body that is too long is read to its end all the same: its sender is not cut off.
    let long = vec![b' '; 4 << 20];
    let mut stream = UnixStream::connect(runtime.socket("web")).unwrap();
    let head = format!("POST /v1/vms/web/fork HTTP/1.1\r\nhost: clade\r\ncontent-length: {}\r\n\r\n", long.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&long).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[test]
fn a_runtime_directory_that_others_could_change_is_refused() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let outer = tempfile::tempdir().unwrap();
    let (real, link) = (outer.path().join("real"), outer.path().join("link"));
    fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let run = |dir: &std::path::Path| {
        let mut command = runtime.command(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "web"]);
        crate::tool::Answer::from(command.env("CLADE_RUNTIME_DIR", dir).output().unwrap())
    };
    run(&link).expect_refusal("is a link");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o777)).unwrap();
    run(&real).expect_refusal("0777");
    let long = outer.path().join("l".repeat(100));
    run(&long).expect_refusal("107");
    assert_eq!(fs::read_dir(&real).unwrap().count(), 0);
}

#[test]
fn a_child_that_ends_by_itself_leaves_its_reason_and_its_last_lines() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("guest");
    write_guest(&kernel);
    let args = ["run", "--detached", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", "bell"];
    runtime.spawn(&args);
    let logs = |runtime: &Runtime, name: &str| runtime.clade(&["logs", name]);
    wait_until("the guest", || logs(&runtime, "bell").stdout.contains("ready"));
    let followed = dir.path().join("followed");
    let mut follow = runtime.command(&["logs", "--follow", "bell"]);
    runtime.adopt(follow.stdout(fs::File::create(&followed).unwrap()).stderr(Stdio::null()).spawn().unwrap());
    wait_until("its output", || fs::read_to_string(&followed).unwrap().contains("ready"));
    runtime.clade(&["fork", "bell", "--count", "2", "--json"]).json();
    let mut console = UnixStream::connect(runtime.dir().join("bell-1.console")).unwrap();
    console.write_all(b"x").unwrap();
    wait_until("its end", || !runtime.socket("bell-1").exists());
    assert_eq!(runtime.names(), ["bell", "bell-2"]);
    for gone in [logs(&runtime, "bell-1"), runtime.clade(&["logs", "-f", "bell-1"])] {
        assert_eq!((gone.code, gone.stdout.trim_end()), (Some(0), "bye"), "{gone:?}");
        assert!(gone.stderr.contains("bell-1 ended after") && gone.stderr.contains("reset itself"), "{gone:?}");
    }
    let all = runtime.clade(&["ps", "-a"]).stdout;
    assert!(all.lines().any(|line| line.starts_with("bell-1 ") && line.contains("reset itself")), "{all}");
    let all = runtime.clade(&["ps", "--all", "--json"]).json();
    assert_eq!((&all["ended"][0]["name"], &all["ended"][0]["parent"]), (&json!("bell-1"), &json!("bell")));
    assert!(!runtime.clade(&["ps"]).stdout.contains("bell-1"));
    // Stopped on request: not recorded.
    runtime.clade(&["stop", "bell-2", "--json"]).json();
    assert!(!runtime.clade(&["ps", "-a"]).stdout.contains("bell-2"));
    logs(&runtime, "bell-2").expect_refusal("bell-2");
    // The next VM of the name replaces the record.
    let again = runtime.clade(&["fork", "bell", "--json"]).json();
    assert_eq!(again["children"], json!(["bell-1"]));
    assert!(!runtime.clade(&["ps", "-a"]).stdout.contains("reset itself"));
    // The last VM of its process, which ends with it.
    runtime.clade(&["stop", "bell-1", "--json"]).json();
    let mut console = UnixStream::connect(runtime.dir().join("bell.console")).unwrap();
    // A client that types need not read. It has time to notice that nothing reads.
    console.shutdown(Shutdown::Read).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    console.write_all(b"x").unwrap();
    drop(console);
    assert_eq!(runtime.ended(), Some(0));
    let gone = logs(&runtime, "bell");
    assert!(gone.stdout.contains("ready") && gone.stdout.contains("bye"), "{gone:?}");
    // The end of the VM is the end of the command.
    assert_eq!(runtime.ended(), Some(0));
    assert_eq!(fs::read_to_string(followed).unwrap(), gone.stdout);
}

#[test]
fn a_dead_process_and_one_that_never_was_are_told_apart() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("dead");
    runtime.crash_all();
    wait_until("the end of its process", || runtime.clades().is_empty());
    runtime.clade(&["pause", "dead"]).expect_refusal("has died");
    runtime.clade(&["console", "dead"]).expect_refusal("has died");
    runtime.clade(&["pause", "never"]).expect_refusal("there is no VM \"never\"");
}

#[test]
fn another_users_vms_are_not_listed_as_none() {
    const NOBODY: u32 = 65534;
    if !kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return clade_test_support::skipped("without root no process is another user's");
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    fs::set_permissions(runtime.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    // That user may have no access to the binary's directory.
    let outer = tempfile::tempdir().unwrap();
    fs::set_permissions(outer.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = outer.path().join("clade");
    crate::tool::copy_program(&copy);
    let as_nobody = |args: &[&str]| -> crate::tool::Answer {
        let mut command = std::process::Command::new(&copy);
        command.args(args).env("CLADE_RUNTIME_DIR", runtime.dir()).uid(NOBODY).gid(NOBODY).current_dir("/");
        command.output().unwrap().into()
    };
    let listed = as_nobody(&["ps"]);
    assert_eq!(listed.code, Some(0), "{listed:?}");
    assert!(listed.stderr.contains("1 VMs in") && listed.stderr.contains("another user's"), "{listed:?}");
    as_nobody(&["pause", "web"]).expect_refusal("another user's");
    as_nobody(&["console", "web"]).expect_refusal("another user's");
    fs::set_permissions(runtime.dir(), fs::Permissions::from_mode(0o700)).unwrap();
    let closed = as_nobody(&["ps"]);
    assert!(closed.code == Some(1) && closed.stderr.contains("cannot be read"), "{closed:?}");
}

#[test]
fn a_place_where_no_snapshot_can_be_is_bad_input() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.clade(&["snapshot", "web", "/nonexistent/deep/web"]).expect_refusal("/nonexistent/deep/web");
    let file = runtime.dir().join("file");
    fs::write(&file, "").unwrap();
    let inside = file.join("web").display().to_string();
    runtime.clade(&["snapshot", "web", &inside]).expect_refusal(&inside);
}

#[test]
fn output_that_nobody_reads_is_no_complaint() {
    let runtime = Runtime::new();
    let script = "\"$0\" ps --json | true; \"$0\" --help | true; \"$0\" run --help | head -1 >/dev/null";
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script, crate::tool::CLADE]).env("CLADE_RUNTIME_DIR", runtime.dir());
    let output = shell.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn logs_that_do_not_fit_on_a_disk_are_an_error() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let kernel = all.runtime.dir().join("login.elf");
    write_login_guest(&kernel);
    let kernel = kernel.to_str().unwrap();
    let booted = all.runtime.clade(&["run", "-d", "--kernel", kernel, "--mem", "32M", "--name", "web"]);
    assert_eq!(booted.code, Some(0), "{booted:?}");
    // A line without an end is written last.
    wait_until("the guest's output", || all.runtime.clade(&["logs", "web"]).stdout == "login: ");
    let full = all.runtime.clade_with_full_disk(&["logs", "web"]);
    assert!(full.code == Some(1) && full.stderr.contains("No space left"), "{full:?}");
    fs::remove_file(kernel).unwrap();
    all.end();
}

#[test]
fn a_filter_of_the_log_that_is_not_valid_is_refused() {
    let runtime = Runtime::new();
    let answer: crate::tool::Answer = runtime.command(&["ps"]).env("CLADE_LOG", "nonsense").output().unwrap().into();
    answer.expect_refusal("nonsense");
}

#[test]
fn help_shows_the_patterns_it_speaks_of() {
    let runtime = Runtime::new();
    for command in ["fork", "restore"] {
        let help = runtime.clade(&[command, "--help"]).stdout;
        assert!(help.contains("{n} stands for a number"), "{help}");
        assert!(!help.contains('\u{1b}'), "{help}");
    }
}

#[test]
fn what_is_appended_comes_behind_the_default_command_line() {
    let runtime = Runtime::new();
    let answer = runtime.clade(&["run", "--kernel", "bare", "--append", "quiet", "--cmdline", "x"]);
    assert!(answer.code == Some(2) && answer.stderr.contains("--cmdline"), "{answer:?}");
}

#[test]
fn names_are_listed_by_their_numbers() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.clade(&["fork", "web", "--count", "11", "--paused", "--json"]).json();
    let expected: Vec<String> = std::iter::once("web".into()).chain((1..=11).map(|n| format!("web-{n}"))).collect();
    assert_eq!(runtime.names(), expected);
    let table = runtime.clade(&["ps"]).stdout;
    let names: Vec<&str> = table.lines().skip(1).map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(names, expected);
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let all: Value = runtime.clade(&["ps", "--json"]).json();
    assert_eq!(all[11]["name"], "web-11");
}
