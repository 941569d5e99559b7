//! Guest memory with a dirty bitmap of the user's choice.

use std::sync::Arc;

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::Result as GuestMemoryResult;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress,
    VolatileSlice,
};

use crate::error::RamError;
use crate::ram::GuestRam;
use crate::region::GuestRegion;

/// A region that records its writes through `vm_memory` in a bitmap `B`.
///
/// The bitmap has this process's writes through `vm_memory` only. KVM's dirty log has the guest's
/// writes, and the owners of pins know those of devices.
#[derive(Debug)]
pub struct TrackedRegion<B> {
    region: Arc<GuestRegion>,
    bitmap: B,
}

impl<B> TrackedRegion<B> {
    /// The region itself.
    #[must_use]
    pub fn region(&self) -> &Arc<GuestRegion> {
        &self.region
    }
}

impl<B: Bitmap> GuestMemoryRegion for TrackedRegion<B> {
    type B = B;

    fn len(&self) -> GuestUsize {
        self.region.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.region.start_addr()
    }

    fn bitmap(&self) -> BS<'_, B> {
        self.bitmap.slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        self.region.get_host_address(addr)
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, B>>> {
        let plain = self.region.get_slice(offset, count)?;
        let addr = plain.ptr_guard_mut().as_ptr();
        // SAFETY: the bytes of `plain`, under the same lifetime: it was checked to lie within the
        // region's live memory.
        Ok(unsafe { VolatileSlice::with_bitmap(addr, count, self.bitmap.slice_at(offset.0 as usize), None) })
    }
}

impl<B: Bitmap> GuestMemoryRegionBytes for TrackedRegion<B> {}

impl GuestRam {
    /// The same memory, for rust-vmm crates, with a dirty bitmap for each region. `bitmap` is
    /// called with the region's size in bytes.
    ///
    /// ```
    /// use clade_memory::{GuestRam, PAGE_SIZE, RamLayout, Store};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, bitmap::{AtomicBitmap, Bitmap}};
    ///
    /// let ram = GuestRam::reserve(&RamLayout::new(64 * PAGE_SIZE)?, &Store::open_small()?)?;
    /// ram.populate()?;
    /// let page = std::num::NonZero::new(PAGE_SIZE as usize).unwrap();
    /// let memory = ram.tracked(|bytes| AtomicBitmap::new(bytes as usize, page))?;
    /// memory.write_obj(1u64, GuestAddress(5 * PAGE_SIZE))?;
    /// let region = memory.iter().next().unwrap();
    /// assert!(region.bitmap().dirty_at(5 * PAGE_SIZE as usize));
    /// assert!(!region.bitmap().dirty_at(6 * PAGE_SIZE as usize));
    /// # use vm_memory::GuestMemoryBackend;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Never for a layout that [`RamLayout`](crate::RamLayout) has accepted.
    pub fn tracked<B: Bitmap>(
        &self,
        mut bitmap: impl FnMut(u64) -> B,
    ) -> Result<GuestRegionCollection<TrackedRegion<B>>, RamError> {
        let regions = self.regions().iter();
        let regions = regions.map(|region| TrackedRegion { region: Arc::clone(region), bitmap: bitmap(region.len()) });
        GuestRegionCollection::from_regions(regions.collect()).map_err(|_| RamError::NoMemory)
    }
}
