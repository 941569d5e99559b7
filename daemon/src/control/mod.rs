//! The control plane: HTTP over Unix sockets. One socket per VM for now; the paths name the VM, so
//! that a daemon can serve them for all.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/vms` | | all VMs of the process: `[VmInfo]` |
//! | `GET /v1/vms/{name}` | | `VmInfo` |
//! | `POST /v1/vms/{name}/fork` | `ForkRequest` | `ForkAnswer` |
//! | `GET /v1/vms/{name}/balloon` | | `BalloonInfo` |
//! | `POST /v1/vms/{name}/balloon` | `BalloonRequest` | `BalloonInfo` |
//! | `POST /v1/vms/{name}/snapshot` | `SnapshotRequest` | `SnapshotAnswer`, when all is on the disk |
//! | `GET /v1/vms/{name}/snapshot` | | `SnapshotProgress` |
//! | `DELETE /v1/vms/{name}/snapshot` | | `SnapshotProgress`; the one that is being made ends with an error |
//! | `POST /v1/vms/{name}/working-set` | | `WorkingSetAnswer`: what it touched is written into its snapshot |
//! | `GET /v1/vms/{name}/logs` | | `LogsAnswer` |
//! | `POST /v1/vms/{name}/pause`, `resume` | | `VmInfo` |
//! | `POST /v1/vms/{name}/stop` | | `VmInfo`, when its name, interfaces and sockets are free |
//!
//! Errors are `{"error": "..."}`: 400 for a request that cannot be right, 404 for no such VM, 408
//! for a body that does not come, 409 for a VM in the wrong state or a name taken, 413 for a body
//! above 64 KiB, 507 for no room on the host, 500 for the rest.

mod api;
mod client;
mod listen;
mod server;

pub use api::{
    BalloonInfo, BalloonRequest, DiskInfo, ForkAnswer, ForkRequest, GuestMemory, IdentityInfo, LogsAnswer, MemoryInfo,
    NetInfo, ResetAnswer, SnapshotAnswer, SnapshotProgress, SnapshotRequest, VmInfo, VmState, VsockInfo,
    WorkingSetAnswer,
};
pub use client::{Client, ClientError, ListedVms};
pub(crate) use listen::Acceptor;
pub use listen::serve_fleet;
