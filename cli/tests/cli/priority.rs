//! Real-time priority of VMs' processes in a fork.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clade_host_io::realtime::Scheduling;

use crate::supervisor::Supervised;
use crate::tool::{kvm, wait_until};

/// Returns whether this process may set real-time priorities.
fn may_raise() -> bool {
    let attempt = || {
        let before = Scheduling::of(0).unwrap();
        before.raise(0, 1).and_then(|()| before.give_back(0, &[1])).is_ok() && before.is_default()
    };
    thread::spawn(attempt).join().unwrap()
}

/// Returns the threads of process `pid` that have another priority than by default.
fn raised(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let ids = threads.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // A thread that has ended has none.
    ids.filter(|tid| Scheduling::of(tid.parse().unwrap()).is_ok_and(|now| !now.is_default())).collect()
}

/// Sets the flag when it is dropped, also by a failed assertion.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// On a busy host a fork raises the threads of the parent and of a prepared worker, and leaves none of the
/// parent nor of the child with a priority over others. Whether they run or are paused makes no difference.
#[test]
fn a_fork_on_a_busy_host_raises_the_parent_and_the_child_until_the_answer() {
    if !kvm() {
        return;
    }
    if !may_raise() {
        clade_test_support::skipped("no real-time priority");
        return;
    }
    let log = tempfile::NamedTempFile::new().unwrap();
    let all = Supervised::start_logging("1", "clade_supervisor::priority=debug", log.reopen().unwrap());
    all.boot("web", &["--cpus", "2"]);
    let parent = all.pid_of("web");
    let processors = thread::available_parallelism().unwrap().get();
    let (stop, seen) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for _ in 0..=processors {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let is_raised = Scheduling::of(parent).is_ok_and(|now| !now.is_default());
                    seen.fetch_or(is_raised, Ordering::Relaxed);
                }
            });
        }
        let mut forks = 0;
        let mut fork = |is_running: bool| {
            let answer = all.runtime.clade(&["fork", "--json", "web"]).json();
            let child = answer["children"][0].as_str().unwrap();
            forks += 1;
            assert_eq!(raised(parent), [""; 0], "after fork {forks}, running {is_running}");
            assert_eq!(raised(all.pid_of(child)), [""; 0], "of the child of fork {forks}");
            all.runtime.clade(&["stop", child]);
        };
        wait_until("raises", || {
            fork(false);
            // With one processor the raised process always runs instead.
            let seen = seen.load(Ordering::Relaxed) || processors == 1;
            // A worker of the next fork.
            wait_until("a prepared worker", || all.http("GET", "/v1/supervisor", "").1["prepared"] != 0);
            seen && fs::read_to_string(log.path()).unwrap().contains("task=Start")
        });
        all.runtime.clade(&["resume", "web", "--json"]).json();
        (0..3).for_each(|_| fork(true));
    });
}

/// A supervisor that was killed may leave a worker raised. The next one takes the priority back even if it then
/// fails to start.
#[test]
fn a_supervisor_that_cannot_start_has_taken_the_priority_of_workers_back() {
    if !kvm() {
        return;
    }
    if !may_raise() {
        clade_test_support::skipped("no real-time priority");
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    let pid = all.pid_of("web");
    all.runtime.crash();
    Scheduling::of(pid).unwrap().raise(pid, 2).unwrap();
    assert_eq!(raised(pid), [pid.to_string()]);
    all.runtime.clade(&["serve", "--net-hook", "/no/such/program"]).expect_refusal("/no/such/program");
    assert_eq!(raised(pid), [""; 0]);
    all.serve("0");
    all.end();
}
