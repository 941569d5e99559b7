//! One delta layer that is being filled, and the pages of the frozen VM that are protected until it is.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::background::{BackgroundError, Failure, FillError, Shared, Target};
use crate::budget::Promise;
use crate::layer::Source;
use crate::protect::{self, ProtectGate};
use crate::sys::{Reservation, Watch};
use crate::units::{PAGE_SIZE, PageRange};

/// Pages copied before the thread looks for faults again: what a fault waits for at most, beside its own copy.
const SLICE: u64 = 64;
/// Pages copied around a fault, aligned: a writer that goes on to the next page does not fault again.
const WINDOW: u64 = 32;
/// Mappings made, or runs released, before the thread looks for faults again.
const RUNS: usize = 32;
/// Shorter runs are released instead of mapped over the delta: a mapping costs more than copying them again.
const LEAST_REMAPPED: u64 = 8;
/// Pages that stay the parent's own in any case, as in an eager freeze.
const KEEP_PAGES: u64 = 256;

/// The freeze returns and the vCPUs resume before copying begins: the thread that has just been woken would otherwise run in their place.
const HEAD_START: Duration = Duration::from_millis(1);

/// The delta has it.
const FILLED: u8 = 1;
/// The frozen VM cannot write it.
const PROTECTED: u8 = 2;

/// Where the bytes of a part are until they are copied.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// In the frozen VM's memory, protected or pinned.
    Parent,
    /// A gap that was closed: the VM does not own these pages and may write them meanwhile, but the layer beneath never changes (I4).
    Layer(Source),
    /// A gap over nothing.
    Zero,
}

/// Pages of the frozen region that lie together in the delta's file from `at` on.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) range: PageRange,
    pub(crate) at: u64,
    pub(crate) origin: Origin,
}

impl Part {
    fn file(&self) -> PageRange {
        PageRange::with_len(self.at, self.range.len())
    }
    fn to_file(&self, range: PageRange) -> PageRange {
        PageRange::with_len(self.at + (range.start - self.range.start), range.len())
    }
    fn to_region(&self, file: PageRange) -> PageRange {
        PageRange::with_len(self.range.start + (file.start - self.at), file.len())
    }
}

/// A child's mapping of the unfinished file.
#[derive(Debug)]
struct Reader {
    at: Arc<Reservation>,
    range: PageRange,
    file: PageRange,
    failure: Arc<Failure>,
}

impl Reader {
    fn address(&self) -> u64 {
        self.at.addr(self.range.start) as u64
    }

    /// What of the file `range` of the child's region shows.
    fn file_of(&self, range: PageRange) -> Option<PageRange> {
        let cut = self.range.intersect(range);
        let file = || PageRange::with_len(self.file.start + (cut.start - self.range.start), cut.len());
        (!cut.is_empty()).then(file)
    }
}

#[derive(Debug)]
enum Stage {
    /// From this page of the file on.
    Copy(u64),
    /// Runs of the region and where they are in the file; the next is the last.
    Remap(Vec<(PageRange, u64)>),
    /// From this part on.
    Release(usize),
}

#[derive(Debug)]
struct Work {
    gate: ProtectGate,
    /// When it was begun.
    since: Instant,
    /// The delta's file, and all of it mapped, for the kernel to put pages into.
    file: File,
    into: Reservation,
    _mapping: Promise,
    /// Ascending in the file, which they cover.
    parts: Vec<Part>,
    /// Indices of `parts`, ascending in the region.
    by_page: Vec<usize>,
    /// A page of the file each.
    pages: Vec<u8>,
    stage: Stage,
    /// Mappings that the region may still be given.
    allowance: u64,
    remapped: Vec<(PageRange, u64)>,
    readers: Vec<Reader>,
    bounce: Vec<u8>,
}

#[derive(Debug)]
enum Phase {
    Pending(Box<Work>),
    /// The runs of the region that are now mapped over the file.
    Done(Vec<(PageRange, u64)>),
    Failed(Arc<FillError>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Filling {
    shared: Arc<Shared>,
    phase: Mutex<Phase>,
    /// Set (Release) after the last page is there or the first is lost; pairs with the Acquire of those who ask without the lock.
    over: AtomicBool,
}

/// What a filling is made of.
#[derive(Debug)]
pub(crate) struct Delta {
    pub(crate) file: File,
    pub(crate) parts: Vec<Part>,
    /// For the mapping it needs itself.
    pub(crate) mapping: Promise,
    /// Mappings the region may be given.
    pub(crate) allowance: u64,
}

impl Filling {
    /// Prepares to fill `delta` from the region `at`. Nothing is protected yet.
    pub(crate) fn new(shared: &Arc<Shared>, at: &Arc<Reservation>, delta: Delta) -> Result<Arc<Self>, BackgroundError> {
        let Delta { file, parts, mapping, allowance } = delta;
        let count = parts.last().map_or(0, |part| part.file().end);
        let all = PageRange::new(0, count);
        // A page that is there is taken for filled.
        let blocks = file.metadata().map_err(BackgroundError::Watch)?.blocks();
        assert_eq!(blocks, 0, "a layer that is filled later starts as holes");
        let into = Reservation::new(count).map_err(BackgroundError::Watch)?;
        into.map_shared(all, file.as_fd(), 0).map_err(BackgroundError::Watch)?;
        shared.uffd.register(&into, all, Watch::Missing).map_err(BackgroundError::Watch)?;
        let gate = ProtectGate::open(Arc::clone(&shared.uffd), Arc::clone(at)).map_err(BackgroundError::Watch)?;
        let mut by_page: Vec<usize> = (0..parts.len()).collect();
        by_page.sort_unstable_by_key(|&n| parts[n].range.start);
        let work = Work {
            gate,
            since: Instant::now(),
            file,
            into,
            _mapping: mapping,
            parts,
            by_page,
            pages: vec![0; count as usize],
            stage: Stage::Copy(0),
            allowance,
            remapped: Vec::new(),
            readers: Vec::new(),
            bounce: Vec::new(),
        };
        let phase = Mutex::new(Phase::Pending(Box::new(work)));
        let filling = Arc::new(Self { shared: Arc::clone(shared), phase, over: AtomicBool::new(false) });
        // Before anything is protected: a fault always finds its filling.
        let (start, end) = (at.addr(0) as u64, at.addr(at.pages()) as u64);
        shared.add_target(start, end, Target::Writer(Arc::clone(&filling)));
        Ok(filling)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // A panic while it was held is answered by failing the filling.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the pinned pages, then protects the others: the order is I3's.
    pub(crate) fn protect(&self, private: &protect::Shared<'_>, pinned: &[PageRange]) -> Result<(), BackgroundError> {
        let mut phase = self.phase();
        let Phase::Pending(work) = &mut *phase else { return Ok(()) };
        let fill = |range| work.fill_region(range).map_err(|e| BackgroundError::Watch(io::Error::other(e)));
        pinned.iter().copied().try_for_each(fill)?;
        // Marked first: should protecting fail half-way, all of it is released.
        for run in private.runs() {
            let mut marked = 0;
            work.for_parts(*run, |work, part, range| {
                work.mark(part.to_file(range), |flags| flags | PROTECTED);
                marked += range.len();
                Ok(())
            })
            .map_err(|e| BackgroundError::Watch(io::Error::other(e)))?;
            assert_eq!(marked, run.len(), "what is protected is in the delta, whose filling releases it");
        }
        work.gate.protect(private).map_err(BackgroundError::Watch)
    }

    /// Hands it to the background thread.
    pub(crate) fn start(self: &Arc<Self>) {
        self.shared.start(self);
    }

    /// Pages of the layer that are not there yet.
    pub(crate) fn missing(&self) -> u64 {
        match &*self.phase() {
            Phase::Pending(work) => work.pages.iter().filter(|flags| **flags & FILLED == 0).count() as u64,
            _ => 0,
        }
    }

    /// How long the thread is to answer faults only.
    pub(crate) fn head_start(&self) -> Option<Duration> {
        let phase = self.phase();
        let Phase::Pending(work) = &*phase else { return None };
        HEAD_START.checked_sub(work.since.elapsed()).filter(|left| !left.is_zero())
    }

    /// Whether there is nothing left to wait for.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    pub(crate) fn failure(&self) -> Option<Arc<FillError>> {
        if !self.is_over() {
            return None;
        }
        match &*self.phase() {
            Phase::Failed(error) => Some(Arc::clone(error)),
            _ => None,
        }
    }

    /// Does one slice of the work. True when nothing is left.
    pub(crate) fn step(&self) -> bool {
        let mut phase = self.phase();
        let Phase::Pending(work) = &mut *phase else { return true };
        match work.step(&self.shared) {
            Ok(false) => false,
            Ok(true) => {
                self.complete(phase);
                true
            }
            Err(error) => {
                self.fail_locked(phase, &Arc::new(error));
                true
            }
        }
    }

    /// Finishes on the caller's thread, beside the background thread; returns what was mapped over the delta meanwhile. Bounded: it copies what is
    /// missing and waits for nobody.
    pub(crate) fn finish(&self) -> Result<Vec<(PageRange, u64)>, Arc<FillError>> {
        while !self.step() {}
        match &*self.phase() {
            Phase::Failed(error) => Err(Arc::clone(error)),
            Phase::Done(remapped) => Ok(remapped.clone()),
            Phase::Pending(_) => Ok(Vec::new()),
        }
    }

    /// Everything is copied, and released or mapped over the delta.
    fn complete(&self, mut phase: MutexGuard<'_, Phase>) {
        let Phase::Pending(work) = &mut *phase else { return };
        let remapped = std::mem::take(&mut work.remapped);
        self.shared.remove_target(work.gate.at().addr(0) as u64);
        // After the last page is there: from here on a hole would be zeros.
        for reader in &work.readers {
            self.shared.remove_target(reader.address());
            if let Err(error) = self.shared.uffd.unregister(&reader.at, reader.range) {
                tracing::error!(%error, "a child's memory stays watched");
            }
        }
        let done = std::mem::replace(&mut *phase, Phase::Done(remapped));
        self.over.store(true, Ordering::Release);
        drop(phase);
        // Outside the lock: it may hold the last handles of layers beneath.
        drop(done);
    }

    /// Gives up: the parent goes on whole, children lose what they have not got.
    pub(crate) fn fail(&self, error: &Arc<FillError>) {
        self.fail_locked(self.phase(), error);
    }

    fn fail_locked(&self, mut phase: MutexGuard<'_, Phase>, error: &Arc<FillError>) {
        let Phase::Pending(work) = &mut *phase else { return };
        tracing::warn!(%error, "a background freeze failed");
        let readers = std::mem::take(&mut work.readers);
        // Before anyone is woken: who asks why must be told. (Who asks the layer waits for this lock.)
        self.over.store(true, Ordering::Release);
        readers.iter().for_each(|reader| reader.failure.set(error));
        work.release_everything();
        self.shared.remove_target(work.gate.at().addr(0) as u64);
        for reader in &readers {
            self.shared.remove_target(reader.address());
            for run in few(runs_without(&work.pages, reader.file, FILLED)) {
                deny(&self.shared, reader, run);
            }
        }
        let done = std::mem::replace(&mut *phase, Phase::Failed(Arc::clone(error)));
        drop(phase);
        drop(done);
        readers.iter().for_each(|reader| reader.failure.tell());
    }

    /// Nobody wants the layer: releases the frozen VM's pages. A layer that somebody reads is finished instead.
    pub(crate) fn abandon(&self) {
        if self.is_over() {
            return;
        }
        let mut phase = self.phase();
        match &mut *phase {
            Phase::Pending(work) if work.readers.is_empty() => {
                work.release_everything();
                self.complete(phase);
            }
            _ => {}
        }
    }

    /// A write to a page of the frozen region waits.
    pub(crate) fn serve_writer(&self, page: u64) {
        let mut phase = self.phase();
        let Phase::Pending(work) = &mut *phase else { return };
        let window = PageRange::with_len(page - page % WINDOW, WINDOW);
        let released = work.let_go(&self.shared, window).and_then(|()| {
            // Released by now, or never protected by this filling, which under its lock is the only one: lifting it again is harmless, and
            // nobody waits for ever.
            work.gate.release(PageRange::with_len(page, 1)).map_err(FillError::Release)
        });
        if let Err(error) = released {
            self.fail_locked(phase, &Arc::new(error));
        }
    }

    /// An access to a page of the file waits.
    pub(crate) fn serve_reader(&self, page: u64) {
        let mut phase = self.phase();
        let Phase::Pending(work) = &mut *phase else { return };
        let window = PageRange::with_len(page - page % WINDOW, WINDOW);
        if let Err(error) = work.fill(&self.shared, window) {
            self.fail_locked(phase, &Arc::new(error));
        }
    }

    /// Copies and releases the pages of the frozen region within `range`, for a device that is about to write them behind every protection.
    /// An error is the layer's, not the region's: its pages are released all the same.
    pub(crate) fn let_go(&self, range: PageRange) {
        let mut phase = self.phase();
        let Phase::Pending(work) = &mut *phase else { return };
        if let Err(error) = work.let_go(&self.shared, range) {
            self.fail_locked(phase, &Arc::new(error));
        }
    }

    /// Waits until the pages of the file within `range` are there.
    pub(crate) fn need(&self, range: PageRange) -> Result<(), Arc<FillError>> {
        if self.is_over() {
            return self.failure().map_or(Ok(()), Err);
        }
        let mut phase = self.phase();
        if let Phase::Pending(work) = &mut *phase {
            let Err(error) = work.fill(&self.shared, range) else { return Ok(()) };
            self.fail_locked(phase, &Arc::new(error));
        } else {
            drop(phase);
        }
        self.failure().map_or(Ok(()), Err)
    }

    /// As [`Self::need`], for the part of a child's `range` that is mapped over the file.
    pub(crate) fn need_for(&self, at: &Arc<Reservation>, range: PageRange) -> Result<(), Arc<FillError>> {
        let wanted: Vec<PageRange> = match &*self.phase() {
            Phase::Done(_) => return Ok(()),
            Phase::Failed(error) => return Err(Arc::clone(error)),
            Phase::Pending(work) => {
                let mine = work.readers.iter().filter(|reader| Arc::ptr_eq(&reader.at, at));
                mine.filter_map(|reader| reader.file_of(range)).collect()
            }
        };
        wanted.into_iter().try_for_each(|file| self.need(file))
    }

    /// Watches a child's mapping of the file: `range` of the reservation `at`, from the file's page `from`. It must not be
    /// live yet. False when nothing is missing any more.
    pub(crate) fn attach(
        self: &Arc<Self>,
        at: &Arc<Reservation>,
        range: PageRange,
        from: u64,
        failure: &Arc<Failure>,
    ) -> Result<bool, AttachError> {
        let mut phase = self.phase();
        match &mut *phase {
            Phase::Done(_) => Ok(false),
            Phase::Failed(error) => Err(AttachError::Failed(Arc::clone(error))),
            Phase::Pending(work) => {
                self.shared.uffd.register(at, range, Watch::Missing).map_err(AttachError::Watch)?;
                let file = PageRange::with_len(from, range.len());
                let reader = Reader { at: Arc::clone(at), range, file, failure: Arc::clone(failure) };
                let end = at.addr(range.end) as u64;
                self.shared.add_target(reader.address(), end, Target::Reader(Arc::clone(self), from));
                work.readers.push(reader);
                Ok(true)
            }
        }
    }

    /// Forgets a child that is going. Its mappings stay watched until they are unmapped, so that they never read a hole.
    pub(crate) fn detach(&self, at: &Arc<Reservation>) {
        let mut phase = self.phase();
        let Phase::Pending(work) = &mut *phase else { return };
        let gone: Vec<Reader> = work.readers.extract_if(.., |reader| Arc::ptr_eq(&reader.at, at)).collect();
        for reader in &gone {
            self.shared.remove_target(reader.address());
        }
    }
}

/// Why a child's mapping could not be watched.
#[derive(Debug)]
pub(crate) enum AttachError {
    Failed(Arc<FillError>),
    Watch(io::Error),
}

/// Most mappings a lost layer may cost a child that is going to be stopped.
const MOST_DENIED: usize = 64;

/// The runs, or one around all of them where they are too many.
fn few(runs: Vec<PageRange>) -> Vec<PageRange> {
    match runs.as_slice() {
        [first, .., last] if runs.len() > MOST_DENIED => vec![PageRange::new(first.start, last.end)],
        _ => runs,
    }
}

/// Makes a run of the file an error to access through `reader`, now and after the guest has discarded it, and lets those who wait find out.
///
/// No access at all, rather than UFFDIO_POISON: KVM answers a poisoned page with a SIGBUS, which would take the whole process, and this with an
/// error from KVM_RUN, which takes the VM.
fn deny(shared: &Shared, reader: &Reader, file: PageRange) {
    let range = PageRange::with_len(reader.range.start + (file.start - reader.file.start), file.len());
    if let Err(error) = reader.at.deny(range).and_then(|()| shared.uffd.wake(&reader.at, range)) {
        // Never zeros: it stays watched.
        tracing::error!(%error, %range, "lost pages could not be denied: whoever touches them waits for ever");
    }
}

/// The runs of `within` whose pages lack `flag`.
fn runs_without(pages: &[u8], within: PageRange, flag: u8) -> Vec<PageRange> {
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

impl Work {
    fn mark(&mut self, file: PageRange, change: impl Fn(u8) -> u8) {
        for flags in &mut self.pages[file.start as usize..file.end as usize] {
            *flags = change(*flags);
        }
    }

    /// Calls `f` with each part that touches `range` of the region, and what it has of it.
    fn for_parts(
        &mut self,
        range: PageRange,
        mut f: impl FnMut(&mut Self, &Part, PageRange) -> Result<(), FillError>,
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

    /// Copies what is missing of `range` of the file.
    fn fill(&mut self, shared: &Shared, range: PageRange) -> Result<(), FillError> {
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

    fn copy(&mut self, shared: &Shared, part: &Part, file: PageRange) -> io::Result<()> {
        match &part.origin {
            Origin::Parent => {
                let from = self.gate.at().addr(part.to_region(file).start);
                return shared.uffd.fill(&self.into, file, from);
            }
            Origin::Zero => {
                self.bounce.clear();
                self.bounce.resize(file.bytes(), 0);
            }
            Origin::Layer(source) => {
                self.bounce.resize(file.bytes(), 0);
                let at = source.at + (file.start - part.at);
                source.layer.file().read_exact_at(&mut self.bounce, at * PAGE_SIZE)?;
            }
        }
        shared.uffd.fill(&self.into, file, self.bounce.as_ptr())
    }

    fn fill_region(&mut self, range: PageRange) -> Result<(), FillError> {
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
    fn let_go(&mut self, shared: &Shared, range: PageRange) -> Result<(), FillError> {
        self.for_parts(range, |work, part, cut| {
            let file = part.to_file(cut);
            // Gaps come from beneath, whatever the VM writes there.
            if matches!(part.origin, Origin::Parent) {
                work.fill(shared, file)?;
            }
            work.release(part, file).map_err(FillError::Release)
        })
    }

    /// Releases what is protected of `file` pages of `part`.
    fn release(&mut self, part: &Part, file: PageRange) -> io::Result<()> {
        for run in runs_with(&self.pages, file, PROTECTED) {
            self.gate.release(part.to_region(run))?;
            self.mark(run, |flags| flags & !PROTECTED);
        }
        Ok(())
    }

    /// The frozen VM can write everything again, copied or not.
    fn release_everything(&mut self) {
        let parts = std::mem::take(&mut self.parts);
        let released = parts.iter().try_for_each(|part| self.release(part, part.file()));
        self.parts = parts;
        if let Err(error) = released.or_else(|_| self.gate.forget()) {
            tracing::error!(%error, "a VM's memory stays write-protected");
        }
    }

    /// One slice. True when all is done.
    fn step(&mut self, shared: &Shared) -> Result<bool, FillError> {
        match &mut self.stage {
            Stage::Copy(next) => {
                let slice = PageRange::with_len(*next, SLICE).intersect(PageRange::new(0, self.pages.len() as u64));
                *next = slice.end;
                if slice.is_empty() {
                    self.stage = Stage::Remap(self.to_remap());
                } else {
                    self.fill(shared, slice)?;
                    self.release_short(slice)?;
                }
            }
            Stage::Remap(todo) => {
                let keep = todo.len().saturating_sub(RUNS);
                let now = todo.split_off(keep);
                let last = todo.is_empty();
                let ended = now.into_iter().rev().find_map(|(run, at)| self.share_back(run, at).err());
                if let Some(error) = &ended {
                    tracing::debug!(%error, "pages stay private to the parent");
                }
                if last || ended.is_some() {
                    self.stage = Stage::Release(0);
                }
            }
            Stage::Release(next) => {
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

    /// Runs that will not be mapped over the delta are released as soon as they are copied.
    fn release_short(&mut self, slice: PageRange) -> Result<(), FillError> {
        let mut next = self.parts.partition_point(|part| part.file().end <= slice.start);
        while let Some(part) = self.parts.get(next) {
            let cut = part.file().intersect(slice);
            if cut.is_empty() {
                break;
            }
            if part.range.len() < LEAST_REMAPPED && self.is_alone(next) {
                let part = part.clone();
                self.release(&part, cut).map_err(FillError::Release)?;
            }
            next += 1;
        }
        Ok(())
    }

    /// Whether no other part goes on where this one ends or begins, in the region as in the file.
    fn is_alone(&self, n: usize) -> bool {
        let goes_on = |a: &Part, b: &Part| a.range.end == b.range.start && a.file().end == b.at;
        let part = &self.parts[n];
        !n.checked_sub(1).is_some_and(|before| goes_on(&self.parts[before], part))
            && !self.parts.get(n + 1).is_some_and(|next| goes_on(part, next))
    }

    /// What is worth mapping over the delta: the longest runs last, which is next.
    fn to_remap(&self) -> Vec<(PageRange, u64)> {
        // A VM that has gone shares nothing.
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
        runs.retain(|(run, _)| run.len() >= LEAST_REMAPPED);
        runs.sort_unstable_by_key(|(run, _)| std::cmp::Reverse(run.len()));
        // Each adds itself and splits what it lies in.
        runs.truncate((self.allowance / 2) as usize);
        let wanted = runs.iter().take_while(|(run, _)| {
            let more = left > KEEP_PAGES;
            left = left.saturating_sub(run.len());
            more
        });
        let wanted = wanted.count();
        runs.truncate(wanted);
        runs.reverse();
        runs
    }

    /// Maps a copied run over the delta, unless somebody has been let write to it since.
    fn share_back(&mut self, run: PageRange, at: u64) -> io::Result<()> {
        let file = PageRange::with_len(at, run.len());
        if self.pages[at as usize..file.end as usize].iter().any(|flags| *flags != FILLED | PROTECTED) {
            return Ok(());
        }
        // All of it is copied and protected, so no write is lost: a writer waits, and finds the new mapping when it is woken.
        self.gate.at().map_private(run, self.file.as_fd(), at)?;
        self.mark(file, |flags| flags & !PROTECTED);
        self.remapped.push((run, at));
        self.gate.wake(run)
    }
}
