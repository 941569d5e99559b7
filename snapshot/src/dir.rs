//! The open directory of a snapshot, which stays the same directory even if its path leads
//! elsewhere later.
//!
//! All files in it are opened, made and removed through this descriptor. So the files read belong
//! to the manifest that was checked, even if directories are exchanged meanwhile.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fsync, openat, openat2, renameat};
use rustix::io::Errno;

use crate::error::Error;
use crate::files::{FileOp, FileOps, len, name_of};

/// Bytes of a file that are read at once.
const PIECE: usize = 4 << 20;

/// An open directory, and its path when it was opened.
#[derive(Clone, Debug)]
pub(crate) struct Dir {
    file: Arc<File>,
    path: PathBuf,
}

impl Dir {
    /// Its path in messages, never used to open it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same directory, with another path in messages.
    pub(crate) fn called(self, path: PathBuf) -> Self {
        Self { path, ..self }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The directory's device and inode numbers.
    pub(crate) fn identity(&self) -> Option<DirId> {
        self.file.metadata().ok().map(|meta| identity(&meta))
    }
}

/// A file's device and inode numbers.
pub(crate) type DirId = (u64, u64);

/// Returns a file's device and inode numbers.
pub(crate) fn identity(meta: &Metadata) -> DirId {
    (meta.dev(), meta.ino())
}

impl FileOps {
    /// Opens a directory whose files are to be read. Links are followed, but not those of procfs.
    pub(crate) fn dir(&self, path: &Path) -> Result<Dir, Error> {
        self.dir_by(CWD, path, path.to_owned(), OFlags::PATH)
    }

    /// As [`Self::dir`], by its path from `from`.
    pub(crate) fn dir_from(&self, from: &Dir, relative: &Path) -> Result<Dir, Error> {
        self.dir_by(from.file(), relative, from.path.join(relative), OFlags::PATH)
    }

    /// Opens a directory that can be listed, locked and synced. The path itself must not be a link.
    pub(crate) fn whole_dir(&self, path: &Path) -> Result<Dir, Error> {
        self.dir_by(CWD, path, path.to_owned(), OFlags::RDONLY | OFlags::NOFOLLOW)
    }

    fn dir_by(&self, from: impl AsFd, name: &Path, path: PathBuf, flags: OFlags) -> Result<Dir, Error> {
        // A link of procfs may lead into a mount namespace of the link's maker, where directories are
        // mounted on each other and `..` leads elsewhere.
        let resolve = ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = self.run(FileOp::Open, &path, |_| Ok(openat2(from.as_fd(), name, flags, Mode::empty(), resolve)?));
        match opened {
            Ok(fd) => Ok(Dir { file: Arc::new(fd.into()), path }),
            Err(source) => Err(Error::file("opened", path, source)),
        }
    }

    /// Opens a regular file for reading. Links are refused, because they lead elsewhere; FIFOs are
    /// refused, because opening one would block.
    pub(crate) fn open_in(&self, dir: &Dir, name: &str) -> Result<File, Error> {
        let path = dir.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match self.run(FileOp::Open, &path, |_| Ok(openat(dir.file(), name, flags, Mode::empty())?)) {
            Ok(fd) => File::from(fd),
            Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                return Err(Error::NotAFile { path, found: "a symbolic link" });
            }
            Err(source) => return Err(Error::file("opened", path, source)),
        };
        let kind = file.metadata().map_err(|source| Error::file("looked at", &path, source))?.file_type();
        if kind.is_file() { Ok(file) } else { Err(Error::NotAFile { path, found: name_of(kind) }) }
    }

    /// All of a file, of at most `most` bytes.
    pub(crate) fn read_in(&self, dir: &Dir, name: &str, most: u64) -> Result<Vec<u8>, Error> {
        let path = dir.path.join(name);
        let file = self.open_in(dir, name)?;
        let bytes = len(&file, &path)?;
        if bytes > most {
            let damage = crate::format::Damage::Length { what: "the file".to_owned(), wanted: most, found: bytes };
            return Err(Error::damaged(path, damage));
        }
        // Allocated as it is read, so that a false length costs no memory.
        let mut out = Vec::new();
        while (out.len() as u64) < bytes {
            let (from, some) = (out.len(), PIECE.min((bytes as usize) - out.len()));
            let no_memory = |_| Error::file("read", &path, io::ErrorKind::OutOfMemory.into());
            out.try_reserve(some).map_err(no_memory)?;
            out.resize(from + some, 0);
            self.read_exact_at(&file, &path, &mut out[from..], from as u64)?;
        }
        Ok(out)
    }

    /// Makes a file with these bytes, and syncs it. The directory is not synced. An error leaves no part of it, but maybe a
    /// whole file that is not durable: another process may have found that, and rely on it.
    pub(crate) fn write_in(&self, dir: &Dir, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = dir.path.join(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = self.run(FileOp::Create, &path, |_| Ok(openat(dir.file(), name, flags, Mode::RUSR | Mode::WUSR)?));
        let file = File::from(made.map_err(|source| Error::file("created", &path, source))?);
        if let Err(error) = self.write_all_at(&file, &path, bytes, 0) {
            // A part could be taken for the whole.
            let _ = self.unlink(dir, name);
            return Err(error);
        }
        self.sync(&file, &path)
    }

    /// Renames a file, over the file that has the name.
    pub(crate) fn replace_in(&self, dir: &Dir, from: &str, to: &str) -> Result<(), Error> {
        let path = dir.path.join(to);
        let renamed = self.run(FileOp::Rename, &path, |_| Ok(renameat(dir.file(), from, dir.file(), to)?));
        renamed.map_err(|source| Error::file("put in place", path, source))
    }

    /// The names in a directory ([`Self::whole_dir`]) that are UTF-8 and begin with `prefix`,
    /// sorted.
    pub(crate) fn names_like(&self, dir: &Dir, prefix: &str) -> Result<Vec<String>, Error> {
        let text = |name: OsString| name.into_string().ok().filter(|name| name.starts_with(prefix));
        Ok(self.names_in(dir.file(), &dir.path)?.into_iter().filter_map(text).collect())
    }

    /// Removes a file, if it is there.
    pub(crate) fn unlink(&self, dir: &Dir, name: &str) -> Result<(), Error> {
        self.remove_in(dir.file(), &dir.path, OsStr::new(name))
    }

    /// Makes the names in a directory ([`Self::whole_dir`]) durable.
    pub(crate) fn sync_open_dir(&self, dir: &Dir) -> Result<(), Error> {
        let synced = self.run(FileOp::SyncDir, &dir.path, |_| Ok(fsync(dir.file())?));
        synced.map_err(|source| Error::file("synced", &dir.path, source))
    }
}
