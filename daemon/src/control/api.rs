//! The requests and answers of the control socket.

mod boot;
mod checkpoint;
mod fork;
mod guest_memory;
mod lifecycle;
mod vm;

pub use boot::{
    BootRequest, OpenRequest, RestoreRequest, SavedSource, SnapshotAnswer, SnapshotProgress, SnapshotRequest, VmLimits,
};
pub use checkpoint::{
    AheadInfo, CheckpointInfo, CheckpointRequest, DetachedInfo, ForkedInfo, KeepRequest, PrepareRequest, Prepared,
    SupervisorInfo, SupervisorKept,
};
pub use fork::{ErasedInfo, ForkAnswer, ForkRequest, IdentityInfo, ReadyAnswer};
pub use guest_memory::{BalloonInfo, BalloonRequest, GuestMemory, TouchedAnswer, TouchedRun, WorkingSetAnswer};
pub(crate) use lifecycle::MAX_GRACE;
pub use lifecycle::{
    MergingVm, NetworkRequest, ResetAnswer, RollbackRequest, ShutdownInfo, StopAnswer, StopRequest, SuspendAfterInfo,
    SuspendAfterRequest, SuspendAnswer, SuspendRequest, WakeAnswer,
};
pub use vm::{DiskInfo, GuestState, LogsAnswer, MemoryInfo, NetInfo, VmInfo, VmState, VsockInfo};
