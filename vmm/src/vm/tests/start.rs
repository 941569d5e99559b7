//! States that KVM refuses: a child or a reset loads all of its state or none, and the caller gets
//! the error.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clade_guests::abi::{Command, MAGIC, mailbox_gpa, offset};
use clade_memory::Store;
use clade_test_support::{wait_eq, wait_until};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_msr_entry, kvm_sregs,
};
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::messages;
use crate::kvm::testutil::host;
use crate::vm::tests::storm::{Pair, boot, boot_idle, goes_on};
use crate::vm::{ChildOptions, Context, ForkImage, Vm, VmError};
use clade_harness::BareMailbox;

const PAIRS: [Pair; 1] = [Pair::Relay];
/// Longer than a vCPU takes to start.
const SETTLE: Duration = Duration::from_millis(30);

/// `image` with an MSR that no KVM has, on vCPU `vcpu`.
fn spoiled(image: &ForkImage, vcpu: usize) -> Arc<ForkImage> {
    let mut image = image.clone();
    let mut msrs = image.vcpus[vcpu].msrs.as_slice().to_vec();
    msrs.push(kvm_msr_entry { index: 0x4000_ffff, data: 5, ..Default::default() });
    image.vcpus[vcpu].msrs = Msrs::from_entries(&msrs).unwrap();
    Arc::new(image)
}

#[test]
fn i13_a_child_whose_state_is_refused_is_an_error_and_leaves_nothing() {
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let parent = boot(&context, &PAIRS);
    let (image, _) = parent.fork().unwrap();
    for vcpu in [0, 1] {
        let bad = spoiled(&image, vcpu);
        let options = ChildOptions { paused: vcpu == 1, erase: &[], before_start: None };
        let error = Vm::from_image(&context, "child", &bad, options).unwrap_err();
        assert!(matches!(error, VmError::VcpuState(_)), "{error:?}");
        assert!(crate::error_chain(&error).contains("0x4000ffff"), "{}", crate::error_chain(&error));
        // A remaining vCPU thread would hold a handle.
        assert_eq!(Arc::strong_count(&bad), 1);
    }
    goes_on(&parent, &PAIRS).unwrap();
    let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
    goes_on(&child, &PAIRS).unwrap();
}

#[test]
fn a_reset_to_a_state_that_is_refused_is_an_error_and_another_reset_mends_it() {
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let vm = boot(&context, &PAIRS);
    let (image, _) = vm.fork().unwrap();
    let error = vm.reset(&spoiled(&image, 1)).unwrap_err();
    assert!(matches!(error, VmError::VcpuState(_)), "{error:?}");
    assert!(vm.is_paused());
    assert!(matches!(vm.resume().unwrap_err(), VmError::Inconsistent));
    vm.reset(&image).unwrap();
    vm.resume().unwrap();
    goes_on(&vm, &PAIRS).unwrap();
}

/// A vCPU's thread that held it would keep all layers that only the image shows, for the VM's whole life.
#[test]
fn no_vcpu_thread_holds_an_image_that_it_has_loaded() {
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let parent = boot(&context, &PAIRS);
    let (image, _) = parent.fork().unwrap();
    let only_here = |what| wait_eq(what, &1, || Arc::strong_count(&image));
    let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
    child.forget_origin();
    only_here("a thread that has started holds the image");
    child.pause().unwrap();
    child.reset(&image).unwrap();
    only_here("a thread that is parked after a reset holds the image");
    child.resume().unwrap();
    goes_on(&child, &PAIRS).unwrap();
}

/// The caller may outlive the panic, as the daemon's requests do.
#[test]
fn a_reset_that_panics_half_way_keeps_the_vm_paused_and_another_reset_mends_it() {
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let vm = boot(&context, &PAIRS);
    let (image, _) = vm.fork().unwrap();
    crate::vm::reset::PANIC_IN_LOAD.set(true);
    let reset = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vm.reset(&image).map(drop)));
    assert!(reset.is_err(), "asked to panic");
    assert!(vm.is_paused());
    assert!(matches!(vm.resume().unwrap_err(), VmError::Inconsistent));
    assert!(matches!(vm.fork().unwrap_err(), VmError::Inconsistent));
    vm.reset(&image).unwrap();
    vm.resume().unwrap();
    goes_on(&vm, &PAIRS).unwrap();
}

/// vCPU 2 restarts vCPU 1 by INIT and SIPI, and is kicked long after it: the reset finds a SIPI
/// latched. In the image vCPU 1 waits for a SIPI that no vCPU sends.
#[test]
fn a_start_up_ipi_latched_before_a_reset_starts_nobody_after_it() {
    const WAITS: u64 = 1;
    const SENDS: u64 = 2;
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let parent = boot_idle(&context, 3);
    let magic = GuestAddress(mailbox_gpa(WAITS) + offset::MAGIC);
    let started = |vm: &Vm| vm.ram().memory().read_obj::<u64>(magic).unwrap() == MAGIC;
    parent.pause().unwrap();
    parent.ram().memory().write_obj(0u64, magic).unwrap();
    let mut image = (*parent.fork().unwrap().0).clone();
    // As INIT leaves a vCPU: in real mode. Otherwise a start-up IPI would have no visible effect.
    let (_vm, fresh) = context.host().lone_vcpu().unwrap();
    let waits = &mut image.vcpus[WAITS as usize];
    waits.mp_state.mp_state = KVM_MP_STATE_INIT_RECEIVED;
    waits.sregs = kvm_sregs { apic_base: waits.sregs.apic_base, ..fresh.get_sregs().unwrap() };
    waits.regs = fresh.get_regs().unwrap();
    let image = Arc::new(image);
    let vm = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
    for round in 0..10 {
        thread::sleep(SETTLE);
        assert!(!started(&vm), "round {round}: a start-up IPI of the time before");
        let sender = BareMailbox::new(vm.ram(), SENDS);
        sender.order(Command::Restart { peer: WAITS }).unwrap();
        vm.ring_doorbell(SENDS).unwrap();
        wait_until("the sender gets on", || sender.progress().unwrap() >= 3);
        vm.prepared.control.schedule.delay_kicks(Duration::from_millis(4), round);
        vm.reset(&image).unwrap();
    }
}

/// In the image the vCPU is about to halt with interrupts disabled, as it would for a paravirtual spinlock. Its kick, if
/// it has come already, is in no saved state, and nothing else ends the halt.
#[test]
fn a_vcpu_about_to_halt_for_a_spinlock_gets_on_in_a_child_and_after_a_reset() {
    const HLT: [u8; 1] = [0xf4];
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let parent = boot_idle(&context, 1);
    let mut image = (*parent.fork().unwrap().0).clone();
    wait_until("the vCPU halts", || {
        image = (*parent.fork().unwrap().0).clone();
        image.vcpus[0].mp_state.mp_state == KVM_MP_STATE_HALTED
    });
    let vcpu = &mut image.vcpus[0];
    vcpu.mp_state.mp_state = KVM_MP_STATE_RUNNABLE;
    vcpu.regs.rip -= 1;
    vcpu.regs.rflags &= !(1 << 9);
    let mut instruction = [0];
    parent.ram().memory().read_slice(&mut instruction, GuestAddress(vcpu.regs.rip)).unwrap();
    assert_eq!(instruction, HLT);
    messages::announce_kicks(vcpu);
    let image = Arc::new(image);
    let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
    for start in ["as a child", "after a reset"] {
        let mailbox = BareMailbox::new(child.ram(), 0);
        mailbox.order(Command::Spin).unwrap();
        child.ring_doorbell(0).unwrap();
        wait_until(start, || mailbox.progress().unwrap() > 0);
        child.reset(&image).unwrap();
    }
}
