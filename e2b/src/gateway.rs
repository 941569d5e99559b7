//! Sandboxes: what calls do to the VMs of the supervisor.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clade_agent_client::proto::PORT;
use clade_agent_client::proto::api::Init;
use clade_agent_client::{Client as Agent, Endpoint};
use clade_daemon::control::{
    CheckpointInfo, CheckpointRequest, Client, ClientError, ForkAnswer, ForkRequest, NetworkRequest, StopRequest,
    TtlInfo, TtlRequest, VmInfo,
};
use clade_daemon::fleet::{Label, LabelError, Labels};
use clade_devices::virtio::net::Link;
use hyper::Method;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use thiserror::Error;

use crate::error::{Answer, ApiError};
use crate::idempotency::Replays;
use crate::keys::ApiKeys;
use crate::rate::Rates;
use crate::records::{Entry, Record, Snapshot, Table};
use crate::secret::{TokenKey, random_hex};
use crate::wire::{CLIENT_ID, ENVD_VERSION, Fork, Forked, NewSandbox, Sandbox, SnapshotInfo, State};

/// The time of a sandbox that is made without one, and of a fork, in seconds.
const DEFAULT_TIMEOUT: i64 = 300;
const DEFAULT_FORK_TIMEOUT: i64 = 15;
/// The longest time, in seconds: a day.
const MAX_TIMEOUT: i64 = 86_400;
/// Most forks of one call.
const MAX_FORKS: i64 = 100;
/// How often it is looked for sandboxes whose time is over, and for those that are gone.
const TICK: Duration = Duration::from_millis(250);
const TICKS_OF_A_SWEEP: u32 = 20;
/// How long an agent may take to take a connection and then to answer. Guests' kernels may be interpreted.
const CONNECTING: Duration = Duration::from_secs(10);
const ANSWERING: Duration = Duration::from_secs(60);

/// What a gateway is opened with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The supervisor's runtime directory.
    pub dir: PathBuf,
    /// The file of API keys.
    pub keys: PathBuf,
    /// The domain below which `PORT-ID` are sandboxes' ports. Without one they are named by headers alone.
    pub domain: Option<String>,
}

/// Why there is no gateway.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// What it keeps cannot be read or made.
    #[error("{} cannot be used", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The domain is none.
    #[error("{domain:?} is no domain: letters, digits, '-' and '.' are wanted")]
    Domain {
        /// The domain given.
        domain: String,
    },
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) client: Client,
    pub(crate) keys: ApiKeys,
    pub(crate) rates: Rates,
    pub(crate) replays: Replays,
    pub(crate) sandboxes: Table<Record>,
    pub(crate) snapshots: Table<Snapshot>,
    pub(crate) domain: Option<String>,
    token_key: TokenKey,
}

/// E2B's API over the VMs of one supervisor.
#[derive(Clone, Debug)]
pub struct Gateway(pub(crate) Arc<Inner>);

fn after(start: Timestamp, seconds: i64) -> Answer<Timestamp> {
    start.checked_add(SignedDuration::from_secs(seconds)).map_err(|error| ApiError::bad(error.to_string()))
}

/// A time to live: what is given, or `otherwise`.
fn seconds(given: Option<i64>, otherwise: i64) -> Answer<i64> {
    match given.unwrap_or(otherwise) {
        seconds @ 1..=MAX_TIMEOUT => Ok(seconds),
        seconds => Err(ApiError::bad(format!("timeout={seconds}: 1 to {MAX_TIMEOUT} seconds"))),
    }
}

/// The checkpoint of a template. The tag that E2B adds to its own says nothing here.
pub(crate) fn checkpoint_name(template: &str) -> &str {
    template.strip_suffix(":default").unwrap_or(template)
}

fn is_set(value: Option<&Value>) -> bool {
    value.is_some_and(|value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(fields) => fields.values().any(|field| is_set(Some(field))),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    })
}

impl NewSandbox {
    /// Refuses what would be promised and not kept.
    fn check(&self) -> Answer<()> {
        let refused = [
            ("mcp", is_set(self.mcp.as_ref())),
            ("iam", is_set(self.iam.as_ref())),
            ("volumeMounts", is_set(self.volume_mounts.as_ref())),
            ("autoPauseMemory=false", self.auto_pause_memory == Some(false)),
        ];
        match refused.iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => Err(ApiError::bad(format!("{field} is not there on this host"))),
            None if self.template.contains('/') => Err(ApiError::no_template(&self.template)),
            None => Ok(()),
        }
    }
}

/// What of the rules for a network there is here: all may pass, or nothing. Without a rule it stays as it is.
fn link(allowed: Option<bool>, network: Option<&Value>) -> Answer<Option<Link>> {
    let mut is_denied = allowed == Some(false);
    for (field, value) in
        network.and_then(Value::as_object).into_iter().flatten().filter(|(_, value)| is_set(Some(value)))
    {
        match (field.as_str(), value.as_array().map(Vec::as_slice)) {
            ("denyOut", Some([all])) if all == "0.0.0.0/0" => is_denied = true,
            ("allow_internet_access", None) => {}
            _ => {
                return Err(ApiError::bad(format!(
                    "network: {field}={value} is not there: all may pass here, or nothing"
                )));
            }
        }
    }
    let allowed = allowed.or_else(|| network?.get("allow_internet_access")?.as_bool());
    Ok(match (is_denied, allowed) {
        (true, _) | (_, Some(false)) => Some(Link::Closed),
        (_, Some(true)) => Some(Link::Open),
        (_, None) => None,
    })
}

impl Gateway {
    /// A gateway over the VMs of a runtime directory. It finds the sandboxes that were made before.
    ///
    /// # Errors
    /// When what it keeps cannot be read or made.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        let is_fine = |b: u8| b.is_ascii_alphanumeric() || b"-.".contains(&b);
        if let Some(domain) = &options.domain
            && (domain.is_empty() || !domain.bytes().all(is_fine))
        {
            return Err(OpenError::Domain { domain: domain.clone() });
        }
        let dir = options.dir.join("e2b");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::State { path, source }
        };
        let sandboxes = Table::open(dir.join("sandboxes")).map_err(failed(&dir))?;
        let snapshots = Table::open(dir.join("snapshots")).map_err(failed(&dir))?;
        let path = dir.join("token-key");
        let token_key = TokenKey::read_or_create(&path).map_err(failed(&path))?;
        Ok(Self(Arc::new(Inner {
            client: Client::new(&options.dir),
            keys: ApiKeys::new(&options.keys),
            rates: Rates::default(),
            replays: Replays::default(),
            sandboxes,
            snapshots,
            domain: options.domain.as_ref().map(|domain| domain.to_ascii_lowercase()),
            token_key,
        })))
    }

    pub(crate) fn token(&self, id: &str) -> String {
        self.0.token_key.token(id)
    }

    /// How a sandbox is shown to who made it.
    pub(crate) fn shown(&self, record: &Record) -> Sandbox {
        Sandbox {
            template: record.template.clone(),
            id: record.id.clone(),
            client: CLIENT_ID,
            envd_version: ENVD_VERSION,
            envd_access_token: self.token(&record.id),
            domain: self.0.domain.clone(),
        }
    }

    /// The sandbox of that name, if it is its owner who asks. Of others' there is no word.
    pub(crate) fn owned(&self, owner: &str, id: &str) -> Answer<Arc<Entry<Record>>> {
        let entry = self.0.sandboxes.get(id).filter(|entry| entry.get().owner == owner);
        entry.ok_or_else(|| ApiError::no_sandbox(id))
    }

    fn agent(record: &Record, token: &str) -> Agent {
        let endpoint = Endpoint::Vsock { socket: record.socket.clone(), port: PORT };
        Agent::new(endpoint).with_patience(CONNECTING, ANSWERING).with_token(Some(token.to_owned()))
    }

    /// The agent in a sandbox.
    pub(crate) fn agent_of(&self, record: &Record) -> Agent {
        Self::agent(record, &self.token(&record.id))
    }

    pub(crate) async fn vm<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        id: &str,
        action: &str,
        body: Option<&(impl serde::Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        self.0.client.supervisor(method, &format!("/v1/vms/{id}{action}"), body).await
    }

    /// Has the VM's process end it at the time that is set, also when nobody supervises it.
    async fn end_in(&self, id: &str, seconds: i64) -> Answer<()> {
        let request = TtlRequest { seconds: seconds as f64 };
        let _: TtlInfo = self.vm(Method::PUT, id, "/ttl", Some(&request)).await?;
        Ok(())
    }

    async fn end_never(&self, id: &str) -> Answer<()> {
        let _: TtlInfo = self.vm(Method::DELETE, id, "/ttl", None::<&()>).await?;
        Ok(())
    }

    async fn stop(&self, id: &str) {
        if let Err(error) = self.0.client.stop(id, StopRequest::default()).await {
            tracing::warn!(%error, id, "a sandbox does not stop");
        }
    }

    /// Makes a sandbox of a template.
    pub(crate) async fn create(&self, owner: &str, new: NewSandbox) -> Answer<Sandbox> {
        new.check()?;
        let timeout = seconds(new.timeout, DEFAULT_TIMEOUT)?;
        let template = checkpoint_name(&new.template).to_owned();
        let is_anothers = self.0.snapshots.get(&template).is_some_and(|snapshot| snapshot.get().owner != owner);
        if is_anothers {
            return Err(ApiError::no_template(&template));
        }
        let checkpoint = format!("/v1/checkpoints/{template}");
        let found = self.0.client.supervisor::<CheckpointInfo>(Method::GET, &checkpoint, None::<&()>).await;
        let no_template = |error: ClientError| match ApiError::from(error) {
            error if error.status.as_u16() == 404 => ApiError::no_template(&template),
            error => error,
        };
        found.map_err(no_template)?;
        let id = random_hex::<9>().map_err(|error| ApiError::internal(error.to_string()))?;
        let network = link(new.allow_internet_access, new.network.as_ref())?;
        let request = ForkRequest { network, ..request_for(format!("i{id}"), 1, &template)? };
        let fork = format!("{checkpoint}/fork");
        let answer: ForkAnswer = self.0.client.supervisor(Method::POST, &fork, Some(&request)).await?;
        let started_at = Timestamp::now();
        let record = Record {
            id: answer.children.first().cloned().ok_or_else(|| ApiError::internal("a fork without a child"))?,
            template,
            owner: owner.to_owned(),
            metadata: new.metadata.unwrap_or_default(),
            envs: new.env_vars.unwrap_or_default(),
            started_at,
            end_at: after(started_at, timeout)?,
            paused: false,
            auto_pause: new.auto_pause.unwrap_or(false),
            auto_resume: new.auto_resume.is_some_and(|auto| auto.enabled),
            cpus: 0,
            mib: 0,
            socket: PathBuf::new(),
        };
        self.hand_out(record, timeout).await
    }

    /// Makes a VM that was just forked a sandbox. One that cannot be is stopped.
    async fn hand_out(&self, record: Record, timeout: i64) -> Answer<Sandbox> {
        let id = record.id.clone();
        let handed = self.hand_out_or_fail(record, timeout).await;
        if handed.is_err() {
            self.stop(&id).await;
        }
        handed
    }

    async fn hand_out_or_fail(&self, mut record: Record, timeout: i64) -> Answer<Sandbox> {
        // First: it ends also if this process does now.
        self.end_in(&record.id, timeout).await?;
        let vm: VmInfo = self.vm(Method::GET, &record.id, "", None::<&()>).await?;
        record.cpus = vm.cpus;
        record.mib = vm.memory.map_or(0, |memory| memory.mib);
        let vsock = vm.vsock.ok_or_else(|| ApiError::bad("the template has no vsock device for its agent"))?;
        record.socket = vsock.socket;
        self.init(&record).await?;
        if record.auto_pause {
            self.end_never(&record.id).await?;
        }
        let shown = self.shown(&record);
        self.0.sandboxes.insert(record).map_err(|error| ApiError::internal(error.to_string()))?;
        Ok(shown)
    }

    /// Gives the agent its token, variables and time.
    async fn init(&self, record: &Record) -> Answer<()> {
        let init = Init {
            env_vars: Some(record.envs.clone()),
            access_token: Some(self.token(&record.id)),
            timestamp: Some(Timestamp::now().to_string()),
            ..Init::default()
        };
        Ok(self.agent_of(record).init(&init).await?)
    }

    /// Forks a sandbox that runs. All forks are of one instant.
    pub(crate) async fn fork(&self, owner: &str, id: &str, fork: Fork) -> Answer<Vec<Forked>> {
        let entry = self.owned(owner, id)?;
        let timeout = seconds(fork.timeout, DEFAULT_FORK_TIMEOUT)?;
        let count = match fork.count.unwrap_or(1) {
            count @ 1..=MAX_FORKS => count as usize,
            count => return Err(ApiError::bad(format!("count={count}: 1 to {MAX_FORKS}"))),
        };
        let _turn = entry.turn.lock().await;
        let parent = entry.get();
        if parent.paused {
            return Err(ApiError::conflict(format!("the sandbox {id:?} is paused")));
        }
        let name = random_hex::<9>().map_err(|error| ApiError::internal(error.to_string()))?;
        let request = request_for(format!("i{name}x{{n}}"), count, &parent.template)?;
        let answer: ForkAnswer = self.vm(Method::POST, id, "/fork", Some(&request)).await?;
        let started_at = Timestamp::now();
        let end_at = after(started_at, timeout)?;
        let mut forked = Vec::new();
        for child in answer.children {
            let record = Record { id: child, started_at, end_at, ..parent.clone() };
            forked.push(match self.hand_out(record, timeout).await {
                Ok(sandbox) => Forked::Sandbox(sandbox),
                Err(error) => Forked::Error(error.body()),
            });
        }
        Ok(forked)
    }

    /// Pauses a sandbox. Its time stands still.
    pub(crate) async fn pause(&self, entry: &Entry<Record>) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        if record.paused {
            return Err(ApiError::conflict(format!("the sandbox {:?} is paused", record.id)));
        }
        // First: it must not end while it is paused.
        self.end_never(&record.id).await?;
        let paused: Result<VmInfo, _> = self.vm(Method::POST, &record.id, "/pause", None::<&()>).await;
        if let Err(error) = paused {
            let left = Timestamp::now().duration_until(record.end_at).as_secs().max(1);
            if !record.auto_pause {
                self.end_in(&record.id, left).await?;
            }
            return Err(error.into());
        }
        self.0.sandboxes.change(entry, |record| record.paused = true);
        Ok(())
    }

    /// Lets a sandbox run, and for this long at least. Returns whether it was paused.
    pub(crate) async fn resume(
        &self,
        entry: &Entry<Record>,
        timeout: Option<i64>,
        auto_pause: Option<bool>,
    ) -> Answer<(Sandbox, bool)> {
        let timeout = seconds(timeout, DEFAULT_TIMEOUT)?;
        let _turn = entry.turn.lock().await;
        let record = entry.get();
        let end_at = after(Timestamp::now(), timeout)?;
        if !record.paused {
            if end_at > record.end_at {
                self.prolong(entry, &record, end_at, timeout).await?;
            }
            return Ok((self.shown(&record), false));
        }
        let _: VmInfo = self.vm(Method::POST, &record.id, "/resume", None::<&()>).await?;
        let record = self.0.sandboxes.change(entry, |record| {
            record.paused = false;
            record.auto_pause = auto_pause.unwrap_or(record.auto_pause);
            record.end_at = end_at;
        });
        if !record.auto_pause {
            self.end_in(&record.id, timeout).await?;
        }
        // Its clock stood still, too.
        self.init(&record).await?;
        Ok((self.shown(&record), true))
    }

    async fn prolong(&self, entry: &Entry<Record>, record: &Record, end_at: Timestamp, seconds: i64) -> Answer<()> {
        if !record.auto_pause {
            self.end_in(&record.id, seconds).await?;
        }
        self.0.sandboxes.change(entry, |record| record.end_at = end_at);
        Ok(())
    }

    /// Gives a sandbox so many seconds from now on. One that is paused has them when it is resumed.
    pub(crate) async fn set_timeout(&self, entry: &Entry<Record>, timeout: i64) -> Answer<()> {
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

    /// Opens or closes a sandbox's network.
    pub(crate) async fn set_network(&self, entry: &Entry<Record>, rules: &Value) -> Answer<()> {
        let network = link(None, Some(rules))?.unwrap_or(Link::Open);
        let _turn = entry.turn.lock().await;
        let request = NetworkRequest { network };
        let _: VmInfo = self.vm(Method::POST, &entry.get().id, "/network", Some(&request)).await?;
        Ok(())
    }

    /// Ends a sandbox for good.
    pub(crate) async fn kill(&self, entry: &Entry<Record>) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        let id = entry.get().id;
        let stopped = self.0.client.stop(&id, StopRequest::default()).await.map_err(ApiError::from);
        if stopped.as_ref().is_err_and(|error| error.status.as_u16() != 404) {
            return stopped.map(drop);
        }
        self.0.sandboxes.remove(&id);
        // Somebody else may have ended it.
        stopped.map(drop).map_err(|_| ApiError::no_sandbox(&id))
    }

    /// Holds the state of a sandbox at one instant, to make others of.
    pub(crate) async fn snapshot(&self, owner: &str, id: &str, name: Option<String>) -> Answer<SnapshotInfo> {
        let entry = self.owned(owner, id)?;
        let _turn = entry.turn.lock().await;
        let names: Vec<String> = name.iter().cloned().collect();
        let name = match name {
            Some(name) => checkpoint_name(&name).to_owned(),
            None => format!("s{}", random_hex::<9>().map_err(|error| ApiError::internal(error.to_string()))?),
        };
        let request = CheckpointRequest { name: Some(name) };
        let taken: CheckpointInfo = self.vm(Method::POST, id, "/checkpoint", Some(&request)).await?;
        let (owner, sandbox) = (owner.to_owned(), id.to_owned());
        let snapshot = Snapshot { id: taken.name.clone(), owner, sandbox, taken_at: Timestamp::now() };
        if let Err(error) = self.0.snapshots.insert(snapshot) {
            // It would be everybody's.
            self.remove_checkpoint(&taken.name).await?;
            return Err(ApiError::internal(error.to_string()));
        }
        Ok(SnapshotInfo { id: taken.name, names })
    }

    async fn remove_checkpoint(&self, name: &str) -> Answer<()> {
        let path = format!("/v1/checkpoints/{name}");
        let _: Value = self.0.client.supervisor(Method::DELETE, &path, None::<&()>).await?;
        Ok(())
    }

    /// Removes a snapshot of its owner's. Templates are the host's: they are not removed here.
    pub(crate) async fn remove_snapshot(&self, owner: &str, id: &str) -> Answer<()> {
        let id = checkpoint_name(id);
        let owned = self.0.snapshots.get(id).is_some_and(|snapshot| snapshot.get().owner == owner);
        if !owned {
            return Err(ApiError::no_template(id));
        }
        let removed = self.remove_checkpoint(id).await;
        if removed.as_ref().is_err_and(|error| error.status.as_u16() != 404) {
            return removed;
        }
        self.0.snapshots.remove(id);
        Ok(())
    }

    pub(crate) fn state(record: &Record) -> State {
        if record.paused { State::Paused } else { State::Running }
    }

    /// Forgets sandboxes whose VMs are gone, and snapshots whose checkpoints are.
    async fn sweep(&self) -> Result<(), ClientError> {
        // Before it is asked what is there: one that is made meanwhile is not forgotten.
        let (sandboxes, snapshots) = (self.0.sandboxes.list(), self.0.snapshots.list());
        if !sandboxes.is_empty() {
            let there = self.0.client.all_names().await?;
            for record in sandboxes.iter().filter(|record| !there.contains(&record.id)) {
                self.0.sandboxes.remove(&record.id);
            }
        }
        if !snapshots.is_empty() {
            let all: Vec<CheckpointInfo> =
                self.0.client.supervisor(Method::GET, "/v1/checkpoints", None::<&()>).await?;
            for snapshot in snapshots.iter().filter(|one| !all.iter().any(|there| there.name == one.id)) {
                self.0.snapshots.remove(&snapshot.id);
            }
        }
        Ok(())
    }

    /// Pauses sandboxes whose time is over, for ever.
    pub(crate) async fn keep_time(self) {
        let mut ticks: u32 = 0;
        loop {
            if ticks.is_multiple_of(TICKS_OF_A_SWEEP)
                && let Err(error) = self.sweep().await
            {
                tracing::debug!(%error, "sandboxes are not looked for");
            }
            ticks = ticks.wrapping_add(1);
            tokio::time::sleep(TICK).await;
            let now = Timestamp::now();
            let is_over = |record: &Record| record.auto_pause && !record.paused && record.end_at <= now;
            for record in self.0.sandboxes.list().into_iter().filter(is_over) {
                let Some(entry) = self.0.sandboxes.get(&record.id) else { continue };
                if let Err(error) = self.pause(&entry).await {
                    tracing::debug!(%error.message, id = record.id, "a sandbox is not paused");
                }
            }
        }
    }
}

/// A request for children that nobody else's connections or tokens reach.
fn request_for(name: String, count: usize, template: &str) -> Answer<ForkRequest> {
    let refused = |error: LabelError| ApiError::bad(error.to_string());
    let label: Label = format!("e2b-template={template}").parse().map_err(refused)?;
    let labels = Labels::of(&[label]).map_err(refused)?;
    Ok(ForkRequest { count, name: Some(name), ready: true, labels: Some(labels), ..ForkRequest::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_templates_are_checked() {
        assert_eq!(seconds(None, 15), Ok(15));
        assert_eq!(seconds(Some(MAX_TIMEOUT), 15), Ok(MAX_TIMEOUT));
        for wrong in [0, -1, MAX_TIMEOUT + 1, i64::MAX, i64::MIN] {
            let error = seconds(Some(wrong), 15).unwrap_err();
            assert!(error.message.contains(&wrong.to_string()), "{error:?}");
        }
        assert_eq!((checkpoint_name("base:default"), checkpoint_name("base:v2")), ("base", "base:v2"));
    }

    #[test]
    fn what_is_not_there_is_refused_by_its_name() {
        let new = |text: &str| {
            let new: NewSandbox = serde_json::from_str(text).unwrap();
            new.check().and_then(|()| link(new.allow_internet_access, new.network.as_ref()))
        };
        for (text, network) in [
            (r#"{"templateID": "base", "network": {}, "iam": null, "mcp": false, "more": 1}"#, None),
            (r#"{"templateID": "base", "network": {"denyOut": [], "allowPublicTraffic": null}}"#, None),
            (r#"{"templateID": "base", "network": {"denyOut": ["0.0.0.0/0"]}}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "allow_internet_access": false}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "allow_internet_access": true}"#, Some(Link::Open)),
        ] {
            assert_eq!(new(text), Ok(network), "{text}");
        }
        for (text, field) in [
            (r#"{"templateID": "base", "network": {"denyOut": ["10.0.0.0/8"]}}"#, "denyOut"),
            (r#"{"templateID": "base", "network": {"denyOut": ["0.0.0.0/0"], "allowOut": ["1.1.1.1"]}}"#, "allowOut"),
            (r#"{"templateID": "base", "volumeMounts": [{"name": "a", "path": "/a"}]}"#, "volumeMounts"),
            (r#"{"templateID": "base", "autoPauseMemory": false}"#, "autoPauseMemory"),
            (r#"{"templateID": "team/base"}"#, "team/base"),
        ] {
            let error = new(text).unwrap_err();
            assert!(error.message.contains(field), "{error:?}");
        }
        let rules = |text: &str| link(None, Some(&serde_json::from_str(text).unwrap()));
        assert_eq!(rules(r#"{"allow_internet_access": false}"#), Ok(Some(Link::Closed)));
        assert_eq!(rules(r#"{"allow_internet_access": true, "denyOut": []}"#), Ok(Some(Link::Open)));
        assert_eq!(rules("{}"), Ok(None));
    }

    #[test]
    fn a_domain_is_one() {
        let dir = tempfile::tempdir().unwrap();
        for domain in ["", "a b", "a/b", "a:80"] {
            let domain = Some(domain.to_owned());
            let options = Options { dir: dir.path().to_owned(), keys: PathBuf::new(), domain };
            assert!(matches!(Gateway::open(&options), Err(OpenError::Domain { .. })));
        }
    }
}
