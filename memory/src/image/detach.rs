//! Detaching: copies an image's layers, so that no other process can write the pages it shows.
//!
//! A layer that another process published is a file which that process may still write to: its
//! descriptors are read-only here alone. A copy is made once, and its file is in no other process.

use std::collections::{BTreeMap, HashMap};

use crate::backing::Backing;
use crate::error::RamError;
use crate::handle::{ImageMap, LayerHandle, LayerSource};
use crate::layer::LayerId;
use crate::ram::RamImage;
use crate::store::Store;
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange, join_runs, pages_in, subtract_runs};

/// Pages that are copied at once: few, because the buffer's first use costs as much as a page of the copy.
const CHUNK: u64 = 16;

/// Pages of a layer, and the layer that has copies of them at the same offsets.
#[derive(Clone, Debug)]
pub struct CopiedRuns {
    /// The copy.
    pub copy: LayerHandle,
    /// The pages, ascending.
    pub runs: Vec<PageRange>,
}

/// What a detachment does with a layer.
#[derive(Clone, Debug)]
pub enum LayerTreatment {
    /// It stays as it is.
    Keep,
    /// It is copied, except for pages that were copied before. Layers do not change (I4), so these are
    /// the same.
    Copy(Vec<CopiedRuns>),
}

/// The copy of a layer's pages that a detachment has made.
#[derive(Clone, Debug)]
pub struct MadeCopy {
    /// The layer.
    pub of: LayerId,
    /// Its pages that were copied, and the copy.
    pub made: CopiedRuns,
}

/// Counts of a detachment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DetachedRam {
    /// Layers copied.
    pub copied_layers: u64,
    /// Layers that stay as they are, or of which all pages were copied before.
    pub shared_layers: u64,
    /// Pages written to copies: those that are shown and not zeros.
    pub copied_pages: u64,
}

/// The pages of one layer that an image shows.
struct ShownLayer {
    layer: LayerHandle,
    runs: Vec<PageRange>,
}

/// A layer's pages that are to be copied: all of them, and those with data.
struct Missing {
    of: LayerId,
    layer: LayerHandle,
    runs: Vec<PageRange>,
    data: Vec<PageRange>,
}

impl RamImage {
    /// Returns an image of the same pages. Layers are copied as far as the image shows them and as
    /// `treatment` demands, to new layers of this process. The copies have at most `room` pages.
    ///
    /// # Errors
    /// When the copies exceed `room`, before any is made; when a layer cannot be read, or memory runs
    /// out; that of `treatment`.
    pub fn detached(
        &self,
        store: &Store,
        room: u64,
        treatment: &dyn Fn(&LayerHandle) -> Result<LayerTreatment, RamError>,
    ) -> Result<(Self, DetachedRam, Vec<MadeCopy>), RamError> {
        let maps: Vec<ImageMap> = self.maps().collect();
        let mut shown: BTreeMap<LayerId, ShownLayer> = BTreeMap::new();
        for (range, source) in maps.iter().flat_map(ImageMap::iter) {
            let fresh = || ShownLayer { layer: source.layer.clone(), runs: Vec::new() };
            let layer = shown.entry(source.layer.id()).or_insert_with(fresh);
            layer.runs.push(PageRange::with_len(source.at, range.len()));
        }
        let mut done = DetachedRam::default();
        let mut copies: HashMap<LayerId, Vec<CopiedRuns>> = HashMap::new();
        let mut missing = Vec::new();
        for (of, ShownLayer { layer, mut runs }) in shown {
            let LayerTreatment::Copy(known) = treatment(&layer)? else {
                done.shared_layers += 1;
                continue;
            };
            // Regions, and runs of one region, may show the same pages.
            runs.sort_unstable();
            let mut runs = join_runs(&runs, 0);
            known.iter().for_each(|known| runs = subtract_runs(&runs, &known.runs));
            copies.insert(of, known);
            if runs.is_empty() {
                done.shared_layers += 1;
                continue;
            }
            let mut data = Vec::new();
            for run in &runs {
                data.extend(layer.data_runs(*run)?);
            }
            missing.push(Missing { of, layer, runs, data });
        }
        let pages = missing.iter().map(|missing| pages_in(&missing.data)).sum();
        if pages > room {
            return Err(RamError::DetachRoom { pages, room });
        }
        let mut all_made = Vec::new();
        for Missing { of, layer, runs, data } in missing {
            let made = CopiedRuns { copy: copied(store, &layer, &data, &mut done)?, runs };
            copies.entry(of).or_default().push(made.clone());
            all_made.push(MadeCopy { of, made });
        }
        let parts = maps.iter().map(|map| replaced(map, &copies)).zip(self.dont_fork()).collect();
        Ok((Self::from_parts(store, self.layout(), parts)?, done, all_made))
    }
}

/// The map with copies in place of their layers.
fn replaced(map: &ImageMap, copies: &HashMap<LayerId, Vec<CopiedRuns>>) -> ImageMap {
    let mut now = ImageMap::new();
    for (range, source) in map.iter() {
        let Some(copies) = copies.get(&source.layer.id()) else {
            now.insert(range, source.clone());
            continue;
        };
        let mut left = vec![PageRange::with_len(source.at, range.len())];
        for CopiedRuns { copy, runs } in copies {
            // Runs are many, and so are pieces of a map.
            let runs = &runs[runs.partition_point(|run| run.end <= source.at)..];
            let rest = subtract_runs(&left, runs);
            for piece in subtract_runs(&left, &rest) {
                let start = range.start + (piece.start - source.at);
                now.insert(
                    PageRange::with_len(start, piece.len()),
                    LayerSource { layer: copy.clone(), at: piece.start },
                );
            }
            left = rest;
        }
        debug_assert!(left.is_empty(), "{left:?} of {source:?} have no copy");
    }
    now
}

/// Copies the pages `data` of a layer to the same pages of a new one. Pages of zeros stay holes.
fn copied(
    store: &Store,
    layer: &LayerHandle,
    data: &[PageRange],
    done: &mut DetachedRam,
) -> Result<LayerHandle, RamError> {
    let copy = store.draft(layer.pages(), grain(data))?;
    let mut buffer = vec![0; (CHUNK * PAGE_SIZE) as usize];
    for run in data {
        let mut at = run.start;
        while at < run.end {
            let pages = CHUNK.min(run.end - at);
            let bytes = &mut buffer[..(pages * PAGE_SIZE) as usize];
            layer.read_pages(at, bytes)?;
            done.copied_pages += write_nonzero(&copy, at, bytes)?;
            at += pages;
        }
    }
    done.copied_layers += 1;
    Ok(copy.publish())
}

/// Chooses the pages of a copy: huge ones if at least three quarters of the blocks' pages have data. In
/// huge pages, a lone page would take a whole block.
fn grain(data: &[PageRange]) -> Backing {
    let whole =
        |run: &PageRange| PageRange::new(run.start / BLOCK_PAGES * BLOCK_PAGES, run.end.next_multiple_of(BLOCK_PAGES));
    let blocks = join_runs(&data.iter().map(whole).collect::<Vec<_>>(), 0);
    if 4 * pages_in(data) >= 3 * pages_in(&blocks) { Backing::Huge } else { Backing::Small }
}

/// Writes the pages of `bytes` that are not zeros, with a call for each run of them. Returns their
/// number.
fn write_nonzero(copy: &crate::LayerBuilder, at: u64, bytes: &[u8]) -> Result<u64, RamError> {
    let page = PAGE_SIZE as usize;
    let is_zero: Vec<bool> = bytes.chunks(page).map(|page| page.iter().all(|byte| *byte == 0)).collect();
    let (mut first, mut written) = (0, 0);
    for run in is_zero.chunk_by(|a, b| a == b) {
        if !run[0] {
            copy.write_pages(at + first as u64, &bytes[first * page..(first + run.len()) * page])?;
            written += run.len() as u64;
        }
        first += run.len();
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::region::dont_fork::DontFork;
    use crate::{GuestRam, Quiesced, RamLayout};
    use vm_memory::{Bytes, GuestAddress};

    const PAGES: u64 = 2 * BLOCK_PAGES;
    const FAR: u64 = 0x1000_0000;
    const COPY: LayerTreatment = LayerTreatment::Copy(Vec::new());

    fn gpa(region: usize, page: u64) -> GuestAddress {
        GuestAddress(region as u64 * FAR + page * PAGE_SIZE)
    }

    fn word(ram: &GuestRam, region: usize, page: u64) -> u64 {
        ram.memory().read_obj(gpa(region, page)).unwrap()
    }

    /// A VM of two regions, and two images of it: of its base file, and of a delta above that.
    fn vm(store: &Store) -> (GuestRam, [RamImage; 2]) {
        let layout = RamLayout::of_ranges(&[(gpa(0, 0), PAGES), (gpa(1, 0), PAGES)]).unwrap();
        let ram = GuestRam::reserve(&layout, store).unwrap();
        ram.populate().unwrap();
        let put = |region, page, word: u64| ram.memory().write_obj(word, gpa(region, page)).unwrap();
        (0..700).for_each(|page| put(0, page, page + 1));
        put(1, 900, 77);
        let quiesced = Quiesced::by(&crate::NoWriters);
        let first = ram.freeze_in(crate::FreezeMode::Eager, &quiesced).unwrap().0;
        (100..200).for_each(|page| put(0, page, page + 1000));
        ram.regions()[0].set_dont_fork(PageRange::new(300, 302), Some(DontFork::Zeroed)).unwrap();
        let second = ram.freeze_in(crate::FreezeMode::Eager, &quiesced).unwrap().0;
        (ram, [first, second])
    }

    fn child(store: &Store, image: &RamImage) -> GuestRam {
        let child = GuestRam::reserve(image.layout(), store).unwrap();
        child.adopt(image).unwrap();
        child
    }

    fn expect(ram: &GuestRam, hidden: &[u64], delta: u64) {
        for page in 0..PAGES {
            let wanted = match page {
                _ if hidden.contains(&page) => 0,
                100..200 => page + delta,
                0..700 => page + 1,
                _ => 0,
            };
            assert_eq!(word(ram, 0, page), wanted, "page {page}");
            assert_eq!(word(ram, 1, page), if page == 900 { 77 } else { 0 }, "page {page} of the second region");
        }
    }

    /// Writes to every file of an image as its giver could.
    fn overwrite(image: &RamImage) {
        let runs = |map: ImageMap| map.iter().map(|(range, source)| (range, source.clone())).collect::<Vec<_>>();
        for (range, source) in image.maps().flat_map(runs) {
            let file = std::fs::File::from(std::os::fd::AsFd::as_fd(&source.layer).try_clone_to_owned().unwrap());
            (0..range.len()).for_each(|page| file.write_all_at(&[0xff; 8], (source.at + page) * PAGE_SIZE).unwrap());
        }
    }

    #[test]
    fn i4_a_detached_image_has_its_pages_whatever_the_giver_writes() {
        for open in [Store::open, Store::open_small] {
            let (giver, keeper) = (open().unwrap(), open().unwrap());
            let (ram, images) = vm(&giver);
            let detached = images.each_ref().map(|image| image.detached(&keeper, u64::MAX, &|_| Ok(COPY)).unwrap());
            assert_eq!(detached[0].1, DetachedRam { copied_layers: 2, shared_layers: 0, copied_pages: 701 });
            // The delta shows the pages that the base no longer does, which are not copied again.
            assert_eq!((detached[1].1.copied_layers, detached[1].1.copied_pages), (3, 699));
            images.iter().for_each(overwrite);
            drop((ram, images));
            for ((image, ..), (hidden, delta)) in detached.iter().zip([(&[][..], 1), (&[300, 301], 1000)]) {
                let one = child(&keeper, image);
                expect(&one, hidden, delta);
                // A write of one is not another's.
                one.memory().write_obj(5u64, gpa(0, 3)).unwrap();
                expect(&child(&keeper, image), hidden, delta);
            }
            // No-fork ranges are declared in the copy too.
            assert_eq!(detached[1].0.dont_fork().next().unwrap().len(), 1);
            drop(detached);
            keeper.expect_no_layers();
        }
    }

    #[test]
    fn layers_that_are_safe_are_not_copied() {
        let store = Store::open_small().unwrap();
        let (_ram, [first, second]) = vm(&store);
        let (copy, done, _) = first.detached(&store, u64::MAX, &|_| Ok(COPY)).unwrap();
        assert_eq!(done.copied_layers, 2);
        let (again, done, _) = copy.detached(&store, u64::MAX, &|_| Ok(LayerTreatment::Keep)).unwrap();
        assert_eq!(done, DetachedRam { copied_layers: 0, shared_layers: 2, copied_pages: 0 });
        assert_eq!(again.changed_since(&copy).unwrap(), vec![vec![], vec![]]);
        // The layers of an earlier image are safe, and the delta is not.
        let layers = |map: ImageMap| map.iter().map(|(_, source)| source.layer.id()).collect::<Vec<_>>();
        let old: Vec<LayerId> = first.maps().flat_map(layers).collect();
        let (mixed, done, _) = second
            .detached(&store, u64::MAX, &|layer| {
                Ok(if old.contains(&layer.id()) { LayerTreatment::Keep } else { COPY })
            })
            .unwrap();
        assert_eq!(done, DetachedRam { copied_layers: 1, shared_layers: 2, copied_pages: 100 });
        expect(&child(&store, &mixed), &[300, 301], 1000);
        let refused = second.detached(&store, u64::MAX, &|_| Err(RamError::NoMemory)).map(drop);
        assert!(matches!(refused, Err(RamError::NoMemory)));
        // Before a copy is made. Pages that were only read are there too.
        let layers = store.live_layers();
        let pages = match second.detached(&store, 1, &|_| Ok(COPY)) {
            Err(RamError::DetachRoom { pages, room: 1 }) => pages,
            other => panic!("{other:?}"),
        };
        assert!((699..2 * PAGES).contains(&pages) && store.live_layers() == layers, "{pages}");
        assert!(second.detached(&store, pages - 1, &|_| Ok(COPY)).is_err());
        second.detached(&store, pages, &|_| Ok(COPY)).unwrap();
    }

    /// The second image of a VM shows pages that were copied for the first, and others.
    #[test]
    fn pages_that_were_copied_before_are_not_copied_again() {
        for open in [Store::open, Store::open_small] {
            let (giver, keeper) = (open().unwrap(), open().unwrap());
            let (ram, images) = vm(&giver);
            let mut known: HashMap<LayerId, Vec<CopiedRuns>> = HashMap::new();
            let copy = |image: &RamImage, known: &HashMap<LayerId, Vec<CopiedRuns>>| {
                let treatment =
                    |layer: &LayerHandle| Ok(LayerTreatment::Copy(known.get(&layer.id()).cloned().unwrap_or_default()));
                image.detached(&keeper, u64::MAX, &treatment).unwrap()
            };
            // The second image first: it does not show all pages of the base file.
            let (second, done, made) = copy(&images[1], &known);
            assert_eq!((done.copied_layers, done.copied_pages, made.len()), (3, 699, 3));
            made.into_iter().for_each(|made| known.entry(made.of).or_default().push(made.made));
            let (first, done, made) = copy(&images[0], &known);
            // The hundred that the delta hides, and two that children do not inherit.
            assert_eq!(done, DetachedRam { copied_layers: 1, shared_layers: 1, copied_pages: 102 });
            assert_eq!(pages_in(&made[0].made.runs), 102);
            made.into_iter().for_each(|made| known.entry(made.of).or_default().push(made.made));
            let (third, done, _) = copy(&images[0], &known);
            assert_eq!(done, DetachedRam { copied_layers: 0, shared_layers: 2, copied_pages: 0 });
            images.iter().for_each(overwrite);
            drop((ram, images, known));
            for (image, hidden, delta) in [(&first, &[][..], 1), (&second, &[300, 301], 1000), (&third, &[], 1)] {
                expect(&child(&keeper, image), hidden, delta);
            }
        }
    }

    /// A giver can truncate its file. The copy then fails, and has no zeros in place of pages.
    #[test]
    fn a_truncated_layer_is_an_error() {
        let (giver, keeper) = (Store::open_small().unwrap(), Store::open_small().unwrap());
        let (_ram, [first, _]) = vm(&giver);
        for cut in [false, true] {
            let foreign = |_: &LayerHandle| -> Result<LayerHandle, RamError> {
                let source = first.maps().next().unwrap().get(0).unwrap().layer;
                let (_, lease) = std::io::pipe().unwrap();
                let file = source.read_only_file()?;
                Ok(keeper.foreign_layer(file, source.pages(), std::sync::Arc::new(lease.into()))?)
            };
            let layer = foreign(&first.maps().next().unwrap().get(0).unwrap().layer).unwrap();
            let mut map = ImageMap::new();
            map.insert(PageRange::new(0, PAGES), LayerSource { layer, at: 0 });
            let layout = RamLayout::of_ranges(&[(gpa(0, 0), PAGES)]).unwrap();
            let image = RamImage::from_parts(&keeper, &layout, vec![(map, Vec::new())]).unwrap();
            if cut {
                let source = first.maps().next().unwrap().get(0).unwrap().layer;
                let file = std::fs::File::from(std::os::fd::AsFd::as_fd(&source).try_clone_to_owned().unwrap());
                file.set_len(650 * PAGE_SIZE).unwrap();
            }
            let done = image.detached(&keeper, u64::MAX, &|_| Ok(COPY));
            assert_eq!(done.is_err(), cut, "{done:?}");
        }
    }

    #[test]
    fn sparse_layers_are_copied_in_small_pages() {
        let run = |start, pages| PageRange::with_len(start, pages);
        let most = 3 * BLOCK_PAGES / 4;
        assert_eq!(grain(&[]), Backing::Huge);
        assert_eq!(grain(&[run(0, most)]), Backing::Huge);
        assert_eq!(grain(&[run(0, most - 1)]), Backing::Small);
        assert_eq!(grain(&[run(0, 3 * BLOCK_PAGES), run(5 * BLOCK_PAGES, 1)]), Backing::Huge);
        assert_eq!(grain(&[run(0, BLOCK_PAGES), run(5 * BLOCK_PAGES, 1)]), Backing::Small);
        assert_eq!(grain(&[run(BLOCK_PAGES - 1, most + 1)]), Backing::Small);
    }
}
