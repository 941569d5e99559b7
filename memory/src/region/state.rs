//! The data under a region's lock.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::layer::interval::Piece;
use crate::layer::registry::View;
use crate::layer::{Layer, LayerMap, LayerOffset};
use crate::region::GuestRegion;
use crate::region::compact::Compaction;
use crate::region::dont_fork::DontForkMap;
use crate::region::mappings::Mapping;
use crate::region::reset::LayerWindows;
use crate::region::space::AddressSpace;
use crate::sync::whole::MutexGuard;
use crate::units::PageRange;

/// The region's data that changes only under its lock.
///
/// Lock order: this lock, then the ownership table's.
#[derive(Debug)]
pub(crate) struct State {
    /// The address space (I14).
    pub(crate) space: AddressSpace,
    /// No-fork declarations.
    pub(crate) dont_fork: DontForkMap,
    /// The last freeze, if it was copied in the background and its outcome is not absorbed yet.
    pub(crate) freezing: Option<Freezing>,
    /// Private pages without their bit that are already counted as copies, ascending: a background
    /// freeze has left them in place.
    pub(crate) counted: Vec<PageRange>,
    /// Layers adopted before they were complete, each watched where it is mapped.
    pub(crate) waits: Vec<Arc<Layer>>,
    /// The background merge of the view, or its result.
    pub(crate) compaction: Option<Arc<Compaction>>,
    /// Pieces and layers of the map after the last compaction.
    pub(crate) last_compacted: (usize, usize),
    /// A reset has failed half-way: only another reset may follow.
    pub(crate) inconsistent: bool,
    /// Pages copied ahead, ascending, since the VM was last made, reset, frozen or suspended.
    pub(crate) ahead: Vec<PageRange>,
    /// The VM was frozen or suspended since it was made or reset: pages written before belong to a
    /// layer.
    pub(crate) moved: bool,
    /// The VM was suspended, so pages mapped now were touched since.
    pub(crate) woken: bool,
    /// Number of times that a working set was read ahead.
    pub(crate) wakes: u64,
    /// Layers of the published view that resets read through a mapping.
    pub(crate) windows: LayerWindows,
}

impl State {
    pub(super) fn new(space: AddressSpace) -> Self {
        Self {
            space,
            dont_fork: DontForkMap::new(),
            freezing: None,
            counted: Vec::new(),
            waits: Vec::new(),
            compaction: None,
            last_compacted: (0, 0),
            inconsistent: false,
            ahead: Vec::new(),
            moved: false,
            woken: false,
            wakes: 0,
            windows: LayerWindows::default(),
        }
    }

    /// The parts of `runs`, ascending, that complete layers of `map` provide, where the region shows them.
    pub(super) fn provided_of(&self, map: &LayerMap, runs: &[PageRange]) -> Vec<(PageRange, LayerOffset)> {
        let mut provided = Vec::with_capacity(runs.len());
        // Most images have few layers. So the last answer often holds for the next run.
        let mut known: Option<(PageRange, LayerOffset)> = None;
        for run in runs {
            if !known.as_ref().is_some_and(|(range, _)| range.covers(*run)) {
                known = self.provided_around(map, run.start);
            }
            match known.as_ref().filter(|(range, _)| range.covers(*run)) {
                Some((range, source)) => provided.push((*run, source.advance(run.start - range.start))),
                None => provided.extend(self.provided(map, *run)),
            }
        }
        provided
    }

    /// All pages around `page` that one complete layer of `map` provides in order, where the region shows them.
    fn provided_around(&self, map: &LayerMap, page: u64) -> Option<(PageRange, LayerOffset)> {
        let (piece, _) = self.space.mappings().piece(page)?;
        let (shown, _) = map.entry(page)?;
        self.provided(map, piece.intersect(shown)).pop()
    }

    /// The parts of `run` that complete layers of `map` provide, where the region shows them.
    pub(super) fn provided(&self, map: &LayerMap, run: PageRange) -> Vec<(PageRange, LayerOffset)> {
        let mut provided = Vec::new();
        for (piece, mapping) in self.space.mappings().within(run) {
            let Mapping::Private(mapped) = mapping else { continue };
            if mapped.layer.pending().is_some() || mapped.layer.failure().is_some() {
                continue;
            }
            // A sweep may punch pages that the map does not show.
            let shown = map.within(piece).into_iter();
            provided.extend(shown.filter(|(part, source)| source.is(&mapped.advance(part.start - piece.start))));
        }
        provided
    }
}

/// Work left for the end of a background freeze.
#[derive(Debug)]
pub(crate) struct Freezing {
    /// The delta.
    pub(crate) layer: Arc<Layer>,
    /// The map without the delta. If the delta fails, the freeze is undone.
    pub(crate) before: View,
    /// Closed gaps: pages in the delta that were not this VM's own.
    pub(crate) gaps: Vec<PageRange>,
}

/// The locked state. Changes to the view are published before unlock. Until then no lock-free pin
/// treats a page as shared (R11, [`crate::region::srcu`]).
#[derive(Debug)]
pub(crate) struct LockedState<'a> {
    pub(super) region: &'a GuestRegion,
    pub(super) state: MutexGuard<'a, State>,
}

impl Deref for LockedState<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for LockedState<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for LockedState<'_> {
    fn drop(&mut self) {
        #[cfg(feature = "trace")]
        if self.region.is_live()
            && self.state.freezing.is_none()
            && !self.state.inconsistent
            && !std::thread::panicking()
        {
            self.region.table.trace.settled(self.state.space.map());
        }
        self.state.space.publish();
        let replaced = self.state.space.take_replaced();
        // A window keeps a file of an earlier view from being freed.
        let windows =
            if replaced.is_empty() { LayerWindows::default() } else { std::mem::take(&mut self.state.windows) };
        // After the new view is published and its layers are mapped, and before another pin may
        // begin: a device that reads the old view keeps it.
        let gone: Vec<View> = replaced.into_iter().flat_map(|view| self.region.srcu.retire(view)).collect();
        self.region.srcu.end_change();
        if gone.iter().any(View::shows_layers) || windows.len() > 0 {
            // These views may hold the last handles of large layers, and the VM may be paused.
            self.region.store.dispose((gone, windows));
        }
    }
}
