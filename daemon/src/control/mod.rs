//! The control plane: HTTP over Unix sockets, one per VM. Paths name the VM, so that the
//! supervisor's socket takes the same requests for all of them; its own are in
//! `supervisor/server.rs`.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/vms` | | all VMs of the process: `[VmInfo]` |
//! | `GET /v1/vms/{name}` | | `VmInfo` |
//! | `GET /v1/vms/{name}/stats` | | `VmStats` |
//! | `GET /v1/vms/{name}/pages` | | `PagesAnswer`: the kind of each page |
//! | `GET /v1/vms/{name}/page-map` | | the same in few bytes: see `page_map` |
//! | `GET /v1/vms/{name}/console` | | its console's output, without end |
//! | `POST /v1/vms/{name}/console` | bytes | `ConsoleTyped` |
//! | `GET /v1/vms/{name}/memory` | | bytes of the guest's memory |
//! | `PUT /v1/vms/{name}/memory` | bytes | `MemoryWritten` |
//! | `GET /v1/vms/{name}/ttl`, `DELETE` | | `TtlInfo`: when it will be stopped |
//! | `PUT /v1/vms/{name}/ttl` | `TtlRequest` | `TtlInfo` |
//! | `POST /v1/vms/{name}/fork` | `ForkRequest` | `ForkAnswer` |
//! | `POST /v1/vms/{name}/reset` | | `ResetAnswer` |
//! | `POST /v1/vms/{name}/rollback` | `RollbackRequest` | `ResetAnswer` |
//! | `GET /v1/vms/{name}/balloon` | | `BalloonInfo` |
//! | `POST /v1/vms/{name}/balloon` | `BalloonRequest` | `BalloonInfo` |
//! | `POST /v1/vms/{name}/network` | `NetworkRequest` | `VmInfo` |
//! | `POST /v1/vms/{name}/snapshot` | `SnapshotRequest` | `SnapshotAnswer`, when it is durable |
//! | `GET /v1/vms/{name}/snapshot` | | `SnapshotProgress` |
//! | `DELETE /v1/vms/{name}/snapshot` | | `SnapshotProgress`; cancels the snapshot |
//! | `POST /v1/vms/{name}/working-set` | | `WorkingSetAnswer`; recorded in its snapshot |
//! | `GET /v1/vms/{name}/logs` | | `LogsAnswer` |
//! | `POST /v1/vms/{name}/pause`, `resume` | | `VmInfo` |
//! | `POST /v1/vms/{name}/suspend` | `SuspendRequest` or none | `SuspendAnswer` |
//! | `POST /v1/vms/{name}/wake` | | `WakeAnswer` |
//! | `POST /v1/vms/{name}/stop` | `StopRequest` or none | `StopAnswer`, when its name, interfaces and sockets are free |
//!
//! Errors are problem details: see `problem`.

mod api;
mod client;
mod console;
pub(crate) mod exposition;
pub(crate) mod frames;
mod gather;
mod guesses;
mod listen;
mod memory;
mod object;
mod optional;
mod page_map;
mod pages;
mod problem;
mod ram;
pub(crate) mod schema;
mod server;
pub(crate) mod session;
mod stall;
mod token;
mod ttl;

pub use api::{
    AheadInfo, BalloonInfo, BalloonRequest, BootRequest, CheckpointInfo, CheckpointRequest, DetachedInfo, DiskInfo,
    ErasedInfo, ForkAnswer, ForkRequest, ForkedInfo, GuestMemory, GuestState, IdentityInfo, KeepRequest, LogsAnswer,
    MemoryInfo, MergingVm, NetInfo, NetworkRequest, OpenRequest, PrepareRequest, Prepared, ReadyAnswer, ResetAnswer,
    RestoreRequest, RollbackRequest, SavedSource, ShutdownInfo, SnapshotAnswer, SnapshotProgress, SnapshotRequest,
    StopAnswer, StopRequest, SupervisorInfo, SupervisorKept, SuspendAfterInfo, SuspendAfterRequest, SuspendAnswer,
    SuspendRequest, TouchedAnswer, TouchedRun, VmInfo, VmLimits, VmState, VsockInfo, WakeAnswer, WorkingSetAnswer,
};
pub use client::{Client, ClientError, ListedVms};
pub use console::ConsoleTyped;
pub use gather::Gathered;
pub(crate) use listen::ClientProcess;
pub(crate) use listen::{ACCEPT_BACKOFF, Acceptor, TcpAcceptor, behind_gate, serve_http, serve_vm, with_bodies};
pub use memory::{
    CopyStats, HistogramInfo, KindCounts, LayerHome, LayerInfo, MemoryStats, PauseStats, PinStats, ProcessStats,
    VmStats, pages_kib,
};
pub(crate) use optional::Optional;
pub use pages::{CellInfo, MAX_CELLS, PagesAnswer, RunInfo, RunKind};
pub(crate) use problem::{ApiError, PROBLEM_TYPE};
pub use problem::{Problem, ProblemKind};
pub use ram::{MAX_MEMORY, MemoryWritten};
pub(crate) use server::{
    Answer, CancelOnDrop, THREAD_PATIENCE, described, expect_absolute, fallback, grace, not_allowed, on_a_thread,
    warm_up,
};
pub(crate) use session::SessionGate;
pub use session::{SessionEnded, SessionInfo};
pub use token::{Token, TokenError};
pub(crate) use token::{hex, is_for_this_host, random_hex};
pub use ttl::{TtlInfo, TtlRequest};
