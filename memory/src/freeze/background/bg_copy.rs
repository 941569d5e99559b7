//! One delta layer that is being filled, and the frozen VM's pages that are protected until it is.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::budget::Promise;
use crate::freeze::background::work::{
    CopyWork, DeltaPart, FILLED, PROTECTED, ReaderMapping, WINDOW, coalesce_if_many, make_inaccessible, runs_without,
};
use crate::freeze::background::{BackgroundError, CopyService, FaultTarget};
use crate::freeze::protect;
use crate::layer::fill::{AttachError, LayerFill};
use crate::layer::registry::View;
use crate::lost::{FillError, LostMemory};
use crate::reclaim::TaskSender;
use crate::sync::whole::{AtomicBool, Mutex, MutexGuard};
use crate::sys::{RegisterMode, Reservation};
use crate::testing::sabotage::{Break, broken};
use crate::units::PageRange;

/// Delay of the copy, so that the freeze returns and the vCPUs resume first: the woken thread would
/// otherwise run in their place.
const HEAD_START: Duration = Duration::from_millis(1);

#[derive(Debug)]
enum CopyPhase {
    Pending(Box<CopyWork>),
    /// The runs of the region that are now mapped over the file.
    Done(Vec<(PageRange, u64)>),
    Failed(Arc<FillError>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct BackgroundCopy {
    shared: Arc<CopyService>,
    phase: Mutex<CopyPhase>,
    /// Set (Release) after the last page is filled or the first is lost. Pairs with the Acquire of
    /// readers without the lock.
    over: AtomicBool,
}

/// Inputs of a background copy.
#[derive(Debug)]
pub(crate) struct Delta {
    pub(crate) file: File,
    pub(crate) parts: Vec<DeltaPart>,
    /// The view through which gaps between the parts are copied.
    pub(crate) beneath: View,
    /// Reserved for the copy's own mapping.
    pub(crate) mapping: Promise,
    /// Mappings that the region may use.
    pub(crate) allowance: u64,
    /// Number of pages that stay the region's own in any case, as in an eager freeze.
    pub(crate) keep: u64,
    /// Task queue for collapsing its blocks when it is complete.
    pub(crate) later: Option<TaskSender>,
}

impl BackgroundCopy {
    /// Prepares to fill `delta` from the region `at`. Protects no page yet.
    pub(crate) fn new(
        shared: &Arc<CopyService>,
        at: &Arc<Reservation>,
        delta: Delta,
    ) -> Result<Arc<Self>, BackgroundError> {
        let work = CopyWork::new(shared, at, delta)?;
        let phase = Mutex::new(CopyPhase::Pending(Box::new(work)));
        let bg_copy = Arc::new(Self { shared: Arc::clone(shared), phase, over: AtomicBool::new(false) });
        // Before any page is protected, so that every fault finds its background copy.
        let (start, end) = (at.addr(0) as u64, at.addr(at.pages()) as u64);
        shared.add_target(start, end, FaultTarget::Writer(Arc::clone(&bg_copy)));
        Ok(bg_copy)
    }

    fn phase(&self) -> MutexGuard<'_, CopyPhase> {
        // If a holder panics, the background copy is failed.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the pinned pages, then protects the others: I3 requires this order.
    pub(crate) fn protect(
        &self,
        private: &protect::SharedPages<'_>,
        pinned: &[PageRange],
    ) -> Result<(), BackgroundError> {
        let mut phase = self.phase();
        let CopyPhase::Pending(work) = &mut *phase else { return Ok(()) };
        let fill = |range| work.fill_region(range).map_err(|e| BackgroundError::Watch(io::Error::other(e)));
        let pinned: &[PageRange] = if broken(Break::CopyPinnedLater) { &[] } else { pinned };
        pinned.iter().copied().try_for_each(fill)?;
        // Marked first: if protecting fails half-way, all marked pages are released.
        for run in private.runs() {
            let mut marked = 0;
            work.for_parts(*run, |work, part, range| {
                work.mark(part.to_file(range), |flags| flags | PROTECTED);
                marked += range.len();
                Ok(())
            })
            .map_err(|e| BackgroundError::Watch(io::Error::other(e)))?;
            assert_eq!(marked, run.len(), "what is protected is in the delta, whose background copy releases it");
        }
        work.gate.protect(private).map_err(BackgroundError::Watch)
    }

    /// Queues the copy for the background thread.
    pub(crate) fn start(self: &Arc<Self>) {
        self.shared.start(self);
    }

    /// Number of pages of the layer that are not filled yet.
    pub(crate) fn missing(&self) -> u64 {
        match &*self.phase() {
            CopyPhase::Pending(work) => work.pages.iter().filter(|flags| **flags & FILLED == 0).count() as u64,
            _ => 0,
        }
    }

    /// Time for which the thread should answer faults only.
    pub(crate) fn head_start(&self) -> Option<Duration> {
        let phase = self.phase();
        let CopyPhase::Pending(work) = &*phase else { return None };
        HEAD_START.checked_sub(work.since.elapsed()).filter(|left| !left.is_zero())
    }

    /// Does one slice of the work. Returns true when no work is left.
    pub(crate) fn step(&self) -> bool {
        let mut phase = self.phase();
        let CopyPhase::Pending(work) = &mut *phase else { return true };
        match work.step(&self.shared) {
            Ok(false) => false,
            Ok(true) => {
                self.complete(phase);
                true
            }
            Err(error) => {
                self.give_up(phase, &Arc::new(error));
                true
            }
        }
    }

    /// Handles a failed step. If the delta has all its pages, the failure is harmless: the layer is
    /// complete, and runs mapped over it stay so. Otherwise the layer is lost. In that case no run
    /// has been mapped over it, so the parent is as it was before the freeze.
    fn give_up(&self, mut phase: MutexGuard<'_, CopyPhase>, error: &Arc<FillError>) {
        match &mut *phase {
            CopyPhase::Pending(work) if work.is_filled() => {
                tracing::warn!(%error, "pages stay private to the parent");
                work.release_everything();
                self.complete(phase);
            }
            _ => self.fail_locked(phase, error),
        }
    }

    /// Completes: everything is copied, and released or mapped over the delta.
    fn complete(&self, mut phase: MutexGuard<'_, CopyPhase>) {
        let CopyPhase::Pending(work) = &mut *phase else { return };
        let remapped = std::mem::take(&mut work.remapped);
        self.shared.remove_target(work.gate.at().addr(0) as u64);
        // After the last page is filled: from here on a hole would read as zeros.
        for reader in &work.readers {
            self.shared.remove_target(reader.address());
            if let Err(error) = self.shared.uffd.unregister(&reader.at, reader.range) {
                tracing::error!(%error, "a child's memory stays watched");
            }
        }
        let done = std::mem::replace(&mut *phase, CopyPhase::Done(remapped));
        self.over.store(true, Ordering::Release);
        drop(phase);
        // Outside the lock, because it may hold the last handles of layers below.
        if let CopyPhase::Pending(work) = done {
            work.put_together();
        }
    }

    /// Gives up: the parent continues unharmed, and children lose the pages that they lack.
    pub(crate) fn fail(&self, error: &Arc<FillError>) {
        self.give_up(self.phase(), error);
    }

    fn fail_locked(&self, mut phase: MutexGuard<'_, CopyPhase>, error: &Arc<FillError>) {
        let CopyPhase::Pending(work) = &mut *phase else { return };
        tracing::warn!(%error, "a background freeze failed");
        // I14: for pages mapped over a delta the map must show the delta, and a failed delta is
        // removed from the map.
        debug_assert!(work.remapped.is_empty(), "a run is mapped over a delta that is not complete");
        let readers = std::mem::take(&mut work.readers);
        // Before waiters are woken, so that they see the failure. (Callers that query the layer
        // wait for this lock.)
        self.over.store(true, Ordering::Release);
        readers.iter().for_each(|reader| reader.failure.set(error));
        work.release_everything();
        self.shared.remove_target(work.gate.at().addr(0) as u64);
        for reader in &readers {
            self.shared.remove_target(reader.address());
            for run in coalesce_if_many(runs_without(&work.pages, reader.file, FILLED)) {
                make_inaccessible(&self.shared, reader, run);
            }
        }
        let done = std::mem::replace(&mut *phase, CopyPhase::Failed(Arc::clone(error)));
        drop(phase);
        drop(done);
        // Deferred: the caller may hold a region's lock, and a callback may query that region.
        self.shared.tell_later(readers.into_iter().map(|reader| reader.failure));
    }

    /// Serves a write that waits for a page of the frozen region.
    pub(crate) fn serve_writer(&self, page: u64) {
        let mut phase = self.phase();
        let CopyPhase::Pending(work) = &mut *phase else { return };
        let window = PageRange::with_len(page - page % WINDOW, WINDOW);
        // Relies on this background copy's flags only: the fault may predate the copy. Since it was
        // read the page may have been released, or mapped over the delta, which needs no release.
        // The waiter is woken in any case, and tries again.
        if let Err(error) = work.copy_and_unprotect(&self.shared, window) {
            self.give_up(phase, &Arc::new(error));
        }
    }

    /// Serves an access that waits for a page of the file.
    pub(crate) fn serve_reader(&self, page: u64) {
        let mut phase = self.phase();
        let CopyPhase::Pending(work) = &mut *phase else { return };
        let window = PageRange::with_len(page - page % WINDOW, WINDOW);
        if let Err(error) = work.fill(&self.shared, window) {
            self.fail_locked(phase, &Arc::new(error));
        }
    }
}

impl LayerFill for BackgroundCopy {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn failure(&self) -> Option<Arc<FillError>> {
        if !self.is_over() {
            return None;
        }
        match &*self.phase() {
            CopyPhase::Failed(error) => Some(Arc::clone(error)),
            _ => None,
        }
    }

    fn finish(&self) -> Result<Vec<(PageRange, u64)>, Arc<FillError>> {
        loop {
            match &*self.phase() {
                CopyPhase::Failed(error) => return Err(Arc::clone(error)),
                CopyPhase::Done(remapped) => return Ok(remapped.clone()),
                CopyPhase::Pending(_) => {}
            }
            self.step();
        }
    }

    fn abandon(&self) {
        if self.is_over() {
            return;
        }
        let mut phase = self.phase();
        match &mut *phase {
            CopyPhase::Pending(work) if work.readers.is_empty() => {
                work.release_everything();
                self.complete(phase);
            }
            _ => {}
        }
    }

    fn copy_and_unprotect(&self, range: PageRange) {
        let mut phase = self.phase();
        let CopyPhase::Pending(work) = &mut *phase else { return };
        if let Err(error) = work.copy_and_unprotect(&self.shared, range) {
            self.give_up(phase, &Arc::new(error));
        }
    }

    fn wait_filled(&self, range: PageRange) -> Result<(), Arc<FillError>> {
        if self.is_over() {
            return self.failure().map_or(Ok(()), Err);
        }
        let mut phase = self.phase();
        if let CopyPhase::Pending(work) = &mut *phase {
            let Err(error) = work.fill(&self.shared, range) else { return Ok(()) };
            self.fail_locked(phase, &Arc::new(error));
        } else {
            drop(phase);
        }
        self.failure().map_or(Ok(()), Err)
    }

    fn wait_filled_for(&self, at: &Arc<Reservation>, range: PageRange) -> Result<(), Arc<FillError>> {
        let wanted: Vec<PageRange> = match &*self.phase() {
            CopyPhase::Done(_) => return Ok(()),
            CopyPhase::Failed(error) => return Err(Arc::clone(error)),
            CopyPhase::Pending(work) => {
                let mine = work.readers.iter().filter(|reader| Arc::ptr_eq(&reader.at, at));
                mine.filter_map(|reader| reader.file_of(range)).collect()
            }
        };
        wanted.into_iter().try_for_each(|file| self.wait_filled(file))
    }

    fn attach(
        self: Arc<Self>,
        at: &Arc<Reservation>,
        range: PageRange,
        from: u64,
        failure: &Arc<LostMemory>,
    ) -> Result<bool, AttachError> {
        let mut phase = self.phase();
        match &mut *phase {
            CopyPhase::Done(_) => Ok(false),
            CopyPhase::Failed(error) => Err(AttachError::Failed(Arc::clone(error))),
            CopyPhase::Pending(work) => {
                self.shared.uffd.register(at, range, RegisterMode::Missing).map_err(AttachError::Watch)?;
                let file = PageRange::with_len(from, range.len());
                let reader = ReaderMapping { at: Arc::clone(at), range, file, failure: Arc::clone(failure) };
                let end = at.addr(range.end) as u64;
                self.shared.add_target(reader.address(), end, FaultTarget::Reader(Arc::clone(&self), from));
                work.readers.push(reader);
                Ok(true)
            }
        }
    }

    fn detach(&self, at: &Arc<Reservation>) {
        let mut phase = self.phase();
        let CopyPhase::Pending(work) = &mut *phase else { return };
        let gone: Vec<ReaderMapping> = work.readers.extract_if(.., |reader| Arc::ptr_eq(&reader.at, at)).collect();
        for reader in &gone {
            self.shared.remove_target(reader.address());
        }
    }
}
