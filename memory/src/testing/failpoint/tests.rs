//! I13, call by call: every operation runs with its first system call failing, then its second, and
//! so on until no call is left to fail; once with that call alone, and once with every later call
//! that allocates memory. Each time the VM must be unchanged, own the same pages, run on, leave no
//! resources behind, and succeed on the next attempt.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use crate::region::pin::{Access, DmaPin, PinLifetime};
use crate::sys::allocated;
use crate::testing::failpoint::{Call, plan};
use crate::units::{PAGE_SIZE, PageRange, join_runs, subtract_runs};
use crate::{
    Backing, DontFork, FreezeMode, GuestRam, GuestRegion, PageSet, Quiesced, RamError, RamImage, RamLayout, Store,
    SuspendFile,
};

/// Pages of the first region, where operations on a region take place.
const PAGES: u64 = 1100;
/// Pages of both regions, numbered through. The second begins behind a gap, so that operations on
/// the whole VM can fail in it after the first is done.
const ALL: u64 = PAGES + 200;
const SECOND: u64 = 1 << 30;

/// Allowed effect of an operation on the contents.
#[derive(Clone, Copy, PartialEq)]
enum Effect {
    /// Unchanged on success and failure.
    None,
    /// These pages become zeros, or the pattern; on failure some or all of them.
    Shows(PageRange, u64),
    /// All pages are as in the image afterwards; torn on a failure half-way.
    Resets,
}

struct Rig {
    store: Store,
    ram: GuestRam,
    want: Vec<u64>,
    image: Option<(RamImage, Vec<u64>)>,
    pins: Vec<DmaPin>,
    empty: GuestRam,
}

fn address(page: u64) -> GuestAddress {
    let start = if page < PAGES { page * PAGE_SIZE } else { SECOND + (page - PAGES) * PAGE_SIZE };
    GuestAddress(start + 64)
}

fn put(ram: &GuestRam, page: u64, word: u64) {
    ram.memory().write_obj(word, address(page)).unwrap();
}

fn word(ram: &GuestRam, page: u64) -> u64 {
    ram.memory().read_obj(address(page)).unwrap()
}

fn contents(ram: &GuestRam) -> Vec<u64> {
    (0..ALL).map(|page| word(ram, page)).collect()
}

fn layout() -> RamLayout {
    RamLayout::of_ranges(&[(GuestAddress(0), PAGES), (GuestAddress(SECOND), ALL - PAGES)]).unwrap()
}

/// The region of a page, and the page's number in it.
fn place(ram: &GuestRam, page: u64) -> (&Arc<GuestRegion>, u64) {
    if page < PAGES { (&ram.regions()[0], page) } else { (&ram.regions()[1], page - PAGES) }
}

impl Rig {
    /// A VM that was frozen before, if `frozen`, with pages of every kind: base or shared, its own,
    /// pinned, reference, no-fork.
    fn new(small: bool, frozen: bool) -> Self {
        let store = if small { Store::open_small() } else { Store::open() }.unwrap();
        let ram = GuestRam::reserve(&layout(), &store).unwrap();
        let empty = GuestRam::reserve(&layout(), &store).unwrap();
        ram.populate().unwrap();
        (0..ALL).for_each(|page| put(&ram, page, page + 1));
        let region = ram.regions()[0].clone();
        region.set_dont_fork(PageRange::new(900, 910), Some(DontFork::Zeroed)).unwrap();
        let mut image = None;
        if frozen {
            let (taken, _) = ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
            let mut seen = contents(&ram);
            seen[900..910].fill(0);
            image = Some((taken, seen));
            let pattern = store.reference_page(&[7; PAGE_SIZE as usize]).unwrap();
            region.map_reference(PageRange::new(40, 60), &pattern).unwrap();
            (100..140).chain(700..720).chain(1030..1040).for_each(|page| put(&ram, page, 1000 + page));
            (1000..1020).step_by(2).for_each(|page| put(&ram, page, 1000 + page));
            (1110..1150).chain(1200..1204).for_each(|page| put(&ram, page, 1000 + page));
        }
        let pins = [(110, 114), (800, 803)]
            .map(|(a, b)| region.pin(PageRange::new(a, b), Access::Write, PinLifetime::LongTerm).unwrap());
        let want = contents(&ram);
        Self { store, ram, want, image, pins: pins.into(), empty }
    }

    fn child(&self, image: &RamImage) -> Vec<u64> {
        let child = GuestRam::reserve(&layout(), &self.store).unwrap();
        child.adopt(image).unwrap();
        contents(&child)
    }

    fn check_table(&self, what: &str) {
        self.ram.check(&Quiesced::by(&crate::NoWriters)).unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    fn bits(&self) -> Vec<bool> {
        let bit = |page| {
            let (region, at) = place(&self.ram, page);
            region.ownership().get(at).0
        };
        (0..ALL).map(bit).collect()
    }

    /// After a failure: the VM still owns its remaining pages, and has no more mappings reserved
    /// than it needs.
    fn check_still_owned(&self, before: &[bool], what: &str) {
        for (region, first) in self.ram.regions().iter().zip([0, PAGES]) {
            let state = region.state();
            let own = region.own(&state).unwrap();
            for page in own.iter().flat_map(|run| run.start..run.end).filter(|page| before[(first + page) as usize]) {
                assert!(region.ownership().get(page).0, "{what}: page {page} from {first} on has lost its bit");
            }
            if state.freezing.is_none() {
                let (promised, mapped) = (state.space.promised(), state.space.mappings().len() as u64);
                assert_eq!(promised, mapped, "{what}: mappings are promised and not made");
            }
        }
    }

    /// The VM runs on: it can write all pages, devices write through their pins, and images see
    /// none of these writes.
    fn check_runs_on(&mut self, what: &str) {
        for pin in &self.pins {
            let first = pin.range().start;
            pin.slice().write_obj(first + 5_000_000, 64).unwrap();
            assert_eq!(word(&self.ram, first), first + 5_000_000, "{what}: the device's write is not seen");
        }
        (0..ALL).for_each(|page| put(&self.ram, page, page + 9_000_000));
        for pin in &self.pins {
            let got: u64 = pin.slice().read_obj(64).unwrap();
            assert_eq!(got, pin.range().start + 9_000_000, "{what}: the device does not see the guest's write");
        }
        if let Some((image, seen)) = &self.image {
            assert_eq!(&self.child(image), seen, "{what}: an older image has changed");
        }
        let (image, _) = self.ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
        let mut want: Vec<u64> = (0..ALL).map(|page| page + 9_000_000).collect();
        want[900..910].fill(0);
        assert_eq!(self.child(&image), want, "{what}: a freeze afterwards is wrong");
    }

    fn check_nothing_is_left(self, what: &str) {
        let Self { store, ram, image, pins, empty, .. } = self;
        drop((pins, image, ram, empty));
        let left = || (store.live_layers(), store.budget().used());
        clade_test_support::wait_eq(&format!("{what}: layers and mappings that are left"), &(0, 0), left);
    }
}

/// The base file of a VM that was never frozen has no page that the VM does not show: nothing would give it back.
fn expect_no_lost_pages(ram: &GuestRam, what: &str) {
    for region in ram.regions() {
        let state = region.state();
        let Some(file) = state.space.base_file().filter(|file| file.is_base()) else { continue };
        let there = allocated(file.as_fd(), region.range()).unwrap();
        let of_file = state.space.map().iter().filter(|(_, source)| Arc::ptr_eq(&source.layer, file));
        let mut shown: Vec<_> = of_file.map(|(range, source)| PageRange::with_len(source.at, range.len())).collect();
        shown.extend(state.space.mappings().base_runs());
        shown.sort_unstable();
        assert_eq!(subtract_runs(&there, &join_runs(&shown, 0)), [], "{what}");
    }
}

/// Runs `op` with every one of its calls failing in turn.
fn walk(name: &str, frozen: bool, effect: Effect, op: impl Fn(&Rig) -> Result<Option<RamImage>, RamError>) {
    let mut failed: BTreeMap<String, u32> = BTreeMap::new();
    let stride = clade_test_support::stride();
    for (kind, (small, for_ever)) in [(false, false), (true, false), (false, true)].into_iter().enumerate() {
        // Each kind starts at another call.
        for nth in (kind as u64 % stride as u64..).step_by(stride) {
            assert!(nth < 2_000, "{name} never gets done");
            let mut rig = Rig::new(small, frozen);
            let what = format!("{name}, call {nth}{} failing", if for_ever { " and all after" } else { "" });
            let before = rig.bits();
            plan().arm(nth, for_ever);
            let done = op(&rig);
            let call = plan().disarm();
            let Some(call) = call else {
                // Fewer calls than that: all of them have been tried.
                done.unwrap_or_else(|error| panic!("{what}: {error:?}, though nothing failed"));
                break;
            };
            if done.is_err() {
                rig.check_still_owned(&before, &what);
            }
            // Of a file in 2 MiB pages, whole ones are given back.
            if small {
                expect_no_lost_pages(&rig.ram, &what);
            }
            *failed.entry(format!("{call:?}")).or_default() += 1;
            check(&mut rig, &what, call, effect, &op, &done);
            drop(done);
            rig.check_nothing_is_left(&what);
        }
    }
    println!("{name}: {failed:?}");
    assert!(!failed.is_empty(), "{name} makes no call that could fail");
}

fn check(
    rig: &mut Rig,
    what: &str,
    call: Call,
    effect: Effect,
    op: &impl Fn(&Rig) -> Result<Option<RamImage>, RamError>,
    done: &Result<Option<RamImage>, RamError>,
) {
    let now = (effect != Effect::Resets || done.is_ok()).then(|| contents(&rig.ram));
    match effect {
        Effect::None => assert_eq!(now.as_ref(), Some(&rig.want), "{what} ({call:?}): the contents have changed"),
        Effect::Shows(range, shown) => {
            let pinned = |page| rig.pins.iter().any(|pin| pin.range().contains(page));
            for (page, got) in (0..).zip(now.unwrap()) {
                let old = rig.want[page as usize];
                let may = range.contains(page) && !pinned(page);
                let must = may && done.is_ok();
                assert!((got == old && !must) || (got == shown && may), "{what} ({call:?}): page {page} is {got}");
            }
        }
        Effect::Resets => {
            if rig.ram.is_inconsistent() {
                assert!(done.is_err());
                let refused = rig.ram.freeze(&Quiesced::by(&crate::NoWriters));
                assert!(matches!(refused, Err(RamError::Inconsistent { .. })), "{what}: frozen half reset");
            } else if done.is_err() {
                assert_eq!(contents(&rig.ram), rig.want, "{what} ({call:?}): refused, and changed all the same");
            }
        }
    }
    if let Ok(Some(image)) = done
        && effect == Effect::None
    {
        let mut want = rig.want.clone();
        want[900..910].fill(0);
        assert_eq!(rig.child(image), want, "{what}: a failure was passed over, and the image is wrong");
    }
    if !rig.ram.is_inconsistent() {
        rig.check_table(what);
    }
    // The next attempt succeeds.
    op(rig).unwrap_or_else(|error| panic!("{what}: and again: {error:?}"));
    rig.check_table(what);
    rig.check_runs_on(what);
}

fn freeze(rig: &Rig, mode: FreezeMode) -> Result<Option<RamImage>, RamError> {
    let (image, _) = rig.ram.freeze_in(mode, &Quiesced::by(&crate::NoWriters))?;
    // A failure after the return undoes the freeze, which is harmless as long as no child was
    // started.
    Ok(image.finish_background().is_ok().then_some(image))
}

#[test]
fn i13_a_freeze_that_fails_anywhere_changes_nothing() {
    walk("first freeze", false, Effect::None, |rig| freeze(rig, FreezeMode::Eager));
    walk("later freeze", true, Effect::None, |rig| freeze(rig, FreezeMode::Eager));
}

#[test]
fn i13_a_background_freeze_that_fails_anywhere_changes_nothing() {
    walk("background freeze", true, Effect::None, |rig| {
        rig.store.start_background()?;
        freeze(rig, FreezeMode::Background)
    });
}

#[test]
fn i13_a_child_that_fails_anywhere_leaves_nothing() {
    walk("adopt", true, Effect::None, |rig| {
        let (image, seen) = rig.image.as_ref().unwrap();
        let adopted = rig.empty.adopt(image);
        match &adopted {
            Ok(()) => {
                assert_eq!(&contents(&rig.empty), seen);
                rig.empty.regions().iter().for_each(|region| region.empty());
            }
            Err(_) => {
                for region in rig.empty.regions() {
                    let state = region.state();
                    assert_eq!(
                        (state.space.mappings().len(), state.space.map().len(), state.space.promised()),
                        (0, 0, 1)
                    );
                    assert_eq!((state.dont_fork.len(), region.ownership().counts(region.range()).exclusive), (0, 0));
                }
                assert!(rig.empty.memory().read_obj::<u64>(GuestAddress(0)).is_err());
                assert!(rig.empty.memory().read_obj::<u64>(GuestAddress(SECOND)).is_err());
            }
        }
        adopted.map(|()| None)
    });
    walk("birth", true, Effect::None, |rig| {
        let base = GuestRam::reserve(&layout(), &rig.store)?;
        base.populate()?;
        assert_eq!(contents(&base), vec![0; ALL as usize]);
        Ok(None)
    });
}

#[test]
fn i13_a_reset_that_fails_half_way_says_so_and_is_mended_by_another() {
    walk("reset", true, Effect::Resets, |rig| {
        // Pins would refuse the reset: this VM is not pinned.
        let vm = GuestRam::reserve(&layout(), &rig.store)?;
        let (image, seen) = rig.image.as_ref().unwrap();
        vm.adopt(image)?;
        let (later, _) = {
            (0..30).for_each(|page| put(&vm, page * 30, 3));
            (300..900).for_each(|page| put(&vm, page, 4));
            vm.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters))?
        };
        (0..30).for_each(|page| put(&vm, page * 31, 5));
        let before = contents(&vm);
        let reset = vm.reset(image, &Quiesced::by(&crate::NoWriters), Duration::ZERO);
        let torn = vm.regions()[0].state().inconsistent;
        match &reset {
            Ok(_) => assert_eq!(&contents(&vm), seen),
            Err(_) if torn => {
                assert!(matches!(vm.freeze(&Quiesced::by(&crate::NoWriters)), Err(RamError::Inconsistent { .. })));
                plan().heal();
                vm.reset(image, &Quiesced::by(&crate::NoWriters), Duration::ZERO)?;
                assert_eq!(&contents(&vm), seen);
            }
            Err(_) => {
                plan().heal();
                assert_eq!(contents(&vm), before, "refused, and changed all the same");
            }
        }
        vm.reset(&later, &Quiesced::by(&crate::NoWriters), Duration::ZERO)?;
        reset.map(|_| None)
    });
}

#[test]
fn i13_what_takes_pages_away_stops_between_two_pages() {
    let range = PageRange::new(90, 850);
    walk("discard", true, Effect::Shows(range, 0), |rig| rig.ram.regions()[0].discard(range).map(|_| None));
    walk("discard of born", false, Effect::Shows(range, 0), |rig| rig.ram.regions()[0].discard(range).map(|_| None));
    let few = PageRange::new(1000, 1060);
    let shown = u64::from_ne_bytes([9; 8]);
    for frozen in [false, true] {
        walk("map_reference", frozen, Effect::Shows(few, shown), |rig| {
            let page = rig.store.reference_page(&[9; PAGE_SIZE as usize])?;
            rig.ram.regions()[0].map_reference(few, &page).map(|()| None)
        });
    }
}

#[test]
fn i13_eviction_and_compaction_change_nothing() {
    let dir = Path::new("/var/tmp");
    for frozen in [false, true] {
        walk("evict", frozen, Effect::None, |rig| {
            let region = &rig.ram.regions()[0];
            region.evict(PageRange::new(90, 850), dir, &Quiesced::by(&crate::NoWriters))?;
            // Pages that have been read back are dropped again.
            assert_eq!(word(&rig.ram, 120), rig.want[120]);
            region.evict(PageRange::new(90, 850), dir, &Quiesced::by(&crate::NoWriters)).map(|_| None)
        });
    }
    walk("compact", true, Effect::None, |rig| {
        freeze(rig, FreezeMode::Eager)?;
        rig.ram.compact(&Quiesced::by(&crate::NoWriters))?;
        let (image, _) = rig.image.as_ref().unwrap();
        image.compact(&rig.store)?;
        Ok(None)
    });
    walk("flatten", true, Effect::None, |rig| {
        let (image, seen) = rig.image.as_ref().unwrap();
        let flat = image.flatten(&rig.store, Backing::Small)?;
        plan().heal();
        assert_eq!(&rig.child(&flat), seen);
        Ok(None)
    });
}

/// Suspends a VM that was frozen or booted, with pages in both regions, `times` times.
fn suspend(rig: &Rig, times: u64) -> Result<Option<RamImage>, RamError> {
    let vm = GuestRam::reserve(&layout(), &rig.store)?;
    match &rig.image {
        Some((image, _)) => vm.adopt(image)?,
        None => vm.populate()?,
    }
    let mut done = Ok(());
    for time in 0..times {
        (time..ALL).step_by(130 + 400 * time as usize).for_each(|page| put(&vm, page, page + 1));
        (700..1000 - 200 * time).for_each(|page| put(&vm, page, 5 + time));
        let bits = |region: &GuestRegion| -> Vec<bool> {
            (0..region.pages()).map(|page| region.ownership().get(page).0).collect()
        };
        let had: Vec<Vec<bool>> = vm.regions().iter().map(|region| bits(region)).collect();
        let before = contents(&vm);
        let file = SuspendFile::create(Path::new("/dev/shm")).map_err(|source| RamError::Suspend { pages: 0, source });
        done = file
            .and_then(|file| vm.suspend(file, &Quiesced::by(&crate::NoWriters), Duration::ZERO))
            .map(|(_, working_set)| vm.read_ahead(&working_set));
        assert!(contents(&vm) == before, "time {time}: {done:?}");
        if done.is_err() {
            plan().heal();
            for (region, had) in vm.regions().iter().zip(&had) {
                let own = region.own(&region.state()).unwrap();
                for page in own.iter().flat_map(|run| run.start..run.end).filter(|page| had[*page as usize]) {
                    assert!(region.ownership().get(page).0, "page {page} has lost its bit");
                }
            }
            break;
        }
    }
    plan().heal();
    vm.check(&Quiesced::by(&crate::NoWriters)).unwrap();
    if rig.store.config().backing == Some(Backing::Small) {
        expect_no_lost_pages(&vm, "suspension");
    }
    for region in vm.regions() {
        let state = region.state();
        assert_eq!(state.space.promised(), state.space.mappings().len() as u64, "promised and not made");
    }
    done.map(|()| None)
}

#[test]
fn i13_a_suspension_that_fails_anywhere_loses_nothing() {
    walk("suspend", true, Effect::None, |rig| suspend(rig, 2));
    walk("suspend of booted", false, Effect::None, |rig| suspend(rig, 1));
}

#[test]
fn i13_a_copy_ahead_that_fails_anywhere_changes_nothing() {
    walk("copy ahead", true, Effect::None, |rig| {
        let vm = GuestRam::reserve(&layout(), &rig.store)?;
        vm.adopt(&rig.image.as_ref().unwrap().0)?;
        (200..210).for_each(|page| put(&vm, page, 1));
        let before = contents(&vm);
        let runs = vec![vec![PageRange::new(90, 300), PageRange::new(500, 501)], vec![PageRange::new(3, 90)]];
        let set = PageSet::new(&layout(), runs).unwrap();
        // A failed copy is not an error of the operation.
        vm.copy_ahead(&set, 500).unwrap();
        let came = vm.written_set(&Quiesced::by(&crate::NoWriters));
        if let Ok((written, came)) = &came {
            assert_eq!((written.pages(), came.hits), (10, 0), "{came:?}");
        }
        assert!(contents(&vm) == before);
        plan().heal();
        vm.check(&Quiesced::by(&crate::NoWriters)).unwrap();
        (0..ALL).for_each(|page| put(&vm, page, 7));
        came.map(|_| None)
    });
}

#[test]
fn i13_a_pin_that_is_refused_leaves_no_pin() {
    walk("pin", true, Effect::None, |rig| {
        let region = &rig.ram.regions()[0];
        let before = region.ownership().counts(region.range()).pins;
        let pinned = region.pin(PageRange::new(90, 700), Access::Read, PinLifetime::LongTerm);
        if pinned.is_err() {
            assert_eq!(region.ownership().counts(region.range()).pins, before);
        }
        pinned.map(|_| None).map_err(|error| RamError::Copy { pages: 0, source: std::io::Error::other(error) })
    });
}

/// The guard of a VM's pause may outlive a panic, and the VM with it.
#[test]
fn i13_a_reset_that_panics_half_way_is_known_to_be_inconsistent() {
    let stopped = crate::NoWriters;
    let mut torn = 0;
    for call in [Call::Map, Call::Advise, Call::Copy, Call::Scan] {
        for nth in 0.. {
            let rig = Rig::new(true, true);
            let vm = GuestRam::reserve(&layout(), &rig.store).unwrap();
            let (image, seen) = rig.image.as_ref().unwrap();
            vm.adopt(image).unwrap();
            (0..ALL).step_by(3).for_each(|page| put(&vm, page, 5));
            vm.freeze_in(FreezeMode::Eager, &Quiesced::by(&stopped)).unwrap();
            (0..ALL).step_by(2).for_each(|page| put(&vm, page, 6));
            let before = contents(&vm);
            plan().before(call, nth, || panic!("asked to panic"));
            let reset = || vm.reset(image, &Quiesced::by(&stopped), Duration::ZERO).map(|_| ());
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(reset));
            plan().forget_action();
            if let Ok(done) = done {
                done.unwrap();
                break;
            }
            match vm.freeze(&Quiesced::by(&stopped)) {
                Err(RamError::Inconsistent { .. }) => torn += 1,
                Err(error) => panic!("{call:?} {nth}: {error}"),
                Ok(_) => assert!(contents(&vm) == before, "{call:?} {nth}: frozen half reset"),
            }
            reset().unwrap();
            assert!(&contents(&vm) == seen, "{call:?} {nth}: put back by another");
        }
    }
    assert!(torn > 0, "each panic was before the first change");
}

/// A page that is lost while memory is frozen would be a page of zeros in the image.
#[test]
fn i13_memory_that_is_lost_during_a_freeze_is_not_given_to_children() {
    let store = Store::open_small().unwrap();
    let mut acted = 0;
    for nth in 0.. {
        let file =
            std::fs::File::from(rustix::fs::memfd_create("clade-layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let second = ALL - PAGES;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; (second * PAGE_SIZE) as usize], 0).unwrap();
        let layer = store.file_layer(file.try_clone().unwrap(), second).unwrap();
        let mut map = crate::ImageMap::new();
        map.insert(PageRange::new(0, second), crate::LayerSource { layer, at: 0 });
        let parts = vec![(crate::ImageMap::new(), Vec::new()), (map, Vec::new())];
        let image = RamImage::from_parts(&store, &layout(), parts).unwrap();
        let vm = GuestRam::reserve(&layout(), &store).unwrap();
        vm.adopt(&image).unwrap();
        let other = vm.clone();
        plan().before(Call::Scan, nth, move || {
            file.set_len(0).unwrap();
            word(&other, PAGES + 30);
        });
        let frozen = vm.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters));
        if !plan().has_acted() {
            break;
        }
        acted += 1;
        assert!(matches!(frozen, Err(RamError::Lost(_))), "scan {nth}");
    }
    plan().forget_action();
    assert!(acted > 0, "a freeze that scans nothing");
}
