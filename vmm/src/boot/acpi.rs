//! ACPI tables: CPUs, interrupts, devices, the notification of a clone, and the power button.
//!
//! The tables are hardware-reduced: there is no power management timer and no system control
//! interrupt to emulate. Events come through a Generic Event Device. Its interrupt is
//! edge-triggered, so there is no state to save.
//!
//! ```text
//! RSDP ─► XSDT ─┬► FADT ─► DSDT ─┬► COM1, and a device for each virtio-mmio device
//!               └► MADT          ├► VGEN and VCLK: pages in RAM
//!                                ├► PWRB: the power button
//!                                └► GED0: interrupt 12: Notify (VGEN, 0x80), Notify (VCLK, 0x80),
//!                                         and if its register is set: Notify (PWRB, 0x80)
//! ```
//!
//! One interrupt serves all events. A driver notified without a change sees that from its page. The
//! button has a register, which is set by a press and cleared by the read. So an interrupt that is
//! pending at a fork does not count as a press in the child.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use clade_devices::virtio::MMIO_LEN;
use clade_devices::{BUTTON, POWER_PORTS, SLEEP_CONTROL, SLEEP_STATUS, SOFT_OFF};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::platform::{
    ACPI_TABLES, ACPI_TABLES_END, COM1_BASE, COM1_GSI, EVENT_GSI, GENERATION_ID, I8042_BASE, IOAPIC_BASE, LAPIC_BASE,
    PAGE_SIZE, POWER_BASE, VMCLOCK, virtio_slot,
};

const OEM: [u8; 6] = *b"CLADE ";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;
/// Alignment of the tables in bytes.
const ALIGN: u64 = 16;
/// IAPC_BOOT_ARCH: no VGA, and no RTC in CMOS.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// The keyboard controller's command port, and the command that pulses the CPU's reset line.
const RESET_PORT: u64 = I8042_BASE as u64 + 4;
const RESET_VALUE: u8 = 0xfe;
/// Notification that a device's state has changed; the device defines its meaning. For a button:
/// pressed.
const CHANGED: u8 = 0x80;

/// Collects the bytes of a table.
#[derive(Default)]
struct AmlBuffer(Vec<u8>);

impl AmlSink for AmlBuffer {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = AmlBuffer::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

fn hid(id: &'static str) -> Name {
    Name::new(Path::new("_HID"), &id)
}

/// A device whose registers or data are one page of memory.
fn in_memory(name: &str, hid: &Name, uid: &Name, at: GuestAddress, more: &[&dyn Aml]) -> Vec<u8> {
    // The address map puts every device below 4 GiB.
    let memory = Memory32Fixed::new(true, at.0 as u32, PAGE_SIZE as u32);
    let mut resources: Vec<&dyn Aml> = vec![&memory];
    resources.extend(more);
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources));
    bytes(&Device::new(Path::new(name), vec![hid, uid, &resources]))
}

/// The devices, and the method that runs on the interrupt of an event.
fn devices(virtio: usize) -> Vec<u8> {
    let interrupt = |gsi| Interrupt::new(true, true, false, false, gsi);
    let uid = |number: u8| Name::new(Path::new("_UID"), &number);
    let mut all = Vec::new();

    let ports = IO::new(COM1_BASE, COM1_BASE, 0, 8);
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt(COM1_GSI)]));
    let com1 = Name::new(Path::new("_HID"), &EISAName::new("PNP0501"));
    all.extend(bytes(&Device::new(Path::new("COM1"), vec![&com1, &uid(0), &resources])));

    const { assert!(MMIO_LEN == PAGE_SIZE) };
    for (number, (base, gsi)) in (0..virtio).filter_map(virtio_slot).enumerate() {
        // At most 16, the length of VIRTIO_GSIS.
        let number = number as u8;
        all.extend(in_memory(&format!("VR{number:02}"), &hid("LNRO0005"), &uid(number), base, &[&interrupt(gsi)]));
    }

    // The guest's driver binds to the compatible id.
    let compatible = Name::new(Path::new("_CID"), &"VM_Gen_Counter");
    let described = Name::new(Path::new("_DDN"), &"VM_Gen_Counter");
    let address = Package::new(vec![&(GENERATION_ID.0 as u32), &ZERO]);
    let address = Name::new(Path::new("ADDR"), &address);
    let id = hid("CLADVGEN");
    all.extend(bytes(&Device::new(Path::new("VGEN"), vec![&id, &compatible, &described, &address])));

    let compatible = Name::new(Path::new("_CID"), &"VMCLOCK");
    let memory = Memory32Fixed::new(true, VMCLOCK.0 as u32, PAGE_SIZE as u32);
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&memory]));
    let id = hid("AMZNC10C");
    all.extend(bytes(&Device::new(Path::new("VCLK"), vec![&id, &compatible, &resources])));

    let button = Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"));
    all.extend(bytes(&Device::new(Path::new("PWRB"), vec![&button, &uid(0)])));
    let registers = OpRegion::new(Path::new("PWRR"), OpRegionSpace::SystemIO, &POWER_BASE, &POWER_PORTS);
    all.extend(bytes(&registers));
    let pressed = FieldEntry::Named(*b"BTTN", 8);
    let fields = vec![FieldEntry::Reserved(8 * usize::from(BUTTON)), pressed];
    let (access, rule) = (FieldAccessType::Byte, FieldUpdateRule::Preserve);
    all.extend(bytes(&Field::new(Path::new("PWRR"), access, FieldLockRule::NoLock, rule, fields)));

    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt(EVENT_GSI)]));
    let (generation, clock) = (Path::new("\\_SB_.VGEN"), Path::new("\\_SB_.VCLK"));
    let (tell_generation, tell_clock) = (Notify::new(&generation, &CHANGED), Notify::new(&clock, &CHANGED));
    let (button, register) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.BTTN"));
    // Once: the read clears it.
    let read = Store::new(&Local(0), &register);
    let tell_button = Notify::new(&button, &CHANGED);
    let is_pressed = Equal::new(&Local(0), &ONE);
    let if_pressed = If::new(&is_pressed, vec![&tell_button]);
    let ours = Equal::new(&Arg(0), &EVENT_GSI);
    let tell = If::new(&ours, vec![&tell_generation, &tell_clock, &read, &if_pressed]);
    let event = Method::new(Path::new("_EVT"), 1, true, vec![&tell]);
    let id = hid("ACPI0013");
    all.extend(bytes(&Device::new(Path::new("GED0"), vec![&id, &uid(0), &resources, &event])));
    all
}

fn dsdt(virtio: usize) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), devices(virtio)));
    // S5, soft off, is the only sleep state.
    let off = Package::new(vec![&SOFT_OFF, &ZERO, &ZERO, &ZERO]);
    table.append_slice(&bytes(&Name::new(Path::new("_S5_"), &off)));
    table.as_slice().to_vec()
}

fn madt(cpus: u8) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(LAPIC_BASE.0 as u32);
    let mut table = MADT::new(OEM, OEM_TABLE, REVISION, lapic);
    for cpu in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(cpus, IOAPIC_BASE.0 as u32, 0));
    bytes(&table)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // No fixed buttons: the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_PORT);
    table.reset_value = RESET_VALUE;
    let register =
        |at| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(POWER_BASE) + u64::from(at));
    table.sleep_control_reg = register(SLEEP_CONTROL);
    table.sleep_status_reg = register(SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"CLADE\0\0\0").into();
    bytes(&table.finalize())
}

/// The tables for `cpus` vCPUs and the first `virtio` virtio-mmio devices, to be written at
/// [`ACPI_TABLES`]. The root pointer comes first.
#[must_use]
pub(crate) fn acpi_tables(cpus: u8, virtio: usize) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len().next_multiple_of(ALIGN as usize)];
    let mut add = |table: Vec<u8>| {
        all.resize(all.len().next_multiple_of(ALIGN as usize), 0);
        let at = ACPI_TABLES.0 + all.len() as u64;
        all.extend(table);
        at
    };
    let dsdt = add(dsdt(virtio));
    let (fadt, madt) = (add(fadt(dsdt)), add(madt(cpus)));
    let mut roots = XSDT::new(OEM, OEM_TABLE, REVISION);
    roots.add_entry(fadt);
    roots.add_entry(madt);
    let roots = add(bytes(&roots));
    let pointer = bytes(&Rsdp::new(OEM, roots));
    all[..pointer.len()].copy_from_slice(&pointer);
    debug_assert!(all.len() as u64 <= ACPI_TABLES_END.0 - ACPI_TABLES.0, "{} bytes of ACPI tables", all.len());
    all
}

/// Writes the tables, and returns the address of the root pointer.
///
/// # Errors
/// When there is no RAM at [`ACPI_TABLES`].
pub(crate) fn write_acpi_tables<M: GuestMemoryBackend>(
    mem: &M,
    cpus: u8,
    virtio: usize,
) -> Result<GuestAddress, GuestMemoryError> {
    mem.write_slice(&acpi_tables(cpus, virtio), ACPI_TABLES)?;
    Ok(ACPI_TABLES)
}

#[cfg(test)]
mod tests {
    use super::super::testutil::{sum, u32_at};
    use super::*;
    use crate::platform::{MAX_CPUS, VIRTIO_GSIS};

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at `address`, checked as a kernel checks it.
    fn table<'a>(all: &'a [u8], address: u64, signature: &[u8; 4]) -> &'a [u8] {
        assert_eq!(address % ALIGN, 0);
        let rest = &all[(address - ACPI_TABLES.0) as usize..];
        let table = &rest[..u32_at(rest, 4) as usize];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(signature));
        table
    }

    #[test]
    fn tables_point_at_each_other() {
        for (cpus, virtio) in [(1, 0), (2, 3), (MAX_CPUS, VIRTIO_GSIS.len())] {
            let all = acpi_tables(cpus, virtio);
            assert!(all.len() as u64 <= ACPI_TABLES_END.0 - ACPI_TABLES.0, "{} bytes", all.len());
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!((sum(&all[..20]), sum(&all[..36]), all[15]), (0, 0, 2));
            let roots = table(&all, u64_at(&all, 24), b"XSDT");
            assert_eq!(roots.len(), 36 + 2 * 8);
            let fadt = table(&all, u64_at(roots, 36), b"FACP");
            assert_eq!(u32_at(fadt, 112) & 1 << 20, 1 << 20, "hardware-reduced");
            assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0x64, 0xfe), "the reset register");
            assert_eq!((fadt[244], u64_at(fadt, 248)), (1, 0x600), "the sleep control register");
            assert_eq!((fadt[256], u64_at(fadt, 260)), (1, 0x601), "the sleep status register");
            let madt = table(&all, u64_at(roots, 44), b"APIC");
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
            assert_eq!(madt[44..][..8 * usize::from(cpus)].chunks(8).map(|cpu| cpu[3]).collect::<Vec<_>>(), {
                (0..cpus).collect::<Vec<_>>()
            });
            let dsdt = table(&all, u64_at(fadt, 140), b"DSDT");
            let count = |name: &[u8]| dsdt.windows(name.len()).filter(|window| *window == name).count();
            assert_eq!(count(b"LNRO0005"), virtio);
            assert_eq!((count(b"VM_Gen_Counter"), count(b"AMZNC10C"), count(b"ACPI0013")), (2, 1, 1));
            // The device, and the notification.
            assert_eq!((count(b"PWRB"), count(b"BTTN")), (2, 2));
        }
    }
}
