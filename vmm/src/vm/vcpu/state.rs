//! A vCPU's state on its own thread: set at a boot, restored in a child, saved at a fork, replaced
//! at a reset.
//!
//! The parts of the state, and their order, are documented at [`VcpuState`].

use crate::boot::{BOOT_MSRS, BootEntry};
use crate::kvm::{
    Clock, CpuidState, EmulateError, Quirks, VcpuState, forget_pending, mark_paused, set_msr_bits, tsc_khz,
};
use crate::vm::error::{VmError, catch_panic};
use crate::vm::vcpu::control::Next;
use crate::vm::vcpu::exits::{ExitKind, ExitRecord};
use crate::vm::vcpu::{VcpuStart, VcpuThread};
use clade_host_io::sched::ParkGuard;

impl VcpuThread {
    /// Loads the state that the vCPU starts with.
    pub(super) fn give_state(&mut self, start: &VcpuStart) -> Result<(), VmError> {
        let new = self.new.take();
        // The state may set another frequency.
        self.tsc_khz = None;
        match start {
            VcpuStart::Boot(entry) => {
                self.set_boot_msrs();
                // The other vCPUs wait until the first starts them.
                if self.index == 0 { self.boot(entry) } else { Ok(()) }
            }
            VcpuStart::Restore(image) => {
                let state = image.vcpus.get(self.index).ok_or(VmError::NotSaved)?;
                // The CPUID in an image is that of the host it was taken on, and the guest keeps
                // it. A vCPU that has run has it already.
                let other = state.cpuid.as_slice() != self.cpuid.as_slice();
                if other {
                    self.cpuid = state.cpuid.clone();
                }
                let cpuid = if other { CpuidState::Unset } else { CpuidState::Set };
                state.restore(&self.vcpu, &self.layout, cpuid, Clock::CatchUp, new.as_ref())?;
                self.watch_page_faults(state.page_fault_entry).map_err(VmError::PageFaults)
            }
        }
    }

    fn save_state(&mut self) -> Result<VcpuState, VmError> {
        let tsc_khz = *self.tsc_khz.get_or_insert_with(|| tsc_khz(&self.vcpu));
        let mut state = VcpuState::save_with(&self.vcpu, &self.layout, &self.cpuid, tsc_khz)?;
        state.page_fault_entry = self.page_fault_entry;
        Ok(state)
    }

    /// Parks, and saves or replaces the vCPU's state as often as the owner requests it. Returns
    /// false when the thread must end.
    pub(super) fn park(&mut self) -> bool {
        // The owner waits for this thread to save, and the guest for it to run on. Both need to run
        // without waiting for the end of another thread's slice.
        let _boost = ParkGuard::new();
        let mut next = self.control.park(self.index, false);
        loop {
            match next {
                Next::Save(request) => {
                    // Caught, because the owner waits for this vCPU.
                    let saved = catch_panic(self.index, || self.save_state());
                    self.control.exits(self.index).note(ExitRecord { kind: ExitKind::Saved, address: 0 });
                    self.control.submit_state(self.index, request, saved);
                    next = self.control.park(self.index, true);
                }
                Next::Load(request, command) => {
                    // Caught, because the owner waits for this vCPU.
                    let loaded = catch_panic(self.index, || {
                        // Pending events belong to the instant before the reset.
                        let state = match &command.start {
                            VcpuStart::Restore(image) => image.vcpus.get(self.index),
                            VcpuStart::Boot(_) => None,
                        };
                        let lapic = state.map(|state| &state.lapic);
                        forget_pending(&self.vcpu, &self.layout, lapic)?;
                        self.give_state(&command.start)
                    });
                    // A VM that stays paused would keep the image's layers.
                    drop(command);
                    self.control.exits(self.index).note(ExitRecord { kind: ExitKind::Loaded, address: 0 });
                    self.control.has_loaded(self.index, request, loaded);
                    next = self.control.park(self.index, true);
                }
                Next::Run => {
                    // The pause's kick has done its work. Clear the flag and read the wish again
                    // before the guest is entered.
                    self.control.kicker(self.index).clear_immediate_exit();
                    if self.control.may_run() {
                        self.notify_paused();
                        return true;
                    }
                    next = self.control.park(self.index, false);
                }
                Next::Start(_) | Next::Exit => return false,
            }
        }
    }

    /// Notifies the guest that it was paused, if it has a kvm-clock: its watchdogs then do not
    /// count that time.
    pub(super) fn notify_paused(&self) {
        if let Err(error) = mark_paused(&self.vcpu) {
            let error = crate::error_chain(&error);
            tracing::debug!(vcpu = self.index, error, "cannot notify the guest of its pause");
        }
    }

    /// Watches the guest's page faults from now on (`Some`), or stops watching them.
    pub(super) fn watch_page_faults(&mut self, entry: Option<u64>) -> Result<(), EmulateError> {
        // Most guests are never watched.
        if self.page_fault_entry != entry {
            Quirks::watch_page_faults(&self.vcpu, entry)?;
            self.page_fault_entry = entry;
        }
        Ok(())
    }

    /// Sets the MSRs that firmware would set. A KVM that refuses one leaves the guest with KVM's
    /// default.
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

    fn boot(&self, entry: &BootEntry) -> Result<(), VmError> {
        let mut sregs = self.vcpu.get_sregs().map_err(|e| VmError::kvm("read a vCPU's special registers", e))?;
        entry.apply_to(&mut sregs);
        self.vcpu.set_sregs(&sregs).map_err(|e| VmError::kvm("set a vCPU's special registers", e))?;
        self.vcpu.set_regs(&entry.regs()).map_err(|e| VmError::kvm("set a vCPU's registers", e))
    }
}
