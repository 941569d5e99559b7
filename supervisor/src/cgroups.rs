//! A control group for each VM (cgroup v2): limits of memory and processor time for its process.
//!
//! ```text
//! DIR                     delegated to the supervisor: it may make groups there
//! ├── supervisor          the supervisor, its zygote, and workers that are prepared
//! └── vm-NAME             a VM's worker, moved there before it is told what to do
//! ```
//!
//! | file of a VM's group | value |
//! |---|---|
//! | `memory.max` | the VM's limit; without one [`RAM_TIMES`] its RAM and [`OVERHEAD`] |
//! | `memory.swap.max` | 0: a VM beyond its limit ends, and does not slow the host down |
//! | `memory.oom.group` | 1 |
//! | `cpu.max` | the VM's limit, if it has one |
//! | `pids.max` | [`MAX_THREADS`] |
//!
//! A group is removed with its VM: processes left in it are killed. If a VM exceeds its memory, the
//! kernel ends that VM alone, and its record has the reason.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use clade_api::CgroupError;
use serde::{Deserialize, Serialize};

/// Default memory limit of a VM's process, in times the VM's RAM: its own pages, and its earlier
/// pages that checkpoints, forks and a last snapshot still show.
const RAM_TIMES: u64 = 4;
/// Memory of a VM's process beside that.
const OVERHEAD: u64 = 512 << 20;
/// Threads of a VM's process: vCPUs, devices, requests.
const MAX_THREADS: u64 = 2048;
/// The period of processor time, in microseconds.
const PERIOD_US: f64 = 100_000.0;
/// Attempts to remove a group whose processes have been killed, and the interval between them.
const REMOVE_TRIES: u32 = 50;
const REMOVE_INTERVAL: Duration = Duration::from_millis(10);
/// Mount point of control groups.
const MOUNT: &str = "/sys/fs/cgroup";
const OWN: &str = "supervisor";
const PREFIX: &str = "vm-";

/// Place of the VMs' control groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CgroupPlace {
    /// Below the supervisor's own group, if that has a memory controller and no other process: as
    /// under systemd with `Delegate=yes`. Otherwise nowhere.
    #[default]
    Auto,
    /// Nowhere.
    Off,
    /// In this directory.
    Dir(PathBuf),
}

impl FromStr for CgroupPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            dir if Path::new(dir).is_absolute() => Ok(Self::Dir(dir.into())),
            other => Err(format!("{other:?} is neither auto nor off, nor an absolute path")),
        }
    }
}

/// Resource limits of a VM's process on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bounds {
    /// Memory in MiB.
    pub(crate) memory_mib: Option<u64>,
    /// Processors.
    pub(crate) cpus: Option<f64>,
}

impl Bounds {
    pub(crate) fn is_none(self) -> bool {
        self == Self::default()
    }

    /// Returns the memory limit in bytes of a VM with `ram`.
    fn memory(self, ram: u64) -> u64 {
        self.memory_mib.map_or_else(|| (RAM_TIMES * ram).saturating_add(OVERHEAD), |mib| mib.saturating_mul(1 << 20))
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CgroupError + '_ {
    |source| CgroupError { path: path.to_owned(), source }
}

/// The groups of a supervisor's VMs. Clones are handles to the same groups.
#[derive(Clone, Debug)]
pub(super) struct Cgroups(Arc<CgroupsShared>);

#[derive(Debug)]
struct CgroupsShared {
    dir: PathBuf,
    /// Whether the place has a memory controller.
    has_memory: bool,
    has_cpu: bool,
    /// Groups that are in use.
    used: Mutex<Vec<PathBuf>>,
}

impl CgroupsShared {
    fn used(&self) -> MutexGuard<'_, Vec<PathBuf>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the supervisor's group, below the mount point.
fn own_group() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = Path::new(MOUNT).join(text.lines().find_map(|line| line.strip_prefix("0::/"))?);
    // The service manager started it there (DelegateSubgroup=), or it is a later supervisor.
    let is_divided = own.file_name().is_some_and(|name| name == OWN);
    if is_divided { own.parent().map(Path::to_owned) } else { Some(own) }
}

/// Returns whether this process alone may divide a group.
fn is_delegated(dir: &Path) -> bool {
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let own = std::process::id().to_string();
    let is_alone = read("cgroup.procs").split_whitespace().all(|pid| pid == own);
    is_alone && read("cgroup.controllers").split_whitespace().any(|controller| controller == "memory")
}

impl Cgroups {
    /// Opens the groups at `place`. Returns None if `place` is off, or if it is automatic and has
    /// no delegated group.
    ///
    /// # Errors
    /// When the directory is not a group, or may not be divided.
    pub(super) fn open(place: &CgroupPlace) -> Result<Option<Self>, CgroupError> {
        match place {
            CgroupPlace::Off => Ok(None),
            CgroupPlace::Dir(dir) => Self::in_dir(dir).map(Some),
            CgroupPlace::Auto => match own_group().filter(|dir| is_delegated(dir)) {
                Some(dir) => Self::in_dir(&dir).map(Some),
                None => {
                    tracing::info!("VMs have no control groups: this process's own is not delegated to it");
                    Ok(None)
                }
            },
        }
    }

    fn in_dir(dir: &Path) -> Result<Self, CgroupError> {
        let procs = fs::read_to_string(dir.join("cgroup.procs")).map_err(failed(dir))?;
        // A group with processes gives its children no controllers. So this process moves to a
        // leaf, with its threads and its later zygote.
        let own = std::process::id().to_string();
        if procs.split_whitespace().any(|pid| pid == own) {
            let leaf = dir.join(OWN);
            make(&leaf).and_then(|()| fs::write(leaf.join("cgroup.procs"), &own)).map_err(failed(&leaf))?;
        }
        let there = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
        for controller in ["memory", "cpu", "pids"] {
            if !there.split_whitespace().any(|found| found == controller) {
                tracing::warn!(controller, dir = %dir.display(), "the control group has no such controller: VMs are not limited by it");
                continue;
            }
            fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")).map_err(failed(dir))?;
        }
        let [has_memory, has_cpu] = ["memory", "cpu"].map(|name| there.split_whitespace().any(|found| found == name));
        let shared = CgroupsShared { dir: dir.to_owned(), has_memory, has_cpu, used: Mutex::default() };
        let groups = Self(Arc::new(shared));
        groups.tidy();
        Ok(groups)
    }

    /// Whether a VM is held to `bounds`. The process of a VM without a limit of memory may have all of the host's.
    pub(super) fn enforces(&self, bounds: Bounds) -> bool {
        self.0.has_memory && (self.0.has_cpu || bounds.cpus.is_none())
    }

    /// Removes the groups of VMs that have ended without this supervisor.
    pub(super) fn tidy(&self) {
        for entry in fs::read_dir(&self.0.dir).into_iter().flatten().flatten() {
            let is_vm = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
            // Under the lock: a group made meanwhile is in use.
            let used = self.0.used();
            if is_vm && !used.contains(&entry.path()) {
                // Refused while a process is in it.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// Makes the group of the VM called `name` with `ram` bytes of RAM.
    ///
    /// # Errors
    /// When it cannot be made, or a limit cannot be set.
    pub(super) fn make(&self, name: &str, bounds: Bounds, ram: u64) -> Result<Group, CgroupError> {
        let group = {
            let mut used = self.0.used();
            let names = std::iter::once(String::new()).chain((1u64..).map(|number| format!(".{number}")));
            let mut paths = names.map(|more| self.0.dir.join(format!("{PREFIX}{name}{more}")));
            // An earlier VM's process may still be ending in the group of that name.
            let path = paths.find(|path| !used.contains(path) && !path.join("cgroup.procs").exists());
            let path = path.unwrap_or_default();
            make(&path).map_err(failed(&path))?;
            used.push(path.clone());
            Group { of: Arc::clone(&self.0), path, memory: bounds.memory(ram) }
        };
        let set = |file: &str, value: &str| {
            let file = group.path.join(file);
            // The file of a missing controller.
            if !file.exists() { Ok(()) } else { fs::write(&file, value).map_err(failed(&file)) }
        };
        set("memory.max", &group.memory.to_string())?;
        set("memory.swap.max", "0")?;
        set("memory.oom.group", "1")?;
        set("pids.max", &MAX_THREADS.to_string())?;
        if let Some(cpus) = bounds.cpus {
            set("cpu.max", &format!("{} {PERIOD_US}", (cpus * PERIOD_US).round()))?;
        }
        Ok(group)
    }
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The group of one VM. A drop removes it only if it is empty: VMs outlive their supervisor.
#[derive(Debug)]
pub(super) struct Group {
    of: Arc<CgroupsShared>,
    path: PathBuf,
    memory: u64,
}

impl Group {
    /// Moves a worker into the group, with all threads that it will start.
    ///
    /// # Errors
    /// When the worker has ended.
    pub(super) fn enter(&self, pid: u32) -> Result<(), CgroupError> {
        let procs = self.path.join("cgroup.procs");
        fs::write(&procs, pid.to_string()).map_err(failed(&procs))
    }

    /// The limit in MiB, if a process was killed because of it.
    pub(super) fn exceeded(&self) -> Option<u64> {
        let events = fs::read_to_string(self.path.join("memory.events")).ok()?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())?;
        (kills > 0).then_some(self.memory >> 20)
    }
}

impl Group {
    /// Kills the group's processes, and removes the group.
    pub(super) fn remove(&self) {
        // Missing before Linux 5.14. Then the group is removed once its processes have ended.
        let kill = self.path.join("cgroup.kill");
        if kill.exists() {
            let _ = fs::write(kill, "1");
        }
        let removed = (0..REMOVE_TRIES).any(|attempt| {
            if attempt > 0 {
                thread::sleep(REMOVE_INTERVAL);
            }
            match fs::remove_dir(&self.path) {
                Err(error) => error.kind() == io::ErrorKind::NotFound,
                Ok(()) => true,
            }
        });
        if !removed {
            tracing::warn!(group = %self.path.display(), "a control group stays for now");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Refused while a process is in it. `tidy` removes it after that has ended.
        let _ = fs::remove_dir(&self.path);
        self.of.used().retain(|path| *path != self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// Makes the files of a new group in an ordinary directory.
    fn imitate(group: &Path) {
        for file in ["memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max", "cgroup.procs"] {
            fs::write(group.join(file), "max").unwrap();
        }
        fs::write(group.join("memory.events"), "low 0\nmax 9\noom 1\noom_kill 0\noom_group_kill 0\n").unwrap();
    }

    fn imitation() -> (tempfile::TempDir, Cgroups) {
        imitation_with("cpuset cpu io memory pids")
    }

    fn imitation_with(controllers: &str) -> (tempfile::TempDir, Cgroups) {
        let dir = tempfile::tempdir().unwrap();
        imitate(dir.path());
        fs::write(dir.path().join("cgroup.procs"), "1\n2\n").unwrap();
        fs::write(dir.path().join("cgroup.controllers"), format!("{controllers}\n")).unwrap();
        let groups = Cgroups::open(&CgroupPlace::Dir(dir.path().to_owned())).unwrap().unwrap();
        (dir, groups)
    }

    fn read(group: &Path, file: &str) -> String {
        fs::read_to_string(group.join(file)).unwrap()
    }

    #[test]
    fn a_place_is_a_word_or_a_path() {
        assert_eq!("auto".parse(), Ok(CgroupPlace::Auto));
        assert_eq!("off".parse(), Ok(CgroupPlace::Off));
        assert_eq!("/sys/fs/cgroup/clade".parse(), Ok(CgroupPlace::Dir("/sys/fs/cgroup/clade".into())));
        assert!("clade".parse::<CgroupPlace>().is_err());
        assert!(Cgroups::open(&CgroupPlace::Off).unwrap().is_none());
        let none = CgroupPlace::Dir("/nonexistent".into());
        assert!(Cgroups::open(&none).unwrap_err().to_string().contains("/nonexistent"));
    }

    #[test]
    fn a_limit_needs_its_controller() {
        let bounds = |memory_mib, cpus| Bounds { memory_mib, cpus };
        for (controllers, memory, cpus) in
            [("cpu memory pids", true, true), ("memory", true, false), ("cpu", false, false), ("", false, false)]
        {
            let (_dir, groups) = imitation_with(controllers);
            let enforced = (groups.enforces(bounds(Some(64), None)), groups.enforces(bounds(None, Some(0.5))));
            assert_eq!(enforced, (memory, cpus), "{controllers}");
        }
    }

    #[test]
    fn a_group_has_the_limits_of_its_vm() {
        let (dir, groups) = imitation();
        assert_eq!(read(dir.path(), "cgroup.subtree_control"), "+pids");
        let ram = 256 << 20;
        // The kernel makes these files with the group: here they are made before.
        for (name, bounds, memory, cpu) in [
            ("web", Bounds::default(), 4 * ram + OVERHEAD, "max"),
            ("small", Bounds { memory_mib: Some(300), cpus: Some(0.5) }, 300 << 20, "50000 100000"),
        ] {
            let path = dir.path().join(format!("vm-{name}"));
            let made = {
                fs::create_dir(&path).unwrap();
                imitate(&path);
                // Makes the name free.
                fs::rename(path.join("cgroup.procs"), path.join("procs")).unwrap();
                groups.make(name, bounds, ram).unwrap()
            };
            assert_eq!(made.path, path);
            assert_eq!((read(&path, "memory.max"), read(&path, "cpu.max")), (memory.to_string(), cpu.to_owned()));
            assert_eq!((read(&path, "memory.swap.max"), read(&path, "pids.max")), ("0".into(), "2048".into()));
            made.enter(77).unwrap();
            assert_eq!(read(&path, "cgroup.procs"), "77");
            assert_eq!(made.exceeded(), None);
            fs::write(path.join("memory.events"), "oom 1\noom_kill 1\n").unwrap();
            assert_eq!(made.exceeded(), Some(memory >> 20));
            // An ordinary directory stays, with the values written.
            fs::remove_dir_all(&path).unwrap();
            drop(made);
        }
        assert!(groups.0.used().is_empty());
    }

    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A directory for real groups on this host, whatever its controllers.
    fn real() -> Option<PathBuf> {
        let roots = [Path::new(MOUNT).to_owned(), Path::new(MOUNT).join("unified")];
        let root = roots.into_iter().find(|root| root.join("cgroup.controllers").exists());
        let dir = root.map(|root| root.join(format!("clade-test-{}", std::process::id())));
        let dir = dir.filter(|dir| fs::create_dir(dir).is_ok());
        if dir.is_none() {
            clade_test_support::skipped("no control group (v2) can be made here");
        }
        dir
    }

    #[test]
    fn a_group_goes_with_what_is_in_it() {
        let Some(dir) = real() else { return };
        let groups = Cgroups::open(&CgroupPlace::Dir(dir.clone())).unwrap().unwrap();
        let left = dir.join("vm-left");
        fs::create_dir(&left).unwrap();
        let mut sleeper = Sleeper(Command::new("sleep").arg("60").spawn().unwrap());
        let group = groups.make("web", Bounds::default(), 32 << 20).unwrap();
        group.enter(sleeper.0.id()).unwrap();
        let path = group.path.clone();
        assert_eq!(read(&path, "cgroup.procs").trim(), sleeper.0.id().to_string());
        // Another VM of the name while the process is in the group.
        let second = groups.make("web", Bounds::default(), 32 << 20).unwrap();
        assert_eq!((path.ends_with("vm-web"), second.path.ends_with("vm-web.1")), (true, true));
        groups.tidy();
        assert!(path.exists() && second.path.exists() && !left.exists(), "what a supervisor left goes, and no other");
        let can_kill = path.join("cgroup.kill").exists();
        if !can_kill {
            sleeper.0.kill().unwrap();
        }
        drop((groups, second));
        assert!(path.exists(), "a VM outlives its supervisor");
        group.remove();
        if can_kill {
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(sleeper.0.wait().unwrap().signal(), Some(libc::SIGKILL));
        }
        // The process may have needed longer to end than its group was tried.
        group.remove();
        drop(group);
        assert!(!path.exists());
        fs::remove_dir(&dir).unwrap();
    }
}
