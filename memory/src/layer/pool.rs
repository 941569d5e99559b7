//! Files for the next freezes, made ahead: their memory is allocated, and they were never
//! them.
//!
//! A page of a fresh file costs the kernel's finding it, and the host's behind that where this is a
//! virtual machine itself: 0.4-5.5 us, against 0.15 to copy over one that is there. A VM that is
//! forked a hundred times a second needs as many deltas, each about as large as the one before. So
//! when freezes follow each other, the reclaim thread allocates the next file while no VM waits.
//!
//! **No file is used again.** The file of a layer that has gone may still be read: by a device that
//! was given its frames, by a splice, by another process. Only the kernel knows, by its page
//! references, and it cannot be asked; a count of ours is no proof (I4). A file that was never
//! published needs none. What a layer leaves behind is freed, and frames in use outlive their file.
//!
//! Only a freeze that copies at once takes from here, because it writes every page of its layer
//! before it is shared.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate, ftruncate};

use crate::store::Backing;
use crate::units::PAGE_SHIFT;

/// Files kept of each kind. One is taken while the next is made.
const MAX_FILES: usize = 2;
/// Largest file made ahead, in pages.
pub(crate) const MAX_PAGES: u64 = 2_048;
/// Sizes are rounded up to this many pages.
const ROUNDED_TO: u64 = 16;
/// Freezes further apart than this make their files themselves: memory that waits longer is wasted.
const MAX_APART: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Made {
    grain: Backing,
    pages: u64,
    file: File,
}

#[derive(Debug, Default)]
struct Inner {
    files: Vec<Made>,
    /// When a freeze last asked.
    asked: Option<Instant>,
    /// Asked for and not made yet.
    ordered: usize,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct LayerFilePool(Mutex<Inner>);

/// A file that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    grain: Backing,
    pages: u64,
}

impl LayerFilePool {
    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A file in pages of `grain` that has room for `pages`: the smallest there is.
    pub(crate) fn take(&self, grain: Backing, pages: u64) -> Option<File> {
        let made = self.with(|inner| {
            let fits = |made: &Made| made.grain == grain && made.pages >= pages;
            let fitting = inner.files.iter().enumerate().filter(|(_, made)| fits(made));
            let (at, _) = fitting.min_by_key(|(_, made)| made.pages)?;
            Some(inner.files.swap_remove(at))
        })?;
        // What is over is given back, unless it is little: the file's length is what it is charged
        // for. While the VM is paused: so a file that is made for a delta of the same size is not
        // cut.
        if made.pages > pages + pages / 4 + ROUNDED_TO {
            ftruncate(&made.file, pages << PAGE_SHIFT).ok()?;
        }
        Some(made.file)
    }

    /// Notes that a freeze has wanted a file of `pages` at `now`. What is to be made for the next,
    /// if another is likely.
    pub(crate) fn order(&self, grain: Backing, pages: u64, now: Instant) -> Option<Wanted> {
        // The next delta is about as large as the last.
        let pages = (pages + pages / 8).next_multiple_of(ROUNDED_TO);
        self.with(|inner| {
            let soon = inner.asked.replace(now).is_some_and(|asked| now.saturating_duration_since(asked) < MAX_APART);
            let fitting = inner.files.iter().filter(|made| made.grain == grain && made.pages >= pages).count();
            if !soon || pages > MAX_PAGES || fitting + inner.ordered >= MAX_FILES {
                return None;
            }
            inner.ordered += 1;
            Some(Wanted { grain, pages })
        })
    }

    /// What was ordered will not be made.
    pub(crate) fn cancel(&self) {
        self.with(|inner| inner.ordered -= 1);
    }

    /// Makes what was ordered with `make`, and allocates its memory. On a thread that no VM waits
    /// for.
    pub(crate) fn fill(&self, order: Wanted, make: impl FnOnce(u64, Backing) -> io::Result<File>) {
        let made = make(order.pages, order.grain).and_then(|file| {
            fallocate(file.as_fd(), FallocateFlags::empty(), 0, order.pages << PAGE_SHIFT)?;
            Ok(file)
        });
        let gone = self.with(|inner| {
            inner.ordered -= 1;
            let Ok(file) = made else { return None };
            inner.files.push(Made { grain: order.grain, pages: order.pages, file });
            let same = inner.files.iter().enumerate().filter(|(_, made)| made.grain == order.grain);
            let (count, smallest) = (same.clone().count(), same.min_by_key(|(_, made)| made.pages).map(|(at, _)| at));
            smallest.filter(|_| count > MAX_FILES).map(|at| inner.files.swap_remove(at))
        });
        // Not under the lock: freeing its pages takes long.
        drop(gone);
    }

    /// Lets all of them go.
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

    /// A VM is frozen again and again, and what each image and child shows, and what a splice under
    /// way reads, stays what it was.
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
            // The device has the frame, which outlives the pin as far as the kernel is concerned.
            drop(pin);
        }
        for (round, splice) in held {
            assert_eq!(page_of(&splice.read()), round << 32 | 3, "what round {round} showed");
        }
        assert!(store.made_ahead() > 10, "{} files were made ahead", store.made_ahead());
    }
}
