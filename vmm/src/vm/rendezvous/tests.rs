//! The orders of a save, a load and a start, with threads that are no vCPUs.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Next, Rendezvous};
use crate::vm::VmError;
use crate::vm::stop::StopReason;

/// Long enough for a thread that may go on to do so.
const SETTLE: Duration = Duration::from_millis(150);
const TIMEOUT: Duration = Duration::from_secs(10);

type Meeting = Rendezvous<u32, u32>;

fn parks(meeting: &Arc<Meeting>, index: usize, told: &Sender<(usize, Next<u32>)>) -> JoinHandle<()> {
    let (meeting, told) = (Arc::clone(meeting), told.clone());
    thread::spawn(move || {
        let next = meeting.park(index, false);
        let _ = told.send((index, next));
    })
}

/// A thread that pauses. It has asked for it when this returns: a vCPU that parks before that is told to run.
fn pauses(meeting: &Arc<Meeting>, save: bool) -> JoinHandle<()> {
    let pauser = {
        let meeting = Arc::clone(meeting);
        thread::spawn(move || meeting.pause(save).unwrap())
    };
    while meeting.may_run() {
        thread::yield_now();
    }
    pauser
}

/// What both vCPUs are told once both are parked, the first having parked alone for a while.
fn one_then_the_other(meeting: &Arc<Meeting>) -> Result<[Next<u32>; 2], (usize, Next<u32>)> {
    let pauser = pauses(meeting, true);
    let (tell, told): (_, Receiver<(usize, Next<u32>)>) = channel();
    let first = parks(meeting, 0, &tell);
    match told.recv_timeout(SETTLE) {
        Ok(early) => return Err(early),
        Err(error) => assert_eq!(error, RecvTimeoutError::Timeout),
    }
    let second = parks(meeting, 1, &tell);
    pauser.join().unwrap();
    let next = [told.recv_timeout(TIMEOUT).unwrap().1, told.recv_timeout(TIMEOUT).unwrap().1];
    first.join().unwrap();
    second.join().unwrap();
    Ok(next)
}

#[test]
fn no_vcpu_saves_before_all_are_parked() {
    let meeting = Arc::new(Meeting::new(2));
    let next = one_then_the_other(&meeting).expect("nobody is told anything before both are parked");
    assert!(next.iter().all(|next| matches!(next, Next::Save(_))), "{next:?}");
}

#[test]
fn without_the_rule_one_saves_beside_a_running_sibling() {
    let meeting = Arc::new(Meeting::new(2));
    meeting.schedule.save_early();
    let (index, next) = one_then_the_other(&meeting).unwrap_err();
    assert!(index == 0 && matches!(next, Next::Save(_)), "{next:?}");
}

#[test]
fn no_vcpu_loads_before_all_are_parked() {
    let meeting = Arc::new(Meeting::new(2));
    let (tell, told) = channel();
    let pauser = pauses(&meeting, false);
    meeting.load([7, 8]);
    let first = parks(&meeting, 0, &tell);
    assert_eq!(told.recv_timeout(SETTLE).unwrap_err(), RecvTimeoutError::Timeout);
    let second = parks(&meeting, 1, &tell);
    for _ in 0..2 {
        let (index, next) = told.recv_timeout(TIMEOUT).unwrap();
        let Next::Load(request, order) = next else { panic!("{next:?}") };
        assert_eq!(order, 7 + index as u32);
        meeting.has_loaded(index, request, Ok(()));
    }
    meeting.await_loaded().unwrap();
    [pauser, first, second].into_iter().for_each(|thread| thread.join().unwrap());
}

/// A fork that fails in the middle resumes while a vCPU still saves. What that hands in late is of another instant.
#[test]
fn a_state_saved_for_an_earlier_pause_is_dropped() {
    let meeting = Arc::new(Meeting::new(1));
    let (tell, told) = channel();
    let pauser = pauses(&meeting, true);
    let vcpu = parks(&meeting, 0, &tell);
    pauser.join().unwrap();
    vcpu.join().unwrap();
    let Next::Save(first) = told.recv().unwrap().1 else { panic!("no save") };
    meeting.resume();
    pauses(&meeting, true).join().unwrap();
    meeting.hand_in(0, first, Ok(1));
    let Next::Save(second) = meeting.park(0, true) else { panic!("the newer request counts as answered") };
    assert_ne!(first, second);
    meeting.hand_in(0, second, Ok(2));
    assert_eq!(meeting.collect().unwrap(), [2]);
}

/// vCPUs that begin with `own`, the last with `lead`. Returns what the owner is told and who entered the guest.
fn start(
    own: Vec<Result<(), VmError>>,
    lead: impl Fn() -> Result<(), VmError> + Send + Sync + 'static,
) -> (Result<(), VmError>, Vec<bool>, Option<StopReason>) {
    let meeting = Arc::new(Meeting::new(own.len()));
    let lead = Arc::new(lead);
    let vcpus: Vec<_> = (0..)
        .zip(own)
        .map(|(index, own)| {
            let (meeting, lead) = (Arc::clone(&meeting), Arc::clone(&lead));
            thread::spawn(move || match meeting.wait_for_order(index) {
                Next::Start(_) => meeting.begin(index, own, || lead()),
                _ => false,
            })
        })
        .collect();
    meeting.wait_idle().unwrap();
    let told = meeting.start(0..vcpus.len() as u32);
    let entered = vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).collect();
    (told, entered, meeting.stopped())
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
    let meeting = Arc::new(Meeting::new(2));
    let one = {
        let meeting = Arc::clone(&meeting);
        thread::spawn(move || meeting.begin(0, Ok(()), || Ok(())))
    };
    thread::sleep(SETTLE);
    meeting.stop(StopReason::Requested);
    assert!(!one.join().unwrap());
    assert!(matches!(meeting.start([1, 2]), Err(VmError::Stopped(StopReason::Requested))));
}

/// An order has the VM's devices: kept, a VM that was stopped in the middle of a reset would never give them back.
#[test]
fn an_order_that_nobody_takes_any_more_is_dropped() {
    let (before, after) = (Arc::new(()), Arc::new(()));
    let meeting = Rendezvous::<Arc<()>, ()>::new(2);
    // One that was given in time, and never taken; and one that comes too late.
    meeting.load([Arc::clone(&before), Arc::clone(&before)]);
    assert_eq!(Arc::strong_count(&before), 3);
    meeting.stop(StopReason::Requested);
    meeting.load([Arc::clone(&after), Arc::clone(&after)]);
    assert_eq!((Arc::strong_count(&before), Arc::strong_count(&after)), (1, 1));
    assert!(meeting.start([Arc::clone(&after), Arc::clone(&after)]).is_err());
    assert_eq!(Arc::strong_count(&after), 1);
}
