//! A VM from its boot or its fork to its end.
//!
//! | question | file |
//! |---|---|
//! | what a VM is made of | `config.rs` |
//! | the VM itself: boot, pause, resume, stop | `machine.rs` |
//! | what is made before a VM is needed | `prepared.rs`, `pool.rs`, `context.rs` |
//! | where a fork happens, and where its child starts | `fork.rs` |
//! | where a VM goes back to an earlier instant, in place | `reset.rs` |
//! | where a VM gives its memory back until it is needed | `suspend.rs` |
//! | where a snapshot is written and made durable | `persist/save.rs` |
//! | where a snapshot becomes an image again | `persist/restore.rs`, `persist/sections.rs` |
//! | where an image goes to another process | `transfer/` |
//! | the loop around `KVM_RUN` | `vcpu/run.rs` |
//! | where a vCPU's state is saved and restored | `vcpu/state.rs` |
//! | where vCPUs are paused and synchronized | `vcpu/control.rs` |
//! | where a vCPU is kicked out of the guest | `vcpu/kick.rs` |
//! | where its memory is read and written from outside | `memory.rs` |
//! | how long pauses were | `pauses.rs` |
//! | how long each step of a child's start took | `timeline.rs` |
//! | the devices on their buses | `devices/` |
//! | what a VM does not share with its clones | `identity/` |

mod config;
mod context;
mod devices;
mod error;
mod fork;
mod identity;
mod machine;
mod memory;
mod pauses;
mod persist;
mod pool;
mod prepared;
mod reset;
mod stop;
mod suspend;
#[cfg(test)]
mod tests;
mod timeline;
mod transfer;
mod vcpu;

pub use config::{ConfigError, DiskSpec, Irqchip, NetSpec, VmConfig};
pub use context::{Context, ContextError};
pub use devices::{DeviceError, DeviceState, Reports};
pub use error::VmError;
pub use fork::{ChildOptions, ForkImage, ForkReport, ForkTimes, PauseGuard};
pub use identity::{
    ChildIdentity, EndpointParts, Endpoints, GenerationError, GenerationId, Identity, IdentityError, NetChoice,
    NetIdentity, PortForward, UserNet, UserNetError, VsockChoice, user_net,
};
pub use machine::Vm;
pub use pauses::{Histogram, HistogramCounts, Pauses};
pub use persist::{
    RestoreLoad, RestoreOptions, SavedAt, SavedError, SavedVm, SnapshotError, SnapshotOptions, SnapshotReport, sections,
};
pub use reset::ResetReport;
pub use stop::StopReason;
pub use suspend::{RequestSource, SuspendReport, WakeReport};
pub use timeline::{ChildStep, Timeline};
#[cfg(feature = "fuzzing")]
pub(crate) use transfer::is_memory;
pub use transfer::{ImageParts, Leases, Overlays, SealedParts, SharedFiles, TransferError};
