//! VMs in the foreground: they end with the command, and nothing else does.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;

use clade_host_io::realtime::Scheduling;
use clade_test_support::{Port, skipped};
use rustix::process::Signal;

use crate::guest::{write_guest, write_hasty_guest};
use crate::tool::{Answer, Runtime, kill, kvm, runs, wait_until};

fn detached(runtime: &Runtime, name: &str) {
    let args = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", name];
    let booted = runtime.clade(&args);
    assert_eq!((booted.code, booted.stdout.trim()), (Some(0), name), "{booted:?}");
    runtime.clade(&["pause", name, "--json"]).json();
}

fn parent_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

#[test]
fn each_vm_has_a_process_and_the_session_ends_with_the_command() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.clade(&["fork", "web", "--paused", "--json"]).json();
    // Outside of its session.
    detached(&runtime, "other");
    runtime.clade(&["fork", "other", "--paused", "--json"]).json();
    let (pid, supervisor) = (|name: &str| runtime.worker(name), runtime.supervisor());
    let pids = [pid("web"), pid("web-1"), pid("other"), pid("other-1"), supervisor, runtime.pid()];
    assert_eq!(pids.iter().collect::<BTreeSet<_>>().len(), 6, "{pids:?}");
    // A zygote's death ends no VM, and the next one's VMs are of the session too.
    let zygote = parent_of(pids[0]);
    kill(zygote, Signal::KILL);
    wait_until("its end", || !runs(zygote));
    runtime.clade(&["fork", "web", "--paused", "--count", "3", "--name", "late-{n}", "--json"]).json();
    assert_eq!(runtime.names(), ["late-1", "late-2", "late-3", "other", "other-1", "web", "web-1"]);
    let late = ["late-1", "late-2", "late-3"].map(pid);
    // The first one had not prepared all of them.
    assert!(late.iter().any(|pid| runtime.clades().contains(&parent_of(*pid))), "{late:?}");
    // A killed command can stop no VM.
    runtime.crash();
    wait_until("the end of its VMs", || late.iter().chain(&pids[..2]).all(|pid| !runs(*pid)));
    wait_until("its VMs to be cleared up", || runtime.names() == ["other", "other-1"]);
    assert_eq!(runtime.clade(&["resume", "other", "--json"]).json()["state"], "running");
    runtime.start("web");
    runtime.clade(&["fork", "other", "--paused", "--json"]).json();
    assert_eq!(runtime.names(), ["other", "other-1", "other-2", "web"]);
    assert_eq!(runtime.supervisor(), supervisor);
    // The first one ends the command.
    for name in ["web", "other", "other-1", "other-2"] {
        let stopped = runtime.clade(&["stop", name]);
        assert_eq!(stopped.code, Some(0), "{name}: {stopped:?}");
    }
    assert_eq!(runtime.ended(), Some(0));
    wait_until("the end of the supervisor, which has nothing left", || runtime.clades().is_empty());
}

#[test]
fn a_session_outlives_its_supervisor_and_not_its_command() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    kill(runtime.supervisor(), Signal::KILL);
    wait_until("the end of the supervisor", || runtime.clade(&["serve", "--status"]).code == Some(2));
    // A fork starts the next one, whose VMs are of the session too.
    runtime.clade(&["fork", "web", "--paused", "--json"]).json();
    let workers = ["web", "web-1"].map(|name| runtime.worker(name));
    assert!(runtime.runs() && workers.iter().all(|pid| runs(*pid)));
    runtime.crash();
    wait_until("the end of its VMs", || workers.iter().all(|pid| !runs(*pid)));
    wait_until("its VMs to be cleared up", || runtime.names().is_empty());
    wait_until("the records of both", || {
        runtime.clade(&["ps", "-a"]).stdout.matches("the command that it belonged to has ended").count() == 2
    });
}

#[test]
fn what_others_hold_and_a_sessions_checkpoints_outlive_the_command() {
    if !kvm() {
        return;
    }
    for is_killed in [false, true] {
        let mut runtime = Runtime::new();
        runtime.start("web");
        detached(&runtime, "other");
        for (vm, name) in [("other", "others"), ("web", "its")] {
            runtime.clade(&["checkpoint", vm, name, "--json"]).json();
        }
        if is_killed {
            runtime.crash();
        } else {
            runtime.signal(Signal::INT);
            assert_eq!(runtime.ended(), Some(130));
        }
        wait_until("the end of the session", || runtime.names() == ["other"]);
        for checkpoint in ["others", "its"] {
            runtime.clade(&["fork", checkpoint, "--name", &format!("of-{checkpoint}"), "--paused", "--json"]).json();
        }
        // A VM of the session would have ended by now.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert_eq!(runtime.names(), ["of-its", "of-others", "other"]);
        assert_eq!(runtime.clade(&["resume", "of-its", "--json"]).json()["state"], "running");
        runtime.clade(&["stop", "--all"]);
        // Checkpoints keep the supervisor.
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert_eq!(runtime.clade(&["rm", "others", "its"]).code, Some(0));
        wait_until("the end of the supervisor, which has nothing left", || runtime.clades().is_empty());
    }
}

#[test]
fn a_session_ends_alone() {
    if !kvm() {
        return;
    }
    for is_killed in [false, true] {
        let mut runtime = Runtime::new();
        runtime.start("web");
        let mut command = runtime.command(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "next"]);
        let mut next = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the VM", || runtime.names() == ["next", "web"]);
        runtime.clade(&["fork", "next", "--paused", "--json"]).json();
        let workers = ["next", "next-1"].map(|name| runtime.worker(name));
        if is_killed {
            runtime.crash();
        } else {
            assert_eq!(runtime.clade(&["stop", "web"]).code, Some(0));
            assert_eq!(runtime.ended(), Some(0));
        }
        wait_until("the end of the first", || runtime.names() == ["next", "next-1"]);
        // A VM that ends with it would have ended by now.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(workers.iter().all(|pid| runs(*pid)) && next.try_wait().unwrap().is_none());
        assert_eq!(runtime.clade(&["resume", "next-1", "--json"]).json()["state"], "running");
        kill(next.id(), Signal::TERM);
        assert_eq!(next.wait().unwrap().code(), Some(143));
        assert_eq!(runtime.names(), [""; 0]);
    }
}

#[test]
fn a_supervisor_that_cannot_start_gives_its_reason() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    // The socket's path is a directory, which no supervisor removes.
    fs::create_dir(runtime.api()).unwrap();
    for args in [&["run", "--kernel", "bare"][..], &["run", "-d", "--kernel", "bare"], &["restore", "/nowhere", "-d"]] {
        let refused = runtime.clade(args);
        assert!(matches!(refused.code, Some(1 | 2)), "{refused:?}");
        assert!(
            refused.stderr.contains("the supervisor could not start: ") && refused.stderr.contains("clade.api"),
            "{refused:?}"
        );
    }
}

#[test]
fn the_settings_of_a_killed_supervisor_are_those_of_the_next() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let claim = Port::take();
    let address = format!("127.0.0.1:{}", claim.number());
    // Relative to the working directory.
    let serve = ["serve", "--pool", "0", "--tcp", &address, "--token-file", "token"];
    let answers = || TcpStream::connect(&address).is_ok();
    runtime.adopt(runtime.command(&serve).current_dir(runtime.dir()).stdout(Stdio::null()).spawn().unwrap());
    // The port is bound first, and the settings are kept last.
    wait_until("the supervisor", || runtime.dir().join("clade.serve").exists() && answers());
    let first = runtime.supervisor();
    runtime.crash();
    assert!(!answers());
    detached(&runtime, "web");
    assert!(answers() && runtime.supervisor() != first);
    // A killed one of the background as well.
    kill(runtime.supervisor(), Signal::KILL);
    wait_until("its end", || !answers());
    runtime.clade(&["fork", "web", "--paused", "--json"]).json();
    assert!(answers());
    // The settings are an error where they cannot be had.
    kill(runtime.supervisor(), Signal::KILL);
    wait_until("its end", || !answers());
    let taken = std::net::TcpListener::bind(&address).unwrap();
    let refused = runtime.clade(&["checkpoint", "web"]);
    assert!(
        refused.stderr.contains("settings of one that was killed") && refused.stderr.contains(&address),
        "{refused:?}"
    );
    drop(taken);
    // An orderly end.
    runtime.clade(&["checkpoint", "web", "--json"]).json();
    assert!(answers());
    assert_eq!(runtime.clade(&["serve", "--stop"]).code, Some(0));
    runtime.clade(&["checkpoint", "web", "--json"]).json();
    assert!(!answers());
    // Nor are the defaults of one that a command has started settings.
    assert!(!runtime.dir().join("clade.serve").exists());
    runtime.clade(&["stop", "--all"]);
}

#[test]
fn a_supervisor_that_a_command_starts_keeps_what_was_asked_for_and_nothing_of_the_shells() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    // A lock of a shell must not live as long as the supervisor.
    let script = "exec 9>\"$CLADE_RUNTIME_DIR/../$1\"; exec \"$0\" run -d --kernel bare --mem 32M --name web";
    let lock = tempfile::NamedTempFile::new_in(runtime.dir().parent().unwrap()).unwrap();
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script, crate::tool::CLADE]).arg(lock.path().file_name().unwrap()).stdin(Stdio::null());
    let booted = Answer::from(shell.env("CLADE_RUNTIME_DIR", runtime.dir()).output().unwrap());
    assert_eq!((booted.code, booted.stdout.trim()), (Some(0), "web"), "{booted:?}");
    for pid in runtime.clades() {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let has_lock = |file: fs::DirEntry| fs::read_link(file.path()).is_ok_and(|file| file == lock.path());
        assert!(!files.into_iter().any(has_lock), "{pid}");
    }
    runtime.clade(&["stop", "web", "--json"]).json();
    // It ends by itself two seconds after its last VM.
    let stopped = runtime.clade(&["serve", "--stop"]);
    assert!(stopped.code == Some(0) || stopped.stderr.contains("no supervisor is running"), "{stopped:?}");
    // Less confinement than was asked for is refused.
    runtime.spawn(&["serve", "--pool", "0", "--confine", "off"]);
    wait_until("the supervisor", || runtime.dir().join("clade.serve").exists());
    runtime.crash();
    let run = ["run", "--kernel", "bare", "--mem", "32M", "--confine", "require"];
    runtime.clade(&run).expect_refusal("--confine off");
    // The zygote of the killed one notices that a moment later.
    wait_until("the end of all", || runtime.clades().is_empty());
}

#[test]
fn a_supervisor_makes_way_for_another_when_it_has_nothing_left() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("web");
    runtime.clade(&["serve", "--pool", "0"]).expect_refusal("supervises");
    assert_eq!(runtime.clade(&["stop", "web"]).code, Some(0));
    assert_eq!(runtime.ended(), Some(0));
    runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the other", || runtime.clade(&["serve", "--status"]).stdout.contains(&runtime.pid().to_string()));
}

#[test]
fn a_session_under_another_supervisor_ends_its_vms_alone() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the supervisor", || runtime.clade(&["checkpoints"]).code == Some(0));
    detached(&runtime, "other");
    let mut command = runtime.command(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", "web"]);
    let mut session = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the VM", || runtime.names() == ["other", "web"]);
    runtime.clade(&["pause", "web", "--json"]).json();
    runtime.clade(&["fork", "web", "--paused", "--count", "2", "--json"]).json();
    kill(session.id(), Signal::TERM);
    assert_eq!(session.wait().unwrap().code(), Some(143));
    assert_eq!(runtime.names(), ["other"]);
    runtime.clade(&["stop", "other", "--json"]).json();
}

#[test]
fn what_a_guest_says_from_its_first_instruction_to_its_last_is_shown() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("guest");
    write_guest(&kernel);
    let mut command = runtime.command(&["run", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", "bell"]);
    let mut run = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut stdin, mut stdout) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("ready") {
        let mut bytes = [0; 64];
        let got = stdout.read(&mut bytes).unwrap();
        assert!(got > 0, "{said:?}");
        said.push_str(&String::from_utf8_lossy(&bytes[..got]));
    }
    // Typed input reaches it. At the end of the input its output goes on.
    stdin.write_all(b"x").unwrap();
    drop(stdin);
    stdout.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("ready") && said.trim_end().ends_with("bye"), "{said:?}");
    assert_eq!(run.wait().unwrap().code(), Some(0));
    wait_until("the end of all", || runtime.clades().is_empty());
    let left = runtime.files();
    assert!(left.iter().all(|name| name.ends_with(".ended")), "{left:?}");
    runtime.start("last");
}

#[test]
fn a_guest_that_ends_at_once_is_shown_with_its_output() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("hasty");
    write_hasty_guest(&kernel);
    // The VM may have ended before or after the connection to its console.
    for time in 0..5 {
        let name = format!("hasty-{time}");
        let ran = runtime.clade(&["run", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", &name]);
        assert_eq!((ran.code, ran.stdout.trim()), (Some(0), "bye"), "{ran:?}");
    }
    // The same through another process.
    runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the supervisor", || runtime.clade(&["checkpoints"]).code == Some(0));
    let args = ["run", "-d", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", "hasty"];
    let ran = runtime.clade(&args);
    assert_eq!((ran.code, ran.stdout.trim()), (Some(0), "hasty"), "{ran:?}");
    // The list leaves a VM out as soon as its process has ended; the record follows.
    let waited = runtime.clade(&["wait", "hasty"]);
    assert!(waited.code == Some(0) && waited.stdout.contains("powered itself off"), "{waited:?}");
    let ended = runtime.clade(&["ps", "-a", "--json"]).json();
    assert!(ended.to_string().contains("hasty-4") && ended.to_string().contains("\"hasty\""), "{ended}");
}

#[test]
fn the_supervisor_after_a_killed_one_takes_real_time_priority_from_vms() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    detached(&runtime, "web");
    let pid = runtime.worker("web");
    let threads = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse::<u32>().unwrap())
    };
    // As a supervisor raises them for an image. All threads but the first may end meanwhile.
    let raise = |tid| Scheduling::of(tid)?.raise(tid, 2);
    let is_raised = |tid| Scheduling::of(tid).is_ok_and(|now| now.is_raised(&[2]));
    match raise(pid) {
        Ok(()) => {
            threads().filter(|tid| *tid != pid).for_each(|tid| drop(raise(tid)));
            assert!(is_raised(pid) && threads().filter(|tid| is_raised(*tid)).count() > 1);
            let supervisor = runtime.supervisor();
            kill(supervisor, Signal::KILL);
            wait_until("its end", || !runs(supervisor));
            runtime.clade(&["checkpoint", "web", "--json"]).json();
            assert!(!threads().any(is_raised));
        }
        Err(error) => skipped(&format!("no real-time priority: {error}")),
    }
    runtime.clade(&["stop", "--all"]);
}
