//! The last exits of a vCPU from KVM_RUN, and the instructions emulated by `quirks`, for the flight
//! record.
//!
//! The vCPU's thread writes one word for each; any thread reads them. A reader that meets an entry
//! being replaced shows the newer one.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::VcpuExit;

use crate::kvm::Emulated;

/// Number of exits that are kept.
const KEPT: usize = 64;
/// Bits of an entry that hold its address.
const ADDRESS: u64 = (1 << 56) - 1;
/// Maximum length of a line.
const LINE: usize = 200;
/// Maximum number of lines for an ended VM, which leaves room in the flight record for other
/// events.
const MAX_LINES: usize = 24;

/// The kind of an entry. Its address is a port, a guest-physical address or, for an emulated
/// instruction, the instruction's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ExitKind {
    PortIn = 1,
    PortOut,
    MmioRead,
    MmioWrite,
    /// A signal, or `immediate_exit`.
    Kick,
    /// KVM could not emulate an instruction.
    Failure,
    /// Emulated here.
    Instruction,
    /// INT3, emulated here.
    Breakpoint,
    /// At the breakpoint at the guest's page-fault handler.
    PageFault,
    /// A state was saved.
    Saved,
    /// Another state was loaded.
    Loaded,
    /// Any other exit.
    Other,
}

const KINDS: [(ExitKind, &str); 12] = [
    (ExitKind::PortIn, "in"),
    (ExitKind::PortOut, "out"),
    (ExitKind::MmioRead, "read"),
    (ExitKind::MmioWrite, "write"),
    (ExitKind::Kick, "kick"),
    (ExitKind::Failure, "not emulated by KVM"),
    (ExitKind::Instruction, "emulated at"),
    (ExitKind::Breakpoint, "INT3 at"),
    (ExitKind::PageFault, "page fault"),
    (ExitKind::Saved, "saved"),
    (ExitKind::Loaded, "loaded"),
    (ExitKind::Other, "other"),
];

impl From<&Result<VcpuExit<'_>, kvm_ioctls::Error>> for ExitRecord {
    fn from(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Self {
        let (kind, address) = match exit {
            Ok(VcpuExit::IoIn(port, _)) => (ExitKind::PortIn, (*port).into()),
            Ok(VcpuExit::IoOut(port, _)) => (ExitKind::PortOut, (*port).into()),
            Ok(VcpuExit::MmioRead(address, _)) => (ExitKind::MmioRead, *address),
            Ok(VcpuExit::MmioWrite(address, _)) => (ExitKind::MmioWrite, *address),
            Ok(VcpuExit::InternalError) => (ExitKind::Failure, 0),
            Ok(VcpuExit::Debug(_)) => (ExitKind::PageFault, 0),
            Ok(VcpuExit::Intr) => (ExitKind::Kick, 0),
            Err(error) if error.errno() == libc::EINTR => (ExitKind::Kick, 0),
            _ => (ExitKind::Other, 0),
        };
        Self { kind, address }
    }
}

/// One exit, or one action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitRecord {
    pub(crate) kind: ExitKind,
    pub(crate) address: u64,
}

impl ExitRecord {
    pub(crate) fn emulated(what: Emulated, address: u64) -> Self {
        let kind = if what == Emulated::Breakpoint { ExitKind::Breakpoint } else { ExitKind::Instruction };
        Self { kind, address }
    }

    fn pack(self) -> u64 {
        (self.kind as u64) << 56 | self.address & ADDRESS
    }

    fn unpack(word: u64) -> Option<Self> {
        let (kind, _) = KINDS.iter().find(|(kind, _)| *kind as u64 == word >> 56)?;
        // Sign-extended: a kernel's addresses are at the top.
        Some(Self { kind: *kind, address: ((word << 8) as i64 >> 8) as u64 })
    }
}

impl fmt::Display for ExitRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = KINDS.iter().find(|(kind, _)| *kind == self.kind).map_or("", |(_, name)| name);
        match self.address {
            0 => f.write_str(name),
            address => write!(f, "{name} {address:#x}"),
        }
    }
}

/// The last [`KEPT`] entries of one vCPU.
#[derive(Debug)]
pub(crate) struct Exits {
    entries: [AtomicU64; KEPT],
    /// Entries so far.
    count: AtomicU64,
}

impl Default for Exits {
    fn default() -> Self {
        Self { entries: [const { AtomicU64::new(0) }; KEPT], count: AtomicU64::new(0) }
    }
}

impl Exits {
    /// Adds an entry. Only the vCPU's own thread does.
    pub(crate) fn note(&self, entry: ExitRecord) {
        // Relaxed: an entry is one word, and no other memory depends on it.
        let count = self.count.load(Ordering::Relaxed);
        self.entries[count as usize % KEPT].store(entry.pack(), Ordering::Relaxed);
        self.count.store(count.wrapping_add(1), Ordering::Relaxed);
    }

    /// The entries in words, the oldest first, in lines that fit into a flight record. Consecutive
    /// equal entries are merged, with their number.
    pub(crate) fn lines(&self, vcpu: usize) -> Vec<String> {
        // Relaxed: see `note`.
        let count = self.count.load(Ordering::Relaxed);
        let words = (count.saturating_sub(KEPT as u64)..count)
            .filter_map(|n| ExitRecord::unpack(self.entries[n as usize % KEPT].load(Ordering::Relaxed)));
        let mut runs: Vec<(ExitRecord, u32)> = Vec::new();
        for entry in words {
            match runs.last_mut() {
                Some((last, times)) if *last == entry => *times += 1,
                _ => runs.push((entry, 1)),
            }
        }
        let head = format!("vCPU {vcpu}, {count} exits, the last:");
        let mut lines = vec![head];
        for (entry, times) in runs {
            let word = if times > 1 { format!(" {entry} x{times},") } else { format!(" {entry},") };
            match lines.last_mut() {
                Some(line) if line.len() + word.len() <= LINE => line.push_str(&word),
                _ => lines.push(format!("vCPU {vcpu}:{word}")),
            }
        }
        lines
    }
}

/// The newest lines of each vCPU's entries, in words.
pub(crate) fn lines_of_all(all: &[Exits]) -> Vec<String> {
    let each = (MAX_LINES / all.len().max(1)).max(1);
    let lines = all.iter().enumerate().flat_map(|(vcpu, exits)| {
        let lines = exits.lines(vcpu);
        let older = lines.len().saturating_sub(each);
        lines.into_iter().skip(older)
    });
    lines.take(MAX_LINES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_exits_are_in_order_and_runs_are_counted() {
        let exits = Exits::default();
        assert_eq!(exits.lines(0), ["vCPU 0, 0 exits, the last:"]);
        for n in 0..100 {
            exits.note(ExitRecord { kind: ExitKind::PortOut, address: n });
        }
        for _ in 0..KEPT - 3 {
            exits.note(ExitRecord { kind: ExitKind::MmioWrite, address: 0xd000_0050 });
        }
        exits.note(ExitRecord::emulated(Emulated::Instruction, 0xffff_ffff_8100_0000));
        assert_eq!(
            exits.lines(1),
            ["vCPU 1, 162 exits, the last: out 0x62, out 0x63, write 0xd0000050 x61, \
                 emulated at 0xffffffff81000000,"]
        );
    }

    #[test]
    fn each_line_fits_a_slot_of_the_record() {
        let exits = Exits::default();
        for n in 0..2 * KEPT as u64 {
            exits.note(ExitRecord { kind: ExitKind::Failure, address: u64::MAX - n });
        }
        let lines = exits.lines(31);
        assert!(lines.iter().all(|line| line.len() <= LINE), "{lines:?}");
        assert_eq!(lines.concat().matches("not emulated").count(), KEPT);
    }

    #[test]
    fn every_kind_has_a_name_and_is_unpacked_as_it_was_packed() {
        for (kind, _) in KINDS {
            let entry = ExitRecord { kind, address: 7 };
            assert_eq!(ExitRecord::unpack(entry.pack()), Some(entry));
        }
        assert_eq!(ExitRecord::unpack(0), None);
    }
}
