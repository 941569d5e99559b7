//! Rows of tracking: page ownership while pages are protected, filled, moved and queried. 26-29,
//! 33, 35-38, 40.

use std::thread;

use clade_memory::{
    Access, BLOCK_PAGES, DontFork, FreezeMode, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamError, RefPage,
};

use crate::case::{Actor, Axis, Case, Order, State};
use crate::runner::{Row, Run, Skip};
use crate::vm::{ALL, ARENA, Content, Image, PAGES, Vm, WIDE, WRITTEN};

const ONE_ORDER: Skip = (|axis: &Axis| axis.order != Order::Fork, "the row has an order of its own");
const EAGER: Skip = (|axis: &Axis| axis.mode == FreezeMode::Eager, "nothing is left to a running handler");
const ITS_OWN_PAGES: Skip = (|axis: &Axis| axis.state != State::Birth, "the row makes its own pages");
const ONE_ACTOR: Skip = (|axis: &Axis| axis.actor != Actor::Cpu, "the row has actors of its own");
pub(crate) fn rows() -> Vec<Row> {
    let row = |number, name, guards, skips, run| Row { number, name, guards, run: Run::Axes(skips, run) };
    vec![
        row(26, "EEXIST", "a page filled twice: old bytes over new ones", &[ONE_ORDER, EAGER], filled_twice),
        row(27, "move", "a page moved under a pin, or a layer's page moved", &[ONE_ORDER], moved),
        row(28, "wp-fork", "protection inherited by a child, or left behind in the parent", &[ONE_ORDER], |case| {
            forked_under_protection(case, false);
        }),
        row(29, "wp-fork-pin", "the same with a pinned page among them", &[ONE_ORDER], |case| {
            forked_under_protection(case, true);
        }),
        row(33, "events", "a stale fill after a discard, a remap or a clone", &[ONE_ORDER, EAGER], beside_the_handler),
        row(
            35,
            "wp-mremap",
            "an address that is used again and still protected",
            &[ONE_ORDER, ITS_OWN_PAGES],
            used_again,
        ),
        row(
            36,
            "pagemap sanity",
            "a range beyond the end; a count cut off where a buffer ends",
            &[ONE_ORDER, ITS_OWN_PAGES],
            sane,
        ),
        row(37, "pagemap", "a page too much or too few where ownership changes", &[ITS_OWN_PAGES], exact),
        row(
            38,
            "pagemap mprotect",
            "a written page forgotten over protection and remapping",
            &[ONE_ORDER],
            nothing_forgotten,
        ),
        row(40, "mkdirty", "a shared page made writable by marking it dirty", &[ONE_ACTOR], marked_dirty),
    ]
}

fn filled_twice(case: &Case<'_>) {
    let mut parent = case.subject();
    parent.write(WRITTEN, 2);
    let image = case.freeze(&parent);
    let (one, two) = (case.child(&image), case.child(&image));
    // The parent's writers, two children's readers, a device and the background thread compete for
    // the same pages.
    thread::scope(|scope| {
        scope.spawn(|| one.check("while it is filled"));
        scope.spawn(|| two.check("while it is filled"));
        case.overwrite(&mut parent, ARENA, 3);
        let device = parent.pin(WRITTEN, Access::Write, PinLifetime::Transient);
        let again = parent.pin(WRITTEN, Access::Read, PinLifetime::LongTerm);
        image.ram.finish_background().unwrap();
        drop((device, again));
    });
    image.ram.finish_background().unwrap();
    parent.ram.finish_background().unwrap();
}

fn moved(case: &Case<'_>) {
    let mut vm = case.subject();
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let evict = |vm: &Vm| vm.region().evict(ARENA, dir, &Quiesced::by(&clade_memory::NoWriters)).unwrap().written;
    let _image = case.freeze(&vm);
    vm.ram.finish_background().unwrap();
    // In the page map only the frame number distinguishes a copy from a zero page that was only
    // read.
    let copied = |page: &u64| ARENA.contains(*page) && vm.model[*page as usize] != Content::Zero;
    let own = vm.owned().into_iter().filter(copied).count() as u64;
    assert_eq!(evict(&vm), own, "what is moved is the VM's own: a layer's page is not");
    vm.check("after its own pages have moved");
    case.overwrite(&mut vm, ARENA, 2);
    let held = PageRange::with_len(ARENA.start() + 3, 5);
    let mut device = vm.device(held, Access::Write, PinLifetime::LongTerm);
    assert_eq!(evict(&vm), ARENA.len() - held.len(), "R12: all but what is pinned");
    device.write(0xd1);
    vm.holds(held, Content::Byte(0xd1));
    vm.check("after the rest has moved");
    vm.write(held, 3);
    vm.check_device(&mut device, "after the rest has moved");
}

fn forked_under_protection(case: &Case<'_>, pinned: bool) {
    let mut parent = case.subject();
    case.overwrite(&mut parent, WRITTEN, 2);
    let held = PageRange::with_len(ARENA.start() + 3, 5);
    let mut device = pinned.then(|| parent.device(held, Access::Write, PinLifetime::LongTerm));
    let first = case.freeze(&parent);
    // At once, while the parent's pages may be protected.
    let second = case.freeze(&parent);
    let mut children = [case.child(&first), case.child(&second)];
    for child in &children {
        assert_eq!(child.exclusive(), 0, "a child owns what it has not written");
    }
    if let Some(device) = &mut device {
        device.write(0xd1);
        parent.holds(held, Content::Byte(0xd1));
    }
    for (child, seed) in children.iter_mut().zip([3, 4]) {
        case.overwrite(child, ARENA, seed);
        assert_eq!(child.exclusive(), ARENA.len(), "a child owns what it has written");
        let grandchild = case.child(&case.freeze(child));
        assert_eq!(grandchild.exclusive(), 0);
        grandchild.check("of a VM that was made under protection");
    }
    parent.write(PageRange::new(WIDE.start(), held.start()), 5);
}

fn beside_the_handler(case: &Case<'_>) {
    let mut parent = case.subject();
    parent.write(WRITTEN, 2);
    let image = case.freeze(&parent);
    let mut child = case.child(&image);
    // Discard, remap and clone, on both sides, while pages are filled.
    let (a, b) =
        (PageRange::new(ARENA.start(), ARENA.start() + 9), PageRange::new(ARENA.start() + 9, ARENA.start() + 20));
    for vm in [&mut parent, &mut child] {
        vm.region().discard(a).unwrap();
        vm.holds(a, Content::Zero);
        case.show(vm, b, 0x33);
        vm.check("after it has discarded and remapped");
    }
    let second = case.freeze(&parent);
    case.overwrite(&mut parent, ARENA, 3);
    let _third = case.freeze(&child);
    case.overwrite(&mut child, ARENA, 4);
    parent.ram.reset(&second.ram, &Quiesced::by(&clade_memory::NoWriters), std::time::Duration::ZERO).unwrap();
    parent.model.clone_from(&second.model);
    parent.check("after a reset beside the handler");
}

fn used_again(case: &Case<'_>) {
    let mut vm = case.subject();
    vm.write(WRITTEN, 2);
    let at = vm.region().host_address();
    let image = case.freeze(&vm);
    // The VM is dropped while its pages are protected, and its address is free when the copy
    // completes. Memory of another VM is then placed there.
    drop(vm);
    image.ram.finish_background().unwrap();
    let mut others: Vec<Vm> = Vec::new();
    while others.len() < 8 && others.iter().all(|vm| vm.region().host_address() != at) {
        others.push(Vm::born(case.store, "VM at a used address"));
    }
    // The last one is at that address, or as near as the other backing's run permits.
    others.drain(..others.len() - 1);
    for other in &mut others {
        case.overwrite(other, ALL, 3);
        let _again = case.freeze(other);
        case.overwrite(other, ALL, 4);
    }
}

/// More runs than one query of the kernel returns.
const MANY: u64 = 3 * BLOCK_PAGES + 30;

fn sane(case: &Case<'_>) {
    let vm = case.subject();
    let region = vm.region();
    let beyond = PageRange::new(PAGES - 1, PAGES + 1);
    let dir = std::path::Path::new("/tmp");
    let quiesced = Quiesced::by(&clade_memory::NoWriters);
    for refused in [
        region.discard(beyond).map(|_| ()),
        region.map_reference(beyond, &RefPage::zero()),
        region.evict(beyond, dir, &quiesced).map(|_| ()),
        region.set_dont_fork(beyond, Some(DontFork::Zeroed)),
    ] {
        assert!(matches!(refused, Err(RamError::OutOfRange { pages: PAGES, .. })), "{refused:?}");
    }
    assert!(region.dont_fork().is_empty());

    let mut many = Vm::with_pages(case.store, "VM of many runs", MANY);
    many.ram.populate().unwrap();
    drop(case.freeze(&many));
    let odd = (1..MANY).step_by(2).map(|page| PageRange::with_len(page, 1));
    odd.clone().for_each(|page| case.overwrite(&mut many, page, 2));
    assert_eq!(many.owned(), odd.clone().map(PageRange::start).collect::<Vec<_>>(), "by the page map");
    assert_eq!(many.exclusive(), MANY / 2, "exact beyond what one answer of the kernel holds");
    let image = case.freeze(&many);
    // Closed gaps are copied too; the VM's own pages are never left out.
    assert!(image.report.copied >= MANY / 2, "{:?}", image.report);
    case.overwrite(&mut many, PageRange::new(0, MANY), 3);
}

fn exact(case: &Case<'_>) {
    let middle = PAGES / 2;
    let patterns: [(&str, Vec<PageRange>); 6] = [
        ("all clean", vec![]),
        ("all", vec![ALL]),
        ("all but the edges", vec![PageRange::new(1, PAGES - 1)]),
        ("the middle", vec![PageRange::new(middle - 3, middle + 3)]),
        ("half of a huge page", vec![PageRange::new(0, BLOCK_PAGES / 2)]),
        ("every third page", (0..40).map(|n| PageRange::with_len(n * 3, 1)).collect()),
    ];
    let mut parent = case.subject();
    for (name, runs) in patterns {
        let (_image, mut child) = case.clone_of(&mut parent);
        child.check("before it has written");
        assert_eq!((child.exclusive(), child.owned()), (0, vec![]), "{name}: only read");
        runs.iter().for_each(|run| case.overwrite(&mut child, *run, 2));
        let written: Vec<u64> = runs.iter().flat_map(|run| run.start()..run.end()).collect();
        assert_eq!(child.owned(), written, "{name}: by the page map");
        let stats = child.ram.stats().unwrap();
        assert_eq!(stats.exclusive, written.len() as u64, "{name}: by the statistics");
        assert_eq!(stats.private_kib, stats.exclusive * PAGE_SIZE / 1024, "{name}: in memory");
        assert_eq!(stats.exclusive + stats.shared + stats.reference, PAGES, "{name}: each page is one of three");
        let image = case.freeze(&child);
        assert!(
            image.report.copied >= written.len() as u64 && image.report.remapped == 0,
            "{name}: {:?}",
            image.report
        );
        case.overwrite(&mut child, WIDE, 3);
    }
}

fn nothing_forgotten(case: &Case<'_>) {
    let mut vm = case.subject();
    let mut images: Vec<Image> = Vec::new();
    for round in 0..6u16 {
        // Fewer pages than a freeze leaves with the VM, and more.
        let pages = if round % 2 == 0 { PageRange::new(300, 320) } else { WRITTEN };
        case.overwrite(&mut vm, pages, 10 + round);
        if case.axis.mode == FreezeMode::Background {
            case.protect_and_unprotect(&vm);
        }
        case.overwrite(&mut vm, PageRange::with_len(305 + u64::from(round), 2), 30 + round);
        if round == 3 {
            vm.ram.finish_background().unwrap();
        }
        images.push(case.freeze(&vm));
    }
    case.overwrite(&mut vm, WIDE, 50);
    // Back, and forward again: later freezes are based on the image of the reset.
    vm.ram.reset(&images[1].ram, &Quiesced::by(&clade_memory::NoWriters), std::time::Duration::ZERO).unwrap();
    vm.model.clone_from(&images[1].model);
    images.push(case.freeze(&vm));
    case.overwrite(&mut vm, ARENA, 51);
    images.push(case.freeze(&vm));
}

/// Pins, attached devices and populated pages make the kernel mark pages dirty and writable without
/// a write.
fn marked_dirty(case: &Case<'_>) {
    let mut parent = case.subject();
    let (_image, mut child) = case.clone_of(&mut parent);
    for vm in [&mut parent, &mut child] {
        for (access, term) in [
            (Access::Write, PinLifetime::Transient),
            (Access::Read, PinLifetime::LongTerm),
            (Access::Write, PinLifetime::LongTerm),
        ] {
            let device = vm.device(ARENA, access, term);
            vm.check("with a device that does nothing");
            drop(device);
        }
        let at = (vm.region().host_address() + ARENA.offset()) as *mut libc::c_void;
        // SAFETY: populating faults pages in; contents do not change.
        let populated = unsafe { libc::madvise(at, ARENA.bytes(), libc::MADV_POPULATE_WRITE) };
        assert_eq!(populated, 0, "{}", std::io::Error::last_os_error());
    }
    parent.write(ARENA, 2);
    child.check("after its parent has written pages marked dirty");
    child.write(WIDE, 3);
}
