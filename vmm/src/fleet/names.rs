//! Names of VMs, and the sockets that go with them.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::FleetError;

/// Longest name: a socket's path must fit 108 bytes.
pub const LONGEST_NAME: usize = 48;

/// Where sockets live: `$CLADE_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/clade`, else `/tmp/clade-UID`.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("CLADE_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        return dir.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        Some(dir) => Path::new(&dir).join("clade"),
        None => PathBuf::from(format!("/tmp/clade-{}", rustix::process::getuid().as_raw())),
    }
}

/// Makes the runtime directory, for this user alone.
pub(super) fn make_runtime_dir(dir: &Path) -> Result<(), FleetError> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |source| FleetError::Runtime { path: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let owner = fs::metadata(dir).map_err(failed)?.uid();
    if owner != rustix::process::getuid().as_raw() {
        // Under /tmp somebody else may have been there first.
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, format!("it belongs to user {owner}"))));
    }
    Ok(())
}

/// Checks a name.
///
/// # Errors
/// [`FleetError::BadName`].
pub fn check_name(name: &str) -> Result<(), FleetError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if first && rest && name.len() <= LONGEST_NAME {
        Ok(())
    } else {
        Err(FleetError::BadName { name: name.to_owned() })
    }
}

/// Paths of a VM's sockets.
#[must_use]
pub fn socket_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// Path of a VM's console.
#[must_use]
pub fn console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.console"))
}

/// Path of a VM's virtio console, if it has one.
#[must_use]
pub fn virtio_console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.hvc"))
}

/// A name held on this host. The lock goes with the process, so a crashed owner's name is free again.
#[derive(Debug)]
pub(super) struct Claim {
    dir: PathBuf,
    pub(super) name: String,
    _lock: File,
}

impl Claim {
    pub(super) fn new(dir: &Path, name: &str) -> Result<Self, FleetError> {
        check_name(name)?;
        let path = dir.join(format!("{name}.lock"));
        let failed = |source| FleetError::Runtime { path: path.clone(), source };
        let lock = loop {
            let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(FleetError::Taken { name: name.to_owned() }),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            // An owner that left after the file was opened has removed it: what is locked then is no longer the name's.
            let locked = lock.metadata().map_err(failed)?;
            match fs::metadata(&path) {
                Ok(named) if (named.dev(), named.ino()) == (locked.dev(), locked.ino()) => break lock,
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        };
        Ok(Self { dir: dir.to_owned(), name: name.to_owned(), _lock: lock })
    }

    pub(super) fn bind(&self, path: &Path) -> Result<UnixListener, FleetError> {
        let failed = |source| FleetError::Runtime { path: path.to_owned(), source };
        // The lock is ours, so a socket that is there is a dead owner's.
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        UnixListener::bind(path).map_err(failed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock file last: while it is locked nobody else binds these.
        for path in [socket_path, console_path, virtio_console_path] {
            let _ = fs::remove_file(path(&self.dir, &self.name));
        }
        let _ = fs::remove_file(self.dir.join(format!("{}.lock", self.name)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", "../x", "a/b", ".hidden", "-x", "a b", "ä", &"x".repeat(49)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "web-1", "A.b_c", &"x".repeat(48)] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_after() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim::new(dir.path(), "a").unwrap();
        claim.bind(&socket_path(dir.path(), "a")).unwrap();
        assert!(matches!(Claim::new(dir.path(), "a"), Err(FleetError::Taken { .. })));
        drop(claim);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
        Claim::new(dir.path(), "a").unwrap();
    }

    #[test]
    fn a_dead_owners_sockets_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(socket_path(dir.path(), "a")).unwrap());
        assert!(socket_path(dir.path(), "a").exists());
        let claim = Claim::new(dir.path(), "a").unwrap();
        claim.bind(&socket_path(dir.path(), "a")).unwrap();
    }
}
