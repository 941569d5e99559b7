//! The progress of a save, and its cancellation.

use crate::error::Error;

/// Progress of a save, and its cancellation.
#[derive(Clone, Copy)]
pub struct SaveProgress<'a> {
    /// Called on the saving thread with the bytes done and the most bytes to do. Bytes that turn
    /// out to be zeros count as done.
    pub progress: &'a dyn Fn(u64, u64),
    /// Returns whether the save is cancelled. Called after each write, and last right before the snapshot is put in
    /// its place.
    pub is_cancelled: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for SaveProgress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SaveProgress").finish_non_exhaustive()
    }
}

impl SaveProgress<'static> {
    /// Without progress and cancellation.
    #[must_use]
    pub fn none() -> Self {
        Self { progress: &|_, _| {}, is_cancelled: &|| false }
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
        if (self.watch.is_cancelled)() { Err(Error::Cancelled) } else { Ok(()) }
    }
}
