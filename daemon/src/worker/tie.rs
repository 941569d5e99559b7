//! VMs that end with the process that supervises them.
//!
//! Their processes get a pidfd, and end when it reports the end of the supervisor. The tie does not
//! depend on the process that forked them: a zygote may be killed and replaced. Workers share the
//! pidfd, and none can write to it: the reader of a pipe could open that for writing.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

/// The exit code of a process that has ended with another, as if killed by that.
const EXIT_CODE: i32 = 128 + libc::SIGKILL;

/// Ends this process as soon as `process` has ended, whatever code runs.
pub(super) fn end_with(process: OwnedFd, runtime: &Handle) -> io::Result<()> {
    let _within = runtime.enter();
    // SAFETY: an owned descriptor stays the same one, and open, until it is dropped.
    let process = unsafe { AsyncFd::register(process) }?;
    runtime.spawn(async move {
        // Without a readiness event the end would never be noticed.
        if let Err(error) = process.readable().await {
            tracing::error!(%error, "the process that this one ends with cannot be watched");
        }
        std::process::exit(EXIT_CODE);
    });
    Ok(())
}
