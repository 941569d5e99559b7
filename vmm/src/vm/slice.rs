//! How soon a waking thread gets a processor that others are busy on.
//!
//! Linux lets a running thread finish its slice (3 ms and more) before one that has just woken, unless that one has asked for a
//! shorter slice. A vCPU thread that waits to start is such a one: with its parent's vCPUs running on every processor, the
//! child's first instruction would come milliseconds late. Best effort: kernels before 6.12 do not look at it.

/// The shortest slice the scheduler takes.
const PROMPT_NS: u64 = 100_000;

/// The calling thread gets a processor soon after it wakes.
pub(crate) fn prompt() {
    set(PROMPT_NS);
}

/// The calling thread is scheduled like any other.
pub(crate) fn ordinary() {
    set(0);
}

/// The calling thread is scheduled promptly until this is dropped: for the few hundred microseconds in which a VM stands still, or is being
/// born.
pub(crate) struct Urgent(());

impl Urgent {
    pub(crate) fn new() -> Self {
        prompt();
        Self(())
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        ordinary();
    }
}

fn set(slice_ns: u64) {
    let mut attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: slice_ns,
        sched_deadline: 0,
        sched_period: 0,
    };
    // A thread keeps the nice value it was given.
    // SAFETY: getpriority of the calling thread has no preconditions.
    attr.sched_nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // SAFETY: `attr` is a valid sched_attr that says its own size; 0 is the calling thread.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if rc != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "the scheduler does not take a slice");
    }
}
