//! Checkpoints: images of VMs at one instant, held for forks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::about::About;
use crate::ahead::Learning;
use crate::control::{CheckpointInfo, ForkAnswer, ForkedInfo};
use crate::fleet::{FleetError, Labels, RuntimeDir, check_name};
use crate::image::{Asked, Forked};
use crate::secrets::Secrets;
use crate::worker::Made;
use clade_vmm::vm::{SavedAt, SavedVm, SealedParts, VmConfig};

/// An image of a VM, as the descriptors of its layers and its state. It outlives the VM.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// The VM, or the snapshot that it was opened from.
    origin: Origin,
    about: About,
    parts: SealedParts,
    forked: Forked,
    made: Instant,
    /// Learns the pages that its children write.
    learning: Arc<Learning>,
}

/// The source of an image.
#[derive(Clone, Debug)]
pub(super) enum Origin {
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
        check: &dyn Fn() -> Result<(), FleetError>,
    ) -> Result<Self, FleetError> {
        // Before: when the image is there, the VM's files may be another's.
        let about = About::expect(dir, vm)?;
        Self::of_asked(vm, about, Asked::begin(dir.path(), vm)?, check)
    }

    /// Returns the image of the VM called `vm`, which `about` describes. The request for it is
    /// already sent.
    ///
    /// # Errors
    /// When it cannot be forked.
    pub(super) fn of_asked(
        vm: &str,
        about: About,
        asked: Asked,
        check: &dyn Fn() -> Result<(), FleetError>,
    ) -> Result<Self, FleetError> {
        let (forked, parts) = asked.image(check)?;
        about.check(vm, &forked)?;
        Ok(Self::new(Origin::Vm(vm.to_owned()), about, parts, forked))
    }

    /// Returns the image of a snapshot, of a VM that `about` describes.
    pub(super) fn of_saved(about: About, saved: &SavedVm, parts: SealedParts) -> Self {
        let forked = Forked {
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
        Self::new(Origin::Saved(saved.place.clone()), about, parts, forked)
    }

    fn new(origin: Origin, about: About, parts: SealedParts, forked: Forked) -> Self {
        let learning = Arc::new(Learning::new(about.shape.config.layout()));
        Self { origin, about, parts, forked, made: Instant::now(), learning }
    }

    /// Returns the learned set of the pages that its children write.
    pub(super) fn learning(&self) -> &Arc<Learning> {
        &self.learning
    }

    /// Returns the supervisor's record of the VM.
    pub(super) fn about(&self) -> &About {
        &self.about
    }

    /// Returns the name of the VM that it was taken of.
    pub(super) fn vm(&self) -> Option<&str> {
        match &self.origin {
            Origin::Vm(name) => Some(name),
            Origin::Saved(_) => None,
        }
    }

    /// Returns the snapshot that it was opened from.
    pub(super) fn saved_at(&self) -> Option<&SavedAt> {
        match &self.origin {
            Origin::Vm(_) => None,
            Origin::Saved(place) => Some(place),
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
        &self.about.shape.config
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
            network: self.forked.network,
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
        }
    }

    /// Returns the answer to a fork that has made `made` in `total`.
    pub(super) fn answer(&self, made: Vec<Made>, total: Duration) -> ForkAnswer {
        let Forked { pause, freeze, remapped, copied, .. } = self.forked;
        ForkAnswer::new(made, (pause, freeze, total), (remapped, copied))
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Checkpoints by name.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints(Mutex<BTreeMap<String, Option<Arc<Checkpoint>>>>);

/// A reserved name. A drop frees it, unless a checkpoint has it.
#[derive(Debug)]
pub(super) struct Reserved<'a> {
    of: &'a Checkpoints,
    name: String,
}

impl std::ops::Deref for Reserved<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.name
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut all = self.of.all();
        if all.get(&self.name).is_some_and(Option::is_none) {
            all.remove(&self.name);
        }
    }
}

impl Checkpoints {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Option<Arc<Checkpoint>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a name: by default the VM's and a number.
    ///
    /// # Errors
    /// When the name is invalid, or taken.
    pub(super) fn reserve(&self, vm: &str, name: Option<&str>) -> Result<Reserved<'_>, FleetError> {
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
            return Err(FleetError::CheckpointTaken { name });
        }
        all.insert(name.clone(), None);
        Ok(Reserved { of: self, name })
    }

    pub(super) fn insert(&self, name: &str, checkpoint: Arc<Checkpoint>) {
        self.all().insert(name.to_owned(), Some(checkpoint));
    }

    /// Returns the checkpoint called `name`.
    ///
    /// # Errors
    /// When no checkpoint has the name.
    pub(super) fn get(&self, name: &str) -> Result<Arc<Checkpoint>, FleetError> {
        let none = || FleetError::NoSuchCheckpoint { name: name.to_owned() };
        self.all().get(name).cloned().flatten().ok_or_else(none)
    }

    /// Removes a checkpoint. Children forked from it run on.
    ///
    /// # Errors
    /// When no checkpoint has the name.
    pub(super) fn remove(&self, name: &str) -> Result<CheckpointInfo, FleetError> {
        let mut all = self.all();
        // A reserved name belongs to another request.
        let found = if all.get(name).is_some_and(Option::is_some) { all.remove(name).flatten() } else { None };
        drop(all);
        Ok(found.ok_or_else(|| FleetError::NoSuchCheckpoint { name: name.to_owned() })?.info(name))
    }

    pub(super) fn list(&self) -> Vec<CheckpointInfo> {
        self.all().iter().filter_map(|(name, found)| Some(found.as_ref()?.info(name))).collect()
    }

    /// Returns the configurations of the checkpoints' VMs.
    pub(super) fn configs(&self) -> Vec<VmConfig> {
        self.all().values().flatten().map(|checkpoint| checkpoint.config().clone()).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.all().len()
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
        assert!(matches!(all.reserve("web", Some("web.1")), Err(FleetError::CheckpointTaken { .. })));
        // A checkpoint is listed once it is there.
        assert_eq!(all.list().len(), 0);
        assert!(matches!(all.get("web.1"), Err(FleetError::NoSuchCheckpoint { .. })));
        assert!(all.remove("web.1").is_err());
        drop(first);
        assert_eq!(&*all.reserve("web", None).unwrap(), "web.1");
        assert!(matches!(all.reserve("web", Some("a/b")), Err(FleetError::BadName { .. })));
        assert_eq!(all.len(), 0);
    }
}
