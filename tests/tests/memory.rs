//! Rows 1, 19, 22, 30 and 37 of the kernel's copy-on-write tests, on VMs: each row in huge and in
//! small pages, written by the guest's CPU and by the VMM. A row's text names the leak it guards
//! against.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_memory::{Access, Backing, PageRange, PinLifetime};
use clade_tests::{Guest, Turn, Writer, expect_nothing_held, smaps_anonymous_kib};
use clade_vmm::vm::{Context, ForkImage};

/// 16 MiB of work pages: eight blocks of 2 MiB.
const MIB: u64 = 32;
const PAGES: u64 = (MIB << 20) / PAGE_SIZE - WORK_BASE / PAGE_SIZE;
const BLOCK: u64 = 512;

struct Case<'a> {
    context: &'a Context,
    writer: Writer,
    what: String,
}

impl Case<'_> {
    /// A guest whose work pages hold the words of seed 1.
    fn parent(&self) -> Guest {
        let parent = self.untouched();
        parent.fill(self.writer, 0, PAGES, 1);
        parent
    }

    fn untouched(&self) -> Guest {
        Guest::boot(self.context, MIB, 1)
    }

    fn child(&self, image: &Arc<ForkImage>) -> Guest {
        Guest::child(self.context, image)
    }

    fn write(&self, guest: &Guest, first: u64, pages: u64, seed: u64) {
        guest.fill(self.writer, first, pages, seed);
    }

    fn expect(&self, guest: &Guest, first: u64, pages: u64, seed: impl Into<Option<u64>>, who: &str) {
        guest.expect(first, pages, seed.into(), &format!("{}: {who}", self.what));
    }
}

struct Row {
    name: &'static str,
    guards: &'static str,
    run: fn(&Case<'_>),
}

fn run(rows: &[Row]) {
    let Some(turn) = Turn::take() else { return };
    for backing in [Backing::Huge, Backing::Small] {
        let context = turn.context(backing);
        for writer in [Writer::Guest, Writer::Host] {
            for row in rows {
                let what = format!("{} ({}), {} pages, {writer:?} writes", row.name, row.guards, backing.name());
                println!("{what}");
                (row.run)(&Case { context: &context, writer, what });
                context.drain();
                expect_nothing_held(context.store(), row.name);
            }
        }
    }
}

// --- 1: basic copy-on-write ---

#[test]
fn canon_1_basic_cow() {
    run(&[
        Row {
            name: "1 parent overwrites all",
            guards: "birth file left shared-writable in the parent",
            run: |case| {
                let parent = case.parent();
                let child = parent.fork_child();
                case.write(&parent, 0, PAGES, 2);
                case.expect(&child, 0, PAGES, 1, "child");
                case.expect(&parent, 0, PAGES, 2, "parent");
            },
        },
        Row {
            name: "1 child overwrites all",
            guards: "layer mapped shared in the child",
            run: |case| {
                let parent = case.parent();
                let child = parent.fork_child();
                case.write(&child, 0, PAGES, 2);
                case.expect(&parent, 0, PAGES, 1, "parent");
                case.expect(&child, 0, PAGES, 2, "child");
            },
        },
        Row {
            name: "1 siblings",
            guards: "two children of one image sharing a written page",
            run: |case| {
                let parent = case.parent();
                let (image, _) = parent.fork();
                let (one, two) = (case.child(&image), case.child(&image));
                case.write(&one, 0, PAGES, 2);
                case.write(&two, 0, PAGES / 2, 3);
                case.expect(&parent, 0, PAGES, 1, "parent");
                case.expect(&one, 0, PAGES, 2, "first child");
                case.expect(&two, 0, PAGES / 2, 3, "second child, written");
                case.expect(&two, PAGES / 2, PAGES / 2, 1, "second child, not written");
                case.expect(&case.child(&image), 0, PAGES, 1, "a child made afterwards");
            },
        },
        Row {
            name: "1 grandchild",
            guards: "a delta laid over the wrong layer",
            run: |case| {
                let parent = case.parent();
                let child = parent.fork_child();
                case.write(&child, 0, PAGES / 2, 2);
                let grandchild = child.fork_child();
                case.write(&child, 0, PAGES, 3);
                case.expect(&grandchild, 0, PAGES / 2, 2, "grandchild, from the child");
                case.expect(&grandchild, PAGES / 2, PAGES / 2, 1, "grandchild, from the parent");
                case.write(&grandchild, 0, PAGES, 4);
                case.expect(&parent, 0, PAGES, 1, "parent");
                case.expect(&child, 0, PAGES, 3, "child");
            },
        },
        Row {
            name: "1 forked again",
            guards: "a page written between two forks missing from the second, or in the first",
            run: |case| {
                let parent = case.parent();
                let (first, _) = parent.fork();
                // More pages than a freeze leaves with the parent, and fewer.
                case.write(&parent, 10, 1000, 2);
                case.write(&parent, 4 * BLOCK + 7, 3, 3);
                let (second, _) = parent.fork();
                case.write(&parent, 0, PAGES, 4);
                case.expect(&case.child(&first), 0, PAGES, 1, "child of the first");
                let child = case.child(&second);
                case.expect(&child, 10, 1000, 2, "child of the second, many");
                case.expect(&child, 4 * BLOCK + 7, 3, 3, "child of the second, few");
                case.expect(&child, 4 * BLOCK + 10, PAGES - 4 * BLOCK - 10, 1, "child of the second, rest");
                case.expect(&parent, 0, PAGES, 4, "parent");
            },
        },
    ]);
}

// --- 19: pages without an owner ---

#[test]
fn canon_19_zero_and_file_pages() {
    run(&[
        Row {
            name: "19 zero page, child writes",
            guards: "a hole of the birth file filled by a child",
            run: |case| {
                let parent = case.untouched();
                let (image, _) = parent.fork();
                let (one, two) = (case.child(&image), case.child(&image));
                // Every other page, so that neighbours would show.
                (0..64).for_each(|n| case.write(&one, n * 2, 1, 2));
                case.expect(&parent, 0, 128, None, "parent");
                case.expect(&two, 0, 128, None, "sibling");
                case.expect(&one, 3, 1, None, "between the written");
                case.expect(&one, 4, 1, 2, "written");
                case.expect(&case.child(&image), 0, PAGES, None, "a child made afterwards");
            },
        },
        Row {
            name: "19 zero page, parent writes",
            guards: "the parent writing into holes of its own layer",
            run: |case| {
                let parent = case.untouched();
                let child = parent.fork_child();
                case.write(&parent, 0, PAGES, 2);
                case.expect(&child, 0, PAGES, None, "child");
            },
        },
        Row {
            name: "19 file page",
            guards: "the first write to a layer's page reaching the file",
            run: |case| {
                let parent = case.parent();
                let (image, _) = parent.fork();
                let (one, two) = (case.child(&image), case.child(&image));
                // Read by the other before and after: a page already mapped must not change either.
                case.expect(&two, 0, 128, 1, "sibling before");
                (0..64).for_each(|n| case.write(&one, n * 2, 1, 2));
                case.expect(&two, 0, 128, 1, "sibling after");
                case.expect(&parent, 0, 128, 1, "parent");
                case.expect(&one, 63, 1, 1, "between the written");
                case.expect(&case.child(&image), 0, PAGES, 1, "a child made afterwards");
            },
        },
    ]);
}

// --- 22: mixed ownership within 2 MiB ---

#[test]
fn canon_22_mixed_ownership_in_a_block() {
    /// Blocks that hold, from page 0 on: pages of the first layer, of a second, untouched zeros.
    fn mixed(case: &Case<'_>) -> Guest {
        let parent = case.untouched();
        case.write(&parent, 0, BLOCK + 300, 1);
        drop(parent.fork());
        case.write(&parent, 100, 1, 2);
        case.write(&parent, 110, 100, 2);
        case.write(&parent, BLOCK + 290, 20, 2);
        parent
    }
    fn expect_mixed(case: &Case<'_>, guest: &Guest, who: &str) {
        case.expect(guest, 0, 100, 1, who);
        case.expect(guest, 100, 1, 2, who);
        case.expect(guest, 101, 9, 1, who);
        case.expect(guest, 110, 100, 2, who);
        case.expect(guest, 210, BLOCK + 80, 1, who);
        case.expect(guest, BLOCK + 290, 20, 2, who);
        case.expect(guest, BLOCK + 310, BLOCK, None, who);
    }
    run(&[
        Row {
            name: "22 parent overwrites",
            guards: "a block frozen by what its first page is",
            run: |case| {
                let parent = mixed(case);
                let child = parent.fork_child();
                case.write(&parent, 0, 2 * BLOCK, 3);
                expect_mixed(case, &child, "child");
                case.expect(&parent, 0, 2 * BLOCK, 3, "parent");
            },
        },
        Row {
            name: "22 child overwrites",
            guards: "the same with the roles swapped",
            run: |case| {
                let parent = mixed(case);
                let child = parent.fork_child();
                case.write(&child, 0, 2 * BLOCK, 3);
                expect_mixed(case, &parent, "parent");
                expect_mixed(case, &parent.fork_child(), "sibling");
            },
        },
        Row {
            name: "22 all but one page",
            guards: "closing a gap of one shared page with the wrong bytes",
            run: |case| {
                let parent = case.parent();
                let child = parent.fork_child();
                case.write(&child, BLOCK, 255, 2);
                case.write(&child, BLOCK + 256, 256, 2);
                let grandchild = child.fork_child();
                case.write(&child, 0, PAGES, 3);
                case.expect(&grandchild, BLOCK, 255, 2, "grandchild, before the page");
                case.expect(&grandchild, BLOCK + 255, 1, 1, "grandchild, the page");
                case.expect(&grandchild, BLOCK + 256, 256, 2, "grandchild, after the page");
                case.expect(&parent, 0, PAGES, 1, "parent");
            },
        },
        Row {
            name: "22 a pinned page among them",
            guards: "a pinned page shared in place, or left out of the layer (I3)",
            run: |case| {
                let parent = case.parent();
                let region = &parent.vm().ram().regions()[0];
                let (born, private) = (WORK_BASE / PAGE_SIZE + 7, WORK_BASE / PAGE_SIZE + BLOCK + 9);
                let pin_born =
                    region.pin(PageRange::new(born, born + 2), Access::Write, PinLifetime::Transient).unwrap();
                let (first, _) = parent.fork();
                // No longer owned: the pin copies.
                let pin_private =
                    region.pin(PageRange::new(private, private + 2), Access::Write, PinLifetime::LongTerm).unwrap();
                let (second, _) = parent.fork();
                for pin in [&pin_born, &pin_private] {
                    pin.slice().copy_from(&vec![0xd7u8; pin.len()]);
                }
                let word = 0xd7d7_d7d7_d7d7_d7d7;
                for at in [born, private] {
                    parent.expect_words(
                        at * PAGE_SIZE,
                        &vec![word; 1024],
                        &format!("{}: DMA in the parent", case.what),
                    );
                    let [sum, ..] =
                        parent.run(Command::Read { start: at * PAGE_SIZE, pages: 2, passes: 1, words: 512 });
                    assert_eq!(sum, 1024u64.wrapping_mul(word), "{}: the guest sees what the device wrote", case.what);
                }
                case.expect(&case.child(&first), 0, PAGES, 1, "child of the first");
                case.expect(&case.child(&second), 0, PAGES, 1, "child of the second");
            },
        },
    ]);
}

// --- 30: a page before its first access ---

#[test]
fn canon_30_untouched_page_then_write() {
    run(&[
        Row {
            name: "30 image of an untouched page",
            guards: "a write after the snapshot showing in it",
            run: |case| {
                let parent = case.untouched();
                let (image, _) = parent.fork();
                case.write(&parent, 0, PAGES, 2);
                case.expect(&case.child(&image), 0, PAGES, None, "child");
            },
        },
        Row {
            name: "30 untouched in a child",
            guards: "the same where the page is a hole two layers down",
            run: |case| {
                let child = case.untouched().fork_child();
                case.write(&child, 0, 1, 2);
                let (image, _) = child.fork();
                case.write(&child, 0, PAGES, 3);
                let grandchild = case.child(&image);
                case.expect(&grandchild, 0, 1, 2, "the touched page");
                case.expect(&grandchild, 1, PAGES - 1, None, "the rest");
            },
        },
    ]);
}

// --- 37: the exact set of a VM's own pages ---

/// Runs of work pages, by name.
fn patterns() -> Vec<(&'static str, Vec<(u64, u64)>)> {
    vec![
        ("all clean", vec![]),
        ("all", vec![(0, PAGES)]),
        ("all but the edges", vec![(1, PAGES - 2)]),
        ("the middle", vec![(PAGES / 2 - 3, 6)]),
        ("half of a huge page", vec![(3 * BLOCK, BLOCK / 2)]),
        ("every third page", (0..PAGES / 3).map(|n| (n * 3, 1)).collect()),
    ]
}

fn expect_exact(case: &Case<'_>, guest: &Guest, who: &str, runs: &[(u64, u64)]) {
    // The guest's own commands touch low memory (mailbox, stack, the page tables' accessed and
    // dirty bits): done before counting.
    guest.run(Command::Read { start: WORK_BASE, pages: PAGES, passes: 1, words: 1 });
    guest.run(Command::SharedCount { address: WORK_BASE - PAGE_SIZE, count: 1 });
    let before = guest.exclusive();
    assert!(guest.owned_work_pages().is_empty(), "{}: {who} owns pages it has not written", case.what);
    for (first, pages) in runs {
        case.write(guest, *first, *pages, 2);
    }
    let written: Vec<u64> = runs.iter().flat_map(|(first, pages)| *first..first + pages).collect();
    assert!(guest.owned_work_pages() == written, "{}: {who} owns other pages than it has written", case.what);
    assert_eq!(guest.exclusive() - before, written.len() as u64, "{}: {who}'s statistics", case.what);
}

#[test]
fn canon_37_exactly_the_written_pages() {
    run(&[
        Row {
            name: "37 child",
            guards: "copies made for pages that were only read, or written pages not counted",
            run: |case| {
                let parent = case.parent();
                let (image, _) = parent.fork();
                for (name, runs) in patterns() {
                    expect_exact(case, &case.child(&image), name, &runs);
                }
            },
        },
        Row {
            name: "37 parent",
            guards: "pages counted as the parent's own although they are a layer's",
            run: |case| {
                for (name, runs) in patterns() {
                    let parent = case.parent();
                    drop(parent.fork());
                    expect_exact(case, &parent, name, &runs);
                }
            },
        },
    ]);
}

/// Compares `private_kib` with the kernel's own accounting, which counts by other means.
#[test]
fn private_memory_is_what_the_kernel_says() {
    run(&[Row {
        name: "private memory",
        guards: "memory charged to nobody, or twice",
        run: |case| {
            let parent = case.parent();
            let (image, _) = parent.fork();
            let child = case.child(&image);
            let agree = |guest: &Guest, who: &str, at_least: u64| {
                let region = &guest.vm().ram().regions()[0];
                let kernel = smaps_anonymous_kib(region.host_address(), region.pages());
                let ours = guest.vm().memory_stats().unwrap().private_kib;
                assert_eq!(ours, kernel, "{}: {who}", case.what);
                assert!(ours >= at_least, "{}: {who} has {ours} KiB of its own, wrote {at_least}", case.what);
            };
            agree(&child, "a fresh child", 0);
            case.write(&child, 5, 1000, 2);
            agree(&child, "a child that wrote", 4000);
            case.write(&parent, BLOCK, 3 * BLOCK, 2);
            agree(&parent, "a parent that wrote", 6 * BLOCK);
            let grandchild = child.fork_child();
            agree(&child, "a forked child", 0);
            case.write(&grandchild, 0, 3, 3);
            agree(&grandchild, "a grandchild", 12);
        },
    }]);
}
