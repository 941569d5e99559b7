//! A worker that writes a snapshot of a VM in another process, and ends.
//!
//! The VM's own process may not open files. This one has the image, and never runs it.
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | starter | [`WriteSnapshotRequest`] |
//! | 2.. | starter | the image of the base snapshot, if there is one |
//! | .. | starter | the image |
//! | next | worker | progress, every [`TELL_INTERVAL`] at most |
//! | any time | starter | one byte: stop |
//! | last | worker | the report, or the error |

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_snapshot::{Compression, SaveProgress, Saved, SnapshotId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::{WorkerAnswer, send};
use clade_api::DaemonError;
use clade_vmm::vm::{Context, ForkImage, Overlays, SavedAt, SealedParts, SharedFiles, SnapshotOptions, VmConfig};

/// Interval of the progress reports.
const TELL_INTERVAL: Duration = Duration::from_millis(50);

/// A snapshot to be written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WriteSnapshotRequest {
    /// Its directory.
    pub dir: PathBuf,
    /// Directory and id of its base snapshot.
    pub base: Option<(PathBuf, SnapshotId)>,
    /// The configuration that the images must have.
    pub config: VmConfig,
    /// Whether it is compressed.
    pub zstd: bool,
    /// Whether it replaces a snapshot that others depend on.
    pub replace: bool,
    /// Whether nothing replaces the base, and both move together.
    pub is_fixed: bool,
    /// Whether the network of its VMs is closed, whatever the image has.
    pub is_closed: bool,
}

/// Writes a snapshot of the images received over `socket`.
pub(super) fn save(context: &Context, socket: &OwnedFd, request: &WriteSnapshotRequest) -> Result<Saved, DaemonError> {
    let failed = |source| DaemonError::Worker { source };
    // A layer in both images must be one here, or all of it would count as changed.
    let mut shared = SharedFiles::default();
    let mut import = || -> Result<_, DaemonError> {
        let parts = SealedParts::receive(socket)?.open()?;
        let image = ForkImage::import_beside(context, parts, Overlays::Nowhere, &mut shared)?;
        if **image.config() == request.config {
            Ok(image)
        } else {
            Err(failed(io::Error::other("an image is of a VM with another configuration")))
        }
    };
    let base = match &request.base {
        Some((dir, id)) => Some((SavedAt { dir: dir.clone(), id: *id }, import()?)),
        None => None,
    };
    let mut image = import()?;
    if request.is_closed {
        // No other thread has the image.
        Arc::get_mut(&mut image).ok_or_else(|| failed(io::ErrorKind::ResourceBusy.into()))?.close_network();
    }
    let has_gone = Cell::new(false);
    let told = Cell::new(Instant::now());
    let tell = |done, total| {
        if told.get().elapsed() < TELL_INTERVAL {
            return;
        }
        told.set(Instant::now());
        if send(socket, &WorkerAnswer::Saving { done, total }, &[]).is_err() {
            has_gone.set(true);
        }
    };
    // A request to stop counts until the snapshot is put in its place.
    let is_cancelled = || has_gone.get() || has_word(socket);
    let compression = if request.zstd { Compression::Zstd } else { Compression::None };
    let options = SnapshotOptions {
        incremental: base.is_some(),
        compression,
        replace: request.replace,
        is_fixed: request.is_fixed,
    };
    let watch = SaveProgress { progress: &tell, is_cancelled: &is_cancelled };
    let of = base.as_ref().map(|(place, image)| (place, &**image));
    image.save(&request.dir, of, options, &watch).map(|(_, saved)| saved).map_err(Into::into)
}

/// Returns whether the other side has sent a byte, or gone.
fn has_word(socket: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Returns the directories that a snapshot in `dir` is written in: its own is made aside, and
/// renamed.
pub fn written_beside(dir: &Path) -> io::Result<PathBuf> {
    let beside = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("/"));
    std::fs::canonicalize(beside)
}
