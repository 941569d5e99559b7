//! Rows of pins: 3-14, 20, 21, 24.

use clade_memory::{Access, DontFork, FreezeMode, PageRange, PinError, PinLifetime, Quiesced};

use crate::case::{Actor, Axis, Case, Order, State};
use crate::dma::Device;
use crate::dma::splice::Splice;
use crate::runner::{Row, Run, Skip};
use crate::vm::{ALL, ARENA, Content, Image, PAGES, UNTOUCHED, Vm, WIDE};

const NOT_ITS_OWN: Skip =
    (|axis: &Axis| !matches!(axis.state, State::Birth | State::Exclusive), "such pages are not exclusive: rows 9-12");
const EAGER: Skip = (|axis: &Axis| axis.mode == FreezeMode::Eager, "without write protection it is the row before");
const ONE_ACTOR: Skip = (|axis: &Axis| axis.actor != Actor::Cpu, "the row has all kinds of pins");
const HELD_THROUGHOUT: Skip = (
    |axis: &Axis| axis.order == Order::Snapshot,
    "its pages are held, so nothing is written between an image and its use",
);
const ONE_ORDER: Skip = (|axis: &Axis| axis.order != Order::Fork, "the row forks once");

/// A part of the arena, on both sides of the block's edge.
const HELD: PageRange = PageRange::new(ARENA.start() + 5, ARENA.end() - 5);

pub(crate) fn rows() -> Vec<Row> {
    let axes = |number, name, guards, run| Row { number, name, guards, run: Run::Axes(&[], run) };
    let protected = |number, name, guards, run| Row { number, name, guards, run: Run::Axes(&[EAGER], run) };
    let held = |number, name, guards, run| Row { number, name, guards, run: Run::Axes(&[HELD_THROUGHOUT], run) };
    let own = |number, name, guards, run| Row { number, name, guards, run: Run::Axes(&[NOT_ITS_OWN], run) };
    vec![
        axes(3, "vmsplice, unmap in child", "a child's device reading what the parent writes later", |case| {
            unmapped_in_child(case, false);
        }),
        protected(4, "vmsplice + mprotect", "the same after the child was protected and released", |case| {
            unmapped_in_child(case, true);
        }),
        axes(5, "vmsplice before fork", "a parent's read pin seeing the child's writes", |case| {
            pinned_parent(case, true);
        }),
        axes(6, "vmsplice after fork", "a read pin of shared pages seeing another VM's writes", |case| {
            pinned_parent(case, false);
        }),
        axes(7, "iouring", "a device and its guest parting ways over protection", pinned_and_protected),
        axes(
            8,
            "fork + iouring",
            "a device and its guest parting ways over a clone, or DMA in the child",
            pinned_and_cloned,
        ),
        axes(9, "read pin on shared", "a read pin of a frame that the guest will leave", |case| {
            read_pin(case, false, false);
        }),
        protected(10, "+ mprotect", "the same across protection", |case| read_pin(case, false, true)),
        axes(11, "read pin on once shared", "a page taken for exclusive because its sharers are gone", |case| {
            read_pin(case, true, false);
        }),
        protected(12, "+ mprotect", "the same across protection", |case| read_pin(case, true, true)),
        own(13, "read pin on exclusive", "a copy made for a page that is the VM's own", |case| no_copy(case, false)),
        own(14, "+ mprotect", "the same across protection", |case| no_copy(case, true)),
        held(20, "read pin on untouched", "a device left with the zero page", |case| pin_untouched(case, false)),
        held(21, "read pin on untouched, cloned", "a device left with a layer's hole", |case| {
            pin_untouched(case, true);
        }),
        Row {
            number: 24,
            name: "gup_longterm",
            guards: "a kind of pin that is incoherent for a kind of page; a refusal without a name",
            run: Run::Axes(&[ONE_ACTOR, ONE_ORDER], all_kinds),
        },
    ]
}

/// Requirements on a device that holds `range`: it sees the CPU's writes, and its own are seen.
fn coherent(vm: &mut Vm, device: &mut Device, writes: bool, seed: u16) {
    let range = device.pin().range();
    vm.check_device(device, "at first");
    vm.write(range, seed);
    vm.check_device(device, "after the CPU has written");
    if writes {
        device.write(0xd0 | seed as u8);
        vm.holds(range, Content::Byte(0xd0 | seed as u8));
        vm.check("after the device has written");
    }
}

fn unmapped_in_child(case: &Case<'_>, protect: bool) {
    let mut parent = case.subject();
    let (_image, mut child) = case.clone_of(&mut parent);
    let mut device = child.device(HELD, Access::Read, PinLifetime::LongTerm);
    // A short read of pages that the child does not own holds their frames read-only, as in
    // CVE-2020-29374.
    let elsewhere = PageRange::new(300, 310);
    let short = child.pin(elsewhere, Access::Read, PinLifetime::Transient);
    let splice = Splice::of(&short);
    let old = child.bytes(elsewhere);
    if protect {
        case.protect_and_unprotect(&child);
    }
    drop(short);
    // All pages are freed except those that the device holds (I7).
    let gone = child.region().discard(ALL).unwrap();
    assert_eq!((gone.discarded, gone.pinned), (PAGES - HELD.len(), HELD.len()));
    for zero in [PageRange::new(0, HELD.start()), PageRange::new(HELD.end(), PAGES)] {
        child.holds(zero, Content::Zero);
    }
    case.overwrite(&mut parent, WIDE, 2);
    assert!(splice.read() == old, "R28: a child's read reference shows the parent's later writes");
    child.check_device(&mut device, "after the child has discarded and the parent written");
    child.check("after it has discarded");
    // The child dies: the frames belong to the device alone.
    let held = device.read();
    child.kill();
    case.overwrite(&mut parent, WIDE, 3);
    assert!(device.read() == held, "a dead child's device reads what the parent writes");
}

fn pinned_parent(case: &Case<'_>, before: bool) {
    let mut parent = case.subject();
    let access = if case.axis.actor == Actor::DeviceWrite { Access::Write } else { Access::Read };
    let early = before.then(|| parent.device(HELD, access, PinLifetime::LongTerm));
    let (_image, mut child) = match &early {
        Some(_) => case.clone_under_pins(&mut parent, HELD),
        None => case.clone_of(&mut parent),
    };
    let mut device = early.unwrap_or_else(|| parent.device(HELD, access, PinLifetime::LongTerm));
    let gone = parent.region().discard(ALL).unwrap();
    assert_eq!((gone.discarded, gone.pinned), (PAGES - HELD.len(), HELD.len()), "I7");
    for zero in [PageRange::new(0, HELD.start()), PageRange::new(HELD.end(), PAGES)] {
        parent.holds(zero, Content::Zero);
    }
    case.overwrite(&mut child, WIDE, 2);
    parent.check_device(&mut device, "after the child has written");
    parent.check("after the child has written");
    coherent(&mut parent, &mut device, access == Access::Write, 3);
}

fn access_of(actor: Actor) -> Access {
    if actor == Actor::DeviceRead { Access::Read } else { Access::Write }
}

fn pinned_and_protected(case: &Case<'_>) {
    let mut vm = case.subject();
    let access = access_of(case.axis.actor);
    let mut device = vm.device(HELD, access, PinLifetime::LongTerm);
    coherent(&mut vm, &mut device, access == Access::Write, 2);
    let image = case.freeze(&vm);
    if case.axis.mode == FreezeMode::Background {
        case.protect_and_unprotect(&vm);
    }
    coherent(&mut vm, &mut device, access == Access::Write, 3);
    if case.axis.order == Order::Reset {
        let refused = vm.ram.reset(&image.ram, &Quiesced::by(&clade_memory::NoWriters), std::time::Duration::ZERO);
        assert!(refused.is_err(), "I7: pinned pages were reset away");
        coherent(&mut vm, &mut device, access == Access::Write, 4);
    }
}

fn pinned_and_cloned(case: &Case<'_>) {
    let mut parent = case.subject();
    let access = access_of(case.axis.actor);
    let mut device = parent.device(HELD, access, PinLifetime::LongTerm);
    let (_image, mut child) = case.clone_under_pins(&mut parent, HELD);
    coherent(&mut parent, &mut device, access == Access::Write, 2);
    child.check("after a device of its parent was at work");
    case.overwrite(&mut child, ARENA, 3);
    coherent(&mut parent, &mut device, access == Access::Write, 4);
    child.check("after both have written");
    // Once more, with the same pin.
    let (_second, _) = case.clone_under_pins(&mut parent, HELD);
    coherent(&mut parent, &mut device, access == Access::Write, 5);
}

fn read_pin(case: &Case<'_>, alone: bool, protect: bool) {
    let mut parent = case.subject();
    let sharers = case.clone_of(&mut parent);
    let (kept, gone): (Option<(Image, Vm)>, _) = if alone { (None, Some(sharers)) } else { (Some(sharers), None) };
    drop(gone);
    let pin = parent.pin(HELD, Access::Read, PinLifetime::LongTerm);
    // Before a device is registered, which would unshare by itself.
    let owned = parent.owned();
    for page in HELD.start()..HELD.end() {
        assert_eq!(
            parent.region().ownership().get(page),
            (true, 1),
            "R26: exclusive before the pin returns: {page:#x}"
        );
        assert!(owned.contains(&page), "R26: unshared before the pin returns: {page:#x}");
    }
    let mut device = Device::attach(pin);
    if protect {
        case.protect_and_unprotect(&parent);
    }
    parent.check_device(&mut device, "at first");
    parent.write(ARENA, 2);
    parent.check_device(&mut device, "after the CPU has written (R26)");
    if case.axis.actor == Actor::DeviceWrite {
        let mut writer = parent.device(HELD, Access::Write, PinLifetime::Transient);
        writer.write(0xd7);
        parent.holds(HELD, Content::Byte(0xd7));
        parent.check_device(&mut device, "after another device has written");
    }
    if let Some((_, child)) = &kept {
        child.check("after its parent and a device were at work");
    }
    let _again = case.freeze(&parent);
    parent.write(HELD, 4);
    parent.check_device(&mut device, "after a freeze and a write (I3)");
}

fn no_copy(case: &Case<'_>, protect: bool) {
    let mut vm = case.subject();
    let before = vm.ram.stats().unwrap();
    let access = access_of(case.axis.actor);
    let mut device = vm.device(HELD, access, PinLifetime::LongTerm);
    let with_pin = vm.ram.stats().unwrap();
    assert_eq!(
        (with_pin.exclusive, with_pin.private_kib, with_pin.mappings),
        (before.exclusive, before.private_kib, before.mappings),
        "the pin has copied"
    );
    assert_eq!(with_pin.pinned, HELD.len());
    let frames = vm.frames(HELD);
    let (_image, _child) = case.clone_under_pins(&mut vm, HELD);
    if protect {
        case.protect_and_unprotect(&vm);
    }
    coherent(&mut vm, &mut device, access == Access::Write, 2);
    assert_eq!(vm.frames(HELD), frames, "I3: the frames have changed under a pin");
}

fn pin_untouched(case: &Case<'_>, cloned: bool) {
    let mut vm = case.subject();
    let family = cloned.then(|| {
        let image = case.freeze(&vm);
        let child = case.child(&image);
        (image, child)
    });
    let access = access_of(case.axis.actor);
    let mut device = vm.device(UNTOUCHED, access, PinLifetime::LongTerm);
    assert_eq!(device.read(), vec![0; UNTOUCHED.bytes()]);
    coherent(&mut vm, &mut device, access == Access::Write, 2);
    let (_image, _child) = case.clone_under_pins(&mut vm, UNTOUCHED);
    coherent(&mut vm, &mut device, access == Access::Write, 3);
    drop((device, family));
}

fn all_kinds(case: &Case<'_>) {
    let mut vm = case.subject();
    let (image, child) = case.clone_of(&mut vm);
    for (access, term) in [
        (Access::Read, PinLifetime::LongTerm),
        (Access::Write, PinLifetime::Transient),
        (Access::Write, PinLifetime::LongTerm),
    ] {
        for range in [PageRange::with_len(ARENA.start(), 4), PageRange::new(0, 512), UNTOUCHED] {
            let mut device = vm.device(range, access, term);
            coherent(&mut vm, &mut device, access == Access::Write, 2);
        }
        case.freeze(&vm).check("at once");
    }
    // A short read of pages that the VM does not own sees the bytes at its start; no page is copied
    // for it.
    let mut reader = case.child(&image);
    let before = reader.bytes(ARENA);
    let pin = reader.pin(ARENA, Access::Read, PinLifetime::Transient);
    let splice = Splice::of(&pin);
    assert_eq!(reader.exclusive(), 0, "a short read has copied");
    reader.write(ARENA, 5);
    assert!(splice.read() == before, "a short read of a layer's pages");
    drop(pin);
    drop((child, reader));
    refused(case, &vm);
}

/// Ranges that cannot be pinned are refused by name, and no page stays pinned.
fn refused(case: &Case<'_>, vm: &Vm) {
    let region = vm.region();
    let empty = Vm::reserve(case.store, "reserved");
    for (access, term) in [(Access::Read, PinLifetime::Transient), (Access::Write, PinLifetime::LongTerm)] {
        let pin = |range| region.pin(range, access, term);
        assert!(matches!(pin(PageRange::new(PAGES - 1, PAGES + 1)), Err(PinError::OutOfRange { pages: PAGES, .. })));
        assert!(matches!(pin(PageRange::new(3, 3)), Err(PinError::NoPages)));
        assert!(matches!(empty.region().pin(ARENA, access, term), Err(PinError::Empty { .. })));
    }
    empty.kill();
    region.set_dont_fork(ARENA, Some(DontFork::Absent)).unwrap();
    let (image, _) = vm.ram.freeze_in(case.axis.mode, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
    let child = Vm::reserve(case.store, "child without an arena");
    child.ram.adopt(&image).unwrap();
    for (access, term) in [
        (Access::Write, PinLifetime::LongTerm),
        (Access::Read, PinLifetime::LongTerm),
        (Access::Read, PinLifetime::Transient),
    ] {
        for range in [HELD, PageRange::with_len(ARENA.start() - 1, 2), PageRange::with_len(ARENA.end() - 1, 9)] {
            let absent = child.region().pin(range, access, term);
            assert!(matches!(absent, Err(PinError::Absent { range: named }) if named == range), "{absent:?}");
        }
    }
    let wraps = child.region().pin(PageRange::with_len(3, u64::MAX - 2), Access::Read, PinLifetime::Transient);
    assert!(matches!(wraps, Err(PinError::OutOfRange { .. })), "{wraps:?}");
    assert_eq!(child.region().ownership().counts(child.all()).pins, 0, "nothing stays pinned");
    child.kill();
}
