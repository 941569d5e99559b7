//! Claims: the lock and the socket of a directory's supervisor, and the lock and the files of a VM's
//! name.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};
use rustix::io::Errno;
use rustix::net::SocketType;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, test_kill_process};

use super::{
    END, RuntimeDir, SUPERVISOR, SUPERVISOR_LOCK, VM, check_name, console_path, expect_short, pid_in, supervisor_path,
    write_pid,
};
use crate::error::DaemonError;

/// Attempts to lock a directory whose supervisor takes no connections.
const LOCK_ATTEMPTS: u32 = 1_000;
/// The time between two attempts.
pub(super) const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// A directory's supervisor: its lock and its socket.
#[derive(Debug)]
pub struct SupervisorClaim {
    dir: RuntimeDir,
    _lock: File,
}

impl SupervisorClaim {
    /// Claims the directory and binds the socket. The kernel closes the descriptors of a supervisor
    /// that was killed one by one: its lock may outlive its sockets. So a lock without a socket
    /// that takes connections is waited for.
    ///
    /// # Errors
    /// When another process has it.
    pub fn new(dir: &RuntimeDir) -> Result<(Self, UnixListener), DaemonError> {
        let path = supervisor_path(&dir.path);
        expect_short(path.clone())?;
        let mut attempts = 0;
        let lock = loop {
            if let Some(lock) = dir.lock(SUPERVISOR_LOCK)? {
                break lock;
            }
            attempts += 1;
            let listening = UnixStream::connect(&path).ok();
            if attempts > LOCK_ATTEMPTS || listening.is_some() {
                let peer = listening.and_then(|stream| socket_peercred(&stream).ok());
                let pid = peer.map(|peer| peer.pid.as_raw_nonzero().get());
                return Err(DaemonError::Supervised { path: dir.path.clone(), pid });
            }
            thread::sleep(LOCK_INTERVAL);
        };
        let socket = dir.bind(SUPERVISOR, SocketType::STREAM)?;
        Ok((Self { dir: dir.clone(), _lock: lock }, UnixListener::from(socket)))
    }
}

impl Drop for SupervisorClaim {
    fn drop(&mut self) {
        // The lock file last.
        self.dir.forget(SUPERVISOR);
        self.dir.forget(SUPERVISOR_LOCK);
    }
}

/// A name held on this host. The lock ends with the process, so a crashed owner's name is free
/// again.
#[derive(Debug)]
pub struct NameClaim {
    dir: RuntimeDir,
    /// The name.
    pub name: String,
    /// None if it is left to another process.
    lock: Option<File>,
    /// Whether the files go with the claim. Otherwise another process removes them.
    removes: bool,
}
/// The endings of a VM's sockets.
const CONTROL: &str = "sock";
const CONSOLE: &str = "console";
const HVC: &str = "hvc";
const IMAGE: &str = "image";
/// The ending of its lock.
const LOCK: &str = "lock";
/// The endings of a VM's files. The lock file last: while it is locked no other process makes
/// these.
const ENDINGS: [&str; 7] = [CONTROL, CONSOLE, HVC, IMAGE, VM, END, LOCK];

/// The names that this process has claimed, with their directories.
fn claimed() -> MutexGuard<'static, BTreeSet<(PathBuf, String)>> {
    static CLAIMED: Mutex<BTreeSet<(PathBuf, String)>> = Mutex::new(BTreeSet::new());
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NameClaim {
    /// Claims a name for a VM.
    ///
    /// # Errors
    /// [`DaemonError::Taken`] if another VM has it. When its files cannot be made.
    pub fn new(dir: &RuntimeDir, name: &str) -> Result<Self, DaemonError> {
        check_name(name)?;
        // The longest path of its sockets.
        expect_short(console_path(&dir.path, name))?;
        let lock = dir.lock(&format!("{name}.{LOCK}"))?;
        let lock = lock.ok_or_else(|| DaemonError::Taken { name: name.to_owned() })?;
        Ok(Self::of(dir, name, lock))
    }

    fn of(dir: &RuntimeDir, name: &str, lock: File) -> Self {
        claimed().insert((dir.path.clone(), name.to_owned()));
        Self { dir: dir.clone(), name: name.to_owned(), lock: Some(lock), removes: true }
    }

    /// Returns whether a process other than this one has the name. Its own word, the number in the lock, does not
    /// count.
    #[must_use]
    pub fn is_anothers(dir: &RuntimeDir, name: &str) -> bool {
        // Before the lock is tried: this process may take it meanwhile.
        if claimed().contains(&(dir.path.clone(), name.to_owned())) {
            return false;
        }
        let lock = openat(
            &dir.fd,
            &*format!("{name}.{LOCK}"),
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        );
        lock.is_ok_and(|lock| matches!(File::from(lock).try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Returns the claim of another process that has passed on its lock. That process removes the
    /// files.
    ///
    /// # Errors
    /// When the file is not the lock of that name.
    pub fn adopt(dir: &RuntimeDir, name: &str, lock: OwnedFd) -> Result<Self, DaemonError> {
        check_name(name)?;
        let lock = File::from(lock);
        if !dir.has(&format!("{name}.{LOCK}"), &lock) {
            return Err(DaemonError::Taken { name: name.to_owned() });
        }
        write_pid(&lock, std::process::id());
        Ok(Self { dir: dir.clone(), name: name.to_owned(), lock: Some(lock), removes: false })
    }

    /// Makes the files that a confined VM cannot make: its sockets, and the file for its end.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn hand_over(&self, has_hvc: bool) -> Result<(BTreeMap<String, OwnedFd>, OwnedFd), DaemonError> {
        let bind = |ending: &str, kind| Ok((ending.to_owned(), self.bind(ending, kind)?));
        let mut sockets: BTreeMap<_, _> = [CONTROL, CONSOLE]
            .iter()
            .chain(has_hvc.then_some(&HVC))
            .map(|ending| bind(ending, SocketType::STREAM))
            .collect::<Result<_, DaemonError>>()?;
        sockets.extend([bind(IMAGE, SocketType::SEQPACKET)?]);
        let file = format!("{}.{END}", self.name);
        // Not the file of an earlier VM, whose process may have it open.
        let record = self.dir.make(&file);
        let record = record.map_err(|source| DaemonError::Runtime { path: self.dir.path.join(file), source })?;
        Ok((sockets, record.into()))
    }

    /// The runtime directory.
    pub fn dir(&self) -> &RuntimeDir {
        &self.dir
    }

    /// The lock, to be passed on. The name stays locked as long as one process has it open.
    pub fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(AsFd::as_fd)
    }

    /// Claims the names of dead owners, each with the owner's pid: their control sockets exist, and
    /// their locks are free. Dropping the claims removes their files. Of names whose owners were killed while they
    /// removed these, the rest is removed here.
    pub fn of_the_dead(dir: &RuntimeDir) -> io::Result<Vec<(Self, u32)>> {
        let (mut dead, entries) = (Vec::new(), dir.entries()?);
        Self::remove_rests(dir, &entries);
        for file in entries {
            // An owner may die after either file was removed, or before it was made.
            let ending = |file: &'_ str| {
                [CONTROL, VM].iter().find_map(|ending| Some(file.strip_suffix(ending)?.strip_suffix('.')?.to_owned()))
            };
            let Some(name) = file.to_str().and_then(ending) else { continue };
            let name = name.as_str();
            if dead.iter().any(|(claim, _): &(Self, u32)| claim.name == name) {
                continue;
            }
            let pid = dir.read(&format!("{name}.{LOCK}")).ok().flatten();
            let pid = pid.and_then(|text| pid_in(&text)).unwrap_or(0);
            // Refused for live owners, and for invalid names.
            let Ok(claim) = Self::new(dir, name) else { continue };
            // An owner that has ended properly meanwhile removed it first.
            if statat(&dir.fd, &*file, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                dead.push((claim, pid));
            }
        }
        Ok(dead)
    }

    /// Removes the last files of those names among `files` whose owners are dead, and have removed the others.
    fn remove_rests(dir: &RuntimeDir, files: &[OsString]) {
        let names = |endings: [&str; 2]| -> BTreeSet<&str> {
            let files = files.iter().filter_map(|file| file.to_str());
            let name = |file| endings.iter().find_map(|ending| str::strip_suffix(file, ending)?.strip_suffix('.'));
            files.filter_map(name).collect()
        };
        let known = names([CONTROL, VM]);
        for name in names([END, LOCK]).difference(&known) {
            // An owner that is about to lock the file has not named itself.
            let pid = dir.read(&format!("{name}.{LOCK}")).ok().flatten().and_then(|text| pid_in(&text));
            let Some(pid) = pid.filter(|pid| !is_alive(*pid)) else { continue };
            let Ok(claim) = Self::new(dir, name) else { continue };
            let exists = |ending| statat(&dir.fd, &*format!("{name}.{ending}"), AtFlags::SYMLINK_NOFOLLOW).is_ok();
            if [CONTROL, VM].into_iter().any(exists) {
                // The owner has died after the directory was read.
                claim.leave_as_found(pid);
            }
        }
    }

    /// Claims the name of a VM whose process, `pid`, has ended without removing its files. None if
    /// they are gone, or the name is another's by now.
    ///
    /// # Errors
    /// When the process still has it.
    pub(crate) fn of_a_dead(dir: &RuntimeDir, name: &str, pid: u32) -> Result<Option<Self>, DaemonError> {
        match Self::owner(dir, name)? {
            Some(owner) if owner == pid => {}
            // This process already clears up after it.
            Some(owner) if owner == std::process::id() => return Err(DaemonError::Taken { name: name.to_owned() }),
            _ => return Ok(None),
        }
        // If the lock file has gone meanwhile, this makes a new one, and removes it.
        Self::new(dir, name).map(Some)
    }

    /// The pid of the process that has claimed the name, by the process's own account.
    ///
    /// # Errors
    /// When the lock file cannot be read.
    pub fn owner(dir: &RuntimeDir, name: &str) -> Result<Option<u32>, DaemonError> {
        let failed = |source| DaemonError::Runtime { path: dir.path.join(name), source };
        let owner = dir.read(&format!("{name}.{LOCK}")).map_err(failed)?;
        Ok(owner.and_then(|text| pid_in(&text)))
    }

    /// Leaves the name to the process that has the lock too.
    pub fn leave(mut self) {
        self.lock = None;
    }

    /// Leaves the name as its dead owner left it: with the owner's `pid` in the lock.
    pub fn leave_as_found(mut self, pid: u32) {
        if let Some(lock) = self.lock.take() {
            // Before the lock is free: then the file may be another owner's.
            write_pid(&lock, pid);
        }
    }

    /// Binds the socket `NAME.ending`, for this user alone (mode 0600). We hold the lock, so an
    /// existing one is a dead owner's.
    pub(super) fn bind(&self, ending: &str, kind: SocketType) -> Result<OwnedFd, DaemonError> {
        self.dir.bind(&format!("{}.{ending}", self.name), kind)
    }
}

/// The files passed to a VM's process, which may make none.
#[derive(Debug)]
pub struct VmFiles {
    /// The control socket.
    pub control: UnixListener,
    /// Socket for requests of other processes for its image.
    pub image: OwnedFd,
    /// The socket of the serial console.
    pub console: UnixListener,
    /// The virtio console's.
    pub hvc: Option<UnixListener>,
    /// File for the record of its end.
    pub record: File,
}

impl VmFiles {
    /// Builds it from the sockets by their endings, and the file for the end.
    ///
    /// # Errors
    /// When a socket is missing.
    pub fn of(mut sockets: BTreeMap<String, OwnedFd>, record: OwnedFd) -> io::Result<Self> {
        let missing =
            |ending: &str| io::Error::new(io::ErrorKind::InvalidData, format!("there is no socket .{ending}"));
        let mut take = |ending: &str| sockets.remove(ending).ok_or_else(|| missing(ending));
        let (control, image, console) = (take(CONTROL)?.into(), take(IMAGE)?, take(CONSOLE)?.into());
        Ok(Self { control, image, console, hvc: take(HVC).ok().map(UnixListener::from), record: record.into() })
    }
}

/// Whether there is a process of this number.
fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| !matches!(test_kill_process(pid), Err(Errno::SRCH)))
}

impl Drop for NameClaim {
    fn drop(&mut self) {
        // Another process that also has the lock may have removed the files before. Then the name
        // may have another owner.
        let is_ours = |lock: &File| self.removes && self.dir.has(&format!("{}.{LOCK}", self.name), lock);
        if self.lock.as_ref().is_some_and(is_ours) {
            for ending in ENDINGS {
                self.dir.forget(&format!("{}.{ending}", self.name));
            }
        }
        if self.removes {
            // Last: until then the lock is this process's.
            drop(self.lock.take());
            claimed().remove(&(self.dir.path.clone(), self.name.clone()));
        }
    }
}
