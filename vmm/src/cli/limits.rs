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
