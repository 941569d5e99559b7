//! The address space of a region: the kernel's mappings, their record, the layer map, and the
//! promised mappings. All changes to them are made together, in this module.
//!
//! **I14**: *no mapping shows a page that the layer map does not show.* For a page of which the VM
//! has its own copy, the map names the source that other VMs see, and the mapping below the copy
//! may be older. For any other page the two agree. So all maps together contain every readable page
//! ([`crate::layer::gc`]).
//!
//! | operation | kernel | record | map |
//! |---|---|---|---|
//! | [`AddressSpace::populate`] | shared over the base file | yes | |
//! | [`AddressSpace::show`] | a layer, zeros or nothing | yes | yes |
//! | [`AddressSpace::lay_out`] | the same, piece by piece | yes | at the end |
//! | [`AddressSpace::catch_up`] | to the source in the map | yes | |
//! | [`AddressSpace::supersede`] | | | of the VM's own pages |
//! | [`AddressSpace::note_shared_back`] | done by a background copy | yes | |
//! | [`AddressSpace::privatize_base`] | a private copy of base pages | yes | |
//! | [`AddressSpace::keep_gaps`] | | | back to the mapping's source |
//!
//! Every operation that maps reserves its mappings first (D5). A refused operation changes nothing.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};

use crate::budget::{BudgetError, Promise};
use crate::error::RamError;
use crate::layer::interval::Piece;
use crate::layer::registry::View;
use crate::layer::{Layer, LayerMap, LayerOffset};
use crate::region::mappings::{Mapping, Mappings};
use crate::region::{parts_of, same};
use crate::store::Store;
use crate::sys::Reservation;
use crate::testing::sabotage::{Break, broken};
use crate::units::{PAGE_SHIFT, PageRange, subtract_runs};

/// See the module's documentation. All fields are under the state lock.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    at: Arc<Reservation>,
    /// The mappings. Their number is the region's share of the mapping budget.
    mappings: Mappings,
    /// The source of each page that this VM does not own, or would show if it dropped its own copy.
    map: View,
    /// The base file of this VM, while some of its pages are still mapped shared.
    base_file: Option<Arc<Layer>>,
    /// The still shared-mapped pages of the base file, once the rest of it is a layer. The view
    /// keeps these pages from being punched, and allows the rest to be.
    base: Option<View>,
    promise: Promise,
    /// Replaced views, until taken.
    replaced: Vec<View>,
}

/// A piece whose mapping and map differ. `None` stands for zeros.
#[derive(Debug)]
pub(crate) struct Differs {
    pub(crate) range: PageRange,
    /// The mapped source.
    pub(crate) shown: Option<LayerOffset>,
    /// The source in the map.
    pub(crate) says: Option<LayerOffset>,
}

impl AddressSpace {
    /// An address space without mappings.
    pub(super) fn new(at: &Arc<Reservation>, store: &Store) -> Result<Self, BudgetError> {
        Ok(Self {
            at: Arc::clone(at),
            mappings: Mappings::default(),
            map: View::new(store.views(), Arc::default()),
            base_file: None,
            base: None,
            promise: store.budget().promise(1)?,
            replaced: Vec::new(),
        })
    }

    /// The source of each page that the VM does not own.
    pub(crate) fn map(&self) -> &Arc<LayerMap> {
        self.map.map()
    }

    /// The identities of the views: the shown one, the one of the base file, and the replaced ones.
    pub(crate) fn views(&self) -> impl Iterator<Item = u64> {
        [&self.map].into_iter().chain(&self.base).chain(&self.replaced).map(View::id)
    }

    /// The recorded mappings.
    pub(crate) fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// Number of promised mappings.
    pub(crate) fn promised(&self) -> u64 {
        self.promise.count()
    }

    /// The VM's base file, while some of its pages are mapped shared.
    pub(crate) fn base_file(&self) -> Option<&Arc<Layer>> {
        self.base_file.as_ref()
    }

    /// Reserves mappings for replacing `runs` runs: each adds a mapping and splits the one it lies
    /// in. On failure nothing has changed.
    pub(crate) fn reserve_runs(&mut self, runs: usize) -> Result<(), BudgetError> {
        self.reserve((self.mappings.len() + 2 * runs) as u64)
    }

    /// Reserves `count` mappings in total, unless more are reserved.
    pub(crate) fn reserve(&mut self, count: u64) -> Result<(), BudgetError> {
        self.promise.resize(self.promise.count().max(count))
    }

    /// Releases promised mappings that are not needed.
    pub(crate) fn trim(&mut self) {
        // Shrinking a promise cannot fail, and the promise is never below the number of mappings.
        let shrunk = self.promise.resize(self.mappings.len().max(1) as u64);
        debug_assert!(shrunk.is_ok(), "D5: more is mapped than was promised");
    }

    /// Maps all pages shared over `file`, which becomes the VM's base file.
    pub(super) fn populate(&mut self, file: Arc<Layer>) -> Result<(), RamError> {
        let range = PageRange::new(0, self.at.pages());
        self.at.map_shared(range, file.as_fd(), 0).map_err(|source| RamError::Map { range, source })?;
        self.mappings.insert(range, Mapping::SharedBase(LayerOffset { layer: Arc::clone(&file), at: 0 }));
        file.set_base(true);
        self.base_file = Some(file);
        Ok(())
    }

    /// Maps `want` in `range`, in place of its pages and the VM's own copies. On failure nothing
    /// has changed, or the memory is lost ([`FillError::Unmapped`](crate::FillError::Unmapped)).
    pub(crate) fn show(&mut self, range: PageRange, want: &Mapping) -> Result<(), RamError> {
        self.put(range, want)?;
        if broken(Break::LeaveMap) {
            return Ok(());
        }
        match want {
            Mapping::Private(source) | Mapping::SharedBase(source) => self.map.insert(range, source.clone()),
            // An unchanged map stays shared with other views.
            Mapping::Zero | Mapping::Absent if self.map.within(range).is_empty() => {}
            Mapping::Zero | Mapping::Absent => {
                self.map.remove(range);
            }
        }
        Ok(())
    }

    /// Maps each of `pieces`, calling `mapped` after each, and finally shows `map`.
    ///
    /// On failure some pieces are mapped and the map is the old one: no vCPU may run on it.
    pub(crate) fn lay_out(
        &mut self,
        pieces: &[(PageRange, Mapping)],
        map: &Arc<LayerMap>,
        mut mapped: impl FnMut(PageRange, &Mapping) -> Result<(), RamError>,
    ) -> Result<(), RamError> {
        for (range, want) in pieces {
            self.put(*range, want)?;
            mapped(*range, want)?;
        }
        self.map.set(Arc::clone(map));
        Ok(())
    }

    /// Has the records of private mappings hold the layers of the map where those show the same pages of
    /// another process: a record of an earlier image would hold that image's lease for as long as nothing
    /// else is mapped there.
    pub(crate) fn hold_leases_of_map(&mut self) {
        let renewed = |(range, mapping): (PageRange, &Mapping)| {
            let Mapping::Private(have) = mapping else { return None };
            have.layer.lease()?;
            let now = self.map.map().get(range.start)?;
            (have.is(&now) && !Arc::ptr_eq(&have.layer, &now.layer)).then_some((range, Mapping::Private(now)))
        };
        let renewed: Vec<_> = self.mappings.iter().filter_map(renewed).collect();
        renewed.into_iter().for_each(|(range, mapping)| self.mappings.insert(range, mapping));
    }

    /// Maps the map's source of `range`, which is `source`, in place of the VM's own copies.
    pub(crate) fn catch_up(&mut self, range: PageRange, source: &LayerOffset) -> Result<(), RamError> {
        debug_assert!(
            parts_of(&self.map, range)
                .iter()
                .all(|(part, says)| same(says.as_ref(), Some(&source.advance(part.start - range.start)))),
            "I14: {range} is mapped over what the map does not show"
        );
        self.put(range, &Mapping::Private(source.clone()))
    }

    /// Changes the kernel's mapping and its record.
    fn put(&mut self, range: PageRange, want: &Mapping) -> Result<(), RamError> {
        if self.promise.count() < self.mappings.len() as u64 + 2 {
            self.reserve(self.mappings.len_with(range) as u64)?;
        }
        match want {
            Mapping::Private(source) => self.at.map_private(range, source.layer.as_fd(), source.at),
            Mapping::SharedBase(source) => self.at.map_shared(range, source.layer.as_fd(), source.at),
            Mapping::Zero => self.at.map_zero(range),
            Mapping::Absent => self.at.map_none(range),
        }
        .map_err(|source| RamError::Map { range, source })?;
        self.mappings.insert(range, want.clone());
        Ok(())
    }

    /// Makes `source` the source of `range` in the map. The pages are the VM's own and are not
    /// remapped.
    pub(crate) fn supersede(&mut self, range: PageRange, source: LayerOffset) {
        self.map.insert(range, source);
    }

    /// Records that a background copy has mapped `run` over `source`, which the map has shown since
    /// its freeze.
    pub(super) fn note_shared_back(&mut self, run: PageRange, source: LayerOffset) {
        self.mappings.insert(run, Mapping::Private(source));
        debug_assert!(
            self.mappings.len() as u64 <= self.promise.count(),
            "D5: a copy has mapped more than was promised"
        );
    }

    /// Restores the map `before`, undoing a freeze whose copies were never mapped. Returns the
    /// replaced view.
    pub(super) fn undo(&mut self, before: View) -> View {
        std::mem::replace(&mut self.map, before)
    }

    /// Replaces base pages by private copies with the same bytes. The file's pages are to be
    /// punched ([`Self::free_base`]). On failure nothing has changed.
    pub(crate) fn privatize_base(&mut self, piece: PageRange) -> Result<(), RamError> {
        let Some(base_file) = self.base_file.clone() else { return Ok(()) };
        // In addition to the mappings promised to a background copy.
        self.reserve(self.promise.count() + 2)?;
        self.at
            .replace_private(piece, base_file.as_fd(), piece.start)
            .map_err(|source| RamError::Map { range: piece, source })?;
        self.mappings.insert(piece, Mapping::Zero);
        Ok(())
    }

    /// Restores the sources from `before` a delta for those `gaps` whose copies were not mapped.
    /// The VM has no copies of its own there.
    pub(crate) fn keep_gaps(&mut self, before: &LayerMap, gaps: &[PageRange]) {
        for gap in gaps {
            for Differs { range, .. } in self.mismatched_ranges(*gap) {
                self.map.remove(range);
                before.within(range).into_iter().for_each(|(range, source)| self.map.insert(range, source));
            }
        }
    }

    /// The pieces of `range` whose mapping and map differ. There I14 holds only because the VM has
    /// its own copies. Absent ranges stay unmapped even if the reset image maps them.
    pub(crate) fn mismatched_ranges(&self, range: PageRange) -> Vec<Differs> {
        let mut differ = Vec::new();
        for (range, mapping) in self.mappings.within(range) {
            let shown = match &mapping {
                Mapping::Private(source) | Mapping::SharedBase(source) => Some(source),
                Mapping::Zero => None,
                Mapping::Absent => continue,
            };
            for (piece, says) in parts_of(&self.map, range) {
                let shown = shown.map(|source| source.advance(piece.start - range.start));
                if !same(says.as_ref(), shown.as_ref()) {
                    differ.push(Differs { range: piece, shown, says });
                }
            }
        }
        differ
    }

    /// The pages of `range` whose copies can be dropped without a new mapping, because the mapping
    /// below agrees with the map.
    pub(crate) fn matched_ranges(&self, range: PageRange) -> Vec<PageRange> {
        let mut differ: Vec<PageRange> = self.mismatched_ranges(range).iter().map(|piece| piece.range).collect();
        differ.sort_unstable();
        subtract_runs(&[range], &differ)
    }

    /// Called after pages were taken from the base file. Drops the base file once no page maps it
    /// shared.
    pub(crate) fn retire_base_if_shared(&mut self) {
        if self.mappings.base_pages() == 0
            && let Some(base_file) = self.base_file.take()
        {
            // Publishes the view of these pages as a layer's before the file may be swept.
            self.publish();
            base_file.set_base(false);
            self.base = None;
        }
    }

    /// Called after a freeze: the base file is now a layer except for the pages that the VM still
    /// owns. These pages are registered in a view of their own. From then on the sweep can punch
    /// the other pages, even if one page of the file is kept for ever.
    pub(crate) fn register_base(&mut self) {
        self.retire_base_if_shared();
        let Some(base_file) = self.base_file.clone() else { return };
        let mut map = LayerMap::new();
        for run in self.mappings.base_runs() {
            map.insert(run, LayerOffset { layer: Arc::clone(&base_file), at: run.start });
        }
        // In this order: pages that became the layer's are in the published view before they leave
        // the base's view.
        self.publish();
        self.base = Some(self.map.beside(Arc::new(map)));
        base_file.set_base(false);
    }

    /// Abandons the base file when the VM or its memory goes; the VM's pages in it lose their
    /// owner. Devices do not use them, because a pin keeps the region.
    pub(crate) fn abandon_base(&mut self) {
        if let Some(base_file) = self.base_file.take() {
            base_file.set_base(false);
        }
        self.base = None;
    }

    /// After a replacement of `runs`, which were mapped shared over the base file: punches the file's pages that are
    /// not mapped any more. Called also if the replacement has failed half-way, because no later one looks at these.
    pub(crate) fn free_replaced_base(&mut self, runs: &[PageRange]) {
        self.free_base(&subtract_runs(runs, &self.mappings.base_runs()));
        self.retire_base_if_shared();
    }

    /// Punches the base file's pages in `runs`, which are this VM's alone: they are mapped nowhere, or are zeros from
    /// now on.
    pub(crate) fn free_base(&self, runs: &[PageRange]) {
        let Some(base_file) = &self.base_file else { return };
        for run in runs.iter().filter(|run| !run.is_empty()) {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(error) = fallocate(base_file.as_fd(), how, run.offset(), run.len() << PAGE_SHIFT) {
                tracing::debug!(%error, %run, "memory was not given back");
            }
            trace!(Punch { file: crate::trace::file(base_file.as_fd()), range: *run, swept: false });
        }
    }

    /// Removes all memory and leaves bare address space.
    pub(crate) fn clear(&mut self) {
        if let Err(error) = self.at.protect_none() {
            tracing::error!(%error, "a region could not be emptied");
        }
        self.map.set(Arc::default());
        self.mappings = Mappings::default();
        self.abandon_base();
        self.trim();
    }

    /// Keeps `view` registered until the current one is published and no device reads `view`.
    pub(crate) fn keep_until_published(&mut self, view: View) {
        self.replaced.push(view);
    }

    /// Registers the current view. The previous one stays registered until the lock is released,
    /// and longer while it is read.
    pub(super) fn publish(&mut self) {
        self.replaced.extend(self.map.publish());
    }

    /// Takes the replaced views, which are still registered and may still be read by devices.
    pub(super) fn take_replaced(&mut self) -> Vec<View> {
        std::mem::take(&mut self.replaced)
    }
}
