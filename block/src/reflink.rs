//! Flushes after a fork on a file system with reflinks (XFS, Btrfs): a new image that shares blocks
//! with the old one, instead of a journal.
//!
//! A fork makes the image read-only. The first flush after it syncs the image, clones it (FICLONE, which
//! copies no data, and would write back on the device's thread what the sync has written), adds the clusters that the map has in other files (`copy_file_range`, which
//! shares blocks too), syncs the copy, and renames it to the image's name. The rename is one step:
//! under its name the image is always whole, and has all flushed data. Clones keep the old image,
//! which then has no name.
//!
//! No map contains the new image. So later flushes write the changed clusters into it and sync it,
//! with or without another fork. Like any disk that is being written, it shows each sector as it
//! was at the last flush or later.
//!
//! When no clone needs the old image, the new one takes its place in the map, as if the disk had
//! never been forked.

use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::Arc;

use clade_host_io::{CachePolicy, FileError, IoFile, Request};
use rustix::fs::{XattrFlags, copy_file_range, fgetxattr, flistxattr, fsetxattr, ioctl_ficlone};

use super::directory::{Directory, failed, not_synced};
use super::map::{BlockMap, CLUSTER, ClusterSource, push_run};
use super::steps_trace::step;

/// The suffix of a new image's name until it takes the image's name.
const SUFFIX: &str = ".clade-new";
/// Ranges that are remembered between flushes; with more, the next flush makes a new image.
const MAX_MOVED: usize = 1 << 16;
/// Bytes of the largest value of an extended attribute, and of the largest list of their names.
const XATTR_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReflinkStep {
    Data,
    Cloned,
    Named,
}

#[derive(Debug)]
struct ReflinkWrite {
    moved: Vec<Range<u64>>,
    synced: Vec<Arc<IoFile>>,
    map: BlockMap,
    /// Whether the new image is still to be cloned.
    is_to_clone: bool,
    /// Whether the base was written since its last sync.
    dirty: bool,
    step: ReflinkStep,
}

/// The new image of a disk, and the clusters it lacks since the last flush.
#[derive(Debug)]
pub(super) struct ReflinkImage {
    beside: Directory,
    name: String,
    base: Arc<IoFile>,
    size: u64,
    policy: CachePolicy,
    /// The new image, once it has the image's name.
    file: Option<Arc<IoFile>>,
    /// The new image, until it has the image's name.
    next: Option<Arc<IoFile>>,
    moved: Vec<Range<u64>>,
    /// Whether the next flush makes a new image.
    whole: bool,
    broken: bool,
    writing: Option<ReflinkWrite>,
}

/// The image's directory, and its name there.
fn place(path: &Path) -> Result<(Directory, String), FileError> {
    let real = std::fs::canonicalize(path).map_err(failed(path, "found"))?;
    let name = real.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let name = name.ok_or_else(|| failed(path, "named")(io::ErrorKind::InvalidFilename.into()))?;
    Ok((Directory::open(real.parent().unwrap_or(Path::new("/")))?, name))
}

/// Removes the half-made new image of an earlier process.
pub(super) fn sweep(base: &IoFile) {
    if base.is_block_device() || !base.is_writable() {
        return;
    }
    if let Ok((beside, name)) = place(base.path()) {
        let new = format!("{name}{SUFFIX}");
        if beside.identity_of(&new).is_ok() {
            let _ = beside.unlink(&new).inspect_err(|error| tracing::warn!(%error, "not removed"));
        }
    }
}

impl ReflinkImage {
    /// For the image `base`. None on a file system without reflinks, for an image with a second
    /// name (which would stay with the old image), or with overlays on another file system.
    pub(super) fn new(base: &Arc<IoFile>, size: u64, overlays: &Directory, policy: CachePolicy) -> Option<Self> {
        let ready = || -> Result<Self, FileError> {
            let (beside, name) = place(base.path())?;
            let no = |what| failed(base.path(), what)(io::ErrorKind::Unsupported.into());
            let stat = rustix::fs::fstat(&**base).map_err(|error| failed(base.path(), "looked at")(error.into()))?;
            if base.is_block_device() || stat.st_nlink != 1 {
                return Err(no("replaced"));
            }
            if beside.device()? != overlays.device()? {
                return Err(no("given overlays from elsewhere"));
            }
            let new = |len| beside.new_image(len, base.path(), CachePolicy::Host);
            let (from, to) = (new(CLUSTER)?, new(0)?);
            ioctl_ficlone(&to, &from).map_err(|error| failed(base.path(), "cloned")(error.into()))?;
            let (file, next, writing) = (None, None, None);
            let (base, moved) = (Arc::clone(base), Vec::new());
            Ok(Self { beside, name, base, size, policy, file, next, moved, whole: true, broken: false, writing })
        };
        ready()
            .inspect_err(|error| {
                let error = error as &dyn std::error::Error;
                tracing::debug!(path = %base.path().display(), error, "no reflinks: a flush after a fork needs a journal");
            })
            .ok()
    }

    /// Whether the new image has taken the image's name.
    pub(super) fn is_image(&self) -> bool {
        self.file.is_some()
    }

    /// The new image, once it has the image's name.
    pub(super) fn image(&self) -> Option<&IoFile> {
        self.file.as_deref()
    }

    /// Whether a flush is writing it.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Notes that `clusters` have changed.
    pub(super) fn moved(&mut self, clusters: Range<u64>) {
        if self.whole || clusters.is_empty() {
            return;
        }
        push_run(&mut self.moved, clusters);
        if self.moved.len() > MAX_MOVED {
            self.replaced();
        }
    }

    /// Notes that the map was replaced: the next flush makes a new image.
    pub(super) fn replaced(&mut self) {
        self.moved.clear();
        self.whole = true;
    }

    /// Begins to make the clusters of `map` durable. Returns the first requests for the kernel.
    ///
    /// # Errors
    /// When a write was lost.
    pub(super) fn begin(&mut self, map: &BlockMap, dirty: bool) -> Result<Vec<Request>, FileError> {
        let overlays = map.sizes().into_iter().map(|(file, _)| file).filter(|file| !Arc::ptr_eq(file, &self.base));
        let overlays: Vec<_> = overlays.collect();
        self.broken |= overlays.iter().any(|file| file.knows_lost_writes());
        if self.broken {
            return Err(failed(self.base.path(), "flushed since a write was lost")(rustix::io::Errno::IO.into()));
        }
        let base = dirty.then(|| Request::Sync { file: Arc::clone(&self.base), all: false });
        let mut requests: Vec<Request> = base.into_iter().collect();
        if self.file.is_none() && map.is_all(0..self.size.div_ceil(CLUSTER), &self.base) {
            return Ok(requests);
        }
        let synced: Vec<_> = overlays.into_iter().filter(|file| file.take_unsynced()).collect();
        requests.extend(synced.iter().map(|file| Request::Sync { file: Arc::clone(file), all: false }));
        let all = 0..self.size.div_ceil(CLUSTER);
        let is_to_clone = mem::take(&mut self.whole);
        let moved = if is_to_clone { vec![all] } else { mem::take(&mut self.moved) };
        self.moved.clear();
        self.writing =
            Some(ReflinkWrite { moved, synced, map: map.clone(), is_to_clone, dirty, step: ReflinkStep::Data });
        Ok(requests)
    }

    /// A file without a name that shares the base's blocks and has its permissions.
    fn make(&self) -> Result<IoFile, FileError> {
        let current = self.file.as_ref().unwrap_or(&self.base);
        let (inode, device) = self.beside.identity_of(&self.name)?;
        let stat = rustix::fs::fstat(&**current).map_err(|error| failed(current.path(), "looked at")(error.into()))?;
        // Another file has the name; this disk must not replace it.
        if (inode, device) != (stat.st_ino, stat.st_dev) || stat.st_nlink != 1 {
            return Err(failed(current.path(), "found by its name")(io::ErrorKind::NotFound.into()));
        }
        let file = self.beside.new_image(0, self.base.path(), self.policy)?;
        step(|| format!("clone {}", self.name)).map_err(failed(self.base.path(), "cloned"))?;
        ioctl_ficlone(&file, &*self.base).map_err(|error| failed(self.base.path(), "cloned")(error.into()))?;
        self.copy_attributes(&file)?;
        file.try_lock().map_err(failed(self.base.path(), "locked"))?;
        Ok(file)
    }

    fn copy_attributes(&self, to: &IoFile) -> Result<(), FileError> {
        let wrong = || failed(self.base.path(), "copied with who may use it");
        let owned = |file: &IoFile| file.try_clone().map_err(wrong());
        let (from, to): (File, File) = (owned(&self.base)?, owned(to)?);
        let metadata = from.metadata().map_err(wrong())?;
        fchown(&to, Some(metadata.uid()), Some(metadata.gid())).map_err(wrong())?;
        // Without set-uid and the like: a guest writes what is in the file.
        let mode = metadata.mode() & 0o777;
        if mode & 0o400 == 0 {
            return Err(wrong()(io::ErrorKind::PermissionDenied.into()));
        }
        to.set_permissions(std::fs::Permissions::from_mode(mode)).map_err(wrong())?;
        let mut names = vec![0; XATTR_BYTES];
        // A file system without extended attributes lists none.
        let len = flistxattr(&from, &mut names[..]).unwrap_or(0);
        let mut value = vec![0; XATTR_BYTES];
        for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let found = fgetxattr(&from, name, &mut value[..]);
            let set = found.and_then(|len| fsetxattr(&to, name, &value[..len], XattrFlags::empty()));
            set.map_err(|error| wrong()(error.into()))?;
        }
        Ok(())
    }

    /// The next request, once the kernel has completed all earlier ones. None when everything is
    /// durable.
    ///
    /// # Errors
    /// When a step fails. [`ReflinkImage::give_up`] must be called then.
    pub(super) fn next(&mut self) -> Result<Option<Request>, FileError> {
        // The map's instant and the image's are the same: the image is read-only since the fork.
        if self.is_to_clone() {
            self.next = Some(Arc::new(self.make()?));
        }
        let Some(writing) = &mut self.writing else { return Ok(None) };
        writing.is_to_clone = false;
        let Some(to) = self.next.as_ref().or(self.file.as_ref()) else { return Ok(None) };
        match writing.step {
            ReflinkStep::Data => {
                for range in &writing.moved {
                    for (clusters, source) in writing.map.pieces(range.clone()) {
                        if self.next.is_some() && source.is(&self.base) {
                            continue;
                        }
                        let (start, end) = (clusters.start * CLUSTER, (clusters.end * CLUSTER).min(self.size));
                        copy(source, to, start, end)?;
                    }
                }
                writing.step = ReflinkStep::Cloned;
                Ok(Some(Request::Sync { file: Arc::clone(to), all: true }))
            }
            ReflinkStep::Cloned if self.next.is_some() => {
                writing.step = ReflinkStep::Named;
                let new = format!("{}{SUFFIX}", self.name);
                if self.beside.identity_of(&new).is_ok() {
                    self.beside.unlink(&new)?;
                }
                self.beside.link(to, &new)?;
                self.beside.rename(&new, &self.name)?;
                // From here on the file may be the image.
                self.file = self.next.take();
                Ok(Some(Request::Sync { file: Arc::clone(self.beside.file()), all: true }))
            }
            ReflinkStep::Cloned | ReflinkStep::Named => {
                self.writing = None;
                Ok(None)
            }
        }
    }

    /// Whether a flush is still to clone the image.
    fn is_to_clone(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.is_to_clone)
    }

    /// Ends a flush that cannot clone the image, if there has never been a new image: a journal takes its place. Returns
    /// whether the base was written since its last sync before the flush.
    pub(super) fn give_up_for_a_journal(&mut self) -> Option<bool> {
        let dirty = self.writing.as_ref().filter(|writing| writing.is_to_clone)?.dirty;
        if self.is_image() || self.broken {
            return None;
        }
        self.give_up(false);
        Some(dirty)
    }

    /// Whether a flush syncs the new image: the overlays and the base are durable.
    pub(super) fn syncs_new_image(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.step != ReflinkStep::Data)
    }

    /// Ends a failed flush. The next flush does it all again, unless a write was `lost`.
    pub(super) fn give_up(&mut self, lost: bool) {
        let Some(mut writing) = self.writing.take() else { return };
        self.broken |= lost;
        // A sync that fails later is of the new image.
        not_synced(&writing.synced, lost && writing.step == ReflinkStep::Data);
        // The rename may not be durable: another new image is made.
        if self.next.take().is_some() || writing.is_to_clone || writing.step == ReflinkStep::Named {
            self.replaced();
        } else if !self.whole {
            writing.moved.append(&mut self.moved);
            self.moved = writing.moved;
        }
    }

    /// Returns the new image, which becomes the base, if it has all that was written. What was written since the last
    /// flush began is in overlays alone.
    pub(super) fn take_over(&mut self) -> Option<Arc<IoFile>> {
        if self.whole || !self.moved.is_empty() {
            return None;
        }
        let file = self.file.take()?;
        self.base = Arc::clone(&file);
        self.replaced();
        Some(file)
    }
}

/// Copies a range of a source into `to`.
fn copy(source: &ClusterSource, to: &IoFile, start: u64, end: u64) -> Result<(), FileError> {
    let wrong = |error: rustix::io::Errno| failed(to.path(), "given what was written")(error.into());
    let ClusterSource::File(from) = source else {
        use rustix::fs::FallocateFlags as Flags;
        if rustix::fs::fallocate(to, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, start, end - start).is_ok() {
            return Ok(());
        }
        return to.write_now(&vec![0; (end - start) as usize], start);
    };
    let (mut from_at, mut to_at) = (start, start);
    while to_at < end {
        let left = (end - to_at) as usize;
        if copy_file_range(&**from, Some(&mut from_at), to, Some(&mut to_at), left).map_err(wrong)? == 0 {
            return Err(wrong(rustix::io::Errno::IO));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
