//! The transaction: a directory is written beside its place, and put there in one step.
//!
//! 1. Leftovers of crashes are removed: directories with our prefix whose lock is free.
//! 2. A directory `.NAME.clade-XXXXXXXXXXXXXXXX` is made beside the target and locked (flock on the
//!    directory itself, so that the lock ends with the process).
//! 3. Everything is written there, each file synced, then the directory.
//! 4. One rename: to the target if it does not exist, else the two are exchanged.
//! 5. The parent directory is synced, and only then is the old snapshot removed: until the sync, a
//!    power cut can bring the old names back.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::files::FileOps;
use crate::format::Manifest;

pub(crate) const MANIFEST: &str = "manifest.json";
/// Maximum bytes of a manifest.
pub(crate) const MAX_MANIFEST: u64 = 16 << 20;
pub(crate) const STATE: &str = "state";
pub(crate) const WORKING_SET: &str = "warm";
/// The prefix of a working-set file until it has its name.
pub(crate) const WORKING_SET_ASIDE: &str = ".warm-";
/// The prefix of a dependent's note, before 16 digits.
pub(crate) const NEEDED_BY: &str = ".needed-by-";
const MARK: &str = ".clade-";
/// Most bytes of a target's name in that of the directory beside it, which has 24 more, of at most 255.
const MAX_STEM: usize = 200;

/// A random number for a new snapshot.
pub(crate) fn random() -> Result<u128, Error> {
    let mut bytes = [0; 16];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(some) => done += some,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::file("read", "/dev/urandom", error.into())),
        }
    }
    Ok(u128::from_le_bytes(bytes))
}

/// The name of a layer's files: of memory, or of a disk.
pub(crate) fn layer_name(disk: Option<usize>) -> String {
    disk.map_or_else(|| "memory".to_owned(), |disk| format!("disk-{disk}"))
}

/// Whether a snapshot may have a file of this name.
fn is_ours(name: &str) -> bool {
    let layer = |stem: &str| {
        let number = stem.strip_prefix("disk-").unwrap_or("");
        stem == "memory" || (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    [MANIFEST, STATE, WORKING_SET].contains(&name)
        || name.strip_prefix(WORKING_SET_ASIDE).is_some_and(is_hex)
        || name.strip_prefix(NEEDED_BY).is_some_and(is_hex)
        || name.strip_suffix(".data").or_else(|| name.strip_suffix(".index")).is_some_and(layer)
}

fn is_hex(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_aside(name: &str) -> bool {
    name.starts_with('.') && name.rsplit_once(MARK).is_some_and(|(stem, mark)| stem.len() > 1 && is_hex(mark))
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The path of a snapshot: its parent directory, resolved, and its own name.
pub(crate) fn place(dir: &Path) -> Result<PathBuf, Error> {
    let unusable = || Error::Path { path: dir.to_owned() };
    let found = match dir.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = dir.file_name().ok_or_else(unusable)?;
            let parent = match dir.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            parent.canonicalize().map(|parent| parent.join(name))
        }
        other => other,
    };
    let place = found.map_err(|source| Error::file("found", dir, source))?;
    if place.to_str().is_none() || place.file_name().is_none() {
        return Err(unusable());
    }
    Ok(place)
}

/// Checks that a snapshot may be put at `dir`: nothing is there, or an empty directory, or a
/// snapshot and no other file.
pub(crate) fn expect_replaceable(files: &FileOps, dir: &Path) -> Result<(), Error> {
    let refuse = |found: &str| Err(Error::NotASnapshot { path: dir.to_owned(), found: found.to_owned() });
    match dir.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::file("looked at", dir, source)),
        Ok(meta) if !meta.is_dir() => return refuse("no files: it is no directory"),
        Ok(_) => {}
    }
    let names: Vec<String> = files.list(dir)?.iter().map(|path| name_of(path)).collect();
    if let Some(alien) = names.iter().find(|name| !is_ours(name)) {
        return refuse(&format!("{alien:?} in it"));
    }
    if !names.is_empty() && !names.iter().any(|name| name == MANIFEST) {
        return refuse("no manifest.json");
    }
    // Other programs have files of that name.
    let is_alone = !names.is_empty() && names.iter().all(|name| name == MANIFEST);
    if is_alone && !files.read_in(&files.dir(dir)?, MANIFEST, MAX_MANIFEST).is_ok_and(|text| Manifest::is_one(&text)) {
        return refuse("a manifest.json of another format, and no other file");
    }
    Ok(())
}

/// Removes an open directory of snapshot files. Other files stay, and the directory with them.
fn remove(files: &FileOps, dir: &File, path: &Path) -> Result<(), Error> {
    for name in files.names_in(dir, path)? {
        if name.to_str().is_some_and(is_ours) {
            files.remove_in(dir, path, &name)?;
        }
    }
    files.remove_dir(path)
}

/// Removes leftovers of crashes in `parent`. Those that cannot be removed stay until the next save.
fn sweep(files: &FileOps, parent: &Path) -> Result<(), Error> {
    let stale: Vec<PathBuf> = files.list(parent)?.into_iter().filter(|path| is_aside(&name_of(path))).collect();
    if stale.is_empty() {
        return Ok(());
    }
    // One of them may be an old snapshot, and the rename that replaced it may not be durable yet.
    files.sync_dir(parent)?;
    for path in stale {
        if let Err(error) = sweep_one(files, &path) {
            tracing::debug!(path = %path.display(), %error, "not swept");
        }
    }
    Ok(())
}

/// Removes a leftover directory. Another user may have put a link or a directory there: links are
/// not followed, and directories of other users stay.
fn sweep_one(files: &FileOps, path: &Path) -> Result<(), Error> {
    let dir = files.open_real_dir(path)?;
    let owner = dir.metadata().map_err(|source| Error::file("looked at", path, source))?.uid();
    // Before it was locked it may have been put in place: it is a snapshot then.
    if owner == rustix::process::geteuid().as_raw() && files.try_lock(&dir, path)? && leads_to(path, &dir) {
        remove(files, &dir, path)?;
    }
    Ok(())
}

/// Returns whether `path` leads to an open directory.
fn leads_to(path: &Path, dir: &File) -> bool {
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    dir.metadata().and_then(|open| Ok(same(open, path.symlink_metadata()?))).unwrap_or(false)
}

/// A directory being written. Dropped before it is published, it is removed.
#[derive(Debug)]
pub(crate) struct StagingDir<'f> {
    files: &'f FileOps,
    place: PathBuf,
    path: PathBuf,
    /// Held while it is written: a save that gets the lock may remove the directory.
    lock: Option<File>,
    /// Whether to remove it on drop: it was not published, or it is the old snapshot.
    garbage: bool,
}

impl<'f> StagingDir<'f> {
    /// Makes a directory beside `place` (see [`place`]), after removing leftovers.
    pub(crate) fn create(files: &'f FileOps, place: PathBuf) -> Result<Self, Error> {
        let parent = place.parent().ok_or_else(|| Error::Path { path: place.clone() })?;
        sweep(files, parent)?;
        let name = name_of(&place);
        let stem = &name[..name.floor_char_boundary(MAX_STEM)];
        loop {
            let path = parent.join(format!(".{stem}{MARK}{:016x}", random()? as u64));
            files.make_dir(&path)?;
            let made = Self::lock(files, &path);
            match made {
                Ok(Some(lock)) => return Ok(Self { files, place, path, lock: Some(lock), garbage: true }),
                // Another save has removed it before it was locked.
                Ok(None) => {}
                Err(error) => {
                    let _ = files.remove_dir(&path);
                    return Err(error);
                }
            }
        }
    }

    fn lock(files: &FileOps, path: &Path) -> Result<Option<File>, Error> {
        let dir = match files.open_real_dir(path) {
            Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if !files.try_lock(&dir, path)? {
            return Ok(None);
        }
        Ok(leads_to(path, &dir).then_some(dir))
    }

    /// The directory to write to.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the directory into place: over the existing snapshot, which the caller has locked, or
    /// to an unused name. All files in it must be synced. Returns false if the state of the target
    /// contradicts `over`. After an error the snapshot may nevertheless be in place, complete, but
    /// perhaps not durable; not after an error of `check`, which is the last step before.
    pub(crate) fn publish(&mut self, over: bool, check: &dyn Fn() -> Result<(), Error>) -> Result<bool, Error> {
        self.files.sync_dir(&self.path)?;
        check()?;
        let put = if over {
            self.files.exchange(&self.path, &self.place)?
        } else {
            self.files.rename_new(&self.path, &self.place)?
        };
        if !put {
            return Ok(false);
        }
        // The staging directory is the old snapshot now, and is kept until the rename is durable.
        self.garbage = false;
        self.files.sync_dir(self.place.parent().unwrap_or(&self.place))?;
        self.garbage = over;
        // A save on top of this snapshot need not wait until the old one is removed.
        self.lock = None;
        Ok(true)
    }
}

impl Drop for StagingDir<'_> {
    fn drop(&mut self) {
        // Opened again: it may be the old snapshot.
        let removed = || remove(self.files, &self.files.open_real_dir(&self.path)?, &self.path);
        if self.garbage
            && let Err(error) = removed()
        {
            // The next save removes it.
            tracing::debug!(path = %self.path.display(), %error, "not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_is_ours() {
        for ours in [
            "manifest.json",
            "state",
            "memory.data",
            "memory.index",
            "disk-0.data",
            "disk-12.index",
            "warm",
            ".warm-0123456789abcdef",
        ] {
            assert!(is_ours(ours), "{ours}");
        }
        for alien in ["notes.txt", "disk-.data", "disk-x.data", "memory", "manifest.json~", ".warm-1", "lost+found"] {
            assert!(!is_ours(alien), "{alien}");
        }
        assert!(is_aside(".base.clade-0123456789abcdef"));
        assert!(
            !is_aside("base.clade-0123456789abcdef")
                && !is_aside(".base.clade-012")
                && !is_aside(".clade-0123456789abcdef")
        );
    }
}
