//! Reasons why pages of guest memory will never be there, and who learns of them.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// The reason why a layer was never finished.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FillError {
    /// Memory for a page ran out, or the page could not be read.
    #[error("{range} of the frozen VM could not be copied into the layer", range = crate::units::PageRange::with_len(*.page, *.pages))]
    Copy {
        /// First page, of the layer's file.
        page: u64,
        /// Number of pages.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The frozen VM's copied pages could not be made writable again.
    #[error("copied pages could not be released")]
    Release(#[source] io::Error),
    /// The thread that copies panicked.
    #[error("the thread that copies in the background panicked")]
    Panic,
    /// A file behind guest memory was truncated, or cannot be read.
    #[error("a page of guest memory is gone: the file it is mapped from was cut short, or cannot be read")]
    Gone,
    /// The kernel removed pages to map others in their place, and failed.
    #[error("pages of guest memory are lost: the kernel has failed to map others in their place")]
    Unmapped,
    /// The userfaultfd no longer answers.
    #[error("the userfaultfd of the background freeze is lost")]
    Lost(#[source] io::Error),
}

type Callback = Box<dyn FnOnce(&Arc<FillError>) + Send>;

/// Whether a VM's memory is lost, and the callbacks for it.
#[derive(Default)]
pub(crate) struct LostMemory(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    error: Option<Arc<FillError>>,
    callbacks: Vec<Callback>,
}

impl LostMemory {
    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn get(&self) -> Option<Arc<FillError>> {
        self.with(|inner| inner.error.clone())
    }

    /// Records an error; the first one is kept.
    pub(crate) fn set(&self, error: &Arc<FillError>) {
        self.with(|inner| {
            inner.error.get_or_insert_with(|| Arc::clone(error));
        });
    }

    /// Runs the callbacks. No lock may be held.
    pub(crate) fn tell(&self) {
        let (error, callbacks) = self.with(|inner| (inner.error.clone(), std::mem::take(&mut inner.callbacks)));
        if let Some(error) = error {
            callbacks.into_iter().for_each(|call| call(&error));
        }
    }

    /// Calls `call` when memory is lost, or now if it already is.
    pub(crate) fn on(&self, call: Callback) {
        let now = self.with(|inner| match &inner.error {
            Some(error) => Some((Arc::clone(error), call)),
            None => {
                inner.callbacks.push(call);
                None
            }
        });
        if let Some((error, call)) = now {
            call(&error);
        }
    }
}

impl fmt::Debug for LostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LostMemory({:?})", self.get())
    }
}
