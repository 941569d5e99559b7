//! Files by their directory's descriptor: it stays the same directory when it is renamed.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fchmod, linkat, openat};

use crate::file::{CachePolicy, FileError, Handles, IoFile, read_only_again};
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
