//! Copies ahead: pages that a VM is likely to write become its own before the write.
//!
//! Only complete pages of layers are copied. Excluded are pages that the VM owns already, absent
//! pages (R19), zeros, and pages still being filled in the background. After a failure the pages
//! stay shared, as before; the log has the only report of it.

use crate::ahead::{AheadUse, PageSet};
use crate::error::RamError;
use crate::region::{GuestRegion, State};
use crate::units::{PAGE_SIZE, PageRange, join_runs, pages_in, push_run, subtract_runs};

/// Pages copied per lock hold, which delays waiters by some 100 us.
const BATCH: u64 = 64;

/// Copies at most `most` pages of `set`.
pub(crate) fn copy_all_ahead(regions: &[std::sync::Arc<GuestRegion>], set: &PageSet, most: u64) -> u64 {
    let mut left = most;
    for (region, runs) in regions.iter().zip(set.runs()) {
        region.copy_ahead(runs, &mut left);
    }
    most - left
}

impl GuestRegion {
    /// Copies the shared pages of `runs`, up to `left` pages, and subtracts them from `left`.
    fn copy_ahead(&self, runs: &[PageRange], left: &mut u64) {
        let mut batch = Vec::new();
        for run in runs {
            let mut next = run.start;
            while next < run.end {
                let part = PageRange::with_len(next, (run.end - next).min(BATCH - pages_in(&batch)));
                batch.push(part);
                next = part.end;
                if pages_in(&batch) == BATCH && !self.copy_batch(&std::mem::take(&mut batch), left) {
                    return;
                }
            }
        }
        self.copy_batch(&batch, left);
    }

    /// Copies one batch under one lock. Returns whether copying can go on.
    fn copy_batch(&self, runs: &[PageRange], left: &mut u64) -> bool {
        // Like a pin, this only makes pages exclusive, so concurrent pins that consider pages
        // shared remain right. The lock excludes freeze, reset and suspension.
        let mut state = self.state_for_pin();
        if !self.is_live() || state.inconsistent || self.lost().is_some() {
            return false;
        }
        let mut copied = Vec::new();
        let done = runs.iter().try_for_each(|run| self.copy_run(&state, *run, left, &mut copied));
        self.counters.count_ahead(pages_in(&copied));
        state.ahead.extend(copied);
        state.ahead.sort_unstable();
        state.ahead = join_runs(&state.ahead, 0);
        if let Err(error) = &done {
            tracing::debug!(%error, "pages are not copied ahead");
        }
        done.is_ok() && *left > 0
    }

    fn copy_run(
        &self,
        state: &State,
        run: PageRange,
        left: &mut u64,
        copied: &mut Vec<PageRange>,
    ) -> std::io::Result<()> {
        for (piece, _) in state.provided(state.space.map(), run) {
            let own = self.store.pagemap().owned_runs(&self.at, piece)?;
            for part in subtract_runs(&[piece], &own) {
                let part = PageRange::with_len(part.start, part.len().min(*left));
                if part.is_empty() {
                    return Ok(());
                }
                // In step with the kernel's page tables, as for a pin. I2: exclusive once the VM
                // owns the frame.
                let table = self.table.lock();
                self.at.populate_write(part)?;
                table.set_exclusive(part);
                *left -= part.len();
                copied.push(part);
            }
        }
        Ok(())
    }

    pub(crate) fn written(&self) -> Result<(Vec<PageRange>, AheadUse), RamError> {
        let state = self.checked(self.range())?;
        let owned = self.owned_private(self.range(), &state.space.mappings().base_runs())?;
        let ahead = within(&owned, &state.ahead);
        let unused = self.unused(&state, &ahead)?;
        let (copied, waste) = (pages_in(&state.ahead), pages_in(&unused));
        let came = AheadUse { copied, hits: pages_in(&ahead) - waste, waste };
        let written = subtract_runs(&owned, &unused);
        // A reset has restored some, and the VM need not have written them since.
        let kept = self.unused(&state, &within(&written, &state.counted))?;
        Ok((subtract_runs(&written, &kept), came))
    }

    /// The pages of `own`, which are private copies, whose bytes equal the layer's below. There are
    /// no writers.
    fn unused(&self, state: &State, own: &[PageRange]) -> Result<Vec<PageRange>, RamError> {
        let mut unused = Vec::new();
        let failed = |source| RamError::Copy { pages: pages_in(own), source };
        for (piece, source) in state.provided_of(state.space.map(), own) {
            let mut next = piece.start;
            while next < piece.end {
                let part = PageRange::with_len(next, (piece.end - next).min(BATCH));
                let at = source.at + (part.start - piece.start);
                let bytes = source.layer.read_pages(PageRange::with_len(at, part.len())).map_err(failed)?;
                for (page, bytes) in (part.start..part.end).zip(bytes.chunks_exact(PAGE_SIZE as usize)) {
                    // SAFETY: a private copy (the caller's) is mapped and readable.
                    if unsafe { self.at.has_bytes(page, bytes) } {
                        push_run(&mut unused, PageRange::with_len(page, 1));
                    }
                }
                next = part.end;
            }
        }
        Ok(unused)
    }

    /// Drops the unchanged pages that were copied ahead, and shows their layer again. The only
    /// concurrent writers are devices.
    ///
    /// # Errors
    /// When one of the pages is pinned (I7), or the page map cannot be read. Then nothing has
    /// changed.
    pub(crate) fn drop_unused(&self) -> Result<(), RamError> {
        let state = self.checked(self.range())?;
        if state.ahead.is_empty() {
            return Ok(());
        }
        // I7: no uncounted read begins until the lock is released.
        let read = self.srcu.ranges();
        if let Some(first) = read.first().copied() {
            return Err(RamError::Pinned { pages: pages_in(&read), first });
        }
        let table = self.table.lock();
        let owned = self.owned_private(self.range(), &state.space.mappings().base_runs())?;
        let own = within(&owned, &state.ahead);
        // I7, I8: the bit is cleared before the bytes are compared. A later pin waits for the lock.
        let pinned: Vec<PageRange> = own.iter().flat_map(|run| table.share(*run)).collect();
        let refused = pinned.first().map(|first| RamError::Pinned { pages: pages_in(&pinned), first: *first });
        let unused = refused.map_or_else(|| self.unused(&state, &own), Err);
        for run in unused.iter().flatten() {
            if let Err(error) = self.at.drop_private(*run) {
                tracing::debug!(%error, %run, "cannot free unused prepared copies");
            }
        }
        own.iter().for_each(|run| self.reclaim(&state, &table, *run));
        unused.map(drop)
    }
}

/// Intersection of two lists of runs.
fn within(all: &[PageRange], some: &[PageRange]) -> Vec<PageRange> {
    subtract_runs(some, &subtract_runs(some, all))
}

#[cfg(test)]
mod tests;
