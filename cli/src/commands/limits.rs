//! Process limits that many VMs would reach.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of open files to the hard limit. A VM has a handful of descriptors, a fork one
/// per layer.
pub(crate) fn raise() {
    let now = getrlimit(Resource::Nofile);
    let most = Rlimit { current: now.maximum, maximum: now.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::debug!(%error, "the limit of open files stays {:?}", now.current);
    }
}

/// Makes the allocator return large buffers to the kernel when they are freed. glibc's thresholds
/// grow with the sizes freed. From then on an arena keeps a snapshot's windows (12 MiB), and each
/// thread that saves may have its own arena.
#[cfg(target_env = "gnu")]
pub(crate) fn give_back_large_buffers() {
    const THRESHOLD: libc::c_int = 1 << 20;
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: the parameters are glibc's own, the value is in their range, and no other thread
        // has been started.
        if unsafe { libc::mallopt(parameter, THRESHOLD) } == 0 {
            tracing::debug!(parameter, "the allocator keeps its thresholds");
        }
    }
}

#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_back_large_buffers() {}

/// Makes all threads allocate from one arena. A worker's threads allocate little, and each arena
/// is private memory of each of a thousand workers.
#[cfg(target_env = "gnu")]
pub(crate) fn one_arena() {
    // SAFETY: the parameter is glibc's own, and no other thread has been started.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        tracing::debug!("each thread has an arena");
    }
}

#[cfg(not(target_env = "gnu"))]
pub(crate) fn one_arena() {}

/// Makes a closed pipe on standard output end the process silently, as in other tools (`clade ps |
/// head -1`). Not for a process that runs VMs: they outlive their reader.
pub(crate) fn end_at_closed_pipes() {
    // SAFETY: SIG_DFL is a valid disposition, and no other thread has been started that could
    // handle the signal.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Closes the descriptors that a zygote was started with, except for its standard streams: its workers would hold
/// whatever the supervisor was started with.
pub(super) fn close_inherited_descriptors() {
    // SAFETY: the process has opened no descriptor so far that anything refers to.
    let done = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if done != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "inherited descriptors stay open in all workers");
    }
}

/// Has processes that this one starts get no descriptor that this one was started with: a lock or a
/// pipe of a shell would live as long as they do.
pub(super) fn keep_descriptors_from_children() {
    // SAFETY: this sets a flag of descriptors, and closes none.
    let done = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    if done != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "descriptors are not kept from the supervisor");
    }
}
