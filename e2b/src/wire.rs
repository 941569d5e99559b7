//! The types of E2B's API. Requests may have unknown fields: SDKs add some.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::ErrorBody;
use crate::idempotency::Made;

/// The version of envd's protocol that the agent speaks.
pub(crate) const ENVD_VERSION: &str = "0.6.4";
/// E2B's name for the host that a sandbox is on.
pub(crate) const CLIENT_ID: &str = "clade";

/// Metadata and variables. Null is an empty map.
pub(crate) type Texts = BTreeMap<String, String>;

/// `POST /v2/sandboxes`, and the older `POST /sandboxes`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NewSandbox {
    #[serde(rename = "templateID")]
    pub(crate) template: String,
    pub(crate) timeout: Option<i64>,
    #[serde(default)]
    pub(crate) auto_pause: Option<bool>,
    pub(crate) auto_pause_memory: Option<bool>,
    pub(crate) auto_resume: Option<AutoResume>,
    #[serde(rename = "allow_internet_access")]
    pub(crate) allow_internet_access: Option<bool>,
    pub(crate) network: Option<Value>,
    pub(crate) metadata: Option<Texts>,
    pub(crate) env_vars: Option<Texts>,
    pub(crate) mcp: Option<Value>,
    pub(crate) iam: Option<Value>,
    pub(crate) volume_mounts: Option<Value>,
}

/// Whether requests wake a sandbox that paused itself.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct AutoResume {
    pub(crate) enabled: bool,
}

/// A sandbox as it is made, connected to or forked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sandbox {
    #[serde(rename = "templateID")]
    pub(crate) template: String,
    #[serde(rename = "sandboxID")]
    pub(crate) id: String,
    #[serde(rename = "clientID")]
    pub(crate) client: &'static str,
    pub(crate) envd_version: &'static str,
    pub(crate) envd_access_token: String,
    /// Only for a sandbox whose ports are not public.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) traffic_access_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) domain: Option<String>,
}

/// Whether a sandbox runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Running,
    Paused,
}

/// A sandbox in a list.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListedSandbox {
    #[serde(rename = "templateID")]
    pub(crate) template: String,
    #[serde(rename = "sandboxID")]
    pub(crate) id: String,
    #[serde(rename = "clientID")]
    pub(crate) client: &'static str,
    pub(crate) started_at: Timestamp,
    pub(crate) end_at: Timestamp,
    pub(crate) cpu_count: u8,
    #[serde(rename = "memoryMB")]
    pub(crate) memory_mib: u64,
    /// Unknown here: 0.
    #[serde(rename = "diskSizeMB")]
    pub(crate) disk_mib: u64,
    pub(crate) metadata: Texts,
    pub(crate) state: State,
    pub(crate) envd_version: &'static str,
}

/// The egress rules of a sandbox as its owner has requested them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AskedNetwork {
    #[serde(rename = "allowInternetAccess", skip_serializing_if = "Option::is_none", default)]
    pub(crate) is_allowed: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(crate) allow_out: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(crate) deny_out: Vec<String>,
}

/// A sandbox's network.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetworkShown {
    pub(crate) allow_public_traffic: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_out: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) deny_out: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mask_request_host: Option<String>,
}

/// A sandbox, by its name.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Detail {
    #[serde(flatten)]
    pub(crate) listed: ListedSandbox,
    /// Hidden from keys of scope `read`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) envd_access_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) domain: Option<String>,
    /// Null if it was not requested.
    pub(crate) allow_internet_access: Option<bool>,
    pub(crate) network: NetworkShown,
    pub(crate) lifecycle: Lifecycle,
}

/// The action at the end of a sandbox's time.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Lifecycle {
    pub(crate) auto_resume: bool,
    pub(crate) on_timeout: OnTimeout,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnTimeout {
    Kill,
    Pause,
}

/// `POST .../timeout`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Timeout {
    pub(crate) timeout: i64,
}

/// `POST .../refreshes`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Refresh {
    pub(crate) duration: Option<i64>,
}

/// `POST .../connect` and `.../resume`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Connect {
    pub(crate) timeout: Option<i64>,
    pub(crate) memory: Option<bool>,
    pub(crate) auto_pause: Option<bool>,
}

/// `POST .../pause` and `.../snapshots`.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct SaveOptions {
    pub(crate) memory: Option<bool>,
    pub(crate) name: Option<String>,
}

/// `POST .../fork`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Fork {
    pub(crate) timeout: Option<i64>,
    pub(crate) count: Option<i64>,
}

/// `POST /snapshots/{id}/fork`: forks of a snapshot, with what their sandboxes may differ in.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotFork {
    #[serde(flatten)]
    pub(crate) fork: Fork,
    pub(crate) metadata: Option<Texts>,
    pub(crate) env_vars: Option<Texts>,
    #[serde(rename = "allow_internet_access")]
    pub(crate) allow_internet_access: Option<bool>,
    pub(crate) network: Option<Value>,
}

/// The result of one fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ForkResult {
    Sandbox(Sandbox),
    Error(ErrorBody),
}

impl Made for Sandbox {}
impl Made for SnapshotInfo {}

impl Made for Vec<ForkResult> {
    fn has_made(&self) -> bool {
        self.iter().any(|one| matches!(one, ForkResult::Sandbox(_)))
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SnapshotInfo {
    #[serde(rename = "snapshotID")]
    pub(crate) id: String,
    pub(crate) names: Vec<String>,
}

/// The filters of a list.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListQuery {
    /// A query string of its own.
    pub(crate) metadata: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) order: Option<String>,
    pub(crate) started_after: Option<Timestamp>,
    pub(crate) template: Option<String>,
    pub(crate) next_token: Option<String>,
    pub(crate) limit: Option<usize>,
    /// Only for snapshots.
    #[serde(rename = "sandboxID")]
    pub(crate) sandbox: Option<String>,
    /// Only for snapshots.
    pub(crate) name: Option<String>,
}

/// A sandbox's load at one instant.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxMetric {
    pub(crate) timestamp: Timestamp,
    pub(crate) timestamp_unix: i64,
    pub(crate) cpu_count: u32,
    pub(crate) cpu_used_pct: f32,
    pub(crate) mem_used: u64,
    pub(crate) mem_total: u64,
    pub(crate) mem_cache: u64,
    pub(crate) disk_used: u64,
    pub(crate) disk_total: u64,
}

/// A template.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListedTemplate {
    #[serde(rename = "templateID")]
    pub(crate) id: String,
    #[serde(rename = "buildID")]
    pub(crate) build: String,
    pub(crate) cpu_count: u8,
    #[serde(rename = "memoryMB")]
    pub(crate) memory_mib: u64,
    #[serde(rename = "diskSizeMB")]
    pub(crate) disk_mib: u64,
    pub(crate) public: bool,
    pub(crate) aliases: Vec<String>,
    pub(crate) names: Vec<String>,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) created_by: Option<Value>,
    pub(crate) last_spawned_at: Option<Timestamp>,
    pub(crate) spawn_count: u64,
    pub(crate) build_count: u64,
    pub(crate) envd_version: &'static str,
    pub(crate) build_status: &'static str,
}
