//! The orders of a save, a load and a start, with threads in place of vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clade_test_support::receive;

use super::{Next, Phase, Startup, State, VcpuControl};
use crate::vm::error::VmError;
use crate::vm::stop::StopReason;

/// Longer than a thread takes to continue.
const SETTLE: Duration = Duration::from_millis(150);

type Control = VcpuControl<u32, u32>;

fn parks(control: &Arc<Control>, index: usize, told: &Sender<(usize, Next<u32>)>) -> JoinHandle<()> {
    let (control, told) = (Arc::clone(control), told.clone());
    thread::spawn(move || {
        let next = control.park(index, false);
        let _ = told.send((index, next));
    })
}

/// Starts a thread that pauses, and waits for its request: a vCPU that parked earlier would get
/// [`Next::Run`].
fn pauses(control: &Arc<Control>, save: bool) -> JoinHandle<()> {
    let pauser = {
        let control = Arc::clone(control);
        thread::spawn(move || control.pause(save).unwrap())
    };
    while control.may_run() {
        thread::yield_now();
    }
    pauser
}

#[test]
fn no_vcpu_saves_before_all_are_parked() {
    let control = Arc::new(Control::new(2));
    let pauser = pauses(&control, true);
    let (tell, told) = channel();
    let first = parks(&control, 0, &tell);
    let early = told.recv_timeout(SETTLE).unwrap_err();
    assert_eq!(early, RecvTimeoutError::Timeout, "the first vCPU has parked alone");
    let second = parks(&control, 1, &tell);
    pauser.join().unwrap();
    let next = [0, 1].map(|_| receive("what a parked vCPU is to do", &told).1);
    first.join().unwrap();
    second.join().unwrap();
    assert!(next.iter().all(|next| matches!(next, Next::Save(_))), "{next:?}");
}

#[test]
fn without_the_rule_one_saves_beside_a_running_sibling() {
    let control = Arc::new(Control::new(2));
    control.schedule.save_early();
    // The pauser waits for the second vCPU, which never parks.
    let _pauser = pauses(&control, true);
    let (tell, told) = channel();
    let _first = parks(&control, 0, &tell);
    let (index, next) = receive("what a vCPU that parked alone is to do", &told);
    assert!(index == 0 && matches!(next, Next::Save(_)), "{next:?}");
}

#[test]
fn no_vcpu_loads_before_all_are_parked() {
    let control = Arc::new(Control::new(2));
    let (tell, told) = channel();
    let pauser = pauses(&control, false);
    control.load([7, 8]);
    let first = parks(&control, 0, &tell);
    assert_eq!(told.recv_timeout(SETTLE).unwrap_err(), RecvTimeoutError::Timeout);
    let second = parks(&control, 1, &tell);
    for _ in 0..2 {
        let (index, next) = receive("what a parked vCPU is to do", &told);
        let Next::Load(request, order) = next else { panic!("{next:?}") };
        assert_eq!(order, 7 + index as u32);
        control.has_loaded(index, request, Ok(()));
    }
    control.await_loaded().unwrap();
    [pauser, first, second].into_iter().for_each(|thread| thread.join().unwrap());
}

/// A fork that fails in the middle resumes while a vCPU still saves. The late state belongs to
/// another instant.
#[test]
fn a_state_saved_for_an_earlier_pause_is_dropped() {
    let control = Arc::new(Control::new(1));
    let (tell, told) = channel();
    let pauser = pauses(&control, true);
    let vcpu = parks(&control, 0, &tell);
    pauser.join().unwrap();
    vcpu.join().unwrap();
    let Next::Save(first) = told.recv().unwrap().1 else { panic!("no save") };
    control.resume();
    pauses(&control, true).join().unwrap();
    control.submit_state(0, first, Ok(1));
    let Next::Save(second) = control.park(0, true) else { panic!("the newer request counts as answered") };
    assert_ne!(first, second);
    control.submit_state(0, second, Ok(2));
    assert_eq!(control.collect().unwrap(), [2]);
}

/// vCPUs that begin with `own`, the last with `lead`. Returns the owner's result, which vCPUs
/// entered the guest, and the stop reason.
fn start(
    own: Vec<Result<(), VmError>>,
    lead: impl Fn() -> Result<(), VmError> + Send + Sync + 'static,
) -> (Result<(), VmError>, Vec<bool>, Option<StopReason>) {
    let control = Arc::new(Control::new(own.len()));
    let lead = Arc::new(lead);
    let vcpus: Vec<_> = (0..)
        .zip(own)
        .map(|(index, own)| {
            let (control, lead) = (Arc::clone(&control), Arc::clone(&lead));
            thread::spawn(move || match control.wait_for_order(index) {
                Next::Start(_) => control.begin(index, own, || lead()),
                _ => false,
            })
        })
        .collect();
    control.wait_idle().unwrap();
    let told = control.start(0..vcpus.len() as u32);
    let entered = vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).collect();
    (told, entered, control.stopped())
}

#[test]
fn all_enter_the_guest_or_none_does() {
    let (told, entered, _) = start(vec![Ok(()), Ok(()), Ok(())], || Ok(()));
    assert!(told.is_ok() && entered == [true; 3]);

    let (told, entered, stopped) = start(vec![Ok(()), Err(VmError::NotSaved), Ok(())], || Ok(()));
    assert!(matches!(told, Err(VmError::NotSaved)), "{told:?}");
    assert_eq!(entered, [false; 3]);
    assert!(matches!(stopped, Some(StopReason::Start { vcpu: 1, .. })), "{stopped:?}");

    let (told, entered, _) = start(vec![Ok(()), Ok(())], || Err(VmError::NoOrigin));
    assert!(matches!(told, Err(VmError::NoOrigin)), "{told:?}");
    assert_eq!(entered, [false; 2]);
}

#[test]
fn a_guest_that_ends_before_its_owner_looks_has_started() {
    for (reason, has_started) in [(StopReason::PowerOff, true), (StopReason::Requested, false)] {
        let control = Arc::new(Control::new(1));
        let vcpu = {
            let (control, reason) = (Arc::clone(&control), reason.clone());
            thread::spawn(move || {
                assert!(matches!(control.wait_for_order(0), Next::Start(_)));
                assert!(control.begin(0, Ok(()), || Ok(())));
                control.stop(reason);
            })
        };
        control.wait_idle().unwrap();
        control.give([1]);
        control.to_vcpus.notify_all();
        vcpu.join().unwrap();
        let told = control.start([]);
        assert_eq!(told.is_ok(), has_started, "{reason}: {told:?}");
    }
}

/// Whoever admits the VM may wait for many others. The steps before and after have a limit.
#[test]
fn an_admission_may_take_longer_than_a_start() {
    let control = Arc::new(Control::new(1));
    let starts = || {
        let control = Arc::clone(&control);
        let decided = |inner: &super::Inner<u32, u32>| inner.startup.is_decided();
        thread::spawn(move || control.wait_within(Duration::from_millis(1), decided).map(drop))
    };
    assert!(matches!(starts().join().unwrap(), Err(VmError::Stuck { .. })));
    control.inner().startup = Startup::Admission;
    let owner = starts();
    thread::sleep(SETTLE);
    assert!(!owner.is_finished());
    control.inner().startup = Startup::Answered;
    assert!(matches!(owner.join().unwrap(), Err(VmError::Stuck { .. })), "its last steps hang");
    control.inner().startup = Startup::Admission;
    let owner = starts();
    control.inner().startup = Startup::Begun;
    owner.join().unwrap().unwrap();
}

/// Starts a VM whose admission is `answer`, and stops it `before` it is asked for, or meanwhile. Returns the owner's
/// result, and whether admission was asked for.
fn stopped_at_admission(before: bool, answer: bool) -> (Result<(), VmError>, bool) {
    let asked = Arc::new(AtomicBool::new(false));
    let control = Arc::new(Control::new(1));
    let vcpu = {
        let (control, asked) = (Arc::clone(&control), Arc::clone(&asked));
        thread::spawn(move || {
            assert!(matches!(control.wait_for_order(0), Next::Start(_)));
            let lost = || control.stop(StopReason::MemoryLost { error: "gone".to_owned() });
            let lead = || {
                if before {
                    lost();
                }
                control.ask_admission(|| {
                    asked.store(true, Ordering::SeqCst);
                    lost();
                    // The owner has been woken.
                    thread::sleep(SETTLE);
                    answer
                })
            };
            control.begin(0, Ok(()), lead)
        })
    };
    control.wait_idle().unwrap();
    let told = control.start([1]);
    assert_eq!(vcpu.join().unwrap(), told.is_ok());
    assert!(matches!(control.stopped(), Some(StopReason::MemoryLost { .. })));
    assert!(!control.may_run());
    (told, asked.load(Ordering::SeqCst))
}

#[test]
fn a_vm_that_was_admitted_has_started_however_it_ends() {
    assert!(matches!(stopped_at_admission(false, true), (Ok(()), true)));
    assert!(matches!(stopped_at_admission(false, false), (Err(VmError::Unwanted), true)));
    let (told, asked) = stopped_at_admission(true, true);
    assert!(
        matches!(told, Err(VmError::Stopped(_))) && !asked,
        "{told:?}: a VM that has ended is not reported as made"
    );
}

#[test]
fn a_panic_of_an_admission_strands_nobody() {
    let control = Arc::new(Control::new(2));
    let vcpus = [0, 1].map(|index| {
        let control = Arc::clone(&control);
        thread::spawn(move || {
            assert!(matches!(control.wait_for_order(index), Next::Start(_)));
            control.begin(index, Ok(()), || control.ask_admission(|| panic!("on purpose")))
        })
    });
    control.wait_idle().unwrap();
    assert!(matches!(control.start([1, 2]), Err(VmError::Panicked { .. })));
    assert_eq!(vcpus.map(|vcpu| vcpu.join().unwrap()), [false; 2]);
}

#[test]
fn a_panic_of_the_last_vcpu_strands_nobody_and_is_told_as_one() {
    let (told, entered, stopped) = start(vec![Ok(()), Ok(())], || panic!("on purpose"));
    let error = told.unwrap_err();
    assert!(matches!(error, VmError::Panicked { .. }), "{error:?}");
    assert!(error.to_string().ends_with("panicked: on purpose"), "{error}");
    assert_eq!(entered, [false; 2]);
    assert!(matches!(stopped, Some(StopReason::Panic { .. })), "{stopped:?}");
}

#[test]
fn a_vm_stopped_while_it_starts_strands_nobody() {
    let control = Arc::new(Control::new(2));
    let one = {
        let control = Arc::clone(&control);
        thread::spawn(move || control.begin(0, Ok(()), || Ok(())))
    };
    thread::sleep(SETTLE);
    control.stop(StopReason::Requested);
    assert!(!one.join().unwrap());
    assert!(matches!(control.start([1, 2]), Err(VmError::Stopped(StopReason::Requested))));
}

/// An order has the VM's devices. If it were kept, a VM stopped in the middle of a reset would
/// never release them.
#[test]
fn an_order_that_nobody_takes_any_more_is_dropped() {
    let (before, after) = (Arc::new(()), Arc::new(()));
    let control = VcpuControl::<Arc<()>, ()>::new(2);
    // One order is given in time and never taken; the other comes too late.
    control.load([Arc::clone(&before), Arc::clone(&before)]);
    assert_eq!(Arc::strong_count(&before), 3);
    control.stop(StopReason::Requested);
    control.load([Arc::clone(&after), Arc::clone(&after)]);
    assert_eq!((Arc::strong_count(&before), Arc::strong_count(&after)), (1, 1));
    assert!(control.start([Arc::clone(&after), Arc::clone(&after)]).is_err());
    assert_eq!(Arc::strong_count(&after), 1);
}

/// The table of [`VcpuControl`], row by row.
#[test]
fn the_state_changes_as_the_table_says() {
    let control = Control::new(2);
    let state = || control.inner().state.clone();
    assert_eq!(state(), State::Running);
    control.start_paused();
    assert_eq!(state(), State::Pausing);
    control.start_paused();
    control.resume();
    assert_eq!((state(), control.may_run()), (State::Pausing, false), "one of two pauses is still held");
    control.inner().vcpus.iter_mut().for_each(|vcpu| vcpu.phase = Phase::Parked);
    control.resume();
    assert_eq!((state(), control.may_run()), (State::Running, true));
    control.start_paused();
    assert_eq!(state(), State::Paused, "every vCPU is still parked");
    control.inner().vcpus[1].phase = Phase::Started;
    control.resume();
    assert!(matches!(control.park(1, false), Next::Run));
    assert_eq!((state(), control.inner().vcpus[1].phase), (State::Running, Phase::Started));
    control.stop(StopReason::Reset);
    control.stop(StopReason::Requested);
    assert_eq!((state(), control.may_run()), (State::Stopped(StopReason::Reset), false), "the first reason stays");
    control.resume();
    assert!(control.pause(false).is_err());
    assert_eq!(state(), State::Stopped(StopReason::Reset));
    assert!(matches!(control.park(0, true), Next::Exit));
    assert_eq!(control.wait_exited(Duration::ZERO), None);
    [0, 1].into_iter().for_each(|index| control.thread_exited(index));
    assert_eq!(control.wait_exited(Duration::ZERO), Some(StopReason::Reset));
}
