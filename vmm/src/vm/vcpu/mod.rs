//! A vCPU's thread: takes a start command, runs the guest, answers its exits, and parks when the VM
//! is paused.
//!
//! | file | contents |
//! |---|---|
//! | `run` | the loop around `KVM_RUN`, and the handling of each exit |
//! | `state` | a vCPU's state: set at a boot, restored, saved at a fork, replaced at a reset |
//! | `control` | synchronizes these threads with the owner of the VM |
//! | `exits` | the last exits of each vCPU, for the flight record |
//! | `kick` | getting a thread out of `KVM_RUN` |
//! | `schedule` | delays that tests put before kicks |
//! | `ticket_lock` | one operation on a VM at a time, in order |

pub(crate) mod control;
pub(crate) mod exits;
mod kick;
mod run;
mod schedule;
mod state;
pub(crate) mod ticket_lock;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use clade_host_io::sched;
use clade_memory::GuestMemory;
use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::boot::BootEntry;
use crate::kvm::{Host, NewVcpu, StateLayout, VcpuState};
use crate::vm::devices::Devices;
use crate::vm::error::{VmError, catch_panic, panic_message};
use crate::vm::fork::{Admission, ForkImage};
use crate::vm::stop::StopReason;
use crate::vm::timeline::{ChildStep, Timeline};
use control::{Next, VcpuControl};

/// The initial state of a vCPU.
#[derive(Clone)]
pub(crate) enum VcpuStart {
    /// The boot vCPU starts at the entry; the others wait for INIT-SIPI.
    Boot(BootEntry),
    /// The vCPU continues where it was at the fork.
    Restore(Arc<ForkImage>),
}

/// A command to a vCPU that has not run yet, or that is parked for a reset.
#[derive(Clone)]
pub(crate) struct StartCommand {
    pub(crate) start: VcpuStart,
    pub(crate) devices: Arc<Devices>,
    /// The timeline of a child's start.
    pub(crate) timeline: Option<Arc<Timeline>>,
    /// Decides whether a child runs, once all of its vCPUs have their states.
    pub(crate) admission: Option<Admission>,
}

impl StartCommand {
    fn mark(&self, step: ChildStep) {
        if let Some(timeline) = &self.timeline {
            timeline.mark(step);
        }
    }
}

pub(crate) type Control = VcpuControl<StartCommand, VcpuState>;

/// The data of a vCPU's thread.
pub(crate) struct VcpuThread {
    pub(crate) index: usize,
    pub(crate) host: Arc<Host>,
    pub(crate) layout: Arc<StateLayout>,
    pub(crate) control: Arc<Control>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpu: VcpuFd,
    /// The CPUID that `vcpu` has.
    pub(crate) cpuid: CpuId,
    pub(crate) memory: GuestMemory,
    /// The address of the guest's page fault handler, if its page faults are watched; see `quirks`.
    pub(crate) page_fault_entry: Option<u64>,
    /// The state of a new vCPU, until another state is loaded.
    pub(crate) new: Option<NewVcpu>,
    /// The frequency of its TSC, once it was read.
    pub(crate) tsc_khz: Option<Option<u32>>,
    /// Whether the thread was raised for the start. It has the shortest slice until its guest's first exit, or
    /// until it parks.
    pub(crate) is_starting: bool,
}

impl VcpuThread {
    /// The main function of the thread.
    pub(crate) fn main(mut self) {
        let (index, control) = (self.index, Arc::clone(&self.control));
        let enrolled = control.kicker(index).enrol(&mut self.vcpu);
        let end = end_of(index, || self.life());
        // Withdraw before the vCPU and its kvm_run page are dropped.
        drop(enrolled);
        drop(self);
        if let Some(reason) = end {
            // Before the stop: the process may end with the VM.
            for line in control.last_exits() {
                tracing::info!(target: crate::FLIGHT, "{line}");
            }
            control.stop(reason);
        }
        control.thread_exited(index);
    }

    fn life(&mut self) -> Option<StopReason> {
        // The owner waits for the thread to start. Once it runs a guest, it has no priority over
        // others.
        sched::set_slice(self.host.quirks().vcpu_slice());
        sched::boost();
        let Next::Start(command) = self.control.wait_for_order(self.index) else { return None };
        command.mark(ChildStep::Woken);
        if !self.prepare(&command) {
            return None;
        }
        let StartCommand { start, devices, timeline, admission } = command;
        // An image holds its layers, which the VM may forget. The admission may hold a connection to whoever has
        // answered.
        drop((start, admission));
        self.is_starting = sched::unboost_to_start();
        let mut timeline = timeline.as_deref();
        loop {
            // Before `may_run`, not after: see Kicker::clear_immediate_exit.
            self.control.kicker(self.index).clear_immediate_exit();
            if self.is_starting {
                // After the clear, which would undo the kick that follows this note.
                self.control.note_start();
            }
            if !self.control.may_run() && !self.park() {
                return None;
            }
            if let Some(timeline) = timeline.take() {
                timeline.mark_first(ChildStep::Entered);
            }
            if let Some(reason) = self.run(&devices) {
                return Some(reason);
            }
            self.end_start();
        }
    }

    /// Schedules the thread like any other vCPU's: its guest has run.
    fn end_start(&mut self) {
        if std::mem::take(&mut self.is_starting) {
            sched::unboost();
        }
    }

    /// Loads the vCPU's first state. All vCPUs of a VM have theirs before the first of them runs.
    /// Returns false if the VM does not start; it then has a stop reason.
    fn prepare(&mut self, command: &StartCommand) -> bool {
        let own = catch_panic(self.index, || self.give_state(&command.start));
        if !self.control.begin(self.index, own, || self.lead(command)) {
            return false;
        }
        if let VcpuStart::Restore(image) = &command.start
            && image.vcpus.get(self.index).is_some_and(VcpuState::has_kvmclock)
        {
            // After its clock was restored. The instant of the fork may be long ago.
            self.notify_paused();
        }
        true
    }

    /// Performs the steps for the whole VM between its last vCPU's state and its first instruction.
    fn lead(&self, command: &StartCommand) -> Result<(), VmError> {
        command.mark(ChildStep::Vcpus);
        match &command.start {
            VcpuStart::Boot(_) => command.devices.reraise(),
            VcpuStart::Restore(image) => image.restore_controllers(&self.vm, &command.devices)?,
        }
        command.mark(ChildStep::Controllers);
        if let Some(admit) = &command.admission {
            self.control.ask_admission(|| admit())?;
        }
        // It may have stopped while it waited for its admission.
        if self.control.stopped().is_none() {
            command.devices.resume();
        }
        command.mark(ChildStep::Resumed);
        Ok(())
    }
}

/// Runs `life`, the body of vCPU `vcpu`'s thread. A panic stops this VM and no other.
fn end_of(vcpu: usize, life: impl FnOnce() -> Option<StopReason>) -> Option<StopReason> {
    catch_unwind(AssertUnwindSafe(life))
        .unwrap_or_else(|panic| Some(StopReason::Panic { vcpu, message: panic_message(&*panic) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_vcpu_thread_stops_the_vm_as_a_panic_with_its_message() {
        let end = end_of(2, || panic!("at port {:#x}", 0x3f8));
        let panic = StopReason::Panic { vcpu: 2, message: "at port 0x3f8".to_owned() };
        assert_eq!(end, Some(panic.clone()));
        assert_eq!(panic.to_string(), "the thread of vCPU 2 panicked: at port 0x3f8");
        assert_eq!(end_of(2, || None), None);
        assert_eq!(end_of(2, || Some(StopReason::Reset)), Some(StopReason::Reset));
    }
}
