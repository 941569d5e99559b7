//! Who depends on a snapshot: a note in it for each incremental one that is made on top of it.
//!
//! A note is a file `.needed-by-XXXXXXXXXXXXXXXX` with the path of the dependent's directory. It is written before the
//! dependent is published, so that there is no moment at which a dependent is not noted. A note alone proves nothing: the
//! dependent is looked at before it is believed. One that was compacted, replaced or moved away needs nothing any more.

use std::path::{Path, PathBuf};

use crate::aside::{NEEDED_BY, random};
use crate::chain::read_manifest;
use crate::error::Error;
use crate::files::Files;
use crate::format::SnapshotId;

/// Longest path that is believed.
const MAX_PATH: u64 = 4_096;
/// Most notes that are looked at. More are as good as one that holds.
const MAX_NOTES: usize = 1_024;

/// Notes in `base` that the snapshot at `dependent` is made on top of it.
pub(crate) fn note(files: &Files, base: &Path, dependent: &Path) -> Result<(), Error> {
    let text = dependent.to_str().ok_or_else(|| Error::Path { path: dependent.to_owned() })?;
    if notes(files, base)?.iter().any(|note| dependent_in(files, note).as_deref() == Some(dependent)) {
        return Ok(());
    }
    files.write(&base.join(format!("{NEEDED_BY}{:016x}", random()? as u64)), text.as_bytes())
}

fn notes(files: &Files, dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_note =
        |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.starts_with(NEEDED_BY));
    Ok(files.list(dir)?.into_iter().filter(is_note).collect())
}

/// Copies the notes in `dir` to `aside`, which takes its place and its identity.
pub(crate) fn carry(files: &Files, dir: &Path, aside: &Path) -> Result<(), Error> {
    for note in notes(files, dir)? {
        if let (Some(name), Ok(bytes)) = (note.file_name(), files.read(&note, MAX_PATH)) {
            files.write(&aside.join(name), &bytes)?;
        }
    }
    Ok(())
}

fn dependent_in(files: &Files, note: &Path) -> Option<PathBuf> {
    let bytes = files.read(note, MAX_PATH).ok()?;
    Some(PathBuf::from(String::from_utf8(bytes).ok()?)).filter(|path| path.is_absolute())
}

/// Refuses when another snapshot depends on the one at `dir`.
///
/// # Errors
/// [`Error::Needed`], which names one of them.
pub(crate) fn expect_none(files: &Files, dir: &Path) -> Result<(), Error> {
    let Ok(own) = read_manifest(files, dir) else { return Ok(()) };
    let notes = notes(files, dir)?;
    let needed = |by: PathBuf| Error::Needed { path: dir.to_owned(), by };
    if notes.len() > MAX_NOTES {
        return Err(needed(dir.to_owned()));
    }
    match notes.iter().filter_map(|note| dependent_in(files, note)).find(|by| depends(files, by, own.id)) {
        Some(by) => Err(needed(by)),
        None => Ok(()),
    }
}

fn depends(files: &Files, dependent: &Path, on: SnapshotId) -> bool {
    read_manifest(files, dependent).is_ok_and(|manifest| manifest.parent.is_some_and(|parent| parent.id == on))
}
