//! Suspension: all pages that a VM owns are written to a file on disk, and are read back on access.
//!
//! A suspension is an eviction of all regions at once. The file becomes a layer, mapped in place of
//! the VM's own pages.
//!
//! ```text
//!   own page, written           into the file; the file is mapped
//!   own page, zeros             not written, unless they are few: a hole of the file, or mapped
//!   layer's page between two    copied too, where there would be too many mappings otherwise
//!   page of an earlier file     copied too, where that file is no larger than what is written
//!   no-fork page                stays (R19)
//! ```
//!
//! The order makes a failure harmless (I13):
//!
//! 1. Clear the bits in all regions. A pinned page refuses the suspension (I7).
//! 2. Write all pages and sync: an error in the kernel's writeback would be reported too late.
//! 3. Reserve mappings for all regions (D5).
//! 4. Only then map the file. Contents do not change, so this can stop after any run: pages not yet
//!    remapped are still the VM's own.
//!
//! Finally the page tables are emptied, so the pages mapped at the next suspension were touched
//! since the wake: they are the working set. Its written pages are copied at the next wake, and the
//! rest is read ahead ([`crate::ahead`]). Copies that were never written are dropped first, so that
//! they are neither written to a file nor copied again. Each wake leaves an eighth of the rest
//! unmapped, so pages that are no longer touched leave the working set within eight wakes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, Mode, OFlags, fadvise, fallocate, fcntl_getfl, fstat, ftruncate, open};

use crate::ahead::PageSet;
use crate::error::RamError;
use crate::handle::LayerHandle;
use crate::layer::{Layer, LayerId, LayerOffset, LayerStorage};
use crate::region::mappings::Mapping;
use crate::region::{GuestRegion, State, ahead, dont_fork};
use crate::sys::allocated;
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SHIFT, PageRange, join_runs, pages_in, subtract_runs};

/// Minimum length of a run of zeros that is mapped rather than left as a hole in the file: shorter
/// runs are not worth a mapping.
const MIN_ZERO_RUN: u64 = 64;
/// Runs are joined over gaps up to this length even when there are few.
const SMALL_GAP: u64 = 4;
/// Maximum number of pages of a working set that are read ahead.
const MAX_WORKING_SET: u64 = 16_384;
/// Maximum number of them that are copied ahead: 8 MiB, some 2 ms.
const MAX_COPIED: u64 = 2_048;
/// Of the blocks in a working set, a wake leaves one in this many unmapped.
const TESTED_SHARE: u64 = 8;
/// Pages of such a block: the kernel's fault-around maps up to that many at once.
const TESTED_BLOCK: u64 = 16;
/// Maximum number of earlier files that stay in use. With more, the smallest are copied too.
const MAX_FILES: usize = 8;

/// An unnamed file for a suspended VM's pages: one descriptor to write it, and one to read it,
/// which is passed to other processes.
#[derive(Debug)]
pub struct SuspendFile {
    write: File,
    read: File,
}

impl SuspendFile {
    /// Creates a file in the directory `dir`, freed with its last user.
    ///
    /// # Errors
    /// When no file can be created there.
    pub fn create(dir: &Path) -> io::Result<Self> {
        failpoint(Call::File)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        // A receiver of the second descriptor cannot reopen it for writing.
        let write = open(dir, flags, Mode::RUSR)?;
        failpoint(Call::File)?;
        let read = File::open(format!("/proc/self/fd/{}", write.as_raw_fd()))?;
        Ok(Self { write: write.into(), read })
    }

    /// Builds the file from two descriptors that another process has opened.
    ///
    /// # Errors
    /// When the descriptors are not of one file, the file is not empty, the first is not writable,
    /// or the second is.
    pub fn of(write: OwnedFd, read: OwnedFd) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
        let (written, is_read) = (fstat(&write)?, fstat(&read)?);
        if (written.st_dev, written.st_ino) != (is_read.st_dev, is_read.st_ino) {
            return Err(wrong("the descriptors to write and to read are of two files"));
        }
        if written.st_size != 0 {
            return Err(wrong("the file is not empty"));
        }
        let mode = |file: &OwnedFd| fcntl_getfl(file).map(|flags| flags & OFlags::ACCMODE);
        if mode(&write)? != OFlags::RDWR || mode(&read)? != OFlags::RDONLY {
            return Err(wrong("one descriptor must be open for reading and writing, the other for reading only"));
        }
        Ok(Self { write: write.into(), read: read.into() })
    }

    /// The descriptors, for [`SuspendFile::of`] in another process.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.write.as_fd(), self.read.as_fd()]
    }
}

/// Result of a suspension. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Suspended {
    /// Written to the file.
    pub written: u64,
    /// The VM's own zero pages, which are not written.
    pub zeros: u64,
    /// No-fork pages, which stayed in memory.
    pub kept: u64,
}

/// The pages that a VM touched between its last wake and its suspension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TouchedPages {
    touched: PageSet,
    /// The touched pages that were written.
    written: PageSet,
}

impl TouchedPages {
    /// Number of touched pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.touched.pages()
    }

    /// Number of touched pages that were written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.pages()
    }
}

/// The pages of a region at its suspension.
#[derive(Debug)]
struct OwnedPages {
    /// The VM's own pages that are written out.
    own: Vec<PageRange>,
    /// Those of them that are private copies.
    private: Vec<PageRange>,
    /// Those of them that are mapped shared over the base file.
    base: Vec<PageRange>,
    /// Pages that stay in memory.
    kept: Vec<PageRange>,
}

/// The plan for one region.
#[derive(Debug, Default)]
struct SuspendPlan {
    /// Pages that stay in memory.
    kept: Vec<PageRange>,
    /// The own pages that are zeros.
    zeros: Vec<PageRange>,
    /// Pages that will show the file.
    shown: Vec<PageRange>,
    /// Pages that will show zeros.
    cleared: Vec<PageRange>,
}

/// A suspension of all regions.
pub(crate) struct RamSuspension {
    file: Option<SuspendFile>,
    /// Earlier files whose pages are copied too.
    merge: BTreeSet<LayerId>,
    /// Pages of the file that are allocated so far.
    placed: u64,
    layer: Option<Arc<Layer>>,
    /// Held until all regions show the file, to keep the sweep from punching pages that a region
    /// does not show yet.
    whole: Option<LayerHandle>,
    pub(crate) report: Suspended,
    pub(crate) working_set: TouchedPages,
}

impl RamSuspension {
    /// A suspension of `regions`.
    pub(crate) fn to(file: SuspendFile, regions: &[Arc<GuestRegion>]) -> Result<Self, RamError> {
        let (merge, (report, working_set)) = (files_to_merge(regions)?, Default::default());
        Ok(Self { file: Some(file), merge, placed: 0, layer: None, whole: None, report, working_set })
    }

    /// Publishes the file as a layer, once it is written completely.
    fn publish(&mut self, store: &crate::Store) -> io::Result<()> {
        let Some(SuspendFile { write, read }) = self.file.take() else { return Ok(()) };
        if self.placed > 0 {
            synced(&write)?;
            let layer = Arc::new(store.adopt_file(write, self.placed, LayerStorage::Disk).read_by(read));
            self.whole = Some(LayerHandle::new(&layer));
            self.layer = Some(layer);
        }
        Ok(())
    }
}

/// Waits until a file is on the disk. Only then may memory with the same contents be dropped.
pub(super) fn synced(file: &File) -> io::Result<()> {
    failpoint(Call::Sync)?;
    file.sync_data()
}

fn unwritten(pages: u64) -> impl Fn(io::Error) -> RamError {
    move |source| RamError::Suspend { pages, source }
}

impl GuestRegion {
    /// Suspends `regions`, all or none: see the module's documentation. There are no writers.
    pub(crate) fn suspend_all(
        regions: &[Arc<Self>],
        store: &crate::Store,
        to: &mut RamSuspension,
    ) -> Result<(), RamError> {
        let Some((region, rest)) = regions.split_first() else {
            let pages = to.placed;
            return to.publish(store).map_err(unwritten(pages));
        };
        let mut state = region.checked(region.range())?;
        // Finishes background copies first, because they read pages that the suspension drops.
        region.finish_background(&mut state)?;
        // I7: no uncounted read begins until the lock is released.
        let read = region.srcu.ranges();
        if let Some(first) = read.first().copied() {
            return Err(RamError::Pinned { pages: pages_in(&read), first });
        }
        let table = region.table.lock();
        let owned = region.pages_to_suspend(&state)?;
        let unseen = region.unseen_copies(&state, &owned.private);
        let (touched, written) =
            if state.woken { (region.touched_now()?, owned.private.clone()) } else { Default::default() };
        // I7, I8: the bit is cleared before the page is looked at for zeros, and dropped. A device that has
        // pinned it by the bit until now has written it; a later pin waits for the lock.
        let pinned: Vec<PageRange> = owned.own.iter().flat_map(|run| table.share(*run)).collect();
        let refused = pinned.first().map(|first| RamError::Pinned { pages: pages_in(&pinned), first: *first });
        let (place, base) = (to.placed, owned.base.clone());
        let planned = refused.map_or_else(|| region.plan_suspension(&state, &to.merge, owned), Err);
        let done = planned.and_then(|plan| {
            region.write_plan(&plan, to)?;
            state.space.reserve_runs(plan.shown.len() + plan.cleared.len())?;
            Self::suspend_all(rest, store, to)?;
            region.show_file(&mut state, &plan, place, to.layer.as_ref())?;
            Ok(plan)
        });
        if done.is_err() {
            // I13: pages still mapped shared over the base file, or private, are still this VM's
            // own.
            region.reclaim(&state, &table, region.range());
        }
        state.space.trim();
        state.space.free_replaced_base(&base);
        let plan = done?;
        region.empty_tables(&plan.kept);
        region.counters.count_guest(unseen);
        state.counted.clear();
        state.ahead.clear();
        state.moved = true;
        state.woken = true;
        to.report.zeros += pages_in(&plan.zeros);
        to.report.kept += pages_in(&plan.kept);
        to.working_set.touched.insert_first(touched);
        to.working_set.written.insert_first(written);
        region.store.sweep_later();
        Ok(())
    }

    fn pages_to_suspend(&self, state: &State) -> Result<OwnedPages, RamError> {
        let mappings = state.space.mappings();
        // R19: no-fork pages stay in place. In a layer's file a child would be one mapping away
        // from their bytes.
        let kept = dont_fork::runs(&state.dont_fork);
        let mapped_shared = mappings.base_runs();
        let private = subtract_runs(&self.owned_private(self.range(), &mapped_shared)?, &kept);
        let base = subtract_runs(&mapped_shared, &kept);
        Ok(OwnedPages { own: merged(&[&private, &base]), private, base, kept })
    }

    /// Plans for the `owned` pages, whose bits are cleared: nothing writes them.
    fn plan_suspension(
        &self,
        state: &State,
        merge: &BTreeSet<LayerId>,
        owned: OwnedPages,
    ) -> Result<SuspendPlan, RamError> {
        let OwnedPages { own, private, base, kept } = owned;
        let absent = subtract_runs(&[self.range()], &self.not_absent(&[self.range()]));
        // The file is examined instead of the mapping, because reading through it would allocate
        // pages.
        let (mut filled, mut holes) = (Vec::new(), Vec::new());
        if let Some(file) = state.space.base_file() {
            for run in &base {
                let there = allocated(file.as_fd(), *run).map_err(RamError::Harvest)?;
                holes.extend(subtract_runs(&[*run], &there));
                filled.extend(there);
            }
        }
        // SAFETY: private copies, and pages of the base file with content, are mapped and readable.
        let mut zeros = unsafe { self.at.zero_runs(&merged(&[&private, &filled])) };
        zeros = merged(&[&zeros, &holes]);
        // Short zero runs are written along with their neighbours: fewer writes.
        zeros.retain(|run| run.len() > SMALL_GAP);
        let barred = merged(&[&kept, &absent]);
        let earlier = shown_by(merge, state, &own);
        let long: Vec<PageRange> = zeros.iter().copied().filter(|run| run.len() >= MIN_ZERO_RUN).collect();
        let wanted = merged(&[&subtract_runs(&own, &long), &subtract_runs(&earlier, &barred)]);
        let most = self.store.budget().fair_share() as usize;
        let mut gap = SMALL_GAP;
        let mut shown = subtract_runs(&join_runs(&wanted, gap), &barred);
        while shown.len() > most && gap < self.pages() {
            gap *= 2;
            shown = subtract_runs(&join_runs(&wanted, gap), &barred);
        }
        let cleared = subtract_runs(&long, &shown);
        debug_assert!(subtract_runs(&own, &merged(&[&shown, &cleared])).is_empty(), "a page of the VM's own is left");
        Ok(SuspendPlan { kept, zeros, shown, cleared })
    }

    /// Appends the shown pages of the plan to the file. Zeros stay holes.
    fn write_plan(&self, plan: &SuspendPlan, to: &mut RamSuspension) -> Result<(), RamError> {
        let Some(file) = &to.file else { return Ok(()) };
        let pages = pages_in(&plan.shown);
        let failed = unwritten(pages);
        // One system call for runs that are adjacent in the file.
        let mut batch: Vec<PageRange> = Vec::new();
        let (mut at, mut batch_at, mut written) = (to.placed, to.placed, 0);
        let end = at + pages;
        failpoint(Call::Size).map_err(&failed)?;
        ftruncate(&file.write, end << PAGE_SHIFT).map_err(|errno| failed(errno.into()))?;
        let mut flush = |batch: &mut Vec<PageRange>, from: u64| -> io::Result<()> {
            let pages = pages_in(batch);
            if pages > 0 {
                reserve_room(&file.write, from, pages)?;
                self.at.write_out(batch, file.write.as_fd(), from)?;
                written += pages;
                batch.clear();
            }
            Ok(())
        };
        for run in &plan.shown {
            let mut next = run.start;
            for piece in subtract_runs(&[*run], &plan.zeros) {
                if piece.start > next {
                    flush(&mut batch, batch_at).map_err(&failed)?;
                }
                at += piece.start - next;
                if batch.is_empty() {
                    batch_at = at;
                }
                batch.push(piece);
                at += piece.len();
                next = piece.end;
            }
            if next < run.end {
                flush(&mut batch, batch_at).map_err(&failed)?;
                at += run.end - next;
            }
        }
        flush(&mut batch, batch_at).map_err(&failed)?;
        debug_assert!(at == end, "every page has its place");
        to.placed = end;
        to.report.written += written;
        Ok(())
    }

    /// Maps the file, from its page `place` on, in place of the planned pages.
    fn show_file(
        &self,
        state: &mut State,
        plan: &SuspendPlan,
        place: u64,
        layer: Option<&Arc<Layer>>,
    ) -> Result<(), RamError> {
        let mut at = place;
        for run in &plan.shown {
            // There is a layer if a page was placed.
            let Some(layer) = layer else { break };
            state.space.show(*run, &Mapping::Private(LayerOffset { layer: Arc::clone(layer), at }))?;
            at += run.len();
        }
        plan.cleared.iter().try_for_each(|run| state.space.show(*run, &Mapping::Zero))
    }

    /// Empties the page tables except for `kept`. The VM owns no page outside `kept`.
    fn empty_tables(&self, kept: &[PageRange]) {
        for run in subtract_runs(&[self.range()], kept) {
            if let Err(error) = self.at.drop_private(run) {
                tracing::debug!(%error, %run, "page tables stay");
            }
        }
    }

    fn touched_now(&self) -> Result<Vec<PageRange>, RamError> {
        self.store.pagemap().touched_runs(&self.at, self.range()).map_err(RamError::Harvest)
    }

    /// Starts reading the file pages behind `runs`, without waiting.
    fn begin_reading(&self, runs: &[PageRange]) {
        let state = self.state_for_pin();
        let some = self.not_absent(runs);
        for (piece, source) in some.iter().flat_map(|run| state.space.map().within(*run)) {
            if source.layer.storage() == LayerStorage::Disk {
                let len = NonZero::new(piece.len() << PAGE_SHIFT);
                let _ = fadvise(source.layer.as_fd(), source.at << PAGE_SHIFT, len, Advice::WillNeed);
            }
        }
    }

    /// Maps `runs` for reading, except for the blocks that this wake tests. Best effort: a failure
    /// here recurs with a proper error when the guest touches the page.
    fn map_ahead(&self, runs: &[PageRange]) {
        let mut state = self.state_for_pin();
        state.wakes = state.wakes.wrapping_add(1);
        let runs = subtract_runs(runs, &tested_blocks(runs, state.wakes));
        for run in self.not_absent(&runs).iter().filter(|run| !run.is_empty()) {
            if let Err(error) = self.at.populate_read(*run) {
                tracing::debug!(%error, %run, "not read ahead");
            }
        }
    }
}

impl TouchedPages {
    /// Copies the written pages ahead into `regions`, and reads the rest ahead.
    pub(crate) fn read_ahead(&self, regions: &[Arc<GuestRegion>]) {
        let ahead = self.touched.first(MAX_WORKING_SET);
        // All reads are started before the first is waited for.
        for (region, runs) in regions.iter().zip(ahead.runs()) {
            region.begin_reading(runs);
        }
        ahead::copy_all_ahead(regions, &self.written, MAX_COPIED);
        // A page mapped for reading costs two faults at its first write: its copy invalidates KVM's
        // entry, and KVM must look up the page again.
        for (region, runs) in regions.iter().zip(ahead.without(&self.written).runs()) {
            region.map_ahead(runs);
        }
    }
}

/// The blocks of `runs` that wake number `wake` tests: one in [`TESTED_SHARE`], others at the next
/// wake.
///
/// A page that is mapped ahead is present at the next suspension, whether or not the guest has
/// touched it. So a page leaves the working set only if it is not mapped and the guest does not touch
/// it. The guest pays for a test with a page fault that needs no disk.
fn tested_blocks(runs: &[PageRange], wake: u64) -> Vec<PageRange> {
    let blocks = runs.iter().filter(|run| !run.is_empty());
    let blocks = blocks.flat_map(|run| run.start / TESTED_BLOCK..=(run.end - 1) / TESTED_BLOCK);
    let mut tested: Vec<PageRange> = blocks
        .filter(|block| block % TESTED_SHARE == wake % TESTED_SHARE)
        .map(|block| PageRange::with_len(block * TESTED_BLOCK, TESTED_BLOCK))
        .collect();
    // Two runs may be in one block.
    tested.dedup();
    tested
}

/// All of `lists`, ascending.
fn merged(lists: &[&[PageRange]]) -> Vec<PageRange> {
    let mut all = lists.concat();
    all.sort_unstable();
    join_runs(&all, 0)
}

/// Selects the earlier files to copy too, which keeps their number small and copies each page only
/// a few times. Only a heuristic: any selection is correct, whatever changes meanwhile.
fn files_to_merge(regions: &[Arc<GuestRegion>]) -> Result<BTreeSet<LayerId>, RamError> {
    let (mut files, mut written) = (BTreeMap::<LayerId, u64>::new(), 0);
    for region in regions {
        let state = region.live_state()?;
        let own = region.own(&state)?;
        written += pages_in(&own);
        for (range, source) in
            state.space.map().iter().filter(|(_, source)| source.layer.storage() == LayerStorage::Disk)
        {
            *files.entry(source.layer.id()).or_default() += pages_in(&subtract_runs(&[range], &own));
        }
    }
    let mut left = files.len();
    let mut files: Vec<(u64, LayerId)> = files.into_iter().map(|(id, pages)| (pages, id)).collect();
    files.sort_unstable();
    let mut merged = BTreeSet::new();
    for (pages, id) in files {
        // If the VM has written nothing, nothing is copied.
        if written == 0 || (pages > written && left < MAX_FILES) {
            break;
        }
        written += pages;
        left -= 1;
        merged.insert(id);
    }
    Ok(merged)
}

/// The pages shown by the files in `merge`, except the VM's `own` pages.
fn shown_by(merge: &BTreeSet<LayerId>, state: &State, own: &[PageRange]) -> Vec<PageRange> {
    let pieces = state.space.map().iter().filter(|(_, source)| merge.contains(&source.layer.id()));
    subtract_runs(&pieces.map(|(range, _)| range).collect::<Vec<_>>(), own)
}

/// Reserves disk space, so that a full disk fails before the first write.
fn reserve_room(file: &File, at: u64, pages: u64) -> io::Result<()> {
    failpoint(Call::Size)?;
    match fallocate(file, FallocateFlags::KEEP_SIZE, at << PAGE_SHIFT, pages << PAGE_SHIFT) {
        // The sync reports a full disk in this case.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests;
