//! The files of a disk: its base, its overlays, and the map from clusters to these files.

use std::ops::Range;
use std::sync::Arc;

use clade_host_io::{CachePolicy, FileError, IoFile};

use super::image::DiskImage;
use super::journal::{JournalReport, JournalTail, write_back};
use super::map::{BlockMap, CLUSTER, ClusterSource};
use super::relocation::{Relocation, movable};
use super::setup::Setup;
use super::{DiskConfig, DiskError};

/// The map from clusters to files, and the file that writes go to.
///
/// Invariants:
///
/// - No image and no other disk has `active` in its map. A fork clears it before it clones the map.
/// - `active` is empty, the base, or an overlay made by this disk since its last fork.
/// - Once the disk was forked, `active` is the base only while the disk folds; no other disk and no
///   image had the setup when the fold began.
/// - `relocation` never moves clusters out of `active`, and never begins while `unsettled` has
///   writes.
#[derive(Debug)]
pub(super) struct OverlayChain {
    setup: Arc<Setup>,
    map: BlockMap,
    /// The file that this disk alone may write. None after a fork, until the next write.
    active: Option<Arc<IoFile>>,
    /// Whether the disk was forked, or made by a fork, since it was all in its base.
    forked: bool,
    /// Files of the map that another VM was still writing when this disk was made.
    unsettled: Vec<Arc<IoFile>>,
    /// Whether a forked disk writes to its base again, and has overlays moved into it.
    folding: bool,
    /// Whether clusters may have come into other files than the base since a fold last queued its
    /// moves.
    rescan: bool,
    relocation: Relocation,
}

impl OverlayChain {
    /// The chain of a disk that is opened from its base.
    pub(super) fn opened(setup: Arc<Setup>, map: BlockMap, active: Option<Arc<IoFile>>) -> Self {
        Self {
            setup,
            map,
            active,
            forked: false,
            unsettled: Vec::new(),
            folding: false,
            rescan: false,
            relocation: Relocation::default(),
        }
    }

    /// The chain of a disk that continues from an image.
    pub(super) fn from_image(image: &DiskImage) -> Self {
        let unsettled = image.unsettled.clone();
        let chain = Self::opened(Arc::clone(&image.setup), image.map.clone(), None);
        Self { forked: true, unsettled, ..chain }
    }

    /// The disk at this instant. `targets` are the files that its requests in flight write to.
    pub(super) fn fork<'f>(&mut self, targets: impl Iterator<Item = &'f Arc<IoFile>>) -> DiskImage {
        self.active = None;
        self.forked = true;
        if self.folding {
            self.relocation.forget();
        }
        self.stop_folding();
        // The map may still contain them, even after the device has repeated those writes.
        self.unsettled.retain(|file| file.has_writes());
        let mut unsettled = self.unsettled.clone();
        for target in targets {
            if target.has_writes() && !unsettled.iter().any(|known| Arc::ptr_eq(known, target)) {
                unsettled.push(Arc::clone(target));
            }
        }
        DiskImage { setup: Arc::clone(&self.setup), map: self.map.clone(), unsettled }
    }

    /// Goes back to an image. Requires that no request is in flight.
    pub(super) fn rewind(&mut self, image: &DiskImage) {
        self.setup = Arc::clone(&image.setup);
        self.map = image.map.clone();
        // No map contains the active file any more: its room is freed.
        self.active = None;
        self.forked = true;
        self.stop_folding();
        self.unsettled.clone_from(&image.unsettled);
        self.relocation.forget();
    }

    /// Whether the image's disk has this disk's base.
    pub(super) fn has_base_of(&self, image: &DiskImage) -> bool {
        let base = |setup: &Setup| setup.base.as_ref().map(Arc::as_ptr);
        base(&self.setup) == base(&image.setup)
    }

    /// Size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.setup.size
    }

    /// All clusters; the last one may be a short one.
    pub(super) fn clusters(&self) -> Range<u64> {
        0..self.setup.size.div_ceil(CLUSTER)
    }

    pub(super) fn config(&self) -> &DiskConfig {
        &self.setup.config
    }

    pub(super) fn policy(&self) -> CachePolicy {
        self.setup.base.as_ref().map_or(self.setup.config.cache, |base| base.policy())
    }

    pub(super) fn map(&self) -> &BlockMap {
        &self.map
    }

    pub(super) fn is_forked(&self) -> bool {
        self.forked
    }

    /// The file that the disk was opened from.
    pub(super) fn base(&self) -> Option<&Arc<IoFile>> {
        self.setup.base.as_ref()
    }

    /// Whether `file` is the base.
    pub(super) fn is_base(&self, file: &Arc<IoFile>) -> bool {
        self.base().is_some_and(|base| Arc::ptr_eq(base, file))
    }

    /// Whether all clusters are in the base.
    pub(super) fn is_all_base(&self) -> bool {
        self.base().is_some_and(|base| self.map.is_all(self.clusters(), base))
    }

    /// The file that writes go to, if there is one.
    pub(super) fn active(&self) -> Option<&Arc<IoFile>> {
        self.active.as_ref()
    }

    /// The file that writes go to. Makes an overlay if necessary.
    pub(super) fn active_or_overlay(&mut self) -> Result<Arc<IoFile>, DiskError> {
        if let Some(active) = &self.active {
            return Ok(Arc::clone(active));
        }
        let setup = &self.setup;
        let file = setup.overlays.unnamed(&setup.pool, setup.size, setup.config.cache)?;
        // Without a journal, the file gets no name by which it could be opened for writing. So no
        // process opens it for writing again, not even one that gets it for reading.
        // A block device has none.
        let has_journal = setup.base.as_ref().is_some_and(|base| base.is_writable() && !base.is_block_device());
        if !has_journal {
            file.forbid_writers().map_err(|source| FileError { path: file.path().to_owned(), what: "kept", source })?;
        }
        let active = Arc::clone(self.active.insert(Arc::new(file)));
        self.relocation.overlay_made(&self.map, &active, &self.setup.config.path);
        Ok(active)
    }

    /// Maps `clusters` to `source`.
    pub(super) fn insert(&mut self, clusters: Range<u64>, source: ClusterSource) {
        self.rescan |= !self.base().is_some_and(|base| source.is(base));
        self.map.insert(clusters, source);
    }

    /// Whether writes that were in flight when this disk was made have not ended.
    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled.iter().any(|file| file.has_writes())
    }

    /// How many other disks and images have the setup, and so may have the base in a map.
    pub(super) fn others(&self) -> usize {
        Arc::strong_count(&self.setup) - 1
    }

    /// Whether no other disk and no image has the base in a map.
    pub(super) fn is_alone(&mut self) -> bool {
        // A count alone is not enough: `get_mut` also orders the accesses of former holders before
        // this.
        !self.is_unsettled() && Arc::get_mut(&mut self.setup).is_some()
    }

    /// Makes `file` the base and the active file, with every cluster, as if the disk had never been
    /// forked. Returns false, with nothing changed, unless the chain is alone.
    pub(super) fn replace_base(&mut self, file: Arc<IoFile>) -> bool {
        let Some(setup) = Arc::get_mut(&mut self.setup) else { return false };
        self.map = BlockMap::new(setup.size.div_ceil(CLUSTER), ClusterSource::File(Arc::clone(&file)));
        self.active = Some(Arc::clone(&file));
        setup.base = Some(file);
        self.forked = false;
        self.stop_folding();
        true
    }

    /// Copies the clusters of other files into the base; see [`write_back`].
    pub(super) fn write_back(
        &mut self,
        base: &Arc<IoFile>,
        log: Option<&mut JournalTail>,
    ) -> Result<JournalReport, FileError> {
        write_back(&mut self.map, base, self.setup.size, log)
    }

    /// Whether a forked disk writes to its base again.
    pub(super) fn is_folding(&self) -> bool {
        self.folding
    }

    /// Makes the base the active file, into which overlays are to be moved. The chain must be
    /// alone.
    pub(super) fn begin_fold(&mut self) {
        self.relocation.forget();
        self.active = self.base().cloned();
        self.folding = true;
        self.rescan = true;
    }

    /// Ends a fold when all clusters are in the base, as if the disk had never been forked.
    pub(super) fn end_fold(&mut self) {
        self.stop_folding();
        self.forked = false;
    }

    /// Has a fold go on whose moves were dropped, because one has failed or the disk was halted.
    pub(super) fn resume_fold(&mut self) {
        self.rescan |= self.folding && self.relocation.is_idle();
    }

    fn stop_folding(&mut self) {
        (self.folding, self.rescan) = (false, false);
    }

    /// The moves that are queued and running.
    pub(super) fn relocation(&self) -> &Relocation {
        &self.relocation
    }

    /// Queues the clusters of chosen sources to be moved.
    pub(super) fn queue_moves(&mut self, chosen: impl Fn(&ClusterSource) -> bool) {
        self.relocation.queue_sources(&self.map, chosen);
    }

    /// As [`OverlayChain::queue_moves`], and makes flushes wait for the moves.
    pub(super) fn queue_urgent_moves(&mut self, chosen: impl Fn(&ClusterSource) -> bool) {
        self.queue_moves(chosen);
        self.relocation.set_urgent();
    }

    /// Queues the rest of a range whose move has begun.
    pub(super) fn requeue_moves(&mut self, ranges: impl Iterator<Item = Range<u64>>) {
        self.relocation.queue(ranges);
    }

    /// The clusters to move next. The move counts as running until [`OverlayChain::move_ended`].
    pub(super) fn next_move(&mut self) -> Option<Range<u64>> {
        if self.moves_are_held() { None } else { self.relocation.next() }
    }

    /// During a fold, queues the clusters that are not in the base, when no move is queued or
    /// running.
    pub(super) fn rescan_for_fold(&mut self) {
        if self.folding && self.rescan && self.relocation.is_idle() {
            self.rescan = false;
            let base = self.base().cloned();
            self.queue_moves(|source| !base.as_ref().is_some_and(|base| source.is(base)));
        }
    }

    /// Counts a move as ended.
    pub(super) fn move_ended(&mut self) {
        self.relocation.ended();
    }

    /// Clears the queue of moves.
    pub(super) fn forget_moves(&mut self) {
        self.relocation.forget();
    }

    /// Stops moves from beginning, or lets them begin again.
    pub(super) fn hold_moves(&mut self, held: bool) {
        self.relocation.hold(held);
    }

    fn moves_are_held(&self) -> bool {
        // This disk's device repeats its parent's writes that have not ended, into the active file.
        self.relocation.is_held() || self.active.is_none() || self.is_unsettled()
    }

    /// Whether a flush waits for moves.
    pub(super) fn merges_first(&self) -> bool {
        self.relocation.is_urgent()
            && (self.relocation.running() > 0 || self.relocation.is_queued() && !self.moves_are_held())
    }

    /// Whether a source's clusters may be moved into the active file.
    pub(super) fn is_movable(&self, source: &ClusterSource) -> bool {
        match source {
            ClusterSource::File(file) => movable(file, self.active.as_ref()),
            ClusterSource::Zero => false,
        }
    }

    #[cfg(test)]
    pub(crate) fn relocation_mut(&mut self) -> &mut Relocation {
        &mut self.relocation
    }
}
