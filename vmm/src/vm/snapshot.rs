//! VMs on disk: a snapshot of a VM that runs on, and VMs that go on from one.
//!
//! A snapshot is a fork whose child is written down: the VM is paused as a fork pauses it, and the writing is done from the frozen layers while it runs.
//! What it was is kept by the VM until the next one, as the base of an incremental snapshot; it is replaced only when the next one is in its place.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use clade_devices::disk::{CLUSTER, DiskError, DiskImage, DiskLayer, DiskRun};
use clade_devices::virtio::Backend;
use clade_io::IoFile;
use clade_memory::{PAGE_SIZE, PageRange, RamError};
use clade_snapshot::{
    Base, Compression, DiskReader, DiskToSave, Kind, Load, Save, SaveProgress, Saved, Snapshot, SnapshotId, Space,
    linear, record_warm,
};
use thiserror::Error;

use crate::kvm::HostMismatch;
use crate::vm::config::VmConfig;
use crate::vm::fork::{ForkImage, ForkTimes};
use crate::vm::saved::{self, SavedError};
use crate::vm::{Context, Vm, VmError};

/// How long writes that were in flight at the instant may take to end before there is no snapshot.
const SETTLE: Duration = Duration::from_secs(30);
/// How often it is looked meanwhile whether the snapshot is cancelled.
const SETTLE_TURN: Duration = Duration::from_millis(100);

/// Why there is no snapshot, or no VM of one.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The files.
    #[error(transparent)]
    Files(#[from] clade_snapshot::Error),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// What is written down of it.
    #[error("the state in the snapshot")]
    State(#[from] SavedError),
    /// The host is not one it can go on at.
    #[error(transparent)]
    Host(#[from] HostMismatch),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Writes do not end.
    #[error("writes to {} that were in flight have not ended within {} s", path.display(), SETTLE.as_secs())]
    Unsettled {
        /// The disk.
        path: PathBuf,
    },
    /// Nothing to be incremental to.
    #[error("{name} was neither saved nor restored before, so nothing can be incremental to it: save it in full first")]
    NoBase {
        /// The VM.
        name: String,
    },
    /// One at a time.
    #[error("a snapshot of {name} is being written already")]
    Busy {
        /// The VM.
        name: String,
    },
    /// A disk of the configuration that is not in the snapshot, or of another length.
    #[error("the snapshot has {found} disks, its configuration {wanted}")]
    Disks {
        /// In the snapshot.
        found: usize,
        /// In the configuration.
        wanted: usize,
    },
    /// There is no record of what to read ahead.
    #[error("{} has no record of what is touched first: make one with `clade snapshot warm` of a VM restored from it", path.display())]
    Cold {
        /// The snapshot.
        path: PathBuf,
    },
    /// No file to unpack a disk into.
    #[error("no unnamed file in {}", path.display())]
    Unpack {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl From<RamError> for SnapshotError {
    fn from(error: RamError) -> Self {
        VmError::from(error).into()
    }
}

/// Where and as what a VM's instant stands on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAt {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// Which it is.
    pub id: SnapshotId,
}

/// The snapshot a VM's next incremental one is on top of.
#[derive(Debug)]
pub(crate) struct LastSave {
    place: SavedAt,
    image: Arc<ForkImage>,
}

/// What of a VM's saving others may look at and stop.
#[derive(Debug, Default)]
pub(crate) struct Saving {
    last: Mutex<Option<LastSave>>,
    running: AtomicBool,
    cancel: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Saving {
    /// Of a VM that was started from `image`.
    pub(crate) fn of(image: &Arc<ForkImage>) -> Self {
        let last = image.place.clone().map(|place| LastSave { place, image: Arc::clone(image) });
        Self { last: Mutex::new(last), ..Self::default() }
    }
}

/// How a VM is saved.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotOptions {
    /// Only what changed since it was last saved, or restored.
    pub incremental: bool,
    /// Smaller files that cannot be mapped.
    pub compression: Compression,
    /// Replace a snapshot that is there although others depend on it.
    pub replace: bool,
}

/// A snapshot that was made.
#[derive(Clone, Debug)]
pub struct SnapshotReport {
    /// Where it is.
    pub place: SavedAt,
    /// What was written.
    pub saved: Saved,
    /// The VM's pause.
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

    fn runs(&self) -> io::Result<Vec<(PageRange, Kind)>> {
        const { assert!(CLUSTER == PAGE_SIZE) };
        let run = |run: &DiskRun| {
            let kind = if run.zero { Kind::Zero } else { Kind::Data };
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
    /// Saves it to the directory `dir`, in place of the snapshot that is there. It runs on meanwhile.
    ///
    /// # Errors
    /// Then it runs on all the same, what was in `dir` is there as it was, and so is the base of the next incremental snapshot.
    pub fn snapshot(&self, dir: &Path, options: SnapshotOptions) -> Result<SnapshotReport, SnapshotError> {
        let begun = Instant::now();
        let busy = || SnapshotError::Busy { name: self.name().to_owned() };
        let mut last = match self.saving.last.try_lock() {
            Ok(last) => last,
            // What it guards is replaced in one step.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(busy()),
        };
        if options.incremental && last.is_none() {
            return Err(SnapshotError::NoBase { name: self.name().to_owned() });
        }
        // Relaxed, like all of these: they are looked at by whoever wants to see how far it is.
        self.saving.cancel.store(false, Ordering::Relaxed);
        self.saving.done.store(0, Ordering::Relaxed);
        self.saving.total.store(0, Ordering::Relaxed);
        self.saving.running.store(true, Ordering::Relaxed);
        let base = last.as_ref().filter(|_| options.incremental);
        let saved = self.fork().map_err(SnapshotError::from).and_then(|(image, report)| {
            let watch = SaveProgress {
                progress: &|done, total| {
                    self.saving.done.store(done, Ordering::Relaxed);
                    self.saving.total.store(total, Ordering::Relaxed);
                },
                cancel: &self.saving.cancel,
            };
            let saved = save(&image, dir, base, options, &watch)?;
            Ok((image, report, saved))
        });
        self.saving.running.store(false, Ordering::Relaxed);
        let (image, report, saved) = saved.map_err(|error| match (error, self.stopped()) {
            // By whoever has stopped it: that is what is to be told.
            (SnapshotError::Files(clade_snapshot::Error::Cancelled), Some(reason)) => VmError::Stopped(reason).into(),
            (error, _) => error,
        })?;
        // A relative path means another directory to whoever has another.
        let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let place = SavedAt { dir, id: saved.id };
        *last = Some(LastSave { place: place.clone(), image });
        Ok(SnapshotReport { place, saved, times: report.times, took: begun.elapsed() })
    }

    /// Bytes written and to be written, while it is being saved.
    #[must_use]
    pub fn snapshot_progress(&self) -> Option<(u64, u64)> {
        let running = self.saving.running.load(Ordering::Relaxed);
        running.then(|| (self.saving.done.load(Ordering::Relaxed), self.saving.total.load(Ordering::Relaxed)))
    }

    /// Stops the saving that is going on, if one is: it ends with an error.
    pub fn cancel_snapshot(&self) {
        self.saving.cancel.store(true, Ordering::Relaxed);
    }

    /// Writes down, in the snapshot this VM was restored from or last saved to, which pages it has touched since it was started: what
    /// `--warm` reads ahead.
    ///
    /// # Errors
    /// When it has no snapshot, or what was touched cannot be told or written. What was written down before is then as it was.
    pub fn record_warm(&self) -> Result<u64, SnapshotError> {
        let busy = || SnapshotError::Busy { name: self.name().to_owned() };
        let last = self.saving.last.try_lock().map_err(|_| busy())?;
        let Some(last) = last.as_ref() else { return Err(SnapshotError::NoBase { name: self.name().to_owned() }) };
        let runs = linear(self.config().layout(), &self.ram().touched()?);
        record_warm(&last.place.dir, &runs)?;
        Ok(runs.iter().map(|run| run.len()).sum())
    }
}

fn save(
    image: &ForkImage,
    dir: &Path,
    base: Option<&LastSave>,
    options: SnapshotOptions,
    watch: &SaveProgress<'_>,
) -> Result<Saved, SnapshotError> {
    let deadline = Instant::now() + SETTLE;
    let settled = |disk: &DiskImage| loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if disk.settle(left.min(SETTLE_TURN)) {
            return Ok(());
        }
        if watch.cancel.load(Ordering::Relaxed) {
            return Err(clade_snapshot::Error::Cancelled.into());
        }
        if left.is_zero() {
            return Err(SnapshotError::Unsettled { path: disk.config().path.clone() });
        }
    };
    let mut spaces = Vec::new();
    let older: Vec<Option<&DiskImage>> = match base {
        Some(base) => base.image.disks().map(Some).collect(),
        None => vec![None; image.disks().count()],
    };
    for (disk, older) in image.disks().zip(older) {
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
    let sections = image.sections()?;
    let sections: Vec<(&str, &[u8])> = sections.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    let base = base.map(|base| Base { dir: &base.place.dir, id: base.place.id, image: base.image.ram() });
    let SnapshotOptions { compression, replace, .. } = options;
    let save = Save { memory: image.ram(), disks: &disks, sections: &sections, base, compression, replace };
    Ok(save.to(dir, watch)?)
}

/// How VMs go on from a snapshot.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// How memory comes from the disk.
    pub load: RestoreLoad,
    /// Where disks have their overlays; if not given, beside the snapshot, or else in the temporary
    /// directory.
    pub overlays: Option<PathBuf>,
    /// Where VMs have the sockets of their socket devices, as `NAME.vsock`; if not given, each must
    /// be chosen ([`crate::vm::VsockChoice`]).
    pub sockets: Option<PathBuf>,
}

/// How memory comes from the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RestoreLoad {
    /// As it is touched, shared through the page cache.
    #[default]
    Lazy,
    /// All of it now, into huge pages, and every checksum compared.
    Preload,
    /// As it is touched, after what was recorded to be touched first has been read ahead.
    Warm,
}

impl ForkImage {
    /// The VM in the snapshot in `dir`, to start any number of VMs from. All that can be wrong with it but the data itself is found now, by name;
    /// damaged data too if it is preloaded.
    ///
    /// # Errors
    /// When it is no snapshot, damaged, of another version or machine, made on a host that has what this one lacks, or depends on one that
    /// is not there.
    pub fn restore(context: &Context, dir: &Path, options: &RestoreOptions) -> Result<Arc<Self>, SnapshotError> {
        let snapshot = Snapshot::open(dir)?;
        let sections: Vec<(&str, &[u8])> = snapshot.sections().iter().collect();
        // Before anything is made: what would be wrong with it later has no name.
        saved::host_requirements(sections.iter().copied())?.check(context.host())?;
        let config = saved::config(sections.iter().copied())?;
        let backends = backends(&config, &snapshot, options)?;
        let load = match options.load {
            RestoreLoad::Lazy => Load::Lazy,
            RestoreLoad::Preload => Load::Preload,
            RestoreLoad::Warm => {
                Load::Warm(snapshot.warm()?.ok_or_else(|| SnapshotError::Cold { path: dir.to_owned() })?)
            }
        };
        let ram = snapshot.restore_ram(context.store(), &load)?;
        let mut image = Self::from_sections(sections, ram, backends)?;
        Arc::make_mut(&mut image.identity).forget_host(options.sockets.as_deref());
        let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        image.place = Some(SavedAt { dir, id: snapshot.id() });
        Ok(Arc::new(image))
    }

    /// The snapshot it was restored from.
    #[must_use]
    pub fn place(&self) -> Option<&SavedAt> {
        self.place.as_ref()
    }
}

/// The disks, at their places among the devices.
fn backends(config: &VmConfig, snapshot: &Snapshot, options: &RestoreOptions) -> Result<Vec<Backend>, SnapshotError> {
    let readers = snapshot.disks();
    let (found, wanted) = (readers.len(), config.disks.len());
    if found != wanted {
        return Err(SnapshotError::Disks { found, wanted });
    }
    let mut backends = Vec::new();
    for (spec, reader) in config.disks.iter().zip(&readers) {
        let mut disk = spec.disk.clone();
        disk.overlays = Some(overlays(options, snapshot.dir()));
        let layers = disk_layers(reader, &disk)?;
        backends.push(Backend::Disk(DiskImage::from_layers(&disk, reader.bytes(), &layers)?));
    }
    // Disks have the first places.
    backends.resize_with(config.places().count(), || Backend::None);
    Ok(backends)
}

/// Where a restored disk has its overlays: where the user says, or beside the snapshot. Where the
/// VM that was saved had them is not believed.
fn overlays(options: &RestoreOptions, snapshot: &Path) -> PathBuf {
    if let Some(dir) = &options.overlays {
        return dir.clone();
    }
    let usable = |dir: &&Path| dir.is_dir() && rustix::fs::access(*dir, rustix::fs::Access::WRITE_OK).is_ok();
    snapshot.parent().filter(usable).map_or_else(std::env::temp_dir, Path::to_owned)
}

fn disk_layers(reader: &DiskReader, disk: &clade_devices::disk::DiskConfig) -> Result<Vec<DiskLayer>, SnapshotError> {
    let run =
        |(range, kind): &(PageRange, Kind)| DiskRun { clusters: range.start()..range.end(), zero: *kind == Kind::Zero };
    let mut layers = Vec::new();
    for layer in reader.layers()? {
        let Some((file, path)) = layer.file else {
            // Compressed: all of the disk is unpacked, whatever other layers are.
            let (file, path) = unpacked(reader, disk)?;
            let data = reader.data_runs();
            let runs = data.iter().map(|range| run(&(*range, Kind::Data))).collect();
            let file = Some(Arc::new(IoFile::read_only(file, &path, disk.cache)));
            return Ok(vec![DiskLayer { file, runs }]);
        };
        let file = Some(Arc::new(IoFile::read_only(file, &path, disk.cache)));
        layers.push(DiskLayer { file, runs: layer.runs.iter().map(run).collect() });
    }
    Ok(layers)
}

/// A disk in an unnamed file that is open for reading only.
fn unpacked(reader: &DiskReader, disk: &clade_devices::disk::DiskConfig) -> Result<(File, PathBuf), SnapshotError> {
    let dir = disk.overlays.clone().unwrap_or_else(std::env::temp_dir);
    let failed = |source: io::Error| SnapshotError::Unpack { path: dir.clone(), source };
    let file = tempfile::tempfile_in(&dir).map_err(failed)?;
    reader.copy_to(&file, &dir)?;
    let only_read = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(failed)?;
    Ok((only_read, dir))
}
