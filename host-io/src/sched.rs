//! Makes a waking thread run soon on a processor that other threads use.
//!
//! Linux lets a running thread finish its slice (3 ms and more) before a thread that has just
//! woken, unless the latter's slice is shorter. With the parent's vCPUs running on every processor,
//! a child's first instruction would come milliseconds late. So a vCPU thread that waits to start
//! has the shortest slice.
//!
//! A heavier weight makes the slice of a boosted thread count for less; that needs CAP_SYS_NICE. Both
//! are best effort: kernels before 6.12 ignore slices. Neither helps a thread that has used up its share:
//! see [`realtime`].
//!
//! The supervisor's threads get the shortest slice too, and a somewhat heavier weight: they answer all
//! clients, and the vCPUs of one client's guests may occupy every processor.

use std::cell::{Cell, OnceCell};
use std::io;
use std::time::Duration;

use crate::realtime::{self, RESET_ON_FORK, is_realtime};

/// The shortest slice the scheduler takes.
const BOOST_SLICE_NS: u64 = 100_000;

/// The nice value of the heaviest weight.
const BOOST_NICE: i32 = -20;

/// The nice value of a thread that answers requests.
const SERVER_NICE: i32 = -5;

thread_local! {
    /// The nice value of the calling thread before it was changed here.
    static GIVEN: OnceCell<i32> = const { OnceCell::new() };
    /// The slice of the calling thread, in nanoseconds, while it is not boosted. 0 for the kernel's default.
    static SLICE_NS: Cell<u64> = const { Cell::new(0) };
}

/// Gives the calling thread this slice from its next [`unboost`] on, whenever it is not boosted.
pub fn set_slice(slice: Duration) {
    SLICE_NS.set(u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX));
}

/// Makes the calling thread run soon after it wakes. A real-time thread does already.
pub fn boost() {
    boost_if_not_realtime();
}

/// Returns whether it has boosted the calling thread.
fn boost_if_not_realtime() -> bool {
    let boosts = !is_realtime();
    if boosts {
        put_in_front(BOOST_NICE);
    }
    boosts
}

/// Makes the calling thread, which answers requests, run soon after it wakes, until it ends. Whoever
/// started the process with another niceness or policy has chosen for it.
pub fn serve_requests() {
    // SAFETY: sched_getscheduler of the calling thread has no preconditions.
    let policy = unsafe { libc::sched_getscheduler(0) };
    if policy == libc::SCHED_OTHER && given() == 0 {
        put_in_front(SERVER_NICE);
    }
}

fn put_in_front(nice: i32) {
    let given = given();
    // Without CAP_SYS_NICE: the shorter slice alone.
    // A boosted thread creates a child's vCPU threads, which must not be boosted themselves.
    set(BOOST_SLICE_NS, nice.min(given), RESET_ON_FORK)
        .or_else(|_| set(BOOST_SLICE_NS, given, RESET_ON_FORK))
        .unwrap_or_else(|error| tracing::debug!(%error, "the scheduler takes no slice"));
}

/// Schedules the calling thread like any other of its slice again, also if another process has made it
/// a real-time thread.
pub fn unboost() {
    unboost_with(SLICE_NS.get());
}

/// The same, but a real-time thread has the shortest slice afterwards, until its next [`unboost`]. Returns
/// whether it has that. It would lose its processor otherwise, and whoever has raised it waits for what it
/// does next.
#[must_use]
pub fn unboost_to_start() -> bool {
    let was_raised = is_realtime();
    unboost_with(if was_raised { BOOST_SLICE_NS } else { SLICE_NS.get() });
    was_raised
}

fn unboost_with(slice_ns: u64) {
    // Without CAP_SYS_NICE the flag stays once it is set. It changes nothing for a thread that is
    // like any other.
    set(slice_ns, given(), 0)
        .or_else(|_| set(slice_ns, given(), RESET_ON_FORK))
        .unwrap_or_else(|error| tracing::debug!(%error, "the scheduler keeps a slice"));
}

/// Boosts the calling thread until this is dropped: for the few hundred microseconds in which a VM
/// is paused, or a child starts. A real-time thread stays one: whoever made it one takes it back.
#[derive(Debug)]
pub struct BoostGuard {
    is_own: bool,
}

impl BoostGuard {
    /// Boosts the calling thread.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "it acts on the calling thread")]
    pub fn new() -> Self {
        Self { is_own: boost_if_not_realtime() }
    }
}

impl Drop for BoostGuard {
    fn drop(&mut self) {
        if self.is_own {
            unboost();
        }
    }
}

/// Boosts the calling thread, which then runs a guest, until this is dropped. No priority outlasts it,
/// whoever has given it: the guest has none over others.
#[derive(Debug)]
pub struct ParkGuard(());

impl ParkGuard {
    /// Boosts the calling thread.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "it acts on the calling thread")]
    pub fn new() -> Self {
        boost();
        Self(())
    }
}

impl Drop for ParkGuard {
    fn drop(&mut self) {
        unboost();
    }
}

fn given() -> i32 {
    // SAFETY: getpriority of the calling thread has no preconditions.
    GIVEN.with(|given| *given.get_or_init(|| unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }))
}

/// Sets slice, nice value and flags of the calling thread: all, or none.
fn set(slice_ns: u64, nice: i32, flags: u64) -> io::Result<()> {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: flags,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: slice_ns,
        sched_deadline: 0,
        sched_period: 0,
    };
    realtime::set(0, &attr)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice() -> i32 {
        // SAFETY: getpriority of the calling thread has no preconditions.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[test]
    fn a_boosted_thread_makes_threads_that_are_not() {
        std::thread::spawn(|| {
            let before = nice();
            let boost = BoostGuard::new();
            let inside = nice();
            let made = std::thread::spawn(|| {
                let before = nice();
                drop(BoostGuard::new());
                (before, nice())
            });
            // The kernel resets a negative value to 0.
            let reset = if inside < 0 { 0 } else { before };
            assert_eq!(made.join().unwrap(), (reset, reset));
            drop(boost);
            assert_eq!(nice(), before);
            if inside == before {
                clade_test_support::skipped("without CAP_SYS_NICE no weight changes");
            }
            assert!(inside == BOOST_NICE || inside == before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn threads_that_serve_requests_are_in_front_and_their_processes_are_not() {
        std::thread::spawn(|| {
            let before = nice();
            serve_requests();
            let inside = nice();
            assert!(inside == SERVER_NICE.min(before) || inside == before, "{inside}");
            let status = std::process::Command::new("sh").args(["-c", "exit $(( $(nice) + 20 ))"]).status().unwrap();
            // A niceness of the test's own caller is left, and inherited.
            let inherited = if inside == before { before } else { 0 };
            assert_eq!(status.code(), Some(inherited + 20));
        })
        .join()
        .unwrap();
    }

    /// The slice of the calling thread, in nanoseconds.
    fn slice() -> u64 {
        realtime::Scheduling::of(0).unwrap().0.sched_runtime
    }

    #[test]
    fn a_thread_without_privileges_has_its_slice_back() {
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
        std::thread::spawn(|| {
            let none = CapabilitySet::empty();
            // Applies to this thread alone.
            set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
            let before = (slice(), nice());
            let boost = BoostGuard::new();
            let inside = slice();
            drop(boost);
            assert_eq!((slice(), nice()), before);
            if inside == before.0 {
                clade_test_support::skipped("this kernel takes no slices");
            } else {
                assert_eq!(inside, BOOST_SLICE_NS);
            }
            // A thread with a slice of its own has that one back.
            set_slice(Duration::from_millis(10));
            drop(BoostGuard::new());
            let kept = if inside == before.0 { before.0 } else { 10_000_000 };
            assert_eq!((slice(), nice()), (kept, before.1));
        })
        .join()
        .unwrap();
    }
}
