//! Eviction: cold pages that a VM owns go to a file on disk, and are read back on access.
//!
//! An eviction freezes some pages into a layer whose file is on a disk. Afterwards the layer owns
//! them, the kernel may drop them from its page cache under pressure, and an access reads them
//! back. A pinned page is never evicted (I7, R12).

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, Mode, OFlags, fadvise, ftruncate, open};

use crate::error::RamError;
use crate::layer::{LayerOffset, LayerStorage};
use crate::ownership::TableGuard;
use crate::quiesce::Quiesced;
use crate::region::mappings::Mapping;
use crate::region::suspend::synced;
use crate::region::{GuestRegion, State, dont_fork};
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SHIFT, PageRange, join_runs, pages_in, subtract_runs};

/// Creates an unnamed file in `dir`, freed with its last user.
fn swap_file(dir: &Path, pages: u64) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    failpoint(Call::File)?;
    let fd = open(dir, flags, Mode::RUSR | Mode::WUSR)?;
    failpoint(Call::Size)?;
    ftruncate(&fd, pages << PAGE_SHIFT)?;
    Ok(fd.into())
}

/// Result of an eviction. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// This VM's own pages that were written to disk and dropped from memory.
    pub written: u64,
    /// Pages of a layer on disk (evicted earlier) that were dropped again, unless another VM shows
    /// them.
    pub dropped: u64,
}

impl GuestRegion {
    /// Writes the unpinned pages of `range` that this VM owns to a file in `dir` and drops them
    /// from memory, together with pages that layers on disk provide. No-fork pages stay. The only
    /// concurrent writers are pinned devices.
    ///
    /// # Errors
    /// When the file cannot be written; then nothing has changed. When a mapping fails half-way,
    /// some pages are evicted and the others are not; the contents are the same.
    pub fn evict(&self, range: PageRange, dir: &Path, _quiesced: &Quiesced<'_>) -> Result<Evicted, RamError> {
        let mut state = self.checked(range)?;
        // Finishes background copies first, because they read pages that the eviction drops.
        self.finish_background(&mut state)?;
        let table = self.table.lock();
        // R19: no-fork pages stay in place. In a layer's file a child would be one mapping away
        // from their bytes. I7: pages that a device reads stay too.
        let mut kept = [dont_fork::runs(&state.dont_fork), self.srcu.ranges()].concat();
        kept.sort_unstable();
        let kept = join_runs(&kept, 0);
        let base = subtract_runs(&state.space.mappings().base_within(range), &kept);
        let mut own = subtract_runs(&self.owned_private(range, &state.space.mappings().base_within(range))?, &kept);
        own.extend_from_slice(&base);
        own.sort_unstable();
        // Before the new layer is in the map, because it is not mapped yet.
        let mut stays = [own.as_slice(), &kept].concat();
        stays.sort_unstable();
        let dropped = self.drop_cached(&state, range, &join_runs(&stays, 0))?;
        // I7: clears the bits first; pinned pages keep theirs and stay.
        let pinned: Vec<PageRange> = own.iter().flat_map(|run| table.share(*run)).collect();
        let out = subtract_runs(&own, &pinned);
        let written = pages_in(&out);
        if written > 0 {
            let done = self.write_away(&mut state, &table, &out, dir);
            state.space.trim();
            state.space.free_replaced_base(&subtract_runs(&base, &pinned));
            done?;
        }
        Ok(Evicted { written, dropped })
    }

    /// Drops cached pages of layers on disk within `range`, except this VM's own. An access reads
    /// them again.
    fn drop_cached(&self, state: &State, range: PageRange, own: &[PageRange]) -> Result<u64, RamError> {
        let mut dropped = 0;
        for (piece, source) in state.space.map().within(range) {
            if !matches!(source.layer.storage(), LayerStorage::Disk | LayerStorage::File) {
                continue;
            }
            for run in subtract_runs(&[piece], own) {
                // The VM has no copies of its own here, so no data is lost; unmapped pages can be
                // dropped from the page cache.
                self.at.drop_private(run).map_err(|source| RamError::Map { range: run, source })?;
                let offset = (source.at + (run.start - piece.start)) << PAGE_SHIFT;
                // Best effort: pages that another VM shows stay, and are reclaimed under memory
                // pressure.
                let _ = fadvise(source.layer.as_fd(), offset, NonZero::new(run.len() << PAGE_SHIFT), Advice::DontNeed);
                dropped += run.len();
            }
        }
        Ok(dropped)
    }

    /// Makes a layer on disk of `out`, whose bits are cleared, and maps it in place of the pages.
    fn write_away(
        &self,
        state: &mut State,
        table: &TableGuard<'_>,
        out: &[PageRange],
        dir: &Path,
    ) -> Result<(), RamError> {
        // Restores the bits of pages that were not remapped, which are still this VM's own.
        let restore = |rest: &[PageRange]| rest.iter().for_each(|run| table.set_exclusive(*run));
        let pages = pages_in(out);
        let written = swap_file(dir, pages).and_then(|file| {
            self.at.write_out(out, file.as_fd(), 0)?;
            synced(&file)?;
            Ok(file)
        });
        let file = written.map_err(|source| {
            restore(out);
            RamError::Copy { pages, source }
        })?;
        state.space.reserve_runs(out.len()).inspect_err(|_| restore(out))?;

        let layer = Arc::new(self.store.adopt_file(file, pages, LayerStorage::Disk));
        let mut at = 0;
        for (done, run) in out.iter().enumerate() {
            let source = LayerOffset { layer: Arc::clone(&layer), at };
            at += run.len();
            // Contents do not change, so stopping half-way is harmless: pages not remapped are
            // still the VM's own.
            state.space.show(*run, &Mapping::Private(source)).inspect_err(|_| restore(&out[done..]))?;
        }
        // Best effort: pages left in the page cache are reclaimed under memory pressure.
        let _ = fadvise(layer.as_fd(), 0, None, Advice::DontNeed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, GuestRam, PAGE_SIZE, PinLifetime, RamLayout, Store};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn i7_cold_pages_go_to_disk_and_come_back_pinned_ones_stay() {
        let dir = Path::new("/var/tmp");
        let store = Store::open().unwrap();
        for frozen in [false, true] {
            let ram = GuestRam::reserve(&RamLayout::new(1024 * PAGE_SIZE).unwrap(), &store).unwrap();
            ram.populate().unwrap();
            if frozen {
                ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
            }
            let word = |page: u64| ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap();
            (0..1024).for_each(|p| ram.memory().write_obj(p + 1, GuestAddress(p * PAGE_SIZE)).unwrap());
            let region = &ram.regions()[0];
            let pin = region.pin(PageRange::new(10, 12), Access::Write, PinLifetime::LongTerm).unwrap();
            let quiesced = Quiesced::by(&crate::NoWriters);
            assert_eq!(
                region.evict(PageRange::new(0, 600), dir, &quiesced).unwrap(),
                Evicted { written: 598, dropped: 0 }
            );
            assert_eq!(ram.stats().unwrap().exclusive, 1024 - 598);
            assert_eq!(ram.stats().unwrap().private_kib, (1024 - 598) * 4, "the memory is given back");
            (0..1024).for_each(|p| assert_eq!(word(p), p + 1, "page {p} came back"));
            pin.slice().write_obj(99u64, 0).unwrap();
            assert_eq!(word(10), 99, "the pinned page did not move");
            ram.memory().write_obj(7u64, GuestAddress(20 * PAGE_SIZE)).unwrap();
            assert_eq!((word(20), word(21)), (7, 22));
        }
        store.expect_no_layers();
    }

    #[test]
    fn what_is_read_without_a_count_and_what_is_not_inherited_stays() {
        let store = Store::open().unwrap();
        for frozen in [false, true] {
            let ram = GuestRam::reserve(&RamLayout::new(64 * PAGE_SIZE).unwrap(), &store).unwrap();
            ram.populate().unwrap();
            if frozen {
                ram.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
            }
            (0..64).for_each(|p| ram.memory().write_obj(p + 1, GuestAddress(p * PAGE_SIZE)).unwrap());
            let region = &ram.regions()[0];
            // The VM's own pages, and a short read of them, which leaves private pages uncounted.
            let pin = region.pin(PageRange::new(10, 12), Access::Read, PinLifetime::Transient).unwrap();
            assert_eq!(region.ownership().get(10).1, u32::from(!frozen));
            region.set_dont_fork(PageRange::new(20, 30), Some(crate::DontFork::Zeroed)).unwrap();
            let evicted =
                region.evict(PageRange::new(0, 64), Path::new("/var/tmp"), &Quiesced::by(&crate::NoWriters)).unwrap();
            assert_eq!(evicted, Evicted { written: 64 - 2 - 10, dropped: 0 }, "frozen before: {frozen}");
            let on_disk = |page: u64| {
                let state = region.state();
                state
                    .space
                    .map()
                    .within(PageRange::with_len(page, 1))
                    .iter()
                    .any(|(_, source)| source.layer.storage() == LayerStorage::Disk)
            };
            assert_eq!(
                [9, 10, 11, 12, 19, 20, 29, 30].map(on_disk),
                [true, false, false, true, true, false, false, true]
            );
            assert_eq!(pin.slice().read_obj::<u64>(0).unwrap(), 11);
            drop(pin);
            ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
        }
    }

    #[test]
    fn i13_a_disk_that_cannot_be_written_changes_nothing() {
        let store = Store::open().unwrap();
        let ram = GuestRam::reserve(&RamLayout::new(64 * PAGE_SIZE).unwrap(), &store).unwrap();
        ram.populate().unwrap();
        ram.memory().write_obj(5u64, GuestAddress(0)).unwrap();
        let gone = Path::new("/proc/no-such-directory");
        let refused = ram.regions()[0].evict(PageRange::new(0, 64), gone, &Quiesced::by(&crate::NoWriters));
        assert!(matches!(refused, Err(RamError::Copy { pages: 64, .. })));
        assert_eq!(ram.stats().unwrap().exclusive, 64);
        assert!(ram.regions()[0].ownership().get(0).0, "the bit is back");
    }
}
