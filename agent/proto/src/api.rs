//! The requests beside the two services: plain JSON over HTTP.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `POST /init`: the agent's token, defaults and time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Init {
    /// Variables of every process. They replace the earlier ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// The token that requests need. Left out or empty: no token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The time as in RFC 3339. A request that is older than an earlier one has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// The default user of processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// The default directory for relative paths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
}

/// The answer of `GET /metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Seconds since 1970.
    pub ts: i64,
    /// Processors.
    pub cpu_count: u32,
    /// Their use since the last call, in per cent.
    pub cpu_used_pct: f32,
    /// Memory in MiB.
    pub mem_total_mib: u64,
    /// Memory in use, in MiB.
    pub mem_used_mib: u64,
    /// Memory in bytes.
    pub mem_total: u64,
    /// Memory in use, in bytes.
    pub mem_used: u64,
    /// The page cache, in bytes.
    pub mem_cache: u64,
    /// Bytes of the root file system that are not available.
    pub disk_used: u64,
    /// Bytes of the root file system.
    pub disk_total: u64,
}

/// A file that was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Written {
    /// Its path.
    pub path: String,
    /// Its name.
    pub name: String,
    /// Always `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The attributes `user.e2b.*`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Why a request beside the services failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HttpError {
    /// The HTTP status.
    pub code: u16,
    /// The case in words.
    pub message: String,
}

/// `POST /clade/shutdown`: the guest ends in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Shutdown {
    /// Time in milliseconds that the entrypoint, and then the other programs, have to end in. Left out, the
    /// agent decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// `POST /clade/generation`: the VM is another one from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Generation {
    /// The VM's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The time in nanoseconds since 1970, as text. Left out, the clock is not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub now_ns: Option<String>,
    /// Bytes for the kernel's random number generator, as base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<crate::Base64>,
    /// Time for all hooks together in milliseconds, which is less than the host waits for the
    /// answer. Left out, the agent decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hooks_ms: Option<u64>,
}

/// The result of a hook in `/etc/clade/fork.d`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hook {
    /// Its name.
    pub name: String,
    /// Its exit status, such as `exit status 0`.
    pub status: String,
}

/// The answer, when all steps are done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Ready {
    /// Number of generation changes of this agent.
    pub generation: u64,
    /// The hooks, in their order.
    pub hooks: Vec<Hook>,
    /// The steps that failed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}
