//! The agent in a guest: programs, files, forks, and errors without an agent.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

mod asleep;

use clade_agent_client::proto::PORT;
use clade_agent_client::{Client as Agent, Endpoint};
use clade_test_support::{Cid, TapName, wait_for_within};

use crate::cached;
use crate::tool::{Answer, Runtime, kvm, taps};

/// Running time for a boot on the reference host. Guest kernels may be interpreted.
pub(crate) const BOOT: Duration = Duration::from_secs(900);
/// Time that `clade exec` waits for an agent whose guest is busy.
pub(crate) const WAIT: &str = "1h";

fn exec(runtime: &Runtime, args: &[&str]) -> Answer {
    runtime.clade(&[&["exec", "--wait", WAIT], args].concat())
}

/// Runs `clade exec -i` with a program that gets these bytes, or as many as the program reads.
fn feed(runtime: &Runtime, program: &[&str], bytes: Vec<u8>) -> Answer {
    let mut command = runtime.command(&[&["exec", "--wait", WAIT, "-i", "web", "--"], program].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let answer = child.wait_with_output().unwrap().into();
    // The program may end before it has read everything: its end and its output are checked.
    let _ = writer.join().unwrap();
    answer
}

fn programs(runtime: &Runtime) {
    let done = exec(runtime, &["web", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (Some(7), "out\n", "err\n"));
    let printed = exec(
        runtime,
        &["-u", "user", "-w", "/tmp", "-e", "A=b c", "--json", "web", "sh", "-c", "id -un; pwd; echo $A"],
    );
    assert_eq!(printed.json()["stdout"], "user\n/tmp\nb c\n");
    assert_eq!(exec(runtime, &["web", "--", "sh", "-c", "kill -9 $$"]).code, Some(137));
    assert_eq!(exec(runtime, &["web", "--", "no-such-program"]).code, Some(127));
    assert_eq!(exec(runtime, &["web", "--", "/etc/passwd"]).code, Some(126));
    assert_eq!(exec(runtime, &["--timeout", "1s", "web", "--", "sleep", "1000"]).code, Some(124));
    assert_eq!(exec(runtime, &["nobody", "--", "true"]).code, Some(125));
    assert!(exec(runtime, &["-t", "web", "tty"]).stdout.starts_with("/dev/pts/"));
    let bytes = vec![b'x'; 3_000_000];
    let done = feed(runtime, &["sha256sum"], bytes.clone());
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{done:?}");
    // A program that ends while its input still arrives: its output and its end are reported.
    let early = feed(runtime, &["sh", "-c", "head -c 4; echo; seq 20000; exit 3"], bytes.clone());
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert_eq!((early.code, early.stderr.as_str()), (Some(3), ""), "{early:?}");
    assert!(early.stdout == format!("xxxx\n{numbers}"), "{} bytes came", early.stdout.len());
    let own = runtime.dir().join("bytes");
    fs::write(&own, &bytes).unwrap();
    let own = String::from_utf8(Command::new("sha256sum").arg(own).output().unwrap().stdout).unwrap();
    assert_eq!(done.stdout.split(' ').next(), own.split(' ').next());
    let memory = exec(runtime, &["web", "--", "cat", "/proc/meminfo"]).stdout;
    assert!(memory.starts_with("MemTotal:"), "{memory}");
    assert_eq!(exec(runtime, &["web", "--", "cat", "/proc/1/comm"]).stdout, "init\n");
}

fn files(runtime: &Runtime) {
    let tree = runtime.dir().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("program"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(tree.join("sub/ü b"), vec![7; 1_000_000]).unwrap();
    let tree = tree.to_str().unwrap();
    exec(runtime, &["web", "--", "true"]);
    let copied = runtime.clade(&["cp", "--json", tree, "web:/tmp"]).json();
    assert_eq!((copied["files"].as_u64(), copied["directories"].as_u64()), (Some(2), Some(3)));
    assert_eq!(exec(runtime, &["web", "/tmp/tree/program"]).stdout, "ran\n");
    let script = "ln -s / /tmp/tree/circle; ln -s /etc/passwd /tmp/tree/users; printf word >/tmp/word";
    exec(runtime, &["web", "--", "sh", "-c", script]);
    let back = runtime.dir().join("back");
    let answer = runtime.clade(&["cp", "web:/tmp/tree", back.to_str().unwrap()]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.stderr.contains("/tmp/tree/circle"), "{answer:?}");
    assert_eq!(fs::read(back.join("sub/ü b")).unwrap(), vec![7; 1_000_000]);
    assert!(back.join("sub/empty").is_dir() && back.join("users").is_file() && !back.join("circle").exists());
    assert_eq!(fs::metadata(back.join("program")).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(runtime.clade(&["cp", "web:/tmp/tree/program", "-"]).stdout, "#!/bin/sh\necho ran\n");
    let full = runtime.clade_with_full_disk(&["cp", "web:/tmp/word", "-"]);
    assert!(full.code == Some(1) && full.stderr.contains("standard output: "), "{full:?}");
    runtime.clade(&["cp", "web:/nowhere", "-"]).expect_refusal("/nowhere");
    runtime.clade(&["cp", "/nowhere", "web:/tmp"]).expect_refusal("/nowhere");
    runtime.clade(&["cp", "web:/a", "web:/b"]).expect_refusal("this host");
}

fn forks(runtime: &Runtime) {
    let hook = "#!/bin/sh\necho $CLADE_VM $CLADE_GENERATION > /tmp/hook\n";
    let path = runtime.dir().join("10-name");
    fs::write(&path, hook).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let copied = runtime.clade(&["cp", path.to_str().unwrap(), "web:/etc/clade/fork.d/"]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    // A process that goes on in each, undisturbed; and the clock is wrong.
    let script = "(trap 'echo hit >> /tmp/hit' HUP INT TERM; sleep 100000 & while :; do wait; done) >/dev/null 2>&1 </dev/null & echo $!";
    let pid = exec(runtime, &["web", "--", "sh", "-c", script]).stdout.trim().to_owned();
    exec(runtime, &["web", "--", "date", "-s", "2001-01-01 00:00:00"]);
    let forked = runtime.clade(&["fork", "web", "--count", "2", "--ready", "--json"]).json();
    assert_eq!(forked["children"].as_array().unwrap().len(), 2);
    // Each ran from its permit on.
    for name in ["web-1", "web-2"] {
        let noted = runtime.clade(&["logs", name, "--flight"]).stdout;
        let noted: Vec<&str> = noted.lines().map(|line| &line[13..]).collect();
        assert_eq!(noted[..2], ["started as a child of web, generation 2, paused", "resumed"], "{noted:?}");
    }
    let mut drawn = Vec::new();
    for name in ["web", "web-1", "web-2"] {
        // One program for everything: each takes seconds where the guest's kernel is interpreted.
        let script = format!(
            "read r < /proc/sys/kernel/random/uuid; echo $r; date +%Y; kill -0 {pid} && ! test -e /tmp/hit && echo alive; \
             echo {name} >> /tmp/who; while read l; do echo who $l; done < /tmp/who; \
             test -e /tmp/hook && while read l; do echo hook $l; done < /tmp/hook; true"
        );
        let said = exec(runtime, &[name, "--", "sh", "-c", &script]);
        let lines: Vec<&str> = said.stdout.lines().collect();
        let [draw, year, "alive", who, hooks @ ..] = &lines[..] else { panic!("{said:?}") };
        drawn.push((*draw).to_owned());
        assert_eq!(*who, format!("who {name}"), "alone in its memory");
        if name == "web" {
            assert_eq!((hooks, *year), (&[][..], "2001"));
        } else {
            // The notification is repeated if the fork reset its connection.
            let named = format!("hook {name} ");
            assert!(!hooks.is_empty() && hooks.iter().all(|hook| hook.starts_with(&named)), "{said:?}");
            assert_ne!(*year, "2001", "the child's clock is the host's");
        }
    }
    assert!(drawn[0] != drawn[1] && drawn[1] != drawn[2] && drawn[0] != drawn[2]);
    // A reset VM is notified as well.
    exec(runtime, &["web-2", "--", "rm", "/tmp/hook"]);
    runtime.clade(&["reset", "web-2", "--json"]).json();
    let ready = runtime.clade(&["reidentify", "web-2", "--json"]).json();
    assert_eq!((ready["name"].as_str(), ready["hooks"][0].as_str()), (Some("web-2"), Some("10-name")), "{ready}");
    assert!(exec(runtime, &["web-2", "--", "cat", "/tmp/hook"]).stdout.starts_with("web-2 "));
    // It may be reset again and again: what KVM has derived from its page tables is reset with them.
    for _ in 0..4 {
        runtime.clade(&["reset", "web-2", "--json"]).json();
        assert_eq!(exec(runtime, &["web-2", "--", "sh", "-c", "! test -e /tmp/left && > /tmp/left"]).code, Some(0));
    }
    runtime.clade(&["reidentify", "web-2", "--json"]).json();
    // By the reset itself.
    exec(runtime, &["web-2", "--", "rm", "-f", "/tmp/hook"]);
    let reset = runtime.clade(&["reset", "web-2", "--ready", "--json"]).json();
    assert!(reset["total_us"].as_f64() > Some(0.0), "{reset}");
    assert!(exec(runtime, &["web-2", "--", "cat", "/tmp/hook"]).stdout.starts_with("web-2 "));
    // A VM that is rolled back is notified as well.
    exec(runtime, &["web-2", "--", "rm", "/tmp/hook"]);
    runtime.clade(&["checkpoint", "web-2", "before-hook", "--json"]).json();
    runtime.clade(&["rollback", "web-2", "before-hook", "--ready", "--json"]).json();
    assert!(exec(runtime, &["web-2", "--", "cat", "/tmp/hook"]).stdout.starts_with("web-2 "));
    // If one is not ready, no child stays.
    let bad = "echo exit 3 > /etc/clade/fork.d/20-bad; sed -i '1i#!/bin/sh' /etc/clade/fork.d/20-bad; chmod +x /etc/clade/fork.d/20-bad";
    exec(runtime, &["web", "--", "sh", "-c", bad]);
    let refused = runtime.clade(&["fork", "web", "--ready"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("20-bad"), "{refused:?}");
    assert_eq!(runtime.names(), ["web", "web-1", "web-2"]);
    // A VM that is rolled back stays so.
    runtime.clade(&["checkpoint", "web", "before-file", "--json"]).json();
    exec(runtime, &["web", "--", "touch", "/tmp/file"]);
    let refused = runtime.clade(&["rollback", "web", "before-file", "--ready"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("20-bad"), "{refused:?}");
    assert_eq!(exec(runtime, &["web", "--", "test", "!", "-e", "/tmp/file"]).code, Some(0));
    // A VM that is reset does so too.
    runtime.clade(&["fork", "web", "--name", "bad", "--json"]).json();
    exec(runtime, &["bad", "--", "touch", "/tmp/file"]);
    let refused = runtime.clade(&["reset", "bad", "--ready"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("20-bad"), "{refused:?}");
    assert_eq!(exec(runtime, &["bad", "--", "test", "!", "-e", "/tmp/file"]).code, Some(0));
    runtime.clade(&["stop", "bad", "--json"]).json();
    // The agent is PID 1: it ends the guest in order.
    exec(runtime, &["web-1", "--", "kill", "-TERM", "1"]);
    assert_eq!(runtime.clade(&["wait", "web-1"]).code, Some(0));
}

/// A program and an upload of the parent's go on through a fork. The child has their state at that
/// instant, and reports it. (This kernel has no inotify to watch with.)
fn forks_in_the_middle(runtime: &Runtime) {
    let socket = runtime.dir().join("web.vsock");
    let slow = BOOT;
    let guest = Agent::new(Endpoint::Vsock { socket, port: PORT }).with_patience(slow, slow);
    let script = "mkfifo /tmp/go; echo $$; read go < /tmp/go; echo gone; exit 3";
    let mut program = runtime.command(&["exec", "web", "--", "sh", "-c", script]);
    let mut program = program.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(program.stdout.take().unwrap());
    let mut pid = String::new();
    output.read_line(&mut pid).unwrap();
    let is_running = |name: &str| exec(runtime, &[name, "--", "kill", "-0", pid.trim()]).code == Some(0);
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let (mut upload, call) = guest.upload("/tmp/up", None);
        let uploaded = tokio::spawn(call);
        assert!(upload.send(vec![b'a'; 600 << 10].into()).await);
        let mut patience = clade_test_support::Patience::new(BOOT);
        while !guest.stat("/tmp/up").await.is_ok_and(|file| file.size >= 256 << 10) {
            assert!(patience.tick(), "nothing of the file is there");
        }
        let fork = runtime.command(&["fork", "web", "--ready", "--name", "middle", "--network", "off"]).output();
        let fork = Answer::from(fork.unwrap());
        assert_eq!(fork.code, Some(0), "{fork:?}");
        // Requests begun by the parent's clients go on.
        assert!(upload.send(vec![b'b'; 400 << 10].into()).await);
        drop(upload);
        assert_eq!(uploaded.await.unwrap().unwrap().path, "/tmp/up");
        assert_eq!(guest.stat("/tmp/up").await.unwrap().size, 1000 << 10);
    });
    assert!(is_running("web") && is_running("middle"), "no program is disturbed");
    exec(runtime, &["web", "--", "sh", "-c", "echo go > /tmp/go"]);
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), program.wait().unwrap().code()), ("gone\n", Some(3)));
    assert!(is_running("middle"), "the child's waits for a line of its own");
    let size = exec(runtime, &["middle", "--", "stat", "-c", "%s", "/tmp/up"]).stdout;
    assert!(size.trim().parse::<u64>().unwrap() <= 600 << 10, "the parent's bytes: {size}");
    let logs = runtime.clade(&["logs", "middle"]).stdout;
    assert!(logs.contains("the VM is \"middle\" now") && logs.contains("/tmp/up is written in part"), "{logs}");
    closed(runtime, "middle");
    runtime.clade(&["stop", "middle"]);
}

/// The guest of a closed child sees its link down, even when it brings its interface up again. Its
/// agent answers all the same.
fn closed(runtime: &Runtime, child: &str) {
    if !taps() {
        return;
    }
    let carrier = "ip link set eth0 down; ip link set eth0 up; cat /sys/class/net/eth0/carrier";
    let up = |name: &str| exec(runtime, &[name, "--", "sh", "-c", carrier]).stdout;
    assert_eq!(up("web"), "1\n");
    assert_eq!(up(child), "0\n");
    assert_eq!(runtime.clade(&["network", child, "open"]).code, Some(0));
    wait_for_within(BOOT, "the link comes up", || (up(child) == "1\n").then_some(()));
}

#[test]
fn an_agent_serves_its_guest_and_its_forks() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let (cid, tap) = (Cid::take(), TapName::take());
    if !cached::agent(&mut runtime, &cid, &tap) {
        return;
    }
    programs(&runtime);
    files(&runtime);
    forks_in_the_middle(&runtime);
    forks(&runtime);
    runtime.clade(&["pause", "web"]);
    let paused = exec(&runtime, &["web", "--", "true"]);
    assert!(paused.code == Some(125) && paused.stderr.contains("does not run"), "{paused:?}");
    runtime.clade(&["stop", "--all"]);
}

#[test]
fn a_vm_without_an_agent_is_an_error_that_says_why() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    runtime.start("plain");
    let cid = Cid::take();
    let vsock = format!("cid={},socket={}", cid.number(), runtime.dir().join("deaf.vsock").display());
    runtime.start_with("deaf", &["--vsock", &vsock]);
    for name in ["plain", "deaf"] {
        runtime.clade(&["resume", name, "--json"]).json();
    }
    // Without the device there is nothing to wait for: the wait of an hour must not happen.
    let plain = exec(&runtime, &["plain", "--", "true"]);
    assert!(plain.code == Some(125) && plain.stderr.contains("no vsock device"), "{plain:?}");
    let deaf = runtime.clade(&["exec", "--wait", "300ms", "deaf", "--", "true"]);
    assert!(deaf.code == Some(125) && deaf.stderr.contains("no agent answers in the guest within"), "{deaf:?}");
    runtime.clade(&["cp", "--wait", "300ms", "/etc/passwd", "deaf:/tmp"]).expect_refusal("no agent answers");
    runtime.clade(&["fork", "plain", "--ready"]).expect_refusal("no vsock device");
    // Children that are made paused until they are made ready count as running. Larger hosts have other limits.
    let beyond = 500 * std::thread::available_parallelism().unwrap().get();
    if beyond <= 2000 {
        let refused = runtime.clade(&["fork", "deaf", "--ready", "--count", &beyond.to_string()]);
        assert!(refused.code != Some(0) && refused.stderr.contains("running VMs"), "{refused:?}");
    }
    runtime.clade(&["ready", "plain"]).expect_refusal("no vsock device");
    // No agent of a paused VM answers: neither is waited for.
    runtime.clade(&["pause", "deaf"]);
    runtime.clade(&["reidentify", "deaf"]).expect_refusal("deaf is paused");
    let (status, problem) = runtime.http("POST", "/v1/vms/deaf/ready", "");
    assert_eq!((status, problem["type"].as_str()), (409, Some("urn:clade:wrong-state")), "{problem}");
    let (status, problem) = runtime.http("POST", "/v1/vms/deaf/fork", r#"{"ready": true, "paused": true}"#);
    assert_eq!((status, problem["type"].as_str()), (400, Some("urn:clade:bad-request")), "{problem}");
    assert_eq!(runtime.names(), ["deaf", "plain"]);
}

/// Sends a guest's answer to every connection after its request.
fn say_to_all(listener: UnixListener, answer: &'static [u8]) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut asked = [0; 1 << 12];
            let _ = stream.read(&mut asked).and_then(|_| stream.write_all(b"OK 1024\n"));
            // Its request, or the first part.
            let _ = stream.read(&mut asked).and_then(|_| stream.write_all(answer));
        }
    });
}

#[test]
fn a_guest_that_talks_nonsense_is_said_to() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let socket = runtime.dir().join("odd.vsock");
    let cid = Cid::take();
    runtime.start_with("odd", &["--vsock", &format!("cid={},socket={}", cid.number(), socket.display())]);
    runtime.clade(&["resume", "odd", "--json"]).json();
    for (answer, why) in [
        (&b"\0\x01nonsense\r\n\r\n"[..], "connection has failed"),
        (b"", "the agent or its VM has ended"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnonsense!", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\n\r\n\0\0\0\0\x02{}", "the first event is no start"),
        (b"HTTP/1.1 200 OK\r\n\r\n\0\xff\xff\xff\xff", "cannot be read"),
    ] {
        fs::remove_file(&socket).unwrap();
        say_to_all(UnixListener::bind(&socket).unwrap(), answer);
        let said = runtime.clade(&["exec", "odd", "--", "true"]);
        assert!(said.code == Some(125) && said.stderr.contains(why), "{answer:?}: {said:?}");
        assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    }
    fs::remove_file(&socket).unwrap();
    say_to_all(UnixListener::bind(&socket).unwrap(), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnonsense!");
    runtime.clade(&["reidentify", "odd"]).expect_refusal("cannot be read");
}
