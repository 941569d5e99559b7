//! A journal that was left behind: the disk it shows, and how it is applied to the image.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use clade_host_io::{FileError, IoFile};

use super::files::{JOURNAL, Location, NEXT, header_in, header_of, overlay, remove_files, retire, unmark};
use super::format::{self, Contents, ImageStatus, JournalEntry, JournalError, StoredIn};
use super::image_binding::{self, Mark};
use crate::DiskError;
use crate::directory::{Directory, sync, write};
use crate::map::{BlockMap, CLUSTER, ClusterSource, push_run};

/// Checks before a journal is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checks {
    /// That the journal is the image's, and that no other program has changed the image.
    All,
    /// That the journal's disk has the image's size: the only check of `clade disk apply`.
    Size,
}

/// A disk whose journal was left behind: its process crashed, or other VMs still used the image at
/// its end.
#[derive(Debug)]
pub(crate) struct RecoveredJournal {
    location: Location,
    /// The journal's directory, locked.
    dir: Directory,
    pub(super) contents: Contents,
    /// The disk with the journal applied.
    pub(crate) map: BlockMap,
    file: Arc<IoFile>,
}

/// The journal files beside an image.
#[derive(Debug)]
pub(super) enum Beside {
    /// No directory.
    Nothing,
    /// A directory, locked, with an invalid journal.
    Names(Directory),
    /// A directory, locked, and the bytes of the journal in it.
    Journal(Directory, Arc<IoFile>, Vec<u8>),
}

/// Opens a journal's directory, and locks it.
pub(super) fn look(location: &Location, write: bool) -> Result<Beside, DiskError> {
    let dir = match location.beside.open_ours(&location.name) {
        Ok(dir) => dir,
        Err(error) => match error.source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => return Ok(Beside::Nothing),
            io::ErrorKind::PermissionDenied => {
                return Err(DiskError::Journal { path: location.path(), source: JournalError::NotOurs });
            }
            _ => return Err(error.into()),
        },
    };
    dir.lock(write)?;
    let file = match dir.open_file(JOURNAL, write) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(Beside::Names(dir)),
        opened => opened?,
    };
    let mut bytes = vec![0; file.size()? as usize];
    file.read_now(&mut bytes, 0)?;
    Ok(Beside::Journal(dir, file, bytes))
}

/// The error for an image whose attribute names a journal that is not here.
fn missing(location: &Location, image: &IoFile, id: format::JournalId) -> DiskError {
    let (image, journal) = (image.path().to_owned(), location.path());
    DiskError::JournalMissing { image, journal, id, found: location.look_for(id) }
}

impl RecoveredJournal {
    /// Looks for the journal of the image `base`. Removes an invalid journal, if the image is
    /// writable.
    ///
    /// # Errors
    /// When the journal cannot be read, belongs to another image, or lacks a file; when the image
    /// has changed since; or when the image's attribute names an absent journal.
    pub(crate) fn find(base: &Arc<IoFile>, size: u64) -> Result<Option<Self>, DiskError> {
        if base.is_block_device() {
            return Ok(None);
        }
        let location = if base.is_writable() { Location::of(base.path()) } else { Location::to_read(base.path()) };
        let location = match location {
            Ok(location) => location,
            // An image without a name has no journal beside it. Any other failure may hide one.
            Err(error) if matches!(error.source.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let mark = image_binding::read_mark(base)?;
        let (dir, file, bytes) = match look(&location, base.is_writable())? {
            Beside::Nothing => return mark.id().map_or(Ok(None), |id| Err(missing(&location, base, id))),
            Beside::Names(dir) => {
                if let Mark::Id(id) = mark {
                    // The name of the file shows that the journal is unfinished, or was applied
                    // already.
                    let same = header_in(&dir, NEXT)?.is_some_and(|header| header.id == Some(id));
                    if !same {
                        return Err(missing(&location, base, id));
                    }
                }
                if base.is_writable() {
                    unmark(base)?;
                    remove_files(&location, &dir);
                }
                return Ok(None);
            }
            Beside::Journal(dir, file, bytes) => (dir, file, bytes),
        };
        Self::read(location, dir, file, &bytes, (base, size), Checks::All).map(Some)
    }

    /// Reads a journal.
    pub(super) fn read(
        location: Location,
        dir: Directory,
        file: Arc<IoFile>,
        bytes: &[u8],
        (base, size): (&Arc<IoFile>, u64),
        checks: Checks,
    ) -> Result<Self, DiskError> {
        let refused = |source| DiskError::Journal { path: location.path().join(JOURNAL), source };
        let contents = format::read(bytes).map_err(refused)?;
        let image = header_of(base, size)?;
        match checks {
            Checks::All => {
                image_binding::belongs(&contents.header, &image).map_err(refused)?;
                image_binding::unchanged(contents.seen, image_binding::stamp(base)?).map_err(refused)?;
            }
            Checks::Size if contents.header.size != size => {
                image_binding::belongs(&contents.header, &image).map_err(refused)?;
            }
            Checks::Size => {}
        }
        let mut map = BlockMap::new(size.div_ceil(CLUSTER), ClusterSource::File(Arc::clone(base)));
        let mut files: Vec<(u64, Arc<IoFile>)> = Vec::new();
        for JournalEntry { clusters, stored_in } in &contents.entries {
            let source = match *stored_in {
                StoredIn::Image => ClusterSource::File(Arc::clone(base)),
                StoredIn::Zeros => ClusterSource::Zero,
                StoredIn::Overlay(number) => {
                    let known = files.iter().find(|(known, _)| *known == number).map(|(_, file)| Arc::clone(file));
                    let file = match known {
                        Some(file) => file,
                        None => {
                            let file = dir.open_file(&overlay(number), base.is_writable())?;
                            files.push((number, Arc::clone(&file)));
                            file
                        }
                    };
                    ClusterSource::File(file)
                }
            };
            map.insert(clusters.clone(), source);
        }
        Ok(Self { location, dir, contents, map, file })
    }

    /// Applies the journal to the image, and removes it.
    ///
    /// # Errors
    /// When a step fails. Opening the image continues from there.
    pub(crate) fn write_back(mut self, base: &Arc<IoFile>, size: u64) -> Result<JournalReport, FileError> {
        let mut log = JournalTail {
            file: self.file,
            end: self.contents.end,
            records: self.contents.records,
            seen: self.contents.seen,
        };
        let report = write_back(&mut self.map, base, size, Some(&mut log))?;
        retire(&self.location, &self.dir, base)?;
        Ok(report)
    }
}

/// The end of the journal, where records are added while clusters are copied into the image.
#[derive(Debug)]
pub(crate) struct JournalTail {
    pub(super) file: Arc<IoFile>,
    pub(super) end: u64,
    pub(super) records: u64,
    pub(super) seen: ImageStatus,
}

impl JournalTail {
    /// Adds a record, durably.
    fn add(&mut self, entries: &[JournalEntry]) -> Result<(), FileError> {
        let bytes = format::record(self.records, self.seen, entries);
        write(&self.file, &bytes, self.end)?;
        sync(&self.file)?;
        self.end += bytes.len() as u64;
        self.records += 1;
        Ok(())
    }
}

/// Bytes written into an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalReport {
    /// Bytes copied from overlays.
    pub copied: u64,
    /// Bytes that were made zeros.
    pub zeroed: u64,
}

/// Bytes copied at once.
const CHUNK: u64 = 1 << 20;
/// Maximum number of bytes in an overlay and in the image at the same time.
#[cfg(not(test))]
const BATCH: u64 = 16 << 20;
#[cfg(test)]
const BATCH: u64 = 16 << 10;

/// Copies the clusters of `map` that are in other files into `base`, and makes them durable. With a
/// journal, the copy is piecewise. Once a piece is durable in the image, the journal records that,
/// and the piece's room in the overlay is freed. Without a journal the overlays stay unchanged,
/// because the image is incomplete until the end.
///
/// # Errors
/// When a step fails. `map` then shows which clusters are in the image.
pub(crate) fn write_back(
    map: &mut BlockMap,
    base: &Arc<IoFile>,
    size: u64,
    mut log: Option<&mut JournalTail>,
) -> Result<JournalReport, FileError> {
    let (mut report, mut batch) = (JournalReport::default(), Batch::default());
    let before = map.clone();
    if let Some(log) = &mut log {
        log.seen.writing = true;
        log.add(&[])?;
    }
    for (range, source) in before.pieces(0..size.div_ceil(CLUSTER)) {
        if source.is(base) {
            continue;
        }
        for start in (range.start..range.end).step_by((CHUNK.min(BATCH) / CLUSTER) as usize) {
            let piece = start..range.end.min(start + CHUNK.min(BATCH) / CLUSTER);
            let (from, to) = (piece.start * CLUSTER, (piece.end * CLUSTER).min(size));
            match source {
                ClusterSource::File(file) => {
                    let mut bytes = vec![0; (to - from) as usize];
                    file.read_now(&mut bytes, from)?;
                    write(base, &bytes, from)?;
                    report.copied += to - from;
                }
                ClusterSource::Zero => {
                    zero(base, from, to)?;
                    report.zeroed += to - from;
                }
            }
            batch.add(piece, source);
            if let Some(log) = &mut log
                && batch.bytes >= BATCH
            {
                batch.finish(map, base, log)?;
            }
        }
    }
    match &mut log {
        Some(log) => batch.finish(map, base, log)?,
        None => {
            sync(base)?;
            map.insert(0..size.div_ceil(CLUSTER), ClusterSource::File(Arc::clone(base)));
        }
    }
    Ok(report)
}

/// Clusters that are in the image, but may not be durable there.
#[derive(Default)]
struct Batch {
    runs: Vec<Range<u64>>,
    overlays: Vec<(Arc<IoFile>, Range<u64>)>,
    bytes: u64,
}

impl Batch {
    fn add(&mut self, piece: Range<u64>, source: &ClusterSource) {
        if let ClusterSource::File(file) = source {
            self.bytes += (piece.end - piece.start) * CLUSTER;
            self.overlays.push((Arc::clone(file), piece.clone()));
        }
        push_run(&mut self.runs, piece);
    }

    fn finish(&mut self, map: &mut BlockMap, base: &Arc<IoFile>, log: &mut JournalTail) -> Result<(), FileError> {
        sync(base)?;
        let runs = std::mem::take(&mut self.runs);
        let entry = |clusters: &Range<u64>| JournalEntry { clusters: clusters.clone(), stored_in: StoredIn::Image };
        let entries: Vec<JournalEntry> = runs.iter().map(entry).collect();
        if !entries.is_empty() {
            log.add(&entries)?;
        }
        runs.into_iter().for_each(|run| map.insert(run, ClusterSource::File(Arc::clone(base))));
        // Not earlier: until now the journal refers to these clusters.
        for (file, piece) in self.overlays.drain(..).filter(|(file, _)| file.is_writable()) {
            punch(&file, piece.start * CLUSTER, (piece.end - piece.start) * CLUSTER);
        }
        self.bytes = 0;
        Ok(())
    }
}

/// Frees a range of a file, where the file system can.
fn punch(file: &IoFile, offset: u64, len: u64) {
    use rustix::fs::FallocateFlags as Flags;
    let _ = rustix::fs::fallocate(file, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, offset, len);
}

/// Makes a range of a file zeros: as a hole, or by writing zeros if the file system has no holes.
fn zero(file: &IoFile, start: u64, end: u64) -> Result<(), FileError> {
    use rustix::fs::FallocateFlags as Flags;
    file.set_unsynced();
    if rustix::fs::fallocate(file, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, start, end - start).is_ok() {
        return Ok(());
    }
    write(file, &vec![0; (end - start) as usize], start)
}
