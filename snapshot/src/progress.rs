//! The progress of a save, and its cancellation.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Error;

/// Progress of a save, and its cancellation.
#[derive(Clone, Copy)]
pub struct SaveProgress<'a> {
    /// Called on the saving thread with the bytes done and the most bytes to do. Bytes that turn
    /// out to be zeros count as done.
    pub progress: &'a dyn Fn(u64, u64),
    /// Any thread may set it to cancel the save.
    pub cancel: &'a AtomicBool,
}

impl std::fmt::Debug for SaveProgress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SaveProgress").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl SaveProgress<'static> {
    /// Without progress and cancellation.
    #[must_use]
    pub fn none() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self { progress: &|_, _| {}, cancel: &NEVER }
    }
}

/// Counts bytes for a [`SaveProgress`].
pub(crate) struct Meter<'a> {
    watch: &'a SaveProgress<'a>,
    done: &'a mut u64,
    total: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(watch: &'a SaveProgress<'a>, done: &'a mut u64, total: u64) -> Self {
        Self { watch, done, total }
    }

    /// The same meter, borrowed.
    pub(crate) fn part(&mut self) -> Meter<'_> {
        Meter { watch: self.watch, done: self.done, total: self.total }
    }

    /// Adds bytes done. Returns an error if the save was cancelled.
    pub(crate) fn add(&mut self, bytes: u64) -> Result<(), Error> {
        *self.done += bytes;
        (self.watch.progress)(*self.done, self.total);
        self.check()
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        // Relaxed: the flag guards no other data.
        if self.watch.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
