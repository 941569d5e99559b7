//! The data under the lock of [`VcpuControl`](super::VcpuControl): the state of the VM, and the
//! phase of each vCPU.

use crate::vm::error::VmError;
use crate::vm::stop::StopReason;

/// The state of a VM, which limits its vCPUs' actions. See [`VcpuControl`](super::VcpuControl) for
/// its transitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// No pause is held. A vCPU that was started may enter the guest; one that is still parked is
    /// about to leave.
    Running,
    /// A pause is held, and at least one vCPU is not parked.
    Pausing,
    /// A pause is held, and every vCPU is parked until the last pause is released.
    Paused,
    /// The VM has stopped for good.
    Stopped(StopReason),
}

/// The wish in each [`State`].
pub(super) const RUN: u8 = 0;
pub(super) const PARK: u8 = 1;
pub(super) const EXIT: u8 = 2;

impl State {
    pub(super) fn wish(&self) -> u8 {
        match self {
            Self::Running => RUN,
            Self::Pausing | Self::Paused => PARK,
            Self::Stopped(_) => EXIT,
        }
    }
}

/// The progress of the start. Separate from [`State`], because a VM may start paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Startup {
    /// This many vCPUs have loaded their state.
    Preparing(usize),
    /// All vCPUs have loaded their state, and the last one asks whether the VM is admitted, for as long as that takes.
    Admission,
    /// It has an answer.
    Answered,
    /// All vCPUs have loaded their state, and may enter the guest.
    Begun,
    /// A vCPU could not load its state, or the last one failed. No vCPU enters the guest.
    Failed,
}

impl Startup {
    /// Whether it is known if the vCPUs enter the guest.
    pub(super) fn is_decided(self) -> bool {
        matches!(self, Self::Begun | Self::Failed)
    }

    /// Whether the admission of the VM is asked for, or known. From here on it is not given up before its start is decided.
    pub(super) fn is_asked(self) -> bool {
        matches!(self, Self::Admission | Self::Answered)
    }
}

/// The phase of one vCPU's thread. See [`VcpuControl`](super::VcpuControl) for its transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The thread is being made.
    Spawned,
    /// The thread waits for its start command.
    Idle,
    /// The vCPU loads its state, or runs the guest.
    Started,
    /// The vCPU is out of the guest and between two instructions: it waits, saves or loads.
    Parked,
    /// The thread has seen that the VM has stopped.
    Leaving,
    /// The thread has dropped the vCPU and ends.
    Exited,
}

/// One vCPU. `O` is the order it starts with, `S` its saved state.
pub(super) struct Vcpu<O, S> {
    pub(super) phase: Phase,
    /// The order to start with if it is idle, or to load if it is parked.
    pub(super) order: Option<O>,
    /// The number of the newest request to save that it has answered.
    pub(super) save_done: u64,
    pub(super) saved: Option<Result<S, VmError>>,
    /// The result of the newest request to load. None until the vCPU has answered.
    pub(super) loaded: Option<Result<(), VmError>>,
}

impl<O, S> Vcpu<O, S> {
    pub(super) fn new() -> Self {
        Self { phase: Phase::Spawned, order: None, save_done: 0, saved: None, loaded: None }
    }
}

pub(super) struct Inner<O, S> {
    pub(super) state: State,
    pub(super) startup: Startup,
    /// Whether the VM was admitted: whoever asked for it counts it as started.
    pub(super) admitted: bool,
    /// Why the start failed, until the owner takes it.
    pub(super) failure: Option<VmError>,
    /// Pauses held. [`State::Running`] means none.
    pub(super) pauses: u32,
    /// The number of the newest request to save.
    pub(super) save_asked: u64,
    /// The number of the newest request to load.
    pub(super) load_asked: u64,
    pub(super) vcpus: Vec<Vcpu<O, S>>,
}

impl<O, S> Inner<O, S> {
    pub(super) fn new(vcpus: usize) -> Self {
        Self {
            state: State::Running,
            startup: Startup::Preparing(0),
            admitted: false,
            failure: None,
            pauses: 0,
            save_asked: 0,
            load_asked: 0,
            vcpus: (0..vcpus).map(|_| Vcpu::new()).collect(),
        }
    }

    pub(super) fn all_in(&self, phase: Phase) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.phase == phase)
    }

    pub(super) fn stop_reason(&self) -> Option<&StopReason> {
        match &self.state {
            State::Stopped(reason) => Some(reason),
            State::Running | State::Pausing | State::Paused => None,
        }
    }
}
