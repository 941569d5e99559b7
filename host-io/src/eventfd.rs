//! Eventfds.

use std::io;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A non-blocking eventfd, closed by `exec`: no program that this process starts inherits it.
///
/// # Errors
/// When no descriptor is left.
#[expect(clippy::disallowed_methods, reason = "this passes the flag that others forget")]
pub fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{OFlags, fcntl_getfl};
    use rustix::io::{FdFlags, fcntl_getfd};
    use std::os::fd::{AsRawFd, BorrowedFd};

    #[test]
    fn an_eventfd_is_closed_by_exec_and_does_not_block() {
        let event = super::eventfd().unwrap();
        // SAFETY: `event` keeps the descriptor open as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        assert_eq!(fcntl_getfd(fd).unwrap(), FdFlags::CLOEXEC);
        assert!(fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
}
