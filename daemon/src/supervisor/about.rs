//! What the supervisor knows of a VM, whatever the VM's process says.
//!
//! A process that has been broken into may say of its VM what it likes: that its disks' files go
//! into `/etc`, that its interface is another VM's. So the supervisor writes down what it started
//! (`NAME.vm` in the runtime directory, where no confined process may write), and derives children
//! from that. A VM of a process that is not confined has no such file, and is believed.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use clade_devices::disk::overlay_dir;
use serde::{Deserialize, Serialize};

use super::cgroups::Bounds;
use super::net_hook::Interfaces;
use super::overlays::unnamed_in;
use super::processes::ProcessId;
use crate::fleet::{FleetError, NameClaim, RuntimeDir, about, settle};
use crate::image::Forked;
use crate::jail::is_block_device;
use crate::worker::Shape;
use crate::zygote::Exit;
use clade_vmm::vm::{DiskSpec, Identity, VmConfig};

impl Shape {
    /// Of a VM with this configuration, the overlays of whose disks would be made in `dir` if it were
    /// not confined.
    pub(super) fn new(config: &VmConfig, dir: impl Fn(usize) -> PathBuf) -> Self {
        let of_disk = |(at, disk): (usize, &DiskSpec)| if disk.disk.read_only { dir(at) } else { unnamed_in(&dir(at)) };
        Self { config: config.clone(), overlays: config.disks.iter().enumerate().map(of_disk).collect() }
    }

    /// Of the children of a VM that is booted with this configuration.
    pub(super) fn of_boot(config: &VmConfig) -> Self {
        Self::new(config, |at| {
            let disk = &config.disks[at].disk;
            overlay_dir(disk, is_block_device(&disk.path))
        })
    }

    /// The directories that a child's disks write to.
    pub(super) fn written(&self) -> Vec<PathBuf> {
        let disks = self.config.disks.iter().zip(&self.overlays);
        disks.filter(|(disk, _)| !disk.disk.read_only).map(|(_, overlays)| overlays.clone()).collect()
    }
}

/// A VM as it was started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(super) shape: Shape,
    pub(super) identity: Identity,
    /// Directories of overlays that it uses.
    pub(super) overlays: Vec<PathBuf>,
    /// Device and inode of the socket of its device: its path may be another's later.
    pub(super) socket: Option<(u64, u64)>,
    /// Its process.
    #[serde(default)]
    pub(super) process: Option<ProcessId>,
    /// The VM or checkpoint that it was forked from.
    #[serde(default)]
    pub(super) parent: Option<String>,
    /// What its process may take, and those of its children.
    #[serde(default)]
    pub(super) bounds: Bounds,
}

fn failed(source: std::io::Error) -> FleetError {
    FleetError::Worker { source }
}

impl About {
    /// What is written down of the VM called `name`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn read(dir: &RuntimeDir, name: &str) -> Result<Option<Self>, FleetError> {
        let bytes = dir.read(&about(name)).map_err(failed)?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))).transpose()
    }

    /// What is written down of all VMs.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(super) fn all(dir: &RuntimeDir) -> Result<Vec<(String, Self)>, FleetError> {
        let names = dir.entries().map_err(failed)?;
        let names = names.iter().filter_map(|file| file.to_str()?.strip_suffix(".vm"));
        Ok(names.filter_map(|name| Some((name.to_owned(), Self::read(dir, name).ok()??))).collect())
    }

    /// What is known of a VM whose process has given an image and said `forked`.
    ///
    /// # Errors
    /// When it says something else than what was written down.
    pub(super) fn of(written: Option<Self>, name: &str, forked: &Forked) -> Result<Self, FleetError> {
        let Some(written) = written else {
            let shape = Shape::new(&forked.config, |at| forked.overlays.get(at).cloned().unwrap_or_default());
            let (identity, overlays) = (forked.identity.clone(), Vec::new());
            return Ok(Self {
                shape,
                identity,
                overlays,
                socket: None,
                process: None,
                parent: None,
                bounds: Bounds::default(),
            });
        };
        if written.shape.config != forked.config {
            let text =
                format!("the process of {name:?} says that it has another configuration than it was started with");
            return Err(failed(std::io::Error::other(text)));
        }
        Ok(written)
    }

    /// Writes it down for the VM of `claim`.
    ///
    /// # Errors
    /// When there is no room for it.
    pub(super) fn write(&self, claim: &NameClaim) -> Result<(), FleetError> {
        let bytes = serde_json::to_vec(self).map_err(|error| failed(error.into()))?;
        claim.write_about(&bytes).map_err(failed)
    }

    /// The interfaces of the VM, which is called `name`.
    pub(super) fn interfaces(&self, name: &str) -> Interfaces {
        Interfaces::of(name, self.parent.as_deref(), &self.identity)
    }

    /// Removes the sockets of its devices, which it could not remove itself.
    pub(super) fn remove_sockets(&self) {
        let Some(vsock) = &self.identity.vsock else { return };
        let is_its = self.socket.is_some() && inode(&vsock.socket) == self.socket;
        if is_its && let Err(error) = fs::remove_file(&vsock.socket) {
            tracing::debug!(%error, socket = %vsock.socket.display(), "a socket stays behind");
        }
    }
}

/// Device and inode of a socket.
pub(super) fn inode(socket: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(socket).ok()?;
    found.file_type().is_socket().then(|| (found.dev(), found.ino()))
}

/// Records the end of a VM whose process has ended, and removes what is left of it. Returns what was
/// written down of it.
pub(crate) fn clear_up(claim: NameClaim, exit: Exit, was_orderly: bool) -> Option<About> {
    settle(claim.dir(), &claim.name, exit, was_orderly);
    let about = About::read(claim.dir(), &claim.name).unwrap_or_else(|error| {
        tracing::warn!(%error, name = claim.name, "not all of a VM's files are known");
        None
    });
    about.iter().for_each(About::remove_sockets);
    drop(claim);
    about
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clade_devices::disk::DiskConfig;
    use clade_devices::virtio::block::BlockOptions;

    use crate::fleet::Labels;

    use super::*;

    fn forked(config: &VmConfig) -> Forked {
        let overlays = config.disks.iter().map(|_| PathBuf::from("/etc")).collect();
        let none = Duration::ZERO;
        let (identity, config, labels) = (Identity::default(), config.clone(), Labels::default());
        Forked { config, identity, overlays, labels, generation: 1, pause: none, freeze: none, remapped: 0, copied: 0 }
    }

    fn with_disk(path: &str) -> VmConfig {
        let mut config = VmConfig::bare(32 << 20, 1).unwrap();
        let (disk, device) = (DiskConfig::new(Path::new(path)), BlockOptions::default());
        config.disks.push(DiskSpec { disk, device });
        config
    }

    #[test]
    fn what_a_worker_says_of_its_vm_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(dir.path()).unwrap();
        let config = with_disk("/srv/disk");
        let shape = Shape::of_boot(&config);
        assert_eq!(shape.overlays, [Path::new("/srv/.clade-overlays")]);
        let identity = Identity::default();
        let known = About {
            shape,
            identity,
            overlays: Vec::new(),
            socket: None,
            process: None,
            parent: None,
            bounds: Bounds::default(),
        };
        let claim = NameClaim::new(&dir, "web").unwrap();
        known.write(&claim).unwrap();
        let written = || About::read(&dir, "web").unwrap();
        // Its overlays go into /etc, it says.
        assert_eq!(About::of(written(), "web", &forked(&config)).unwrap(), known);
        // It has another disk, it says.
        let refused = About::of(written(), "web", &forked(&with_disk("/etc/shadow"))).unwrap_err();
        assert!(clade_vmm::error_chain(&refused).contains("another configuration"), "{refused:?}");
        // One that was not started here is believed, but for the directory.
        let believed = About::of(None, "other", &forked(&config)).unwrap();
        assert_eq!(believed.shape.overlays, [Path::new("/etc/.clade-overlays")]);
        assert_eq!(About::all(&dir).unwrap(), [("web".to_owned(), known)]);
        drop(claim);
        assert_eq!(About::read(&dir, "web").unwrap(), None);
    }
}
