//! The requests beside the two services: plain JSON over HTTP.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `POST /init`: what the agent is to use from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Init {
    /// Variables of every process. They replace those of the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// The token that requests need. Left out or empty, none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The time, as RFC 3339 says it. The request is old if a later one came first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// Who runs processes if a request does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Where relative paths begin if a request does not say it.
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
    /// Per cent of them that were busy since the last time.
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
    /// This case, in words.
    pub message: String,
}

/// `POST /clade/generation`: the VM is another one from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Generation {
    /// What the VM is called.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The time in nanoseconds since 1970, as text. Left out, the clock stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub now_ns: Option<String>,
    /// Bytes for the kernel's random number generator, as base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<crate::Base64>,
}

/// What a hook of `/etc/clade/fork.d` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hook {
    /// Its name.
    pub name: String,
    /// How it ended: `exit status 0`.
    pub status: String,
}

/// The answer: all that was to be done is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Ready {
    /// How often this agent has been told that it is another.
    pub generation: u64,
    /// The hooks, in their order.
    pub hooks: Vec<Hook>,
    /// What could not be done.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}
