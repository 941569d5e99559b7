//! The MSRs of a vCPU's state on this host, in restore order.
//!
//! KVM lists MSRs that cannot be read, or cannot be written back. So every listed MSR is tried
//! once, on a scratch vCPU with a guest's CPUID. After that one `KVM_GET_MSRS` reads them all.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::host::Host;

/// `IA32_TIME_STAMP_COUNTER`
pub(super) const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// `MSR_KVM_SYSTEM_TIME_NEW`
pub(super) const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// `MSR_KVM_ASYNC_PF_EN`
pub(super) const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// `IA32_ARCH_CAPABILITIES`: the CPU's immunities to attacks on speculative execution.
pub(super) const ARCH_CAPABILITIES: u32 = 0x10a;
/// `IA32_MCG_CAP`: the number of machine-check banks, and whether CMCI is supported.
const MCG_CAP: u32 = 0x179;
const MCG_CMCI: u64 = 1 << 10;
/// The first of the banks' `MCi_CTL`, `MCi_STATUS`, `MCi_ADDR` and `MCi_MISC`, and of their
/// `MCi_CTL2`.
const MC0_CTL: u32 = 0x400;
const MC0_CTL2: u32 = 0x280;
/// `MSR_KVM_WALL_CLOCK` and `MSR_KVM_SYSTEM_TIME`: old indices of values that the new MSRs hold
/// too.
const DUPLICATES: [u32; 2] = [0x11, 0x12];
/// `MSR_KVM_WALL_CLOCK_NEW`: an order, and no state. When it is set, KVM writes the time to the guest's memory.
pub(super) const WALL_CLOCK: u32 = 0x4b56_4d00;
/// State MSRs that `KVM_GET_MSR_INDEX_LIST` does not list on every kernel: `DEBUGCTL` and the last
/// branches, and the MTRRs, of which KVM has eight variable ones. Machine-check banks are counted
/// instead.
const UNLISTED: [u32; 33] = [
    0x1d9, 0x1db, 0x1dc, 0x1dd, 0x1de, //
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// The most MSRs that one ioctl can carry.
pub const MAX_MSRS: usize = kvm_bindings::KVM_MAX_MSR_ENTRIES;
/// MSRs probed with one ioctl.
const PIECE: usize = 128;

/// Why the MSRs could not be listed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MsrError {
    /// A KVM ioctl failed.
    #[error("{what} failed")]
    Call {
        /// The ioctl.
        what: &'static str,
        /// The ioctl's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// There are more MSRs than one ioctl takes.
    #[error("{count} MSRs are more than one call can carry")]
    TooMany {
        /// The number of MSRs.
        count: usize,
    },
}

/// MSRs in restore order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrSet(Vec<u32>);

/// The rank of an MSR in the restore order, lowest first.
fn rank(index: u32) -> u8 {
    match index {
        // First: all other clocks and timers are computed from the TSC.
        MSR_TSC => 0,
        // After the TSC: on this write KVM fills the guest's clock page from the TSC offset.
        KVM_SYSTEM_TIME => 2,
        // After the MSR of the interrupt that delivers it: on this write KVM queues an event that
        // wakes all waiters.
        KVM_ASYNC_PF_EN => 2,
        // Last: KVM compares the deadline with the TSC, and fires at once if the TSC is still
        // another VM's.
        MSR_TSC_DEADLINE => 3,
        _ => 1,
    }
}

fn entries(indices: &[u32]) -> Vec<kvm_msr_entry> {
    indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect()
}

fn fam(entries: &[kvm_msr_entry]) -> Result<Msrs, MsrError> {
    Msrs::from_entries(entries).map_err(|_| MsrError::TooMany { count: entries.len() })
}

/// Sets `bits` of one MSR and keeps its other bits. Returns `false` if this host's KVM lacks the
/// MSR, or refuses the value.
pub(crate) fn set_msr_bits(vcpu: &VcpuFd, index: u32, bits: u64) -> Result<bool, MsrError> {
    let failed = |what| move |source| MsrError::Call { what, source };
    let mut one = fam(&entries(&[index]))?;
    if vcpu.get_msrs(&mut one).map_err(failed("KVM_GET_MSRS"))? != 1 {
        return Ok(false);
    }
    one.as_mut_slice()[0].data |= bits;
    Ok(vcpu.set_msrs(&one).map_err(failed("KVM_SET_MSRS"))? == 1)
}

/// Reads `wanted`. Returns the entries read, and the indices that KVM refused. KVM stops at the
/// first refused MSR; the next call reads those after it.
pub(super) fn read_all(vcpu: &VcpuFd, wanted: Msrs) -> Result<(Vec<kvm_msr_entry>, Vec<u32>), MsrError> {
    let (mut found, mut refused) = (Vec::with_capacity(wanted.as_slice().len()), Vec::new());
    let mut left = wanted;
    loop {
        let source = |source| MsrError::Call { what: "KVM_GET_MSRS", source };
        let read = vcpu.get_msrs(&mut left).map_err(source)?;
        found.extend(left.as_slice().iter().take(read));
        let Some((bad, rest)) = left.as_slice().get(read..).and_then(<[_]>::split_first) else {
            return Ok((found, refused));
        };
        refused.push(bad.index);
        left = fam(rest)?;
    }
}

/// Writes `all`. Returns the entries that KVM refused. KVM stops at each of them; the next call
/// writes those after it.
pub(super) fn write_all(vcpu: &VcpuFd, all: &Msrs) -> Result<Vec<kvm_msr_entry>, MsrError> {
    let mut refused = Vec::new();
    let failed = |source| MsrError::Call { what: "KVM_SET_MSRS", source };
    let mut left = all.as_slice();
    let mut written = vcpu.set_msrs(all).map_err(failed)?;
    while let Some((bad, rest)) = left.get(written..).and_then(<[_]>::split_first) {
        refused.push(*bad);
        left = rest;
        written = if left.is_empty() { 0 } else { vcpu.set_msrs(&fam(left)?).map_err(failed)? };
    }
    Ok(refused)
}

/// The value of one MSR, if `vcpu` has it.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, MsrError> {
    let (found, _) = read_all(vcpu, fam(&entries(&[index]))?)?;
    Ok(found.first().map(|entry| entry.data))
}

/// The MSRs of the machine-check banks that `vcpu` has.
fn machine_check_banks(vcpu: &VcpuFd) -> Result<Vec<u32>, MsrError> {
    let Some(cap) = read_one(vcpu, MCG_CAP)? else { return Ok(Vec::new()) };
    let banks = (cap & 0xff) as u32;
    let mut all: Vec<u32> = (MC0_CTL..MC0_CTL + 4 * banks).collect();
    if cap & MCG_CMCI != 0 {
        all.extend(MC0_CTL2..MC0_CTL2 + banks);
    }
    Ok(all)
}

impl MsrSet {
    /// Tries every MSR that KVM lists on `vcpu`, a scratch vCPU that has its CPUID.
    pub(super) fn probe(host: &Host, vcpu: &VcpuFd) -> Result<Self, MsrError> {
        let failed = |what| move |source| MsrError::Call { what, source };
        let listed = host.kvm().get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;

        let mut indices = listed.as_slice().to_vec();
        indices.extend(UNLISTED);
        indices.extend(machine_check_banks(vcpu)?);
        indices.retain(|index| {
            !DUPLICATES.contains(index) && *index != WALL_CLOCK && !host.quirks().skip_msrs().contains(index)
        });
        // By rank, then by index: the order is then the same on every run.
        indices.sort_unstable_by_key(|&index| (rank(index), index));
        indices.dedup();

        let (mut readable, mut refused) = (Vec::new(), Vec::new());
        // In pieces, because KVM may list more than one ioctl can carry.
        for piece in indices.chunks(PIECE) {
            let (some, others) = read_all(vcpu, fam(&entries(piece))?)?;
            readable.extend(some);
            refused.extend(others);
        }
        for index in refused {
            tracing::debug!(msr = index, "cannot be read, left out of the state");
        }
        // In one call as long as KVM refuses none: any call to a vCPU costs microseconds.
        let mut refused = Vec::new();
        for piece in readable.chunks(PIECE) {
            refused.extend(write_all(vcpu, &fam(piece)?)?.iter().map(|entry| entry.index));
        }
        let kept = readable.iter().map(|entry| entry.index).filter(|index| !refused.contains(index)).collect();
        for index in refused {
            tracing::debug!(msr = index, "cannot be written back, left out of the state");
        }
        Ok(Self(kept))
    }

    /// The indices of the MSRs.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.0
    }

    /// A buffer for one call that reads them all.
    pub(super) fn buffer(&self) -> Result<Msrs, MsrError> {
        fam(&entries(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::features::CpuHide;
    use super::super::testutil::host;
    use super::*;

    #[test]
    fn the_order_is_tsc_then_others_then_clock_then_deadline() {
        let mut indices = [MSR_TSC_DEADLINE, KVM_ASYNC_PF_EN, 0x4b56_4d06, 0x4b56_4d01, 0xc000_0081, 0x174, MSR_TSC];
        indices.sort_unstable_by_key(|&index| (rank(index), index));
        let wanted = [MSR_TSC, 0x174, 0x4b56_4d06, 0xc000_0081, 0x4b56_4d01, KVM_ASYNC_PF_EN, MSR_TSC_DEADLINE];
        assert_eq!(indices, wanted);
    }

    /// KVM stops at a refused MSR. The MSRs after it are still read and written, and the refused
    /// one is reported.
    #[test]
    fn one_bad_msr_hides_no_other() {
        let Some(host) = host() else { return };
        let vm = host.scratch_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&host.cpuid(0, 1, &CpuHide::none()).unwrap()).unwrap();
        const BAD: [u32; 2] = [0x4000_ffff, 0x4000_fffe];
        let (pat, def_type) = (0x277, 0x2ff);
        let wanted = fam(&entries(&[pat, BAD[0], def_type, BAD[1]])).unwrap();
        let (mut found, refused) = read_all(&vcpu, wanted).unwrap();
        assert_eq!(refused, BAD);
        assert_eq!(found.iter().map(|entry| entry.index).collect::<Vec<_>>(), [pat, def_type]);
        found[1].data = 6;
        let bad = BAD.map(|index| kvm_msr_entry { index, data: 7, ..Default::default() });
        let refused = write_all(&vcpu, &fam(&[bad[0], found[0], bad[1], found[1]]).unwrap()).unwrap();
        assert_eq!(refused, bad);
        let (found, _) = read_all(&vcpu, fam(&entries(&[def_type])).unwrap()).unwrap();
        assert_eq!(found[0].data, 6);
    }

    #[test]
    fn machine_check_banks_are_part_of_the_state() {
        let Some(host) = host() else { return };
        let set = host.msrs().unwrap();
        for must in [MC0_CTL, MC0_CTL + 1, MC0_CTL + 4, 0x1d9] {
            assert!(set.indices().contains(&must), "{must:#x}");
        }
    }

    #[test]
    fn bits_are_set_beside_those_that_are_set() {
        let Some(host) = host() else { return };
        let vm = host.scratch_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&host.cpuid(0, 1, &CpuHide::none()).unwrap()).unwrap();
        let value = |index| {
            let mut one = fam(&entries(&[index])).unwrap();
            assert_eq!(vcpu.get_msrs(&mut one).unwrap(), 1);
            one.as_slice()[0].data
        };
        // IA32_MTRR_DEF_TYPE: write-back; then enabled as well.
        assert!(set_msr_bits(&vcpu, 0x2ff, 6).unwrap());
        assert!(set_msr_bits(&vcpu, 0x2ff, 1 << 11).unwrap());
        assert_eq!(value(0x2ff), 1 << 11 | 6);
        assert!(!set_msr_bits(&vcpu, 0x4000_ffff, 1).unwrap(), "there is none of that number");
        assert!(!set_msr_bits(&vcpu, 0x2ff, 1 << 60).unwrap(), "a reserved bit");
        assert_eq!(value(0x2ff), 1 << 11 | 6);
    }

    #[test]
    fn what_is_kept_reads_in_one_call_and_writes_back() {
        let Some(host) = host() else { return };
        let set = host.msrs().unwrap();
        for must in [MSR_TSC, 0x174, 0xc000_0081, 0xc000_0082, 0x4b56_4d01] {
            assert!(set.indices().contains(&must), "{must:#x}");
        }
        let vm = host.scratch_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&host.cpuid(0, 1, &CpuHide::none()).unwrap()).unwrap();
        let mut buffer = set.buffer().unwrap();
        assert_eq!(vcpu.get_msrs(&mut buffer).unwrap(), set.indices().len());
        assert_eq!(vcpu.set_msrs(&buffer).unwrap(), set.indices().len());
        println!("{} MSRs: {:x?}", set.indices().len(), set.indices());
    }
}
