//! Freeze: a VM's exclusive pages become a layer that other VMs may share.
//!
//! ```text
//!   base pages (shared over the base file)         private pages (the kernel's copies)
//!     │ not pinned: remap private; the base file     │ copy into a delta layer
//!     │             is the layer, without a copy     │ many: remap over the delta, to share them
//!     │ pinned:     copy into the delta; stays       │ few, or pinned: stay this VM's own
//!     │             mapped shared and in place (I3)  │           (the layer has its own bytes)
//! ```
//!
//! The order preserves I1-I4 and makes a failure harmless (I13):
//!
//! 1. Clear the bits first, atomically against lockless pins ([`crate::ownership::word`]). A later
//!    pin waits for the table's lock.
//! 2. Copy every page that needs a copy while it is still in place. A failure changes nothing.
//! 3. Remap base pages. Contents do not change, so even a failure half-way leaves the VM whole:
//!    remapped pages are read from the same file, and the others stay owned.
//! 4. Remap private pages over the delta. This is an optimisation: a page left out is just copied
//!    again by the next freeze. The selection precedes step 2, so that the remaining pages get a
//!    layer to themselves. The next freeze supersedes that layer completely, which frees its
//!    memory. In one layer with the others it would live as long as the last of them.
//! 5. Only then can the image be adopted.
//!
//! If there are many pages to copy, steps 2 and 4 run in the background
//! ([`crate::freeze::background`]). Pinned pages are still copied here, then the others are
//! write-protected, and the image exists before its delta is complete.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::backing::Backing;
use crate::error::RamError;
use crate::freeze::background::{BackgroundCopy, Delta};
use crate::freeze::copies::{DeltaRuns, Packed, SMALL_GAP, close_gaps, parts, runs_to_remap};
use crate::freeze::protect::SharedPages;
use crate::freeze::{FreezeMode, FreezeReport};
use crate::layer::fill::LayerFill;
use crate::layer::registry::View;
use crate::layer::{Layer, LayerMap, LayerOffset};
use crate::ownership::TableGuard;
use crate::reclaim::ReclaimThread;
use crate::region::dont_fork::{self, DontForkMap};
use crate::region::mappings::Mapping;
use crate::region::{Freezing, GuestRegion, State};
use crate::testing::failpoint::{Call, failpoint};
use crate::testing::sabotage::{Break, broken};
use crate::units::{PageRange, join_runs, pages_in, subtract_runs};

/// Maximum number of no-fork pages that a freeze moves out of the base file: reading them takes a
/// millisecond.
const MAX_PRIVATIZED: u64 = 1_024;

/// A region at one instant.
#[derive(Clone, Debug)]
pub(crate) struct RegionImage {
    pub(crate) map: Arc<View>,
    /// No-fork declarations, inherited by children.
    pub(crate) dont_fork: DontForkMap,
}

/// The pages to freeze, determined under both locks.
struct FreezePlan<'t> {
    base: Vec<PageRange>,
    /// Private pages this VM owns.
    owned: Vec<PageRange>,
    /// The owned pages whose bits are cleared: those not pinned. Short gaps between them are
    /// included, so that protecting takes few calls.
    private: SharedPages<'t>,
    /// Base and private.
    pinned: Vec<PageRange>,
    /// Number of owned pages that the kernel has copied since the last count.
    unseen: u64,
    /// Pages for the delta: `owned` with small gaps closed, and the pinned base pages.
    copy: Vec<PageRange>,
}

impl GuestRegion {
    /// Freezes `regions`, all or none; see the module's documentation. The only concurrent writers
    /// are pinned devices.
    ///
    /// All steps that can be refused are done in every region before the first remap: each region
    /// is prepared here, then the rest, and the region is committed only when those have succeeded.
    /// A commit can fail only in a system call that changes no contents.
    pub(crate) fn freeze_all(
        regions: &[Arc<Self>],
        mode: FreezeMode,
        frozen: &mut VecDeque<(RegionImage, FreezeReport)>,
    ) -> Result<(), RamError> {
        let Some((region, rest)) = regions.split_first() else { return Ok(()) };
        let mut state = region.checked(region.range())?;
        // Finishes earlier background work first: pages still being copied from here would be
        // shared twice, and adopted pages may not be filled yet.
        region.finish_background(&mut state)?;
        let table = region.table.lock();
        region.table.trace.freeze_begun();
        let plan = region.plan(&state, &table)?;
        // At this point there are no writers and every page that this VM owns is known.
        region.install_compacted(&mut state, [&plan.base, &plan.owned]);
        let prepared = region.prepare_freeze(&mut state, &plan, mode);
        let done = prepared.and_then(|prepared| Self::freeze_all(rest, mode, frozen).map(|()| prepared));
        let done = done.and_then(|prepared| region.commit_freeze(&mut state, &table, &plan, prepared));
        if done.is_err() {
            // I13: pages still mapped shared over the base file, or private, are still this VM's
            // own.
            for run in
                state.space.mappings().base_runs().iter().chain(&plan.owned).filter(|_| !broken(Break::ForgetUndo))
            {
                table.set_exclusive(*run);
            }
            state.space.trim();
            region.table.trace.freeze_failed();
        }
        let (mut map, report) = done?;
        region.compact_later(&mut state);
        region.store.sweep_later();
        // The child's map, which differs from the parent's in no-fork ranges (R19).
        dont_fork::hide(&state.dont_fork, &mut map);
        region.table.trace.image(&map, &state.dont_fork);
        let map = Arc::new(View::new(region.store.views(), map));
        frozen.push_front((RegionImage { map, dont_fork: state.dont_fork.clone() }, report));
        Ok(())
    }

    fn plan<'t>(&self, state: &State, table: &'t TableGuard<'_>) -> Result<FreezePlan<'t>, RamError> {
        // R19: no-fork pages are skipped. They stay as they are, and their bytes reach no layer.
        let kept = if broken(Break::InheritAll) { Vec::new() } else { dont_fork::runs(&state.dont_fork) };
        let mapped_shared = state.space.mappings().base_runs();
        let base = subtract_runs(&mapped_shared, &kept);
        let (mut owned, mut together) = (Vec::new(), Vec::new());
        let (mut copy, mut pinned) = (Vec::new(), Vec::new());
        // Absent pages that are no longer declared have no bytes to copy, and do not count as gaps
        // between other pages (R19).
        for private in self.not_absent(&subtract_runs(&subtract_runs(&[self.range()], &mapped_shared), &kept)) {
            let mut runs = self.store.pagemap().owned_runs(&self.at, private).map_err(RamError::Harvest)?;
            if broken(Break::BelieveTable) {
                runs = runs.iter().flat_map(|run| subtract_runs(&[*run], &table.not_exclusive(*run))).collect();
            }
            copy.extend(close_gaps(&runs));
            // At most the copied pages: a protected page is released by the thread that fills the
            // delta.
            together.extend(join_runs(&runs, SMALL_GAP));
            owned.extend(runs);
        }
        // Before the bits are cleared.
        let unseen = self.unseen_copies(state, &owned);
        let ignores_pins = self.ignores_pins();
        // Pages that devices used since the last freeze will be used again, so they are copied now
        // and left in place, like pinned pages. Otherwise each would be mapped anew, and copied
        // again at its next pin. Their bits stay set, so that such a pin needs no lock.
        let mut left = if ignores_pins { 0 } else { self.store.config().keep_recently_pinned_pages };
        let mut take_recently_pinned = |runs: &[PageRange]| {
            let mut used = Vec::new();
            for run in runs {
                let taken = table.take_recently_pinned(*run, left);
                left -= pages_in(&taken);
                used.extend(taken);
            }
            used
        };
        let (used_base, used_private) = (take_recently_pinned(&base), take_recently_pinned(&together));
        // I2, I8: the bit is cleared before a page is shared. An earlier pin excludes its page.
        for run in subtract_runs(&base, &used_base) {
            pinned.extend(table.share(run));
        }
        if ignores_pins {
            pinned.clear();
        }
        pinned.extend(used_base);
        if !broken(Break::ForgetPinned) {
            copy.extend(pinned.iter().copied());
        }
        let private = SharedPages::give_up(table, &subtract_runs(&together, &used_private));
        if !ignores_pins {
            pinned.extend(private.pinned());
            pinned.extend(used_private);
        }
        pinned.sort_unstable();
        copy.sort_unstable();
        Ok(FreezePlan { base, owned, private, pinned, unseen, copy })
    }

    /// Makes the copies and reserves mappings. On failure, or if the result is dropped, nothing has
    /// changed.
    fn prepare_freeze(
        &self,
        state: &mut State,
        plan: &FreezePlan<'_>,
        mode: FreezeMode,
    ) -> Result<PreparedFreeze, RamError> {
        let kept: &[PageRange] = if broken(Break::RemapPinned) { &[] } else { &plan.pinned };
        let to_remap = subtract_runs(&plan.base, kept);
        // Reserved before any change (D5): each run adds a mapping and splits the one it lies in.
        // Done first, because the background's mappings come on top.
        state.space.reserve_runs(to_remap.len())?;
        let delta = self.delta(state, plan, mode)?;
        Ok(PreparedFreeze { delta, to_remap })
    }

    /// Shares the prepared pages.
    fn commit_freeze(
        &self,
        state: &mut State,
        table: &TableGuard<'_>,
        plan: &FreezePlan<'_>,
        prepared: PreparedFreeze,
    ) -> Result<(Arc<LayerMap>, FreezeReport), RamError> {
        let PreparedFreeze { mut delta, to_remap } = prepared;
        let base_file = state.space.base_file().cloned();
        for (run, base_file) in to_remap.iter().zip(base_file.iter().cycle()) {
            let source = LayerOffset { layer: Arc::clone(base_file), at: run.start };
            if broken(Break::WriteLayer) {
                state.space.supersede(*run, source);
                continue;
            }
            // From here on these pages of the base file belong to a layer (I4).
            state.space.show(*run, &Mapping::Private(source))?;
        }
        self.privatize_dont_fork(state, table);
        state.space.register_base();
        let before = View::new(self.store.views(), Arc::clone(state.space.map()));
        for (run, source) in delta.all() {
            state.space.supersede(*run, source.clone());
        }
        let gaps = subtract_runs(&subtract_runs(&plan.copy, &plan.owned), &plan.pinned);
        let report = FreezeReport {
            remapped: pages_in(&to_remap),
            copied: pages_in(&plan.copy),
            pending: delta.bg_copy.as_ref().map_or(0, |bg_copy| bg_copy.missing()),
            pinned: plan.pinned.iter().map(|run| self.table.counts(*run).pinned).sum(),
        };
        let ahead = pages_in(&plan.pinned).saturating_sub(report.pinned);
        self.counters.count_guest(plan.unseen);
        self.counters.count_freeze(report.copied, report.pinned, ahead);
        // Use of the pages copied ahead is no longer known: the delta has their bytes.
        state.ahead.clear();
        state.moved = true;
        if let (Some(bg_copy), Some((_, source))) = (delta.bg_copy.take(), delta.staying.first()) {
            // The bits stay cleared: a pin of one of these pages first has it copied, under the
            // state lock.
            state.counted.clone_from(&plan.owned);
            state.freezing = Some(Freezing { layer: Arc::clone(&source.layer), before, gaps });
            bg_copy.start();
            return Ok((Arc::clone(state.space.map()), report));
        }
        state.counted.clear();
        let image = Arc::clone(state.space.map());
        self.share_copies(state, &delta.shared);
        state.space.keep_gaps(&before, &gaps);
        // Pages that were copied but not remapped are this VM's own as before: the layer has its
        // own copy of the bytes.
        let shared_id = delta.shared.first().map(|(_, source)| source.layer.id());
        for private in &plan.owned {
            for (range, mapping) in state.space.mappings().within(*private) {
                let shared = matches!(&mapping, Mapping::Private(now) if Some(now.layer.id()) == shared_id);
                if !shared {
                    table.set_exclusive(range);
                }
            }
        }
        state.space.trim();
        Ok((image, report))
    }

    /// R19: moves no-fork pages out of the VM's base file, which children map from now on. The
    /// pages become private pages with the same bytes, and leave holes in the file. Pinned pages
    /// stay (I3), and so do pages beyond the number that a pause allows.
    fn privatize_dont_fork(&self, state: &mut State, table: &TableGuard<'_>) {
        if state.space.base_file().is_none() {
            return;
        }
        let declared = dont_fork::runs(&state.dont_fork);
        let base: Vec<PageRange> = declared.iter().flat_map(|run| state.space.mappings().base_within(*run)).collect();
        let (mut moved, mut left) = (Vec::new(), MAX_PRIVATIZED);
        for run in base {
            let pinned = table.share(run);
            for piece in subtract_runs(&[run], &pinned) {
                if piece.len() <= left {
                    match state.space.privatize_base(piece) {
                        Ok(()) => {
                            left -= piece.len();
                            moved.push(piece);
                        }
                        Err(error) => tracing::debug!(%error, %piece, "no-fork pages stay in the base file"),
                    }
                }
                // In both places they are this VM's own.
                table.set_exclusive(piece);
            }
        }
        state.space.free_base(&moved);
    }

    /// Copies the region's current contents into a layer of its own.
    pub(crate) fn copy_whole(&self, grain: Backing, dont_fork: &DontForkMap) -> Result<RegionImage, RamError> {
        let _state = self.state();
        let layer = self.store.layer(self.pages(), grain)?;
        let copied = self.at.write_out(&[self.range()], layer.as_fd(), 0);
        copied.map_err(|source| RamError::Copy { pages: self.pages(), source })?;
        let mut map = LayerMap::new();
        map.insert(self.range(), LayerOffset { layer: Arc::new(layer), at: 0 });
        let map = Arc::new(View::new(self.store.views(), Arc::new(map)));
        Ok(RegionImage { map, dont_fork: dont_fork.clone() })
    }

    /// Makes the layers of the plan's copies: complete, or with the background copy that fills
    /// them.
    fn delta(&self, state: &mut State, plan: &FreezePlan<'_>, mode: FreezeMode) -> Result<Copies, RamError> {
        if plan.copy.is_empty() {
            return Ok(Copies::default());
        }
        let later = pages_in(&subtract_runs(&plan.owned, &plan.pinned));
        let wanted = match mode {
            FreezeMode::Eager => false,
            FreezeMode::Background => later > 0,
            FreezeMode::Auto => later >= self.store.config().background_pages,
        };
        if wanted {
            let packed = Packed::of(&plan.copy);
            match self.defer(state, plan, &packed) {
                Ok((layer, bg_copy)) => {
                    return Ok(Copies { staying: packed.placed(&layer), bg_copy: Some(bg_copy), ..Copies::default() });
                }
                Err(error) if mode == FreezeMode::Background => return Err(error),
                Err(error) => tracing::warn!(%error, "pages are copied while the VM is paused"),
            }
        }
        // Pages kept in place would spare pinned pages after all.
        let keep = if self.ignores_pins() { 0 } else { self.store.config().keep_pages };
        let shared = runs_to_remap(&plan.copy, &plan.pinned, keep);
        let staying = self.copied(&subtract_runs(&plan.copy, &shared))?;
        Ok(Copies { shared: self.copied(&shared)?, staying, bg_copy: None })
    }

    /// Copies `runs` into a layer of their own.
    fn copied(&self, runs: &[PageRange]) -> Result<DeltaRuns, RamError> {
        if runs.is_empty() {
            return Ok(Vec::new());
        }
        let packed = Packed::of(runs);
        let layer = self.store.delta_layer(packed.pages, packed.grain)?;
        let copied = self.at.write_out(&packed.runs, layer.as_fd(), 0);
        copied.map_err(|source| RamError::Copy { pages: packed.pages, source })?;
        Ok(packed.placed(&Arc::new(layer)))
    }

    /// Copies the pinned pages into a new delta layer, write-protects the others, and leaves these
    /// to the background. On failure, or if the layer is dropped, no page stays protected.
    fn defer(
        &self,
        state: &mut State,
        plan: &FreezePlan<'_>,
        packed: &Packed,
    ) -> Result<(Arc<Layer>, Arc<BackgroundCopy>), RamError> {
        let shared = self.store.background()?;
        let layer = Arc::new(self.store.unpopulated_layer(packed.pages, packed.grain)?);
        let file = failpoint(Call::Copy)
            .and_then(|()| layer.file().try_clone())
            .map_err(|source| RamError::Copy { pages: packed.pages, source })?;
        // Mappings that the background may make when it shares copied runs back: as many as are
        // available, possibly zero.
        let used = state.space.promised();
        let allowance =
            (2 * plan.private.runs().len() as u64).min(self.store.budget().fair_share().saturating_sub(used));
        let allowance = state.space.reserve(used + allowance).map_or(0, |()| allowance);
        let mapping = self.store.budget().promise(1)?;
        let beneath = View::new(self.store.views(), Arc::clone(state.space.map()));
        // Pages enter the file one by one; whole blocks are collapsed when all pages are filled.
        let later = (packed.grain == Backing::Huge).then(|| self.store.reclaim(ReclaimThread::sender)).flatten();
        let delta = Delta {
            file,
            parts: parts(&beneath, &plan.owned, &plan.pinned, packed),
            beneath,
            mapping,
            allowance,
            keep: self.store.config().keep_pages,
            later,
        };
        let bg_copy = BackgroundCopy::new(&shared, &self.at, delta)?;
        let fill: Arc<dyn LayerFill> = Arc::<BackgroundCopy>::clone(&bg_copy);
        layer.fill_with(fill);
        bg_copy.protect(&plan.private, &plan.pinned)?;
        Ok((layer, bg_copy))
    }

    /// Remaps copied private pages over their layer, longest runs first. Never an error: a page
    /// left out is just copied again next time.
    fn share_copies(&self, state: &mut State, shared: &[(PageRange, LayerOffset)]) {
        // D5: at most the region's share, regardless of the rest of the budget. The base pages and
        // the pieces of the image come on top.
        let share = self.store.budget().fair_share();
        let mut pieces: Vec<_> = shared.iter().collect();
        pieces.sort_unstable_by_key(|(run, _)| std::cmp::Reverse(run.len()));
        for (piece, source) in pieces {
            if state.space.mappings().len() as u64 + 2 > share {
                tracing::debug!("enough mappings: pages stay private to the parent until layers have been merged");
                break;
            }
            // Also refused when the budget is used up.
            if let Err(error) =
                state.space.reserve_runs(1).map_err(RamError::from).and_then(|()| state.space.catch_up(*piece, source))
            {
                tracing::debug!(%error, "pages stay private to the parent");
                break;
            }
        }
    }
}

/// A prepared freeze of one region, which can still be undone.
struct PreparedFreeze {
    delta: Copies,
    /// Base runs that become a layer's by a private mapping.
    to_remap: Vec<PageRange>,
}

/// Copies of a freeze, and their places.
#[derive(Default)]
struct Copies {
    /// Pages that will be shown to the parent from here.
    shared: DeltaRuns,
    /// Pages that stay the VM's own and in place, and all pages left to the background.
    staying: DeltaRuns,
    bg_copy: Option<Arc<BackgroundCopy>>,
}

impl Copies {
    fn all(&self) -> impl Iterator<Item = &(PageRange, LayerOffset)> {
        self.shared.iter().chain(&self.staying)
    }
}
