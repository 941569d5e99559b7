//! The files of a file system, and their changes since an instant.

use std::collections::BTreeMap;
use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The prefix of a removed file's name in a layer.
pub(super) const WHITEOUT: &[u8] = b".wh.";
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
    changed: (i64, i64),
}

impl FileIdentity {
    fn of(found: &Metadata) -> Self {
        Self { inode: found.ino(), changed: (found.ctime(), found.ctime_nsec()) }
    }
}

/// A file's kind, as far as a walk is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Directory(FileIdentity),
    Other(FileIdentity),
    /// A socket, or another file system.
    LeftOut,
}

/// The files of a file system by their paths below its root, parents first.
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

pub(super) fn place(root: &Path, path: &[u8]) -> PathBuf {
    root.join(std::ffi::OsStr::from_bytes(path))
}

fn is_left_out(kind: FileType, found: &Metadata, device: u64) -> bool {
    kind.is_socket() || found.dev() != device
}

impl Files {
    /// Lists the file system at `root`. A file that is removed meanwhile is missing.
    pub(crate) fn list(root: &Path) -> Result<Self, LayerError> {
        let device = fs::symlink_metadata(root).map_err(failed(root))?.dev();
        let (mut all, mut dirs) = (BTreeMap::new(), vec![Vec::new()]);
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
                let found = match fs::symlink_metadata(&place) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    found => found.map_err(failed(&place))?,
                };
                let identity = FileIdentity::of(&found);
                let found = match found.file_type() {
                    kind if is_left_out(kind, &found, device) => Found::LeftOut,
                    kind if kind.is_dir() => {
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
            if *found == Found::LeftOut || baseline.0.get(path) == Some(found) {
                continue;
            }
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            if name.starts_with(WHITEOUT) {
                return Err(LayerError::Whiteout(place(root, path)));
            }
            changes.push(Change::Present(path.clone()));
        }
        for (path, before) in &baseline.0 {
            // The content of a removed directory is hidden with it, or by a file in its place.
            let is_below = parent(path).is_some_and(|dir| !matches!(self.0.get(dir), Some(Found::Directory(_))));
            if *before != Found::LeftOut && !self.0.contains_key(path) && !is_below {
                changes.push(Change::Removed(path.clone()));
            }
        }
        Ok(changes)
    }
}

/// An error with its cause.
pub(crate) fn chain(error: &LayerError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}
