//! The host's KVM: its capabilities and their gaps, CPUID, and the state of vCPUs and VMs.
//!
//! | file | what |
//! |---|---|
//! | `host` | `/dev/kvm`, its version and capabilities, with an error for each thing that may be missing |
//! | `features`, `cpuid` | names of CPU features, and the CPUID each vCPU is given |
//! | `template` | CPU models that are the same on every host |
//! | `requirements` | what a saved state needs of a host |
//! | `host_time` | the time since a state was saved |
//! | `quirks` | everything that adapts to a KVM which is not a hardware one |
//! | `msrs` | which MSRs make up a vCPU's state on this host |
//! | `pio` | the width of the accesses of a port exit |
//! | `pending` | a vCPU's pending events, dropped before a reset |
//! | `vcpu_state`, `vm_state` | save and restore, each step with the reason for its place |
//!
//! Not done here: creating VMs and running vCPUs.

#[cfg(test)]
mod cost;
mod cpuid;
mod features;
mod host;
mod host_time;
mod msrs;
mod pending;
mod pio;
mod quirks;
mod requirements;
mod template;
#[cfg(test)]
pub(crate) mod testutil;
mod vcpu_state;
mod vm_state;

pub use cpuid::CpuidError;
pub use features::{CpuHide, UnknownFeature};
pub(crate) use host::{CpuLook, local_apics_alone, set_machine_check_banks};
pub use host::{Host, HostError};
pub use host_time::{BootTime, WallClock};
pub(crate) use msrs::set_msr_bits;
pub use msrs::{MAX_MSRS, MsrError, MsrSet};
pub(crate) use pending::forget_pending;
pub(crate) use pio::pio_width;
pub(crate) use quirks::Emulated;
pub use quirks::{EmulateError, EmulationFailure, QuirkError, Quirks};
pub use requirements::{FeatureWord, HostMismatch, HostRequirements, XsaveComponent};
pub use template::{CpuTemplate, UnknownTemplate};
pub(crate) use vcpu_state::mark_paused;
pub use vcpu_state::{CpuidState, StateLayout, VcpuState, VcpuStateError};
pub(crate) use vm_state::{Chips, VmState};
pub use vm_state::{Clock, VmStateError};
