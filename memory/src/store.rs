//! The origin of layers, and the state that all VMs of a process share: the file source, the
//! mapping budget, the pagemap.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use thiserror::Error;

use crate::backing::Backing;
use crate::budget::MappingBudget;
use crate::config::Config;
use crate::freeze::background::{self, BackgroundError, CopyThread};
use crate::layer::gc::{self, Swept};
use crate::layer::pool::{LayerFilePool, MAX_PAGES};
use crate::layer::registry::Views;
use crate::layer::{Layer, LayerId, LayerStorage};
use crate::reclaim::ReclaimThread;
use crate::sync::whole;
use crate::sys::{HugeTmpfs, Pagemap, small_file};
use crate::units::{BLOCK_PAGES, BLOCK_SIZE, PAGE_SHIFT};

/// Pages of a spare file: enough for a typical guest's writes between two forks.
const SPARE_PAGES: u64 = 4 * BLOCK_PAGES;

/// Failures of the store.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// 2 MiB pages were demanded, and a tmpfs in huge pages cannot be mounted.
    #[error("no tmpfs in huge pages (CAP_SYS_ADMIN and transparent huge pages are needed)")]
    Huge(#[source] io::Error),
    /// The kernel lacks PAGEMAP_SCAN, which freeze depends on.
    #[error("this kernel cannot tell which pages a mapping owns (PAGEMAP_SCAN, Linux 6.7 or later)")]
    Pagemap(#[source] io::Error),
    /// A memory file could not be made.
    #[error("no memory file of {pages} pages could be made")]
    File {
        /// Its size.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file of another process's layer is writable here.
    #[error("the file of another process's layer must be open for reading only")]
    Writable,
}

/// Resources of VMs that may share memory with each other.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    huge: Option<HugeTmpfs>,
    warning: Option<String>,
    config: Config,
    pagemap: Pagemap,
    budget: MappingBudget,
    live_layers: Arc<AtomicUsize>,
    spares: Mutex<Vec<File>>,
    pool: Arc<LayerFilePool>,
    /// Files that were taken from it.
    made_ahead: AtomicU64,
    views: Arc<Views>,
    /// Started by the first background freeze. On drop, finishes pending copies.
    engine: whole::Mutex<Option<CopyThread>>,
    /// Started with the first task. Declared after the engine, which may send tasks while it is
    /// dropped.
    reclaim: Mutex<Option<ReclaimThread>>,
}

impl Store {
    /// Opens a store with the default [`Config`]: in 2 MiB pages if this host allows it.
    ///
    /// # Errors
    /// When the kernel lacks a feature that freeze needs.
    pub fn open() -> Result<Self, StoreError> {
        Self::with_config(Config::default())
    }

    /// Opens a store in 4 KiB pages, regardless of the host.
    ///
    /// # Errors
    /// When the kernel lacks a feature that freeze needs.
    pub fn open_small() -> Result<Self, StoreError> {
        Self::with_config(Config { backing: Some(Backing::Small), ..Config::default() })
    }

    /// Opens a store with `config`.
    ///
    /// # Errors
    /// When the kernel lacks a feature that freeze needs; when 2 MiB pages were demanded and are
    /// unavailable.
    pub fn with_config(config: Config) -> Result<Self, StoreError> {
        let budget = MappingBudget::of_this_process(config.max_mappings);
        let (huge, warning) = match config.backing {
            Some(Backing::Small) => (None, None),
            Some(Backing::Huge) => (Some(HugeTmpfs::mount().map_err(StoreError::Huge)?), None),
            None => match HugeTmpfs::mount_or_warn() {
                Ok(fs) => (Some(fs), None),
                Err(warning) => (None, Some(warning)),
            },
        };
        Self::assemble(huge, warning, budget, config)
    }

    /// Opens a store with the default [`Config`], on a mount made by another process. `None` if
    /// that process could not mount one, and has logged the reason.
    ///
    /// # Errors
    /// When the kernel lacks a feature that freeze needs.
    pub fn on(mount: Option<HugeTmpfs>) -> Result<Self, StoreError> {
        let config = Config::default();
        Self::assemble(mount, None, MappingBudget::of_this_process(config.max_mappings), config)
    }

    /// In 4 KiB pages, with a budget of its own.
    #[cfg(test)]
    pub(crate) fn open_with_budget(budget: MappingBudget) -> Self {
        Self::assemble(None, None, budget, Config::default()).unwrap()
    }

    fn assemble(
        huge: Option<HugeTmpfs>,
        warning: Option<String>,
        budget: MappingBudget,
        config: Config,
    ) -> Result<Self, StoreError> {
        let pagemap = Pagemap::open().map_err(StoreError::Pagemap)?;
        do_not_merge_pages();
        let live_layers = Arc::default();
        Ok(Self(Arc::new(Inner {
            huge,
            warning,
            config,
            pagemap,
            budget,
            views: Arc::new(Views::new(&live_layers)),
            live_layers,
            spares: Mutex::default(),
            pool: Arc::default(),
            made_ahead: AtomicU64::new(0),
            engine: whole::Mutex::default(),
            reclaim: Mutex::default(),
        })))
    }

    /// The configuration of the store.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// The directory of huge-page files, if they are in use. For callers that restrict the paths
    /// that this process may open.
    #[must_use]
    pub fn directory(&self) -> Option<BorrowedFd<'_>> {
        self.0.huge.as_ref().map(HugeTmpfs::directory)
    }

    /// Page size of base files and large layers.
    #[must_use]
    pub fn backing(&self) -> Backing {
        if self.0.huge.is_some() { Backing::Huge } else { Backing::Small }
    }

    /// A warning for the operator, if the backing is not the best.
    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        self.0.warning.as_deref()
    }

    /// Layers still in use.
    #[must_use]
    pub fn live_layers(&self) -> usize {
        self.0.live_layers.load(Ordering::Acquire)
    }

    /// Waits until the reclaim thread has done every task queued before. Returns at once if the
    /// thread was never started, or on that thread.
    pub(crate) fn wait_reclaimed(&self) {
        if cfg!(shuttle) {
            // Under shuttle a task replaces the thread, and takes the queued tasks at any time.
            return;
        }
        let sender = {
            let reclaim = self.0.reclaim.lock().unwrap_or_else(PoisonError::into_inner);
            reclaim.as_ref().filter(|thread| !thread.is_this()).map(ReclaimThread::sender)
        };
        if let Some(sender) = sender {
            sender.barrier();
        }
    }

    /// Waits until no layer is left. A background copy that has just ended keeps its source layers
    /// for a moment longer.
    #[cfg(test)]
    pub(crate) fn expect_no_layers(&self) {
        self.wait_reclaimed();
        clade_test_support::wait_eq("layers have outlived their last user", &0, || self.live_layers());
    }

    /// The budget of memory mappings of this process.
    #[must_use]
    pub fn budget(&self) -> &MappingBudget {
        &self.0.budget
    }

    pub(crate) fn pagemap(&self) -> &Pagemap {
        &self.0.pagemap
    }

    /// The background copy service, started on first use.
    pub(crate) fn background(&self) -> Result<Arc<background::CopyService>, BackgroundError> {
        let mut engine = self.0.engine.lock().unwrap_or_else(PoisonError::into_inner);
        match &*engine {
            Some(engine) => engine.shared(),
            None => engine.insert(CopyThread::start()?).shared(),
        }
    }

    /// All views of its layers.
    pub(crate) fn views(&self) -> &Arc<Views> {
        &self.0.views
    }

    /// Calls `with` with the reclaim thread, unless the thread cannot be started.
    pub(crate) fn reclaim<T>(&self, with: impl FnOnce(&ReclaimThread) -> T) -> Option<T> {
        let mut reclaim = self.0.reclaim.lock().unwrap_or_else(PoisonError::into_inner);
        if reclaim.is_none() {
            match ReclaimThread::start(&self.0.views) {
                Ok(started) => *reclaim = Some(started),
                Err(error) => tracing::warn!(%error, "no reclaim thread: memory is freed on the spot"),
            }
        }
        reclaim.as_ref().map(with)
    }

    /// Drops `garbage` in the background: freeing a layer of small pages takes 0.7 us for each.
    pub(crate) fn dispose(&self, garbage: impl Send + 'static) {
        // Without a thread, or with a full queue, the garbage is dropped here with the task.
        let task = self.reclaim(ReclaimThread::sender).map(|sender| sender.spawn(move || drop(garbage)));
        drop(task);
    }

    /// Starts the background service, which otherwise the first background freeze does: so that a
    /// missing feature of the host is reported by name at start (canon 25).
    ///
    /// # Errors
    /// The reason why this host lacks background freezes. Freezes are eager then.
    pub fn start_background(&self) -> Result<(), BackgroundError> {
        self.background().map(|_| ())
    }

    /// Makes a new layer with a file of `pages` pages, all holes. Huge pages are used from one
    /// block upward: a smaller file would clear 2 MiB to hold a few pages.
    pub(crate) fn layer(&self, pages: u64, grain: Backing) -> Result<Layer, StoreError> {
        let file = self.file(pages, grain).map_err(|source| StoreError::File { pages, source })?;
        Ok(self.adopt_file(file, pages, LayerStorage::Memory(self.grain(grain))))
    }

    /// As [`Self::layer`], for a caller that writes all pages before sharing the layer: its memory
    /// may be preallocated.
    pub(crate) fn delta_layer(&self, pages: u64, grain: Backing) -> Result<Layer, StoreError> {
        if pages > MAX_PAGES {
            return self.layer(pages, grain);
        }
        let grain = self.grain(grain);
        let made = self.0.pool.take(grain, pages);
        if let Some(order) = self.0.pool.order(grain, pages, Instant::now()) {
            let (pool, huge) = (Arc::clone(&self.0.pool), self.0.huge.clone());
            let work = move || {
                pool.fill(order, |pages, grain| match (&huge, grain) {
                    (Some(fs), Backing::Huge) => fs.file(pages),
                    _ => small_file(pages),
                });
            };
            if self.reclaim(|thread| thread.sender().spawn(work).is_ok()) != Some(true) {
                self.0.pool.cancel();
            }
        }
        match made {
            Some(file) => {
                // Relaxed: a statistic.
                self.0.made_ahead.fetch_add(1, Ordering::Relaxed);
                Ok(self.adopt_file(file, pages, LayerStorage::Memory(grain)))
            }
            None => self.layer(pages, grain),
        }
    }

    /// Number of freezes that found a preallocated file.
    #[must_use]
    pub fn made_ahead(&self) -> u64 {
        self.0.made_ahead.load(Ordering::Relaxed)
    }

    /// As [`Self::layer`], with no page present, not even as zeros: in a file that is filled while
    /// it is read, a present page counts as filled.
    pub(crate) fn unpopulated_layer(&self, pages: u64, grain: Backing) -> Result<Layer, StoreError> {
        let file = match (&self.0.huge, grain) {
            (Some(fs), Backing::Huge) => fs.file(pages),
            _ => small_file(pages),
        };
        let file = file.map_err(|source| StoreError::File { pages, source })?;
        Ok(self.adopt_file(file, pages, LayerStorage::Memory(self.grain(grain))))
    }

    /// A layer for a reference page.
    pub(crate) fn reference_layer(&self, pages: u64, grain: Backing) -> Result<Layer, StoreError> {
        let file = self.file(pages, grain).map_err(|source| StoreError::File { pages, source })?;
        let (id, storage) = (LayerId(Self::next_id() | LayerId::REFERENCE), LayerStorage::Memory(self.grain(grain)));
        Ok(Layer::new(id, file, pages, storage, Arc::clone(&self.0.live_layers)))
    }

    /// A layer over a file.
    pub(crate) fn adopt_file(&self, file: File, pages: u64, storage: LayerStorage) -> Layer {
        self.adopt_file_as(LayerId(Self::next_id()), file, pages, storage)
    }

    /// The same with the identity of another layer of the file.
    pub(crate) fn adopt_file_as(&self, id: LayerId, file: File, pages: u64, storage: LayerStorage) -> Layer {
        Layer::new(id, file, pages, storage, Arc::clone(&self.0.live_layers))
    }

    /// The page size available for `wanted`.
    fn grain(&self, wanted: Backing) -> Backing {
        if self.0.huge.is_some() { wanted } else { Backing::Small }
    }

    fn next_id() -> u64 {
        // Per process, because a VM of one store may be started from an image of another. Relaxed:
        // identities only have to differ.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    fn file(&self, pages: u64, grain: Backing) -> io::Result<File> {
        match (&self.0.huge, grain) {
            (Some(_), Backing::Huge) if pages <= SPARE_PAGES && self.spares() > 0 => self.take_spare(pages),
            (Some(fs), Backing::Huge) => fs.file(pages),
            _ => small_file(pages),
        }
    }

    /// Number of spare files that wait for a freeze.
    #[must_use]
    pub fn spares(&self) -> usize {
        self.0.spares.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Makes spare files until there are `count`: huge pages that are already allocated and
    /// cleared, so that a freeze only has to copy into them. Fresh huge pages cost 0.4-5.5 us per 4
    /// KiB if the host has to find them first, warm ones 0.15.
    ///
    /// # Errors
    /// When memory for a file runs out; files already made stay.
    pub fn prefill(&self, count: usize) -> Result<(), StoreError> {
        let Some(fs) = &self.0.huge else { return Ok(()) };
        let failed = |source| StoreError::File { pages: SPARE_PAGES, source };
        while self.spares() < count {
            let file = fs.file(SPARE_PAGES).map_err(failed)?;
            // Written, not just allocated: an allocation leaves the clearing to the first write.
            let zeros = vec![0u8; BLOCK_SIZE as usize];
            for block in 0..SPARE_PAGES / BLOCK_PAGES {
                file.write_all_at(&zeros, block * BLOCK_SIZE).map_err(failed)?;
            }
            self.0.spares.lock().unwrap_or_else(PoisonError::into_inner).push(file);
        }
        Ok(())
    }

    /// Frees all files kept for later, after the reclaim thread has done the tasks queued before: some
    /// tasks close files, and some keep new ones.
    pub fn drain(&self) {
        self.wait_reclaimed();
        self.0.pool.clear();
        self.0.spares.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Takes a spare, truncated to `pages`, rounded up to whole blocks because its memory consists
    /// of blocks.
    fn take_spare(&self, pages: u64) -> io::Result<File> {
        let spare = self.0.spares.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match (spare, &self.0.huge) {
            (Some(file), _) => {
                file.set_len(pages.next_multiple_of(BLOCK_PAGES) << PAGE_SHIFT)?;
                Ok(file)
            }
            // Another freeze took the last spare.
            (None, Some(fs)) => fs.file(pages),
            (None, None) => small_file(pages),
        }
    }
}

impl Store {
    /// Punches all layer pages that no VM and no image can see. Also runs in the background now and
    /// then.
    pub fn sweep(&self) -> Swept {
        // Dropped views may still be queued.
        self.wait_reclaimed();
        gc::sweep(self.views())
    }

    /// Pages that sweeps have punched so far, of layers that were still in use.
    #[must_use]
    pub fn given_back(&self) -> u64 {
        self.views().given_back()
    }

    /// Starts a background sweep, if views have changed since the last one.
    pub(crate) fn sweep_later(&self) {
        if self.views().take_changed() {
            self.reclaim(ReclaimThread::sweep);
        }
    }
}

/// Has KSM merge no memory of this process, where its parent chose otherwise for all its children: merged pages of
/// zeros become the zero page, and the pagemap no longer shows that a mapping owns them.
fn do_not_merge_pages() {
    // SAFETY: this request takes integers alone.
    if unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, 0, 0, 0, 0) } < 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "this kernel merges no pages of whole processes");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_store_lets_no_pages_be_merged() {
        let merges = |set: Option<libc::c_ulong>| match set {
            // SAFETY: both requests take integers alone.
            Some(set) => unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, set, 0, 0, 0) },
            // SAFETY: as above.
            None => unsafe { libc::prctl(libc::PR_GET_MEMORY_MERGE, 0, 0, 0, 0) },
        };
        if merges(Some(1)) < 0 {
            clade_test_support::skipped("this kernel has no KSM for processes");
            return;
        }
        let _store = Store::open_small().unwrap();
        assert_eq!(merges(None), 0);
    }

    /// Tests count descriptors after this: a file that a task keeps afterwards would be counted as a leak.
    #[test]
    fn files_that_a_task_keeps_are_closed_by_a_drain_that_comes_after_it() {
        let store = Store::open_small().unwrap();
        let weak = Arc::downgrade(&store.0);
        let keep = move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            if let Some(inner) = weak.upgrade() {
                inner.spares.lock().unwrap().push(small_file(1).unwrap());
            }
        };
        assert_eq!(store.reclaim(|thread| thread.sender().spawn(keep).is_ok()), Some(true));
        store.drain();
        store.wait_reclaimed();
        assert_eq!(store.spares(), 0);
    }
}
