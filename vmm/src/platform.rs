//! The platform: the addresses, ports and interrupts of a guest.
//!
//! A PC without a chipset. RAM and the boot protocols' structures are in [`boot`](crate::boot).
//!
//! | guest-physical from | to | use |
//! |---|---|---|
//! | `0xe0000` | `0xf0000` | ACPI tables, the root pointer first, where kernels search for it |
//! | `0xfe000` | `0xff000` | the VM's generation id, which changes in every clone |
//! | `0xff000` | `0x100000` | VMClock: the same for user space |
//! | `0xc0000000` | `0x100000000` | the gap without RAM |
//! | `0xd0000000` | `0xd0010000` | virtio-mmio, one page a device |
//! | `0xfec00000` | `0xfec01000` | IOAPIC (KVM) |
//! | `0xfee00000` | `0xfee01000` | local APICs (KVM) |
//! | `0xfffbd000` | `0xfffc0000` | KVM's TSS on Intel hosts |
//!
//! | port (beside those of KVM's PICs and PIT) | use |
//! |---|---|
//! | `0x60`-`0x64` | keyboard controller: only its reset line |
//! | `0x3f8`-`0x3ff` | COM1 |
//! | `0x600`-`0x602` | sleep control and status, and the power button's state |
//!
//! | GSI | use |
//! |---|---|
//! | 4 | COM1 |
//! | 12 | ACPI events: a new generation, the power button |
//! | 16-23, then 5, 6, 7, 9, 10, 11, 14, 15 | virtio devices, by slot |

pub(crate) use clade_devices::{COM1_BASE, COM1_GSI, I8042_BASE, POWER_BASE};
use vm_memory::GuestAddress;

/// Maximum number of vCPUs of a VM.
pub(crate) const MAX_CPUS: u8 = 32;

/// Interrupt inputs of the IOAPIC, one for each GSI.
pub(crate) const IOAPIC_PINS: u8 = 24;

/// ACPI tables, the root pointer first.
pub(crate) const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// End of the range for ACPI tables.
pub(crate) const ACPI_TABLES_END: GuestAddress = GuestAddress(0xf_0000);
/// The 16 bytes of the generation id. In a page of their own: a kernel may map the VMClock's page
/// into user space, and the id is for the kernel only.
pub(crate) const GENERATION_ID: GuestAddress = GuestAddress(0xf_e000);
/// The VMClock structure, in a page of its own.
pub(crate) const VMCLOCK: GuestAddress = GuestAddress(0xf_f000);
/// The interrupt of ACPI events: a new generation, or the power button. On a PC, that of the PS/2
/// mouse, which the VM lacks.
pub(crate) const EVENT_GSI: u32 = 12;
/// Start of the address range without RAM.
pub(crate) const MMIO_GAP_START: GuestAddress = GuestAddress(clade_memory::GAP_START);
/// End of the address range without RAM.
pub(crate) const MMIO_GAP_END: GuestAddress = GuestAddress(clade_memory::GAP_END);
/// The IOAPIC's registers.
pub(crate) const IOAPIC_BASE: GuestAddress = GuestAddress(0xfec0_0000);
/// Every local APIC's registers.
pub(crate) const LAPIC_BASE: GuestAddress = GuestAddress(0xfee0_0000);
/// Range for KVM's three-page TSS (`KVM_SET_TSS_ADDR`), inside the gap.
pub(crate) const KVM_TSS: GuestAddress = GuestAddress(0xfffb_d000);
/// A page that nothing uses, inside the gap.
pub(crate) const UNUSED_PAGE: GuestAddress = GuestAddress(0xf000_0000);
/// The registers of the first virtio device. Each device has one page, one after the other.
pub(crate) const VIRTIO_BASE: GuestAddress = GuestAddress(0xd000_0000);
/// The interrupts of virtio devices, in order: first those unused on a PC, then those of PC devices
/// that the VM lacks.
pub(crate) const VIRTIO_GSIS: [u32; 16] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 14, 15];

/// The address of the registers of virtio device `index`, and its interrupt. None beyond the last
/// place.
#[must_use]
pub fn virtio_slot(index: usize) -> Option<(GuestAddress, u32)> {
    let gsi = *VIRTIO_GSIS.get(index)?;
    Some((GuestAddress(VIRTIO_BASE.0 + index as u64 * PAGE_SIZE), gsi))
}

/// Size of a small page.
pub(crate) const PAGE_SIZE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtio_devices_have_pages_and_interrupts_of_their_own() {
        let mut gsis = VIRTIO_GSIS.to_vec();
        gsis.extend([0, 1, 2, 4, 8, EVENT_GSI]);
        gsis.sort_unstable();
        gsis.dedup();
        assert_eq!(
            gsis.len(),
            VIRTIO_GSIS.len() + 6,
            "none is another's, the timer's, the keyboard's, the console's, the clock's or the events'"
        );
        assert_eq!(virtio_slot(0), Some((VIRTIO_BASE, 16)));
        let (last, _) = virtio_slot(VIRTIO_GSIS.len() - 1).unwrap();
        assert!(last.0 + PAGE_SIZE <= IOAPIC_BASE.0 && VIRTIO_BASE.0 >= MMIO_GAP_START.0);
        assert_eq!(virtio_slot(VIRTIO_GSIS.len()), None);
    }
}
