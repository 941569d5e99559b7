//! Plans: the failing operation on files, and the kind of failure.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use crate::files::{FileOp, FileVerdict};

/// Kind of failure of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Fails with this error, once.
    Errno(Errno),
    /// Fails, and so do all later operations: for the disk, the process is gone.
    Dead,
    /// The process is killed before the operation.
    Kill,
    /// A write or a read is done in part.
    Short,
    /// Reports a successful write without writing.
    Lie,
}

/// Called before an operation; its error is the operation's.
struct Hook(Box<Before>);

type Before = dyn Fn(FileOp, &Path) -> io::Result<()> + Send + Sync;

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// Counts operations, and makes one of them fail.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    hook: Option<Hook>,
    fault: Option<(u64, Fault)>,
    count: AtomicU64,
    trace: Mutex<Vec<(FileOp, PathBuf)>>,
    /// Maximum time to wait for a lock.
    pub(crate) lock_timeout: Option<Duration>,
}

impl Plan {
    /// Operation number `at` fails.
    pub(crate) fn new(at: u64, fault: Fault) -> Self {
        Self { fault: Some((at, fault)), ..Self::default() }
    }

    /// Before each operation `hook` is called.
    pub(crate) fn hooked(hook: impl Fn(FileOp, &Path) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { hook: Some(Hook(Box::new(hook))), ..Self::default() }
    }

    /// A lock that is not free is an error at once.
    pub(crate) fn impatient() -> Self {
        Self { lock_timeout: Some(Duration::ZERO), ..Self::default() }
    }

    /// The operations so far, in order.
    pub(crate) fn trace(&self) -> Vec<(FileOp, PathBuf)> {
        self.trace.lock().unwrap().clone()
    }

    /// The verdict on the next operation.
    pub(crate) fn decide(&self, op: FileOp, path: &Path) -> io::Result<FileVerdict> {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        self.trace.lock().unwrap().push((op, path.to_owned()));
        if let Some(Hook(hook)) = &self.hook {
            hook(op, path)?;
        }
        match self.fault {
            Some((at, Fault::Errno(errno))) if at == number => Err(errno.into()),
            Some((at, Fault::Dead)) if number >= at => Err(Errno::IO.into()),
            Some((at, Fault::Kill)) if at == number => {
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                // The process has ended at this point.
                Err(Errno::IO.into())
            }
            Some((at, Fault::Short)) if at == number => Ok(FileVerdict::Short),
            Some((at, Fault::Lie)) if at == number && op == FileOp::Write => Ok(FileVerdict::Lie),
            _ => Ok(FileVerdict::Go),
        }
    }
}
