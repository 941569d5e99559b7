//! Sweeps at the worst moments, for tests: after every change of the registry of views or of a base
//! file's state, on the thread that makes the change.

use std::cell::Cell;

use crate::layer::registry::Views;

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
    static SWEEPS: Cell<u64> = const { Cell::new(0) };
}

/// While it lives, this thread sweeps at each such moment.
pub(crate) struct Restless(());

impl Restless {
    pub(crate) fn begin() -> Self {
        SWEEPS.set(0);
        ARMED.set(true);
        Self(())
    }

    /// Sweeps so far.
    pub(crate) fn sweeps(&self) -> u64 {
        SWEEPS.get()
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        ARMED.set(false);
    }
}

/// Called after a change to state that a sweep reads.
pub(crate) fn moment(views: &Views) {
    // A sweep may drop layers, which drops views.
    if ARMED.get() && !BUSY.replace(true) {
        super::sweep(views);
        SWEEPS.set(SWEEPS.get() + 1);
        BUSY.set(false);
    }
}
