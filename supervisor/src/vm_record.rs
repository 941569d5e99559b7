//! The supervisor's own records of VMs, independent of the VMs' processes.
//!
//! A compromised process may describe its VM falsely: its disks' files in `/etc`, another VM's
//! interface. So the supervisor records each VM as it started it (`NAME.vm` in the runtime
//! directory, where no confined process may write), and derives children from that.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clade_block::overlay_dir;
use clade_devices::virtio::net::Link;
use serde::{Deserialize, Serialize};

use super::cgroups::Bounds;
use super::net_hook::Interfaces;
use super::overlays::unnamed_in;
use super::processes::{OwnVm, ProcessId};
use super::recorded_link::RecordedLink;
use super::session::{self, Session};
use clade_api::flight::FlightEvent;
use clade_api::secrets::SecretsRecord;
use clade_api::{
    DaemonError, KnownEnd, NameClaim, ProblemKind, RuntimeDir, VsockInfo, WorkerExit, check_name, settle,
    vm_record_name,
};
use clade_vmm::vm::{DiskSpec, Identity, VmConfig};
use clade_worker::VmTemplate;
use clade_worker::image::ForkedVm;
use clade_worker::jail::is_block_device;

/// Most ancestors that a record has: the nearest ones.
const MAX_ANCESTORS: usize = 64;

/// Returns the template of a VM with this configuration, whose disks' overlays would be made in
/// `dir` without confinement.
pub(super) fn template_of(config: &VmConfig, dir: impl Fn(usize) -> PathBuf) -> VmTemplate {
    let of_disk = |(at, disk): (usize, &DiskSpec)| if disk.disk.read_only { dir(at) } else { unnamed_in(&dir(at)) };
    let overlays = config.disks.iter().enumerate().map(of_disk).collect();
    VmTemplate { config: config.clone(), overlays, saved: Vec::new(), detached: false }
}

/// Returns the template of the children of a VM that is booted with this configuration.
pub(super) fn template_of_boot(config: &VmConfig) -> VmTemplate {
    template_of(config, |at| {
        let disk = &config.disks[at].disk;
        overlay_dir(disk, is_block_device(&disk.path))
    })
}

/// A VM as it was started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    #[serde(rename = "shape")]
    pub(super) template: VmTemplate,
    pub(super) identity: Identity,
    /// Directories of overlays that it uses.
    pub(super) overlays: Vec<PathBuf>,
    /// Device and inode of its device's socket: the path may later be another's.
    pub(super) socket: Option<(u64, u64)>,
    /// The session that it belongs to.
    #[serde(default, deserialize_with = "session::recorded")]
    pub(super) session: Option<Session>,
    /// Its process.
    #[serde(default)]
    pub(super) process: Option<ProcessId>,
    /// The VM that it was forked from, itself or by a checkpoint.
    #[serde(default)]
    pub(super) parent: Option<String>,
    /// The processes of the VMs that it was forked from, the nearest last. Empty in a record of an earlier
    /// version.
    #[serde(default)]
    pub(super) ancestors: Vec<ProcessId>,
    /// The resource limits of its process, and of its children's.
    #[serde(default)]
    pub(super) bounds: Bounds,
    /// Its secrets. None in a record of a supervisor that recorded none.
    #[serde(default)]
    pub(super) secrets: Option<SecretsRecord>,
    /// The host's side of its network devices. Empty in a record of an earlier version.
    #[serde(default)]
    pub(super) links: Vec<RecordedLink>,
    /// Whether its network is open. None while that is not known: the state of a snapshot's devices
    /// is known once a worker has read it.
    #[serde(default)]
    pub(super) network: Option<Link>,
}

fn failed(source: std::io::Error) -> DaemonError {
    DaemonError::Worker { source }
}

impl VmRecord {
    /// Returns the ancestors of a child.
    pub(super) fn ancestors_of_child(&self) -> Vec<ProcessId> {
        let mut ancestors = self.ancestors.clone();
        ancestors.extend(self.process);
        let surplus = ancestors.len().saturating_sub(MAX_ANCESTORS);
        ancestors.drain(..surplus);
        ancestors
    }

    /// Reads the record of the VM called `name`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn read(dir: &RuntimeDir, name: &str) -> Result<Option<Self>, DaemonError> {
        check_name(name)?;
        let bytes = dir.read(&vm_record_name(name)).map_err(failed)?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))).transpose()
    }

    /// Reads the record of the VM called `name`, for steps that go on without one. One that cannot be
    /// read is logged.
    pub(super) fn found(dir: &RuntimeDir, name: &str) -> Option<Self> {
        Self::read(dir, name).unwrap_or_else(|error| {
            tracing::warn!(%error, name, "the record of a VM cannot be read");
            None
        })
    }

    /// Reads the record of a VM that must have one.
    ///
    /// # Errors
    /// When the record is missing or cannot be read.
    pub(super) fn expect(dir: &RuntimeDir, name: &str) -> Result<Self, DaemonError> {
        Self::read(dir, name)?.ok_or_else(|| DaemonError::NoSuchVm { name: name.to_owned() })
    }

    /// Returns the recorded process of the VM called `name`, and its pid. None if it has ended, or is not
    /// recorded.
    pub(super) fn own_vm(&self, name: &str) -> Option<(u32, OwnVm)> {
        let is_booted = self.parent.is_none() && self.template.saved.is_empty();
        let (pid, vm) = OwnVm::of_earlier(name, self.process?, &self.template.config, is_booted)?;
        Some((pid, vm.in_session(self.session.as_ref().map(|session| session.name.clone()))))
    }

    /// Reads the records of all VMs.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(super) fn all(dir: &RuntimeDir) -> Result<Vec<(String, Self)>, DaemonError> {
        Ok(Self::names(dir)?
            .into_iter()
            .filter_map(|name| Self::found(dir, &name).map(|found| (name, found)))
            .collect())
    }

    /// Returns the names of all VMs with records.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(super) fn names(dir: &RuntimeDir) -> Result<Vec<String>, DaemonError> {
        let files = dir.entries().map_err(failed)?;
        let names = files.iter().filter_map(|file| file.to_str()?.strip_suffix(".vm"));
        Ok(names.filter(|name| check_name(name).is_ok()).map(str::to_owned).collect())
    }

    /// Checks an image's description by the process of a VM: its configuration and its secrets must
    /// be the recorded ones.
    ///
    /// # Errors
    /// When they are others.
    pub(super) fn check(&self, name: &str, forked: &ForkedVm) -> Result<(), DaemonError> {
        let what = if self.template.config != forked.config {
            "another configuration"
        } else if self.secrets.as_ref().is_some_and(|secrets| !secrets.is_of(&forked.secrets)) {
            "other secrets"
        } else {
            return Ok(());
        };
        let text = format!("the process of {name:?} says that it has {what} than it was started with");
        // No worker has failed, so no other is tried.
        Err(DaemonError::Refused { kind: ProblemKind::Internal, text })
    }

    /// Returns the record of the VM called `name` if its process is the one of `pid`: another VM may have the name by
    /// now.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub(super) fn read_of(dir: &RuntimeDir, name: &str, pid: u32) -> Result<Option<Self>, DaemonError> {
        Ok(Self::read(dir, name)?.filter(|record| record.has_process(pid)))
    }

    /// Whether its process is the one of `pid`.
    pub(super) fn has_process(&self, pid: u32) -> bool {
        self.process.is_some_and(|process| process.pid() == pid)
    }

    /// Keeps records as they are until the guard is dropped.
    pub(super) fn lock() -> MutexGuard<'static, ()> {
        static WRITES: Mutex<()> = Mutex::new(());
        WRITES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the record of the VM of `claim`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn write(&self, claim: &NameClaim) -> Result<(), DaemonError> {
        let _records = Self::lock();
        self.replace(claim.dir(), &claim.name)
    }

    /// Writes the record of the VM called `name`. The caller has the lock and has checked that the
    /// VM still has the name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn replace(&self, dir: &RuntimeDir, name: &str) -> Result<(), DaemonError> {
        let bytes = serde_json::to_vec(self).map_err(|error| failed(error.into()))?;
        dir.write(&vm_record_name(name), &bytes).map_err(failed)
    }

    fn is_of(&self, session: &str) -> bool {
        self.session.as_ref().is_some_and(|own| own.name == session)
    }

    /// Its socket device.
    pub(super) fn vsock(&self) -> Option<VsockInfo> {
        VsockInfo::of(&self.identity)
    }

    pub(super) fn has_interface(&self, tap: &str) -> bool {
        self.identity.nets.iter().any(|net| net.tap == tap)
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

/// The VMs of a session that have not ended.
///
/// # Errors
/// When the runtime directory cannot be read.
pub fn in_session(dir: &Path, session: &str) -> Result<Vec<String>, DaemonError> {
    let all = VmRecord::all(&RuntimeDir::open(dir)?)?;
    let mine = |vm_record: &VmRecord| vm_record.is_of(session);
    Ok(all.into_iter().filter(|(_, vm_record)| mine(vm_record)).map(|(name, _)| name).collect())
}

/// Returns whether the VM called `name` has not ended, and is of a session.
///
/// # Errors
/// When the record cannot be read.
pub fn is_in_session(dir: &Path, name: &str, session: &str) -> Result<bool, DaemonError> {
    let vm_record = VmRecord::read(&RuntimeDir::open(dir)?, name)?;
    Ok(vm_record.is_some_and(|vm_record| vm_record.is_of(session)))
}

/// All VMs of a runtime directory that have not ended.
///
/// # Errors
/// When the directory cannot be read.
pub fn vms_in(dir: &Path) -> Result<Vec<String>, DaemonError> {
    Ok(VmRecord::all(&RuntimeDir::open(dir)?)?.into_iter().map(|(name, _)| name).collect())
}

/// Returns the socket device of a VM as its supervisor made it, independent of the VM's process.
/// The outer `None` is for a VM that no supervisor has started.
///
/// # Errors
/// When the record cannot be read.
pub(crate) fn vsock_known(dir: &Path, name: &str) -> Result<Option<Option<VsockInfo>>, DaemonError> {
    Ok(VmRecord::read(&RuntimeDir::open(dir)?, name)?.map(|vm_record| vm_record.vsock()))
}

/// Device and inode of a socket.
pub(super) fn inode(socket: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(socket).ok()?;
    found.file_type().is_socket().then(|| (found.dev(), found.ino()))
}

/// Records the end of a VM whose process has ended, and removes its files. Returns its record.
pub(super) fn clear_up(
    claim: NameClaim,
    exit: WorkerExit,
    was_orderly: bool,
    flight: Vec<FlightEvent>,
) -> Option<VmRecord> {
    let vm_record = VmRecord::read(claim.dir(), &claim.name).unwrap_or_else(|error| {
        tracing::warn!(%error, name = claim.name, "not all of a VM's files are known");
        None
    });
    let parent = vm_record.as_ref().and_then(|vm_record| vm_record.parent.clone());
    settle(claim.dir(), &claim.name, KnownEnd { exit, parent, flight }, was_orderly);
    vm_record.iter().for_each(VmRecord::remove_sockets);
    drop(claim);
    vm_record
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use clade_block::DiskConfig;
    use clade_devices::virtio::block::BlockOptions;

    use zeroize::Zeroizing;

    use clade_api::Labels;
    use clade_api::secrets::{Secret, Secrets};

    use super::*;

    fn forked(config: &VmConfig) -> ForkedVm {
        let (none, config, labels) = (Duration::ZERO, config.clone(), Labels::default());
        ForkedVm {
            config,
            labels,
            secrets: clade_api::secrets::Secrets::None,
            network: None,
            generation: 1,
            pause: none,
            freeze: none,
            park: none,
            in_flight: 0,
            remapped: 0,
            copied: 0,
        }
    }

    fn with_disk(path: &str) -> VmConfig {
        let mut config = VmConfig::bare(32 << 20, 1).unwrap();
        let (disk, device) = (DiskConfig::new(Path::new(path)), BlockOptions::default());
        config.disks.push(DiskSpec { disk, device });
        config
    }

    /// A VM without disks whose agent is behind this socket.
    pub(crate) fn record_with(socket: Option<&str>) -> VmRecord {
        let vsock = socket.map(|socket| clade_devices::virtio::vsock::VsockOptions { cid: 3, socket: socket.into() });
        VmRecord {
            template: template_of_boot(&VmConfig::bare(32 << 20, 1).unwrap()),
            identity: Identity { vsock, ..Identity::default() },
            overlays: Vec::new(),
            socket: None,
            session: None,
            process: None,
            parent: None,
            ancestors: Vec::new(),
            bounds: Bounds::default(),
            secrets: None,
            links: Vec::new(),
            network: None,
        }
    }

    #[test]
    fn a_record_that_cannot_be_read_keeps_its_name() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(scratch.path()).unwrap();
        record_with(None).replace(&dir, "good").unwrap();
        for file in ["bad.vm", "not a name.vm"] {
            fs::write(scratch.path().join(file), "{").unwrap();
        }
        let mut names = VmRecord::names(&dir).unwrap();
        names.sort();
        assert_eq!(names, ["bad", "good"]);
        VmRecord::read(&dir, "bad").unwrap_err();
        // Of the process that is meant alone.
        let own = ProcessId::of(std::process::id());
        VmRecord { process: own, ..record_with(None) }.replace(&dir, "own").unwrap();
        for (name, pid, is_its) in [("own", std::process::id(), true), ("own", 1, false), ("good", 1, false)] {
            assert_eq!(VmRecord::read_of(&dir, name, pid).unwrap().is_some(), is_its, "{name} of {pid}");
        }
        fs::remove_file(scratch.path().join("own.vm")).unwrap();
        assert!(VmRecord::found(&dir, "bad").is_none() && VmRecord::found(&dir, "none").is_none());
        assert_eq!(VmRecord::all(&dir).unwrap(), [("good".to_owned(), record_with(None))]);
    }

    #[test]
    fn a_child_knows_its_nearest_ancestors() {
        let own = ProcessId::of(std::process::id());
        let first = ProcessId::of(std::os::unix::process::parent_id()).unwrap();
        let mut record = VmRecord { process: own, ancestors: vec![first], ..record_with(None) };
        assert_eq!(record.ancestors_of_child(), [first, own.unwrap()]);
        for _ in 1..MAX_ANCESTORS {
            record.ancestors = record.ancestors_of_child();
        }
        assert_eq!((record.ancestors.len(), record.ancestors[0]), (MAX_ANCESTORS, first));
        record.ancestors = record.ancestors_of_child();
        assert_eq!((record.ancestors.len(), record.ancestors[0]), (MAX_ANCESTORS, own.unwrap()));
    }

    #[test]
    fn what_a_worker_says_of_its_vm_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(dir.path()).unwrap();
        let config = with_disk("/srv/disk");
        let template = template_of_boot(&config);
        assert_eq!(template.overlays, [Path::new("/srv/.clade-overlays")]);
        let identity = Identity::default();
        let known = VmRecord {
            template,
            identity,
            overlays: Vec::new(),
            socket: None,
            session: None,
            process: None,
            parent: None,
            ancestors: Vec::new(),
            bounds: Bounds::default(),
            secrets: None,
            links: Vec::new(),
            network: None,
        };
        let claim = NameClaim::new(&dir, "web").unwrap();
        known.write(&claim).unwrap();
        let written = VmRecord::read(&dir, "web").unwrap().unwrap();
        assert_eq!(written, known);
        written.check("web", &forked(&config)).unwrap();
        // The process claims another disk.
        let refused = written.check("web", &forked(&with_disk("/etc/shadow"))).unwrap_err();
        assert!(clade_vmm::error_chain(&refused).contains("another configuration"), "{refused:?}");
        // The process claims other secrets, so that children have those it leaves out.
        let secret = |name: &str| Secret { name: name.to_owned(), value: Zeroizing::new(vec![7; 32]) };
        let held = |names: &[&str]| Secrets::of(names.iter().map(|name| secret(name)).collect());
        let own = held(&["token", "key"]);
        let claimed =
            [held(&["token"]), held(&["key", "token"]), held(&["tokenkey"]), Secrets::None, Secrets::Withheld];
        let of = |secrets: &Secrets| ForkedVm { secrets: secrets.clone(), ..forked(&config) };
        let record = SecretsRecord::of(&own).unwrap();
        for (record, own) in [(record.of_child(false), &own), (record.of_child(true), &Secrets::Withheld)] {
            let known = VmRecord { secrets: Some(record), ..known.clone() };
            known.check("web", &of(own)).unwrap();
            for other in &claimed {
                if !(matches!((own, other), (Secrets::Withheld, Secrets::Withheld))) {
                    let refused = known.check("web", &of(other)).unwrap_err();
                    assert!(clade_vmm::error_chain(&refused).contains("other secrets"), "{other:?}: {refused:?}");
                }
            }
        }
        let text = serde_json::to_string(&record).unwrap();
        assert!(!text.contains("token") && !text.contains("[7,7"), "{text}");
        assert_ne!(record, SecretsRecord::of(&own).unwrap(), "the salt is another");
        assert_eq!(VmRecord::all(&dir).unwrap(), [("web".to_owned(), known)]);
        drop(claim);
        assert_eq!(VmRecord::read(&dir, "web").unwrap(), None);
    }
}
