//! The host's KVM: what it can do, what it must be told, and how a VM's state is taken and given back.
//!
//! | file | what |
//! |---|---|
//! | `host` | `/dev/kvm`, its version and capabilities, with an error for each thing that may be missing |
//! | `features`, `cpuid` | names of CPU features, and the CPUID each vCPU is given |
//! | `facts` | what a state written down presupposes of its host |
//! | `host_time` | how long ago something was saved |
//! | `quirks` | everything that adapts to a KVM which is not a hardware one |
//! | `msrs` | which MSRs make up a vCPU's state on this host |
//! | `pio` | how wide the accesses of a port exit are |
//! | `pending` | what a vCPU has on its way to the guest, taken away before a reset |
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

pub use cpuid::{CpuidError, CpuidSpec, build_cpuid};
pub use features::{CpuHide, UnknownFeature};
pub use host::{CpuLook, Host, HostError, KVM_PATH};
pub(crate) use host::{local_apics_alone, set_machine_check_banks};
pub use host_time::{BootTime, WallClock};
pub use msrs::MAX_MSRS;
pub use msrs::{MsrError, MsrSet, set_msr_bits};
pub use pending::forget_pending;
pub(crate) use pio::pio_width;
pub use quirks::{EmulateError, Emulated, EmulationFailure, QUIRKS_ENV, QuirkError, Quirks};
pub use requirements::{FeatureWord, HostMismatch, HostRequirements, XsaveComponent};
pub use template::{CpuTemplate, UnknownTemplate};
pub use vcpu_state::{CpuidState, StateLayout, VcpuState, VcpuStateError, mark_paused};
pub use vm_state::{Chips, Clock, VmState, VmStateError};
