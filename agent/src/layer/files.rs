//! The files of a file system, and their changes since an instant.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};
use thiserror::Error;

/// The prefix of a removed file's name in a layer.
pub(super) const WHITEOUT: &[u8] = b".wh.";
/// Longest name of a file.
const MAX_NAME: usize = 255;
/// Most files of a file system, as of an image.
const MAX_FILES: usize = 1_000_000;

/// Why there is no layer.
#[derive(Debug, Error)]
pub(crate) enum LayerError {
    #[error("{} cannot be read", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("there are more than {MAX_FILES} files")]
    TooMany,
    #[error("{} has a name that hides another file in a layer", .0.display())]
    Whiteout(PathBuf),
    #[error("{} has been removed, and its name is too long to be hidden in a layer", .0.display())]
    LongName(PathBuf),
    #[error("no layer has been begun")]
    NotBegun,
}

pub(super) fn failed(path: &Path) -> impl FnOnce(io::Error) -> LayerError {
    let path = path.to_owned();
    move |source| LayerError::File { path, source }
}

/// The identity of a file's content and metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity {
    inode: u64,
    changed: (i64, u32),
}

impl FileIdentity {
    fn of(found: &Statx) -> Self {
        Self { inode: found.stx_ino, changed: (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec) }
    }
}

/// The mount that a file is of: its file system, and its number where the kernel has one. A bind
/// mount has the file system of its source.
fn mount(found: &Statx) -> (u32, u32, u64) {
    let number =
        if StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::MNT_ID) { found.stx_mnt_id } else { 0 };
    (found.stx_dev_major, found.stx_dev_minor, number)
}

fn look(path: &Path) -> io::Result<Statx> {
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::CTIME | StatxFlags::MNT_ID;
    Ok(statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, wanted)?)
}

/// A file's kind, as far as a walk is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Directory(FileIdentity),
    Other(FileIdentity),
    Socket,
    /// A mount point. The file below it is not seen.
    Mount,
}

impl Found {
    /// Whether a layer may have it.
    fn is_kept(self) -> bool {
        matches!(self, Self::Directory(_) | Self::Other(_))
    }
}

/// The files of a file system by their paths below its root, parents first. The root has the empty path.
#[derive(Debug, Default)]
pub(crate) struct Files(BTreeMap<Vec<u8>, Found>);

/// The identities of all files at an instant.
pub(crate) type Baseline = Files;

/// A change since the baseline, by its path below the root.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A file that is new, or has changed.
    Present(Vec<u8>),
    Removed(Vec<u8>),
}

fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|byte| *byte == b'/').map(|at| &path[..at])
}

pub(super) fn name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

pub(super) fn place(root: &Path, path: &[u8]) -> PathBuf {
    root.join(std::ffi::OsStr::from_bytes(path))
}

impl Files {
    /// Lists the file system at `root`. A file that is removed meanwhile is missing.
    pub(crate) fn list(root: &Path) -> Result<Self, LayerError> {
        let found = look(root).map_err(failed(root))?;
        let (own, identity) = (mount(&found), FileIdentity::of(&found));
        let (mut all, mut dirs) = (BTreeMap::from([(Vec::new(), Found::Directory(identity))]), vec![Vec::new()]);
        while let Some(dir) = dirs.pop() {
            let path = place(root, &dir);
            let entries = match fs::read_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(failed(&path))?,
            };
            for entry in entries {
                let name = entry.map_err(failed(&path))?.file_name().into_vec();
                let path = if dir.is_empty() { name } else { [&dir[..], b"/", &name].concat() };
                let place = place(root, &path);
                let found = match look(&place) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    found => found.map_err(failed(&place))?,
                };
                let identity = FileIdentity::of(&found);
                let found = match FileType::from_raw_mode(found.stx_mode.into()) {
                    _ if mount(&found) != own => Found::Mount,
                    FileType::Socket => Found::Socket,
                    FileType::Directory => {
                        dirs.push(path.clone());
                        Found::Directory(identity)
                    }
                    _ => Found::Other(identity),
                };
                if all.len() == MAX_FILES {
                    return Err(LayerError::TooMany);
                }
                all.insert(path, found);
            }
        }
        Ok(Self(all))
    }

    /// Returns the changes from `baseline` to these files: directories before their content, and
    /// removed files last.
    pub(crate) fn changes(&self, root: &Path, baseline: &Baseline) -> Result<Vec<Change>, LayerError> {
        let mut changes = Vec::new();
        for (path, found) in &self.0 {
            if !found.is_kept() || baseline.0.get(path) == Some(found) {
                continue;
            }
            if name(path).starts_with(WHITEOUT) {
                return Err(LayerError::Whiteout(place(root, path)));
            }
            changes.push(Change::Present(path.clone()));
        }
        for (path, before) in &baseline.0 {
            // The content of a removed directory is hidden with it, or by a file in its place.
            let is_below = parent(path).is_some_and(|dir| !matches!(self.0.get(dir), Some(Found::Directory(_))));
            // A socket is in no layer, and must not leave the file whose place it took.
            let is_gone = matches!(self.0.get(path), None | Some(Found::Socket));
            if !before.is_kept() || !is_gone || is_below {
                continue;
            }
            if name(path).len() + WHITEOUT.len() > MAX_NAME {
                return Err(LayerError::LongName(place(root, path)));
            }
            changes.push(Change::Removed(path.clone()));
        }
        Ok(changes)
    }
}

/// An error with its cause.
pub(crate) fn chain(error: &LayerError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}
