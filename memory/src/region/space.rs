//! The address space of a region: what the kernel has mapped where, the record of it, the layer
//! map, and the mappings promised for it. They change together, here and nowhere else.
//!
//! **I14**: *a page that the layer map does not show is shown by no mapping.* Of a page that the VM
//! has a copy of its own of, the map says what other VMs are shown, and the mapping beneath the
//! copy may be an older one. Of any other page the two say the same. So all maps together name all
//! that can be read ([`crate::layer::gc`]).
//!
//! | operation | kernel | record | map |
//! |---|---|---|---|
//! | [`AddressSpace::populate`] | shared over the base file | yes | |
//! | [`AddressSpace::show`] | a layer, zeros or nothing | yes | yes |
//! | [`AddressSpace::lay_out`] | the same, piece by piece | yes | at the end |
//! | [`AddressSpace::catch_up`] | what the map shows already | yes | |
//! | [`AddressSpace::supersede`] | | | of the VM's own pages |
//! | [`AddressSpace::note_shared_back`] | done by a background copy | yes | |
//! | [`AddressSpace::withdraw`] | a private copy of base pages | yes | |
//! | [`AddressSpace::keep_gaps`] | | | back to what is mapped |
//!
//! Every operation that maps something has its mapping promised first (D5): one that is refused has
//! changed nothing.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};

use crate::budget::{BudgetError, Promise};
use crate::error::RamError;
use crate::layer::interval::Piece;
use crate::layer::registry::View;
use crate::layer::{Layer, LayerMap, Source};
use crate::region::mappings::{Mapping, Mappings};
use crate::region::{parts_of, same};
use crate::store::Store;
use crate::sys::Reservation;
use crate::testing::sabotage::{Break, broken};
use crate::units::{PAGE_SHIFT, PageRange, subtract_runs};

/// See the module's documentation. All of it is under the state lock.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    at: Arc<Reservation>,
    /// What is mapped where. Its length is what the region costs the mapping budget.
    mappings: Mappings,
    /// What provides the pages this VM does not own, or would if it dropped its own copy.
    map: View,
    /// The base file of this VM, while some of its pages are still mapped shared.
    base_file: Option<Arc<Layer>>,
    /// Once the rest of that file is a layer: those pages, so that nothing of theirs is given back,
    /// and the rest may be.
    base: Option<View>,
    promise: Promise,
    /// Views that were replaced since the last were taken.
    replaced: Vec<View>,
}

/// A piece of which mapping and map differ. `None` stands for zeros.
#[derive(Debug)]
pub(crate) struct Differs {
    pub(crate) range: PageRange,
    /// What is mapped.
    pub(crate) shown: Option<Source>,
    /// What the map says.
    pub(crate) says: Option<Source>,
}

impl AddressSpace {
    /// Of bare addresses.
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

    /// What provides the pages that are not the VM's own.
    pub(crate) fn map(&self) -> &Arc<LayerMap> {
        self.map.map()
    }

    /// The identities of its views: of what it shows, and of what is left of its base file.
    pub(crate) fn views(&self) -> impl Iterator<Item = u64> {
        [&self.map].into_iter().chain(&self.base).chain(&self.replaced).map(View::id)
    }

    /// What is mapped where.
    pub(crate) fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// Mappings promised.
    pub(crate) fn promised(&self) -> u64 {
        self.promise.count()
    }

    /// The VM's base file, while some of its pages are mapped shared.
    pub(crate) fn base_file(&self) -> Option<&Arc<Layer>> {
        self.base_file.as_ref()
    }

    /// Has mappings promised for what is put in place of `runs` runs: each adds itself and splits
    /// what it lies in. Failing, nothing has changed.
    pub(crate) fn reserve_runs(&mut self, runs: usize) -> Result<(), BudgetError> {
        self.reserve((self.mappings.len() + 2 * runs) as u64)
    }

    /// Has `count` mappings promised in all, or more if more are.
    pub(crate) fn reserve(&mut self, count: u64) -> Result<(), BudgetError> {
        self.promise.resize(self.promise.count().max(count))
    }

    /// Gives back what was promised and is not needed.
    pub(crate) fn trim(&mut self) {
        // Shrinking a promise cannot fail, and there is always as much as is mapped.
        let shrunk = self.promise.resize(self.mappings.len().max(1) as u64);
        debug_assert!(shrunk.is_ok(), "D5: more is mapped than was promised");
    }

    /// Maps all of it shared over `file`, which becomes the VM's base file.
    pub(super) fn populate(&mut self, file: Arc<Layer>) -> Result<(), RamError> {
        let range = PageRange::new(0, self.at.pages());
        self.at.map_shared(range, file.as_fd(), 0).map_err(|source| RamError::Map { range, source })?;
        self.mappings.insert(range, Mapping::SharedBase(Source { layer: Arc::clone(&file), at: 0 }));
        file.set_base(true);
        self.base_file = Some(file);
        Ok(())
    }

    /// Maps `want` in place of what is in `range`, copies of the VM's own included. Failing,
    /// nothing has changed.
    pub(crate) fn show(&mut self, range: PageRange, want: &Mapping) -> Result<(), RamError> {
        self.put(range, want)?;
        if broken(Break::LeaveMap) {
            return Ok(());
        }
        match want {
            Mapping::Private(source) | Mapping::SharedBase(source) => self.map.insert(range, source.clone()),
            // A map that is not changed stays the one that others have too.
            Mapping::Zero | Mapping::Absent if self.map.within(range).is_empty() => {}
            Mapping::Zero | Mapping::Absent => {
                self.map.remove(range);
            }
        }
        Ok(())
    }

    /// Maps each of `pieces`, calling `mapped` after it, and shows `map` in the end.
    ///
    /// Failing half-way, some are mapped and the map is the old one: no vCPU may run on it.
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

    /// Maps what the map shows in `range`, which is `source`, in place of the VM's own copies of
    /// it.
    pub(crate) fn catch_up(&mut self, range: PageRange, source: &Source) -> Result<(), RamError> {
        debug_assert!(
            parts_of(&self.map, range)
                .iter()
                .all(|(part, says)| same(says.as_ref(), Some(&source.advance(part.start - range.start)))),
            "I14: {range} is mapped over what the map does not show"
        );
        self.put(range, &Mapping::Private(source.clone()))
    }

    /// The kernel's mapping and its record.
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

    /// Says that `source` provides `range`, whose pages are the VM's own: they are not mapped anew.
    pub(crate) fn supersede(&mut self, range: PageRange, source: Source) {
        self.map.insert(range, source);
    }

    /// Records that a background copy has mapped `run` over `source`, which the map shows since its
    /// freeze.
    pub(super) fn note_shared_back(&mut self, run: PageRange, source: Source) {
        self.mappings.insert(run, Mapping::Private(source));
        debug_assert!(
            self.mappings.len() as u64 <= self.promise.count(),
            "D5: a copy has mapped more than was promised"
        );
    }

    /// Shows `map` again, undoing a freeze whose copies were mapped nowhere. Returns the view that
    /// is replaced.
    pub(super) fn undo(&mut self, before: View) -> View {
        std::mem::replace(&mut self.map, before)
    }

    /// Puts private copies with the same bytes in place of base pages. The file has holes to come
    /// there ([`Self::free_base`]). Failing, nothing has changed.
    pub(crate) fn withdraw(&mut self, piece: PageRange) -> Result<(), RamError> {
        let Some(base_file) = self.base_file.clone() else { return Ok(()) };
        // On top of what a background copy has been promised.
        self.reserve(self.promise.count() + 2)?;
        self.at
            .replace_private(piece, base_file.as_fd(), piece.start)
            .map_err(|source| RamError::Map { range: piece, source })?;
        self.mappings.insert(piece, Mapping::Zero);
        Ok(())
    }

    /// Shows what was there `before` a delta where its copies of `gaps` have not been mapped: the
    /// VM has no copy of its own of them.
    pub(crate) fn keep_gaps(&mut self, before: &LayerMap, gaps: &[PageRange]) {
        for gap in gaps {
            for Differs { range, .. } in self.out_of_step(*gap) {
                self.map.remove(range);
                before.within(range).into_iter().for_each(|(range, source)| self.map.insert(range, source));
            }
        }
    }

    /// The pieces of `range` of which mapping and map differ: only copies of the VM's own keep I14
    /// there. What has no memory shows nothing, whatever an image it was reset to has there.
    pub(crate) fn out_of_step(&self, range: PageRange) -> Vec<Differs> {
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

    /// Those pages of `range` whose copies can be dropped with nothing mapped anew: what is beneath
    /// is what the map says.
    pub(crate) fn in_step(&self, range: PageRange) -> Vec<PageRange> {
        let mut differ: Vec<PageRange> = self.out_of_step(range).iter().map(|piece| piece.range).collect();
        differ.sort_unstable();
        subtract_runs(&[range], &differ)
    }

    /// To be called when pages have been taken from the base file: it is none any more once all
    /// have.
    pub(crate) fn retire_base_if_shared(&mut self) {
        if self.mappings.base_pages() == 0
            && let Some(base_file) = self.base_file.take()
        {
            // Before it may be swept: what it shows as a layer.
            self.publish();
            base_file.set_base(false);
            self.base = None;
        }
    }

    /// After a freeze: this VM's base file is a layer but for the pages that are still its own.
    /// These are registered like a view's, and from then on what no view shows of the file can be
    /// given back, though one page of it be kept for ever.
    pub(crate) fn register_base(&mut self) {
        self.retire_base_if_shared();
        let Some(base_file) = self.base_file.clone() else { return };
        let mut map = LayerMap::new();
        for run in self.mappings.base_runs() {
            map.insert(run, Source { layer: Arc::clone(&base_file), at: run.start });
        }
        // In this order: what has become a layer's is shown by the view before it is no longer
        // registered as the base's.
        self.publish();
        self.base = Some(self.map.beside(Arc::new(map)));
        base_file.set_base(false);
    }

    /// The VM goes, or its memory does: what it still owned of its base file has no owner. No
    /// device has any of it, for a pin keeps the region.
    pub(crate) fn abandon_base(&mut self) {
        if let Some(base_file) = self.base_file.take() {
            base_file.set_base(false);
        }
        self.base = None;
    }

    /// Gives back the base file's memory behind pages that were this VM's alone and are mapped
    /// nowhere now.
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

    /// Takes all memory away and leaves bare address space.
    pub(crate) fn clear(&mut self) {
        if let Err(error) = self.at.protect_none() {
            tracing::error!(%error, "a region could not be emptied");
        }
        self.map.set(Arc::default());
        self.mappings = Mappings::default();
        self.abandon_base();
        self.trim();
    }

    /// Keeps `view` registered until what is shown now is, and until no device reads it.
    pub(crate) fn keep_until_published(&mut self, view: View) {
        self.replaced.push(view);
    }

    /// Registers the view as it is now. The one before stays registered until the lock is let go,
    /// and longer while it is read.
    pub(super) fn publish(&mut self) {
        self.replaced.extend(self.map.publish());
    }

    /// Views that were replaced: still registered, and perhaps read by a device.
    pub(super) fn take_replaced(&mut self) -> Vec<View> {
        std::mem::take(&mut self.replaced)
    }
}
