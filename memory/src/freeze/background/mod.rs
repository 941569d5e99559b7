//! Background freeze: the parent resumes before its pages have been copied (D4).
//!
//! ```text
//!            parent's pages            delta layer's file            child's mapping of the file
//!           ┌───┬───┬───┬───┬───┐     ┌───┬───┬───┬───┬───┐         ┌───┬───┬───┬───┬───┐
//!           │ C │ C │ W │ W │ P │     │ ▓ │ ▓ │   │   │ ▓ │ ◄────── │   │ ▓ │ ? │   │   │
//!           └───┴───┴─▲─┴───┴─▲─┘     └───┴───┴─▲─┴───┴───┘         └───┴───┴─│─┴───┴───┘
//!      a vCPU writes ─┘       │                 │  a read of a hole waits ◄───┘
//!      and waits              └─ pinned         │
//!           │                    (copied before │             W write-protected, not copied
//!           │                    anything)      │             C copied: released or over the delta
//!           └───────────► background thread ────┘             P pinned: never protected
//!              both faults jump the queue: copy, then release, then wake
//! ```
//!
//! Invariants, in the order of a page's life:
//!
//! 1. **Pinned pages are copied before any page is protected**, and are never protected (I3,
//!    [`crate::freeze::protect`]).
//! 2. A page is **protected before the freeze returns** and the parent's vCPUs resume; until it is
//!    copied its bytes are the frozen ones.
//! 3. **Copy, then release, then wake.** A page of the parent is released only after the delta has
//!    it.
//! 4. A page appears in the delta's file **complete and alone**: UFFDIO_COPY puts finished 4 KiB
//!    pages into the page cache. (`pwrite` is unsuitable: in a hole of a `huge=always` file it
//!    allocates 2 MiB of which all other pages read as zeros, and if it cannot read its source at
//!    once it exposes zeros for a moment even with 4 KiB pages.)
//! 5. A child's mapping of an unfinished file is **watched before it is live**; an access to a hole
//!    waits and never reads zeros. Watching ends only after every page is filled.
//! 6. A pin of a protected or missing page fills the page itself ([`crate::GuestRegion`]'s
//!    `settle`), under the region's lock. From then on the page is released and not shared back, so
//!    the device's frame stays the page's.
//! 7. Every operation that removes or remaps pages (freeze, reset, evict, compaction) first
//!    finishes the copy (`finish_background`).
//! 8. Pages that are **still protected** when all is copied are mapped over the delta, so that
//!    parent and children share them and the next freeze need not copy them again. No write is
//!    lost: the pages cannot be written until the mapping is replaced, and the replacement is one
//!    step for every CPU.
//!
//! If the copy fails, the parent is whole (its pages were only protected). In children the missing
//! pages become access errors, never zeros; [`crate::GuestRam::on_failure`] reports it.
//!
//! Lock order: a region's state, the ownership table, a [`BackgroundCopy`], the [`CopyService`]
//! index. The thread takes the last two only, and their holders access guest memory only through
//! the kernel, reading. So a thread that waits for this one may hold the first two.
//!
//! The parent may be dropped at any time: a background copy keeps the parent's memory until it is
//! done. One thread per store does all copies. It ends with the store, after the last background
//! copy.

mod bg_copy;
#[cfg(test)]
mod tests;
mod work;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use thiserror::Error;

use crate::lost::{FillError, LostMemory};
use crate::sync::whole::{Mutex, MutexGuard};
use crate::sys::{Fault, Uffd, UffdOpenError};
use crate::units::PAGE_SIZE;

pub(crate) use bg_copy::{BackgroundCopy, Delta};
pub(crate) use work::{CopySource, DeltaPart};

/// The reason why background freezes are impossible.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BackgroundError {
    /// The kernel refused a userfaultfd.
    #[error(
        "the kernel gives no userfaultfd (it needs /dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd)"
    )]
    Refused(#[source] io::Error),
    /// The userfaultfd lacks a needed feature.
    #[error("this kernel's userfaultfd lacks {feature} (Linux 6.4 or later has it)")]
    Lacks {
        /// The missing feature.
        feature: &'static str,
    },
    /// The thread could not be started.
    #[error("the thread that copies in the background could not be started")]
    Thread(#[source] io::Error),
    /// The memory could not be prepared.
    #[error("memory could not be write-protected or watched")]
    Watch(#[source] io::Error),
}

impl From<UffdOpenError> for BackgroundError {
    fn from(error: UffdOpenError) -> Self {
        match error {
            UffdOpenError::Refused(source) => Self::Refused(source),
            UffdOpenError::Lacks(feature) => Self::Lacks { feature },
        }
    }
}

/// Owner of a faulting address.
#[derive(Clone)]
enum FaultTarget {
    /// The frozen VM, from its first page.
    Writer(Arc<BackgroundCopy>),
    /// A child; the number is the file's page at the start of the range.
    Reader(Arc<BackgroundCopy>, u64),
}

#[derive(Default)]
struct FaultIndex {
    /// By first address: the end, and the owner.
    targets: BTreeMap<u64, (u64, FaultTarget)>,
    jobs: VecDeque<Arc<BackgroundCopy>>,
    /// VMs whose memory was lost. The thread, which holds no lock, runs their callbacks.
    lost_memory: Vec<Arc<LostMemory>>,
    stopping: bool,
    /// The userfaultfd failed: no new copies start.
    lost: bool,
    /// The thread has ended.
    ended: bool,
}

/// State shared by the thread and the background copies. A background copy keeps it alive after the
/// thread has ended.
pub(crate) struct CopyService {
    uffd: Arc<Uffd>,
    bell: OwnedFd,
    /// A file without a page, which lost pages show.
    empty: OwnedFd,
    index: Mutex<FaultIndex>,
    #[cfg(test)]
    pub(crate) hooks: tests::Hooks,
}

impl fmt::Debug for CopyService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyService({} jobs)", self.index().jobs.len())
    }
}

impl CopyService {
    fn index(&self) -> MutexGuard<'_, FaultIndex> {
        // Each change to the index is one step.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Simulates the loss of the userfaultfd.
    #[cfg(test)]
    pub(crate) fn lose_userfaultfd(&self) {
        self.index().lost = true;
    }

    fn ring(&self) {
        // EAGAIN: the counter is full, so it is readable already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn add_target(&self, start: u64, end: u64, target: FaultTarget) {
        let replaced = self.index().targets.insert(start, (end, target));
        debug_assert!(replaced.is_none(), "an address has one background copy at a time");
    }

    fn remove_target(&self, start: u64) {
        // Dropped after unlock, because it may be the last handle of a background copy.
        let gone = self.index().targets.remove(&start);
        drop(gone);
    }

    /// Queues a background copy for the thread.
    pub(crate) fn start(&self, bg_copy: &Arc<BackgroundCopy>) {
        self.index().jobs.push_back(Arc::clone(bg_copy));
        self.ring();
    }

    /// Queues the callbacks of `failures` for the thread. May be called with any lock held.
    pub(crate) fn tell_later(&self, failures: impl Iterator<Item = Arc<LostMemory>>) {
        let mut failures: Vec<_> = failures.collect();
        if failures.is_empty() {
            return;
        }
        let mut index = self.index();
        if !index.ended {
            index.lost_memory.append(&mut failures);
            drop(index);
            self.ring();
            return;
        }
        drop(index);
        let tell = move || failures.iter().for_each(|failure| failure.tell());
        if let Err(error) = thread::Builder::new().name("clade-lost".to_owned()).spawn(tell) {
            tracing::error!(%error, "memory is lost, and there is no thread to tell its VM");
        }
    }

    /// Runs the callbacks of VMs whose memory was lost.
    fn tell_now(&self) {
        let failures = std::mem::take(&mut self.index().lost_memory);
        for failure in failures {
            if catch_unwind(AssertUnwindSafe(|| failure.tell())).is_err() {
                tracing::error!("a callback for lost memory panicked");
            }
        }
    }

    fn answer(&self, fault: Fault) {
        let found = {
            let index = self.index();
            let near = index.targets.range(..=fault.address).next_back();
            near.filter(|(_, (end, _))| fault.address < *end).map(|(start, (_, target))| (*start, target.clone()))
        };
        match found {
            Some((start, FaultTarget::Writer(bg_copy))) => bg_copy.serve_writer((fault.address - start) / PAGE_SIZE),
            Some((start, FaultTarget::Reader(bg_copy, at))) => {
                bg_copy.serve_reader(at + (fault.address - start) / PAGE_SIZE);
            }
            // The copy has finished since: retry.
            None => {}
        }
        // Last: by now the page is present, released, or lost.
        if let Err(error) = self.uffd.wake_page(fault.address) {
            tracing::error!(%error, "a waiting access could not be woken");
        }
    }

    /// The thread: faults first, then a slice of the oldest job.
    fn serve(&self) -> io::Result<()> {
        loop {
            let faults = self.uffd.faults()?;
            #[cfg(test)]
            self.hooks.between_read_and_answer(&faults);
            for fault in faults {
                self.answer(fault);
            }
            self.tell_now();
            let (job, stopping) = {
                let index = self.index();
                (index.jobs.front().cloned(), index.stopping)
            };
            #[cfg(test)]
            let job = job.filter(|_| stopping || !self.hooks.held());
            match job {
                Some(job) if !stopping && let Some(left) = job.head_start() => self.wait(Some(left))?,
                Some(job) if job.step() => {
                    let done = self.index().jobs.pop_front();
                    drop(done);
                }
                Some(_) => {}
                None if stopping => return Ok(()),
                None => self.wait(None)?,
            }
        }
    }

    /// One round of the thread, for a task in its place: `fault`, or a slice of the oldest job.
    /// Returns false when idle.
    #[cfg(all(test, shuttle))]
    pub(crate) fn serve_one(&self, fault: Option<Fault>) -> bool {
        if let Some(fault) = fault {
            self.answer(fault);
            return true;
        }
        self.tell_now();
        let job = self.index().jobs.front().cloned();
        let Some(job) = job else { return false };
        if job.step() {
            let done = self.index().jobs.pop_front();
            drop(done);
        }
        true
    }

    fn wait(&self, most: Option<Duration>) -> io::Result<()> {
        let most = most.map(|most| Timespec { tv_sec: 0, tv_nsec: i64::from(most.subsec_nanos()) });
        let mut fds = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&self.bell, PollFlags::IN)];
        match poll(&mut fds, most.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let rung = fds[1].revents().contains(PollFlags::IN);
        let lost = fds[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP);
        if lost {
            return Err(io::Error::other("the userfaultfd reports an error"));
        }
        if rung {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.bell, &mut count);
        }
        Ok(())
    }

    /// Returns only on request, never while an access may wait.
    fn run(&self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.serve())) {
                Ok(Ok(())) => return,
                // The interrupted work may be half done, so none of the pending layers can be
                // trusted. The thread continues, for the accesses that still wait.
                Err(_) => self.fail_all(&Arc::new(FillError::Panic)),
                Ok(Err(error)) => {
                    self.index().lost = true;
                    self.fail_all(&Arc::new(FillError::Lost(error)));
                    return;
                }
            }
        }
    }

    fn fail_all(&self, error: &Arc<FillError>) {
        tracing::error!(%error, "background freezes failed");
        // Read at once: copies that start later are unaffected. A background copy that was not yet
        // started is in the targets only.
        let (jobs, targets) = {
            let mut index = self.index();
            let targets: Vec<_> = index.targets.values().map(|(_, target)| target.clone()).collect();
            (std::mem::take(&mut index.jobs), targets)
        };
        jobs.iter().for_each(|job| job.fail(error));
        for target in targets {
            let (FaultTarget::Writer(bg_copy) | FaultTarget::Reader(bg_copy, _)) = target;
            bg_copy.fail(error);
        }
    }
}

/// A store's background thread, which copies and answers faults.
pub(crate) struct CopyThread {
    shared: Arc<CopyService>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for CopyThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyThread({:?})", self.shared)
    }
}

/// A file that no process can grow.
fn empty_file() -> rustix::io::Result<OwnedFd> {
    let file = memfd_create("clade-empty", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

impl CopyThread {
    pub(crate) fn start() -> Result<Self, BackgroundError> {
        let uffd = Arc::new(Uffd::open()?);
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| BackgroundError::Thread(e.into()))?;
        let empty = empty_file().map_err(|e| BackgroundError::Thread(e.into()))?;
        let shared = Arc::new(CopyService {
            uffd,
            bell,
            empty,
            index: Mutex::default(),
            #[cfg(test)]
            hooks: tests::Hooks::default(),
        });
        if cfg!(shuttle) {
            // In tests under shuttle a task does the thread's work: `serve_one`.
            return Ok(Self { shared, thread: None });
        }
        let served = Arc::clone(&shared);
        #[cfg(test)]
        let plan = crate::testing::failpoint::plan();
        let thread = thread::Builder::new().name("clade-freeze".to_owned()).spawn(move || {
            #[cfg(test)]
            crate::testing::failpoint::inherit(plan);
            served.run();
            served.index().ended = true;
            served.tell_now();
        });
        Ok(Self { shared, thread: Some(thread.map_err(BackgroundError::Thread)?) })
    }

    /// The service for new background copies; an error after the userfaultfd was lost.
    pub(crate) fn shared(&self) -> Result<Arc<CopyService>, BackgroundError> {
        if self.shared.index().lost {
            return Err(BackgroundError::Watch(io::Error::other("the userfaultfd was lost")));
        }
        Ok(Arc::clone(&self.shared))
    }
}

impl Drop for CopyThread {
    /// Waits until every background copy is done: layers outlive their store.
    fn drop(&mut self) {
        self.shared.index().stopping = true;
        self.shared.ring();
        let Some(thread) = self.thread.take() else { return };
        // A failure callback may have held the last handle of the store. Then this is the thread
        // itself, which ends without being joined.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the background thread ended in a panic");
        }
    }
}

impl AsFd for CopyService {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
