//! Checkpoints kept on disk: later supervisors of the directory have them too.
//!
//! ```text
//! ROOT/NAME/data/snapshot/   the checkpoint as a snapshot; its writer reaches `data` alone
//! ROOT/NAME/record.json      written last: without it there is no checkpoint
//! ROOT/.gone-NAME-N/         a checkpoint that is being removed
//! ```
//!
//! A supervisor reads the records when it starts. It opens a snapshot at the first fork of its
//! checkpoint, so the start costs no memory and no time for checkpoints that are not used. It holds a
//! lock on the directory: no other supervisor takes a checkpoint that is being written for a leftover.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clade_devices::virtio::net::Link;
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::cgroups::Bounds;
use crate::control::CheckpointInfo;
use crate::vm_host::{Labels, check_name};

const RECORD: &str = "record.json";
const GONE: &str = ".gone-";
/// Most bytes of a record.
const MAX_RECORD: u64 = 1 << 20;
/// Most levels of directories that are removed with a checkpoint.
const MAX_DEPTH: usize = 8;
/// Time that a new supervisor waits for the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The record of a kept checkpoint: what a snapshot does not have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct KeptRecord {
    /// The checkpoint as it was shown when it was taken.
    info: CheckpointInfo,
    pub(super) labels: Labels,
    /// Resource limits, which its children inherit.
    pub(super) bounds: Bounds,
    taken: SystemTime,
}

impl KeptRecord {
    /// Returns the record of a checkpoint that was taken just now.
    pub(super) fn of(info: CheckpointInfo, labels: Labels, bounds: Bounds) -> Self {
        let age = Duration::try_from_secs_f64(info.age_s).unwrap_or_default();
        let taken = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        Self { info: CheckpointInfo { kept: true, ..info }, labels, bounds, taken }
    }

    /// Returns the checkpoint as it is shown while this supervisor has not opened it.
    pub(super) fn info(&self) -> CheckpointInfo {
        CheckpointInfo { age_s: self.age().as_secs_f64(), descriptors: 0, ..self.info.clone() }
    }

    /// Returns the VM that it was taken of.
    pub(super) fn vm(&self) -> Option<&str> {
        self.info.vm.as_deref()
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
    /// Names whose records cannot be read, by this version or at all. Their files stay.
    pub(super) unreadable: BTreeSet<String>,
}

/// The directory of kept checkpoints.
#[derive(Debug)]
pub(super) struct KeptDir {
    root: PathBuf,
    /// The open directory, locked, once it is there.
    lock: Mutex<Option<File>>,
}

impl KeptDir {
    /// Opens the directory `root`, which may be missing until the first checkpoint is kept. Files of
    /// incomplete and removed checkpoints are removed.
    ///
    /// # Errors
    /// When it cannot be read, is not this user's alone, or is another supervisor's. Then none of its
    /// checkpoints may be named anew.
    pub(super) fn open(root: &Path) -> io::Result<(Self, Found)> {
        let dir = Self { root: root.to_owned(), lock: Mutex::default() };
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
                    tracing::info!(name, "removes an incomplete checkpoint");
                    if let Err(error) = dir.remove(&name) {
                        tracing::warn!(%error, path = %entry.path().display(), "an incomplete checkpoint stays");
                        found.unreadable.insert(name);
                    }
                }
                unreadable => {
                    let error = unreadable.err();
                    tracing::warn!(?error, path = %entry.path().display(), "a kept checkpoint cannot be used");
                    found.unreadable.insert(name);
                }
            }
        }
        Ok((dir, found))
    }

    /// The directory itself. Overlays of children are beneath it.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn of(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Returns the directory that the writer of a checkpoint's snapshot may write in.
    pub(super) fn data(&self, name: &str) -> PathBuf {
        self.of(name).join("data")
    }

    /// Returns the directory of a checkpoint's snapshot.
    pub(super) fn snapshot(&self, name: &str) -> PathBuf {
        self.data(name).join("snapshot")
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

    /// Prepares the directory of a new checkpoint.
    ///
    /// # Errors
    /// When it cannot be made, or a checkpoint of the name is there.
    pub(super) fn prepare(&self, name: &str) -> io::Result<()> {
        make_durably(&self.root)?;
        self.lock()?;
        if self.of(name).join(RECORD).symlink_metadata().is_ok() {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "a checkpoint of this name is there"));
        }
        self.remove(name)?;
        make_durably(&self.data(name))
    }

    /// Writes the record of a checkpoint whose snapshot is complete: the checkpoint is kept.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn commit(&self, name: &str, record: &KeptRecord) -> io::Result<()> {
        let dir = self.of(name);
        let mut file = NamedTempFile::with_prefix_in(".", &dir)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.as_file().sync_all()?;
        file.persist(dir.join(RECORD)).map_err(|error| error.error)?;
        sync(&dir)
    }

    /// Removes a checkpoint, complete or not. Children of it run on.
    ///
    /// # Errors
    /// When it is there still, whole. Once it is not, its files are removed, at the latest by the next
    /// supervisor.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        let mut number = 0;
        // In one step: a half removed checkpoint would be a damaged one.
        let gone = loop {
            let gone = self.root.join(format!("{GONE}{name}-{number}"));
            match fs::rename(self.of(name), &gone) {
                Ok(()) => break gone,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && number < 1000 => number += 1,
                Err(error) => return Err(error),
            }
        };
        if let Err(error) = self.sync() {
            // Undone: with an error the checkpoint is there.
            fs::rename(&gone, self.of(name))?;
            return Err(error);
        }
        remove_tree(&gone);
        Ok(())
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
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    pub(in crate::supervisor) fn record(name: &str) -> KeptRecord {
        let info = CheckpointInfo {
            name: name.to_owned(),
            vm: Some("web".to_owned()),
            snapshot: None,
            generation: 1,
            cpus: 1,
            mib: 64,
            network: Some(Link::Closed),
            age_s: 5.0,
            descriptors: 7,
            pause_us: 300.0,
            forked: None,
            ahead: crate::control::AheadInfo::default(),
            kept: false,
            detached: None,
        };
        let bounds = Bounds { memory_mib: Some(512), cpus: Some(0.5) };
        KeptRecord::of(info, Labels::of(&["tier=web".parse().unwrap()]).unwrap(), bounds)
    }

    fn kept(dir: &KeptDir, name: &str) {
        dir.prepare(name).unwrap();
        fs::create_dir(dir.snapshot(name)).unwrap();
        dir.commit(name, &record(name)).unwrap();
    }

    /// Opens the directory as the next supervisor does. Returns names with and without records.
    fn reopened(dir: KeptDir) -> (KeptDir, Vec<String>, Vec<String>) {
        let root = dir.root.clone();
        drop(dir);
        let (dir, Found { records, unreadable }) = KeptDir::open(&root).unwrap();
        (dir, records.into_keys().collect(), unreadable.into_iter().collect())
    }

    #[test]
    fn a_checkpoint_is_kept_from_its_record_on_until_it_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("deep/checkpoints");
        let (dir, found) = KeptDir::open(&root).unwrap();
        assert!(found == Found::default() && !root.exists(), "a missing directory has none, and is not made");
        dir.prepare("base").unwrap();
        fs::create_dir(dir.snapshot("base")).unwrap();
        let (dir, names, _) = reopened(dir);
        assert!(names.is_empty() && !dir.of("base").exists(), "an incomplete checkpoint is none");
        kept(&dir, "base");
        kept(&dir, "record.json");
        let again = dir.prepare("base").unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AlreadyExists);
        drop(dir);
        let (dir, found) = KeptDir::open(&root).unwrap();
        assert_eq!(found.records.keys().collect::<Vec<_>>(), ["base", "record.json"]);
        let read = &found.records["base"];
        assert_eq!(
            (read.labels.text().as_str(), read.vm(), read.network()),
            ("tier=web", Some("web"), Some(Link::Closed))
        );
        assert_eq!(read.bounds, Bounds { memory_mib: Some(512), cpus: Some(0.5) });
        let shown = read.info();
        assert!(shown.kept && shown.age_s >= 5.0 && shown.age_s < 3600.0, "{shown:?}");
        assert_eq!((shown.name.as_str(), shown.mib, shown.descriptors), ("base", 64, 0));
        dir.remove("base").unwrap();
        dir.remove("base").unwrap();
        let (dir, names, _) = reopened(dir);
        assert_eq!(names, ["record.json"]);
        assert_eq!(fs::read_dir(dir.root()).unwrap().count(), 1, "no files of the other are left");
    }

    #[test]
    fn unreadable_records_take_their_names_and_cost_no_other_checkpoint() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = KeptDir::open(scratch.path()).unwrap().0;
        ["good", "cut", "other", "dir"].iter().for_each(|name| kept(&dir, name));
        let record = |name: &str| scratch.path().join(name).join(RECORD);
        let whole = fs::read(record("cut")).unwrap();
        fs::write(record("cut"), &whole[..whole.len() / 2]).unwrap();
        // Of another name: a copied directory would hide the checkpoint of that name.
        fs::copy(record("good"), record("other")).unwrap();
        fs::remove_file(record("dir")).unwrap();
        fs::create_dir(record("dir")).unwrap();
        fs::create_dir(scratch.path().join(format!("{GONE}old-0"))).unwrap();
        fs::create_dir(scratch.path().join(".clade-overlays")).unwrap();
        // A checkpoint that somebody has moved is no incomplete one.
        fs::create_dir_all(scratch.path().join("moved/good")).unwrap();
        let (dir, names, unreadable) = reopened(dir);
        assert_eq!(
            (names, unreadable),
            (vec!["good".to_owned()], ["cut", "dir", "moved", "other"].map(str::to_owned).to_vec())
        );
        assert!(scratch.path().join("moved/good").exists());
        for name in ["cut", "dir", "other"] {
            assert!(dir.prepare(name).is_err() && dir.snapshot(name).exists(), "{name}: its files stay");
        }
        assert!(!scratch.path().join(format!("{GONE}old-0")).exists());
        assert!(scratch.path().join(".clade-overlays").exists(), "children's overlays are there");
    }

    #[test]
    fn the_directory_is_its_owners_alone_and_one_supervisors() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("checkpoints");
        let dir = KeptDir::open(&root).unwrap().0;
        kept(&dir, "base");
        for path in [root.clone(), root.join("base")] {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700, "{}", path.display());
        }
        dir.prepare("half").unwrap();
        let second = KeptDir::open(&root).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::WouldBlock, "{second}");
        assert!(dir.data("half").exists(), "another's checkpoint is no leftover");
        drop(dir);
        fs::set_permissions(&root, PermissionsExt::from_mode(0o777)).unwrap();
        assert_eq!(KeptDir::open(&root).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }

    /// The worker that writes a snapshot may make directories.
    #[test]
    fn nested_directories_end_no_supervisor() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("checkpoints");
        let dir = KeptDir::open(&root).unwrap().0;
        dir.prepare("shallow").unwrap();
        fs::create_dir_all(dir.data("shallow").join("a/b/c")).unwrap();
        fs::write(dir.data("shallow").join("a/b/c/file"), "x").unwrap();
        std::os::unix::fs::symlink(scratch.path(), dir.data("shallow").join("link")).unwrap();
        dir.remove("shallow").unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        dir.prepare("deep").unwrap();
        let mut at = File::open(dir.data("deep")).unwrap();
        for _ in 0..20_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = openat(&at, "d", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap().into();
        }
        dir.remove("deep").unwrap();
        let (dir, names, unreadable) = reopened(dir);
        assert!(names.is_empty() && unreadable.is_empty());
        // Its name is free all the same.
        kept(&dir, "deep");
        // As a shell would, for the test's own directory.
        let gone = fs::read_dir(&root).unwrap().flatten().find(|entry| entry.file_name() != "deep").unwrap();
        let removed = std::process::Command::new("rm").arg("-rf").arg(gone.path()).status().unwrap();
        assert!(removed.success());
    }

    #[test]
    fn two_first_checkpoints_at_once_are_both_kept() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = KeptDir::open(&scratch.path().join("checkpoints")).unwrap().0;
        thread::scope(|threads| {
            for name in ["one", "two", "three", "four"] {
                let dir = &dir;
                threads.spawn(move || kept(dir, name));
            }
        });
        assert_eq!(reopened(dir).1, ["four", "one", "three", "two"]);
    }
}
