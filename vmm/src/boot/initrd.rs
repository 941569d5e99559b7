//! Placement of the initramfs: as high as it fits, so that the kernel can grow into the memory
//! above itself.

use vm_memory::GuestAddress;

use super::layout::{GuestRamRanges, GuestRange};
use crate::platform::{MMIO_GAP_START, PAGE_SIZE};

/// Why there is no room for the initramfs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitrdError {
    /// The initramfs does not fit into free memory.
    #[error(
        "the initramfs of {len} bytes does not fit: {room} bytes are free between the kernel's end at {kernel_end:#x} and {top:#x}"
    )]
    NoRoom {
        /// The length of the initramfs in bytes.
        len: u64,
        /// Free bytes between the kernel's last page and `top`.
        room: u64,
        /// End of the kernel.
        kernel_end: u64,
        /// The highest end address of the initramfs, exclusive.
        top: u64,
    },
}

/// Places `len` bytes on a page boundary above `kernel`. They end at or below the end of low RAM,
/// the MMIO gap and `addr_max`, the kernel's highest address for an initramfs (inclusive).
pub(super) fn place(
    len: u64,
    ram: &GuestRamRanges,
    kernel: GuestRange,
    addr_max: u64,
) -> Result<GuestRange, InitrdError> {
    let top = ram.low_end().0.min(MMIO_GAP_START.0).min(addr_max.saturating_add(1));
    let floor = kernel.end().0.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
    let start = top.checked_sub(len).map(|start| start - start % PAGE_SIZE).filter(|start| *start >= floor);
    let no_room = || {
        let room = top.saturating_sub(floor);
        InitrdError::NoRoom { len, room, kernel_end: kernel.end().0, top }
    };
    start.and_then(|start| GuestRange::new(GuestAddress(start), len)).ok_or_else(no_room)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kernel(end: u64) -> GuestRange {
        GuestRange::new(GuestAddress(0x10_0000), end - 0x10_0000).unwrap()
    }

    #[test]
    fn goes_to_the_top_page() {
        let ram = GuestRamRanges::around_gap(16 << 20).unwrap();
        let placed = place(5000, &ram, kernel(0x20_0000), u64::MAX).unwrap();
        assert_eq!(placed, GuestRange::new(GuestAddress(0xff_e000), 5000).unwrap());
    }

    #[test]
    fn respects_the_gap_and_the_kernels_limit() {
        let ram = GuestRamRanges::around_gap(8 << 30).unwrap();
        let below_gap = place(4096, &ram, kernel(0x20_0000), 0xffff_ffff).unwrap();
        assert_eq!(below_gap.end(), MMIO_GAP_START);
        let below_limit = place(4096, &ram, kernel(0x20_0000), 0x7fff_ffff).unwrap();
        assert_eq!(below_limit.end(), GuestAddress(0x8000_0000));
    }

    #[test]
    fn no_room_says_how_much_there_is() {
        let ram = GuestRamRanges::around_gap(4 << 20).unwrap();
        let error = place(0x20_0000, &ram, kernel(0x20_0001), u64::MAX).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the initramfs of 2097152 bytes does not fit: 2093056 bytes are free between the kernel's end at 0x200001 and 0x400000"
        );
        assert!(place(0x1f_f000, &ram, kernel(0x20_0001), u64::MAX).is_ok());
    }

    proptest! {
        #[test]
        fn placed_or_refused(len in 1..u64::MAX, ram_mib in 2..8192_u64, kernel_len in 1..u64::MAX / 2, max in any::<u64>()) {
            let ram = GuestRamRanges::around_gap(ram_mib << 20).unwrap();
            let kernel = GuestRange::new(GuestAddress(0x10_0000), kernel_len).unwrap();
            if let Ok(placed) = place(len, &ram, kernel, max) {
                prop_assert!(!placed.overlaps(kernel));
                prop_assert!(ram.contains(placed));
                prop_assert_eq!(placed.start().0 % PAGE_SIZE, 0);
                prop_assert!(placed.end().0 - 1 <= max);
            }
        }
    }
}
