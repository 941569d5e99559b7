//! Commands with several names, and waiting for ends.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use rustix::process::Signal;

use crate::supervisor::Supervised;
use crate::tool::{Answer, hold, kill, kvm, runs, wait_until};

/// Starts `clade wait` with these arguments. Returns when it has seen these VMs run.
fn waiting(all: &Supervised, args: &[&str], vms: &[&str]) -> Child {
    let mut command = all.runtime.command(&[&["wait"], args].concat());
    command.env("CLADE_LOG", "debug").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut missing = vms.to_vec();
    let mut lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    while !missing.is_empty() {
        let line = lines.next().expect("it waits for all VMs").unwrap();
        missing.retain(|vm| !(line.contains("is waited for") && line.contains(&format!("{vm:?}"))));
    }
    drop(lines);
    child
}

fn lines(answer: &Answer) -> Vec<&str> {
    answer.stdout.lines().collect()
}

#[test]
fn each_name_is_done_and_the_first_failure_says_how_it_ends() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web", "--count", "3"]);
    let run = |args: &[&str]| all.runtime.clade(args);
    let resumed = run(&["resume", "web-1", "nobody", "web-2", "no/name"]);
    assert_eq!((resumed.code, lines(&resumed)), (Some(2), vec!["web-1 is running", "web-2 is running"]), "{resumed:?}");
    assert!(resumed.stderr.lines().all(|line| line.starts_with("clade: ")), "{resumed:?}");
    assert!(resumed.stderr.contains("nobody: ") && resumed.stderr.contains("no/name: "), "{resumed:?}");
    let paused = run(&["pause", "--all"]);
    assert_eq!((paused.code, lines(&paused).len()), (Some(0), 4), "{paused:?}");
    assert!(lines(&paused).iter().all(|line| line.ends_with(" is paused")), "{paused:?}");
    // A booted VM has no image to reset to.
    let reset = run(&["reset", "web", "web-3", "--json"]);
    assert_eq!(reset.code, Some(2), "{reset:?}");
    let answers: serde_json::Value = serde_json::from_str(&reset.stdout).unwrap();
    assert_eq!((answers.as_array().unwrap().len(), &answers[0]["vm"]["name"]), (1, &"web-3".into()));
    for name in ["one", "two"] {
        run(&["checkpoint", "web", name, "--json"]).json();
    }
    assert_eq!(lines(&run(&["rm", "--all"])), ["one is removed", "two is removed"]);
    assert_eq!(run(&["rm", "--all", "--json"]).json(), serde_json::json!([]));
    for bad in [&["stop"][..], &["stop", "web", "--all"], &["wait"]] {
        assert_eq!(run(bad).code, Some(2), "{bad:?}");
    }
    assert_eq!(lines(&run(&["stop", "--all"])).len(), 4);
    assert_eq!(all.runtime.names(), [""; 0]);
    all.end();
}

#[test]
fn waiting_ends_with_the_vms_and_says_why() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web", "--count", "3"]);
    let run = |args: &[&str]| all.runtime.clade(args);
    let late = run(&["wait", "web", "web-1", "--timeout", "300ms"]);
    assert_eq!((late.code, late.stdout.as_str()), (Some(124), ""), "{late:?}");
    assert!(late.stderr.contains("web, web-1"), "{late:?}");
    let mut waits = waiting(&all, &["web-1", "web-2"], &["web-1", "web-2"]);
    all.stop("web-1");
    assert!(waits.try_wait().unwrap().is_none(), "web-2 still runs");
    all.stop("web-2");
    let ended = Answer::from(waits.wait_with_output().unwrap());
    assert_eq!((ended.code, lines(&ended)), (Some(0), vec!["web-1: stopped as asked", "web-2: stopped as asked"]));
    let pid = all.pid_of("web-3");
    let waits = waiting(&all, &["web-3", "--json"], &["web-3"]);
    kill(pid, Signal::KILL);
    let ended = Answer::from(waits.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let said: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(said[0]["in_order"], false, "{said}");
    assert!(said[0]["reason"].as_str().unwrap().contains("signal 9"), "{said}");
    // A VM that has ended before the first check is on record.
    assert_eq!(run(&["wait", "web-3"]).code, Some(1));
    // No supervisor has a leftover socket. The wait for its end lasts as long as requested.
    let left = all.runtime.dir().join("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    assert_ne!(run(&["wait", "left", "--timeout", "500ms"]).code, Some(0));
    let _ = std::fs::remove_file(left);
    run(&["wait", "nobody"]).expect_refusal("nobody");
    assert_eq!(run(&["wait", "web", "--timeout", "soon"]).code, Some(2));
    all.end();
}

/// A host whose processors are all busy has no turn left for those that are to end.
#[test]
fn all_are_stopped_by_a_kill_but_those_that_write_disks() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    all.boot("disk", &["--disk", image.to_str().unwrap()]);
    all.boot("web", &[]);
    all.fork(&["web"]);
    let pids = ["disk", "web", "web-1"].map(|name| all.pid_of(name));
    let run = |args: &[&str]| all.runtime.clade(args);
    let (status, answer) = all.http("POST", "/v1/vms/web-1/stop", r#"{"at_once": true, "graceful_s": 86401}"#);
    assert_eq!(status, 400, "{answer}");
    let stopped = run(&["stop", "--all", "--json"]).json();
    // A process that is asked knows its memory; one that is killed says nothing any more.
    let was_asked = |answer: &serde_json::Value| !answer["memory"].is_null();
    let asked: Vec<(&str, bool)> =
        stopped.as_array().unwrap().iter().map(|vm| (vm["name"].as_str().unwrap(), was_asked(vm))).collect();
    assert_eq!(asked, [("disk", true), ("web", false), ("web-1", false)], "{stopped}");
    let was_wanted = |vm: &serde_json::Value| vm["stopped"]["kind"] == "requested";
    assert!(stopped.as_array().unwrap().iter().all(was_wanted), "{stopped}");
    wait_until("the ends of all", || pids.iter().all(|pid| !runs(*pid)));
    // As of any VM that was stopped: no names, no files, no record of a crash.
    assert_eq!(all.runtime.names(), [""; 0]);
    assert_eq!(run(&["ps", "-a", "--json"]).json()["ended"], serde_json::json!([]));
    let left: Vec<String> = all.runtime.files().into_iter().filter(|name| name.starts_with("web")).collect();
    assert_eq!(left, [""; 0]);
    all.boot("web", &[]);
    all.end();
}

#[test]
fn a_list_does_not_wait_for_a_process_that_stands_still() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web"]);
    let pid = all.pid_of("web-1");
    hold(pid);
    // On a busy machine the other VM may be silent once, too.
    wait_until("a list with the VM that answers", || {
        let listed = all.runtime.clade(&["ps", "--wait", "3s"]);
        assert_eq!(listed.code, Some(0), "{listed:?}");
        let rows = lines(&listed);
        assert!(rows[1].starts_with("web  ") && rows[2].starts_with("web-1  no answer  ?"), "{listed:?}");
        listed.stderr.contains("1 of 2 VMs have not answered") && !rows[1].contains("no answer")
    });
    kill(pid, Signal::CONT);
    assert_eq!(all.runtime.clade(&["ps", "--json"]).json().as_array().unwrap().len(), 2);
    all.end();
}

#[test]
fn more_children_than_the_processors_take_are_refused_without_overcommit() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let limit = 500 * std::thread::available_parallelism().unwrap().get();
    let refused = all.runtime.clade(&["fork", "web", "--count", &limit.to_string()]);
    assert!(refused.code != Some(0) && refused.stderr.contains("running VMs"), "{refused:?}");
    assert!(refused.stderr.contains(&format!("{} of {limit}", limit - 1)), "{refused:?}");
    assert_eq!(all.runtime.names(), ["web"]);
    assert_eq!(all.fork(&["web", "--overcommit"]), ["web-1"]);
    all.end();
}

#[test]
fn a_checkpoint_is_printed_though_no_process_can_be_prepared_for_its_children() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    // More than the supervisor prepares.
    let take = |name: &str, more: &[&str]| {
        all.runtime.clade(&[&["checkpoint", "web", name, "--prepare", "10001"], more].concat())
    };
    let failed = take("one", &[]);
    assert_eq!((failed.code, lines(&failed)), (Some(2), vec!["one"]), "{failed:?}");
    assert!(failed.stderr.lines().any(|line| line.starts_with("clade: ") && line.contains("10001")), "{failed:?}");
    let failed = take("two", &["--json"]);
    let printed: serde_json::Value = serde_json::from_str(&failed.stdout).unwrap();
    assert_eq!((failed.code, &printed["name"]), (Some(2), &"two".into()), "{failed:?}");
    assert_eq!(lines(&all.runtime.clade(&["rm", "--all"])), ["one is removed", "two is removed"]);
    all.end();
}
