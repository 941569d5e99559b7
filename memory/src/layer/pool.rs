//! Preallocated files for the next freezes. Their memory is allocated ahead of time, and the files
//! were never published.
//!
//! To find a page of a fresh file costs the kernel, and its host if the machine is itself virtual,
//! 0.4-5.5 us; to copy over an existing page costs 0.15. A VM that is forked a hundred times a
//! second needs as many deltas, each about as large as the last. So when freezes follow each other
//! closely, the reclaim thread allocates the next file while no VM waits.
//!
//! **Files are never reused.** The file of a dropped layer may still be read by a device that was
//! given its frames, by a splice, or by another process. The kernel knows this by its page
//! references but has no interface for it; a count of ours is not proof (I4). A file that was never
//! published needs no proof. A dropped layer's memory is freed, and frames in use outlive their
//! file.
//!
//! Only a freeze that copies at once takes files from the pool, because it writes every page of its
//! layer before the layer is shared.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate, ftruncate};

use crate::backing::Backing;
use crate::units::PAGE_SHIFT;

/// Maximum number of files of each kind: one can be taken while the next is made.
const MAX_FILES: usize = 2;
/// Largest file made ahead, in pages.
pub(crate) const MAX_PAGES: u64 = 2_048;
/// Sizes are rounded up to this many pages.
const ROUNDED_TO: u64 = 16;
/// Minimum rate: freezes further apart than this make their own files, because memory that waits
/// longer is wasted.
const MAX_APART: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct PooledFile {
    grain: Backing,
    pages: u64,
    file: File,
}

#[derive(Debug, Default)]
struct Inner {
    files: Vec<PooledFile>,
    /// Time of the last freeze's request.
    asked: Option<Instant>,
    /// Number of files ordered and not made yet.
    ordered: usize,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct LayerFilePool(Mutex<Inner>);

/// A file that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileOrder {
    grain: Backing,
    pages: u64,
}

impl LayerFilePool {
    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the smallest file with pages of `grain` that has room for `pages`.
    pub(crate) fn take(&self, grain: Backing, pages: u64) -> Option<File> {
        let made = self.with(|inner| {
            let fits = |made: &PooledFile| made.grain == grain && made.pages >= pages;
            let fitting = inner.files.iter().enumerate().filter(|(_, made)| fits(made));
            let (at, _) = fitting.min_by_key(|(_, made)| made.pages)?;
            Some(inner.files.swap_remove(at))
        })?;
        // Truncates the excess unless it is small, because the file is charged by its length. The
        // VM is paused here, so a file that was made for a delta of the same size is not truncated.
        if made.pages > pages + pages / 4 + ROUNDED_TO {
            ftruncate(&made.file, pages << PAGE_SHIFT).ok()?;
        }
        Some(made.file)
    }

    /// Notes that a freeze requested a file of `pages` at `now`. Returns the file to make for the
    /// next freeze, if one is likely to follow.
    pub(crate) fn order(&self, grain: Backing, pages: u64, now: Instant) -> Option<FileOrder> {
        // The next delta is about as large as the last.
        let pages = (pages + pages / 8).next_multiple_of(ROUNDED_TO);
        self.with(|inner| {
            let soon = inner.asked.replace(now).is_some_and(|asked| now.saturating_duration_since(asked) < MAX_APART);
            let fitting = inner.files.iter().filter(|made| made.grain == grain && made.pages >= pages).count();
            if !soon || pages > MAX_PAGES || fitting + inner.ordered >= MAX_FILES {
                return None;
            }
            inner.ordered += 1;
            Some(FileOrder { grain, pages })
        })
    }

    /// Cancels an order.
    pub(crate) fn cancel(&self) {
        self.with(|inner| inner.ordered -= 1);
    }

    /// Makes an ordered file with `make` and allocates its memory. Runs on a thread that no VM
    /// waits for.
    pub(crate) fn fill(&self, order: FileOrder, make: impl FnOnce(u64, Backing) -> io::Result<File>) {
        let made = make(order.pages, order.grain).and_then(|file| {
            fallocate(file.as_fd(), FallocateFlags::empty(), 0, order.pages << PAGE_SHIFT)?;
            Ok(file)
        });
        let gone = self.with(|inner| {
            inner.ordered -= 1;
            let Ok(file) = made else { return None };
            inner.files.push(PooledFile { grain: order.grain, pages: order.pages, file });
            let same = inner.files.iter().enumerate().filter(|(_, made)| made.grain == order.grain);
            let (count, smallest) = (same.clone().count(), same.min_by_key(|(_, made)| made.pages).map(|(at, _)| at));
            smallest.filter(|_| count > MAX_FILES).map(|at| inner.files.swap_remove(at))
        });
        // Not under the lock: freeing its pages takes long.
        drop(gone);
    }

    /// Drops all files.
    pub(crate) fn clear(&self) {
        let gone = self.with(|inner| std::mem::take(&mut inner.files));
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::splice::{Splice, page_of};
    use crate::{
        Access, FreezeMode, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage, RamLayout, Store,
    };
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    fn made(pool: &LayerFilePool, pages: u64, now: Instant) -> bool {
        let order = pool.order(Backing::Small, pages, now);
        if let Some(order) = order {
            pool.fill(order, |pages, _| {
                let file = tempfile::tempfile()?;
                file.set_len(pages * PAGE_SIZE)?;
                Ok(file)
            });
        }
        order.is_some()
    }

    #[test]
    fn files_are_made_ahead_where_freezes_follow_each_other() {
        let (pool, start) = (LayerFilePool::default(), Instant::now());
        assert!(!made(&pool, 100, start), "one freeze is no sequence");
        assert!(!made(&pool, 100, start + 2 * MAX_APART));
        assert!(made(&pool, 100, start + 2 * MAX_APART));
        assert!(made(&pool, 300, start + 2 * MAX_APART));
        assert!(!made(&pool, 98, start + 2 * MAX_APART), "two fit");
        assert!(!made(&pool, MAX_PAGES + 1, start + 2 * MAX_APART));
        let file = pool.take(Backing::Small, 110).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 112 * PAGE_SIZE, "an eighth more, in pieces of 16");
        assert!(file.metadata().unwrap().blocks() * 512 >= 112 * PAGE_SIZE, "its memory is there");
        let file = pool.take(Backing::Small, 110).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 110 * PAGE_SIZE, "far too large: cut");
        assert!(pool.take(Backing::Small, 1).is_none() && pool.take(Backing::Huge, 1).is_none());
    }

    #[test]
    fn a_file_made_for_a_delta_of_the_same_size_is_not_cut() {
        for pages in (1..200).chain([MAX_PAGES / 2, MAX_PAGES * 8 / 9 - ROUNDED_TO]) {
            let (pool, now) = (LayerFilePool::default(), Instant::now());
            made(&pool, pages, now);
            assert!(made(&pool, pages, now), "{pages}");
            let made_with = pool.with(|inner| inner.files[0].pages);
            assert_eq!(pool.take(Backing::Small, pages).unwrap().metadata().unwrap().len(), made_with * PAGE_SIZE);
        }
    }

    #[test]
    fn a_file_that_cannot_be_made_is_ordered_again() {
        let (pool, start) = (LayerFilePool::default(), Instant::now());
        made(&pool, 1, start);
        for _ in 0..2 * MAX_FILES {
            let order = pool.order(Backing::Small, 1, start).unwrap();
            pool.fill(order, |_, _| Err(io::ErrorKind::OutOfMemory.into()));
        }
    }

    /// A VM is frozen repeatedly. The contents of each image and child, and the data of a splice in
    /// flight, do not change.
    #[test]
    fn i4_what_was_a_layer_is_read_to_the_end_by_whoever_holds_its_frames() {
        const PAGES: u64 = 1024;
        let store = Store::open_small().unwrap();
        let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
        ram.populate().unwrap();
        let freeze = || -> RamImage { ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0 };
        let put = |page: u64, word: u64| ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
        freeze();
        let mut held = Vec::new();
        for round in 1..60u64 {
            // More pages than stay in place: they are shown from the delta.
            (0..600).for_each(|page| put(page, round << 32 | page));
            drop(freeze());
            let pin = ram.regions()[0].pin(PageRange::new(3, 4), Access::Read, PinLifetime::Transient).unwrap();
            held.push((round, Splice::of(&pin)));
            // The device holds the frame, which the kernel keeps beyond the pin.
            drop(pin);
            if round % 2 == 0 {
                // A file is made between these rounds, however late its thread runs.
                store.wait_reclaimed();
            }
        }
        for (round, splice) in held {
            assert_eq!(page_of(&splice.read()), round << 32 | 3, "what round {round} showed");
        }
        assert!(store.made_ahead() > 10, "{} files were made ahead", store.made_ahead());
    }
}
