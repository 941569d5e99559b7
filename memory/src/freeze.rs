//! Freeze: what a VM exclusively owns becomes a layer that others may share.
//!
//! ```text
//!   born pages (shared mapping over the birth file)      private pages (the kernel's copies)
//!     │ not pinned: remap private; the birth file          │ copy into a delta layer
//!     │             is the layer. Nothing is copied.       │ many: remap over the delta, so that they are shared
//!     │ pinned:     copy into the delta; stays mapped      │ few, or pinned: stay as they are, still this VM's own
//!     │             shared and in place (I3)               │             (the layer has its own bytes)
//! ```
//!
//! The order is what keeps I1-I4, and what makes failure harmless (I13):
//!
//! 1. Bits are given up first, atomically against lockless pins ([`crate::word`]); whoever pins later waits on the table's lock.
//! 2. Everything that needs a copy is copied while every page still is where it was. Failing here changes nothing.
//! 3. Born pages are remapped. Contents do not change, so even a failure half-way leaves the VM whole: what was remapped is read from the
//!    same file, what was not stays owned.
//! 4. Private pages are remapped over the delta, as an optimisation: a page left out is merely copied again next time.
//! 5. Only then does the image exist for anyone else.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::RamError;
use crate::layer::{Layer, LayerMap, Source};
use crate::ownership::TableGuard;
use crate::region::{GuestRegion, Mapping, State};
use crate::store::Backing;
use crate::units::{BLOCK_PAGES, PageRange, pages_in, push_run, subtract_runs};

/// Runs are joined over gaps up to this long (in pages) even when there are few: copying four shared pages costs less
/// than one more mapping in the parent and in every child.
const SMALL_GAP: u64 = 4;
/// Above this many runs, longer gaps are closed too.
const MANY_RUNS: usize = 64;
/// Private pages that stay the parent's own after a freeze has copied them. Below it, copying them again at the next freeze
/// is cheaper than remapping and breaking COW again.
const KEEP_PAGES: u64 = 256;

/// What one freeze did. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreezeReport {
    /// Became layer pages by remapping alone.
    pub remapped: u64,
    /// Were copied into a delta layer (gaps that were closed included).
    pub copied: u64,
    /// Of the copied, pinned: they stay exclusive and in place.
    pub pinned: u64,
}

impl std::ops::AddAssign for FreezeReport {
    fn add_assign(&mut self, other: Self) {
        self.remapped += other.remapped;
        self.copied += other.copied;
        self.pinned += other.pinned;
    }
}

/// What there is to freeze, decided under both locks.
struct Plan {
    born: Vec<PageRange>,
    /// Private pages this VM owns.
    owned: Vec<PageRange>,
    pinned: Vec<PageRange>,
    /// What goes into the delta: `owned` with small gaps closed, and the pinned born pages.
    copy: Vec<PageRange>,
}

impl GuestRegion {
    /// Freezes the region; see the module's documentation. Nothing but pinned DMA may be writing to it.
    pub(crate) fn freeze(&self) -> Result<(LayerMap, FreezeReport), RamError> {
        let mut state = self.state();
        if !self.is_live() {
            return Err(RamError::Empty { base: self.base.0 });
        }
        let table = self.table.lock();
        let plan = self.plan(&state, &table)?;
        let frozen = self.carry_out(&mut state, &table, &plan);
        if frozen.is_err() {
            // I13: whatever is still born or private is still this VM's own.
            for run in state.born_runs().iter().chain(&plan.owned) {
                table.set_exclusive(*run);
            }
        }
        frozen
    }

    fn plan(&self, state: &State, table: &TableGuard<'_>) -> Result<Plan, RamError> {
        let born = state.born_runs();
        let mut plan = Plan { born, owned: Vec::new(), pinned: Vec::new(), copy: Vec::new() };
        for private in subtract_runs(&[self.range()], &plan.born) {
            let runs = self.store.pagemap().owned_runs(&self.at, private).map_err(RamError::Harvest)?;
            plan.copy.extend(close_gaps(&runs));
            plan.owned.extend(runs);
        }
        // I2, I8: the bit goes before anything is shared. A pin that got in first keeps its page out.
        for run in plan.born.iter() {
            plan.pinned.extend(table.share(*run));
        }
        plan.copy.extend(plan.pinned.iter().copied());
        for run in &plan.owned {
            plan.pinned.extend(table.share(*run));
        }
        plan.pinned.sort_unstable();
        plan.copy.sort_unstable();
        Ok(plan)
    }

    fn carry_out(
        &self,
        state: &mut State,
        table: &TableGuard<'_>,
        plan: &Plan,
    ) -> Result<(LayerMap, FreezeReport), RamError> {
        let delta = self.copy_out(&plan.copy)?;
        let to_remap = subtract_runs(&plan.born, &plan.pinned);
        // Promised before anything is touched (D5): each run adds itself and splits what it lies in.
        let most = state.mappings.len() as u64 + 2 * to_remap.len() as u64;
        let promised = state.promise.count().max(most);
        state.promise.resize(promised)?;

        let birth = state.birth.clone();
        for (run, birth) in to_remap.iter().zip(birth.iter().cycle()) {
            self.remap(state, *run, &Source { layer: Arc::clone(birth), at: run.start })?;
            // From here on these pages of the birth file are a layer's (I4).
            state.map.insert(*run, Source { layer: Arc::clone(birth), at: run.start });
        }
        if state.born_runs().is_empty() {
            state.birth = None;
        }
        for (run, source) in &delta {
            state.map.insert(*run, source.clone());
        }
        self.share_copies(state, plan, &delta);
        // Pages that were copied but not remapped are this VM's own as before: the layer has its own bytes.
        let delta_id = delta.first().map(|(_, source)| source.layer.id());
        for private in &plan.owned {
            for (range, mapping) in state.mappings.within(*private) {
                let shared = matches!(&mapping, Mapping::Private(now) if Some(now.layer.id()) == delta_id);
                if !shared {
                    table.set_exclusive(range);
                }
            }
        }
        let report = FreezeReport {
            remapped: pages_in(&to_remap),
            copied: pages_in(&plan.copy),
            pinned: pages_in(&plan.pinned),
        };
        // Shrinking a promise cannot fail.
        let _ = state.promise.resize(state.mappings.len() as u64);
        Ok((state.map.clone(), report))
    }

    /// All of the region, as it is read now, in a layer of its own.
    pub(crate) fn copy_whole(&self, grain: Backing) -> Result<LayerMap, RamError> {
        let _state = self.state();
        let layer = self.store.layer(self.pages(), grain)?;
        let copied = self.at.write_out(&[self.range()], layer.as_fd(), 0);
        copied.map_err(|source| RamError::Copy { pages: self.pages(), source })?;
        let mut map = LayerMap::new();
        map.insert(self.range(), Source { layer: Arc::new(layer), at: 0 });
        Ok(map)
    }

    /// Copies `runs` into a new delta layer, and says where each piece went.
    ///
    /// The delta is packed: its file holds the runs one after another, whole blocks first and so aligned that they can be mapped
    /// 2 MiB at a time. (At offset = region offset, one stray page in a huge-page file would cost 2 MiB.)
    fn copy_out(&self, runs: &[PageRange]) -> Result<Vec<(PageRange, Source)>, RamError> {
        if runs.is_empty() {
            return Ok(Vec::new());
        }
        let mut order = Vec::with_capacity(runs.len());
        let mut rest = Vec::with_capacity(runs.len());
        for run in runs {
            let first = run.start.next_multiple_of(BLOCK_PAGES);
            let last = run.end - run.end % BLOCK_PAGES;
            if first < last {
                order.push(PageRange::new(first, last));
                rest.push(PageRange::new(run.start, first));
                rest.push(PageRange::new(last, run.end));
            } else {
                rest.push(*run);
            }
        }
        let grain = if order.is_empty() { Backing::Small } else { Backing::Huge };
        order.extend(rest.into_iter().filter(|r| !r.is_empty()));
        let pages = pages_in(&order);
        let layer = self.store.layer(pages, grain)?;
        self.at.write_out(&order, layer.as_fd(), 0).map_err(|source| RamError::Copy { pages, source })?;
        let layer: Arc<Layer> = Arc::new(layer);
        let mut at = 0;
        let place = |run: PageRange| {
            let source = Source { layer: Arc::clone(&layer), at };
            at += run.len();
            (run, source)
        };
        Ok(order.into_iter().map(place).collect())
    }

    /// Remaps copied private pages over the delta, longest runs first, until few enough remain the parent's own.
    /// Never an error: a page left out is only copied again next time.
    fn share_copies(&self, state: &mut State, plan: &Plan, delta: &[(PageRange, Source)]) {
        let mut pieces: Vec<(PageRange, Source)> = Vec::new();
        for (run, source) in delta {
            // I3: not the pinned pages. Born pages in the delta are all pinned.
            for piece in subtract_runs(&[*run], &plan.pinned) {
                let skip = piece.start - run.start;
                pieces.push((piece, Source { layer: Arc::clone(&source.layer), at: source.at + skip }));
            }
        }
        let mut left: u64 = pieces.iter().map(|(r, _)| r.len()).sum();
        pieces.sort_unstable_by_key(|(run, _)| std::cmp::Reverse(run.len()));
        for (piece, source) in pieces {
            if left <= KEEP_PAGES {
                break;
            }
            let needed = state.mappings.len() as u64 + 2;
            if state.promise.count() < needed && state.promise.resize(needed).is_err() {
                tracing::debug!(left, "mapping budget reached: pages stay private to the parent");
                break;
            }
            if let Err(error) = self.remap(state, piece, &source) {
                tracing::debug!(%error, left, "pages stay private to the parent");
                break;
            }
            left -= piece.len();
        }
    }

    /// Maps `run` private over `source` and records it.
    fn remap(&self, state: &mut State, run: PageRange, source: &Source) -> Result<(), RamError> {
        self.at
            .map_private(run, source.layer.as_fd(), source.at)
            .map_err(|source| RamError::Map { range: run, source })?;
        state.mappings.insert(run, Mapping::Private(source.clone()));
        Ok(())
    }
}

/// Joins runs over small gaps; over longer ones when there are many runs. Copying a shared page too much is always safe (I5).
fn close_gaps(runs: &[PageRange]) -> Vec<PageRange> {
    let mut joined = join(runs, SMALL_GAP);
    let mut gap = SMALL_GAP * 4;
    while joined.len() > MANY_RUNS && gap <= BLOCK_PAGES / 8 {
        let wider = join(runs, gap);
        // Not at any price: at most twice the pages that have to be copied anyway.
        if pages_in(&wider) > 2 * pages_in(runs) {
            break;
        }
        joined = wider;
        gap *= 4;
    }
    joined
}

fn join(runs: &[PageRange], gap: u64) -> Vec<PageRange> {
    let mut out: Vec<PageRange> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if run.start - last.end <= gap => last.end = run.end,
            _ => push_run(&mut out, *run),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_close_when_cheap() {
        let r = PageRange::new;
        assert_eq!(close_gaps(&[r(0, 1), r(3, 4), r(20, 21)]), vec![r(0, 4), r(20, 21)]);
        let scattered: Vec<_> = (0..1000).map(|i| PageRange::with_len(i * 10, 1)).collect();
        assert_eq!(close_gaps(&scattered).len(), 1000, "closing would copy ten times as much");
        let dense: Vec<_> = (0..1000).map(|i| PageRange::with_len(i * 20, 14)).collect();
        assert_eq!(close_gaps(&dense), vec![r(0, 19_994)]);
    }
}
