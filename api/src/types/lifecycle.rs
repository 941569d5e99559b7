//! Suspension, resets, ends, and settings of a VM that runs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use std::path::PathBuf;

use clade_devices::virtio::net::{EgressRule, Link};

use super::VmInfo;

/// A request to suspend a VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SuspendRequest {
    /// The directory on a disk in which a file without a name is made for its memory; `/var/tmp` if
    /// not given.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub dir: Option<PathBuf>,
}

/// A request to suspend a VM whenever it has done nothing for a time.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SuspendAfterRequest {
    /// Seconds for which its process takes next to no processor time.
    pub seconds: f64,
    /// The directory, as for a request to suspend it at once.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub dir: Option<PathBuf>,
}

/// The time after which a VM is suspended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SuspendAfterInfo {
    /// Idle time in seconds until it is suspended; null for never.
    pub seconds: Option<f64>,
}

/// A VM that was suspended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SuspendAnswer {
    /// Its name.
    pub name: String,
    /// Whether it was already suspended. Then the request did nothing.
    pub was_suspended: bool,
    /// Pages written to the file.
    pub written_pages: u64,
    /// Zero pages among its own pages, which are not written.
    pub zero_pages: u64,
    /// Its own pages that its children do not inherit: they stay in memory.
    pub kept_pages: u64,
    /// Microseconds until vCPUs and devices stood still.
    pub halt_us: f64,
    /// Microseconds to write the file and give memory back.
    pub write_us: f64,
    /// Microseconds in all.
    pub total_us: f64,
}

/// A VM that was woken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WakeAnswer {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmInfo,
    /// Whether it was suspended.
    pub was_suspended: bool,
    /// Pages read ahead: those touched between its previous wake and its suspension.
    pub working_set_pages: u64,
    /// Microseconds until it could run.
    pub total_us: f64,
}

/// The longest that a guest may take to power itself off, in seconds: a day.
pub const MAX_GRACE: f64 = 86_400.0;

/// A request to stop a VM. Without a body its power is cut.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Seconds that the guest has to power itself off after its power button was pressed. Its power
    /// is cut when they are over. Null: it is cut at once.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 86400)]
    pub graceful_s: Option<f64>,
    /// Whether to kill the VM's process instead of asking it, if no disk of the VM is written: a busy
    /// host stops many VMs sooner. The checkpoint learns nothing from such a child. Without effect
    /// with `graceful_s`.
    #[serde(default)]
    pub at_once: bool,
}

/// A VM that has stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StopAnswer {
    /// The VM as it was last.
    #[serde(flatten)]
    pub vm: VmInfo,
    /// The guest's response to the power button, if it was pressed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub shutdown: Option<ShutdownInfo>,
    /// Whether its process did not answer, and was killed: writes that were not on its disks are
    /// lost.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub killed: bool,
}

/// A guest's response to its power button.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShutdownInfo {
    /// Whether the guest ended by itself. Otherwise its power was cut when the time was over.
    pub by_itself: bool,
    /// Whether the guest's kernel noticed the button.
    pub noticed: bool,
}

/// A request to change a VM's network. Absent fields change nothing.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkRequest {
    /// Whether packets pass.
    #[serde(default)]
    pub network: Option<Link>,
    /// Egress rules, which replace all existing ones; an empty list removes them.
    #[serde(default)]
    pub egress: Option<Vec<EgressRule>>,
    /// Number of layers of rules that stay, from the first on. `egress` replaces the layers behind
    /// them.
    #[serde(default)]
    pub keep: usize,
}

impl NetworkRequest {
    /// # Errors
    /// When it requests no change.
    pub fn check(&self) -> Result<(), &'static str> {
        match (&self.network, &self.egress, self.keep) {
            (None, None, _) => Err("neither \"network\" nor \"egress\" is given: nothing would change"),
            (_, None, 1..) => Err("\"keep\" without \"egress\": no layer would be replaced"),
            _ => Ok(()),
        }
    }
}

/// The result of a reset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResetAnswer {
    /// The VM after the reset. `memory` is null: counting pages takes longer than the reset.
    pub vm: VmInfo,
    /// The VM's own pages that were dropped: another page is shown in their place.
    pub dropped_pages: u64,
    /// The VM's own pages that were kept, with the image's bytes.
    #[serde(default)]
    pub restored_pages: u64,
    /// Pages mapped anew.
    pub remapped_pages: u64,
    /// The time to restore memory, in microseconds.
    pub memory_us: f64,
    /// From the request to the vCPUs until their release, in microseconds.
    pub total_us: f64,
}

/// A request to reset a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResetRequest {
    /// Whether the agent in the guest then renews its identity: its clock, random numbers, tokens and
    /// hooks. Answers when the guest is ready. If it is not, the answer is `not-ready`, and the VM has
    /// been reset all the same.
    #[serde(default)]
    pub ready: bool,
}

/// A request to roll a VM back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The name of a checkpoint in memory, of the VM itself or of one of its ancestors.
    pub checkpoint: String,
    /// Whether the agent in the guest then renews its identity: its clock, random numbers, tokens and
    /// hooks. Answers when the guest is ready. If it is not, the answer is `not-ready`, and the VM has
    /// been rolled back all the same.
    #[serde(default)]
    pub ready: bool,
}

/// An ended VM whose process has yet to merge the writes since a fork into its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MergingVm {
    /// Its name.
    pub name: String,
    /// Its session's name, if it had one.
    pub session: Option<String>,
    /// Whether the process waits for a VM or a checkpoint that uses a disk.
    pub waits: bool,
    /// Whether the process has ended, and the writes are not in the disk. The newest 16 such VMs are
    /// listed.
    #[serde(default)]
    pub failed: bool,
}

/// A request to stop a VM after a time, in place of the time that it had.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TtlRequest {
    /// Seconds from now on.
    pub seconds: f64,
}

/// The time that a VM has to live.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TtlInfo {
    /// Seconds until it is stopped; null if it has no time to live.
    pub seconds_left: Option<f64>,
}
