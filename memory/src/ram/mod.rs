//! A VM's guest memory: its regions, and operations on all of them at once.

mod ahead;
mod check;
mod compact;
pub(crate) mod tracked;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionCollection};

use crate::backing::Backing;
use crate::error::RamError;
use crate::freeze::{FreezeMode, FreezeReport};
use crate::layout::RamLayout;
use crate::lost::FillError;
use crate::quiesce::Quiesced;
use crate::region::GuestRegion;
use crate::region::compact::layers;
use crate::region::counts::{CowCounts, PinCounts};
use crate::region::dont_fork::DontForkMap;
use crate::region::freeze::RegionImage;
use crate::region::pages::{self, PageMap};
use crate::region::reset::{RamResetReport, ResetError};
use crate::region::stats::RamStats;
use crate::region::suspend::{RamSuspension, SuspendFile, Suspended, TouchedPages};
use crate::store::Store;
use crate::units::PAGE_SHIFT;

/// Interval at which a reset or a suspension that waits for devices checks again.
const PIN_POLL: Duration = Duration::from_micros(200);

/// The memory of a VM at one instant, as layers: cheap to clone, keeps the layers alive, and can
/// start any number of VMs.
#[derive(Clone, Debug)]
pub struct RamImage {
    layout: RamLayout,
    regions: Vec<RegionImage>,
}

impl RamImage {
    /// The shape of the guest from which the image was taken.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    pub(crate) fn regions(&self) -> &[RegionImage] {
        &self.regions
    }

    pub(crate) fn of(layout: RamLayout, regions: Vec<RegionImage>) -> Self {
        Self { layout, regions }
    }

    /// An image of the same shape, with other maps of the same contents.
    pub(crate) fn with_regions(&self, regions: Vec<RegionImage>) -> Self {
        Self { layout: self.layout.clone(), regions }
    }

    /// Maximum number of mappings of a VM started from the image.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.regions.iter().map(|region| region.map.len()).sum()
    }

    /// Copies the memory into one layer per region, in pages of the given size. The time is that of
    /// copying all memory; the result depends on no other layer.
    ///
    /// # Errors
    /// When memory for the copy runs out.
    pub fn flatten(&self, store: &Store, grain: Backing) -> Result<Self, RamError> {
        let view = GuestRam::reserve(&self.layout, store)?;
        // Absent ranges are copied as zeros, and are absent again in a VM that adopts the copy.
        let seen = |region: &RegionImage| RegionImage { map: Arc::clone(&region.map), dont_fork: DontForkMap::new() };
        view.adopt(&Self { layout: self.layout.clone(), regions: self.regions.iter().map(seen).collect() })?;
        let copies = view.regions.iter().zip(&self.regions).map(|(region, of)| region.copy_whole(grain, &of.dont_fork));
        Ok(Self { layout: self.layout.clone(), regions: copies.collect::<Result<_, _>>()? })
    }

    pub(crate) fn bg_copies(&self) -> impl Iterator<Item = &Arc<dyn crate::layer::fill::LayerFill>> {
        self.regions.iter().flat_map(|region| region.map.iter()).filter_map(|(_, source)| source.layer.bg_copy())
    }

    /// Whether pages of the image are still being copied from its VM. The image can be adopted in
    /// the meantime.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.bg_copies().any(|bg_copy| !bg_copy.is_over())
    }

    /// The reason why the image will never be complete, if a background copy failed. Such an image
    /// cannot be adopted.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<FillError>> {
        self.bg_copies().find_map(|bg_copy| bg_copy.failure())
    }

    /// Waits until the image is complete, copying missing pages on this thread.
    ///
    /// # Errors
    /// When the image will never be complete.
    pub fn finish_background(&self) -> Result<(), RamError> {
        for bg_copy in self.bg_copies() {
            bg_copy.finish().map_err(RamError::Lost)?;
        }
        Ok(())
    }

    /// Number of layers in the image.
    #[must_use]
    pub fn layers(&self) -> usize {
        layers(self.regions.iter().map(|region| &**region.map))
    }
}

/// The memory for rust-vmm crates: the regions as a `vm_memory` collection.
pub type GuestMemory = GuestRegionCollection<GuestRegion>;

/// A VM's guest memory.
///
/// ```
/// # use clade_memory::{GuestRam, NoWriters, Quiesced, RamLayout, Store};
/// # use vm_memory::{Bytes, GuestAddress};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = Store::open()?;
/// let layout = RamLayout::new(16 << 20)?;
/// let parent = GuestRam::reserve(&layout, &store)?;
/// parent.populate()?;
/// parent.memory().write_obj(7u32, GuestAddress(0x1000))?;
///
/// let (image, _) = parent.freeze(&Quiesced::by(&NoWriters))?;
/// let child = GuestRam::reserve(&layout, &store)?;
/// child.adopt(&image)?;
///
/// parent.memory().write_obj(8u32, GuestAddress(0x1000))?;
/// assert_eq!(child.memory().read_obj::<u32>(GuestAddress(0x1000))?, 7);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GuestRam {
    layout: RamLayout,
    regions: Vec<Arc<GuestRegion>>,
    memory: GuestMemory,
}

impl GuestRam {
    /// Reserves host addresses for `layout`: enough for memslots, without memory yet.
    ///
    /// # Errors
    /// When address space or the mapping budget is exhausted.
    pub fn reserve(layout: &RamLayout, store: &Store) -> Result<Self, RamError> {
        let reserve = |(base, pages): &(GuestAddress, u64)| GuestRegion::reserve(*base, *pages, store).map(Arc::new);
        let regions = layout.ranges().iter().map(reserve).collect::<Result<Vec<_>, _>>()?;
        // A layout has at least one range, and its ranges are ascending and disjoint.
        let memory = GuestRegionCollection::from_arc_regions(regions.clone()).map_err(|_| RamError::NoMemory)?;
        Ok(Self { layout: layout.clone(), regions, memory })
    }

    /// Prepares the VM for getting its memory soon: unmaps the reservations, so that mapping the
    /// memory sends KVM no invalidations. Called before the VM has memory.
    pub fn vacate(&self) {
        self.regions.iter().for_each(|region| region.vacate());
    }

    /// Populates the VM with its own zeroed memory.
    ///
    /// # Errors
    /// When the VM has memory already, or memory runs out.
    pub fn populate(&self) -> Result<(), RamError> {
        trace!(Schedule);
        self.fill_regions(|at| self.regions[at].populate())
    }

    /// Fills every region, and makes all of them live when every fill has succeeded. On failure all
    /// regions are empty (I13).
    fn fill_regions(&self, mut one: impl FnMut(usize) -> Result<(), RamError>) -> Result<(), RamError> {
        for at in 0..self.regions.len() {
            if let Err(error) = one(at) {
                self.regions[..at].iter().for_each(|done| done.empty());
                return Err(error);
            }
        }
        self.regions.iter().for_each(|region| region.go_live());
        Ok(())
    }

    /// Gives the VM the memory of an image, shared until written.
    ///
    /// # Errors
    /// When the VM has memory already, the shapes differ, or mappings run out; then it is as empty
    /// as before (I13).
    pub fn adopt(&self, image: &RamImage) -> Result<(), RamError> {
        if image.layout != self.layout {
            return Err(RamError::Shape { image: image.layout.bytes(), guest: self.layout.bytes() });
        }
        self.fill_regions(|at| self.regions[at].adopt(&image.regions[at]))
    }

    /// Turns all pages that this VM owns into layers, except pages pinned for DMA, which are copied
    /// (I3). The VM continues with the same contents at the same addresses.
    ///
    /// # Errors
    /// Then the VM is unchanged, and no page was shared (I13).
    pub fn freeze(&self, quiesced: &Quiesced<'_>) -> Result<(RamImage, FreezeReport), RamError> {
        self.freeze_in(FreezeMode::Auto, quiesced)
    }

    /// As [`GuestRam::freeze`], with a choice of when private pages are copied.
    ///
    /// If they are copied in the background, writers may resume as soon as this returns: a write to
    /// a page that is not copied yet waits for that page. The image may be adopted at once: a read
    /// of such a page waits likewise.
    ///
    /// # Errors
    /// Then the VM is unchanged, and no page was shared (I13).
    pub fn freeze_in(&self, mode: FreezeMode, _quiesced: &Quiesced<'_>) -> Result<(RamImage, FreezeReport), RamError> {
        let mut frozen = VecDeque::with_capacity(self.regions.len());
        GuestRegion::freeze_all(&self.regions, mode, &mut frozen)?;
        // A page that was lost meanwhile was copied as the zeros in its place.
        if let Some(error) = self.regions.iter().find_map(|region| region.lost()) {
            return Err(RamError::Lost(error));
        }
        let mut report = FreezeReport::default();
        let mut regions = Vec::with_capacity(frozen.len());
        for (image, one) in frozen {
            regions.push(image);
            report += one;
        }
        Ok((RamImage { layout: self.layout.clone(), regions }, report))
    }

    /// Sets the treatment of pinned pages in this VM's later freezes. Not inherited by children.
    #[cfg(any(test, feature = "hazard"))]
    pub fn set_pin_policy(&self, policy: crate::PinPolicy) {
        if policy == crate::PinPolicy::Ignore {
            tracing::warn!("pinned pages are no longer spared by freezes: memory will be wrong, as was asked for");
        }
        self.regions.iter().for_each(|region| region.set_pin_policy(policy));
    }

    /// Resets the memory to `image`, in place. The cost is in pages written since. Waits up to
    /// `patience` for transient pins, and never for long-term pins.
    ///
    /// # Errors
    /// When pages stay pinned, or mappings run out: then nothing has changed. After a failure
    /// half-way the contents are inconsistent ([`GuestRam::is_inconsistent`]), and the VM must not
    /// run.
    pub fn reset(
        &self,
        image: &RamImage,
        _quiesced: &Quiesced<'_>,
        patience: Duration,
    ) -> Result<RamResetReport, RamError> {
        if image.layout != self.layout {
            return Err(RamError::Shape { image: image.layout.bytes(), guest: self.layout.bytes() });
        }
        // The image's missing pages must be filled before it is mapped.
        image.finish_background()?;
        self.wait_unpinned(patience)?;
        let mut report = RamResetReport::default();
        match GuestRegion::reset_all(&self.regions, image.regions(), &mut report) {
            Ok(()) => Ok(report),
            Err(ResetError::Refused(error)) => Err(error),
            Err(ResetError::Inconsistent(error)) => {
                // Some pages are of the image's instant, and others are not.
                self.regions.iter().for_each(|region| region.mark_inconsistent());
                Err(error)
            }
        }
    }

    /// Writes all pages that this VM owns to `file`, and frees their memory. The VM keeps the same
    /// contents at the same addresses: pages are read back on access. After an earlier suspension,
    /// only pages written since are written. Waits up to `patience` for devices to release their
    /// pins.
    ///
    /// # Errors
    /// When pages stay pinned, the file cannot be written, or mappings run out. Then the
    /// contents are the same, and pages that are not in the file are still this VM's own (I13).
    pub fn suspend(
        &self,
        file: SuspendFile,
        _quiesced: &Quiesced<'_>,
        patience: Duration,
    ) -> Result<(Suspended, TouchedPages), RamError> {
        self.wait_unpinned(patience)?;
        // Before the pages to write are selected: contents do not change, even if a later step
        // fails.
        self.regions.iter().try_for_each(|region| region.drop_unused())?;
        let mut suspension = RamSuspension::to(file, &self.regions)?;
        let store = self.regions.first().map(|region| region.store.clone()).ok_or(RamError::NoMemory)?;
        GuestRegion::suspend_all(&self.regions, &store, &mut suspension)?;
        Ok((suspension.report, suspension.working_set))
    }

    /// Reads ahead and maps the pages that a suspended VM is likely to touch. Pages that cannot be
    /// read are read on access.
    pub fn read_ahead(&self, working_set: &TouchedPages) {
        working_set.read_ahead(&self.regions);
    }

    /// Waits up to `patience` until no page is pinned. Gives up at a long-term pin, whose end only
    /// its holder decides. All regions are checked before the first change; a later pin refuses the
    /// operation on its own region.
    fn wait_unpinned(&self, patience: Duration) -> Result<(), RamError> {
        let deadline = Instant::now() + patience;
        while let Some(refused) = self.regions.iter().find_map(|region| region.in_use()) {
            let is_long = self.regions.iter().any(|region| region.pins.counts().0 > 0);
            if is_long || Instant::now() >= deadline {
                return Err(refused);
            }
            std::thread::sleep(PIN_POLL);
        }
        Ok(())
    }

    /// Whether a reset has failed half-way: the contents are not of one instant, and only another
    /// reset helps.
    #[must_use]
    pub fn is_inconsistent(&self) -> bool {
        self.regions.iter().any(|region| region.is_inconsistent())
    }

    /// The reason why memory is lost, if it is: the VM adopted an image that was still being
    /// copied, and the copy failed. Accesses to the missing pages fail (KVM_RUN and system calls:
    /// EFAULT; this process: a signal).
    #[must_use]
    pub fn failure(&self) -> Option<Arc<FillError>> {
        self.regions.iter().find_map(|region| region.lost())
    }

    /// Calls `call` once when memory is lost, on a thread of this crate that holds no lock, so
    /// `call` may query the VM. If memory is already lost, calls it immediately. For stopping the
    /// VM with the reason.
    pub fn on_failure(&self, call: impl FnOnce(&Arc<FillError>) + Send + 'static) {
        let once = Arc::new(Mutex::new(Some(call)));
        for region in &self.regions {
            let once = Arc::clone(&once);
            region.failure.on(Box::new(move |error| {
                let call = once.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(call) = call {
                    call(error);
                }
            }));
        }
    }

    /// Finishes all background work on this memory: the VM's own last freeze, and layers that it
    /// adopted unfinished.
    ///
    /// # Errors
    /// When adopted memory is lost.
    pub fn finish_background(&self) -> Result<(), RamError> {
        self.regions.iter().try_for_each(|region| region.finish_background(&mut region.state()))
    }

    /// Page counts by kind.
    ///
    /// # Errors
    /// When the page map cannot be read.
    pub fn stats(&self) -> Result<RamStats, RamError> {
        let mut stats = RamStats::default();
        for region in &self.regions {
            region.reap_background(&mut region.state(), false);
            stats += region.stats()?;
        }
        Ok(stats)
    }

    /// Copies so far, by cause.
    ///
    /// # Errors
    /// When the page map cannot be read.
    pub fn cow_counts(&self) -> Result<CowCounts, RamError> {
        let mut counts = CowCounts::default();
        for region in &self.regions {
            counts += region.cow_counts()?;
        }
        Ok(counts)
    }

    /// Pins of the VM.
    #[must_use]
    pub fn pin_counts(&self) -> PinCounts {
        let mut counts = PinCounts::default();
        self.regions.iter().for_each(|region| counts += region.pin_counts());
        counts
    }

    /// The kind of each page, and the layers shown to the VM. `origin` is an image that is held for
    /// this VM alone: its layers do not count as shown to others.
    ///
    /// # Errors
    /// When there is no memory yet, or the page map cannot be read.
    pub fn page_map(&self, origin: Option<&RamImage>) -> Result<PageMap, RamError> {
        self.regions.iter().for_each(|region| region.reap_background(&mut region.state(), false));
        let own_views = origin.into_iter().flat_map(RamImage::regions).map(|region| region.map.id()).collect();
        pages::page_map(&self.regions, own_views)
    }

    /// The memory, for rust-vmm crates.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[Arc<GuestRegion>] {
        &self.regions
    }

    /// The shape of the memory.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The region that contains `gpa`, and the page of the region.
    #[must_use]
    pub fn locate(&self, gpa: GuestAddress) -> Option<(&Arc<GuestRegion>, u64)> {
        let at = self.regions.iter().find(|r| r.to_region_addr(gpa).is_some())?;
        Some((at, (gpa.0 - at.base.0) >> PAGE_SHIFT))
    }
}
