//! The loop around `KVM_RUN`, and the handling of each exit.

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{EmulateError, Emulated, Quirks, pio_width};
use crate::vm::devices::Devices;
use crate::vm::stop::StopReason;
use crate::vm::vcpu::VcpuThread;
use crate::vm::vcpu::exits::ExitRecord;

impl VcpuThread {
    /// Runs the guest until it must park (`None`) or stops.
    pub(super) fn run(&mut self, devices: &Devices) -> Option<StopReason> {
        let vcpu = self.index;
        loop {
            let exit = self.vcpu.run();
            self.control.exits(self.index).note(ExitRecord::from(&exit));
            match exit {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let data: *const [u8] = data;
                    let width = pio_width(&mut self.vcpu);
                    // SAFETY: as below, and the guest does not write it meanwhile.
                    let ends = devices.pio_write(port, width, unsafe { &*data });
                    if ends.is_some() {
                        return ends;
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let data: *mut [u8] = data;
                    let width = pio_width(&mut self.vcpu);
                    // SAFETY: the bytes are behind the kvm_run structure, in the vCPU's mapping,
                    // and nothing else refers to them. Both outlive this exit: the vCPU is this
                    // thread's, and KVM_RUN is called again only after it.
                    devices.pio_read(port, width, unsafe { &mut *data });
                }
                Ok(VcpuExit::MmioRead(address, data)) => devices.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => devices.mmio_write(address, data),
                Ok(VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::IoapicEoi(_)) => {}
                Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => {
                    return self.unhandled(StopReason::Shutdown { vcpu });
                }
                Ok(VcpuExit::FailEntry(reason, _)) => return self.unhandled(StopReason::FailEntry { vcpu, reason }),
                Ok(VcpuExit::InternalError) => {
                    if let Some(reason) = self.emulate_insn() {
                        return Some(reason);
                    }
                }
                Ok(VcpuExit::Debug(_)) if self.page_fault_entry.is_some() => {
                    let done = Quirks::at_page_fault(&self.vcpu, &self.read_memory());
                    if let Some(reason) = self.stop_unless_emulated(done) {
                        return Some(reason);
                    }
                }
                // An exit is handled before the next KVM_RUN, and that call completes the
                // instruction. Only at EINTR is the vCPU between two instructions, and only then
                // may it be saved.
                Ok(VcpuExit::Intr) => return None,
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    return self.unhandled(StopReason::Unexpected { vcpu, exit });
                }
                Err(error) if error.errno() == libc::EINTR => return None,
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return self.unhandled(StopReason::Run { vcpu, error: error.to_string() }),
            }
            self.end_start();
        }
    }

    /// Writes the vCPU's position to the flight record, since it is lost with the VM.
    fn unhandled(&self, reason: StopReason) -> Option<StopReason> {
        let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
        tracing::info!(target: crate::FLIGHT, rip = %format_args!("{rip:#x}"), %reason, "unhandled exit");
        Some(reason)
    }

    fn read_memory(&self) -> impl Fn(u64, &mut [u8]) -> bool {
        |address, bytes| self.memory.read_slice(bytes, GuestAddress(address)).is_ok()
    }

    fn emulate_insn(&mut self) -> Option<StopReason> {
        let emulated = self.host.quirks().emulate_insn(&mut self.vcpu).and_then(|(emulated, rip)| {
            self.control.exits(self.index).note(ExitRecord::emulated(emulated, rip));
            if emulated == Emulated::Breakpoint && self.page_fault_entry.is_none() {
                let entry = self.host.quirks().find_page_faults(&self.vcpu, &self.read_memory())?;
                self.watch_page_faults(entry)?;
            }
            Ok(())
        });
        self.stop_unless_emulated(emulated)
    }

    fn stop_unless_emulated(&self, emulated: Result<(), EmulateError>) -> Option<StopReason> {
        let vcpu = self.index;
        match emulated {
            Ok(()) => None,
            Err(EmulateError::NoRemedy { failure, rip }) => {
                Some(StopReason::Emulation { vcpu, rip, bytes: failure.to_string() })
            }
            Err(error) => self.unhandled(StopReason::Internal { vcpu, error: crate::error_chain(&error) }),
        }
    }
}
