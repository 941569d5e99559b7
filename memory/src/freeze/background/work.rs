//! The work for one delta that is filled in the background, and its steps. Under the background
//! copy's lock.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::budget::Promise;
use crate::freeze::background::bg_copy::Delta;
use crate::freeze::background::{BackgroundError, CopyService};
use crate::freeze::protect::ProtectGate;
use crate::layer::LayerOffset;
use crate::layer::registry::View;
use crate::lost::{FillError, LostMemory};
use crate::reclaim::TaskSender;
use crate::sys::{RegisterMode, Reservation};
use crate::testing::failpoint::{Call, failpoint};
use crate::testing::sabotage::{Break, broken};
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange};

/// Pages copied before the thread checks for faults again: the longest wait of a fault, apart from
/// its own copy.
const SLICE: u64 = if cfg!(shuttle) { 3 } else { 64 };
/// Pages copied around a fault, aligned, so that a sequential writer does not fault on every page.
pub(super) const WINDOW: u64 = if cfg!(shuttle) { 2 } else { 32 };
/// Mappings made, or runs released, before the thread looks for faults again.
const RUNS: usize = if cfg!(shuttle) { 1 } else { 32 };
/// Shorter runs are released instead of mapped over the delta: a mapping costs more than copying
/// them again.
const MIN_REMAPPED: u64 = if cfg!(shuttle) { 2 } else { 8 };
/// Attempts to collapse a block before it stays in small pages: one of its pages may be in use for
/// a moment.
const COLLAPSE_TRIES: u32 = if cfg!(shuttle) { 1 } else { 5 };
const COLLAPSE_INTERVAL: Duration = Duration::from_millis(1);

/// The delta has the page.
pub(super) const FILLED: u8 = 1;
/// The frozen VM cannot write the page.
pub(super) const PROTECTED: u8 = 2;

/// Where the bytes of a part are until they are copied.
#[derive(Clone, Debug)]
pub(crate) enum CopySource {
    /// In the frozen VM's memory, protected or pinned.
    Parent,
    /// A closed gap: the VM does not own these pages and may write them meanwhile, but the layer
    /// below never changes (I4).
    Layer(LayerOffset),
    /// A closed gap without a layer below.
    Zero,
}

/// Pages of the frozen region that are contiguous in the delta's file from `at` on.
#[derive(Clone, Debug)]
pub(crate) struct DeltaPart {
    pub(crate) range: PageRange,
    pub(crate) at: u64,
    pub(crate) origin: CopySource,
}

impl DeltaPart {
    pub(super) fn file(&self) -> PageRange {
        PageRange::with_len(self.at, self.range.len())
    }
    pub(super) fn to_file(&self, range: PageRange) -> PageRange {
        PageRange::with_len(self.at + (range.start - self.range.start), range.len())
    }
    fn to_region(&self, file: PageRange) -> PageRange {
        PageRange::with_len(self.range.start + (file.start - self.at), file.len())
    }
}

/// A child's mapping of the unfinished file.
#[derive(Debug)]
pub(super) struct ReaderMapping {
    pub(super) at: Arc<Reservation>,
    pub(super) range: PageRange,
    pub(super) file: PageRange,
    pub(super) failure: Arc<LostMemory>,
}

impl ReaderMapping {
    pub(super) fn address(&self) -> u64 {
        self.at.addr(self.range.start) as u64
    }

    /// The file pages shown by `range` of the child's region.
    pub(super) fn file_of(&self, range: PageRange) -> Option<PageRange> {
        let cut = self.range.intersect(range);
        let file = || PageRange::with_len(self.file.start + (cut.start - self.range.start), cut.len());
        (!cut.is_empty()).then(file)
    }
}

#[derive(Debug)]
enum CopyStage {
    /// Copying, from this page of the file on.
    Copy(u64),
    /// Remapping: runs of the region and their places in the file; the last one is next.
    Remap(Vec<(PageRange, u64)>),
    /// Releasing, from this part on.
    Release(usize),
}

#[derive(Debug)]
pub(super) struct CopyWork {
    pub(super) gate: ProtectGate,
    /// Start time.
    pub(super) since: Instant,
    /// The delta's file, and a mapping of all of it, into which the kernel puts pages.
    file: File,
    into: Reservation,
    _mapping: Promise,
    /// Keeps the source pages of the gaps.
    _beneath: View,
    /// Ascending in the file; the parts cover it without gaps.
    parts: Vec<DeltaPart>,
    /// Indices of `parts`, ascending in the region.
    by_page: Vec<usize>,
    /// Flags of each page of the file.
    pub(super) pages: Vec<u8>,
    stage: CopyStage,
    /// Mappings that the region may still use.
    allowance: u64,
    /// Number of pages that stay the region's own in any case.
    keep: u64,
    later: Option<TaskSender>,
    pub(super) remapped: Vec<(PageRange, u64)>,
    pub(super) readers: Vec<ReaderMapping>,
    bounce: Vec<u8>,
}

/// Maximum number of mappings that a lost layer may cost a child that will be stopped.
const MAX_INACCESSIBLE_RUNS: usize = 64;

/// The runs, or a single run around them if there are too many.
pub(super) fn coalesce_if_many(runs: Vec<PageRange>) -> Vec<PageRange> {
    match runs.as_slice() {
        [first, .., last] if runs.len() > MAX_INACCESSIBLE_RUNS => vec![PageRange::new(first.start, last.end)],
        _ => runs,
    }
}

/// Makes a run of the file inaccessible through `reader`, now and after a discard by the guest, and
/// wakes waiting accesses.
///
/// The pages show a file that has none, rather than being marked by UFFDIO_POISON: KVM answers a poisoned
/// page with a SIGBUS, which would kill the whole process, and one that is not there with an error from
/// KVM_RUN, which stops the VM. Nor are they unmapped: a device of the child that uses one just then would
/// be a SIGSEGV, and end the other VMs of the process, too.
pub(super) fn make_inaccessible(shared: &CopyService, reader: &ReaderMapping, file: PageRange) {
    let range = PageRange::with_len(reader.range.start + (file.start - reader.file.start), file.len());
    if let Err(error) =
        reader.at.map_lost(range, shared.empty.as_fd()).and_then(|()| shared.uffd.wake(&reader.at, range))
    {
        // Never zeros: the range stays watched.
        tracing::error!(%error, %range, "lost pages could not be denied: whoever touches them waits for ever");
    }
}

/// The runs of `within` whose pages lack `flag`.
pub(super) fn runs_without(pages: &[u8], within: PageRange, flag: u8) -> Vec<PageRange> {
    let mut runs = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let rest = &pages[at as usize..within.end as usize];
        let lacks = rest[0] & flag == 0;
        let len = rest.iter().take_while(|flags| (**flags & flag == 0) == lacks).count() as u64;
        if lacks {
            runs.push(PageRange::with_len(at, len));
        }
        at += len;
    }
    runs
}

/// The runs of `within` whose pages have `flag`.
fn runs_with(pages: &[u8], within: PageRange, flag: u8) -> Vec<PageRange> {
    crate::units::subtract_runs(&[within], &runs_without(pages, within, flag))
}

impl CopyWork {
    /// Prepares to fill `delta` from the region `at`. Protects no page yet.
    pub(super) fn new(shared: &CopyService, at: &Arc<Reservation>, delta: Delta) -> Result<Self, BackgroundError> {
        let Delta { file, parts, beneath, mapping, allowance, keep, later } = delta;
        let count = parts.last().map_or(0, |part| part.file().end);
        let all = PageRange::new(0, count);
        // A present page counts as filled.
        let blocks = file.metadata().map_err(BackgroundError::Watch)?.blocks();
        assert_eq!(blocks, 0, "a layer that is filled later starts as holes");
        let into = Reservation::new(count).map_err(BackgroundError::Watch)?;
        into.map_shared(all, file.as_fd(), 0).map_err(BackgroundError::Watch)?;
        shared.uffd.register(&into, all, RegisterMode::Missing).map_err(BackgroundError::Watch)?;
        let gate = ProtectGate::open(Arc::clone(&shared.uffd), Arc::clone(at)).map_err(BackgroundError::Watch)?;
        let mut by_page: Vec<usize> = (0..parts.len()).collect();
        by_page.sort_unstable_by_key(|&n| parts[n].range.start);
        Ok(Self {
            gate,
            since: Instant::now(),
            file,
            into,
            _mapping: mapping,
            _beneath: beneath,
            parts,
            by_page,
            pages: vec![0; count as usize],
            stage: CopyStage::Copy(0),
            allowance,
            keep,
            later,
            remapped: Vec::new(),
            readers: Vec::new(),
            bounce: Vec::new(),
        })
    }

    /// Whether every page of the delta is filled.
    pub(super) fn is_filled(&self) -> bool {
        self.pages.iter().all(|flags| flags & FILLED != 0)
    }

    pub(super) fn mark(&mut self, file: PageRange, change: impl Fn(u8) -> u8) {
        for flags in &mut self.pages[file.start as usize..file.end as usize] {
            *flags = change(*flags);
        }
    }

    /// Calls `f` with each part that touches `range` of the region, and the part's share of it.
    pub(super) fn for_parts(
        &mut self,
        range: PageRange,
        mut f: impl FnMut(&mut Self, &DeltaPart, PageRange) -> Result<(), FillError>,
    ) -> Result<(), FillError> {
        let mut next = self.by_page.partition_point(|&n| self.parts[n].range.end <= range.start);
        while let Some(&n) = self.by_page.get(next) {
            let part = self.parts[n].clone();
            let cut = part.range.intersect(range);
            if cut.is_empty() {
                break;
            }
            f(self, &part, cut)?;
            next += 1;
        }
        Ok(())
    }

    /// Copies the missing pages of `range` of the file.
    pub(super) fn fill(&mut self, shared: &CopyService, range: PageRange) -> Result<(), FillError> {
        let range = range.intersect(PageRange::new(0, self.pages.len() as u64));
        let mut next = self.parts.partition_point(|part| part.file().end <= range.start);
        while let Some(part) = self.parts.get(next).cloned() {
            let cut = part.file().intersect(range);
            if cut.is_empty() {
                break;
            }
            for run in runs_without(&self.pages, cut, FILLED) {
                #[cfg(test)]
                shared.hooks.before_copy(run)?;
                self.copy(shared, &part, run).map_err(|source| FillError::Copy {
                    page: run.start,
                    pages: run.len(),
                    source,
                })?;
                self.mark(run, |flags| flags | FILLED);
            }
            next += 1;
        }
        Ok(())
    }

    fn copy(&mut self, shared: &CopyService, part: &DeltaPart, file: PageRange) -> io::Result<()> {
        match &part.origin {
            CopySource::Parent => {
                let from = self.gate.at().addr(part.to_region(file).start);
                return shared.uffd.fill(&self.into, file, from);
            }
            CopySource::Zero => {
                self.bounce.clear();
                self.bounce.resize(file.bytes(), 0);
            }
            CopySource::Layer(source) => {
                self.bounce.resize(file.bytes(), 0);
                let at = source.at + (file.start - part.at);
                failpoint(Call::Copy)?;
                source.layer.file().read_exact_at(&mut self.bounce, at * PAGE_SIZE)?;
            }
        }
        shared.uffd.fill(&self.into, file, self.bounce.as_ptr())
    }

    pub(super) fn fill_region(&mut self, range: PageRange) -> Result<(), FillError> {
        let uffd = Arc::clone(self.gate.uffd());
        self.for_parts(range, |work, part, cut| {
            let file = part.to_file(cut);
            for run in runs_without(&work.pages, file, FILLED) {
                let from = work.gate.at().addr(part.to_region(run).start);
                uffd.fill(&work.into, run, from).map_err(|source| FillError::Copy {
                    page: run.start,
                    pages: run.len(),
                    source,
                })?;
                work.mark(run, |flags| flags | FILLED);
            }
            Ok(())
        })
    }

    /// Copies the protected pages of `range` of the region, then releases them: in this order.
    pub(super) fn copy_and_unprotect(&mut self, shared: &CopyService, range: PageRange) -> Result<(), FillError> {
        self.for_parts(range, |work, part, cut| {
            let file = part.to_file(cut);
            // Gaps are copied from the layer below, regardless of writes by the VM.
            if matches!(part.origin, CopySource::Parent) && !broken(Break::ReleaseUncopied) {
                work.fill(shared, file)?;
            }
            work.release(part, file).map_err(FillError::Release)
        })
    }

    /// Releases the protected ones of the `file` pages of `part`.
    fn release(&mut self, part: &DeltaPart, file: PageRange) -> io::Result<()> {
        for run in runs_with(&self.pages, file, PROTECTED) {
            failpoint(Call::Release)?;
            self.gate.release(part.to_region(run))?;
            self.mark(run, |flags| flags & !PROTECTED);
        }
        Ok(())
    }

    /// Makes all pages writable for the frozen VM again, copied or not.
    pub(super) fn release_everything(&mut self) {
        let parts = std::mem::take(&mut self.parts);
        let released = parts.iter().try_for_each(|part| self.release(part, part.file()));
        self.parts = parts;
        if let Err(error) = released.or_else(|_| self.gate.forget()) {
            tracing::error!(%error, "a VM's memory stays write-protected");
        }
    }

    /// When all pages are filled: collapses whole blocks, in the background. Children then map 2
    /// MiB at a time, as after a freeze that copied at once.
    pub(super) fn put_together(self) {
        let filled = self.is_filled();
        let Self { later, into, _mapping: promise, .. } = self;
        let (Some(later), true) = (later, filled) else { return };
        // Skipped if the queue is full: then small pages stay small.
        let _ = later.spawn(move || {
            for (_, block) in PageRange::new(0, into.pages()).blocks().filter(|(_, block)| block.len() == BLOCK_PAGES) {
                let mut done = into.collapse(block);
                for _ in 1..COLLAPSE_TRIES {
                    if done.is_ok() {
                        break;
                    }
                    std::thread::sleep(COLLAPSE_INTERVAL);
                    done = into.collapse(block);
                }
                if let Err(error) = done {
                    // No contiguous memory, or a page in use: the block stays as it is, which is
                    // slower and correct.
                    tracing::debug!(%error, %block, "small pages stay small");
                }
            }
            drop(promise);
        });
    }

    /// Does one slice. Returns true when all is done.
    pub(super) fn step(&mut self, shared: &CopyService) -> Result<bool, FillError> {
        match &mut self.stage {
            CopyStage::Copy(next) => {
                let slice = PageRange::with_len(*next, SLICE).intersect(PageRange::new(0, self.pages.len() as u64));
                *next = slice.end;
                if slice.is_empty() {
                    self.stage = CopyStage::Remap(self.to_remap());
                } else {
                    self.fill(shared, slice)?;
                    self.release_short(slice)?;
                }
            }
            CopyStage::Remap(todo) => {
                let keep = todo.len().saturating_sub(RUNS);
                let now = todo.split_off(keep);
                let last = todo.is_empty();
                let ended = now.into_iter().rev().find_map(|(run, at)| self.share_back(run, at).err());
                if let Some(error) = &ended {
                    tracing::debug!(%error, "pages stay private to the parent");
                }
                if last || ended.is_some() {
                    self.stage = CopyStage::Release(0);
                }
            }
            CopyStage::Release(next) => {
                let (first, end) = (*next, (*next + RUNS).min(self.parts.len()));
                *next = end;
                for n in first..end {
                    let part = self.parts[n].clone();
                    self.release(&part, part.file()).map_err(FillError::Release)?;
                }
                return Ok(end == self.parts.len());
            }
        }
        Ok(false)
    }

    /// Releases runs that will not be mapped over the delta as soon as they are copied.
    fn release_short(&mut self, slice: PageRange) -> Result<(), FillError> {
        let mut next = self.parts.partition_point(|part| part.file().end <= slice.start);
        while let Some(part) = self.parts.get(next) {
            let cut = part.file().intersect(slice);
            if cut.is_empty() {
                break;
            }
            if part.range.len() < MIN_REMAPPED && self.is_alone(next) {
                let part = part.clone();
                self.release(&part, cut).map_err(FillError::Release)?;
            }
            next += 1;
        }
        Ok(())
    }

    /// Whether no other part adjoins this one, in the region and in the file alike.
    fn is_alone(&self, n: usize) -> bool {
        let goes_on = |a: &DeltaPart, b: &DeltaPart| a.range.end == b.range.start && a.file().end == b.at;
        let part = &self.parts[n];
        !n.checked_sub(1).is_some_and(|before| goes_on(&self.parts[before], part))
            && !self.parts.get(n + 1).is_some_and(|next| goes_on(part, next))
    }

    /// The runs worth mapping over the delta, in reverse order: the longest is last and next.
    fn to_remap(&self) -> Vec<(PageRange, u64)> {
        // The VM was dropped, so sharing is useless.
        if Arc::strong_count(self.gate.at()) == 1 {
            return Vec::new();
        }
        let mut runs: Vec<(PageRange, u64)> = Vec::new();
        for part in &self.parts {
            for file in runs_with(&self.pages, part.file(), PROTECTED) {
                let run = part.to_region(file);
                match runs.last_mut() {
                    Some((last, at)) if last.end == run.start && *at + last.len() == file.start => last.end = run.end,
                    _ => runs.push((run, file.start)),
                }
            }
        }
        let mut left: u64 = runs.iter().map(|(run, _)| run.len()).sum();
        runs.retain(|(run, _)| run.len() >= MIN_REMAPPED);
        runs.sort_unstable_by_key(|(run, _)| std::cmp::Reverse(run.len()));
        // Each run adds a mapping and splits the one it lies in.
        runs.truncate((self.allowance / 2) as usize);
        let wanted = runs.iter().take_while(|(run, _)| {
            let more = left > self.keep;
            left = left.saturating_sub(run.len());
            more
        });
        let wanted = wanted.count();
        runs.truncate(wanted);
        runs.reverse();
        runs
    }

    /// Maps a copied run over the delta, unless a write to it was allowed since.
    fn share_back(&mut self, run: PageRange, at: u64) -> io::Result<()> {
        let file = PageRange::with_len(at, run.len());
        let kept = self.pages[at as usize..file.end as usize].iter().all(|flags| *flags == FILLED | PROTECTED);
        if !kept && !broken(Break::ShareWritten) {
            return Ok(());
        }
        // The run is copied and protected completely, so no write is lost: a writer waits, and
        // finds the new mapping when it is woken.
        self.remapped.reserve(1);
        self.gate.at().map_private(run, self.file.as_fd(), at)?;
        // At once: from here on the run is mapped over the delta, whatever fails next (I14).
        self.remapped.push((run, at));
        self.mark(file, |flags| flags & !PROTECTED);
        self.gate.wake(run)
    }
}
