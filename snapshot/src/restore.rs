//! Restoring memory: layers of a snapshot become layers of VMs.
//!
//! An uncompressed layer is mapped as it is. Its file has each page at the page's own offset, so
//! adjacent pages are adjacent in the file. A hole between two of them reads as zeros, so one
//! mapping can span both. Other layers are copied into memory, and every chunk that is copied was
//! compared with its checksum.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use clade_memory::{
    BLOCK_PAGES, Backing, DontFork, ImageMap, LayerBuilder, LayerHandle, LayerSource, PAGE_SHIFT, PAGE_SIZE, PageRange,
    RamError, RamImage, RamLayout, Store,
};
use rustix::fs::{Advice, fadvise};

use crate::chain::{ChainSpace, PageSource, Snapshot};
use crate::disk::{WantedChunk, chunks_of};
use crate::error::Error;
use crate::files::{FileOps, len};
use crate::format::{Damage, NoForkKind};

/// Mappings of a region before larger gaps are spanned and short pieces copied.
const MAX_MAPPINGS: usize = 256;
/// Most zero pages between two pieces of one file that are mapped with them, at first.
const GAP: u64 = 16;
/// Most pages of a piece that is copied to save a mapping.
const MAX_SHORT: u64 = 512;

/// How memory is read from disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// On access, from the page cache, which all VMs of the snapshot share. Compressed layers are
    /// decompressed first. Mapped data is not compared with checksums.
    Lazy,
    /// All of it now, into huge pages. Each chunk is compared with its checksum.
    Preload,
    /// As [`Load::Lazy`], but these pages are read ahead: [`Snapshot::working_set`], or others.
    WorkingSet(Vec<PageRange>),
}

/// The owner of a piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The mapped file of the layer with this number.
    File(usize),
    /// The region's own layer, which is filled here.
    Draft,
}

type Pieces = Vec<(PageRange, Owner)>;

struct RegionDraft {
    /// The region's pages, in the space.
    all: PageRange,
    pieces: Pieces,
    draft: Option<LayerBuilder>,
}

impl RegionDraft {
    /// The page size of the region's own layer: huge pages, unless most of their memory would be
    /// unused.
    fn grain(&self) -> Backing {
        let (mut pages, mut blocks, mut counted) = (0, 0, 0);
        for (range, _) in self.pieces.iter().filter(|(_, owner)| *owner == Owner::Draft) {
            let (first, end) = (range.start() - self.all.start(), range.end() - self.all.start());
            let first_block = (first / BLOCK_PAGES).max(counted);
            pages += range.len();
            counted = end.div_ceil(BLOCK_PAGES);
            blocks += counted.saturating_sub(first_block);
        }
        if blocks * BLOCK_PAGES <= 2 * pages { Backing::Huge } else { Backing::Small }
    }
}

impl Snapshot {
    /// The snapshot's memory as an image. Any number of VMs in this process can start from it, and
    /// incremental snapshots can be saved on top of it.
    ///
    /// # Errors
    /// When the snapshot is of another architecture, a file has become shorter, a chunk that is
    /// read is damaged, or there is no memory.
    pub fn restore_ram(&self, store: &Store, load: &Load) -> Result<RamImage, Error> {
        let (ours, theirs) = (std::env::consts::ARCH, &self.manifest().machine);
        if ours != theirs {
            return Err(Error::Machine { path: self.dir().to_owned(), theirs: theirs.clone(), ours });
        }
        let space = &self.0.memory;
        let layout = self.layout()?;
        let mapped = |at: usize| *load != Load::Preload && !space.layers[at].index.packed;
        let mut regions = regions(&layout, space, mapped);
        for region in &mut regions {
            if region.pieces.iter().any(|(_, owner)| *owner == Owner::Draft) {
                region.draft = Some(store.draft(region.all.len(), region.grain()).map_err(RamError::from)?);
            }
        }
        fill(&self.0.files, space, &regions, mapped)?;
        let files = self.layers(store, &regions)?;
        if let Load::WorkingSet(runs) = load {
            self.read_ahead(runs, mapped);
        }
        let mut maps = Vec::with_capacity(regions.len());
        for (region, declared) in regions.into_iter().zip(self.dont_fork(store)?) {
            let draft = region.draft.map(LayerBuilder::publish);
            let mut map = ImageMap::new();
            for (range, owner) in region.pieces {
                let local = PageRange::new(range.start() - region.all.start(), range.end() - region.all.start());
                let source = match owner {
                    Owner::File(at) => files[at].clone().map(|layer| LayerSource { layer, at: range.start() }),
                    Owner::Draft => draft.clone().map(|layer| LayerSource { layer, at: local.start() }),
                };
                if let Some(source) = source {
                    map.insert(local, source);
                }
            }
            maps.push((map, declared));
        }
        Ok(RamImage::from_parts(store, &layout, maps)?)
    }

    /// The mapped data files as layers.
    fn layers(&self, store: &Store, regions: &[RegionDraft]) -> Result<Vec<Option<LayerHandle>>, Error> {
        let space = &self.0.memory;
        let used = |at| regions.iter().flat_map(|region| &region.pieces).any(|(_, owner)| *owner == Owner::File(at));
        let layer = |(at, layer): (usize, &crate::layer::LayerFile)| {
            if !used(at) {
                return Ok(None);
            }
            // The length was checked when the file was opened, which may be long ago.
            let found = len(&layer.file, &layer.path)?;
            if found != layer.index.data_bytes {
                let damage = Damage::Length { what: "the data".to_owned(), wanted: layer.index.data_bytes, found };
                return Err(Error::damaged(&layer.path, damage));
            }
            let file = layer.file.try_clone().map_err(|source| Error::file("opened", &layer.path, source))?;
            Ok(Some(store.file_layer(file, space.pages()).map_err(RamError::from)?))
        };
        space.layers.iter().enumerate().map(layer).collect()
    }

    fn read_ahead(&self, runs: &[PageRange], mapped: impl Fn(usize) -> bool) {
        let space = &self.0.memory;
        for run in runs {
            for (range, place) in space.map.within(*run) {
                if let PageSource::Layer(at) = place
                    && mapped(at)
                {
                    // Best effort: without it the page is read on access.
                    let bytes = NonZero::new(range.len() << PAGE_SHIFT);
                    let _ = fadvise(&space.layers[at].file, range.offset(), bytes, Advice::WillNeed);
                }
            }
        }
    }

    fn dont_fork(&self, store: &Store) -> Result<Vec<Vec<(PageRange, DontFork)>>, Error> {
        let mut first = 0;
        let mut all = Vec::new();
        for region in &self.manifest().memory.regions {
            let mut declared = Vec::new();
            for entry in &region.no_fork {
                let what = match entry.kind {
                    NoForkKind::Absent => DontFork::Absent,
                    NoForkKind::Zeroed => DontFork::Zeroed,
                    NoForkKind::Fresh => {
                        let mut page = [0; PAGE_SIZE as usize];
                        self.read_page(first + entry.start, &mut page)?;
                        DontFork::Fresh(store.reference_page(&page).map_err(RamError::from)?)
                    }
                };
                declared.push((entry.range(), what));
            }
            all.push(declared);
            first += region.pages;
        }
        Ok(all)
    }

    /// Reads a page of memory. Its chunk is compared with its checksum.
    fn read_page(&self, page: u64, into: &mut [u8]) -> Result<(), Error> {
        let space = crate::disk::MergedSpace { space: &self.0.memory, files: &self.0.files, last: Default::default() };
        let read = crate::space::Space::read_pages(&space, page, into);
        read.map_err(|source| Error::Space { name: "memory".to_owned(), page, source })
    }
}

/// The owners of each region's pages.
fn regions(layout: &RamLayout, space: &ChainSpace, mapped: impl Fn(usize) -> bool) -> Vec<RegionDraft> {
    let mut first = 0;
    let mut regions = Vec::new();
    for (_, pages) in layout.ranges() {
        let all = PageRange::with_len(first, *pages);
        first += pages;
        let (mut gap, mut short) = (GAP, 0);
        let mut pieces = plan(space, all, gap, short, &mapped);
        while pieces.len() > MAX_MAPPINGS && gap < all.len() {
            gap *= 4;
            pieces = plan(space, all, gap, short, &mapped);
        }
        while pieces.len() > MAX_MAPPINGS && short < MAX_SHORT {
            short = (short * 2).max(1);
            pieces = plan(space, all, gap, short, &mapped);
        }
        regions.push(RegionDraft { all, pieces, draft: None });
    }
    regions
}

/// The pieces of a range, with gaps of up to `gap` zero pages spanned, and pieces of up to `short`
/// pages copied.
fn plan(space: &ChainSpace, all: PageRange, gap: u64, short: u64, mapped: impl Fn(usize) -> bool) -> Pieces {
    let owned = space.map.within(all).into_iter().filter_map(|(range, place)| match place {
        PageSource::Layer(at) if mapped(at) => Some((range, Owner::File(at))),
        PageSource::Layer(_) => Some((range, Owner::Draft)),
        PageSource::Zero => None,
    });
    let bridged = bridge(space, owned, gap);
    if short == 0 {
        return bridged;
    }
    let copied =
        bridged.into_iter().map(|(range, owner)| (range, if range.len() <= short { Owner::Draft } else { owner }));
    bridge(space, copied, gap)
}

fn bridge(space: &ChainSpace, pieces: impl Iterator<Item = (PageRange, Owner)>, gap: u64) -> Pieces {
    let mut out = Pieces::new();
    for (range, owner) in pieces {
        if let Some((last, before)) = out.last_mut()
            && *before == owner
            && range.start() - last.end() <= gap
        {
            let between = PageRange::new(last.end(), range.start());
            // Zeros in the space must be a hole in the file. The file may have data for pages that
            // are zeros in a later layer.
            let hole = match owner {
                Owner::File(at) => space.layers[at].index.data_within(between).next().is_none(),
                Owner::Draft => true,
            };
            if hole {
                *last = PageRange::new(last.start(), range.end());
                continue;
            }
        }
        out.push((range, owner));
    }
    out
}

/// Reads the data of the regions' own layers.
fn fill(
    files: &FileOps,
    space: &ChainSpace,
    regions: &[RegionDraft],
    mapped: impl Fn(usize) -> bool,
) -> Result<(), Error> {
    let mut todo = chunks_of(space, |at| !mapped(at));
    // Short pieces of mapped layers.
    for (range, place) in space.map.iter() {
        let PageSource::Layer(at) = *place else { continue };
        if !mapped(at) {
            continue;
        }
        for (piece, _) in regions.iter().flat_map(|region| drafted(region, range)) {
            let numbers = piece.start() / crate::format::CHUNK_PAGES..=(piece.end() - 1) / crate::format::CHUNK_PAGES;
            todo.extend(numbers.map(|number| (at, number, vec![piece])));
        }
    }
    if todo.is_empty() {
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(8).min(todo.len());
    thread::scope(|scope| {
        let work = || {
            let mut buffer = Vec::new();
            // Relaxed: each thread takes another number, and the list does not change.
            while let Some(wanted) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                buffer = copy(files, space, regions, wanted, buffer).inspect_err(|_| {
                    next.store(todo.len(), Ordering::Relaxed);
                })?;
            }
            Ok(())
        };
        // As many as the host gives: this thread takes what is left.
        let workers: Vec<_> =
            (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        let mine = work();
        let theirs =
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        theirs.fold(mine, Result::and)
    })
}

/// The parts of `range` that are in a region's own layer.
fn drafted(region: &RegionDraft, range: PageRange) -> impl Iterator<Item = (PageRange, Owner)> {
    let first = region.pieces.partition_point(|(piece, _)| piece.end() <= range.start());
    let touching = region.pieces[first..].iter().take_while(move |(piece, _)| piece.start() < range.end());
    touching
        .map(move |(piece, owner)| (piece.intersect(range), *owner))
        .filter(|(piece, owner)| *owner == Owner::Draft && !piece.is_empty())
}

fn copy(
    files: &FileOps,
    space: &ChainSpace,
    regions: &[RegionDraft],
    wanted: &WantedChunk,
    buffer: Vec<u8>,
) -> Result<Vec<u8>, Error> {
    let (at, number, ranges) = wanted;
    let layer = &space.layers[*at];
    let Some(chunk) = layer.index.chunk(*number) else { return Ok(buffer) };
    let bytes = layer.read_chunk(files, chunk, buffer)?;
    for wanted in ranges {
        layer.pick(chunk, &bytes, *wanted, |range, data| {
            for region in regions {
                let cut = range.intersect(region.all);
                if let Some(draft) = &region.draft
                    && !cut.is_empty()
                {
                    let data = &data[((cut.start() - range.start()) << PAGE_SHIFT) as usize..][..cut.bytes()];
                    draft.write_pages(cut.start() - region.all.start(), data)?;
                }
            }
            Ok::<(), Error>(())
        })?;
    }
    Ok(bytes)
}
