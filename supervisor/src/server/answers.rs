//! The answers to requests of the socket's clients and of servers in this process.

use std::path::Path;

use clade_api::http::{ApiError, Cancel, CancelOnDrop, THREAD_PATIENCE, expect_absolute, grace, on_a_thread};
use clade_api::{
    CheckpointInfo, CheckpointRequest, Client, ClientError, DaemonError, ForkAnswer, ForkRequest, KeepRequest,
    OpenRequest, ProblemKind, SavedSource, StopAnswer, StopRequest, SuspendAnswer, SuspendRequest,
};

use crate::vm_record::VmRecord;
use crate::{Supervisor, suspend};

/// Maximum number of directories allowed for the parents of a snapshot.
const MAX_PARENT_DIRS: usize = 16;

/// Returns whether to make the VMs of a request ready. Those that start paused cannot be.
pub(super) fn may_be_ready(request: &ForkRequest) -> Result<bool, ApiError> {
    if request.ready && request.paused {
        return Err(ApiError::new(ProblemKind::BadRequest, "a VM that starts paused is not ready: nothing in it runs"));
    }
    Ok(request.ready)
}

pub(super) fn expect_paths(saved: &SavedSource) -> Result<(), ApiError> {
    if saved.parents.len() > MAX_PARENT_DIRS {
        let what = format!("{} directories of parents: at most {MAX_PARENT_DIRS}", saved.parents.len());
        return Err(ApiError::new(ProblemKind::BadRequest, what));
    }
    std::iter::once(&saved.dir).chain(&saved.overlays).chain(&saved.parents).try_for_each(|path| expect_absolute(path))
}

impl Supervisor {
    /// Runs blocking work off the async threads. The work is cancelled when the result is dropped.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self, &Cancel) -> Result<T, DaemonError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (supervisor, cancel) = (self.clone(), Cancel::default());
        let _cancel_on_drop = CancelOnDrop(cancel.clone());
        Ok(on_a_thread(THREAD_PATIENCE, move || work(&supervisor, &cancel)).await??)
    }

    /// Makes VMs by `work`, and activates them: if `ready`, with a permit, and once they are.
    pub(super) async fn activated(
        &self,
        ready: bool,
        work: impl Future<Output = Result<ForkAnswer, ApiError>>,
    ) -> Result<ForkAnswer, ApiError> {
        if !ready {
            return work.await;
        }
        let permit = self.0.ready_limiter.queue().await?;
        let answer = work.await?;
        self.reidentify_all(&answer.children, permit.begin()).await?;
        Ok(answer)
    }

    pub(super) async fn answer_fork(&self, vm: String, request: ForkRequest) -> Result<ForkAnswer, ApiError> {
        let ready = may_be_ready(&request)?;
        if ready {
            // Before the wait for a permit.
            let (supervisor, name) = (self.clone(), vm.clone());
            on_a_thread(THREAD_PATIENCE, move || VmRecord::expect(&supervisor.0.dir, &name)).await??;
        }
        let fork = async {
            // After that wait: a request that waits keeps no other from the VM's image.
            let permit = self.permit(&vm).await?;
            self.work(move |supervisor, cancel| supervisor.fork_vm(&vm, &request, permit, cancel)).await
        };
        self.activated(ready, fork).await
    }

    pub(super) async fn answer_fork_of_checkpoint(
        &self,
        checkpoint: String,
        request: ForkRequest,
    ) -> Result<ForkAnswer, ApiError> {
        let ready = may_be_ready(&request)?;
        // Before the wait for a permit.
        self.checkpoints().info(&checkpoint)?;
        let fork = move |supervisor: &Self, cancel: &Cancel| supervisor.fork_checkpoint(&checkpoint, &request, cancel);
        self.activated(ready, self.work(fork)).await
    }

    pub(super) async fn answer_checkpoint(
        &self,
        vm: String,
        request: CheckpointRequest,
    ) -> Result<CheckpointInfo, ApiError> {
        let permit = self.permit(&vm).await?;
        self.work(move |supervisor, cancel| supervisor.checkpoint(&vm, &request, permit, cancel)).await
    }

    pub(super) async fn answer_open(&self, request: OpenRequest) -> Result<CheckpointInfo, ApiError> {
        expect_paths(&request.saved)?;
        self.work(move |supervisor, cancel| supervisor.open_checkpoint(&request, cancel)).await
    }

    pub(super) async fn answer_keep(
        &self,
        checkpoint: String,
        request: KeepRequest,
    ) -> Result<CheckpointInfo, ApiError> {
        self.work(move |supervisor, cancel| supervisor.keep_checkpoint(&checkpoint, request.full, cancel)).await
    }

    pub(super) async fn answer_remove(&self, checkpoint: String) -> Result<CheckpointInfo, ApiError> {
        // Closing descriptors may free memory and disks.
        self.work(move |supervisor, _| supervisor.remove_checkpoint(&checkpoint)).await
    }

    pub(super) async fn answer_suspend(&self, vm: String, request: SuspendRequest) -> Result<SuspendAnswer, ApiError> {
        let dir = request.dir.unwrap_or_else(|| Path::new(suspend::DIR).to_owned());
        expect_absolute(&dir)?;
        self.work(move |supervisor, cancel| supervisor.suspend(&vm, &dir, cancel)).await
    }

    /// Stops the VM called `name`.
    pub(crate) async fn answer_stop(&self, name: &str, request: StopRequest) -> Result<StopAnswer, ApiError> {
        // Before the request to its process, which has as much time.
        grace(request)?;
        // Not from the process itself.
        let pid = self.pid_of(name);
        let (held, owned) = (self.clone(), name.to_owned());
        if request.at_once && request.graceful_s.is_none() {
            // The signal comes first: threads that wait for the ends of others may all be taken.
            if let Some(killed) = self.kill_at_once(name)? {
                return Ok(on_a_thread(THREAD_PATIENCE, move || held.reap(&owned, killed)).await??);
            }
        }
        match Client::new(self.dir()).stop_process(name, request, pid).await {
            Ok((answer, left)) => {
                // Closing descriptors may free memory and disks.
                on_a_thread(THREAD_PATIENCE, move || held.stopped(pid, left)).await?;
                Ok(answer)
            }
            Err(ClientError::Silent { .. }) => Ok(on_a_thread(THREAD_PATIENCE, move || held.kill(&owned)).await??),
            Err(error) => Err(error.into()),
        }
    }
}
