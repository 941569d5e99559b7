//! A region: one memslot's worth of guest memory, over one reservation of host addresses that never moves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::guest_memory::Result as GuestMemoryResult;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress,
    VolatileSlice,
};

use crate::budget::Promise;
use crate::error::RamError;
use crate::interval::{IntervalMap, Piece};
use crate::layer::{Layer, LayerMap, Source};
use crate::nofork::NoForkMap;
use crate::ownership::OwnershipTable;
use crate::pin::PinList;
use crate::store::{Backing, Store};
use crate::sys::Reservation;
use crate::units::{PAGE_SHIFT, PageRange};

/// What is mapped into a piece of the reservation at present.
#[derive(Clone, Debug)]
pub(crate) enum Mapping {
    /// Shared and writable over the birth file: every page is this VM's own.
    Born(Source),
    /// Private over a layer: the kernel copies on write.
    Private(Source),
    /// Private zeros.
    Zero,
}

impl Piece for Mapping {
    fn advance(&self, pages: u64) -> Self {
        match self {
            Self::Born(source) => Self::Born(source.advance(pages)),
            Self::Private(source) => Self::Private(source.advance(pages)),
            Self::Zero => Self::Zero,
        }
    }
    /// Never: the kernel may or may not join two mappings, so each counts against the budget.
    fn continues(&self, _pages: u64, _next: &Self) -> bool {
        false
    }
}

/// Everything about a region that only changes under its lock.
///
/// Lock order: this, then the ownership table's.
#[derive(Debug)]
pub(crate) struct State {
    /// What provides the pages this VM does not own, or would if it dropped its own copy.
    pub(crate) map: LayerMap,
    /// What is mapped where. Its length is what the region costs the mapping budget.
    pub(crate) mappings: IntervalMap<Mapping>,
    /// The file this VM was born in, while some of its pages are still mapped shared.
    pub(crate) birth: Option<Arc<Layer>>,
    pub(crate) promise: Promise,
    /// What children do not inherit.
    pub(crate) no_fork: NoForkMap,
}

impl State {
    /// The runs mapped shared over the birth file.
    pub(crate) fn born_runs(&self) -> Vec<PageRange> {
        let mut runs = Vec::new();
        for (range, mapping) in self.mappings.iter() {
            if matches!(mapping, Mapping::Born(_)) {
                crate::units::push_run(&mut runs, range);
            }
        }
        runs
    }
}

/// A guest-physical range and the memory behind it. See [`crate::GuestRam`] for what is done with it.
#[derive(Debug)]
pub struct GuestRegion {
    pub(crate) base: GuestAddress,
    pub(crate) store: Store,
    pub(crate) at: Reservation,
    pub(crate) table: OwnershipTable,
    pub(crate) pins: PinList,
    /// Whether memory is mapped. Release on going live pairs with Acquire at each access: the mappings are there before anyone uses them.
    live: AtomicBool,
    state: Mutex<State>,
}

impl GuestRegion {
    /// Reserves addresses for `pages` pages at `base`. Nothing is mapped yet.
    pub(crate) fn reserve(base: GuestAddress, pages: u64, store: &Store) -> Result<Self, RamError> {
        let at = Reservation::new(pages).map_err(|source| RamError::Reserve { pages, source })?;
        let promise = store.budget().promise(1)?;
        Ok(Self {
            base,
            store: store.clone(),
            at,
            table: OwnershipTable::new(pages),
            pins: PinList::default(),
            live: AtomicBool::new(false),
            state: Mutex::new(State {
                map: LayerMap::new(),
                mappings: IntervalMap::new(),
                birth: None,
                promise,
                no_fork: NoForkMap::new(),
            }),
        })
    }

    /// Gives the region a birth file: fresh zeros, every page this VM's own (I2).
    pub(crate) fn birth(&self) -> Result<(), RamError> {
        let mut state = self.state();
        self.expect_empty()?;
        let file = Arc::new(self.store.layer(self.pages(), Backing::Huge)?);
        self.at
            .map_shared(self.range(), std::os::fd::AsFd::as_fd(&*file), 0)
            .map_err(|source| RamError::Map { range: self.range(), source })?;
        self.table.lock().set_exclusive(self.range());
        state.mappings.insert(self.range(), Mapping::Born(Source { layer: Arc::clone(&file), at: 0 }));
        state.birth = Some(file);
        self.set_live(true);
        Ok(())
    }

    /// The state, for an operation on `range`.
    pub(crate) fn checked(&self, range: PageRange) -> Result<MutexGuard<'_, State>, RamError> {
        if !self.range().covers(range) {
            return Err(RamError::OutOfRange { range, pages: self.pages() });
        }
        let state = self.state();
        if self.is_live() { Ok(state) } else { Err(RamError::Empty { base: self.base.0 }) }
    }

    pub(crate) fn expect_empty(&self) -> Result<(), RamError> {
        if self.is_live() { Err(RamError::NotEmpty { base: self.base.0 }) } else { Ok(()) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves the state as it was after the last completed step, each of which is consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    pub(crate) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Release);
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
        if !self.is_live() {
            return Err(GuestMemoryError::HostAddressNotAvailable);
        }
        let addr = self.at.addr(0).wrapping_add(offset.0 as usize);
        // SAFETY: offset..end lies within the reservation (checked), which is mapped read-write while the region is
        // live, and lives as long as `self`, whose lifetime the slice carries. Access through it is volatile.
        Ok(unsafe { VolatileSlice::new(addr, count) })
    }
}

impl GuestMemoryRegionBytes for GuestRegion {}
