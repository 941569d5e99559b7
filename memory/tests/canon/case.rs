//! The axes, and the steps of a row along them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clade_memory::{
    Access, FreezeMode, FreezeReport, ImageMap, LayerSource, PageRange, PinLifetime, Quiesced, RamError, RamImage,
    RefPage, Store,
};

use crate::vm::{ALL, ARENA, Content, Image, Vm, WIDE, WRITTEN, seeded};

/// State of a row's pages at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Written since birth, never frozen.
    Birth,
    /// Provided by a layer.
    Shared,
    /// The VM's own again after a freeze.
    Exclusive,
    /// Half of them show a pattern, half zeros.
    Reference,
    /// In a layer that the background has still to fill.
    BackgroundCopy,
    /// In a file on a disk.
    Evicted,
    /// In a snapshot's file, mapped and not yet touched.
    Restored,
    /// Shared, exclusive, zero and reference pages in turn, within each block.
    Mixed,
    /// All but one page of their block discarded.
    OneLeft,
}

impl State {
    pub(crate) const ALL: [Self; 9] = [
        Self::Birth,
        Self::Shared,
        Self::Exclusive,
        Self::Reference,
        Self::BackgroundCopy,
        Self::Evicted,
        Self::Restored,
        Self::Mixed,
        Self::OneLeft,
    ];

    /// Whether the state belongs to rows 22 and 23.
    pub(crate) fn is_another_rows(self) -> bool {
        matches!(self, Self::Mixed | Self::OneLeft | Self::BackgroundCopy | Self::Evicted | Self::Restored)
    }
}

/// The writer and the observer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Actor {
    Cpu,
    /// The CPU writes while a device holds a long read pin; the device must see the write.
    DeviceRead,
    /// A device writes through a pin.
    DeviceWrite,
}

impl Actor {
    pub(crate) const ALL: [Self; 3] = [Self::Cpu, Self::DeviceRead, Self::DeviceWrite];
}

/// Order of the observations of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// A child is started at once.
    Fork,
    /// The VM writes first; the child is made of the image afterwards.
    Snapshot,
    /// A child is started at once; the VM writes, and is reset to the image.
    Reset,
}

impl Order {
    pub(crate) const ALL: [Self; 3] = [Self::Fork, Self::Snapshot, Self::Reset];
}

/// One combination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Axis {
    pub(crate) state: State,
    pub(crate) actor: Actor,
    pub(crate) order: Order,
    pub(crate) mode: FreezeMode,
}

impl fmt::Debug for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} pages, {:?}, {:?}, {:?} freeze", self.state, self.actor, self.order, self.mode)
    }
}

impl Axis {
    /// All combinations.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        State::ALL.into_iter().flat_map(|state| {
            Actor::ALL.into_iter().flat_map(move |actor| {
                Order::ALL.into_iter().flat_map(move |order| {
                    [FreezeMode::Eager, FreezeMode::Background].into_iter().map(move |mode| Self {
                        state,
                        actor,
                        order,
                        mode,
                    })
                })
            })
        })
    }
}

/// Written before a row's own writes.
const AGAIN: u16 = 9;
/// Written by the VM between an image and its use.
const LATER: u16 = 70;
pub(crate) const PATTERN: u8 = 0x5a;

/// VMs in the state "being filled": those filled before the row could begin, and the others.
pub(crate) static FILLING: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];

pub(crate) struct Case<'a> {
    pub(crate) store: &'a Store,
    pub(crate) axis: Axis,
    /// Each takes a block of memory.
    patterns: RefCell<BTreeMap<u8, RefPage>>,
}

impl<'a> Case<'a> {
    pub(crate) fn new(store: &'a Store, axis: Axis) -> Self {
        Self { store, axis, patterns: RefCell::default() }
    }

    /// A VM whose [`ARENA`] is in the row's state, surrounded by pages of a similar state and
    /// untouched ones.
    pub(crate) fn subject(&self) -> Vm {
        let mut vm = Vm::born(self.store, "VM");
        vm.write(WRITTEN, 1);
        match self.axis.state {
            State::Birth => {}
            State::Shared => self.share(&mut vm),
            State::Exclusive => {
                self.share(&mut vm);
                // Enough pages that a freeze shares most of them back, instead of just copying.
                vm.write(WRITTEN, AGAIN);
            }
            State::Reference => {
                let middle = (ARENA.start() + ARENA.end()) / 2;
                self.show(&mut vm, PageRange::new(ARENA.start(), middle), PATTERN);
                self.show(&mut vm, PageRange::new(middle, ARENA.end()), 0);
            }
            State::BackgroundCopy => {
                self.share(&mut vm);
                vm.write(WRITTEN, AGAIN);
                let image = self.freeze_in(FreezeMode::Background, &vm);
                let mut child = Vm::adopt(self.store, &image, "VM");
                vm.who = "VM's parent";
                child.kin.push(vm);
                FILLING[usize::from(image.ram.is_pending())].fetch_add(1, Ordering::Relaxed);
                child.images.push(image);
                return child;
            }
            State::Evicted => {
                let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
                let out = vm.region().evict(ARENA, dir, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
                assert_eq!(out.written, ARENA.len());
            }
            State::Restored => {
                let image = self.on_disk(&vm);
                let mut restored = Vm::adopt(self.store, &image, "VM");
                restored.images.push(image);
                return restored;
            }
            State::Mixed => {
                self.share(&mut vm);
                for page in ARENA.start() - 20..ARENA.end() {
                    let one = PageRange::with_len(page, 1);
                    match page % 5 {
                        1 | 2 => vm.write(one, AGAIN),
                        3 => {
                            vm.region().discard(one).unwrap();
                            vm.holds(one, Content::Zero);
                        }
                        4 if page % 2 == 0 => self.show(&mut vm, one, PATTERN),
                        _ => {}
                    }
                }
            }
            State::OneLeft => {
                self.share(&mut vm);
                vm.write(ARENA, AGAIN);
                let left = ARENA.start() + 7;
                for gone in [PageRange::new(0, left), PageRange::new(left + 1, ALL.end())] {
                    vm.region().discard(gone).unwrap();
                    vm.holds(gone, Content::Zero);
                }
            }
        }
        vm
    }

    /// Puts all of a VM into a file, without mapping a page. (Pages in the page cache differ only
    /// in timing.)
    fn on_disk(&self, vm: &Vm) -> Image {
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.write_all_at(&vm.bytes(ALL), 0).unwrap();
        let mut map = ImageMap::new();
        map.insert(ALL, LayerSource { layer: self.store.file_layer(file, ALL.len()).unwrap(), at: 0 });
        let ram = RamImage::from_parts(self.store, vm.ram.layout(), vec![(map, Vec::new())]).unwrap();
        Image { ram, model: vm.model.clone(), report: FreezeReport::default(), store: self.store.clone() }
    }

    fn share(&self, vm: &mut Vm) {
        let image = self.freeze_in(FreezeMode::Eager, vm);
        vm.images.push(image);
    }

    /// Shows a reference page of `byte`.
    pub(crate) fn show(&self, vm: &mut Vm, range: PageRange, byte: u8) {
        let mut patterns = self.patterns.borrow_mut();
        let page = patterns.entry(byte).or_insert_with(|| self.store.reference_page(&[byte; 4096]).unwrap());
        vm.region().map_reference(range, page).unwrap();
        vm.holds(range, if byte == 0 { Content::Zero } else { Content::Byte(byte) });
    }

    pub(crate) fn freeze_in(&self, mode: FreezeMode, vm: &Vm) -> Image {
        let (ram, report) = vm.ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
        Image { ram, model: vm.model.clone(), report, store: self.store.clone() }
    }

    /// Freezes in the case's mode.
    pub(crate) fn freeze(&self, vm: &Vm) -> Image {
        self.freeze_in(self.axis.mode, vm)
    }

    pub(crate) fn child(&self, image: &Image) -> Vm {
        Vm::adopt(self.store, image, "child")
    }

    /// The actor writes.
    pub(crate) fn overwrite(&self, vm: &mut Vm, range: PageRange, seed: u16) {
        match self.axis.actor {
            Actor::Cpu => vm.write(range, seed),
            Actor::DeviceRead => {
                let mut device = vm.device(range, Access::Read, PinLifetime::LongTerm);
                vm.check_device(&mut device, "before the CPU writes (R26)");
                vm.write(range, seed);
                vm.check_device(&mut device, "after the CPU has written (R26)");
            }
            Actor::DeviceWrite => {
                let mut device = vm.device(range, Access::Write, PinLifetime::Transient);
                device.put(0, &seeded(range, seed));
                vm.holds(range, Content::Seed(seed));
            }
        }
        let model = &vm.model[range.start() as usize];
        assert_eq!(
            &vm.bytes(PageRange::with_len(range.start(), 1))[..],
            model.bytes(range.start()),
            "the guest sees it"
        );
    }

    /// The VM and an image of it, with a child, in the case's order. `held`: devices hold pins,
    /// which a reset must respect. The VM ends up with contents other than the image's only in the
    /// order "snapshot", and never in `keep`.
    fn cloned(&self, vm: &mut Vm, keep: PageRange, held: bool) -> (Image, Vm) {
        let image = self.freeze(vm);
        if self.axis.order == Order::Fork {
            let child = self.child(&image);
            return (image, child);
        }
        let early = (self.axis.order == Order::Reset).then(|| self.child(&image));
        let before = vm.model.clone();
        for other in
            [PageRange::new(WIDE.start(), keep.start()), PageRange::new(keep.end().max(WIDE.start()), WIDE.end())]
        {
            if !other.is_empty() {
                vm.write(other, LATER);
            }
        }
        let child = early.unwrap_or_else(|| self.child(&image));
        if self.axis.order == Order::Reset {
            match (vm.ram.reset(&image.ram, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO), held) {
                (Ok(_), false) => vm.model = before,
                (Err(RamError::Pinned { .. }), true) => {}
                (other, _) => panic!("I7: a reset under {held} pins: {other:?}"),
            }
        }
        vm.check("after the clone");
        (image, child)
    }

    /// A clone of a VM without active devices.
    pub(crate) fn clone_of(&self, vm: &mut Vm) -> (Image, Vm) {
        // All of the arena is written in between, and more on both sides.
        self.cloned(vm, PageRange::new(0, WIDE.start()), false)
    }

    /// A clone of a VM with `held` pinned by devices.
    pub(crate) fn clone_under_pins(&self, vm: &mut Vm, held: PageRange) -> (Image, Vm) {
        self.cloned(vm, held, true)
    }

    /// Protects the VM's own pages, and lifts the protection: after a complete copy, or after a
    /// copy abandoned because its layer has no user.
    pub(crate) fn protect_and_unprotect(&self, vm: &Vm) {
        for wanted in [true, false] {
            let image = match vm.ram.freeze_in(FreezeMode::Background, &Quiesced::by(&clade_memory::NoWriters)) {
                Ok((image, _)) => image,
                // Over a file on a disk, only without a background freeze.
                Err(RamError::Background(_)) if matches!(self.axis.state, State::Evicted | State::Restored) => return,
                Err(error) => panic!("{error}"),
            };
            if wanted {
                image.finish_background().unwrap();
            }
            drop(image);
            if wanted {
                vm.ram.finish_background().unwrap();
            }
        }
    }
}
