//! An image as bytes and descriptors, and back.
//!
//! The bytes are a description in CBOR, followed by the sections of
//! [`sections`](super::super::sections). The description refers to descriptors by index. It comes
//! from a process that may be compromised, so everything in it is checked: indexes, sizes, ranges.
//! The files behind the descriptors are checked at their use: layers are mapped for reading only,
//! and a file that is too short is refused.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clade_block::{DiskConfig, DiskImage, DiskLayer, DiskRun};
use clade_devices::virtio::Backend;
use clade_host_io::IoFile;
use clade_memory::{
    DontFork, ImageMap, LayerHandle, LayerId, LayerSource, PAGE_SIZE, PageRange, RamError, RamImage, RamLayout, Store,
};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::received::{FileId, Received, file_id, past_the_cache, readable};
use super::{Leases, TransferError};
use crate::vm::config::VmConfig;
use crate::vm::context::Context;
use crate::vm::fork::ForkImage;
use crate::vm::persist::sections;

/// Maximum number of descriptors of one image.
pub(super) const MAX_FILES: usize = 1 << 16;
/// Maximum bytes of one image's description and state.
pub(super) const MAX_BYTES: usize = 64 << 20;
/// Timeout for the writes that were in flight at the fork.
const SETTLE: Duration = Duration::from_secs(30);
/// Size of the buffer for the longest byte string of a description that is read in one piece.
const SCRATCH: usize = 8 << 10;

/// An image as bytes and descriptors, from which another process makes the image again.
#[derive(Debug)]
pub struct ImageParts {
    pub(in crate::vm) bytes: Vec<u8>,
    pub(in crate::vm) files: Vec<OwnedFd>,
}

/// The description at the head of the bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
struct ImageDescription {
    /// Names and lengths of the sections after the description.
    sections: Vec<(String, u64)>,
    layers: Vec<LayerParts>,
    regions: Vec<RegionParts>,
    disks: Vec<DiskParts>,
    /// Its number among the images that its process has given away. 0 for an image of another version.
    #[serde(default)]
    number: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct LayerParts {
    file: usize,
    pages: u64,
    /// The descriptor to be kept open while the layer is in use.
    lease: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct RegionParts {
    /// Guest physical address.
    start: u64,
    pages: u64,
    map: Vec<MapRun>,
    no_fork: Vec<(u64, u64, Hidden)>,
}

/// Pages `start..end` of a region are those of a layer from `at` on.
#[derive(Debug, Serialize, Deserialize)]
struct MapRun {
    start: u64,
    end: u64,
    layer: usize,
    at: u64,
}

/// The content of a range that a child does not pass on, in its own children.
#[derive(Debug, Serialize, Deserialize)]
enum Hidden {
    Absent,
    Zeroed,
    /// Copies of the page that the image has at the beginning of the range.
    Fresh,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskParts {
    bytes: u64,
    /// The directory of its overlays, which may differ from the one in its configuration.
    overlays: PathBuf,
    layers: Vec<DiskPart>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskPart {
    file: usize,
    /// The same file opened past the page cache, if it is used so: the receiver may not reopen
    /// files in another VM's directory.
    #[serde(default)]
    direct: Option<usize>,
    path: PathBuf,
    /// Descriptors to be kept open while the file is in use.
    kept: Vec<usize>,
    /// Clusters, and whether they are zeros.
    runs: Vec<(u64, u64, bool)>,
    /// Whether the system has lost writes to it.
    #[serde(default)]
    lost: bool,
}

/// Descriptors, each once.
#[derive(Default)]
struct PassedFiles {
    files: Vec<OwnedFd>,
    /// Descriptors that stay open here too, and their indexes. Held, so that their addresses are
    /// not reused.
    kept: HashMap<*const OwnedFd, (Arc<OwnedFd>, usize)>,
}

impl PassedFiles {
    fn add(&mut self, file: OwnedFd) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    /// The index of a descriptor that stays open here too.
    fn share(&mut self, file: &Arc<OwnedFd>) -> Result<usize, TransferError> {
        if let Some((_, at)) = self.kept.get(&Arc::as_ptr(file)) {
            return Ok(*at);
        }
        let copy = file.try_clone().map_err(TransferError::system("given another descriptor"))?;
        let at = self.add(copy);
        self.kept.insert(Arc::as_ptr(file), (Arc::clone(file), at));
        Ok(at)
    }
}

impl ForkImage {
    /// The image for another process. Held in `leases` until no other process uses it.
    ///
    /// Waits until memory that is still being copied in the background is there.
    ///
    /// # Errors
    /// When memory is lost, a file cannot be opened again, or there is no free descriptor.
    pub fn export(self: &Arc<Self>, leases: &Leases) -> Result<ImageParts, TransferError> {
        let mut files = PassedFiles::default();
        let (lease, number) = leases.lease(self).map_err(TransferError::system("leased"))?;
        let lease = Arc::new(lease);
        let mut description = ImageDescription { number, ..ImageDescription::default() };

        let mut seen: HashMap<LayerId, usize> = HashMap::new();
        for (((start, pages), map), hidden) in
            self.ram().layout().ranges().iter().zip(self.ram().maps()).zip(self.ram().dont_fork())
        {
            let mut region = RegionParts { start: start.0, pages: *pages, map: Vec::new(), no_fork: Vec::new() };
            for (range, source) in map.iter() {
                let layer = match seen.get(&source.layer.id()) {
                    Some(layer) => *layer,
                    None => {
                        let layer = exported(&source.layer, &lease, &mut files)?;
                        seen.insert(source.layer.id(), description.layers.len());
                        description.layers.push(layer);
                        description.layers.len() - 1
                    }
                };
                region.map.push(MapRun { start: range.start(), end: range.end(), layer, at: source.at });
            }
            region.no_fork =
                hidden.into_iter().map(|(range, what)| (range.start(), range.end(), Hidden::of(&what))).collect();
            description.regions.push(region);
        }
        for disk in self.disks() {
            // The receiver cannot wait for them.
            if !disk.settle(SETTLE) {
                return Err(TransferError::Unsettled { path: disk.config().path.clone() });
            }
            let layers = disk.shared_layers(&lease)?;
            let layers = layers.iter().map(|layer| exported_disk(layer, &mut files)).collect::<Result<_, _>>()?;
            let overlays = disk.overlay_dir().to_owned();
            description.disks.push(DiskParts { bytes: disk.size(), overlays, layers });
        }
        let sections = self.sections()?;
        description.sections = sections.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.len() as u64)).collect();
        let mut bytes = vec![0; 8];
        ciborium::into_writer(&description, &mut bytes)
            .map_err(|error| TransferError::malformed(format!("it has no description: {error}")))?;
        let head = (bytes.len() - 8) as u64;
        bytes[..8].copy_from_slice(&head.to_le_bytes());
        sections.iter().for_each(|(_, section)| bytes.extend_from_slice(section));
        let parts = ImageParts { bytes, files: files.files };
        parts.check()?;
        Ok(parts)
    }

    /// The image made of parts that another process exported. Its disks' overlays are made in
    /// `overlays`.
    ///
    /// # Errors
    /// When the parts are not an image, or this host cannot run it; when a file has the wrong type
    /// or size.
    pub fn import(context: &Context, parts: ImageParts, overlays: Overlays<'_>) -> Result<Arc<Self>, TransferError> {
        Self::import_beside(context, parts, overlays, &mut SharedFiles::default())
    }

    /// The same, beside other images of the VM: layers of one file have one identity here, so that the
    /// images can be compared.
    ///
    /// # Errors
    /// As for [`Self::import`].
    pub fn import_beside(
        context: &Context,
        parts: ImageParts,
        overlays: Overlays<'_>,
        shared: &mut SharedFiles,
    ) -> Result<Arc<Self>, TransferError> {
        let ImageParts { bytes, files } = parts;
        let (description, saved) = described(&bytes)?;
        // Checked first: KVM's errors do not name features.
        sections::host_requirements(saved.iter().copied())?.check(context.host())?;
        let config = sections::config(saved.iter().copied())?;
        let mut files = Received::new(files);
        let ram = ram(context.store(), &description, &mut files, shared)?;
        let backends = disks(&config, &description.disks, overlays, &mut files, shared)?;
        Ok(Arc::new(Self::with_config(config, &saved, ram, backends)?))
    }
}

impl ImageParts {
    /// Its number among the images that its process has given away ([`Leases::image`]).
    ///
    /// # Errors
    /// When the parts are not an image.
    pub fn number(&self) -> Result<u64, TransferError> {
        Ok(described(&self.bytes)?.0.number)
    }

    fn check(&self) -> Result<(), TransferError> {
        let most = |what, found: usize, most: usize| {
            let error = TransferError::TooLarge { what, found: found as u64, most: most as u64 };
            if found > most { Err(error) } else { Ok(()) }
        };
        most("descriptors", self.files.len(), MAX_FILES)?;
        most("bytes", self.bytes.len(), MAX_BYTES)
    }
}

impl Hidden {
    fn of(what: &DontFork) -> Self {
        match what {
            DontFork::Absent => Self::Absent,
            DontFork::Zeroed => Self::Zeroed,
            DontFork::Fresh(_) => Self::Fresh,
        }
    }
}

fn exported(layer: &LayerHandle, lease: &Arc<OwnedFd>, files: &mut PassedFiles) -> Result<LayerParts, TransferError> {
    let file = files.add(layer.read_only_file()?.into());
    // A layer that came from another process is leased from that process.
    let lease = files.share(layer.lease().unwrap_or(lease))?;
    Ok(LayerParts { file, pages: layer.pages(), lease })
}

fn exported_disk(layer: &DiskLayer, files: &mut PassedFiles) -> Result<DiskPart, TransferError> {
    let file = layer.file.as_ref().ok_or_else(|| TransferError::malformed("a disk's layer without a file"))?;
    let mut add = |file: BorrowedFd<'_>| {
        let copy = file.try_clone_to_owned().map_err(TransferError::system("given another descriptor"))?;
        Ok::<_, TransferError>(files.add(copy))
    };
    let (at, direct) = (add(file.as_fd())?, file.direct().map(add).transpose()?);
    let kept = file.kept().iter().map(|kept| files.share(kept)).collect::<Result<_, _>>()?;
    let runs = layer.runs.iter().map(|run| (run.clusters.start, run.clusters.end, run.zero)).collect();
    Ok(DiskPart { file: at, direct, path: file.path().to_owned(), kept, runs, lost: file.knows_lost_writes() })
}

/// Sections by their names.
type SectionList<'a> = Vec<(&'static str, &'a [u8])>;

/// The description and the sections in `bytes`.
fn described(bytes: &[u8]) -> Result<(ImageDescription, SectionList<'_>), TransferError> {
    let (head, rest) = bytes.split_first_chunk().ok_or_else(|| TransferError::malformed("it ends in its head"))?;
    let head = usize::try_from(u64::from_le_bytes(*head)).unwrap_or(usize::MAX);
    let (head, mut rest) =
        rest.split_at_checked(head).ok_or_else(|| TransferError::malformed("it ends in its description"))?;
    let description: ImageDescription =
        ciborium::de::from_reader_with_buffer(head, &mut vec![0; SCRATCH.min(head.len())])
            .map_err(|error| TransferError::malformed(format!("its description cannot be read: {error}")))?;
    let mut saved = Vec::with_capacity(sections::SECTIONS.len());
    for (name, len) in &description.sections {
        let len = usize::try_from(*len).unwrap_or(usize::MAX);
        let (section, behind) = rest
            .split_at_checked(len)
            .ok_or_else(|| TransferError::malformed(format!("it ends in its section {name:?}")))?;
        rest = behind;
        // Sections of a later version are skipped, as in a snapshot.
        if let Some(known) = sections::SECTIONS.iter().find(|known| *known == name) {
            saved.push((*known, section));
        }
    }
    if !rest.is_empty() {
        return Err(TransferError::malformed(format!("{} bytes behind its end", rest.len())));
    }
    Ok((description, saved))
}

/// The directories of overlays for an image's disks.
#[derive(Clone, Copy, Debug)]
pub enum Overlays<'a> {
    /// The directories in the image.
    AsNamed,
    /// These directories, one for each disk.
    In(&'a [PathBuf]),
    /// None: no VM is started from the image.
    Nowhere,
}

/// Layers and disk files of existing images, by file id.
#[derive(Debug, Default)]
pub struct SharedFiles {
    layers: HashMap<FileId, LayerHandle>,
    files: HashMap<FileId, Arc<IoFile>>,
}

impl SharedFiles {
    /// The layers of the memory of `image`.
    ///
    /// # Errors
    /// When the identity of a layer's file cannot be read.
    pub fn of_memory(image: &ForkImage) -> Result<Self, TransferError> {
        let (mut shared, mut seen) = (Self::default(), HashSet::new());
        for map in image.ram().maps() {
            for (_, source) in map.iter().filter(|(_, source)| seen.insert(source.layer.id())) {
                shared.layers.insert(file_id(&source.layer)?, source.layer.clone());
            }
        }
        Ok(shared)
    }
}

fn ram(
    store: &Store,
    description: &ImageDescription,
    files: &mut Received,
    shared: &mut SharedFiles,
) -> Result<RamImage, TransferError> {
    let mut layers = Vec::with_capacity(description.layers.len());
    for layer in &description.layers {
        let file = File::from(files.take(layer.file)?);
        let (id, lease) = (file_id(&file)?, files.keep(layer.lease)?);
        let known = shared.layers.get(&id).filter(|known| known.pages() == layer.pages);
        // Never the known layer itself: its lease does not keep the pages that only this image shows.
        let layer = match known {
            Some(known) => store.foreign_layer_again(known, file, lease)?,
            None => store.foreign_layer(file, layer.pages, lease)?,
        };
        shared.layers.insert(id, layer.clone());
        layers.push(layer);
    }
    let ranges: Vec<(GuestAddress, u64)> =
        description.regions.iter().map(|region| (GuestAddress(region.start), region.pages)).collect();
    let layout = RamLayout::of_ranges(&ranges)?;
    let mut maps = Vec::with_capacity(description.regions.len());
    for region in &description.regions {
        let mut map = ImageMap::new();
        let mut end = 0;
        for run in &region.map {
            let inside = |layer: &&LayerHandle| {
                let last = run.at.checked_add(run.end.saturating_sub(run.start));
                last.is_some_and(|last| last <= layer.pages())
            };
            let is_run = run.start >= end && run.start < run.end && run.end <= region.pages;
            let layer = layers.get(run.layer).filter(|_| is_run).filter(inside);
            let layer = layer.ok_or_else(|| TransferError::malformed(format!("a run of memory: {run:?}")))?;
            end = run.end;
            map.insert(PageRange::new(run.start, run.end), LayerSource { layer: layer.clone(), at: run.at });
        }
        let mut declared = Vec::new();
        for (start, end, hidden) in &region.no_fork {
            if start >= end || *end > region.pages {
                return Err(TransferError::malformed(format!("pages {start} to {end} are not inherited")));
            }
            declared.push((PageRange::new(*start, *end), dont_fork(store, &map, *start, hidden)?));
        }
        maps.push((map, declared));
    }
    Ok(RamImage::from_parts(store, &layout, maps)?)
}

fn dont_fork(store: &Store, map: &ImageMap, page: u64, hidden: &Hidden) -> Result<DontFork, TransferError> {
    Ok(match hidden {
        Hidden::Absent => DontFork::Absent,
        Hidden::Zeroed => DontFork::Zeroed,
        Hidden::Fresh => {
            let mut pattern = [0; PAGE_SIZE as usize];
            if let Some(source) = map.get(page) {
                source.layer.read_pages(source.at, &mut pattern)?;
            }
            DontFork::Fresh(store.reference_page(&pattern).map_err(RamError::from)?)
        }
    })
}

/// The backends of all devices by slot: disks, and none for other devices.
fn disks(
    config: &VmConfig,
    disks: &[DiskParts],
    overlays: Overlays<'_>,
    files: &mut Received,
    shared: &mut SharedFiles,
) -> Result<Vec<Backend>, TransferError> {
    if disks.len() != config.disks.len() {
        let (found, wanted) = (disks.len(), config.disks.len());
        return Err(TransferError::malformed(format!("{found} disks, its configuration has {wanted}")));
    }
    let mut backends = Vec::new();
    for (at, (spec, disk)) in config.disks.iter().zip(disks).enumerate() {
        let mut layers = Vec::with_capacity(disk.layers.len());
        let dir = match overlays {
            Overlays::AsNamed | Overlays::Nowhere => &disk.overlays,
            Overlays::In(dirs) => {
                let few = || TransferError::malformed(format!("directories for the overlays of {at} disks"));
                dirs.get(at).ok_or_else(few)?
            }
        };
        let config = DiskConfig { overlays: Some(dir.clone()), ..spec.disk.clone() };
        for layer in &disk.layers {
            let kept = layer.kept.iter().map(|at| files.keep(*at)).collect::<Result<_, _>>()?;
            let file = readable(files.take(layer.file)?)?;
            let id = file_id(&file)?;
            let direct = layer.direct.map(|at| past_the_cache(files.take(at)?, id)).transpose()?;
            let file = shared
                .files
                .entry(id)
                .or_insert_with(|| Arc::new(IoFile::handed_in(file, direct, &layer.path, config.cache).keeping(kept)));
            let file = Arc::clone(file);
            if layer.lost {
                file.note_lost_writes();
            }
            let runs = layer.runs.iter().map(|(start, end, zero)| DiskRun { clusters: *start..*end, zero: *zero });
            layers.push(DiskLayer { file: Some(file), runs: runs.collect() });
        }
        let image = match overlays {
            Overlays::Nowhere => DiskImage::from_layers_to_read(&config, disk.bytes, &layers),
            Overlays::AsNamed | Overlays::In(_) => DiskImage::from_layers(&config, disk.bytes, &layers),
        };
        backends.push(Backend::Disk(image?));
    }
    // Disks have the first slots.
    backends.resize_with(config.device_slots().count(), || Backend::None);
    Ok(backends)
}

/// Whether `bytes` and `files` form the memory of an image.
#[cfg(feature = "fuzzing")]
pub(crate) fn is_memory(store: &Store, bytes: &[u8], files: Vec<OwnedFd>) -> bool {
    let described = described(bytes);
    described
        .and_then(|(description, _)| ram(store, &description, &mut Received::new(files), &mut SharedFiles::default()))
        .is_ok()
}
