//! Files of layers that have gone, kept for the next freeze.
//!
//! A page of a fresh file costs the kernel's finding it, and the host's behind that where this is a virtual machine itself: 0.4-5.5 us, against 0.15 to copy
//! over one that is there. A VM that is forked a hundred times a second drops as many deltas, each about as large as the next.
//!
//! Only a freeze that copies at once takes from here, because it writes every page of its layer before anyone sees it: what the file held before is
//! nobody's to read. A layer's file comes here when nobody has the layer any more, and so nobody maps it: a mapping is replaced, or its region
//! unmapped, before the layer behind it is let go of.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use crate::store::Backing;

/// Files kept, of each kind.
const MOST: usize = 4;
/// Largest file kept, in pages.
pub(crate) const LARGEST: u64 = 2_048;

#[derive(Debug)]
struct Kept {
    grain: Backing,
    pages: u64,
    file: Arc<File>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Shelf(Mutex<Vec<Kept>>);

impl Shelf {
    fn with<T>(&self, f: impl FnOnce(&mut Vec<Kept>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A file in pages of `grain` that has room for `pages`, with anything in it: the smallest there is.
    pub(crate) fn take(&self, grain: Backing, pages: u64) -> Option<(Arc<File>, u64)> {
        self.with(|kept| {
            let fits = |kept: &Kept| kept.grain == grain && kept.pages >= pages;
            let fitting = kept.iter().enumerate().filter(|(_, kept)| fits(kept));
            let (at, _) = fitting.min_by_key(|(_, kept)| kept.pages)?;
            let Kept { pages, file, .. } = kept.swap_remove(at);
            Some((file, pages))
        })
    }

    /// Keeps a file that nobody uses, or lets it go: the smallest, if there are too many.
    pub(crate) fn put(&self, grain: Backing, pages: u64, file: Arc<File>) {
        if pages > LARGEST {
            return;
        }
        let gone = self.with(|kept| {
            kept.push(Kept { grain, pages, file });
            let same = kept.iter().enumerate().filter(|(_, kept)| kept.grain == grain);
            let (count, smallest) = (same.clone().count(), same.min_by_key(|(_, kept)| kept.pages).map(|(at, _)| at));
            smallest.filter(|_| count > MOST).map(|at| kept.swap_remove(at))
        });
        // Not under the lock: freeing its pages takes long.
        drop(gone);
    }

    /// Lets all of them go.
    pub(crate) fn clear(&self) {
        let gone = self.with(std::mem::take);
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, FreezeMode, GuestRam, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store, Term};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_smallest_that_fits_is_taken_and_few_are_kept() {
        let shelf = Shelf::default();
        let file = || Arc::new(tempfile::tempfile().unwrap());
        for pages in [10, 300, 20, 7, 40, 9_000] {
            shelf.put(Backing::Small, pages, file());
        }
        shelf.put(Backing::Huge, 512, file());
        let take = |grain, pages| shelf.take(grain, pages).map(|(_, pages)| pages);
        assert_eq!(take(Backing::Small, 15), Some(20));
        assert_eq!(take(Backing::Small, 15), Some(40));
        assert_eq!(take(Backing::Small, 301), None, "too large to be kept, or of the other kind");
        assert_eq!((take(Backing::Small, 1), take(Backing::Small, 1)), (Some(10), Some(300)), "the smallest went");
        assert_eq!((take(Backing::Small, 1), take(Backing::Huge, 1)), (None, Some(512)));
        shelf.put(Backing::Huge, 512, file());
        shelf.clear();
        assert_eq!(take(Backing::Huge, 1), None);
    }

    /// A VM is frozen again and again, and what each image and child shows stays what it was, whatever file it stands in.
    #[test]
    fn files_are_used_again_and_nobody_sees_it() {
        const PAGES: u64 = 1024;
        let (store, ram) = frozen(PAGES);
        let mut kept = Vec::new();
        for round in 1..40u64 {
            // Pages far apart, as many as are copied and shared, in numbers that differ.
            let written = (0..PAGES).step_by(2).take(300 + (round as usize * 37) % 150);
            written.clone().for_each(|page| put(&ram, page, round << 32 | page));
            let image = freeze(&ram);
            let model: Vec<u64> = (0..PAGES).map(|page| read(&ram, page)).collect();
            if round % 5 == 0 {
                let child = GuestRam::reserve(ram.layout(), &store).unwrap();
                child.adopt(&image).unwrap();
                kept.push((child, model));
            }
        }
        for (child, model) in &kept {
            for page in 0..PAGES {
                assert_eq!(read(child, page), model[page as usize], "page {page}");
            }
        }
        assert!(store.reused() > 10, "{} files were used again", store.reused());
    }

    /// Pages that stay this VM's own are copied at every freeze, into a layer that the next one supersedes, whatever else the VM writes.
    #[test]
    fn what_stays_is_copied_to_files_used_again() {
        const PAGES: u64 = 8192;
        let (store, ram) = frozen(PAGES);
        let region = &ram.regions()[0];
        for round in 0..20u64 {
            // Devices use these, and the VM writes more than a freeze leaves in place: each time elsewhere, so that it stays shown from its layer.
            drop(region.pin(PageRange::new(0, 200), Access::Write, Term::Short).unwrap());
            (0..200).for_each(|page| put(&ram, page, round));
            (0..300).for_each(|page| put(&ram, 1000 + round * 301 + page, round));
            let image = freeze(&ram);
            let child = GuestRam::reserve(ram.layout(), &store).unwrap();
            child.adopt(&image).unwrap();
            assert_eq!((read(&child, 7), read(&child, 1299 + round * 301)), (round, round));
        }
        // Two take turns.
        assert!(store.reused() >= 17, "{} files were used again", store.reused());
    }

    /// A VM's memory of which all was frozen once.
    fn frozen(pages: u64) -> (Store, GuestRam) {
        let store = Store::open_small().unwrap();
        let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), &store).unwrap();
        ram.birth().unwrap();
        freeze(&ram);
        (store, ram)
    }

    fn freeze(ram: &GuestRam) -> RamImage {
        ram.freeze_in(FreezeMode::Eager, &Quiesced::assume()).unwrap().0
    }

    fn put(ram: &GuestRam, page: u64, word: u64) {
        ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
    }

    fn read(ram: &GuestRam, page: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
    }
}
