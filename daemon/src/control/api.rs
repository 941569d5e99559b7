//! The requests and answers of the control socket.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use std::path::PathBuf;
use std::time::Duration;

use clade_devices::virtio::balloon::{BalloonStat, BalloonStats};
use clade_devices::virtio::net::{EgressRule, Link, Mac};
use clade_host_io::CachePolicy;
use clade_memory::Erased;

use crate::control::{object, schema};
use crate::flight::{self, FlightEvent};
use crate::secrets::{self, Secret};
use crate::vm_host::{EndedVm, Labels, Shutdown, VmEntry};
use crate::worker::LaunchedVm;
use crate::zygote::WorkerExit;
use clade_vmm::vm::{
    ChildIdentity, Identity, NetChoice, ResetReport, RestoreLoad, StopReason, Vm, VmConfig, VsockChoice,
};

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
    #[schema(value_type = schema::Link)]
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

fn egress(vm: &Vm, at: usize) -> Vec<Vec<EgressInfo>> {
    let info = |(rule, packets): (EgressRule, u64)| EgressInfo { rule: rule.to_string(), packets };
    let layers = vm.egress_packets(at).unwrap_or_default().into_iter();
    layers.map(|layer| layer.into_iter().map(info).collect()).collect()
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
    /// The state of a guest that reports it: of one that is booted with `reports_ready`, or has
    /// reported that it is ready.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub guest: Option<GuestState>,
    /// The reason why it stopped, if it has.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<schema::StopReason>)]
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

fn disks(vm: &Vm) -> Vec<DiskInfo> {
    let info = |at| {
        vm.with_disk(at, |disk| {
            let health = disk.health();
            DiskInfo {
                path: disk.config().path.clone(),
                no_room: health.no_room,
                lost: health.lost,
                direct: disk.policy() == CachePolicy::Direct,
            }
        })
    };
    (0..vm.config().disks.len()).filter_map(info).collect()
}

fn nets(vm: &Vm) -> Vec<NetInfo> {
    let info = |(at, own): (usize, &clade_vmm::vm::NetIdentity)| {
        let stats = vm.net_stats(at).unwrap_or_default();
        NetInfo {
            tap: own.tap.clone(),
            mac: own.mac,
            received_bytes: stats.received_bytes,
            sent_bytes: stats.sent_bytes,
            dropped: stats.dropped,
            network: vm.network(at).unwrap_or_default(),
            blocked_received: stats.blocked_received,
            blocked_sent: stats.blocked_sent,
            egress_dropped: stats.egress_dropped,
            egress: egress(vm, at),
            egress_inherited: vm.inherited_egress(at).unwrap_or_default(),
        }
    };
    vm.identity().nets.iter().enumerate().map(info).collect()
}

fn vsock(identity: &Identity) -> Option<VsockInfo> {
    identity.vsock.as_ref().map(|own| VsockInfo { cid: own.cid, socket: own.socket.clone() })
}

impl From<&VmEntry> for VmInfo {
    fn from(entry: &VmEntry) -> Self {
        let vm = &entry.vm;
        let stopped = vm.stopped();
        let state = match (&stopped, vm.is_paused()) {
            (Some(_), _) => VmState::Stopped,
            (None, _) if vm.is_suspended() => VmState::Suspended,
            (None, true) => VmState::Paused,
            (None, false) => VmState::Running,
        };
        let is_ready = vm.guest_notice().is_some_and(|notice| notice.is_ready);
        let guest = match (is_ready, entry.reports_ready) {
            (true, _) => Some(GuestState::Ready),
            (false, true) => Some(GuestState::Booting),
            (false, false) => None,
        };
        let memory = vm.memory_stats().ok().map(|stats| MemoryInfo {
            mib: vm.config().layout().bytes() >> 20,
            reference_pages: stats.reference,
            shared_pages: stats.shared,
            exclusive_pages: stats.exclusive,
            pinned_pages: stats.pinned,
            private_kib: stats.private_kib,
            shared_kib: stats.shared_kib,
        });
        Self {
            name: vm.name().to_owned(),
            pid: std::process::id(),
            state,
            guest,
            stopped,
            parent: entry.parent.clone(),
            labels: entry.labels.clone(),
            secrets: entry.secrets.names(),
            generation: vm.generation(),
            cpus: vm.config().cpus(),
            age_s: vm.age().as_secs_f64(),
            memory,
            nets: nets(vm),
            disks: disks(vm),
            vsock: vsock(vm.identity()),
        }
    }
}

impl VmInfo {
    /// Describes a VM whose process was killed, without asking it.
    pub(crate) fn of_killed(name: &str, exit: WorkerExit, config: &VmConfig) -> Self {
        let stopped = StopReason::Process { signal: exit.signal, code: exit.code };
        Self::of_stopped(name, exit.pid, stopped, config)
    }

    /// Describes a VM that has ended by itself, with this configuration.
    pub(crate) fn of_ended(ended: EndedVm, config: &VmConfig) -> Self {
        let EndedVm { name, stopped, parent, generation, age_s, pid, .. } = ended;
        Self { parent, generation, age_s, ..Self::of_stopped(&name, pid, stopped, config) }
    }

    /// A VM that has ended for this reason.
    pub(crate) fn of_stopped(name: &str, pid: u32, stopped: StopReason, config: &VmConfig) -> Self {
        Self {
            name: name.to_owned(),
            pid,
            state: VmState::Stopped,
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
    /// ready; if one fails, no VM stays. Not for VMs that start paused.
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
    #[schema(value_type = Vec<schema::NetChoice>)]
    pub nets: Vec<NetChoice>,
    /// Whether packets pass between their network devices and the host; as the parent's if not
    /// given. When closed, no packet passes in either direction, from the first instruction on.
    #[serde(default)]
    #[schema(value_type = Option<schema::Link>)]
    pub network: Option<Link>,
    /// Egress rules of the children: a layer in addition to their parent's rules, which also apply.
    #[serde(default)]
    #[schema(value_type = Vec<schema::EgressRule>)]
    pub egress: Vec<EgressRule>,
    /// The choices for their socket device.
    #[serde(default, deserialize_with = "object::optional")]
    #[schema(value_type = Option<schema::VsockChoice>)]
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
    /// VMs to more than 500 for each processor (children that start paused do not count).
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
pub(crate) const MAX_GRACE: f64 = 86_400.0;

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

impl From<Shutdown> for ShutdownInfo {
    fn from(Shutdown { by_itself, noticed }: Shutdown) -> Self {
        Self { by_itself, noticed }
    }
}

/// A request to change a VM's network. Absent fields change nothing.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkRequest {
    /// Whether packets pass.
    #[serde(default)]
    #[schema(value_type = Option<schema::Link>)]
    pub network: Option<Link>,
    /// Egress rules, which replace all existing ones; an empty list removes them.
    #[serde(default)]
    #[schema(value_type = Option<Vec<schema::EgressRule>>)]
    pub egress: Option<Vec<EgressRule>>,
    /// Number of layers of rules that stay, from the first on. `egress` replaces the layers behind
    /// them.
    #[serde(default)]
    pub keep: usize,
}

impl NetworkRequest {
    /// # Errors
    /// When it requests no change.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        match (&self.network, &self.egress, self.keep) {
            (None, None, _) => Err("neither \"network\" nor \"egress\" is given: nothing would change"),
            (_, None, 1..) => Err("\"keep\" without \"egress\": no layer would be replaced"),
            _ => Ok(()),
        }
    }
}

/// A request to resize a balloon.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// MiB the guest should give up in total.
    pub target_mib: u64,
}

/// A balloon, and the guest's memory statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonInfo {
    /// The balloon's target in MiB.
    pub target_mib: f64,
    /// MiB the guest reports as given up.
    pub actual_mib: f64,
    /// Pages discarded so far: given up to the balloon, or reported as free.
    pub discarded_pages: u64,
    /// Pages that were not discarded because a device had them pinned.
    pub pinned_pages: u64,
    /// Whether the guest answered this request; otherwise its statistics are older.
    pub answered: bool,
    /// The guest's statistics; absent if it never sent any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub guest: Option<GuestMemory>,
}

/// A guest's memory statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestMemory {
    /// Total memory in KiB.
    pub total_kib: u64,
    /// Unused memory in KiB.
    pub free_kib: u64,
    /// Memory available without swapping, in KiB.
    pub available_kib: u64,
    /// Disk caches in KiB.
    pub caches_kib: u64,
    /// Major page faults: those that read from a disk.
    pub major_faults: u64,
    /// Minor page faults.
    pub minor_faults: u64,
}

impl BalloonInfo {
    /// Converts the device's statistics.
    #[must_use]
    pub fn new(stats: &BalloonStats, answered: bool) -> Self {
        let mib = |pages: u32| f64::from(pages) / 256.0;
        let said = |stat| stats.guest.iter().find(|(tag, _)| *tag == stat).map_or(0, |(_, value)| *value);
        let guest = (!stats.guest.is_empty()).then(|| GuestMemory {
            total_kib: said(BalloonStat::Total) >> 10,
            free_kib: said(BalloonStat::Free) >> 10,
            available_kib: said(BalloonStat::Available) >> 10,
            caches_kib: said(BalloonStat::Caches) >> 10,
            major_faults: said(BalloonStat::MajorFaults),
            minor_faults: said(BalloonStat::MinorFaults),
        });
        Self {
            target_mib: mib(stats.target),
            actual_mib: mib(stats.actual),
            discarded_pages: stats.discarded,
            pinned_pages: stats.pinned,
            answered,
            guest,
        }
    }
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
    /// The whole request, until the last child was started, in microseconds.
    pub total_us: f64,
    /// Pages that became shared without being copied.
    pub remapped_pages: u64,
    /// Pages copied.
    pub copied_pages: u64,
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

impl ForkAnswer {
    /// Returns the answer to a fork whose parent was paused for `pause`, of which `freeze` went
    /// into freezing memory. `pages` were remapped and copied.
    pub(crate) fn new(
        made: Vec<LaunchedVm>,
        (pause, freeze, total): (Duration, Duration, Duration),
        (remapped_pages, copied_pages): (u64, u64),
    ) -> Self {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let (children, identities): (_, Vec<_>) = made.into_iter().map(|child| (child.name, child.identity)).unzip();
        Self {
            children,
            identities: identities.into_iter().flatten().collect(),
            pause_us: us(pause),
            freeze_us: us(freeze),
            total_us: us(total),
            remapped_pages,
            copied_pages,
            erased: None,
        }
    }

    /// Adds the counts of erased secrets: the same in each child, because all have the same image.
    pub(crate) fn with_erased(self, erased: Option<ErasedInfo>) -> Self {
        Self { erased, ..self }
    }
}

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

/// A recorded working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkingSetAnswer {
    /// Pages in it.
    pub pages: u64,
}

/// Pages that a VM has touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TouchedAnswer {
    /// Runs of pages, ascending, counted over all of memory.
    pub runs: Vec<TouchedRun>,
}

/// A run of pages that a VM has touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TouchedRun {
    /// The first page.
    pub first: u64,
    /// The number of pages.
    pub count: u64,
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

impl IdentityInfo {
    /// Returns the identity of `vm`, or None if it has no such devices.
    #[must_use]
    pub fn of(vm: &Vm) -> Option<Self> {
        let (nets, vsock) = (nets(vm), vsock(vm.identity()));
        (!nets.is_empty() || vsock.is_some()).then_some(Self { nets, vsock })
    }
}

/// The result of a reset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResetAnswer {
    /// The VM after the reset.
    pub vm: VmInfo,
    /// Pages written since the image, and dropped.
    pub dropped_pages: u64,
    /// Pages mapped anew.
    pub remapped_pages: u64,
    /// The time to restore memory, in microseconds.
    pub memory_us: f64,
    /// From the request to the vCPUs until their release, in microseconds.
    pub total_us: f64,
}

impl ResetAnswer {
    /// Reports what was done, and notes it in the VM's flight record.
    pub(crate) fn new(entry: &VmEntry, report: &ResetReport, what: &str) -> Self {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let (dropped_pages, remapped_pages) = (report.memory.dropped, report.memory.remapped);
        let took = report.total.as_micros();
        flight::note(&format!("{what} in {took} us: {dropped_pages} pages dropped, {remapped_pages} remapped"));
        let (memory_us, total_us) = (us(report.drop), us(report.total));
        Self { vm: VmInfo::from(entry), dropped_pages, remapped_pages, memory_us, total_us }
    }
}

/// A request to roll a VM back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The name of a checkpoint in memory, of the VM itself or of one of its ancestors.
    pub checkpoint: String,
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

/// A request to boot a VM in a process of its own.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootRequest {
    /// Its name.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", min_length = 1, max_length = 48)]
    pub name: String,
    /// Its configuration.
    #[schema(value_type = schema::VmConfig)]
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
    #[schema(value_type = schema::RestoreLoad)]
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
    #[schema(value_type = Option<schema::Link>)]
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
