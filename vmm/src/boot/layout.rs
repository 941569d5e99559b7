//! Guest memory at boot: addresses of the boot structures, and the ranges of RAM.
//!
//! | from | to | what |
//! |---|---|---|
//! | `0x0500` | `0x0520` | boot GDT: null, code, data, TSS |
//! | `0x0520` | `0x0528` | empty IDT (limit 0): early exceptions triple-fault, as on hardware |
//! | `0x6000` | `0x6038` | PVH `hvm_start_info` |
//! | `0x6040` | `0x6060` | PVH module list, one entry: the initramfs |
//! | `0x6080` | `0x7000` | PVH memory map |
//! | `0x7000` | `0x8000` | zero page (`boot_params`) of the 64-bit protocol |
//! | `0x8ff0` | | boot stack of the 64-bit protocol, grows down |
//! | `0x9000` | `0xf000` | boot page tables: PML4, PDPT, four PDs; 4 GiB in 2 MiB pages |
//! | `0x20000` | `0x20800` | command line |
//! | `0x9fc00` | `0xa0000` | MP floating pointer and table, in the last KiB of base memory |
//! | `0xa0000` | `0x100000` | reserved: see [`platform`](crate::platform) |
//! | `0x100000` | | kernel, at its link address |
//! | below the gap | | initramfs, as high as it fits |
//! | `0xc0000000` | `0x100000000` | no RAM: see [`platform`](crate::platform) |
//! | `0x100000000` | | the RAM that does not fit below the gap |
//!
//! Kernels search the last KiB of base memory for the MP floating pointer.

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::platform::{MMIO_GAP_END, MMIO_GAP_START};

/// Boot GDT.
pub(crate) const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// Boot IDT, empty.
pub(crate) const BOOT_IDT: GuestAddress = GuestAddress(0x520);
/// PVH `hvm_start_info`.
pub(crate) const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// PVH module list.
pub(crate) const PVH_MODLIST: GuestAddress = GuestAddress(0x6040);
/// PVH memory map.
pub(crate) const PVH_MEMMAP: GuestAddress = GuestAddress(0x6080);
/// Zero page.
pub(crate) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer of the 64-bit protocol.
pub(crate) const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Top level of the boot page tables.
pub(crate) const BOOT_PML4: GuestAddress = GuestAddress(0x9000);
/// Second level of the boot page tables.
pub(crate) const BOOT_PDPT: GuestAddress = GuestAddress(0xa000);
/// The first of [`BOOT_PD_COUNT`] page directories.
pub(crate) const BOOT_PD: GuestAddress = GuestAddress(0xb000);
/// Page directories: one per GiB.
pub(crate) const BOOT_PD_COUNT: u64 = 4;
/// Command line.
pub(crate) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line with its terminating NUL: the x86 `COMMAND_LINE_SIZE`.
pub(crate) const CMDLINE_CAPACITY: usize = 2048;
/// MP floating pointer, followed by the table. Also the start of the extended BIOS data area.
pub(crate) const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// End of base memory.
pub(crate) const BASE_MEMORY_END: GuestAddress = GuestAddress(0xa_0000);
/// Start of the memory a kernel may be loaded into.
pub(crate) const HIMEM_START: GuestAddress = GuestAddress(0x10_0000);
/// Maximum number of RAM ranges in a layout, so that every protocol's memory map can hold them.
pub(crate) const MAX_RAM_RANGES: usize = 64;
/// Minimum RAM of a guest: base memory and 1 MiB for a kernel.
pub(crate) const MIN_RAM: u64 = 0x20_0000;

/// Why a RAM layout was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// Base memory is missing or too small.
    #[error("RAM must start at address 0 and be at least {MIN_RAM:#x} bytes there, but {found:#x} bytes are there")]
    NoBaseMemory {
        /// Length in bytes of the range at address 0.
        found: u64,
    },
    /// An empty range, or one past the end of the address space.
    #[error("a RAM range of {len:#x} bytes at {start:#x} is empty or leaves the address space")]
    BadRange {
        /// The range's start.
        start: u64,
        /// The range's length in bytes.
        len: u64,
    },
    /// Two ranges overlap.
    #[error("RAM at {second:#x} begins before the RAM at {first:#x} ends")]
    Overlap {
        /// Start of the earlier range.
        first: u64,
        /// Start of the later range.
        second: u64,
    },
    /// RAM in the MMIO gap.
    #[error("RAM {start:#x}..{end:#x} reaches into the MMIO gap 0xc0000000..0x100000000")]
    InGap {
        /// Start of the range.
        start: u64,
        /// End of the range.
        end: u64,
    },
    /// More ranges than a memory map holds.
    #[error("{count} RAM ranges, at most {MAX_RAM_RANGES} are supported")]
    TooMany {
        /// The number of ranges.
        count: usize,
    },
}

/// A non-empty range of guest-physical addresses whose end is representable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GuestRange {
    start: u64,
    end: u64,
}

impl GuestRange {
    /// `len` bytes at `start`; `None` if the range is empty or leaves the address space.
    #[must_use]
    pub(crate) fn new(start: GuestAddress, len: u64) -> Option<Self> {
        let end = start.0.checked_add(len)?;
        (len > 0).then_some(Self { start: start.0, end })
    }

    /// First address.
    #[must_use]
    pub(crate) fn start(self) -> GuestAddress {
        GuestAddress(self.start)
    }

    /// The address after the last.
    #[must_use]
    pub(crate) fn end(self) -> GuestAddress {
        GuestAddress(self.end)
    }

    /// Length in bytes, never 0.
    #[must_use]
    pub(crate) fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether `inner` lies within this range.
    #[must_use]
    pub(crate) fn contains(self, inner: Self) -> bool {
        self.start <= inner.start && inner.end <= self.end
    }

    /// Whether the two share an address.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The part of the range between `low` and `high`, if any.
    fn clip(self, low: u64, high: u64) -> Option<Self> {
        let (start, end) = (self.start.max(low), self.end.min(high));
        (start < end).then_some(Self { start, end })
    }
}

impl std::fmt::Debug for GuestRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// The guest-physical ranges of RAM: sorted, disjoint, starting at 0, none in the MMIO gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestRamRanges(Vec<GuestRange>);

impl GuestRamRanges {
    /// Checks and sorts `ranges` of (start, length).
    pub(crate) fn new(ranges: impl IntoIterator<Item = (GuestAddress, u64)>) -> Result<Self, LayoutError> {
        let mut checked = ranges
            .into_iter()
            .map(|(start, len)| GuestRange::new(start, len).ok_or(LayoutError::BadRange { start: start.0, len }))
            .collect::<Result<Vec<_>, _>>()?;
        checked.sort_unstable();
        if checked.len() > MAX_RAM_RANGES {
            return Err(LayoutError::TooMany { count: checked.len() });
        }
        if let Some(pair) = checked.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(LayoutError::Overlap { first: pair[0].start, second: pair[1].start });
        }
        if let Some(bad) = checked.iter().find(|r| r.clip(MMIO_GAP_START.0, MMIO_GAP_END.0).is_some()) {
            return Err(LayoutError::InGap { start: bad.start, end: bad.end });
        }
        match checked.first() {
            Some(first) if first.start == 0 && first.len() >= MIN_RAM => Ok(Self(checked)),
            Some(first) if first.start == 0 => Err(LayoutError::NoBaseMemory { found: first.len() }),
            _ => Err(LayoutError::NoBaseMemory { found: 0 }),
        }
    }

    /// `bytes` of RAM: from 0 to the gap, the rest from 4 GiB.
    #[cfg(test)]
    pub(crate) fn around_gap(bytes: u64) -> Result<Self, LayoutError> {
        let low = bytes.min(MMIO_GAP_START.0);
        let high = bytes - low;
        let ranges = [(GuestAddress(0), low), (MMIO_GAP_END, high)];
        Self::new(ranges.into_iter().take(if high > 0 { 2 } else { 1 }))
    }

    /// All regions of `mem`, for a guest memory that consists of RAM alone.
    pub(crate) fn of_memory<M: GuestMemoryBackend + ?Sized>(mem: &M) -> Result<Self, LayoutError> {
        Self::new(mem.iter().map(|region| (region.start_addr(), region.len())))
    }

    /// The ranges, in order.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn ranges(&self) -> &[GuestRange] {
        &self.0
    }

    /// Bytes of RAM.
    #[must_use]
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|range| range.len()).sum()
    }

    /// End of the RAM that starts at 0.
    #[must_use]
    pub(crate) fn low_end(&self) -> GuestAddress {
        self.0.first().map_or(GuestAddress(0), |range| range.end())
    }

    /// Whether `range` lies within one RAM range.
    #[must_use]
    pub(crate) fn contains(&self, range: GuestRange) -> bool {
        self.0.iter().any(|ram| ram.contains(range))
    }

    /// The guest's memory map: RAM, except for a reserved range from the MP table to 1 MiB.
    #[must_use]
    pub(crate) fn memory_map(&self) -> Vec<MapEntry> {
        let ram = |range| MapEntry { range, kind: MapKind::Ram };
        let hole = GuestRange { start: MP_TABLE.raw_value(), end: HIMEM_START.raw_value() };
        let below = self.0.iter().filter_map(|r| r.clip(0, hole.start)).map(ram);
        let above = self.0.iter().filter_map(|r| r.clip(hole.end, u64::MAX)).map(ram);
        below.chain([MapEntry { range: hole, kind: MapKind::Reserved }]).chain(above).collect()
    }
}

/// The type of a range. The discriminants are those of E820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum MapKind {
    /// Usable RAM.
    Ram = 1,
    /// Reserved for firmware.
    Reserved = 2,
}

/// One entry of the guest's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapEntry {
    /// The range.
    pub range: GuestRange,
    /// The range's type.
    pub kind: MapKind,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::{ACPI_TABLES, ACPI_TABLES_END, GENERATION_ID, PAGE_SIZE, VMCLOCK};

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::new(GuestAddress(start), end - start).unwrap()
    }

    #[test]
    fn ram_is_split_around_the_gap() {
        let small = GuestRamRanges::around_gap(512 << 20).unwrap();
        assert_eq!(small.ranges(), [range(0, 512 << 20)]);
        let large = GuestRamRanges::around_gap(5 << 30).unwrap();
        assert_eq!(large.ranges(), [range(0, 3 << 30), range(4 << 30, 6 << 30)]);
        assert_eq!(large.total(), 5 << 30);
        assert_eq!(large.low_end(), MMIO_GAP_START);
    }

    #[test]
    fn memory_map_keeps_the_first_megabyte_hole_reserved() {
        let map = GuestRamRanges::around_gap(4 << 30).unwrap().memory_map();
        assert_eq!(
            map,
            [
                MapEntry { range: range(0, 0x9fc00), kind: MapKind::Ram },
                MapEntry { range: range(0x9fc00, 0x10_0000), kind: MapKind::Reserved },
                MapEntry { range: range(0x10_0000, 0xc000_0000), kind: MapKind::Ram },
                MapEntry { range: range(0x1_0000_0000, 0x1_4000_0000), kind: MapKind::Ram },
            ]
        );
    }

    #[test]
    fn bad_layouts_are_refused_by_value() {
        let new = |ranges: &[(u64, u64)]| GuestRamRanges::new(ranges.iter().map(|&(s, l)| (GuestAddress(s), l)));
        assert_eq!(new(&[]), Err(LayoutError::NoBaseMemory { found: 0 }));
        assert_eq!(new(&[(0, 4096)]), Err(LayoutError::NoBaseMemory { found: 4096 }));
        assert_eq!(new(&[(4096, MIN_RAM)]), Err(LayoutError::NoBaseMemory { found: 0 }));
        assert_eq!(new(&[(u64::MAX, 2)]), Err(LayoutError::BadRange { start: u64::MAX, len: 2 }));
        assert_eq!(new(&[(0, MIN_RAM), (4096, 1)]), Err(LayoutError::Overlap { first: 0, second: 4096 }));
        assert_eq!(new(&[(0, 4 << 30)]), Err(LayoutError::InGap { start: 0, end: 4 << 30 }));
        let many: Vec<_> = (0..65).map(|i| (i * 2 * MIN_RAM, MIN_RAM)).collect();
        assert_eq!(new(&many), Err(LayoutError::TooMany { count: 65 }));
    }

    #[test]
    fn fixed_structures_do_not_overlap() {
        let e820_capacity = u64::try_from(MAX_RAM_RANGES).unwrap() + 2;
        let fixed = [
            range(BOOT_GDT.0, BOOT_IDT.0),
            range(BOOT_IDT.0, BOOT_IDT.0 + 8),
            range(PVH_START_INFO.0, PVH_START_INFO.0 + 56),
            range(PVH_MODLIST.0, PVH_MODLIST.0 + 32),
            range(PVH_MEMMAP.0, PVH_MEMMAP.0 + 24 * e820_capacity),
            range(ZERO_PAGE.0, ZERO_PAGE.0 + PAGE_SIZE),
            range(ZERO_PAGE.0 + PAGE_SIZE, BOOT_STACK.0),
            range(BOOT_PML4.0, BOOT_PDPT.0),
            range(BOOT_PDPT.0, BOOT_PD.0),
            range(BOOT_PD.0, BOOT_PD.0 + PAGE_SIZE * BOOT_PD_COUNT),
            range(CMDLINE.0, CMDLINE.0 + CMDLINE_CAPACITY as u64),
            range(MP_TABLE.0, BASE_MEMORY_END.0),
            range(ACPI_TABLES.0, ACPI_TABLES_END.0),
            range(GENERATION_ID.0, GENERATION_ID.0 + PAGE_SIZE),
            range(VMCLOCK.0, VMCLOCK.0 + PAGE_SIZE),
            range(HIMEM_START.0, HIMEM_START.0 + 1),
        ];
        for (i, a) in fixed.iter().enumerate() {
            for b in &fixed[i + 1..] {
                assert!(!a.overlaps(*b), "{a:?} and {b:?}");
            }
        }
    }
}
