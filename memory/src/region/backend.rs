//! A region's memory as a file, for a device backend in another process (vhost-user).
//!
//! The backend maps the file and writes to it at any time, like a device that has pinned all of the
//! region. So the file comes with such a pin. While the pin is held, every freeze copies the region
//! instead of sharing it, and backend and guest continue to see each other's writes (I3).

use std::fs::File;
use std::sync::Arc;

use crate::layer::Layer;
use crate::region::GuestRegion;
use crate::region::pin::{Access, DmaPin, PinError, PinLifetime};

/// A region's memory file, for as long as it may be mapped by another process.
///
/// Drop it after the backend has unmapped the file: later writes by the backend reach no VM or,
/// after the next freeze, a layer shown to other VMs.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    pin: DmaPin,
}

impl SharedFile {
    /// The file. The region's first byte is the file's first. The file may be longer than the
    /// region: use [`SharedFile::len`].
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the region, all of which are in the file.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pin.len() as u64
    }

    /// Always false: a region has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pin.is_empty()
    }
}

impl GuestRegion {
    /// Returns the file that has all of this region's memory, with the whole region pinned.
    ///
    /// The file exists from [`GuestRam::populate`](crate::GuestRam::populate) to the first
    /// operation with another mapping: a freeze without such a pin, a discard, a reset, an
    /// eviction. A forked VM has no such file: its memory is its own copies over shared layers.
    ///
    /// # Errors
    /// [`PinError::NotInOneFile`] where there is no such file; the errors of a pin.
    pub fn share_file(self: &Arc<Self>) -> Result<SharedFile, PinError> {
        if !self.is_live() {
            return Err(PinError::Empty { base: self.base.0 });
        }
        // Before the pin, which would unshare all pages that are not in the file.
        self.whole_file()?;
        let pin = self.pin(self.range(), Access::Write, PinLifetime::LongTerm)?;
        // After the pin: pages mapped shared now stay so as long as it is held.
        let file = self.whole_file()?.file().try_clone().map_err(PinError::File)?;
        Ok(SharedFile { file, pin })
    }

    /// The base file, if all of the region is mapped shared over it.
    fn whole_file(&self) -> Result<Arc<Layer>, PinError> {
        let state = self.state_for_pin();
        let shared = state.space.mappings().base_pages();
        let base_file = state.space.base_file().filter(|_| shared == self.pages()).cloned();
        base_file.ok_or(PinError::NotInOneFile { base: self.base.0, pages: self.pages(), shared })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{FreezeMode, GuestRam, NoWriters, PAGE_SIZE, PageRange, Quiesced, RamLayout, Store};

    const PAGES: u64 = 1_200;

    fn word(ram: &GuestRam, page: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
    }

    #[test]
    fn i3_a_backend_in_another_process_goes_on_across_freezes() {
        for (store, mode) in
            [(Store::open().unwrap(), FreezeMode::Eager), (Store::open_small().unwrap(), FreezeMode::Auto)]
        {
            let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
            ram.populate().unwrap();
            (0..PAGES).for_each(|page| ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap());
            let shared = ram.regions()[0].share_file().unwrap();
            assert_eq!((shared.len(), shared.is_empty()), (PAGES * PAGE_SIZE, false));
            let quiesced = Quiesced::by(&NoWriters);
            for round in 0..2 {
                let (image, report) = ram.freeze_in(mode, &quiesced).unwrap();
                assert_eq!((report.pinned, report.remapped), (PAGES, 0));
                // The backend writes, the guest writes: each sees the other, no child does.
                shared.file().write_all_at(&(700u64 + round).to_ne_bytes(), 7 * PAGE_SIZE).unwrap();
                ram.memory().write_obj(900 + round, GuestAddress(9 * PAGE_SIZE)).unwrap();
                let mut seen = [0; 8];
                shared.file().read_exact_at(&mut seen, 9 * PAGE_SIZE).unwrap();
                assert_eq!((word(&ram, 7), u64::from_ne_bytes(seen)), (700 + round, 900 + round));
                let child = GuestRam::reserve(image.layout(), &store).unwrap();
                child.adopt(&image).unwrap();
                let before = if round == 0 { (8, 10) } else { (700, 900) };
                assert_eq!((word(&child, 7), word(&child, 9)), before);
                assert!(matches!(
                    child.regions()[0].share_file(),
                    Err(PinError::NotInOneFile { pages: PAGES, shared: 0, .. })
                ));
                assert_eq!(child.stats().unwrap().exclusive, 0, "what is refused unshares nothing");
                ram.check(&quiesced).unwrap();
            }
            drop(shared);
            let (_, report) = ram.freeze_in(mode, &quiesced).unwrap();
            assert_eq!(report.pinned, 0, "the pin is gone");
        }
    }

    #[test]
    fn a_region_that_is_not_one_file_has_none_to_share() {
        let store = Store::open_small().unwrap();
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
        assert!(matches!(ram.regions()[0].share_file(), Err(PinError::Empty { .. })));
        ram.populate().unwrap();
        ram.regions()[0].discard(PageRange::new(3, 4)).unwrap();
        let refused = ram.regions()[0].share_file();
        let shared = PAGES - 1;
        assert!(matches!(refused, Err(PinError::NotInOneFile { shared: s, .. }) if s == shared), "{refused:?}");
        assert_eq!(ram.regions()[0].ownership().counts(ram.regions()[0].range()).pins, 0, "nothing stays pinned");
    }
}
