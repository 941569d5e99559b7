//! A VM of the storm: its memory, the allowed contents, and the locks that its writers take.
//!
//! Lock order: `cpus`, then `devices`, then chunks in ascending order.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use clade_memory::{DmaPin, GuestRam, GuestRegion, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

use crate::stamp::{Clock, Frozen, LANE, LANES, Lane, Model};

/// Pages of the first region: two whole blocks and a part of one.
const LOW_PAGES: u64 = 2 * 512 + 96;
/// Pages of the second, behind a gap.
const HIGH_PAGES: u64 = 512 + 192;
const HIGH_START: u64 = 1 << 32;
pub(crate) const PAGES: u64 = LOW_PAGES + HIGH_PAGES;
/// Pages under one lock, which excludes discards during a write. Divides both regions evenly.
pub(crate) const CHUNK: u64 = 32;
pub(crate) const CHUNKS: u64 = PAGES / CHUNK;
const PAGE: usize = PAGE_SIZE as usize;

pub(crate) fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), LOW_PAGES), (GuestAddress(HIGH_START), HIGH_PAGES)]).unwrap()
}

/// Address of a page, counted over both regions.
pub(crate) fn address(page: u64) -> GuestAddress {
    let high = page.checked_sub(LOW_PAGES);
    GuestAddress(high.map_or(page * PAGE_SIZE, |high| HIGH_START + high * PAGE_SIZE))
}

/// The region of a page and the page's number in it.
fn located(page: u64) -> (usize, u64) {
    page.checked_sub(LOW_PAGES).map_or((0, page), |high| (1, high))
}

pub(crate) fn chunk(chunk: u64) -> PageRange {
    PageRange::with_len(chunk * CHUNK, CHUNK)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// State that a VM's devices keep after it: the held pages, and the locks of writers.
#[derive(Debug)]
pub(crate) struct Chunks {
    locks: Vec<RwLock<()>>,
    /// Pins that must keep a page in place, as counted by the storm.
    held: Vec<AtomicU32>,
    /// Devices are asked to finish their requests.
    quiet: AtomicBool,
}

impl Chunks {
    fn new() -> Self {
        Self {
            locks: (0..CHUNKS).map(|_| RwLock::default()).collect(),
            held: (0..PAGES).map(|_| AtomicU32::new(0)).collect(),
            quiet: AtomicBool::new(false),
        }
    }

    /// Locks the chunk around `page` for a writer.
    pub(crate) fn writing(&self, page: u64) -> RwLockReadGuard<'_, ()> {
        read(&self.locks[(page / CHUNK) as usize])
    }

    /// Locks chunks for an operation that removes pages.
    pub(crate) fn taking(&self, chunks: std::ops::Range<u64>) -> Vec<RwLockWriteGuard<'_, ()>> {
        self.locks[chunks.start as usize..chunks.end as usize].iter().map(write).collect()
    }

    pub(crate) fn is_held(&self, page: u64) -> bool {
        self.held[page as usize].load(Ordering::SeqCst) > 0
    }

    pub(crate) fn hold(&self, pages: PageRange) {
        for page in pages.start()..pages.end() {
            self.held[page as usize].fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::SeqCst)
    }

    pub(crate) fn set_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::SeqCst);
    }

    /// Called before the pin is dropped.
    pub(crate) fn let_go(&self, pages: PageRange) {
        for page in pages.start()..pages.end() {
            let _writing = self.writing(page);
            self.held[page as usize].fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) ram: GuestRam,
    /// Number of forks and resets since its birth.
    pub(crate) depth: usize,
    model: RwLock<Arc<Model>>,
    /// Read by vCPUs while they write. Written by threads that need [`Quiesced`].
    pub(crate) cpus: RwLock<()>,
    /// Read by devices while they begin or perform an operation. Written by threads that need them
    /// paused.
    pub(crate) devices: RwLock<()>,
    pub(crate) chunks: Arc<Chunks>,
}

impl Vm {
    fn of(ram: GuestRam, depth: usize, model: Model) -> Self {
        Self {
            ram,
            depth,
            model: RwLock::new(Arc::new(model)),
            cpus: RwLock::default(),
            devices: RwLock::default(),
            chunks: Arc::new(Chunks::new()),
        }
    }

    pub(crate) fn born(store: &Store, clock: &Arc<Clock>) -> Self {
        let ram = GuestRam::reserve(&layout(), store).unwrap();
        ram.populate().unwrap();
        Self::of(ram, 0, Model::born(clock, PAGES))
    }

    pub(crate) fn adopt(store: &Store, clock: &Arc<Clock>, image: &Image) -> Self {
        let ram = GuestRam::reserve(&layout(), store).unwrap();
        ram.adopt(&image.ram).unwrap();
        Self::of(ram, image.frozen.line.len(), Model::of(clock, &image.frozen))
    }

    pub(crate) fn model(&self) -> Arc<Model> {
        Arc::clone(&read(&self.model))
    }

    /// Begins a new life after a reset.
    pub(crate) fn begin_life(&self, clock: &Arc<Clock>, image: &Frozen) {
        *write(&self.model) = Arc::new(Model::of(clock, image));
    }

    pub(crate) fn cpus_run(&self) -> RwLockReadGuard<'_, ()> {
        read(&self.cpus)
    }

    pub(crate) fn stop_cpus(&self) -> RwLockWriteGuard<'_, ()> {
        write(&self.cpus)
    }

    pub(crate) fn devices_run(&self) -> RwLockReadGuard<'_, ()> {
        read(&self.devices)
    }

    pub(crate) fn stop_devices(&self) -> RwLockWriteGuard<'_, ()> {
        write(&self.devices)
    }

    /// The region that contains `pages`, and their range in it.
    pub(crate) fn region(&self, pages: PageRange) -> (&Arc<GuestRegion>, PageRange) {
        let (region, first) = located(pages.start());
        (&self.ram.regions()[region], PageRange::with_len(first, pages.len()))
    }

    /// The CPU writes its lane of `page`. The caller holds the chunk.
    pub(crate) fn write(&self, model: &Model, page: u64) {
        let begun = model.write(page, Lane::Cpu);
        self.ram.memory().write_slice(&begun.bytes(), address(page)).unwrap();
        begun.done();
    }

    /// The CPU reads and checks `page`.
    pub(crate) fn look(&self, model: &Model, page: u64) -> Result<(), String> {
        let lows = LANES.map(|lane| model.low(page, lane));
        let mut got = [0; PAGE];
        self.ram.memory().read_slice(&mut got, address(page)).unwrap();
        for (lane, low) in LANES.into_iter().zip(lows) {
            let wrong = model.wrong(page, lane, model.span(page, lane, low), &got[lane.offset()..][..LANE]);
            wrong.map_or(Ok(()), |wrong| Err(format!("the CPU reads: {wrong}")))?;
        }
        Ok(())
    }

    /// Checks every byte, while all other threads are stopped.
    pub(crate) fn look_all(&self) -> Result<(), String> {
        let (_cpus, _devices) = (self.stop_cpus(), self.stop_devices());
        let model = self.model();
        (0..PAGES).try_for_each(|page| self.look(&model, page))?;
        self.ram.check(&Quiesced::by(&clade_memory::NoWriters)).map_err(|error| format!("check: {error}"))?;
        self.ram.failure().map_or(Ok(()), |error| Err(format!("the VM's memory is lost: {error}")))
    }
}

/// An image, and its required contents.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) ram: RamImage,
    pub(crate) frozen: Arc<Frozen>,
}

impl Image {
    /// Checks every byte of a new child. The child has no writers.
    pub(crate) fn look_through(&self, child: &Vm) -> Result<(), String> {
        let mut got = [0; PAGE];
        for page in 0..PAGES {
            child.ram.memory().read_slice(&mut got, address(page)).unwrap();
            for lane in LANES {
                let wrong = self.frozen.wrong(page, lane, &got[lane.offset()..][..LANE]);
                wrong.map_or(Ok(()), |wrong| Err(format!("a child is shown: {wrong}")))?;
            }
        }
        Ok(())
    }
}

/// The pages of a pin, counted over both regions.
pub(crate) fn pages_of(pin: &DmaPin, first: u64) -> PageRange {
    PageRange::with_len(first, pin.range().len())
}
