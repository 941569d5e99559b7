//! The make-up of a VM's memory, in numbers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{DiskInfo, NetInfo, VmState};
use crate::check_name;
use clade_memory::{LayerPlace, PAGE_SIZE, ShownLayer};
use clade_vmm::vm::HistogramCounts;

const PAGE_KIB: u64 = PAGE_SIZE / 1024;

/// Guest pages by kind. Each page counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KindCounts {
    /// Pages not inherited, without memory.
    pub absent: u64,
    /// Pages of zeros or a pattern, which cost nothing.
    pub reference: u64,
    /// Pages of a layer.
    pub shared: u64,
    /// The VM's own pages, without the pinned ones.
    pub exclusive: u64,
    /// The VM's own pages that are pinned for DMA.
    pub pinned: u64,
}

impl KindCounts {
    /// All pages.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.absent + self.reference + self.shared + self.exclusive + self.pinned
    }
}

impl From<[u64; 5]> for KindCounts {
    fn from([absent, reference, shared, exclusive, pinned]: [u64; 5]) -> Self {
        Self { absent, reference, shared, exclusive, pinned }
    }
}

/// The place of a layer's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LayerHome {
    /// In memory of this process.
    Memory,
    /// On a disk, evicted.
    Disk,
    /// In a snapshot's file.
    Snapshot,
    /// In memory that another process published.
    Foreign,
}

/// A layer that provides pages of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerInfo {
    /// Its number within the VM's process.
    pub id: u64,
    /// Its file, the same for all processes: device and inode.
    pub file: String,
    /// The place of its bytes.
    pub home: LayerHome,
    /// Pages of the VM that it provides now.
    pub shown_pages: u64,
    /// Memory behind its file, in KiB; null if the file cannot be queried.
    pub resident_kib: Option<u64>,
    /// Whether no other VM, checkpoint or image uses it; null if that is unknown.
    pub alone: Option<bool>,
}

impl From<&ShownLayer> for LayerInfo {
    fn from(layer: &ShownLayer) -> Self {
        let home = match layer.place {
            LayerPlace::Memory => LayerHome::Memory,
            LayerPlace::Disk => LayerHome::Disk,
            LayerPlace::Snapshot => LayerHome::Snapshot,
            LayerPlace::Foreign => LayerHome::Foreign,
        };
        Self {
            id: layer.id.number(),
            file: format!("{:x}:{}", layer.file.0, layer.file.1),
            home,
            shown_pages: layer.shown,
            resident_kib: layer.resident_bytes.map(|bytes| bytes / 1024),
            alone: layer.is_alone,
        }
    }
}

/// A VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryStats {
    /// Its pages by kind.
    pub pages: KindCounts,
    /// Memory that is freed with the VM, in KiB.
    pub private_kib: u64,
    /// Shared pages of layers without another user.
    pub alone_pages: u64,
    /// Shared pages of layers whose users are unknown.
    pub unknown_pages: u64,
    /// Page size of its memory files: `huge`, or `4k`.
    #[serde(default)]
    pub backing: String,
    /// Memory mappings in use.
    pub mappings: u64,
    /// The table of owned pages, in KiB.
    pub table_kib: u64,
    /// The layers that provide its pages.
    pub layers: Vec<LayerInfo>,
}

/// Pages copied since the VM was made, by cause; see `clade_memory::CowCounts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CopyStats {
    /// Written by the guest.
    pub guest: u64,
    /// Copied for a pin.
    pub pin: u64,
    /// Copied when the VM was started, for want of mappings.
    pub adopt: u64,
    /// Copied ahead of a write that was likely, when it was woken.
    #[serde(default)]
    pub ahead: u64,
    /// Copied into layers by forks and snapshots, because they were written.
    pub freeze: u64,
    /// Copied into layers because they were pinned.
    pub freeze_pinned: u64,
    /// Copied into layers because devices had them lately.
    pub freeze_ahead: u64,
}

impl CopyStats {
    /// Returns each count with the name of its cause.
    #[must_use]
    pub fn by_cause(&self) -> [(&'static str, u64); 7] {
        [
            ("guest", self.guest),
            ("pin", self.pin),
            ("adopt", self.adopt),
            ("ahead", self.ahead),
            ("freeze", self.freeze),
            ("freeze_pinned", self.freeze_pinned),
            ("freeze_ahead", self.freeze_ahead),
        ]
    }
}

/// Pins of a VM's pages for DMA.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PinStats {
    /// Pins over all pages, now.
    pub now: u64,
    /// Shared pages that devices are reading, which takes no pin.
    pub reading: u64,
    /// Pins so far that had to take a lock. Other pins are not counted.
    pub locked: u64,
    /// Long-term pins, now.
    pub long: u64,
    /// Long-term pins so far.
    pub long_total: u64,
    /// The longest time that a pin is or was held, in seconds.
    pub longest_s: f64,
}

/// A histogram of durations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HistogramInfo {
    /// The number of durations.
    pub count: u64,
    /// Their sum, in microseconds.
    pub sum_us: u64,
    /// Upper bounds in microseconds, and the number of durations up to each bound and above the one
    /// before.
    pub buckets: Vec<(u64, u64)>,
}

impl From<HistogramCounts> for HistogramInfo {
    fn from(counts: HistogramCounts) -> Self {
        Self { count: counts.count(), sum_us: counts.sum_us, buckets: counts.buckets }
    }
}

/// The pauses of a VM, by cause.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PauseStats {
    /// Forks and checkpoints.
    pub fork: HistogramInfo,
    /// Snapshots.
    pub snapshot: HistogramInfo,
    /// Resets.
    pub reset: HistogramInfo,
}

/// The kernel's counts for a process with one VM, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProcessStats {
    /// Page tables (`VmPTE`).
    pub page_tables_kib: u64,
    /// Resident anonymous memory (`RssAnon`): the guest's private copies, and the process's own.
    pub anonymous_kib: u64,
    /// Resident memory of memory files (`RssShmem`): the mapped part of the layers.
    pub memory_files_kib: u64,
    /// The process's share of its mapped memory, each page divided by its users (`Pss`).
    pub proportional_kib: u64,
}

/// A VM in numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// Its name.
    pub name: String,
    /// The pid of its process.
    pub pid: u32,
    /// Its state.
    pub state: VmState,
    /// The name of its parent, if it has one.
    pub parent: Option<String>,
    /// Forks between it and the VM that was booted.
    pub generation: u32,
    /// Seconds since it was made.
    pub age_s: f64,
    /// Its memory.
    pub memory: MemoryStats,
    /// Pages copied so far.
    pub copies: CopyStats,
    /// Its pins.
    pub pins: PinStats,
    /// Its pauses.
    pub pauses: PauseStats,
    /// Its process, if that has no other VM.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub process: Option<ProcessStats>,
    /// Its network devices.
    #[serde(default)]
    pub nets: Vec<NetInfo>,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<DiskInfo>,
}

/// Most bounds of a histogram, network devices and disks of a VM, and bytes of an interface's name, in an answer that
/// is accepted. A VM has fewer.
const MAX_BUCKETS: usize = 64;
const MAX_NETS: usize = 64;
const MAX_DISKS: usize = 64;
const MAX_TAP: usize = 64;

impl VmStats {
    /// Returns whether they can be of a VM. They come from its process, which may be compromised, and end up in a text
    /// for all VMs.
    pub(crate) fn is_plausible(&self) -> bool {
        let pauses = [&self.pauses.fork, &self.pauses.snapshot, &self.pauses.reset];
        self.parent.as_deref().is_none_or(|parent| check_name(parent).is_ok())
            && pauses.iter().all(|pauses| pauses.buckets.len() <= MAX_BUCKETS)
            && self.disks.len() <= MAX_DISKS
            && self.nets.len() <= MAX_NETS
            && self.nets.iter().all(|net| net.tap.len() <= MAX_TAP)
    }
}

/// Returns pages as KiB.
#[must_use]
pub fn pages_kib(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_KIB)
}
