//! VMs that end with the process that supervises them.
//!
//! Their processes are handed a pidfd, and end when it says that its process has. Nothing depends on
//! who has forked them: a zygote may be killed and replaced. A pidfd, because workers share it, and
//! none can change what it says to the others: who has a pipe for reading can open it for writing.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

/// The exit code of a process that has ended with another: as if that had killed it.
const EXIT_CODE: i32 = 128 + libc::SIGKILL;

/// Ends this process as soon as `process` has ended, whatever it is doing.
pub(super) fn end_with(process: OwnedFd, runtime: &Handle) -> io::Result<()> {
    let _within = runtime.enter();
    // SAFETY: an owned descriptor stays the same one, and open, until it is dropped.
    let process = unsafe { AsyncFd::register(process) }?;
    runtime.spawn(async move {
        // Without an answer it would never be known.
        if let Err(error) = process.readable().await {
            tracing::error!(%error, "the process that this one ends with cannot be watched");
        }
        std::process::exit(EXIT_CODE);
    });
    Ok(())
}
