//! Whether a file is open, by a lease.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// `F_SETSIG` of fcntl(2), which the library has for glibc alone.
const F_SETSIG: libc::c_int = 10;

/// How often an open file is looked at, in 2 s in all. The kernel closes the files of an io_uring in a worker of its
/// own, after the process that used them can be waited for.
const LOOKS: u32 = 100;
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Whether any other process has the file open, and keeps it open.
pub(crate) fn stays_open(path: &Path) -> bool {
    for _ in 0..LOOKS {
        if !is_open(path) {
            return false;
        }
        thread::sleep(LOOK_INTERVAL);
    }
    is_open(path)
}

/// Whether any other process has the file open.
fn is_open(path: &Path) -> bool {
    // Without a disk there is no user.
    let Ok(file) = File::open(path) else { return false };
    // Without leases on the file system, the use is unknown; open files then stay intact for their
    // users.
    lease(&file).is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

/// Takes a write lease, which the kernel grants only to the sole opener, until `file` is closed. A process that opens
/// the file meanwhile waits, and the kernel sends a signal here: one that is ignored by default, unlike SIGIO.
fn lease(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is, and the other arguments of the call are numbers.
    let set = |command, to: libc::c_int| match unsafe { libc::fcntl(file.as_raw_fd(), command, to) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    set(F_SETSIG, libc::SIGURG)?;
    set(libc::F_SETLEASE, libc::F_WRLCK)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    /// The default action of SIGIO is to end the process.
    #[test]
    fn an_open_of_a_leased_file_ends_no_process() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(is_open(file.path()), "this test has it open");
        let path = file.into_temp_path();
        assert!(!is_open(&path));
        let leased = File::open(&path).unwrap();
        lease(&leased).unwrap();
        let open = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        assert_eq!(open.unwrap_err().raw_os_error(), Some(libc::EWOULDBLOCK), "the lease is broken");
        drop(leased);
        assert!(!is_open(&path));
    }

    /// What the files of an io_uring do after the end of their process.
    #[test]
    fn a_file_that_is_closed_soon_does_not_stay_open() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let user = File::open(&path).unwrap();
        assert!(is_open(&path));
        let closes = thread::spawn(move || {
            thread::sleep(LOOK_INTERVAL);
            drop(user);
        });
        assert!(!stays_open(&path));
        closes.join().unwrap();
    }
}
