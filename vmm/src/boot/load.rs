//! Loading a guest into memory, and its entry point.

use std::borrow::Cow;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::bzimage::{BzImage, BzImageError, looks_like_bzimage};
use super::elf::{ElfError, KernelElf, looks_like_elf};
use super::image::{BootImage, BootImageError};
use super::initrd::{self, InitrdError};
use super::layout::{
    BOOT_PML4, CMDLINE, CMDLINE_CAPACITY, GuestRamRanges, GuestRange, MP_TABLE, PVH_START_INFO, ZERO_PAGE,
};
use super::linux64::{self, ZeroPage};
use super::mptable::{MpTableError, mp_table};
use super::pvh;
use super::unpack::{Codec, UnpackError, unpack};
use crate::platform::MMIO_GAP_START;

/// Size limit of a kernel in bytes, packed or unpacked, for guests of any size.
const MAX_KERNEL: u64 = 512 << 20;

/// The files that a guest boots from, and its command line.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// The kernel.
    pub kernel: BootImage,
    /// The initramfs, if any.
    pub initrd: Option<BootImage>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl BootSource {
    /// A kernel alone, with an empty command line.
    #[must_use]
    pub fn new(kernel: BootImage) -> Self {
        Self { kernel, initrd: None, cmdline: String::new() }
    }
}

/// Information that firmware would pass to the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Firmware {
    /// The number of vCPUs, for the MP table.
    pub cpus: u8,
    /// The address of the ACPI root pointer, if any.
    pub rsdp: Option<GuestAddress>,
}

/// The boot vCPU's start: the boot protocol, and the addresses that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BootEntry {
    /// The PVH protocol: 32-bit protected mode, flat segments, no paging, `ebx` = `start_info`.
    Pvh {
        /// Address of the first instruction.
        rip: GuestAddress,
        /// Address of `hvm_start_info`.
        start_info: GuestAddress,
    },
    /// Linux's 64-bit protocol: long mode, `rsi` = `boot_params`.
    Linux64 {
        /// Address of the first instruction.
        rip: GuestAddress,
        /// Address of the zero page.
        boot_params: GuestAddress,
        /// Address of the PML4.
        page_tables: GuestAddress,
    },
}

/// A loaded guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoadedGuest {
    /// The boot vCPU's start.
    pub entry: BootEntry,
    /// The kernel, from its lowest to its highest segment.
    pub kernel: GuestRange,
    /// The initramfs, if any.
    pub initrd: Option<GuestRange>,
}

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The kernel or the initramfs could not be read.
    #[error(transparent)]
    Image(#[from] BootImageError),
    /// The kernel is neither ELF nor bzImage.
    #[error("not a kernel: {len} bytes that start with {found:02x?} are neither an ELF file nor a bzImage")]
    NotAKernel {
        /// The file's length in bytes.
        len: usize,
        /// Its first bytes.
        found: Vec<u8>,
    },
    /// The bzImage could not be parsed.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// The compressed kernel could not be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// The ELF file cannot be loaded.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// There is no room for the initramfs.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The MP table cannot list that many vCPUs.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// The command line is too long.
    #[error("the command line is {len} bytes long, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// Maximum length for this kernel.
        max: usize,
    },
    /// The command line contains a NUL, where the kernel would stop reading.
    #[error("the command line has a NUL at byte {at}")]
    CmdlineNul {
        /// The NUL's position in bytes.
        at: usize,
    },
    /// A boot structure could not be written.
    #[error("cannot write {what} to guest memory")]
    Write {
        /// The structure's name.
        what: &'static str,
        /// The error of the access.
        #[source]
        source: GuestMemoryError,
    },
}

/// An unpacked kernel, with the setup header of its bzImage, if any.
struct Unpacked<'a> {
    elf: Cow<'a, [u8]>,
    header: Option<setup_header>,
}

/// Finds the ELF file in `image`, in any supported format.
fn unpack_kernel(image: &[u8], limit: usize) -> Result<Unpacked<'_>, BootError> {
    if looks_like_elf(image) {
        return Ok(Unpacked { elf: Cow::Borrowed(image), header: None });
    }
    if looks_like_bzimage(image) {
        let bzimage = BzImage::parse(image)?;
        // No x86 kernel build has an uncompressed payload today, but the format allows it.
        let payload = bzimage.payload();
        let elf = if looks_like_elf(payload) { Cow::Borrowed(payload) } else { unpack(payload, limit)?.into() };
        return Ok(Unpacked { elf, header: Some(bzimage.header()) });
    }
    if Codec::detect(image).is_some() {
        return Ok(Unpacked { elf: unpack(image, limit)?.into(), header: None });
    }
    Err(BootError::NotAKernel { len: image.len(), found: image.iter().take(8).copied().collect() })
}

impl BootError {
    /// Subtracts `added`, the bytes appended to the caller's command line, from the lengths in
    /// [`Self::CmdlineTooLong`].
    pub(crate) fn without(self, added: usize) -> Self {
        match self {
            Self::CmdlineTooLong { len, max } => {
                Self::CmdlineTooLong { len: len.saturating_sub(added), max: max.saturating_sub(added) }
            }
            other => other,
        }
    }
}

/// Checks the command line and appends its NUL.
fn terminated(cmdline: &str, header: Option<&setup_header>) -> Result<Vec<u8>, BootError> {
    let kernels = header.map_or(usize::MAX, |header| usize::try_from(header.cmdline_size).unwrap_or(usize::MAX));
    let max = kernels.min(CMDLINE_CAPACITY - 1);
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), max });
    }
    if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { at });
    }
    Ok([cmdline.as_bytes(), b"\0"].concat())
}

/// Loads `source` into `mem`. `ram` is its RAM, which must still be zero at the kernel's place.
///
/// All checks come before the first write. An image may still become unreadable half-way: after an
/// error, discard the memory.
pub(crate) fn load<M: GuestMemoryBackend>(
    mem: &M,
    ram: &GuestRamRanges,
    source: &BootSource,
    firmware: &Firmware,
) -> Result<LoadedGuest, BootError> {
    let written = |what| move |source| BootError::Write { what, source };
    let limit = ram.total().min(MAX_KERNEL);
    let image = source.kernel.read(MAX_KERNEL)?;
    let Unpacked { elf, header } = unpack_kernel(&image, usize::try_from(limit).unwrap_or(usize::MAX))?;
    let elf = KernelElf::parse(&elf)?;
    let kernel = elf.extent().ok_or(ElfError::NoSegments)?;
    let cmdline = terminated(&source.cmdline, header.as_ref())?;
    let mp_table = mp_table(firmware.cpus)?;
    let entry = match elf.pvh_entry() {
        Some(rip) => BootEntry::Pvh { rip: elf.check_entry(rip)?, start_info: PVH_START_INFO },
        None => {
            let rip = elf.check_entry(elf.entry())?;
            BootEntry::Linux64 { rip, boot_params: ZERO_PAGE, page_tables: BOOT_PML4 }
        }
    };
    let initrd_image = source.initrd.as_ref().map(BootImage::open).transpose()?;
    let addr_max = match header.map_or(0, |header| header.initrd_addr_max) {
        0 => MMIO_GAP_START.0 - 1,
        max => max.into(),
    };
    let initrd = match &initrd_image {
        Some(image) => Some(initrd::place(image.len(), ram, kernel, addr_max)?),
        None => None,
    };

    elf.load(mem, ram)?;
    if let (Some(image), Some(at)) = (initrd_image, initrd) {
        image.copy_to(mem, at.start())?;
    }
    mem.write_slice(&cmdline, CMDLINE).map_err(written("the command line"))?;
    mem.write_slice(&mp_table, MP_TABLE).map_err(written("the MP table"))?;
    let map = ram.memory_map();
    match entry {
        BootEntry::Pvh { .. } => {
            pvh::write(mem, &map, initrd, firmware.rsdp).map_err(written("the PVH start info"))?;
        }
        BootEntry::Linux64 { .. } => {
            // At most CMDLINE_CAPACITY.
            let cmdline_len = cmdline.len() as u32 - 1;
            let page = ZeroPage { header, map: &map, initrd, cmdline_len, rsdp: firmware.rsdp };
            page.write(mem).map_err(written("the zero page"))?;
            linux64::write_page_tables(mem).map_err(written("the boot page tables"))?;
        }
    }
    let long_mode = matches!(entry, BootEntry::Linux64 { .. });
    linux64::write_descriptors(mem, long_mode).map_err(written("the boot GDT"))?;
    Ok(LoadedGuest { entry, kernel, initrd })
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::elf::start_info::hvm_start_info;
    use proptest::prelude::*;

    use super::super::testutil::{ElfBuilder, bytes_at, bzimage, compress, memory};
    use super::*;

    fn source(kernel: Vec<u8>) -> BootSource {
        BootSource { kernel: kernel.into(), initrd: None, cmdline: "console=ttyS0".into() }
    }

    const TWO_CPUS: Firmware = Firmware { cpus: 2, rsdp: None };

    fn pvh_kernel() -> Vec<u8> {
        ElfBuilder::new(0x10_0008).pvh(0x10_0004).segment(0x10_0000, b"0123456789abcdef", 0x1_0000).build()
    }

    fn linux64_kernel() -> Vec<u8> {
        ElfBuilder::new(0x10_0008).segment(0x10_0000, b"0123456789abcdef", 0x1_0000).build()
    }

    const PVH: BootEntry = BootEntry::Pvh { rip: GuestAddress(0x10_0004), start_info: PVH_START_INFO };
    const LINUX64: BootEntry =
        BootEntry::Linux64 { rip: GuestAddress(0x10_0008), boot_params: ZERO_PAGE, page_tables: BOOT_PML4 };

    fn try_load(source: &BootSource) -> Result<LoadedGuest, BootError> {
        let (mem, ram) = memory(4 << 20);
        load(&mem, &ram, source, &TWO_CPUS)
    }

    fn refusal(source: &BootSource) -> String {
        try_load(source).unwrap_err().to_string()
    }

    #[test]
    fn an_elf_file_is_started_by_pvh_if_it_can_be() {
        assert_eq!(try_load(&source(pvh_kernel())).unwrap().entry, PVH);
        assert_eq!(try_load(&source(linux64_kernel())).unwrap().entry, LINUX64);
    }

    #[test]
    fn a_bzimage_of_every_codec_is_unpacked() {
        use Codec::{Bzip2, Gzip, Lz4, Lzma, Xz, Zstd};
        for codec in [Gzip, Lz4, Zstd, Xz, Lzma, Bzip2] {
            let packed = compress(codec, &pvh_kernel());
            assert_eq!(try_load(&source(bzimage(&packed))).unwrap().entry, PVH, "{codec}");
            assert_eq!(try_load(&source(packed)).unwrap().entry, PVH, "{codec}, without a bzImage");
            let packed = compress(codec, &linux64_kernel());
            assert_eq!(try_load(&source(bzimage(&packed))).unwrap().entry, LINUX64, "{codec}");
        }
    }

    #[test]
    fn everything_is_where_the_start_info_says() {
        let (mem, ram) = memory(4 << 20);
        let source = BootSource { initrd: Some(vec![7; 5000].into()), ..source(pvh_kernel()) };
        let loaded = load(&mem, &ram, &source, &TWO_CPUS).unwrap();
        assert_eq!(mem.read_obj::<[u8; 16]>(GuestAddress(0x10_0000)).unwrap(), *b"0123456789abcdef");
        let info: hvm_start_info = mem.read_obj(PVH_START_INFO).unwrap();
        assert_eq!(mem.read_obj::<[u8; 14]>(GuestAddress(info.cmdline_paddr)).unwrap(), *b"console=ttyS0\0");
        let initrd = loaded.initrd.unwrap();
        assert_eq!(initrd.end().0.next_multiple_of(4096), 4 << 20);
        assert_eq!(bytes_at(&mem, initrd.start(), 5000), [7; 5000]);
        assert_eq!(mem.read_obj::<[u8; 4]>(MP_TABLE).unwrap(), *b"_MP_");
    }

    #[test]
    fn files_are_loaded_too() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, initrd) = (dir.path().join("k"), dir.path().join("i"));
        std::fs::write(&kernel, pvh_kernel()).unwrap();
        std::fs::write(&initrd, [9; 100]).unwrap();
        let source = BootSource { kernel: kernel.into(), initrd: Some(initrd.into()), ..source(vec![]) };
        let (mem, ram) = memory(4 << 20);
        let loaded = load(&mem, &ram, &source, &TWO_CPUS).unwrap();
        assert_eq!(bytes_at(&mem, loaded.initrd.unwrap().start(), 100), [9; 100]);
    }

    #[test]
    fn refusals_are_one_sentence_with_the_value() {
        assert_eq!(refusal(&source(vec![])), "the built-in image of 0 bytes is empty");
        assert_eq!(
            refusal(&source(b"#!/bin/sh\n".to_vec())),
            "not a kernel: 10 bytes that start with [23, 21, 2f, 62, 69, 6e, 2f, 73] are neither an ELF file nor a bzImage"
        );
        let long = BootSource { cmdline: "x".repeat(2048), ..source(pvh_kernel()) };
        assert_eq!(refusal(&long), "the command line is 2048 bytes long, this kernel takes at most 2047");
        assert!(try_load(&BootSource { cmdline: "x".repeat(2047), ..source(pvh_kernel()) }).is_ok());
        let nul = BootSource { cmdline: "a\0b".into(), ..source(pvh_kernel()) };
        assert_eq!(refusal(&nul), "the command line has a NUL at byte 1");
        let (mem, ram) = memory(4 << 20);
        let many = load(&mem, &ram, &source(pvh_kernel()), &Firmware { cpus: 33, rsdp: None }).unwrap_err();
        assert_eq!(many.to_string(), "33 vCPUs, but 1 to 32 are supported");
        let lost = ElfBuilder::new(0x1234).segment(0x10_0000, b"k", 1).build();
        assert_eq!(refusal(&source(lost)), "the kernel's entry point 0x1234 is in none of its segments");
        let big = BootSource { initrd: Some(vec![0; 3 << 20].into()), ..source(pvh_kernel()) };
        assert_eq!(
            refusal(&big),
            "the initramfs of 3145728 bytes does not fit: 3080192 bytes are free between the kernel's end at 0x110000 and 0x400000"
        );
    }

    #[test]
    fn a_bzimages_own_limits_are_kept() {
        let mut image = bzimage(&compress(Codec::Gzip, &linux64_kernel()));
        image[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x1f_ffff_u32.to_le_bytes());
        let long = BootSource { cmdline: "x".repeat(256), ..source(image.clone()) };
        assert_eq!(refusal(&long), "the command line is 256 bytes long, this kernel takes at most 255");
        let low = BootSource { initrd: Some(vec![0; 4096].into()), ..source(image) };
        assert_eq!(try_load(&low).unwrap().initrd.unwrap().end(), GuestAddress(0x20_0000));
    }

    #[test]
    fn a_bomb_is_stopped_at_the_guests_size() {
        let bomb = bzimage(&compress(Codec::Gzip, &vec![0; 5 << 20]));
        assert_eq!(refusal(&source(bomb)), "the gzip payload unpacks to more than 4194304 bytes");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn damaged_kernels_never_panic(kind in 0..4, cut in any::<prop::sample::Index>(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
            let mut image = match kind {
                0 => pvh_kernel(),
                1 => linux64_kernel(),
                2 => bzimage(&compress(Codec::Gzip, &pvh_kernel())),
                _ => bzimage(&pvh_kernel()),
            };
            // Half of the cases keep their length.
            let at = cut.index(image.len() * 2);
            image.truncate(at.max(1));
            for (at, with) in flips {
                let at = at.index(image.len());
                image[at] ^= with;
            }
            let _ = try_load(&source(image));
        }

        #[test]
        fn random_headers_never_panic(fields in prop::collection::vec(any::<u64>(), 40)) {
            let mut image = pvh_kernel();
            for (chunk, field) in image[24..].chunks_exact_mut(8).zip(fields).filter(|(_, field)| field % 3 == 0) {
                chunk.copy_from_slice(&field.to_le_bytes());
            }
            image[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
            let _ = try_load(&source(image));
        }
    }
}
