//! The boot vCPU's registers for each boot protocol.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::layout::{BOOT_GDT, BOOT_IDT, BOOT_STACK};
use super::load::BootEntry;

/// Null, code, data and TSS descriptors for PVH: 32-bit, base 0, limit 4 GiB.
pub(super) const GDT_PROTECTED_MODE: [u64; 4] =
    [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
/// Null, code, data and TSS descriptors for the 64-bit protocol, with a long-mode code segment.
pub(super) const GDT_LONG_MODE: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

const CODE: usize = 1;
const DATA: usize = 2;
const TSS: usize = 3;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 1 << 1;

/// Bits of an MSR that are set on new vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootMsr {
    /// The MSR's index.
    pub index: u32,
    /// The bits, set in addition to KVM's.
    pub bits: u64,
}

/// MSRs that firmware would set and kernels rely on, for every vCPU. They enable fast string
/// operations (`IA32_MISC_ENABLE`) and make write-back the default memory type
/// (`IA32_MTRR_DEF_TYPE`).
pub(crate) const BOOT_MSRS: [BootMsr; 2] =
    [BootMsr { index: 0x1a0, bits: 1 }, BootMsr { index: 0x2ff, bits: 1 << 11 | 6 }];

/// Decodes descriptor `index` of `gdt`, as a segment register load does.
fn segment(gdt: &[u64; 4], index: usize) -> kvm_segment {
    let descriptor = gdt[index];
    let bits = |at: u32, width: u32| (descriptor >> at) & ((1 << width) - 1);
    let granular = bits(55, 1) == 1;
    let limit = bits(0, 16) | bits(48, 4) << 16;
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: (if granular { limit << 12 | 0xfff } else { limit }) as u32,
        selector: 8 * index as u16,
        type_: bits(40, 4) as u8,
        s: bits(44, 1) as u8,
        dpl: bits(45, 2) as u8,
        present: bits(47, 1) as u8,
        avl: bits(52, 1) as u8,
        l: bits(53, 1) as u8,
        db: bits(54, 1) as u8,
        g: granular.into(),
        unusable: 0,
        padding: 0,
    }
}

impl BootEntry {
    /// General registers.
    #[must_use]
    pub(crate) fn regs(&self) -> kvm_regs {
        match *self {
            Self::Pvh { rip, start_info } => {
                kvm_regs { rip: rip.0, rbx: start_info.0, rflags: RFLAGS, ..Default::default() }
            }
            Self::Linux64 { rip, boot_params, .. } => kvm_regs {
                rip: rip.0,
                rsi: boot_params.0,
                rsp: BOOT_STACK.0,
                rbp: BOOT_STACK.0,
                rflags: RFLAGS,
                ..Default::default()
            },
        }
    }

    /// Sets the special registers of a new vCPU as the protocol requires. The others, above all the
    /// APIC base, stay as KVM set them.
    pub(crate) fn apply_to(&self, sregs: &mut kvm_sregs) {
        let gdt = match self {
            Self::Pvh { .. } => &GDT_PROTECTED_MODE,
            Self::Linux64 { .. } => &GDT_LONG_MODE,
        };
        let data = segment(gdt, DATA);
        sregs.cs = segment(gdt, CODE);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(gdt, TSS);
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
        sregs.gdt = kvm_dtable { base: BOOT_GDT.0, limit: size_of_val(gdt) as u16 - 1, padding: [0; 3] };
        sregs.idt = kvm_dtable { base: BOOT_IDT.0, limit: 0, padding: [0; 3] };
        match *self {
            Self::Pvh { .. } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
            }
            Self::Linux64 { page_tables, .. } => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                (sregs.cr3, sregs.cr4) = (page_tables.0, CR4_PAE);
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::super::layout::{BOOT_PML4, PVH_START_INFO, ZERO_PAGE};
    use super::*;

    #[test]
    fn pvh_is_flat_32_bit_without_paging() {
        let entry = BootEntry::Pvh { rip: GuestAddress(0x10_0000), start_info: PVH_START_INFO };
        let (regs, mut sregs) = (entry.regs(), kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() });
        entry.apply_to(&mut sregs);
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x10_0000, 0x6000, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.cs.l, sregs.cs.type_), (0, u32::MAX, 1, 0, 0xb));
        assert_eq!((sregs.ss.limit, sregs.ss.type_, sregs.ss.selector), (u32::MAX, 3, 0x10));
        assert_eq!((sregs.tr.limit, sregs.tr.type_, sregs.tr.s, sregs.tr.g), (0x67, 0xb, 0, 0));
        assert_eq!(sregs.apic_base, 0xfee0_0900, "the APIC base is KVM's");
    }

    #[test]
    fn linux64_is_in_long_mode() {
        let entry =
            BootEntry::Linux64 { rip: GuestAddress(0x100_0000), boot_params: ZERO_PAGE, page_tables: BOOT_PML4 };
        let (regs, mut sregs) = (entry.regs(), kvm_sregs::default());
        entry.apply_to(&mut sregs);
        assert_eq!((regs.rip, regs.rsi, regs.rsp), (0x100_0000, 0x7000, 0x8ff0));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0011, 0x9000, 0x20, 0x500));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.gdt.limit), (1, 0, 31));
    }
}
