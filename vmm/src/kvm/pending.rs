//! Drops a vCPU's pending events before another state is restored in place.
//!
//! A restore replaces most pending events. These survive it:
//!
//! | event | why it survives | effect |
//! |---|---|---|
//! | start-up IPI | `KVM_SET_MP_STATE` can only set it | an AP that waits for one starts |
//! | SMI (before Linux 6.4 also NMI) that KVM has not looked at | a request, not yet an event | it is delivered |
//! | SMI, SMM | restored after `KVM_SET_MP_STATE` | KVM refuses an AP's wait for INIT or SIPI |
//! | triple fault | restored where a state has one | the VM shuts down |
//! | async page faults | in no state | reports a page that the guest never waited for |
//! | unacknowledged page-ready event | in no state | KVM wakes no halted vCPU for the next one |
//! | timer in TSC-deadline mode | `KVM_SET_LAPIC` of another mode clears the new count | the timer never fires |
//!
//! A fresh vCPU has no such events. A reset in place calls [`forget_pending`] on each vCPU, after
//! all are parked and before any state is restored.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs, kvm_lapic_state, kvm_msr_entry, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;

use super::msrs::KVM_ASYNC_PF_EN;
use super::vcpu_state::{StateLayout, VcpuStateError};

/// `MSR_KVM_ASYNC_PF_ACK`
const KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;

/// The timer's entry in a LAPIC's registers, and the bits of its mode.
const LVT_TIMER: usize = 0x320;
const TIMER_MODE: u32 = 3 << 17;
const TSC_DEADLINE_MODE: u32 = 2 << 17;

/// Drops all pending events of `vcpu`. The vCPU is unusable until a state is restored, with the registers `lapic`.
pub(crate) fn forget_pending(
    vcpu: &VcpuFd,
    layout: &StateLayout,
    lapic: Option<&kvm_lapic_state>,
) -> Result<(), VcpuStateError> {
    let failed = |call| move |source| VcpuStateError::Ioctl { call, source };
    // NMIs and SMIs that KVM has not looked at become pending here, where the next call drops them. Otherwise they
    // would once the vCPU runs on.
    vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    // Before the others: this call clears a latched INIT, so that the next step does not reset the vCPU, and it
    // leaves System Management Mode.
    let none = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM
            | if layout.triple_faults { KVM_VCPUEVENT_VALID_TRIPLE_FAULT } else { 0 },
        ..Default::default()
    };
    vcpu.set_vcpu_events(&none).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
    // KVM_GET_MP_STATE accepts or drops a pending start-up IPI. There is no other way to clear one.
    vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    // Disabling cancels the page faults in flight and drops the completed ones. Then the
    // acknowledgement, because an event delivered earlier waits for one.
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let both = [entry(KVM_ASYNC_PF_EN, 0), entry(KVM_ASYNC_PF_ACK, 1)];
    // KVM ends at the first refusal, and a guest without the feature lacks its MSR.
    let mut done = 0;
    while let Some(rest) = both.get(done..).filter(|rest| !rest.is_empty()) {
        let msrs =
            Msrs::from_entries(rest).map_err(|_| VcpuStateError::Buffer { what: "MSRs", bytes: size_of_val(rest) })?;
        done += vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?.max(1);
    }
    // The change of the mode happens here, and the restore then starts the timer.
    let changed = lapic.filter(|lapic| timer_mode(lapic) != TSC_DEADLINE_MODE);
    changed.map_or(Ok(()), |lapic| vcpu.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC")))
}

fn timer_mode(lapic: &kvm_lapic_state) -> u32 {
    let bytes: [u8; 4] = std::array::from_fn(|byte| lapic.regs[LVT_TIMER + byte] as u8);
    u32::from_le_bytes(bytes) & TIMER_MODE
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, kvm_mp_state};
    use kvm_ioctls::VcpuExit;

    use super::super::host::Host;
    use super::super::testutil::{TWO_OUTS, TestVm, host, save_all};
    use super::super::vcpu_state::{CpuidState, VcpuState};
    use super::super::vm_state::Clock;
    use super::*;

    /// A VM, and the state of its second vCPU, which waits for a start-up IPI.
    fn waiting(host: &Host) -> (TestVm, StateLayout, VcpuState) {
        let layout = StateLayout::new(host).unwrap();
        let vm = TestVm::new(host, 2, &TWO_OUTS);
        vm.vcpus[1].set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_INIT_RECEIVED }).unwrap();
        let state = save_all(&vm, host, &layout).remove(1);
        assert_eq!(state.mp_state.mp_state, KVM_MP_STATE_INIT_RECEIVED);
        (vm, layout, state)
    }

    fn reset(vcpu: &VcpuFd, layout: &StateLayout, state: &VcpuState) {
        forget_pending(vcpu, layout, Some(&state.lapic)).unwrap();
        state.restore(vcpu, layout, CpuidState::Set, Clock::CatchUp, None).unwrap();
    }

    #[test]
    fn a_start_up_ipi_from_before_a_reset_starts_nobody() {
        let Some(host) = host() else { return };
        let (vm, layout, state) = waiting(&host);
        let vcpu = &vm.vcpus[1];
        let sipi = || vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_SIPI_RECEIVED }).unwrap();
        sipi();
        assert_eq!(vcpu.get_mp_state().unwrap().mp_state, KVM_MP_STATE_RUNNABLE, "it is one");
        sipi();
        reset(vcpu, &layout, &state);
        assert_eq!(vcpu.get_mp_state().unwrap().mp_state, KVM_MP_STATE_INIT_RECEIVED);
        assert_eq!(vcpu.get_sregs().unwrap().cs.selector, state.sregs.cs.selector);
    }

    #[test]
    fn an_init_from_before_a_reset_resets_nobody() {
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap();
        let mut vm = TestVm::new(&host, 1, &TWO_OUTS);
        vm.run_to_out(&host);
        let state = save_all(&vm, &host, &layout).remove(0);
        let vcpu = &vm.vcpus[0];
        let mut events = state.events;
        events.smi.latched_init = 1;
        vcpu.set_vcpu_events(&events).unwrap();
        reset(vcpu, &layout, &state);
        assert_eq!(vcpu.get_vcpu_events().unwrap().smi.latched_init, 0);
        vcpu.get_mp_state().unwrap();
        assert_eq!(vcpu.get_regs().unwrap().rip, state.regs.rip);
    }

    #[test]
    fn an_smi_from_before_a_reset_hinders_nobody() {
        let Some(host) = host() else { return };
        let (vm, layout, state) = waiting(&host);
        let vcpu = &vm.vcpus[1];
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
        let mut events = state.events;
        events.smi.pending = 1;
        if vcpu.set_vcpu_events(&events).is_err() || vcpu.get_vcpu_events().unwrap().smi.pending == 0 {
            clade_test_support::skipped("this KVM has no System Management Mode");
            return;
        }
        reset(vcpu, &layout, &state);
        assert_eq!(vcpu.get_vcpu_events().unwrap().smi.pending, 0);
        assert_eq!(vcpu.get_mp_state().unwrap().mp_state, KVM_MP_STATE_INIT_RECEIVED);
    }

    #[test]
    fn an_smi_or_nmi_that_kvm_has_not_looked_at_is_dropped_too() {
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap();
        let vm = TestVm::new(&host, 1, &TWO_OUTS);
        let vcpu = &vm.vcpus[0];
        let state = save_all(&vm, &host, &layout).remove(0);
        let pending = || {
            let events = vcpu.get_vcpu_events().unwrap();
            (events.smi.pending, events.nmi.pending)
        };
        if vcpu.smi().is_err() || vcpu.nmi().is_err() || pending() != (1, 1) {
            return clade_test_support::skipped("this KVM takes no SMIs or NMIs from user space");
        }
        reset(vcpu, &layout, &state);
        vcpu.smi().unwrap();
        vcpu.nmi().unwrap();
        reset(vcpu, &layout, &state);
        assert_eq!(pending(), (0, 0));
    }

    #[test]
    fn a_triple_fault_from_before_a_reset_ends_nobody_and_a_saved_one_stays() {
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap();
        let mut vm = TestVm::new(&host, 1, &TWO_OUTS);
        let first = vm.run_to_out(&host);
        let state = save_all(&vm, &host, &layout).remove(0);
        assert_eq!(state.events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT, 0, "a kernel before 6.0 takes the state");
        let pending = |vm: &TestVm| vm.vcpus[0].get_vcpu_events().unwrap().triple_fault.pending;
        let mut events = state.events;
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = 1;
        if vm.vcpus[0].set_vcpu_events(&events).is_err() {
            clade_test_support::skipped("this KVM does not show triple faults");
            return;
        }
        let dying = save_all(&vm, &host, &layout).remove(0);
        reset(&vm.vcpus[0], &layout, &state);
        assert_eq!(pending(&vm), 0);
        assert_ne!(vm.run_to_out(&host), first, "the guest goes on");
        reset(&vm.vcpus[0], &layout, &dying);
        assert_eq!(pending(&vm), 1);
        assert!(matches!(vm.vcpus[0].run().unwrap(), VcpuExit::Shutdown));
    }

    #[test]
    fn asynchronous_page_faults_are_off_until_the_state_says_otherwise() {
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap();
        let vm = TestVm::new(&host, 1, &TWO_OUTS);
        let vcpu = &vm.vcpus[0];
        // A 64-byte area, delivered by interrupt.
        const ENABLED: u64 = 0x20_0000 | 1 << 3 | 1;
        let enabled = || {
            let mut one =
                Msrs::from_entries(&[kvm_msr_entry { index: KVM_ASYNC_PF_EN, ..Default::default() }]).unwrap();
            vcpu.get_msrs(&mut one).unwrap();
            one.as_slice()[0].data
        };
        let entry = kvm_msr_entry { index: KVM_ASYNC_PF_EN, data: ENABLED, ..Default::default() };
        if vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap() != 1 {
            clade_test_support::skipped("this KVM has no asynchronous page faults");
            return;
        }
        let state = save_all(&vm, &host, &layout).remove(0);
        forget_pending(vcpu, &layout, Some(&state.lapic)).unwrap();
        assert_eq!(enabled(), 0);
        state.restore(vcpu, &layout, CpuidState::Set, Clock::CatchUp, None).unwrap();
        assert_eq!(enabled(), ENABLED);
    }

    /// The guest's next kernel uses the TSC deadline, and the image's does not.
    #[test]
    fn the_timer_of_the_image_runs_after_a_reset_from_another_mode() {
        const COUNT: u32 = 0x7fff_ffff;
        const PERIODIC: u32 = 1 << 17 | 0x40;
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap();
        let vm = TestVm::new(&host, 1, &TWO_OUTS);
        let vcpu = &vm.vcpus[0];
        let with = |lapic: &kvm_lapic_state, registers: &[(usize, u32)]| {
            let mut lapic = *lapic;
            for (at, value) in registers {
                lapic.regs[*at..at + 4].copy_from_slice(&value.to_le_bytes().map(|byte| byte as i8));
            }
            lapic
        };
        let read = |at: usize| {
            let regs = vcpu.get_lapic().unwrap().regs;
            u32::from_le_bytes(std::array::from_fn(|byte| regs[at + byte] as u8))
        };
        let mut state = save_all(&vm, &host, &layout).remove(0);
        // Enabled, and divided by one.
        state.lapic = with(&state.lapic, &[(0xf0, 0x1ff), (LVT_TIMER, PERIODIC), (0x3e0, 0xb), (0x380, COUNT)]);
        vcpu.set_lapic(&with(&state.lapic, &[(LVT_TIMER, TSC_DEADLINE_MODE | 0x40), (0x380, 0)])).unwrap();
        if read(LVT_TIMER) & TIMER_MODE != TSC_DEADLINE_MODE {
            return clade_test_support::skipped("this KVM has no timer in TSC-deadline mode");
        }
        reset(vcpu, &layout, &state);
        assert_eq!((read(LVT_TIMER), read(0x380)), (PERIODIC, COUNT));
        assert_ne!(read(0x390), 0, "it counts");
    }

    /// Otherwise the next guest of a template has CPUID faulting, and its kernel does not know that.
    #[test]
    fn cpuid_faulting_does_not_survive_a_reset_under_a_template() {
        const MISC_FEATURES_ENABLES: u32 = 0x140;
        let Some(host) = host() else { return };
        let layout = StateLayout::new(&host).unwrap().of(super::super::CpuTemplate::V2).unwrap();
        let vm = TestVm::new(&host, 1, &TWO_OUTS);
        let state = save_all(&vm, &host, &layout).remove(0);
        let entry = kvm_msr_entry { index: MISC_FEATURES_ENABLES, data: 1, ..Default::default() };
        let mut one = Msrs::from_entries(&[entry]).unwrap();
        if vm.vcpus[0].set_msrs(&one).unwrap() != 1 {
            return clade_test_support::skipped("this KVM has no CPUID faulting");
        }
        reset(&vm.vcpus[0], &layout, &state);
        vm.vcpus[0].get_msrs(&mut one).unwrap();
        assert_eq!(one.as_slice()[0].data, 0);
    }
}
