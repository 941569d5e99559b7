//! Reading the files of a layer.

use std::fs::File;
use std::path::PathBuf;

use clade_memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};

use crate::content::PageContent;
use crate::dir::Dir;
use crate::error::Error;
use crate::files::{FileOps, len};
use crate::format::{CHUNK_PAGES, Chunk, Compression, Damage, Index, LayerEntry, checksum};

/// Most bytes of an index: enough for some 16 TiB of data in one piece, or 64 million runs.
const MAX_INDEX: u64 = 1 << 30;

/// A layer with open files. Its index and the length of its data file were checked.
#[derive(Debug)]
pub(crate) struct LayerFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) index: Index,
}

impl LayerFile {
    /// Opens the layer `name` in a snapshot's directory.
    pub(crate) fn open(files: &FileOps, dir: &Dir, name: &str, entry: &LayerEntry) -> Result<Self, Error> {
        let (index, data) = (format!("{name}.index"), format!("{name}.data"));
        let bytes = files.read_in(dir, &index, entry.index_bytes.min(MAX_INDEX))?;
        let index = Self::checked(&bytes, entry).map_err(|damage| Error::damaged(dir.path().join(index), damage))?;
        let file = files.open_in(dir, &data)?;
        let path = dir.path().join(data);
        let found = len(&file, &path)?;
        if found != index.data_bytes {
            let damage = Damage::Length { what: "the data".to_owned(), wanted: index.data_bytes, found };
            return Err(Error::damaged(path, damage));
        }
        Ok(Self { path, file, index })
    }

    fn checked(bytes: &[u8], entry: &LayerEntry) -> Result<Index, Damage> {
        let length = |what: &str, wanted, found| {
            if wanted == found { Ok(()) } else { Err(Damage::Length { what: what.to_owned(), wanted, found }) }
        };
        length("the index", entry.index_bytes, bytes.len() as u64)?;
        let index = Index::decode(bytes)?;
        // The index has its own checksum; this compares it with the manifest's.
        let found = sealed_sum(bytes);
        if entry.index_checksum != found {
            return Err(Damage::Checksum { what: "the index".to_owned(), wanted: entry.index_checksum, found });
        }
        length("the space", entry.bytes, index.bytes)?;
        length("the data file", entry.data_bytes, index.data_bytes)?;
        let pages = (index.count(PageContent::Data), index.count(PageContent::Zero));
        if pages != (entry.data_pages, entry.zero_pages) {
            let value = format!("{pages:?}, with {:?} in the manifest", (entry.data_pages, entry.zero_pages));
            return Err(Damage::value("the numbers of data and zero pages", &value));
        }
        if index.packed != (entry.compression == Compression::Zstd) {
            return Err(Damage::value("the compression", &format!("{:?}", entry.compression)));
        }
        Ok(index)
    }

    /// The data pages of a chunk, one behind the other, after its checksum was compared. `into` is
    /// returned, so that it is allocated once.
    pub(crate) fn read_chunk(&self, files: &FileOps, chunk: &Chunk, mut into: Vec<u8>) -> Result<Vec<u8>, Error> {
        into.clear();
        into.resize(chunk.stored as usize, 0);
        if self.index.packed {
            files.read_exact_at(&self.file, &self.path, &mut into, chunk.offset)?;
        } else {
            let mut rest = into.as_mut_slice();
            for range in self.index.data_of(chunk.number) {
                let (part, after) = rest.split_at_mut(range.bytes());
                files.read_exact_at(&self.file, &self.path, part, range.offset())?;
                rest = after;
            }
        }
        let found = checksum(&into);
        if found != chunk.sum {
            let what = format!("the chunk at page {:#x}", chunk.number * CHUNK_PAGES);
            return Err(Error::damaged(&self.path, Damage::Checksum { what, wanted: chunk.sum, found }));
        }
        let pages: u64 = self.index.data_of(chunk.number).map(PageRange::len).sum();
        if into.len() as u64 == pages << PAGE_SHIFT {
            return Ok(into);
        }
        let damaged = |why: String| Error::damaged(&self.path, Damage::Compressed { chunk: chunk.number, why });
        let out = zstd::bulk::decompress(&into, (pages << PAGE_SHIFT) as usize);
        let out = out.map_err(|error| damaged(error.to_string()))?;
        if out.len() as u64 != pages << PAGE_SHIFT {
            return Err(damaged(format!("it has {} bytes, not {}", out.len(), pages << PAGE_SHIFT)));
        }
        Ok(out)
    }

    /// Calls `with` for each piece of `wanted`, all in one chunk, with its bytes in the result of
    /// [`Self::read_chunk`].
    pub(crate) fn pick<E>(
        &self,
        chunk: &Chunk,
        bytes: &[u8],
        wanted: PageRange,
        mut with: impl FnMut(PageRange, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        for range in self.index.data_of(chunk.number) {
            let cut = range.intersect(wanted);
            if !cut.is_empty() {
                let from = at + ((cut.start() - range.start()) * PAGE_SIZE) as usize;
                with(cut, &bytes[from..from + cut.bytes()])?;
            }
            at += range.bytes();
        }
        Ok(())
    }
}

/// The checksum at the end of a sealed file.
pub(crate) fn sealed_sum(bytes: &[u8]) -> u64 {
    bytes.last_chunk::<8>().map_or(0, |sum| u64::from_le_bytes(*sum))
}
