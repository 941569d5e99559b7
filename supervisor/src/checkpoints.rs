//! Checkpoints by name: in memory, on disk, or both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::checkpoint::Checkpoint;
use super::kept::{DataId, Found, KeptRecord};
use super::{ImagePermit, Supervisor};
use clade_api::http::Cancel;
use clade_api::{CheckpointInfo, CheckpointRequest, DaemonError, ProblemKind, check_name};

/// A name's checkpoint. A name with neither is reserved, by a request or by files that cannot be read.
#[derive(Clone, Debug, Default)]
struct Slot {
    /// Why its files cannot be read.
    unreadable: Option<Arc<str>>,
    /// Whether a request writes it to the disk.
    is_being_kept: bool,
    /// In memory.
    held: Option<Arc<Checkpoint>>,
    /// On disk.
    kept: Option<Arc<KeptRecord>>,
}

impl Slot {
    /// # Errors
    /// When a request writes the checkpoint to the disk.
    fn expect_settled(&self, name: &str) -> Result<(), DaemonError> {
        if !self.is_being_kept {
            return Ok(());
        }
        let text = format!("the checkpoint {name:?} is being written to the disk");
        Err(DaemonError::Refused { kind: ProblemKind::WrongState, text })
    }

    /// Returns the error of a request for a checkpoint that is not there.
    fn missing(&self, name: &str) -> DaemonError {
        let name = name.to_owned();
        let Some(reason) = &self.unreadable else { return DaemonError::NoSuchCheckpoint { name } };
        let text = format!("the checkpoint {name:?} is on the disk and cannot be read: {reason}");
        DaemonError::Refused { kind: ProblemKind::WrongState, text }
    }

    fn info(&self, name: &str) -> Option<CheckpointInfo> {
        let Some(held) = &self.held else { return Some(self.kept.as_ref()?.info()) };
        let info = held.info(name);
        Some(match &self.kept {
            None => info,
            // The checkpoint may have been opened from the disk.
            Some(record) => CheckpointInfo {
                vm: record.vm().map(str::to_owned),
                age_s: record.age().as_secs_f64(),
                kept: true,
                ..info
            },
        })
    }
}

/// Checkpoints by name.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints(Mutex<BTreeMap<String, Slot>>);

/// A reserved name. A drop frees it, unless a checkpoint has it.
#[derive(Debug)]
pub(super) struct ReservedName<'a> {
    of: &'a Checkpoints,
    name: String,
    is_used: bool,
}

impl ReservedName<'_> {
    /// Holds a checkpoint under the name, with its record if it is kept.
    pub(super) fn hold(mut self, checkpoint: Arc<Checkpoint>, kept: Option<KeptRecord>) {
        self.is_used = true;
        let slot = Slot { held: Some(checkpoint), kept: kept.map(Arc::new), ..Slot::default() };
        self.of.all().insert(self.name.clone(), slot);
    }
}

/// A checkpoint that is written to the disk. Its removal waits until this is dropped.
#[derive(Debug)]
pub(super) struct Keeping<'a> {
    of: &'a Checkpoints,
    name: String,
    pub(super) checkpoint: Arc<Checkpoint>,
}

impl Keeping<'_> {
    /// Notes that the checkpoint is on the disk, with this record.
    pub(super) fn done(self, record: KeptRecord) {
        if let Some(slot) = self.of.all().get_mut(&self.name) {
            slot.kept = Some(Arc::new(record));
        }
    }
}

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.of.all().get_mut(&self.name) {
            slot.is_being_kept = false;
        }
    }
}

impl std::ops::Deref for ReservedName<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.name
    }
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        if !self.is_used {
            self.of.all().remove(&self.name);
        }
    }
}

impl Checkpoints {
    /// The kept checkpoints of an earlier supervisor.
    pub(super) fn of_kept(found: Found) -> Self {
        let slot = |record| Slot { kept: Some(Arc::new(record)), ..Slot::default() };
        let kept = found.records.into_iter().map(|(name, record)| (name, slot(record)));
        let unreadable = |reason: String| Slot { unreadable: Some(reason.into()), ..Slot::default() };
        let unreadable = found.unreadable.into_iter().map(|(name, reason)| (name, unreadable(reason)));
        Self(Mutex::new(kept.chain(unreadable).collect()))
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a name: by default the VM's and a number.
    ///
    /// # Errors
    /// When the name is invalid, or taken.
    pub(super) fn reserve(&self, vm: &str, name: Option<&str>) -> Result<ReservedName<'_>, DaemonError> {
        let mut all = self.all();
        let name = match name {
            Some(name) => name.to_owned(),
            None => {
                let free = (1u64..).map(|n| format!("{vm}.{n}")).find(|name| !all.contains_key(name));
                free.unwrap_or_default()
            }
        };
        check_name(&name)?;
        if all.contains_key(&name) {
            return Err(DaemonError::CheckpointTaken { name });
        }
        all.insert(name.clone(), Slot::default());
        Ok(ReservedName { of: self, name, is_used: false })
    }

    /// Returns the checkpoint called `name`. One that is only on disk is opened with `open`.
    ///
    /// # Errors
    /// When no checkpoint has the name, also after it was opened; when it cannot be opened.
    pub(super) fn get(
        &self,
        name: &str,
        open: impl FnOnce(&KeptRecord) -> Result<Checkpoint, DaemonError>,
    ) -> Result<Arc<Checkpoint>, DaemonError> {
        let slot = self.all().get(name).cloned().unwrap_or_default();
        let none = || slot.missing(name);
        let record = match &slot {
            Slot { held: Some(held), .. } => return Ok(Arc::clone(held)),
            Slot { kept: Some(record), .. } => Arc::clone(record),
            Slot { held: None, kept: None, .. } => return Err(none()),
        };
        let opened = open(&record)?;
        let mut all = self.all();
        // Another checkpoint may have the name by now, or none.
        let slot = all.get_mut(name).filter(|slot| slot.kept.as_ref().is_some_and(|now| Arc::ptr_eq(now, &record)));
        // Another request may have opened it too.
        Ok(Arc::clone(slot.ok_or_else(none)?.held.get_or_insert_with(|| Arc::new(opened))))
    }

    /// Returns the kept checkpoint with this data of its own, if it is in memory.
    pub(super) fn held_as(&self, data: &DataId) -> Option<Arc<Checkpoint>> {
        let all = self.all();
        let kept =
            all.values().filter(|slot| slot.kept.as_ref().is_some_and(|record| record.chain().first() == Some(data)));
        kept.filter_map(|slot| slot.held.clone()).next()
    }

    /// Returns whether the kept checkpoint called `name` builds on others.
    fn builds_on_others(&self, name: &str) -> bool {
        let all = self.all();
        all.get(name).and_then(|slot| slot.kept.as_ref()).is_some_and(|record| record.chain().len() > 1)
    }

    /// Begins to write the checkpoint called `name` to the disk. None if it is there already.
    ///
    /// # Errors
    /// When no checkpoint has the name, or another request writes it.
    pub(super) fn begin_keeping(&self, name: &str) -> Result<Option<Keeping<'_>>, DaemonError> {
        let mut all = self.all();
        let slot = all.get_mut(name).ok_or_else(|| Slot::default().missing(name))?;
        slot.expect_settled(name)?;
        if slot.kept.is_some() {
            return Ok(None);
        }
        let checkpoint = slot.held.clone().ok_or_else(|| slot.missing(name))?;
        slot.is_being_kept = true;
        Ok(Some(Keeping { of: self, name: name.to_owned(), checkpoint }))
    }

    /// Returns a description of the checkpoint called `name`.
    ///
    /// # Errors
    /// When no checkpoint has the name.
    pub(super) fn info(&self, name: &str) -> Result<CheckpointInfo, DaemonError> {
        let slot = self.all().get(name).cloned().unwrap_or_default();
        slot.info(name).ok_or_else(|| slot.missing(name))
    }

    /// Removes a checkpoint. Children forked from it run on. `remove_kept` removes the files of a kept
    /// one.
    ///
    /// # Errors
    /// When no checkpoint has the name, or a request writes it to the disk. That of `remove_kept`: the
    /// checkpoint stays.
    pub(super) fn remove(
        &self,
        name: &str,
        remove_kept: impl FnOnce() -> Result<(), DaemonError>,
    ) -> Result<CheckpointInfo, DaemonError> {
        // The name stays reserved until its files are removed: a new checkpoint of the name has files
        // in the same place.
        let mut all = self.all();
        let slot = all.get_mut(name).ok_or_else(|| Slot::default().missing(name))?;
        let info = slot.info(name).ok_or_else(|| slot.missing(name))?;
        slot.expect_settled(name)?;
        let taken = std::mem::take(slot);
        drop(all);
        if taken.kept.is_some()
            && let Err(error) = remove_kept()
        {
            self.all().insert(name.to_owned(), taken);
            return Err(error);
        }
        self.all().remove(name);
        // Not under the lock: closing descriptors takes time.
        drop(taken);
        Ok(info)
    }

    pub(super) fn list(&self) -> Vec<CheckpointInfo> {
        self.all().iter().filter_map(|(name, slot)| slot.info(name)).collect()
    }

    /// Returns the images of disks that checkpoints in memory have open.
    pub(super) fn images(&self) -> Vec<PathBuf> {
        let all = self.all();
        let held = all.values().filter_map(|slot| slot.held.as_ref());
        held.flat_map(|held| held.vm_record().template.images()).map(Path::to_owned).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.all().values().filter(|slot| slot.unreadable.is_none()).count()
    }

    /// Returns the number of kept checkpoints.
    pub(super) fn kept(&self) -> usize {
        self.all().values().filter(|slot| slot.kept.is_some()).count()
    }

    /// Returns the number of checkpoints that end with this supervisor, and of reserved names.
    pub(super) fn unkept(&self) -> usize {
        self.all().values().filter(|slot| slot.kept.is_none() && slot.unreadable.is_none()).count()
    }

    pub(super) fn clear(&self) {
        // Not under the lock: closing descriptors takes time.
        let all = std::mem::take(&mut *self.all());
        drop(all);
    }
}

impl Supervisor {
    /// Takes a checkpoint of a VM, in whichever process it runs, and keeps it if that is requested.
    ///
    /// # Errors
    /// When there is no such VM, it cannot be forked, the name is taken, or the checkpoint cannot be
    /// kept. No checkpoint stays then.
    pub(crate) fn checkpoint(
        &self,
        vm: &str,
        request: &CheckpointRequest,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<CheckpointInfo, DaemonError> {
        if request.full && !request.keep {
            let text = "full: a checkpoint that is not kept is not written".to_owned();
            return Err(DaemonError::Refused { kind: ProblemKind::BadRequest, text });
        }
        let _busy = self.0.busy.read();
        let name = self.0.checkpoints.reserve(vm, request.name.as_deref())?;
        let checkpoint = if request.detach {
            self.detached_image(vm, permit, cancel)?
        } else {
            let taken = self.take_checkpoint(vm, cancel)?;
            drop(permit);
            taken
        };
        let checkpoint = Arc::new(checkpoint);
        let kept = if request.keep { Some(self.keep(&name, &checkpoint, request.full, cancel)?) } else { None };
        // A checkpoint without a client would stay unknown.
        if let Err(cancelled) = self.check(0, 0, cancel) {
            if kept.is_some()
                && let Err(error) = self.remove_kept(&name)
            {
                // Its record is still on the disk, so this supervisor has the checkpoint too.
                self.0.events.checkpoint_created(&name, vm);
                name.hold(checkpoint, kept);
                return Err(error);
            }
            return Err(cancelled);
        }
        let info = CheckpointInfo { kept: kept.is_some(), ..checkpoint.info(&name) };
        // First: as soon as the checkpoint is there, another request may remove it, and announce
        // that.
        self.0.events.checkpoint_created(&name, vm);
        name.hold(checkpoint, kept);
        Ok(info)
    }

    /// Writes a checkpoint to the disk, where later supervisors find it. One that is there already is
    /// left as it is.
    ///
    /// # Errors
    /// When no checkpoint has the name, another request writes or removes it, or it cannot be written.
    /// The checkpoint is then held as before.
    pub(crate) fn keep_checkpoint(
        &self,
        name: &str,
        full: bool,
        cancel: &Cancel,
    ) -> Result<CheckpointInfo, DaemonError> {
        let _busy = self.0.busy.read();
        if let Some(keeping) = self.0.checkpoints.begin_keeping(name)? {
            let record = self.keep(name, &keeping.checkpoint, full, cancel)?;
            keeping.done(record);
        } else if full && self.0.checkpoints.builds_on_others(name) {
            let text = format!("the checkpoint {name:?} is kept already, and builds on others: take another one");
            return Err(DaemonError::Refused { kind: ProblemKind::WrongState, text });
        }
        self.0.checkpoints.info(name)
    }

    /// Returns the checkpoint called `name`, opened from the disk if it is only there.
    ///
    /// # Errors
    /// When no checkpoint has the name, or it cannot be opened.
    pub(super) fn checkpoint_of(&self, name: &str, cancel: &Cancel) -> Result<Arc<Checkpoint>, DaemonError> {
        self.0.checkpoints.get(name, |record| self.open_kept(name, record, cancel))
    }

    /// Removes a checkpoint, also from the disk.
    ///
    /// # Errors
    /// When no checkpoint has the name, or its files cannot be removed.
    pub(super) fn remove_checkpoint(&self, name: &str) -> Result<CheckpointInfo, DaemonError> {
        let _busy = self.0.busy.read();
        let removed = self.0.checkpoints.remove(name, || self.remove_kept(name))?;
        self.0.events.checkpoint_removed(name);
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_reserved_while_its_checkpoint_is_taken_and_free_if_it_fails() {
        let all = Checkpoints::default();
        let first = all.reserve("web", None).unwrap();
        assert_eq!(&*first, "web.1");
        assert_eq!(&*all.reserve("web", None).unwrap(), "web.2");
        assert!(matches!(all.reserve("web", Some("web.1")), Err(DaemonError::CheckpointTaken { .. })));
        // A checkpoint is listed once it is there.
        assert_eq!(all.list().len(), 0);
        let get = |name: &str| all.get(name, |_| panic!("it is not on disk")).map(drop);
        assert!(matches!(get("web.1"), Err(DaemonError::NoSuchCheckpoint { .. })));
        assert!(all.remove("web.1", || Ok(())).is_err());
        drop(first);
        assert_eq!(&*all.reserve("web", None).unwrap(), "web.1");
        assert!(matches!(all.reserve("web", Some("a/b")), Err(DaemonError::BadName { .. })));
        assert_eq!(all.len(), 0);
    }

    #[test]
    fn a_kept_checkpoint_is_there_until_its_files_have_gone() {
        let record = crate::kept::tests::record("base");
        let records = [("base".to_owned(), record)].into();
        let all = Checkpoints::of_kept(Found {
            records,
            unreadable: [("cut".to_owned(), "cut/record: torn".to_owned())].into(),
        });
        assert_eq!((all.list().len(), all.len(), all.unkept()), (1, 1, 0));
        // No other checkpoint gets the name of files that cannot be read.
        assert!(matches!(all.reserve("web", Some("cut")), Err(DaemonError::CheckpointTaken { .. })));
        for refused in [
            all.remove("cut", || panic!("removed")).map(drop),
            all.info("cut").map(drop),
            all.get("cut", |_| panic!("opened")).map(drop),
            all.begin_keeping("cut").map(drop),
        ] {
            let error = refused.unwrap_err();
            assert_eq!(error.problem(), ProblemKind::WrongState);
            assert!(error.to_string().contains("\"cut\"") && error.to_string().contains("torn"), "{error}");
        }
        assert!(matches!(all.reserve("web", Some("cut")), Err(DaemonError::CheckpointTaken { .. })));
        assert!(all.info("base").unwrap().kept && all.images().is_empty());
        let refused = |what: &str| {
            let kind = clade_api::ProblemKind::Internal;
            DaemonError::Refused { kind, text: what.to_owned() }
        };
        let opened = all.get("base", |_| Err(refused("damaged"))).map(drop).unwrap_err();
        assert_eq!(opened.to_string(), "damaged");
        // While its files are removed, the name is neither the checkpoint's nor free.
        let is_taken = || {
            assert!(matches!(all.info("base"), Err(DaemonError::NoSuchCheckpoint { .. })));
            assert!(matches!(all.get("base", |_| panic!("opened")), Err(DaemonError::NoSuchCheckpoint { .. })));
            assert!(matches!(
                all.remove("base", || panic!("removed twice")),
                Err(DaemonError::NoSuchCheckpoint { .. })
            ));
            assert!(matches!(all.reserve("web", Some("base")), Err(DaemonError::CheckpointTaken { .. })));
        };
        let failed = all.remove("base", || {
            is_taken();
            Err(refused("read-only"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "read-only");
        assert!(all.info("base").unwrap().kept, "files that stay are a checkpoint still");
        // Removed while it is opened.
        let gone = all.get("base", |_| {
            all.remove("base", || Ok(())).unwrap();
            Err(refused("it has gone"))
        });
        assert!(gone.is_err() && all.len() == 0);
        assert_eq!(&*all.reserve("web", Some("base")).unwrap(), "base");
    }
}
