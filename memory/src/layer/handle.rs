//! Layers as others see them: handles that count.
//!
//! Inside the crate a layer is an `Arc`, and what may be read of it is what views show
//! ([`crate::layer::registry`]); the rest of it is given back ([`crate::layer::gc`]). Who is
//! outside may read any page of a layer they were given, so a handle says so: while there is one,
//! nothing of its layer is given back.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl};

use crate::error::RamError;
use crate::freeze::background::FillError;
use crate::layer::interval::{IntervalMap, Piece};
use crate::layer::{Home, Layer, LayerId, LayerMap, Source};
use crate::region::stats::allocated;
use crate::units::{PAGE_SIZE, PageRange};

/// A layer: immutable pages in a file. While there is a handle all of it stays as it was when the
/// handle was made.
pub struct LayerHandle(Arc<Layer>);

/// Another descriptor of a file, open for reading only. One that is so already is not opened again:
/// this process may have no right to.
fn reopened_for_reading(file: BorrowedFd<'_>) -> io::Result<File> {
    if fcntl_getfl(file)? & OFlags::ACCMODE == OFlags::RDONLY {
        return Ok(file.try_clone_to_owned()?.into());
    }
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl LayerHandle {
    /// To be called while something that shows the layer's pages is registered or the layer is
    /// no other's: from then on the handle keeps them.
    pub(crate) fn new(layer: &Arc<Layer>) -> Self {
        layer.add_handle();
        Self(Arc::clone(layer))
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> LayerId {
        self.0.id()
    }

    /// Pages of address space in its file (holes included).
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// Why it will never be complete.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<FillError>> {
        self.0.failure()
    }

    /// Its file for another process, open for reading only. Waits for pages that are still being
    /// copied: a hole is zeros to whoever maps it there.
    ///
    /// While the other process uses it, an image that shows those pages must be held here: what no
    /// image and no VM of this process shows is given back.
    ///
    /// # Errors
    /// When pages will never come, or the file cannot be opened again (procfs is needed).
    pub fn read_only_file(&self) -> Result<File, RamError> {
        self.0.wait_filled(PageRange::new(0, self.0.pages())).map_err(RamError::Lost)?;
        let file = self.0.reader().map_or(self.0.as_fd(), AsFd::as_fd);
        reopened_for_reading(file).map_err(RamError::Reopen)
    }

    /// What its publisher sees it in use by, if that is another process
    /// ([`Store::foreign_layer`](crate::Store::foreign_layer)).
    #[must_use]
    pub fn lease(&self) -> Option<&Arc<OwnedFd>> {
        self.0.lease()
    }

    /// Bytes of memory behind its file.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.0.resident_bytes()
    }

    /// Reads whole pages of it, beginning with page `at`; waits for those that are still being
    /// copied.
    ///
    /// # Errors
    /// When they cannot be read, or will never come.
    pub fn read_pages(&self, at: u64, bytes: &mut [u8]) -> Result<(), RamError> {
        let pages = (bytes.len() as u64).div_ceil(PAGE_SIZE);
        let range = PageRange::with_len(at, pages);
        self.0.wait_filled(range).map_err(RamError::Lost)?;
        self.0.file().read_exact_at(bytes, range.offset()).map_err(|source| RamError::Copy { pages, source })
    }

    /// Those of the pages in `range` of its file that may be other than zeros, because there is
    /// memory behind them. Waits for those that are still being copied.
    ///
    /// # Errors
    /// When the file cannot be asked, or pages will never come.
    pub fn data_runs(&self, range: PageRange) -> Result<Vec<PageRange>, RamError> {
        self.0.wait_filled(range).map_err(RamError::Lost)?;
        match self.0.home() {
            // What is read of it must be there: had it been cut short, what is gone would look
            // like a hole.
            Home::File => return Ok(vec![range]),
            Home::Foreign => crate::layer::builder::check_length(self.0.file(), self.0.pages())?,
            Home::Memory(_) | Home::Disk => {}
        }
        allocated(self.0.as_fd(), range).map_err(RamError::Harvest)
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
    pub(crate) fn inner(&self) -> Source {
        Source { layer: Arc::clone(&self.layer.0), at: self.at }
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

/// `map` for others. To be called while it is registered.
pub(crate) fn image_map(map: &LayerMap) -> ImageMap {
    let mut out = ImageMap::new();
    for (range, source) in map.iter() {
        out.insert(range, LayerSource { layer: LayerHandle::new(&source.layer), at: source.at });
    }
    out
}

/// `map` for the inside.
pub(crate) fn layer_map(map: &ImageMap) -> LayerMap {
    let mut out = LayerMap::new();
    map.iter().for_each(|(range, source)| out.insert(range, source.inner()));
    out
}
