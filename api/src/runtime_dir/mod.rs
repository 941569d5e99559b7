//! The runtime directory: names of VMs, their locks, their sockets, and records of ended VMs.
//!
//! Everything below it goes through one descriptor, opened without following a link and checked
//! once. A directory that is swapped under a running process changes nothing.

mod claim;
mod ended;
mod names;
mod settings;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_host_io::private_listener;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType};

use crate::error::{DaemonError, LONGEST_NAME, LONGEST_SOCKET_PATH};

pub use claim::{NameClaim, SupervisorClaim, VmFiles};
pub use ended::{
    EndedVm, KnownEnd, MAX_OUTPUT, WorkerExit, ended_vms, forget as forget_ended, record_end, recorded_reason, settle,
    unix_seconds,
};
pub use names::{check_names, claim_names};
pub use settings::KeptSettings;

/// The supervisor's socket, and the file that a directory's one supervisor holds locked.
const SUPERVISOR: &str = "clade.api";
const LOG: &str = "clade.log";
const SUPERVISOR_LOCK: &str = "clade.supervisor";
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Returns the directory of sockets: `$CLADE_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/clade`, else
/// `/run/clade` for root and `/tmp/clade-UID` for others.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    let of = |name| std::env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let default = || match rustix::process::getuid() {
        uid if uid.is_root() => PathBuf::from("/run/clade"),
        uid => PathBuf::from(format!("/tmp/clade-{}", uid.as_raw())),
    };
    of("CLADE_RUNTIME_DIR").or_else(|| Some(of("XDG_RUNTIME_DIR")?.join("clade"))).unwrap_or_else(default)
}

/// Checks a name.
///
/// # Errors
/// [`DaemonError::BadName`].
pub fn check_name(name: &str) -> Result<(), DaemonError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if first && rest && name.len() <= LONGEST_NAME {
        Ok(())
    } else {
        Err(DaemonError::BadName { name: name.to_owned() })
    }
}

/// Path of a VM's control socket.
#[must_use]
pub fn socket_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// Names of the VMs that have sockets in the directory.
///
/// # Errors
/// When it cannot be read.
pub fn vm_names(dir: &RuntimeDir) -> io::Result<BTreeSet<String>> {
    let name = |file: OsString| Some(file.to_str()?.strip_suffix(".sock")?.to_owned());
    Ok(dir.entries()?.into_iter().filter_map(name).filter(|name| check_name(name).is_ok()).collect())
}

/// Path of a VM's console socket.
#[must_use]
pub fn console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.console"))
}

/// Path of the socket on which another process requests a VM's image.
#[must_use]
pub fn image_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.image"))
}

/// Opens the log of a supervisor in the background, for this user alone (mode 0600).
///
/// # Errors
/// When the runtime directory cannot be made or used, or the log is a link.
pub fn open_log(dir: &Path) -> Result<File, DaemonError> {
    let dir = RuntimeDir::create(dir)?;
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = openat(&dir.fd, LOG, flags, Mode::RUSR | Mode::WUSR);
    opened.map(File::from).map_err(|error| DaemonError::Runtime { path: dir.path.join(LOG), source: error.into() })
}

/// Path of the log of a supervisor in the background.
#[must_use]
pub fn log_path(dir: &Path) -> PathBuf {
    dir.join(LOG)
}

/// Path of the supervisor's socket. A VM's files end differently.
#[must_use]
pub fn supervisor_path(dir: &Path) -> PathBuf {
    dir.join(SUPERVISOR)
}

/// Path of a VM's virtio console socket, if it has one.
#[must_use]
pub fn virtio_console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.hvc"))
}

/// The directory, open. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    fd: Arc<OwnedFd>,
}

impl RuntimeDir {
    /// Opens the directory, and creates it (mode 0700) if it is missing.
    ///
    /// # Errors
    /// When it is a link, another user's, or may be written by others.
    pub fn create(path: &Path) -> Result<Self, DaemonError> {
        let failed = |source| DaemonError::Runtime { path: path.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let dir = Self::open(path)?;
        let found = rustix::fs::fstat(&dir.fd).map_err(|error| failed(error.into()))?;
        if found.st_uid != rustix::process::geteuid().as_raw() {
            return Err(DaemonError::ForeignDir { path: path.to_owned(), owner: found.st_uid });
        }
        let mode = found.st_mode & 0o7777;
        if mode & 0o022 != 0 {
            return Err(DaemonError::OpenDir { path: path.to_owned(), mode });
        }
        Ok(dir)
    }

    /// Opens an existing directory.
    pub fn open(path: &Path) -> Result<Self, DaemonError> {
        Self::open_as(path, OFlags::RDONLY)
    }

    /// Returns the directory at `path`, which cannot be listed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reach(path: &Path) -> Result<Self, DaemonError> {
        Self::open_as(path, OFlags::PATH)
    }

    fn open_as(path: &Path, how: OFlags) -> Result<Self, DaemonError> {
        let failed = |source| DaemonError::Runtime { path: path.to_owned(), source };
        let flags = how | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| {
            // The error for a link depends on which flag the kernel checks first.
            let link = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_symlink());
            if link { DaemonError::LinkedDir { path: path.to_owned() } } else { failed(error.into()) }
        })?;
        Ok(Self { path: path.to_owned(), fd: Arc::new(fd) })
    }

    /// Returns the directory's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the files in it.
    pub fn entries(&self) -> io::Result<Vec<OsString>> {
        use std::os::unix::ffi::OsStringExt;
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd)? {
            names.push(OsString::from_vec(entry?.file_name().to_bytes().to_vec()));
        }
        Ok(names)
    }

    pub(super) fn remove(&self, file: &str) -> io::Result<()> {
        match unlinkat(&self.fd, file, AtFlags::empty()) {
            Err(error) if error != Errno::NOENT => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Reads a regular file of at most 1 MiB. None if it is missing.
    pub fn read(&self, file: &str) -> io::Result<Option<Vec<u8>>> {
        // Without NONBLOCK, the open of a FIFO would block.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = match openat(&self.fd, file, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            other => File::from(other?),
        };
        let found = opened.metadata()?;
        if !found.is_file() || found.len() > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no small file"));
        }
        // With room for one byte more: the second read finds the end.
        let mut bytes = Vec::with_capacity(found.len() as usize + 1);
        opened.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Makes an empty file for this user alone (mode 0600), in place of one that is there.
    fn make(&self, file: &str) -> io::Result<File> {
        let create = || {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(&self.fd, file, flags, Mode::RUSR | Mode::WUSR)
        };
        // A process that was killed may have left one: seldom, so it is not looked for first. It is not opened: that
        // process may have it open still.
        Ok(File::from(match create() {
            Err(Errno::EXIST) => {
                self.remove(file)?;
                create()?
            }
            created => created?,
        }))
    }

    /// Writes a file for this user alone (mode 0600), whole or not at all.
    pub fn write(&self, file: &str, bytes: &[u8]) -> io::Result<()> {
        let aside = format!(".{file}.new");
        let mut opened = self.make(&aside)?;
        let written = opened.write_all(bytes);
        let renamed = written.and_then(|()| Ok(rustix::fs::renameat(&self.fd, &*aside, &self.fd, file)?));
        renamed.inspect_err(|_| drop(self.remove(&aside)))
    }

    /// Returns the modification time of a regular file, in seconds since 1970, or None if it is
    /// missing.
    pub(crate) fn written_at(&self, file: &str) -> Option<i64> {
        let found = statat(&self.fd, file, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        (FileType::from_raw_mode(found.st_mode) == FileType::RegularFile).then_some(found.st_mtime)
    }

    /// Removes a file. Logs a failure.
    pub fn forget(&self, file: &str) {
        if let Err(error) = self.remove(file) {
            tracing::debug!(%error, file, "a file of the runtime directory stays");
        }
    }

    /// Whether `file` is still the one that is open.
    fn has(&self, file: &str, open: &File) -> bool {
        let named = statat(&self.fd, file, AtFlags::SYMLINK_NOFOLLOW);
        open.metadata()
            .is_ok_and(|open| named.is_ok_and(|named| (named.st_dev, named.st_ino) == (open.dev(), open.ino())))
    }

    /// Locks a file, which is made if it is missing. `None` if another process has it locked.
    fn lock(&self, file: &str) -> Result<Option<File>, DaemonError> {
        let failed = |source| DaemonError::Runtime { path: self.path.join(file), source };
        let lock = loop {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let lock = openat(&self.fd, file, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
            let lock = File::from(lock);
            match lock.try_lock() {
                Ok(()) => {}
                // The lock file has the owner's pid.
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            // An owner that ended after the open has removed the file. The lock is then on a file
            // that no longer has the name.
            let locked = lock.metadata().map_err(failed)?;
            match statat(&self.fd, file, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(named) if (named.st_dev, named.st_ino) == (locked.dev(), locked.ino()) => break lock,
                Err(error) if error != Errno::NOENT => return Err(failed(error.into())),
                _ => {}
            }
        };
        write_pid(&lock, std::process::id());
        Ok(Some(lock))
    }

    /// Binds a socket of the directory, for this user alone (mode 0600). The caller's lock proves
    /// that an existing one is a dead owner's.
    fn bind(&self, file: &str, kind: SocketType) -> Result<OwnedFd, DaemonError> {
        let bound = || -> io::Result<OwnedFd> {
            let path = format!("/proc/self/fd/{}/{file}", self.fd.as_raw_fd());
            let bind = || private_listener(Path::new(&path), kind, SocketFlags::NONBLOCK);
            match bind() {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    self.remove(file)?;
                    bind()
                }
                bound => bound,
            }
        };
        bound().map_err(|source| DaemonError::Runtime { path: self.path.join(file), source })
    }
}

/// Refuses a path that no client could connect to.
fn expect_short(path: PathBuf) -> Result<(), DaemonError> {
    match path.as_os_str().len() {
        length if length > LONGEST_SOCKET_PATH => Err(DaemonError::LongPath { path, length }),
        _ => Ok(()),
    }
}

/// Name of the file with the supervisor's records of the VM called `name`.
pub fn vm_record_name(name: &str) -> String {
    format!("{name}.{VM}")
}

/// The ending of the file in which a confined worker records the end of its VM.
pub(super) const END: &str = "end";
/// The ending of the file with the supervisor's records of a VM.
const VM: &str = "vm";

/// Writes the owner's pid, for a reader of the file. The lock holds even if it cannot be written.
///
/// In one write of a fixed length: a reader finds the earlier pid or this one, on the first line. An earlier owner
/// may have written more.
fn write_pid(lock: &File, pid: u32) {
    let text = format!("{pid:<10}\n");
    let _ = lock.write_all_at(text.as_bytes(), 0).and_then(|()| lock.set_len(text.len() as u64));
}

/// Returns the pid in the text of a lock.
fn pid_in(text: &[u8]) -> Option<u32> {
    let line = text.split(|byte| *byte == b'\n').next()?;
    str::from_utf8(line).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests;
