//! Records of sandboxes and snapshots: a file for each, and a copy in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clade_api::write_durably;
use jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Mutex as AsyncMutex, RwLock, watch};
use tokio::task::block_in_place;

use crate::error::{Answer, GatewayError};
use crate::wire::{AskedNetwork, State, Texts};

/// The gateway's own record of a sandbox, beyond its VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    /// Its name, and that of its VM.
    pub(crate) id: String,
    pub(crate) template: String,
    /// The name of the key that it was made with.
    pub(crate) owner: String,
    pub(crate) metadata: Texts,
    pub(crate) envs: Texts,
    pub(crate) started_at: Timestamp,
    pub(crate) end_at: Timestamp,
    pub(crate) paused: bool,
    /// Whether it pauses when its time is over, instead of ending.
    pub(crate) auto_pause: bool,
    /// Whether a request for one of its ports wakes it.
    pub(crate) auto_resume: bool,
    pub(crate) cpus: u8,
    pub(crate) mib: u64,
    /// The socket of its agent.
    pub(crate) socket: PathBuf,
    /// Whether its ports require its traffic token.
    #[serde(default)]
    pub(crate) is_private: bool,
    /// The host in requests to its programs, with `${PORT}` for the port.
    #[serde(default)]
    pub(crate) masked_host: Option<String>,
    #[serde(default)]
    pub(crate) network: AskedNetwork,
    /// Whether its template's owner has closed the template's network. Then it is never opened.
    /// None if unknown.
    #[serde(default)]
    pub(crate) is_template_closed: Option<bool>,
    /// Number of its template's layers of egress rules. They stay when its own are replaced. None
    /// in records from before this field.
    #[serde(default)]
    pub(crate) template_layers: Option<usize>,
}

impl SandboxRecord {
    pub(crate) fn state(&self) -> State {
        if self.paused { State::Paused } else { State::Running }
    }

    /// # Errors
    /// 409 when it is in the other state.
    pub(crate) fn expect(&self, state: State) -> Answer<()> {
        match self.state() {
            is if is == state => Ok(()),
            State::Paused => Err(GatewayError::conflict(format!("the sandbox {:?} is paused", self.id))),
            State::Running => Err(GatewayError::conflict(format!("the sandbox {:?} runs", self.id))),
        }
    }

    /// Returns whether it runs at `now` though its time has been over for `grace`. Its VM ends by
    /// itself at its time: it has lost that end by an error, or its process does not keep it.
    pub(crate) fn is_overdue(&self, now: Timestamp, grace: SignedDuration) -> bool {
        !self.auto_pause && !self.paused && now.duration_since(self.end_at) >= grace
    }

    /// Returns whether it is to pause because its time is over at `now`.
    pub(crate) fn is_to_pause(&self, now: Timestamp) -> bool {
        self.auto_pause && !self.paused && self.end_at <= now
    }
}

/// A snapshot: a checkpoint that a sandbox's owner has taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    /// The checkpoint's name, which no owner can choose.
    pub(crate) id: String,
    /// The name that its owner has chosen, if any: unique among the owner's.
    #[serde(default)]
    pub(crate) name: Option<String>,
    /// MiB of guest memory.
    #[serde(default)]
    pub(crate) mib: u64,
    /// As its sandbox's [`SandboxRecord::is_template_closed`].
    #[serde(default)]
    pub(crate) is_closed: Option<bool>,
    pub(crate) owner: String,
    pub(crate) sandbox: String,
    pub(crate) taken_at: Timestamp,
    /// Whether its checkpoint is on the disk. Then it is forgotten only on request, and not when its
    /// checkpoint is not found: a supervisor may be without the directory for a time.
    #[serde(default)]
    pub(crate) is_kept: bool,
}

impl SnapshotRecord {
    /// Returns the name that its owner uses.
    pub(crate) fn shown(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }
}

/// The name of a file of a [`RecordTable`].
pub(crate) trait Named {
    fn name(&self) -> &str;
}

impl Named for SandboxRecord {
    fn name(&self) -> &str {
        &self.id
    }
}

impl Named for SnapshotRecord {
    fn name(&self) -> &str {
        &self.id
    }
}

/// A value with a file of its own.
#[derive(Debug)]
pub(crate) struct RecordEntry<T> {
    value: Mutex<T>,
    /// Held while its VM is changed.
    pub(crate) turn: AsyncMutex<()>,
    /// Held while a request to a port of its VM wakes it.
    pub(crate) waking: Arc<AsyncMutex<()>>,
    /// Written to while its network is changed, and read while it is forked.
    pub(crate) network: RwLock<()>,
    /// Sent to when its VM has been paused or ended: connections to its programs' ports end.
    pub(crate) cut: watch::Sender<()>,
}

impl<T: Clone> RecordEntry<T> {
    pub(crate) fn get(&self) -> T {
        self.value.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Files of one kind, by name. Names are those of VMs and checkpoints: none leads out of the
/// directory.
#[derive(Debug)]
pub(crate) struct RecordTable<T> {
    dir: PathBuf,
    /// Whether its files outlive a crash of the host.
    is_durable: bool,
    entries: Mutex<BTreeMap<String, Arc<RecordEntry<T>>>>,
}

impl<T: Named + Clone + Serialize + DeserializeOwned> RecordTable<T> {
    /// Reads the files of a directory, which may be missing until there is a file. Invalid files are
    /// skipped.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        let mut entries = BTreeMap::new();
        let files = match std::fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            files => Some(files?),
        };
        for file in files.into_iter().flatten() {
            let path = file?.path();
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                // A killed process has left it, and it may be older than the record itself.
                let _ = std::fs::remove_file(&path);
                continue;
            }
            let read = std::fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<T>(&bytes)?));
            match read {
                Ok(value) if path.file_stem().is_none_or(|stem| stem != value.name()) => {
                    tracing::warn!(path = %path.display(), "a record of another name is left out");
                }
                Ok(value) => drop(entries.insert(value.name().to_owned(), Arc::new(RecordEntry::new(value)))),
                Err(error) => tracing::warn!(%error, path = %path.display(), "is left out"),
            }
        }
        Ok(Self { dir, is_durable: false, entries: Mutex::new(entries) })
    }

    /// The same, of files that outlive a crash of the host.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub(crate) fn open_durable(dir: PathBuf) -> io::Result<Self> {
        Ok(Self { is_durable: true, ..Self::open(dir)? })
    }

    /// Returns whether there is a file for this name, even an invalid one.
    pub(crate) fn has_file(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<RecordEntry<T>>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<RecordEntry<T>>> {
        self.all().get(name).cloned()
    }

    /// Returns all values, in the order of their names.
    pub(crate) fn list(&self) -> Vec<T> {
        // A change locks an entry before the table.
        let entries: Vec<_> = self.all().values().map(Arc::clone).collect();
        entries.iter().map(|entry| entry.get()).collect()
    }

    /// Returns copies of the values that `is_such` accepts, in the order of their names.
    pub(crate) fn such(&self, is_such: impl Fn(&T) -> bool) -> Vec<T> {
        self.select(is_such).iter().map(|entry| entry.get()).collect()
    }

    /// Calls `show` with each value.
    pub(crate) fn each(&self, mut show: impl FnMut(&T)) {
        // A change locks an entry before the table.
        let entries: Vec<_> = self.all().values().map(Arc::clone).collect();
        entries.iter().for_each(|entry| show(&entry.value.lock().unwrap_or_else(PoisonError::into_inner)));
    }

    /// Returns the entries that `is_such` accepts now, in the order of their names.
    pub(crate) fn select(&self, is_such: impl Fn(&T) -> bool) -> Vec<Arc<RecordEntry<T>>> {
        // As above.
        let mut entries: Vec<_> = self.all().values().map(Arc::clone).collect();
        entries.retain(|entry| is_such(&entry.value.lock().unwrap_or_else(PoisonError::into_inner)));
        entries
    }

    /// Adds a value, which replaces one of the same name.
    ///
    /// # Errors
    /// When its file cannot be written: then the value is not added.
    pub(crate) fn insert(&self, value: T) -> io::Result<()> {
        self.write(&value)?;
        self.all().insert(value.name().to_owned(), Arc::new(RecordEntry::new(value)));
        Ok(())
    }

    /// Changes a value. Its file may be behind: it is only read at a start.
    pub(crate) fn change(&self, entry: &RecordEntry<T>, change: impl FnOnce(&mut T)) -> T {
        let mut value = entry.value.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut value);
        // A value removed meanwhile stays removed.
        let is_there = self.all().get(value.name()).is_some_and(|own| std::ptr::eq(Arc::as_ptr(own), entry));
        if is_there && let Err(error) = self.write(&value) {
            tracing::warn!(%error, name = value.name(), "a record is not written");
        }
        value.clone()
    }

    pub(crate) fn remove(&self, name: &str) -> bool {
        let removed = self.all().remove(name).is_some();
        if removed && let Err(error) = std::fs::remove_file(self.path(name)) {
            tracing::warn!(%error, name, "a record is not removed");
        }
        removed
    }

    /// Writes a file as a whole or not at all.
    fn write(&self, value: &T) -> io::Result<()> {
        let has_workers = || Handle::try_current().is_ok_and(|now| now.runtime_flavor() == RuntimeFlavor::MultiThread);
        // A sync takes milliseconds, in which this thread would answer no other client.
        if self.is_durable && has_workers() {
            return block_in_place(|| self.write_file(value));
        }
        self.write_file(value)
    }

    fn write_file(&self, value: &T) -> io::Result<()> {
        if !self.dir.exists() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            if self.is_durable
                && let Some(parent) = self.dir.parent()
            {
                File::open(parent)?.sync_all()?;
            }
        }
        let (path, content) = (self.path(value.name()), serde_json::to_vec(value)?);
        if self.is_durable {
            return write_durably(&path, &content);
        }
        let mut file = NamedTempFile::with_prefix_in(".", &self.dir)?;
        file.write_all(&content)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
}

impl<T> RecordEntry<T> {
    fn new(value: T) -> Self {
        Self {
            value: Mutex::new(value),
            turn: AsyncMutex::new(()),
            waking: Arc::default(),
            network: RwLock::new(()),
            cut: watch::Sender::new(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str, sandbox: &str) -> SnapshotRecord {
        let (id, owner, sandbox) = (id.to_owned(), "one".to_owned(), sandbox.to_owned());
        SnapshotRecord {
            id,
            name: None,
            mib: 64,
            is_closed: None,
            owner,
            sandbox,
            taken_at: Timestamp::UNIX_EPOCH,
            is_kept: false,
        }
    }

    #[test]
    fn records_outlive_their_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshots");
        let table = RecordTable::open(path.clone()).unwrap();
        for id in ["a", "b", "c"] {
            table.insert(snapshot(id, "box")).unwrap();
        }
        let entry = table.get("b").unwrap();
        table.change(&entry, |one| one.sandbox = "other".to_owned());
        assert!(table.remove("c") && !table.remove("c"));
        std::fs::write(path.join("bad.json"), "{").unwrap();
        let again = RecordTable::<SnapshotRecord>::open(path.clone()).unwrap();
        assert_eq!(again.list(), [snapshot("a", "box"), snapshot("b", "other")]);
        // Older copies: of a killed write, and by another name.
        let older = serde_json::to_vec(&snapshot("b", "older")).unwrap();
        [".tmp", "copy.json"].iter().for_each(|name| std::fs::write(path.join(name), &older).unwrap());
        let again = RecordTable::<SnapshotRecord>::open(path.clone()).unwrap();
        assert_eq!(again.list(), [snapshot("a", "box"), snapshot("b", "other")]);
        assert!(!path.join(".tmp").exists() && path.join("copy.json").exists());
    }

    #[test]
    fn what_was_removed_does_not_come_back_by_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let table = RecordTable::open(dir.path().join("s")).unwrap();
        table.insert(snapshot("a", "box")).unwrap();
        let entry = table.get("a").unwrap();
        table.remove("a");
        table.change(&entry, |one| one.sandbox = "late".to_owned());
        // Nor by the entry of another that has its name now.
        table.insert(snapshot("a", "new")).unwrap();
        table.change(&entry, |one| one.sandbox = "later".to_owned());
        assert_eq!(RecordTable::<SnapshotRecord>::open(dir.path().join("s")).unwrap().list(), [snapshot("a", "new")]);
    }

    #[test]
    fn one_whose_time_is_over_pauses_unless_it_was_given_more_or_is_paused() {
        let record = |id: &str, end_at: i64, auto_pause: bool, paused: bool| SandboxRecord {
            id: id.to_owned(),
            template: "base".to_owned(),
            owner: "one".to_owned(),
            metadata: Texts::default(),
            envs: Texts::default(),
            started_at: Timestamp::UNIX_EPOCH,
            end_at: Timestamp::from_second(end_at).unwrap(),
            paused,
            auto_pause,
            auto_resume: false,
            cpus: 1,
            mib: 64,
            socket: PathBuf::from("/s"),
            is_private: false,
            masked_host: None,
            network: AskedNetwork::default(),
            is_template_closed: None,
            template_layers: None,
        };
        let dir = tempfile::tempdir().unwrap();
        let table = RecordTable::open(dir.path().join("s")).unwrap();
        let all =
            [("late", 30, true, false), ("over", 10, true, false), ("killed", 10, false, false), ("p", 10, true, true)];
        for (id, end_at, auto_pause, paused) in all {
            table.insert(record(id, end_at, auto_pause, paused)).unwrap();
        }
        let now = Timestamp::from_second(20).unwrap();
        let over = table.select(|record| record.is_to_pause(now));
        assert_eq!(over.iter().map(|entry| entry.get().id).collect::<Vec<_>>(), ["over"]);
        let record = table.change(&over[0], |record| record.end_at = Timestamp::from_second(40).unwrap());
        assert!(!record.is_to_pause(now));
        record.expect(State::Running).unwrap();
        assert_eq!(record.expect(State::Paused).unwrap_err().status.as_u16(), 409);
    }
}
