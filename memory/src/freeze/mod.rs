//! Freeze: what a VM exclusively owns becomes a layer that others may share.
//!
//! ```text
//!   base pages (shared mapping over the base file)       private pages (the kernel's copies)
//!     │ not pinned: remap private; the base file           │ copy into a delta layer
//!     │             is the layer. Nothing is copied.       │ many: remap over the delta, so that they are shared
//!     │ pinned:     copy into the delta; stays mapped      │ few, or pinned: stay as they are, still this VM's own
//!     │             shared and in place (I3)               │             (the layer has its own bytes)
//! ```
//!
//! The order is what keeps I1-I4, and what makes failure harmless (I13):
//!
//! 1. Bits are given up first, atomically against lockless pins ([`crate::ownership::word`]);
//!    a later pin waits for the table's lock.
//! 2. Everything that needs a copy is copied while every page still is where it was. Failing here
//!    changes nothing.
//! 3. Base pages are remapped. Contents do not change, so even a failure half-way leaves the VM
//!    whole: what was remapped is read from the same file, what was not stays owned.
//! 4. Private pages are remapped over the delta, as an optimisation: a page left out is merely
//!    copied again next time. Which are is decided before 2, so that those that stay get a layer to
//!    themselves: all of it is superseded at the next freeze, and its memory goes. In one layer
//!    with the others it would live as long as the last of them.
//! 5. Only then can the image be adopted.
//!
//! Where there is much to copy, steps 2 and 4 are left to the background
//! ([`crate::freeze::background`]): pinned pages are still copied here, then the others are
//! write-protected, and the image exists before its delta is complete.

pub(crate) mod background;
pub(crate) mod protect;

mod copies;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::RamError;
use crate::freeze::background::{BackgroundCopy, Delta};
use crate::freeze::protect::SharedPages;
use crate::layer::registry::View;
use crate::layer::{Layer, LayerMap, Source};
use crate::ownership::TableGuard;
use crate::reclaim::ReclaimThread;
use crate::region::mappings::Mapping;
use crate::region::nofork::{self, NoForkMap};
use crate::region::{Freezing, GuestRegion, State};
use crate::store::Backing;
use crate::testing::failpoint::{Call, failpoint};
use crate::testing::sabotage::{Break, broken};
use crate::units::{PageRange, join_runs, pages_in, subtract_runs};

pub(crate) use copies::{Packed, Placed};
use copies::{SMALL_GAP, close_gaps, parts, runs_to_remap};

/// No-fork pages that a freeze moves out of the base file, at most: reading them takes a
/// millisecond.
const MAX_WITHDRAWN: u64 = 1_024;

/// When a freeze copies the private pages that have to be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreezeMode {
    /// Before it returns.
    Eager,
    /// In the background, however few they are. An error where the host cannot.
    Background,
    /// In the background when they are many and the host can.
    #[default]
    Auto,
}

/// What a freeze does with a page that is pinned for DMA.
#[cfg(any(test, feature = "hazard"))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PinPolicy {
    /// It is copied for the others, and stays the VM's own and in place (I3).
    #[default]
    Unshare,
    /// It is shared and write-protected like any other, as kernels did before they told exclusive
    /// pages apart. **Memory is lost**: devices write into layers, and into frames that the guest
    /// has left. For showing that a test would notice.
    Ignore,
}

/// A region at one instant.
#[derive(Clone, Debug)]
pub(crate) struct RegionImage {
    pub(crate) map: Arc<View>,
    /// What was not inherited, and will not be by the children's children.
    pub(crate) no_fork: NoForkMap,
}

/// What one freeze did. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreezeReport {
    /// Became layer pages by remapping alone.
    pub remapped: u64,
    /// Were copied into a delta layer (gaps that were closed included), or will be.
    pub copied: u64,
    /// Of those, left to the background.
    pub pending: u64,
    /// Of the copied, pinned: they stay exclusive and in place.
    pub pinned: u64,
}

impl std::ops::AddAssign for FreezeReport {
    fn add_assign(&mut self, other: Self) {
        self.remapped += other.remapped;
        self.copied += other.copied;
        self.pending += other.pending;
        self.pinned += other.pinned;
    }
}

/// What there is to freeze, decided under both locks.
struct Plan<'t> {
    base: Vec<PageRange>,
    /// Private pages this VM owns.
    owned: Vec<PageRange>,
    /// Of those, the ones given up: not pinned. Short gaps between them are among them, so that
    /// protecting takes few calls.
    private: SharedPages<'t>,
    /// Base and private.
    pinned: Vec<PageRange>,
    /// Of the owned, those that the kernel has copied since they were last counted.
    unseen: u64,
    /// What goes into the delta: `owned` with small gaps closed, and the pinned base pages.
    copy: Vec<PageRange>,
}

impl GuestRegion {
    /// Freezes `regions`, all or none; see the module's documentation. Nothing but pinned DMA may
    /// be writing to them.
    ///
    /// Everything that can be refused is done in all of them before the first is remapped: each is
    /// prepared here, then the rest, and only when those have succeeded is it committed. A commit
    /// can fail in one system call, which changes no contents.
    pub(crate) fn freeze_all(
        regions: &[Arc<Self>],
        mode: FreezeMode,
        frozen: &mut VecDeque<(RegionImage, FreezeReport)>,
    ) -> Result<(), RamError> {
        let Some((region, rest)) = regions.split_first() else { return Ok(()) };
        let mut state = region.checked(region.range())?;
        // Before anything is looked at: what is still being copied from here would be shared twice,
        // and what this VM was given may not be there yet.
        region.finish_background(&mut state)?;
        let table = region.table.lock();
        region.table.trace.freeze_begun();
        let plan = region.plan(&state, &table)?;
        // While nothing writes and every page this VM owns is known.
        region.take_over_some(&mut state, [&plan.base, &plan.owned]);
        let prepared = region.prepare_freeze(&mut state, &plan, mode);
        let done = prepared.and_then(|prepared| Self::freeze_all(rest, mode, frozen).map(|()| prepared));
        let done = done.and_then(|prepared| region.commit_freeze(&mut state, &table, &plan, prepared));
        if done.is_err() {
            // I13: whatever is still base or private is still this VM's own.
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
        // The map of a child, which is not in all the parent's own (R19).
        nofork::hide(&state.no_fork, &mut map);
        region.table.trace.image(&map, &state.no_fork);
        let map = Arc::new(View::new(region.store.views(), map));
        frozen.push_front((RegionImage { map, no_fork: state.no_fork.clone() }, report));
        Ok(())
    }

    fn plan<'t>(&self, state: &State, table: &'t TableGuard<'_>) -> Result<Plan<'t>, RamError> {
        // R19: what children do not inherit is not looked at. It stays as it is, and its bytes
        // reach no layer.
        let kept = if broken(Break::InheritAll) { Vec::new() } else { nofork::runs(&state.no_fork) };
        let mapped_shared = state.space.mappings().base_runs();
        let base = subtract_runs(&mapped_shared, &kept);
        let (mut owned, mut together) = (Vec::new(), Vec::new());
        let (mut copy, mut pinned) = (Vec::new(), Vec::new());
        // What is absent though it is not declared any more has nothing to be copied, and is no gap
        // between what has (R19).
        for private in self.not_absent(&subtract_runs(&subtract_runs(&[self.range()], &mapped_shared), &kept)) {
            let mut runs = self.store.pagemap().owned_runs(&self.at, private).map_err(RamError::Harvest)?;
            if broken(Break::BelieveTable) {
                runs = runs.iter().flat_map(|run| subtract_runs(&[*run], &table.not_exclusive(*run))).collect();
            }
            copy.extend(close_gaps(&runs));
            // Never more than is copied: what is protected is released by what fills the delta.
            together.extend(join_runs(&runs, SMALL_GAP));
            owned.extend(runs);
        }
        // Before bits are given up.
        let unseen = self.unseen_copies(state, &owned);
        let ignores_pins = self.ignores_pins();
        // Pages that devices had since the last freeze they will have again: copied now and left
        // where they are, like those they have. Otherwise each would be mapped anew, and copied
        // once more at its next pin. Their bits stay, so that such a pin needs no lock.
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
        // I2, I8: the bit goes before anything is shared. A pin that got in first keeps its page
        // out.
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
        Ok(Plan { base, owned, private, pinned, unseen, copy })
    }

    /// Copies what has to be copied, and has mappings promised. Failing, or with what it returns
    /// dropped, nothing has changed.
    fn prepare_freeze(&self, state: &mut State, plan: &Plan<'_>, mode: FreezeMode) -> Result<Prepared, RamError> {
        let kept: &[PageRange] = if broken(Break::RemapPinned) { &[] } else { &plan.pinned };
        let to_remap = subtract_runs(&plan.base, kept);
        // Promised before anything is touched (D5): each run adds itself and splits what it lies
        // in. First, because what the background may map comes on top.
        state.space.reserve_runs(to_remap.len())?;
        let delta = self.delta(state, plan, mode)?;
        Ok(Prepared { delta, to_remap })
    }

    /// Shares what was prepared.
    fn commit_freeze(
        &self,
        state: &mut State,
        table: &TableGuard<'_>,
        plan: &Plan<'_>,
        prepared: Prepared,
    ) -> Result<(Arc<LayerMap>, FreezeReport), RamError> {
        let Prepared { mut delta, to_remap } = prepared;
        let base_file = state.space.base_file().cloned();
        for (run, base_file) in to_remap.iter().zip(base_file.iter().cycle()) {
            let source = Source { layer: Arc::clone(base_file), at: run.start };
            if broken(Break::WriteLayer) {
                state.space.supersede(*run, source);
                continue;
            }
            // From here on these pages of the base file are a layer's (I4).
            state.space.show(*run, &Mapping::Private(source))?;
        }
        self.withdraw_no_fork(state, table);
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
        // What came of them cannot be told any more: the delta has their bytes.
        state.ahead.clear();
        state.moved = true;
        if let (Some(bg_copy), Some((_, source))) = (delta.bg_copy.take(), delta.staying.first()) {
            // The bits stay given up: a pin of one of these pages has it settled first, under the
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
        // own bytes.
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

    /// R19: pages that children do not inherit leave the VM's base file, which is one that children
    /// map from now on: they become private pages with the same bytes, and the file has holes in
    /// their place. What is pinned stays where it is (I3), and so does what is too much for a
    /// pause.
    fn withdraw_no_fork(&self, state: &mut State, table: &TableGuard<'_>) {
        if state.space.base_file().is_none() {
            return;
        }
        let declared = nofork::runs(&state.no_fork);
        let base: Vec<PageRange> = declared.iter().flat_map(|run| state.space.mappings().base_within(*run)).collect();
        let (mut moved, mut left) = (Vec::new(), MAX_WITHDRAWN);
        for run in base {
            let pinned = table.share(run);
            for piece in subtract_runs(&[run], &pinned) {
                if piece.len() <= left {
                    match state.space.withdraw(piece) {
                        Ok(()) => {
                            left -= piece.len();
                            moved.push(piece);
                        }
                        Err(error) => tracing::debug!(%error, %piece, "no-fork pages stay in the base file"),
                    }
                }
                // Here or there, they are this VM's own.
                table.set_exclusive(piece);
            }
        }
        state.space.free_base(&moved);
    }

    /// All of the region, as it is read now, in a layer of its own.
    pub(crate) fn copy_whole(&self, grain: Backing, no_fork: &NoForkMap) -> Result<RegionImage, RamError> {
        let _state = self.state();
        let layer = self.store.layer(self.pages(), grain)?;
        let copied = self.at.write_out(&[self.range()], layer.as_fd(), 0);
        copied.map_err(|source| RamError::Copy { pages: self.pages(), source })?;
        let mut map = LayerMap::new();
        map.insert(self.range(), Source { layer: Arc::new(layer), at: 0 });
        let map = Arc::new(View::new(self.store.views(), Arc::new(map)));
        Ok(RegionImage { map, no_fork: no_fork.clone() })
    }

    /// What the plan copies, in layers: complete, or with what fills them.
    fn delta(&self, state: &mut State, plan: &Plan<'_>, mode: FreezeMode) -> Result<Copies, RamError> {
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
        // What is kept in place would be spared after all.
        let keep = if self.ignores_pins() { 0 } else { self.store.config().keep_pages };
        let shared = runs_to_remap(&plan.copy, &plan.pinned, keep);
        let staying = self.copied(&subtract_runs(&plan.copy, &shared))?;
        Ok(Copies { shared: self.copied(&shared)?, staying, bg_copy: None })
    }

    /// Copies `runs` into a layer of their own.
    fn copied(&self, runs: &[PageRange]) -> Result<Placed, RamError> {
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
    /// to the background. Failing, or with the layer dropped, nothing stays protected.
    fn defer(
        &self,
        state: &mut State,
        plan: &Plan<'_>,
        packed: &Packed,
    ) -> Result<(Arc<Layer>, Arc<BackgroundCopy>), RamError> {
        let shared = self.store.background()?;
        let layer = Arc::new(self.store.unpopulated_layer(packed.pages, packed.grain)?);
        let file = failpoint(Call::Copy)
            .and_then(|()| layer.file().try_clone())
            .map_err(|source| RamError::Copy { pages: packed.pages, source })?;
        // Mappings that the background may make when it shares copied runs back: as many as are to
        // be had, none if there are none.
        let used = state.space.promised();
        let allowance =
            (2 * plan.private.runs().len() as u64).min(self.store.budget().fair_share().saturating_sub(used));
        let allowance = state.space.reserve(used + allowance).map_or(0, |()| allowance);
        let mapping = self.store.budget().promise(1)?;
        let beneath = View::new(self.store.views(), Arc::clone(state.space.map()));
        // Pages come into its file one by one; what is a whole block is put together when all are
        // there.
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
        layer.fill_with(Arc::clone(&bg_copy));
        bg_copy.protect(&plan.private, &plan.pinned)?;
        Ok((layer, bg_copy))
    }

    /// Remaps copied private pages over their layer, longest runs first. Never an error: a page
    /// left out is only copied again next time.
    fn share_copies(&self, state: &mut State, shared: &[(PageRange, Source)]) {
        // D5: no more than its share, whatever is left of the budget; the base pages and the pieces
        // of the image come on top.
        let share = self.store.budget().fair_share();
        let mut pieces: Vec<_> = shared.iter().collect();
        pieces.sort_unstable_by_key(|(run, _)| std::cmp::Reverse(run.len()));
        for (piece, source) in pieces {
            if state.space.mappings().len() as u64 + 2 > share {
                tracing::debug!("enough mappings: pages stay private to the parent until layers have been merged");
                break;
            }
            // Refused when the budget is used up, too.
            if let Err(error) =
                state.space.reserve_runs(1).map_err(RamError::from).and_then(|()| state.space.catch_up(*piece, source))
            {
                tracing::debug!(%error, "pages stay private to the parent");
                break;
            }
        }
    }
}

/// A freeze of one region that can still be given up.
struct Prepared {
    delta: Copies,
    /// Base runs that become a layer's by being mapped privately.
    to_remap: Vec<PageRange>,
}

/// What a freeze copies, and where to.
#[derive(Default)]
struct Copies {
    /// Pages that the parent will be shown from here.
    shared: Placed,
    /// Pages that stay its own and in place, and whatever is left to the background.
    staying: Placed,
    bg_copy: Option<Arc<BackgroundCopy>>,
}

impl Copies {
    fn all(&self) -> impl Iterator<Item = &(PageRange, Source)> {
        self.shared.iter().chain(&self.staying)
    }
}
