//! Descriptors registered with the runtime.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A pipe, a terminal, or another pollable descriptor.
pub(crate) type Stream = AsyncFd<OwnedFd>;

/// Registers a descriptor with the runtime, and makes it non-blocking.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<Stream> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives, and the `AsyncFd` owns
    // it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
