//! Compaction: merging a view of many pieces or many layers into few.
//!
//! Every freeze adds a delta on top, so a VM frozen a thousand times, or the thousandth generation
//! of forks, would consist of a thousand layers in as many pieces, each of them a mapping in every
//! VM started from it. Layers do not change (I4), so short pieces can be copied together into one
//! new layer at any time, while all VMs run. The reclaim thread does that, from the map that a
//! freeze has left. The VM installs the result at a later freeze, while there are no writers:
//!
//! * where its map still has the copied source, the map is changed, and
//! * where, in addition, the VM does not own the page and its mapping agrees with the map, the new
//!   layer is mapped in place of the old.
//!
//! Neither step changes contents, so compaction can stop after any piece. Reference pages stay
//! references (R22).

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Config;
use crate::error::RamError;
use crate::freeze::copies::Packed;
use crate::layer::interval::{IntervalMap, Piece};
use crate::layer::registry::View;
use crate::layer::{LayerMap, LayerOffset};
use crate::region::mappings::{Mapping, Mappings};
use crate::region::{GuestRegion, State, dont_fork, parts_of, same};
use crate::store::Store;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange, join_runs, pages_in, subtract_runs};

/// Target number of short pieces, if reachable by copying at most [`MAX_COPY_RATIO`] times their
/// pages.
const TARGET_PIECES: usize = 48;
/// See [`TARGET_PIECES`].
const MAX_COPY_RATIO: u64 = 4;
/// Hard limit on short pieces, at any cost of copying: half of the mappings that a VM may have.
const MAX_SHORT_PIECES: usize = 512;
/// Pages that may always be copied.
const MIN_COPY_BUDGET: u64 = 2_048;
/// Longer pieces are not copied.
const MAX_MERGED_PAGES: u64 = BLOCK_PAGES;
/// Mappings that a freeze makes on behalf of a compaction, which bounds the added pause. The others
/// wait for the next freeze.
const MAX_REMAPS_AT_FREEZE: usize = 24;

/// Result of a compaction. Pieces and layers are counted over all regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// Pages copied into new layers.
    pub copied: u64,
    /// Pieces of the view before the compaction.
    pub pieces_before: u64,
    /// Pieces after it.
    pub pieces: u64,
    /// Layers in the view before the compaction.
    pub layers_before: u64,
    /// Layers after it.
    pub layers: u64,
}

impl CompactReport {
    pub(crate) fn note(&mut self, before: &LayerMap, after: &LayerMap, copied: u64) {
        self.copied += copied;
        self.pieces_before += before.len() as u64;
        self.pieces += after.len() as u64;
        self.layers_before += layers([before]) as u64;
        self.layers += layers([after]) as u64;
    }
}

/// Layers that `maps` refer to.
pub(crate) fn layers<'a>(maps: impl IntoIterator<Item = &'a LayerMap>) -> usize {
    let pieces = maps.into_iter().flat_map(LayerMap::iter);
    let mut ids: Vec<_> = pieces.map(|(_, source)| source.layer.id()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.len()
}

/// The runs to copy together, ascending: every short piece, and the gaps between them where that is
/// cheap. `barred` is left out.
pub(crate) fn runs_to_merge(map: &LayerMap, barred: &[PageRange]) -> Vec<PageRange> {
    let (mut short, mut barred) = (Vec::new(), barred.to_vec());
    for (range, source) in map.iter() {
        if source.layer.id().is_reference() {
            barred.push(range);
        } else if range.len() < MAX_MERGED_PAGES {
            short.push(range);
        }
    }
    barred.sort_unstable();
    let short = subtract_runs(&short, &barred);
    let most = (MAX_COPY_RATIO * pages_in(&short)).max(MIN_COPY_BUDGET);
    let mut patches = join_runs(&short, 0);
    let mut gap = 4;
    while patches.len() > TARGET_PIECES {
        let wider = subtract_runs(&join_runs(&short, gap), &barred);
        let dear = pages_in(&wider) > most && patches.len() <= MAX_SHORT_PIECES;
        if dear || gap > map_end(map) {
            break;
        }
        patches = wider;
        gap *= 4;
    }
    patches
}

fn map_end(map: &LayerMap) -> u64 {
    map.iter().last().map_or(0, |(range, _)| range.end)
}

/// Whether the size of `map` makes merging worthwhile: it has grown well beyond the size after the
/// last compaction.
fn needs_compaction(map: &LayerMap, last_compacted: (usize, usize), config: &Config) -> bool {
    let (pieces, deep) = last_compacted;
    // Any threshold is accepted, because the user sets it.
    let deep = deep.saturating_add(config.compact_at_layers);
    map.len() > config.compact_at_pieces.max(pieces + pieces / 2) || (map.len() > deep && layers([map]) > deep)
}

/// A copy of parts of a map in one layer.
#[derive(Debug)]
pub(crate) struct MergedLayer {
    /// The map it is a copy of.
    of: Arc<LayerMap>,
    /// The copied runs, and where each was copied to.
    placed: Vec<(PageRange, LayerOffset)>,
    /// Keeps the new layer's pages in view until the views that take them over are published.
    seen: View,
}

impl MergedLayer {
    /// Copies `patches` of `of`. Returns `None` if merging gains nothing.
    pub(crate) fn make(store: &Store, of: &Arc<LayerMap>, patches: &[PageRange]) -> Result<Option<Self>, RamError> {
        if patches.is_empty() {
            return Ok(None);
        }
        let packed = Packed::of(patches);
        let layer = Arc::new(store.layer(packed.pages, packed.grain)?);
        let mut buffer = vec![0; (256 * PAGE_SIZE) as usize];
        for (run, at) in packed.iter() {
            // Pages in no layer are zeros, in the new file as well.
            for (range, source) in of.within(run) {
                source.layer.wait_filled(PageRange::with_len(source.at, range.len())).map_err(RamError::Lost)?;
                let copied = copy(
                    source.layer.file(),
                    source.at,
                    layer.file(),
                    at + range.start - run.start,
                    range.len(),
                    &mut buffer,
                );
                copied.map_err(|source| RamError::Copy { pages: range.len(), source })?;
            }
        }
        let placed = packed.placed(&layer);
        let mut map = LayerMap::new();
        placed.iter().for_each(|(run, source)| map.insert(*run, source.clone()));
        Ok(Some(Self { of: Arc::clone(of), placed, seen: View::new(store.views(), Arc::new(map)) }))
    }

    pub(crate) fn pages(&self) -> u64 {
        self.placed.iter().map(|(run, _)| run.len()).sum()
    }

    /// The parts of `run` that `now` still maps as at the time of the copy.
    fn unchanged(&self, now: &LayerMap, run: PageRange) -> Vec<PageRange> {
        let mut unchanged = Vec::new();
        for (range, was) in parts_of(&self.of, run) {
            for (piece, is) in parts_of(now, range) {
                let was = was.as_ref().map(|source| source.advance(piece.start - range.start));
                if same(was.as_ref(), is.as_ref()) {
                    unchanged.push(piece);
                }
            }
        }
        unchanged.sort_unstable();
        join_runs(&unchanged, 0)
    }

    /// Replaces sources in `map` by their copies, wherever the copied source is unchanged.
    pub(crate) fn substitute(&self, map: &mut LayerMap) {
        for (run, source) in &self.placed {
            for same in self.unchanged(map, *run) {
                map.insert(same, source.advance(same.start - run.start));
            }
        }
    }
}

fn copy(from: &File, at: u64, into: &File, to: u64, pages: u64, buffer: &mut [u8]) -> io::Result<()> {
    let (mut done, whole) = (0, pages * PAGE_SIZE);
    while done < whole {
        failpoint(Call::Copy)?;
        let part = &mut buffer[..(whole - done).min(256 * PAGE_SIZE) as usize];
        from.read_exact_at(part, at * PAGE_SIZE + done)?;
        into.write_all_at(part, to * PAGE_SIZE + done)?;
        done += part.len() as u64;
    }
    Ok(())
}

/// A compaction in the background.
#[derive(Debug, Default)]
pub(crate) struct Compaction(Mutex<CompactionState>);

#[derive(Debug, Default)]
enum CompactionState {
    #[default]
    Copying,
    /// The merged parts that are not installed yet, if the merge succeeded.
    Copied(Option<MergedLayer>),
}

impl Compaction {
    fn set(&self, merged: Option<MergedLayer>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = CompactionState::Copied(merged);
    }

    /// Takes the result, once.
    fn take(&self) -> Option<Option<MergedLayer>> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            CompactionState::Copying => None,
            CompactionState::Copied(merged) => Some(merged.take()),
        }
    }
}

/// Whether mapping `pieces` anew takes no more mappings than exist now. False where one large layer
/// shows between many pages of the VM's own. Absent ranges stay absent.
fn is_gain(mappings: &Mappings, pieces: &[PageRange]) -> bool {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return true };
    let mut trial = IntervalMap::new();
    for (range, mapping) in mappings.within(PageRange::new(first.start.saturating_sub(1), last.end + 1)) {
        if matches!(mapping, Mapping::Absent) {
            return false;
        }
        trial.insert(range, mapping);
    }
    let before = trial.len();
    pieces.iter().for_each(|piece| trial.insert(*piece, Mapping::Zero));
    trial.len() <= before
}

impl GuestRegion {
    pub(crate) fn compact(&self, report: &mut CompactReport) -> Result<(), RamError> {
        let mut state = self.checked(self.range())?;
        self.finish_background(&mut state)?;
        let of = Arc::clone(state.space.map());
        let merged = MergedLayer::make(&self.store, &of, &runs_to_merge(&of, &dont_fork::runs(&state.dont_fork)))?;
        let pages = merged.as_ref().map_or(0, MergedLayer::pages);
        if let Some(merged) = merged {
            // Mapping anew is allowed only for pages that the VM does not own, so the bits must not
            // change meanwhile.
            let _table = self.table.lock();
            let own = self.own(&state)?;
            self.install_at_most(&mut state, merged, &own, usize::MAX)?;
        }
        report.note(&of, state.space.map(), pages);
        Ok(())
    }

    /// After a freeze: starts a background merge of the view's short pieces, if there are many.
    pub(crate) fn compact_later(&self, state: &mut State) {
        if state.compaction.is_some()
            || state.freezing.is_some()
            || !needs_compaction(state.space.map(), state.last_compacted, self.store.config())
        {
            return;
        }
        let compaction = Arc::new(Compaction::default());
        let (store, of) = (self.store.clone(), View::new(self.store.views(), Arc::clone(state.space.map())));
        let (barred, result) = (dont_fork::runs(&state.dont_fork), Arc::clone(&compaction));
        let work = move || {
            let merged = MergedLayer::make(&store, of.map(), &runs_to_merge(&of, &barred));
            result.set(merged.unwrap_or_else(|error| {
                tracing::warn!(%error, "layers are not merged");
                None
            }));
        };
        if self.store.reclaim(|thread| thread.sender().spawn(work).is_ok()) == Some(true) {
            state.compaction = Some(compaction);
        }
    }

    /// In a freeze, with the table locked: installs some of the merged parts, if a merge has
    /// finished. `own` are the pages that this VM owns, except no-fork ones. There are no other
    /// writers.
    pub(crate) fn install_compacted(&self, state: &mut State, own: [&[PageRange]; 2]) {
        let Some(merged) = state.compaction.as_ref().and_then(|compaction| compaction.take()) else { return };
        let mut own = own.concat();
        own.sort_unstable();
        match merged.map(|merged| self.install_at_most(state, merged, &own, MAX_REMAPS_AT_FREEZE)) {
            Some(Ok(Some(rest))) => {
                if let Some(compaction) = &state.compaction {
                    compaction.set(Some(rest));
                }
                return;
            }
            Some(Err(error)) => tracing::debug!(%error, "layers stay as they are"),
            Some(Ok(None)) | None => {}
        }
        state.compaction = None;
        state.last_compacted = (state.space.map().len(), layers([&**state.space.map()]));
    }

    /// Puts the copies into the map, and maps them where this VM shows the old layer. Takes at most
    /// `most` patches; returns the rest.
    fn install_at_most(
        &self,
        state: &mut State,
        mut merged: MergedLayer,
        own: &[PageRange],
        most: usize,
    ) -> Result<Option<MergedLayer>, RamError> {
        let rest = merged.placed.split_off(most.min(merged.placed.len()));
        let taken = self.install_all(state, &merged, own);
        state.space.trim();
        merged.placed = rest;
        if taken.is_ok() && !merged.placed.is_empty() {
            return Ok(Some(merged));
        }
        // Parts installed earlier are in the published view, so a sweep considers the new layer;
        // the parts just installed are not in it yet.
        state.space.keep_until_published(merged.seen);
        taken.map(|()| None)
    }

    fn install_all(&self, state: &mut State, merged: &MergedLayer, own: &[PageRange]) -> Result<(), RamError> {
        let kept = dont_fork::runs(&state.dont_fork);
        for (run, source) in &merged.placed {
            // Skips ranges declared no-fork since the copy: a freeze does not look for the VM's own
            // pages among them, and the mapping of a page that the VM does not own must agree with
            // the map.
            let same = subtract_runs(&merged.unchanged(state.space.map(), *run), &kept);
            let copied = |part: PageRange| source.advance(part.start - run.start);
            // This VM's own pages stay mapped; only their entries in the map change.
            let pieces = subtract_runs(&same, own);
            if !is_gain(state.space.mappings(), &pieces) {
                continue;
            }
            for piece in pieces {
                state.space.reserve_runs(1)?;
                state.space.show(piece, &Mapping::Private(copied(piece)))?;
            }
            same.into_iter().for_each(|part| state.space.supersede(part, copied(part)));
        }
        Ok(())
    }
}
