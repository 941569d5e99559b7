//! The program of a guest, which its agent starts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The file of the entrypoint in a guest's first root file system.
pub const ENTRYPOINT_PATH: &str = "/etc/clade/entrypoint.json";

/// A program that runs beside the agent. An agent refuses fields that it does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Entrypoint {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// Its variables.
    pub env: BTreeMap<String, String>,
    /// Its directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Its user, and a group behind a colon. Default: root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The number of the signal that ends it in order. Default: SIGTERM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<i32>,
    /// Whether other programs that the agent starts have its variables and its directory too.
    pub share_env: bool,
    /// Whether the guest ends with it.
    pub power_off: bool,
}
