//! Messages to the local APICs of a VM.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_msi};
use kvm_ioctls::VmFd;

use super::vcpu_state::VcpuState;

/// The address of messages to local APICs: the destination is in bits 12 to 19.
const ADDRESS: u32 = 0xfee0_0000;
/// The delivery mode of `KVM_HC_KICK_CPU` (KVM's `APIC_DM_REMRD`), in a message's data.
const KICK: u32 = 3 << 8;
/// The CPUID leaf of KVM's features, and `KVM_FEATURE_PV_UNHALT` in its EAX.
const KVM_FEATURES: u32 = 0x4000_0001;
const PV_UNHALT: u32 = 1 << 7;
const RFLAGS_IF: u64 = 1 << 9;

/// Sends the interrupt `vector` to the local APIC of `vcpu`. A local APIC that its guest has not
/// enabled drops the message.
pub(crate) fn interrupt(vm: &VmFd, vcpu: u8, vector: u8) -> Result<(), kvm_ioctls::Error> {
    send(vm, vcpu, vector.into())
}

fn send(vm: &VmFd, vcpu: u8, data: u32) -> Result<(), kvm_ioctls::Error> {
    let message = kvm_msi { address_lo: ADDRESS | u32::from(vcpu) << 12, data, ..kvm_msi::default() };
    vm.signal_msi(message).map(drop)
}

/// Repeats the kicks (`KVM_HC_KICK_CPU`) that vCPUs in these states may have received shortly before they halt.
///
/// A vCPU that waits for a paravirtual spinlock checks the lock with interrupts disabled, and then
/// halts. A kick between the two is latched in KVM, in no saved state, and ends the halt at once.
/// Without it the restored vCPU halts for ever, if nothing but the kick is to wake it. One kick too
/// many ends one halt early, after which such a guest checks the lock again.
pub(crate) fn kick_again(vm: &VmFd, states: &[VcpuState]) -> Result<(), kvm_ioctls::Error> {
    for (vcpu, _) in (0..).zip(states).filter(|(_, state)| is_before_a_kicked_halt(state)) {
        match send(vm, vcpu, KICK) {
            // Its guest has disabled the local APIC, by which KVM would deliver a kick too.
            Err(error) if error.errno() == libc::EPERM => {}
            sent => sent?,
        }
    }
    Ok(())
}

/// Whether the vCPU may have a latched kick. KVM reports a kicked vCPU that has halted already as runnable, with the
/// instruction after the halt as its next one.
fn is_before_a_kicked_halt(state: &VcpuState) -> bool {
    let masked = state.regs.rflags & RFLAGS_IF == 0 || state.events.interrupt.shadow != 0;
    let mut leaves = state.cpuid.as_slice().iter();
    masked
        && state.mp_state.mp_state == KVM_MP_STATE_RUNNABLE
        && leaves.any(|leaf| leaf.function == KVM_FEATURES && leaf.eax & PV_UNHALT != 0)
}

/// Has the guest of `state` see that KVM wakes vCPUs by kicks.
#[cfg(test)]
pub(crate) fn announce_kicks(state: &mut VcpuState) {
    let leaf = state.cpuid.as_mut_slice().iter_mut().find(|leaf| leaf.function == KVM_FEATURES);
    leaf.expect("a guest sees that it runs on KVM").eax |= PV_UNHALT;
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_mp_state};

    use super::*;
    use crate::kvm::testutil::{TWO_OUTS, TestVm, host, save_all};
    use crate::kvm::vcpu_state::{CpuidState, StateLayout};
    use crate::kvm::vm_state::Clock;

    #[test]
    fn a_vcpu_that_was_about_to_halt_for_a_lock_is_kicked_again() {
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap();
        let mut parent = TestVm::new(&host, 1, &TWO_OUTS);
        parent.run_to_out(&host);
        let mut saved = save_all(&parent, &host, &layout);
        announce_kicks(&mut saved[0]);
        assert_eq!(saved[0].regs.rflags & RFLAGS_IF, 0, "no interrupt ends its halt");

        // What becomes of its next halt in a new VM.
        let halted = |change: &dyn Fn(&mut VcpuState)| {
            let mut states = saved.clone();
            change(&mut states[0]);
            let child = parent.sibling(&host);
            states[0].restore(&child.vcpus[0], &layout, CpuidState::Unset, Clock::Resume, None).unwrap();
            kick_again(&child.vm, &states).unwrap();
            child.vcpus[0].set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
            child.vcpus[0].get_mp_state().unwrap().mp_state
        };
        assert_eq!(halted(&|_| ()), KVM_MP_STATE_RUNNABLE, "it ends");
        assert_eq!(halted(&|state| state.regs.rflags |= RFLAGS_IF), KVM_MP_STATE_HALTED, "an interrupt ends it");
        let after_sti = |state: &mut VcpuState| {
            state.regs.rflags |= RFLAGS_IF;
            state.events.interrupt.shadow = 1;
        };
        assert_eq!(halted(&after_sti), KVM_MP_STATE_RUNNABLE, "STI masks interrupts up to the halt");
        let without = |state: &mut VcpuState| {
            for leaf in state.cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == KVM_FEATURES) {
                leaf.eax &= !PV_UNHALT;
            }
        };
        assert_eq!(halted(&without), KVM_MP_STATE_HALTED, "its guest knows no kicks");
    }
}
