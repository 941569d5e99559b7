//! Layers: immutable sets of pages in files, shared by any number of VMs; and the map from pages to
//! layers.

pub(crate) mod fill;
pub(crate) mod gc;
pub(crate) mod interval;
pub(crate) mod pool;
pub(crate) mod registry;

use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::{ReadWriteFlags, preadv2};

use crate::backing::Backing;
use crate::layer::fill::LayerFill;
use crate::layer::interval::{IntervalMap, Piece};
use crate::lost::FillError;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SIZE, PageRange};

/// Identity of a layer within the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub(crate) u64);

impl LayerId {
    /// Set in the identity of a layer that holds a reference page.
    pub(crate) const REFERENCE: u64 = 1 << 63;

    /// Number of the layer. Layers and reference pages are numbered separately.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0 & !Self::REFERENCE
    }

    /// Whether this layer holds a reference page.
    #[must_use]
    pub fn is_reference(self) -> bool {
        self.0 & Self::REFERENCE != 0
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_reference() { "reference" } else { "layer" };
        write!(f, "{kind} {}", self.0 & !Self::REFERENCE)
    }
}

/// Where a layer's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerStorage {
    /// In memory, in pages of this size.
    Memory(Backing),
    /// In a private file on a disk. The page cache holds its pages as long as there is room.
    Disk,
    /// In a file with other users, such as a snapshot's: read-only, so the sweep never punches it.
    File,
    /// In a memory file published by another process: read-only.
    Foreign,
}

/// A memory file whose published pages are immutable (I4). The last user frees layer and file.
///
/// A layer made from a base file may still contain pages that were pinned when it was frozen. Those
/// pages belong to the VM that was populated in the file, are in no [`LayerMap`], and are not part
/// of the layer.
#[derive(Debug)]
pub(crate) struct Layer {
    id: LayerId,
    file: File,
    pages: u64,
    storage: LayerStorage,
    live: Arc<AtomicUsize>,
    /// Whether a VM still owns pages of the file, mapped shared, that no map contains.
    base_file: AtomicBool,
    /// Punched ranges of the file, ascending (see [`crate::layer::gc`]).
    given: Mutex<Vec<PageRange>>,
    /// The background copy that fills or filled the layer, if it was published incomplete.
    bg_copy: OnceLock<Arc<dyn LayerFill>>,
    /// External handles created (see [`crate::handle`]), and external handles dropped. Both
    /// counts only grow.
    handles_made: AtomicU64,
    handles_gone: AtomicU64,
    /// The publisher's lease, held open as long as the layer is in use, for another process's
    /// layer.
    lease: Option<Arc<OwnedFd>>,
    /// The file opened read-only, for when this process may lack the right to reopen it so.
    reader: Option<File>,
}

impl Layer {
    pub(crate) fn new(id: LayerId, file: File, pages: u64, storage: LayerStorage, live: Arc<AtomicUsize>) -> Self {
        // Relaxed: a gauge that orders nothing.
        live.fetch_add(1, Ordering::Relaxed);
        let (base_file, given) = (AtomicBool::new(false), Mutex::default());
        trace!(Layer { layer: id.0, file: crate::trace::file(&file) });
        let (bg_copy, handles_made, handles_gone) = (OnceLock::new(), AtomicU64::new(0), AtomicU64::new(0));
        let (lease, reader) = (None, None);
        Self { id, file, pages, storage, live, base_file, given, bg_copy, handles_made, handles_gone, lease, reader }
    }

    /// Sets `reader`, an open of the same file, as the descriptor to copy to other processes.
    pub(crate) fn read_by(mut self, reader: File) -> Self {
        self.reader = Some(reader);
        self
    }

    /// The descriptor for other processes, if one was set at creation.
    pub(crate) fn reader(&self) -> Option<&File> {
        self.reader.as_ref()
    }

    /// Keeps `lease` open as long as the layer is in use.
    pub(crate) fn under(mut self, lease: Arc<OwnedFd>) -> Self {
        self.lease = Some(lease);
        self
    }

    /// The lease by which the publisher sees that the layer is in use.
    pub(crate) fn lease(&self) -> Option<&Arc<OwnedFd>> {
        self.lease.as_ref()
    }

    /// Counts a new handle, before the view from which it is made may be dropped. SeqCst: pairs
    /// with [`Self::handles_made`].
    pub(crate) fn add_handle(&self) {
        crate::trace::handle(self.id, || self.handles_made.fetch_add(1, Ordering::SeqCst));
    }

    /// Counts a dropped handle. Release: reads through the handle, and the registration of views
    /// made from it, happen before.
    pub(crate) fn remove_handle(&self) {
        trace!(HandleGone { layer: self.id.0 });
        self.handles_gone.fetch_add(1, Ordering::Release);
    }

    /// Number of handles ever made, if all have been dropped. Two equal results mean that no handle
    /// existed in between.
    pub(crate) fn handles_made(&self) -> Option<u64> {
        // In this order, because a handle is made before it is dropped: equal counts mean that no
        // handle existed at the first load. Acquire: pairs with `remove_handle`.
        let gone = self.handles_gone.load(Ordering::Acquire);
        let made = self.handles_made.load(Ordering::SeqCst);
        (made == gone).then_some(made)
    }

    /// Whether the layer belongs to the store that counts its layers in `live`.
    pub(crate) fn is_counted_in(&self, live: &Arc<AtomicUsize>) -> bool {
        Arc::ptr_eq(&self.live, live)
    }

    /// Where the pages are.
    pub(crate) fn storage(&self) -> LayerStorage {
        self.storage
    }

    /// Sets whether a VM owns pages of the file that no map contains. Release: pairs with
    /// [`Self::is_base`]; the map with the pages that the VM gave up is published before.
    pub(crate) fn set_base(&self, base_file: bool) {
        self.base_file.store(base_file, Ordering::Release);
        #[cfg(test)]
        crate::layer::gc::worst::moment(&crate::layer::registry::Views::new(&self.live));
    }

    pub(crate) fn is_base(&self) -> bool {
        self.base_file.load(Ordering::Acquire)
    }

    /// Punched ranges of the file.
    pub(crate) fn given(&self) -> MutexGuard<'_, Vec<PageRange>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Identity of the layer.
    pub(crate) fn id(&self) -> LayerId {
        self.id
    }

    /// Sets the background copy that fills the layer: once, before the layer is shared.
    pub(crate) fn fill_with(&self, bg_copy: Arc<dyn LayerFill>) {
        let first = self.bg_copy.set(bg_copy).is_ok();
        debug_assert!(first, "a layer is filled once");
        trace!(Hollow { layer: self.id.0 });
    }

    /// The background copy that fills or filled the layer, if any.
    pub(crate) fn bg_copy(&self) -> Option<&Arc<dyn LayerFill>> {
        self.bg_copy.get()
    }

    /// The background copy that fills the layer, as long as pages may be missing.
    pub(crate) fn pending(&self) -> Option<&Arc<dyn LayerFill>> {
        self.bg_copy().filter(|bg_copy| !bg_copy.is_over())
    }

    /// The reason why the layer will never be complete.
    pub(crate) fn failure(&self) -> Option<Arc<FillError>> {
        self.bg_copy()?.failure()
    }

    /// Waits until the file's pages within `range` are filled. Required before the file is read
    /// otherwise than through an adopted mapping.
    pub(crate) fn wait_filled(&self, range: PageRange) -> Result<(), Arc<FillError>> {
        self.bg_copy().map_or(Ok(()), |bg_copy| bg_copy.wait_filled(range))
    }

    /// Reads the file's pages within `range`, which must be filled.
    pub(crate) fn read_pages(&self, range: PageRange) -> io::Result<Vec<u8>> {
        failpoint(Call::Copy)?;
        let mut bytes = vec![0; range.bytes()];
        self.file.read_exact_at(&mut bytes, range.offset())?;
        Ok(bytes)
    }

    /// Reads one page, which must be filled, into `bytes`, if that needs no wait for a disk.
    pub(crate) fn read_cached(&self, page: u64, bytes: &mut [u8; PAGE_SIZE as usize]) -> io::Result<()> {
        failpoint(Call::Copy)?;
        let offset = PageRange::with_len(page, 1).offset();
        match self.storage {
            LayerStorage::Memory(_) | LayerStorage::Foreign => self.file.read_exact_at(bytes, offset)?,
            LayerStorage::Disk | LayerStorage::File => {
                let mut buffer = [IoSliceMut::new(bytes)];
                if preadv2(&self.file, &mut buffer, offset, ReadWriteFlags::NOWAIT)? < PAGE_SIZE as usize {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
            }
        }
        Ok(())
    }

    /// Number of pages of the file's address space (holes included).
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of memory behind the file.
    ///
    /// # Errors
    /// If `fstat` fails.
    pub(crate) fn resident_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if let Some(bg_copy) = self.bg_copy.get() {
            bg_copy.abandon();
        }
        trace!(LayerGone { layer: self.id.0 });
        // Release: pairs with the Acquire in Store::live_layers, so that a reader that sees the
        // count drop may check the rest.
        self.live.fetch_sub(1, Ordering::Release);
    }
}

impl AsFd for Layer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Where the first page of a range comes from; the following pages follow in the file.
#[derive(Clone)]
pub(crate) struct LayerOffset {
    /// The layer.
    pub(crate) layer: Arc<Layer>,
    /// The page in the layer's file.
    pub(crate) at: u64,
}

impl LayerOffset {
    /// Whether both refer to the same page of the same layer.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.layer.id() == other.layer.id() && self.at == other.at
    }
}

impl fmt::Debug for LayerOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:#x}", self.layer.id, self.at)
    }
}

impl Piece for LayerOffset {
    fn advance(&self, pages: u64) -> Self {
        Self { layer: Arc::clone(&self.layer), at: self.at + pages }
    }
    fn continues(&self, pages: u64, next: &Self) -> bool {
        self.layer.id == next.layer.id && self.at + pages == next.at
    }
}

/// The layer that provides each page that a VM does not own. Pages in no entry are zeros.
pub(crate) type LayerMap = IntervalMap<LayerOffset>;
