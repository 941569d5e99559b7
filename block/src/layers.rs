//! Runs of clusters that a snapshot writes, and a disk made of a snapshot's files.
//!
//! A snapshot takes runs of clusters from an image, either all or those that changed since an older
//! image. Each cluster is written at its own offset in a file. A disk is made of such files again,
//! oldest first: later runs cover earlier ones.
//!
//! # Why comparing sources is enough
//!
//! A file in an image's map was its disk's active file until that instant, and is read-only from
//! then on. So a cluster that two images map to one file has one content, once the writes in flight
//! at the *older* image's instant have ended ([`DiskImage::settle`]). The child repeats those
//! writes, so the file's content does not matter to it. A cluster with two sources may still have
//! one content; it counts as changed.

use std::collections::BTreeSet;
use std::iter;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use clade_host_io::{FileError, IoFile};

use super::directory::{Directory, sync_to_copy};
use super::image::open_overlays;
use super::map::{BlockMap, CLUSTER, ClusterSource};
use super::setup::Setup;
use super::{DiskConfig, DiskError, DiskImage, SECTOR};

/// A run of adjacent clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRun {
    /// The clusters, in units of [`CLUSTER`] bytes.
    pub clusters: Range<u64>,
    /// Whether the clusters are known to be zeros. Other runs may be zeros too.
    pub zero: bool,
}

/// Part of a disk in a snapshot: a file with each cluster at its own offset.
#[derive(Clone, Debug)]
pub struct DiskLayer {
    /// The file, open for reading. Not needed if all runs are zeros.
    pub file: Option<Arc<IoFile>>,
    /// The clusters that the layer has.
    pub runs: Vec<DiskRun>,
}

/// Reopens `file` for another process. The result keeps open the descriptors that `file` came with,
/// or `ours` if it came with none.
fn shared(file: &IoFile, ours: &[Arc<OwnedFd>]) -> Result<IoFile, FileError> {
    let kept = if file.kept().is_empty() { ours } else { file.kept() };
    Ok(file.for_another_process()?.keeping(kept.to_vec()))
}

/// Appends a run, joined to the last one where they are adjacent and of one kind.
fn push(runs: &mut Vec<DiskRun>, clusters: Range<u64>, zero: bool) {
    if clusters.is_empty() {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.zero == zero && last.clusters.end == clusters.start => last.clusters.end = clusters.end,
        _ => runs.push(DiskRun { clusters, zero }),
    }
}

/// Appends `clusters` of `file`, with its holes as zeros.
fn push_file(runs: &mut Vec<DiskRun>, file: &IoFile, clusters: Range<u64>) -> Result<(), DiskError> {
    let mut at = clusters.start;
    while at < clusters.end {
        // A cluster is zeros only if no byte of it is data.
        let data = file.next_data(at * CLUSTER)?.map_or(clusters.end, |data| data / CLUSTER).clamp(at, clusters.end);
        push(runs, at..data, true);
        if data == clusters.end {
            break;
        }
        // At least one cluster: a hole may begin in the cluster that has data.
        let hole = file.next_hole(data * CLUSTER)?.div_ceil(CLUSTER).clamp(data + 1, clusters.end);
        push(runs, data..hole, false);
        at = hole;
    }
    Ok(())
}

/// Returns the runs of pieces, whose files are made durable first: a lost write may have left a hole.
/// A file of them that no longer has all clusters is an error: the rest of it would look like a hole. `size` is that
/// of the disk, whose last cluster may be a short one.
fn runs_of<'a>(
    size: u64,
    pieces: impl Iterator<Item = (Range<u64>, &'a ClusterSource)>,
) -> Result<Vec<DiskRun>, DiskError> {
    let (mut runs, mut synced) = (Vec::new(), BTreeSet::new());
    for (clusters, source) in pieces {
        let ClusterSource::File(file) = source else {
            push(&mut runs, clusters, true);
            continue;
        };
        if synced.insert(Arc::as_ptr(file)) {
            sync_to_copy(file)?;
        }
        // A write in flight may fill a hole.
        match file.has_writes() {
            true => push(&mut runs, clusters.clone(), false),
            false => push_file(&mut runs, file, clusters.clone())?,
        }
        // After the search: the file may be cut at any time.
        let bytes = file.size()?;
        if bytes < (clusters.end * CLUSTER).min(size) {
            let (path, Range { start, end }) = (file.path().to_owned(), clusters);
            return Err(DiskError::LayerRun { path, start, end, clusters: bytes / CLUSTER });
        }
    }
    Ok(runs)
}

impl DiskImage {
    /// How many clusters the disk has; the last one may be a short one.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.setup.size.div_ceil(CLUSTER)
    }

    /// All clusters, ascending and without gaps, as data or known zeros. Their files are made durable. Settle the
    /// image first: a file that is still being written counts as data.
    ///
    /// # Errors
    /// When a write to a file was lost, or a file was cut. When a file system cannot list a file's holes.
    pub fn runs(&self) -> Result<Vec<DiskRun>, DiskError> {
        runs_of(self.size(), self.map.pieces(0..self.clusters()))
    }

    /// The clusters that may differ from those of `older`, ascending. Includes all that differ, if
    /// `older` was settled before it was read.
    ///
    /// # Errors
    /// As [`Self::runs`].
    pub fn changed_since(&self, older: &Self) -> Result<Vec<DiskRun>, DiskError> {
        let mut pieces = Vec::new();
        for (clusters, source) in self.map.pieces(0..self.clusters()) {
            let mut at = clusters.start;
            // `pieces` omits clusters beyond the end of the older image.
            for (other, before) in older.map.pieces(clusters.clone()) {
                if !source.same(before) {
                    pieces.push((other.clone(), source));
                }
                at = other.end;
            }
            if at < clusters.end {
                pieces.push((at..clusters.end, source));
            }
        }
        runs_of(self.size(), pieces.into_iter())
    }

    /// Reads its bytes from `offset` on, through the page cache.
    ///
    /// # Errors
    /// When the range leaves the disk, when writes that were in flight at the image's instant have
    /// not ended ([`DiskImage::settle`]), or when a file cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let (len, size) = (bytes.len() as u64, self.setup.size);
        let Some(end) = offset.checked_add(len).filter(|end| *end <= size) else {
            return Err(DiskError::OutOfRange { offset, len, size });
        };
        if let Some(file) = self.unsettled.iter().find(|file| file.has_writes()) {
            return Err(DiskError::Unsettled { path: file.path().to_owned() });
        }
        for (clusters, source) in self.map.pieces(offset / CLUSTER..end.div_ceil(CLUSTER)) {
            let (from, to) = ((clusters.start * CLUSTER).max(offset), (clusters.end * CLUSTER).min(end));
            let part = &mut bytes[(from - offset) as usize..(to - offset) as usize];
            match source {
                ClusterSource::Zero => part.fill(0),
                ClusterSource::File(file) => file.read_now(part, from)?,
            }
        }
        Ok(())
    }

    /// The disk as layers for another process: reopened files, read-only. While the process uses
    /// them, this process must hold the image; the process has `lease` open as long as it does.
    /// Each layer keeps the lock on the disk's image file, even if no cluster of that file is
    /// shown: otherwise, once this process has ended, opening the image file could apply a journal,
    /// which punches overlays. A file received from another process keeps the descriptors it came
    /// with.
    ///
    /// # Errors
    /// When a file cannot be opened again.
    pub fn shared_layers(&self, lease: &Arc<OwnedFd>) -> Result<Vec<DiskLayer>, FileError> {
        let lock = self.setup.base.as_ref().map(|base| base.lock_descriptor()).transpose()?.map(Arc::new);
        let kept: Vec<_> = iter::once(Arc::clone(lease)).chain(lock).collect();
        let mut layers: Vec<(&Arc<IoFile>, DiskLayer)> = Vec::new();
        for (clusters, source) in self.map.extents() {
            let ClusterSource::File(file) = source else { continue };
            let at = match layers.iter().position(|(of, _)| Arc::ptr_eq(of, file)) {
                Some(at) => at,
                None => {
                    layers.push((file, DiskLayer { file: Some(Arc::new(shared(file, &kept)?)), runs: Vec::new() }));
                    layers.len() - 1
                }
            };
            push(&mut layers[at].1.runs, clusters, false);
        }
        Ok(layers.into_iter().map(|(_, layer)| layer).collect())
    }

    /// A disk of `size` bytes made of a snapshot's layers, oldest first. Later runs cover earlier
    /// ones. Clusters in no run are zeros. Disks that are opened from it write to overlays in the
    /// directory of `config`, and never to the layers.
    ///
    /// # Errors
    /// When the size is not a disk's, a layer does not fit the disk, or overlays cannot be made.
    pub fn from_layers(config: &DiskConfig, size: u64, layers: &[DiskLayer]) -> Result<Self, DiskError> {
        Self::from_layers_in(config, size, layers, || open_overlays(config, false, size))
    }

    /// The same, read-only: a disk that is opened from it has no place for overlays.
    ///
    /// # Errors
    /// When the size is not a disk's, or a layer does not fit the disk.
    pub fn from_layers_to_read(config: &DiskConfig, size: u64, layers: &[DiskLayer]) -> Result<Self, DiskError> {
        // Opened as a path alone, in which no file can be made.
        Self::from_layers_in(config, size, layers, || Ok(Directory::reach(Path::new("/"))?))
    }

    fn from_layers_in(
        config: &DiskConfig,
        size: u64,
        layers: &[DiskLayer],
        overlays: impl FnOnce() -> Result<Directory, DiskError>,
    ) -> Result<Self, DiskError> {
        // The offset of the last byte must be a file offset.
        if size == 0 || !size.is_multiple_of(SECTOR) || i64::try_from(size).is_err() {
            return Err(DiskError::Size { size });
        }
        let overlays = overlays()?;
        let mut map = BlockMap::new(size.div_ceil(CLUSTER), ClusterSource::Zero);
        for layer in layers {
            layer.check(config, size)?;
            for DiskRun { clusters, zero } in &layer.runs {
                let source = layer.file.as_ref().filter(|_| !zero);
                map.insert(
                    clusters.clone(),
                    source.map_or(ClusterSource::Zero, |file| ClusterSource::File(Arc::clone(file))),
                );
            }
        }
        let setup = Arc::new(Setup { config: config.clone(), base: None, size, overlays, pool: Arc::default() });
        Ok(Self { setup, map, unsettled: Vec::new() })
    }
}

impl DiskLayer {
    /// Refuses runs that leave a disk of `size` bytes or the file, and a file that is writable.
    fn check(&self, config: &DiskConfig, size: u64) -> Result<(), DiskError> {
        let mut in_file = 0;
        if let Some(file) = &self.file {
            if file.is_writable() {
                return Err(DiskError::WritableLayer { path: file.path().to_owned() });
            }
            // The disk's last cluster may be a short one. The file has all of it if the file is as
            // long as the disk.
            let bytes = file.size()?;
            in_file = if bytes >= size { u64::MAX } else { bytes / CLUSTER };
        }
        let on_disk = size.div_ceil(CLUSTER);
        for DiskRun { clusters: Range { start, end }, zero } in &self.runs {
            let (start, end) = (*start, *end);
            let most = if *zero { on_disk } else { on_disk.min(in_file) };
            if self.file.is_none() && !zero {
                return Err(DiskError::NoLayerFile { path: config.path.clone(), start, end });
            }
            if start >= end || end > most {
                let path = self.file.as_ref().map_or(config.path.as_path(), |file| file.path()).to_owned();
                return Err(DiskError::LayerRun { path, start, end, clusters: most });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
