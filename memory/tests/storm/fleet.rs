//! All VMs and images of a storm, and a tally of the operations.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clade_memory::{PageRange, PinLifetime, Store};
use clade_test_support::Random;

use crate::stamp::Clock;
use crate::vm::{CHUNK, CHUNKS, Image, Vm, chunk};

const MAX_VMS: usize = 5;
const MAX_IMAGES: usize = 6;

/// Operations done, which proves that the storm was effective.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    freezes: AtomicU64,
    pending: AtomicU64,
    short: AtomicU64,
    long: AtomicU64,
    crossed: AtomicU64,
    dma: AtomicU64,
    written: AtomicU64,
    forks: AtomicU64,
    resets: AtomicU64,
    discarded: AtomicU64,
    /// Pages that the kernel was asked to reclaim.
    reclaimed: AtomicU64,
    other: AtomicU64,
    looks: AtomicU64,
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl Tally {
    pub(crate) fn freezes(&self) -> u64 {
        self.freezes.load(Ordering::SeqCst)
    }

    pub(crate) fn freeze(&self, pending: u64) {
        self.freezes.fetch_add(1, Ordering::SeqCst);
        count(&self.pending, u64::from(pending > 0));
    }

    pub(crate) fn read(&self, term: PinLifetime, crossed: u64) {
        count(if term == PinLifetime::Transient { &self.short } else { &self.long }, 1);
        count(&self.crossed, u64::from(crossed >= 3));
    }

    pub(crate) fn dma(&self) {
        count(&self.dma, 1);
    }

    pub(crate) fn written(&self, pages: u64) {
        count(&self.written, pages);
    }

    pub(crate) fn fork(&self) {
        count(&self.forks, 1);
    }

    pub(crate) fn reset(&self) {
        count(&self.resets, 1);
    }

    pub(crate) fn discarded(&self, pages: u64) {
        count(&self.discarded, pages);
    }

    pub(crate) fn reclaim(&self, pages: u64) {
        count(&self.reclaimed, pages);
    }

    pub(crate) fn other(&self) {
        count(&self.other, 1);
    }

    pub(crate) fn look(&self) {
        count(&self.looks, 1);
    }

    /// Whether every essential operation occurred.
    pub(crate) fn is_a_storm(&self) -> bool {
        let some = [&self.freezes, &self.long, &self.dma, &self.written, &self.forks, &self.looks];
        some.iter().all(|counter| counter.load(Ordering::Relaxed) > 0)
    }
}

#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) store: Store,
    pub(crate) clock: Arc<Clock>,
    pub(crate) tally: Tally,
    /// Whether this host can freeze in the background.
    pub(crate) background: bool,
    /// Operations left out, to isolate a cause.
    without: String,
    vms: Mutex<Vec<Arc<Vm>>>,
    images: Mutex<Vec<Image>>,
    end: Instant,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    pub(crate) fn new(store: &Store, lasts: Duration, background: bool, without: String) -> Self {
        let clock = Arc::new(Clock::new());
        let vms = (0..2).map(|_| Arc::new(Vm::born(store, &clock))).collect();
        Self {
            store: store.clone(),
            clock,
            tally: Tally::default(),
            background,
            without,
            vms: Mutex::new(vms),
            images: Mutex::default(),
            end: Instant::now() + lasts,
            stop: AtomicBool::new(false),
        }
    }

    pub(crate) fn goes_on(&self) -> bool {
        // A storm lasts at least its time, and on a slow machine until every operation occurred.
        !self.stop.load(Ordering::Relaxed) && (Instant::now() < self.end || !self.tally.is_a_storm())
    }

    /// Whether this storm includes `what`.
    pub(crate) fn has(&self, what: &str) -> bool {
        self.without.split(',').all(|without| without.trim() != what)
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Any VM.
    pub(crate) fn pick(&self, random: &mut Random) -> Option<Arc<Vm>> {
        let vms = lock(&self.vms);
        vms.get(random.below(vms.len() as u64) as usize).cloned()
    }

    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        lock(&self.vms).clone()
    }

    /// Adds a running VM. Drops another one if there are too many.
    pub(crate) fn add(&self, vm: Vm, random: &mut Random) {
        let mut vms = lock(&self.vms);
        vms.push(Arc::new(vm));
        let gone =
            (vms.len() > MAX_VMS).then(|| vms.len() as u64 - 1).map(|old| vms.swap_remove(random.below(old) as usize));
        drop(vms);
        // Its devices may continue.
        drop(gone);
    }

    /// Drops a VM, if another is left.
    pub(crate) fn drop_one(&self, random: &mut Random) {
        let mut vms = lock(&self.vms);
        let gone = (vms.len() > 2).then(|| vms.len() as u64).map(|all| vms.swap_remove(random.below(all) as usize));
        drop(vms);
        drop(gone);
    }

    /// Any image.
    pub(crate) fn image(&self, random: &mut Random) -> Option<Image> {
        let images = lock(&self.images);
        images.get(random.below(images.len() as u64) as usize).cloned()
    }

    pub(crate) fn images(&self) -> Vec<Image> {
        lock(&self.images).clone()
    }

    pub(crate) fn keep(&self, image: Image, random: &mut Random) {
        let mut images = lock(&self.images);
        images.push(image);
        let gone = (images.len() > MAX_IMAGES).then(|| images.swap_remove(random.below(MAX_IMAGES as u64) as usize));
        drop(images);
        drop(gone);
    }

    /// Replaces an image by another one with the same contents.
    pub(crate) fn replace(&self, new: &Image) {
        let same = |image: &&mut Image| Arc::ptr_eq(&image.frozen, &new.frozen);
        let old = lock(&self.images).iter_mut().find(same).map(|image| std::mem::replace(image, new.clone()));
        drop(old);
    }

    pub(crate) fn drop_image(&self, random: &mut Random) {
        let mut images = lock(&self.images);
        let gone =
            (!images.is_empty()).then(|| images.len() as u64).map(|all| images.swap_remove(random.below(all) as usize));
        drop(images);
        drop(gone);
    }

    pub(crate) fn clear(&self) {
        lock(&self.images).clear();
        lock(&self.vms).clear();
    }

    /// Some pages of one region.
    pub(crate) fn run_of_pages(&self, random: &mut Random, most: u64) -> PageRange {
        // Chunks do not cross regions.
        let of = chunk(random.below(CHUNKS));
        let len = 1 + random.below(most.min(CHUNK));
        PageRange::with_len(of.start() + random.below(CHUNK - len + 1), len)
    }
}
