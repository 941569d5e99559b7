//! VMs that end with a command: those of its session.
//!
//! Their processes get a pidfd, and end when it reports the end of the command. This does not
//! depend on the processes between them: a zygote or a supervisor may be killed and replaced.
//! Workers share the pidfd, and none can write to it: the reader of a pipe could open that for
//! writing.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// The exit code of a process that has ended with another, as if killed by that.
pub const PARENT_DEATH_EXIT: i32 = 128 + libc::SIGKILL;

/// Ends this process with another, until this is dropped.
#[derive(Debug)]
pub struct ParentDeath(AbortHandle);

impl ParentDeath {
    /// Ends this process as soon as `process` has ended, whatever code runs.
    pub(super) fn watch(process: OwnedFd, runtime: &Handle) -> io::Result<Self> {
        let _within = runtime.enter();
        // SAFETY: an owned descriptor stays the same one, and open, until it is dropped.
        let process = unsafe { AsyncFd::register(process) }?;
        let watch = runtime.spawn(async move {
            // Without a readiness event the end would never be noticed.
            if let Err(error) = process.readable().await {
                tracing::error!(%error, "the process that this one ends with cannot be watched");
            }
            std::process::exit(PARENT_DEATH_EXIT);
        });
        Ok(Self(watch.abort_handle()))
    }
}

impl Drop for ParentDeath {
    fn drop(&mut self) {
        self.0.abort();
    }
}
