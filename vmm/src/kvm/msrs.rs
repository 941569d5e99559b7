//! Which MSRs make up a vCPU's state on this host, in the order in which they are restored.
//!
//! KVM names more than can be read or written back, so each is tried once, on a scratch vCPU with the CPUID guests get.
//! After that one `KVM_GET_MSRS` reads them all.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::host::Host;

/// `IA32_TIME_STAMP_COUNTER`
pub(super) const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// `MSR_KVM_SYSTEM_TIME_NEW`
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// `MSR_KVM_WALL_CLOCK` and `MSR_KVM_SYSTEM_TIME`: older numbers for what the new ones hold too.
const DUPLICATES: [u32; 2] = [0x11, 0x12];
/// MSRs that are state and that `KVM_GET_MSR_INDEX_LIST` does not name: the MTRRs. Of those, KVM has eight variable ones.
const UNLISTED: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// Why the MSRs could not be told.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// A call failed.
    #[error("{what} failed")]
    Call {
        /// Which.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More than one call can carry.
    #[error("{count} MSRs are more than one call can carry")]
    TooMany {
        /// How many.
        count: usize,
    },
}

/// MSRs in the order in which they are restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrSet(Vec<u32>);

/// Where an MSR's turn is.
fn rank(index: u32) -> u8 {
    match index {
        // First, because everything that tells the time is computed from it.
        MSR_TSC => 0,
        // After the TSC, because KVM fills the guest's clock page from the TSC offset when this is written.
        KVM_SYSTEM_TIME => 2,
        // Last, because a deadline is compared with the TSC, and fires at once when that is still another VM's.
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

/// Sets `bits` of one MSR beside those that are set. False when this host's KVM has no such MSR, or refuses the value.
pub fn set_msr_bits(vcpu: &VcpuFd, index: u32, bits: u64) -> Result<bool, MsrError> {
    let failed = |what| move |source| MsrError::Call { what, source };
    let mut one = fam(&entries(&[index]))?;
    if vcpu.get_msrs(&mut one).map_err(failed("KVM_GET_MSRS"))? != 1 {
        return Ok(false);
    }
    one.as_mut_slice()[0].data |= bits;
    Ok(vcpu.set_msrs(&one).map_err(failed("KVM_SET_MSRS"))? == 1)
}

impl MsrSet {
    /// Tries every MSR that KVM names on `vcpu`, a scratch one that has its CPUID.
    pub(super) fn probe(host: &Host, vcpu: &VcpuFd) -> Result<Self, MsrError> {
        let failed = |what| move |source| MsrError::Call { what, source };
        let listed = host.kvm().get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;

        let mut indices = listed.as_slice().to_vec();
        indices.extend(UNLISTED);
        indices.retain(|index| !DUPLICATES.contains(index) && !host.quirks().skip_msrs().contains(index));
        // By rank, then by number, so that the order is the same on every run.
        indices.sort_unstable_by_key(|&index| (rank(index), index));
        indices.dedup();

        let readable = Self::readable(vcpu, indices)?;
        let mut kept = Vec::with_capacity(readable.len());
        for entry in readable {
            let written = vcpu.set_msrs(&fam(&[entry])?).map_err(failed("KVM_SET_MSRS"))?;
            if written == 1 {
                kept.push(entry.index);
            } else {
                tracing::debug!(msr = entry.index, "cannot be written back, left out of the state");
            }
        }
        Ok(Self(kept))
    }

    /// Those of `indices` that can be read, with their values. KVM stops at the first that cannot, so that one is dropped
    /// and the rest tried again.
    fn readable(vcpu: &VcpuFd, mut indices: Vec<u32>) -> Result<Vec<kvm_msr_entry>, MsrError> {
        let mut found = Vec::with_capacity(indices.len());
        while !indices.is_empty() {
            let mut msrs = fam(&entries(&indices))?;
            let source = |source| MsrError::Call { what: "KVM_GET_MSRS", source };
            let read = vcpu.get_msrs(&mut msrs).map_err(source)?.min(indices.len());
            found.extend_from_slice(&msrs.as_slice()[..read]);
            if let Some(index) = indices.get(read) {
                tracing::debug!(msr = index, "cannot be read, left out of the state");
            }
            indices.drain(..(read + 1).min(indices.len()));
        }
        Ok(found)
    }

    /// The MSRs.
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
        let mut indices = [MSR_TSC_DEADLINE, 0x4b56_4d01, 0xc000_0081, 0x174, MSR_TSC];
        indices.sort_unstable_by_key(|&index| (rank(index), index));
        assert_eq!(indices, [MSR_TSC, 0x174, 0xc000_0081, 0x4b56_4d01, MSR_TSC_DEADLINE]);
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
