//! The supervisor's requests as a trait: for servers in the supervisor's own process, and for clients in
//! others.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{
    CheckpointInfo, CheckpointRequest, Client, ClientError, ForkAnswer, ForkRequest, LogsAnswer, NetworkRequest,
    OpenRequest, StopAnswer, StopRequest, SuspendAnswer, SuspendRequest, TtlInfo, TtlRequest, VmInfo,
};

/// A request in progress. Dropping it cancels the request, as the end of a client's connection does.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, ClientError>> + Send + 'a>>;

/// The VMs and checkpoints of a supervisor.
pub trait SupervisorApi: Debug + Send + Sync {
    /// Returns the names of all VMs. Some may have died.
    fn vm_names(&self) -> Pending<'_, Vec<String>>;

    /// Shows a VM.
    fn vm<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo>;

    /// Returns the end of a VM's console output.
    fn logs<'a>(&'a self, vm: &'a str) -> Pending<'a, LogsAnswer>;

    /// Forks a VM.
    fn fork_vm<'a>(&'a self, vm: &'a str, request: ForkRequest) -> Pending<'a, ForkAnswer>;

    /// Pauses a VM.
    fn pause<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo>;

    /// Resumes a VM.
    fn resume<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo>;

    /// Suspends a VM.
    fn suspend<'a>(&'a self, vm: &'a str, request: SuspendRequest) -> Pending<'a, SuspendAnswer>;

    /// Stops a VM for good, also while the supervisor ends.
    fn stop<'a>(&'a self, vm: &'a str, request: StopRequest) -> Pending<'a, StopAnswer>;

    /// Opens or closes a VM's network, or sets its egress rules.
    fn set_network<'a>(&'a self, vm: &'a str, request: NetworkRequest) -> Pending<'a, VmInfo>;

    /// Sets the time after which a VM's process ends it.
    fn set_ttl<'a>(&'a self, vm: &'a str, request: TtlRequest) -> Pending<'a, TtlInfo>;

    /// Lets a VM run without such a time.
    fn remove_ttl<'a>(&'a self, vm: &'a str) -> Pending<'a, TtlInfo>;

    /// Lists the checkpoints.
    fn checkpoints(&self) -> Pending<'_, Vec<CheckpointInfo>>;

    /// Shows a checkpoint.
    fn checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo>;

    /// Takes a checkpoint of a VM.
    fn take_checkpoint<'a>(&'a self, vm: &'a str, request: CheckpointRequest) -> Pending<'a, CheckpointInfo>;

    /// Opens a snapshot as a checkpoint.
    fn open_checkpoint(&self, request: OpenRequest) -> Pending<'_, CheckpointInfo>;

    /// Writes a checkpoint to the disk, for later supervisors.
    fn keep_checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo>;

    /// Removes a checkpoint.
    fn remove_checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo>;

    /// Forks a checkpoint.
    fn fork_checkpoint<'a>(&'a self, checkpoint: &'a str, request: ForkRequest) -> Pending<'a, ForkAnswer>;
}

impl Client {
    fn pending_vm<'a, T: DeserializeOwned>(
        &'a self,
        method: Method,
        vm: &'a str,
        action: &'static str,
        body: Option<impl Serialize + Send + Sync + 'a>,
    ) -> Pending<'a, T> {
        Box::pin(async move { self.of_vm(method, vm, action, body.as_ref()).await })
    }

    fn pending_checkpoint<'a, T: DeserializeOwned>(
        &'a self,
        method: Method,
        checkpoint: &'a str,
        action: &'static str,
        body: Option<impl Serialize + Send + Sync + 'a>,
    ) -> Pending<'a, T> {
        Box::pin(async move { self.of_checkpoint(method, checkpoint, action, body.as_ref()).await })
    }
}

/// The supervisor of a runtime directory, or behind a port.
impl SupervisorApi for Client {
    fn vm_names(&self) -> Pending<'_, Vec<String>> {
        Box::pin(self.all_names())
    }

    fn vm<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo> {
        self.pending_vm(Method::GET, vm, "", None::<()>)
    }

    fn logs<'a>(&'a self, vm: &'a str) -> Pending<'a, LogsAnswer> {
        self.pending_vm(Method::GET, vm, "/logs", None::<()>)
    }

    fn fork_vm<'a>(&'a self, vm: &'a str, request: ForkRequest) -> Pending<'a, ForkAnswer> {
        self.pending_vm(Method::POST, vm, "/fork", Some(request))
    }

    fn pause<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo> {
        self.pending_vm(Method::POST, vm, "/pause", None::<()>)
    }

    fn resume<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo> {
        self.pending_vm(Method::POST, vm, "/resume", None::<()>)
    }

    fn suspend<'a>(&'a self, vm: &'a str, request: SuspendRequest) -> Pending<'a, SuspendAnswer> {
        self.pending_vm(Method::POST, vm, "/suspend", Some(request))
    }

    fn stop<'a>(&'a self, vm: &'a str, request: StopRequest) -> Pending<'a, StopAnswer> {
        Box::pin(Self::stop(self, vm, request))
    }

    fn set_network<'a>(&'a self, vm: &'a str, request: NetworkRequest) -> Pending<'a, VmInfo> {
        self.pending_vm(Method::POST, vm, "/network", Some(request))
    }

    fn set_ttl<'a>(&'a self, vm: &'a str, request: TtlRequest) -> Pending<'a, TtlInfo> {
        self.pending_vm(Method::PUT, vm, "/ttl", Some(request))
    }

    fn remove_ttl<'a>(&'a self, vm: &'a str) -> Pending<'a, TtlInfo> {
        self.pending_vm(Method::DELETE, vm, "/ttl", None::<()>)
    }

    fn checkpoints(&self) -> Pending<'_, Vec<CheckpointInfo>> {
        Box::pin(self.supervisor(Method::GET, "/v1/checkpoints", None::<&()>))
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo> {
        self.pending_checkpoint(Method::GET, checkpoint, "", None::<()>)
    }

    fn take_checkpoint<'a>(&'a self, vm: &'a str, request: CheckpointRequest) -> Pending<'a, CheckpointInfo> {
        self.pending_vm(Method::POST, vm, "/checkpoint", Some(request))
    }

    fn open_checkpoint(&self, request: OpenRequest) -> Pending<'_, CheckpointInfo> {
        Box::pin(async move { self.supervisor(Method::POST, "/v1/checkpoints", Some(&request)).await })
    }

    fn keep_checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo> {
        self.pending_checkpoint(Method::POST, checkpoint, "/keep", None::<()>)
    }

    fn remove_checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo> {
        self.pending_checkpoint(Method::DELETE, checkpoint, "", None::<()>)
    }

    fn fork_checkpoint<'a>(&'a self, checkpoint: &'a str, request: ForkRequest) -> Pending<'a, ForkAnswer> {
        self.pending_checkpoint(Method::POST, checkpoint, "/fork", Some(request))
    }
}
