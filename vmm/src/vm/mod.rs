//! VMs: prepared, booted or forked, paused by guards.

mod config;
mod context;
mod device_control;
mod devices;
mod fork;
mod generation;
mod identity;
mod kick;
mod machine;
mod prepared;
mod reset;
pub mod saved;
mod sched;
mod schedule;
#[cfg(test)]
mod serial_tests;
mod snapshot;
#[cfg(test)]
mod start_tests;
mod stop;
#[cfg(test)]
mod storm;
mod ticket_lock;
mod vcpu;
mod vcpu_control;
mod virtio;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use clade_memory::RamError;
use thiserror::Error;

use crate::boot::BootError;
use crate::kvm::{HostError, VcpuStateError, VmStateError};

pub use config::{ConfigError, DiskSpec, Irqchip, NetSpec, VmConfig};
pub use context::{Context, ContextError};
pub use devices::{DeviceError, DeviceState, Reports};
pub use fork::{ForkImage, ForkReport, ForkTimes, PauseGuard};
pub use generation::{GenerationError, GenerationId};
pub use identity::{ChildIdentity, Endpoints, Identity, IdentityError, NetChoice, NetIdentity, VsockChoice};
pub use machine::{ChildOptions, Vm};
pub use reset::ResetReport;
pub use saved::SavedError;
pub use snapshot::{RestoreLoad, RestoreOptions, SavedAt, SnapshotError, SnapshotOptions, SnapshotReport};
pub use stop::StopReason;

/// What can go wrong with a VM.
#[derive(Debug, Error)]
pub enum VmError {
    /// Guest memory.
    #[error("guest memory")]
    Ram(#[from] RamError),
    /// The shape of the memory.
    #[error(transparent)]
    Layout(#[from] crate::boot::LayoutError),
    /// Loading the guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host's KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A vCPU's state.
    #[error("a vCPU's state")]
    VcpuState(#[from] VcpuStateError),
    /// The state of interrupt controllers, timer or clock.
    #[error("the VM's state")]
    VmState(#[from] VmStateError),
    /// A KVM call.
    #[error("KVM could not {what}")]
    Call {
        /// What it was to do.
        what: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A stock kernel's page faults cannot be watched.
    #[error("the guest's page faults cannot be watched")]
    PageFaults(#[source] crate::kvm::EmulateError),
    /// No thread for a vCPU.
    #[error("no thread for a vCPU")]
    Thread(#[source] io::Error),
    /// No device.
    #[error(transparent)]
    Devices(#[from] DeviceError),
    /// What is to be the VM's alone.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No such device.
    #[error("the VM has no {device}")]
    NoDevice {
        /// Which.
        device: &'static str,
    },
    /// A balloon larger than the VM.
    #[error("a balloon of {asked} MiB in a VM of {there} MiB")]
    Balloon {
        /// MiB asked for.
        asked: u64,
        /// MiB there are.
        there: u64,
    },
    /// Not a VM.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The generation id could not be made, or not be put into the guest's memory.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The VM has stopped.
    #[error("the VM has stopped: {0}")]
    Stopped(StopReason),
    /// A vCPU does not come out of the guest.
    #[error("a vCPU did not come out of the guest within {seconds} s")]
    Stuck {
        /// How long was waited.
        seconds: u64,
    },
    /// There is no image to go back to.
    #[error("the VM was booted, not forked: there is no image it could be reset to")]
    NoOrigin,
    /// An image of another VM.
    #[error("the image is of a VM of another shape")]
    OtherShape,
    /// The kernel does not let go of guest memory.
    #[error("transfers of virtio device {place} did not end within {seconds} s")]
    InFlight {
        /// The device's place.
        place: usize,
        /// How long was waited.
        seconds: u64,
    },
    /// It is of no instant.
    #[error("a reset of the VM failed half-way; only another one mends it")]
    Inconsistent,
    /// A vCPU's state is missing.
    #[error("a vCPU has no saved state")]
    NotSaved,
    /// A vCPU's thread panicked where others wait for it.
    #[error("the thread of vCPU {vcpu} panicked: {message}")]
    Panicked {
        /// Which.
        vcpu: usize,
        /// What the panic said.
        message: String,
    },
}

/// Runs `work` for vCPU `vcpu`. A panic becomes [`VmError::Panicked`]: others wait for the result.
pub(crate) fn caught<T>(vcpu: usize, work: impl FnOnce() -> Result<T, VmError>) -> Result<T, VmError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message =
            text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned());
        Err(VmError::Panicked { vcpu, message })
    })
}

impl VmError {
    pub(crate) fn kvm(what: &'static str, source: kvm_ioctls::Error) -> Self {
        Self::Call { what, source }
    }
}
