//! The common state of all calls: the supervisor, the records, and the agents in sandboxes.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use clade_agent_client::proto::PORT;
use clade_agent_client::{Client as Agent, Endpoint};
use clade_api::http::Changes;
use clade_api::{StopAnswer, StopRequest, SupervisorApi, TtlRequest};
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::sync::Mutex as AsyncMutex;

use crate::call_permits::CallPermits;
use crate::connection_limits::ConnectionLimits;
use crate::error::{Answer, GatewayError};
use crate::idempotency::Replays;
use crate::keys::ApiKeys;
use crate::making::MakingLimits;
use crate::ports::number;
use crate::quotas::{HeldQuota, Ledger, Quotas, Usage};
use crate::rate::Rates;
use crate::records::{RecordEntry, RecordTable, SandboxRecord, SnapshotRecord};
use crate::secret::TokenKey;
use crate::templates::TemplateStore;
use crate::wire::{CLIENT_ID, ENVD_VERSION, Sandbox};

/// Time limit of an agent for a connection, and then for an answer. Guests' kernels may be
/// interpreted.
const CONNECTING: Duration = Duration::from_secs(30);
const ANSWERING: Duration = Duration::from_secs(60);
/// The same for requests of clients to agents and programs.
const PROGRAM_ANSWERING: Duration = Duration::from_secs(600);

/// Options of a gateway.
#[derive(Clone, Debug)]
pub struct Options {
    /// The supervisor's runtime directory.
    pub dir: PathBuf,
    /// The file of API keys.
    pub keys: PathBuf,
    /// The domain whose subdomains `PORT-ID` are sandboxes' ports, with the port of clients' addresses
    /// unless that is their default. Without a domain, only headers name ports.
    pub domain: Option<String>,
    /// The store of built templates. Without it checkpoints are the only templates.
    pub templates: Option<TemplateStore>,
    /// The directory of the records of snapshots, which outlive a restart of the host as their
    /// checkpoints do. Without it they are in the runtime directory.
    pub snapshots: Option<PathBuf>,
    /// Quotas of each owner's sandboxes and snapshots.
    pub quotas: Quotas,
}

/// Reason why a gateway cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GatewayOpenError {
    /// Its files cannot be read or made.
    #[error("{} cannot be used", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The domain is invalid.
    #[error("invalid domain {domain:?}: letters, digits, '-' and '.' are allowed, and a port after ':'")]
    Domain {
        /// The domain given.
        domain: String,
    },
}

/// The files of a gateway, read before its supervisor runs.
#[derive(Debug)]
pub struct GatewayFiles {
    options: Options,
    sandboxes: RecordTable<SandboxRecord>,
    snapshots: RecordTable<SnapshotRecord>,
    token_key: TokenKey,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) supervisor: Arc<dyn SupervisorApi>,
    pub(crate) keys: ApiKeys,
    pub(crate) rates: Rates,
    pub(crate) connection_limits: Arc<ConnectionLimits>,
    /// Time limit for the beginning of a guest's answer, from the last part of the request's body
    /// on.
    pub(crate) answering: Duration,
    /// Calls in progress.
    pub(crate) calls: Arc<ConnectionLimits>,
    pub(crate) call_permits: CallPermits,
    pub(crate) changes: Arc<Changes>,
    pub(crate) replays: Replays,
    pub(crate) making: MakingLimits,
    pub(crate) sandboxes: RecordTable<SandboxRecord>,
    pub(crate) snapshots: RecordTable<SnapshotRecord>,
    pub(crate) ledger: Arc<Ledger>,
    /// Names of snapshots being taken, each with its owner.
    pub(crate) naming: Mutex<BTreeSet<(String, String)>>,
    pub(crate) domain: Option<String>,
    pub(crate) templates: Option<TemplateStore>,
    /// Held while a template's checkpoint is made from its snapshot.
    pub(crate) opening: AsyncMutex<()>,
    token_key: TokenKey,
}

/// E2B's API over the VMs of one supervisor.
#[derive(Clone, Debug)]
pub struct Gateway(pub(crate) Arc<Inner>);

impl GatewayFiles {
    /// Opens the files of a gateway over the VMs of a runtime directory, with the sandboxes that were
    /// made before.
    ///
    /// # Errors
    /// When the files cannot be read or made, or the domain is invalid.
    pub fn open(options: Options) -> Result<Self, GatewayOpenError> {
        if let Some(domain) = options.domain.as_ref().filter(|domain| !is_domain(domain)) {
            return Err(GatewayOpenError::Domain { domain: domain.clone() });
        }
        let dir = options.dir.join("e2b");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| GatewayOpenError::State { path, source }
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed(&dir))?;
        let sandboxes = RecordTable::open(dir.join("sandboxes")).map_err(failed(&dir))?;
        let of_snapshots = options.snapshots.clone().unwrap_or_else(|| dir.join("snapshots"));
        let snapshots = RecordTable::open_durable(of_snapshots.clone()).map_err(failed(&of_snapshots))?;
        let path = dir.join("token-key");
        let token_key = TokenKey::read_or_create(&path).map_err(failed(&path))?;
        Ok(Self { options, sandboxes, snapshots, token_key })
    }

    /// Returns the gateway to the VMs of `supervisor`.
    #[must_use]
    pub fn gateway(self, supervisor: Arc<dyn SupervisorApi>) -> Gateway {
        let Self { options, sandboxes, snapshots, token_key } = self;
        Gateway(Arc::new(Inner {
            supervisor,
            keys: ApiKeys::new(&options.keys),
            rates: Rates::default(),
            connection_limits: Arc::default(),
            answering: PROGRAM_ANSWERING,
            calls: Arc::default(),
            call_permits: CallPermits::default(),
            changes: Arc::default(),
            replays: Replays::default(),
            making: MakingLimits::default(),
            sandboxes,
            snapshots,
            ledger: Arc::new(Ledger::new(options.quotas)),
            naming: Mutex::default(),
            domain: options.domain.map(|domain| domain.to_ascii_lowercase()),
            templates: options.templates,
            opening: AsyncMutex::default(),
            token_key,
        }))
    }
}

impl Gateway {
    /// Opens the gateway of a fake supervisor, which answers at the socket of the runtime directory.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn of_socket(options: Options) -> Result<Self, GatewayOpenError> {
        let client = clade_api::Client::new(&options.dir).with_retries();
        Ok(GatewayFiles::open(options)?.gateway(Arc::new(client)))
    }

    /// Takes a part of an owner's quotas.
    ///
    /// # Errors
    /// 429 when too little is left.
    pub(crate) fn take(&self, owner: &str, more: Usage) -> Answer<HeldQuota> {
        self.0.ledger.take(owner, more, || {
            let mut usage = Usage::default();
            self.0.sandboxes.each(|one| {
                if one.owner == owner {
                    usage = usage.and(Usage::of_sandboxes(1, one.mib));
                }
            });
            self.0.snapshots.each(|one| {
                if one.owner == owner {
                    usage = usage.and(Usage::of_snapshot(one.mib));
                }
            });
            usage
        })
    }

    pub(crate) fn token(&self, id: &str) -> String {
        self.0.token_key.token(id)
    }

    /// Returns the token for the ports of a sandbox that is not public.
    pub(crate) fn traffic_token(&self, record: &SandboxRecord) -> Option<String> {
        record.is_private.then(|| self.0.token_key.traffic_token(&record.id))
    }

    pub(crate) fn is_traffic_token(&self, id: &str, given: &[u8]) -> bool {
        is_same(&self.0.token_key.traffic_token(id), given)
    }

    /// Returns whether this is the token of a sandbox's agent.
    pub(crate) fn is_token(&self, id: &str, given: &[u8]) -> bool {
        is_same(&self.token(id), given)
    }

    /// Describes a sandbox to its maker.
    pub(crate) fn shown(&self, record: &SandboxRecord) -> Sandbox {
        Sandbox {
            template: record.template.clone(),
            id: record.id.clone(),
            client: CLIENT_ID,
            envd_version: ENVD_VERSION,
            envd_access_token: self.token(&record.id),
            traffic_access_token: self.traffic_token(record),
            domain: self.0.domain.clone(),
        }
    }

    /// Returns the sandbox of that name, if it is this owner's. Others' look missing.
    pub(crate) fn owned(&self, owner: &str, id: &str) -> Answer<Arc<RecordEntry<SandboxRecord>>> {
        let entry = self.0.sandboxes.get(id).filter(|entry| entry.get().owner == owner);
        entry.ok_or_else(|| GatewayError::no_sandbox(id))
    }

    fn agent(record: &SandboxRecord, token: &str) -> Agent {
        let endpoint = Endpoint::Vsock { socket: record.socket.clone(), port: PORT };
        Agent::new(endpoint).with_patience(CONNECTING, ANSWERING).with_token(Some(token.to_owned()))
    }

    /// Returns the agent in a sandbox.
    pub(crate) fn agent_of(&self, record: &SandboxRecord) -> Agent {
        Self::agent(record, &self.token(&record.id))
    }

    /// Has the VM's process end it at the time set, even without a supervisor.
    pub(crate) async fn end_in(&self, id: &str, seconds: i64) -> Answer<()> {
        self.0.supervisor.set_ttl(id, TtlRequest { seconds: seconds as f64 }).await?;
        Ok(())
    }

    pub(crate) async fn end_never(&self, id: &str) -> Answer<()> {
        self.0.supervisor.remove_ttl(id).await?;
        Ok(())
    }

    /// Stops the VM of a sandbox.
    pub(crate) async fn stop_vm(&self, id: &str) -> Answer<StopAnswer> {
        Ok(self.0.supervisor.stop(id, StopRequest::default()).await?)
    }

    /// Stops the VM of a sandbox that no client waits for.
    pub(crate) async fn stop(&self, id: &str) {
        match self.stop_vm(id).await {
            Err(error) if error.status != StatusCode::NOT_FOUND => {
                tracing::warn!(%error.message, id, "a sandbox does not stop");
            }
            _ => {}
        }
    }
}

/// Whether the text is a domain, with a port or without.
fn is_domain(text: &str) -> bool {
    let (name, port) = text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)));
    let is_fine = |b: u8| b.is_ascii_alphanumeric() || b"-.".contains(&b);
    !name.is_empty() && name.bytes().all(is_fine) && port.is_none_or(|port| number(port).is_some())
}

/// Compares in a time that depends only on the length.
fn is_same(own: &str, given: &[u8]) -> bool {
    !own.is_empty() && bool::from(own.as_bytes().ct_eq(given))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_one() {
        let dir = tempfile::tempdir().unwrap();
        for domain in ["box.test", "box.test:8443"] {
            assert!(is_domain(domain), "{domain}");
        }
        for domain in ["", "a b", "a/b", ":80", "a:", "a:x", "a:0", "a:99999", "a:1:2"] {
            let domain = Some(domain.to_owned());
            let options = Options {
                dir: dir.path().to_owned(),
                keys: PathBuf::new(),
                domain,
                templates: None,
                snapshots: None,
                quotas: Quotas::default(),
            };
            assert!(matches!(GatewayFiles::open(options), Err(GatewayOpenError::Domain { .. })));
        }
    }
}
