//! Errors of a VM.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use clade_memory::{AccessError, EraseError, RamError};
use thiserror::Error;

use crate::boot::{BootError, LayoutError};
use crate::kvm::{EmulateError, HostError, VcpuStateError, VmStateError};
use crate::vm::config::ConfigError;
use crate::vm::devices::DeviceError;
use crate::vm::identity::{GenerationError, IdentityError};
use crate::vm::stop::StopReason;

/// An error of a VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// Guest memory could not be made, frozen, adopted or reset.
    #[error("guest memory")]
    Ram(#[from] RamError),
    /// Guest memory could not be read or written.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The secrets withheld from a child could not be erased in its memory.
    #[error("cannot erase the withheld secrets in the child's memory")]
    Erase(#[from] EraseError),
    /// No guest can boot in these RAM ranges.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The guest's kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host's KVM lacks a required feature.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A vCPU's state could not be saved or restored.
    #[error("a vCPU's state")]
    VcpuState(#[from] VcpuStateError),
    /// The state of interrupt controllers, timer or clock could not be saved or restored.
    #[error("the VM's state")]
    VmState(#[from] VmStateError),
    /// A KVM ioctl failed.
    #[error("KVM could not {what}")]
    Call {
        /// The failed operation.
        what: &'static str,
        /// The ioctl's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This host's KVM requires the guest's page faults to be watched, and they cannot be.
    #[error("the guest's page faults cannot be watched")]
    PageFaults(#[source] EmulateError),
    /// The thread of a vCPU could not be created.
    #[error("no thread for a vCPU")]
    Thread(#[source] io::Error),
    /// A device could not be made, saved or restored.
    #[error(transparent)]
    Devices(#[from] DeviceError),
    /// An interface, address or socket of the VM could not be taken.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The VM does not have the device that the operation is for.
    #[error("the VM has no {device}")]
    NoDevice {
        /// The kind of device.
        device: &'static str,
    },
    /// The VM has fewer vCPUs.
    #[error("vCPU {vcpu} of a VM with {cpus}: their numbers start at 0")]
    NoVcpu {
        /// The number of the vCPU.
        vcpu: u64,
        /// The number of vCPUs.
        cpus: u8,
    },
    /// The balloon's target is not less than the VM's memory.
    #[error("a balloon of {asked} MiB in a VM of {there} MiB")]
    Balloon {
        /// The target in MiB.
        asked: u64,
        /// The VM's memory in MiB.
        there: u64,
    },
    /// The configuration describes an impossible VM.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The generation id could not be made, or could not be written to the guest's memory.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The VM has stopped.
    #[error("the VM has stopped: {0}")]
    Stopped(StopReason),
    /// The client of the operation has gone before its begin, and nothing was done.
    #[error("the request was abandoned before it was begun")]
    Unwanted,
    /// The VM is paused, and the operation needs its guest to run.
    #[error("the VM is paused: resume it first")]
    Paused,
    /// A vCPU does not leave the guest.
    #[error("a vCPU did not come out of the guest within {seconds} s")]
    Stuck {
        /// The timeout in seconds.
        seconds: u64,
    },
    /// The VM was booted, so there is no image to reset it to.
    #[error("the VM was booted, not forked: there is no image it could be reset to")]
    NoOrigin,
    /// The image was taken of a VM with another configuration.
    #[error("the image is of a VM with another configuration: {field} differs")]
    OtherConfig {
        /// The first field that differs.
        field: &'static str,
    },
    /// The kernel does not complete the requests of a virtio device.
    #[error("transfers of virtio device {place} did not end within {seconds} s")]
    InFlight {
        /// The device's place.
        place: usize,
        /// The timeout in seconds.
        seconds: u64,
    },
    /// Memory, vCPUs and devices of the VM belong to different instants.
    #[error("a reset of the VM failed half-way; only another one mends it")]
    Inconsistent,
    /// The image has no state for a vCPU of the VM.
    #[error("a vCPU has no saved state")]
    NotSaved,
    /// The thread of a vCPU panicked while another thread waited for its result.
    #[error("the thread of vCPU {vcpu} panicked: {message}")]
    Panicked {
        /// The vCPU's index.
        vcpu: usize,
        /// The panic's message.
        message: String,
    },
}

impl VmError {
    pub(crate) fn kvm(what: &'static str, source: kvm_ioctls::Error) -> Self {
        Self::Call { what, source }
    }
}

/// Runs `work` for vCPU `vcpu`. Turns a panic into [`VmError::Panicked`], because another thread
/// waits for the result.
pub(crate) fn catch_panic<T>(vcpu: usize, work: impl FnOnce() -> Result<T, VmError>) -> Result<T, VmError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(VmError::Panicked { vcpu, message: panic_message(&*panic) }))
}

/// The message of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_of_its_own_with_its_message() {
        let message = |work: fn() -> Result<(), VmError>| match catch_panic(3, work) {
            Err(VmError::Panicked { vcpu: 3, message }) => message,
            other => panic!("{other:?}"),
        };
        assert_eq!(message(|| panic!("a literal")), "a literal");
        assert_eq!(message(|| panic!("formatted: {}", 5)), "formatted: 5");
        assert_eq!(message(|| std::panic::panic_any(7_u8)), "no message");
        assert!(matches!(catch_panic(3, || Err::<(), _>(VmError::NotSaved)), Err(VmError::NotSaved)));
    }
}
