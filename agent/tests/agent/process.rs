//! Processes: their streams, ends, signals, terminals, users and time.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clade_agent_client::proto::process::{ProcessConfig, Pty, Selector, Signal, Size, StartRequest};
use clade_agent_client::proto::{Code, RpcError};
use clade_agent_client::{Client, ClientError};
use clade_test_support::{lowest, write_program};

use crate::{Agent, PROGRAM, outcome, run, sh, shell, until};

fn refused<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> RpcError {
    match answer.unwrap_err() {
        ClientError::Rpc(error) => error,
        other => panic!("{other}"),
    }
}

async fn refused_start(client: &Client, request: &StartRequest) -> RpcError {
    refused(client.start(request, None).await)
}

#[test]
fn a_command_has_its_output_and_its_end() {
    let agent = Agent::start();
    run(async {
        let done = sh(&agent.client(), "echo out; echo err >&2; exit 3").await;
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!((done.end.exit_code, done.end.exited, done.end.status.as_str()), (3, true, "exit status 3"));
        assert_eq!(done.end.error.as_deref(), Some("exit status 3"));
        let killed = sh(&agent.client(), "kill -SEGV $$").await.end;
        assert_eq!((killed.exit_code, killed.exited), (-1, false));
        assert!(killed.status.starts_with("signal: segmentation fault"), "{}", killed.status);
    });
}

#[test]
fn a_command_has_its_directory_and_its_environment() {
    let agent = Agent::start();
    let mut request = shell("pwd; echo $A $HOME $USER; echo ${SECRET:-none}; ulimit -n; umask");
    request.process.cwd = Some("/usr/..//tmp".into());
    request.process.envs.insert("A".into(), "b c".into());
    run(async {
        let done = outcome(agent.client().start(&request, None).await.unwrap()).await.unwrap();
        let lines: Vec<&str> = done.stdout.lines().collect();
        assert_eq!(lines[0], "/tmp");
        assert_eq!(lines[1], "b c /root root");
        assert_eq!(lines[2], "none");
        let limit = open_files(&std::fs::read_to_string("/proc/self/limits").unwrap());
        assert_eq!(lines[3], limit.to_string(), "children have the limit of before");
        request.process.cwd = Some("/nowhere".into());
        assert_eq!(refused_start(&agent.client(), &request).await.code, Code::InvalidArgument);
    });
}

/// The soft limit of open files in a process's `limits`. The agent starts with that of this process.
fn open_files(limits: &str) -> u64 {
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}

#[test]
fn what_cannot_be_started_is_said() {
    let agent = Agent::start();
    run(async {
        let of = |cmd: &str| {
            let process = ProcessConfig { cmd: cmd.into(), ..ProcessConfig::default() };
            StartRequest { process, ..StartRequest::default() }
        };
        let client = agent.client();
        assert_eq!(refused_start(&client, &of("/no/such/program")).await.code, Code::NotFound);
        assert_eq!(refused_start(&client, &of("no-such-program")).await.code, Code::NotFound);
        assert_eq!(refused_start(&client, &of("/etc/passwd")).await.code, Code::PermissionDenied);
        assert_eq!(refused_start(&client, &of("")).await.code, Code::InvalidArgument);
        let mut odd = shell("true");
        odd.process.envs.insert("a=b".into(), "c".into());
        assert_eq!(refused_start(&client, &odd).await.code, Code::InvalidArgument);
        let nobody = client.clone().with_user(Some("no-such-user".into()));
        assert_eq!(refused_start(&nobody, &shell("true")).await.code, Code::Unauthenticated);
        assert!(client.list().await.unwrap().processes.is_empty());
    });
}

#[test]
fn a_program_is_found_and_executed_as_execvp_does() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let directory = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let file = |path: &Path, mode: u32| {
        // No interpreter is named: the shell runs it.
        write_program(path, "echo \"$0 $1\"\n", mode);
    };
    let (empty, closed, open) = (directory("empty"), directory("closed"), directory("open"));
    let inside = directory("inside");
    file(&closed.join("script"), 0o644);
    file(&closed.join("other"), 0o644);
    file(&inside.join("hidden"), 0o755);
    std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    file(&open.join("script"), 0o755);
    let is_root = sh_user(&agent) == "root";
    let search = format!("{}:{}:{}:{}", empty.display(), closed.display(), open.display(), inside.display());
    let request = |cmd: &str| {
        let envs = std::collections::BTreeMap::from([("PATH".to_owned(), search.clone())]);
        let process = ProcessConfig { cmd: cmd.into(), args: vec!["one".into()], envs, ..Default::default() };
        StartRequest { process, ..StartRequest::default() }
    };
    run(async {
        let client = agent.client();
        let expected = format!("{} one\n", open.join("script").display());
        for cmd in ["script", open.join("script").to_str().unwrap()] {
            let done = outcome(client.start(&request(cmd), None).await.unwrap()).await.unwrap();
            assert_eq!((done.stdout.as_str(), done.end.exit_code), (expected.as_str(), 0), "{cmd}");
        }
        assert_eq!(refused_start(&client, &request("other")).await.code, Code::PermissionDenied);
        assert_eq!(refused_start(&client, &request("none")).await.code, Code::NotFound);
        // A path through a file is a wrong path, not a missing one.
        assert_eq!(refused_start(&client, &request("/etc/passwd/x")).await.code, Code::InvalidArgument);
        if is_root {
            // The last directory cannot be searched by this user.
            let nobody = client.clone().with_user(Some("nobody".into()));
            assert_eq!(refused_start(&nobody, &request("none")).await.code, Code::PermissionDenied);
        }
        assert_eq!(refused_start(&client, &request("scr\0ipt")).await.code, Code::InvalidArgument);
    });
}

#[test]
fn the_rest_of_a_group_is_killed_at_the_end_of_its_first_program_if_asked_for() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        // The loop holds the output open. Without the request it is waited for.
        let script = "sleep 100000 & echo $!";
        let request = StartRequest { kill_rest: true, ..shell(script) };
        let done = outcome(client.start(&request, None).await.unwrap()).await.unwrap();
        assert_eq!(done.end.exit_code, 0, "{done:?}");
        let rest = Path::new("/proc").join(done.stdout.trim());
        while std::fs::read_link(rest.join("exe")).is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn the_agent_keeps_its_own_settings_while_its_children_get_theirs() {
    let mut command = Command::new("prlimit");
    command.args(["--nofile=1000:", PROGRAM]);
    let agent = Agent::start_by(command, &[], Stdio::inherit());
    let own = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", agent.child.id())).unwrap();
    let signals = || {
        let status = own("status");
        // Not the queue (SigQ), which is all processes' of the user, nor a child's end that is pending.
        let kept = |line: &&str| ["SigBlk:", "SigIgn:", "SigCgt:"].iter().any(|name| line.starts_with(name));
        status.lines().filter(kept).map(str::to_owned).collect::<Vec<_>>()
    };
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", agent.child.id())).unwrap().count();
    let settings =
        || (signals(), own("oom_score_adj"), own("limits"), own("stat").split(' ').nth(4).unwrap().to_owned());
    run(async {
        let client = agent.client();
        // An answer: the agent listens, with its handlers installed.
        client.list().await.unwrap();
        let before = settings();
        assert!(open_files(&before.2) > 1000, "the agent raises its own limit: {}", before.2);
        assert_eq!(sh(&client, "ulimit -Sn").await.stdout, "1000\n", "a child has the limit of the agent's starter");
        // The first process opens what the agent keeps.
        sh(&client, "true").await;
        let open = lowest(descriptors);
        let shown = "pwd; cat /proc/self/oom_score_adj";
        for (script, output) in [(shown, "/usr\n100\n"), ("exit 3", ""), ("kill -9 $$", "")] {
            let mut request = shell(script);
            request.process.cwd = Some("/usr".into());
            assert_eq!(outcome(client.start(&request, None).await.unwrap()).await.unwrap().stdout, output);
            request.process.cmd = "/no/such/program".into();
            assert_eq!(refused_start(&client, &request).await.code, Code::NotFound);
        }
        let terminal = StartRequest { pty: Some(Pty { size: Size { cols: 80, rows: 24 } }), ..shell("true") };
        outcome(client.start(&terminal, None).await.unwrap()).await.unwrap();
        assert_eq!(settings(), before);
        until("the children's files to be closed", async || descriptors() <= open).await;
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", agent.child.id())).unwrap();
        assert_eq!(cwd, std::env::current_dir().unwrap());
        // No child stays behind, not even one that has not become a program.
        until("the children's ends", async || own(&format!("task/{}/children", agent.child.id())).is_empty()).await;
    });
}

#[test]
fn input_comes_in_order_and_ends() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let process = client.start(&StartRequest { stdin: Some(true), ..shell("cat; echo end") }, None).await.unwrap();
        let pid = process.pid;
        let (mut input, call) = client.input(pid, false);
        let call = tokio::spawn(call);
        for number in 0..500 {
            assert!(input.send(format!("line {number}\n").as_bytes()).await);
        }
        drop(input);
        call.await.unwrap().unwrap();
        client.close_stdin(pid).await.unwrap();
        // Closing it twice is allowed.
        let done = outcome(process).await.unwrap();
        let wanted: String = (0..500).map(|number| format!("line {number}\n")).collect();
        assert_eq!(done.stdout, format!("{wanted}end\n"));
        assert_eq!(refused(client.close_stdin(pid).await).code, Code::NotFound);
    });
}

#[test]
fn a_process_that_does_not_read_holds_only_its_writer_up() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let process = client.start(&StartRequest { stdin: Some(true), ..shell("sleep 100000") }, None).await.unwrap();
        let (mut input, call) = client.input(process.pid, false);
        let call = tokio::spawn(call);
        let piece = vec![b'x'; 1 << 20];
        let flood = tokio::time::timeout(Duration::from_secs(2), async { while input.send(&piece).await {} });
        assert!(flood.await.is_err(), "the input must wait");
        assert!(agent.memory() < 64 << 10, "{} KiB", agent.memory());
        assert_eq!(sh(&client, "echo hi").await.stdout, "hi\n");
        client.signal(process.pid, Signal::KILL).await.unwrap();
        assert_eq!(outcome(process).await.unwrap().end.status, "signal: killed");
        call.abort();
    });
}

#[test]
fn signals_go_to_the_whole_group() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        // The shell waits for a child, which holds its output open.
        let mut process = client.start(&shell("sleep 1000 & echo $!; wait"), None).await.unwrap();
        // Wait for the child: a shell that blocks signals during its fork could have a child that
        // missed one.
        let first = process.next().await.unwrap().unwrap().data.unwrap().stdout.unwrap().0;
        let child = String::from_utf8(first).unwrap().trim().to_owned();
        client.signal(process.pid, Signal::TERM).await.unwrap();
        let done = outcome(process).await.unwrap();
        assert_eq!(done.end.status, "signal: terminated");
        until("the child's end", async || !std::path::Path::new(&format!("/proc/{child}/exe")).exists()).await;
        let hup = client.start(&shell("sleep 1000"), None).await.unwrap();
        client.signal(hup.pid, Signal(1)).await.unwrap();
        assert_eq!(outcome(hup).await.unwrap().end.status, "signal: hangup");
        let odd = client.start(&shell("sleep 1000"), None).await.unwrap();
        assert_eq!(refused(client.signal(odd.pid, Signal(0)).await).code, Code::Unimplemented);
        assert_eq!(refused(client.signal(odd.pid, Signal(1000)).await).code, Code::Unimplemented);
        client.signal(odd.pid, Signal::KILL).await.unwrap();
    });
}

#[test]
fn a_process_starts_with_default_signals_under_an_agent_that_ignores_and_blocks_some() {
    let mut command = Command::new("env");
    command.args(["--ignore-signal=HUP,INT,USR2,RTMIN", "--block-signal=TERM,USR1", PROGRAM]);
    let agent = Agent::start_by(command, &[], Stdio::inherit());
    let status = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        u64::from_str_radix(line.unwrap(), 16).unwrap()
    };
    let own = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let hangup = 1 << (rustix::process::Signal::HUP.as_raw() - 1);
    assert_ne!(status(&own, "SigIgn:") & hangup, 0, "the agent ignores SIGHUP: {own}");
    assert_ne!(status(&own, "SigBlk:"), 0, "the agent blocks signals: {own}");
    run(async {
        let process = ProcessConfig { cmd: "cat".into(), args: vec!["/proc/self/status".into()], ..Default::default() };
        let request = StartRequest { process, stdin: Some(false), ..StartRequest::default() };
        let child = outcome(agent.client().start(&request, None).await.unwrap()).await.unwrap().stdout;
        assert_eq!((status(&child, "SigIgn:"), status(&child, "SigBlk:")), (0, 0), "{child}");
    });
}

#[test]
fn what_was_left_behind_is_killed_after_its_leader() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let mut process = client.start(&shell("sleep 1000 & echo $!"), None).await.unwrap();
        let first = process.next().await.unwrap().unwrap().data.unwrap().stdout.unwrap().0;
        let child = String::from_utf8(first).unwrap().trim().to_owned();
        // The shell has ended, and the child holds its output: the stream continues.
        until("the shell's end", async || !std::path::Path::new(&format!("/proc/{}", process.pid)).exists()).await;
        assert_eq!(client.list().await.unwrap().processes.len(), 1);
        client.signal(process.pid, Signal::KILL).await.unwrap();
        assert_eq!(outcome(process).await.unwrap().end.exit_code, 0);
        until("the child's end", async || !std::path::Path::new(&format!("/proc/{child}/exe")).exists()).await;
    });
}

#[test]
fn a_terminal_is_one_and_has_its_size() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let script = "test -t 0 && test -t 1 && test -t 2 && tty; stty size; read line; echo \"got $line\"; \
                      trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.05; done";
        let pty = Some(Pty { size: Size { cols: 100, rows: 40 } });
        let mut process = client.start(&StartRequest { pty, ..shell(script) }, None).await.unwrap();
        let pid = process.pid;
        let (mut input, call) = client.input(pid, true);
        let call = tokio::spawn(call);
        assert!(input.send(b"hello\r").await);
        let mut text = String::new();
        while !text.contains("ready") {
            let event = process.next().await.unwrap().unwrap();
            text.push_str(&String::from_utf8_lossy(&event.data.unwrap().pty.unwrap().0));
        }
        assert!(text.contains("/dev/pts/") && text.contains("40 100") && text.contains("got hello"), "{text}");
        assert_eq!(refused(client.close_stdin(pid).await).code, Code::FailedPrecondition);
        client.resize(pid, Size { cols: 20, rows: 10 }).await.unwrap();
        let done = outcome(process).await.unwrap();
        assert!(done.pty.contains("10 20"), "{}", done.pty);
        assert_eq!(done.end.exit_code, 7);
        drop(input);
        // The process has gone before its input has ended.
        let _ = call.await;
        let plain = client.start(&shell("sleep 1000"), None).await.unwrap();
        assert_eq!(refused(client.resize(plain.pid, Size::default()).await).code, Code::FailedPrecondition);
        client.signal(plain.pid, Signal::KILL).await.unwrap();
    });
}

#[test]
fn time_ends_a_process_and_its_children() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let mut time = Duration::from_millis(300);
        // On a busy machine, the program's time may be over before it has printed.
        let (begun, mut process, first) = loop {
            let begun = Instant::now();
            let started = client.start(&shell("sleep 100000 & echo $!; wait"), Some(time)).await;
            if let Ok(mut process) = started
                && let Ok(Some(event)) = process.next().await
                && let Some(first) = event.data.and_then(|data| data.stdout)
            {
                break (begun, process, first.0);
            }
            time *= 2;
        };
        let child = String::from_utf8(first).unwrap().trim().to_owned();
        let error = loop {
            match process.next().await {
                Ok(Some(event)) => assert!(event.end.is_none() || event.end.unwrap().status == "signal: killed"),
                Ok(None) => panic!("the time-out is not said"),
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, ClientError::Rpc(error) if error.code == Code::DeadlineExceeded), "{error}");
        assert!(begun.elapsed() >= time);
        until("the child's end", async || !std::path::Path::new(&format!("/proc/{child}/exe")).exists()).await;
        until("the list", async || client.list().await.unwrap().processes.is_empty()).await;
    });
}

#[test]
fn users_are_who_they_say() {
    let agent = Agent::start();
    if sh_user(&agent) != "root" {
        clade_test_support::skipped("users are changed by root only");
        return;
    }
    run(async {
        let client = agent.client().with_user(Some("nobody".into()));
        let done = sh(&client, "id -un; id -G; cat /proc/self/oom_score_adj; echo $HOME").await;
        let lines: Vec<&str> = done.stdout.lines().collect();
        assert_eq!((lines[0], lines[1], lines[2]), ("nobody", "65534", "100"), "{done:?}");
        let number = agent.client().with_user(Some("4321".into()));
        assert_eq!(sh(&number, "id -u; id -G; pwd").await.stdout, "4321\n0\n/\n");
        // Its streams are the user's, also by their names.
        let done = sh(&number, "echo out > /dev/stdout; echo err > /dev/stderr; cat < /dev/null").await;
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!(std::fs::metadata("/dev/null").unwrap().uid(), 0);
        // The user must be allowed to enter the directory.
        let mut secret = shell("pwd");
        secret.process.cwd = Some("/root".into());
        if std::fs::metadata("/root").unwrap().permissions().mode() & 0o007 == 0 {
            assert_eq!(refused_start(&client, &secret).await.code, Code::PermissionDenied);
        }
    });
}

fn sh_user(agent: &Agent) -> String {
    run(async { sh(&agent.client(), "id -un").await.stdout.trim().to_owned() })
}

#[test]
fn a_process_outlives_its_client_and_is_found_again() {
    let agent = Agent::start();
    let flag = agent.path("go");
    run(async {
        let client = agent.client();
        let script = format!("while ! test -e {flag}; do sleep 0.02; done; echo late; exit 5");
        let request = StartRequest { tag: Some("job".into()), ..shell(&script) };
        let process = client.start(&request, None).await.unwrap();
        let pid = process.pid;
        drop(process);
        let list = client.list().await.unwrap().processes;
        assert_eq!((list[0].pid, list[0].tag.as_deref()), (pid, Some("job")));
        assert_eq!(list[0].config.cmd, "/bin/sh");
        let by_tag = Selector { tag: Some("job".into()), pid: None };
        let again = client.follow(by_tag.clone()).await.unwrap();
        let third = client.follow(Selector::pid(pid)).await.unwrap();
        std::fs::write(&flag, "").unwrap();
        for follower in [again, third] {
            let done = outcome(follower).await.unwrap();
            assert_eq!((done.stdout.as_str(), done.end.exit_code), ("late\n", 5));
        }
        // Its end is remembered for a while.
        let after = outcome(client.follow(by_tag).await.unwrap()).await.unwrap();
        assert_eq!(after.end.exit_code, 5);
        assert_eq!(refused(client.follow(Selector::pid(u32::MAX)).await).code, Code::NotFound);
        assert_eq!(refused(client.follow(Selector::default()).await).code, Code::InvalidArgument);
        assert!(client.list().await.unwrap().processes.is_empty());
    });
}

#[test]
fn orphans_that_are_the_agents_are_reaped() {
    let agent = Agent::start();
    run(async {
        // An orphan in the background becomes a child of init, so only the agent's own children are
        // counted here.
        for _ in 0..20 {
            sh(&agent.client(), "true").await;
        }
        let children = format!("/proc/{0}/task/{0}/children", agent.child.id());
        until("no children", async || std::fs::read_to_string(&children).unwrap().is_empty()).await;
    });
}
