//! A region: one memslot's worth of guest memory, over one reservation of host addresses that never
//! moves.

pub(crate) mod ahead;
pub(crate) mod backend;
pub(crate) mod check;
pub(crate) mod counts;
pub(crate) mod evict;
pub(crate) mod grace;
pub(crate) mod mappings;
pub(crate) mod nofork;
pub(crate) mod pages;
pub(crate) mod pin;
pub(crate) mod reference;
pub(crate) mod reset;
pub(crate) mod space;
pub(crate) mod state;
pub(crate) mod stats;
pub(crate) mod suspend;
pub(crate) mod tracked;

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

use crate::error::RamError;
use crate::freeze::background::{FillError, LostMemory};
use crate::layer::registry::View;
use crate::layer::{LayerMap, Source};
use crate::ownership::{OwnershipTable, TableGuard};
use crate::region::counts::Counters;
use crate::region::grace::Grace;
use crate::region::mappings::Mapping;
use crate::region::pin::PinList;
use crate::region::space::AddressSpace;
use crate::store::{Backing, Store};
use crate::sync::whole::{self, Mutex, MutexGuard};
use crate::sys::{Reservation, Watched};
use crate::units::{PAGE_SHIFT, PageRange, subtract_runs};

pub(crate) fn same(a: Option<&Source>, b: Option<&Source>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.is(b),
        (None, None) => true,
        _ => false,
    }
}

/// All of `range` by what `map` says: a source, or zeros.
pub(crate) fn parts_of(map: &LayerMap, range: PageRange) -> Vec<(PageRange, Option<Source>)> {
    let mut parts: Vec<_> = map.within(range).into_iter().map(|(range, source)| (range, Some(source))).collect();
    let covered: Vec<PageRange> = parts.iter().map(|(range, _)| *range).collect();
    parts.extend(subtract_runs(&[range], &covered).into_iter().map(|range| (range, None)));
    parts
}

/// A guest-physical range and the memory behind it. See [`crate::GuestRam`] for what is done with
/// it.
#[derive(Debug)]
pub struct GuestRegion {
    pub(crate) base: GuestAddress,
    pub(crate) store: Store,
    /// Before the addresses, which may be another's once they are given back.
    watched: Option<Watched>,
    /// Shared with what is still being copied out of it.
    pub(crate) at: Arc<Reservation>,
    pub(crate) table: OwnershipTable,
    /// Whether memory it adopted was lost.
    pub(crate) failure: Arc<LostMemory>,
    pub(crate) pins: PinList,
    pub(crate) counters: Counters,
    /// The short read pins that are not counted, and the views they may read.
    pub(crate) grace: Grace<View>,
    /// Whether memory it adopted may still be missing: then a pin has it brought first, under the
    /// state lock. Set before the region is live.
    unfinished: whole::AtomicBool,
    /// Whether memory is mapped. Release on going live pairs with Acquire at each access: the
    /// mappings are there before they are used.
    live: AtomicBool,
    /// Ranges without memory, known before the region is live.
    absent: OnceLock<Vec<PageRange>>,
    /// Whether its freezes take pinned pages like any others. Relaxed: looked at by freezes only,
    /// under the state lock.
    ignores_pins: AtomicBool,
    state: Mutex<State>,
}

impl GuestRegion {
    /// Reserves addresses for `pages` pages at `base`. Nothing is mapped yet.
    pub(crate) fn reserve(base: GuestAddress, pages: u64, store: &Store) -> Result<Self, RamError> {
        let at = Reservation::new(pages).map(Arc::new).map_err(|source| RamError::Reserve { pages, source })?;
        let space = AddressSpace::new(&at, store)?;
        let failure = Arc::default();
        let table = OwnershipTable::new(pages);
        #[cfg(feature = "trace")]
        table.trace.space(at.addr(0) as u64);
        let watched = Watched::new(at.addr(0) as usize, at.addr(pages) as usize, &failure);
        Ok(Self {
            base,
            store: store.clone(),
            watched,
            at,
            table,
            failure,
            pins: PinList::default(),
            counters: Counters::default(),
            grace: Grace::default(),
            unfinished: whole::AtomicBool::new(false),
            live: AtomicBool::new(false),
            absent: OnceLock::new(),
            ignores_pins: AtomicBool::new(false),
            state: Mutex::new(State::new(space)),
        })
    }

    /// Leaves its addresses unmapped until it gets memory ([`Reservation::vacate`]).
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

    /// The state, for an operation on `range`.
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

    /// The state, torn or not.
    pub(crate) fn live_state(&self) -> Result<LockedState<'_>, RamError> {
        let state = self.state();
        if self.is_live() { Ok(state) } else { Err(RamError::Empty { base: self.base.0 }) }
    }

    /// Sets the bits again that were given up in `range` for something that then failed: of what is
    /// still this VM's own, as the kernel says. Where the kernel cannot be asked, a page stays
    /// without its bit, which costs a copy at most (R4).
    pub(crate) fn reclaim(&self, state: &State, table: &TableGuard<'_>, range: PageRange) {
        let base = state.space.mappings().base_within(range);
        match self.owned_private(range, &base) {
            Ok(owned) => owned.iter().for_each(|run| table.set_exclusive(*run)),
            Err(error) => tracing::debug!(%error, "pages stay without their bit"),
        }
        base.iter().for_each(|run| table.set_exclusive(*run));
    }

    /// The private pages of `range` that this VM owns, as the kernel says; `base` are the runs
    /// mapped shared.
    pub(crate) fn owned_private(&self, range: PageRange, base: &[PageRange]) -> Result<Vec<PageRange>, RamError> {
        let mut owned = Vec::new();
        for private in subtract_runs(&[range], base) {
            owned.extend(self.store.pagemap().owned_runs(&self.at, private).map_err(RamError::Harvest)?);
        }
        Ok(owned)
    }

    /// What this VM owns, mapped shared or private.
    pub(crate) fn own(&self, state: &State) -> Result<Vec<PageRange>, RamError> {
        let base = state.space.mappings().base_runs();
        let mut own = self.owned_private(self.range(), &base)?;
        own.extend(base);
        own.sort_unstable();
        Ok(own)
    }

    /// Refuses memory that is there, live or about to be.
    pub(crate) fn expect_empty(base: GuestAddress, state: &State) -> Result<(), RamError> {
        if state.space.mappings().is_empty() { Ok(()) } else { Err(RamError::NotEmpty { base: base.0 }) }
    }

    /// The memory is there, in this region and in all others of its VM: pins and accesses may
    /// begin.
    pub(crate) fn go_live(&self) {
        let state = self.state();
        let absent = state.space.mappings().iter().filter(|(_, mapping)| matches!(mapping, Mapping::Absent));
        // Once: a region that is live stays so.
        let _ = self.absent.set(absent.map(|(range, _)| range).collect());
        self.set_unfinished(!state.waits.is_empty());
        self.set_live(true);
    }

    pub(crate) fn state(&self) -> LockedState<'_> {
        // A panic under the lock leaves the state as it was after the last completed step, each of
        // which is consistent.
        let state = self.state_for_pin();
        self.grace.begin_change();
        LockedState { region: self, state }
    }

    /// The state, for a pin: it only makes pages this VM's own, so those that other pins take for
    /// shared stay right.
    pub(crate) fn state_for_pin(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether memory it adopted may still be missing.
    pub(crate) fn is_unfinished(&self) -> bool {
        // Acquire: pairs with the Release of the thread that has done it.
        self.unfinished.load(Ordering::Acquire)
    }

    pub(crate) fn set_unfinished(&self, unfinished: bool) {
        self.unfinished.store(unfinished, Ordering::Release);
    }

    /// Finishes what the background has to do with this region, copying what is missing on this
    /// thread: its own last freeze, and the layers it adopted unfinished. To be called under the
    /// state lock, with the vCPUs stopped or not, **before anything takes pages away, maps others
    /// in their place or reads the map or the mappings to do so**: freeze, reset, evict,
    /// compaction.
    ///
    /// A freeze of its own that failed is undone, which takes nothing from the region (I13).
    ///
    /// # Errors
    /// When memory it adopted is lost.
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

    /// Takes note of what a freeze in the background has done to the mappings; waits for it on
    /// demand.
    pub(crate) fn reap_background(&self, state: &mut State, wait: bool) {
        let Some(freezing) = state.freezing.take_if(|freezing| wait || freezing.layer.pending().is_none()) else {
            return;
        };
        let Freezing { layer, before, gaps } = freezing;
        let beneath = match layer.bg_copy().map_or(Ok(Vec::new()), |bg_copy| bg_copy.finish()) {
            Ok(shared_back) => {
                let mut runs: Vec<PageRange> = shared_back.iter().map(|(run, _)| *run).collect();
                runs.sort_unstable();
                // What is copied of them from now on is copied anew.
                state.counted = subtract_runs(&state.counted, &runs);
                for (run, at) in shared_back {
                    state.space.note_shared_back(run, Source { layer: Arc::clone(&layer), at });
                }
                state.space.keep_gaps(&before, &gaps);
                before
            }
            Err(error) => {
                tracing::warn!(%error, "a freeze is undone: its layer could not be filled");
                state.space.undo(before)
            }
        };
        // Registered until what is shown now is: a gap's pages, which are shown from beneath again,
        // are in no other view before that, and a sweep in between would give them back. Whatever
        // lets go of a view publishes first.
        state.space.keep_until_published(beneath);
        // It may hold the last handle of a large layer, and the vCPUs may be stopped.
        self.store.dispose(layer);
        // What the background was promised and did not need.
        state.space.trim();
    }

    /// Copies those pages of `range` that the background has not got to, and releases them: from
    /// then on they are not protected, not missing, and stay where they are. To be called under the
    /// state lock before a device is given their frames, which no protection keeps it from writing.
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

    /// Why some of its memory is lost, whether its callbacks have run or not.
    pub(crate) fn lost(&self) -> Option<Arc<FillError>> {
        let gone = || self.watched.as_ref().is_some_and(Watched::is_lost).then(|| Arc::new(FillError::Gone));
        self.failure.get().or_else(gone)
    }

    #[cfg(any(test, feature = "hazard"))]
    pub(crate) fn set_pin_policy(&self, policy: crate::PinPolicy) {
        self.ignores_pins.store(policy == crate::PinPolicy::Ignore, Ordering::Relaxed);
    }

    /// Whether a freeze takes pinned pages like any others: never, but where a test is to notice
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

    /// Those of `runs`, ascending, that have memory (R19).
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

    /// All of it.
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
        // A freeze of its own is finished without it: the background copy keeps the memory, and has
        // long copied what was pinned of the base file.
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
