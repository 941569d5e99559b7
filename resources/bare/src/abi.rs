//! The interface between the bare guest and the host. This file is compiled into both.
//!
//! # Memory
//!
//! | guest-physical | content |
//! |---|---|
//! | `0x8000` | the real-mode start of the other vCPUs |
//! | [`MAILBOX_BASE`] | one [`Mailbox`] page per vCPU |
//! | [`IMAGE_BASE`] | the image |
//! | [`PER_VCPU_BASE`] | task state and stacks, [`PER_VCPU_SIZE`] each |
//! | [`PAGE_TABLES`] | a PML4, a PDPT and a page directory for every GiB in use |
//! | [`WORK_BASE`] and up | never touched except by a command |
//!
//! All RAM in the memory map that the guest is booted with is mapped one to one, up to 512 GiB, and
//! so are the local APIC and the 2 MiB from [`VIRTIO_BASE`]. An access anywhere else is a page
//! fault, and is reported as one.
//!
//! # vCPUs
//!
//! The first vCPU starts all others by INIT and start-up IPIs, however many there are; a vCPU's
//! index is its initial APIC ID, which the host must set in CPUID leaf 1. A VMM without an
//! in-kernel local APIC sees the IPIs as three 32-bit MMIO writes to 0xfee00300, and may ignore
//! them, as all others to the APIC's page. Interrupts stay off except while a vCPU waits for the
//! doorbell, and while [`Command::Relay`] sleeps.
//!
//! # Commands
//!
//! A vCPU without a command halts. The host writes `command` and `args`, then `cmd_seq`, one higher
//! than before; that store must be the last (a release store: it pairs with the guest's load, which
//! x86 does not move behind the loads that follow). Then the host rings the doorbell: it sends the
//! vCPU's local APIC an interrupt with vector [`DOORBELL`]. A vCPU that runs a command polls its
//! mailbox and needs no ring; without a local APIC, an idle vCPU polls too. A VMM that starts a
//! vCPU from a saved state rings once, because the mailbox may have changed since the vCPU halted.
//! The guest copies command and arguments once, stores `ack_seq`, and runs the command. When it
//! ends, the guest stores `status`, `result`, `done_seq` and `state`, in that order, and then
//! reports.
//!
//! A running command reads `cmd_seq` at least every [`POLL_OPS`] operations. A new command
//! interrupts it: the old one ends with [`Status::Interrupted`] and without a report.
//! [`Command::Idle`] and [`Command::Announce`] store no status, progress or result, so that after
//! interrupting with `Idle` and waiting for its `Done`, the host reads the exact progress of the
//! interrupted command.
//!
//! # Reports
//!
//! A report is a 32-bit `out` to [`REPORT_PORT`]; see [`Report`].

#[path = "abi/model.rs"]
pub mod model;

/// Bytes in a page, the unit of commands.
pub const PAGE_SIZE: u64 = 4096;
/// 64-bit words in a page.
pub const PAGE_WORDS: u64 = PAGE_SIZE / 8;

/// First of the mailbox pages.
pub const MAILBOX_BASE: u64 = 0x10_0000;
/// Distance between mailboxes.
pub const MAILBOX_STRIDE: u64 = PAGE_SIZE;
/// vCPUs with an initial APIC ID of this or more halt at once.
pub const MAX_VCPUS: u64 = 32;

/// Address that the image is linked at.
pub const IMAGE_BASE: u64 = 0x20_0000;
/// First of the per-vCPU areas. An area starts with the task state segment and the stack for ring 0
/// in one page.
pub const PER_VCPU_BASE: u64 = 0x28_0000;
/// Size of a per-vCPU area; a power of two, because the exception handler finds the vCPU's index
/// from its stack.
pub const PER_VCPU_SIZE: u64 = 0x4000;
/// Page tables start here and end below [`WORK_BASE`].
pub const PAGE_TABLES: u64 = 0x40_0000;
/// The first address that the host may give to commands.
pub const WORK_BASE: u64 = 0x100_0000;

/// Address of the first virtio device's registers; each device has a page.
pub const VIRTIO_BASE: u64 = 0xd000_0000;

/// The port that reports are written to.
pub const REPORT_PORT: u16 = 0xf4;
/// The vector of the interrupt by which the host wakes a vCPU that waits for a command.
pub const DOORBELL: u8 = 48;
/// A running command reads `cmd_seq` at least this often.
pub const POLL_OPS: u64 = 64;

/// In [`Mailbox::magic`] as soon as a vCPU runs. The last two characters are the version of this
/// interface.
pub const MAGIC: u64 = u64::from_le_bytes(*b"CLADE_02");

/// Returns the address of a vCPU's mailbox.
pub const fn mailbox_gpa(vcpu: u64) -> u64 {
    MAILBOX_BASE + vcpu * MAILBOX_STRIDE
}

/// A vCPU's mailbox. The host's fields have cache lines of their own.
///
/// The host uses [`offset`], because it reaches the mailbox through guest memory and never as a
/// Rust reference.
#[repr(C)]
#[derive(Debug)]
pub struct Mailbox {
    /// [`MAGIC`].
    pub magic: u64,
    /// A [`State`].
    pub state: u64,
    /// Number of the command taken last.
    pub ack_seq: u64,
    /// Number of the command that ended last.
    pub done_seq: u64,
    /// The [`Status`] of the last command that has one.
    pub status: u64,
    _guest: [u64; 3],

    /// Number of the command in `command` and `args`; the host stores it last.
    pub cmd_seq: u64,
    /// A code of [`Command`].
    pub command: u64,
    /// Its arguments.
    pub args: [u64; 8],
    _host: [u64; 6],

    /// Progress of the command, in its documented unit.
    pub progress: u64,
    /// Results of the command.
    pub result: [u64; 4],
    _results: [u64; 3],

    /// Vector of the exception that stopped the vCPU; meaningful in [`State::Faulted`], as are the
    /// next four.
    pub fault_vector: u64,
    /// Its error code, 0 for a vector without one.
    pub fault_error: u64,
    /// The address of its instruction.
    pub fault_rip: u64,
    /// CR2, which is the address for a page fault.
    pub fault_cr2: u64,
    /// The stack pointer at its instruction.
    pub fault_rsp: u64,
}

/// Byte offsets into a mailbox page.
pub mod offset {
    use super::Mailbox;
    use core::mem::offset_of;

    macro_rules! offsets {
        ($($name:ident = $field:ident),* $(,)?) => {
            $(
                #[doc = concat!("Of [`Mailbox::", stringify!($field), "`].")]
                pub const $name: u64 = offset_of!(Mailbox, $field) as u64;
            )*
        };
    }

    offsets! {
        MAGIC = magic,
        STATE = state,
        ACK_SEQ = ack_seq,
        DONE_SEQ = done_seq,
        STATUS = status,
        CMD_SEQ = cmd_seq,
        COMMAND = command,
        ARGS = args,
        PROGRESS = progress,
        RESULT = result,
        FAULT_VECTOR = fault_vector,
        FAULT_ERROR = fault_error,
        FAULT_RIP = fault_rip,
        FAULT_CR2 = fault_cr2,
        FAULT_RSP = fault_rsp,
    }
}

/// An enum of numbers that can be read back from guest memory.
macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident: $repr:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:expr),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr($repr)]
        pub enum $name { $($(#[$variant_doc])* $variant = $number),* }

        impl $name {
            /// Returns the value with this number, if it exists.
            pub const fn from_number(number: $repr) -> Option<Self> {
                match number {
                    $(number if number == $number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

// Behind the macro that it uses.
#[path = "abi/disk.rs"]
pub mod disk;

use disk::DiskRun;

numbered! {
    /// The state of a vCPU.
    State: u64 {
        /// Not in its command loop yet.
        Booting = 0,
        /// Waits for a command, and has run none yet.
        Idle = 1,
        /// Runs the command `ack_seq`.
        Running = 2,
        /// Waits for a command; the last one was `done_seq`.
        Done = 3,
        /// Halted by a command, with interrupts off: only INIT wakes it.
        Halted = 4,
        /// Stopped by an exception, for good.
        Faulted = 5,
    }
}

numbered! {
    /// The outcome of a command.
    Status: u64 {
        /// No command has ended yet.
        None = 0,
        /// The command has done all of its work.
        Complete = 1,
        /// `Verify` found unexpected words.
        Mismatch = 2,
        /// Another command came first.
        Interrupted = 3,
        /// No such command, an address that is not a multiple of 8, a range that wraps, or no
        /// pages.
        Rejected = 4,
    }
}

numbered! {
    /// The event of a report.
    Event: u8 {
        /// The vCPU has entered its command loop, in ring 3.
        Ready = 1,
        /// A command ended without interruption.
        Done = 2,
        /// The answer to [`Command::Announce`] and [`Command::AnnounceAndHalt`].
        Announce = 3,
        /// An exception stopped the vCPU; the mailbox has the details.
        Fault = 4,
        /// [`Command::Verify`] ended, with [`Status::Mismatch`].
        Mismatch = 5,
    }
}

/// A report, as one 32-bit value: the event in bits 0-7, the vCPU in 8-15, the command's number in
/// 16-31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// The event.
    pub event: Event,
    /// The vCPU.
    pub vcpu: u8,
    /// The low bits of the number of the command taken last.
    pub seq: u16,
}

impl Report {
    /// Returns the value for the port.
    pub const fn encode(self) -> u32 {
        self.event as u32 | (self.vcpu as u32) << 8 | (self.seq as u32) << 16
    }

    /// Returns the report in a value from the port, if the event exists.
    pub const fn decode(value: u32) -> Option<Self> {
        let [event, vcpu, low, high] = value.to_le_bytes();
        match Event::from_number(event) {
            Some(event) => Some(Self { event, vcpu, seq: u16::from_le_bytes([low, high]) }),
            None => None,
        }
    }
}

/// An order to a vCPU. Addresses are guest-physical and multiples of 8; lengths are in pages of 4
/// KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Does nothing: ends the running command, and keeps its status, progress and result.
    Idle,
    /// Counts `progress` up for ever, and touches nothing but the mailbox.
    Spin,
    /// Sets every word to [`fill_word`]. `progress` and `result[0]` count pages.
    Fill { start: u64, pages: u64, seed: u64 },
    /// Compares every word with [`fill_word`]. `result` is the number of words that differ, the
    /// address of the first, its value, and the value expected there. `progress` counts pages.
    Verify { start: u64, pages: u64, seed: u64 },
    /// Operation `i`, from `first` on, stores one word given by [`write_op`], and then stores `i +
    /// 1` in `progress`: a host that reads `progress` and then the memory sees at least that many
    /// operations. `count` 0 is for ever. `result[0]` is the final `progress`.
    Write { start: u64, pages: u64, window: u64, seed: u64, count: u64, first: u64 },
    /// Increments the words `start`, `start + 8 * stride` and so on, over and over, for ever;
    /// `stride` is in words, and 0 stands for one word a page. `progress` and `result[0]` count
    /// increments.
    Count { start: u64, pages: u64, stride: u64 },
    /// Reads the first `words` words (0 stands for 1) of every page, `passes` times (0: for ever).
    /// `result` is their sum and the time-stamp counter's cycles. `progress` counts pages.
    Read { start: u64, pages: u64, passes: u64, words: u64 },
    /// Stores [`touch_word`] in the first word of every page. `result` is the pages and the
    /// time-stamp counter's cycles. `progress` counts pages.
    Touch { start: u64, pages: u64, value: u64 },
    /// Reports [`Event::Announce`] with this command's number before it stores anything, even
    /// `ack_seq` or the end of the command that it interrupts: so the host times the vCPU's first
    /// instructions, not its first broken COW.
    Announce,
    /// Adds 1 to one word, `count` times, atomically. `progress` and `result[0]` count.
    SharedCount { address: u64, count: u64 },
    /// Reports `Done` and halts for good; see [`State::Halted`].
    Halt,
    /// Takes the virtio block device at place `slot`, with a queue of `size` descriptors in the
    /// [`disk::AREA_PAGES`] pages at `area`. `result` is the disk's sectors, the features that were
    /// negotiated, and the device's status.
    DiskOpen { slot: u64, area: u64, size: u64 },
    /// Moves blocks; see [`DiskRun`]. `progress` counts operations that are done. `result` is
    /// operations done, those that ended with a status other than 0, words that were wrong (and
    /// [`disk::VIOLATION`], if the device broke the rules), and the time-stamp counter's cycles.
    DiskRun(DiskRun),
    /// Resets the device of `area` and waits until its status shows that. Ends a `DiskRun` on
    /// another vCPU. `result[0]` is the status after it.
    DiskReset { area: u64 },
    /// Halts until an interrupt comes, and answers it by one to vCPU `peer`, over and over; with
    /// `first`, sends one before. Two vCPUs that name each other go on for ever unless an interrupt
    /// is lost. `progress` counts the times it was about to halt. A new command is seen only after
    /// an interrupt.
    Relay { peer: u64, first: bool },
    /// Restarts vCPU `peer` by INIT and two start-up IPIs and waits until it runs again, over and
    /// over. `progress` and `result[0]` count restarts.
    Restart { peer: u64 },
    /// As [`Self::Announce`], and then halts for good. It stores nothing in the mailbox, not even
    /// `ack_seq`.
    AnnounceAndHalt,
}

impl Command {
    /// Returns the words for [`Mailbox::command`] and [`Mailbox::args`].
    pub const fn encode(self) -> (u64, [u64; 8]) {
        match self {
            Self::Idle => (0, [0; 8]),
            Self::Spin => (1, [0; 8]),
            Self::Fill { start, pages, seed } => (2, [start, pages, seed, 0, 0, 0, 0, 0]),
            Self::Verify { start, pages, seed } => (3, [start, pages, seed, 0, 0, 0, 0, 0]),
            Self::Write { start, pages, window, seed, count, first } => {
                (4, [start, pages, window, seed, count, first, 0, 0])
            }
            Self::Count { start, pages, stride } => (5, [start, pages, stride, 0, 0, 0, 0, 0]),
            Self::Read { start, pages, passes, words } => (6, [start, pages, passes, words, 0, 0, 0, 0]),
            Self::Touch { start, pages, value } => (7, [start, pages, value, 0, 0, 0, 0, 0]),
            Self::Announce => (8, [0; 8]),
            Self::SharedCount { address, count } => (9, [address, count, 0, 0, 0, 0, 0, 0]),
            Self::Halt => (10, [0; 8]),
            Self::DiskOpen { slot, area, size } => (11, [slot, area, size, 0, 0, 0, 0, 0]),
            Self::DiskRun(run) => (12, run.encode()),
            Self::DiskReset { area } => (13, [area, 0, 0, 0, 0, 0, 0, 0]),
            Self::Relay { peer, first } => (14, [peer, first as u64, 0, 0, 0, 0, 0, 0]),
            Self::Restart { peer } => (15, [peer, 0, 0, 0, 0, 0, 0, 0]),
            Self::AnnounceAndHalt => (16, [0; 8]),
        }
    }

    /// Returns the command in a mailbox's words, if it exists and its range is possible.
    pub const fn decode(code: u64, args: [u64; 8]) -> Option<Self> {
        let [a, b, c, d, e, f, ..] = args;
        let command = match code {
            0 => return Some(Self::Idle),
            1 => return Some(Self::Spin),
            2 => Self::Fill { start: a, pages: b, seed: c },
            3 => Self::Verify { start: a, pages: b, seed: c },
            4 => Self::Write { start: a, pages: b, window: c, seed: d, count: e, first: f },
            5 => Self::Count { start: a, pages: b, stride: c },
            6 => Self::Read { start: a, pages: b, passes: c, words: d },
            7 => Self::Touch { start: a, pages: b, value: c },
            8 => return Some(Self::Announce),
            9 if a.is_multiple_of(8) => return Some(Self::SharedCount { address: a, count: b }),
            10 => return Some(Self::Halt),
            11 if disk::is_place(a, b, c) => return Some(Self::DiskOpen { slot: a, area: b, size: c }),
            12 => match DiskRun::decode(args) {
                Some(run) => return Some(Self::DiskRun(run)),
                None => return None,
            },
            13 if a.is_multiple_of(PAGE_SIZE) => return Some(Self::DiskReset { area: a }),
            14 if a < MAX_VCPUS => return Some(Self::Relay { peer: a, first: b != 0 }),
            15 if a < MAX_VCPUS => return Some(Self::Restart { peer: a }),
            16 => return Some(Self::AnnounceAndHalt),
            _ => return None,
        };
        // All others work on a range of `b` pages from `a`, and some of them would never poll an
        // empty one.
        match b.checked_mul(PAGE_SIZE) {
            Some(bytes) if b > 0 && a.is_multiple_of(8) && a.checked_add(bytes).is_some() => Some(command),
            _ => None,
        }
    }
}

/// The step of splitmix64: the golden ratio's fraction, which is odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX_1: u64 = 0xbf58_476d_1ce4_e5b9;
const MIX_2: u64 = 0x94d0_49bb_1331_11eb;

/// The output function of splitmix64, a bijection.
#[inline(always)]
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(MIX_1);
    z = (z ^ (z >> 27)).wrapping_mul(MIX_2);
    z ^ (z >> 31)
}

/// Returns the word that [`Command::Fill`] stores at `gpa`. Words of one seed all differ.
#[inline(always)]
pub const fn fill_word(seed: u64, gpa: u64) -> u64 {
    mix(seed ^ gpa.wrapping_mul(GOLDEN))
}

/// Returns the word that [`Command::Touch`] stores at `gpa`.
#[inline(always)]
pub const fn touch_word(value: u64, gpa: u64) -> u64 {
    value ^ gpa
}

/// One operation of [`Command::Write`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOp {
    /// Page within the range.
    pub page: u64,
    /// Word within the page.
    pub slot: u64,
    /// The stored value.
    pub value: u64,
}

/// Operations after which a window of [`Command::Write`] moves on by one page.
pub const WINDOW_OPS_PER_PAGE: u64 = 8;

/// Returns operation `i` of [`Command::Write`].
///
/// With `r` the `i`-th output of splitmix64 started from `seed`, the value is `r`, the slot is the
/// low 9 bits of `r`, and the page is drawn from the high bits of `r`: from the whole range if
/// `window` is 0 or at least `pages`, otherwise from the `window` pages that follow page `i /
/// WINDOW_OPS_PER_PAGE`, where the range is taken as a circle. `n` operations thus dirty about
/// `window + n / 8` pages, and every page that the window has passed was very likely written.
///
/// Values of one seed all differ, and [`model::op_of`] finds the operation from the value. `pages`
/// must not be 0.
#[inline(always)]
pub const fn write_op(seed: u64, i: u64, pages: u64, window: u64) -> WriteOp {
    let value = mix(seed.wrapping_add(i.wrapping_add(1).wrapping_mul(GOLDEN)));
    let slot = value % PAGE_WORDS;
    let page = if window == 0 || window >= pages {
        scale(value, pages)
    } else {
        let page = (i / WINDOW_OPS_PER_PAGE) % pages + scale(value, window);
        if page >= pages { page - pages } else { page }
    };
    WriteOp { page, slot, value }
}

/// Returns a number below `bound`, from the high bits of `random`.
#[inline(always)]
pub(crate) const fn scale(random: u64, bound: u64) -> u64 {
    ((random as u128 * bound as u128) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mailbox_fields_have_stable_offsets() {
        assert_eq!(size_of::<Mailbox>(), 0x128);
        let offsets = [offset::MAGIC, offset::STATE, offset::ACK_SEQ, offset::DONE_SEQ, offset::STATUS];
        assert_eq!(offsets, [0, 8, 0x10, 0x18, 0x20]);
        assert_eq!([offset::CMD_SEQ, offset::COMMAND, offset::ARGS], [0x40, 0x48, 0x50]);
        assert_eq!([offset::PROGRESS, offset::RESULT], [0xc0, 0xc8]);
        let fault =
            [offset::FAULT_VECTOR, offset::FAULT_ERROR, offset::FAULT_RIP, offset::FAULT_CR2, offset::FAULT_RSP];
        assert_eq!(fault, [0x100, 0x108, 0x110, 0x118, 0x120]);
    }

    #[test]
    fn areas_do_not_overlap() {
        const {
            assert!(mailbox_gpa(MAX_VCPUS) <= IMAGE_BASE);
            assert!(PER_VCPU_BASE + MAX_VCPUS * PER_VCPU_SIZE <= PAGE_TABLES);
            assert!(PAGE_TABLES + (2 + 512) * PAGE_SIZE <= WORK_BASE);
        }
    }

    #[test]
    fn commands_survive_encoding() {
        let (start, pages) = (WORK_BASE, 7);
        let commands = [
            Command::Idle,
            Command::Spin,
            Command::Fill { start, pages, seed: 1 },
            Command::Verify { start, pages, seed: 1 },
            Command::Write { start, pages, window: 2, seed: 3, count: 4, first: 5 },
            Command::Count { start, pages, stride: 1 },
            Command::Read { start, pages, passes: 2, words: 3 },
            Command::Touch { start, pages, value: 9 },
            Command::Announce,
            Command::SharedCount { address: start, count: 3 },
            Command::Halt,
            Command::DiskOpen { slot: 3, area: start, size: 256 },
            Command::DiskRun(DiskRun {
                area: start,
                buffer: start + 0x10_0000,
                stride: 0x2000,
                what: disk::What::Verify,
                order: disk::Order::Random,
                depth: 32,
                sector: 8,
                sectors: 800,
                block: 8,
                count: 1000,
                seed: 7,
            }),
            Command::DiskReset { area: start },
            Command::Relay { peer: 3, first: true },
            Command::Restart { peer: 31 },
            Command::AnnounceAndHalt,
        ];
        for (code, command) in commands.into_iter().enumerate() {
            let (encoded, args) = command.encode();
            assert_eq!(encoded, code as u64);
            assert_eq!(Command::decode(encoded, args), Some(command));
        }
        assert_eq!(Command::decode(commands.len() as u64, [8; 8]), None);
    }

    #[test]
    fn impossible_ranges_are_rejected() {
        let fill = |start, pages| {
            let (code, args) = Command::Fill { start, pages, seed: 0 }.encode();
            Command::decode(code, args)
        };
        assert!(fill(WORK_BASE, 1).is_some());
        assert_eq!(fill(WORK_BASE, 0), None);
        assert_eq!(fill(WORK_BASE + 4, 1), None);
        assert_eq!(fill(WORK_BASE, u64::MAX / 2), None);
        assert_eq!(fill(u64::MAX - 4095, 1), None);
    }

    #[test]
    fn reports_survive_encoding() {
        let report = Report { event: Event::Mismatch, vcpu: 31, seq: 0xabcd };
        assert_eq!(report.encode(), 0xabcd_1f05);
        assert_eq!(Report::decode(report.encode()), Some(report));
        assert_eq!(Report::decode(0), None);
    }

    #[test]
    fn write_ops_stay_in_their_window() {
        for i in 0..10_000 {
            let op = write_op(5, i, 100, 0);
            assert!(op.page < 100 && op.slot < PAGE_WORDS);
            let op = write_op(5, i, 100, 10);
            let into_window = (op.page + 100 - (i / WINDOW_OPS_PER_PAGE) % 100) % 100;
            assert!(into_window < 10, "operation {i} is {into_window} pages into a window of 10");
        }
        assert_eq!(write_op(5, 9, 100, 0), write_op(5, 9, 100, 100));
    }

    #[test]
    fn write_ops_reach_every_page_and_slot() {
        let (mut pages, mut slots) = ([false; 16], [false; 512]);
        for i in 0..20_000 {
            let op = write_op(1, i, 16, 0);
            pages[op.page as usize] = true;
            slots[op.slot as usize] = true;
        }
        assert!(pages.into_iter().all(|seen| seen));
        assert!(slots.into_iter().all(|seen| seen));
    }
}
