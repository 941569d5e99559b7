//! A directory by its descriptor: operations stay in it even if its name changes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use clade_host_io::{CachePolicy, FileError, IoFile, OverlayPool, UnnamedCopy};
use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, renameat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::steps_trace::step;

/// An open directory.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    file: Arc<IoFile>,
}

impl Directory {
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        Self::open_as(path, OFlags::RDONLY)
    }

    /// Opens the directory at `path` as a path alone, for operations that do not read it.
    pub(super) fn reach(path: &Path) -> Result<Self, FileError> {
        Self::open_as(path, OFlags::PATH)
    }

    fn open_as(path: &Path, how: OFlags) -> Result<Self, FileError> {
        let shown = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = how | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(shown, flags, Mode::empty());
        let opened = opened.map_err(|error| failed(shown, "opened")(error.into()))?;
        Ok(Self::of(File::from(opened), shown))
    }

    fn of(file: File, path: &Path) -> Self {
        Self { file: Arc::new(IoFile::read_only(file, path, CachePolicy::Host)) }
    }

    /// Its path when it was opened.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file to sync to make the directory's names durable.
    pub(super) fn file(&self) -> &Arc<IoFile> {
        &self.file
    }

    fn at(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn failed(&self, name: &str, what: &'static str) -> impl FnOnce(Errno) -> FileError {
        let path = self.path().join(name);
        move |error| FileError { path, what, source: error.into() }
    }

    /// The device number of its file system.
    pub(super) fn device(&self) -> Result<u64, FileError> {
        let stat = rustix::fs::fstat(&*self.file).map_err(self.failed("", "looked at"))?;
        Ok(stat.st_dev)
    }

    /// Refuses a directory in which files cannot be made.
    pub(super) fn check_writable(&self) -> Result<(), FileError> {
        use rustix::fs::{Access, accessat};
        let flags = AtFlags::EACCESS;
        accessat(self.at(), ".", Access::WRITE_OK | Access::EXEC_OK, flags).map_err(self.failed("", "written to"))
    }

    /// Opens the subdirectory `name`. If another user owns it or may write in it, the error is
    /// PermissionDenied.
    pub(super) fn open_ours(&self, name: &str) -> Result<Self, FileError> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = self.path().join(name);
        let opened = openat(self.at(), name, flags, Mode::empty()).map_err(self.failed(name, "opened"))?;
        let opened = File::from(opened);
        let metadata = opened.metadata().map_err(failed(&path, "looked at"))?;
        if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(failed(&path, "trusted")(io::ErrorKind::PermissionDenied.into()));
        }
        Ok(Self::of(opened, &path))
    }

    /// Makes the subdirectory `name` for its owner only, if it is not there.
    pub(super) fn make(&self, name: &str) -> Result<(), FileError> {
        step(|| format!("mkdir {name}")).map_err(failed(&self.path().join(name), "made"))?;
        match mkdirat(self.at(), name, Mode::RWXU) {
            Err(Errno::EXIST) | Ok(()) => Ok(()),
            Err(error) => Err(self.failed(name, "made")(error)),
        }
    }

    /// Locks it against other processes, and against other descriptors of this process.
    pub(super) fn lock(&self, exclusive: bool) -> Result<(), FileError> {
        self.file.lock(exclusive)
    }

    /// Makes an empty file `name` for its owner only. Replaces an existing file.
    pub(super) fn create(&self, name: &str) -> Result<Arc<IoFile>, FileError> {
        step(|| format!("create {name}")).map_err(failed(&self.path().join(name), "created"))?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(self.at(), name, flags, Mode::RUSR | Mode::WUSR).map_err(self.failed(name, "created"))?;
        Ok(Arc::new(IoFile::read_write(File::from(opened), &self.path().join(name), CachePolicy::Host)))
    }

    /// Opens the regular file `name`.
    pub(super) fn open_file(&self, name: &str, write: bool) -> Result<Arc<IoFile>, FileError> {
        let path = self.path().join(name);
        let way = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = way | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat(self.at(), name, flags, Mode::empty()).map_err(self.failed(name, "opened"))?;
        let opened = File::from(opened);
        if !opened.metadata().map_err(failed(&path, "looked at"))?.is_file() {
            return Err(failed(&path, "opened as a file")(io::ErrorKind::InvalidInput.into()));
        }
        let file = if write {
            IoFile::read_write(opened, &path, CachePolicy::Host)
        } else {
            IoFile::read_only(opened, &path, CachePolicy::Host)
        };
        Ok(Arc::new(file))
    }

    /// Makes an unnamed file of `len` bytes. Messages call the file `path`, its future name.
    pub(super) fn new_image(&self, len: u64, path: &Path, policy: CachePolicy) -> Result<IoFile, FileError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let opened = openat(self.at(), ".", flags, Mode::RUSR | Mode::WUSR);
        let opened = File::from(opened.map_err(self.failed("", "given an unnamed file"))?);
        opened.set_len(len).map_err(failed(self.path(), "given a file of a size"))?;
        Ok(IoFile::read_write(opened, path, policy))
    }

    /// Makes an unnamed file of `len` bytes to copy others' clusters to.
    pub(super) fn copy(&self, len: u64) -> Result<UnnamedCopy, FileError> {
        UnnamedCopy::new_in(self.at(), self.path(), len)
    }

    /// The inode and device numbers of `name`.
    pub(super) fn identity_of(&self, name: &str) -> Result<(u64, u64), FileError> {
        let stat = rustix::fs::statat(self.at(), name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(self.failed(name, "looked at"))?;
        Ok((stat.st_ino, stat.st_dev))
    }

    /// See [`IoFile::reused_in`].
    pub(super) fn unnamed(&self, pool: &Arc<OverlayPool>, len: u64, policy: CachePolicy) -> Result<IoFile, FileError> {
        IoFile::reused_in(pool, self.at(), self.path(), len, policy)
    }

    /// Makes and drops an unnamed file: an attempt is the only test of whether one can be made.
    pub(super) fn try_unnamed(&self, len: u64) -> Result<(), FileError> {
        IoFile::unnamed_in(self.at(), self.path(), len, CachePolicy::Host).map(drop)
    }

    pub(super) fn link(&self, file: &IoFile, name: &str) -> Result<(), FileError> {
        let path = self.path().join(name);
        step(|| format!("link {name}")).map_err(failed(&path, "linked"))?;
        file.link_in(self.at(), name, &path)
    }

    /// Renames a file. Replaces an existing file of the new name.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), FileError> {
        step(|| format!("rename {from} {to}")).map_err(failed(&self.path().join(to), "replaced"))?;
        renameat(self.at(), from, self.at(), to).map_err(self.failed(to, "replaced"))
    }

    /// Removes a file, if it is there.
    pub(super) fn unlink(&self, name: &str) -> Result<(), FileError> {
        self.remove(name, AtFlags::empty())
    }

    /// Removes an empty directory.
    pub(super) fn rmdir(&self, name: &str) -> Result<(), FileError> {
        self.remove(name, AtFlags::REMOVEDIR)
    }

    fn remove(&self, name: &str, flags: AtFlags) -> Result<(), FileError> {
        step(|| format!("remove {name}")).map_err(failed(&self.path().join(name), "removed"))?;
        match unlinkat(self.at(), name, flags) {
            Err(Errno::NOENT) | Ok(()) => Ok(()),
            Err(error) => Err(self.failed(name, "removed")(error)),
        }
    }

    /// Makes the directory's names durable.
    pub(super) fn sync(&self) -> Result<(), FileError> {
        sync(&self.file)
    }

    /// The names in it that are UTF-8.
    pub(super) fn names(&self) -> Result<Vec<String>, FileError> {
        let entries = rustix::fs::Dir::read_from(&*self.file).map_err(self.failed("", "listed"))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned));
        Ok(names.filter(|name| name != "." && name != "..").collect())
    }
}

pub(super) fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { path, what, source }
}

/// Makes a file durable, with its metadata.
pub(super) fn sync(file: &IoFile) -> Result<(), FileError> {
    step(|| format!("sync {}", name(file))).map_err(failed(file.path(), "made durable"))?;
    file.sync_now()
}

/// Makes a file durable before it is copied. Once the system has failed to write a page back, a read may show what
/// was there before, and a copy would have that for good. So no copy is made after a loss, and no flush of the disk
/// succeeds.
pub(super) fn sync_to_copy(file: &IoFile) -> Result<(), FileError> {
    if file.has_lost_writes() {
        return Err(failed(file.path(), "copied since a write to it was lost")(Errno::IO.into()));
    }
    match sync(&file.for_another_process()?) {
        // A file system without writes has no sync.
        Err(error) if Errno::from_io_error(&error.source) == Some(Errno::INVAL) => Ok(()),
        Err(error) => {
            file.note_lost_writes();
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

/// Notes that a flush has not made files durable. If writes were `lost`, no later one can.
pub(super) fn not_synced(files: &[Arc<IoFile>], lost: bool) {
    for file in files {
        file.set_unsynced();
        if lost {
            file.note_lost_writes();
        }
    }
}

/// Writes to a file.
pub(super) fn write(file: &IoFile, bytes: &[u8], offset: u64) -> Result<(), FileError> {
    step(|| format!("write {} {offset}+{}", name(file), bytes.len())).map_err(failed(file.path(), "written"))?;
    file.write_now(bytes, offset)
}

pub(super) fn name(file: &IoFile) -> String {
    file.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
