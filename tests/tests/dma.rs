//! Rows 3, 5-9, 13 and 29 of the kernel's tests of copy-on-write and pins (`memory/tests/canon` has
//! the table), with a KVM guest as the CPU and io_uring's registered buffers as the device: the
//! guest must see the device's writes, and the device the guest's, and no other VM sees any of
//! them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../memory/tests/dma/mod.rs"]
mod dma;

use clade_guests::abi::{PAGE_SIZE, WORK_BASE, model};
use clade_memory::{Access, Backing, PageRange, PinLifetime};
use clade_tests::{Guest, Turn, Writer, expect_nothing_held};
use clade_vmm::vm::Context;

use dma::Device;

/// 16 MiB of work pages: eight blocks of 2 MiB.
const MIB: u64 = 32;
const PAGES: u64 = (MIB << 20) / PAGE_SIZE - WORK_BASE / PAGE_SIZE;
/// The pages that the device holds: on both sides of a block's edge.
const FIRST: u64 = 500;
const HELD: u64 = 24;

struct Row {
    name: &'static str,
    /// The leak that the row guards against.
    guards: &'static str,
    run: fn(&Context, &str),
}

/// Returns the words that [`Guest::fill`] would write to the held pages.
fn words(seed: u64) -> Vec<u8> {
    let mut words = vec![0; (HELD * PAGE_SIZE / 8) as usize];
    model::fill(&mut words, WORK_BASE + FIRST * PAGE_SIZE, seed);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn guest(context: &Context) -> Guest {
    let guest = Guest::boot(context, MIB, 1);
    guest.fill(Writer::Guest, 0, PAGES, 1);
    guest
}

fn device(guest: &Guest, access: Access) -> Device {
    let range = PageRange::with_len(WORK_BASE / PAGE_SIZE + FIRST, HELD);
    Device::attach(guest.vm().ram().regions()[0].pin_as("test", range, access, PinLifetime::LongTerm).unwrap())
}

/// The guest writes and the device sees it; the device writes and the guest sees it.
fn coherent(guest: &Guest, device: &mut Device, writes: bool, seed: u64, what: &str) {
    guest.fill(Writer::Guest, FIRST, HELD, seed);
    assert!(device.read() == words(seed), "{what}: the device does not see what the guest wrote");
    if writes {
        device.put(0, &words(seed + 1));
        guest.expect(FIRST, HELD, Some(seed + 1), &format!("{what}: the guest does not see what the device wrote"));
    }
}

#[test]
fn canon_dma_beside_a_running_guest() {
    let rows = [
        Row {
            name: "3 child's read pin",
            guards: "a child's device reading what the parent's CPU writes later",
            run: |context, what| {
                let parent = guest(context);
                let child = parent.fork_child();
                let mut device = device(&child, Access::Read);
                let all = child.vm().ram().regions()[0].range();
                let gone = child.vm().ram().regions()[0].discard(all).unwrap();
                assert_eq!(gone.pinned, HELD, "{what}: I7");
                parent.fill(Writer::Guest, 0, PAGES, 2);
                assert!(device.read() == words(1), "{what}: after the child has discarded");
                drop(child);
                parent.fill(Writer::Guest, 0, PAGES, 3);
                assert!(device.read() == words(1), "{what}: after the child has gone");
            },
        },
        Row {
            name: "5 parent's read pin, child writes",
            guards: "a parent's device reading what a child's CPU writes",
            run: |context, what| {
                let parent = guest(context);
                let mut device = device(&parent, Access::Read);
                let child = parent.fork_child();
                child.fill(Writer::Guest, 0, PAGES, 2);
                assert!(device.read() == words(1), "{what}");
                coherent(&parent, &mut device, false, 3, what);
                child.expect(0, PAGES, Some(2), what);
            },
        },
        Row {
            name: "6 the same, pinned after the fork",
            guards: "a read pin of shared pages that is not unshared",
            run: |context, what| {
                let parent = guest(context);
                let child = parent.fork_child();
                let mut device = device(&parent, Access::Read);
                child.fill(Writer::Guest, 0, PAGES, 2);
                assert!(device.read() == words(1), "{what}");
                coherent(&parent, &mut device, false, 3, what);
                child.expect(0, PAGES, Some(2), what);
            },
        },
        Row {
            name: "7, 8 fork + iouring",
            guards: "a device and its guest parting ways at a fork, or DMA in the child",
            run: |context, what| {
                let parent = guest(context);
                let mut device = device(&parent, Access::Write);
                let first = parent.fork_child();
                coherent(&parent, &mut device, true, 2, what);
                first.expect(0, PAGES, Some(1), &format!("{what}: first child"));
                let second = parent.fork_child();
                coherent(&parent, &mut device, true, 4, what);
                first.fill(Writer::Guest, FIRST, HELD, 9);
                coherent(&parent, &mut device, true, 6, what);
                second.expect(FIRST, HELD, Some(3), &format!("{what}: second child"));
                second.expect(0, FIRST, Some(1), &format!("{what}: second child, the rest"));
            },
        },
        Row {
            name: "9, 13 read pin on shared, and on exclusive",
            guards: "a read pin of a frame that the guest's CPU leaves; a copy of a page that is the VM's own",
            run: |context, what| {
                let parent = guest(context);
                let child = parent.fork_child();
                let shared = device(&child, Access::Read);
                let own = child.exclusive();
                let mut again = device(&child, Access::Read);
                assert_eq!(child.exclusive(), own, "{what}: a pin of exclusive pages has copied");
                drop(shared);
                coherent(&child, &mut again, false, 2, what);
                parent.expect(0, PAGES, Some(1), what);
            },
        },
        Row {
            name: "29 wp-fork-pin",
            guards: "protection of a background copy keeping a device, its guest or a second child from the pages",
            run: |context, what| {
                let parent = guest(context);
                drop(parent.fork_child());
                // Enough for the copy to be left to the background.
                parent.fill(Writer::Guest, 0, 2_000, 2);
                let mut device = device(&parent, Access::Write);
                let (first, report) = parent.fork();
                assert_eq!(report.freeze.pinned, HELD, "{what}: {report:?}");
                let second = parent.fork_child();
                coherent(&parent, &mut device, true, 3, what);
                parent.fill(Writer::Guest, 0, FIRST, 5);
                let first = Guest::child(context, &first);
                for child in [&first, &second] {
                    child.expect(0, 2_000, Some(2), what);
                    child.expect(2_000, PAGES - 2_000, Some(1), what);
                }
                first.fill(Writer::Guest, 0, 2_000, 6);
                second.expect(0, 2_000, Some(2), what);
            },
        },
    ];
    let Some(turn) = Turn::take() else { return };
    for backing in [Backing::Huge, Backing::Small] {
        let context = turn.context(backing);
        for row in &rows {
            let what = format!("{} ({}), {} pages", row.name, row.guards, backing.name());
            println!("{what}");
            (row.run)(&context, &what);
            context.drain();
            expect_nothing_held(context.store(), row.name);
        }
    }
}
