//! The description of a VM.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use std::path::PathBuf;

use clade_devices::virtio::net::{Link, Mac};

use crate::flight::FlightEvent;
use crate::{EndedVm, Labels, WorkerExit};
use clade_vmm::vm::{Identity, StopReason, VmConfig};

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The vCPUs run.
    Running,
    /// Its owner has paused it.
    Paused,
    /// The VM stands still, with its memory on a disk, until its guest is needed.
    Suspended,
    /// The VM has ended.
    Stopped,
}

/// The state of a guest's system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// The guest has not reported yet that it is ready.
    Booting,
    /// The guest has reported that it is ready (`READY=1` of `sd_notify`).
    Ready,
}

/// A VM's pages by kind; see `clade_memory::RamStats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryInfo {
    /// Guest memory in MiB.
    pub mib: u64,
    /// Pages in no layer, or showing a reference page.
    pub reference_pages: u64,
    /// Pages provided by a layer.
    pub shared_pages: u64,
    /// The VM's own pages.
    pub exclusive_pages: u64,
    /// Exclusive pages that are pinned for DMA.
    pub pinned_pages: u64,
    /// Memory that is freed with the VM, in KiB.
    pub private_kib: u64,
    /// Memory of the shared pages, in KiB: other VMs and checkpoints may use it too.
    #[serde(default)]
    pub shared_kib: u64,
}

/// A network device and its traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetInfo {
    /// The interface on the host. Empty if the network is passt's.
    pub tap: String,
    /// The guest's MAC address.
    #[schema(value_type = String, pattern = "^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
    pub mac: Mac,
    /// Bytes received by the guest.
    pub received_bytes: u64,
    /// Bytes sent by the guest.
    pub sent_bytes: u64,
    /// Packets that the interface or the driver did not accept.
    pub dropped: u64,
    /// Whether packets pass.
    #[serde(default)]
    pub network: Link,
    /// Packets to the guest that were dropped because its network is closed.
    #[serde(default)]
    pub blocked_received: u64,
    /// Packets of the guest that were dropped because its network is closed.
    #[serde(default)]
    pub blocked_sent: u64,
    /// Packets of the guest that its egress rules have dropped.
    #[serde(default)]
    pub egress_dropped: u64,
    /// Egress rules: layers of rules, each of which a packet has to pass.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub egress: Vec<Vec<EgressInfo>>,
    /// Number of these layers, from the first on, that are its parent's.
    #[serde(default)]
    pub egress_inherited: usize,
}

/// An egress rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EgressInfo {
    /// The rule.
    pub rule: String,
    /// Packets decided by the rule.
    pub packets: u64,
}

/// A socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VsockInfo {
    /// The guest's CID.
    pub cid: u64,
    /// The socket that programs on the host connect to.
    #[schema(value_type = String)]
    pub socket: PathBuf,
}

impl VsockInfo {
    /// Describes the socket device of a VM with this identity, if it has one.
    #[must_use]
    pub fn of(identity: &Identity) -> Option<Self> {
        identity.vsock.as_ref().map(|own| Self { cid: own.cid, socket: own.socket.clone() })
    }
}

/// A disk and its errors on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfo {
    /// Its image.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Writes that failed for lack of room on the host.
    pub no_room: u64,
    /// Whether a write was lost; no later write is made durable then.
    pub lost: bool,
    /// Whether reads and writes bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
}

/// A VM in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// The pid of its process.
    pub pid: u32,
    /// Its state.
    pub state: VmState,
    /// Whether its owner has paused it. A suspended VM may be paused as well.
    #[serde(default)]
    pub paused: bool,
    /// The state of a guest that reports it: of one that is booted with `reports_ready`, or has
    /// reported that it is ready.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub guest: Option<GuestState>,
    /// The reason why it stopped, if it has.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stopped: Option<StopReason>,
    /// The name of its parent, if it has one.
    pub parent: Option<String>,
    /// Its labels.
    #[serde(skip_serializing_if = "Labels::is_empty", default)]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub labels: Labels,
    /// Names of the secrets that its children may be made without.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub secrets: Vec<String>,
    /// Forks between it and the VM that was booted.
    pub generation: u32,
    /// vCPUs.
    pub cpus: u8,
    /// Seconds since it was made.
    pub age_s: f64,
    /// Its memory, if the kernel could be queried.
    pub memory: Option<MemoryInfo>,
    /// Its network devices.
    #[serde(default)]
    pub nets: Vec<NetInfo>,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<DiskInfo>,
    /// Its socket device.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vsock: Option<VsockInfo>,
}

impl VmInfo {
    /// Describes a VM whose process was killed, without asking it.
    pub fn of_killed(name: &str, exit: WorkerExit, config: &VmConfig) -> Self {
        let stopped = StopReason::Process { signal: exit.signal, code: exit.code };
        Self::of_stopped(name, exit.pid, stopped, config)
    }

    /// Describes a VM that has ended by itself, with this configuration.
    pub fn of_ended(ended: EndedVm, config: &VmConfig) -> Self {
        let EndedVm { name, stopped, parent, generation, age_s, pid, .. } = ended;
        Self { parent, generation, age_s, ..Self::of_stopped(&name, pid, stopped, config) }
    }

    /// A VM that has ended for this reason.
    pub fn of_stopped(name: &str, pid: u32, stopped: StopReason, config: &VmConfig) -> Self {
        Self {
            name: name.to_owned(),
            pid,
            state: VmState::Stopped,
            paused: false,
            guest: None,
            stopped: Some(stopped),
            parent: None,
            labels: Labels::default(),
            secrets: Vec::new(),
            generation: 0,
            cpus: config.cpus(),
            age_s: 0.0,
            memory: None,
            nets: Vec::new(),
            disks: Vec::new(),
            vsock: None,
        }
    }
}

/// The last output on a VM's console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LogsAnswer {
    /// The output as text, at most 32 KiB.
    pub console: String,
    /// The last events of the VM's flight record, the oldest first.
    #[serde(default)]
    pub flight: Vec<FlightEvent>,
}

/// The input that a console has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleTyped {
    /// Bytes taken, from the first on. The console had no room for the others yet.
    pub taken: usize,
}
