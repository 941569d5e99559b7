//! Saving: a snapshot is written aside, and put in its place as a whole or not at all.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use clade_memory::{DontFork, PAGE_SHIFT, RamImage};
use serde::{Deserialize, Serialize};

use crate::chain::{MAX_DEPTH, Snapshot, read_manifest};
use crate::content::PageContent;
use crate::dependents::{self, Noted};
use crate::dir::{Dir, identity};
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{
    Compression, DiskEntry, Manifest, MemoryEntry, NoForkEntry, NoForkKind, Parent, Region, SnapshotId, StateEntry,
    encode_sections, valid_name,
};
use crate::layer::sealed_sum;
use crate::lock::{How, lock};
use crate::parents::ParentDirs;
use crate::progress::{Meter, SaveProgress};
use crate::ram::RamSpace;
use crate::space::{Space, checked_runs};
use crate::staging::{MANIFEST, STATE, StagingDir, expect_replaceable, layer_name, place, random};
use crate::write::write_layer;

/// A disk to be saved.
#[derive(Clone, Copy)]
pub struct DiskToSave<'a> {
    /// Its name in the snapshot: 1 to 255 bytes, unique among the disks.
    pub name: &'a str,
    /// Its contents at the instant of the image.
    pub space: &'a dyn Space,
}

impl std::fmt::Debug for DiskToSave<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskToSave").field("name", &self.name).field("bytes", &self.space.bytes()).finish()
    }
}

/// The base of an incremental snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// The base's directory.
    pub dir: &'a Path,
    /// The base's identity; the snapshot in `dir` must have it.
    pub id: SnapshotId,
    /// The memory that was saved there, or restored from there.
    pub image: &'a RamImage,
    /// Whether nothing replaces the base, and it moves together with the snapshot. The manifest then has
    /// the path from one to the other, wherever the base is, and the base gets neither a lock nor a note
    /// of its dependent. A base in another directory else has its absolute path.
    pub is_fixed: bool,
}

/// A VM at one instant, to be saved. The VM may run meanwhile: an image never changes.
#[derive(Clone, Debug)]
pub struct Save<'a> {
    /// Its memory.
    pub memory: &'a RamImage,
    /// Its disks. For a full save they have all of their pages; for an incremental save, those that
    /// changed since the base.
    pub disks: &'a [DiskToSave<'a>],
    /// All other state: names and contents of sections.
    pub sections: &'a [(&'a str, &'a [u8])],
    /// The base, for an incremental save.
    pub base: Option<Base<'a>>,
    /// How data is stored. Compressed files are smaller, and cannot be mapped.
    pub compression: Compression,
    /// Whether to replace a snapshot on which others depend.
    pub replace: bool,
}

/// The result of a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The new snapshot's identity. The caller replaces its last base by the image just saved only
    /// **after** it has this.
    pub id: SnapshotId,
    /// Pages of data written, of memory and disks.
    pub data_pages: u64,
    /// Pages that are zeros, of memory and disks.
    pub zero_pages: u64,
    /// Bytes of the data files.
    pub data_bytes: u64,
    /// Whether the base is read-only, and so has no note of this dependent. A save that can write
    /// there may replace the base without a warning.
    pub base_untold: bool,
    /// Whether the base or one of its parents is in another directory than the snapshot: opening the
    /// snapshot has to allow that directory ([`crate::ParentDirs`]).
    pub base_elsewhere: bool,
}

impl Save<'_> {
    /// Writes the snapshot to `dir`, in place of the one that is there.
    ///
    /// # Errors
    /// When it fails, `dir` is as it was. If the last sync has failed, the new snapshot may be
    /// there, whole, but perhaps not durable: it must be saved again.
    pub fn to(&self, dir: &Path, watch: &SaveProgress<'_>) -> Result<Saved, Error> {
        self.with(&FileOps::default(), dir, watch)
    }

    pub(crate) fn with(&self, files: &FileOps, dir: &Path, watch: &SaveProgress<'_>) -> Result<Saved, Error> {
        self.check_names()?;
        let memory = RamSpace::new(self.memory, self.base.map(|base| base.image))?;
        let place = place(dir)?;
        expect_replaceable(files, &place)?;
        if !self.replace && place.exists() {
            // Checked again under the lock. This check saves the writing.
            dependents::expect_none(files, &files.whole_dir(&place)?)?;
        }
        let parent = self.base.map(|base| self.parent(files, &base, &place)).transpose()?;
        let full = self.base.is_none();
        let (parent, base_elsewhere) = parent.map_or((None, false), |(parent, elsewhere)| (Some(parent), elsewhere));
        let mut spaces = vec![("memory", &memory as &dyn Space)];
        spaces.extend(self.disks.iter().map(|disk| (disk.name, disk.space)));
        let mut total = 0;
        let mut runs = Vec::with_capacity(spaces.len());
        for (name, space) in &spaces {
            let these = checked_runs(name, *space, full)?;
            let data = these.iter().filter(|run| run.kind == PageContent::Data).map(|run| run.range.len());
            total += data.sum::<u64>() << PAGE_SHIFT;
            runs.push(these);
        }
        let mut done = 0;
        let mut meter = Meter::new(watch, &mut done, total);
        meter.add(0)?;

        let target = place.clone();
        let mut aside = StagingDir::create(files, place)?;
        let mut layers = Vec::with_capacity(spaces.len());
        for (at, ((_, space), runs)) in spaces.into_iter().zip(&runs).enumerate() {
            let how = (runs.as_slice(), self.compression);
            layers.push(write_layer(files, aside.path(), &layer_name(at.checked_sub(1)), space, how, &mut meter)?);
        }
        let state = encode_sections(self.sections);
        files.write(&aside.path().join(STATE), &state)?;
        let id = SnapshotId::new(random()?);
        let (data_pages, zero_pages, data_bytes) = layers.iter().fold((0, 0, 0), |sum, layer| {
            (sum.0 + layer.data_pages, sum.1 + layer.zero_pages, sum.2 + layer.data_bytes)
        });
        let mut layers = layers.into_iter();
        let Some(layer) = layers.next() else { return Err(Error::Cancelled) };
        let disks = self.disks.iter().zip(layers).map(|(disk, layer)| DiskEntry { name: disk.name.to_owned(), layer });
        let memory = MemoryEntry { regions: regions(self.memory), layer };
        let entry = StateEntry { bytes: state.len() as u64, checksum: sealed_sum(&state) };
        let manifest = Manifest::new(id, parent, memory, disks.collect(), entry);
        files.write(&aside.path().join(MANIFEST), &manifest.encode())?;
        meter.check()?;
        let base_untold = self.publish(files, &mut aside, &target, &mut meter)? == Some(Noted::ReadOnly);
        Ok(Saved { id, data_pages, zero_pages, data_bytes, base_untold, base_elsewhere })
    }

    /// Checks the base, writes the note into it, and puts the snapshot in its place, all under
    /// locks on both directories.
    fn publish(
        &self,
        files: &FileOps,
        aside: &mut StagingDir<'_>,
        target: &Path,
        meter: &mut Meter<'_>,
    ) -> Result<Option<Noted>, Error> {
        let base = self.base.as_ref().map(|base| Ok::<_, Error>((base, place(base.dir)?))).transpose()?;
        let mut how = How::Shared;
        loop {
            let mut wanted = vec![(target, How::Exclusive)];
            let lockable = base.as_ref().filter(|(base, _)| !base.is_fixed);
            wanted.extend(lockable.map(|(_, place)| (place.as_path(), how)));
            let mut locked = lock(files, &wanted, &mut || meter.check())?.into_iter();
            let there = locked.next().flatten();
            if !self.replace
                && let Some(there) = &there
            {
                dependents::expect_none(files, there)?;
            }
            let (mut noted, mut base_lock) = (None, None);
            if let Some((base, path)) = &lockable {
                let gone = || Error::file("found", path, std::io::ErrorKind::NotFound.into());
                let dir = locked.next().flatten().ok_or_else(gone)?;
                // Another save may have replaced the base meanwhile.
                expect_id(files, base, &dir)?;
                if how == How::Shared && dependents::is_full(files, &dir)? {
                    how = How::Exclusive;
                    continue;
                }
                if how == How::Exclusive {
                    dependents::prune(files, &dir)?;
                }
                noted = Some(dependents::note(files, &dir, target)?);
                base_lock = Some(dir);
            }
            // Both stay locked until the snapshot is in place.
            let put = aside.publish(there.is_some(), &|| meter.check())?;
            drop((there, base_lock));
            if put {
                return Ok(noted);
            }
        }
    }

    fn check_names(&self) -> Result<(), Error> {
        let twice = |name: &str| Err(Error::Twice { name: name.to_owned() });
        let mut names = HashSet::new();
        for disk in self.disks {
            if !valid_name(disk.name) || !names.insert(disk.name) {
                return twice(disk.name);
            }
        }
        names.clear();
        for (name, _) in self.sections {
            if !valid_name(name) || !names.insert(name) {
                return twice(name);
            }
        }
        Ok(())
    }

    /// The base for the manifest, after a check of its whole chain, and whether one of the chain is in
    /// another directory than `place`.
    fn parent(&self, files: &FileOps, base: &Base<'_>, place: &Path) -> Result<(Parent, bool), Error> {
        // No page of the chain is read.
        let chain = Snapshot::with(files, base.dir, &ParentDirs::unchecked())?;
        if chain.id() != base.id {
            return Err(Error::WrongId { path: base.dir.to_owned(), wanted: base.id, found: chain.id() });
        }
        let target = place.metadata().ok().map(|meta| identity(&meta));
        if target.is_some() && chain.0.members.iter().any(|member| member.dir.identity() == target) {
            return Err(Error::OwnChain { path: place.to_owned() });
        }
        if chain.depth() >= MAX_DEPTH {
            return Err(Error::TooDeep { path: base.dir.to_owned(), most: MAX_DEPTH });
        }
        let wrong = |what: String| Error::Shape { path: base.dir.to_owned(), what };
        if chain.layout()? != *self.memory.layout() {
            return Err(wrong(format!("its memory is not of the shape {:?}", self.memory.layout().ranges())));
        }
        let theirs: Vec<(&str, u64)> =
            chain.manifest().disks.iter().map(|d| (d.name.as_str(), d.layer.bytes)).collect();
        let ours: Vec<(&str, u64)> = self.disks.iter().map(|disk| (disk.name, disk.space.bytes())).collect();
        if theirs != ours {
            return Err(wrong(format!("its disks {theirs:?} are not {ours:?}")));
        }
        let dir = crate::staging::place(base.dir)?;
        let sibling = dir.parent() == place.parent();
        let path = if sibling || base.is_fixed { relative(place, &dir) } else { dir.clone() };
        let text = path.to_str().ok_or_else(|| Error::Path { path: path.clone() })?;
        let elsewhere = !sibling || chain.dirs().skip(1).any(|dir| dir.parent() != place.parent());
        Ok((Parent { id: base.id, path: text.to_owned() }, elsewhere))
    }
}

/// The path from the directory `from` to `to`, both absolute and without links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(from, to)| from == to).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(to.components().skip(shared)).collect()
}

fn expect_id(files: &FileOps, base: &Base<'_>, dir: &Dir) -> Result<(), Error> {
    let found = read_manifest(files, dir)?.id;
    if found == base.id { Ok(()) } else { Err(Error::WrongId { path: base.dir.to_owned(), wanted: base.id, found }) }
}

fn regions(image: &RamImage) -> Vec<Region> {
    let entry = |(range, what): (clade_memory::PageRange, DontFork)| NoForkEntry {
        start: range.start(),
        pages: range.len(),
        kind: match what {
            DontFork::Absent => NoForkKind::Absent,
            DontFork::Zeroed => NoForkKind::Zeroed,
            DontFork::Fresh(_) => NoForkKind::Fresh,
        },
    };
    let ranges = image.layout().ranges().iter().zip(image.dont_fork());
    let region = |((base, pages), declared): (&(vm_memory::GuestAddress, u64), Vec<_>)| Region {
        guest_address: base.0,
        pages: *pages,
        no_fork: declared.into_iter().map(entry).collect(),
    };
    ranges.map(region).collect()
}
