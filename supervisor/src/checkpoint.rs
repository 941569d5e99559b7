//! Checkpoints: images of VMs at one instant, held for forks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Supervisor;
use super::copied_files::Copies;
use super::host_link::stricter;
use super::kept::KeptData;
use super::kept::{DataId, KeptLine, KeptRecord};
use super::launched_vm::LaunchedVm;
use super::priority::Raised;
use super::vm_record::VmRecord;
use clade_api::http::Cancel;
use clade_api::secrets::Secrets;
use clade_api::{CheckpointInfo, DaemonError, DetachedInfo, ErasedInfo, ForkAnswer, ForkedInfo, Labels, RuntimeDir};
use clade_devices::virtio::net::Link;
use clade_vmm::vm::{SavedAt, SavedVm, SealedParts, VmConfig};
use clade_worker::VmTemplate;
use clade_worker::ahead::Learning;
use clade_worker::image::{ForkedVm, PendingFork};

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
    /// Its files, if it is kept.
    kept: OnceLock<KeptData>,
    /// The kept checkpoints that the VM descended from at that instant.
    line: KeptLine,
    /// Whether the VM of a copy has files of an earlier copy.
    descends_from_copies: bool,
    /// The images of disks that it has open.
    images: Arc<[PathBuf]>,
}

/// The images of disks that checkpoints have open, also those that are being written and have no name.
#[derive(Debug, Default)]
pub(super) struct ImagesInUse(Mutex<Vec<Weak<[PathBuf]>>>);

impl ImagesInUse {
    fn all(&self) -> MutexGuard<'_, Vec<Weak<[PathBuf]>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the images of a checkpoint, until it is dropped.
    fn note(&self, images: &Arc<[PathBuf]>) {
        let mut all = self.all();
        all.retain(|images| images.strong_count() > 0);
        if !images.is_empty() {
            all.push(Arc::downgrade(images));
        }
    }

    pub(super) fn paths(&self) -> BTreeSet<PathBuf> {
        self.all().iter().filter_map(Weak::upgrade).flat_map(|images| images.to_vec()).collect()
    }
}

fn images_of(template: &VmTemplate) -> Arc<[PathBuf]> {
    template.images().map(Path::to_owned).collect()
}

/// The source of an image.
#[derive(Clone, Debug)]
pub(super) enum CheckpointOrigin {
    /// A VM of this name.
    Vm(String),
    /// A snapshot.
    Saved(SavedAt),
}

impl Supervisor {
    /// Forks the VM called `vm`, which runs on.
    ///
    /// # Errors
    /// When there is no such VM, it cannot be forked, or the request is cancelled.
    pub(super) fn take_checkpoint(&self, vm: &str, cancel: &Cancel) -> Result<Checkpoint, DaemonError> {
        // Before: when the image is there, the VM's files may be another's.
        let vm_record = VmRecord::expect(&self.0.dir, vm)?;
        let line = self.0.kept_lines.now(vm, vm_record.process);
        let (pending_fork, _raised) = self.begin_fork(vm, &vm_record)?;
        let check = || self.check(0, 0, cancel);
        let taken = Checkpoint::of_pending(&self.0.dir, vm, (vm_record, line), pending_fork, &check)?;
        self.0.images_in_use.note(&taken.images);
        Ok(taken)
    }

    /// Requests the image of the VM called `vm`, whose process is raised until the drop.
    ///
    /// # Errors
    /// When there is no such VM, or it takes no request.
    pub(super) fn begin_fork(
        &self,
        vm: &str,
        vm_record: &VmRecord,
    ) -> Result<(PendingFork, Option<Raised>), DaemonError> {
        let begin = || PendingFork::begin(self.dir(), vm);
        let (pending_fork, raised) = self.0.priority.raise(vm_record.process, begin);
        Ok((pending_fork?, raised))
    }
}

impl Checkpoint {
    /// Returns the image of the VM called `vm`, which `vm_record` describes and whose line was `line`
    /// before the request for it was sent.
    ///
    /// # Errors
    /// When it cannot be forked.
    pub(super) fn of_pending(
        dir: &RuntimeDir,
        vm: &str,
        (mut vm_record, line): (VmRecord, KeptLine),
        pending_fork: PendingFork,
        check: &dyn Fn() -> Result<(), DaemonError>,
    ) -> Result<Self, DaemonError> {
        let (forked, parts) = pending_fork.image(check)?;
        vm_record.check(vm, &forked)?;
        // Of nothing else: a lock or an interface would be held here beyond the end of its VM.
        parts.check_files()?;
        // The VM's process chose the instant of its image: the network may have been closed before that.
        if !vm_record.template.config.nets.is_empty() {
            let now = VmRecord::read(dir, vm)?.filter(|now| now.process == vm_record.process);
            vm_record.network = stricter(vm_record.network, now.and_then(|now| now.network));
        }
        Ok(Self { line, ..Self::new(CheckpointOrigin::Vm(vm.to_owned()), vm_record, parts, forked) })
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

    /// Adds the parts that a snapshot does not have: labels, and the state of the network.
    pub(super) fn with_record(mut self, record: &KeptRecord) -> Self {
        (self.forked.labels, self.forked.network) = (record.labels.clone(), record.network());
        if let CheckpointOrigin::Saved(place) = &self.origin {
            self.set_kept(KeptData {
                chain: record.chain().to_vec(),
                bytes: record.bytes(),
                id: place.id,
                is_alone: true,
            });
        }
        self
    }

    /// Notes its files.
    pub(super) fn set_kept(&self, data: KeptData) {
        // Data of an earlier version goes with its name: nothing builds on it.
        if !data.chain.is_empty() {
            let is_first = self.kept.set(data).is_ok();
            debug_assert!(is_first, "a checkpoint is kept once");
        }
    }

    /// Returns the data of the kept checkpoints that its children descend from, the nearest first.
    pub(super) fn line(&self) -> Vec<DataId> {
        let Some(data) = self.kept() else { return self.line.data.clone() };
        let earlier = self.line.data.iter().filter(|id| !data.is_alone && !data.chain.contains(id));
        data.chain.iter().chain(earlier).cloned().collect()
    }

    /// Returns the ordinal of its instant ([`KeptLine::at`]).
    pub(super) fn instant(&self) -> u64 {
        self.line.at
    }

    /// Returns whether the VM of a copy has files of an earlier copy.
    pub(super) fn descends_from_copies(&self) -> bool {
        self.descends_from_copies
    }

    /// Returns its files, if it is kept.
    pub(super) fn kept(&self) -> Option<&KeptData> {
        self.kept.get()
    }

    fn new(origin: CheckpointOrigin, vm_record: VmRecord, parts: SealedParts, forked: ForkedVm) -> Self {
        let learning = Arc::new(Learning::new(vm_record.template.config.layout()));
        let images = images_of(&vm_record.template);
        Self {
            origin,
            vm_record,
            parts,
            forked,
            made: Instant::now(),
            learning,
            detached: None,
            kept: OnceLock::new(),
            line: KeptLine::default(),
            descends_from_copies: false,
            images,
        }
    }

    /// The same image made of copies, which are detached. The images of disks that were copied are not in use by it.
    pub(super) fn with_parts(
        mut self,
        parts: SealedParts,
        info: DetachedInfo,
        copies: Copies,
        in_use: &ImagesInUse,
    ) -> Self {
        self.descends_from_copies = self.vm_record.template.detached;
        self.vm_record.template.detached = true;
        let images = images_of(&self.vm_record.template);
        // Before the drop of the earlier list: most are in both.
        in_use.note(&images);
        Self { parts, detached: Some((info, copies)), images, ..self }
    }

    /// Returns whether it is made of copies.
    pub(super) fn is_detached(&self) -> bool {
        self.detached.is_some()
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

    /// Returns the answer to a fork that has made `made` in `total`, with the counts of secrets erased
    /// in each child.
    pub(super) fn answer(&self, made: Vec<LaunchedVm>, total: Duration, erased: Option<ErasedInfo>) -> ForkAnswer {
        let ForkedVm { pause, freeze, remapped, copied, .. } = self.forked;
        let (children, identities): (_, Vec<_>) = made.into_iter().map(|child| (child.name, child.identity)).unzip();
        ForkAnswer {
            children,
            identities: identities.into_iter().flatten().collect(),
            pause_us: us(pause),
            freeze_us: us(freeze),
            total_us: us(total),
            remapped_pages: remapped,
            copied_pages: copied,
            network: self.network(),
            // The same in each child, because all have the same image.
            erased,
        }
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_in_use_as_long_as_a_checkpoint_has_them_open() {
        let in_use = ImagesInUse::default();
        let images = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Arc<[_]>>();
        let (first, second) = (images(&["/a", "/b"]), images(&["/b"]));
        [&first, &second, &images(&[])].into_iter().for_each(|images| in_use.note(images));
        assert_eq!(in_use.paths().len(), 2);
        drop(first);
        assert_eq!(in_use.paths(), BTreeSet::from(["/b".into()]));
        drop(second);
        assert!(in_use.paths().is_empty());
        in_use.note(&images(&["/c"]));
        assert_eq!(in_use.all().len(), 1, "those of dropped checkpoints are forgotten");
    }
}
