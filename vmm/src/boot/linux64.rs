//! Memory structures of Linux's 64-bit boot protocol: the zero page, a GDT, and page tables that
//! identity-map the first 4 GiB.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{
    BOOT_GDT, BOOT_IDT, BOOT_PD, BOOT_PD_COUNT, BOOT_PDPT, BOOT_PML4, CMDLINE, GuestRange, MapEntry, ZERO_PAGE,
};
use super::regs::{GDT_LONG_MODE, GDT_PROTECTED_MODE};
use crate::platform::PAGE_SIZE;

const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
const PROTOCOL: u16 = 0x020f;
/// "Other": a loader without an assigned number.
const LOADER: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = PAGE_SIZE / 8;

/// The setup header for a kernel from a bare ELF file.
fn plain_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HDRS,
        // Not 0: the kernel treats a header of version 0 as not copied yet.
        version: PROTOCOL,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    }
}

/// The contents of the zero page (`boot_params`).
pub(super) struct ZeroPage<'a> {
    pub(super) header: Option<setup_header>,
    pub(super) map: &'a [MapEntry],
    pub(super) initrd: Option<GuestRange>,
    pub(super) cmdline_len: u32,
    pub(super) rsdp: Option<GuestAddress>,
}

impl ZeroPage<'_> {
    /// Writes the zero page.
    pub(super) fn write<M: GuestMemoryBackend>(&self, mem: &M) -> Result<(), GuestMemoryError> {
        let mut params = boot_params { hdr: self.header.unwrap_or_else(plain_header), ..Default::default() };
        params.hdr.type_of_loader = LOADER;
        // Both are below 4 GiB, by the layout and by the placement of the initramfs.
        params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
        params.hdr.cmdline_size = self.cmdline_len;
        if let Some(initrd) = self.initrd {
            params.hdr.ramdisk_image = initrd.start().0 as u32;
            params.hdr.ramdisk_size = initrd.len() as u32;
        }
        params.acpi_rsdp_addr = self.rsdp.map_or(0, |addr| addr.0);
        for (slot, MapEntry { range, kind }) in params.e820_table.iter_mut().zip(self.map) {
            *slot = boot_e820_entry { addr: range.start().0, size: range.len(), r#type: *kind as u32 };
        }
        // At most MAX_RAM_RANGES + 2.
        params.e820_entries = self.map.len() as u8;
        mem.write_obj(params, ZERO_PAGE)
    }
}

/// Writes page tables that identity-map the first 4 GiB in 2 MiB pages.
pub(super) fn write_page_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), GuestMemoryError> {
    mem.write_obj(BOOT_PDPT.0 | PRESENT | WRITABLE, BOOT_PML4)?;
    for pd in 0..BOOT_PD_COUNT {
        let directory = BOOT_PD.0 + pd * PAGE_SIZE;
        mem.write_obj(directory | PRESENT | WRITABLE, GuestAddress(BOOT_PDPT.0 + pd * 8))?;
        let entries: Vec<u8> = (0..ENTRIES)
            .flat_map(|i| (((pd * ENTRIES + i) * LARGE_PAGE_SIZE) | PRESENT | WRITABLE | LARGE).to_le_bytes())
            .collect();
        mem.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// Writes the boot GDT and an empty IDT. The 64-bit protocol needs a GDT. PVH kernels load their
/// own before they use one; a valid GDT prevents a fault in a kernel that does not.
pub(super) fn write_descriptors<M: GuestMemoryBackend>(mem: &M, long_mode: bool) -> Result<(), GuestMemoryError> {
    let gdt = if long_mode { GDT_LONG_MODE } else { GDT_PROTECTED_MODE };
    for (i, descriptor) in gdt.iter().enumerate() {
        mem.write_obj(*descriptor, GuestAddress(BOOT_GDT.0 + 8 * i as u64))?;
    }
    mem.write_obj(0_u64, BOOT_IDT)
}

#[cfg(test)]
mod tests {
    use super::super::testutil::memory;
    use super::*;

    #[test]
    fn zero_page_carries_the_map_the_initramfs_and_the_command_line() {
        let (mem, ram) = memory(16 << 20);
        let map = ram.memory_map();
        let initrd = GuestRange::new(GuestAddress(0xf0_0000), 1234);
        ZeroPage { header: None, map: &map, initrd, cmdline_len: 7, rsdp: None }.write(&mem).unwrap();
        let params: boot_params = mem.read_obj(ZERO_PAGE).unwrap();
        assert_eq!(params.e820_entries, 3);
        assert_eq!({ params.e820_table[2].addr }, 0x10_0000);
        assert_eq!({ params.e820_table[1].r#type }, 2);
        assert_eq!(({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }), (0xf0_0000, 1234));
        assert_eq!(({ params.hdr.cmd_line_ptr }, { params.hdr.cmdline_size }), (0x2_0000, 7));
        assert_eq!(({ params.hdr.header }, { params.hdr.version }), (HDRS, PROTOCOL));
    }

    #[test]
    fn a_bzimages_header_is_kept() {
        let (mem, ram) = memory(16 << 20);
        let header = setup_header { version: 0x20c, kernel_alignment: 0x100, ..Default::default() };
        let map = ram.memory_map();
        ZeroPage { header: Some(header), map: &map, initrd: None, cmdline_len: 0, rsdp: None }.write(&mem).unwrap();
        let params: boot_params = mem.read_obj(ZERO_PAGE).unwrap();
        assert_eq!(({ params.hdr.version }, { params.hdr.kernel_alignment }), (0x20c, 0x100));
        assert_eq!(params.hdr.type_of_loader, LOADER);
    }

    /// Walks the tables as the MMU does.
    fn translate(mem: &impl GuestMemoryBackend, va: u64) -> Option<u64> {
        let read = |table: u64, index: u64| mem.read_obj::<u64>(GuestAddress(table + index * 8)).unwrap();
        let next = |entry: u64| (entry & PRESENT != 0).then_some(entry & !0xfff);
        let pdpt = next(read(BOOT_PML4.0, va >> 39 & 511))?;
        let pd = next(read(pdpt, va >> 30 & 511))?;
        let entry = read(pd, va >> 21 & 511);
        assert_ne!(entry & LARGE, 0);
        Some((entry & !0x1f_ffff) | (va & 0x1f_ffff))
    }

    #[test]
    fn the_first_four_gib_are_mapped_to_themselves() {
        let (mem, _) = memory(16 << 20);
        write_page_tables(&mem).unwrap();
        for va in [0, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xbfff_f123, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&mem, va), Some(va), "{va:#x}");
        }
        assert_eq!(mem.read_obj::<u64>(GuestAddress(BOOT_PDPT.0 + 32)).unwrap(), 0, "nothing past 4 GiB");
    }
}
