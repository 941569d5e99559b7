//! Checkpoints, and the supervisor that holds them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use std::path::PathBuf;

use clade_devices::virtio::net::Link;

use super::MergingVm;

/// A request for a checkpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Its name; the VM's and a number if not given.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", min_length = 1, max_length = 48)]
    pub name: Option<String>,
    /// Whether it is kept on disk, so that later supervisors have it too. The answer comes once it is
    /// durable.
    // Left out if false: a supervisor of the version before refuses the field.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
    /// Whether its memory and disks are copied, so that no process of a VM can write what children
    /// start from. The answer comes once the copies are made.
    // Left out if false, as above.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detach: bool,
    /// Whether it is written in full with `keep`: the processes of its children then read no file of an
    /// earlier checkpoint, in which the guest's earlier memory is.
    // Left out if false, as above.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
}

/// A request to keep a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeepRequest {
    /// Whether it is written in full, as with `full` of a request for a checkpoint.
    #[serde(default)]
    pub full: bool,
}

/// A checkpoint: a VM at one instant, to fork from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointInfo {
    /// Its name.
    pub name: String,
    /// The VM that it was taken of.
    pub vm: Option<String>,
    /// The snapshot that it was opened from.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<String>)]
    pub snapshot: Option<PathBuf>,
    /// Forks between it and the VM that was booted, counting this one.
    pub generation: u32,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub mib: u64,
    /// Whether packets passed at that instant, and so pass for its children. Null without a
    /// network, or for a checkpoint of a snapshot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub network: Option<Link>,
    /// Seconds since it was taken.
    pub age_s: f64,
    /// Descriptors held: layers of memory and of disks, and its state.
    pub descriptors: usize,
    /// Length of the VM's pause, in microseconds.
    pub pause_us: f64,
    /// Further costs for the VM; null if it was opened from a snapshot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub forked: Option<ForkedInfo>,
    /// Pages learned from its children, which the next ones have copies of before they write them.
    #[serde(default)]
    pub ahead: AheadInfo,
    /// Whether it is kept on disk. `descriptors` is 0 as long as this supervisor has not opened it.
    #[serde(default)]
    pub kept: bool,
    /// The cost of its copies, if it is detached: no process of a VM can write its files. Null if it is
    /// not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detached: Option<DetachedInfo>,
}

/// The cost of a detached checkpoint's copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DetachedInfo {
    /// Layers of memory that were copied.
    pub copied_layers: u64,
    /// Layers of memory that no process of a VM can write anyway: a snapshot's files, and copies for
    /// earlier checkpoints.
    pub shared_layers: u64,
    /// Pages of memory that were copied.
    pub copied_pages: u64,
    /// Files of disks that were copied.
    pub disk_files: u64,
    /// Bytes of disks that were copied.
    pub disk_bytes: u64,
    /// Time for the copies, in microseconds. The VM ran meanwhile.
    pub total_us: f64,
}

/// Counts of the pages learned from a checkpoint's ended children.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AheadInfo {
    /// Children that have ended and reported their written pages.
    pub children: u64,
    /// Pages that the next child is likely to write, regardless of its limit.
    pub pages: u64,
    /// Pages copied ahead for those children.
    pub copied: u64,
    /// Copied pages that were written: a fault less each.
    pub hits: u64,
    /// Copied pages that were never written: wasted memory and time.
    pub waste: u64,
}

/// The cost of a checkpoint for its VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ForkedInfo {
    /// The part of the pause until vCPUs and devices stood still, in microseconds.
    pub park_us: f64,
    /// The part of the pause that froze memory, in microseconds.
    pub freeze_us: f64,
    /// Pages that became shared without being copied.
    pub remapped_pages: u64,
    /// Pages copied.
    pub copied_pages: u64,
    /// Device requests in flight at that instant.
    pub in_flight: u64,
}

/// A request to prepare workers for children of a checkpoint.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    /// Number of workers to have ready.
    #[schema(minimum = 0, maximum = 10000)]
    pub count: usize,
}

/// Prepared workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Prepared {
    /// Their number.
    pub prepared: usize,
}

/// The supervisor in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SupervisorInfo {
    /// Its pid.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// The runtime directory.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// VMs whose processes it has started.
    pub vms: usize,
    /// Checkpoints.
    pub checkpoints: usize,
    /// Those of them that are kept on disk.
    #[serde(default)]
    pub kept: usize,
    /// Prepared workers.
    pub prepared: usize,
    /// Whether the supervisor ends when it has no VM, and no checkpoint that is not kept.
    #[serde(default)]
    pub until_idle: bool,
    /// Ended VMs whose processes have yet to merge the writes since a fork into their disks.
    #[serde(default)]
    pub merging: Vec<MergingVm>,
}

/// The supervisor, which does not end within two seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SupervisorKept {
    /// Its pid.
    pub pid: u32,
}
