//! The memory of a guest.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use clade_devices::virtio::balloon::{BalloonStat, BalloonStats};

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

/// Most bytes of a request or an answer.
pub const MAX_MEMORY: usize = 4 << 20;

/// The media type of memory.
pub const MEDIA_TYPE: &str = "application/octet-stream";

/// A write to a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryWritten {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Number of bytes written.
    pub length: u64,
}
