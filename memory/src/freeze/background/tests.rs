//! Tests in which the thread stops or fails at a known place. `tests/background.rs` has the others.

mod failure;
mod over;
mod short;

use std::any::Any;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use clade_test_support::{receive, wait_until};
use vm_memory::{Bytes, GuestAddress};

use crate::freeze::background::{BackgroundCopy, CopyService};
use crate::layer::fill::LayerFill;
use crate::lost::FillError;
use crate::region::pin::{Access, PinLifetime};
use crate::sys::small_file;
use crate::testing::failpoint::Call;
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange};
use crate::{FreezeMode, FreezeReport, GuestRam, Quiesced, RamError, RamImage, RamLayout, Store};

/// Controls of the background thread for tests.
#[derive(Debug)]
pub(crate) struct Hooks {
    /// Only faults are answered.
    hold: AtomicBool,
    /// Number of pages that can still be copied before copying fails.
    left: AtomicU64,
    panic: AtomicBool,
    /// Each copy takes this long.
    delay: AtomicU64,
    /// Faults are read and not answered yet.
    hold_answers: AtomicBool,
    /// Number of faults read.
    faults_read: AtomicU64,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            hold: AtomicBool::new(false),
            left: AtomicU64::new(u64::MAX),
            panic: AtomicBool::new(false),
            delay: AtomicU64::new(0),
            hold_answers: AtomicBool::new(false),
            faults_read: AtomicU64::new(0),
        }
    }
}

impl Hooks {
    pub(crate) fn hold(&self) {
        self.hold.store(true, Ordering::Release);
    }

    /// Makes all further copies fail.
    pub(crate) fn fail_copies(&self) {
        self.left.store(0, Ordering::Release);
    }

    pub(crate) fn held(&self) -> bool {
        self.hold.load(Ordering::Acquire)
    }

    pub(crate) fn between_read_and_answer(&self, faults: &[crate::sys::Fault]) {
        self.faults_read.fetch_add(faults.len() as u64, Ordering::AcqRel);
        while !faults.is_empty() && self.hold_answers.load(Ordering::Acquire) {
            thread::sleep(Duration::from_micros(50));
        }
    }

    pub(crate) fn before_copy(&self, run: PageRange) -> Result<(), FillError> {
        assert!(!self.panic.swap(false, Ordering::AcqRel), "asked to panic");
        thread::sleep(Duration::from_millis(self.delay.load(Ordering::Acquire)));
        let left = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(run.len()) };
        match self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, left) {
            Ok(_) => Ok(()),
            Err(_) => Err(FillError::Copy {
                page: run.start,
                pages: run.len(),
                source: std::io::Error::from_raw_os_error(libc::ENOSPC),
            }),
        }
    }
}

const PAGES: u64 = 3 * BLOCK_PAGES + 40;
const BYTES: u64 = PAGES * PAGE_SIZE;

/// A frozen parent whose pages were written since, for a background freeze to copy.
struct Rig {
    store: Store,
    engine: Arc<CopyService>,
    parent: GuestRam,
}

fn stores() -> [Store; 2] {
    [Store::open().unwrap(), Store::open_small().unwrap()]
}

impl Rig {
    /// With `dirty` pages written with their own number, on top of a layer of 0xee.
    fn new(store: Store, dirty: &[PageRange]) -> Self {
        let engine = store.background().unwrap();
        let parent = GuestRam::reserve(&RamLayout::new(BYTES).unwrap(), &store).unwrap();
        parent.populate().unwrap();
        for page in 0..PAGES {
            write(&parent, page, 0xee);
        }
        parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
        let rig = Self { store, engine, parent };
        rig.dirty(dirty);
        rig
    }

    fn dirty(&self, runs: &[PageRange]) {
        for page in runs.iter().flat_map(|run| run.start..run.end) {
            write(&self.parent, page, mark(page));
        }
    }

    /// Freezes with the thread held: all pages are pending except those that faults request.
    fn freeze_held(&self) -> (RamImage, FreezeReport) {
        self.engine.hooks.hold.store(true, Ordering::Release);
        self.parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap()
    }

    fn let_run(&self) {
        self.engine.hooks.hold.store(false, Ordering::Release);
        self.engine.ring();
    }

    fn child(&self, image: &RamImage) -> GuestRam {
        let child = GuestRam::reserve(image.layout(), &self.store).unwrap();
        child.adopt(image).unwrap();
        child
    }
}

fn mark(page: u64) -> u8 {
    (page % 200) as u8 + 1
}

fn write(ram: &GuestRam, page: u64, byte: u8) {
    ram.memory().write_slice(&[byte; PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE)).unwrap();
}

fn read(ram: &GuestRam, page: u64) -> u8 {
    let mut got = [0; PAGE_SIZE as usize];
    ram.memory().read_slice(&mut got, GuestAddress(page * PAGE_SIZE)).unwrap();
    assert!(got.iter().all(|byte| *byte == got[0]), "page {page:#x} is torn");
    got[0]
}

/// Result of a kernel access to `page`, without a signal.
fn touch(ram: &GuestRam, page: u64) -> std::io::Result<()> {
    let sink = small_file(1).unwrap();
    let from = ram.regions()[0].host_address() + page * PAGE_SIZE;
    // SAFETY: the kernel reads the address, or returns an error.
    let wrote = unsafe { libc::pwrite(sink.as_raw_fd(), from as *const libc::c_void, PAGE_SIZE as usize, 0) };
    if wrote < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn all(dirty: &[PageRange], page: u64) -> u8 {
    if dirty.iter().any(|run| run.contains(page)) { mark(page) } else { 0xee }
}

fn expect_image(rig: &Rig, image: &RamImage, dirty: &[PageRange]) {
    let child = rig.child(image);
    for page in 0..PAGES {
        assert_eq!(read(&child, page), all(dirty, page), "page {page:#x}");
    }
}

const MANY: [PageRange; 3] = [PageRange::new(3, 200), PageRange::new(500, 1100), PageRange::new(1200, 1260)];

/// The background copy that fills a layer.
fn background(fill: &Arc<dyn LayerFill>) -> &BackgroundCopy {
    let fill: &dyn Any = &**fill;
    fill.downcast_ref().unwrap()
}

#[test]
fn a_childs_read_waits_for_its_page_and_brings_no_zeros_with_it() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, report) = rig.freeze_held();
        assert_eq!(report.pending, report.copied);
        let (child, sibling) = (rig.child(&image), rig.child(&image));
        assert!(image.is_pending());
        // One page, then its neighbours in the same 2 MiB, out of order, by two children.
        for page in [700, 701, 699, 512, 1023, 1024, 3, 0, 199, 200, 1259] {
            assert_eq!(read(&child, page), all(&MANY, page), "page {page:#x}");
            assert_eq!(read(&sibling, page), all(&MANY, page), "page {page:#x}");
        }
        assert!(image.is_pending(), "the thread is held: only what was touched is there");
        for page in (0..PAGES).rev() {
            assert_eq!(read(&child, page), all(&MANY, page), "page {page:#x}");
        }
        write(&child, 700, 0x77);
        assert_eq!(read(&sibling, 700), mark(700));
        rig.let_run();
        image.finish_background().unwrap();
        assert_eq!(read(&child, 700), 0x77);
        expect_image(&rig, &image, &MANY);
    }
}

#[test]
fn a_parents_write_waits_until_its_page_is_copied() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, report) = rig.freeze_held();
        let before = report.pending;
        write(&rig.parent, 600, 0x66);
        assert_eq!(read(&rig.parent, 600), 0x66);
        let bg_copy = background(image.bg_copies().next().unwrap());
        assert!(bg_copy.missing() < before && bg_copy.missing() > 0, "copied around the fault, and no more");
        expect_image(&rig, &image, &MANY);
        for page in 0..PAGES {
            write(&rig.parent, page, 0x67);
        }
        expect_image(&rig, &image, &MANY);
        rig.let_run();
        rig.parent.finish_background().unwrap();
        expect_image(&rig, &image, &MANY);
        assert!((0..PAGES).all(|page| read(&rig.parent, page) == 0x67));
    }
}

#[test]
fn gaps_that_were_closed_come_from_beneath() {
    let short: Vec<PageRange> = (0..300).map(|n| PageRange::with_len(n * 4, 2)).collect();
    // Longer than the range protected around the pages themselves: the copier does not see these
    // writes.
    let long: Vec<PageRange> = (0..75).map(|n| PageRange::with_len(n * 20, 14)).collect();
    for dirty in [short, long] {
        for store in stores() {
            let rig = Rig::new(store, &dirty);
            let (image, report) = rig.freeze_held();
            assert!(report.copied > crate::units::pages_in(&dirty), "gaps were closed");
            for page in 0..PAGES {
                write(&rig.parent, page, 0x68);
            }
            rig.let_run();
            image.finish_background().unwrap();
            expect_image(&rig, &image, &dirty);
            rig.parent.finish_background().unwrap();
            assert!((0..PAGES).all(|page| read(&rig.parent, page) == 0x68), "no write is lost");
        }
    }
}

#[test]
fn d4_a_pin_of_a_page_not_copied_yet_copies_it_first() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let region = &rig.parent.regions()[0];
        let early = region.pin(PageRange::new(50, 60), Access::Write, PinLifetime::LongTerm).unwrap();
        let (image, report) = rig.freeze_held();
        assert_eq!(report.pinned, 10);
        assert_eq!(report.pending, report.copied - 10, "I3: pinned pages are copied before it returns");
        let pin = region.pin(PageRange::new(590, 610), Access::Write, PinLifetime::LongTerm).unwrap();
        // A device that writes only after all pages are copied: no fault precedes its write.
        let late = region.pin(PageRange::new(700, 710), Access::Write, PinLifetime::LongTerm).unwrap();
        // Like a device: through the frames, regardless of protection (here the kernel writes at
        // the early pin's and the pin's own addresses).
        for pin in [&early, &pin] {
            pin.slice().write_slice(&vec![0x99; pin.len()], 0).unwrap();
        }
        rig.let_run();
        image.finish_background().unwrap();
        expect_image(&rig, &image, &MANY);
        rig.parent.finish_background().unwrap();
        let frame = |page| region.store.pagemap().owned_runs(&region.at, PageRange::with_len(page, 1)).unwrap();
        assert_eq!(frame(600).len(), 1, "I3: a pinned page is not shared back");
        assert_eq!(frame(705).len(), 1, "I3: nor is one that was not written");
        rig.parent.check(&Quiesced::by(&crate::NoWriters)).unwrap();
        late.slice().write_slice(&vec![0x88; late.len()], 0).unwrap();
        assert_eq!(read(&rig.parent, 705), 0x88);
        assert_eq!(read(&rig.parent, 600), 0x99);
        assert_eq!(read(&rig.parent, 55), 0x99);
    }
}

#[test]
fn a_pin_in_a_child_waits_for_its_pages() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let pin = child.regions()[0].pin(PageRange::new(190, 210), Access::Write, PinLifetime::Transient).unwrap();
        assert_eq!(read(&child, 195), mark(195));
        pin.slice().write_slice(&vec![0x99; pin.len()], 0).unwrap();
        rig.let_run();
        image.finish_background().unwrap();
        assert_eq!(read(&child, 195), 0x99);
        expect_image(&rig, &image, &MANY);
    }
}

#[test]
fn copied_runs_are_shared_back_and_written_pages_are_not() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, report) = rig.freeze_held();
        write(&rig.parent, 600, 0x66);
        rig.let_run();
        rig.parent.finish_background().unwrap();
        assert!(!image.is_pending());
        let stats = rig.parent.stats().unwrap();
        assert!(stats.exclusive < report.copied / 2, "{stats:?}");
        assert!((0..PAGES).all(|page| read(&rig.parent, page) == if page == 600 { 0x66 } else { all(&MANY, page) }));
        let (_, again) = rig.parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
        assert!(again.copied < report.copied / 2, "what was shared back is not copied again: {again:?}");
    }
}

/// Runs are chosen in one step and mapped over the delta in the next, with a possible write in
/// between.
#[test]
fn a_write_between_any_two_steps_is_the_parents_alone() {
    for store in stores() {
        for steps in 0.. {
            let rig = Rig::new(store.clone(), &MANY);
            let (image, _) = rig.freeze_held();
            let bg_copy = background(image.bg_copies().next().unwrap());
            let is_over = (0..steps).any(|_| bg_copy.step());
            write(&rig.parent, 600, 0x66);
            rig.let_run();
            rig.parent.finish_background().unwrap();
            let expected = |page| if page == 600 { 0x66 } else { all(&MANY, page) };
            assert!((0..PAGES).all(|page| read(&rig.parent, page) == expected(page)), "after {steps} steps");
            expect_image(&rig, &image, &MANY);
            if is_over {
                assert!(steps > 4, "{steps} steps have no middle");
                break;
            }
        }
    }
}

#[test]
fn frozen_again_while_pending() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (first, _) = rig.freeze_held();
        let child = rig.child(&first);
        write(&rig.parent, 700, 0x70);
        let (second, _) = rig.freeze_held();
        assert!(!first.is_pending(), "finished first");
        let grandchild = {
            // A child that was frozen while its adopted pages were pending.
            let (image, _) = child.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap();
            rig.child(&image)
        };
        let of_second = rig.child(&second);
        for page in 0..PAGES {
            assert_eq!(read(&grandchild, page), all(&MANY, page));
            assert_eq!(read(&of_second, page), if page == 700 { 0x70 } else { all(&MANY, page) });
        }
    }
}

#[test]
fn a_child_frozen_while_its_layer_is_pending() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        for page in 300..400 {
            write(&child, page, 0x33);
        }
        write(&child, 650, 0x34);
        let (nested, _) = child.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap();
        assert!(nested.is_pending());
        for page in 0..PAGES {
            write(&child, page, 1);
            write(&rig.parent, page, 2);
        }
        let grandchild = rig.child(&nested);
        for page in 0..PAGES {
            let want = match page {
                300..400 => 0x33,
                650 => 0x34,
                _ => all(&MANY, page),
            };
            assert_eq!(read(&grandchild, page), want, "page {page:#x}");
        }
        expect_image(&rig, &image, &MANY);
    }
}

#[test]
fn a_parent_that_goes_leaves_its_children_whole() {
    for store in stores() {
        let mut rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let early = rig.child(&image);
        let other = GuestRam::reserve(rig.parent.layout(), &rig.store).unwrap();
        drop(std::mem::replace(&mut rig.parent, other));
        assert!(image.is_pending());
        assert_eq!(read(&early, 700), mark(700), "while the thread is held");
        rig.let_run();
        expect_image(&rig, &image, &MANY);
        image.finish_background().unwrap();
        expect_image(&rig, &image, &MANY);
        assert_eq!(read(&early, 701), mark(701));
    }
}

#[test]
fn the_store_finishes_before_it_goes() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let budget = rig.store.clone();
        drop(rig);
        assert_eq!(budget.budget().used(), 1, "the background copy's own mapping");
        drop(budget);
        assert!(!image.is_pending());
        let elsewhere = Store::open_small().unwrap();
        let child = GuestRam::reserve(image.layout(), &elsewhere).unwrap();
        child.adopt(&image).unwrap();
        assert!((0..PAGES).all(|page| read(&child, page) == all(&MANY, page)));
    }
}

#[test]
fn the_store_waits_for_a_slow_copy() {
    let rig = Rig::new(Store::open_small().unwrap(), &MANY);
    let (image, _) = rig.freeze_held();
    rig.engine.hooks.delay.store(20, Ordering::Release);
    drop(rig);
    assert!(!image.is_pending() && image.failure().is_none(), "the last handle of the store waits until all is copied");
}

/// A blocking bell would stop the thread that rings it, and a child process could ring an inherited
/// one.
#[test]
fn the_bell_blocks_nobody_and_is_not_inherited() {
    let store = Store::open_small().unwrap();
    let engine = store.background().unwrap();
    let flags = rustix::fs::fcntl_getfl(&engine.bell).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    assert!(rustix::io::fcntl_getfd(&engine.bell).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn a_layer_nobody_wants_is_not_filled() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let Rig { store, engine, parent } = rig;
        let child = GuestRam::reserve(image.layout(), &store).unwrap();
        child.adopt(&image).unwrap();
        drop((child, image, parent));
        store.expect_no_layers();
        assert!(engine.index().targets.is_empty(), "no address is watched any more");
        engine.hooks.hold.store(false, Ordering::Release);
        engine.ring();
        wait_until("the copy thread drops the job", || engine.index().jobs.is_empty());
        assert_eq!(store.budget().used(), 0);
    }
}
