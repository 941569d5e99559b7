//! The kind of each page of a VM.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{KindCounts, LayerInfo};
use clade_memory::{PageKind, PageRun};

/// Most cells of an answer.
pub const MAX_CELLS: u64 = 65_536;

/// The kind of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunKind {
    /// Pages not inherited, without memory.
    Absent,
    /// Pages of zeros or a pattern.
    Reference,
    /// Pages of a layer.
    Shared,
    /// The VM's own pages.
    Exclusive,
    /// The VM's own pages that are pinned for DMA.
    Pinned,
}

/// Pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunInfo {
    /// The first guest frame number.
    pub first: u64,
    /// The number of pages.
    pub count: u64,
    /// Their kind.
    pub kind: RunKind,
    /// The number of their layer, if they are of one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layer: Option<u64>,
}

impl From<&PageRun> for RunInfo {
    fn from(run: &PageRun) -> Self {
        let (kind, layer) = match run.kind {
            PageKind::Absent => (RunKind::Absent, None),
            PageKind::Reference => (RunKind::Reference, None),
            PageKind::Shared(layer) => (RunKind::Shared, Some(layer.number())),
            PageKind::Exclusive => (RunKind::Exclusive, None),
            PageKind::Pinned => (RunKind::Pinned, None),
        };
        Self { first: run.first, count: run.count, kind, layer }
    }
}

/// One of equal parts of a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CellInfo {
    /// Its first guest frame number.
    pub first: u64,
    /// Its pages by kind.
    #[serde(flatten)]
    pub pages: KindCounts,
    /// The number of the layer that provides most of its shared pages.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layer: Option<u64>,
}

/// The pages of a VM by kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PagesAnswer {
    /// All of its pages by kind.
    pub totals: KindCounts,
    /// The layers that provide its pages.
    pub layers: Vec<LayerInfo>,
    /// Runs, ascending. They leave out frames without memory, such as the gap below 4 GiB.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub runs: Vec<RunInfo>,
    /// The first frame of the next request, if there are more.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub next: Option<u64>,
    /// Equal parts, ascending.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub cells: Vec<CellInfo>,
}
