//! Files for operations: a handle through the page cache, and on request one past it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, SeekFrom, StatxFlags, seek, statx};
use thiserror::Error;

use crate::handles::{CachePolicy, Handles};
use crate::lost_writes::LostWrites;
use crate::overlay_pool::OverlayPool;

/// A system call on a file has failed.
#[derive(Debug, Error)]
#[error("{} could not be {what}", path.display())]
pub struct FileError {
    /// The file's path.
    pub path: PathBuf,
    /// The operation, as a participle: "opened", "written".
    pub what: &'static str,
    /// Why it has failed.
    #[source]
    pub source: io::Error,
}

/// Why a file cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A system call has failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The path leads neither to a file nor to a block device.
    #[error("{} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Another process has locked the file.
    #[error("{} is in use: another process {}", path.display(), if *writing { "has it open" } else { "writes to it" })]
    Locked {
        /// The path.
        path: PathBuf,
        /// Whether it was to be opened for writing.
        writing: bool,
    },
}

/// An open file. Operations in flight keep it open.
#[derive(Debug)]
pub struct IoFile {
    path: PathBuf,
    pub(crate) handles: Arc<Handles>,
    /// The pool that its handles return to.
    pub(crate) pool: Option<Arc<OverlayPool>>,
    writable: bool,
    /// Whether it had a name when it was opened.
    named: bool,
    /// Whether it got a name later.
    pub(crate) linked: AtomicBool,
    block_device: bool,
    /// Whether writes to it have ended since it was last made durable.
    unsynced: AtomicBool,
    /// Writes that were given to the kernel and not reaped.
    writes: Mutex<usize>,
    no_writes: Condvar,
    /// Open as long as the file is: leases and locks of the process it comes from.
    kept: Vec<Arc<OwnedFd>>,
    /// The file opened for reading only, and locked, if it is.
    pub(crate) lock: OnceLock<File>,
    pub(crate) lost: LostWrites,
}

/// The same file on an open file of its own, for reading only.
pub(crate) fn read_only_again(file: &File) -> std::io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Locks a file on an open file of its own, against all others. Nothing can be written through it: it goes to other
/// processes. Nor does the kernel operate on it: it keeps an open file, with its lock, for a moment after it has
/// completed a request for it, and after the last descriptor is closed.
fn try_lock(file: &File, exclusive: bool) -> io::Result<File> {
    let lock = read_only_again(file)?;
    if exclusive { lock.try_lock() } else { lock.try_lock_shared() }?;
    Ok(lock)
}

impl IoFile {
    /// Opens a file or a block device. Locks it against writers in other processes that lock too,
    /// and with `write` also against readers.
    ///
    /// # Errors
    /// When it cannot be opened, is of another kind, or is locked.
    pub fn open(path: &Path, write: bool, policy: CachePolicy) -> Result<Self, OpenError> {
        let failed = |what| move |source| FileError { path: path.to_owned(), what, source };
        let opened = if write { "opened for writing" } else { "opened" };
        // O_NONBLOCK, because opening a FIFO must not wait for its other end. The flag has no
        // effect on files and block devices.
        let cached = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed(opened))?;
        let kind = cached.metadata().map_err(failed("looked at"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path.to_owned() });
        }
        let lock = match try_lock(&cached, write) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(OpenError::Locked { path: path.to_owned(), writing: write });
            }
            Err(source) => return Err(failed("locked")(source).into()),
        };
        let handles = Handles::new(cached, write, policy, path);
        let file = Self::new(path, Arc::new(handles), write, true, kind.is_block_device());
        let _ = file.lock.set(lock);
        Ok(file)
    }

    /// Opens an empty unnamed file of `len` bytes in `dir`, freed with its last handle.
    ///
    /// # Errors
    /// When the directory's file system has no unnamed files, or no room.
    pub fn unnamed(dir: &Path, len: u64, policy: CachePolicy) -> Result<Self, FileError> {
        let opened = File::open(dir);
        let opened = opened.map_err(|source| FileError { path: dir.to_owned(), what: "opened", source })?;
        Self::unnamed_in(opened.as_fd(), dir, len, policy)
    }

    /// Wraps a file that is open for reading, with its path, without locking it: the caller
    /// guarantees that it does not change.
    #[must_use]
    pub fn read_only(cached: File, path: &Path, policy: CachePolicy) -> Self {
        Self::new(path, Arc::new(Handles::new(cached, false, policy, path)), false, true, false)
    }

    /// The file, which keeps `kept` open as long as it is open itself.
    #[must_use]
    pub fn keeping(mut self, kept: Vec<Arc<OwnedFd>>) -> Self {
        self.kept = kept;
        self
    }

    /// The descriptors that it keeps open.
    #[must_use]
    pub fn kept(&self) -> &[Arc<OwnedFd>] {
        &self.kept
    }

    /// A file of another process, open for reading only, as [`IoFile::read_only`]. `direct` is its
    /// handle past the page cache: this process may have no right to open the file again.
    #[must_use]
    pub fn handed_in(cached: File, direct: Option<File>, path: &Path, policy: CachePolicy) -> Self {
        let handles = match direct.filter(|_| policy == CachePolicy::Direct) {
            Some(direct) => Handles::of(cached, Some(direct)),
            None => Handles::new(cached, false, policy, path),
        };
        Self::new(path, Arc::new(handles), false, true, false)
    }

    /// The file for another process, open for reading only: on open files of its own, unless it is
    /// another process's already. It knows of lost writes as this one does.
    ///
    /// # Errors
    /// When it cannot be opened again (procfs is needed).
    pub fn for_another_process(&self) -> Result<Self, FileError> {
        let file = if self.writable {
            let opened = read_only_again(&self.handles.cached);
            let opened = opened.map_err(|error| self.failed("opened for another process", error))?;
            Self::read_only(opened, &self.path, self.policy())
        } else {
            // This process may have no right to open it again.
            Self::new(&self.path, Arc::clone(&self.handles), false, true, false)
        };
        if self.has_lost_writes() {
            file.note_lost_writes();
        }
        Ok(file)
    }

    /// Its handle past the page cache, if it has one.
    #[must_use]
    pub fn direct(&self) -> Option<BorrowedFd<'_>> {
        self.handles.direct.as_ref().map(AsFd::as_fd)
    }

    /// Locks it until it is dropped, against other processes and other files of this one.
    ///
    /// # Errors
    /// When another has locked it, or it cannot be opened again (procfs is needed).
    pub fn lock(&self, exclusive: bool) -> Result<(), FileError> {
        let lock = try_lock(&self.handles.cached, exclusive).map_err(|error| self.failed("locked", error))?;
        let _ = self.lock.set(lock);
        Ok(())
    }

    /// Another, read-only descriptor of the open file that holds the lock. As long as it exists,
    /// the file is locked as it is here.
    ///
    /// # Errors
    /// When there is no descriptor to be had, or the file is not locked.
    pub fn lock_descriptor(&self) -> Result<OwnedFd, FileError> {
        let lock = self.lock.get().ok_or(std::io::ErrorKind::NotFound.into());
        let descriptor = lock.and_then(|lock| lock.as_fd().try_clone_to_owned());
        descriptor.map_err(|error| self.failed("given another descriptor", error))
    }

    pub(crate) fn new(path: &Path, handles: Arc<Handles>, writable: bool, named: bool, block_device: bool) -> Self {
        let (writes, no_writes) = (Mutex::new(0), Condvar::new());
        let (linked, unsynced, path) = (AtomicBool::new(false), AtomicBool::new(false), path.to_owned());
        let (kept, lock) = (Vec::new(), OnceLock::new());
        Self {
            path,
            handles,
            pool: None,
            writable,
            named,
            linked,
            block_device,
            unsynced,
            writes,
            no_writes,
            kept,
            lock,
            lost: LostWrites::default(),
        }
    }

    /// Whether writes to it have ended since the last call. The caller must make those writes
    /// durable, or call [`IoFile::set_unsynced`].
    #[must_use]
    pub fn take_unsynced(&self) -> bool {
        self.unsynced.swap(false, Ordering::AcqRel)
    }

    /// Notes that not all of it is durable.
    pub fn set_unsynced(&self) {
        self.unsynced.store(true, Ordering::Release);
    }

    /// The inode number, and the inode's birth time (ns since 1970; 0 if unknown), because numbers
    /// are used again.
    ///
    /// # Errors
    /// When the file's attributes cannot be read.
    pub fn identity(&self) -> Result<(u64, u64), FileError> {
        let wanted = StatxFlags::INO | StatxFlags::BTIME;
        let stat = statx(&self.handles.cached, "", AtFlags::EMPTY_PATH, wanted)
            .map_err(|error| self.failed("looked at", error.into()))?;
        let born = (stat.stx_btime.tv_sec as u64).wrapping_mul(1_000_000_000) + u64::from(stat.stx_btime.tv_nsec);
        let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        Ok((stat.stx_ino, if known { born } else { 0 }))
    }

    /// How many names it has.
    ///
    /// # Errors
    /// When the file's attributes cannot be read.
    pub fn link_count(&self) -> Result<u64, FileError> {
        let stat = rustix::fs::fstat(&self.handles.cached).map_err(|error| self.failed("looked at", error.into()))?;
        Ok(stat.st_nlink)
    }

    /// Its path; for an unnamed file, its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How transfers are done: by the policy asked for, as far as the file system supports it.
    #[must_use]
    pub fn policy(&self) -> CachePolicy {
        if self.handles.direct.is_some() { CachePolicy::Direct } else { CachePolicy::Host }
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it has a name. A file without a name ends with the process, synced or not.
    #[must_use]
    pub fn is_named(&self) -> bool {
        self.named
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Its size in bytes.
    ///
    /// # Errors
    /// When the size cannot be read.
    pub fn size(&self) -> Result<u64, FileError> {
        // A block device reports its size only by a seek. Operations name their offsets, so the
        // position of the handle does not matter.
        seek(&self.handles.cached, SeekFrom::End(0)).map_err(|error| self.failed("measured", error.into()))
    }

    /// The first byte from `offset` on that is not in a hole, as far as the file system reports
    /// holes. `None` when only a hole is left.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>, FileError> {
        match seek(&self.handles.cached, SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            // Past the last byte of data.
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A block device, or a file system without holes: all of it is data.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(error) => Err(self.failed("searched for data", error.into())),
        }
    }

    /// The end of the data at `offset`: a hole, or the end of the file.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    pub fn next_hole(&self, offset: u64) -> Result<u64, FileError> {
        match seek(&self.handles.cached, SeekFrom::Hole(offset)) {
            Ok(at) => Ok(at),
            Err(rustix::io::Errno::NXIO | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(u64::MAX),
            Err(error) => Err(self.failed("searched for holes", error.into())),
        }
    }

    /// Reads without an engine.
    ///
    /// # Errors
    /// When the read fails, or the file ends first.
    pub fn read_now(&self, bytes: &mut [u8], offset: u64) -> Result<(), FileError> {
        self.handles.cached.read_exact_at(bytes, offset).map_err(|source| self.failed("read", source))
    }

    /// Writes without an engine.
    ///
    /// # Errors
    /// When the write fails.
    pub fn write_now(&self, bytes: &[u8], offset: u64) -> Result<(), FileError> {
        self.set_unsynced();
        self.handles.cached.write_all_at(bytes, offset).map_err(|source| self.failed("written", source))
    }

    /// Makes finished writes durable, without an engine.
    ///
    /// # Errors When the sync fails. A later success then does not cover earlier writes.
    pub fn sync_now(&self) -> Result<(), FileError> {
        self.handles.cached.sync_all().map_err(|source| self.failed("made durable", source))
    }

    /// Returns whether writes to the file were lost, as far as this process knows. If the kernel reports a loss now, no
    /// later sync reports it: the caller must let none succeed.
    #[must_use]
    pub fn has_lost_writes(&self) -> bool {
        self.knows_lost_writes() || self.lost.check(&self.handles.cached)
    }

    /// Returns the same without asking the kernel.
    #[must_use]
    pub fn knows_lost_writes(&self) -> bool {
        self.lost.is_known()
    }

    /// Notes that a sync of the file has failed.
    pub fn note_lost_writes(&self) {
        self.lost.note();
    }

    /// Waits up to `patience` until no write to it is in flight. Returns whether that is so.
    #[must_use]
    pub fn settle(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        while *writes > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            writes = self.no_writes.wait_timeout(writes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whether a write to it is in flight.
    #[must_use]
    pub fn has_writes(&self) -> bool {
        *self.writes.lock().unwrap_or_else(PoisonError::into_inner) > 0
    }

    pub(crate) fn write_begins(&self) {
        *self.writes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    pub(crate) fn write_ends(&self) {
        self.set_unsynced();
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        *writes -= 1;
        if *writes == 0 {
            self.no_writes.notify_all();
        }
    }

    /// The alignment for transfers past the page cache.
    pub(crate) fn direct_align(&self) -> usize {
        self.handles.align
    }

    pub(crate) fn direct_fd(&self) -> Option<RawFd> {
        self.handles.direct.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub(crate) fn cached_fd(&self) -> RawFd {
        self.handles.cached.as_raw_fd()
    }

    pub(crate) fn failed(&self, what: &'static str, source: io::Error) -> FileError {
        FileError { path: self.path.clone(), what, source }
    }
}

impl Drop for IoFile {
    fn drop(&mut self) {
        // No operation reads or writes it any more: operations hold the file.
        if let Some(pool) = self.pool.take().filter(|_| !*self.linked.get_mut()) {
            pool.put(Arc::clone(&self.handles));
        }
    }
}

impl AsFd for IoFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handles.cached.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_are_alone_and_readers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let reader = IoFile::open(&path, false, CachePolicy::Host).unwrap();
        let _second = IoFile::open(&path, false, CachePolicy::Host).unwrap();
        assert_eq!(reader.size().unwrap(), 8192);
        let error = IoFile::open(&path, true, CachePolicy::Host).unwrap_err();
        assert!(matches!(error, OpenError::Locked { writing: true, .. }), "{error}");
        assert!(error.to_string().contains("disk"), "{error}");
    }

    #[test]
    fn a_lock_ends_with_the_file_though_the_kernel_still_has_that_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [7; 4096]).unwrap();
        // A directory is synced by requests too.
        for path in [&path, dir.path()] {
            let open = || IoFile::read_only(File::open(path).unwrap(), path, CachePolicy::Host);
            let file = open();
            file.lock(true).unwrap();
            let error = open().lock(false).unwrap_err();
            assert_eq!(error.source.kind(), io::ErrorKind::WouldBlock);
            // As a request that the kernel has completed, and not yet put away.
            let request = file.as_fd().try_clone_to_owned().unwrap();
            drop(file);
            open().lock(true).unwrap();
            drop(request);
        }
    }

    #[test]
    fn what_is_no_file_is_refused_by_name() {
        for path in ["/", "/dev/null", "/no/such/file"] {
            let error = IoFile::open(Path::new(path), false, CachePolicy::Host).unwrap_err().to_string();
            assert!(error.starts_with(path), "{error}");
        }
        let error = IoFile::unnamed(Path::new("/proc"), 1, CachePolicy::Host).unwrap_err();
        assert_eq!(error.path, Path::new("/proc"));
    }

    #[test]
    fn a_file_is_used_again_when_nobody_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Arc::new(OverlayPool::default());
        let opened = File::open(dir.path()).unwrap();
        let file = || IoFile::reused_in(&pool, opened.as_fd(), dir.path(), 1 << 20, CachePolicy::Direct).unwrap();
        let inode = |file: &IoFile| rustix::fs::fstat(file).unwrap().st_ino;
        let (first, second) = (file(), file());
        first.write_now(b"before", 5000).unwrap();
        let (was, other) = (inode(&first), inode(&second));
        assert_ne!(was, other);
        drop(first);
        let again = file();
        assert_eq!(
            (inode(&again), again.is_writable(), again.is_named(), again.has_writes()),
            (was, true, false, false)
        );
        assert_eq!(again.policy(), second.policy());
        let mut got = [0; 6];
        again.read_now(&mut got, 5000).unwrap();
        assert_eq!(&got, b"before", "its room is there, with anything in it");
        assert_ne!(inode(&file()), was, "it is in use");
        drop((again, second));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_was_given_a_name_is_there_afterwards_and_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Arc::new(OverlayPool::default());
        let opened = File::open(dir.path()).unwrap();
        let make = || IoFile::reused_in(&pool, opened.as_fd(), dir.path(), 8192, CachePolicy::Host).unwrap();
        let file = make();
        assert!(!file.take_unsynced());
        file.write_now(b"kept", 4096).unwrap();
        assert!(file.take_unsynced() && !file.take_unsynced());
        let path = dir.path().join("name");
        file.link_in(opened.as_fd(), "name", &path).unwrap();
        assert_eq!(
            file.link_in(opened.as_fd(), "name", &path).unwrap_err().source.kind(),
            io::ErrorKind::AlreadyExists
        );
        let inode = file.identity().unwrap();
        drop(file);
        assert_eq!(&std::fs::read(&path).unwrap()[4096..4100], b"kept");
        let other = make();
        assert_ne!(other.identity().unwrap(), inode);
        let proc = File::open("/proc").unwrap();
        let error = other.link_in(proc.as_fd(), "name", Path::new("/proc/name")).unwrap_err();
        assert!(error.to_string().starts_with("/proc/name"), "{error}");
    }

    #[test]
    fn an_unnamed_file_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let file = IoFile::unnamed(dir.path(), 1 << 20, CachePolicy::Direct).unwrap();
        file.write_now(b"hello", 5000).unwrap();
        let mut got = [0; 7];
        file.read_now(&mut got, 4999).unwrap();
        assert_eq!(&got, b"\0hello\0");
        assert_eq!((file.size().unwrap(), file.is_named()), (1 << 20, false));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_descriptor_of_a_lock_cannot_be_written_through_and_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        let file = IoFile::open(&path, true, CachePolicy::Host).unwrap();
        let lock = file.lock_descriptor().unwrap();
        let flags = rustix::fs::fcntl_getfl(&lock).unwrap();
        assert_eq!(flags & rustix::fs::OFlags::ACCMODE, rustix::fs::OFlags::RDONLY);
        assert!(File::from(lock.try_clone().unwrap()).set_len(0).is_err());
        drop(file);
        assert!(matches!(IoFile::open(&path, true, CachePolicy::Host), Err(OpenError::Locked { .. })));
        drop(lock);
        drop(IoFile::open(&path, true, CachePolicy::Host).unwrap());
        assert!(IoFile::unnamed(dir.path(), 4096, CachePolicy::Host).unwrap().lock_descriptor().is_err(), "no lock");
    }
}
