//! Makes a waking thread run soon on a processor that other threads use.
//!
//! Linux lets a running thread finish its slice (3 ms and more) before a thread that has just
//! woken, unless the latter's slice is shorter. With the parent's vCPUs running on every processor,
//! a child's first instruction would come milliseconds late. So a vCPU thread that waits to start
//! has the shortest slice.
//!
//! A heavier weight keeps it from waiting behind threads that have had less time; that needs
//! CAP_SYS_NICE. Both are best effort: kernels before 6.12 ignore slices.

use std::cell::OnceCell;

/// The shortest slice the scheduler takes.
const BOOST_SLICE_NS: u64 = 100_000;

/// The nice value of the heaviest weight.
const BOOST_NICE: i32 = -20;

thread_local! {
    /// The nice value of the calling thread before it was changed here.
    static GIVEN: OnceCell<i32> = const { OnceCell::new() };
}

/// Makes the calling thread run soon after it wakes.
pub(crate) fn boost() {
    let given = given();
    // Without CAP_SYS_NICE: the shorter slice alone.
    if !set(BOOST_SLICE_NS, BOOST_NICE.min(given)) {
        set(BOOST_SLICE_NS, given);
    }
}

/// Schedules the calling thread like any other again.
pub(crate) fn unboost() {
    set(0, given());
}

/// Boosts the calling thread until this is dropped: for the few hundred microseconds in which a VM
/// is paused, or a child starts.
pub(crate) struct BoostGuard(());

impl BoostGuard {
    pub(crate) fn new() -> Self {
        boost();
        Self(())
    }
}

impl Drop for BoostGuard {
    fn drop(&mut self) {
        unboost();
    }
}

fn given() -> i32 {
    // SAFETY: getpriority of the calling thread has no preconditions.
    GIVEN.with(|given| *given.get_or_init(|| unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }))
}

/// Sets slice and nice value of the calling thread. Returns whether the scheduler took both.
fn set(slice_ns: u64, nice: i32) -> bool {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        // A boosted thread creates a child's vCPU threads, which must not be boosted themselves.
        sched_flags: if slice_ns > 0 { libc::SCHED_FLAG_RESET_ON_FORK as u64 } else { 0 },
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: slice_ns,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: `attr` is a valid sched_attr that says its own size; 0 is the calling thread.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if rc != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), nice, "the scheduler does not take a slice");
    }
    rc == 0
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
            assert_eq!(made.join().unwrap(), (before.max(0), before.max(0)));
            drop(boost);
            assert_eq!(nice(), before);
            if inside == before {
                println!("skipped: without CAP_SYS_NICE no weight changes");
            }
            assert!(inside == BOOST_NICE || inside == before);
        })
        .join()
        .unwrap();
    }
}
