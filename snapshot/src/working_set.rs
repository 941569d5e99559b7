//! Recording the working set of a run.

use std::path::Path;

use clade_memory::{PAGE_SHIFT, PageRange};

use crate::chain::read_manifest;
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{SnapshotId, WorkingSet};
use crate::staging::{WORKING_SET, WORKING_SET_ASIDE, place, random};

/// Records the pages of memory (see [`crate::linear`]) that a VM touched after it was started from
/// the snapshot `id` in `dir`, in the order of access. An earlier record is replaced.
///
/// # Errors
/// When another snapshot is in `dir` by now. When it fails, the earlier record is as it was.
pub fn record_working_set(dir: &Path, id: SnapshotId, runs: &[PageRange]) -> Result<(), Error> {
    record_with(&FileOps::default(), dir, id, runs)
}

pub(crate) fn record_with(files: &FileOps, dir: &Path, id: SnapshotId, runs: &[PageRange]) -> Result<(), Error> {
    let dir = files.whole_dir(&place(dir)?)?;
    let manifest = read_manifest(files, &dir)?;
    if manifest.id != id {
        return Err(Error::WrongId { path: dir.path().to_owned(), wanted: id, found: manifest.id });
    }
    let warm = WorkingSet::of(manifest.id, runs, manifest.memory.layer.bytes >> PAGE_SHIFT);
    // Leftovers of crashes. A file being written now may be removed too: its writer then fails, and
    // only the hint is lost.
    for name in files.names_like(&dir, WORKING_SET_ASIDE)? {
        files.unlink(&dir, &name)?;
    }
    let aside = format!("{WORKING_SET_ASIDE}{:016x}", random()? as u64);
    let written =
        files.write_in(&dir, &aside, &warm.encode()).and_then(|()| files.replace_in(&dir, &aside, WORKING_SET));
    if written.is_err() {
        let _ = files.unlink(&dir, &aside);
    }
    written?;
    files.sync_open_dir(&dir)
}
