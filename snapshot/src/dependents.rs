//! Dependents: each snapshot has a note for each incremental one on top of it.
//!
//! A note is a file `.needed-by-XXXXXXXXXXXXXXXX` with the path of the dependent's directory. A
//! dependent is published only after its note is durable, so a dependent always has a note. A note
//! alone proves nothing: the dependent's manifest is read too. A dependent that was compacted,
//! replaced or moved away no longer counts.
//!
//! Notes are written under a shared lock of the base, and read, copied and removed under an
//! exclusive one ([`crate::lock`]). So the note of a dependent that is about to be published cannot
//! be mistaken for that of a removed one.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::chain::read_manifest;
use crate::dir::Dir;
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{SnapshotId, checksum};
use crate::staging::{MANIFEST, NEEDED_BY, random};

/// Most bytes of a path in a note.
const MAX_PATH: u64 = 4_096;
/// Notes in a snapshot before stale ones are removed.
pub(crate) const PRUNE_AT: usize = 1_024;

/// The result of writing a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// The note is durable.
    Yes,
    /// The base is read-only.
    ReadOnly,
}

/// Whether `base` has so many notes that stale ones should be removed first.
pub(crate) fn is_full(files: &FileOps, base: &Dir) -> Result<bool, Error> {
    Ok(notes(files, base)?.len() >= PRUNE_AT)
}

/// Writes a note into `base` for the snapshot at `dependent`. The base is locked.
///
/// # Errors
/// When the base is writable, and the note cannot be written.
pub(crate) fn note(files: &FileOps, base: &Dir, dependent: &Path) -> Result<Noted, Error> {
    let text = dependent.to_str().ok_or_else(|| Error::Path { path: dependent.to_owned() })?;
    match write_note(files, base, text) {
        Ok(()) => Ok(Noted::Yes),
        Err(Error::File { source, .. })
            if matches!(source.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied) =>
        {
            Ok(Noted::ReadOnly)
        }
        Err(error) => Err(error),
    }
}

fn write_note(files: &FileOps, base: &Dir, text: &str) -> Result<(), Error> {
    // One note for each path, found again without listing the directory.
    let name = format!("{NEEDED_BY}{:016x}", checksum(text.as_bytes()));
    match files.read_in(base, &name, MAX_PATH) {
        // The note may not be durable: its writer may have ended before the sync.
        Ok(bytes) if bytes == text.as_bytes() => {
            files.sync(&files.open_in(base, &name)?, &base.path().join(&name))?;
            return files.sync_open_dir(base);
        }
        Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
            match files.write_in(base, &name, text.as_bytes()) {
                // Another save to the same path makes it at this moment, and needs it.
                Err(Error::File { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {}
                written => return written.and_then(|()| files.sync_open_dir(base)),
            }
        }
        _ => {}
    }
    let name = format!("{NEEDED_BY}{:016x}", random()? as u64);
    files.write_in(base, &name, text.as_bytes())?;
    // If that fails the note stays: another save may rely on it, and alone it proves nothing.
    files.sync_open_dir(base)
}

fn notes(files: &FileOps, dir: &Dir) -> Result<Vec<String>, Error> {
    files.names_like(dir, NEEDED_BY)
}

/// Copies the valid notes of `dir` to `aside`, which takes its place and its identity. The
/// directory is locked exclusively.
pub(crate) fn carry(files: &FileOps, dir: &Dir, aside: &Path, id: SnapshotId) -> Result<(), Error> {
    for name in notes(files, dir)? {
        // A note that cannot be read cannot be copied either: nothing is replaced.
        match standing(files, dir, &name, Some(id))? {
            Standing::Gone => {}
            Standing::Needs(by) => files.write(&aside.join(name), by.as_os_str().as_encoded_bytes())?,
        }
    }
    Ok(())
}

/// Removes the notes in `dir` whose dependents are gone. The directory is locked exclusively.
pub(crate) fn prune(files: &FileOps, dir: &Dir) -> Result<(), Error> {
    let id = read_manifest(files, dir)?.id;
    for name in notes(files, dir)? {
        // A note that cannot be read stays.
        if matches!(standing(files, dir, &name, Some(id)), Ok(Standing::Gone)) {
            match files.unlink(dir, &name) {
                // The note stays, and does no harm.
                Err(Error::File { source, .. })
                    if matches!(source.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied) =>
                {
                    return Ok(());
                }
                other => other?,
            }
        }
    }
    Ok(())
}

/// Refuses if another snapshot depends on the one in `dir`. The result holds while the directory is
/// locked exclusively.
///
/// # Errors
/// [`Error::Needed`] with one of the dependents. When a note cannot be read.
pub(crate) fn expect_none(files: &FileOps, dir: &Dir) -> Result<(), Error> {
    let own = match read_manifest(files, dir) {
        Ok(manifest) => Some(manifest.id),
        // Its dependents may be whole, as those of a later version of the format are.
        Err(Error::Damaged { .. } | Error::NotAFile { .. }) => None,
        Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in notes(files, dir)? {
        if let Standing::Needs(by) = standing(files, dir, &name, own)? {
            return Err(Error::Needed { path: dir.path().to_owned(), by });
        }
    }
    Ok(())
}

/// The validity of a note.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    /// The dependent is there and depends on the snapshot, or cannot be read.
    Needs(PathBuf),
    /// There is no such dependent.
    Gone,
}

/// Examines a note in `dir`, a snapshot of the identity `on`. Without it, each snapshot at the note's path that
/// has a base counts.
///
/// # Errors
/// When the note cannot be read: nothing is known of its dependent.
fn standing(files: &FileOps, dir: &Dir, name: &str, on: Option<SnapshotId>) -> Result<Standing, Error> {
    let text = match files.read_in(dir, name, MAX_PATH) {
        Ok(bytes) => String::from_utf8(bytes).ok(),
        // A name that leads to no file, or to more bytes than a path has, is no note.
        Err(Error::Damaged { .. } | Error::NotAFile { .. }) => None,
        Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let Some(path) = text.map(PathBuf::from).filter(|path| path.is_absolute()) else { return Ok(Standing::Gone) };
    let needs = |parent: SnapshotId| on.is_none_or(|on| on == parent);
    Ok(match files.dir(&path).and_then(|dir| read_manifest(files, &dir)) {
        Ok(manifest) if manifest.parent.as_ref().is_some_and(|parent| needs(parent.id)) => Standing::Needs(path),
        Ok(_) => Standing::Gone,
        // The path is missing, or leads to a file or another directory.
        Err(Error::File { source, .. }) if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Standing::Gone
        }
        Err(Error::NotAFile { .. }) => Standing::Gone,
        Err(error) => {
            tracing::debug!(dependent = %path.join(MANIFEST).display(), %error, "cannot be looked at");
            Standing::Needs(path)
        }
    })
}
