//! The sweep: memory of layer pages that cannot be seen any more is given back, though the layer
//! itself is still in use.
//!
//! A layer goes with its last user. Until then a VM that is frozen again and again leaves old
//! versions of its pages behind, in layers that others, or other pages, keep alive. A page is seen
//! if it is in some view ([`crate::layer::registry`]); nothing else reads a layer's page: a mapping
//! shows what the view says, or a page of the VM's own on top of it.
//!
//! Never under a pin: a pinned page is exclusive, so it is no layer's page, with one exception, the
//! pages of a base file that were pinned when the rest of it became a layer. They are in no view,
//! and a base file is not swept for as long as its VM has such pages.

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod worst;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};

use crate::layer::registry::Views;
use crate::layer::{Home, Layer, LayerId, LayerMap};
use crate::reclaim::ReclaimThread;
use crate::store::{Backing, Store};
use crate::trace;
use crate::units::{BLOCK_PAGES, PAGE_SHIFT, PageRange, join_runs, pages_in, subtract_runs};

/// What a sweep gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Pages whose memory is free again (or disk space, of layers on a disk).
    pub pages: u64,
    /// Layers they were in.
    pub layers: u64,
}

impl Store {
    /// Gives back what no VM and no image can see, now. It is done now and then by itself.
    pub fn sweep(&self) -> Swept {
        // Views that were let go of may still be waiting to be dropped.
        self.wait_reclaimed();
        sweep(self.views())
    }

    /// Pages that sweeps have given back so far, of layers that were still in use.
    #[must_use]
    pub fn given_back(&self) -> u64 {
        self.views().given_back()
    }

    /// Has it done in the background, if anything has changed since it was last.
    pub(crate) fn sweep_later(&self) {
        if self.views().take_changed() {
            self.reclaim(ReclaimThread::sweep);
        }
    }
}

/// See [`Store::sweep`]. Layers of other stores are theirs to sweep.
pub(crate) fn sweep(views: &Views) -> Swept {
    sweep_in_steps(views, || {})
}

/// `between` is called after each step but the last: whatever others do there must cost no page.
fn sweep_in_steps(views: &Views, mut between: impl FnMut()) -> Swept {
    // Before the views are looked at: a VM that freezes or dies in between first shows the pages it
    // had to itself and then says that it has none. Asked afterwards, the layer would be one of
    // which the views looked at do not show those pages.
    let whole = whole_layers(views);
    between();
    let mut seen = seen_in(views);
    between();
    // A handle is made of a view, and a view of a handle. While the views are read, a page may pass
    // from one to the other and be seen in neither. So there must have been no handle from the
    // first look to the last.
    let mut spared = HashMap::new();
    trace::swept(&mut seen, |seen| {
        let may_go =
            |id: &LayerId, layer: &Layer| whole.get(id).is_some_and(|made| layer.handles_made() == Some(*made));
        (*seen, spared) = std::mem::take(seen).into_iter().partition(|(id, (layer, _))| may_go(id, layer));
    });
    // A layer may end here: not within a step, as its end is one.
    drop(spared);
    let mut swept = Swept::default();
    for (layer, runs) in seen.into_values() {
        // Held while pages go: what a layer has given is what its file lacks.
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

/// All there is to be read through, once: children that have not changed since their fork share one
/// map.
fn maps_of(views: &Views) -> Vec<Arc<LayerMap>> {
    let mut maps = views.all();
    let mut walked = HashSet::new();
    maps.retain(|map| walked.insert(Arc::as_ptr(map)));
    maps
}

/// This store's layers in sight that may be swept, each with the handles there have been of it.
fn whole_layers(views: &Views) -> HashMap<LayerId, u64> {
    let maps = maps_of(views);
    let layers = maps.iter().flat_map(|map| map.iter()).map(|(_, source)| &source.layer);
    let whole = layers.filter(|layer| views.owns(layer) && is_whole(layer));
    whole.filter_map(|layer| Some((layer.id(), layer.handles_made()?))).collect()
}

/// What views see of this store's layers.
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

/// Whether what views show is all there is of it. Once it is, it stays so. A reference page lives
/// by its handle; in a layer that is being filled a hole is a page that is still to come; a
/// snapshot, or another process's layer, is not ours to punch holes in, whatever sees it here.
fn is_whole(layer: &Layer) -> bool {
    !matches!(layer.home(), Home::File | Home::Foreign)
        && !layer.id().is_reference()
        && !layer.is_base()
        && layer.pending().is_none()
}

/// What of `layer` no view shows and has not been given back: in whole blocks where its memory
/// comes in blocks, because a block that lost a page would be mapped page by page.
fn dead_runs(layer: &Layer, mut seen: Vec<PageRange>, given: &[PageRange]) -> Vec<PageRange> {
    seen.sort_unstable();
    let dead = subtract_runs(&[PageRange::new(0, layer.pages())], &join_runs(&seen, 0));
    let dead = subtract_runs(&dead, given);
    if layer.home() != Home::Memory(Backing::Huge) {
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
