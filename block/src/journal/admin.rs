//! Inspection of an image's journal, and its removal by hand: `clade disk`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_host_io::{CachePolicy, FileError, IoFile};

use super::files::{Location, allocated, retire, unmark};
use super::format::{JournalError, JournalId};
use super::image_binding;
use super::recovery::{Beside, Checks, JournalReport, RecoveredJournal, look};
use crate::map::{CLUSTER, ClusterSource};
use crate::{DiskError, SECTOR};

/// The state of an image's journal.
#[derive(Debug)]
pub struct DiskJournal {
    /// The image's path.
    pub image: PathBuf,
    /// The journal's directory, whether or not there is one.
    pub journal: PathBuf,
    /// The journal's id in the image's attribute.
    pub id: Option<JournalId>,
    /// Whether the journal can be applied.
    pub state: JournalState,
    /// Bytes of the disk that are in overlays.
    pub data: u64,
    /// Bytes of the disk that are zeros in the journal.
    pub zeros: u64,
    /// Overlays that the journal refers to.
    pub overlays: usize,
    /// Bytes that the overlays take on the file system.
    pub room: u64,
}

/// Whether a journal can be applied.
#[derive(Debug)]
pub enum JournalState {
    /// There is no journal.
    None,
    /// The journal is applied when the image is opened next.
    Good,
    /// The journal is applied in part. Opening the image continues.
    Applying,
    /// The image's attribute names a journal that is not here.
    Missing,
    /// The image cannot be opened while the journal is there, for this reason.
    Refused(DiskError),
}

impl DiskJournal {
    /// Inspects the journal of the image at `path`. Changes nothing.
    ///
    /// # Errors
    /// When the image cannot be read, or a VM that writes to it is running.
    pub fn show(path: &Path) -> Result<Self, DiskError> {
        let (base, size, location) = open(path, false)?;
        let id = image_binding::read_mark(&base)?.id();
        let mut shown = Self {
            image: path.to_owned(),
            journal: location.path(),
            id,
            state: JournalState::None,
            data: 0,
            zeros: 0,
            overlays: 0,
            room: 0,
        };
        match look(&location, false) {
            Ok(Beside::Journal(dir, file, bytes)) => {
                let read = |checks| {
                    let parts = (location.clone(), dir.clone(), Arc::clone(&file));
                    RecoveredJournal::read(parts.0, parts.1, parts.2, &bytes, (&base, size), checks)
                };
                match read(Checks::Size) {
                    Ok(left) => shown.count(&left, &base),
                    Err(error) => {
                        shown.state = JournalState::Refused(error);
                        return Ok(shown);
                    }
                }
                shown.state = match read(Checks::All) {
                    Ok(left) if left.contents.seen.writing => JournalState::Applying,
                    Ok(_) => JournalState::Good,
                    Err(error) => JournalState::Refused(error),
                };
            }
            Ok(Beside::Nothing | Beside::Names(_)) => match RecoveredJournal::find(&base, size) {
                Err(DiskError::JournalMissing { .. }) => shown.state = JournalState::Missing,
                found => drop(found?),
            },
            Err(error @ DiskError::Journal { source: JournalError::NotOurs, .. }) => {
                shown.state = JournalState::Refused(error);
            }
            Err(error) => return Err(error),
        }
        Ok(shown)
    }

    fn count(&mut self, left: &RecoveredJournal, base: &Arc<IoFile>) {
        for (clusters, source) in left.map.pieces(0..u64::MAX) {
            let bytes = (clusters.end - clusters.start) * CLUSTER;
            match source {
                ClusterSource::Zero => self.zeros += bytes,
                ClusterSource::File(file) if Arc::ptr_eq(file, base) => {}
                ClusterSource::File(_) => self.data += bytes,
            }
        }
        let overlays = left.map.sizes();
        let overlays = overlays.iter().filter(|(file, _)| !Arc::ptr_eq(file, base));
        for (file, _) in overlays {
            self.overlays += 1;
            self.room += allocated(file);
        }
    }

    /// Applies the journal beside `path` to the image, regardless of other changes to the image,
    /// and removes the journal.
    ///
    /// # Errors
    /// When there is no journal, it is damaged, its disk has another size, or a step fails.
    pub fn apply(path: &Path) -> Result<JournalReport, DiskError> {
        let (base, size, location) = open(path, true)?;
        match look(&location, true)? {
            Beside::Journal(dir, file, bytes) => {
                let left = RecoveredJournal::read(location, dir, file, &bytes, (&base, size), Checks::Size)?;
                Ok(left.write_back(&base, size)?)
            }
            Beside::Nothing | Beside::Names(_) => {
                let source = std::io::ErrorKind::NotFound.into();
                Err(FileError { path: location.path(), what: "found", source }.into())
            }
        }
    }

    /// Discards the journal beside `path`, and removes its id from the image. Returns whether there
    /// was one.
    ///
    /// # Errors
    /// When the image or the journal is in use, or a step fails.
    pub fn discard(path: &Path) -> Result<bool, DiskError> {
        let (base, _, location) = open(path, true)?;
        let marked = image_binding::read_mark(&base)?.id().is_some();
        match look(&location, true)? {
            Beside::Nothing => {
                unmark(&base)?;
                Ok(marked)
            }
            Beside::Names(dir) => {
                retire(&location, &dir, &base)?;
                Ok(marked)
            }
            Beside::Journal(dir, file, _) => {
                drop(file);
                retire(&location, &dir, &base)?;
                Ok(true)
            }
        }
    }
}

fn open(path: &Path, write: bool) -> Result<(Arc<IoFile>, u64, Location), DiskError> {
    let base = Arc::new(IoFile::open(path, write, CachePolicy::Host)?);
    let size = base.size()? / SECTOR * SECTOR;
    let location = Location::of(path)?;
    Ok((base, size, location))
}
