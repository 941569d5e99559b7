//! Real-time priority of another thread, for a short time.
//!
//! The fair scheduler owes nothing to a thread that has used up its share: it waits, whatever its
//! weight and slice, until the others have had theirs. A thread under SCHED_FIFO runs at once. It
//! keeps its processor for as long as it wants one, so whoever sets the policy takes it back.
//!
//! Setting it needs CAP_SYS_NICE. A thread may always take it back from itself.

use std::io;

/// Threads that the thread creates are under the default policy and slice, with no nice value below 0.
pub(crate) const RESET_ON_FORK: u64 = libc::SCHED_FLAG_RESET_ON_FORK as u64;

/// Returns whether the calling thread is a real-time thread.
pub(crate) fn is_realtime() -> bool {
    // SAFETY: sched_getscheduler of the calling thread has no preconditions.
    let policy = unsafe { libc::sched_getscheduler(0) };
    policy >= 0 && policy & !libc::SCHED_RESET_ON_FORK != libc::SCHED_OTHER
}

/// How a thread was scheduled when this was read.
#[derive(Clone, Copy, Debug)]
pub struct Scheduling(pub(crate) libc::sched_attr);

impl Scheduling {
    /// Reads the scheduling of thread `tid`. 0 is the calling thread.
    ///
    /// # Errors
    /// Those of sched_getattr: ESRCH for a thread that has ended.
    pub fn of(tid: u32) -> io::Result<Self> {
        let size = size_of::<libc::sched_attr>() as u32;
        // SAFETY: zeros are valid for these numbers.
        let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
        // SAFETY: `attr` has room for `size` bytes.
        match unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, size, 0) } {
            0 => Ok(Self(attr)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns whether the thread was under the default policy, with no positive nice value: nobody
    /// had chosen another priority for it.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.0.sched_policy == libc::SCHED_OTHER as u32 && self.0.sched_nice <= 0
    }

    /// Returns whether [`Scheduling::raise`] has made the thread a real-time thread of one of
    /// `priorities`, as far as that shows.
    #[must_use]
    pub fn is_raised(&self, priorities: &[u32]) -> bool {
        self.0.sched_policy == libc::SCHED_FIFO as u32
            && self.0.sched_flags & RESET_ON_FORK != 0
            && priorities.contains(&self.0.sched_priority)
    }

    /// Returns the same without real-time priority: the default of threads.
    #[must_use]
    pub fn without_raise(&self) -> Self {
        let default = libc::sched_attr {
            sched_policy: libc::SCHED_OTHER as u32,
            sched_flags: 0,
            sched_nice: 0,
            sched_priority: 0,
            sched_runtime: 0,
            ..self.0
        };
        Self(default)
    }

    /// Returns whether nobody, the thread included, had chosen any priority for it.
    #[must_use]
    pub fn is_ordinary(&self) -> bool {
        self.is_default() && self.0.sched_nice == 0
    }

    /// Makes thread `tid`, which is scheduled like this, a real-time thread of `priority`.
    ///
    /// # Errors
    /// Those of sched_setattr: EPERM without CAP_SYS_NICE.
    pub fn raise(&self, tid: u32, priority: u32) -> io::Result<()> {
        let attr = libc::sched_attr {
            sched_policy: libc::SCHED_FIFO as u32,
            sched_flags: RESET_ON_FORK,
            sched_nice: 0,
            sched_priority: priority,
            sched_runtime: 0,
            ..self.0
        };
        set(tid, &attr)
    }

    /// Schedules thread `tid` like this again, if [`Scheduling::raise`] has given it one of `priorities`:
    /// a thread that has left them has chosen for itself.
    ///
    /// # Errors
    /// Those of the two system calls.
    pub fn give_back(&self, tid: u32, priorities: &[u32]) -> io::Result<()> {
        if !Self::of(tid)?.is_raised(priorities) {
            return Ok(());
        }
        // Without CAP_SYS_NICE the flag stays once it is set. It changes nothing for an ordinary thread.
        let kept = libc::sched_attr { sched_flags: self.0.sched_flags | RESET_ON_FORK, ..self.0 };
        set(tid, &self.0).or_else(|_| set(tid, &kept))
    }
}

/// Sets all of `attr` for thread `tid`, or nothing. 0 is the calling thread.
pub(crate) fn set(tid: u32, attr: &libc::sched_attr) -> io::Result<()> {
    let attr = libc::sched_attr { size: size_of::<libc::sched_attr>() as u32, ..*attr };
    // SAFETY: `attr` is a valid sched_attr that contains its own size.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attr, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sched::{BoostGuard, ParkGuard, boost, unboost};

    /// Runs `body` on a thread of its own, with a real-time priority, if this process may set one.
    fn as_realtime(body: impl FnOnce(Scheduling) + Send + 'static) {
        std::thread::spawn(|| {
            let before = Scheduling::of(0).unwrap();
            match before.raise(0, 1) {
                Ok(()) if before.is_default() => body(before),
                Ok(()) => clade_test_support::skipped("the tests have another priority"),
                Err(error) => clade_test_support::skipped(&format!("no real-time priority: {error}")),
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_boost_of_a_realtime_thread_changes_nothing_and_a_vcpu_is_like_any_other_after_it() {
        as_realtime(|before| {
            let guard = BoostGuard::new();
            assert!(is_realtime(), "the boost has ended the real-time priority");
            drop(guard);
            assert!(is_realtime(), "the end of the boost has ended the real-time priority");
            let guard = ParkGuard::new();
            assert!(is_realtime(), "the park has ended the real-time priority");
            drop(guard);
            assert!(!is_realtime());
            let after = Scheduling::of(0).unwrap();
            assert_eq!((after.0.sched_nice, after.0.sched_policy), (before.0.sched_nice, before.0.sched_policy));
        });
    }

    #[test]
    fn a_realtime_thread_has_the_shortest_slice_for_its_start() {
        use crate::sched::{set_slice, unboost_to_start};
        let of_this = || Scheduling::of(0).unwrap().0;
        as_realtime(move |_| {
            set_slice(std::time::Duration::from_millis(5));
            assert!(unboost_to_start());
            assert!(!is_realtime());
            let starts = of_this().sched_runtime;
            assert!(!unboost_to_start(), "it is like any other by now");
            let after = of_this().sched_runtime;
            boost();
            // Older kernels have no slices.
            assert_eq!(starts, of_this().sched_runtime);
            assert!(starts < 5_000_000 && (after == 5_000_000 || after == starts), "{starts} {after}");
        });
    }

    #[test]
    fn threads_of_a_realtime_thread_are_like_any_other() {
        as_realtime(|_| {
            assert!(is_realtime());
            let made = std::thread::spawn(is_realtime).join().unwrap();
            assert!(!made);
        });
    }

    #[test]
    fn what_a_thread_has_chosen_since_is_left() {
        as_realtime(|before| {
            unboost();
            boost();
            let chosen = Scheduling::of(0).unwrap().0.sched_runtime;
            before.give_back(0, &[1, 2]).unwrap();
            assert_eq!(Scheduling::of(0).unwrap().0.sched_runtime, chosen);
            unboost();
            before.raise(0, 2).unwrap();
            before.give_back(0, &[1, 2]).unwrap();
            let after = Scheduling::of(0).unwrap().0;
            assert_eq!((after.sched_policy, after.sched_nice), (before.0.sched_policy, before.0.sched_nice));
        });
    }

    #[test]
    fn a_thread_that_does_not_exist_is_an_error() {
        assert_eq!(Scheduling::of(u32::MAX >> 1).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn a_realtime_thread_is_not_scheduled_by_default() {
        as_realtime(|before| {
            assert!(before.is_default());
            assert!(!before.is_raised(&[1]));
            let now = Scheduling::of(0).unwrap();
            assert!(!now.is_default());
            assert!(now.is_raised(&[1, 2]));
            assert!(!now.is_raised(&[2]));
            now.without_raise().give_back(0, &[2]).unwrap();
            assert!(is_realtime(), "it has another priority");
            now.without_raise().give_back(0, &[1, 2]).unwrap();
            assert!(Scheduling::of(0).unwrap().is_ordinary());
        });
    }

    #[test]
    fn without_privileges_a_thread_gives_its_priority_back() {
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
        as_realtime(|before| {
            let none = CapabilitySet::empty();
            // Applies to this thread alone.
            set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
            before.give_back(0, &[1]).unwrap();
            assert!(!is_realtime());
        });
    }
}
