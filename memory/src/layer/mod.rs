//! Layers: sets of pages that never change, in files, shared by any number of VMs; and the map from
//! pages to them.

pub(crate) mod builder;
pub(crate) mod compact;
pub(crate) mod gc;
pub(crate) mod handle;
pub(crate) mod interval;
pub(crate) mod pool;
pub(crate) mod registry;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::freeze::background::{BackgroundCopy, FillError};
use crate::layer::interval::{IntervalMap, Piece};
use crate::store::Backing;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::PageRange;

/// Identity of a layer within the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub(crate) u64);

impl LayerId {
    /// Set in the identity of a layer that holds a reference page.
    pub(crate) const REFERENCE: u64 = 1 << 63;

    /// Its number. Layers and reference pages are counted apart.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0 & !Self::REFERENCE
    }

    /// Whether the layer is a reference page's.
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
pub(crate) enum Home {
    /// In memory, in pages of this size.
    Memory(Backing),
    /// In a file on a disk that is the layer's alone, and in the page cache as long as there is
    /// room.
    Disk,
    /// In a file that others have too, such as a snapshot's: only ever read, so nothing of it is
    /// given back.
    File,
    /// In memory, in a file that another process published: only ever read.
    Foreign,
}

/// A memory file whose published pages are immutable (I4). Freed, file and all, with its last user.
///
/// A layer made from a base file may still have pages that were pinned when it was frozen: those
/// belong to the VM that was populated in it, are in no [`LayerMap`], and are not part of the
/// layer.
#[derive(Debug)]
pub(crate) struct Layer {
    id: LayerId,
    file: File,
    pages: u64,
    home: Home,
    live: Arc<AtomicUsize>,
    /// Whether a VM still owns pages of it, mapped shared, which are in no map.
    base_file: AtomicBool,
    /// What has been given back of it, ascending (see [`crate::layer::gc`]).
    given: Mutex<Vec<PageRange>>,
    /// What fills it, or did, if it was published before it was complete.
    bg_copy: OnceLock<Arc<BackgroundCopy>>,
    /// Handles that others were given (see [`crate::layer::handle`]), and those of them that have
    /// gone. Both only grow.
    handles_made: AtomicU64,
    handles_gone: AtomicU64,
    /// Open as long as the layer is in use, if another process published it.
    lease: Option<Arc<OwnedFd>>,
    /// Its file open for reading only, where this process may have no right to open it so.
    reader: Option<File>,
}

impl Layer {
    pub(crate) fn new(id: LayerId, file: File, pages: u64, home: Home, live: Arc<AtomicUsize>) -> Self {
        // Relaxed: a gauge; nothing is ordered by it.
        live.fetch_add(1, Ordering::Relaxed);
        let (base_file, given) = (AtomicBool::new(false), Mutex::default());
        trace!(Layer { layer: id.0, file: crate::trace::file(&file) });
        let (bg_copy, handles_made, handles_gone) = (OnceLock::new(), AtomicU64::new(0), AtomicU64::new(0));
        let (lease, reader) = (None, None);
        Self { id, file, pages, home, live, base_file, given, bg_copy, handles_made, handles_gone, lease, reader }
    }

    /// Gives other processes copies of `reader`, which is of the same file.
    pub(crate) fn read_by(mut self, reader: File) -> Self {
        self.reader = Some(reader);
        self
    }

    /// Its file for another process, if that was there from the beginning.
    pub(crate) fn reader(&self) -> Option<&File> {
        self.reader.as_ref()
    }

    /// Keeps `lease` open as long as the layer is in use.
    pub(crate) fn under(mut self, lease: Arc<OwnedFd>) -> Self {
        self.lease = Some(lease);
        self
    }

    /// What its publisher sees it in use by.
    pub(crate) fn lease(&self) -> Option<&Arc<OwnedFd>> {
        self.lease.as_ref()
    }

    /// Counts a handle, before the view that it is made of may go. SeqCst: pairs with
    /// [`Self::handles_made`].
    pub(crate) fn add_handle(&self) {
        crate::trace::handle(self.id, || self.handles_made.fetch_add(1, Ordering::SeqCst));
    }

    /// Release: what was read through the handle was read before, and what was made of it is
    /// registered.
    pub(crate) fn remove_handle(&self) {
        trace!(HandleGone { layer: self.id.0 });
        self.handles_gone.fetch_add(1, Ordering::Release);
    }

    /// How many handles there have been, if there is none now. If it says the same twice, there was
    /// none in between.
    pub(crate) fn handles_made(&self) -> Option<u64> {
        // In this order: no handle goes before it is made. So equal counts mean that there was none
        // at the first load. Acquire: pairs with `remove_handle`.
        let gone = self.handles_gone.load(Ordering::Acquire);
        let made = self.handles_made.load(Ordering::SeqCst);
        (made == gone).then_some(made)
    }

    /// Whether it is counted there: whether it is that store's.
    pub(crate) fn is_counted_in(&self, live: &Arc<AtomicUsize>) -> bool {
        Arc::ptr_eq(&self.live, live)
    }

    /// Where its pages are.
    pub(crate) fn home(&self) -> Home {
        self.home
    }

    /// Says whether a VM owns pages of it that are in no map. Release: pairs with
    /// [`Self::is_base`]; the map that shows the pages the VM gave up is published before.
    pub(crate) fn set_base(&self, base_file: bool) {
        self.base_file.store(base_file, Ordering::Release);
        #[cfg(test)]
        crate::layer::gc::worst::moment(&crate::layer::registry::Views::new(&self.live));
    }

    pub(crate) fn is_base(&self) -> bool {
        self.base_file.load(Ordering::Acquire)
    }

    /// What has been given back of it.
    pub(crate) fn given(&self) -> MutexGuard<'_, Vec<PageRange>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Its identity.
    pub(crate) fn id(&self) -> LayerId {
        self.id
    }

    /// Says what fills it: once, before it is shared.
    pub(crate) fn fill_with(&self, bg_copy: Arc<BackgroundCopy>) {
        let first = self.bg_copy.set(bg_copy).is_ok();
        debug_assert!(first, "a layer is filled once");
        trace!(Hollow { layer: self.id.0 });
    }

    /// What fills it, if that was left to the background.
    pub(crate) fn bg_copy(&self) -> Option<&Arc<BackgroundCopy>> {
        self.bg_copy.get()
    }

    /// What fills it, as long as pages may be missing.
    pub(crate) fn pending(&self) -> Option<&Arc<BackgroundCopy>> {
        self.bg_copy().filter(|bg_copy| !bg_copy.is_over())
    }

    /// Why it will never be complete.
    pub(crate) fn failure(&self) -> Option<Arc<FillError>> {
        self.bg_copy()?.failure()
    }

    /// Waits until the pages of its file within `range` are there: to be called before the file is
    /// read otherwise than through a mapping that was adopted.
    pub(crate) fn wait_filled(&self, range: PageRange) -> Result<(), Arc<FillError>> {
        self.bg_copy().map_or(Ok(()), |bg_copy| bg_copy.wait_filled(range))
    }

    /// The bytes of `range` of its file. What is still being filled must be there.
    pub(crate) fn read_pages(&self, range: PageRange) -> io::Result<Vec<u8>> {
        failpoint(Call::Copy)?;
        let mut bytes = vec![0; range.bytes()];
        self.file.read_exact_at(&mut bytes, range.offset())?;
        Ok(bytes)
    }

    /// Pages of address space in its file (holes included).
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of memory behind its file.
    ///
    /// # Errors
    /// When the file cannot be asked.
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
pub(crate) struct Source {
    /// The layer.
    pub(crate) layer: Arc<Layer>,
    /// The page in the layer's file.
    pub(crate) at: u64,
}

impl Source {
    /// Whether both are one page of one layer.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.layer.id() == other.layer.id() && self.at == other.at
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:#x}", self.layer.id, self.at)
    }
}

impl Piece for Source {
    fn advance(&self, pages: u64) -> Self {
        Self { layer: Arc::clone(&self.layer), at: self.at + pages }
    }
    fn continues(&self, pages: u64, next: &Self) -> bool {
        self.layer.id == next.layer.id && self.at + pages == next.at
    }
}

/// Which layer provides each page a VM does not own. A page in no entry is zeros.
pub(crate) type LayerMap = IntervalMap<Source>;
