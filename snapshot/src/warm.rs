//! Recording what a run touched first.

use std::path::Path;

use clade_memory::PageRange;

use crate::aside::{WARM, WARM_ASIDE, random};
use crate::chain::read_manifest;
use crate::error::Error;
use crate::files::Files;
use crate::format::Warm;

/// Writes down for the snapshot in `dir` which pages of memory (see [`crate::linear`]) a VM touched after it was started from there, first things first, in
/// place of what was written down before.
///
/// # Errors
/// Then what was there is as it was.
pub fn record_warm(dir: &Path, runs: &[PageRange]) -> Result<(), Error> {
    record_with(&Files::default(), dir, runs)
}

pub(crate) fn record_with(files: &Files, dir: &Path, runs: &[PageRange]) -> Result<(), Error> {
    let id = read_manifest(files, dir)?.id;
    let runs = runs.iter().copied().filter(|run| !run.is_empty()).collect();
    // What crashes have left over. One that is being written now may go too: its writer then fails, and nothing is lost but time.
    for path in files.list(dir)? {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(WARM_ASIDE)) {
            files.remove_file(&path)?;
        }
    }
    let aside = dir.join(format!("{WARM_ASIDE}{:016x}", random()? as u64));
    let written =
        files.write(&aside, &Warm { id, runs }.encode()).and_then(|()| files.replace(&aside, &dir.join(WARM)));
    if written.is_err() {
        let _ = files.remove_file(&aside);
    }
    written?;
    files.sync_dir(dir)
}
