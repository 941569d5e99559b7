//! The cost of each step of saving and restoring a vCPU. A measurement, not a test.

use std::time::{Duration, Instant};

use super::testutil::{TWO_OUTS, TestVm, host, save_all};
use super::vcpu_state::{CpuidState, StateLayout};
use super::vm_state::Clock;

/// Prints the p50 and p99 of each step in microseconds. Run it with
/// `cargo test --release -- --ignored --nocapture cost_of_each_step`.
#[test]
#[ignore = "a measurement"]
fn cost_of_each_step() {
    const ROUNDS: u32 = 2000;
    let Some(host) = host() else { return };
    let layout = StateLayout::new(&host).unwrap();
    let mut vm = TestVm::new(&host, 1, &TWO_OUTS);
    vm.run_to_out(&host);
    let mut state = save_all(&vm, &host, &layout).remove(0);
    let vcpu = &vm.vcpus[0];
    let time = |name: &str, step: &mut dyn FnMut()| {
        let mut samples: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                step();
                start.elapsed()
            })
            .collect();
        samples.sort_unstable();
        let us = |p: usize| samples[samples.len() * p / 100].as_secs_f64() * 1e6;
        println!("{name:>16}  p50 {:7.1} us  p99 {:7.1} us", us(50), us(99));
    };
    println!("{} MSRs", state.msrs.as_slice().len());
    time("get mp_state", &mut || _ = vcpu.get_mp_state().unwrap());
    time("get regs", &mut || _ = vcpu.get_regs().unwrap());
    time("get sregs", &mut || _ = vcpu.get_sregs().unwrap());
    time("get xsave", &mut || state.save_xsave(vcpu, &layout).unwrap());
    time("get xcrs", &mut || _ = vcpu.get_xcrs().unwrap());
    time("get debugregs", &mut || _ = vcpu.get_debug_regs().unwrap());
    time("get msrs", &mut || state.save_msrs(vcpu, &layout).unwrap());
    time("get lapic", &mut || _ = vcpu.get_lapic().unwrap());
    time("get events", &mut || _ = vcpu.get_vcpu_events().unwrap());
    time("save", &mut || state.save_into(vcpu, &layout).unwrap());
    time("get tsc_khz", &mut || _ = vcpu.get_tsc_khz());
    // On a new vCPU: KVM refuses KVM_SET_CPUID2 once a vCPU has run.
    let fresh = vm.sibling(&host);
    time("set cpuid", &mut || fresh.vcpus[0].set_cpuid2(&state.cpuid).unwrap());
    time("set mp_state", &mut || vcpu.set_mp_state(state.mp_state).unwrap());
    time("set regs", &mut || vcpu.set_regs(&state.regs).unwrap());
    time("set sregs", &mut || vcpu.set_sregs(&state.sregs).unwrap());
    // SAFETY: `save_xsave` created the area with this host's size.
    time("set xsave", &mut || unsafe { vcpu.set_xsave2(&state.xsave) }.unwrap());
    time("set xcrs", &mut || vcpu.set_xcrs(&state.xcrs).unwrap());
    time("set debugregs", &mut || vcpu.set_debug_regs(&state.debug_regs).unwrap());
    time("set lapic", &mut || vcpu.set_lapic(&state.lapic).unwrap());
    time("set msrs", &mut || _ = vcpu.set_msrs(&state.msrs).unwrap());
    time("set events", &mut || vcpu.set_vcpu_events(&state.events).unwrap());
    time("restore", &mut || state.restore(vcpu, &layout, CpuidState::Set, Clock::CatchUp, None).unwrap());
}
