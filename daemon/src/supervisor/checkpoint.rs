//! Checkpoints: images of VMs at one instant, held for forks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::detach::Copies;
use super::host_link::stricter;
use super::kept::{Found, KeptRecord};
use super::vm_record::VmRecord;
use crate::ahead::Learning;
use crate::control::{CheckpointInfo, DetachedInfo, ForkAnswer, ForkedInfo, ProblemKind};
use crate::image::{ForkedVm, PendingFork};
use crate::secrets::Secrets;
use crate::vm_host::{DaemonError, Labels, RuntimeDir, check_name};
use crate::worker::LaunchedVm;
use clade_devices::virtio::net::Link;
use clade_vmm::vm::{SavedAt, SavedVm, SealedParts, VmConfig};

/// An image of a VM, as the descriptors of its layers and its state. It outlives the VM.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// The VM, or the snapshot that it was opened from.
    origin: CheckpointOrigin,
    vm_record: VmRecord,
    parts: SealedParts,
    forked: ForkedVm,
    made: Instant,
    /// Learns the pages that its children write.
    learning: Arc<Learning>,
    /// The cost of its copies, if no VM's process can write its files.
    detached: Option<(DetachedInfo, Copies)>,
}

/// The source of an image.
#[derive(Clone, Debug)]
pub(super) enum CheckpointOrigin {
    /// A VM of this name.
    Vm(String),
    /// A snapshot.
    Saved(SavedAt),
}

impl Checkpoint {
    /// Forks the VM called `vm`, which runs on. Calls `check` while it waits.
    ///
    /// # Errors
    /// When there is no such VM, or it cannot be forked.
    pub(super) fn take(
        dir: &RuntimeDir,
        vm: &str,
        check: &dyn Fn() -> Result<(), DaemonError>,
    ) -> Result<Self, DaemonError> {
        // Before: when the image is there, the VM's files may be another's.
        let vm_record = VmRecord::expect(dir, vm)?;
        Self::of_pending(vm, vm_record, PendingFork::begin(dir.path(), vm)?, check)
    }

    /// Returns the image of the VM called `vm`, which `vm_record` describes. The request for it is
    /// already sent.
    ///
    /// # Errors
    /// When it cannot be forked.
    pub(super) fn of_pending(
        vm: &str,
        vm_record: VmRecord,
        pending_fork: PendingFork,
        check: &dyn Fn() -> Result<(), DaemonError>,
    ) -> Result<Self, DaemonError> {
        let (forked, parts) = pending_fork.image(check)?;
        vm_record.check(vm, &forked)?;
        Ok(Self::new(CheckpointOrigin::Vm(vm.to_owned()), vm_record, parts, forked))
    }

    /// Returns the image of a snapshot, of a VM that `vm_record` describes.
    pub(super) fn of_saved(vm_record: VmRecord, saved: &SavedVm, parts: SealedParts) -> Self {
        let forked = ForkedVm {
            config: saved.config.clone(),
            labels: Labels::default(),
            // A snapshot has no list of the secrets in its memory.
            secrets: Secrets::None,
            network: None,
            generation: saved.generation,
            pause: Duration::ZERO,
            freeze: Duration::ZERO,
            park: Duration::ZERO,
            in_flight: 0,
            remapped: 0,
            copied: 0,
        };
        Self::new(CheckpointOrigin::Saved(saved.place.clone()), vm_record, parts, forked)
    }

    /// The same with what a snapshot does not have.
    pub(super) fn with_record(mut self, record: &KeptRecord) -> Self {
        (self.forked.labels, self.forked.network) = (record.labels.clone(), record.network());
        self
    }

    fn new(origin: CheckpointOrigin, vm_record: VmRecord, parts: SealedParts, forked: ForkedVm) -> Self {
        let learning = Arc::new(Learning::new(vm_record.template.config.layout()));
        Self { origin, vm_record, parts, forked, made: Instant::now(), learning, detached: None }
    }

    /// The same image made of copies, which are detached.
    pub(super) fn with_parts(self, parts: SealedParts, info: DetachedInfo, copies: Copies) -> Self {
        Self { parts, detached: Some((info, copies)), ..self }
    }

    /// Returns whether the network of its children is open unless they are made with another state.
    pub(super) fn network(&self) -> Option<Link> {
        stricter(self.vm_record.network, self.forked.network)
    }

    /// Returns the learned set of the pages that its children write.
    pub(super) fn learning(&self) -> &Arc<Learning> {
        &self.learning
    }

    /// Returns the supervisor's record of the VM.
    pub(super) fn vm_record(&self) -> &VmRecord {
        &self.vm_record
    }

    /// Returns the name of the VM that it was taken of.
    pub(super) fn vm(&self) -> Option<&str> {
        match &self.origin {
            CheckpointOrigin::Vm(name) => Some(name),
            CheckpointOrigin::Saved(_) => None,
        }
    }

    /// Returns the snapshot that it was opened from.
    pub(super) fn saved_at(&self) -> Option<&SavedAt> {
        match &self.origin {
            CheckpointOrigin::Vm(_) => None,
            CheckpointOrigin::Saved(place) => Some(place),
        }
    }

    /// Returns its labels.
    pub(super) fn labels(&self) -> &Labels {
        &self.forked.labels
    }

    /// Returns the secrets that its children may be made without.
    pub(super) fn secrets(&self) -> &Secrets {
        &self.forked.secrets
    }

    pub(super) fn config(&self) -> &VmConfig {
        &self.vm_record.template.config
    }

    pub(super) fn parts(&self) -> &SealedParts {
        &self.parts
    }

    /// Returns the length of the VM's pause, in microseconds.
    pub(super) fn pause_us(&self) -> f64 {
        us(self.forked.pause)
    }

    pub(super) fn info(&self, name: &str) -> CheckpointInfo {
        CheckpointInfo {
            name: name.to_owned(),
            vm: self.vm().map(str::to_owned),
            snapshot: self.saved_at().map(|place| place.dir.clone()),
            generation: self.forked.generation,
            cpus: self.config().cpus(),
            mib: self.config().layout().bytes() >> 20,
            network: self.network(),
            age_s: self.made.elapsed().as_secs_f64(),
            descriptors: self.parts.descriptors(),
            pause_us: self.pause_us(),
            forked: self.vm().map(|_| ForkedInfo {
                park_us: us(self.forked.park),
                freeze_us: us(self.forked.freeze),
                remapped_pages: self.forked.remapped,
                copied_pages: self.forked.copied,
                in_flight: self.forked.in_flight,
            }),
            ahead: self.learning.info(),
            kept: false,
            detached: self.detached.as_ref().map(|(info, _)| *info),
        }
    }

    /// Returns the answer to a fork that has made `made` in `total`.
    pub(super) fn answer(&self, made: Vec<LaunchedVm>, total: Duration) -> ForkAnswer {
        let ForkedVm { pause, freeze, remapped, copied, .. } = self.forked;
        ForkAnswer::new(made, (pause, freeze, total), (remapped, copied))
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// A name's checkpoint. A name with neither is reserved, by a request or by files that cannot be read.
#[derive(Clone, Debug, Default)]
struct Slot {
    is_unreadable: bool,
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

    fn info(&self, name: &str) -> Option<CheckpointInfo> {
        let Some(held) = &self.held else { return Some(self.kept.as_ref()?.info()) };
        let info = held.info(name);
        Some(match &self.kept {
            None => info,
            // It may have been opened from the disk.
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

/// A checkpoint that is written to the disk. It is not removed until this is dropped.
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
        let unreadable = Slot { is_unreadable: true, ..Slot::default() };
        Self(Mutex::new(kept.chain(found.unreadable.into_iter().map(|name| (name, unreadable.clone()))).collect()))
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
        let none = || DaemonError::NoSuchCheckpoint { name: name.to_owned() };
        let record = match self.all().get(name).cloned().unwrap_or_default() {
            Slot { held: Some(held), .. } => return Ok(held),
            Slot { kept: Some(record), .. } => record,
            Slot { held: None, kept: None, .. } => return Err(none()),
        };
        let opened = open(&record)?;
        let mut all = self.all();
        // Another checkpoint may have the name by now, or none.
        let slot = all.get_mut(name).filter(|slot| slot.kept.as_ref().is_some_and(|now| Arc::ptr_eq(now, &record)));
        // Another request may have opened it too.
        Ok(Arc::clone(slot.ok_or_else(none)?.held.get_or_insert_with(|| Arc::new(opened))))
    }

    /// Begins to write the checkpoint called `name` to the disk. None if it is there already.
    ///
    /// # Errors
    /// When no checkpoint has the name, or another request writes it.
    pub(super) fn begin_keeping(&self, name: &str) -> Result<Option<Keeping<'_>>, DaemonError> {
        let mut all = self.all();
        let none = || DaemonError::NoSuchCheckpoint { name: name.to_owned() };
        let slot = all.get_mut(name).ok_or_else(none)?;
        slot.expect_settled(name)?;
        if slot.kept.is_some() {
            return Ok(None);
        }
        let checkpoint = slot.held.clone().ok_or_else(none)?;
        slot.is_being_kept = true;
        Ok(Some(Keeping { of: self, name: name.to_owned(), checkpoint }))
    }

    /// Returns a description of the checkpoint called `name`.
    ///
    /// # Errors
    /// When no checkpoint has the name.
    pub(super) fn info(&self, name: &str) -> Result<CheckpointInfo, DaemonError> {
        let found = self.all().get(name).and_then(|slot| slot.info(name));
        found.ok_or_else(|| DaemonError::NoSuchCheckpoint { name: name.to_owned() })
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
        let none = || DaemonError::NoSuchCheckpoint { name: name.to_owned() };
        // The name stays reserved until its files are removed: a new checkpoint of the name has files
        // in the same place.
        let mut all = self.all();
        let slot = all.get_mut(name).filter(|slot| slot.info(name).is_some()).ok_or_else(none)?;
        slot.expect_settled(name)?;
        let taken = std::mem::take(slot);
        drop(all);
        let info = taken.info(name).ok_or_else(none)?;
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

    /// Returns the configurations of the VMs of checkpoints in memory.
    pub(super) fn configs(&self) -> Vec<VmConfig> {
        self.all().values().filter_map(|slot| Some(slot.held.as_ref()?.config().clone())).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.all().values().filter(|slot| !slot.is_unreadable).count()
    }

    /// Returns the number of kept checkpoints.
    pub(super) fn kept(&self) -> usize {
        self.all().values().filter(|slot| slot.kept.is_some()).count()
    }

    /// Returns the number of checkpoints that end with this supervisor, and of reserved names.
    pub(super) fn unkept(&self) -> usize {
        self.all().values().filter(|slot| slot.kept.is_none() && !slot.is_unreadable).count()
    }

    pub(super) fn clear(&self) {
        // Not under the lock: closing descriptors takes time.
        let all = std::mem::take(&mut *self.all());
        drop(all);
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
        let record = crate::supervisor::kept::tests::record("base");
        let records = [("base".to_owned(), record)].into();
        let all = Checkpoints::of_kept(Found { records, unreadable: ["cut".to_owned()].into() });
        assert_eq!((all.list().len(), all.len(), all.unkept()), (1, 1, 0));
        // No other checkpoint gets the name of files that cannot be read.
        assert!(matches!(all.reserve("web", Some("cut")), Err(DaemonError::CheckpointTaken { .. })));
        assert!(matches!(all.remove("cut", || panic!("removed")), Err(DaemonError::NoSuchCheckpoint { .. })));
        assert!(matches!(all.reserve("web", Some("cut")), Err(DaemonError::CheckpointTaken { .. })));
        assert!(all.info("base").unwrap().kept && all.configs().is_empty());
        let refused = |what: &str| {
            let kind = crate::control::ProblemKind::Internal;
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
