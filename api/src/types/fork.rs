//! Forks, and what was made.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use clade_devices::virtio::net::{EgressRule, Link};

use clade_memory::Erased;

use crate::{Labels, object};

use super::{NetInfo, VsockInfo};
use clade_vmm::vm::{ChildIdentity, NetChoice, VsockChoice};

/// A request to fork a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// The number of children; 1 if not given.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 10000, default = 1)]
    pub count: usize,
    /// Their names, `{n}` standing for a number; the parent's name and a number if not given.
    #[serde(default)]
    #[schema(pattern = r"^([A-Za-z0-9]|\{n\})([A-Za-z0-9_.-]|\{n\})*$", min_length = 1, max_length = 50)]
    pub name: Option<String>,
    /// Whether they start paused.
    #[serde(default)]
    pub paused: bool,
    /// Whether the agent in each guest renews its identity first. The answer comes when all are
    /// ready; if one fails, no VM stays. Several start paused, and run a few at a time. Not for
    /// VMs that are to stay paused.
    #[serde(default)]
    pub ready: bool,
    /// Whether the secrets that the parent was made with are erased in their memory before their
    /// first instruction. Refused for a parent whose secrets are not known.
    #[serde(default)]
    pub without_secrets: bool,
    /// Their labels; the parent's if not given.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>)]
    pub labels: Option<Labels>,
    /// The choices for their network devices, in order.
    #[serde(default, deserialize_with = "object::list")]
    pub nets: Vec<NetChoice>,
    /// Whether packets pass between their network devices and the host; as the parent's if not
    /// given. When closed, no packet passes in either direction, from the first instruction on.
    #[serde(default)]
    pub network: Option<Link>,
    /// Egress rules of the children: a layer in addition to their parent's rules, which also apply.
    #[serde(default)]
    pub egress: Vec<EgressRule>,
    /// The choices for their socket device.
    #[serde(default, deserialize_with = "object::optional")]
    pub vsock: Option<VsockChoice>,
    /// MiB of memory that each child may have copies of before it writes there: the pages that most
    /// ended children of the checkpoint have written. 0 for none; the supervisor's setting if not
    /// given. All children of a request have 256 MiB together at most. Refused for the fork of a
    /// VM, which does not learn.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 4096)]
    pub ahead_mib: Option<u32>,
    /// Whether to make them though the host has too little memory or too few processors for so many:
    /// without this, a fork is refused that takes more than the available memory, or that brings the
    /// VMs to more than 500 for each processor (children that are to stay paused do not count).
    #[serde(default)]
    pub overcommit: bool,
    /// Whether the children start from copies of what the VM's process can write, so that a guest which
    /// breaks into that process later cannot change their memory or disks. The VM runs on meanwhile.
    /// Refused for the fork of a checkpoint, which may be detached itself, and for a restore.
    #[serde(default)]
    pub detach: bool,
}

impl Default for ForkRequest {
    /// Returns a request for one child with its parent's settings.
    fn default() -> Self {
        Self {
            count: 1,
            name: None,
            paused: false,
            ready: false,
            without_secrets: false,
            labels: None,
            nets: Vec::new(),
            network: None,
            egress: Vec::new(),
            vsock: None,
            ahead_mib: None,
            overcommit: false,
            detach: false,
        }
    }
}

impl ForkRequest {
    /// The choices for the children's devices.
    #[must_use]
    pub fn identity(&self) -> ChildIdentity {
        ChildIdentity {
            nets: self.nets.clone(),
            network: self.network,
            egress: self.egress.clone(),
            vsock: self.vsock.clone(),
        }
    }
}

/// A guest that has renewed its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReadyAnswer {
    /// Number of notifications of its agent that the VM is a new one.
    pub generation: u64,
    /// The hooks that the agent has run, in their order.
    pub hooks: Vec<String>,
}

fn one() -> usize {
    1
}

/// The result of a fork.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ForkAnswer {
    /// The children's names.
    pub children: Vec<String>,
    /// Their own interfaces, addresses and sockets, in the same order; empty if they have no such
    /// devices.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub identities: Vec<IdentityInfo>,
    /// Length of the parent's pause, in microseconds.
    pub pause_us: f64,
    /// The part of the pause that froze memory, in microseconds.
    pub freeze_us: f64,
    /// The whole request, until the last child was started (several that are to be ready: made), in
    /// microseconds.
    pub total_us: f64,
    /// Pages that became shared without being copied.
    pub remapped_pages: u64,
    /// Pages copied.
    pub copied_pages: u64,
    /// Whether packets passed for the parent or the checkpoint, and so pass for the children unless the
    /// request had another state. Null without a network, or for a checkpoint of a snapshot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub network: Option<Link>,
    /// Counts of secrets erased in each child's memory, if it was made without secrets.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub erased: Option<ErasedInfo>,
}

/// Places at which a child's memory was erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErasedInfo {
    /// Places with a whole secret.
    pub whole: u64,
    /// Places with a part of a secret: its beginning at the end of a page, or its end at the start
    /// of one.
    pub parts: u64,
}

impl From<Erased> for ErasedInfo {
    fn from(Erased { whole, parts }: Erased) -> Self {
        Self { whole, parts }
    }
}

/// A child's own interfaces, addresses and sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IdentityInfo {
    /// Its network devices.
    pub nets: Vec<NetInfo>,
    /// Its socket device.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vsock: Option<VsockInfo>,
}
