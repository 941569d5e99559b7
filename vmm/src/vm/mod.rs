//! A VM from its boot or its fork to its end.
//!
//! | topic | file |
//! |---|---|
//! | the configuration of a VM | `config.rs` |
//! | the VM itself: boot, pause, resume, stop | `machine.rs` |
//! | preparations before a VM is needed | `prepared.rs`, `pool.rs`, `context.rs` |
//! | forks, and the start of children | `fork.rs` |
//! | resets in place to an earlier instant | `reset.rs` |
//! | giving memory back until it is needed | `suspend.rs` |
//! | writing a snapshot and making it durable | `persist/save.rs` |
//! | turning a snapshot into an image again | `persist/restore.rs`, `persist/sections.rs` |
//! | giving an image to another process | `transfer/` |
//! | the loop around `KVM_RUN` | `vcpu/run.rs` |
//! | saving and restoring a vCPU's state | `vcpu/state.rs` |
//! | pausing and synchronizing vCPUs | `vcpu/control.rs` |
//! | kicking a vCPU out of the guest | `vcpu/kick.rs` |
//! | reading and writing memory from outside | `memory.rs` |
//! | durations of pauses | `pause_times.rs` |
//! | durations of the steps of a child's start | `timeline.rs` |
//! | the devices on their buses | `devices/` |
//! | state that a VM does not share with its clones | `identity/` |

mod config;
mod context;
mod devices;
mod error;
mod fork;
mod identity;
mod machine;
mod memory;
mod pause_times;
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
pub use devices::{DeviceError, DevicesState, Reports};
pub use error::VmError;
pub use fork::{Admission, ChildOptions, ForkImage, ForkReport, ForkTimes, PauseGuard};
pub use identity::{
    ChildIdentity, EndpointParts, Endpoints, GenerationError, GenerationId, HostLink, Identity, IdentityError,
    InterfaceClaim, NetChoice, NetIdentity, PortForward, UserNet, UserNetError, VsockChoice, user_net,
};
pub use machine::{TakenDisks, Vm};
pub use pause_times::{Histogram, HistogramCounts, Pauses};
pub use persist::{
    RestoreLoad, RestoreOptions, SavedAt, SavedError, SavedVm, SnapshotError, SnapshotOptions, SnapshotReport, sections,
};
pub use reset::ResetReport;
pub use stop::StopReason;
pub use suspend::{RequestSource, SuspendReport, WakeReport};
pub use timeline::{ChildStep, Timeline};
#[cfg(feature = "fuzzing")]
pub(crate) use transfer::is_memory;
pub use transfer::{
    CopiedFile, DetachOptions, DetachReport, FileId, ImageFile, ImageParts, KnownCopy, Leases, Overlays, SealedParts,
    SharedFiles, TransferError, file_id_at,
};
