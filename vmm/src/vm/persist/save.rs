//! Snapshots of running VMs.
//!
//! A snapshot is a fork whose image is written to a directory. The VM is paused as for a fork, and
//! runs on while the frozen layers are written. The VM keeps the image until the next snapshot, as
//! the base of an incremental one. The base is replaced only when the next snapshot is durable:
//! when [`clade_snapshot::Save::to`] has returned.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use clade_block::{CLUSTER, DiskImage, DiskRun};
use clade_memory::{PAGE_SIZE, PageRange};
use clade_snapshot::{
    Base, Compression, DiskToSave, PageContent, Save, SaveProgress, Saved, Space, linear, record_working_set,
};

use crate::vm::error::VmError;
use crate::vm::fork::{ForkImage, ForkTimes};
use crate::vm::machine::Vm;
use crate::vm::persist::restore::real;
use crate::vm::persist::{SavedAt, SnapshotError};

/// Timeout of a snapshot for writes in flight at the fork.
pub(super) const SETTLE: Duration = Duration::from_secs(30);
/// The interval at which cancellation is checked meanwhile.
const SETTLE_POLL: Duration = Duration::from_millis(100);

/// The snapshot that a VM's next incremental one is based on.
#[derive(Debug)]
pub(crate) struct LastSave {
    place: SavedAt,
    image: Arc<ForkImage>,
}

/// The progress of a VM's snapshot, which other threads read and cancel.
#[derive(Debug, Default)]
pub(crate) struct SaveTracker {
    last: Mutex<Option<LastSave>>,
    running: AtomicBool,
    cancel: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl SaveTracker {
    /// The initial value for a VM that was started from `image`.
    pub(crate) fn of(image: &Arc<ForkImage>) -> Self {
        let last = image.place.clone().map(|place| LastSave { place, image: Arc::clone(image) });
        Self { last: Mutex::new(last), ..Self::default() }
    }

    /// Number of handles of `image` held here. 0 while a snapshot is being written.
    pub(crate) fn holds(&self, image: &Arc<ForkImage>) -> usize {
        let last = self.last.try_lock();
        usize::from(last.is_ok_and(|last| last.as_ref().is_some_and(|last| Arc::ptr_eq(&last.image, image))))
    }
}

/// Options of a snapshot.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotOptions {
    /// Whether to write only the changes since the VM was last saved, or restored.
    pub incremental: bool,
    /// The compression of the files: compressed ones are smaller, but cannot be mapped.
    pub compression: Compression,
    /// Whether to replace a snapshot in the directory although others depend on it.
    pub replace: bool,
    /// Whether nothing replaces the base, and it moves together with the snapshot
    /// ([`clade_snapshot::Base::is_fixed`]).
    pub is_fixed: bool,
}

/// A snapshot that was made.
#[derive(Clone, Debug)]
pub struct SnapshotReport {
    /// Its directory and id.
    pub place: SavedAt,
    /// Pages and bytes that were written.
    pub saved: Saved,
    /// The times of the fork, with the VM's pause.
    pub times: ForkTimes,
    /// From the request to the last sync.
    pub took: Duration,
}

/// A disk at the image's instant, as pages.
struct DiskSpace<'a> {
    image: &'a DiskImage,
    runs: Vec<DiskRun>,
}

impl Space for DiskSpace<'_> {
    fn bytes(&self) -> u64 {
        self.image.size()
    }

    fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>> {
        const { assert!(CLUSTER == PAGE_SIZE) };
        let run = |run: &DiskRun| {
            let kind = if run.zero { PageContent::Zero } else { PageContent::Data };
            (PageRange::new(run.clusters.start, run.clusters.end), kind)
        };
        Ok(self.runs.iter().map(run).collect())
    }

    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        let offset = page * PAGE_SIZE;
        let there = self.image.size().saturating_sub(offset).min(bytes.len() as u64) as usize;
        let (data, beyond) = bytes.split_at_mut(there);
        beyond.fill(0);
        self.image.read_at(offset, data).map_err(io::Error::other)
    }
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

impl Vm {
    /// Saves the VM to the directory `dir`, in place of an existing snapshot. The VM runs on
    /// meanwhile.
    ///
    /// # Errors
    /// On failure the VM runs on. The contents of `dir` are unchanged, and so is the base of the
    /// next incremental snapshot.
    pub fn snapshot(&self, dir: &Path, options: SnapshotOptions) -> Result<SnapshotReport, SnapshotError> {
        let begun = Instant::now();
        let busy = || SnapshotError::Busy { name: self.name().to_owned() };
        let mut last = match self.saving.last.try_lock() {
            Ok(last) => last,
            // The value under the lock is replaced in one step.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(busy()),
        };
        if options.incremental && last.is_none() {
            return Err(SnapshotError::NoBase { name: self.name().to_owned() });
        }
        // Relaxed, like all accesses to these: they publish no other data.
        self.saving.cancel.store(false, Ordering::Relaxed);
        self.saving.done.store(0, Ordering::Relaxed);
        self.saving.total.store(0, Ordering::Relaxed);
        self.saving.running.store(true, Ordering::Relaxed);
        let base = last.as_ref().filter(|_| options.incremental);
        let saved = self.image().map_err(SnapshotError::from).and_then(|(image, report)| {
            self.pauses.snapshot.record(report.times.pause);
            let watch = SaveProgress {
                progress: &|done, total| {
                    self.saving.done.store(done, Ordering::Relaxed);
                    self.saving.total.store(total, Ordering::Relaxed);
                },
                is_cancelled: &|| self.saving.cancel.load(Ordering::Relaxed),
            };
            let base = base.map(|base| (&base.place, &*base.image));
            let (place, saved) = image.save(dir, base, options, &watch)?;
            Ok((image, report, place, saved))
        });
        self.saving.running.store(false, Ordering::Relaxed);
        let (image, report, place, saved) = saved.map_err(|error| match (error, self.stopped()) {
            // Stopping the VM cancels its snapshot, so the stop is the cause.
            (SnapshotError::Files(clade_snapshot::Error::Cancelled), Some(reason)) => VmError::Stopped(reason).into(),
            (error, _) => error,
        })?;
        *last = Some(LastSave { place: place.clone(), image });
        Ok(SnapshotReport { place, saved, times: report.times, took: begun.elapsed() })
    }

    /// Bytes written so far and in total, if a snapshot is being written.
    #[must_use]
    pub fn snapshot_progress(&self) -> Option<(u64, u64)> {
        let running = self.saving.running.load(Ordering::Relaxed);
        running.then(|| (self.saving.done.load(Ordering::Relaxed), self.saving.total.load(Ordering::Relaxed)))
    }

    /// Cancels the snapshot that is being written, if any: it ends with an error.
    pub fn cancel_snapshot(&self) {
        self.saving.cancel.store(true, Ordering::Relaxed);
    }

    /// The pages that the VM has touched since it was started, numbered as in a snapshot's memory,
    /// for callers that record them for the VM.
    ///
    /// # Errors
    /// When the kernel cannot be queried.
    pub fn touched_runs(&self) -> Result<Vec<PageRange>, SnapshotError> {
        Ok(linear(self.config().layout(), &self.ram().touched()?))
    }

    /// Records the VM's working set in the snapshot it was restored from or last saved to: the
    /// pages it has touched since it was started. `--working-set` reads these ahead. Returns their
    /// number.
    ///
    /// # Errors
    /// When it has no snapshot, or the record cannot be made or written. An earlier record is then
    /// unchanged.
    pub fn record_working_set(&self) -> Result<u64, SnapshotError> {
        let busy = || SnapshotError::Busy { name: self.name().to_owned() };
        let last = self.saving.last.try_lock().map_err(|_| busy())?;
        let Some(last) = last.as_ref() else { return Err(SnapshotError::NoBase { name: self.name().to_owned() }) };
        let runs = self.touched_runs()?;
        record_working_set(&last.place.dir, last.place.id, &runs)?;
        Ok(runs.iter().map(|run| run.len()).sum())
    }
}

impl ForkImage {
    /// Writes the image to `dir`. With a base, writes only the changes since that image, which was
    /// saved there. For a process that has only the image: [`Vm::snapshot`] saves a VM.
    ///
    /// # Errors
    /// The contents of `dir` are unchanged then.
    pub fn save(
        &self,
        dir: &Path,
        base: Option<(&SavedAt, &Self)>,
        options: SnapshotOptions,
        watch: &SaveProgress<'_>,
    ) -> Result<(SavedAt, Saved), SnapshotError> {
        let deadline = Instant::now() + SETTLE;
        let settled = |disk: &DiskImage| loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if disk.settle(left.min(SETTLE_POLL)) {
                return Ok(());
            }
            if (watch.is_cancelled)() {
                return Err(clade_snapshot::Error::Cancelled.into());
            }
            if left.is_zero() {
                return Err(SnapshotError::Unsettled { path: disk.config().path.clone() });
            }
        };
        let mut spaces = Vec::new();
        if let Some((_, base)) = base
            && base.disks().count() != self.disks().count()
        {
            // Another VM with the same name.
            let (found, wanted) = (base.disks().count(), self.disks().count());
            return Err(SnapshotError::Disks { found, wanted });
        }
        let older: Vec<Option<&DiskImage>> = match base {
            Some((_, base)) => base.disks().map(Some).collect(),
            None => vec![None; self.disks().count()],
        };
        for (disk, older) in self.disks().zip(older) {
            settled(disk)?;
            let runs = match older {
                Some(older) => disk.changed_since(older)?,
                None => disk.runs()?,
            };
            spaces.push(DiskSpace { image: disk, runs });
        }
        let names: Vec<String> = (0..spaces.len()).map(disk_name).collect();
        let disks: Vec<DiskToSave<'_>> =
            names.iter().zip(&spaces).map(|(name, space)| DiskToSave { name, space: space as &dyn Space }).collect();
        let sections = self.sections()?;
        let sections: Vec<(&str, &[u8])> = sections.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        let base = base.map(|(place, image)| Base {
            dir: &place.dir,
            id: place.id,
            image: image.ram(),
            is_fixed: options.is_fixed,
        });
        let SnapshotOptions { compression, replace, .. } = options;
        let save = Save { memory: self.ram(), disks: &disks, sections: &sections, base, compression, replace };
        let saved = save.to(dir, watch)?;
        // A relative path names another directory once the working directory has changed.
        let dir = real(dir);
        Ok((SavedAt { dir, id: saved.id }, saved))
    }
}
