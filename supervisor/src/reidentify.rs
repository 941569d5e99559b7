//! Identity of guests that are in a new VM: children of a fork, restored VMs, reset VMs. The agent
//! in each drops its parent's state, and reports when it is ready.
//!
//! Children requested as *ready* are activated once all are ready, or none is (I13).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clade_agent_client::proto::api::Generation;
use clade_agent_client::proto::{Base64, NOTICE_PORT, PORT};
use clade_agent_client::{Client as Agent, ClientError, Endpoint};
use clade_vmm::vm::VmConfig;
use clade_worker::host_limits::has_free_processor;
use hyper::Method;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::Supervisor;
use super::ready_limiter::ReadyPermit;
use super::vm_record::VmRecord;
use clade_api::http::{ApiError, Change, THREAD_PATIENCE, on_a_thread};
use clade_api::{Client, DaemonError, ProblemKind, ReadyAnswer, StopRequest, VmInfo, VmState};

/// Agents report to the port that the device answers.
const _: () = assert!(NOTICE_PORT == clade_devices::virtio::vsock::NOTICE_PORT);

/// Most agents notified at a time.
const MAX_TOLD: usize = 16;
/// Most VMs stopped at a time.
const MAX_STOPPED: usize = 16;
/// Bytes of entropy for each guest's random number generator.
const ENTROPY: usize = 64;
/// Time limit until an agent accepts a connection. It first has to notice that its parent's
/// connections were reset.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Additional time for each VM made by the same request, and its maximum: all begin at once, and
/// each has work to do then. On a busy host one of ten guests whose kernels are interpreted took
/// more than 39 s.
const CONNECT_TIMEOUT_EACH: Duration = Duration::from_secs(5);
const MAX_TIMEOUT: Duration = Duration::from_secs(300);
/// Time limit of one attempt. Every abandoned attempt is more work for a slow guest.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit from then on until the agent is ready, and the additional time for each VM made by
/// the same request: on a busy host ten guests whose kernels are interpreted took more than a
/// minute.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const ANSWER_TIMEOUT_EACH: Duration = Duration::from_secs(10);
/// Part of that time in which no hook runs, so that the agent's answer arrives and names the hook that
/// was slow.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);
/// Interval of the checks for a free processor.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of the attempts.
const RETRY: Duration = Duration::from_millis(20);

/// The part of the time of a graceful stop that the agent gives to programs.
const AGENTS_PART: f64 = 0.75;

/// The time limits of one agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TimeLimits {
    /// For a connection.
    connecting: Duration,
    /// From then on, until the answer.
    answering: Duration,
    /// For all hooks, within that.
    hooks: Duration,
}

impl TimeLimits {
    /// The limits if `count` VMs are made by one request.
    fn of(count: usize) -> Self {
        let others = u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX);
        let with_others =
            |own: Duration, each: Duration| own.saturating_add(each.saturating_mul(others)).min(MAX_TIMEOUT);
        let answering = with_others(ANSWER_TIMEOUT, ANSWER_TIMEOUT_EACH);
        let hooks = answering.saturating_sub(ANSWER_MARGIN);
        Self { connecting: with_others(CONNECT_TIMEOUT, CONNECT_TIMEOUT_EACH), answering, hooks }
    }
}

/// The time that a guest has left for a connection or an answer. On a host whose processors are all busy it does not
/// pass, up to [`MAX_TIMEOUT`] in all: the guest may not have had its share.
struct TimeLeft {
    begun: Instant,
    looked: Instant,
    left: Duration,
}

impl TimeLeft {
    fn of(limit: Duration) -> Self {
        let now = Instant::now();
        Self { begun: now, looked: now, left: limit }
    }

    /// Counts the time since the last call, unless the host is busy. Returns whether any is left.
    fn is_left(&mut self, is_busy: bool) -> bool {
        let now = Instant::now();
        if !is_busy {
            self.left = self.left.saturating_sub(now - self.looked);
        }
        self.looked = now;
        !self.left.is_zero() && now - self.begun < MAX_TIMEOUT
    }
}

/// Returns after this time, which passes as [`TimeLeft`] does.
async fn passed(limit: Duration) {
    let mut left = TimeLeft::of(limit);
    while left.is_left(!has_free_processor()) {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Returns how many agents of new VMs have a permit at a time: their guests work then. More of them than
/// processors would all be late on hosts where their kernels are interpreted.
pub(super) fn told_at_a_time() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).saturating_mul(2).min(MAX_TOLD)
}

fn not_ready(name: &str, why: &str) -> ApiError {
    ApiError::new(ProblemKind::NotReady, format!("{name}: {why}"))
}

/// Checks that the guests of VMs of `config` have an agent that can be reached.
pub(super) fn expect_reachable(name: &str, config: &VmConfig) -> Result<(), DaemonError> {
    if config.vsock.is_some() {
        return Ok(());
    }
    let text = format!("{name} has no vsock device to reach its agent by");
    Err(DaemonError::Refused { kind: ProblemKind::NoDevice, text })
}

/// A new VM and its process: the name may be another VM's once this one has ended.
#[derive(Clone, Debug)]
struct NewVm {
    name: String,
    pid: Option<u32>,
}

/// New VMs that no answer has named yet. They end when it is dropped: the client has gone. The end of the
/// supervisor waits for that.
pub(super) struct PendingVms {
    supervisor: Supervisor,
    vms: Vec<NewVm>,
    _pending: Change,
}

impl PendingVms {
    /// To be called by the work that has made them, whose end the end of the supervisor waits for first.
    pub(super) fn new(supervisor: &Supervisor, names: &[String]) -> Self {
        let pids = supervisor.0.processes.pids_of(names);
        let vms = names.iter().map(|name| NewVm { name: name.clone(), pid: pids.get(name).copied() });
        Self { supervisor: supervisor.clone(), vms: vms.collect(), _pending: supervisor.0.pending_vms.begin() }
    }

    /// Leaves the VMs to the client.
    pub(super) fn leave(mut self) {
        self.vms.clear();
    }

    /// Stops the VMs. That runs to its end, even if the client goes.
    pub(super) async fn stop(mut self) {
        if let Some(stopping) = self.begin_to_stop() {
            let _ = stopping.await;
        }
    }

    fn begin_to_stop(&mut self) -> Option<JoinHandle<()>> {
        if self.vms.is_empty() {
            return None;
        }
        let (supervisor, vms) = (self.supervisor.clone(), std::mem::take(&mut self.vms));
        let pending = supervisor.0.pending_vms.begin();
        Some(self.supervisor.0.runtime.spawn(async move {
            let _pending = pending;
            stop_all(&supervisor, vms).await;
        }))
    }
}

impl Drop for PendingVms {
    fn drop(&mut self) {
        drop(self.begin_to_stop());
    }
}

async fn stop_all(supervisor: &Supervisor, vms: Vec<NewVm>) {
    let (mut stopping, mut waiting) = (JoinSet::new(), vms.into_iter());
    loop {
        // A process that does not answer keeps few others waiting: the supervisor may end soon.
        while stopping.len() < MAX_STOPPED
            && let Some(vm) = waiting.next()
        {
            let supervisor = supervisor.clone();
            stopping.spawn(async move {
                // One that has ended by itself is no longer there, or another has its name.
                if !supervisor.is_there(&vm) {
                    return;
                }
                let request = StopRequest { at_once: true, ..StopRequest::default() };
                if let Err(error) = supervisor.answer_stop(&vm.name, request).await {
                    tracing::warn!(?error, vm.name, "a VM that is not ready does not stop");
                }
            });
        }
        if stopping.join_next().await.is_none() {
            break;
        }
    }
}

impl Supervisor {
    /// Has the agent in a VM renew its identity.
    ///
    /// # Errors
    /// When there is no such VM, no agent answers in it, or it could not do all of it.
    pub(super) async fn reidentify(&self, name: &str) -> Result<ReadyAnswer, ApiError> {
        self.reidentify_among(name, 1).await
    }

    /// Refuses a paused VM, whose agent cannot answer.
    ///
    /// # Errors
    /// When the VM is paused.
    pub(super) async fn expect_running(&self, name: &str) -> Result<(), ApiError> {
        let client = Client::new(self.dir());
        let asked = client.request::<VmInfo>(Method::GET, name, "", None::<&()>);
        match tokio::time::timeout(ATTEMPT_TIMEOUT, asked).await {
            Ok(Ok(VmInfo { state: VmState::Paused, .. } | VmInfo { paused: true, .. })) => {
                Err(ApiError::new(ProblemKind::WrongState, format!("{name} is paused: its agent cannot answer")))
            }
            // A VM that has ended, or does not answer, is noticed by the next step.
            _ => Ok(()),
        }
    }

    fn is_there(&self, vm: &NewVm) -> bool {
        vm.pid.is_some() && self.pid_of(&vm.name) == vm.pid
    }

    /// Has the agent in a guest, if there is one, end the guest in order within the time of `request`: a kernel
    /// may take no notice of the power button. Awaits nothing else: the VM's process notices the end.
    pub(crate) async fn end_by_agent(&self, name: &str, request: StopRequest) -> Infallible {
        let grace = request.graceful_s.and_then(|grace| Duration::try_from_secs_f64(grace).ok());
        if let Some(grace) = grace
            && let Ok(vm_record) = self.record_of(name).await
            // Without a power button the request is refused.
            && vm_record.template.config.has_acpi()
            && let Some(vsock) = vm_record.identity.vsock
        {
            let socket = vsock.socket;
            let agent = Agent::new(Endpoint::Vsock { socket, port: PORT }).with_patience(ATTEMPT_TIMEOUT, MAX_TIMEOUT);
            // The rest is for its files, and its kernel.
            if let Err(error) = agent.shut_down(Some(grace.mul_f64(AGENTS_PART))).await {
                tracing::debug!(%error, name, "no agent ends the guest");
            }
        }
        std::future::pending().await
    }

    /// Reads the record of a VM on a thread for files.
    pub(crate) async fn record_of(&self, name: &str) -> Result<VmRecord, ApiError> {
        let (supervisor, vm) = (self.clone(), name.to_owned());
        Ok(on_a_thread(THREAD_PATIENCE, move || VmRecord::expect(&supervisor.0.dir, &vm)).await??)
    }

    /// Lets a new VM run that was made paused.
    async fn resume_new(&self, name: &str) -> Result<(), ApiError> {
        let client = Client::new(self.dir()).with_retries();
        let resumed =
            client.request_within::<VmInfo>(ATTEMPT_TIMEOUT, Method::POST, name, "/resume", None::<&()>).await;
        resumed.map(drop).map_err(|error| not_ready(name, &clade_vmm::error_chain(&error)))
    }

    /// The same as [`Self::reidentify`] for one of `count` new VMs.
    async fn reidentify_among(&self, name: &str, count: usize) -> Result<ReadyAnswer, ApiError> {
        let limits = TimeLimits::of(count);
        let vm_record = self.record_of(name).await?;
        expect_reachable(name, &vm_record.template.config)?;
        let socket = vm_record.identity.vsock.ok_or_else(|| not_ready(name, "it has no socket"))?.socket;
        let agent = Agent::new(Endpoint::Vsock { socket, port: PORT }).with_patience(ATTEMPT_TIMEOUT, MAX_TIMEOUT);
        // Each attempt has its own time of day.
        let agent = agent.with_one_attempt();
        let mut entropy = vec![0; ENTROPY];
        rustix::rand::getrandom(&mut entropy[..], rustix::rand::GetRandomFlags::empty())
            .map_err(|error| not_ready(name, &format!("there is no entropy: {error}")))?;
        let mut request = Generation {
            name: name.to_owned(),
            now_ns: None,
            entropy: Some(Base64(entropy)),
            hooks_ms: u64::try_from(limits.hooks.as_millis()).ok(),
        };
        let mut left = TimeLeft::of(limits.connecting);
        let ready = loop {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            request.now_ns = Some(now.as_nanos().to_string());
            let answer = tokio::select! {
                answer = agent.change_generation(&request) => answer,
                () = passed(ATTEMPT_TIMEOUT + limits.answering) => {
                    let waited = limits.answering.as_secs();
                    return Err(not_ready(name, &format!("the agent has not answered for {waited} s")));
                }
            };
            match answer {
                // A child resets its parent's connections, perhaps this one: the notification is
                // repeated.
                Err(ClientError::NoAgent { .. } | ClientError::Http(_) | ClientError::Lost(_))
                    if left.is_left(!has_free_processor()) =>
                {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(not_ready(name, &clade_vmm::error_chain(&error))),
                Ok(ready) => break ready,
            }
        };
        let failed = ready.hooks.iter().filter(|hook| hook.status != "exit status 0");
        let failed = failed.map(|hook| format!("the hook {}: {}", hook.name, hook.status));
        match ready.failed.iter().cloned().chain(failed).next() {
            Some(first) => Err(not_ready(name, &first)),
            None => {
                let hooks = ready.hooks.into_iter().map(|hook| hook.name).collect();
                Ok(ReadyAnswer { generation: ready.generation, hooks })
            }
        }
    }

    /// The same for new VMs, which may be paused: all run and are ready when this returns, or all have
    /// ended. They also end when the future is dropped. The first has the request's permit, the others
    /// wait for their own.
    ///
    /// # Errors
    /// That of the first VM that is not ready.
    pub(super) async fn reidentify_all(
        &self,
        pending: PendingVms,
        own: ReadyPermit,
        are_paused: bool,
    ) -> Result<(), ApiError> {
        // Of one request no more wait in the queue, so that others are not behind all its VMs.
        let waiting = Arc::new(Semaphore::new(told_at_a_time()));
        let (mut told, count, mut own) = (JoinSet::new(), pending.vms.len(), Some(own));
        for vm in pending.vms.clone() {
            let (supervisor, waiting) = (self.clone(), Arc::clone(&waiting));
            let own = own.take();
            told.spawn(async move {
                // The semaphore is never closed.
                let _waiting = if own.is_some() { None } else { waiting.acquire().await.ok() };
                let _permit = match own {
                    Some(permit) => permit,
                    None => supervisor.0.ready_limiter.next().await.begin(),
                };
                if !supervisor.is_there(&vm) {
                    return Err(not_ready(&vm.name, "it has ended"));
                }
                if are_paused {
                    supervisor.resume_new(&vm.name).await?;
                }
                supervisor.reidentify_among(&vm.name, count).await
            });
        }
        let mut failed = None;
        while failed.is_none() {
            tokio::select! {
                ready = told.join_next() => {
                    let Some(ready) = ready else { break };
                    failed = ready.unwrap_or_else(|error| Err(not_ready("a VM", &error.to_string()))).err();
                }
                () = self.0.ready_limiter.closed() => failed = Some(ProblemKind::Ending.into()),
            }
        }
        drop(told);
        match failed {
            None => {
                pending.leave();
                Ok(())
            }
            Some(error) => {
                pending.stop().await;
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_on_a_busy_host_does_not_count_up_to_a_bound() {
        let second = Duration::from_secs(1);
        let mut left = TimeLeft::of(30 * second);
        for (passed, is_busy, remains) in [(100, true, true), (29, false, true), (50, true, true), (1, false, false)] {
            advance(passed * second).await;
            assert_eq!(left.is_left(is_busy), remains, "{passed}");
        }
        let mut left = TimeLeft::of(30 * second);
        advance(MAX_TIMEOUT).await;
        assert!(!left.is_left(true));
    }

    #[test]
    fn siblings_have_more_time_and_hooks_less_than_the_answer() {
        for (count, connecting, answering, hooks) in
            [(0, 30, 60, 55), (1, 30, 60, 55), (2, 35, 70, 65), (25, 150, 300, 295), (usize::MAX, 300, 300, 295)]
        {
            let [connecting, answering, hooks] = [connecting, answering, hooks].map(Duration::from_secs);
            assert_eq!(TimeLimits::of(count), TimeLimits { connecting, answering, hooks }, "{count}");
        }
    }
}
