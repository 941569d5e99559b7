//! Sandboxes: made, forked, paused, and ended.

use std::path::PathBuf;
use std::sync::Arc;

use axum::http::StatusCode;
use clade_agent_client::proto::api::Init;
use clade_api::{ForkRequest, Label, LabelError, Labels, NetworkRequest, SuspendRequest, random_hex};
use clade_devices::virtio::net::Link;
use jiff::Timestamp;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::change_client::ChangeClient;
use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::quotas::{HeldQuota, Usage, check_metadata, check_variables};
use crate::records::{RecordEntry, SandboxRecord};
use crate::rules::{after, checkpoint_name, network, new_network, seconds};
use crate::wire::{Fork, ForkResult, NewSandbox, Sandbox, SnapshotFork, State};

/// Default time of a sandbox and of a fork, in seconds.
const DEFAULT_TIMEOUT: i64 = 300;
const DEFAULT_FORK_TIMEOUT: i64 = 15;
/// Extra seconds that a sandbox may live while its guest is initialised: it ends even if this
/// process has gone meanwhile.
pub(crate) const INIT_TIME: i64 = 600;
/// Most forks of one call.
const MAX_FORKS: i64 = 100;
/// Forks activated at a time.
const MAX_ACTIVATED: usize = 16;

/// The label of sandboxes' VMs that has the name of their template.
pub(crate) const TEMPLATE_LABEL: &str = "e2b-template";

/// Whether a VM's name is of the form of [`Names`].
pub(crate) fn is_sandbox_name(name: &str) -> bool {
    let (random, number) = name.strip_prefix('i').and_then(|rest| rest.split_at_checked(18)).unwrap_or_default();
    let is_number = |number: &str| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    !random.is_empty()
        && random.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        && (number.is_empty() || number.strip_prefix('x').is_some_and(is_number))
}

impl Gateway {
    /// Makes a sandbox of a template.
    pub(crate) async fn create(&self, owner: &str, new: NewSandbox, client: ChangeClient) -> Answer<Sandbox> {
        new.check()?;
        let timeout = seconds(new.timeout, DEFAULT_TIMEOUT)?;
        let (mut record, made) = self.fork_template(owner, new, Names::one()?, client).await?;
        let only = made.into_iter().next().ok_or_else(|| GatewayError::internal("no sandbox was made"))?;
        record.id.clone_from(&only.id);
        self.activate_or_stop(only, record, timeout).await
    }

    /// Makes sandboxes of a snapshot, each with its own result.
    pub(crate) async fn fork_snapshot(
        &self,
        owner: &str,
        id: &str,
        fork: SnapshotFork,
        client: ChangeClient,
    ) -> Answer<Vec<ForkResult>> {
        let (count, timeout) = Self::count_and_timeout(fork.fork)?;
        let snapshot = self.snapshot_of(owner, checkpoint_name(id)).ok_or_else(|| GatewayError::no_template(id))?;
        let new = NewSandbox {
            template: snapshot.id,
            metadata: fork.metadata,
            env_vars: fork.env_vars,
            allow_internet_access: fork.allow_internet_access,
            network: fork.network,
            ..NewSandbox::default()
        };
        let (record, made) = self.fork_template(owner, new, Names::of(count)?, client).await?;
        Ok(self.activate_all(made, &record, timeout).await)
    }

    /// Takes a part of an owner's limits for each of `count` VMs of `mib`, and waits until the owner's other
    /// requests leave room for them.
    async fn hold_limits(
        &self,
        owner: &str,
        count: usize,
        mib: u64,
        client: &mut ChangeClient,
    ) -> Answer<Vec<HeldLimits>> {
        let mut quota = self.take(owner, Usage::of_sandboxes(count, mib))?;
        let making = client.waits_for(async { Ok(self.0.making.begin(owner, count).await) }).await?;
        let making = making.map(Arc::new);
        let each = |_| HeldLimits { _quota: quota.split_off(Usage::of_sandboxes(1, mib)), _making: making.clone() };
        Ok((0..count).map(each).collect())
    }

    /// Makes VMs of a template. Returns a record for all but their names and times, and the VMs.
    async fn fork_template(
        &self,
        owner: &str,
        new: NewSandbox,
        names: Names,
        mut client: ChangeClient,
    ) -> Answer<(SandboxRecord, Vec<Unrecorded>)> {
        let Names { pattern, names } = names;
        check_metadata(new.metadata.as_ref())?;
        check_variables(new.env_vars.as_ref())?;
        let network = network(new.allow_internet_access, new.network.as_ref())?;
        let source = self.source(owner, &new.template)?;
        let checkpoint = self.opened(&source).await?;
        let held = self.hold_limits(owner, names.len(), checkpoint.mib, &mut client).await?;
        let link = network.link.and_then(|link| source.asked_link(link, checkpoint.network));
        let egress = network.egress;
        let request = ForkRequest { network: link, egress, ..request_for(pattern, names.len(), &source.template)? };
        let unrecorded = names.into_iter().zip(held).map(|(name, held)| Unrecorded::new(self, name, held)).collect();
        let forked =
            async { Ok::<_, GatewayError>(self.0.supervisor.fork_checkpoint(&source.checkpoint, request).await?) };
        let forked = client.waits_for(forked).await.map_err(|error| match error.status {
            StatusCode::NOT_FOUND => GatewayError::no_template(&source.template),
            _ => error,
        })?;
        // Of the checkpoint that was forked: the request may have waited while it was replaced.
        let is_template_closed = source.is_closed(forked.network);
        let template = source.template;
        let mut envs = source.built.map(|one| one.spec.env).unwrap_or_default();
        envs.extend(new.env_vars.unwrap_or_default());
        let started_at = Timestamp::now();
        let record = SandboxRecord {
            id: String::new(),
            template,
            owner: owner.to_owned(),
            metadata: new.metadata.unwrap_or_default(),
            envs,
            started_at,
            end_at: started_at,
            paused: false,
            auto_pause: new.auto_pause.unwrap_or(false),
            auto_resume: new.auto_resume.is_some_and(|auto| auto.enabled),
            cpus: 0,
            mib: 0,
            socket: PathBuf::new(),
            is_private: network.is_private,
            masked_host: network.masked_host,
            network: network.asked,
            is_template_closed,
            template_layers: None,
        };
        Ok((record, unrecorded))
    }

    /// Makes a sandbox of a new fork. A fork that fails is stopped.
    async fn activate_or_stop(
        &self,
        mut unrecorded: Unrecorded,
        record: SandboxRecord,
        timeout: i64,
    ) -> Answer<Sandbox> {
        let activated = self.activate(record, timeout).await;
        if activated.is_err() {
            self.stop(&unrecorded.id).await;
        }
        // Its record counts from now on, while others of the request may take longer.
        drop(unrecorded.held.take());
        activated
    }

    async fn activate(&self, mut record: SandboxRecord, timeout: i64) -> Answer<Sandbox> {
        self.end_in(&record.id, timeout + INIT_TIME).await?;
        let vm = self.0.supervisor.vm(&record.id).await?;
        record.cpus = vm.cpus;
        record.mib = vm.memory.map_or(0, |memory| memory.mib);
        // An open network is open by its template: a request never opens one of unknown state.
        if record.is_template_closed.is_none() && vm.nets.iter().all(|net| net.network == Link::Open) {
            record.is_template_closed = Some(false);
        }
        // A fork of a sandbox inherits that sandbox's number.
        let of_template = vm.nets.iter().map(|net| net.egress_inherited).max().unwrap_or(0);
        record.template_layers = record.template_layers.or(Some(of_template));
        let vsock = vm.vsock.ok_or_else(|| GatewayError::bad("the template has no vsock device for its agent"))?;
        record.socket = vsock.socket;
        self.init(&record).await?;
        // Its time begins here: a slow start of its guest does not count.
        record.started_at = Timestamp::now();
        record.end_at = after(record.started_at, timeout)?;
        match record.auto_pause {
            true => self.end_never(&record.id).await?,
            false => self.end_in(&record.id, timeout).await?,
        }
        let shown = self.shown(&record);
        self.0.sandboxes.insert(record).map_err(|error| GatewayError::internal(error.to_string()))?;
        Ok(shown)
    }

    /// Gives the agent its token, variables and time.
    async fn init(&self, record: &SandboxRecord) -> Answer<()> {
        let init = Init {
            env_vars: Some(record.envs.clone()),
            access_token: Some(self.token(&record.id)),
            timestamp: Some(Timestamp::now().to_string()),
            ..Init::default()
        };
        Ok(self.agent_of(record).init(&init).await?)
    }

    fn count_and_timeout(fork: Fork) -> Answer<(usize, i64)> {
        let timeout = seconds(fork.timeout, DEFAULT_FORK_TIMEOUT)?;
        match fork.count.unwrap_or(1) {
            count @ 1..=MAX_FORKS => Ok((count as usize, timeout)),
            count => Err(GatewayError::bad(format!("count={count}: 1 to {MAX_FORKS}"))),
        }
    }

    /// Forks a sandbox. All forks are of one instant, and run: a paused sandbox stays paused. The sandbox may be
    /// paused, resumed and ended meanwhile: the forks may wait for others long after they were made.
    pub(crate) async fn fork(
        &self,
        owner: &str,
        id: &str,
        fork: Fork,
        mut client: ChangeClient,
    ) -> Answer<Vec<ForkResult>> {
        let entry = self.owned(owner, id)?;
        let (count, timeout) = Self::count_and_timeout(fork)?;
        let Names { pattern, names } = Names::of(count)?;
        let held = self.hold_limits(owner, count, entry.get().mib, &mut client).await?;
        let children = names.into_iter().zip(held).map(|(name, held)| Unrecorded::new(self, name, held));
        let mut children: Vec<_> = children.collect();
        let forked = async {
            // The forks have the network of its record.
            let _network = entry.network.read().await;
            // A change in progress is waited for: the image of a VM that is being suspended may be late.
            drop(entry.turn.lock().await);
            let parent = SandboxRecord { paused: false, ..entry.get() };
            let request = request_for(pattern, count, &parent.template)?;
            Ok((parent, self.0.supervisor.fork_vm(id, request).await?))
        };
        let (parent, answer) = client.waits_for(forked).await?;
        children.retain(|child| answer.children.contains(&child.id));
        Ok(self.activate_all(children, &parent, timeout).await)
    }

    /// Makes sandboxes of new forks, whose records are as `record` but for their names and times.
    async fn activate_all(&self, children: Vec<Unrecorded>, record: &SandboxRecord, timeout: i64) -> Vec<ForkResult> {
        let turns = Arc::new(Semaphore::new(MAX_ACTIVATED));
        let mut activated = Vec::new();
        for child in children {
            let record = SandboxRecord { id: child.id.clone(), ..record.clone() };
            let (gateway, turns) = (self.clone(), Arc::clone(&turns));
            activated.push(tokio::spawn(async move {
                // The semaphore is never closed.
                let _turn = turns.acquire_owned().await;
                gateway.activate_or_stop(child, record, timeout).await
            }));
        }
        let mut forked = Vec::new();
        for one in activated {
            let one = one.await.unwrap_or_else(|error| Err(GatewayError::internal(error.to_string())));
            forked.push(one.map_or_else(|error| ForkResult::Error(error.body()), ForkResult::Sandbox));
        }
        forked
    }

    /// Pauses a sandbox that `is_such` accepts. Its time stands still.
    pub(crate) async fn pause(
        &self,
        entry: &RecordEntry<SandboxRecord>,
        is_such: impl Fn(&SandboxRecord) -> bool,
    ) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        record.expect(State::Running)?;
        if !is_such(&record) {
            return Ok(());
        }
        // First: it must not end while it is paused.
        self.end_never(&record.id).await?;
        if let Err(error) = self.0.supervisor.pause(&record.id).await {
            let left = Timestamp::now().duration_until(record.end_at).as_secs().max(1);
            if !record.auto_pause {
                self.end_in(&record.id, left).await?;
            }
            return Err(error.into());
        }
        self.0.sandboxes.change(entry, |record| record.paused = true);
        entry.cut.send_replace(());
        self.suspend(&record.id).await;
        Ok(())
    }

    /// Puts the memory of a paused sandbox into a file until it is resumed. Without room on a disk, it stays in memory.
    pub(crate) async fn suspend(&self, id: &str) {
        if let Err(error) = self.0.supervisor.suspend(id, SuspendRequest { dir: None }).await {
            tracing::warn!(%error, id, "the memory of a paused sandbox stays");
        }
    }

    /// Lets a sandbox run, for at least this long: one that is in the `state`, if given. Returns
    /// whether it was paused.
    pub(crate) async fn resume(
        &self,
        entry: &RecordEntry<SandboxRecord>,
        timeout: Option<i64>,
        auto_pause: Option<bool>,
        state: Option<State>,
    ) -> Answer<(Sandbox, bool)> {
        let timeout = seconds(timeout, DEFAULT_TIMEOUT)?;
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        state.map_or(Ok(()), |state| record.expect(state))?;
        let end_at = after(Timestamp::now(), timeout)?;
        if !record.paused {
            if end_at > record.end_at {
                self.prolong(entry, &record, end_at, timeout).await?;
            }
            return Ok((self.shown(&record), false));
        }
        self.0.supervisor.resume(&record.id).await?;
        let record = self.0.sandboxes.change(entry, |record| {
            record.paused = false;
            record.auto_pause = auto_pause.unwrap_or(record.auto_pause);
            record.end_at = end_at;
        });
        if !record.auto_pause {
            self.end_in(&record.id, timeout + INIT_TIME).await?;
        }
        // Its clock stood still, too.
        let initialised = self.init(&record).await;
        // Its time begins here, like a new sandbox's.
        let end_at = after(Timestamp::now(), timeout)?;
        self.prolong(entry, &record, end_at, timeout).await?;
        initialised?;
        Ok((self.shown(&record), true))
    }

    async fn prolong(
        &self,
        entry: &RecordEntry<SandboxRecord>,
        record: &SandboxRecord,
        end_at: Timestamp,
        seconds: i64,
    ) -> Answer<()> {
        if !record.auto_pause {
            self.end_in(&record.id, seconds).await?;
        }
        self.0.sandboxes.change(entry, |record| record.end_at = end_at);
        Ok(())
    }

    /// Sets a sandbox's time to so many seconds from now on. A paused one has them when it is
    /// resumed.
    pub(crate) async fn set_timeout(&self, entry: &RecordEntry<SandboxRecord>, timeout: i64) -> Answer<()> {
        let timeout = seconds(Some(timeout), timeout)?;
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        let end_at = after(Timestamp::now(), timeout)?;
        if record.paused {
            self.0.sandboxes.change(entry, |record| record.end_at = end_at);
            return Ok(());
        }
        self.prolong(entry, &record, end_at, timeout).await
    }

    /// Opens or closes a sandbox's network, and replaces its own rules. Its template's stay.
    pub(crate) async fn set_network(&self, entry: &RecordEntry<SandboxRecord>, rules: &Value) -> Answer<()> {
        let network = new_network(rules)?;
        // First: a fork may take long, and others wait for the turn.
        let _network = entry.network.write().await;
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        // A network closed by the template's owner stays closed; one of unknown state may be.
        let link = match (network.link, record.is_template_closed) {
            (Some(Link::Open), Some(true)) => Some(Link::Closed),
            (Some(Link::Open), None) => None,
            (link, _) => link,
        };
        let request = match record.template_layers {
            Some(keep) => NetworkRequest { network: link, egress: Some(network.egress), keep },
            None if network.egress.is_empty() => NetworkRequest { network: link, ..NetworkRequest::default() },
            None => {
                return Err(GatewayError::conflict("rules of a sandbox that an older clade made cannot be replaced"));
            }
        };
        if request.network.is_some() || request.egress.is_some() {
            self.0.supervisor.set_network(&record.id, request).await?;
        }
        self.0.sandboxes.change(entry, |record| record.network = network.asked);
        Ok(())
    }

    /// Ends a sandbox for good.
    pub(crate) async fn kill(&self, entry: &RecordEntry<SandboxRecord>) -> Answer<()> {
        self.kill_if(entry, |_| true).await
    }

    /// As [`Self::kill`], for a sandbox that `is_such` accepts when it is its turn.
    pub(crate) async fn kill_if(
        &self,
        entry: &RecordEntry<SandboxRecord>,
        is_such: impl Fn(&SandboxRecord) -> bool,
    ) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        if !is_such(&record) {
            return Ok(());
        }
        let id = record.id;
        let stopped = self.stop_vm(&id).await;
        if stopped.as_ref().is_err_and(|error| error.status.as_u16() != 404) {
            return stopped.map(drop);
        }
        self.0.sandboxes.remove(&id);
        entry.cut.send_replace(());
        // Another call may have ended it.
        stopped.map(drop).map_err(|_| GatewayError::no_sandbox(&id))
    }
}

/// Names for VMs to be made.
struct Names {
    /// As a request for all of them has them.
    pattern: String,
    names: Vec<String>,
}

impl Names {
    fn random() -> Answer<String> {
        random_hex::<9>().map(|name| format!("i{name}")).map_err(|error| GatewayError::internal(error.to_string()))
    }

    /// The name of one VM.
    fn one() -> Answer<Self> {
        let name = Self::random()?;
        Ok(Self { pattern: name.clone(), names: vec![name] })
    }

    /// Names of forks.
    fn of(count: usize) -> Answer<Self> {
        let name = Self::random()?;
        Ok(Self { pattern: format!("{name}x{{n}}"), names: (1..=count).map(|n| format!("{name}x{n}")).collect() })
    }
}

/// A VM of a request in its owner's limits, until it has a record or has ended.
#[derive(Debug)]
struct HeldLimits {
    _quota: HeldQuota,
    /// Of all VMs of the request.
    _making: Option<Arc<OwnedSemaphorePermit>>,
}

/// A VM without a record, or about to be made. A drop stops it, even if its fork was done and the
/// answer was lost.
#[derive(Debug)]
struct Unrecorded {
    gateway: Gateway,
    id: String,
    /// None once it has a record, or was stopped.
    held: Option<HeldLimits>,
}

impl Unrecorded {
    fn new(gateway: &Gateway, id: String, held: HeldLimits) -> Self {
        Self { gateway: gateway.clone(), id, held: Some(held) }
    }
}

impl Drop for Unrecorded {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        let (gateway, id) = (self.gateway.clone(), std::mem::take(&mut self.id));
        // Without a runtime the process ends.
        if let Ok(runtime) = Handle::try_current() {
            let in_progress = gateway.0.changes.begin();
            runtime.spawn(async move {
                let (_in_progress, _held) = (in_progress, held);
                gateway.stop(&id).await;
            });
        }
    }
}

/// Returns a request for children without their parent's connections and tokens.
fn request_for(name: String, count: usize, template: &str) -> Answer<ForkRequest> {
    let refused = |error: LabelError| GatewayError::bad(error.to_string());
    let label: Label = format!("{TEMPLATE_LABEL}={template}").parse().map_err(refused)?;
    let labels = Labels::of(&[label]).map_err(refused)?;
    // The quotas of owners bound sandboxes. Most may be paused, which the supervisor's bound counts as running.
    let overcommit = true;
    Ok(ForkRequest { count, name: Some(name), ready: true, labels: Some(labels), overcommit, ..ForkRequest::default() })
}

#[cfg(test)]
mod tests;
