//! Adopting an image: a child's reservation is mapped over the layers of a freeze.
//!
//! Each entry of the layer map is one private mapping. If that exceeds the VM's share of the
//! mapping budget, short runs are copied into the child instead, so that the mapping below spans
//! them. That costs a page of private memory each, and avoids refusing the fork.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::RamError;
use crate::freeze::background::BackgroundError;
use crate::layer::fill::AttachError;
use crate::layer::interval::Piece;
use crate::layer::{Layer, LayerMap, LayerOffset};
use crate::region::dont_fork::{self, DontForkMap};
use crate::region::freeze::RegionImage;
use crate::region::mappings::Mapping;
use crate::region::{GuestRegion, State};
use crate::units::{PAGE_SIZE, PageRange, pages_in, subtract_runs};

/// Maximum memory to copy into a child to save mappings. Beyond it the fork is refused.
const MAX_COPIED: u64 = (64 << 20) / PAGE_SIZE;

/// Layout of a child: mappings that cover the region, then copies on top of them.
#[derive(Debug, Default)]
struct ChildLayout {
    mappings: Vec<(PageRange, Mapping)>,
    copies: Vec<(PageRange, LayerOffset)>,
}

impl ChildLayout {
    /// Copies runs of up to `short` pages; maps the rest.
    fn plan(map: &LayerMap, all: PageRange, short: u64) -> Self {
        let mut layout = Self::default();
        let mut at = all.start;
        for (range, source) in map.iter() {
            layout.map(PageRange::new(at, range.start), Mapping::Zero);
            at = range.end;
            if range.len() <= short {
                layout.copy(range, source);
            } else {
                layout.map(range, Mapping::Private(source.clone()));
            }
        }
        layout.map(PageRange::new(at, all.end), Mapping::Zero);
        layout
    }

    fn map(&mut self, range: PageRange, mapping: Mapping) {
        if range.is_empty() {
            return;
        }
        // One mapping can extend over runs that are copied on top of it (such runs are zeros until
        // then).
        if let [.., (before, below), (filler, Mapping::Zero)] = self.mappings.as_mut_slice()
            && filler.end == range.start
            && goes_on(below, before.len() + filler.len(), &mapping)
            && self.copies.iter().rev().take_while(|(r, _)| r.start >= filler.start).map(|(r, _)| r.len()).sum::<u64>()
                == filler.len()
        {
            before.end = range.end;
            self.mappings.pop();
            return;
        }
        if let Some((last, below)) = self.mappings.last_mut()
            && last.end == range.start
            && goes_on(below, last.len(), &mapping)
        {
            last.end = range.end;
            return;
        }
        self.mappings.push((range, mapping));
    }

    fn copy(&mut self, range: PageRange, source: &LayerOffset) {
        self.map(range, Mapping::Zero);
        self.copies.push((range, source.clone()));
    }

    fn copied(&self) -> u64 {
        self.copies.iter().map(|(r, _)| r.len()).sum()
    }
}

fn goes_on(below: &Mapping, pages: u64, next: &Mapping) -> bool {
    match (below, next) {
        (Mapping::Private(a), Mapping::Private(b)) => a.continues(pages, b),
        (Mapping::Zero, Mapping::Zero) => true,
        _ => false,
    }
}

impl GuestRegion {
    /// Maps the layers of `map` into this empty region. The region goes live only together with all
    /// regions of its VM.
    pub(crate) fn adopt(&self, image: &RegionImage) -> Result<(), RamError> {
        if let Some(error) = image.map.iter().find_map(|(_, source)| source.layer.failure()) {
            return Err(RamError::Lost(error));
        }
        let mut state = self.state();
        Self::expect_empty(self.base, &state)?;
        let adopted = self.lay_out(&mut state, image);
        if adopted.is_err() {
            // I13: a child that was not started leaves no resources behind.
            self.clear(&mut state);
        }
        adopted
    }

    fn lay_out(&self, state: &mut State, image: &RegionImage) -> Result<(), RamError> {
        let map = &image.map;
        let absent = dont_fork::absent(&image.dont_fork);
        let share = self.store.budget().fair_share();
        let mut short = 0;
        let mut layout = ChildLayout::plan(map, self.range(), short);
        while layout.mappings.len() as u64 > share && layout.copied() < MAX_COPIED && short < self.pages() {
            short = (short * 2).max(1);
            let coarser = ChildLayout::plan(map, self.range(), short);
            if coarser.copied() > MAX_COPIED {
                break;
            }
            layout = coarser;
        }
        state.space.reserve((layout.mappings.len() + 2 * absent.len()) as u64)?;
        let State { space, waits, .. } = state;
        // Before the region is live: an access to a hole in an unfinished layer must wait.
        space.lay_out(&layout.mappings, map.map(), |range, mapping| match mapping {
            Mapping::Private(source) => self.watch(waits, range, source),
            _ => Ok(()),
        })?;
        let copied: Vec<PageRange> = layout.copies.iter().map(|(r, _)| *r).collect();
        for (range, from) in &layout.copies {
            from.layer.wait_filled(PageRange::with_len(from.at, range.len())).map_err(RamError::Lost)?;
            self.at
                .read_in(*range, from.layer.as_fd(), from.at)
                .map_err(|source| RamError::Copy { pages: pages_in(&copied), source })?;
        }
        let table = self.table.lock();
        // I2: a copy made on fork is the child's own. An absent page is not, even if the image's map shows it: a pin
        // by its bit would not look at the declarations.
        let copied = subtract_runs(&copied, &absent);
        copied.iter().for_each(|range| table.set_exclusive(*range));
        self.counters.count_adopted(pages_in(&copied));
        for range in &absent {
            state.space.show(*range, &Mapping::Absent)?;
        }
        state.dont_fork = image.dont_fork.clone();
        Ok(())
    }

    fn watch(&self, waits: &mut Vec<Arc<Layer>>, range: PageRange, source: &LayerOffset) -> Result<(), RamError> {
        // Not only for pending copies: the copy may have failed since the check, and only the
        // background copy's lock protects against that.
        let Some(bg_copy) = source.layer.bg_copy() else { return Ok(()) };
        let missing =
            Arc::clone(bg_copy).attach(&self.at, range, source.at, &self.failure).map_err(|error| match error {
                AttachError::Failed(error) => RamError::Lost(error),
                AttachError::Watch(source) => BackgroundError::Watch(source).into(),
            })?;
        if missing && !waits.iter().any(|layer| Arc::ptr_eq(layer, &source.layer)) {
            waits.push(Arc::clone(&source.layer));
        }
        Ok(())
    }

    /// Removes all memory and leaves bare address space, as after [`GuestRegion::reserve`].
    pub(crate) fn empty(&self) {
        self.clear(&mut self.state());
    }

    /// Undoes all steps of populating: addresses, bits, declarations. The region was never live, so
    /// it has no pins.
    fn clear(&self, state: &mut State) {
        let pinned = self.table.lock().share(self.range());
        debug_assert!(pinned.is_empty(), "a region that was never live is pinned");
        state.dont_fork = DontForkMap::new();
        for layer in state.waits.drain(..) {
            if let Some(bg_copy) = layer.bg_copy() {
                bg_copy.detach(&self.at);
            }
        }
        state.space.clear();
        state.compaction = None;
    }
}
