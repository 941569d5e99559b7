//! Taking images apart and assembling them, for snapshots on disk.
//!
//! A writer of images gets the layer of each page from [`RamImage::maps`] and reads layers by their
//! descriptors ([`LayerHandle::read_pages`]). A reader of images makes layers from existing files
//! ([`Store::file_layer`], never written) or fills new ones ([`LayerBuilder`], not shared before it
//! is complete, I4), and assembles an image of them ([`RamImage::from_parts`]).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::backing::Backing;
use crate::error::RamError;
use crate::handle::{ImageMap, LayerHandle, check_length, image_map, layer_map};
use crate::layer::registry::View;
use crate::layer::{Layer, LayerMap, LayerStorage};
use crate::layout::RamLayout;
use crate::ram::{GuestRam, RamImage};
use crate::region::dont_fork::{DontFork, DontForkMap};
use crate::region::freeze::RegionImage;
use crate::store::{Store, StoreError};
use crate::units::{PAGE_SIZE, PageRange, join_runs, subtract_runs};

/// A layer that is being filled by its maker.
#[derive(Debug)]
pub struct LayerBuilder(Layer);

impl LayerBuilder {
    /// Writes whole pages at the given page of the layer.
    ///
    /// # Errors
    /// If memory runs out, or the pages are beyond the end.
    pub fn write_pages(&self, at: u64, bytes: &[u8]) -> Result<(), RamError> {
        let pages = (bytes.len() as u64).div_ceil(PAGE_SIZE);
        let range = PageRange::with_len(at, pages);
        if !PageRange::new(0, self.0.pages()).covers(range) {
            return Err(RamError::OutOfRange { range, pages: self.0.pages() });
        }
        self.0.file().write_all_at(bytes, range.offset()).map_err(|source| RamError::Copy { pages, source })
    }

    /// Ends writing. From here on the layer never changes (I4).
    #[must_use]
    pub fn publish(self) -> LayerHandle {
        LayerHandle::new(&Arc::new(self.0))
    }
}

impl Store {
    /// Makes a layer of the first `pages` pages of a file. The file is mapped as it is and never
    /// written: pages are read on first touch, and all mappings share its page cache. The file must
    /// not be changed. If it is truncated, accesses to the missing pages fail (KVM_RUN and system
    /// calls: EFAULT; this process: SIGBUS).
    ///
    /// # Errors
    /// If the file is shorter.
    pub fn file_layer(&self, file: File, pages: u64) -> Result<LayerHandle, StoreError> {
        check_length(&file, pages)?;
        Ok(LayerHandle::new(&Arc::new(self.adopt_file(file, pages, LayerStorage::File))))
    }

    /// Makes a layer of the first `pages` pages of a memory file that another process published
    /// ([`LayerHandle::read_only_file`]). The file is mapped as it is and never written. `lease`
    /// stays open as long as this process uses the layer; the publisher keeps the pages until then.
    ///
    /// # Errors
    /// If the file is shorter, or open for writing.
    pub fn foreign_layer(&self, file: File, pages: u64, lease: Arc<OwnedFd>) -> Result<LayerHandle, StoreError> {
        check_foreign(&file, pages)?;
        Ok(LayerHandle::new(&Arc::new(self.adopt_file(file, pages, LayerStorage::Foreign).under(lease))))
    }

    /// The same of a file that is the one of `known`, which has been published again: the layers have
    /// the same identity, and each keeps its own lease. Pages that only the later image shows are kept by
    /// the later lease alone.
    ///
    /// # Errors
    /// As for [`Self::foreign_layer`].
    pub fn foreign_layer_again(
        &self,
        known: &LayerHandle,
        file: File,
        lease: Arc<OwnedFd>,
    ) -> Result<LayerHandle, StoreError> {
        let (id, pages) = (known.id(), known.pages());
        check_foreign(&file, pages)?;
        let layer = self.adopt_file_as(id, file, pages, LayerStorage::Foreign);
        Ok(LayerHandle::new(&Arc::new(layer.under(lease))))
    }

    /// Makes a layer of `pages` zero pages in memory, to be filled.
    ///
    /// # Errors
    /// If no memory file can be created.
    pub fn draft(&self, pages: u64, grain: Backing) -> Result<LayerBuilder, StoreError> {
        self.layer(pages, grain).map(LayerBuilder)
    }
}

/// Checks a file that another process has published.
fn check_foreign(file: &File, pages: u64) -> Result<(), StoreError> {
    check_length(file, pages)?;
    let mode = rustix::fs::fcntl_getfl(file).map_err(|errno| StoreError::File { pages, source: errno.into() })?;
    if mode & OFlags::ACCMODE != OFlags::RDONLY { Err(StoreError::Writable) } else { Ok(()) }
}

impl RamImage {
    /// Assembles an image of these maps and no-fork declarations, one pair for each range of the
    /// layout.
    ///
    /// # Errors
    /// If a map reaches beyond its range, or beyond a layer.
    #[expect(clippy::needless_pass_by_value, reason = "the handles are held to the end, see below")]
    pub fn from_parts(
        store: &Store,
        layout: &RamLayout,
        maps: Vec<(ImageMap, Vec<(PageRange, DontFork)>)>,
    ) -> Result<Self, RamError> {
        let wrong = |what: String| RamError::Parts { what };
        if maps.len() != layout.ranges().len() {
            return Err(wrong(format!("{} maps for {} ranges", maps.len(), layout.ranges().len())));
        }
        let mut regions = Vec::with_capacity(maps.len());
        // The handles in `maps` are held until the views of all regions are registered. Between two
        // registrations the views may show only part of a layer.
        for ((base, pages), (map, declared)) in layout.ranges().iter().zip(&maps) {
            let all = PageRange::new(0, *pages);
            for (range, source) in map.iter() {
                let end = source.at.saturating_add(range.len());
                if !all.covers(range) || end > source.layer.pages() {
                    return Err(wrong(format!("{range} of the {pages} pages at {:#x} from {source:?}", base.0)));
                }
            }
            let mut dont_fork = DontForkMap::new();
            for (range, what) in declared {
                if !all.covers(*range) {
                    return Err(wrong(format!("{range} of the {pages} pages at {:#x} are not inherited", base.0)));
                }
                dont_fork.insert(*range, what.clone());
            }
            let map = Arc::new(View::new(store.views(), Arc::new(layer_map(map))));
            regions.push(RegionImage { map, dont_fork });
        }
        Ok(Self::of(layout.clone(), regions))
    }

    /// The layer map of each range of the layout. Pages in no entry are zeros. The handles keep the
    /// layers whole even after the image is dropped.
    pub fn maps(&self) -> impl Iterator<Item = ImageMap> {
        self.regions().iter().map(|region| image_map(&region.map))
    }

    /// The no-fork declarations of each range of the layout.
    pub fn dont_fork(&self) -> impl Iterator<Item = Vec<(PageRange, DontFork)>> {
        self.regions().iter().map(|region| region.dont_fork.iter().map(|(range, what)| (range, what.clone())).collect())
    }

    /// The pages that may differ between this image and an older one of the same shape, by range of
    /// the layout: all pages that are not the same page of the same layer. Layers never change
    /// (I4), so no difference is missed. Pages that were copied unchanged are included (I5).
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn changed_since(&self, base: &Self) -> Result<Vec<Vec<PageRange>>, RamError> {
        if base.layout() != self.layout() {
            return Err(RamError::Shape { image: base.layout().bytes(), guest: self.layout().bytes() });
        }
        let pairs = self.regions().iter().zip(base.regions());
        Ok(pairs.map(|(now, before)| differing(&now.map, &before.map)).collect())
    }
}

fn differing(now: &LayerMap, before: &LayerMap) -> Vec<PageRange> {
    let mut runs = Vec::new();
    let mut shown = Vec::new();
    for (range, source) in now.iter() {
        shown.push(range);
        let mut same = Vec::new();
        for (piece, was) in before.within(range) {
            let here = crate::layer::interval::Piece::advance(source, piece.start - range.start);
            if here.is(&was) {
                same.push(piece);
            }
        }
        runs.extend(subtract_runs(&[range], &same));
    }
    // Pages that became zeros.
    let had: Vec<PageRange> = before.iter().map(|(range, _)| range).collect();
    runs.extend(subtract_runs(&had, &shown));
    runs.sort_unstable();
    join_runs(&runs, 0)
}

impl GuestRam {
    /// The pages that the VM has touched since it got its memory, by range of the layout:
    /// candidates for readahead when another VM is started from the same snapshot. Fault-around
    /// adds neighbours of touched pages, and huge pages add whole blocks.
    ///
    /// # Errors
    /// If the page map cannot be read.
    pub fn touched(&self) -> Result<Vec<Vec<PageRange>>, RamError> {
        let mut all = Vec::with_capacity(self.regions().len());
        for region in self.regions() {
            let _state = region.live_state()?;
            all.push(region.store.pagemap().touched_runs(&region.at, region.range()).map_err(RamError::Harvest)?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::LayerSource;
    use crate::{PageRange, Quiesced, Swept};
    use vm_memory::{Bytes, GuestAddress};

    const PAGES: u64 = 64;

    fn layout() -> RamLayout {
        RamLayout::of_ranges(&[(GuestAddress(0), PAGES), (GuestAddress(0x10_0000), PAGES)]).unwrap()
    }

    fn put(ram: &GuestRam, gpa: u64, word: u64) {
        ram.memory().write_obj(word, GuestAddress(gpa)).unwrap();
    }

    fn word(ram: &GuestRam, gpa: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    #[test]
    fn ranges_that_cannot_be_are_refused_by_value() {
        let range = |start, pages| (GuestAddress(start), pages);
        for wrong in [
            vec![range(0, 0)],
            vec![range(1, 1)],
            vec![range(0x1000, 2), range(0x2000, 1)],
            vec![range(0x2000, 1), range(0, 1)],
            vec![range(u64::MAX - 0xfff, 1)],
            vec![range(0, u64::MAX)],
        ] {
            assert!(matches!(RamLayout::of_ranges(&wrong), Err(RamError::Range { .. })), "{wrong:?}");
        }
        assert!(matches!(RamLayout::of_ranges(&[]), Err(RamError::NoMemory)));
        let far = [range(1 << 47, 1)];
        assert!(matches!(RamLayout::of_ranges(&far), Err(RamError::TooLarge { .. })));
        assert_eq!(
            RamLayout::new(8 << 30).unwrap(),
            RamLayout::of_ranges(RamLayout::new(8 << 30).unwrap().ranges()).unwrap()
        );
    }

    #[test]
    fn what_changed_is_what_was_written_or_dropped() {
        let store = Store::open().unwrap();
        let ram = GuestRam::reserve(&layout(), &store).unwrap();
        ram.populate().unwrap();
        put(&ram, 0x5000, 5);
        let (first, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        let (same, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        assert_eq!(same.changed_since(&first).unwrap(), vec![vec![], vec![]]);
        put(&ram, 0x7000, 7);
        put(&ram, 0x10_0000, 9);
        ram.regions()[0].discard(PageRange::new(20, 22)).unwrap();
        let (second, _) = ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        let r = PageRange::new;
        assert_eq!(second.changed_since(&first).unwrap(), vec![vec![r(7, 8), r(20, 22)], vec![r(0, 1)]]);
        let other = RamImage::from_parts(&store, &RamLayout::new(4096).unwrap(), vec![Default::default()]).unwrap();
        assert!(matches!(second.changed_since(&other), Err(RamError::Shape { image: 4096, guest: 0x8_0000 })));
    }

    #[test]
    fn i4_an_image_over_a_file_starts_vms_that_share_it_and_no_sweep_touches_it() {
        let store = Store::open().unwrap();
        let path = std::env::temp_dir().join(format!("clade-parts-{}", std::process::id()));
        let bytes: Vec<u8> = (0..2 * PAGES).flat_map(|p| vec![p as u8 + 1; 4096]).collect();
        std::fs::write(&path, &bytes).unwrap();
        // The sweep could write to the file, and must not.
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert!(matches!(store.file_layer(file.try_clone().unwrap(), 2 * PAGES + 1), Err(StoreError::File { .. })));
        let layer = store.file_layer(file, 2 * PAGES).unwrap();
        let draft = store.draft(4, Backing::Small).unwrap();
        assert!(matches!(draft.write_pages(3, &[0; 8192]), Err(RamError::OutOfRange { .. })));
        draft.write_pages(2, &[0xee; 4096]).unwrap();
        let draft = draft.publish();
        let map = |at| {
            let mut map = ImageMap::new();
            // The first page shows zeros, so that a sweep would find a page to punch.
            map.insert(PageRange::new(1, PAGES), LayerSource { layer: layer.clone(), at: at + 1 });
            map.insert(PageRange::new(9, 10), LayerSource { layer: draft.clone(), at: 2 });
            (map, Vec::new())
        };
        let image = RamImage::from_parts(&store, &layout(), vec![map(0), map(PAGES)]).unwrap();
        let beyond = RamImage::from_parts(&store, &layout(), vec![map(0), map(PAGES + 1)]);
        assert!(matches!(beyond, Err(RamError::Parts { .. })));
        drop(beyond);
        let vms: Vec<GuestRam> = (0..2).map(|_| GuestRam::reserve(&layout(), &store).unwrap()).collect();
        vms.iter().for_each(|ram| ram.adopt(&image).unwrap());
        put(&vms[0], 0x2000, 77);
        assert_eq!((word(&vms[0], 0x2000), word(&vms[1], 0x2000)), (77, 0x0303_0303_0303_0303));
        assert_eq!((word(&vms[0], 0), word(&vms[0], 0x9000)), (0, 0xeeee_eeee_eeee_eeee));
        assert_eq!(word(&vms[1], 0x10_0000 + 0x3000), 0x4444_4444_4444_4444);
        // A holder of a handle or of the map may read any page of the layer.
        let map = image.maps().next().unwrap();
        for handle in [Some(draft), map.get(9).map(|source| source.layer)] {
            assert_eq!(store.sweep(), Swept::default());
            let mut page = [1; 4096];
            handle.unwrap().read_pages(3, &mut page).unwrap();
            assert_eq!(page, [0; 4096]);
        }
        drop((map, layer));
        // The sweep punches pages of the draft, and none of the file, which has no handle either.
        let swept = store.sweep();
        assert_eq!(swept, Swept { pages: 3, layers: 1 });
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "the file is as it was");
        let (later, _) = vms[0].freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        assert_eq!(later.changed_since(&image).unwrap(), vec![vec![PageRange::new(2, 3)], vec![]]);
        let touched = vms[0].touched().unwrap();
        assert!(touched[0].iter().any(|run| run.contains(2)) && !touched[1].iter().any(|run| run.contains(3)));
        let mut page = [0; 4096];
        let layer = image.maps().next().unwrap().get(1).unwrap().layer;
        layer.read_pages(3, &mut page).unwrap();
        assert_eq!((page[0], layer.data_runs(PageRange::new(1, 3)).unwrap()), (4, vec![PageRange::new(1, 3)]));
        std::fs::remove_file(path).unwrap();
    }
}
