//! Files that a worker may open, by Landlock.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clade_block::{DiskConfig, journal_path, overlay_dir};
use clade_snapshot::KnownDir;
use clade_vmm::vm::VmConfig;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use serde::{Deserialize, Serialize};

use super::Role;

/// The Landlock version of the rights asked for. Older kernels grant fewer.
const WANTED: ABI = ABI::V6;
/// Files with the resources of the host.
const HOST_FACTS: [&str; 4] =
    ["/proc/sys/vm/max_map_count", "/proc/loadavg", "/proc/meminfo", "/sys/kernel/mm/transparent_hugepage"];

/// Files that a worker may reach beside its descriptors. All come from the process that starts the
/// VM, never from an image.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Grants {
    /// Files that are read: kernels, and the images of a child's disks.
    pub read: Vec<PathBuf>,
    /// Directories whose files are read: those of snapshots, and the journals of images that are only
    /// read. A directory that has one's path by now is not read.
    #[serde(default)]
    pub dirs: Vec<KnownDir>,
    /// Images written in place.
    pub write: Vec<PathBuf>,
    /// Directories for unnamed files.
    pub overlays: Vec<PathBuf>,
    /// Directories of images that are written: a journal, or a new image, is made beside them.
    pub beside: Vec<PathBuf>,
    /// What the worker does with files. A child's images are locked already.
    #[serde(default)]
    pub role: Role,
}

impl Grants {
    /// Grants for a child, whose disks write to unnamed files in `overlays`. The disks of a
    /// restored VM are read from the directories in `saved`: the paths in a snapshot are not
    /// trusted.
    pub fn of_child(config: &VmConfig, overlays: &[PathBuf], saved: &[KnownDir]) -> Self {
        let mut grants = Self { dirs: saved.to_vec(), ..Self::default() };
        for (DiskConfig { path, read_only, .. }, overlays) in config.disks.iter().map(|disk| &disk.disk).zip(overlays) {
            if saved.is_empty() {
                grants.read.push(path.clone());
            }
            if !read_only {
                grants.overlays.push(overlays.clone());
            }
        }
        grants
    }

    /// Grants for a VM that is booted.
    pub fn of_boot(config: &VmConfig, kernel: &Path, initrd: Option<&Path>) -> Self {
        let mut grants = Self::default();
        if !config.disks.is_empty() {
            grants.role = Role::Locks;
        }
        grants.read.extend([Some(kernel), initrd].into_iter().flatten().map(Path::to_owned));
        for disk in config.disks.iter().map(|disk| &disk.disk) {
            let DiskConfig { path, read_only, ephemeral, .. } = disk;
            if !read_only {
                grants.overlays.push(overlay_dir(disk, is_block_device(path)));
            }
            if *read_only || *ephemeral {
                grants.read.push(path.clone());
                // Without the journal that was left beside it, the guest would see the disk without
                // writes that were flushed.
                grants.dirs.extend(journal_of(path));
                continue;
            }
            grants.write.push(path.clone());
            // No file is made beside a block device.
            if !is_block_device(path) {
                grants.beside.extend(path.parent().map(Path::to_owned));
                grants.role = Role::Disks;
            }
        }
        grants
    }

    /// Denies everything else to this thread, and to those that it starts. `memory` is the
    /// directory of memory files, if that is a directory.
    pub(super) fn enforce(&self, memory: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
        let write = AccessFs::WriteFile | AccessFs::Truncate;
        let device = read | AccessFs::WriteFile | AccessFs::IoctlDev;
        let names =
            AccessFs::MakeReg | AccessFs::MakeDir | AccessFs::RemoveFile | AccessFs::RemoveDir | AccessFs::Refer;
        let made = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(WANTED))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(WANTED)))
            .and_then(|rules| rules.scope(Scope::AbstractUnixSocket | Scope::Signal))
            .and_then(Ruleset::create)
            .map_err(io::Error::other)?;
        let mut rules = made;
        if let Some(memory) = memory {
            let rule = PathBeneath::new(memory, read | write);
            (&mut rules).add_rule(rule).map_err(io::Error::other)?;
        }
        let mut allow_known = |path: &Path, id: Option<(u64, u64)>, rights: BitFlags<AccessFs>| -> io::Result<()> {
            let Ok(opened) = PathFd::new(path) else {
                // A missing file stays missing: its user reports that.
                return Ok(());
            };
            if id.is_some() && id != identity(opened.as_fd()) {
                return Ok(());
            }
            let rights = if is_directory(opened.as_fd()) { rights } else { rights & AccessFs::from_file(WANTED) };
            let rule = PathBeneath::new(opened, rights);
            (&mut rules).add_rule(rule).map_err(io::Error::other).map(drop)
        };
        self.dirs.iter().try_for_each(|dir| allow_known(&dir.path, dir.id, read | AccessFs::ReadDir))?;
        let mut allow = |path: &Path, rights| allow_known(path, None, rights);
        // Only the process's own entries: it reads which of its pages are present, and opens its
        // layers again for other processes.
        allow(Path::new("/proc/self"), read | AccessFs::ReadDir)?;
        allow(Path::new("/dev/userfaultfd"), device)?;
        HOST_FACTS.iter().try_for_each(|path| allow(Path::new(path), read))?;
        self.read.iter().try_for_each(|path| allow(path, read))?;
        self.write.iter().try_for_each(|path| allow(path, read | write | AccessFs::IoctlDev))?;
        // Not listed: whoever has such a directory open could change its mode, for all VMs that use it.
        self.overlays.iter().try_for_each(|path| allow(path, read | write))?;
        self.beside.iter().try_for_each(|path| allow(path, read | write | AccessFs::ReadDir | names))?;
        let status = rules.restrict_self().map_err(io::Error::other)?;
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok(()),
            RulesetStatus::PartiallyEnforced => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel knows only some of its rights"))
            }
            RulesetStatus::NotEnforced => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// The directory of the journal beside an image, if there is one.
fn journal_of(image: &Path) -> Option<KnownDir> {
    let path = journal_path(image)?;
    let found = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_dir)?;
    Some(KnownDir { path, id: Some((found.dev(), found.ino())) })
}

/// An open file's device and inode number.
fn identity(file: BorrowedFd<'_>) -> Option<(u64, u64)> {
    rustix::fs::fstat(file).ok().map(|found| (found.st_dev, found.st_ino))
}

fn is_directory(file: BorrowedFd<'_>) -> bool {
    let stat = rustix::fs::fstat(file);
    stat.is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
}

/// Returns whether `path` is a block device.
pub fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}
