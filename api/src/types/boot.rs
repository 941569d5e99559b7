//! Boots, snapshots and restores.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use std::path::PathBuf;

use crate::secrets::Secret;
use crate::{Labels, object, secrets};

use super::ForkRequest;
use clade_vmm::vm::{RestoreLoad, VmConfig};

/// A request to save a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Its directory. Absolute, because this process may have another working directory than the
    /// client.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// Whether to save only what changed since the VM was last saved, or restored.
    #[serde(default)]
    pub incremental: bool,
    /// Whether its files are compressed (zstd), and so cannot be mapped.
    #[serde(default)]
    pub zstd: bool,
    /// Whether an existing snapshot is replaced although others depend on it.
    #[serde(default)]
    pub replace: bool,
}

/// The result of a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapshotAnswer {
    /// Its directory.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// Its id.
    pub id: String,
    /// Length of the VM's pause, in microseconds.
    pub pause_us: f64,
    /// The whole request, until everything was on the disk, in microseconds.
    pub total_us: f64,
    /// Pages of memory and disks written.
    pub data_pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Bytes of the files.
    pub data_bytes: u64,
    /// Whether the base is read-only, and so has no note of this dependent.
    #[serde(default)]
    pub base_untold: bool,
    /// Whether the base or one of its parents is in another directory than the snapshot, so that a
    /// restore has to allow that directory (`parents`).
    #[serde(default)]
    pub base_elsewhere: bool,
}

/// The progress of a VM's snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotProgress {
    /// Whether a snapshot is being written.
    pub running: bool,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do, at most.
    pub total: u64,
}

/// A request to boot a VM in a process of its own.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootRequest {
    /// Its name.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", min_length = 1, max_length = 48)]
    pub name: String,
    /// Its configuration.
    pub config: VmConfig,
    /// The kernel's file, or the name of one of the program's own kernels.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// The initramfs.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Its labels.
    #[serde(default)]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub labels: Labels,
    /// Whether it starts paused.
    #[serde(default)]
    pub paused: bool,
    /// Whether its guest reports that it is ready, by its agent or otherwise. The guest is
    /// `booting` until then.
    #[serde(default)]
    pub reports_ready: bool,
    /// Its session, inherited by all its descendants: they end with the process that sends this
    /// request, however that ends. Refused over TCP.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", min_length = 1, max_length = 48)]
    pub session: Option<String>,
    /// Resource limits of its process, and of its children's.
    #[serde(default, deserialize_with = "object::object")]
    pub limits: VmLimits,
    /// Secrets that children may be made without: at most 16, of 16 KiB in all. This gives them to
    /// no guest.
    #[serde(default, deserialize_with = "secrets::list", skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 16)]
    pub secrets: Vec<Secret>,
}

/// A snapshot, and how it is loaded.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SavedSource {
    /// Its directory. Absolute, because this process may have another working directory than the
    /// client.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// The way to load memory.
    #[serde(default)]
    pub load: RestoreLoad,
    /// The directory of the disks' overlays; beside the snapshot if not given.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub overlays: Option<PathBuf>,
    /// Directories beneath which the snapshot may have parents. Without any, the parents must be in
    /// the directory that holds the snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>, max_items = 16)]
    pub parents: Vec<PathBuf>,
}

/// A request to start VMs from a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The snapshot.
    #[serde(deserialize_with = "object::object")]
    pub saved: SavedSource,
    /// The VMs. A single one without a name is called as the snapshot's directory.
    #[serde(default, deserialize_with = "object::object")]
    pub vms: ForkRequest,
    /// The session that they belong to, as of a VM that is booted.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", min_length = 1, max_length = 48)]
    pub session: Option<String>,
}

/// A request to hold a snapshot as a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenRequest {
    /// The snapshot.
    #[serde(deserialize_with = "object::object")]
    pub saved: SavedSource,
    /// Its name; the directory's and a number if not given.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", min_length = 1, max_length = 48)]
    pub name: Option<String>,
}

/// Resource limits of a VM's process on the host. They need control groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmLimits {
    /// Memory in MiB: the guest's RAM, its earlier pages that forks still show, and the process
    /// itself.
    #[serde(default)]
    #[schema(minimum = 32)]
    pub memory_mib: Option<u64>,
    /// Processors, also parts of one.
    #[serde(default)]
    #[schema(minimum = 0.01, maximum = 1024)]
    pub cpus: Option<f64>,
}
