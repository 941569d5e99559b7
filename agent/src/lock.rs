//! Locks of the agent.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, even after a panic: no change of the data can panic half-way.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
