//! The kernel's ELF file: checks, segments and entry points.
//!
//! Used instead of linux-loader's ELF loader for three reasons. Every error names the offending
//! value. Segments are checked against the guest's RAM before the first write. No arithmetic on the
//! file's numbers can overflow.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{GuestRamRanges, GuestRange, HIMEM_START};

const MAGIC: &[u8; 4] = b"\x7fELF";
const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note whose presence makes a kernel bootable by PVH.
const PVH_NOTE_TYPE: u32 = 18;
const PVH_NOTE_NAME: &[u8] = b"Xen\0";

/// Why an ELF file cannot be loaded as a kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// The file has no ELF magic.
    #[error("not an ELF file: it starts with {found:02x?}")]
    NotElf {
        /// The file's first bytes.
        found: Vec<u8>,
    },
    /// A part of the file ends past the file's end.
    #[error("the ELF file is truncated: {what} ends at byte {end}, the file at byte {len}")]
    Truncated {
        /// The part.
        what: &'static str,
        /// The part's end in bytes; `u64::MAX` when that is not representable.
        end: u64,
        /// The file's length in bytes.
        len: usize,
    },
    /// The file is not a 64-bit ELF file.
    #[error("the kernel is a {} ELF file, only 64-bit ones can be started", match class { 1 => "32-bit".to_owned(), other => format!("class {other}") })]
    Not64Bit {
        /// `EI_CLASS`.
        class: u8,
    },
    /// The file is big-endian.
    #[error("the kernel is not little-endian (ELF data encoding {encoding})")]
    NotLittleEndian {
        /// `EI_DATA`.
        encoding: u8,
    },
    /// The file is for another processor.
    #[error("the kernel is for ELF machine {machine}, this host runs x86-64 (62)")]
    WrongMachine {
        /// `e_machine`.
        machine: u16,
    },
    /// The program headers have an unknown size.
    #[error("the ELF file's program headers are {found} bytes each, not 56")]
    ProgramHeaderSize {
        /// `e_phentsize`.
        found: u16,
    },
    /// No segment is loadable.
    #[error("the ELF file has no loadable segment")]
    NoSegments,
    /// A segment has more bytes in the file than in memory.
    #[error("the ELF segment for {addr:#x} has {file} bytes in the file but {mem} in memory")]
    SegmentSizes {
        /// The segment's guest-physical address.
        addr: u64,
        /// `p_filesz`.
        file: u64,
        /// `p_memsz`.
        mem: u64,
    },
    /// A segment lies outside RAM.
    #[error(
        "the kernel's segment of {len:#x} bytes at {addr:#x} does not fit: RAM below the MMIO gap ends at {ram_end:#x}"
    )]
    OutsideRam {
        /// The segment's guest-physical address.
        addr: u64,
        /// The segment's length in bytes.
        len: u64,
        /// End of low RAM.
        ram_end: u64,
    },
    /// A segment leaves the address space.
    #[error("the kernel's segment of {len:#x} bytes at {addr:#x} leaves the address space")]
    AddressOverflow {
        /// The segment's guest-physical address.
        addr: u64,
        /// The segment's length in bytes.
        len: u64,
    },
    /// A segment lies in base memory, where the boot structures are.
    #[error("the kernel's segment at {addr:#x} lies below 1 MiB, where the boot structures are")]
    BelowHimem {
        /// The segment's guest-physical address.
        addr: u64,
    },
    /// The PVH note is too short for an address.
    #[error("the kernel's PVH note is {len} bytes, too short for an entry address")]
    ShortPvhNote {
        /// `n_descsz`.
        len: u32,
    },
    /// The entry point is in no segment.
    #[error("the kernel's entry point {entry:#x} is in none of its segments")]
    EntryOutside {
        /// The entry point.
        entry: u64,
    },
    /// Guest memory refused a write.
    #[error("cannot copy the kernel's segment of {len:#x} bytes to guest address {addr:#x}")]
    Copy {
        /// The guest-physical address.
        addr: u64,
        /// Bytes to copy.
        len: usize,
        /// The error of the access.
        #[source]
        source: GuestMemoryError,
    },
}

#[derive(Debug)]
struct ElfSegment {
    file: Range<usize>,
    memory: GuestRange,
}

/// A checked 64-bit x86 ELF file.
#[derive(Debug)]
pub(crate) struct KernelElf<'a> {
    bytes: &'a [u8],
    entry: u64,
    pvh_entry: Option<u32>,
    segments: Vec<ElfSegment>,
}

/// Whether `bytes` start like an ELF file.
pub(super) fn looks_like_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// The `N` bytes at `at`, which the caller has bounds-checked.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = bytes.get(at..).and_then(|rest| rest.get(..N)) {
        out.copy_from_slice(found);
    }
    out
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// The `len` bytes of the file at `offset`, or an error with the end of the range.
fn file_range(bytes: &[u8], what: &'static str, offset: u64, len: u64) -> Result<Range<usize>, ElfError> {
    let truncated = |end| ElfError::Truncated { what, end, len: bytes.len() };
    let end = offset.checked_add(len).ok_or_else(|| truncated(u64::MAX))?;
    match (usize::try_from(offset), usize::try_from(end)) {
        (Ok(start), Ok(end)) if end <= bytes.len() => Ok(start..end),
        _ => Err(truncated(end)),
    }
}

impl<'a> KernelElf<'a> {
    /// Checks `bytes` and finds the segments and entry points.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, ElfError> {
        if !looks_like_elf(bytes) {
            return Err(ElfError::NotElf { found: bytes.iter().take(4).copied().collect() });
        }
        let header = &bytes[file_range(bytes, "the file header", 0, HEADER_LEN as u64)?];
        if header[4] != CLASS_64 {
            return Err(ElfError::Not64Bit { class: header[4] });
        }
        if header[5] != LITTLE_ENDIAN {
            return Err(ElfError::NotLittleEndian { encoding: header[5] });
        }
        let machine = u16_at(header, 18);
        if machine != MACHINE_X86_64 {
            return Err(ElfError::WrongMachine { machine });
        }
        let (entry, table, count) = (u64_at(header, 24), u64_at(header, 32), u16_at(header, 56));
        if count > 0 && usize::from(u16_at(header, 54)) != PROGRAM_HEADER_LEN {
            return Err(ElfError::ProgramHeaderSize { found: u16_at(header, 54) });
        }
        let table_len = u64::from(count) * PROGRAM_HEADER_LEN as u64;
        let table = &bytes[file_range(bytes, "the program header table", table, table_len)?];

        let mut elf = Self { bytes, entry, pvh_entry: None, segments: Vec::new() };
        for header in table.chunks_exact(PROGRAM_HEADER_LEN) {
            match u32_at(header, 0) {
                PT_LOAD => elf.segments.extend(Self::segment(bytes, header)?),
                PT_NOTE => {
                    let range = file_range(bytes, "a note segment", u64_at(header, 8), u64_at(header, 32))?;
                    elf.pvh_entry = elf.pvh_entry.or(pvh_note(&bytes[range])?);
                }
                _ => {}
            }
        }
        if elf.segments.is_empty() {
            return Err(ElfError::NoSegments);
        }
        Ok(elf)
    }

    fn segment(bytes: &[u8], header: &[u8]) -> Result<Option<ElfSegment>, ElfError> {
        let (offset, addr) = (u64_at(header, 8), u64_at(header, 24));
        let (file_len, mem_len) = (u64_at(header, 32), u64_at(header, 40));
        if mem_len == 0 && file_len == 0 {
            return Ok(None);
        }
        if file_len > mem_len {
            return Err(ElfError::SegmentSizes { addr, file: file_len, mem: mem_len });
        }
        let file = file_range(bytes, "a loadable segment", offset, file_len)?;
        let memory =
            GuestRange::new(GuestAddress(addr), mem_len).ok_or(ElfError::AddressOverflow { addr, len: mem_len })?;
        Ok(Some(ElfSegment { file, memory }))
    }

    /// The 32-bit entry point of the PVH protocol, if the kernel has one.
    #[must_use]
    pub(crate) fn pvh_entry(&self) -> Option<GuestAddress> {
        self.pvh_entry.map(|entry| GuestAddress(entry.into()))
    }

    /// The ELF entry point, used by the 64-bit protocol.
    #[must_use]
    pub(super) fn entry(&self) -> GuestAddress {
        GuestAddress(self.entry)
    }

    /// The guest memory of the segments, from the lowest to the highest address.
    #[must_use]
    pub(crate) fn extent(&self) -> Option<GuestRange> {
        let start = self.segments.iter().map(|s| s.memory.start()).min()?;
        let end = self.segments.iter().map(|s| s.memory.end()).max()?;
        GuestRange::new(start, end.0 - start.0)
    }

    /// Checks that `entry` is in a segment.
    pub(super) fn check_entry(&self, entry: GuestAddress) -> Result<GuestAddress, ElfError> {
        let inside = GuestRange::new(entry, 1).is_some_and(|e| self.segments.iter().any(|s| s.memory.contains(e)));
        if inside { Ok(entry) } else { Err(ElfError::EntryOutside { entry: entry.0 }) }
    }

    /// Copies the segments into `mem`. If one does not fit, none is copied.
    ///
    /// The memory of a segment beyond its bytes in the file is not written. Guest RAM is already
    /// zero, and a write would only cost host memory.
    pub(super) fn load<M: GuestMemoryBackend>(&self, mem: &M, ram: &GuestRamRanges) -> Result<(), ElfError> {
        for ElfSegment { memory, .. } in &self.segments {
            if memory.start() < HIMEM_START {
                return Err(ElfError::BelowHimem { addr: memory.start().0 });
            }
            if !ram.contains(*memory) {
                let (addr, len) = (memory.start().0, memory.len());
                return Err(ElfError::OutsideRam { addr, len, ram_end: ram.low_end().0 });
            }
        }
        for ElfSegment { file, memory } in &self.segments {
            let (addr, bytes) = (memory.start(), &self.bytes[file.clone()]);
            mem.write_slice(bytes, addr).map_err(|source| ElfError::Copy { addr: addr.0, len: bytes.len(), source })?;
        }
        Ok(())
    }
}

/// Finds the PVH entry point in a note segment. Notes are padded to four bytes at any alignment of
/// the segment.
fn pvh_note(mut notes: &[u8]) -> Result<Option<u32>, ElfError> {
    const NOTE_HEADER_LEN: usize = 12;
    while notes.len() >= NOTE_HEADER_LEN {
        let (name_len, desc_len, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let rest = &notes[NOTE_HEADER_LEN..];
        let padded = |len: u32| usize::try_from(len).ok().and_then(|len| len.checked_next_multiple_of(4));
        let (Some(name_padded), Some(desc_padded)) = (padded(name_len), padded(desc_len)) else { break };
        let Some(desc) = rest.get(name_padded..) else { break };
        if kind == PVH_NOTE_TYPE && name_len == 4 && rest.starts_with(PVH_NOTE_NAME) {
            if desc_len < 4 || desc.len() < 4 {
                return Err(ElfError::ShortPvhNote { len: desc_len });
            }
            return Ok(Some(u32_at(desc, 0)));
        }
        let Some(next) = desc.get(desc_padded..) else { break };
        notes = next;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::testutil::{ElfBuilder, memory};
    use super::*;

    #[test]
    fn finds_entry_points_and_loads_segments() {
        let file = ElfBuilder::new(0x10_0040).pvh(0x10_0010).segment(0x10_0000, b"kernel", 0x2000).build();
        let elf = KernelElf::parse(&file).unwrap();
        assert_eq!(elf.pvh_entry(), Some(GuestAddress(0x10_0010)));
        assert_eq!(elf.entry(), GuestAddress(0x10_0040));
        assert_eq!(elf.extent(), GuestRange::new(GuestAddress(0x10_0000), 0x2000));
        let (mem, ram) = memory(4 << 20);
        elf.load(&mem, &ram).unwrap();
        assert_eq!(mem.read_obj::<[u8; 6]>(GuestAddress(0x10_0000)).unwrap(), *b"kernel");
    }

    #[test]
    fn other_notes_are_skipped() {
        let file = ElfBuilder::new(0x10_0000)
            .note(b"GNU\0", 3, &[1; 20])
            .note(b"Xen\0", 5, &[2; 7])
            .pvh(0x10_0000)
            .segment(0x10_0000, b"k", 1)
            .build();
        assert_eq!(KernelElf::parse(&file).unwrap().pvh_entry(), Some(GuestAddress(0x10_0000)));
        let without = ElfBuilder::new(0x10_0000).note(b"Xen\0", 5, &[2; 8]).segment(0x10_0000, b"k", 1).build();
        assert_eq!(KernelElf::parse(&without).unwrap().pvh_entry(), None);
    }

    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut file = ElfBuilder::new(0x10_0000).segment(0x10_0000, b"kernel", 6).build();
        change(&mut file);
        KernelElf::parse(&file).unwrap_err().to_string()
    }

    #[test]
    fn each_refusal_names_its_value() {
        assert_eq!(refusal(|f| f[0] = b'M'), "not an ELF file: it starts with [4d, 45, 4c, 46]");
        assert_eq!(refusal(|f| f[4] = 1), "the kernel is a 32-bit ELF file, only 64-bit ones can be started");
        assert_eq!(refusal(|f| f[5] = 2), "the kernel is not little-endian (ELF data encoding 2)");
        assert_eq!(refusal(|f| f[18] = 183), "the kernel is for ELF machine 183, this host runs x86-64 (62)");
        assert_eq!(refusal(|f| f[54] = 32), "the ELF file's program headers are 32 bytes each, not 56");
        assert_eq!(refusal(|f| f[56] = 0), "the ELF file has no loadable segment");
        assert_eq!(
            refusal(|f| f.truncate(30)),
            "the ELF file is truncated: the file header ends at byte 64, the file at byte 30"
        );
        assert_eq!(
            refusal(|f| f.truncate(100)),
            "the ELF file is truncated: the program header table ends at byte 120, the file at byte 100"
        );
        assert_eq!(
            refusal(|f| f.truncate(123)),
            "the ELF file is truncated: a loadable segment ends at byte 126, the file at byte 123"
        );
        assert_eq!(refusal(|f| f[64 + 40] = 5), "the ELF segment for 0x100000 has 6 bytes in the file but 5 in memory");
    }

    #[test]
    fn segments_outside_ram_are_refused_before_anything_is_written() {
        let (mem, ram) = memory(4 << 20);
        let file = ElfBuilder::new(0).segment(0x20_0000, b"first", 5).segment(0x3f_ffff, b"ab", 2).build();
        let error = KernelElf::parse(&file).unwrap().load(&mem, &ram).unwrap_err().to_string();
        assert_eq!(
            error,
            "the kernel's segment of 0x2 bytes at 0x3fffff does not fit: RAM below the MMIO gap ends at 0x400000"
        );
        assert_eq!(mem.read_obj::<[u8; 5]>(GuestAddress(0x20_0000)).unwrap(), [0; 5]);
        let low = ElfBuilder::new(0).segment(0x7000, b"x", 1).build();
        let error = KernelElf::parse(&low).unwrap().load(&mem, &ram).unwrap_err().to_string();
        assert_eq!(error, "the kernel's segment at 0x7000 lies below 1 MiB, where the boot structures are");
    }

    #[test]
    fn a_short_pvh_note_is_refused() {
        let file = ElfBuilder::new(0).note(b"Xen\0", 18, &[1, 2]).segment(0x10_0000, b"k", 1).build();
        assert!(matches!(KernelElf::parse(&file), Err(ElfError::ShortPvhNote { len: 2 })));
    }
}
