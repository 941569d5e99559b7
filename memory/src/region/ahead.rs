//! Copies ahead: pages that a VM is likely to write become its own before it does.
//!
//! Only what a layer provides, and is all there, is copied. What is the VM's own already, absent
//! (R19), zeros, or still being filled in the background is left out. A failure leaves pages shared,
//! as they were: it is reported nowhere but in the log.

use crate::ahead::{AheadUse, PageSet, PageSetError};
use crate::error::RamError;
use crate::layer::Source;
use crate::layer::interval::Piece;
use crate::ram::{GuestRam, Quiesced};
use crate::region::mappings::Mapping;
use crate::region::{GuestRegion, State};
use crate::units::{PAGE_SIZE, PageRange, join_runs, pages_in, push_run, subtract_runs};

/// Pages that are copied before the locks are let go: whoever waits for them waits for some 100 us.
const BATCH: u64 = 64;

impl GuestRam {
    /// Gives this VM its own copies of the pages in `set`, `most` at most, before it asks for them.
    /// Returns how many were copied. Its vCPUs and devices may run meanwhile. Contents do not
    /// change, and what cannot be copied stays shared.
    ///
    /// # Errors
    /// When the set is of a guest of another shape. Then nothing is copied.
    pub fn copy_ahead(&self, set: &PageSet, most: u64) -> Result<u64, PageSetError> {
        set.expect_fits(self.layout())?;
        Ok(copy_all_ahead(self.regions(), set, most))
    }

    /// What this VM has written since it was made, reset, frozen or woken last, and what came of
    /// the pages that were copied ahead since. What was copied ahead and is unchanged is not among
    /// what was written: so a set that is learned from it forgets what is written no more.
    ///
    /// # Errors
    /// When there is no memory yet, some is lost, or the kernel cannot be asked.
    pub fn written_set(&self, _quiesced: &Quiesced<'_>) -> Result<(PageSet, AheadUse), RamError> {
        let (mut runs, mut all) = (Vec::with_capacity(self.regions().len()), AheadUse::default());
        for region in self.regions() {
            let (written, one) = region.written()?;
            runs.push(written);
            all += one;
        }
        Ok((PageSet::found(runs), all))
    }

    /// Whether [`GuestRam::written_set`] has all that this VM has written since it was made or reset:
    /// it was neither frozen nor suspended since.
    #[must_use]
    pub fn is_written_set_whole(&self) -> bool {
        self.regions().iter().all(|region| !region.state().moved)
    }
}

/// Copies `most` pages of `set` at most.
pub(super) fn copy_all_ahead(regions: &[std::sync::Arc<GuestRegion>], set: &PageSet, most: u64) -> u64 {
    let mut left = most;
    for (region, runs) in regions.iter().zip(set.runs()) {
        region.copy_ahead(runs, &mut left);
    }
    most - left
}

impl GuestRegion {
    /// Copies those pages of `runs` that are shared, up to `left` of them, which it counts down.
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

    /// The same, under one lock. Whether it can go on.
    fn copy_batch(&self, runs: &[PageRange], left: &mut u64) -> bool {
        // As a pin does, it only makes pages this VM's own: those that other pins take for shared
        // stay right. The lock keeps freeze, reset and suspension out.
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
        for (piece, _) in provided(state, run) {
            let own = self.store.pagemap().owned_runs(&self.at, piece)?;
            for part in subtract_runs(&[piece], &own) {
                let part = PageRange::with_len(part.start, part.len().min(*left));
                if part.is_empty() {
                    return Ok(());
                }
                // In step with the kernel's page tables, like a pin's. I2: exclusive once the frame
                // is this VM's.
                let table = self.table.lock();
                self.at.populate_write(part)?;
                table.set_exclusive(part);
                *left -= part.len();
                copied.push(part);
            }
        }
        Ok(())
    }

    fn written(&self) -> Result<(Vec<PageRange>, AheadUse), RamError> {
        let state = self.checked(self.range())?;
        let owned = self.owned_private(self.range(), &state.space.mappings().base_runs())?;
        let ahead = within(&owned, &state.ahead);
        let unused = self.unused(&state, &ahead)?;
        let (copied, waste) = (pages_in(&state.ahead), pages_in(&unused));
        let came = AheadUse { copied, hits: pages_in(&ahead) - waste, waste };
        Ok((subtract_runs(&owned, &unused), came))
    }

    /// Those pages of `own`, private copies, whose bytes are those of the layer beneath. Nothing may
    /// be writing to them.
    fn unused(&self, state: &State, own: &[PageRange]) -> Result<Vec<PageRange>, RamError> {
        let mut unused = Vec::new();
        let failed = |source| RamError::Copy { pages: pages_in(own), source };
        for (piece, source) in own.iter().flat_map(|run| provided(state, *run)) {
            let mut next = piece.start;
            while next < piece.end {
                let part = PageRange::with_len(next, (piece.end - next).min(BATCH));
                let at = source.at + (part.start - piece.start);
                let bytes = source.layer.read_pages(PageRange::with_len(at, part.len())).map_err(failed)?;
                for (page, bytes) in (part.start..part.end).zip(bytes.chunks_exact(PAGE_SIZE as usize)) {
                    if self.at.has_bytes(page, bytes) {
                        push_run(&mut unused, PageRange::with_len(page, 1));
                    }
                }
                next = part.end;
            }
        }
        Ok(unused)
    }

    /// Gives back what was copied ahead and is as it was: its layer is shown again. Nothing but
    /// devices may be writing.
    ///
    /// # Errors
    /// When a page of it is pinned (I7), or the kernel cannot be asked. Then nothing has changed.
    pub(crate) fn drop_unused(&self) -> Result<(), RamError> {
        let state = self.checked(self.range())?;
        if state.ahead.is_empty() {
            return Ok(());
        }
        // I7: nothing more is read without a count until the lock is let go.
        let read = self.grace.ranges();
        if let Some(first) = read.first().copied() {
            return Err(RamError::Pinned { pages: pages_in(&read), first });
        }
        let table = self.table.lock();
        let owned = self.owned_private(self.range(), &state.space.mappings().base_runs())?;
        let own = within(&owned, &state.ahead);
        // I7, I8: the bit goes before the bytes are looked at. A pin that comes later waits for the
        // lock.
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

/// Those parts of `run` that layers provide which are all there.
fn provided(state: &State, run: PageRange) -> Vec<(PageRange, Source)> {
    let mut provided = Vec::new();
    for (piece, mapping) in state.space.mappings().within(run) {
        let Mapping::Private(mapped) = mapping else { continue };
        if mapped.layer.pending().is_some() || mapped.layer.failure().is_some() {
            continue;
        }
        // What the map does not show may be given back by a sweep.
        let shown = state.space.map().within(piece).into_iter();
        provided.extend(shown.filter(|(part, source)| source.is(&mapped.advance(part.start - piece.start))));
    }
    provided
}

/// What is in both.
fn within(all: &[PageRange], some: &[PageRange]) -> Vec<PageRange> {
    subtract_runs(some, &subtract_runs(some, all))
}

#[cfg(test)]
mod tests;
