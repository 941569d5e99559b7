//! Reading a disk of a snapshot.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use clade_memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};

use crate::chain::{ChainSpace, PageSource, Snapshot};
use crate::content::PageContent;
use crate::error::Error;
use crate::format::{CHUNK_PAGES, Chunk};
use crate::layer::LayerFile;
use crate::space::Space;

/// The chunk that was last decompressed.
type Last = Option<(usize, u64, Vec<u8>)>;

/// A disk of a snapshot. It keeps the files open, and can be read concurrently.
#[derive(Debug)]
pub struct DiskReader {
    of: Snapshot,
    at: usize,
    last: Mutex<Last>,
}

impl Clone for DiskReader {
    fn clone(&self) -> Self {
        Self::new(self.of.clone(), self.at)
    }
}

impl Snapshot {
    /// The disks, in the VM's order.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskReader> {
        (0..self.0.disks.len()).map(|at| DiskReader::new(self.clone(), at)).collect()
    }
}

impl DiskReader {
    fn new(of: Snapshot, at: usize) -> Self {
        Self { of, at, last: Mutex::default() }
    }

    fn space(&self) -> &ChainSpace {
        &self.of.0.disks[self.at]
    }

    /// The name it was saved with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.of.manifest().disks[self.at].name
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.space().bytes
    }

    /// Reads `bytes` at `offset`. Uncompressed data is not compared with its checksum here, because
    /// that would require reading 256 KiB. [`Self::copy_to`] and [`crate::verify`] compare it.
    ///
    /// # Errors
    /// When the range leaves the disk, or cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.bytes());
        let Some(end) = end else {
            let source = io::Error::new(io::ErrorKind::UnexpectedEof, format!("the disk has {} bytes", self.bytes()));
            return Err(Error::Space { name: self.name().to_owned(), page: offset >> PAGE_SHIFT, source });
        };
        let pages = PageRange::new(offset >> PAGE_SHIFT, end.div_ceil(PAGE_SIZE));
        for (range, place) in self.space().map.within(pages) {
            // The wanted part of the range, in bytes of the disk.
            let (from, to) = (range.offset().max(offset), (range.end() << PAGE_SHIFT).min(end));
            let part = &mut bytes[(from - offset) as usize..(to - offset) as usize];
            match place {
                PageSource::Zero => part.fill(0),
                PageSource::Layer(at) if self.space().layers[at].index.packed => self.unpack(at, from, part)?,
                PageSource::Layer(at) => {
                    let layer = &self.space().layers[at];
                    self.of.0.files.read_exact_at(&layer.file, &layer.path, part, from)?;
                }
            }
        }
        Ok(())
    }

    fn unpack(&self, at: usize, from: u64, part: &mut [u8]) -> Result<(), Error> {
        let layer = &self.space().layers[at];
        let end = from + part.len() as u64;
        let chunks = (from >> PAGE_SHIFT) / CHUNK_PAGES..=((end - 1) >> PAGE_SHIFT) / CHUNK_PAGES;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in chunks.filter_map(|number| layer.index.chunk(number)) {
            let bytes = match last.take() {
                Some((was, number, bytes)) if was == at && number == chunk.number => bytes,
                other => layer.read_chunk(&self.of.0.files, chunk, other.map_or_else(Vec::new, |(.., bytes)| bytes))?,
            };
            let wanted = PageRange::new(from >> PAGE_SHIFT, end.div_ceil(PAGE_SIZE));
            layer.pick(chunk, &bytes, wanted, |range, data| {
                let (a, b) = (range.offset().max(from), (range.end() << PAGE_SHIFT).min(end));
                let data = &data[(a - range.offset()) as usize..(b - range.offset()) as usize];
                part[(a - from) as usize..(b - from) as usize].copy_from_slice(data);
                Ok::<(), Error>(())
            })?;
            *last = Some((at, chunk.number, bytes));
        }
        Ok(())
    }

    /// The runs of pages that have data, ascending. A copy has to write these.
    #[must_use]
    pub fn data_runs(&self) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for (range, place) in self.space().map.iter().filter(|(_, place)| **place != PageSource::Zero) {
            debug_assert_ne!(*place, PageSource::Zero);
            match runs.last_mut() {
                Some(last) if last.end() == range.start() => *last = PageRange::new(last.start(), range.end()),
                _ => runs.push(range),
            }
        }
        runs
    }

    /// Writes the disk into an empty file, which gets its length, and holes where there are zeros.
    /// Every chunk is compared with its checksum.
    ///
    /// # Errors
    /// When a chunk is damaged, or the file cannot be written. `path` is the file's path in
    /// messages.
    pub fn copy_to(&self, file: &File, path: &Path) -> Result<(), Error> {
        let files = &self.of.0.files;
        files.set_len(file, path, self.bytes())?;
        each_chunk(self.space(), |_, layer, chunk, wanted| {
            let bytes = layer.read_chunk(files, chunk, Vec::new())?;
            for range in wanted {
                layer.pick(chunk, &bytes, *range, |range, data| {
                    let most = self.bytes().saturating_sub(range.offset()).min(data.len() as u64);
                    files.write_all_at(file, path, &data[..most as usize], range.offset())
                })?;
            }
            Ok(())
        })
    }
}

/// A layer of a disk.
#[derive(Debug)]
pub struct DiskLayerFile {
    /// The data file and its path, with each page at its own offset. None if the layer is
    /// compressed; then only [`DiskReader`] reads it.
    pub file: Option<(File, PathBuf)>,
    /// The runs of the layer, ascending.
    pub runs: Vec<(PageRange, PageContent)>,
}

impl DiskReader {
    /// The disk's layers, oldest first: later runs cover earlier ones. The oldest layer has all of
    /// the disk.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn layers(&self) -> Result<Vec<DiskLayerFile>, Error> {
        let layer = |layer: &LayerFile| {
            let runs = layer.index.runs.iter().map(|run| (run.range, run.kind)).collect();
            let clone = || layer.file.try_clone().map_err(|source| Error::file("opened", &layer.path, source));
            let file = (!layer.index.packed).then(clone).transpose()?;
            Ok(DiskLayerFile { file: file.map(|file| (file, layer.path.clone())), runs })
        };
        self.space().layers.iter().rev().map(layer).collect()
    }
}

/// Calls `with` for each chunk with pages of the space: the layer's number, the chunk, and the
/// wanted pages in it.
pub(crate) fn each_chunk(
    space: &ChainSpace,
    mut with: impl FnMut(usize, &LayerFile, &Chunk, &[PageRange]) -> Result<(), Error>,
) -> Result<(), Error> {
    chunks_of(space, |_| true).iter().try_for_each(|(at, number, wanted)| {
        let layer = &space.layers[*at];
        // A page that the map gives to a layer is data there, so there is a chunk of it.
        layer.index.chunk(*number).map_or(Ok(()), |chunk| with(*at, layer, chunk, wanted))
    })
}

/// A layer's number, a chunk's number, and the wanted pages in the chunk.
pub(crate) type WantedChunk = (usize, u64, Vec<PageRange>);

pub(crate) fn chunks_of(space: &ChainSpace, of: impl Fn(usize) -> bool) -> Vec<WantedChunk> {
    let mut wanted: std::collections::BTreeMap<(usize, u64), Vec<PageRange>> = std::collections::BTreeMap::new();
    for (range, place) in space.map.iter() {
        let PageSource::Layer(at) = *place else { continue };
        if !of(at) {
            continue;
        }
        for number in range.start() / CHUNK_PAGES..=(range.end() - 1) / CHUNK_PAGES {
            let part = range.intersect(PageRange::with_len(number * CHUNK_PAGES, CHUNK_PAGES));
            wanted.entry((at, number)).or_default().push(part);
        }
    }
    wanted.into_iter().map(|((at, number), ranges)| (at, number, ranges)).collect()
}

/// A chain as a space to be saved as a whole.
#[derive(Debug)]
pub(crate) struct MergedSpace<'a> {
    pub(crate) space: &'a ChainSpace,
    pub(crate) files: &'a crate::files::FileOps,
    /// Read by one thread, in order.
    pub(crate) last: Mutex<Last>,
}

impl Space for MergedSpace<'_> {
    fn bytes(&self) -> u64 {
        self.space.bytes
    }

    fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>> {
        let kind = |place: &PageSource| if *place == PageSource::Zero { PageContent::Zero } else { PageContent::Data };
        Ok(self.space.map.iter().map(|(range, place)| (range, kind(place))).collect())
    }

    /// Each chunk is compared with its checksum: a merged chain must not hide damage.
    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        let all = PageRange::with_len(page, bytes.len() as u64 >> PAGE_SHIFT);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for (range, place) in self.space.map.within(all) {
            let PageSource::Layer(at) = place else {
                bytes[((range.start() - page) << PAGE_SHIFT) as usize..][..range.bytes()].fill(0);
                continue;
            };
            let layer = &self.space.layers[at];
            let numbers = range.start() / CHUNK_PAGES..=(range.end() - 1) / CHUNK_PAGES;
            for chunk in numbers.filter_map(|number| layer.index.chunk(number)) {
                let data = match last.take() {
                    Some((was, number, data)) if was == at && number == chunk.number => data,
                    _ => layer.read_chunk(self.files, chunk, Vec::new()).map_err(io::Error::other)?,
                };
                layer.pick(chunk, &data, range, |part, data| {
                    bytes[((part.start() - page) << PAGE_SHIFT) as usize..][..part.bytes()].copy_from_slice(data);
                    Ok::<(), io::Error>(())
                })?;
                *last = Some((at, chunk.number, data));
            }
        }
        Ok(())
    }
}
