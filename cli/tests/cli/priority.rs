//! Real-time priority of VMs' processes in a fork.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use clade_host_io::realtime::Scheduling;
use clade_test_support::wait_for;

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

/// Returns the thread of the first vCPU of a process. None if it has none.
fn vcpu_of(pid: u32) -> Option<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let mut ids = threads.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.find(|tid| fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).is_ok_and(|name| name == "clade-vcpu0\n"))
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
    let all = Supervised::start("1");
    all.boot("web", &["--cpus", "2"]);
    let parent = all.pid_of("web");
    // From the first fork on workers are prepared for the next.
    let first = all.fork(&["web"]);
    all.runtime.clade(&["stop", &first[0]]);
    let processors = thread::available_parallelism().unwrap().get();
    let (stop, seen, seen_child) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    // The vCPU of a prepared worker, while the host is busy.
    let next = AtomicU32::new(0);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for _ in 0..=processors {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let next = next.load(Ordering::Relaxed);
                    if next == 0 {
                        thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    let is_raised = Scheduling::of(parent).is_ok_and(|now| !now.is_default());
                    seen.fetch_or(is_raised, Ordering::Relaxed);
                    let is_raised = Scheduling::of(next).is_ok_and(|now| now.is_raised(&[1]));
                    seen_child.fetch_or(is_raised, Ordering::Relaxed);
                }
            });
        }
        let mut forks = 0;
        let mut fork = |is_running: bool| {
            let prepared = wait_for("a prepared worker", || all.zygotes().into_iter().find_map(vcpu_of));
            next.store(prepared, Ordering::Relaxed);
            let children = all.fork(&["web"]);
            forks += 1;
            assert_eq!(raised(parent), [""; 0], "after fork {forks}, running {is_running}");
            let child = all.pid_of(&children[0]);
            assert_eq!(raised(child), [""; 0], "of the child of fork {forks}");
            next.store(0, Ordering::Relaxed);
            all.runtime.clade(&["stop", &children[0]]);
        };
        wait_until("raises", || {
            fork(false);
            // With one processor the raised process always runs instead.
            (seen.load(Ordering::Relaxed) && seen_child.load(Ordering::Relaxed)) || processors == 1
        });
        all.runtime.clade(&["resume", "web", "--json"]).json();
        (0..3).for_each(|_| fork(true));
    });
}
