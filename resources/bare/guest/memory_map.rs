//! Builds page tables for the loader's memory map, and for nothing else.

use crate::abi::{PAGE_SIZE, PAGE_TABLES, VIRTIO_BASE, WORK_BASE};
use core::ptr;

/// Entries that point at a table: present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// Entries that map 2 MiB: the same, dirty, and large. With accessed and dirty set no page walk has
/// to write them.
const LARGE: u64 = 0xe7;
const LARGE_SIZE: u64 = 2 << 20;
/// Range of one PDPT.
const LIMIT: u64 = 512 << 30;
const LOCAL_APIC: u64 = 0xfee0_0000;

/// In both memory maps, the type of ordinary RAM.
const RAM: u32 = 1;
/// boot.S's number for the PVH entry. The other one is the 64-bit Linux entry.
const PVH: u32 = 1;

/// # Safety
///
/// `info` must be the loader's hvm_start_info if `boot` is [`PVH`], and its boot_params otherwise.
/// The tables must not be in use.
pub unsafe fn build_page_tables(boot: u32, info: *const u8) {
    // SAFETY: the caller's promise; offsets and types are those of the two boot protocols.
    let (entries, stride, count) = unsafe {
        if boot == PVH {
            let map = info.add(40).cast::<u64>().read_unaligned();
            (map as *const u8, 24, info.add(48).cast::<u32>().read_unaligned() as usize)
        } else {
            (info.add(0x2d0), 20, usize::from(info.add(0x1e8).read()))
        }
    };

    let mut tables = Tables::new();
    tables.map(0, WORK_BASE);
    tables.map(LOCAL_APIC, PAGE_SIZE);
    tables.map(VIRTIO_BASE, LARGE_SIZE);
    for index in 0..count {
        // SAFETY: an entry of both maps starts with 64 bits of address, 64 bits of size and 32 bits
        // of type.
        let (start, size, kind) = unsafe {
            let entry = entries.add(index * stride);
            let words = entry.cast::<u64>();
            (words.read_unaligned(), words.add(1).read_unaligned(), entry.add(16).cast::<u32>().read_unaligned())
        };
        if kind == RAM {
            tables.map(start, size);
        }
    }
}

/// The PML4, the PDPT, and as many page directories as were needed, one after the other.
struct Tables {
    used: u64,
}

impl Tables {
    fn new() -> Self {
        let mut tables = Self { used: 0 };
        let (pml4, pdpt) = (tables.add(), tables.add());
        // SAFETY: both tables are this program's, and new.
        unsafe { pml4.write(pdpt as u64 | TABLE) };
        tables
    }

    /// Returns a new empty table.
    fn add(&mut self) -> *mut u64 {
        let table = (PAGE_TABLES + self.used * PAGE_SIZE) as *mut u64;
        self.used += 1;
        // SAFETY: at most 514 tables are made, and so many pages are reserved for them.
        unsafe { ptr::write_bytes(table.cast::<u8>(), 0, PAGE_SIZE as usize) };
        table
    }

    /// Maps the range, and the rest of its first and last 2 MiB.
    fn map(&mut self, start: u64, size: u64) {
        let end = start.saturating_add(size).min(LIMIT);
        let mut at = start & !(LARGE_SIZE - 1);
        while at < end {
            let slot = ((PAGE_TABLES + PAGE_SIZE) as *mut u64).wrapping_add((at >> 30) as usize);
            // SAFETY: `at` is below LIMIT, so the slot is in the PDPT, and a present entry points
            // at a directory.
            unsafe {
                if slot.read() == 0 {
                    slot.write(self.add() as u64 | TABLE);
                }
                let directory = (slot.read() & !(PAGE_SIZE - 1)) as *mut u64;
                directory.add((at >> 21) as usize % 512).write(at | LARGE);
            }
            at += LARGE_SIZE;
        }
    }
}
