//! Views: the process-wide registry of all maps through which a layer can still be read.
//!
//! Layer pages in no view can be punched ([`crate::layer::gc`]). For safety the sweep must see
//! *all* views at one instant, while VMs fork, reset and die concurrently. So a view's map is an
//! immutable value, registered before any read through it. A thread that copies the registry under
//! its lock holds every page of an older layer that a later view can contain, because later views
//! are made of these. (A walk over the VMs one after another would miss a page that moves from an
//! unvisited VM to an image and away again.) The registry is per process, not per store, because a
//! VM of one store can be started from an image of another.
//!
//! A view that a VM has replaced stays registered while a device may be reading it uncounted
//! ([`crate::region::srcu`]).
//!
//! The state lock is held while a VM's view is changed, and the change is published before unlock.
//! Between the two the registry has the VM's old view. Any page added by the change is in another
//! view (an image's, which the caller holds), in a layer that is in no view yet, or in a base file,
//! which the sweep skips.

use std::collections::{BTreeSet, HashMap};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::layer::{Layer, LayerId, LayerMap};

/// Every registered view.
static REGISTERED: LazyLock<Mutex<Registered>> = LazyLock::new(Mutex::default);

/// The registry as one store uses it.
#[derive(Debug)]
pub(crate) struct Views {
    /// Identifies the store's layers: those counted here.
    live_layers: Arc<AtomicUsize>,
    /// Set when a view was dropped or changed since the last sweep: there may be pages to punch.
    changed: AtomicBool,
    /// Pages punched so far, of layers that were still in use.
    given_back: AtomicU64,
}

#[derive(Debug, Default)]
struct Registered {
    next: u64,
    maps: HashMap<u64, Arc<LayerMap>>,
}

fn registered() -> MutexGuard<'static, Registered> {
    // Every change to the registry is one step.
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The layers that views other than `own` show. `None` if there are more than `most` such views.
pub(crate) fn layers_elsewhere(own: &BTreeSet<u64>, most: usize) -> Option<BTreeSet<LayerId>> {
    // Copied under the lock, and walked outside it.
    let others: Vec<Arc<LayerMap>> = {
        let registry = registered();
        let others = registry.maps.iter().filter(|(id, _)| !own.contains(id));
        others.take(most + 1).map(|(_, map)| Arc::clone(map)).collect()
    };
    let layers = || others.iter().flat_map(|map| map.iter()).map(|(_, source)| source.layer.id()).collect();
    (others.len() <= most).then(layers)
}

impl Views {
    /// The views of a store whose layers are counted in `live_layers`.
    pub(crate) fn new(live_layers: &Arc<AtomicUsize>) -> Self {
        let (changed, given_back) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { live_layers: Arc::clone(live_layers), changed, given_back }
    }

    /// Whether a layer is the store's.
    pub(crate) fn owns(&self, layer: &Layer) -> bool {
        layer.is_counted_in(&self.live_layers)
    }

    /// Every map that is read through now. These contain every page of today's layers that can be
    /// read later.
    pub(crate) fn all(&self) -> Vec<Arc<LayerMap>> {
        registered().maps.values().cloned().collect()
    }

    /// Counts pages that a sweep punched.
    pub(crate) fn count_given(&self, pages: u64) {
        // Relaxed: a statistic.
        self.given_back.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages punched so far.
    pub(crate) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }

    /// Whether a sweep may find pages that the last one did not.
    pub(crate) fn take_changed(&self) -> bool {
        // Relaxed: a hint; the registry's lock orders what matters.
        self.changed.swap(false, Ordering::Relaxed)
    }
}

/// A map that is registered for as long as this lives.
#[derive(Debug)]
pub(crate) struct View {
    all: Arc<Views>,
    id: u64,
    map: Arc<LayerMap>,
    published: Arc<LayerMap>,
}

impl View {
    pub(crate) fn new(all: &Arc<Views>, map: Arc<LayerMap>) -> Self {
        Self::register(all, map, false)
    }

    /// Registers a map. `base`: of pages that are a VM's own, in its base file.
    fn register(all: &Arc<Views>, map: Arc<LayerMap>, base: bool) -> Self {
        let mut registry = registered();
        registry.next += 1;
        let id = registry.next;
        registry.maps.insert(id, Arc::clone(&map));
        crate::trace::view(id, &map, base);
        drop(registry);
        #[cfg(test)]
        crate::layer::gc::worst::moment(all);
        Self { all: Arc::clone(all), id, published: Arc::clone(&map), map }
    }

    /// Registers another view of the same store, of the pages of its base file that a VM still
    /// owns.
    pub(crate) fn beside(&self, map: Arc<LayerMap>) -> Self {
        Self::register(&self.all, map, true)
    }

    /// Whether the map or the published map contains a layer. If so, dropping the view may free
    /// one.
    pub(crate) fn shows_layers(&self) -> bool {
        [&self.map, &self.published].iter().any(|map| map.iter().next().is_some())
    }

    /// The current map. A copy is free until one of the two is changed.
    pub(crate) fn map(&self) -> &Arc<LayerMap> {
        &self.map
    }

    /// Its identity among all views.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Replaces the map. The caller publishes it.
    pub(crate) fn set(&mut self, map: Arc<LayerMap>) {
        self.map = map;
    }

    /// Registers the current map in place of the published one. Returns the old one, still
    /// registered, because a device may be reading it ([`crate::region::srcu`]).
    #[must_use = "a device may be reading what was shown before"]
    pub(crate) fn publish(&mut self) -> Option<Self> {
        if Arc::ptr_eq(&self.map, &self.published) {
            return None;
        }
        let before = std::mem::replace(&mut self.published, Arc::clone(&self.map));
        let mut registry = registered();
        registry.next += 1;
        let id = registry.next;
        // One step: a copy of the registry has both.
        registry.maps.insert(id, Arc::clone(&before));
        registry.maps.insert(self.id, Arc::clone(&self.map));
        crate::trace::view(id, &before, false);
        crate::trace::view(self.id, &self.map, false);
        drop(registry);
        self.all.changed.store(true, Ordering::Relaxed);
        #[cfg(test)]
        crate::layer::gc::worst::moment(&self.all);
        Some(Self { all: Arc::clone(&self.all), id, published: Arc::clone(&before), map: before })
    }
}

impl Deref for View {
    type Target = LayerMap;
    fn deref(&self) -> &LayerMap {
        &self.map
    }
}

/// Changes the view's private copy of the map.
impl DerefMut for View {
    fn deref_mut(&mut self) -> &mut LayerMap {
        Arc::make_mut(&mut self.map)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let mut registry = registered();
        let gone = registry.maps.remove(&self.id);
        trace!(ViewGone { view: self.id });
        drop(registry);
        self.all.changed.store(true, Ordering::Relaxed);
        // Outside the lock: it may hold the last handles of layers.
        drop(gone);
        #[cfg(test)]
        crate::layer::gc::worst::moment(&self.all);
    }
}
