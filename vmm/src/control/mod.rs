//! The control plane: HTTP over Unix sockets. One socket per VM for now; the paths name the VM, so that a daemon can serve
//! them for all.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/vms` | | all VMs of the process: `[VmInfo]` |
//! | `GET /v1/vms/{name}` | | `VmInfo` |
//! | `POST /v1/vms/{name}/fork` | `ForkRequest` | `ForkAnswer` |
//! | `POST /v1/vms/{name}/pause`, `resume`, `stop` | | `VmInfo` |
//!
//! Errors are `{"error": "..."}`: 400 for a request that cannot be right, 404 for no such VM, 409 for a VM in the wrong state or a name
//! taken, 500 for the rest.

mod api;
mod client;
mod server;

pub use api::{ForkAnswer, ForkRequest, MemoryInfo, VmInfo, VmState};
pub use client::{Client, ClientError};
pub use server::serve_fleet;
