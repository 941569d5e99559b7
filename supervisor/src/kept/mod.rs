//! Checkpoints kept on disk: later supervisors of the directory have them too.
//!
//! ```text
//! ROOT/NAME/record.json      the record, written last: without it there is no checkpoint
//! ROOT/.data/ID/snapshot/    its data, a snapshot; the writer of it may write in `.data/ID` alone
//! ROOT/.gone-X-N/            what is being removed
//! ROOT/NAME/data/snapshot/   the data of a checkpoint of an earlier version
//! ```
//!
//! The snapshot may be incremental to that of another kept checkpoint, which a record lists. Data is
//! removed once no record lists it.
//!
//! A supervisor reads the records when it starts. It opens a snapshot at the first fork of its
//! checkpoint, so the start costs no memory and no time for checkpoints that are not used. It holds a
//! lock on the directory: no other supervisor takes a checkpoint that is being written for a leftover.

mod data;
mod lines;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clade_devices::virtio::net::Link;
use clade_snapshot::{KnownDir, SnapshotId};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::cgroups::Bounds;
use clade_api::{CheckpointInfo, Labels, check_name, write_durably};
pub(super) use data::DataId;
use data::Needs;
pub(super) use lines::{KeptLine, KeptLines};

const RECORD: &str = "record.json";
const GONE: &str = ".gone-";
const DATA: &str = ".data";
/// The bytes of a chain, in bytes of its full snapshot, from which on the next one is full.
const MAX_GROWTH: u64 = 2;
/// Bytes beyond that of any chain.
const SMALL_CHAIN: u64 = 16 << 20;
/// Most bytes of a record.
const MAX_RECORD: u64 = 1 << 20;
/// Most levels of directories that are removed with a checkpoint.
const MAX_DEPTH: usize = 8;
/// Time that a new supervisor waits for the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// A checkpoint as it is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeptData {
    /// Its own data, and then the data that it builds on, the nearest first.
    pub(super) chain: Vec<DataId>,
    pub(super) bytes: ChainBytes,
    pub(super) id: SnapshotId,
    /// Whether later checkpoints build on none before it: it was to be written in full, or is opened.
    pub(super) is_alone: bool,
}

/// The record of a kept checkpoint: the parts that a snapshot does not have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct KeptRecord {
    /// The checkpoint as it was shown when it was taken.
    info: CheckpointInfo,
    pub(super) labels: Labels,
    /// Resource limits, which its children inherit.
    pub(super) bounds: Bounds,
    taken: SystemTime,
    /// Its own data, and then the data that it builds on, the nearest first. Empty in a record of an
    /// earlier version, whose data is beside it.
    #[serde(default)]
    chain: Vec<DataId>,
    /// Bytes of that data. 0 in a record of an earlier version.
    #[serde(default)]
    bytes: ChainBytes,
}

/// Bytes of the data of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ChainBytes {
    /// Of the one that builds on no other.
    pub(super) full: u64,
    /// Of all.
    pub(super) all: u64,
}

impl ChainBytes {
    /// Whether another checkpoint may build on it. Removed checkpoints leave their data to later ones: this
    /// bounds its size.
    pub(super) fn may_grow(self) -> bool {
        self.full > 0 && self.all < self.full.saturating_mul(MAX_GROWTH).saturating_add(SMALL_CHAIN)
    }

    /// The same with data of so many bytes on it.
    pub(super) fn with(self, bytes: u64) -> Self {
        Self { all: self.all.saturating_add(bytes), ..self }
    }
}

impl KeptRecord {
    /// Returns the record of a checkpoint that was taken just now.
    pub(super) fn of(
        info: CheckpointInfo,
        labels: Labels,
        bounds: Bounds,
        (chain, bytes): (Vec<DataId>, ChainBytes),
    ) -> Self {
        let age = Duration::try_from_secs_f64(info.age_s).unwrap_or_default();
        let taken = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        Self { info: CheckpointInfo { kept: true, ..info }, labels, bounds, taken, chain, bytes }
    }

    /// Returns the checkpoint as it is shown while this supervisor has not opened it.
    pub(super) fn info(&self) -> CheckpointInfo {
        CheckpointInfo { age_s: self.age().as_secs_f64(), descriptors: 0, ..self.info.clone() }
    }

    /// Returns the VM that it was taken of.
    pub(super) fn vm(&self) -> Option<&str> {
        self.info.vm.as_deref()
    }

    /// Returns its own data, and then the data that it builds on.
    pub(super) fn chain(&self) -> &[DataId] {
        &self.chain
    }

    /// Returns the bytes of that data.
    pub(super) fn bytes(&self) -> ChainBytes {
        self.bytes
    }

    /// Returns whether packets passed when it was taken.
    pub(super) fn network(&self) -> Option<Link> {
        self.info.network
    }

    /// Returns the time since it was taken. The clock may have been set back.
    pub(super) fn age(&self) -> Duration {
        self.taken.elapsed().unwrap_or_default()
    }
}

/// The checkpoints that a supervisor finds when it starts.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Found {
    pub(super) records: BTreeMap<String, KeptRecord>,
    /// Names whose records cannot be read, by this version or at all, and names of incomplete checkpoints
    /// that cannot be removed, with the reasons. Their files stay.
    pub(super) unreadable: BTreeMap<String, String>,
}

/// The directory of kept checkpoints.
#[derive(Debug)]
pub(super) struct KeptDir {
    root: PathBuf,
    /// The open directory, locked, once it is there.
    lock: Mutex<Option<File>>,
    needs: Mutex<Needs>,
}

impl KeptDir {
    /// Opens the directory `root`, which may be missing until the first checkpoint is kept. Files of
    /// incomplete and removed checkpoints are removed.
    ///
    /// # Errors
    /// When it cannot be read, is not this user's alone, or is another supervisor's. Then none of its
    /// checkpoints may be named anew.
    pub(super) fn open(root: &Path) -> io::Result<(Self, Found)> {
        let dir = Self { root: root.to_owned(), lock: Mutex::default(), needs: Mutex::default() };
        let mut found = Found::default();
        if !root.try_exists()? {
            return Ok((dir, found));
        }
        let begun = Instant::now();
        // A supervisor that has just ended may have the lock still.
        while let Err(error) = dir.lock() {
            if error.kind() != ErrorKind::WouldBlock || begun.elapsed() > LOCK_TIMEOUT {
                return Err(error);
            }
            thread::sleep(LOCK_INTERVAL);
        }
        let mut incomplete = Vec::new();
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if name.starts_with(GONE) {
                remove_tree(&entry.path());
            }
            if check_name(&name).is_err() {
                continue;
            }
            match read_record(&entry.path().join(RECORD)) {
                Ok(record) if record.info.name == name => {
                    found.records.insert(name, record);
                }
                // The supervisor ended before the checkpoint was complete.
                Err(error) if error.kind() == ErrorKind::NotFound && is_incomplete(&entry.path()).unwrap_or(false) => {
                    incomplete.push(name);
                }
                unreadable => {
                    let why = unreadable.err().map_or_else(|| "its record names another".to_owned(), |e| e.to_string());
                    let reason = format!("{}: {why}", entry.path().display());
                    tracing::warn!(reason, "a kept checkpoint cannot be used");
                    found.unreadable.insert(name, reason);
                }
            }
        }
        // Before anything is removed: data goes when no record needs it.
        let records = found.records.iter().map(|(name, record)| (name.as_str(), record.chain()));
        dir.needs().found(records, found.unreadable.is_empty());
        for name in incomplete {
            tracing::info!(name, "removes an incomplete checkpoint");
            if let Err(error) = dir.remove(&name) {
                tracing::warn!(%error, name, "an incomplete checkpoint stays");
                found.unreadable.insert(name, format!("it is incomplete, and cannot be removed: {error}"));
            }
        }
        dir.remove_unneeded();
        Ok((dir, found))
    }

    /// The directory itself. Overlays of children are beneath it.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn of(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Returns the directory that the writer of a snapshot may write in.
    pub(super) fn data(&self, id: &DataId) -> PathBuf {
        self.root.join(DATA).join(id.as_str())
    }

    /// Returns the directory of the snapshot of a checkpoint with this chain.
    pub(super) fn snapshot(&self, name: &str, chain: &[DataId]) -> PathBuf {
        let data = chain.first().map_or_else(|| self.of(name).join("data"), |own| self.data(own));
        data.join("snapshot")
    }

    /// Returns the directories of the snapshots that a checkpoint with this chain builds on.
    pub(super) fn parents(&self, chain: &[DataId]) -> Vec<PathBuf> {
        chain.iter().skip(1).map(|id| self.data(id)).collect()
    }

    /// Returns the directories of all snapshots of a chain, the newest first.
    ///
    /// # Errors
    /// When one is not there.
    pub(super) fn snapshots(&self, chain: &[DataId]) -> Result<Vec<KnownDir>, clade_snapshot::Error> {
        chain.iter().map(|id| KnownDir::at(&self.data(id).join("snapshot"))).collect()
    }

    fn needs(&self) -> MutexGuard<'_, Needs> {
        self.needs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked(&self) -> MutexGuard<'_, Option<File>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the directory, and checks that it is this user's alone.
    fn lock(&self) -> io::Result<()> {
        // Held meanwhile: two open files of one process exclude each other.
        let mut lock = self.locked();
        if lock.is_some() {
            return Ok(());
        }
        let file = File::open(&self.root)?;
        let found = file.metadata()?;
        if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
            let what = "it must be a directory of this user that no other user may write in";
            return Err(io::Error::new(ErrorKind::PermissionDenied, what));
        }
        file.try_lock().map_err(io::Error::from)?;
        *lock = Some(file);
        Ok(())
    }

    /// Leaves the directory to the next supervisor.
    pub(super) fn release(&self) {
        drop(self.locked().take());
    }

    /// Makes the names of checkpoints durable.
    fn sync(&self) -> io::Result<()> {
        // By the open file: this must not fail for lack of a descriptor.
        match &*self.locked() {
            Some(root) => root.sync_all(),
            None => sync(&self.root),
        }
    }

    /// Prepares the directories of a new checkpoint, which may build on the data `base`, the nearest
    /// first. Returns its chain: without `base` if that is removed.
    ///
    /// # Errors
    /// When they cannot be made, or a checkpoint of the name is there.
    pub(super) fn prepare(&self, name: &str, base: &[DataId]) -> io::Result<Vec<DataId>> {
        make_durably(&self.root)?;
        self.lock()?;
        if self.of(name).join(RECORD).symlink_metadata().is_ok() {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "a checkpoint of this name is there"));
        }
        self.remove(name)?;
        // Before the directory is made: data that no checkpoint needs is removed.
        let chain = self.needs().add(name, DataId::random()?, base);
        let made = make_durably(&self.of(name)).and_then(|()| make_durably(&self.data(&chain[0])));
        made.inspect_err(|_| drop(self.remove(name)))?;
        Ok(chain)
    }

    /// Writes the record of a checkpoint whose snapshot is complete: the checkpoint is kept.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn commit(&self, name: &str, record: &KeptRecord) -> io::Result<()> {
        write_durably(&self.of(name).join(RECORD), &serde_json::to_vec_pretty(record)?)
    }

    /// Removes a checkpoint, complete or not. Children of it run on, and data that other
    /// checkpoints build on stays.
    ///
    /// # Errors
    /// When it is there still, whole. Once it is not, its files are removed, at the latest by the next
    /// supervisor.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        // In one step: a half removed checkpoint would be a damaged one.
        if let Some(gone) = self.put_away(&self.of(name), name)? {
            if let Err(error) = self.sync() {
                // Undone: with an error the checkpoint is there.
                fs::rename(&gone, self.of(name))?;
                return Err(error);
            }
            remove_tree(&gone);
        }
        self.needs().remove(name);
        self.remove_unneeded();
        Ok(())
    }

    /// Renames a directory, to be removed. Returns its new path, or None if it does not exist.
    fn put_away(&self, dir: &Path, name: &str) -> io::Result<Option<PathBuf>> {
        let mut number = 0;
        loop {
            let gone = self.root.join(format!("{GONE}{name}-{number}"));
            match fs::rename(dir, &gone) {
                Ok(()) => return Ok(Some(gone)),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                // The second is XFS's.
                Err(error)
                    if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists)
                        && number < 1000 =>
                {
                    number += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes the data that no checkpoint needs.
    fn remove_unneeded(&self) {
        // These are removed whatever becomes of the others.
        let mut gone = Vec::new();
        let mut put_away = || -> io::Result<()> {
            // Held: data that is needed from now on has no directory yet.
            let mut needs = self.needs();
            let mut there = Vec::new();
            for entry in fs::read_dir(self.root.join(DATA))? {
                there.extend(entry?.file_name().into_string().ok().and_then(|name| DataId::try_from(name).ok()));
            }
            let unneeded = needs.unneeded(there.into_iter());
            if !unneeded.is_empty() {
                // A record whose removal is not durable has its data after a power cut.
                self.sync()?;
            }
            let mut done = Ok(());
            for id in unneeded {
                match self.put_away(&self.data(&id), id.as_str()) {
                    Ok(dir) => {
                        gone.extend(dir);
                        needs.forget(&[id]);
                    }
                    Err(error) => done = Err(error),
                }
            }
            done
        };
        match put_away() {
            Ok(()) => {}
            // Before the first checkpoint.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, "data of removed checkpoints stays"),
        }
        gone.iter().for_each(|dir| remove_tree(dir));
    }
}

fn read_record(path: &Path) -> io::Result<KeptRecord> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_RECORD).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Makes a directory for this user alone, with its parents, and makes their names durable.
fn make_durably(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|path| !path.exists()).collect();
    for path in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        path.parent().map_or(Ok(()), sync)?;
    }
    Ok(())
}

/// Makes the names in a directory durable.
fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Whether a directory without a record was made by [`KeptDir::prepare`], and holds nothing else.
fn is_incomplete(dir: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let name = name.as_encoded_bytes();
        // The record is a hidden file before it has its name.
        if name != b"data" && !name.starts_with(b".") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn remove_tree(dir: &Path) {
    if let Err(error) = remove_beneath(CWD, dir, MAX_DEPTH) {
        tracing::warn!(%error, dir = %dir.display(), "files of a removed checkpoint stay");
    }
}

/// Removes a directory in `parent`. A worker has made the files in it, and may have nested directories
/// without end: each level takes a frame and a descriptor.
fn remove_beneath(parent: impl AsFd, name: impl rustix::path::Arg + Copy, depth: usize) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(parent.as_fd(), name, flags, Mode::empty())?;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match unlinkat(&dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR) if depth > 0 => remove_beneath(&dir, name, depth - 1)?,
            other => other?,
        }
    }
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
pub(super) mod tests;
