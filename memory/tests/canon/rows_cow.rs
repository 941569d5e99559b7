//! Rows of copy-on-write proper: 1, 2, 15-19, 30.

use clade_memory::{Access, BLOCK_PAGES, FreezeMode, PageRange, PinLifetime};

use crate::case::{Actor, Axis, Case, State};
use crate::runner::{Row, Run, Skip};
use crate::vm::{ALL, ARENA, Content, UNTOUCHED, Vm, WIDE};

/// The row makes its pages itself.
const ITS_OWN_PAGES: Skip = (|axis: &Axis| axis.state != State::Birth, "the row makes its own pages");
const NO_BACKGROUND: Skip = (|axis: &Axis| axis.mode == FreezeMode::Eager, "without write protection it is row 1");

/// `split_and_collapse` itself includes a device that reads.
const HAS_ITS_READER: Skip = (|axis: &Axis| axis.actor == Actor::DeviceRead, "the row has a device that reads");

const BLOCK: PageRange = PageRange::new(0, BLOCK_PAGES);

pub(crate) fn rows() -> Vec<Row> {
    let axes = |number, name, guards, run| Row { number, name, guards, run: Run::Axes(&[], run) };
    let collapse = |number, name, guards, run| Row { number, name, guards, run: Run::Axes(&[HAS_ITS_READER], run) };
    vec![
        axes(
            1,
            "basic COW: parent",
            "the birth file, or a layer, left shared-writable in the parent",
            parent_overwrites,
        ),
        axes(1, "basic COW: child", "a layer mapped shared in the child", child_overwrites),
        axes(1, "basic COW: siblings", "two children of one image sharing a written page", siblings),
        axes(1, "basic COW: grandchild", "a delta laid over the wrong layer", grandchild),
        Row {
            number: 2,
            name: "basic COW + mprotect",
            guards: "a shared page made writable by lifting its protection",
            run: Run::Axes(&[NO_BACKGROUND], with_protection),
        },
        collapse(
            15,
            "collapsed before the clone",
            "a merged record that is exclusive for a page that is not",
            collapsed_before,
        ),
        collapse(16, "collapsed after the clone", "a merge that makes shared pages the parent's own", collapsed_after),
        collapse(
            17,
            "collapsed, fully shared",
            "a block that is shared as a whole and pinned in part",
            collapsed_shared,
        ),
        collapse(
            18,
            "collapsed, partly shared",
            "a block that is split unevenly and merged over the difference",
            collapsed_partly,
        ),
        axes(
            19,
            "non-anonymous",
            "a first write that reaches the file, the pattern or the sibling behind a page",
            first_write,
        ),
        Row {
            number: 30,
            name: "wp-unpopulated",
            guards: "a write to a page nobody had touched showing in an image taken before",
            run: Run::Axes(&[ITS_OWN_PAGES], untouched),
        },
    ]
}

fn parent_overwrites(case: &Case<'_>) {
    let mut parent = case.subject();
    // Like all VMs and images of a row, these are checked completely once more when dropped.
    let (_image, _child) = case.clone_of(&mut parent);
    case.overwrite(&mut parent, ALL, 2);
}

fn child_overwrites(case: &Case<'_>) {
    let mut parent = case.subject();
    let (image, mut child) = case.clone_of(&mut parent);
    case.overwrite(&mut child, ALL, 2);
    case.child(&image).check("made after a sibling has overwritten everything");
}

fn siblings(case: &Case<'_>) {
    let mut parent = case.subject();
    let (image, mut one) = case.clone_of(&mut parent);
    let mut two = case.child(&image);
    // The other one maps the pages first: existing mappings must not change either.
    two.check("before its sibling writes");
    case.overwrite(&mut one, ARENA, 2);
    case.overwrite(&mut two, PageRange::new(ARENA.start() + 10, ARENA.end()), 3);
}

fn grandchild(case: &Case<'_>) {
    let mut parent = case.subject();
    let (_, mut child) = case.clone_of(&mut parent);
    case.overwrite(&mut child, PageRange::new(ARENA.start(), ARENA.start() + 20), 2);
    let (_, mut grandchild) = case.clone_of(&mut child);
    case.overwrite(&mut child, WIDE, 3);
    grandchild.check("after its parent has overwritten everything");
    case.overwrite(&mut grandchild, ARENA, 4);
}

fn with_protection(case: &Case<'_>) {
    let mut parent = case.subject();
    let (_, mut child) = case.clone_of(&mut parent);
    for (vm, seed) in [(&mut parent, 2), (&mut child, 3)] {
        case.protect_and_unprotect(vm);
        case.overwrite(vm, ARENA, seed);
        case.protect_and_unprotect(vm);
        case.overwrite(vm, WIDE, seed + 10);
    }
}

/// Splits the block's record by pinning a part of it, drops the pin, and lets the kernel collapse
/// the block. The next freeze that shares the whole block merges the record.
fn split_and_collapse(vm: &Vm) {
    drop(vm.device(PageRange::new(3, 9), Access::Write, PinLifetime::Transient));
    drop(vm.device(PageRange::new(BLOCK.end() - 4, BLOCK.end()), Access::Read, PinLifetime::LongTerm));
    let at = vm.region().host_address() as *mut libc::c_void;
    // SAFETY: the range is guest memory, whose contents collapsing does not change; refusing is
    // allowed.
    let _ = unsafe { libc::madvise(at, BLOCK.bytes(), libc::MADV_COLLAPSE) };
}

fn collapsed_before(case: &Case<'_>) {
    let mut parent = case.subject();
    split_and_collapse(&parent);
    drop(case.freeze(&parent));
    let (_, mut child) = case.clone_of(&mut parent);
    case.overwrite(&mut parent, BLOCK, 2);
    child.check("after its parent has written the block");
    case.overwrite(&mut child, BLOCK, 3);
}

fn collapsed_after(case: &Case<'_>) {
    let mut parent = case.subject();
    let (_image, mut child) = case.clone_of(&mut parent);
    for (vm, seed) in [(&mut parent, 2), (&mut child, 3)] {
        split_and_collapse(vm);
        case.overwrite(vm, ARENA, seed);
        split_and_collapse(vm);
        drop(case.freeze(vm));
        case.overwrite(vm, BLOCK, seed + 10);
    }
}

fn collapsed_shared(case: &Case<'_>) {
    let mut parent = case.subject();
    split_and_collapse(&parent);
    drop(case.freeze(&parent));
    // The whole block is pinned by one record, then a part of it by records of their own, with a
    // clone in between.
    let mut whole = parent.device(BLOCK, Access::Write, PinLifetime::LongTerm);
    let mut part = parent.device(PageRange::new(100, 120), Access::Write, PinLifetime::LongTerm);
    let (_, child) = case.clone_under_pins(&mut parent, BLOCK);
    whole.write(0xd1);
    part.write(0xd2);
    parent.holds(BLOCK, Content::Byte(0xd1));
    parent.holds(part.pin().range(), Content::Byte(0xd2));
    parent.check("after both devices have written");
    child.check("after devices of its parent have written");
    drop(whole);
    let (_image, _second) = case.clone_under_pins(&mut parent, PageRange::new(100, 120));
    part.write(0xd3);
    parent.holds(part.pin().range(), Content::Byte(0xd3));
}

fn collapsed_partly(case: &Case<'_>) {
    let mut parent = case.subject();
    let (_first, _) = case.clone_of(&mut parent);
    // Half of the block is the parent's own again, page by page; the other half is the layer's.
    case.overwrite(&mut parent, PageRange::new(0, BLOCK_PAGES / 2), 2);
    split_and_collapse(&parent);
    let (_, mut child) = case.clone_of(&mut parent);
    case.overwrite(&mut child, PageRange::new(BLOCK_PAGES / 4, BLOCK_PAGES), 3);
    split_and_collapse(&child);
    case.overwrite(&mut parent, BLOCK, 4);
}

fn first_write(case: &Case<'_>) {
    let mut parent = case.subject();
    // The same pattern elsewhere, where writes to this one must not show.
    case.show(&mut parent, PageRange::new(5, 8), 0x77);
    case.show(&mut parent, PageRange::new(10, 13), 0);
    let (image, mut one) = case.clone_of(&mut parent);
    let two = case.child(&image);
    two.check("before its sibling writes");
    for page in [6, 11, ARENA.start() + 1, ARENA.start() + 3, ARENA.end() - 2, UNTOUCHED.start() + 1] {
        case.overwrite(&mut one, PageRange::with_len(page, 1), 2);
    }
    two.check("after its sibling's first writes");
    parent.check("after its child's first writes");
    for page in [6, 11, ARENA.start() + 2, UNTOUCHED.start() + 1] {
        case.overwrite(&mut parent, PageRange::with_len(page, 1), 3);
    }
}

fn untouched(case: &Case<'_>) {
    let mut parent = case.subject();
    let image = case.freeze(&parent);
    case.overwrite(&mut parent, UNTOUCHED, 2);
    image.check("after its source has touched a page");
    // The same for a hole two layers down.
    let mut child = case.child(&image);
    case.overwrite(&mut child, PageRange::with_len(UNTOUCHED.start(), 1), 3);
    let (_, _grandchild) = case.clone_of(&mut child);
    case.overwrite(&mut child, UNTOUCHED, 4);
}
