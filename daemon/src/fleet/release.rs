//! Tracks when a VM, or the whole fleet, has released all its resources.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::dir::NameClaim;

/// Whether a VM has released all its resources. Set by the last value that a VM drops.
#[derive(Debug, Default)]
pub(super) struct Release(Mutex<bool>, Condvar);

impl Release {
    /// Waits up to `timeout`. Returns whether it is released.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let released = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.1.wait_timeout_while(released, timeout, |released| !*released);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Counts the users of the fleet's devices and disks: VMs until they are dropped, listed or not,
/// and requests that make VMs.
#[derive(Debug, Default)]
pub(super) struct InUse(Mutex<usize>, Condvar);

impl InUse {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more, until it is dropped.
    pub(super) fn enter(self: &Arc<Self>) -> Use {
        *self.count() += 1;
        Use(Arc::clone(self))
    }

    /// Waits up to `timeout`. Returns whether there is no user.
    pub(super) fn wait_for_none(&self, timeout: Duration) -> bool {
        let waited = self.1.wait_timeout_while(self.count(), timeout, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
    }
}

/// A user counted by [`InUse`].
#[derive(Debug)]
pub(crate) struct Use(Arc<InUse>);

impl Drop for Use {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.1.notify_all();
    }
}

/// What a VM drops after everything else, in this order: its name, then [`Release`] is set, then
/// [`InUse`] counts down.
#[derive(Debug)]
pub(super) struct Tail {
    _claim: NameClaim,
    _release: ReleaseOnDrop,
    _in_use: Use,
}

impl Tail {
    pub(super) fn new(claim: NameClaim, release: &Arc<Release>, in_use: Use) -> Self {
        Self { _claim: claim, _release: ReleaseOnDrop(Arc::clone(release)), _in_use: in_use }
    }
}

#[derive(Debug)]
struct ReleaseOnDrop(Arc<Release>);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }
}
