//! The common configuration of a family's workers.

use std::path::{Path, PathBuf};

use clade_block::DiskConfig;
use clade_snapshot::KnownDir;
use clade_vmm::vm::VmConfig;
use serde::{Deserialize, Serialize};

/// The common configuration of a family's workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmTemplate {
    /// The configuration.
    pub config: VmConfig,
    /// The directory of each disk's overlays.
    pub overlays: Vec<PathBuf>,
    /// Directories of the snapshots that the disks' files are in, if they were restored.
    #[serde(default)]
    pub saved: Vec<KnownDir>,
    /// Whether the disks that the booted VM writes in place are copies.
    #[serde(default)]
    pub detached: bool,
}

impl VmTemplate {
    /// Whether the other is equal, but for directories that have replaced others at their paths.
    pub fn is_at_paths_of(&self, other: &Self) -> bool {
        let same_paths = self.saved.iter().map(|dir| &dir.path).eq(other.saved.iter().map(|dir| &dir.path));
        same_paths && self.overlays == other.overlays && self.config == other.config
    }

    /// Whether a VM that was booted with the disk writes its image, and not one that was restored.
    #[must_use]
    pub fn writes_in_place(&self, disk: &DiskConfig) -> bool {
        self.saved.is_empty() && !disk.read_only && !disk.ephemeral
    }

    /// The images that the VM's process and those of its children have open. The files of a restored VM's
    /// disks are in its snapshot.
    pub fn images(&self) -> impl Iterator<Item = &Path> {
        let disks = self.config.disks.iter().map(|disk| &disk.disk).filter(|_| self.saved.is_empty());
        let is_copied = |disk: &DiskConfig| self.detached && self.writes_in_place(disk);
        disks.filter(move |disk| !is_copied(disk)).map(|disk| disk.path.as_path())
    }

    /// The directories that a child's disks write to.
    pub fn written(&self) -> Vec<PathBuf> {
        let disks = self.config.disks.iter().zip(&self.overlays);
        disks.filter(|(disk, _)| !disk.disk.read_only).map(|(_, overlays)| overlays.clone()).collect()
    }
}
