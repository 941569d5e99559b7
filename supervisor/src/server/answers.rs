//! The answers to requests of the socket's clients and of servers in this process.

use std::path::Path;

use clade_api::http::{ApiError, Cancel, CancelOnDrop, THREAD_PATIENCE, expect_absolute, grace, on_a_thread};
use clade_api::{
    CheckpointInfo, CheckpointRequest, Client, ClientError, DaemonError, ForkAnswer, ForkRequest, KeepRequest,
    NameClaim, OpenRequest, ProblemKind, SavedSource, StopAnswer, StopRequest, SuspendAnswer, SuspendRequest,
    WorkerExit,
};

use crate::reidentify::PendingVms;
use crate::{Supervisor, suspend};

/// Maximum number of directories allowed for the parents of a snapshot.
const MAX_PARENT_DIRS: usize = 16;

/// How the VMs of a request are activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    /// They are as they were made.
    AsMade,
    /// It runs, and is made ready.
    Running,
    /// They are made paused. Each runs once it has a permit, and is made ready: together all of them
    /// would be late.
    Paused,
}

impl Activation {
    /// Returns how the VMs of a request are activated. If several are to be ready, the
    /// request becomes one for paused VMs.
    ///
    /// # Errors
    /// When they are to stay paused: then they are never ready.
    pub(super) fn of(request: &mut ForkRequest) -> Result<Self, ApiError> {
        if !request.ready {
            return Ok(Self::AsMade);
        }
        if request.paused {
            let text = "a VM that starts paused is not ready: nothing in it runs";
            return Err(ApiError::new(ProblemKind::BadRequest, text));
        }
        request.paused = request.count > 1;
        Ok(if request.paused { Self::Paused } else { Self::Running })
    }
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

    /// Runs work that makes VMs, as [`Self::work`] does. If the client goes even after the last check for
    /// that, the thread has the only result, and they end with it.
    pub(super) async fn making(
        &self,
        work: impl FnOnce(&Self, &Cancel) -> Result<ForkAnswer, DaemonError> + Send + 'static,
    ) -> Result<(ForkAnswer, PendingVms), ApiError> {
        self.work(move |supervisor, cancel| {
            let answer = work(supervisor, cancel)?;
            let pending = PendingVms::new(supervisor, &answer.children);
            Ok((answer, pending))
        })
        .await
    }

    /// Makes VMs, and activates them: those to be ready by permits.
    pub(super) async fn activated(
        &self,
        activation: Activation,
        making: impl Future<Output = Result<(ForkAnswer, PendingVms), ApiError>>,
    ) -> Result<ForkAnswer, ApiError> {
        if activation == Activation::AsMade {
            let (answer, pending) = making.await?;
            pending.leave();
            return Ok(answer);
        }
        let permit = self.0.ready_limiter.queue().await?;
        let (answer, pending) = making.await?;
        self.reidentify_all(pending, permit.begin(), activation == Activation::Paused).await?;
        Ok(answer)
    }

    pub(super) async fn answer_fork(&self, vm: String, mut request: ForkRequest) -> Result<ForkAnswer, ApiError> {
        let activation = Activation::of(&mut request)?;
        if request.ready {
            // Before the wait for a permit.
            self.record_of(&vm).await?;
        }
        let fork = async {
            // After that wait: a request that waits keeps no other from the VM's image.
            let permit = self.permit(&vm).await?;
            self.making(move |supervisor, cancel| supervisor.fork_vm(&vm, &request, permit, cancel)).await
        };
        self.activated(activation, fork).await
    }

    pub(super) async fn answer_fork_of_checkpoint(
        &self,
        checkpoint: String,
        mut request: ForkRequest,
    ) -> Result<ForkAnswer, ApiError> {
        let activation = Activation::of(&mut request)?;
        // Before the wait for a permit.
        self.checkpoints().info(&checkpoint)?;
        let fork = move |supervisor: &Self, cancel: &Cancel| supervisor.fork_checkpoint(&checkpoint, &request, cancel);
        self.activated(activation, self.making(fork)).await
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
        let (held, owned) = (self.clone(), name.to_owned());
        let known = match self.0.processes.of(name) {
            // Of a VM that an earlier supervisor has started.
            None => {
                let (held, name) = (self.clone(), name.to_owned());
                on_a_thread(THREAD_PATIENCE, move || held.known_process(&name)).await?
            }
            own => own,
        };
        if request.at_once && request.graceful_s.is_none() {
            // The signal comes first: threads that wait for the ends of others may all be taken.
            if let Some(killed) = self.kill_at_once(name)? {
                return Ok(on_a_thread(THREAD_PATIENCE, move || held.reap(&owned, killed)).await??);
            }
        }
        let client = Client::new(self.dir());
        let pid = known.as_ref().map(|(pid, _)| *pid);
        let stopped = tokio::select! {
            biased;
            stopped = client.stop_process(name, request, pid) => stopped,
            never = self.end_by_agent(name, request) => match never {},
        };
        match stopped {
            Ok((answer, left)) => {
                let left = LeftName(left);
                // Closing descriptors may free memory and disks.
                let killed = on_a_thread(THREAD_PATIENCE, move || held.stopped(known, left.take())).await?;
                Ok(killed.unwrap_or(answer))
            }
            Err(ClientError::Silent { .. }) => {
                Ok(on_a_thread(THREAD_PATIENCE, move || held.kill(&owned, known)).await??)
            }
            // A guest may refuse to end in order. A process that refuses to stop at all does not behave as ours do.
            Err(error) if request.graceful_s.is_none() => {
                let killed = on_a_thread(THREAD_PATIENCE, move || held.kill_unless_ended(&owned, known)).await??;
                killed.ok_or_else(|| error.into())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The name of a stopped VM. If nobody takes it, as there is no thread for that, it is left as its dead owner's, and
/// cleared up after later.
#[derive(Debug)]
struct LeftName(Option<(NameClaim, WorkerExit)>);

impl LeftName {
    fn take(mut self) -> Option<(NameClaim, WorkerExit)> {
        self.0.take()
    }
}

impl Drop for LeftName {
    fn drop(&mut self) {
        if let Some((claim, exit)) = self.0.take() {
            claim.leave_as_found(exit.pid);
        }
    }
}

#[cfg(test)]
mod tests {
    use clade_api::RuntimeDir;

    use super::*;

    #[test]
    fn a_name_that_nobody_clears_up_after_stays_its_dead_owners() {
        let path = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(path.path()).unwrap();
        let left = || Some((NameClaim::new(&dir, "web").unwrap(), WorkerExit { pid: 7, signal: None, code: None }));
        let record = clade_api::vm_record_name("web");
        NameClaim::new(&dir, "web").unwrap().leave();
        dir.write(&record, b"its files").unwrap();
        drop(LeftName(left()));
        assert!(dir.read(&record).unwrap().is_some(), "what is to be removed is still known");
        drop(LeftName(left()).take());
        assert!(dir.read(&record).unwrap().is_none());
    }

    #[test]
    fn several_vms_to_be_ready_are_made_paused() {
        for (count, ready, paused, activation) in [
            (1, false, true, Some((Activation::AsMade, true))),
            (3, false, false, Some((Activation::AsMade, false))),
            (1, true, false, Some((Activation::Running, false))),
            (2, true, false, Some((Activation::Paused, true))),
            (1, true, true, None),
        ] {
            let mut request = ForkRequest { count, ready, paused, ..ForkRequest::default() };
            let of = Activation::of(&mut request).map(|activation| (activation, request.paused));
            assert_eq!(of.map_err(|error| error.kind), activation.ok_or(ProblemKind::BadRequest), "{count} {ready}");
        }
    }
}
