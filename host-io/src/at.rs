//! Files by their directory's descriptor: it stays the same directory when it is renamed.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, copy_file_range, fchmod, linkat, openat};
use rustix::io::Errno;

use crate::file::{FileError, IoFile, read_only_again};
use crate::handles::{CachePolicy, Handles};
use crate::overlay_pool::OverlayPool;

impl IoFile {
    /// Opens an empty unnamed file of `len` bytes in `dir`, freed with its last handle. `path` is
    /// the directory's path in messages.
    ///
    /// # Errors
    /// When the directory's file system has no unnamed files, or no room.
    pub fn unnamed_in(dir: BorrowedFd<'_>, path: &Path, len: u64, policy: CachePolicy) -> Result<Self, FileError> {
        let failed = |what| move |source: std::io::Error| FileError { path: path.to_owned(), what, source };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = openat(dir, ".", flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed("given an unnamed file")(error.into()))?;
        let cached = File::from(fd);
        cached.set_len(len).map_err(failed("given a file of the disk's size"))?;
        Ok(Self::new(path, Arc::new(Handles::new(cached, true, policy, path)), true, false, false))
    }

    /// As [`IoFile::unnamed_in`], but takes a file from `pool` if it has one, **with arbitrary
    /// content**: the caller must read only bytes that it has written. The file returns to the pool
    /// when it is dropped. All files of one pool must be made with the same arguments.
    ///
    /// # Errors
    /// As [`IoFile::unnamed_in`].
    pub fn reused_in(
        pool: &Arc<OverlayPool>,
        dir: BorrowedFd<'_>,
        path: &Path,
        len: u64,
        policy: CachePolicy,
    ) -> Result<Self, FileError> {
        let mut file = match pool.take() {
            Some(handles) => Self::new(path, handles, true, false, false),
            None => Self::unnamed_in(dir, path, len, policy)?,
        };
        file.pool = Some(Arc::clone(pool));
        Ok(file)
    }

    /// Wraps a named file that is open for reading and writing, without locking it.
    #[must_use]
    pub fn read_write(cached: File, path: &Path, policy: CachePolicy) -> Self {
        Self::new(path, Arc::new(Handles::new(cached, true, policy, path)), true, true, false)
    }

    /// Locks it against other processes, as [`IoFile::open`] does.
    ///
    /// # Errors
    /// When another process has locked it.
    pub fn try_lock(&self) -> std::io::Result<()> {
        let lock = read_only_again(&self.handles.cached)?;
        lock.try_lock()?;
        // An existing lock is kept.
        let _ = self.lock.set(lock);
        Ok(())
    }

    /// Prevents further opens for writing, by this process too: only the existing descriptors can
    /// write. For unnamed files whose descriptors go to other processes.
    ///
    /// # Errors
    /// When its mode cannot be changed.
    pub fn forbid_writers(&self) -> std::io::Result<()> {
        Ok(fchmod(&self.handles.cached, Mode::RUSR)?)
    }

    /// Another descriptor of the same open file.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> std::io::Result<File> {
        self.handles.cached.try_clone()
    }

    /// Gives an unnamed file the name `name` in `dir`; `path` is the directory's path in messages.
    /// Until its last handle is closed it is used as before ([`IoFile::is_named`]). It stays after
    /// the process, and never returns to a pool.
    ///
    /// # Errors
    /// When the directory is on another file system, the name is taken, or the kernel does not
    /// support it.
    pub fn link_in(&self, dir: BorrowedFd<'_>, name: &str, path: &Path) -> Result<(), FileError> {
        // Set first: the file may have the name even if the call has failed.
        self.linked.store(true, Ordering::Release);
        let same = format!("/proc/self/fd/{}", self.handles.cached.as_raw_fd());
        linkat(CWD, same, dir, name, AtFlags::SYMLINK_FOLLOW).map_err(|error| FileError {
            path: path.to_owned(),
            what: "linked",
            source: error.into(),
        })
    }
}

/// Bytes that are copied at once where the kernel does not copy.
const CHUNK: usize = 1 << 20;

/// An unnamed file that is filled from others, and then only read. It cannot be opened for writing
/// again, not even by its owner: no process but this one ever writes it.
#[derive(Debug)]
pub struct UnnamedCopy {
    file: File,
    /// The directory, for messages.
    path: PathBuf,
}

impl UnnamedCopy {
    /// Makes an empty file of `len` bytes in `dir`, whose path is `path`.
    ///
    /// # Errors
    /// When the directory's file system has no unnamed files, or no room.
    pub fn new_in(dir: BorrowedFd<'_>, path: &Path, len: u64) -> Result<Self, FileError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let copy = |file| Self { file, path: path.to_owned() };
        let opened = openat(dir, ".", flags, Mode::RUSR);
        let opened = opened.map_err(|errno| failed(path, "given an unnamed file", errno.into()))?;
        let made = copy(File::from(opened));
        made.file.set_len(len).map_err(|error| made.failed("given a file of the disk's size", error))?;
        Ok(made)
    }

    /// Copies `range` of `from` to the same offsets, except for holes. File systems with reflinks copy no
    /// data. Returns the bytes copied.
    ///
    /// # Errors
    /// When a file ends within the range, or a system call fails.
    pub fn copy_from(&self, from: &IoFile, range: Range<u64>) -> Result<u64, FileError> {
        let size = from.size()?;
        if size < range.end {
            return Err(from.failed("read", std::io::ErrorKind::UnexpectedEof.into()));
        }
        let (mut at, mut copied) = (range.start, 0);
        while at < range.end {
            let Some(data) = from.next_data(at)?.filter(|data| *data < range.end) else { break };
            let hole = from.next_hole(data)?.min(range.end);
            self.copy_data(from, data..hole)?;
            copied += hole - data;
            at = hole;
        }
        Ok(copied)
    }

    fn copy_data(&self, from: &IoFile, range: Range<u64>) -> Result<(), FileError> {
        let (mut from_at, mut to_at) = (range.start, range.start);
        while to_at < range.end {
            let left = (range.end - to_at) as usize;
            match copy_file_range(from, Some(&mut from_at), &self.file, Some(&mut to_at), left) {
                Ok(0) => return Err(from.failed("read", std::io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                // Files of two file systems, or of one that cannot.
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    let mut bytes = vec![0; left.min(CHUNK)];
                    from.read_now(&mut bytes, to_at)?;
                    self.file.write_all_at(&bytes, to_at).map_err(|error| self.failed("written", error))?;
                    to_at += bytes.len() as u64;
                    from_at = to_at;
                }
                Err(errno) => return Err(self.failed("given a copy", errno.into())),
            }
        }
        Ok(())
    }

    /// Makes the copy durable, and opens it for reading.
    ///
    /// # Errors
    /// When a write is lost, or the file cannot be opened again (procfs is needed).
    pub fn finish(self, policy: CachePolicy) -> Result<IoFile, FileError> {
        // The system reports a lost write here, or never.
        self.file.sync_data().map_err(|error| self.failed("made durable", error))?;
        let reader = read_only_again(&self.file).map_err(|error| self.failed("opened for reading", error))?;
        Ok(IoFile::read_only(reader, &self.path, policy))
    }

    fn failed(&self, what: &'static str, source: std::io::Error) -> FileError {
        failed(&self.path, what, source)
    }
}

fn failed(path: &Path, what: &'static str, source: std::io::Error) -> FileError {
    FileError { path: path.to_owned(), what, source }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Within a file system the kernel copies, and between two it does not.
    #[test]
    fn a_copy_has_the_range_of_its_source_on_any_file_system() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm"));
        let path = here.path().join("file");
        let source = File::create(&path).unwrap();
        source.set_len(5 << 20).unwrap();
        source.write_all_at(&vec![7; 3 << 20], 1 << 20).unwrap();
        let from = IoFile::read_only(File::open(&path).unwrap(), &path, CachePolicy::Host);
        let mut devices = vec![source.metadata().unwrap().dev()];
        for dir in [Some(here.path()), there.as_ref().ok().map(tempfile::TempDir::path)].into_iter().flatten() {
            let opened = File::open(dir).unwrap();
            devices.push(opened.metadata().unwrap().dev());
            let copy = UnnamedCopy::new_in(opened.as_fd(), dir, 5 << 20).unwrap();
            assert_eq!(
                copy.copy_from(&from, (2 << 20)..(5 << 20)).unwrap(),
                2 << 20,
                "the hole at the end is left out"
            );
            assert!(copy.copy_from(&from, 0..(6 << 20)).is_err(), "the file ends within the range");
            let copy = copy.finish(CachePolicy::Host).unwrap();
            let mut bytes = vec![1; 5 << 20];
            copy.read_now(&mut bytes, 0).unwrap();
            let wanted = [vec![0; 2 << 20], vec![7; 2 << 20], vec![0; 1 << 20]].concat();
            assert!(bytes == wanted, "{}", dir.display());
        }
        if devices.iter().all(|device| *device == devices[0]) {
            clade_test_support::skipped("/dev/shm is on the same file system as the temporary directory");
        }
    }
}
