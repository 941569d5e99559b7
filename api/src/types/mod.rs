//! The requests and answers of the HTTP API.

mod boot;
mod checkpoint;
mod fork;
mod guest_memory;
mod lifecycle;
mod pages;
#[cfg(test)]
mod schema_tests;
mod stats;
mod vm;

pub use boot::{
    BootRequest, OpenRequest, RestoreRequest, SavedSource, SnapshotAnswer, SnapshotProgress, SnapshotRequest, VmLimits,
};
pub use checkpoint::{
    AheadInfo, CheckpointInfo, CheckpointRequest, DetachedInfo, ForkedInfo, KeepRequest, PrepareRequest, Prepared,
    SupervisorInfo, SupervisorKept,
};
pub use fork::{ErasedInfo, ForkAnswer, ForkRequest, IdentityInfo, ReadyAnswer};
pub use guest_memory::{
    BalloonInfo, BalloonRequest, GuestMemory, MAX_MEMORY, MEDIA_TYPE, MemoryWritten, TouchedAnswer, TouchedRun,
    WorkingSetAnswer,
};
pub use lifecycle::{
    MAX_GRACE, MergingVm, NetworkRequest, ResetAnswer, ResetRequest, RollbackRequest, ShutdownInfo, StopAnswer,
    StopRequest, SuspendAfterInfo, SuspendAfterRequest, SuspendAnswer, SuspendRequest, TtlInfo, TtlRequest, WakeAnswer,
};
pub use pages::{CellInfo, MAX_CELLS, PagesAnswer, RunInfo, RunKind};
pub use stats::{
    CopyStats, HistogramInfo, KindCounts, LayerHome, LayerInfo, MemoryStats, PauseStats, PinStats, ProcessStats,
    VmStats, pages_kib,
};
pub use vm::{
    ConsoleTyped, DiskInfo, EgressInfo, GuestState, LogsAnswer, MemoryInfo, NetInfo, VmInfo, VmState, VsockInfo,
};
