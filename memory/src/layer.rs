//! Layers: sets of pages that never change, in files, shared by any number of VMs; and the map from pages to them.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::background::{FillError, Filling};
use crate::interval::{IntervalMap, Piece};
use crate::store::Backing;
use crate::units::PageRange;

/// Identity of a layer within the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub(crate) u64);

impl LayerId {
    /// Set in the identity of a layer that holds a reference page.
    pub(crate) const REFERENCE: u64 = 1 << 63;

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
    /// In a file on a disk that is the layer's alone, and in the page cache as long as there is room.
    Disk,
    /// In a file that others have too, such as a snapshot's: only ever read, so nothing of it is given back.
    File,
}

/// A memory file whose published pages are immutable (I4). Freed, file and all, with its last user.
///
/// A layer made from a birth file may still have pages that were pinned when it was frozen: those belong to the VM that was
/// born in it, are in nobody's [`LayerMap`], and are not part of the layer.
#[derive(Debug)]
pub(crate) struct Layer {
    id: LayerId,
    file: File,
    pages: u64,
    home: Home,
    live: Arc<AtomicUsize>,
    /// Whether a VM still owns pages of it, mapped shared, which are in no map.
    birth: AtomicBool,
    /// What has been given back of it, ascending (see [`crate::sweep`]).
    given: Mutex<Vec<PageRange>>,
    /// What fills it, or did, if it was published before it was complete.
    filling: OnceLock<Arc<Filling>>,
    /// Handles that others were given (see [`crate::handle`]), and those of them that have gone. Both only grow.
    handles_made: AtomicU64,
    handles_gone: AtomicU64,
}

impl Layer {
    pub(crate) fn new(id: LayerId, file: File, pages: u64, home: Home, live: Arc<AtomicUsize>) -> Self {
        // Relaxed: a gauge; nothing is ordered by it.
        live.fetch_add(1, Ordering::Relaxed);
        let (birth, given) = (AtomicBool::new(false), Mutex::default());
        trace!(Layer { layer: id.0, file: crate::trace::file(&file) });
        let (filling, handles_made, handles_gone) = (OnceLock::new(), AtomicU64::new(0), AtomicU64::new(0));
        Self { id, file, pages, home, live, birth, given, filling, handles_made, handles_gone }
    }

    /// Counts a handle, before the view that it is made of may go. SeqCst: pairs with [`Self::handles_made`].
    pub(crate) fn add_handle(&self) {
        crate::trace::handle(self.id, || self.handles_made.fetch_add(1, Ordering::SeqCst));
    }

    /// Release: what was read through the handle was read before, and what was made of it is registered.
    pub(crate) fn remove_handle(&self) {
        trace!(HandleGone { layer: self.id.0 });
        self.handles_gone.fetch_add(1, Ordering::Release);
    }

    /// How many handles there have been, if there is none now. If it says the same twice, there was none in between.
    pub(crate) fn handles_made(&self) -> Option<u64> {
        // In this order: no handle goes before it is made. So equal counts mean that there was none at the first load.
        // Acquire: pairs with `remove_handle`.
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

    /// Says whether a VM owns pages of it that are in no map. Release: pairs with [`Self::is_birth`]; the map that shows the pages the VM gave up
    /// is published before.
    pub(crate) fn set_birth(&self, birth: bool) {
        self.birth.store(birth, Ordering::Release);
        #[cfg(test)]
        crate::sweep::worst::moment(&crate::view::Views::new(&self.live));
    }

    pub(crate) fn is_birth(&self) -> bool {
        self.birth.load(Ordering::Acquire)
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

    /// Says what fills it: once, before anyone else has it.
    pub(crate) fn fill_with(&self, filling: Arc<Filling>) {
        let first = self.filling.set(filling).is_ok();
        debug_assert!(first, "a layer is filled once");
        trace!(Hollow { layer: self.id.0 });
    }

    /// What fills it, if that was left to the background.
    pub(crate) fn filling(&self) -> Option<&Arc<Filling>> {
        self.filling.get()
    }

    /// What fills it, as long as pages may be missing.
    pub(crate) fn pending(&self) -> Option<&Arc<Filling>> {
        self.filling().filter(|filling| !filling.is_over())
    }

    /// Why it will never be complete.
    pub(crate) fn failure(&self) -> Option<Arc<FillError>> {
        self.filling()?.failure()
    }

    /// Waits until the pages of its file within `range` are there: to be called before the file is read otherwise than through a
    /// mapping that was adopted.
    pub(crate) fn need(&self, range: PageRange) -> Result<(), Arc<FillError>> {
        self.filling().map_or(Ok(()), |filling| filling.need(range))
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
        if let Some(filling) = self.filling.get() {
            filling.abandon();
        }
        trace!(LayerGone { layer: self.id.0 });
        // Release: pairs with the Acquire in Store::live_layers, so that a reader that sees the count drop may check the rest.
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
