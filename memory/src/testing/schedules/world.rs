//! Shared state of a schedule's tasks: a VM of two regions, a record of the writes to each page,
//! and a guest that never waits in the kernel.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use shuttle::sync::{Condvar, Mutex};

use crate::dma::splice::page_of;
use crate::freeze::background::CopyService;
use crate::sys::Fault;
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange};
use crate::{GuestRam, GuestRegion, RamLayout, Store};

/// Pages of each region: whole blocks and a part of one.
pub(super) const PAGES: u64 = 2 * BLOCK_PAGES + 3;
pub(super) const REGIONS: usize = 2;

/// Number of attempts after which an access counts as never served.
const MAX_TRIES: u32 = 200;

/// A page of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub(super) region: usize,
    pub(super) page: u64,
}

impl At {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..REGIONS).flat_map(|region| (0..PAGES).map(move |page| Self { region, page }))
    }

    fn index(self) -> usize {
        self.region * PAGES as usize + self.page as usize
    }
}

/// The words written to every page, in order. Locked only between two steps of a schedule, so
/// without waiting.
#[derive(Debug, Default)]
struct Record {
    /// By page.
    words: Vec<Vec<u64>>,
    last: u64,
    wrong: Option<String>,
}

/// The words that a page may have in a child: the parent's when the freeze began, and those that
/// devices wrote during the freeze.
#[derive(Clone, Debug)]
pub(super) struct Instant(Vec<Vec<u64>>);

impl Instant {
    pub(super) fn allows(&self, at: At) -> &[u64] {
        &self.0[at.index()]
    }
}

/// Requests to the background task.
#[derive(Debug, Default)]
struct Desk {
    faults: VecDeque<Fault>,
    /// Faults answered.
    answered: u64,
    asked: u64,
    poked: bool,
    closed: bool,
}

pub(super) struct World {
    pub(super) store: Store,
    pub(super) engine: Arc<CopyService>,
    pub(super) parent: GuestRam,
    /// Held by the vCPU while it runs, and by a task that has stopped it.
    pub(super) cpu: Mutex<()>,
    record: std::sync::Mutex<Record>,
    desk: Mutex<Desk>,
    bell: Condvar,
}

/// The page map's bit of a page that userfaultfd protects.
const PROTECTED: u64 = 1 << 57;
const PRESENT: u64 = 1 << 63;

fn address(region: &GuestRegion, page: u64) -> u64 {
    region.host_address() + page * PAGE_SIZE
}

thread_local! {
    static PAGEMAP: std::fs::File = std::fs::File::open("/proc/self/pagemap").unwrap();
}

fn pagemap(address: u64) -> u64 {
    let mut entry = [0; 8];
    PAGEMAP.with(|map| map.read_exact_at(&mut entry, address / PAGE_SIZE * 8)).unwrap();
    u64::from_ne_bytes(entry)
}

fn in_core(address: u64) -> bool {
    let mut seen = 0u8;
    // SAFETY: queries one page of this process's own mapping, and writes one byte.
    let asked = unsafe { libc::mincore(address as *mut libc::c_void, PAGE_SIZE as usize, &raw mut seen) };
    asked == 0 && seen & 1 != 0
}

impl World {
    pub(super) fn new() -> Self {
        let store = Store::open_small().unwrap();
        let engine = store.background().unwrap();
        let ranges = [0, 1 << 32].map(|base| (vm_memory::GuestAddress(base), PAGES));
        let parent = GuestRam::reserve(&RamLayout::of_ranges(&ranges).unwrap(), &store).unwrap();
        parent.populate().unwrap();
        let record = Record { words: vec![Vec::new(); REGIONS * PAGES as usize], ..Record::default() };
        Self {
            store,
            engine,
            parent,
            cpu: Mutex::new(()),
            record: std::sync::Mutex::new(record),
            desk: Mutex::new(Desk::default()),
            bell: Condvar::new(),
        }
    }

    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Records a failure: the schedule fails.
    pub(super) fn wrong(&self, told: String) {
        self.record().wrong.get_or_insert(told);
    }

    pub(super) fn found(&self) -> Option<String> {
        self.record().wrong.clone()
    }

    /// A word that no page has had yet.
    pub(super) fn fresh(&self) -> u64 {
        let mut record = self.record();
        record.last += 1;
        record.last
    }

    /// Records that `word` was written to the parent's page, by its guest or by a device.
    pub(super) fn given(&self, at: At, word: u64) {
        self.record().words[at.index()].push(word);
    }

    /// Writes the first word of a page of the VM's base file, which is an unwatched hole until
    /// then.
    pub(super) fn base(&self, at: At) {
        let word = self.fresh();
        let region = &self.parent.regions()[at.region];
        let to = address(region, at.page) as *mut u64;
        // SAFETY: the page is the region's, mapped and aligned; there is no Rust reference to it,
        // and no other task runs yet.
        unsafe { to.write_volatile(word) };
        self.given(at, word);
    }

    pub(super) fn now(&self, at: At) -> u64 {
        *self.record().words[at.index()].last().unwrap()
    }

    /// Number of writes to each page so far.
    pub(super) fn mark(&self) -> Vec<usize> {
        self.record().words.iter().map(|words| words.len() - 1).collect()
    }

    /// The words of each page from `mark` on.
    pub(super) fn since(&self, mark: &[usize]) -> Instant {
        let record = self.record();
        Instant(record.words.iter().zip(mark).map(|(words, first)| words[*first..].to_vec()).collect())
    }

    /// Whether an access would wait in the kernel, which would block all tasks, since they share a
    /// thread.
    pub(super) fn waits(region: &GuestRegion, page: u64, write: bool) -> bool {
        let address = address(region, page);
        let entry = pagemap(address);
        if entry & PRESENT == 0 {
            !in_core(address) || write && entry & PROTECTED != 0
        } else {
            write && entry & PROTECTED != 0
        }
    }

    /// One access by a guest: returns the old word. `None` if the access would wait; its fault has
    /// then been sent.
    fn try_access(&self, region: &GuestRegion, page: u64, write: Option<u64>) -> Option<u64> {
        if Self::waits(region, page, write.is_some()) {
            return None;
        }
        let word = address(region, page) as *mut u64;
        // SAFETY: the page is the region's, mapped and aligned; there is no Rust reference to it,
        // and no other task runs meanwhile.
        let was = unsafe { word.read_volatile() };
        if let Some(value) = write {
            // SAFETY: as above.
            unsafe { word.write_volatile(value) };
        }
        Some(was)
    }

    /// Sends a fault to the background task and waits for its answer.
    fn fault(&self, region: &GuestRegion, page: u64) {
        let mut desk = self.desk.lock().unwrap();
        desk.faults.push_back(Fault { address: address(region, page) });
        desk.asked += 1;
        let mine = desk.asked;
        self.bell.notify_all();
        while desk.answered < mine {
            desk = self.bell.wait(desk).unwrap();
        }
    }

    /// The parent's guest, on its vCPU: reads or writes a page.
    pub(super) fn guest(&self, at: At, write: bool) {
        let region = &self.parent.regions()[at.region];
        for _ in 0..MAX_TRIES {
            {
                let _cpu = self.cpu.lock().unwrap();
                let word = write.then(|| self.fresh());
                let expected = self.now(at);
                if let Some(was) = self.try_access(region, at.page, word) {
                    if was != expected {
                        self.wrong(format!("the guest sees {was} at {at:?}, and it was given {expected}"));
                    }
                    if let Some(word) = word {
                        self.given(at, word);
                    }
                    return;
                }
            }
            // The vCPU waits outside the guest, so a freeze can stop it.
            self.fault(region, at.page);
        }
        self.wrong(format!("an access of the guest to {at:?} is never served"));
    }

    /// A child's guest.
    pub(super) fn child(&self, ram: &GuestRam, at: At, write: Option<u64>) -> u64 {
        let region = &ram.regions()[at.region];
        for _ in 0..MAX_TRIES {
            if let Some(was) = self.try_access(region, at.page, write) {
                return was;
            }
            self.fault(region, at.page);
        }
        self.wrong(format!("a child's access to {at:?} is never served"));
        0
    }

    /// Whether a device's access to `range` would never wait: devices bypass protection, and must
    /// not meet holes.
    pub(super) fn is_open(region: &GuestRegion, range: PageRange, write: bool) -> bool {
        (range.start..range.end).all(|page| !Self::waits(region, page, write))
    }

    /// Signals that there may be pages to copy.
    pub(super) fn poke(&self) {
        self.desk.lock().unwrap().poked = true;
        self.bell.notify_all();
    }

    /// Ends the requests.
    pub(super) fn close(&self) {
        self.desk.lock().unwrap().closed = true;
        self.bell.notify_all();
    }

    /// The background thread's life: faults first, then a slice of the oldest job.
    pub(super) fn serve(&self) {
        loop {
            let fault = {
                let mut desk = self.desk.lock().unwrap();
                desk.poked = false;
                desk.faults.pop_front()
            };
            let answered = fault.is_some();
            if self.engine.serve_one(fault) {
                if answered {
                    self.desk.lock().unwrap().answered += 1;
                    self.bell.notify_all();
                }
                continue;
            }
            let mut desk = self.desk.lock().unwrap();
            while desk.faults.is_empty() && !desk.poked {
                if desk.closed {
                    return;
                }
                desk = self.bell.wait(desk).unwrap();
            }
        }
    }

    /// Runs the tasks of the reclaim thread.
    pub(super) fn reclaim(&self) {
        let tasks = self.store.reclaim(|thread| thread.take_queued());
        tasks.into_iter().flatten().for_each(|task| task());
    }
}

/// The first word of each page.
pub(super) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(PAGE_SIZE as usize).map(page_of).collect()
}

/// Pages that begin with these words.
pub(super) fn bytes(words: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; words.len() * PAGE_SIZE as usize];
    for (page, word) in bytes.chunks_exact_mut(PAGE_SIZE as usize).zip(words) {
        page[..8].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Ends the process if one schedule takes longer than that: a task waits in the kernel, and blocks
/// all tasks.
pub(super) fn watch() {
    // SAFETY: this only arms a timer; the signal's default action ends the process with the
    // signal's name, which identifies the cause.
    unsafe { libc::alarm(60) };
}
