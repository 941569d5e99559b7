//! Reset: back to an image, in place. The cost is in pages written since, not in memory size.
//!
//! A page that the VM has written since is dropped, and the private mapping shows the layer again. Where
//! its own pages are few and far apart, they get the layer's bytes instead ([`restore`]).
//! A range is mapped anew if the layer behind it is no longer the image's (the VM was frozen
//! since), or if the VM's copy lies over an older layer (a freeze copied it and left it in place).

mod restore;
mod windows;

pub(crate) use windows::LayerWindows;

use std::sync::Arc;

use crate::error::RamError;
use crate::layer::LayerMap;
use crate::region::freeze::RegionImage;
use crate::region::mappings::{Mapping, Mappings};
use crate::region::{GuestRegion, State};
use crate::units::{PageRange, join_runs, pages_in, push_run, subtract_runs};

/// Mappings of a region, beyond [`PIECES_OF_A_MAPPING`] for each one that an image needs, at which a reset
/// joins them. Freezes and resets in turn split mappings that show one layer in order, and the host limits
/// their number.
const MAX_PIECES: usize = 1024;
const PIECES_OF_A_MAPPING: usize = 4;

/// Result of a reset. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamResetReport {
    /// The VM's own copies that were dropped.
    pub dropped: u64,
    /// The VM's own copies that were kept, with the image's bytes.
    pub restored: u64,
    /// Pages mapped anew.
    pub remapped: u64,
}

impl std::ops::AddAssign for RamResetReport {
    fn add_assign(&mut self, other: Self) {
        self.dropped += other.dropped;
        self.restored += other.restored;
        self.remapped += other.remapped;
    }
}

/// The reason why a reset failed.
#[derive(Debug)]
pub(crate) enum ResetError {
    /// Nothing has changed.
    Refused(RamError),
    /// The reset is partly done.
    Inconsistent(RamError),
}

impl From<RamError> for ResetError {
    fn from(error: RamError) -> Self {
        Self::Refused(error)
    }
}

/// Whether a private mapping shows the pages of `want`.
fn shows(have: &Mapping, want: &Mapping) -> bool {
    match (have, want) {
        (Mapping::Private(have), Mapping::Private(want)) => have.is(want),
        // Ranges that were not inherited stay absent (R19).
        (Mapping::Zero, Mapping::Zero) | (Mapping::Absent, _) => true,
        _ => false,
    }
}

/// The mappings that `map` requires.
fn wanted(map: &LayerMap, all: PageRange) -> Vec<(PageRange, Mapping)> {
    let mut out = Vec::with_capacity(map.len() + 1);
    let mut at = all.start;
    for (range, source) in map.iter() {
        out.push((PageRange::new(at, range.start), Mapping::Zero));
        out.push((range, Mapping::Private(source.clone())));
        at = range.end;
    }
    out.push((PageRange::new(at, all.end), Mapping::Zero));
    out.retain(|(range, _)| !range.is_empty());
    out
}

/// The runs of `range` whose mapping is not `want`, each with its required mapping. With `join`, all of the
/// range if several mappings show it.
fn differing(mappings: &Mappings, range: PageRange, want: &Mapping, join: bool) -> Vec<(PageRange, Mapping)> {
    use crate::layer::interval::Piece;
    let pieces = mappings.within(range);
    let join = join && pieces.len() > 1;
    let mut runs = Vec::new();
    for (piece, have) in pieces {
        // R19.
        let is_joined = join && !matches!(have, Mapping::Absent);
        if is_joined || !shows(&have, &want.advance(piece.start - range.start)) {
            push_run(&mut runs, piece);
        }
    }
    runs.into_iter().map(|run| (run, want.advance(run.start - range.start))).collect()
}

impl GuestRegion {
    /// The reason why the region cannot be reset now, if any. Callers that can wait do so.
    pub(crate) fn in_use(&self) -> Option<RamError> {
        let mut pinned = self.table.pinned_runs(self.range());
        pinned.extend(self.srcu.ranges());
        pinned.sort_unstable();
        let pinned = join_runs(&pinned, 0);
        let first = pinned.first().copied()?;
        Some(RamError::Pinned { pages: pages_in(&pinned), first })
    }

    /// Whether a reset has failed half-way.
    pub(crate) fn is_inconsistent(&self) -> bool {
        self.state().inconsistent
    }

    /// Notes that a reset of the VM has failed half-way, even if not in this region.
    pub(crate) fn mark_inconsistent(&self) {
        self.state().inconsistent = true;
    }

    /// Resets `regions` to `images`. There are no writers. All checks of all regions precede the
    /// first change.
    pub(crate) fn reset_all(
        regions: &[Arc<Self>],
        images: &[RegionImage],
        report: &mut RamResetReport,
    ) -> Result<(), ResetError> {
        let (Some((region, rest)), Some((image, images))) = (regions.split_first(), images.split_first()) else {
            return Ok(());
        };
        let map = image.map.map();
        let mut state = region.live_state()?;
        if let Some(error) = region.lost() {
            return Err(RamError::Lost(error).into());
        }
        // Finishes background copies first, because they read pages that the reset drops.
        region.finish_background(&mut state)?;
        // I7: no uncounted read begins until the lock is released.
        let read = region.srcu.ranges();
        if let Some(first) = read.first().copied() {
            return Err(RamError::Pinned { pages: pages_in(&read), first }.into());
        }
        let table = region.table.lock();
        let base = state.space.mappings().base_runs();
        let owned = region.owned_private(region.range(), &base)?;
        let unseen = region.unseen_copies(&state, &owned);
        region.table.trace.reset_begun();
        // I7, I8: the bit is cleared before the page is dropped. An earlier pin refuses the reset,
        // and a later one waits for the lock.
        let mut pinned = Vec::new();
        for run in base.iter().chain(&owned) {
            pinned.extend(table.share(*run));
        }
        if let Some(first) = pinned.first().copied() {
            base.iter().chain(&owned).for_each(|run| table.set_exclusive(*run));
            return Err(RamError::Pinned { pages: pages_in(&pinned), first }.into());
        }
        // Before any change. A refusal here or in another region leaves everything as it was.
        let todo = region.prepare(&mut state, map).map_err(ResetError::from);
        let todo = todo.and_then(|todo| Self::reset_all(rest, images, report).map(|()| todo));
        let todo = todo.inspect_err(|_| {
            region.reclaim(&state, &table, region.range());
            state.space.trim();
        })?;
        // Until the reset is complete: if it ends in a panic, the VM must not run on.
        state.inconsistent = true;
        *report += region.put_back(&mut state, map, &base, &owned, &todo).map_err(ResetError::Inconsistent)?;
        state.inconsistent = false;
        region.counters.count_guest(unseen);
        state.ahead.clear();
        state.moved = false;
        Ok(())
    }

    /// The ranges to map anew for `map`, with their mappings reserved (D5).
    fn prepare(&self, state: &mut State, map: &LayerMap) -> Result<Vec<(PageRange, Mapping)>, RamError> {
        let wanted = wanted(map, self.range());
        let todo = |state: &State, join: bool| -> Vec<(PageRange, Mapping)> {
            let mappings = state.space.mappings();
            wanted.iter().flat_map(|(range, want)| differing(mappings, *range, want, join)).collect()
        };
        if state.space.mappings().len() > PIECES_OF_A_MAPPING * wanted.len() + MAX_PIECES {
            let joined = todo(state, true);
            if state.space.reserve_runs(joined.len()).is_ok() {
                return Ok(joined);
            }
            // Near the host's limit. What differs may be less.
        }
        let todo = todo(state, false);
        state.space.reserve_runs(todo.len())?;
        Ok(todo)
    }

    fn put_back(
        &self,
        state: &mut State,
        map: &Arc<LayerMap>,
        base: &[PageRange],
        owned: &[PageRange],
        todo: &[(PageRange, Mapping)],
    ) -> Result<RamResetReport, RamError> {
        let anew: Vec<PageRange> = todo.iter().map(|(range, _)| *range).collect();
        let (restored, dropped) = self.restore(state, map, &subtract_runs(owned, &anew));
        if let Some(error) = self.lost() {
            return Err(RamError::Lost(error));
        }
        // The joined gaps contain no pinned page: a pinned page is the VM's own (I3, I9), and pins
        // were refused above.
        for run in &dropped {
            self.at.drop_private(*run).map_err(|source| RamError::Map { range: *run, source })?;
        }
        let is_other = !Arc::ptr_eq(state.space.map(), map);
        state.space.lay_out(todo, map, |_, _| Ok(()))?;
        if is_other {
            state.space.hold_leases_of_map();
            // Its parts are of the map of before, whose layers and leases it holds.
            state.compaction = None;
            state.last_compacted = (0, 0);
        }
        state.space.retire_base_if_shared();
        state.space.trim();
        let kept = pages_in(&restored);
        // Their bits stay cleared: a pin of one takes the locked path, which finds the copy in place.
        state.counted = restored;
        let dropped = pages_in(base) + pages_in(owned) - kept;
        Ok(RamResetReport { dropped, restored: kept, remapped: pages_in(&anew) })
    }
}

#[cfg(test)]
mod tests;
