//! The image in a snapshot directory, from which VMs are started.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_block::{DiskImage, DiskLayer, DiskRun};
use clade_devices::virtio::Backend;
use clade_host_io::IoFile;
use clade_memory::PageRange;
use clade_snapshot::{Description, DiskReader, KnownDir, Load, PageContent, ParentDirs, Snapshot};
use rustix::fs::{Mode, fchmod};
use serde::{Deserialize, Serialize};

use crate::vm::config::VmConfig;
use crate::vm::context::Context;
use crate::vm::fork::ForkImage;
use crate::vm::identity::Identity;
use crate::vm::persist::{SavedAt, SnapshotError, sections};

/// Attempts to open a snapshot that is being replaced.
const ATTEMPTS: usize = 3;

/// How VMs are started from a snapshot.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// How memory is loaded.
    pub load: RestoreLoad,
    /// The directory of the disks' overlays. Default: the directory that the snapshot is in, if it
    /// is writable, or else the temporary directory.
    pub overlays: Option<PathBuf>,
    /// The directory of the VMs' sockets, each called `NAME.vsock`. Without it, each socket must be
    /// chosen ([`crate::vm::VsockChoice`]).
    pub sockets: Option<PathBuf>,
    /// The directories in which the snapshot may have parents.
    pub parents: ParentDirs,
}

/// How memory is loaded from the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum RestoreLoad {
    /// At each page's first access, shared through the page cache.
    #[default]
    Lazy,
    /// All of it at once, into huge pages. Every checksum is verified.
    Preload,
    /// At each page's first access, after the recorded working set has been read ahead.
    WorkingSet,
}

/// A snapshot's description of its VM. Its data is not read.
#[derive(Clone, Debug)]
pub struct SavedVm {
    /// The snapshot.
    pub place: SavedAt,
    /// The VM's configuration.
    pub config: VmConfig,
    /// The VM's identity, without values that belong to the host it was saved on.
    pub identity: Identity,
    /// Number of forks between it and the VM that was booted.
    pub generation: u32,
    /// The directories of this snapshot and of those that it depends on, the newest first.
    pub dirs: Vec<KnownDir>,
}

impl SavedVm {
    /// Reads the snapshot in the directory `dir`, with parents in `parents`. The VMs that are started
    /// from it will have their sockets in `sockets`.
    ///
    /// # Errors
    /// When it is not a snapshot, or is damaged. When a snapshot it depends on is missing.
    pub fn read(dir: &Path, parents: &ParentDirs, sockets: Option<&Path>) -> Result<Self, SnapshotError> {
        let Description { id, sections, dirs } = Self::describe(dir, parents)?;
        let config = sections::config(sections.iter())?;
        let (mut identity, generation) = sections::identity(sections.iter())?;
        identity.forget_host(sockets);
        let dir = dirs.first().map_or_else(|| real(dir), |newest| newest.path.clone());
        Ok(Self { place: SavedAt { dir, id }, config, identity, generation, dirs })
    }

    /// Reads the description of a snapshot. The process that opens it gets access to its directories, and to no others.
    fn describe(dir: &Path, parents: &ParentDirs) -> Result<Description, SnapshotError> {
        let mut attempt = 1;
        loop {
            match Description::read(dir, parents) {
                // One that was replaced or removed meanwhile is read again.
                Err(clade_snapshot::Error::File { .. }) if attempt < ATTEMPTS => attempt += 1,
                read => return Ok(read?),
            }
        }
    }

    /// The directory of its disks' overlays: `chosen`, or beside the snapshot if that is writable,
    /// or else the temporary directory. The directory named in the snapshot is not trusted.
    #[must_use]
    pub fn overlays(chosen: Option<&Path>, dir: &Path) -> PathBuf {
        if let Some(chosen) = chosen {
            return chosen.to_owned();
        }
        let usable = |dir: &&Path| dir.is_dir() && rustix::fs::access(*dir, rustix::fs::Access::WRITE_OK).is_ok();
        dir.parent().filter(usable).map_or_else(std::env::temp_dir, Path::to_owned)
    }
}

/// A directory's path, absolute and without links.
pub(super) fn real(dir: &Path) -> PathBuf {
    std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned())
}

impl ForkImage {
    /// Opens the image in the snapshot directory `dir`, to start any number of VMs from. Everything
    /// but the data is checked now, by name; the data too if it is preloaded.
    ///
    /// # Errors
    /// When it is not a snapshot, is damaged, or is of another version or machine. When this host
    /// lacks a feature of the snapshot's host, or a snapshot it depends on is missing.
    pub fn restore(context: &Context, dir: &Path, options: &RestoreOptions) -> Result<Arc<Self>, SnapshotError> {
        let snapshot = Snapshot::open(dir, &options.parents)?;
        let saved: Vec<(&str, &[u8])> = snapshot.sections().iter().collect();
        // Checked first: KVM's errors do not name features.
        sections::host_requirements(saved.iter().copied())?.check(context.host())?;
        let config = sections::config(saved.iter().copied())?;
        let backends = backends(&config, &snapshot, options)?;
        let load = match options.load {
            RestoreLoad::Lazy => Load::Lazy,
            RestoreLoad::Preload => Load::Preload,
            RestoreLoad::WorkingSet => {
                Load::WorkingSet(snapshot.working_set()?.ok_or_else(|| SnapshotError::Cold { path: dir.to_owned() })?)
            }
        };
        let ram = snapshot.restore_ram(context.store(), &load)?;
        let mut image = Self::from_sections(saved, ram, backends)?;
        Arc::make_mut(&mut image.identity).forget_host(options.sockets.as_deref());
        image.place = Some(SavedAt { dir: real(dir), id: snapshot.id() });
        Ok(Arc::new(image))
    }

    /// The snapshot that the image was restored from, if any.
    #[must_use]
    pub fn place(&self) -> Option<&SavedAt> {
        self.place.as_ref()
    }
}

/// The backends of all devices by slot: disks, and none for other devices.
fn backends(config: &VmConfig, snapshot: &Snapshot, options: &RestoreOptions) -> Result<Vec<Backend>, SnapshotError> {
    let readers = snapshot.disks();
    let (found, wanted) = (readers.len(), config.disks.len());
    if found != wanted {
        return Err(SnapshotError::Disks { found, wanted });
    }
    let mut backends = Vec::new();
    for (spec, reader) in config.disks.iter().zip(&readers) {
        let mut disk = spec.disk.clone();
        disk.overlays = Some(SavedVm::overlays(options.overlays.as_deref(), snapshot.dir()));
        let layers = disk_layers(reader, &disk)?;
        backends.push(Backend::Disk(DiskImage::from_layers(&disk, reader.bytes(), &layers)?));
    }
    // Disks have the first slots.
    backends.resize_with(config.device_slots().count(), || Backend::None);
    Ok(backends)
}

fn disk_layers(reader: &DiskReader, disk: &clade_block::DiskConfig) -> Result<Vec<DiskLayer>, SnapshotError> {
    let run = |(range, kind): &(PageRange, PageContent)| DiskRun {
        clusters: range.start()..range.end(),
        zero: *kind == PageContent::Zero,
    };
    let mut layers = Vec::new();
    for layer in reader.layers()? {
        let Some((file, path)) = layer.file else {
            // Compressed: all of the disk is unpacked, for any form of the other layers.
            let (file, path) = unpacked(reader, disk)?;
            let data = reader.data_runs();
            let runs = data.iter().map(|range| run(&(*range, PageContent::Data))).collect();
            let file = Some(Arc::new(IoFile::read_only(file, &path, disk.cache)));
            return Ok(vec![DiskLayer { file, runs }]);
        };
        let file = Some(Arc::new(IoFile::read_only(file, &path, disk.cache)));
        layers.push(DiskLayer { file, runs: layer.runs.iter().map(run).collect() });
    }
    Ok(layers)
}

/// Unpacks a disk to an unnamed file, opened read-only.
fn unpacked(reader: &DiskReader, disk: &clade_block::DiskConfig) -> Result<(File, PathBuf), SnapshotError> {
    let dir = disk.overlays.clone().unwrap_or_else(std::env::temp_dir);
    let failed = |source: io::Error| SnapshotError::Unpack { path: dir.clone(), source };
    let file = tempfile::tempfile_in(&dir).map_err(failed)?;
    reader.copy_to(&file, &dir)?;
    // A worker that gets the file for reading may open files of its directory: it must not be able
    // to open this one for writing.
    fchmod(&file, Mode::RUSR).map_err(|error| failed(error.into()))?;
    let only_read = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(failed)?;
    Ok((only_read, dir))
}
