//! Writes to a file that the system has failed to write back.
//!
//! The kernel takes the pages of a failed writeback for written: a later read may show older bytes. It reports the
//! failure once to each open file that was open by then, and to the first that is opened later. So a loss is noted here,
//! and goes with the file to other processes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether writes to a file are known to be lost.
#[derive(Debug, Default)]
pub(crate) struct LostWrites(AtomicBool);

impl LostWrites {
    /// Returns whether a loss is known.
    pub(crate) fn is_known(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn note(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Asks the kernel for a failure that this open file has not reported yet.
    pub(crate) fn check(&self, file: &File) -> bool {
        // The wait for a range behind all data awaits no page, and reports the error like a sync.
        // SAFETY: the call has no pointers.
        let found =
            unsafe { libc::sync_file_range(file.as_raw_fd(), i64::MAX - 1, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
        let is_lost = found < 0 && is_loss(&io::Error::last_os_error());
        if is_lost {
            self.note();
        }
        is_lost
    }
}

/// Whether the error is of a writeback. The others are of files without a writeback.
fn is_loss(error: &io::Error) -> bool {
    let none = [libc::EINVAL, libc::ESPIPE, libc::ENOSYS, libc::EPERM, libc::EINTR];
    error.raw_os_error().is_some_and(|errno| !none.contains(&errno))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{CachePolicy, IoFile};

    /// A block device whose writes fail from some instant on: a loop device on memory that is sealed.
    struct Failing {
        memory: File,
        device: File,
        path: PathBuf,
    }

    /// `LOOP_CTL_GET_FREE`, `LOOP_SET_FD` and `LOOP_CLR_FD`.
    const GET_FREE: libc::Ioctl = 0x4c82;
    const SET_FD: libc::Ioctl = 0x4c00;
    const CLR_FD: libc::Ioctl = 0x4c01;

    impl Failing {
        fn new() -> io::Result<Self> {
            let flags = rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC;
            let memory = File::from(rustix::fs::memfd_create("failing", flags)?);
            memory.set_len(1 << 20)?;
            let control = File::options().read(true).write(true).open("/dev/loop-control")?;
            // Another process may take the number that is free now.
            for _ in 0..32 {
                // SAFETY: the call has no pointers.
                let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) };
                let path = PathBuf::from(format!("/dev/loop{number}"));
                let device = File::options().read(true).write(true).open(&path)?;
                // SAFETY: LOOP_SET_FD takes a descriptor.
                if unsafe { libc::ioctl(device.as_raw_fd(), SET_FD, memory.as_raw_fd()) } == 0 {
                    return Ok(Self { memory, device, path });
                }
            }
            Err(io::Error::last_os_error())
        }

        fn fail(&self) {
            rustix::fs::fcntl_add_seals(&self.memory, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
        }
    }

    impl Drop for Failing {
        fn drop(&mut self) {
            // SAFETY: the call has no pointers.
            unsafe { libc::ioctl(self.device.as_raw_fd(), CLR_FD) };
        }
    }

    #[test]
    fn a_loss_that_another_open_file_has_reported_is_found_once_and_remembered() {
        let failing = match Failing::new() {
            Ok(failing) => failing,
            Err(error) => return clade_test_support::skipped(&format!("no loop device: {error}")),
        };
        let disk = IoFile::open(&failing.path, true, CachePolicy::Host).unwrap();
        disk.write_now(&[1; 4096], 0).unwrap();
        disk.sync_now().unwrap();
        assert!(!disk.has_lost_writes());
        disk.write_now(&[2; 4096], 0).unwrap();
        assert!(!disk.has_lost_writes(), "the kernel has not written it yet");
        failing.fail();
        // As a copy does.
        let opened = || IoFile::read_only(File::open(&failing.path).unwrap(), &failing.path, CachePolicy::Host);
        opened().sync_now().unwrap_err();
        opened().sync_now().unwrap();
        assert!(!opened().has_lost_writes(), "it was opened too late");
        assert!(disk.has_lost_writes());
        disk.sync_now().unwrap();
        assert!(disk.has_lost_writes() && disk.for_another_process().unwrap().has_lost_writes());
    }

    #[test]
    fn a_loss_is_known_to_the_files_for_other_processes() {
        let dir = tempfile::tempdir().unwrap();
        let file = IoFile::unnamed(dir.path(), 4096, CachePolicy::Host).unwrap();
        file.write_now(&[7; 4096], 0).unwrap();
        assert!(!file.has_lost_writes() && !file.for_another_process().unwrap().knows_lost_writes());
        file.note_lost_writes();
        let again = file.for_another_process().unwrap();
        assert!(file.has_lost_writes() && again.knows_lost_writes());
        assert!(again.for_another_process().unwrap().knows_lost_writes());
    }
}
