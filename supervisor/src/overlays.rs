//! Directories for the overlays of confined VMs' disks.
//!
//! Overlays have no names. In a directory without other files, a process that may open files there
//! can open no other VM's. One such directory is made beside each directory of overlays at its
//! first use, and removed with the last VM that uses it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clade_api::DaemonError;

/// The directory's name.
const UNNAMED: &str = ".clade-overlays";

/// Returns the directory for overlays that would otherwise be made in `dir`.
pub(super) fn unnamed_in(dir: &Path) -> PathBuf {
    if dir.file_name().is_some_and(|name| name == UNNAMED) { dir.to_owned() } else { dir.join(UNNAMED) }
}

/// Number of users of each directory.
#[derive(Clone, Debug, Default)]
pub(super) struct OverlayDirs(Arc<Mutex<BTreeMap<PathBuf, usize>>>);

/// Directories that exist until this is dropped.
#[derive(Debug)]
pub(super) struct OverlayUse {
    of: OverlayDirs,
    pub(super) paths: Vec<PathBuf>,
}

impl OverlayDirs {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<PathBuf, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes missing directories, and holds them all.
    ///
    /// # Errors
    /// When a directory cannot be made, or is not this user's alone. Then none is held.
    pub(super) fn hold(&self, paths: &[PathBuf]) -> Result<OverlayUse, DaemonError> {
        let mut held = OverlayUse { of: self.clone(), paths: Vec::with_capacity(paths.len()) };
        for path in paths {
            let mut counts = self.counts();
            make(path).map_err(|source| DaemonError::Overlays { path: path.clone(), source })?;
            *counts.entry(path.clone()).or_default() += 1;
            drop(counts);
            held.paths.push(path.clone());
        }
        Ok(held)
    }

    /// Counts users from before this process.
    pub(super) fn found(&self, paths: &[PathBuf]) {
        paths.iter().for_each(|path| *self.counts().entry(path.clone()).or_default() += 1);
    }

    /// Forgets users, and removes directories without any.
    pub(super) fn release(&self, paths: &[PathBuf]) {
        for path in paths {
            let mut counts = self.counts();
            let left = counts.get_mut(path).map_or(0, |count| {
                *count = count.saturating_sub(1);
                *count
            });
            if left > 0 {
                continue;
            }
            counts.remove(path);
            // Under the lock: no other thread makes it meanwhile.
            if let Err(error) = fs::remove_dir(path) {
                tracing::debug!(%error, path = %path.display(), "a directory of overlays stays");
            }
        }
    }
}

impl OverlayUse {
    /// Leaves the directories to a VM, whose record names them.
    pub(super) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for OverlayUse {
    fn drop(&mut self) {
        self.of.release(&self.paths);
    }
}

fn make(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(path)?;
    let is_ours = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0;
    if is_ours { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_is_there_as_long_as_somebody_uses_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = unnamed_in(dir.path());
        assert_eq!(unnamed_in(&path), path, "a child's children use their parent's");
        let dirs = OverlayDirs::default();
        let one = dirs.hold(&[path.clone(), path.clone()]).unwrap();
        let other = dirs.hold(std::slice::from_ref(&path)).unwrap();
        drop(one);
        assert!(path.is_dir());
        other.keep();
        assert!(path.is_dir());
        dirs.release(std::slice::from_ref(&path));
        assert!(!path.exists());
        // A supervisor that comes back finds it.
        fs::create_dir(&path).unwrap();
        dirs.found(std::slice::from_ref(&path));
        drop(dirs.hold(std::slice::from_ref(&path)).unwrap());
        assert!(path.is_dir());
        dirs.release(std::slice::from_ref(&path));
        assert!(!path.exists());
    }

    #[test]
    fn one_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = unnamed_in(dir.path());
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let dirs = OverlayDirs::default();
        assert!(matches!(dirs.hold(std::slice::from_ref(&path)), Err(DaemonError::Overlays { .. })));
        let nowhere = dir.path().join("no/where");
        assert!(matches!(dirs.hold(&[nowhere]), Err(DaemonError::Overlays { .. })));
        assert!(dirs.counts().is_empty());
    }
}
