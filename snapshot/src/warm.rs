//! Recording what a run touched first.

use std::path::Path;

use clade_memory::{PAGE_SHIFT, PageRange};

use crate::aside::{WARM, WARM_ASIDE, place, random};
use crate::chain::read_manifest;
use crate::error::Error;
use crate::files::Files;
use crate::format::Warm;

/// Writes down for the snapshot in `dir` which pages of memory (see [`crate::linear`]) a VM touched
/// after it was started from there, first things first, in place of what was written down before.
///
/// # Errors
/// Then what was there is as it was.
pub fn record_warm(dir: &Path, runs: &[PageRange]) -> Result<(), Error> {
    record_with(&Files::default(), dir, runs)
}

pub(crate) fn record_with(files: &Files, dir: &Path, runs: &[PageRange]) -> Result<(), Error> {
    let dir = files.whole_dir(&place(dir)?)?;
    let manifest = read_manifest(files, &dir)?;
    let warm = Warm::of(manifest.id, runs, manifest.memory.layer.bytes >> PAGE_SHIFT);
    // What crashes have left over. One that is being written now may go too: its writer then fails,
    // and nothing is lost but time.
    for name in files.names_like(&dir, WARM_ASIDE)? {
        files.unlink(&dir, &name)?;
    }
    let aside = format!("{WARM_ASIDE}{:016x}", random()? as u64);
    let written = files.write_in(&dir, &aside, &warm.encode()).and_then(|()| files.replace_in(&dir, &aside, WARM));
    if written.is_err() {
        let _ = files.unlink(&dir, &aside);
    }
    written?;
    files.sync_open_dir(&dir)
}
