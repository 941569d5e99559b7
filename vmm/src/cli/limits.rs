//! Limits of the process that many VMs in it would meet.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the number of open files to what is allowed: a VM has a handful of descriptors, a fork one a layer.
pub(crate) fn raise() {
    let now = getrlimit(Resource::Nofile);
    let most = Rlimit { current: now.maximum, maximum: now.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::debug!(%error, "the limit of open files stays {:?}", now.current);
    }
}

/// Has a closed pipe on standard output end the process without a word, as with other tools (`clade ps | head -1`). Not for
/// a process that runs VMs: they outlive their reader.
pub(crate) fn end_at_closed_pipes() {
    // SAFETY: SIG_DFL is a valid disposition, and no other thread has been started that could handle the signal.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
