use kvm_bindings::kvm_msr_entry;

use super::*;
use crate::kvm::testutil::{TWO_OUTS, TestVm, host, save_all};
use crate::kvm::vm_state::{Chips, PlatformState};

/// MSRs that change while the vCPU is stopped.
const MOVING: [u32; 1] = [crate::kvm::msrs::MSR_TSC];

/// The fields that a round trip must preserve, each as JSON bytes.
fn fixed(state: &VcpuState) -> Vec<Vec<u8>> {
    let mut state = state.clone();
    for entry in state.msrs.as_mut_slice().iter_mut().filter(|e| MOVING.contains(&e.index)) {
        entry.data = 0;
    }
    (state.taken, state.taken_in_boot) = (WallClock::default(), None);
    let json = |value: serde_json::Value| serde_json::to_vec(&value).unwrap();
    let serde_json::Value::Object(fields) = serde_json::to_value(&state).unwrap() else { unreachable!() };
    fields.into_iter().map(|(name, value)| json(serde_json::json!([name, value]))).collect()
}

fn tsc(state: &VcpuState) -> u64 {
    state.msrs.as_slice().iter().find(|e| MOVING.contains(&e.index)).unwrap().data
}

#[test]
fn a_running_vm_goes_on_in_another() {
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let mut parent = TestVm::new(&host, 2, &TWO_OUTS);
    assert_eq!(parent.run_to_out(&host), b'A');
    let saved = save_all(&parent, &host, &layout);
    let vm_saved = PlatformState::save(&parent.vm, Chips::None).unwrap();
    assert_eq!(saved[0].regs.rbx, 0x1234_5678);
    assert_eq!(saved[1].mp_state.mp_state, kvm_bindings::KVM_MP_STATE_UNINITIALIZED);

    // Serialized, as for another process.
    let sent: Vec<VcpuState> = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
    let mut child = parent.sibling(&host);
    for (vcpu, state) in child.vcpus.iter().zip(&sent) {
        let new = NewVcpu::read(vcpu).unwrap();
        state.restore(vcpu, &layout, CpuidState::Set, Clock::Resume, Some(&new)).unwrap();
    }
    vm_saved.restore_chips(&child.vm).unwrap();
    vm_saved.restore_clock(&child.vm, Clock::Resume).unwrap();

    let again = save_all(&child, &host, &layout);
    for (before, after) in saved.iter().zip(&again) {
        for (a, b) in fixed(before).iter().zip(&fixed(after)) {
            assert_eq!(String::from_utf8_lossy(a), String::from_utf8_lossy(b));
        }
        assert!(tsc(after) >= tsc(before) && tsc(after) - tsc(before) < 20_000_000_000, "the TSC counts on");
    }
    assert_eq!(child.run_to_out(&host), 0x78, "the child goes on after the parent's first OUT");
    assert_eq!(parent.run_to_out(&host), 0x78, "and so does the parent");
}

#[test]
fn every_part_reaches_the_other_vcpu() {
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let parent = TestVm::new(&host, 1, &TWO_OUTS);
    let mut state = save_all(&parent, &host, &layout).remove(0);
    state.regs.r15 = 0xdead_beef;
    state.debug_regs.db[0] = 0x1234;
    state.mark_xsave();
    state.lapic.regs[0x3e0] = 0xb;
    for (index, data) in [(0xc000_0082, 0xffff_ffff_8100_0000), (0x174, 0x10), (0x277, 0x0007_0106_0007_0106)] {
        set_msr(&mut state, index, data);
    }
    state.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_HALTED;
    state.xcrs.xcrs[0].value = 3;
    let same = |vcpu: &TestVm| {
        let again = save_all(vcpu, &host, &layout).remove(0);
        for (a, b) in fixed(&state).iter().zip(&fixed(&again)) {
            assert_eq!(String::from_utf8_lossy(a), String::from_utf8_lossy(b));
        }
    };
    let child = parent.sibling(&host);
    let new = NewVcpu::read(&child.vcpus[0]).unwrap();
    state.restore(&child.vcpus[0], &layout, CpuidState::Set, Clock::Resume, None).unwrap();
    same(&child);
    // The same with the known state of a new vCPU: every difference is set.
    let child = parent.sibling(&host);
    state.restore(&child.vcpus[0], &layout, CpuidState::Set, Clock::Resume, Some(&new)).unwrap();
    same(&child);
}

#[test]
fn an_area_of_another_size_fits_if_nothing_is_lost() {
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let vm = TestVm::new(&host, 1, &TWO_OUTS);
    let mut state = save_all(&vm, &host, &layout).remove(0);
    state.mark_xsave();
    let mut area = Xsave::new(layout.xsave_extra + 7).unwrap();
    area.as_mut_slice()[..layout.xsave_extra].copy_from_slice(state.xsave.as_slice());
    // SAFETY: the length, which describes the allocation, is not changed.
    unsafe { area.as_mut_fam_struct() }.xsave.region = state.xsave.as_fam_struct_ref().xsave.region;
    let larger = VcpuState { xsave: area, ..state.clone() };
    let other = vm.sibling(&host);
    larger.restore(&other.vcpus[0], &layout, CpuidState::Set, Clock::Resume, None).unwrap();
    let again = save_all(&other, &host, &layout).remove(0);
    assert_eq!(again.xsave.as_slice().len(), layout.xsave_extra);
    let region = |state: &VcpuState| state.xsave.as_fam_struct_ref().xsave.region;
    assert_eq!((region(&again)[0], region(&again)[40]), (0x027f, 0xabcd_ef01));
}

fn set_msr(state: &mut VcpuState, index: u32, data: u64) {
    state.msrs.as_mut_slice().iter_mut().find(|e| e.index == index).unwrap().data = data;
}

impl VcpuState {
    /// Sets FCW and XMM0's first word, and marks both present in XSTATE_BV.
    fn mark_xsave(&mut self) {
        self.xsave_word_mut(0, 0x027f);
        self.xsave_word_mut(40, 0xabcd_ef01);
        self.xsave_word_mut(128, 3);
    }

    fn xsave_word_mut(&mut self, word: usize, value: u32) {
        // SAFETY: the length, which describes the allocation, is not changed.
        let area = unsafe { self.xsave.as_mut_fam_struct() };
        area.xsave.region[word] = value;
    }
}

/// With [`Clock::CatchUp`], and only then, the restored TSC is ahead by the time elapsed.
#[test]
fn the_tsc_catches_up_with_the_wall_clock() {
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let vm = TestVm::new(&host, 1, &TWO_OUTS);
    let mut state = save_all(&vm, &host, &layout).remove(0);
    let Some(khz) = state.tsc_khz else {
        clade_test_support::skipped("KVM does not say how fast a TSC counts here");
        return;
    };
    let hour = u64::from(khz) * 1000 * 3600;
    let mut set = state.clone();
    set_msr(&mut set, MSR_TSC, tsc(&state) + hour);
    let other = vm.sibling(&host);
    set.restore(&other.vcpus[0], &layout, CpuidState::Set, Clock::Resume, None).unwrap();
    if tsc(&save_all(&other, &host, &layout)[0]) < tsc(&set) {
        clade_test_support::skipped("guests read the host's TSC here, which goes on by itself");
        return;
    }
    state.taken_in_boot = state.taken_in_boot.map(|taken| taken.earlier(std::time::Duration::from_secs(3600)));
    for (clock, ahead) in [(Clock::Resume, 0), (Clock::CatchUp, hour)] {
        let other = vm.sibling(&host);
        state.restore(&other.vcpus[0], &layout, CpuidState::Set, clock, None).unwrap();
        let again = save_all(&other, &host, &layout).remove(0);
        let counted = tsc(&again) - tsc(&state) - ahead;
        assert!(counted < u64::from(khz) * 1000 * 20, "{clock:?}: {counted} beside what it is ahead");
    }
}

#[test]
fn a_reused_buffer_holds_the_new_state() {
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let mut vm = TestVm::new(&host, 1, &TWO_OUTS);
    let mut state = save_all(&vm, &host, &layout).remove(0);
    assert_eq!(state.regs.rbx, 0);
    vm.run_to_out(&host);
    state.save_into(&vm.vcpus[0], &layout).unwrap();
    assert_eq!(state.regs.rbx, 0x1234_5678);
}

#[test]
fn states_from_elsewhere_are_refused_by_value() {
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let vm = TestVm::new(&host, 1, &TWO_OUTS);
    let good = save_all(&vm, &host, &layout).remove(0);
    let refusal = |state: VcpuState| {
        state.restore(&vm.vcpus[0], &layout, CpuidState::Set, Clock::Resume, None).unwrap_err().to_string()
    };

    let mut area = Xsave::new(layout.xsave_extra + 1).unwrap();
    area.as_mut_slice()[layout.xsave_extra] = 1;
    let larger = VcpuState { xsave: area, ..good.clone() };
    let bytes = layout.xsave_bytes();
    assert_eq!(refusal(larger), format!("the saved XSAVE area is {} bytes, this host's KVM takes {bytes}", bytes + 4));
    let unknown = kvm_msr_entry { index: 0x4000_ffff, data: 5, ..Default::default() };
    let odd = VcpuState { msrs: Msrs::from_entries(&[unknown]).unwrap(), ..good.clone() };
    assert_eq!(refusal(odd), "KVM refuses MSR 0x4000ffff the value 0x5");
    if !layout.tsc_control
        && let Some(here) = good.tsc_khz
    {
        let slow = VcpuState { tsc_khz: Some(here / 2), ..good };
        assert!(refusal(slow).starts_with("the state is from a host with a TSC of"));
    }
}

#[test]
fn a_guest_without_a_clock_page_cannot_be_told_of_a_pause() {
    let Some(host) = host() else { return };
    let vm = TestVm::new(&host, 1, &TWO_OUTS);
    assert!(!mark_paused(&vm.vcpus[0]).unwrap());
    let layout = StateLayout::new(&host).unwrap();
    let mut state = save_all(&vm, &host, &layout).remove(0);
    assert!(!state.has_kvmclock());
    // The lowest bit of the address marks the page as present.
    for (value, has) in [(0x2000, false), (0x2001, true)] {
        set_msr(&mut state, KVM_SYSTEM_TIME, value);
        assert_eq!(state.has_kvmclock(), has);
        state.restore(&vm.vcpus[0], &layout, CpuidState::Set, Clock::Resume, None).unwrap();
        assert_eq!(mark_paused(&vm.vcpus[0]).unwrap(), has);
    }
}
