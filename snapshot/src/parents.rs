//! The directories in which a snapshot may have parents.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

use crate::dir::{Dir, DirId, identity};
use crate::error::Error;

/// The maximum depth of a parent's directory below an allowed one.
const MAX_LEVELS: usize = 256;

/// The directories in which a snapshot may have parents.
///
/// A manifest can be forged, and names the parent by a path. Without a bound, the restored guest
/// reads any snapshot of this host that its owner may read. So a parent must be a sibling of the
/// opened snapshot, or beneath a directory that the caller allows. Links are resolved first.
#[derive(Clone, Debug)]
pub struct ParentDirs(Allowed);

#[derive(Clone, Debug)]
enum Allowed {
    /// Siblings, and directories beneath these.
    Beneath(Vec<PathBuf>),
    /// These directories alone: the opened snapshot's, and those of its parents.
    Known(Vec<DirId>),
    Unchecked,
}

/// A directory of a snapshot that was opened, for another process that opens it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Recorded")]
pub struct KnownDir {
    /// Its path, without links at that time.
    pub path: PathBuf,
    /// Its device and inode number. None in a record of an earlier version.
    pub id: Option<DirId>,
}

/// A directory as this or an earlier version has recorded it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Recorded {
    Path(PathBuf),
    Known { path: PathBuf, id: Option<DirId> },
}

impl KnownDir {
    /// The directory at `path`, of which nothing is read. A link at its end is refused.
    ///
    /// # Errors
    /// When `path` is not a directory.
    pub fn at(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(CWD, path, flags, Mode::empty());
        let dir = opened.map(File::from).map_err(|errno| Error::file("opened", path, errno.into()))?;
        let real = real_path(&dir).unwrap_or_else(|| path.to_owned());
        Ok(Self { path: real, id: Some(id_of(&dir)?) })
    }
}

impl From<Recorded> for KnownDir {
    fn from(recorded: Recorded) -> Self {
        match recorded {
            Recorded::Path(path) => Self { path, id: None },
            Recorded::Known { path, id } => Self { path, id },
        }
    }
}

impl Default for ParentDirs {
    fn default() -> Self {
        Self::siblings()
    }
}

impl ParentDirs {
    /// Allows siblings of the opened snapshot.
    #[must_use]
    pub const fn siblings() -> Self {
        Self::beneath(Vec::new())
    }

    /// Allows siblings, and all directories beneath those in `allowed`.
    #[must_use]
    pub const fn beneath(allowed: Vec<PathBuf>) -> Self {
        Self(Allowed::Beneath(allowed))
    }

    /// Allows the directories of a chain that was opened before ([`crate::Snapshot::known_dirs`]),
    /// even if other directories have their paths by now.
    #[must_use]
    pub fn known(dirs: &[KnownDir]) -> Self {
        Self(Allowed::Known(dirs.iter().filter_map(|dir| dir.id).collect()))
    }

    /// Allows all directories: for a chain of which no page is read.
    pub(crate) const fn unchecked() -> Self {
        Self(Allowed::Unchecked)
    }

    /// Checks the directory of the opened snapshot.
    pub(crate) fn check_newest(&self, newest: &Dir) -> Result<(), Error> {
        match &self.0 {
            Allowed::Known(ids) if ids.first() != Some(&id_of(newest.file())?) => {
                Err(Error::Exchanged { path: newest.path().to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Checks that `parent` may be a parent of the snapshot in `newest`.
    pub(crate) fn check(&self, newest: &Dir, parent: &Dir) -> Result<(), Error> {
        let allowed = match &self.0 {
            Allowed::Unchecked => return Ok(()),
            Allowed::Known(ids) if ids.contains(&id_of(parent.file())?) => return Ok(()),
            Allowed::Known(_) => return Err(Error::Exchanged { path: parent.path().to_owned() }),
            Allowed::Beneath(allowed) => allowed,
        };
        let beside = above(newest.file(), newest.path())?;
        let holder = above(parent.file(), parent.path())?;
        if id_of(&beside)? == id_of(&holder)? {
            return Ok(());
        }
        for dir in allowed {
            if beneath(parent, &open(CWD, dir, dir)?)? {
                return Ok(());
            }
        }
        let beside = real_path(&beside).unwrap_or_else(|| newest.path().join(".."));
        Err(Error::Elsewhere { path: parent.path().to_owned(), beside })
    }
}

/// Whether `dir` is beneath `top`, or `top` itself.
fn beneath(dir: &Dir, top: &File) -> Result<bool, Error> {
    let wanted = id_of(top)?;
    let mut at = id_of(dir.file())?;
    let mut level = dir.file().try_clone().map_err(|source| Error::file("opened", dir.path(), source))?;
    for _ in 0..MAX_LEVELS {
        if at == wanted {
            return Ok(true);
        }
        level = above(&level, dir.path())?;
        let next = id_of(&level)?;
        // The root directory holds itself.
        if next == at {
            return Ok(false);
        }
        at = next;
    }
    Ok(false)
}

/// The directory that holds the open directory `dir`.
fn above(dir: &File, path: &Path) -> Result<File, Error> {
    open(dir, Path::new(".."), path)
}

fn open(from: impl std::os::fd::AsFd, name: &Path, path: &Path) -> Result<File, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(from, name, flags, Mode::empty());
    opened.map(File::from).map_err(|errno| Error::file("opened", path, errno.into()))
}

pub(crate) fn id_of(dir: &File) -> Result<DirId, Error> {
    dir.metadata().map(|meta| identity(&meta)).map_err(|source| Error::file("looked at", "a directory", source))
}

/// The path of an open directory without links, as long as that exists.
pub(crate) fn real_path(dir: &File) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).ok().filter(|path| path.is_absolute())
}
