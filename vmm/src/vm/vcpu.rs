//! A vCPU's thread: takes an order, runs the guest, answers its exits, parks when asked to.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use clade_memory::GuestMemory;
use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{BOOT_MSRS, Entry};
use crate::kvm::{
    Clock, CpuidState, EmulateError, Emulated, Host, Quirks, StateLayout, VcpuState, forget_pending, mark_paused,
    pio_width, set_msr_bits,
};
use crate::vm::devices::Devices;
use crate::vm::fork::ForkImage;
use crate::vm::sched::{self, BoostGuard};
use crate::vm::stop::StopReason;
use crate::vm::vcpu_control::{Next, VcpuControl};
use crate::vm::{VmError, caught};

/// What a vCPU starts from.
#[derive(Clone)]
pub(crate) enum Start {
    /// The boot vCPU starts at the entry; the others wait for INIT-SIPI.
    Boot(Entry),
    /// Where it was at the fork.
    Restore(Arc<ForkImage>),
}

/// An order to a vCPU that has not run yet.
#[derive(Clone)]
pub(crate) struct StartCommand {
    pub(crate) start: Start,
    pub(crate) devices: Arc<Devices>,
}

pub(crate) type Control = VcpuControl<StartCommand, VcpuState>;

/// Everything a vCPU's thread works with.
pub(crate) struct VcpuThread {
    pub(crate) index: usize,
    pub(crate) host: Arc<Host>,
    pub(crate) layout: Arc<StateLayout>,
    pub(crate) control: Arc<Control>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpu: VcpuFd,
    /// What `vcpu` was made with.
    pub(crate) cpuid: CpuId,
    pub(crate) memory: GuestMemory,
    /// Where the guest's page faults are watched; see `quirks`.
    pub(crate) page_fault_entry: Option<u64>,
}

impl VcpuThread {
    /// The thread's whole life.
    pub(crate) fn main(mut self) {
        let (index, control) = (self.index, Arc::clone(&self.control));
        let enrolled = control.kicker(index).enrol(&mut self.vcpu);
        // A panic here stops this VM and no other.
        let end = catch_unwind(AssertUnwindSafe(|| self.life()));
        // Withdrawn before the vCPU and its kvm_run page go.
        drop(enrolled);
        drop(self);
        match end {
            Ok(None) => {}
            Ok(Some(reason)) => control.stop(reason),
            Err(_) => control.stop(StopReason::Panic { vcpu: index }),
        }
        control.thread_exited();
    }

    fn life(&mut self) -> Option<StopReason> {
        // Waiting to start, it is wanted at once; running a guest, it is one of many.
        sched::boost();
        let order = match self.control.wait_for_order(self.index) {
            Next::Start(order) => order,
            _ => return None,
        };
        if !self.prepare(&order) {
            return None;
        }
        sched::unboost();
        loop {
            // Before the look, not after: see Kicker::allow.
            self.control.kicker(self.index).clear_immediate_exit();
            if !self.control.may_run() && !self.park() {
                return None;
            }
            if let Some(reason) = self.run(&order.devices) {
                return Some(reason);
            }
        }
    }

    /// Gives the vCPU the state it starts with. All vCPUs of a VM have theirs before the first of them runs. False when
    /// the VM does not start; it has its reason then.
    fn prepare(&mut self, order: &StartCommand) -> bool {
        let own = caught(self.index, || self.give_state(&order.start));
        if !self.control.begin(self.index, own, || self.lead(order)) {
            return false;
        }
        if let Start::Restore(_) = order.start {
            // After its clock was restored. The instant of the fork may be long ago.
            self.tell_of_pause();
        }
        true
    }

    /// What the VM as a whole needs between its last vCPU's state and its first instruction.
    fn lead(&self, order: &StartCommand) -> Result<(), VmError> {
        if let Start::Restore(image) = &order.start {
            // After every vCPU's own state: an interrupt the controllers hold is delivered to the local APICs, and the
            // clock is computed from the TSCs.
            image.vm.restore_chips(&self.vm)?;
            image.vm.restore_clock(&self.vm, Clock::CatchUp)?;
        }
        // After the interrupt controllers have their state. What a device of the parent had raised may have been on its
        // way to them when that was saved.
        order.devices.reraise();
        if let Start::Restore(_) = order.start {
            order.devices.tell_generation();
        }
        order.devices.resume();
        Ok(())
    }

    fn give_state(&mut self, start: &Start) -> Result<(), VmError> {
        match start {
            Start::Boot(entry) => {
                self.set_boot_msrs();
                // The others wait for the first to start them.
                if self.index == 0 { self.boot(entry) } else { Ok(()) }
            }
            Start::Restore(image) => {
                let state = image.vcpus.get(self.index).ok_or(VmError::NotSaved)?;
                // From another host, which has features of its own: the guest keeps those it was booted with. (A vCPU that has run had them already.)
                let other = state.cpuid.as_slice() != self.cpuid.as_slice();
                if other {
                    self.cpuid = state.cpuid.clone();
                }
                let cpuid = if other { CpuidState::Unset } else { CpuidState::Set };
                state.restore(&self.vcpu, &self.layout, cpuid, Clock::CatchUp)?;
                self.watch_page_faults(state.page_fault_entry).map_err(VmError::PageFaults)
            }
        }
    }

    /// Sets what firmware would have. A host's KVM may refuse: then the guest starts with what that gives it.
    fn set_boot_msrs(&self) {
        for msr in BOOT_MSRS {
            match set_msr_bits(&self.vcpu, msr.index, msr.bits) {
                Ok(true) => {}
                Ok(false) => tracing::debug!(vcpu = self.index, ?msr, "KVM refuses an MSR of a vCPU that boots"),
                Err(error) => {
                    let error = crate::error_chain(&error);
                    tracing::debug!(vcpu = self.index, ?msr, error, "an MSR of a vCPU that boots");
                }
            }
        }
    }

    /// Tells the guest that it stood still, if it has a clock by which to be told: its watchdogs then do not count that time.
    fn tell_of_pause(&self) {
        if let Err(error) = mark_paused(&self.vcpu) {
            tracing::debug!(
                vcpu = self.index,
                error = crate::error_chain(&error),
                "a guest is not told that it was paused"
            );
        }
    }

    fn boot(&self, entry: &Entry) -> Result<(), VmError> {
        let mut sregs = self.vcpu.get_sregs().map_err(|e| VmError::kvm("read a vCPU's special registers", e))?;
        entry.apply_to(&mut sregs);
        self.vcpu.set_sregs(&sregs).map_err(|e| VmError::kvm("set a vCPU's special registers", e))?;
        self.vcpu.set_regs(&entry.regs()).map_err(|e| VmError::kvm("set a vCPU's registers", e))
    }

    fn read_memory(&self) -> impl Fn(u64, &mut [u8]) -> bool {
        |address, bytes| self.memory.read_slice(bytes, GuestAddress(address)).is_ok()
    }

    /// Has page faults of the guest be looked at from now on, or not any more.
    fn watch_page_faults(&mut self, entry: Option<u64>) -> Result<(), EmulateError> {
        // Most guests never are.
        if self.page_fault_entry != entry {
            Quirks::watch_page_faults(&self.vcpu, entry)?;
            self.page_fault_entry = entry;
        }
        Ok(())
    }

    fn emulate_insn(&mut self) -> Option<StopReason> {
        let healed = self.host.quirks().emulate_insn(&mut self.vcpu).and_then(|healed| {
            if healed == Emulated::Breakpoint && self.page_fault_entry.is_none() {
                let entry = self.host.quirks().find_page_faults(&self.vcpu, &self.read_memory())?;
                self.watch_page_faults(entry)?;
            }
            Ok(())
        });
        self.expect_healed(healed)
    }

    fn expect_healed(&self, healed: Result<(), EmulateError>) -> Option<StopReason> {
        let vcpu = self.index;
        match healed {
            Ok(()) => None,
            Err(EmulateError::NoRemedy { failure, rip }) => {
                Some(StopReason::Emulation { vcpu, rip, bytes: failure.to_string() })
            }
            Err(error) => Some(StopReason::Internal { vcpu, error: crate::error_chain(&error) }),
        }
    }

    /// Parks, saving the vCPU as often as asked. False when the thread is to end.
    fn park(&mut self) -> bool {
        // Whoever pauses the VM waits for this thread to save, and the guest for it to go on: both when it is woken, not when others have had enough.
        let _urgent = BoostGuard::new();
        let mut next = self.control.park(self.index, false);
        loop {
            match next {
                Next::Save(request) => {
                    // Caught, because whoever pauses the VM waits for this vCPU.
                    let save = || {
                        let mut state = VcpuState::save(&self.vcpu, &self.layout, &self.cpuid)?;
                        state.page_fault_entry = self.page_fault_entry;
                        Ok(state)
                    };
                    self.control.submit_state(self.index, request, caught(self.index, save));
                    next = self.control.park(self.index, true);
                }
                Next::Load(request, order) => {
                    // Caught, because whoever resets the VM waits for this vCPU.
                    let taken = caught(self.index, || {
                        // What is on its way to the guest is of the time before.
                        forget_pending(&self.vcpu)?;
                        self.give_state(&order.start)
                    });
                    self.control.has_loaded(self.index, request, taken);
                    next = self.control.park(self.index, true);
                }
                Next::Run => {
                    // The pause's kick is spent; `allow` and another look come before the guest is entered.
                    self.control.kicker(self.index).clear_immediate_exit();
                    if self.control.may_run() {
                        self.tell_of_pause();
                        return true;
                    }
                    next = self.control.park(self.index, false);
                }
                Next::Start(_) | Next::Exit => return false,
            }
        }
    }

    /// Runs the guest until it must park (`None`) or stops.
    fn run(&mut self, devices: &Devices) -> Option<StopReason> {
        let vcpu = self.index;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let data: *const [u8] = data;
                    let width = pio_width(&mut self.vcpu);
                    // SAFETY: as below, and the guest does not write it meanwhile.
                    if devices.pio_write(port, width, unsafe { &*data }) {
                        return Some(StopReason::Reset);
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let data: *mut [u8] = data;
                    let width = pio_width(&mut self.vcpu);
                    // SAFETY: the bytes are behind the kvm_run structure, in the vCPU's mapping,
                    // and nobody else refers to them. Both
                    // outlive this exit: the vCPU is this thread's, and KVM_RUN is called again
                    // only after it.
                    devices.pio_read(port, width, unsafe { &mut *data });
                }
                Ok(VcpuExit::MmioRead(address, data)) => devices.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => devices.mmio_write(address, data),
                Ok(VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::IoapicEoi(_)) => {}
                Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Some(StopReason::Shutdown { vcpu }),
                Ok(VcpuExit::FailEntry(reason, _)) => return Some(StopReason::FailEntry { vcpu, reason }),
                Ok(VcpuExit::InternalError) => {
                    if let Some(reason) = self.emulate_insn() {
                        return Some(reason);
                    }
                }
                Ok(VcpuExit::Debug(_)) if self.page_fault_entry.is_some() => {
                    let done = Quirks::at_page_fault(&self.vcpu, &self.read_memory());
                    if let Some(reason) = self.expect_healed(done) {
                        return Some(reason);
                    }
                }
                // An exit is answered before the next KVM_RUN, and that call completes the instruction: only at EINTR is the vCPU between two
                // instructions, and only then may it be saved.
                Ok(VcpuExit::Intr) => return None,
                Ok(exit) => return Some(StopReason::Unexpected { vcpu, exit: format!("{exit:?}") }),
                Err(error) if error.errno() == libc::EINTR => return None,
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Some(StopReason::Run { vcpu, error: error.to_string() }),
            }
        }
    }
}
