//! What a region's lock guards.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::layer::Layer;
use crate::layer::compact::Compaction;
use crate::layer::registry::View;
use crate::region::GuestRegion;
use crate::region::nofork::NoForkMap;
use crate::region::space::AddressSpace;
use crate::sync::whole::MutexGuard;
use crate::units::PageRange;

/// Everything about a region that only changes under its lock.
///
/// Lock order: this, then the ownership table's.
#[derive(Debug)]
pub(crate) struct State {
    /// What its addresses show (I14).
    pub(crate) space: AddressSpace,
    /// What children do not inherit.
    pub(crate) no_fork: NoForkMap,
    /// The last freeze, while it is or was copied in the background and its outcome has not been
    /// taken note of.
    pub(crate) freezing: Option<Freezing>,
    /// Private pages without their bit that have been counted as copies, ascending: a freeze in the
    /// background has left them where they are.
    pub(crate) counted: Vec<PageRange>,
    /// Layers adopted before they were complete, each watched where it is mapped.
    pub(crate) waits: Vec<Arc<Layer>>,
    /// The merge of the view in the background, or its result.
    pub(crate) compaction: Option<Arc<Compaction>>,
    /// Pieces and layers of the map when it last was compacted.
    pub(crate) last_compacted: (usize, usize),
    /// A reset has failed half-way: only another one may follow.
    pub(crate) inconsistent: bool,
    /// What was copied ahead, ascending, since it was made, reset, frozen or suspended last.
    pub(crate) ahead: Vec<PageRange>,
    /// It was frozen or suspended since it was made or reset: what it wrote before is a layer's.
    pub(crate) moved: bool,
    /// It was suspended, so what is mapped now was touched since.
    pub(crate) woken: bool,
}

impl State {
    pub(super) fn new(space: AddressSpace) -> Self {
        Self {
            space,
            no_fork: NoForkMap::new(),
            freezing: None,
            counted: Vec::new(),
            waits: Vec::new(),
            compaction: None,
            last_compacted: (0, 0),
            inconsistent: false,
            ahead: Vec::new(),
            moved: false,
            woken: false,
        }
    }
}

/// What has to be settled when a freeze in the background is over.
#[derive(Debug)]
pub(crate) struct Freezing {
    /// The delta.
    pub(crate) layer: Arc<Layer>,
    /// The map without the delta: if that fails, the freeze has never been.
    pub(crate) before: View,
    /// Gaps that were closed: pages in the delta that were not this VM's own.
    pub(crate) gaps: Vec<PageRange>,
}

/// The state under its lock. What was changed of the view is published before the lock is let go;
/// meanwhile no page is taken for shared without it (R11, [`crate::region::grace`]).
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
        // After the new view is published and its layers are mapped, before another pin may begin:
        // a device that reads the one before keeps it.
        let gone: Vec<View> = replaced.into_iter().flat_map(|view| self.region.grace.retire(view)).collect();
        self.region.grace.end_change();
        if gone.iter().any(View::shows_layers) {
            // They may hold the last handles of large layers, and the VM may be paused for this.
            self.region.store.dispose(gone);
        }
    }
}
