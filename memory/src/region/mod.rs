//! A region: one memslot's worth of guest memory, over one reservation of host addresses that never
//! moves.

pub(crate) mod ahead;
pub(crate) mod backend;
pub(crate) mod check;
pub(crate) mod compact;
pub(crate) mod counts;
pub(crate) mod dont_fork;
pub(crate) mod evict;
pub(crate) mod freeze;
pub(crate) mod mappings;
pub(crate) mod pages;
pub(crate) mod pin;
pub(crate) mod reference;
pub(crate) mod reset;
pub(crate) mod space;
pub(crate) mod srcu;
pub(crate) mod state;
pub(crate) mod stats;
pub(crate) mod suspend;

#[cfg(test)]
mod tests;

pub(crate) use state::{Freezing, LockedState, State};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use vm_memory::guest_memory::Result as GuestMemoryResult;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress,
    VolatileSlice,
};

use crate::backing::Backing;
use crate::error::RamError;
use crate::layer::registry::View;
use crate::layer::{LayerMap, LayerOffset};
use crate::lost::{FillError, LostMemory};
use crate::ownership::{OwnershipTable, TableGuard};
use crate::region::counts::Counters;
use crate::region::mappings::Mapping;
use crate::region::pin::PinList;
use crate::region::space::AddressSpace;
use crate::region::srcu::Srcu;
use crate::store::Store;
use crate::sync::whole::{self, Mutex, MutexGuard};
use crate::sys::{Reservation, SigbusWatch};
use crate::units::{PAGE_SHIFT, PageRange, subtract_runs};

pub(crate) fn same(a: Option<&LayerOffset>, b: Option<&LayerOffset>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.is(b),
        (None, None) => true,
        _ => false,
    }
}

/// Splits all of `range` by its sources in `map`. `None` stands for zeros.
pub(crate) fn parts_of(map: &LayerMap, range: PageRange) -> Vec<(PageRange, Option<LayerOffset>)> {
    let mut parts: Vec<_> = map.within(range).into_iter().map(|(range, source)| (range, Some(source))).collect();
    let covered: Vec<PageRange> = parts.iter().map(|(range, _)| *range).collect();
    parts.extend(subtract_runs(&[range], &covered).into_iter().map(|range| (range, None)));
    parts
}

/// A guest-physical range and the memory behind it. [`crate::GuestRam`] has the operations on it.
#[derive(Debug)]
pub struct GuestRegion {
    pub(crate) base: GuestAddress,
    pub(crate) store: Store,
    /// Dropped before the reservation, whose addresses may be reused once released.
    watched: Option<SigbusWatch>,
    /// Shared with copies of this memory that are still running.
    pub(crate) at: Arc<Reservation>,
    pub(crate) table: OwnershipTable,
    /// Whether adopted memory was lost.
    pub(crate) failure: Arc<LostMemory>,
    pub(crate) pins: PinList,
    pub(crate) counters: Counters,
    /// The uncounted short read pins, and the views they may read.
    pub(crate) srcu: Srcu<View>,
    /// Whether adopted memory may still be missing. If so, a pin first has the pages filled, under
    /// the state lock. Set before the region is live.
    unfinished: whole::AtomicBool,
    /// Whether memory is mapped. The Release on going live pairs with the Acquire at each access,
    /// so the mappings exist before they are used.
    live: AtomicBool,
    /// Ranges without memory. Set before the region is live.
    absent: OnceLock<Vec<PageRange>>,
    /// Whether freezes take pinned pages like any other page. Relaxed: read by freezes only, under
    /// the state lock.
    ignores_pins: AtomicBool,
    state: Mutex<State>,
}

impl GuestRegion {
    /// Reserves addresses for `pages` pages at `base`. Maps nothing.
    pub(crate) fn reserve(base: GuestAddress, pages: u64, store: &Store) -> Result<Self, RamError> {
        let at = Reservation::new(pages).map(Arc::new).map_err(|source| RamError::Reserve { pages, source })?;
        let space = AddressSpace::new(&at, store)?;
        let failure = Arc::default();
        let table = OwnershipTable::new(pages);
        #[cfg(feature = "trace")]
        table.trace.space(at.addr(0) as u64);
        let watched = SigbusWatch::new(at.addr(0) as usize, at.addr(pages) as usize, &failure);
        Ok(Self {
            base,
            store: store.clone(),
            watched,
            at,
            table,
            failure,
            pins: PinList::default(),
            counters: Counters::default(),
            srcu: Srcu::default(),
            unfinished: whole::AtomicBool::new(false),
            live: AtomicBool::new(false),
            absent: OnceLock::new(),
            ignores_pins: AtomicBool::new(false),
            state: Mutex::new(State::new(space)),
        })
    }

    /// Leaves the addresses unmapped until the region gets memory ([`Reservation::vacate`]).
    pub(crate) fn vacate(&self) {
        let state = self.state();
        if state.space.mappings().is_empty() {
            self.at.vacate();
        }
    }

    /// Gives the region a base file: fresh zeros, every page this VM's own (I2).
    pub(crate) fn populate(&self) -> Result<(), RamError> {
        let mut state = self.state();
        Self::expect_empty(self.base, &state)?;
        state.space.populate(Arc::new(self.store.layer(self.pages(), Backing::Huge)?))?;
        self.table.lock().set_exclusive(self.range());
        Ok(())
    }

    /// Locks the state for an operation on `range`.
    pub(crate) fn checked(&self, range: PageRange) -> Result<LockedState<'_>, RamError> {
        if !self.range().covers(range) {
            return Err(RamError::OutOfRange { range, pages: self.pages() });
        }
        let state = self.live_state()?;
        if let Some(error) = self.lost() {
            return Err(RamError::Lost(error));
        }
        if state.inconsistent { Err(RamError::Inconsistent { base: self.base.0 }) } else { Ok(state) }
    }

    /// Locks the state, torn or not.
    pub(crate) fn live_state(&self) -> Result<LockedState<'_>, RamError> {
        let state = self.state();
        if self.is_live() { Ok(state) } else { Err(RamError::Empty { base: self.base.0 }) }
    }

    /// Restores the bits in `range` that were cleared for an operation that then failed, for pages
    /// that the kernel reports as still this VM's own. If the page map cannot be read, the pages
    /// stay without their bit, which costs at most a copy (R4).
    pub(crate) fn reclaim(&self, state: &State, table: &TableGuard<'_>, range: PageRange) {
        let base = state.space.mappings().base_within(range);
        match self.owned_private(range, &base) {
            Ok(owned) => owned.iter().for_each(|run| table.set_exclusive(*run)),
            Err(error) => tracing::debug!(%error, "pages stay without their bit"),
        }
        base.iter().for_each(|run| table.set_exclusive(*run));
    }

    /// The private pages of `range` that this VM owns according to the page map. `base` are the
    /// runs mapped shared.
    pub(crate) fn owned_private(&self, range: PageRange, base: &[PageRange]) -> Result<Vec<PageRange>, RamError> {
        let mut owned = Vec::new();
        for private in subtract_runs(&[range], base) {
            owned.extend(self.store.pagemap().owned_runs(&self.at, private).map_err(RamError::Harvest)?);
        }
        Ok(owned)
    }

    /// The pages that this VM owns, mapped shared or private.
    pub(crate) fn own(&self, state: &State) -> Result<Vec<PageRange>, RamError> {
        let base = state.space.mappings().base_runs();
        let mut own = self.owned_private(self.range(), &base)?;
        own.extend(base);
        own.sort_unstable();
        Ok(own)
    }

    /// Fails if the region has memory, live or not yet live.
    pub(crate) fn expect_empty(base: GuestAddress, state: &State) -> Result<(), RamError> {
        if state.space.mappings().is_empty() { Ok(()) } else { Err(RamError::NotEmpty { base: base.0 }) }
    }

    /// Allows pins and accesses. The memory of this region and of all others of its VM is in place.
    pub(crate) fn go_live(&self) {
        let state = self.state();
        let absent = state.space.mappings().iter().filter(|(_, mapping)| matches!(mapping, Mapping::Absent));
        // Succeeds once: a live region stays live.
        let _ = self.absent.set(absent.map(|(range, _)| range).collect());
        self.set_unfinished(!state.waits.is_empty());
        self.set_live(true);
    }

    pub(crate) fn state(&self) -> LockedState<'_> {
        // A panic under the lock leaves the state as of the last completed step. Each step leaves a
        // consistent state.
        let state = self.state_for_pin();
        self.srcu.begin_change();
        LockedState { region: self, state }
    }

    /// Locks the state for a pin. A pin only makes pages exclusive, so concurrent pins that
    /// consider pages shared remain right.
    pub(crate) fn state_for_pin(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether adopted memory may still be missing.
    pub(crate) fn is_unfinished(&self) -> bool {
        // Acquire: pairs with the Release of the thread that has filled it.
        self.unfinished.load(Ordering::Acquire)
    }

    pub(crate) fn set_unfinished(&self, unfinished: bool) {
        self.unfinished.store(unfinished, Ordering::Release);
    }

    /// Finishes all background work on this region, copying missing pages on this thread: for the
    /// region's own last freeze, and for the layers it adopted unfinished. Called under the state
    /// lock, with the vCPUs stopped or not, **before an operation removes pages, maps others in
    /// their place, or reads the map or the mappings to do so**: freeze, reset, evict, compaction.
    ///
    /// A failed freeze of the region itself is undone, and the region loses nothing (I13).
    ///
    /// # Errors When adopted memory is lost.
    pub(crate) fn finish_background(&self, state: &mut State) -> Result<(), RamError> {
        self.reap_background(state, true);
        while let Some(layer) = state.waits.last() {
            if let Some(bg_copy) = layer.bg_copy() {
                bg_copy.finish().map_err(RamError::Lost)?;
            }
            state.waits.pop();
        }
        self.set_unfinished(false);
        Ok(())
    }

    /// Absorbs the mapping changes of a background freeze. Waits for it if `wait` is set.
    pub(crate) fn reap_background(&self, state: &mut State, wait: bool) {
        let Some(freezing) = state.freezing.take_if(|freezing| wait || freezing.layer.pending().is_none()) else {
            return;
        };
        let Freezing { layer, before, gaps } = freezing;
        let beneath = match layer.bg_copy().map_or(Ok(Vec::new()), |bg_copy| bg_copy.finish()) {
            Ok(shared_back) => {
                let mut runs: Vec<PageRange> = shared_back.iter().map(|(run, _)| *run).collect();
                runs.sort_unstable();
                // Later copies of these pages count again.
                state.counted = subtract_runs(&state.counted, &runs);
                for (run, at) in shared_back {
                    state.space.note_shared_back(run, LayerOffset { layer: Arc::clone(&layer), at });
                }
                state.space.keep_gaps(&before, &gaps);
                before
            }
            Err(error) => {
                tracing::warn!(%error, "a freeze is undone: its layer could not be filled");
                state.space.undo(before)
            }
        };
        // Keeps the old view registered until the current one is published. The pages under closed
        // gaps, shown from the layer below again, are in no other view before that, and a sweep in
        // between would punch them. A view is dropped only after a publication.
        state.space.keep_until_published(beneath);
        // The layer may be large and this the last handle, and the vCPUs may be stopped.
        self.store.dispose(layer);
        // Releases unused mappings of the background copy's promise.
        state.space.trim();
    }

    /// Copies and releases those pages of `range` that the background copy has not reached.
    /// Afterwards they are unprotected, present, and stay in place. Called under the state lock
    /// before a device is given their frames, because write protection does not stop a device.
    ///
    /// # Errors
    /// When adopted pages among them are lost.
    pub(crate) fn copy_range_now(&self, state: &State, range: PageRange) -> Result<(), Arc<FillError>> {
        if let Some(bg_copy) = state.freezing.as_ref().and_then(|freezing| freezing.layer.pending()) {
            bg_copy.copy_and_unprotect(range);
        }
        let waits = state.waits.iter().filter_map(|layer| layer.bg_copy());
        waits.into_iter().try_for_each(|bg_copy| bg_copy.wait_filled_for(&self.at, range))
    }

    /// The reason why adopted memory is lost, whether the callbacks have run or not.
    pub(crate) fn lost(&self) -> Option<Arc<FillError>> {
        let gone = || self.watched.as_ref().is_some_and(SigbusWatch::is_lost).then(|| Arc::new(FillError::Gone));
        let torn = || self.at.is_torn().then(|| Arc::new(FillError::Unmapped));
        self.failure.get().or_else(gone).or_else(torn)
    }

    #[cfg(any(test, feature = "hazard"))]
    pub(crate) fn set_pin_policy(&self, policy: crate::PinPolicy) {
        self.ignores_pins.store(policy == crate::PinPolicy::Ignore, Ordering::Relaxed);
    }

    /// Whether a freeze takes pinned pages like any other page. Set only by tests that must detect
    /// it.
    pub(crate) fn ignores_pins(&self) -> bool {
        self.ignores_pins.load(Ordering::Relaxed)
    }

    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Release);
    }

    /// The parts of `runs` (ascending) that have memory (R19).
    pub(crate) fn not_absent(&self, runs: &[PageRange]) -> Vec<PageRange> {
        subtract_runs(runs, self.absent.get().map_or(&[], Vec::as_slice))
    }

    /// Whether a page of `range` has no memory (R19).
    pub(crate) fn is_absent(&self, range: PageRange) -> bool {
        self.first_absent(range).is_some()
    }

    /// The first page of `range` that has no memory (R19).
    pub(crate) fn first_absent(&self, range: PageRange) -> Option<u64> {
        let absent = self.absent.get()?;
        let next = absent.partition_point(|a| a.end <= range.start);
        let found = absent.get(next)?.intersect(range);
        (!found.is_empty()).then_some(found.start)
    }

    /// Pages in the region.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.at.pages()
    }

    /// All pages of the region.
    #[must_use]
    pub fn range(&self) -> PageRange {
        PageRange::new(0, self.pages())
    }

    /// Host address of the region's first byte, for a memslot. Never changes.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.at.addr(0) as u64
    }

    /// The region's ownership table, for introspection.
    #[must_use]
    pub fn ownership(&self) -> &OwnershipTable {
        &self.table
    }
}

impl Drop for GuestRegion {
    fn drop(&mut self) {
        // A freeze of the region finishes without it: the background copy keeps the memory, and has
        // already copied the base file's pinned pages.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.table.trace.left();
        state.space.abandon_base();
        for layer in state.waits.drain(..) {
            if let Some(bg_copy) = layer.bg_copy() {
                bg_copy.detach(&self.at);
            }
        }
    }
}

impl GuestMemoryRegion for GuestRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.pages() << PAGE_SHIFT
    }

    fn start_addr(&self) -> GuestAddress {
        self.base
    }

    fn bitmap(&self) {}

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        self.check_address(addr).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.at.addr(0).wrapping_add(addr.0 as usize))
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> GuestMemoryResult<VolatileSlice<'_, ()>> {
        let end = offset.0.checked_add(count as u64).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        if end > self.len() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let pages = PageRange::covering(offset.0, count as u64).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        if !self.is_live() || self.is_absent(pages) {
            return Err(GuestMemoryError::HostAddressNotAvailable);
        }
        let addr = self.at.addr(0).wrapping_add(offset.0 as usize);
        // SAFETY: offset..end lies within the reservation (checked), which is mapped read-write
        // while the region is live, and lives as long as `self`, whose lifetime the slice carries.
        // Access through it is volatile.
        Ok(unsafe { VolatileSlice::new(addr, count) })
    }
}

impl GuestMemoryRegionBytes for GuestRegion {}
