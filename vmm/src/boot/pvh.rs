//! Memory structures of the PVH boot protocol: `hvm_start_info`, the module list and the memory
//! map.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{CMDLINE, GuestRange, MapEntry, PVH_MEMMAP, PVH_MODLIST, PVH_START_INFO};

/// The first version of `hvm_start_info` with a memory map.
const VERSION: u32 = 1;

/// Writes the three structures. `rsdp` is the address of the ACPI root pointer.
pub(super) fn write<M: GuestMemoryBackend>(
    mem: &M,
    map: &[MapEntry],
    initrd: Option<GuestRange>,
    rsdp: Option<GuestAddress>,
) -> Result<(), GuestMemoryError> {
    let mut at = PVH_MEMMAP.0;
    for MapEntry { range, kind } in map {
        let entry =
            hvm_memmap_table_entry { addr: range.start().0, size: range.len(), type_: *kind as u32, reserved: 0 };
        mem.write_obj(entry, GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start().0, size: initrd.len(), ..Default::default() };
        mem.write_obj(module, PVH_MODLIST)?;
    }
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: initrd.map_or(0, |_| PVH_MODLIST.0),
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: rsdp.map_or(0, |addr| addr.0),
        memmap_paddr: PVH_MEMMAP.0,
        // At most MAX_RAM_RANGES + 2.
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    mem.write_obj(start_info, PVH_START_INFO)
}

#[cfg(test)]
mod tests {
    use super::super::testutil::memory;
    use super::*;

    #[test]
    fn structures_point_at_each_other() {
        let (mem, ram) = memory(16 << 20);
        let initrd = GuestRange::new(GuestAddress(0xf0_0000), 1234);
        write(&mem, &ram.memory_map(), initrd, Some(GuestAddress(0xe_0000))).unwrap();
        let info: hvm_start_info = mem.read_obj(PVH_START_INFO).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules, info.memmap_entries), (0x336e_c578, 1, 1, 3));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (CMDLINE.0, 0xe_0000));
        let module: hvm_modlist_entry = mem.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0xf0_0000, 1234));
        let last: hvm_memmap_table_entry = mem.read_obj(GuestAddress(info.memmap_paddr + 48)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (0x10_0000, 15 << 20, 1));
    }

    #[test]
    fn without_an_initramfs_there_is_no_module() {
        let (mem, ram) = memory(16 << 20);
        write(&mem, &ram.memory_map(), None, None).unwrap();
        let info: hvm_start_info = mem.read_obj(PVH_START_INFO).unwrap();
        assert_eq!((info.nr_modules, info.modlist_paddr, info.rsdp_paddr), (0, 0, 0));
    }
}
