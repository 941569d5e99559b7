//! Compaction: a chain becomes one full snapshot, in the newest one's place.
//!
//! The snapshot keeps its identity, which belongs to its contents, so snapshots on top of it stay
//! valid. Its parents are unchanged, because other snapshots may depend on them.

use std::path::Path;

use clade_memory::PAGE_SHIFT;

use crate::chain::{PageSource, Snapshot, read_manifest, read_working_set};
use crate::dependents;
use crate::disk::MergedSpace;
use crate::error::Error;
use crate::files::FileOps;
use crate::format::WorkingSet;
use crate::lock::{How, lock};
use crate::parents::ParentDirs;
use crate::progress::{Meter, SaveProgress};
use crate::save::Saved;
use crate::space::checked_runs;
use crate::staging::{MANIFEST, STATE, StagingDir, WORKING_SET, expect_replaceable, layer_name, place};
use crate::write::write_layer;

/// Merges the snapshot in `dir` with all it depends on, which must be in `parents`. A full snapshot
/// stays as it is.
///
/// # Errors
/// When it fails, `dir` is as it was; see [`crate::Save::to`].
pub fn compact(dir: &Path, parents: &ParentDirs, watch: &SaveProgress<'_>) -> Result<Saved, Error> {
    compact_with(&FileOps::default(), dir, parents, watch)
}

pub(crate) fn compact_with(
    files: &FileOps,
    dir: &Path,
    parents: &ParentDirs,
    watch: &SaveProgress<'_>,
) -> Result<Saved, Error> {
    let snapshot = Snapshot::with(files, dir, parents)?;
    let spaces: Vec<_> = std::iter::once(&snapshot.0.memory).chain(&snapshot.0.disks).collect();
    let mut manifest = snapshot.manifest().clone();
    if manifest.parent.is_some() {
        // Read early: another save may replace the directory meanwhile.
        let newest = &snapshot.0.members[0];
        let state = files.read_in(&newest.dir, STATE, manifest.state.bytes)?;
        // A hint; a damaged one is dropped.
        let warm = read_working_set(files, newest).ok().flatten();
        let place = place(dir)?;
        expect_replaceable(files, &place)?;
        let data = |space: &&crate::chain::ChainSpace| {
            let data = space.map.iter().filter(|(_, place)| **place != PageSource::Zero);
            data.map(|(range, _)| range.len() << PAGE_SHIFT).sum::<u64>()
        };
        let (mut done, total) = (0, spaces.iter().map(data).sum());
        let mut meter = Meter::new(watch, &mut done, total);
        meter.add(0)?;
        let target = place.clone();
        let mut aside = StagingDir::create(files, place)?;
        manifest.parent = None;
        for (at, space) in spaces.into_iter().enumerate() {
            let disk = at.checked_sub(1);
            let entry = disk.map_or(&mut manifest.memory.layer, |at| &mut manifest.disks[at].layer);
            let merged = MergedSpace { space, files, last: Default::default() };
            let name = layer_name(disk);
            let runs = checked_runs(&name, &merged, true)?;
            let how = (runs.as_slice(), entry.compression);
            *entry = write_layer(files, aside.path(), &name, &merged, how, &mut meter)?;
        }
        files.write(&aside.path().join(STATE), &state)?;
        if let Some(runs) = warm {
            files.write(&aside.path().join(WORKING_SET), &WorkingSet { id: manifest.id, runs }.encode())?;
        }
        files.write(&aside.path().join(MANIFEST), &manifest.encode())?;
        meter.check()?;
        // A dependent being saved waits for the lock, or has left its note already.
        let mut locked = lock(files, &[(&target, How::Exclusive)], &mut || meter.check())?;
        let gone = || Error::file("found", &target, std::io::ErrorKind::NotFound.into());
        let there = locked.pop().flatten().ok_or_else(gone)?;
        // Another save may have replaced it meanwhile.
        let found = read_manifest(files, &there)?.id;
        if found != manifest.id {
            return Err(Error::WrongId { path: dir.to_owned(), wanted: manifest.id, found });
        }
        // The identity stays, and so do the notes of dependents.
        dependents::carry(files, &there, aside.path(), manifest.id)?;
        if !aside.publish(true, &|| meter.check())? {
            return Err(gone());
        }
    }
    let layers = || std::iter::once(&manifest.memory.layer).chain(manifest.disks.iter().map(|disk| &disk.layer));
    Ok(Saved {
        id: manifest.id,
        data_pages: layers().map(|layer| layer.data_pages).sum(),
        zero_pages: layers().map(|layer| layer.zero_pages).sum(),
        base_untold: false,
        base_elsewhere: false,
        data_bytes: layers().map(|layer| layer.data_bytes).sum(),
    })
}
