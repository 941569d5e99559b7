//! Descriptors that are waited for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A pipe, a terminal, or what else can be waited for.
pub(crate) type Stream = AsyncFd<OwnedFd>;

/// Has the runtime wait for a descriptor, which does not block from now on.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<Stream> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
