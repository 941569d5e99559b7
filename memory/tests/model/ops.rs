//! The operations, and the generation of their schedules.

use clade_memory::{Access, PAGE_SIZE, PageRange, PinLifetime};
use proptest::prelude::*;

use crate::pages::Inherits;

/// A range of bytes or pages, reduced to the size of the memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    start: u64,
    len: u64,
}

impl At {
    /// In pages.
    pub(crate) fn pages(self, pages: u64) -> PageRange {
        let start = self.start % pages;
        PageRange::new(start, start.saturating_add(self.len.max(1)).min(pages))
    }

    /// In bytes.
    pub(crate) fn bytes(self, pages: u64) -> std::ops::Range<u64> {
        let all = pages * PAGE_SIZE;
        let start = self.start % all;
        start..start.saturating_add(self.len.max(1)).min(all)
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// A vCPU or the VMM writes.
    Write {
        vm: usize,
        at: At,
        byte: u8,
    },
    Read {
        vm: usize,
        at: At,
    },
    /// In the background: other operations continue while pages are being copied.
    Freeze {
        vm: usize,
        background: bool,
    },
    /// Of any image, regardless of age and generation.
    Clone {
        image: usize,
    },
    /// Its devices are dropped first, or continue with the remaining memory.
    DropVm {
        vm: usize,
        devices_go_on: bool,
    },
    DropImage {
        image: usize,
    },
    Pin {
        vm: usize,
        at: At,
        access: Access,
        term: PinLifetime,
    },
    /// A device writes through a pin, at any time after it was taken.
    DmaWrite {
        pin: usize,
        byte: u8,
    },
    /// A device reads through a pin.
    DmaRead {
        pin: usize,
    },
    Unpin {
        pin: usize,
    },
    /// Resets to any image of this size. Then writes, and resets to it again, for each of `again`.
    Reset {
        vm: usize,
        image: usize,
        again: Vec<(At, u8)>,
    },
    Discard {
        vm: usize,
        at: At,
    },
    ShowReference {
        vm: usize,
        at: At,
        byte: u8,
    },
    /// To a disk, or to another memory file system.
    Evict {
        vm: usize,
        at: At,
        disk: bool,
    },
    /// Writes all of a VM's own pages to a file. Its touched pages are read ahead, or not.
    Suspend {
        vm: usize,
        wake: bool,
    },
    /// Pages become the VM's own before they are written.
    CopyAhead {
        vm: usize,
        at: At,
    },
    DontFork {
        vm: usize,
        at: At,
        what: Option<Inherits>,
    },
    /// Waits for background work.
    Settle {
        vm: usize,
    },
    /// A VM's view is merged.
    Compact {
        vm: usize,
    },
    /// Merges an image's view: its contents stay the same.
    CompactImage {
        image: usize,
    },
    /// Punches pages that no view shows.
    Sweep,
    /// Memory pressure: the kernel reclaims pages.
    Reclaim {
        vm: usize,
        at: At,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let n = any::<usize>;
    let near_an_edge = prop_oneof![
        any::<u32>().prop_map(u64::from),
        (0..4096u64, 0..32u64).prop_map(|(page, d)| (page * PAGE_SIZE + d).saturating_sub(16))
    ];
    // Occasionally long enough that a freeze remaps its copies instead of keeping pages in place.
    let len = prop_oneof![8 => 1..64u64, 8 => 1..9000u64, 1 => 300 * PAGE_SIZE..700 * PAGE_SIZE];
    let bytes = || (near_an_edge.clone(), len.clone()).prop_map(|(start, len)| At { start, len });
    let run = prop_oneof![6 => 1..40u64, 1 => 1..300u64];
    let pages = || (0..4096u64, run.clone()).prop_map(|(start, len)| At { start, len });
    // Whole blocks too, which have one record until a part of them is pinned.
    let pinned = prop_oneof![
        6 => (0..4096u64, 1..8u64).prop_map(|(start, len)| At { start, len }),
        1 => Just(At { start: 0, len: 512 }),
        1 => Just(At { start: 0, len: u64::MAX }),
    ];
    // From the second reset on, layers are read in another way.
    let again = prop_oneof![
        3 => Just(Vec::new()),
        1 => proptest::collection::vec((bytes(), any::<u8>()), 1..4),
    ];
    let access = prop_oneof![2 => Just(Access::Write), 1 => Just(Access::Read)];
    let term = prop_oneof![Just(PinLifetime::Transient), Just(PinLifetime::LongTerm)];
    let inherits = prop_oneof![
        2 => Just(Inherits::Absent),
        2 => Just(Inherits::Zeroed),
        2 => (0..3u8).prop_map(Inherits::Fresh),
    ];
    // Few pages, as between two that are copied together; and removed everywhere, so that a child
    // has absent pages that are no longer declared.
    let few = (0..4096u64, 1..5u64).prop_map(|(start, len)| At { start, len });
    let dont_fork = prop_oneof![
        5 => (prop_oneof![pages(), few], inherits).prop_map(|(at, what)| (at, Some(what))),
        1 => pages().prop_map(|at| (at, None)),
        2 => Just((At { start: 0, len: u64::MAX }, None)),
    ];
    prop_oneof![
        10 => (n(), bytes(), any::<u8>()).prop_map(|(vm, at, byte)| Op::Write { vm, at, byte }),
        3 => (n(), bytes()).prop_map(|(vm, at)| Op::Read { vm, at }),
        4 => (n(), any::<bool>()).prop_map(|(vm, background)| Op::Freeze { vm, background }),
        3 => n().prop_map(|image| Op::Clone { image }),
        2 => (n(), any::<bool>()).prop_map(|(vm, devices_go_on)| Op::DropVm { vm, devices_go_on }),
        1 => n().prop_map(|image| Op::DropImage { image }),
        4 => (n(), pinned, access, term).prop_map(|(vm, at, access, term)| Op::Pin { vm, at, access, term }),
        5 => (n(), any::<u8>()).prop_map(|(pin, byte)| Op::DmaWrite { pin, byte }),
        3 => n().prop_map(|pin| Op::DmaRead { pin }),
        4 => n().prop_map(|pin| Op::Unpin { pin }),
        3 => (n(), n(), again).prop_map(|(vm, image, again)| Op::Reset { vm, image, again }),
        2 => (n(), pages()).prop_map(|(vm, at)| Op::Discard { vm, at }),
        1 => (n(), pages(), 0..3u8).prop_map(|(vm, at, byte)| Op::ShowReference { vm, at, byte }),
        1 => (n(), pages(), prop_oneof![20 => Just(false), 1 => Just(true)])
            .prop_map(|(vm, at, disk)| Op::Evict { vm, at, disk }),
        2 => (n(), any::<bool>()).prop_map(|(vm, wake)| Op::Suspend { vm, wake }),
        3 => (n(), pages()).prop_map(|(vm, at)| Op::CopyAhead { vm, at }),
        2 => (n(), dont_fork).prop_map(|(vm, (at, what))| Op::DontFork { vm, at, what }),
        1 => n().prop_map(|vm| Op::Settle { vm }),
        1 => n().prop_map(|vm| Op::Compact { vm }),
        1 => n().prop_map(|image| Op::CompactImage { image }),
        2 => Just(Op::Sweep),
        2 => (n(), pages()).prop_map(|(vm, at)| Op::Reclaim { vm, at }),
    ]
}

/// A memory size, and a list of operations.
pub(crate) fn schedule() -> impl Strategy<Value = (u64, Vec<Op>)> {
    // A part of a block, which covers everything except huge pages and sharing back at a seventh of
    // the cost; and one whole block with a part of another, which covers both shapes of ownership
    // record.
    let pages = prop_oneof![2 => Just(90u64), 1 => Just(512 + 90u64)];
    (pages, proptest::collection::vec(op(), 1..400))
}
