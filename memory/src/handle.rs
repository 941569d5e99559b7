//! Counted handles of layers for users outside the crate.
//!
//! Inside the crate a layer is an `Arc`, and only the pages that views show may be read
//! ([`crate::layer::registry`]); the sweep punches the others ([`crate::layer::gc`]). External
//! users may read any page of a layer, so the sweep spares layers with external handles.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl};

use crate::error::RamError;
use crate::layer::interval::{IntervalMap, Piece};
use crate::layer::{Layer, LayerId, LayerMap, LayerOffset, LayerStorage};
use crate::lost::FillError;
use crate::store::StoreError;
use crate::sys::allocated;
use crate::units::{PAGE_SIZE, PageRange};

/// A layer: immutable pages in a file. As long as a handle exists, the whole layer stays as it was
/// when the handle was made.
pub struct LayerHandle(Arc<Layer>);

/// Opens the file again, read-only. A read-only descriptor is duplicated instead: this process may
/// lack the right to reopen the file.
fn reopened_for_reading(file: BorrowedFd<'_>) -> io::Result<File> {
    if fcntl_getfl(file)? & OFlags::ACCMODE == OFlags::RDONLY {
        return Ok(file.try_clone_to_owned()?.into());
    }
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Checks the length: accesses to a mapping beyond the end of its file fail.
pub(crate) fn check_length(file: &File, pages: u64) -> Result<(), StoreError> {
    let short = |source| StoreError::File { pages, source };
    let bytes = file.metadata().map_err(short)?.len();
    if pages.checked_mul(PAGE_SIZE).is_none_or(|wanted| bytes < wanted) {
        return Err(short(io::Error::new(io::ErrorKind::UnexpectedEof, format!("the file has {bytes} bytes"))));
    }
    Ok(())
}

impl LayerHandle {
    /// Makes a handle, which keeps the layer's pages from then on. The caller holds a registered
    /// view of the pages, or the only reference to the layer.
    pub(crate) fn new(layer: &Arc<Layer>) -> Self {
        layer.add_handle();
        Self(Arc::clone(layer))
    }

    /// Identity of the layer.
    #[must_use]
    pub fn id(&self) -> LayerId {
        self.0.id()
    }

    /// Number of pages of the file's address space (holes included).
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// The reason why the layer will never be complete.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<FillError>> {
        self.0.failure()
    }

    /// The file for another process, opened read-only. Waits for pages that are still being copied,
    /// because the other process would read a hole as zeros.
    ///
    /// While the other process uses the file, this process must hold an image that shows those
    /// pages: the sweep punches pages that no image and no VM of this process shows.
    ///
    /// # Errors
    /// If pages will never be filled, or the file cannot be reopened (procfs is needed).
    pub fn read_only_file(&self) -> Result<File, RamError> {
        self.0.wait_filled(PageRange::new(0, self.0.pages())).map_err(RamError::Lost)?;
        let file = self.0.reader().map_or(self.0.as_fd(), AsFd::as_fd);
        reopened_for_reading(file).map_err(RamError::Reopen)
    }

    /// The lease by which the publisher sees that the layer is in use, if another process published
    /// it ([`Store::foreign_layer`](crate::Store::foreign_layer)).
    #[must_use]
    pub fn lease(&self) -> Option<&Arc<OwnedFd>> {
        self.0.lease()
    }

    /// Bytes of memory behind the file.
    ///
    /// # Errors
    /// If `fstat` fails.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.0.resident_bytes()
    }

    /// Reads whole pages, beginning with page `at`. Waits for pages that are still being copied.
    ///
    /// # Errors
    /// If the pages cannot be read, or will never be filled.
    pub fn read_pages(&self, at: u64, bytes: &mut [u8]) -> Result<(), RamError> {
        let pages = (bytes.len() as u64).div_ceil(PAGE_SIZE);
        let range = PageRange::with_len(at, pages);
        self.0.wait_filled(range).map_err(RamError::Lost)?;
        self.0.file().read_exact_at(bytes, range.offset()).map_err(|source| RamError::Copy { pages, source })
    }

    /// The pages of the file within `range` that may be nonzero, because memory is allocated for
    /// them. Waits for pages that are still being copied.
    ///
    /// # Errors
    /// If the file's extents cannot be read, or pages will never be filled.
    pub fn data_runs(&self, range: PageRange) -> Result<Vec<PageRange>, RamError> {
        self.0.wait_filled(range).map_err(RamError::Lost)?;
        // Every page must exist: after a truncation the missing pages would look like a hole.
        if let LayerStorage::File = self.0.storage() {
            return Ok(vec![range]);
        }
        let runs = allocated(self.0.as_fd(), range).map_err(RamError::Harvest)?;
        // After the search: another process may cut the file at any time.
        if let LayerStorage::Foreign = self.0.storage() {
            check_length(self.0.file(), self.0.pages())?;
        }
        Ok(runs)
    }
}

impl Clone for LayerHandle {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for LayerHandle {
    fn drop(&mut self) {
        self.0.remove_handle();
    }
}

impl fmt::Debug for LayerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0.id(), f)
    }
}

impl AsFd for LayerHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where the first page of a range comes from; the following pages follow in the file.
#[derive(Clone, Debug)]
pub struct LayerSource {
    /// The layer.
    pub layer: LayerHandle,
    /// The page in the layer's file.
    pub at: u64,
}

impl LayerSource {
    pub(crate) fn inner(&self) -> LayerOffset {
        LayerOffset { layer: Arc::clone(&self.layer.0), at: self.at }
    }
}

impl Piece for LayerSource {
    fn advance(&self, pages: u64) -> Self {
        Self { layer: self.layer.clone(), at: self.at + pages }
    }
    fn continues(&self, pages: u64, next: &Self) -> bool {
        self.layer.id() == next.layer.id() && self.at + pages == next.at
    }
}

/// Which layer provides each page of a region. A page in no entry is zeros.
pub type ImageMap = IntervalMap<LayerSource>;

/// Converts `map` for external users. Called while the map is registered.
pub(crate) fn image_map(map: &LayerMap) -> ImageMap {
    let mut out = ImageMap::new();
    for (range, source) in map.iter() {
        out.insert(range, LayerSource { layer: LayerHandle::new(&source.layer), at: source.at });
    }
    out
}

/// Converts `map` for use inside the crate.
pub(crate) fn layer_map(map: &ImageMap) -> LayerMap {
    let mut out = LayerMap::new();
    map.iter().for_each(|(range, source)| out.insert(range, source.inner()));
    out
}
