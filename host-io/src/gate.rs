//! Operations that tests hold in the kernel.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Holds the operations submitted during its lifetime on files in a directory, until it is opened
/// or dropped. Cancellation works on them as on all others.
#[derive(Debug)]
pub struct Gate {
    dir: PathBuf,
    event: Arc<EventFd>,
}

type Gates = Vec<(PathBuf, Arc<EventFd>)>;

fn gates() -> MutexGuard<'static, Gates> {
    static GATES: Mutex<Gates> = Mutex::new(Vec::new());
    GATES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Holds operations submitted from now on for files below `dir`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn close(dir: &Path) -> io::Result<Self> {
        let event = Arc::new(crate::eventfd()?);
        gates().push((dir.to_owned(), Arc::clone(&event)));
        Ok(Self { dir: dir.to_owned(), event })
    }

    /// Releases the operations, and later ones.
    pub fn open(&self) {
        gates().retain(|(_, event)| !Arc::ptr_eq(event, &self.event));
        // Readable from now on, because there are no readers. A saturated counter is readable, too.
        let _ = self.event.write(1);
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

/// The gate of an operation, which keeps its descriptor open.
#[derive(Clone, Debug)]
pub(crate) struct Held(Arc<EventFd>);

impl Held {
    /// The newest gate that holds operations on the file at `path`.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        gates().iter().rev().find(|(dir, _)| path.starts_with(dir)).map(|(_, event)| Self(Arc::clone(event)))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
