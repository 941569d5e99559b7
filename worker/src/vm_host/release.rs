//! Tracks when a VM has released all its resources.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clade_api::NameClaim;

/// Whether a VM has resources: from when it is made until the last value that it drops.
#[derive(Debug, Default)]
pub(super) struct ResourceUse(Mutex<bool>, Condvar);

impl ResourceUse {
    fn in_use(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits up to `timeout`. Returns whether everything has been released.
    pub(super) fn wait_for_none(&self, timeout: Duration) -> bool {
        let waited = self.1.wait_timeout_while(self.in_use(), timeout, |in_use| *in_use);
        !*waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Dropped by a VM after everything else, in this order: its name, then the mark that it is in use.
#[derive(Debug)]
pub(super) struct ReleaseOnDrop {
    _claim: NameClaim,
    _in_use: UntilDropped,
}

impl ReleaseOnDrop {
    pub(super) fn new(claim: NameClaim, in_use: &Arc<ResourceUse>) -> Self {
        *in_use.in_use() = true;
        Self { _claim: claim, _in_use: UntilDropped(Arc::clone(in_use)) }
    }
}

#[derive(Debug)]
struct UntilDropped(Arc<ResourceUse>);

impl Drop for UntilDropped {
    fn drop(&mut self) {
        *self.0.in_use() = false;
        self.0.1.notify_all();
    }
}
