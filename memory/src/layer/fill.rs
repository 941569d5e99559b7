//! Layers that are published before their pages are there.

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

use crate::lost::{FillError, LostMemory};
use crate::sys::Reservation;
use crate::units::PageRange;

/// The copy that fills a layer.
pub(crate) trait LayerFill: Any + fmt::Debug + Send + Sync {
    /// Whether no page is missing any more, or some never will be there. Acquire: the pages are
    /// visible then.
    fn is_over(&self) -> bool;

    /// The reason why pages will never be there.
    fn failure(&self) -> Option<Arc<FillError>>;

    /// Waits until the file's pages within `range` are filled.
    fn wait_filled(&self, range: PageRange) -> Result<(), Arc<FillError>>;

    /// As [`LayerFill::wait_filled`], for the pages of `range` of the region at `at`, over which the
    /// layer is mapped.
    fn wait_filled_for(&self, at: &Arc<Reservation>, range: PageRange) -> Result<(), Arc<FillError>>;

    /// Fills all pages, on this thread. Returns the runs of the frozen region that are now mapped over
    /// the file.
    fn finish(&self) -> Result<Vec<(PageRange, u64)>, Arc<FillError>>;

    /// Copies pages of the frozen region, and makes them writable.
    fn copy_and_unprotect(&self, range: PageRange);

    /// Watches a child's mapping of the layer's file: `range` of the reservation `at`, from the file's
    /// page `from`. The mapping must not be live yet. Returns false if no page is missing any more.
    fn attach(
        self: Arc<Self>,
        at: &Arc<Reservation>,
        range: PageRange,
        from: u64,
        failure: &Arc<LostMemory>,
    ) -> Result<bool, AttachError>;

    /// Undoes [`LayerFill::attach`].
    fn detach(&self, at: &Arc<Reservation>);

    /// Takes notice that the layer is freed: its pages are of no use any more.
    fn abandon(&self);
}

/// The reason why a child's mapping could not be watched.
#[derive(Debug)]
pub(crate) enum AttachError {
    Failed(Arc<FillError>),
    Watch(io::Error),
}
