//! Tests with processes that do nothing.

use std::process::{Child, Command};

use clade_test_support::{skipped, wait_for, wait_until};

use super::threads::VCPU_NAME;
use super::*;
use clade_worker::image::IMAGE_THREAD;

/// A raise that only its drop ends.
const LONG: Duration = Duration::from_secs(3600);

/// A process that does nothing, until this is dropped, and looks as if it answered image requests, or had
/// a vCPU.
struct Idle(Child);

impl Idle {
    fn new() -> Self {
        Self::with(IMAGE_THREAD, &[])
    }

    fn vcpu() -> Self {
        Self::with(VCPU_NAME, &[])
    }

    fn with(thread: &str, program: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // A process is called as its program's file.
        let sleep = dir.path().join(thread);
        std::os::unix::fs::symlink("/bin/sleep", &sleep).unwrap();
        let mut args = program.iter().map(AsRef::as_ref).chain([sleep.as_os_str(), "3600".as_ref()]);
        let process = Command::new(args.next().unwrap()).args(args).spawn().unwrap();
        let idle = Self(process);
        let name = || std::fs::read_to_string(format!("/proc/{}/comm", idle.0.id())).unwrap();
        wait_until("the program", || name().trim_end() == thread);
        idle
    }

    fn process(&self) -> Option<ProcessId> {
        ProcessId::of(self.0.id())
    }

    fn is_raised(&self) -> bool {
        !Scheduling::of(self.0.id()).unwrap().is_default()
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the priority of a supervisor that may raise workers, for `hold`, on a busy host. None if
/// this process may not.
fn priority(hold: Duration) -> Option<Priority> {
    priority_on(0, hold)
}

/// The same on a host with `processors`.
fn priority_on(processors: usize, hold: Duration) -> Option<Priority> {
    let before = Scheduling::of(0).unwrap();
    if let Err(error) = before.raise(0, FIRST) {
        skipped(&format!("no real-time priority: {error}"));
        return None;
    }
    before.give_back(0, &[FIRST]).unwrap();
    if !before.is_default() {
        skipped("the tests have another priority");
        return None;
    }
    Some(Priority::new(hold, processors))
}

/// Raises `idle` as soon as a raise is possible.
fn raise(priority: &Priority, idle: &Idle) -> Raised {
    wait_for("a raise", || priority.raise(idle.process(), || ()).1)
}

fn held(priority: &Priority) -> Option<u64> {
    priority.0.state().held.as_ref().map(|held| held.raise)
}

#[test]
fn a_process_is_raised_before_the_request_and_until_the_answer() {
    let Some(priority) = priority(LONG) else { return };
    let idle = Idle::new();
    drop(raise(&priority, &idle));
    assert!(!idle.is_raised());
    priority.0.state().rests_end.image = None;
    let (at_request, raised) = priority.raise(idle.process(), || idle.is_raised());
    assert!(at_request);
    assert!(Scheduling::of(0).unwrap().is_default(), "the calling thread is as before");
    assert!(idle.is_raised());
    drop(raised);
    assert!(!idle.is_raised());
}

#[test]
fn nothing_is_raised_on_a_host_with_a_processor_for_each_thread() {
    let Some(priority) = priority_on(usize::MAX, LONG) else { return };
    let (image, vcpu) = (Idle::new(), Idle::vcpu());
    wait_until("the thread that ends raises", || priority.0.state().ending == Ending::Waits);
    assert!(priority.raise(image.process(), || ()).1.is_none());
    assert!(priority.raise_start(vcpu.process()).is_none());
}

#[test]
fn a_raise_ends_by_time() {
    let Some(priority) = priority(HOLD) else { return };
    let idle = Idle::new();
    let raised = raise(&priority, &idle);
    wait_until("the end of the raise", || !idle.is_raised());
    assert_eq!(held(&priority), None);
    drop(raised);
}

#[test]
fn the_drop_of_an_ended_raise_ends_no_other() {
    let Some(priority) = priority(LONG) else { return };
    let (one, other) = (Idle::new(), Idle::new());
    let raised = raise(&priority, &one);
    // As by time.
    priority.0.state().give_back();
    assert!(!one.is_raised());
    priority.0.state().rests_end.image = None;
    let next = raise(&priority, &other);
    drop(raised);
    assert_eq!(held(&priority), Some(next.raise));
    assert!(other.is_raised());
}

#[test]
fn one_process_at_a_time_is_raised_for_a_tenth_of_the_time() {
    let Some(priority) = priority(LONG) else { return };
    let (one, other) = (Idle::new(), Idle::new());
    let raised = raise(&priority, &one);
    assert!(priority.raise(other.process(), || ()).1.is_none(), "two at a time");
    assert!(!other.is_raised());
    // As if it had taken a minute.
    let begun = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
    priority.0.state().held.as_mut().unwrap().begun = begun;
    drop(raised);
    let rests_end = priority.0.state().rests_end.image.unwrap();
    assert!(rests_end >= begun + Duration::from_secs(600));
    assert!(priority.raise(other.process(), || ()).1.is_none(), "no rest");
    // Minutes later there is a rest to put off, and each raise adds to it.
    let begun = Instant::now();
    priority.0.state().rests_end.image = Some(begun + BURST);
    drop(priority.raise(other.process(), || ()).1.unwrap());
    assert!(priority.0.state().rests_end.image.unwrap() > begun + BURST);
}

#[test]
fn a_process_that_has_ended_or_has_another_priority_is_left_alone() {
    let Some(priority) = priority(LONG) else { return };
    drop(raise(&priority, &Idle::new()));
    priority.0.state().rests_end.image = None;
    let idle = Idle::new();
    let process = idle.process();
    drop(idle);
    assert!(priority.raise(process, || ()).1.is_none());
    assert!(priority.raise(None, || ()).1.is_none());
    let sleep = Idle(Command::new("sleep").arg("3600").spawn().unwrap());
    assert!(priority.raise(sleep.process(), || ()).1.is_none(), "it answers no image requests");
    let nice = Idle::with(IMAGE_THREAD, &["nice", "-n", "5"]);
    assert!(nice.is_raised());
    let raised = priority.raise(nice.process(), || ()).1.unwrap();
    assert!(priority.0.state().held.as_ref().unwrap().threads.is_empty());
    drop(raised);
}

#[test]
fn a_child_is_raised_with_the_caller_until_its_vcpus_have_entered_the_guest() {
    let Some(priority) = priority(LONG) else { return };
    let (image, vcpu) = (Idle::new(), Idle::vcpu());
    let tid = vcpu.0.id();
    let is_default = || Scheduling::of(0).unwrap().is_default();
    let raise = || wait_for("a raise", || priority.raise_start(vcpu.process()));
    drop(raise());
    assert!(is_default() && !vcpu.is_raised(), "given back by the drop");
    for enters in [true, false] {
        // Raises for images have a rest of their own.
        priority.0.state().rests_end = RestsEnd { image: Some(Instant::now() + LONG), start: None };
        assert!(priority.raise_start(image.process()).is_none(), "a worker without vCPUs");
        let raised = raise();
        assert!(!is_default() && Scheduling::of(tid).unwrap().is_raised(&[VCPU]));
        thread::scope(|scope| {
            // As the vCPU's thread itself does.
            let enter = || Scheduling::of(tid).unwrap().without_raise().give_back(tid, &[VCPU]).unwrap();
            assert!(raised.has_raised_vcpus());
            if enters {
                scope.spawn(enter).join().unwrap();
                assert!(!raised.has_raised_vcpus());
            }
            let begun = Instant::now();
            raised.end();
            let waited = begun.elapsed() >= ENTRY_CHECKS * ENTRY_INTERVAL;
            assert!(enters || waited, "it does not wait for the vCPU");
        });
        assert!(is_default() && !vcpu.is_raised(), "enters {enters}");
        assert_eq!(held(&priority), None);
    }
}

#[test]
fn the_caller_is_given_back_by_time_too() {
    let Some(priority) = priority(HOLD) else { return };
    let vcpu = Idle::vcpu();
    let raised = wait_for("a raise", || priority.raise_start(vcpu.process()));
    wait_until("the end of the raise", || Scheduling::of(0).unwrap().is_default());
    assert!(!vcpu.is_raised());
    assert!(!raised.has_raised_vcpus());
    drop(raised);
    assert!(Scheduling::of(0).unwrap().is_default());
}

#[test]
fn the_next_supervisor_gives_back_what_one_that_was_killed_has_raised() {
    let Some(_) = priority(LONG) else { return };
    let (idle, other) = (Idle::new(), Idle::new());
    for (process, priority) in [(&idle, WORKER), (&other, FIRST)] {
        Scheduling::of(process.0.id()).unwrap().raise(process.0.id(), priority).unwrap();
        Priority::give_back(process.process().unwrap());
    }
    assert!(!idle.is_raised());
    assert!(other.is_raised(), "no supervisor raises a worker to that");
}

#[test]
fn a_supervisor_that_ends_leaves_no_process_raised() {
    let Some(priority) = priority(LONG) else { return };
    let idle = Idle::new();
    let raised = raise(&priority, &idle);
    drop(priority);
    assert!(!idle.is_raised());
    drop(raised);
}
