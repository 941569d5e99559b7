//! Views: every map through which a layer can still be read, known to the process.
//!
//! A layer's page that is in no view can be given back ([`crate::layer::gc`]). For that to be safe
//! the sweep must see *all* views at one instant, while VMs fork, reset and die beside it. So a
//! view's map is an immutable value, registered before anything is read through it: a thread that
//! copies the registry under its lock holds every page that any view made later can have of an
//! older layer, because such a view is made of these. (Walking the VMs one after another would miss
//! a page that moves from one not yet visited to an image and away again.) The registry is the
//! process's, not a store's: nothing keeps a VM of one store from being started from an image of
//! another.
//!
//! A view that a VM no longer shows stays registered while a device may be reading it without a
//! count ([`crate::region::grace`]).
//!
//! The state lock is held while a VM's view is changed, and the change is published before it is
//! let go. Between the two the registry has what the VM showed before, and what it will show
//! besides is either in another view (an image's, which the caller holds), in a layer that is in no
//! view yet, or in a base file, which is not swept while it is one.

use std::collections::{BTreeSet, HashMap};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::layer::{Layer, LayerId, LayerMap};

/// Every view there is.
static REGISTERED: LazyLock<Mutex<Registered>> = LazyLock::new(Mutex::default);

/// A store's part in it.
#[derive(Debug)]
pub(crate) struct Views {
    /// Which layers are the store's: those that are counted here.
    live_layers: Arc<AtomicUsize>,
    /// A view has gone or changed since this was last taken: there may be something to give back.
    changed: AtomicBool,
    /// Pages given back so far, of layers that were still in use.
    given_back: AtomicU64,
}

#[derive(Debug, Default)]
struct Registered {
    next: u64,
    maps: HashMap<u64, Arc<LayerMap>>,
}

fn registered() -> MutexGuard<'static, Registered> {
    // Each change to it is one step.
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The layers that views other than `own` show. None if there are more than `most` of them.
pub(crate) fn layers_elsewhere(own: &BTreeSet<u64>, most: usize) -> Option<BTreeSet<LayerId>> {
    // Not walked under the lock.
    let others: Vec<Arc<LayerMap>> = {
        let registry = registered();
        let others = registry.maps.iter().filter(|(id, _)| !own.contains(id));
        others.take(most + 1).map(|(_, map)| Arc::clone(map)).collect()
    };
    let layers = || others.iter().flat_map(|map| map.iter()).map(|(_, source)| source.layer.id()).collect();
    (others.len() <= most).then(layers)
}

impl Views {
    /// Of a store whose layers are counted in `live_layers`.
    pub(crate) fn new(live_layers: &Arc<AtomicUsize>) -> Self {
        let (changed, given_back) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { live_layers: Arc::clone(live_layers), changed, given_back }
    }

    /// Whether a layer is the store's.
    pub(crate) fn owns(&self, layer: &Layer) -> bool {
        layer.is_counted_in(&self.live_layers)
    }

    /// Every map that is read through now, and with it all that can be read through later of the
    /// layers there are now.
    pub(crate) fn all(&self) -> Vec<Arc<LayerMap>> {
        registered().maps.values().cloned().collect()
    }

    /// Counts pages that a sweep gave back.
    pub(crate) fn count_given(&self, pages: u64) {
        // Relaxed: a number to be shown.
        self.given_back.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages given back so far.
    pub(crate) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }

    /// Whether a sweep may find something that the last one did not.
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

    /// `base`: of pages that are a VM's own, in its base file.
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

    /// Another view of the same store, registered: of what stays a VM's own of its base file.
    pub(crate) fn beside(&self, map: Arc<LayerMap>) -> Self {
        Self::register(&self.all, map, true)
    }

    /// Whether there is a layer in it, or in what was published of it. Dropping it may free one then.
    pub(crate) fn shows_layers(&self) -> bool {
        [&self.map, &self.published].iter().any(|map| map.iter().next().is_some())
    }

    /// The map as it is now: a copy costs nothing until one of the two is changed.
    pub(crate) fn map(&self) -> &Arc<LayerMap> {
        &self.map
    }

    /// Its identity among all views.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Shows another map. To be published.
    pub(crate) fn set(&mut self, map: Arc<LayerMap>) {
        self.map = map;
    }

    /// Registers what it shows now in place of what it did. Returns what it did, which is still
    /// registered: a device may be reading it ([`crate::region::grace`]).
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

/// Changes the view's own copy, which others do not see.
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
