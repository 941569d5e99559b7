//! The end of a VM, as a client sees it.

use std::time::{Duration, Instant};

use hyper::Method;
use tokio::time::sleep;

use super::{CONNECT_POLL, Client, ClientError};
use crate::{DaemonError, NameClaim, RuntimeDir, StopAnswer, StopRequest, WorkerExit, check_name, socket_path};

/// Time that the process of a stopped VM may keep its name, and the interval of the checks.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

const RELEASE_POLL: Duration = Duration::from_millis(2);

/// Time limit for the end of a supervisor that no longer answers.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(5);

/// Time limit for a VM's process to stop it, beside its guest's grace time: longer than the process
/// itself waits for the VM's resources.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

impl Client {
    /// Has the supervisor stop a VM. Returns when its name is free.
    ///
    /// # Errors
    /// As for [`Self::supervisor`].
    pub async fn stop(&self, name: &str, request: StopRequest) -> Result<StopAnswer, ClientError> {
        check_name(name)?;
        let deadline = Instant::now() + TAKEOVER_TIMEOUT;
        loop {
            match self.supervisor(Method::POST, &format!("/v1/vms/{name}/stop"), Some(&request)).await {
                // The process ended without an answer. The next may answer; stopping a VM twice is
                // harmless.
                Err(error) if !self.is_remote() && error.is_lost() && Instant::now() < deadline => {
                    sleep(CONNECT_POLL).await;
                }
                answer => return answer,
            }
        }
    }

    /// Stops a VM by its process, which is `pid` if that is known: what the process says is its own
    /// word. Returns the claim to files that the process may not remove, if it has left any.
    ///
    /// # Errors
    /// As for [`Self::stop`].
    pub async fn stop_process(
        &self,
        name: &str,
        request: StopRequest,
        pid: Option<u32>,
    ) -> Result<(StopAnswer, Option<(NameClaim, WorkerExit)>), ClientError> {
        let gone = |error| match error {
            // Another client has stopped it, and its process has ended before the answer.
            ClientError::Http(_) => ClientError::NoSuchVm { name: name.to_owned(), path: socket_path(&self.dir, name) },
            other => other,
        };
        // The process refuses invalid times.
        let grace = Duration::try_from_secs_f64(request.graceful_s.unwrap_or(0.0)).unwrap_or_default();
        let limit = grace.saturating_add(STOP_TIMEOUT);
        let answer = self.request_within(limit, Method::POST, name, "/stop", Some(&request)).await;
        let answer: StopAnswer = answer.map_err(gone)?;
        let dir = RuntimeDir::open(&self.dir)?;
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        let pid = pid.unwrap_or(answer.vm.pid);
        let exit = WorkerExit { pid, signal: None, code: Some(0) };
        loop {
            match NameClaim::of_a_dead(&dir, name, pid) {
                Ok(claim) => return Ok((answer, claim.map(|claim| (claim, exit)))),
                Err(DaemonError::Taken { .. }) if Instant::now() < deadline => sleep(RELEASE_POLL).await,
                // The VM's process has left the name, which another VM gets: its start takes this long.
                Err(DaemonError::Taken { name }) if NameClaim::owner(&dir, &name)? != Some(pid) => {
                    return Ok((answer, None));
                }
                Err(DaemonError::Taken { name }) => {
                    return Err(DaemonError::Unreleased { name, seconds: RELEASE_TIMEOUT.as_secs() }.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
