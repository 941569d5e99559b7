//! What the disks of one ancestor have in common.

use std::sync::Arc;

use clade_host_io::{IoFile, OverlayPool};

use super::DiskConfig;
use super::directory::Directory;

/// State shared by all disks of one ancestor. Each disk and each image holds it once.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) config: DiskConfig,
    /// The file the ancestor was opened from. None if the ancestor was made of a snapshot's files,
    /// which are never written.
    pub(super) base: Option<Arc<IoFile>>,
    /// The disk's size in bytes.
    pub(super) size: u64,
    /// The directory in which overlays are made.
    pub(super) overlays: Directory,
    /// Overlays that no disk and no image has any more, for reuse. Old contents are never read: the
    /// map refers to a cluster only after all of it was written since the file was taken from here.
    pub(super) pool: Arc<OverlayPool>,
}
