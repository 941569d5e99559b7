//! The Intel MultiProcessor table, specification 1.4: CPUs and interrupts, for kernels without
//! ACPI.
//!
//! Local APIC ids are 0, 1, 2, ...; the IOAPIC's id is the number of CPUs. Each IOAPIC pin carries
//! the ISA interrupt of the same number. Pins 0-15 are the PC's; pins 16-23 are listed for
//! virtio-mmio devices.

use super::layout::{BASE_MEMORY_END, MP_TABLE};
use crate::platform::{IOAPIC_BASE, IOAPIC_PINS, LAPIC_BASE, MAX_CPUS};

const FLOATING_LEN: usize = 16;
const HEADER_LEN: usize = 44;
const REVISION_1_4: u8 = 4;
/// The version of an integrated APIC that kernels expect.
const APIC_VERSION: u8 = 0x14;
/// Family 6, so that kernels do not mistake the CPU for a 386.
const CPU_SIGNATURE: u32 = 0x600;
/// The CPU has an APIC and an FPU.
const CPU_FEATURES: u32 = 0x201;
const ISA_BUS: u8 = 0;
const ALL_APICS: u8 = 0xff;

/// A number of CPUs for which no table can be written.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{cpus} vCPUs, but 1 to {MAX_CPUS} are supported")]
pub struct MpTableError {
    /// The number of CPUs.
    pub cpus: u8,
}

enum InterruptType {
    Normal = 0,
    Nmi = 1,
    External = 3,
}

/// Sets `bytes[sum_at]` so that the sum of `bytes` is 0 modulo 256.
fn set_checksum(bytes: &mut [u8], sum_at: usize) {
    bytes[sum_at] = 0;
    bytes[sum_at] = bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte));
}

/// The floating pointer and the table for `cpus` CPUs, to be written at [`MP_TABLE`].
pub(crate) fn mp_table(cpus: u8) -> Result<Vec<u8>, MpTableError> {
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(MpTableError { cpus });
    }
    // At most 16 + 44 + 32 * 20 + 8 + 8 + 24 * 8 + 2 * 8 bytes, within its 1 KiB.
    let mut entries = Vec::with_capacity((BASE_MEMORY_END.0 - MP_TABLE.0) as usize);
    let mut count = 0_u16;
    let mut entry = |bytes: &[&[u8]]| {
        entries.extend(bytes.concat());
        count += 1;
    };
    for cpu in 0..cpus {
        let boot_cpu = if cpu == 0 { 0b10 } else { 0 };
        let enabled = 0b01;
        let head = [0, cpu, APIC_VERSION, enabled | boot_cpu];
        entry(&[&head, &CPU_SIGNATURE.to_le_bytes(), &CPU_FEATURES.to_le_bytes(), &[0; 8]]);
    }
    entry(&[&[1, ISA_BUS], b"ISA   "]);
    let ioapic = cpus;
    let enabled = 1;
    entry(&[&[2, ioapic, APIC_VERSION, enabled], &(IOAPIC_BASE.0 as u32).to_le_bytes()]);
    // Polarity and trigger mode 0: those of the bus.
    for pin in 0..IOAPIC_PINS {
        entry(&[&[3, InterruptType::Normal as u8, 0, 0, ISA_BUS, pin, ioapic, pin]]);
    }
    entry(&[&[4, InterruptType::External as u8, 0, 0, ISA_BUS, 0, ALL_APICS, 0]]);
    entry(&[&[4, InterruptType::Nmi as u8, 0, 0, ISA_BUS, 0, ALL_APICS, 1]]);

    let mut table = Vec::with_capacity(FLOATING_LEN + HEADER_LEN + entries.len());
    table.extend(b"_MP_");
    table.extend((MP_TABLE.0 as u32 + FLOATING_LEN as u32).to_le_bytes());
    table.extend([1, REVISION_1_4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut table, 10);

    let mut config = Vec::with_capacity(HEADER_LEN + entries.len());
    config.extend(b"PCMP");
    config.extend(((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    config.extend([REVISION_1_4, 0]);
    config.extend(b"CLADE   ");
    config.extend(b"MICROVM     ");
    config.extend([0; 6]);
    config.extend(count.to_le_bytes());
    config.extend((LAPIC_BASE.0 as u32).to_le_bytes());
    config.extend([0; 4]);
    config.extend(entries);
    set_checksum(&mut config, 7);

    table.extend(config);
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::super::testutil::{sum, u32_at};
    use super::*;

    /// Parses a table as a kernel does: floating pointer, header, entries by type.
    fn parse(table: &[u8]) -> Vec<&[u8]> {
        assert_eq!(&table[..4], b"_MP_");
        assert_eq!(sum(&table[..16]), 0);
        assert_eq!(u64::from(u32_at(table, 4)), MP_TABLE.0 + 16);
        let config = &table[16..];
        assert_eq!(&config[..4], b"PCMP");
        assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
        assert_eq!(sum(config), 0);
        assert_eq!(u64::from(u32_at(config, 36)), LAPIC_BASE.0);
        let mut rest = &config[44..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (entry, next) = rest.split_at(if rest[0] == 0 { 20 } else { 8 });
            entries.push(entry);
            rest = next;
        }
        assert_eq!(entries.len(), usize::from(u16::from_le_bytes([config[34], config[35]])));
        entries
    }

    #[test]
    fn parses_back_for_every_cpu_count() {
        for cpus in 1..=MAX_CPUS {
            let table = mp_table(cpus).unwrap();
            assert!(table.len() as u64 <= BASE_MEMORY_END.0 - MP_TABLE.0, "{cpus} CPUs");
            let entries = parse(&table);
            let of = |kind: u8| entries.iter().filter(move |e| e[0] == kind).collect::<Vec<_>>();
            let ids: Vec<u8> = of(0).iter().map(|e| e[1]).collect();
            assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
            assert_eq!(of(0).iter().filter(|e| e[3] == 3).count(), 1, "one boot CPU");
            assert_eq!(&of(1)[0][2..], b"ISA   ");
            assert_eq!(of(2)[0][1], cpus);
            assert_eq!(u64::from(u32_at(of(2)[0], 4)), IOAPIC_BASE.0);
            assert!(of(3).iter().all(|e| e[5] == e[7] && e[6] == cpus));
            assert_eq!(of(3).len(), usize::from(IOAPIC_PINS));
            assert_eq!(of(4).iter().map(|e| (e[1], e[7])).collect::<Vec<_>>(), [(3, 0), (1, 1)]);
        }
    }

    #[test]
    fn other_counts_are_refused() {
        assert_eq!(mp_table(0).unwrap_err().to_string(), "0 vCPUs, but 1 to 32 are supported");
        assert_eq!(mp_table(33), Err(MpTableError { cpus: 33 }));
    }
}
