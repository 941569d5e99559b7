//! The processes of VMs that the supervisor has started.
//!
//! A process is identified by its pidfd: its pid may be reused, and its own statements are not
//! trusted. A process that has given its name back and does not end is killed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::cgroups::Group;
use clade_api::flight::FlightEvent;
use clade_api::{MergingVm, WorkerExit, flight};
use clade_vmm::vm::VmConfig;
use clade_worker::ahead::Learning;
use clade_worker::{PARENT_DEATH_EXIT, UNMERGED, has_ended};

/// Time limit for the end of a process that has given its name back.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for a process that merges the writes since a fork into its disks, beside a second for each
/// MiB of them. It begins when no other VM or checkpoint uses the disks.
pub const COMMIT_TIMEOUT: Duration = Duration::from_secs(600);
/// The longest of these limits, and that of a block device, which has no length.
const MAX_COMMIT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// VMs kept on the list of those whose disks lack writes.
const MAX_UNMERGED: usize = 16;
/// Time limit for the end of a killed process: it may have much memory.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The identity of a process at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pid: u32,
    /// In clock ticks since the host's start: a reused pid has another value.
    started: u64,
}

impl ProcessId {
    /// Identifies the process that has the pid now, or returns None.
    pub(super) fn of(pid: u32) -> Option<Self> {
        // In one read: the kernel makes all of the text for each.
        let (mut bytes, file) = ([0; 1024], File::open(format!("/proc/{pid}/stat")).ok()?);
        let read = file.read_at(&mut bytes, 0).ok()?;
        let stat = String::from_utf8_lossy(&bytes[..read]);
        // Field 22; the second is the name, which may have spaces and parentheses.
        let started = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }

    pub(super) fn pid(self) -> u32 {
        self.pid
    }

    /// Opens a pidfd of the process. None if it has ended.
    pub(super) fn open(self) -> Option<OwnedFd> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid as i32)?, PidfdFlags::empty()).ok()?;
        // After the open: from here on the pidfd is of that process.
        (Self::of(self.pid) == Some(self)).then_some(pidfd)
    }
}

/// Kills a process, and waits for its end. Returns whether it has ended.
pub(super) fn kill(pidfd: &OwnedFd) -> bool {
    // Fails for a process that has already ended.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    has_ended(pidfd, KILL_TIMEOUT)
}

/// A VM's process.
#[derive(Clone, Debug)]
pub(super) struct OwnVm {
    pub(super) name: String,
    pub(super) process: Arc<OwnedFd>,
    /// Images of disks that it may merge writes into at its end.
    images: Vec<PathBuf>,
    /// Time limit for its end once it has given its name back. Known from the start: a file system may hang later.
    limit: Duration,
    /// The name of its session.
    session: Option<String>,
    /// When it gave its name back.
    given_back: Option<Instant>,
    /// Sweeps that have found the process ended, before the report of its end.
    found_ended: u32,
    /// Whether a request has stopped it: its end is then expected.
    pub(super) is_stopped: bool,
    /// Its control group, removed with it.
    pub(super) group: Option<Arc<Group>>,
    /// The file of its flight record.
    flight: Option<Arc<OwnedFd>>,
    /// The file for its written pages, for the checkpoint that it was forked from.
    ahead: Option<(Arc<OwnedFd>, Weak<Learning>)>,
}

impl OwnVm {
    /// Makes the record of the process of a VM that was booted or forked.
    pub(super) fn new(name: &str, process: OwnedFd, config: &VmConfig, is_booted: bool) -> Self {
        let given = config.disks.iter().filter(|disk| is_booted && !disk.disk.read_only && !disk.disk.ephemeral);
        let images: Vec<PathBuf> = given.map(|disk| disk.disk.path.clone()).collect();
        Self {
            name: name.to_owned(),
            process: Arc::new(process),
            limit: leave_timeout(&images),
            images,
            session: None,
            given_back: None,
            found_ended: 0,
            is_stopped: false,
            group: None,
            flight: None,
            ahead: None,
        }
    }

    /// Makes that of a VM which an earlier supervisor has started, with its pid. None if the process
    /// has ended.
    pub(super) fn of_earlier(
        name: &str,
        process: ProcessId,
        config: &VmConfig,
        is_booted: bool,
    ) -> Option<(u32, Self)> {
        let vm = Self::new(name, process.open()?, config, is_booted);
        vm.is_there().then_some((process.pid(), vm))
    }

    pub(super) fn in_group(self, group: Option<Group>) -> Self {
        Self { group: group.map(Arc::new), ..self }
    }

    pub(super) fn in_session(self, session: Option<String>) -> Self {
        Self { session, ..self }
    }

    /// Returns whether it may merge writes into one of these images.
    pub(super) fn writes_to(&self, images: &BTreeSet<PathBuf>) -> bool {
        self.images.iter().any(|image| images.contains(image))
    }

    /// Describes the VM once it has ended. `used` are the images that VMs and checkpoints use.
    pub(super) fn merging(&self, used: &BTreeSet<PathBuf>) -> MergingVm {
        let waits = self.images.iter().any(|image| used.contains(image));
        MergingVm { name: self.name.clone(), session: self.session.clone(), waits, failed: false }
    }

    pub(super) fn recorded_in(self, flight: &Arc<OwnedFd>) -> Self {
        Self { flight: Some(Arc::clone(flight)), ..self }
    }

    pub(super) fn noting(self, ahead: Option<(OwnedFd, Weak<Learning>)>) -> Self {
        Self { ahead: ahead.map(|(note, learning)| (Arc::new(note), learning)), ..self }
    }

    /// Has its checkpoint, if that still exists, learn its written pages. Call it after the end.
    pub(super) fn teach(&self) {
        if let Some((note, learning)) = &self.ahead
            && let Some(learning) = learning.upgrade()
        {
            learning.learn(note);
        }
    }

    /// Returns the events that its process has noted.
    pub(super) fn flight(&self) -> Vec<FlightEvent> {
        self.flight.as_ref().map(flight::read).unwrap_or_default()
    }

    /// Whether the process, which has ended by `exit`, has ended with the command of its session.
    pub(super) fn died_with_command(&self, exit: WorkerExit) -> bool {
        self.session.is_some() && exit.code == Some(PARENT_DEATH_EXIT)
    }

    pub(super) fn has_name(&self) -> bool {
        self.given_back.is_none()
    }

    fn is_there(&self) -> bool {
        !has_ended(&self.process, Duration::ZERO)
    }
}

/// The processes, by pid.
#[derive(Debug, Default)]
pub(super) struct Processes {
    by_pid: Mutex<BTreeMap<u32, OwnVm>>,
    unmerged: Mutex<VecDeque<MergingVm>>,
}

impl Processes {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u32, OwnVm>> {
        self.by_pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that an ended VM's process has ended by `exit`, if its disks lack the writes since a
    /// fork: they could not be merged, or the process was killed.
    ///
    /// A VM that was to be stopped and did not answer was killed while it ran: the answer to its stop reports that.
    pub(super) fn note_end(&self, exit: WorkerExit) {
        let vm = self.all().get(&exit.pid).cloned();
        let Some(vm) = vm.filter(|vm| !vm.images.is_empty() && !vm.is_stopped && !vm.is_there()) else { return };
        let is_killed = exit.signal.is_some() && !vm.has_name();
        if !is_killed && exit.code != Some(UNMERGED.into()) {
            return;
        }
        let mut unmerged = self.unmerged.lock().unwrap_or_else(PoisonError::into_inner);
        unmerged.push_back(MergingVm { failed: true, ..vm.merging(&BTreeSet::new()) });
        if unmerged.len() > MAX_UNMERGED {
            unmerged.pop_front();
        }
    }

    /// Returns the last VMs whose disks lack the writes since a fork.
    pub(super) fn unmerged(&self) -> Vec<MergingVm> {
        self.unmerged.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Adds processes of new VMs. Earlier VMs of their names have ended, though that may not be reported yet.
    pub(super) fn add(&self, vms: impl IntoIterator<Item = (u32, OwnVm)>) {
        let vms: Vec<(u32, OwnVm)> = vms.into_iter().collect();
        let names: HashSet<&str> = vms.iter().map(|(_, vm)| vm.name.as_str()).collect();
        let mut all = self.all();
        for earlier in all.values_mut().filter(|earlier| names.contains(earlier.name.as_str())) {
            earlier.given_back.get_or_insert_with(Instant::now);
        }
        all.extend(vms);
    }

    /// Notes that `vm` has given its name back, also if an earlier supervisor has started it. Another VM
    /// may have the name by now.
    pub(super) fn leaves(&self, pid: u32, vm: OwnVm) {
        let mut all = self.all();
        let now = Instant::now();
        match all.get_mut(&pid) {
            // Also if it has ended: the report of its end must not take the name again.
            Some(known) => _ = known.given_back.get_or_insert(now),
            None if vm.is_there() => _ = all.insert(pid, OwnVm { given_back: Some(now), ..vm }),
            None => {}
        }
    }

    pub(super) fn remove(&self, pid: u32) -> Option<OwnVm> {
        self.all().remove(&pid)
    }

    /// Removes a process whose end is reported. The report may be late, and the pid another process's by now.
    pub(super) fn remove_ended(&self, pid: u32) -> Option<OwnVm> {
        let mut all = self.all();
        if all.get(&pid).is_some_and(OwnVm::is_there) { None } else { all.remove(&pid) }
    }

    /// Returns the names of VMs that still have them.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.all().values().filter(|vm| vm.has_name()).map(|vm| vm.name.clone()).collect()
    }

    /// Returns the process of a VM that has its name, and its pid.
    pub(super) fn of(&self, name: &str) -> Option<(u32, OwnVm)> {
        let all = self.all();
        let found = all.iter().find(|(_, vm)| vm.has_name() && vm.name == name);
        found.map(|(pid, vm)| (*pid, vm.clone()))
    }

    /// Returns the pids of the processes of those of these VMs that have their names.
    pub(super) fn pids_of(&self, names: &[String]) -> HashMap<String, u32> {
        let names: HashSet<&String> = names.iter().collect();
        let all = self.all();
        let ours = all.iter().filter(|(_, vm)| vm.has_name() && names.contains(&vm.name));
        ours.map(|(pid, vm)| (vm.name.clone(), *pid)).collect()
    }

    pub(super) fn is_there(&self, pid: u32) -> bool {
        self.all().get(&pid).is_some_and(OwnVm::is_there)
    }

    /// Marks a VM that a request has stopped, or is about to kill.
    pub(super) fn mark_stopped(&self, pid: u32) {
        if let Some(vm) = self.all().get_mut(&pid) {
            vm.is_stopped = true;
        }
    }

    /// Whether the process has given its name back, and its end is not reported yet.
    pub(super) fn gave_back(&self, pid: u32) -> bool {
        self.all().get(&pid).is_some_and(|vm| !vm.has_name())
    }

    /// Notes that the process has given its name back. The process may take some time to end.
    pub(super) fn give_back(&self, pid: u32) {
        if let Some(vm) = self.all().get_mut(&pid) {
            vm.given_back.get_or_insert_with(Instant::now);
        }
    }

    /// Returns the ended VMs whose processes may write to disks. `has_name` returns whether
    /// a VM still runs as a process.
    pub(super) fn writers(&self, has_name: impl Fn(&str, u32) -> bool) -> Vec<OwnVm> {
        // Until its end is noted: the process may have ended by now.
        let may_write = |vm: &OwnVm| !vm.images.is_empty();
        // Not under the lock: `has_name` reads files.
        let all: Vec<(u32, OwnVm)> = self.all().iter().map(|(pid, vm)| (*pid, vm.clone())).collect();
        let writers = all.into_iter().filter(|(pid, vm)| may_write(vm) && !has_name(&vm.name, *pid));
        writers.map(|(_, vm)| vm).collect()
    }

    /// Returns whether a process may write to disks.
    pub(super) fn has_writers(&self) -> bool {
        self.all().values().any(|vm| !vm.images.is_empty())
    }

    /// Returns whether no process is known: each VM's has ended.
    pub(super) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    /// Forgets processes that `most` calls have found ended, except those of VMs that `is_awaited` accepts.
    /// Until then the report of an end may be on its way: without the process, it is not understood.
    pub(super) fn forget_ended(&self, is_awaited: impl Fn(&str) -> bool, most: u32) {
        self.all().retain(|_, vm| {
            vm.found_ended += u32::from(!vm.is_there());
            vm.found_ended < most || (vm.has_name() && is_awaited(&vm.name))
        });
    }

    /// Kills processes that run on for too long after they have given their names back. `is_used`
    /// returns whether another VM or a checkpoint uses an image: until then the process may wait.
    pub(super) fn kill_overdue(&self, is_used: impl Fn(&PathBuf) -> bool) {
        let all = self.all();
        let left = all.iter().filter(|(_, vm)| vm.given_back.is_some()).map(|(pid, vm)| (*pid, vm.clone()));
        let left: Vec<(u32, OwnVm)> = left.collect();
        // `is_used` reads files.
        drop(all);
        for (pid, vm) in left {
            if vm.images.iter().any(&is_used) {
                let mut all = self.all();
                let same = all.get_mut(&pid).filter(|known| Arc::ptr_eq(&known.process, &vm.process));
                same.into_iter().for_each(|vm| vm.given_back = Some(Instant::now()));
                continue;
            }
            if !is_overdue(&vm) {
                continue;
            }
            tracing::warn!(name = vm.name, pid, "a process has given its VM's name back and runs on: it is killed");
            let _ = pidfd_send_signal(&vm.process, Signal::KILL);
        }
    }
}

fn is_overdue(vm: &OwnVm) -> bool {
    vm.given_back.is_some_and(|since| since.elapsed() > vm.limit)
}

/// Returns the time limit for a process that may write these images. A kill of one that merges leaves an image
/// without a journal half old and half new.
fn leave_timeout(images: &[PathBuf]) -> Duration {
    if images.is_empty() {
        return LEAVE_TIMEOUT;
    }
    let bytes_of = |image: &PathBuf| match std::fs::metadata(image) {
        Ok(found) if found.is_file() => found.len(),
        Ok(_) => u64::MAX,
        Err(_) => 0,
    };
    let bytes = images.iter().map(bytes_of).fold(0, u64::saturating_add);
    COMMIT_TIMEOUT.saturating_add(Duration::from_secs(bytes >> 20)).min(MAX_COMMIT_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use clade_block::DiskConfig;
    use clade_devices::virtio::block::BlockOptions;
    use clade_vmm::vm::DiskSpec;

    use super::*;

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("60").spawn().unwrap())
        }

        fn id(&self) -> ProcessId {
            ProcessId::of(self.0.id()).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn config() -> VmConfig {
        VmConfig::bare(32 << 20, 1).unwrap()
    }

    fn long_ago() -> Option<Instant> {
        Instant::now().checked_sub(COMMIT_TIMEOUT + Duration::from_secs(1))
    }

    #[test]
    fn a_process_has_time_to_merge_by_the_size_of_its_images() {
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str, bytes: u64| {
            let path = dir.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            path
        };
        let (small, large, huge) = (image("small", 1 << 20), image("large", 3 << 30), image("huge", 1 << 42));
        let seconds = |images: &[&PathBuf]| {
            leave_timeout(&images.iter().map(|path| (*path).clone()).collect::<Vec<_>>()).as_secs()
        };
        assert_eq!((seconds(&[]), seconds(&[&dir.path().join("gone")])), (30, 600));
        assert_eq!((seconds(&[&small]), seconds(&[&small, &large])), (601, 601 + 3072));
        let day = 24 * 3600;
        assert_eq!((seconds(&[&small, &huge]), seconds(&[&PathBuf::from("/dev/null")])), (day, day));
    }

    #[test]
    fn a_number_is_another_process_when_it_has_another_start() {
        let sleeper = Sleeper::start();
        let id = sleeper.id();
        assert!(id.open().is_some());
        let other = ProcessId { started: id.started + 1, ..id };
        assert!(other.open().is_none(), "the number was another's");
        let pidfd = id.open().unwrap();
        drop(sleeper);
        assert!(has_ended(&pidfd, Duration::ZERO) && id.open().is_none());
    }

    #[test]
    fn a_process_of_an_earlier_supervisor_that_gives_its_name_back_is_killed_too() {
        let (leaves, another) = (Sleeper::start(), Sleeper::start());
        let (processes, earlier) = (Processes::default(), || OwnVm::of_earlier("web", leaves.id(), &config(), true));
        let (pid, vm) = earlier().unwrap();
        // Another VM has the name by now, and keeps it.
        let new = OwnVm::new("web", another.id().open().unwrap(), &config(), true);
        processes.add([(another.id().pid(), new)]);
        processes.leaves(pid, vm);
        assert_eq!(processes.of("web").map(|(pid, _)| pid), Some(another.id().pid()));
        assert!(processes.gave_back(pid));
        processes.kill_overdue(|_| false);
        assert!(processes.is_there(pid), "it has time");
        let Some(since) = long_ago() else { return };
        processes.all().get_mut(&pid).unwrap().given_back = Some(since);
        processes.kill_overdue(|_| false);
        let process = processes.all()[&pid].process.clone();
        assert!(has_ended(&process, KILL_TIMEOUT) && processes.is_there(another.id().pid()));
        assert!(earlier().is_none(), "it has ended");
        // One of this supervisor's that has ended, and whose end is not reported yet.
        let (pid, vm) = processes.of("web").unwrap();
        assert!(kill(&vm.process));
        processes.leaves(pid, vm);
        assert!(processes.of("web").is_none() && processes.gave_back(pid));
    }

    #[test]
    fn a_process_that_gives_its_name_back_and_lives_on_is_killed() {
        let (here, gone) = (Sleeper::start(), Sleeper::start());
        let processes = Processes::default();
        for (name, sleeper) in [("here", &here), ("gone", &gone)] {
            let vm = OwnVm::new(name, sleeper.id().open().unwrap(), &config(), true);
            processes.add([(sleeper.id().pid(), vm)]);
        }
        let pid = gone.id().pid();
        processes.give_back(pid);
        assert_eq!(processes.names(), BTreeSet::from(["here".to_owned()]));
        assert!(processes.of("gone").is_none() && processes.of("here").is_some());
        processes.kill_overdue(|_| false);
        assert!(processes.is_there(pid), "it has time");
        let Some(since) = long_ago() else { return };
        processes.all().get_mut(&pid).unwrap().given_back = Some(since);
        processes.kill_overdue(|_| false);
        let ended = &processes.all()[&pid].process.clone();
        assert!(has_ended(ended, KILL_TIMEOUT));
        assert!(!processes.is_there(pid) && processes.is_there(here.id().pid()));
        processes.forget_ended(|_| true, 2);
        assert_eq!(processes.all().len(), 2, "the report of its end may be on its way");
        processes.forget_ended(|_| true, 2);
        assert_eq!(processes.all().keys().copied().collect::<Vec<_>>(), [here.id().pid()]);
        // Another VM gets the name before the end of the first is reported.
        let (again, pid) = (Sleeper::start(), here.id().pid());
        let vm = OwnVm::new("here", again.id().open().unwrap(), &config(), true);
        processes.add([(again.id().pid(), vm)]);
        assert_eq!(processes.of("here").map(|(pid, _)| pid), Some(again.id().pid()));
        assert!(processes.gave_back(pid) && !processes.gave_back(again.id().pid()));
        drop(here);
        let here = again;
        (0..2).for_each(|_| processes.forget_ended(|_| true, 2));
        assert!(processes.remove(pid).is_none());
        // One that has its name waits as long as a sweep says so.
        let pid = here.id().pid();
        drop(here);
        (0..5).for_each(|_| processes.forget_ended(|name| name == "here", 2));
        assert!(processes.of("here").is_some());
        processes.forget_ended(|_| false, 2);
        assert!(processes.remove(pid).is_none());
    }

    #[test]
    fn a_late_report_of_an_end_takes_no_process_that_has_the_number_by_now() {
        let sleeper = Sleeper::start();
        let (mut with_disk, pid) = (config(), sleeper.id().pid());
        let (disk, device) = (DiskConfig::new("/srv/disk".as_ref()), BlockOptions::default());
        with_disk.disks.push(DiskSpec { disk, device });
        let mut vm = OwnVm::new("web", sleeper.id().open().unwrap(), &with_disk, true);
        vm.given_back = Some(Instant::now());
        let processes = Processes::default();
        processes.add([(pid, vm)]);
        let exit = WorkerExit { pid, signal: Some(libc::SIGKILL), code: None };
        processes.note_end(exit);
        assert!(processes.remove_ended(pid).is_none() && processes.unmerged().is_empty());
        drop(sleeper);
        processes.note_end(exit);
        assert_eq!(processes.unmerged().len(), 1);
        assert_eq!(processes.remove_ended(pid).unwrap().name, "web");
    }

    #[test]
    fn a_process_waits_while_its_images_are_used_and_only_if_it_was_booted_with_them() {
        let sleeper = Sleeper::start();
        let (mut with_disk, pid) = (config(), sleeper.id().pid());
        let (disk, device) = (DiskConfig::new("/srv/disk".as_ref()), BlockOptions::default());
        with_disk.disks.push(DiskSpec { disk, device });
        let child = OwnVm::new("child", sleeper.id().open().unwrap(), &with_disk, false);
        assert!(child.images.is_empty());
        let Some(since) = long_ago() else { return };
        let mut vm = OwnVm::new("web", sleeper.id().open().unwrap(), &with_disk, true);
        vm.given_back = Some(since);
        let processes = Processes::default();
        processes.add([(pid, vm)]);
        processes.kill_overdue(|image| {
            // Without the lock: a look at files may take long.
            assert_eq!(processes.names(), BTreeSet::new());
            image.ends_with("disk")
        });
        assert!(processes.is_there(pid));
        // From then on it has time to write.
        processes.kill_overdue(|_| false);
        assert!(processes.is_there(pid));
    }
}
