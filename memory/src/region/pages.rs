//! The kind of each page of a VM, and the layers shown to the VM.
//!
//! The result is consistent per region: it is read under the region's lock. The guest may write
//! meanwhile, so a page reported as shared may have become the VM's own.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::RamError;
use crate::layer::{Layer, LayerId, LayerStorage, registry};
use crate::region::counts::{CowCounts, PinCounts};
use crate::region::mappings::Mapping;
use crate::region::{GuestRegion, State};
use crate::units::{PAGE_SIZE, PageRange, join_runs, pages_in, subtract_runs};

/// Views of a process beyond which `is_alone` is not determined, because each view is walked.
const MAX_VIEWS: usize = 64;

/// Kind of a page. The kinds are disjoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageKind {
    /// No memory: not inherited.
    Absent,
    /// Zeros or a pattern, which cost nothing.
    Reference,
    /// Of a layer.
    Shared(LayerId),
    /// The VM's own.
    Exclusive,
    /// The VM's own, and pinned for DMA.
    Pinned,
}

/// Pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First guest frame number.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
    /// Kind of the pages.
    pub kind: PageKind,
}

/// Where a layer's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerPlace {
    /// In memory of this process's store.
    Memory,
    /// In a private file on a disk: evicted pages.
    Disk,
    /// In a file on a disk with other users: a snapshot.
    Snapshot,
    /// In memory that another process published.
    Foreign,
}

/// A layer that a VM is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownLayer {
    /// Identity within this process.
    pub id: LayerId,
    /// Device and inode of the file: the identity across processes.
    pub file: (u64, u64),
    /// Location of the bytes.
    pub place: LayerPlace,
    /// Pages of the VM that it provides now.
    pub shown: u64,
    /// Pages that the layer provides, or would if the VM dropped its own copies.
    pub mapped: u64,
    /// Number of pages of the file's address space.
    pub pages: u64,
    /// Bytes of memory behind the file, if `fstat` succeeds.
    pub resident_bytes: Option<u64>,
    /// Whether no other VM and no image shows the layer. `None` if unknown: another process
    /// published it or also uses the file, or this process has too many views to walk.
    pub is_alone: Option<bool>,
}

/// The memory of a VM, page by page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageMap {
    /// Ascending. Gaps between regions are in no run.
    pub runs: Vec<PageRun>,
    /// The layers that provide pages, by identity.
    pub layers: Vec<ShownLayer>,
}

impl PageMap {
    /// Pages of each kind: absent, reference, shared, exclusive, pinned.
    #[must_use]
    pub fn totals(&self) -> [u64; 5] {
        let mut totals = [0; 5];
        for run in &self.runs {
            let at = match run.kind {
                PageKind::Absent => 0,
                PageKind::Reference => 1,
                PageKind::Shared(_) => 2,
                PageKind::Exclusive => 3,
                PageKind::Pinned => 4,
            };
            totals[at] += run.count;
        }
        totals
    }
}

/// A layer with its page counts.
struct LayerCounts<'a> {
    layer: &'a Layer,
    shown: u64,
    mapped: u64,
}

impl ShownLayer {
    fn of(counted: &LayerCounts<'_>, elsewhere: Option<&BTreeSet<LayerId>>) -> Self {
        let LayerCounts { layer, shown, mapped } = *counted;
        let place = match layer.storage() {
            LayerStorage::Memory(_) => LayerPlace::Memory,
            LayerStorage::Disk => LayerPlace::Disk,
            LayerStorage::File => LayerPlace::Snapshot,
            LayerStorage::Foreign => LayerPlace::Foreign,
        };
        let found = rustix::fs::fstat(layer.as_fd()).map(|found| (found.st_dev, found.st_ino));
        let is_local = matches!(place, LayerPlace::Memory | LayerPlace::Disk);
        Self {
            id: layer.id(),
            file: found.unwrap_or_default(),
            place,
            shown,
            mapped,
            pages: layer.pages(),
            resident_bytes: layer.resident_bytes().ok(),
            is_alone: elsewhere.filter(|_| is_local).map(|elsewhere| !elsewhere.contains(&layer.id())),
        }
    }
}

impl GuestRegion {
    /// The number of private pages in `owned` that the kernel has copied on write and that are
    /// neither counted nor marked exclusive yet.
    pub(crate) fn unseen_copies(&self, state: &State, owned: &[PageRange]) -> u64 {
        let unseen = |runs: &[PageRange]| runs.iter().map(|run| run.len() - self.table.counts(*run).exclusive).sum();
        // Fast path, because the VM may be paused.
        if state.counted.is_empty() { unseen(owned) } else { unseen(&subtract_runs(owned, &state.counted)) }
    }

    /// Copies so far, by cause.
    pub(crate) fn cow_counts(&self) -> Result<CowCounts, RamError> {
        // A read-only look, so short reads can be pinned meanwhile.
        let state = self.state_for_pin();
        if !self.is_live() {
            return Ok(CowCounts::default());
        }
        let owned = self.owned_private(self.range(), &state.space.mappings().base_runs())?;
        Ok(self.counters.cow(self.unseen_copies(&state, &owned)))
    }

    /// Pins of the region.
    pub(crate) fn pin_counts(&self) -> PinCounts {
        let reading = {
            // No section opens under this lock.
            let _state = self.state();
            pages_in(&self.srcu.ranges())
        };
        let (long, long_total, longest) = self.pins.counts();
        let now = self.table.counts(self.range()).pins;
        PinCounts { now, reading, locked: self.counters.locked(), long, long_total, longest }
    }

    /// The runs of the region, by its own page numbers.
    fn kinds(&self, state: &State) -> Result<Vec<(PageRange, PageKind)>, RamError> {
        let own = self.own(state)?;
        let pinned = self.table.pinned_runs(self.range());
        let absent = state.space.mappings().iter().filter(|(_, mapping)| matches!(mapping, Mapping::Absent));
        let absent: Vec<PageRange> = absent.map(|(range, _)| range).collect();
        let mut kinds = Vec::new();
        let mut add = |runs: &[PageRange], kind| kinds.extend(runs.iter().map(|run| (*run, kind)));
        // Pinned pages are the VM's own (I3), even where the page map was read before the pin.
        add(&pinned, PageKind::Pinned);
        add(&subtract_runs(&own, &pinned), PageKind::Exclusive);
        let mut known = [own, pinned].concat();
        known.sort_unstable();
        let known = join_runs(&known, 0);
        let absent = subtract_runs(&absent, &known);
        add(&absent, PageKind::Absent);
        let mut taken = [known, absent].concat();
        taken.sort_unstable();
        for rest in subtract_runs(&[self.range()], &join_runs(&taken, 0)) {
            // In one pass, because this takes most of the time for a region in many pieces.
            let mut at = rest.start;
            for (piece, source) in state.space.map().within(rest) {
                let id = source.layer.id();
                let kind = if id.is_reference() { PageKind::Reference } else { PageKind::Shared(id) };
                if at < piece.start {
                    kinds.push((PageRange::new(at, piece.start), PageKind::Reference));
                }
                kinds.push((piece, kind));
                at = piece.end;
            }
            if at < rest.end {
                kinds.push((PageRange::new(at, rest.end), PageKind::Reference));
            }
        }
        kinds.sort_unstable_by_key(|(run, _)| run.start);
        Ok(kinds)
    }
}

/// Appends a run, joined to the last one if it continues it.
fn push(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.kind == run.kind && last.first + last.count == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

/// The page map of `regions`, with `own_views` as further views of the VM.
pub(crate) fn page_map(regions: &[Arc<GuestRegion>], mut own_views: BTreeSet<u64>) -> Result<PageMap, RamError> {
    let mut runs = Vec::new();
    let mut maps = Vec::new();
    for region in regions {
        // A read-only look, so short reads can be pinned meanwhile.
        let state = region.state_for_pin();
        if !region.is_live() {
            return Err(RamError::Empty { base: region.base.0 });
        }
        let base = region.base.0 / PAGE_SIZE;
        for (range, kind) in region.kinds(&state)? {
            push(&mut runs, PageRun { first: base + range.start, count: range.len(), kind });
        }
        own_views.extend(state.space.views());
        maps.push((base, Arc::clone(state.space.map())));
    }
    let mut shown: BTreeMap<LayerId, u64> = BTreeMap::new();
    for run in &runs {
        if let PageKind::Shared(id) = run.kind {
            *shown.entry(id).or_default() += run.count;
        }
    }
    let mut counted: BTreeMap<LayerId, LayerCounts<'_>> = BTreeMap::new();
    let sources = maps.iter().flat_map(|(_, map)| map.iter());
    for (range, source) in sources.filter(|(_, source)| !source.layer.id().is_reference()) {
        let id = source.layer.id();
        let new = || LayerCounts { layer: &source.layer, shown: shown.get(&id).copied().unwrap_or(0), mapped: 0 };
        counted.entry(id).or_insert_with(new).mapped += range.len();
    }
    let elsewhere = registry::layers_elsewhere(&own_views, MAX_VIEWS);
    let layers = counted.values().map(|counted| ShownLayer::of(counted, elsewhere.as_ref())).collect();
    Ok(PageMap { runs, layers })
}

#[cfg(test)]
mod tests;
