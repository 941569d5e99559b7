//! Suspension: everything that a VM owns goes to one file on a disk, and comes back as it is
//! touched.
//!
//! It is an eviction of all regions at once. The file becomes a layer, which is mapped in place of
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
//! 1. Bits are given up in all regions. A pinned page refuses the suspension (I7).
//! 2. Everything is written, and synced: an error of a write that is left to the kernel would be
//!    known too late.
//! 3. Mappings are promised for all regions (D5).
//! 4. Only then is the file mapped. Contents do not change, so this can stop after any run: what was
//!    not remapped is still the VM's own.
//!
//! The page tables are emptied in the end. So what is mapped at the next suspension was touched
//! since the wake: that is the working set. What was written of it is copied at the next wake, and
//! the rest is read ahead ([`crate::ahead`]). Copies that were not written are given back first, so
//! that they are neither written to a file nor copied again.

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
use crate::layer::handle::LayerHandle;
use crate::layer::{Home, Layer, LayerId, Source};
use crate::region::mappings::Mapping;
use crate::region::stats::allocated;
use crate::region::{GuestRegion, State, ahead, nofork};
use crate::testing::failpoint::{Call, failpoint};
use crate::units::{PAGE_SHIFT, PageRange, join_runs, pages_in, subtract_runs};

/// Zeros that are mapped, rather than left out of the file: shorter runs are not worth a mapping.
const MIN_ZERO_RUN: u64 = 64;
/// Runs are joined over gaps up to this long even when there are few.
const SMALL_GAP: u64 = 4;
/// Pages of a working set that are read ahead at most.
const MAX_WORKING_SET: u64 = 16_384;
/// Pages of it that are copied ahead at most: 8 MiB, some 2 ms.
const MAX_COPIED: u64 = 2_048;
/// Earlier files whose pages are shown. With more, the smallest are copied too.
const MAX_FILES: usize = 8;

/// An unnamed file for what a VM owns: one descriptor to write it, and one to read it, which other
/// processes are given.
#[derive(Debug)]
pub struct SuspendFile {
    write: File,
    read: File,
}

impl SuspendFile {
    /// A file in the directory `dir`, gone with its last user.
    ///
    /// # Errors
    /// When none can be made there.
    pub fn create(dir: &Path) -> io::Result<Self> {
        failpoint(Call::File)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        // Whoever is handed the second descriptor cannot open it again to write.
        let write = open(dir, flags, Mode::RUSR)?;
        failpoint(Call::File)?;
        let read = File::open(format!("/proc/self/fd/{}", write.as_raw_fd()))?;
        Ok(Self { write: write.into(), read })
    }

    /// The file of two descriptors that another process has made.
    ///
    /// # Errors
    /// When they are not of one file, it is not empty, the first cannot be written, or the second
    /// can.
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

/// What a suspension did. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Suspended {
    /// Written to the file.
    pub written: u64,
    /// Of the VM's own, zeros: written nowhere.
    pub zeros: u64,
    /// Not inherited by children, so they stayed in memory.
    pub kept: u64,
}

/// What a VM touched between its last wake and its suspension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    touched: PageSet,
    /// Of these, what was written.
    written: PageSet,
}

impl WorkingSet {
    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.touched.pages()
    }

    /// Those of them that were written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.pages()
    }
}

/// What goes where, of one region.
#[derive(Debug, Default)]
struct Plan {
    /// The VM's own pages that go.
    own: Vec<PageRange>,
    /// Of those, mapped shared over the base file.
    base: Vec<PageRange>,
    /// What stays as it is.
    kept: Vec<PageRange>,
    /// What is zeros, and the VM's own.
    zeros: Vec<PageRange>,
    /// What will show the file.
    shown: Vec<PageRange>,
    /// What will show zeros.
    cleared: Vec<PageRange>,
}

/// A suspension of all regions.
pub(crate) struct Suspension {
    file: Option<SuspendFile>,
    /// Earlier files whose pages are copied too.
    merge: BTreeSet<LayerId>,
    /// Pages of the file that have their place.
    placed: u64,
    layer: Option<Arc<Layer>>,
    /// Until all regions show the file: what one of them does not show yet is not given back.
    whole: Option<LayerHandle>,
    pub(crate) report: Suspended,
    pub(crate) working_set: WorkingSet,
}

impl Suspension {
    /// Of `regions`.
    pub(crate) fn to(file: SuspendFile, regions: &[Arc<GuestRegion>]) -> Result<Self, RamError> {
        let (merge, (report, working_set)) = (files_to_merge(regions)?, Default::default());
        Ok(Self { file: Some(file), merge, placed: 0, layer: None, whole: None, report, working_set })
    }

    /// The file as a layer, once all is written.
    fn publish(&mut self, store: &crate::Store) -> io::Result<()> {
        let Some(SuspendFile { write, read }) = self.file.take() else { return Ok(()) };
        if self.placed > 0 {
            failpoint(Call::Copy)?;
            write.sync_data()?;
            let layer = Arc::new(store.adopt_file(write, self.placed, Home::Disk).read_by(read));
            self.whole = Some(LayerHandle::new(&layer));
            self.layer = Some(layer);
        }
        Ok(())
    }
}

fn unwritten(pages: u64) -> impl Fn(io::Error) -> RamError {
    move |source| RamError::Suspend { pages, source }
}

impl GuestRegion {
    /// Suspends `regions`, all or none: see the module's documentation. Nothing may be writing to
    /// them.
    pub(crate) fn suspend_all(
        regions: &[Arc<Self>],
        store: &crate::Store,
        to: &mut Suspension,
    ) -> Result<(), RamError> {
        let Some((region, rest)) = regions.split_first() else {
            let pages = to.placed;
            return to.publish(store).map_err(unwritten(pages));
        };
        let mut state = region.checked(region.range())?;
        // What is still being copied from here is finished first: the copy reads the pages that go.
        region.finish_background(&mut state)?;
        // I7: nothing more is read without a count until the lock is let go.
        let read = region.grace.ranges();
        if let Some(first) = read.first().copied() {
            return Err(RamError::Pinned { pages: pages_in(&read), first });
        }
        let table = region.table.lock();
        let plan = region.plan_suspension(&state, &to.merge)?;
        let private = subtract_runs(&plan.own, &plan.base);
        let unseen = region.unseen_copies(&state, &private);
        let (touched, written) = if state.woken { (region.touched_now()?, private) } else { Default::default() };
        // I7, I8: the bit goes before the page does; a pin that comes later waits for the lock.
        let pinned: Vec<PageRange> = plan.own.iter().flat_map(|run| table.share(*run)).collect();
        let refused = pinned.first().map(|first| RamError::Pinned { pages: pages_in(&pinned), first: *first });
        let place = to.placed;
        let done = refused.map_or(Ok(()), Err);
        let done = done.and_then(|()| region.write_plan(&plan, to));
        let done = done.and_then(|()| Ok(state.space.reserve_runs(plan.shown.len() + plan.cleared.len())?));
        let done = done.and_then(|()| Self::suspend_all(rest, store, to));
        let done = done.and_then(|()| region.show_file(&mut state, &plan, place, to.layer.as_ref()));
        if done.is_err() {
            // I13: whatever is still base or private is still this VM's own.
            region.reclaim(&state, &table, region.range());
        }
        state.space.trim();
        done?;
        state.space.free_base(&plan.base);
        state.space.retire_base_if_shared();
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

    fn plan_suspension(&self, state: &State, merge: &BTreeSet<LayerId>) -> Result<Plan, RamError> {
        let mappings = state.space.mappings();
        // R19: what children do not inherit stays where it is. In a layer's file its bytes would be
        // a mapping away from them.
        let kept = nofork::runs(&state.no_fork);
        let mapped_shared = mappings.base_runs();
        let private = subtract_runs(&self.owned_private(self.range(), &mapped_shared)?, &kept);
        let base = subtract_runs(&mapped_shared, &kept);
        let absent = subtract_runs(&[self.range()], &self.not_absent(&[self.range()]));
        // Not read through the mapping, which would allocate it.
        let (mut filled, mut holes) = (Vec::new(), Vec::new());
        if let Some(file) = state.space.base_file() {
            for run in &base {
                let there = allocated(file.as_fd(), *run).map_err(RamError::Harvest)?;
                holes.extend(subtract_runs(&[*run], &there));
                filled.extend(there);
            }
        }
        let mut zeros = self.at.zero_runs(&merged(&[&private, &filled]));
        zeros = merged(&[&zeros, &holes]);
        // Written with what lies around them: fewer writes.
        zeros.retain(|run| run.len() > SMALL_GAP);
        let own = merged(&[&private, &base]);
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
        Ok(Plan { own, base, kept, zeros, shown, cleared })
    }

    /// Writes what the plan shows, behind what is there. What is zeros stays a hole.
    fn write_plan(&self, plan: &Plan, to: &mut Suspension) -> Result<(), RamError> {
        let Some(file) = &to.file else { return Ok(()) };
        let pages = pages_in(&plan.shown);
        let failed = unwritten(pages);
        // One system call for what follows each other in the file.
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

    /// Maps the file, from page `place` of it on, in place of the pages it has.
    fn show_file(
        &self,
        state: &mut State,
        plan: &Plan,
        place: u64,
        layer: Option<&Arc<Layer>>,
    ) -> Result<(), RamError> {
        let mut at = place;
        for run in &plan.shown {
            // There is a layer if a page was placed.
            let Some(layer) = layer else { break };
            state.space.show(*run, &Mapping::Private(Source { layer: Arc::clone(layer), at }))?;
            at += run.len();
        }
        plan.cleared.iter().try_for_each(|run| state.space.show(*run, &Mapping::Zero))
    }

    /// Has the kernel forget which pages are mapped, but for `kept`: none of the others is the VM's
    /// own.
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

    /// Has what files provide of `runs` read, without waiting for it.
    fn begin_reading(&self, runs: &[PageRange]) {
        let state = self.state_for_pin();
        let some = self.not_absent(runs);
        for (piece, source) in some.iter().flat_map(|run| state.space.map().within(*run)) {
            if source.layer.home() == Home::Disk {
                let len = NonZero::new(piece.len() << PAGE_SHIFT);
                let _ = fadvise(source.layer.as_fd(), source.at << PAGE_SHIFT, len, Advice::WillNeed);
            }
        }
    }

    /// Maps `runs` for reading. Best effort: what fails here fails again, by name, when the guest
    /// touches it.
    fn map_ahead(&self, runs: &[PageRange]) {
        let _state = self.state_for_pin();
        for run in self.not_absent(runs).iter().filter(|run| !run.is_empty()) {
            if let Err(error) = self.at.populate_read(*run) {
                tracing::debug!(%error, %run, "not read ahead");
            }
        }
    }
}

impl WorkingSet {
    /// Copies what was written ahead into `regions`, and reads the rest ahead.
    pub(crate) fn read_ahead(&self, regions: &[Arc<GuestRegion>]) {
        let ahead = self.touched.first(MAX_WORKING_SET);
        // All of it is on its way before the first of it is waited for.
        for (region, runs) in regions.iter().zip(ahead.runs()) {
            region.begin_reading(runs);
        }
        ahead::copy_all_ahead(regions, &self.written, MAX_COPIED);
        // A page that is mapped for reading costs two faults at its first write: its copy takes
        // away what KVM has looked up, which then looks again.
        for (region, runs) in regions.iter().zip(ahead.without(&self.written).runs()) {
            region.map_ahead(runs);
        }
    }
}

/// All of `lists`, ascending.
fn merged(lists: &[&[PageRange]]) -> Vec<PageRange> {
    let mut all = lists.concat();
    all.sort_unstable();
    join_runs(&all, 0)
}

/// The earlier files whose pages are copied too: so there are few files, and each page is copied a
/// few times at most. A choice only: it is right whatever changes meanwhile.
fn files_to_merge(regions: &[Arc<GuestRegion>]) -> Result<BTreeSet<LayerId>, RamError> {
    let (mut files, mut written) = (BTreeMap::<LayerId, u64>::new(), 0);
    for region in regions {
        let state = region.live_state()?;
        let own = region.own(&state)?;
        written += pages_in(&own);
        for (range, source) in state.space.map().iter().filter(|(_, source)| source.layer.home() == Home::Disk) {
            *files.entry(source.layer.id()).or_default() += pages_in(&subtract_runs(&[range], &own));
        }
    }
    let mut left = files.len();
    let mut files: Vec<(u64, LayerId)> = files.into_iter().map(|(id, pages)| (pages, id)).collect();
    files.sort_unstable();
    let mut merged = BTreeSet::new();
    for (pages, id) in files {
        // Of a VM that has written nothing, nothing is written.
        if written == 0 || (pages > written && left < MAX_FILES) {
            break;
        }
        written += pages;
        left -= 1;
        merged.insert(id);
    }
    Ok(merged)
}

/// What the files in `merge` show, besides the VM's `own` pages.
fn shown_by(merge: &BTreeSet<LayerId>, state: &State, own: &[PageRange]) -> Vec<PageRange> {
    let pieces = state.space.map().iter().filter(|(_, source)| merge.contains(&source.layer.id()));
    subtract_runs(&pieces.map(|(range, _)| range).collect::<Vec<_>>(), own)
}

/// Room on the disk: a disk that is full says so before anything is written.
fn reserve_room(file: &File, at: u64, pages: u64) -> io::Result<()> {
    failpoint(Call::Size)?;
    match fallocate(file, FallocateFlags::KEEP_SIZE, at << PAGE_SHIFT, pages << PAGE_SHIFT) {
        // The sync tells.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests;
