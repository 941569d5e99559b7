//! KVM on this host: capabilities and quirks, CPUID, and the state of vCPUs and VMs.
//!
//! | file | contents |
//! |---|---|
//! | `host` | `/dev/kvm`: API version and required capabilities, one error for each |
//! | `features`, `cpuid` | names of CPU features, and the CPUID of each vCPU |
//! | `template` | CPU templates: baselines of CPUID and MSRs |
//! | `requirements` | a saved state's requirements on a host |
//! | `host_time` | the time elapsed since a state was saved |
//! | `quirks` | workarounds for kvm-pvm, a KVM without hardware virtualization |
//! | `msrs` | the MSRs of a vCPU's state on this host |
//! | `messages` | messages to the local APICs of a VM |
//! | `pio` | the access width of a port I/O exit |
//! | `pending` | dropping a vCPU's pending events before a reset |
//! | `vcpu_state`, `vm_state` | save and restore, with the reason for the order of the steps |
//!
//! Not done here: creating VMs and running vCPUs.

#[cfg(test)]
mod cost;
mod cpuid;
mod features;
mod host;
mod host_time;
pub(crate) mod messages;
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
pub(crate) use host::{CpuConfig, local_apics_alone, set_machine_check_banks};
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
pub use vcpu_state::{CpuidState, NewVcpu, StateLayout, VcpuState, VcpuStateError};
pub(crate) use vcpu_state::{mark_paused, tsc_khz};
pub(crate) use vm_state::{Chips, PlatformState};
pub use vm_state::{Clock, VmStateError};
