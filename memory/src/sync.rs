//! The atomics and locks of the ownership protocol, replaced by loom's for its models and by
//! shuttle's for its schedules.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::OnceLock;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Locks and flags of whole regions: real under loom, scheduled under shuttle.
pub(crate) mod whole {
    #[cfg(shuttle)]
    pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic::AtomicBool};
    #[cfg(not(shuttle))]
    pub(crate) use std::sync::{Mutex, MutexGuard, atomic::AtomicBool};
}

/// A point between two system calls where another thread may run.
#[cfg(test)]
pub(crate) fn step() {
    #[cfg(shuttle)]
    shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
}

/// Locks `mutex`. After a panic under the lock, the guarded data is as of the last completed step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(loom)]
use loom::sync::atomic::AtomicBool as Flag;
#[cfg(shuttle)]
use shuttle::sync::atomic::AtomicBool as Flag;

/// Replacement of `std`'s `OnceLock`, with a flag that the model sees. Filled under a lock.
#[cfg(any(loom, shuttle))]
#[derive(Debug)]
pub(crate) struct OnceLock<T> {
    is_full: Flag,
    value: std::sync::OnceLock<T>,
}

#[cfg(any(loom, shuttle))]
impl<T> OnceLock<T> {
    pub(crate) fn new() -> Self {
        Self { is_full: Flag::new(false), value: std::sync::OnceLock::new() }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.is_full.load(Ordering::Acquire).then(|| self.value.get()).flatten()
    }

    pub(crate) fn get_or_init(&self, fill: impl FnOnce() -> T) -> &T {
        let value = self.value.get_or_init(fill);
        self.is_full.store(true, Ordering::Release);
        value
    }
}
