//! Who depends on a snapshot: a note in it for each incremental one that is made on top of it.
//!
//! A note is a file `.needed-by-XXXXXXXXXXXXXXXX` with the path of the dependent's directory. It is
//! written, and on the disk, before the dependent is published, so that there is no moment at which
//! a dependent is not noted. A note alone proves nothing: the dependent is looked at before it is
//! believed. One that was compacted, replaced or moved away needs nothing any more.
//!
//! Notes are written under a shared lock of the base, and looked at, copied or removed under an
//! exclusive one ([`crate::lock`]): the note of a dependent that is about to be published is not
//! taken for that of one that is gone.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::aside::{MANIFEST, NEEDED_BY, random};
use crate::chain::read_manifest;
use crate::dir::Dir;
use crate::error::Error;
use crate::files::Files;
use crate::format::{SnapshotId, checksum};

/// Longest path that is believed.
const MAX_PATH: u64 = 4_096;
/// Notes in a snapshot before those of dependents that are gone are removed.
pub(crate) const MANY: usize = 1_024;

/// What became of a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// It is on the disk.
    Yes,
    /// Nothing may be written into the base.
    ReadOnly,
}

/// Whether so many are noted in `base` that old notes should go first.
pub(crate) fn is_full(files: &Files, base: &Dir) -> Result<bool, Error> {
    Ok(notes(files, base)?.len() >= MANY)
}

/// Notes in `base` that the snapshot at `dependent` is made on top of it. The base is locked.
///
/// # Errors
/// When it can be written into, and the note cannot.
pub(crate) fn note(files: &Files, base: &Dir, dependent: &Path) -> Result<Noted, Error> {
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

fn write_note(files: &Files, base: &Dir, text: &str) -> Result<(), Error> {
    // One for each path, found again without looking at all.
    let mut name = format!("{NEEDED_BY}{:016x}", checksum(text.as_bytes()));
    match files.read_in(base, &name, MAX_PATH) {
        // Its sync may have failed for whoever wrote it.
        Ok(bytes) if bytes == text.as_bytes() => return files.sync_open_dir(base),
        Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        _ => name = format!("{NEEDED_BY}{:016x}", random()? as u64),
    }
    let written = files.write_in(base, &name, text.as_bytes()).and_then(|()| files.sync_open_dir(base));
    if written.is_err() {
        // Half a path could be another's.
        let _ = files.unlink(base, &name);
    }
    written
}

fn notes(files: &Files, dir: &Dir) -> Result<Vec<String>, Error> {
    files.names_like(dir, NEEDED_BY)
}

/// Copies the notes in `dir` that still hold to `aside`, which takes its place and its identity.
/// The directory is locked exclusively.
pub(crate) fn carry(files: &Files, dir: &Dir, aside: &Path, id: SnapshotId) -> Result<(), Error> {
    for name in notes(files, dir)? {
        match standing(files, dir, &name, id) {
            Standing::Gone => {}
            Standing::Needs(by) => files.write(&aside.join(name), by.as_os_str().as_encoded_bytes())?,
        }
    }
    Ok(())
}

/// Removes the notes in `dir` of dependents that are gone. The directory is locked exclusively.
pub(crate) fn prune(files: &Files, dir: &Dir) -> Result<(), Error> {
    let id = read_manifest(files, dir)?.id;
    for name in notes(files, dir)? {
        if standing(files, dir, &name, id) == Standing::Gone {
            match files.unlink(dir, &name) {
                // Then it stays: it harms nothing.
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

/// Refuses when another snapshot depends on the one in `dir`. What it finds holds for as long as
/// the directory is locked exclusively.
///
/// # Errors
/// [`Error::Needed`], which names one of them.
pub(crate) fn expect_none(files: &Files, dir: &Dir) -> Result<(), Error> {
    let own = match read_manifest(files, dir) {
        Ok(manifest) => manifest.id,
        // Nothing can depend on what cannot be read.
        Err(Error::Damaged { .. } | Error::NotAFile { .. }) => return Ok(()),
        Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in notes(files, dir)? {
        if let Standing::Needs(by) = standing(files, dir, &name, own) {
            return Err(Error::Needed { path: dir.path().to_owned(), by });
        }
    }
    Ok(())
}

/// What is to be thought of a note.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    /// That one is there and depends on the snapshot, or cannot be looked at.
    Needs(PathBuf),
    /// It holds nobody up.
    Gone,
}

fn standing(files: &Files, dir: &Dir, name: &str, on: SnapshotId) -> Standing {
    let path = files.read_in(dir, name, MAX_PATH).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let Some(path) = path.map(PathBuf::from).filter(|path| path.is_absolute()) else { return Standing::Gone };
    match files.dir(&path).and_then(|dir| read_manifest(files, &dir)) {
        Ok(manifest) if manifest.parent.as_ref().is_some_and(|parent| parent.id == on) => Standing::Needs(path),
        Ok(_) => Standing::Gone,
        // It is not there, or no directory, or not a snapshot's.
        Err(Error::File { source, .. }) if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Standing::Gone
        }
        Err(Error::NotAFile { .. }) => Standing::Gone,
        Err(error) => {
            tracing::debug!(dependent = %path.join(MANIFEST).display(), %error, "cannot be looked at");
            Standing::Needs(path)
        }
    }
}
