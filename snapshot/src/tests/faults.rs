//! Plans: which operation on files fails, and how.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use crate::files::{Op, Verdict};

/// How an operation goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It fails with this, once.
    Errno(Errno),
    /// It, and every one after it, fails: the process is gone, as far as the disk knows.
    Dead,
    /// The process is killed before it.
    Kill,
    /// Only some of it is done, if it is a write or a read.
    Short,
    /// Reports a successful write without writing.
    Lie,
}

/// Called before an operation; its error is the operation's.
struct Hook(Box<Before>);

type Before = dyn Fn(Op, &Path) -> io::Result<()> + Send + Sync;

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// Numbers operations, and lets one go wrong.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    hook: Option<Hook>,
    fault: Option<(u64, Fault)>,
    count: AtomicU64,
    trace: Mutex<Vec<(Op, PathBuf)>>,
    /// How long locks are waited for.
    pub(crate) lock_timeout: Option<Duration>,
}

impl Plan {
    /// Operation number `at` goes wrong.
    pub(crate) fn new(at: u64, fault: Fault) -> Self {
        Self { fault: Some((at, fault)), ..Self::default() }
    }

    /// Before each operation `hook` is called.
    pub(crate) fn hooked(hook: impl Fn(Op, &Path) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { hook: Some(Hook(Box::new(hook))), ..Self::default() }
    }

    /// A lock that is not free is an error at once.
    pub(crate) fn impatient() -> Self {
        Self { lock_timeout: Some(Duration::ZERO), ..Self::default() }
    }

    /// The operations so far, in order.
    pub(crate) fn trace(&self) -> Vec<(Op, PathBuf)> {
        self.trace.lock().unwrap().clone()
    }

    /// The verdict on the next operation.
    pub(crate) fn decide(&self, op: Op, path: &Path) -> io::Result<Verdict> {
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
            Some((at, Fault::Short)) if at == number => Ok(Verdict::Short),
            Some((at, Fault::Lie)) if at == number && op == Op::Write => Ok(Verdict::Lie),
            _ => Ok(Verdict::Go),
        }
    }
}
