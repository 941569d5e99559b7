//! Detaching: copies a disk's files, so that no other process can write the clusters it shows.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use clade_host_io::{FileError, IoFile, UnnamedCopy};

use super::directory::sync_to_copy;
use super::image::open_overlays;
use super::map::{CLUSTER, ClusterSource};
use super::setup::Setup;
use super::{DiskError, DiskImage};

/// Counts of a detachment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DetachedDisk {
    /// Files copied.
    pub copied_files: u64,
    /// Bytes copied: those that are shown and not in a hole.
    pub copied_bytes: u64,
}

impl DiskImage {
    /// Returns an image of the same disk. Files for which `is_safe` is false are copied, as far as the
    /// image shows them, to unnamed files in the directory of overlays. The copies are durable.
    ///
    /// A copy is of no use for a later image: once no image has the files, the disk writes to its base
    /// and its overlays again.
    ///
    /// # Errors
    /// When a file cannot be read, or a write to it was lost. When the directory has no room; that of `is_safe`.
    pub fn detached(
        &self,
        is_safe: &dyn Fn(&IoFile) -> Result<bool, DiskError>,
    ) -> Result<(Self, DetachedDisk), DiskError> {
        let (config, size) = (self.setup.config.clone(), self.size());
        let overlays = open_overlays(&config, false, size)?;
        let mut files: Vec<(&Arc<IoFile>, Option<UnnamedCopy>)> = Vec::new();
        let mut done = DetachedDisk::default();
        for (clusters, source) in self.map.extents() {
            let ClusterSource::File(file) = source else { continue };
            let at = match files.iter().position(|(known, _)| Arc::ptr_eq(known, file)) {
                Some(at) => at,
                None => {
                    let copy = if is_safe(file)? {
                        None
                    } else {
                        sync_to_copy(file)?;
                        Some(overlays.copy(size)?)
                    };
                    files.push((file, copy));
                    files.len() - 1
                }
            };
            if let Some(copy) = &files[at].1 {
                let (start, end) = (clusters.start * CLUSTER, (clusters.end * CLUSTER).min(size));
                done.copied_bytes += copy.copy_from(file, start..end)?;
            }
        }
        let mut map = self.map.clone();
        for (file, copy) in files {
            let copy = match copy {
                // The image stays locked. The lease would keep the giver's memory and the writes to its
                // other disks from being given back.
                None => without_lease(file)?,
                Some(copy) => {
                    done.copied_files += 1;
                    copy.finish(config.cache)?
                }
            };
            let copy = Arc::new(copy);
            for (clusters, source) in self.map.extents() {
                if matches!(source, ClusterSource::File(of) if Arc::ptr_eq(of, file)) {
                    map.insert(clusters, ClusterSource::File(Arc::clone(&copy)));
                }
            }
        }
        let setup = Arc::new(Setup { config, base: None, size, overlays, pool: Arc::default() });
        Ok((Self { setup, map, unsettled: Vec::new() }, done))
    }
}

/// The same open file, which keeps only locks open: a lease is a pipe.
fn without_lease(file: &IoFile) -> Result<IoFile, FileError> {
    let is_lock = |kept: &&Arc<OwnedFd>| {
        let found = rustix::fs::fstat(kept);
        found.is_ok_and(|found| !rustix::fs::FileType::from_raw_mode(found.st_mode).is_fifo())
    };
    let locks = file.kept().iter().filter(is_lock).cloned().collect();
    Ok(file.for_another_process()?.keeping(locks))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::testutil::{read, whole, write};
    use crate::{Disk, DiskConfig, DiskLayer, SECTOR};

    const BYTES: u64 = 64 * CLUSTER + SECTOR;

    /// A disk over an image of `1`s in its first half, forked after a write to two clusters.
    fn forked(dir: &std::path::Path) -> (Disk, DiskImage) {
        let path = dir.join("image");
        let image = File::create(&path).unwrap();
        image.write_all_at(&vec![1; 32 * CLUSTER as usize], 0).unwrap();
        image.set_len(BYTES).unwrap();
        let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
        drop(disk.fork());
        write(&mut disk, 2 * CLUSTER, &vec![2; 2 * CLUSTER as usize]);
        // The disk's last cluster is a short one.
        write(&mut disk, 64 * CLUSTER, &[3; SECTOR as usize]);
        let image = disk.fork();
        (disk, image)
    }

    /// The image as another process has it.
    fn received(image: &DiskImage, dir: &std::path::Path) -> DiskImage {
        let (_, lease) = std::io::pipe().unwrap();
        let layers: Vec<DiskLayer> = image.shared_layers(&Arc::new(lease.into())).unwrap();
        let config = DiskConfig { overlays: Some(dir.to_owned()), ..image.config().clone() };
        DiskImage::from_layers(&config, image.size(), &layers).unwrap()
    }

    #[test]
    fn i4_a_detached_disk_has_its_clusters_whatever_the_giver_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (mut disk, image) = forked(dir.path());
        let wanted = whole(&image);
        let there = received(&image, dir.path());
        let (all, done) = there.detached(&|_| Ok(false)).unwrap();
        assert_eq!(done, DetachedDisk { copied_files: 2, copied_bytes: 32 * CLUSTER + SECTOR });
        let is_image = |file: &IoFile| Ok(file.link_count()? > 0);
        let (overlay, done) = there.detached(&is_image).unwrap();
        assert_eq!(done, DetachedDisk { copied_files: 1, copied_bytes: 2 * CLUSTER + SECTOR });
        // The image stays locked, and nothing waits for the end of this checkpoint.
        let kept: Vec<bool> = overlay
            .map
            .extents()
            .filter_map(|(_, source)| match source {
                ClusterSource::File(file) => Some(
                    file.kept()
                        .iter()
                        .map(|kept| {
                            let mode = rustix::fs::fstat(kept).unwrap().st_mode;
                            rustix::fs::FileType::from_raw_mode(mode).is_fifo()
                        })
                        .collect::<Vec<_>>(),
                ),
                ClusterSource::Zero => None,
            })
            .flatten()
            .collect();
        assert!(!kept.is_empty() && !kept.contains(&true), "{kept:?}");
        // What a process that holds the overlay for writing can do.
        for (clusters, source) in image.map.extents() {
            let ClusterSource::File(file) = source else { continue };
            if !is_image(file).unwrap() {
                file.write_now(&vec![9; CLUSTER as usize], clusters.start * CLUSTER).unwrap();
            }
        }
        assert_ne!(whole(&there), wanted);
        assert!(whole(&overlay) == wanted && whole(&all) == wanted);
        // And to the image.
        let path = dir.path().join("image");
        File::options().write(true).open(path).unwrap().write_all_at(&[8; 100], 0).unwrap();
        assert_ne!(whole(&overlay), wanted);
        assert!(whole(&all) == wanted);
        // A disk that goes on from there has writes of its own.
        let mut child = all.open().unwrap();
        write(&mut child, 0, &vec![5; CLUSTER as usize]);
        assert_eq!(read(&mut child, 0, CLUSTER as usize), vec![5; CLUSTER as usize]);
        assert!(whole(&all) == wanted);
        assert_eq!(read(&mut disk, 64 * CLUSTER, SECTOR as usize), vec![9; SECTOR as usize]);
    }

    #[test]
    fn copies_cannot_be_opened_for_writing_again_and_errors_are_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        let (_disk, image) = forked(dir.path());
        let there = received(&image, dir.path());
        let (copy, _) = there.detached(&|_| Ok(false)).unwrap();
        for (_, source) in copy.map.extents() {
            let ClusterSource::File(file) = source else { continue };
            let found = File::from(std::os::fd::AsFd::as_fd(&**file).try_clone_to_owned().unwrap()).metadata().unwrap();
            assert_eq!((found.mode() & 0o7777, found.nlink(), file.is_writable()), (0o400, 0, false));
        }
        let refused = there.detached(&|_| Err(DiskError::Size { size: 7 })).map(drop);
        assert!(matches!(refused, Err(DiskError::Size { size: 7 })));
        // A file that a giver has truncated is an error, and not zeros.
        for (_, source) in image.map.extents() {
            let ClusterSource::File(file) = source else { continue };
            rustix::fs::ftruncate(&**file, 0).unwrap();
        }
        assert!(there.detached(&|_| Ok(false)).is_err());
    }
}
