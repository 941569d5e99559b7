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

    /// Waits until the pages of the file within `range` are filled.
    fn wait_filled(&self, range: PageRange) -> Result<(), Arc<FillError>>;

    /// As [`LayerFill::wait_filled`], for the part of a child's `range` that is mapped over the file.
    fn wait_filled_for(&self, at: &Arc<Reservation>, range: PageRange) -> Result<(), Arc<FillError>>;

    /// Finishes on the caller's thread, concurrently with the background thread. Returns the runs
    /// mapped over the layer meanwhile. Bounded: copies the missing pages without waiting.
    fn finish(&self) -> Result<Vec<(PageRange, u64)>, Arc<FillError>>;

    /// Copies and releases the pages of the frozen region within `range`, for a device that will
    /// write them regardless of protection. An error affects the layer, not the region: its pages
    /// are released in any case.
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

    /// Removes a child that is being dropped. Its mappings stay watched until they are unmapped, so
    /// that they never read a hole.
    fn detach(&self, at: &Arc<Reservation>);

    /// The layer has lost its last user: releases the frozen VM's pages. A layer with readers is
    /// finished instead.
    fn abandon(&self);
}

/// The reason why a child's mapping could not be watched.
#[derive(Debug)]
pub(crate) enum AttachError {
    Failed(Arc<FillError>),
    Watch(io::Error),
}
