//! All operations on files: named in errors, repeated when interrupted, and made to fail by tests.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, Dir, DirEntry, FlockOperation, OFlags, RenameFlags, fcntl_getfl, fcntl_setfl, flock, fsync,
    renameat_with, unlinkat,
};
use rustix::io::Errno;

use crate::error::Error;

/// Maximum time to wait for a lock. Its holder writes a note, renames and syncs directories, which
/// takes long on a stalled disk.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// An operation, for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileOp {
    MakeDir,
    Create,
    Open,
    Lock,
    Write,
    SetLen,
    Sync,
    SyncDir,
    Rename,
    Remove,
    Read,
    List,
}

/// Executes operations. In tests, a plan can make them fail.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileOps {
    #[cfg(test)]
    pub(crate) plan: Option<std::sync::Arc<crate::tests::faults::Plan>>,
}

/// A plan's substitute for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only plans of tests say more than Go"))]
pub(crate) enum FileVerdict {
    Go,
    /// A partial write or read.
    Short,
    /// A write of other bytes.
    Lie,
}

impl FileOps {
    #[cfg(not(test))]
    #[inline(always)]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests have it look at its plan")]
    fn point(&self, _op: FileOp, _path: &Path) -> io::Result<FileVerdict> {
        Ok(FileVerdict::Go)
    }

    #[cfg(test)]
    fn point(&self, op: FileOp, path: &Path) -> io::Result<FileVerdict> {
        self.plan.as_ref().map_or(Ok(FileVerdict::Go), |plan| plan.decide(op, path))
    }

    /// Maximum time to wait for a lock of a snapshot's directory.
    #[cfg(not(test))]
    #[allow(clippy::unused_self, reason = "a test's plan decides")]
    pub(crate) fn lock_timeout(&self) -> Duration {
        LOCK_TIMEOUT
    }

    /// Maximum time to wait for a lock: from the plan, or longer than any test.
    #[cfg(test)]
    pub(crate) fn lock_timeout(&self) -> Duration {
        self.plan.as_ref().and_then(|plan| plan.lock_timeout).unwrap_or(LOCK_TIMEOUT * 60)
    }

    /// Repeats `call` while it is interrupted.
    pub(crate) fn run<T>(
        &self,
        op: FileOp,
        path: &Path,
        mut call: impl FnMut(FileVerdict) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match self.point(op, path).and_then(&mut call) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Makes a directory for its owner only, because guest memory is in it.
    pub(crate) fn make_dir(&self, path: &Path) -> Result<(), Error> {
        let made = self.run(FileOp::MakeDir, path, |_| fs::DirBuilder::new().mode(0o700).create(path));
        made.map_err(|source| Error::file("made", path, source))
    }

    /// Opens a directory. Links are followed.
    pub(crate) fn open_dir(&self, path: &Path) -> Result<File, Error> {
        self.open_as(path, OFlags::DIRECTORY)
    }

    /// Opens a directory. The path itself must not be a link.
    pub(crate) fn open_real_dir(&self, path: &Path) -> Result<File, Error> {
        self.open_as(path, OFlags::DIRECTORY | OFlags::NOFOLLOW)
    }

    fn open_as(&self, path: &Path, flags: OFlags) -> Result<File, Error> {
        let open = |_| OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
        match self.run(FileOp::Open, path, open) {
            Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                Err(Error::NotAFile { path: path.to_owned(), found: "a symbolic link" })
            }
            other => other.map_err(|source| Error::file("opened", path, source)),
        }
    }

    /// Locks an open file or directory. Returns false if another descriptor has it locked.
    pub(crate) fn try_lock(&self, file: &File, path: &Path) -> Result<bool, Error> {
        let locked = self.run(FileOp::Lock, path, |_| match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        });
        locked.map_err(|source| Error::file("locked", path, source))
    }

    /// Makes a file. With `direct`, it is written past the page cache where the file system
    /// supports that.
    pub(crate) fn create(&self, path: &Path, direct: bool) -> Result<File, Error> {
        let open = |flags: OFlags| {
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o600).custom_flags(flags.bits().cast_signed());
            options.open(path)
        };
        let file = self.run(FileOp::Create, path, |_| {
            if direct {
                match open(OFlags::DIRECT) {
                    // Unsupported by the file system. The file may have been made in spite of the
                    // error.
                    Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                        let _ = fs::remove_file(path);
                    }
                    other => return other,
                }
            }
            open(OFlags::empty())
        });
        file.map_err(|source| Error::file("created", path, source))
    }

    /// Writes all of `bytes` at `offset`.
    pub(crate) fn write_all_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes.len() {
            let written = self.run(FileOp::Write, path, |verdict| match verdict {
                FileVerdict::Go => file.write_at(&bytes[done..], offset + done as u64),
                // Half of it, in whole pages if it consists of pages.
                FileVerdict::Short => {
                    let half = (bytes.len() - done) / 2;
                    let some = if half > 4096 { half & !4095 } else { bytes.len() - done };
                    file.write_at(&bytes[done..done + some], offset + done as u64)
                }
                FileVerdict::Lie => Ok(bytes.len() - done),
            });
            match written {
                Ok(0) => return Err(Error::file("written", path, io::ErrorKind::WriteZero.into())),
                Ok(some) => done += some,
                // Some file systems open a file for direct writes, and then refuse these.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) && make_indirect(file) => {}
                Err(source) => return Err(Error::file("written", path, source)),
            }
        }
        Ok(())
    }

    /// Sets a file's length.
    pub(crate) fn set_len(&self, file: &File, path: &Path, bytes: u64) -> Result<(), Error> {
        self.run(FileOp::SetLen, path, |_| file.set_len(bytes)).map_err(|source| Error::file("extended", path, source))
    }

    /// Makes a file durable. A failure is final: a later success does not cover the same pages.
    pub(crate) fn sync(&self, file: &File, path: &Path) -> Result<(), Error> {
        self.run(FileOp::Sync, path, |_| file.sync_all()).map_err(|source| Error::file("synced", path, source))
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_dir(&self, path: &Path) -> Result<(), Error> {
        let dir = self.open_dir(path)?;
        let synced = self.run(FileOp::SyncDir, path, |_| Ok(fsync(dir.as_fd())?));
        synced.map_err(|source| Error::file("synced", path, source))
    }

    /// Renames. Returns false if the new name exists.
    pub(crate) fn rename_new(&self, from: &Path, to: &Path) -> Result<bool, Error> {
        self.rename(from, to, RenameFlags::NOREPLACE)
    }

    /// Exchanges two names in one step. Returns false if `to` does not exist.
    pub(crate) fn exchange(&self, from: &Path, to: &Path) -> Result<bool, Error> {
        self.rename(from, to, RenameFlags::EXCHANGE)
    }

    fn rename(&self, from: &Path, to: &Path, how: RenameFlags) -> Result<bool, Error> {
        let renamed = self.run(FileOp::Rename, to, |_| match renameat_with(CWD, from, CWD, to, how) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) if how == RenameFlags::NOREPLACE => Ok(false),
            Err(Errno::NOENT) if how == RenameFlags::EXCHANGE => Ok(false),
            Err(error) => Err(error.into()),
        });
        renamed.map_err(|source| Error::file("put in place", to, source))
    }

    /// Removes `name`, if it is there, from the directory `dir` at `path`. A link itself is
    /// removed.
    pub(crate) fn remove_in(&self, dir: &File, path: &Path, name: &OsStr) -> Result<(), Error> {
        let path = path.join(name);
        gone(self.run(FileOp::Remove, &path, |_| Ok(unlinkat(dir, name, AtFlags::empty())?)), &path)
    }

    /// Removes an empty directory, if it is there.
    pub(crate) fn remove_dir(&self, path: &Path) -> Result<(), Error> {
        gone(self.run(FileOp::Remove, path, |_| fs::remove_dir(path)), path)
    }

    /// The names in the open directory at `path`, sorted.
    pub(crate) fn names_in(&self, dir: &File, path: &Path) -> Result<Vec<OsString>, Error> {
        let names = self.run(FileOp::List, path, |_| {
            let entries = Dir::read_from(dir)?;
            let name =
                |entry: rustix::io::Result<DirEntry>| Ok(OsString::from_vec(entry?.file_name().to_bytes().to_vec()));
            entries.map(name).collect::<io::Result<Vec<OsString>>>()
        });
        let mut names = names.map_err(|source| Error::file("listed", path, source))?;
        names.retain(|name| name != "." && name != "..");
        names.sort_unstable();
        Ok(names)
    }

    /// The names in a directory, sorted.
    pub(crate) fn list(&self, path: &Path) -> Result<Vec<PathBuf>, Error> {
        let names = self.run(FileOp::List, path, |_| {
            fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()
        });
        let mut names = names.map_err(|source| Error::file("listed", path, source))?;
        names.sort_unstable();
        Ok(names)
    }

    /// Fills `bytes` from `offset` on.
    pub(crate) fn read_exact_at(&self, file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes.len() {
            let read = self.run(FileOp::Read, path, |verdict| {
                let most =
                    if verdict == FileVerdict::Short { (bytes.len() - done).div_ceil(2) } else { bytes.len() - done };
                file.read_at(&mut bytes[done..done + most], offset + done as u64)
            });
            match read {
                Ok(0) => return Err(Error::file("read", path, io::ErrorKind::UnexpectedEof.into())),
                Ok(some) => done += some,
                Err(source) => return Err(Error::file("read", path, source)),
            }
        }
        Ok(())
    }

    /// Makes a file with these bytes, and syncs it.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let file = self.create(path, false)?;
        self.write_all_at(&file, path, bytes, 0)?;
        self.sync(&file, path)
    }
}

/// Name for a file of another kind, in messages.
pub(crate) fn name_of(kind: FileType) -> &'static str {
    match kind {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a pipe",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "no file",
    }
}

fn gone(removed: io::Result<()>, path: &Path) -> Result<(), Error> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("removed", path, error)),
        _ => Ok(()),
    }
}

/// Switches a file to the page cache. Returns false if it uses it already.
fn make_indirect(file: &File) -> bool {
    match fcntl_getfl(file) {
        Ok(flags) if flags.contains(OFlags::DIRECT) => fcntl_setfl(file, flags - OFlags::DIRECT).is_ok(),
        _ => false,
    }
}

/// The length of an open file.
pub(crate) fn len(file: &File, path: &Path) -> Result<u64, Error> {
    file.metadata().map(|meta| meta.len()).map_err(|source| Error::file("asked for its length", path, source))
}
