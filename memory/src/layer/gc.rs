//! The sweep: garbage collection of layer pages that no view shows, while the layer itself is still
//! in use.
//!
//! A layer is freed by its last user. Until then a VM that is frozen repeatedly leaves old versions
//! of its pages behind, in layers that other VMs, or other pages, keep alive. A page is visible if
//! it is in some view ([`crate::layer::registry`]). There is no other way to read a layer's page: a
//! mapping shows the page in the view, or a page of the VM's own on top of it.
//!
//! The sweep never punches a pinned page: a pinned page is exclusive, so it is not a layer's page.
//! The one exception is the pages of a base file that were pinned when the rest of it became a
//! layer. These are in no view, and the sweep skips base files as long as their VM owns such pages.

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod worst;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};

use crate::backing::Backing;
use crate::layer::registry::Views;
use crate::layer::{Layer, LayerId, LayerMap, LayerStorage};
use crate::trace;
use crate::units::{BLOCK_PAGES, PAGE_SHIFT, PageRange, join_runs, pages_in, subtract_runs};

/// Result of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Pages whose memory is free again (or disk space, of layers on a disk).
    pub pages: u64,
    /// Layers they were in.
    pub layers: u64,
}

/// See [`crate::Store::sweep`]. Layers of other stores are skipped; their own sweeps handle them.
pub(crate) fn sweep(views: &Views) -> Swept {
    sweep_in_steps(views, || {})
}

/// Calls `between` after each step but the last: concurrent changes at these points must not lose a
/// page.
fn sweep_in_steps(views: &Views, mut between: impl FnMut()) -> Swept {
    // Must precede the scan of the views: a VM that freezes or dies in between first publishes the
    // pages it owned and then clears the base flag. With the opposite order the layer would count
    // as whole while the scanned views lack those pages.
    let whole = whole_layers(views);
    between();
    let mut seen = seen_in(views);
    between();
    // A handle is made from a view, and a view from a handle. During the scan a page may move from
    // one to the other and be seen in neither. So no handle may have existed between the first
    // check and the last.
    let mut spared = HashMap::new();
    trace::swept(&mut seen, |seen| {
        let may_go =
            |id: &LayerId, layer: &Layer| whole.get(id).is_some_and(|made| layer.handles_made() == Some(*made));
        (*seen, spared) = std::mem::take(seen).into_iter().partition(|(id, (layer, _))| may_go(id, layer));
    });
    // A layer may be dropped here, outside the step, because its end is a step of its own.
    drop(spared);
    let mut swept = Swept::default();
    for (layer, runs) in seen.into_values() {
        // Locked while pages are punched: `given` must equal the holes of the file.
        let mut given = layer.given();
        let dead = dead_runs(&layer, runs, &given);
        let mut pages = 0;
        for run in dead {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(layer.as_fd(), how, run.offset(), run.len() << PAGE_SHIFT) {
                Ok(()) => {
                    trace!(Punch { file: crate::trace::file(layer.as_fd()), range: run, swept: true });
                    pages += run.len();
                    given.push(run);
                }
                Err(error) => {
                    let error = io::Error::from(error);
                    tracing::debug!(%error, %run, layer = ?layer.id(), "memory was not given back");
                }
            }
        }
        given.sort_unstable();
        *given = join_runs(&given, 0);
        swept.pages += pages;
        swept.layers += u64::from(pages > 0);
    }
    views.count_given(swept.pages);
    tracing::debug!(?swept, "freed pages without users");
    swept
}

/// All registered maps, without duplicates: children unchanged since their fork share one map.
fn maps_of(views: &Views) -> Vec<Arc<LayerMap>> {
    let mut maps = views.all();
    let mut walked = HashSet::new();
    maps.retain(|map| walked.insert(Arc::as_ptr(map)));
    maps
}

/// This store's visible layers that may be swept, each with the number of handles made so far.
fn whole_layers(views: &Views) -> HashMap<LayerId, u64> {
    let maps = maps_of(views);
    let layers = maps.iter().flat_map(|map| map.iter()).map(|(_, source)| &source.layer);
    let whole = layers.filter(|layer| views.owns(layer) && is_whole(layer));
    whole.filter_map(|layer| Some((layer.id(), layer.handles_made()?))).collect()
}

/// The pages of this store's layers that views show.
fn seen_in(views: &Views) -> HashMap<LayerId, (Arc<Layer>, Vec<PageRange>)> {
    let mut seen: HashMap<LayerId, (Arc<Layer>, Vec<PageRange>)> = HashMap::new();
    for map in &maps_of(views) {
        for (range, source) in map.iter().filter(|(_, source)| views.owns(&source.layer)) {
            let (_, runs) = seen.entry(source.layer.id()).or_insert_with(|| (Arc::clone(&source.layer), Vec::new()));
            runs.push(PageRange::with_len(source.at, range.len()));
        }
    }
    seen
}

/// Whether views show all pages in use of the layer. Once true, it stays true. Excluded are
/// reference pages, which live by their handle; layers being filled, where a hole is a page still
/// to come; and files of snapshots or other processes, which must not be punched in any case.
fn is_whole(layer: &Layer) -> bool {
    !matches!(layer.storage(), LayerStorage::File | LayerStorage::Foreign)
        && !layer.id().is_reference()
        && !layer.is_base()
        && layer.pending().is_none()
}

/// The pages of `layer` that no view shows and that are not punched yet. Only whole blocks where
/// the memory consists of blocks, because a block with a hole would be mapped page by page.
fn dead_runs(layer: &Layer, mut seen: Vec<PageRange>, given: &[PageRange]) -> Vec<PageRange> {
    seen.sort_unstable();
    let dead = subtract_runs(&[PageRange::new(0, layer.pages())], &join_runs(&seen, 0));
    let dead = subtract_runs(&dead, given);
    if layer.storage() != LayerStorage::Memory(Backing::Huge) {
        return dead;
    }
    let whole = |run: PageRange| {
        let last = if run.end == layer.pages() { run.end } else { run.end - run.end % BLOCK_PAGES };
        PageRange::new(run.start.next_multiple_of(BLOCK_PAGES).min(last), last)
    };
    let dead: Vec<PageRange> = dead.into_iter().map(whole).filter(|run| !run.is_empty()).collect();
    debug_assert!(pages_in(&dead) <= layer.pages(), "runs are disjoint");
    dead
}
