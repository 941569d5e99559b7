//! What needs the thread to stand still, or to fail, at a known place. The rest is in `tests/background.rs`.

mod over;
mod short;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::freeze::background::{FillError, Shared};
use crate::region::pin::{Access, PinLifetime};
use crate::sys::small_file;
use crate::testing::failpoint::Call;
use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange};
use crate::{FreezeMode, FreezeReport, GuestRam, Quiesced, RamError, RamImage, RamLayout, Store};

/// What tests may do to the background thread.
#[derive(Debug)]
pub(crate) struct Hooks {
    /// Only faults are answered.
    hold: AtomicBool,
    /// Pages that may still be copied before copying fails.
    left: AtomicU64,
    panic: AtomicBool,
    /// Faults that are read are not answered yet.
    hold_answers: AtomicBool,
    /// Faults that have been read.
    faults_read: AtomicU64,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            hold: AtomicBool::new(false),
            left: AtomicU64::new(u64::MAX),
            panic: AtomicBool::new(false),
            hold_answers: AtomicBool::new(false),
            faults_read: AtomicU64::new(0),
        }
    }
}

impl Hooks {
    pub(crate) fn hold(&self) {
        self.hold.store(true, Ordering::Release);
    }

    /// No page can be copied any more.
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

/// A frozen parent whose pages have been written since: what a freeze in the background has to copy.
struct Rig {
    store: Store,
    engine: Arc<Shared>,
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

    /// Freezes with the thread held: everything is pending but what faults ask for.
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

/// What the kernel says of an access to `page`, without a signal.
fn touch(ram: &GuestRam, page: u64) -> std::io::Result<()> {
    let sink = small_file(1).unwrap();
    let from = ram.regions()[0].host_address() + page * PAGE_SIZE;
    // SAFETY: the kernel reads the address, or says that it cannot.
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
        let bg_copy = image.bg_copies().next().unwrap();
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
    // Longer than what is protected beside the pages themselves: the copier does not see these written.
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
        // As a device would: through the frames, ignores_pins of protection (here the early pin's and the pin's own
        // addresses, by the kernel).
        for pin in [&early, &pin] {
            pin.slice().write_slice(&vec![0x99; pin.len()], 0).unwrap();
        }
        rig.let_run();
        image.finish_background().unwrap();
        expect_image(&rig, &image, &MANY);
        rig.parent.finish_background().unwrap();
        let frame = |page| region.store.pagemap().owned_runs(&region.at, PageRange::with_len(page, 1)).unwrap();
        assert_eq!(frame(600).len(), 1, "I3: a pinned page is not shared back");
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
            // A child frozen while what it was given was pending.
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
fn a_layer_nobody_wants_is_not_filled() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let Rig { store, engine, parent } = rig;
        let child = GuestRam::reserve(image.layout(), &store).unwrap();
        child.adopt(&image).unwrap();
        drop((child, image, parent));
        store.wait_reclaimed(std::time::Duration::from_secs(60));
        assert_eq!(store.live_layers(), 0);
        assert!(engine.index().targets.is_empty(), "no address is watched any more");
        engine.hooks.hold.store(false, Ordering::Release);
        engine.ring();
        let begun = Instant::now();
        while !engine.index().jobs.is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(5));
            thread::yield_now();
        }
        assert_eq!(store.budget().used(), 0);
    }
}

/// More runs than a child may have mappings: some are copied into it, from a layer that is not complete.
#[test]
fn a_child_that_copies_short_runs_waits_for_them() {
    let store = Store::open_small().unwrap();
    let engine = store.background().unwrap();
    let pages = 2500 * 20;
    let parent = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), &store).unwrap();
    parent.populate().unwrap();
    parent.freeze(&Quiesced::by(&crate::NoWriters)).unwrap();
    for n in 0..2500 {
        write(&parent, n * 20, mark(n));
    }
    engine.hooks.hold.store(true, Ordering::Release);
    let (image, report) = parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap();
    assert_eq!(report.pending, 2500);
    let child = GuestRam::reserve(image.layout(), &store).unwrap();
    child.adopt(&image).unwrap();
    assert!(child.stats().unwrap().exclusive > 0, "short runs were copied");
    for n in 0..2500 {
        assert_eq!(read(&child, n * 20), mark(n));
        assert_eq!(read(&child, n * 20 + 1), 0);
    }
}

fn is_lost(result: std::io::Result<()>) -> bool {
    matches!(result.map_err(|e| e.raw_os_error()), Err(Some(libc::EFAULT)))
}

fn expect_failed(rig: &Rig, image: &RamImage, child: &GuestRam, told: &mpsc::Receiver<String>) {
    // I13: the parent is whole, and writable.
    for page in 0..PAGES {
        assert_eq!(read(&rig.parent, page), all(&MANY, page), "page {page:#x}");
    }
    write(&rig.parent, 700, 0x70);
    write(&rig.parent, 700, mark(700));
    // Nobody starts from the image any more. (A parent's write is let go a moment before the failure is known to all.)
    let deadline = Instant::now() + Duration::from_secs(5);
    while image.failure().is_none() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(image.failure().is_some() && !image.is_pending());
    let late = GuestRam::reserve(image.layout(), &rig.store).unwrap();
    assert!(matches!(late.adopt(image), Err(RamError::Lost(_))));
    // A child that has started knows, and reads no zeros.
    assert!(child.failure().is_some());
    told.recv_timeout(Duration::from_secs(5)).expect("the callback");
    assert!(is_lost(touch(child, 1050)), "canon 32: an error, never zeros");
    assert!(touch(child, 1300).is_ok(), "what was never in the delta is still there");
    assert!(child.regions()[0].pin(PageRange::new(1050, 1051), Access::Write, PinLifetime::Transient).is_err());
    assert!(matches!(child.freeze(&Quiesced::by(&crate::NoWriters)), Err(RamError::Lost(_))));
    // Discarded, a lost page does not come back as zeros either.
    let at = (child.regions()[0].host_address() + 1050 * PAGE_SIZE) as *mut libc::c_void;
    // SAFETY: a page of the child's own memory, to which no Rust reference exists.
    assert_eq!(unsafe { libc::madvise(at, PAGE_SIZE as usize, libc::MADV_DONTNEED) }, 0);
    assert!(is_lost(touch(child, 1050)), "canon 32");
    // The next freeze goes as if the failed one had never been.
    let (again, _) = rig.parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap();
    expect_image(rig, &again, &MANY);
    again.finish_background().unwrap();
    expect_image(rig, &again, &MANY);
}

fn tell(child: &GuestRam) -> mpsc::Receiver<String> {
    let (tell, told) = mpsc::channel();
    child.on_failure(move |error| drop(tell.send(error.to_string())));
    told
}

#[test]
fn i13_a_copy_that_fails_leaves_the_parent_whole_and_stops_the_child() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let told = tell(&child);
        assert_eq!(read(&child, 10), mark(10));
        // A child's access waits while the copy fails.
        let waiting = child.clone();
        rig.engine.hooks.left.store(0, Ordering::Release);
        let waiter = thread::spawn(move || touch(&waiting, 1040));
        assert!(is_lost(waiter.join().unwrap()), "canon 32");
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        assert_eq!(read(&child, 10), mark(10), "what it has got it keeps");
        rig.let_run();
        expect_failed(&rig, &image, &child, &told);
    }
}

#[test]
fn i13_a_parents_write_survives_a_copy_that_fails() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let told = tell(&child);
        rig.engine.hooks.left.store(0, Ordering::Release);
        write(&rig.parent, 600, mark(600));
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        rig.let_run();
        expect_failed(&rig, &image, &child, &told);
    }
}

#[test]
fn a_thread_that_panics_stops_the_child_and_goes_on_for_others() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let told = tell(&child);
        rig.engine.hooks.panic.store(true, Ordering::Release);
        rig.let_run();
        told.recv_timeout(Duration::from_secs(5)).expect("the callback");
        let told = tell(&child);
        expect_failed(&rig, &image, &child, &told);
    }
}

#[test]
fn a_refused_freeze_leaves_nothing_protected() {
    let rig = Rig::new(Store::open_small().unwrap(), &MANY);
    rig.engine.lose_userfaultfd();
    let refused = rig.parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters));
    assert!(matches!(refused, Err(RamError::Background(_))), "canon 25: by name");
    let (image, report) = rig.parent.freeze_in(FreezeMode::Auto, &Quiesced::by(&crate::NoWriters)).unwrap();
    assert_eq!(report.pending, 0, "eager instead");
    expect_image(&rig, &image, &MANY);
}

/// A fault that was read is answered when the copy has gone on: the page has been released, or is mapped over the delta by now.
#[test]
fn a_fault_that_is_answered_late_costs_the_parent_nothing() {
    for store in stores() {
        // How far the copy goes on meanwhile: to the end, or step by step.
        for steps in [1, 5, 13, 14, 15, 16, 17, 18, u32::MAX] {
            let rig = Rig::new(store.clone(), &MANY);
            let (image, _) = rig.freeze_held();
            let hooks = &rig.engine.hooks;
            let before = hooks.faults_read.load(Ordering::Acquire);
            hooks.hold_answers.store(true, Ordering::Release);
            let writer = {
                let parent = rig.parent.clone();
                thread::spawn(move || write(&parent, 600, 0x66))
            };
            while hooks.faults_read.load(Ordering::Acquire) == before {
                thread::yield_now();
            }
            {
                let state = rig.parent.regions()[0].state();
                let bg_copy = state.freezing.as_ref().unwrap().layer.bg_copy().unwrap();
                (0..steps).take_while(|_| !bg_copy.step()).for_each(drop);
            }
            hooks.hold_answers.store(false, Ordering::Release);
            writer.join().unwrap();
            rig.let_run();
            rig.parent.finish_background().unwrap();
            assert!(image.failure().is_none(), "after {steps} steps: {:?}", image.failure());
            expect_image(&rig, &image, &MANY);
            // Everything is where the records say: what the VM owns and what later images have.
            rig.parent.check(&Quiesced::by(&crate::NoWriters)).unwrap();
            write(&rig.parent, 700, 0x77);
            let now = |page| match page {
                600 => 0x66,
                700 => 0x77,
                _ => all(&MANY, page),
            };
            for _ in 0..2 {
                let (later, _) = rig.parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
                let child = rig.child(&later);
                (0..PAGES).for_each(|page| {
                    assert_eq!(read(&child, page), now(page), "after {steps} steps, page {page}");
                    assert_eq!(read(&rig.parent, page), now(page), "after {steps} steps, the parent's page {page}");
                });
            }
        }
    }
}

/// Every lift of a protection fails in turn, alone: before anything is mapped over the delta, between, and after. Nobody loses a byte.
#[test]
fn i14_a_release_that_fails_after_a_remap_loses_nothing() {
    let mut tried = 0;
    for nth in 0.. {
        let rig = Rig::new(Store::open_small().unwrap(), &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        write(&rig.parent, 600, 0x66);
        crate::testing::failpoint::plan().fail_call(Call::Release, nth);
        rig.parent.finish_background().unwrap();
        let fired = crate::testing::failpoint::plan().disarm().is_some();
        let want = |page| if page == 600 { 0x66 } else { all(&MANY, page) };
        for round in 0..2u8 {
            let (later, _) = rig.parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
            let second = rig.child(&later);
            for page in (0..PAGES).filter(|page| round == 0 || *page != 800) {
                assert_eq!(read(&second, page), want(page), "release {nth} failing, freeze {round}: page {page}");
                assert_eq!(read(&rig.parent, page), want(page), "release {nth} failing: the parent's page {page}");
            }
            write(&rig.parent, 800, 0x88);
        }
        if image.failure().is_none() {
            (0..PAGES).for_each(|page| assert_eq!(read(&child, page), all(&MANY, page), "the child's page {page}"));
        }
        if !fired {
            break;
        }
        tried += 1;
    }
    assert!(tried > 3, "{tried} releases");
}

/// Who is told may ask the VM anything: no lock is held, whoever noticed.
#[test]
fn a_callback_may_ask_the_vm() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let (tell, told) = mpsc::channel();
        let (own, parent) = (child.clone(), rig.parent.clone());
        child.on_failure(move |_| {
            let asked =
                (own.stats().is_ok(), own.finish_background().is_err(), parent.stats().is_ok(), own.is_inconsistent());
            tell.send(asked).unwrap();
        });
        rig.engine.hooks.left.store(0, Ordering::Release);
        // Noticed by a thread that holds the child's lock.
        let noticed = thread::spawn(move || child.finish_background().is_err());
        let asked = told.recv_timeout(Duration::from_secs(20)).expect("told, and not in a deadlock");
        assert!(noticed.join().unwrap());
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        assert_eq!(asked, (true, true, true, false));
        rig.let_run();
    }
}
