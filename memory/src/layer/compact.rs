//! Compaction: a view of many pieces or many layers is merged into few.
//!
//! Every freeze lays one more delta over what was there, so a VM that is frozen a thousand times,
//! or the thousandth generation of forks, would be made of a thousand layers in as many pieces, and
//! each piece is a mapping in every VM started from it. Layers do not change (I4), so the short
//! pieces can be copied together into one new layer at any time, while everybody runs: that is done
//! by the reclaim thread, from the map a freeze has left. The VM takes the result over at a later
//! freeze, while nothing writes:
//!
//! * where its map still says what was copied, the map is changed, and
//! * where besides the VM does not own the page and its mapping says so too, the new layer is
//!   mapped in place of the old.
//!
//! Contents do not change in either step, so it can stop after any piece. Reference pages stay
//! references (R22).

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Config;
use crate::error::RamError;
use crate::freeze::{Packed, RegionImage};
use crate::layer::interval::{IntervalMap, Piece};
use crate::layer::registry::View;
use crate::layer::{LayerMap, Source};
use crate::ram::{GuestRam, Quiesced, RamImage};
use crate::region::mappings::{Mapping, Mappings};
use crate::region::nofork;
use crate::region::{GuestRegion, State, parts_of, same};
use crate::store::Store;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange, join_runs, pages_in, subtract_runs};

/// As many pieces as short ones are to become, if it can be had for copying [`MAX_COPY_RATIO`]
/// times their pages.
const TARGET_PIECES: usize = 48;
/// See [`TARGET_PIECES`].
const MAX_COPY_RATIO: u64 = 4;
/// As many pieces as short ones may stay, whatever it costs to have fewer: half of what a VM may
/// have mapped.
const MAX_SHORT_PIECES: usize = 512;
/// Pages that may be copied in any case.
const MIN_COPY_BUDGET: u64 = 2_048;
/// Longer pieces stay where they are.
const MAX_MERGED_PAGES: u64 = BLOCK_PAGES;
/// Mappings a freeze makes on behalf of a compaction: what it adds to the pause is bounded. The
/// others wait for the next.
const MAX_REMAPS_AT_FREEZE: usize = 24;

/// What a compaction did. Pieces and layers are counted over all regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// Pages copied into new layers.
    pub copied: u64,
    /// Pieces of the view before.
    pub pieces_before: u64,
    /// And after.
    pub pieces: u64,
    /// Layers in the view before.
    pub layers_before: u64,
    /// And after.
    pub layers: u64,
}

impl CompactReport {
    fn note(&mut self, before: &LayerMap, after: &LayerMap, copied: u64) {
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

/// The runs to copy together, ascending: every short piece, and what lies between them where that
/// is cheap. `barred` is left out.
fn runs_to_merge(map: &LayerMap, barred: &[PageRange]) -> Vec<PageRange> {
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

/// Whether `map` is worth merging, so far as its size tells: it has grown well beyond what the last
/// time left.
fn needs_compaction(map: &LayerMap, last_compacted: (usize, usize), config: &Config) -> bool {
    let (pieces, deep) = last_compacted;
    // No threshold is too large: it is a user's.
    let deep = deep.saturating_add(config.compact_at_layers);
    map.len() > config.compact_at_pieces.max(pieces + pieces / 2) || (map.len() > deep && layers([map]) > deep)
}

/// A copy of parts of a map in one layer.
#[derive(Debug)]
struct Merged {
    /// The map it is a copy of.
    of: Arc<LayerMap>,
    /// What was copied, and where to.
    placed: Vec<(PageRange, Source)>,
    /// The new layer's pages are seen by this until the views that take it over see them.
    seen: View,
}

impl Merged {
    /// Copies `patches` of `of`. `None` when there is nothing to gain.
    fn make(store: &Store, of: &Arc<LayerMap>, patches: &[PageRange]) -> Result<Option<Self>, RamError> {
        if patches.is_empty() {
            return Ok(None);
        }
        let packed = Packed::of(patches);
        let layer = Arc::new(store.layer(packed.pages, packed.grain)?);
        let mut buffer = vec![0; (256 * PAGE_SIZE) as usize];
        for (run, at) in packed.iter() {
            // What no layer provides is zeros, in the new file as well.
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

    fn pages(&self) -> u64 {
        self.placed.iter().map(|(run, _)| run.len()).sum()
    }

    /// The parts of `run` where `now` says what it said when it was copied.
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

    /// Shows the copies in `map`, wherever it still says what was copied.
    fn substitute(&self, map: &mut LayerMap) {
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

impl RamImage {
    /// The same memory in fewer pieces: what a template should be made of before it is forked by
    /// the hundred. Copies short pieces only.
    ///
    /// # Errors
    /// When there is no memory for the copies; the image stays as it was in any case.
    pub fn compact(&self, store: &Store) -> Result<(Self, CompactReport), RamError> {
        let mut report = CompactReport::default();
        let merge = |region: &RegionImage| {
            let merged = Merged::make(store, region.map.map(), &runs_to_merge(&region.map, &[]))?;
            let mut map = Arc::clone(region.map.map());
            if let Some(merged) = &merged {
                merged.substitute(Arc::make_mut(&mut map));
            }
            report.note(&region.map, &map, merged.as_ref().map_or(0, Merged::pages));
            Ok(RegionImage { map: Arc::new(View::new(store.views(), map)), no_fork: region.no_fork.clone() })
        };
        let regions = self.regions().iter().map(merge).collect::<Result<_, RamError>>()?;
        Ok((self.with_regions(regions), report))
    }
}

impl GuestRam {
    /// Merges the short pieces of this VM's own view, now. Freezes have it done in the background.
    ///
    /// # Errors
    /// When there is no memory for the copies, or a mapping fails: then some pieces are merged and
    /// others are not, with the same contents.
    pub fn compact(&self, _quiesced: &Quiesced<'_>) -> Result<CompactReport, RamError> {
        let mut report = CompactReport::default();
        for region in self.regions() {
            region.compact(&mut report)?;
        }
        Ok(report)
    }
}

/// A compaction in the background.
#[derive(Debug, Default)]
pub(crate) struct Compaction(Mutex<Stage>);

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Copying,
    /// What is not taken over yet, if anything came of it.
    Copied(Option<Merged>),
}

impl Compaction {
    fn set(&self, merged: Option<Merged>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Stage::Copied(merged);
    }

    /// What came of it, once.
    fn take(&self) -> Option<Option<Merged>> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Stage::Copying => None,
            Stage::Copied(merged) => Some(merged.take()),
        }
    }
}

/// Whether mapping `pieces` anew takes no more mappings than there are: not where one large layer
/// shows between many pages of the VM's own. What is absent stays absent.
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
    fn compact(&self, report: &mut CompactReport) -> Result<(), RamError> {
        let mut state = self.checked(self.range())?;
        self.finish_background(&mut state)?;
        let of = Arc::clone(state.space.map());
        let merged = Merged::make(&self.store, &of, &runs_to_merge(&of, &nofork::runs(&state.no_fork)))?;
        let pages = merged.as_ref().map_or(0, Merged::pages);
        if let Some(merged) = merged {
            // No bit changes hands, but none may meanwhile: a page is mapped anew only if it is not
            // the VM's own.
            let _table = self.table.lock();
            let own = self.own(&state)?;
            self.take_over(&mut state, merged, &own, usize::MAX)?;
        }
        report.note(&of, state.space.map(), pages);
        Ok(())
    }

    /// After a freeze: has the short pieces of the view merged in the background, if they have
    /// become many.
    pub(crate) fn compact_later(&self, state: &mut State) {
        if state.compaction.is_some()
            || state.freezing.is_some()
            || !needs_compaction(state.space.map(), state.last_compacted, self.store.config())
        {
            return;
        }
        let compaction = Arc::new(Compaction::default());
        let (store, of) = (self.store.clone(), View::new(self.store.views(), Arc::clone(state.space.map())));
        let (barred, result) = (nofork::runs(&state.no_fork), Arc::clone(&compaction));
        let work = move || {
            let merged = Merged::make(&store, of.map(), &runs_to_merge(&of, &barred));
            result.set(merged.unwrap_or_else(|error| {
                tracing::warn!(%error, "layers are not merged");
                None
            }));
        };
        if self.store.reclaim(|thread| thread.sender().spawn(work).is_ok()) == Some(true) {
            state.compaction = Some(compaction);
        }
    }

    /// In a freeze, with the table locked: takes over some of what has been merged, if anything
    /// has. `own` are the pages this VM owns, but for no-fork ones; nothing else writes.
    pub(crate) fn take_over_some(&self, state: &mut State, own: [&[PageRange]; 2]) {
        let Some(merged) = state.compaction.as_ref().and_then(|compaction| compaction.take()) else { return };
        let mut own = own.concat();
        own.sort_unstable();
        match merged.map(|merged| self.take_over(state, merged, &own, MAX_REMAPS_AT_FREEZE)) {
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

    /// Shows what was copied in the map, and maps it where this VM shows the old layer. At most
    /// `most` patches; returns the rest.
    fn take_over(
        &self,
        state: &mut State,
        mut merged: Merged,
        own: &[PageRange],
        most: usize,
    ) -> Result<Option<Merged>, RamError> {
        let rest = merged.placed.split_off(most.min(merged.placed.len()));
        let taken = self.take_over_all(state, &merged, own);
        state.space.trim();
        merged.placed = rest;
        if taken.is_ok() && !merged.placed.is_empty() {
            return Ok(Some(merged));
        }
        // What was taken over before is in the published view, so the new layer is one that a sweep
        // looks at; what was just taken over is not yet.
        state.space.keep_until_published(merged.seen);
        taken.map(|()| None)
    }

    fn take_over_all(&self, state: &mut State, merged: &Merged, own: &[PageRange]) -> Result<(), RamError> {
        let kept = nofork::runs(&state.no_fork);
        for (run, source) in &merged.placed {
            // Without what has been declared no-fork since it was copied: which of those pages are
            // the VM's own a freeze does not ask, and a page that is not must not be shown by a
            // mapping when the map says otherwise.
            let same = subtract_runs(&merged.unchanged(state.space.map(), *run), &kept);
            let copied = |part: PageRange| source.advance(part.start - run.start);
            // This VM's own pages stay as they are; of them only the map changes.
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
