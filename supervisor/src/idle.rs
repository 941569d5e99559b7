//! Suspension of VMs that have been idle for a time.
//!
//! A VM is **idle** if its process uses next to no processor time: at most 2 % of one between two
//! checks, a second apart. That includes vCPUs, devices and requests. A halted guest is in the
//! kernel, and uses none; one that only serves its timer uses less than that. A guest that waits
//! for an answer from elsewhere looks idle: the packet with the answer wakes it.
//!
//! On a busy host a guest that computes may get less than that. So each thread's time is compared
//! with the time that it could have had: the interval, less the time that the thread waited for a
//! processor (`/proc/PID/task/TID/schedstat`). A thread that waits all the time is busy.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::processes::ProcessId;
use super::vm_record::VmRecord;
use super::{Inner, Supervisor};
use clade_api::http::{Cancel, THREAD_PATIENCE, on_a_thread};
use clade_api::{DaemonError, ProblemKind, SuspendAfterInfo, SuspendAfterRequest};

/// Interval of the checks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Idle VMs that are suspended at a time. One whose process does not answer takes ten minutes.
const MAX_SUSPENDED: usize = 8;
/// Largest share of a processor that an idle VM's process uses.
const MAX_SHARE: f64 = 0.02;
/// The longest time, in seconds: a century.
const MAX_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;
/// Field of `/proc/PID/stat` with the time in user mode, counted behind the program's name. The
/// time in the kernel follows, and the start time is seven fields behind that.
const USER_TICKS: usize = 11;
/// USER_HZ, which is the same on every kernel for x86-64.
const TICKS_A_SECOND: u64 = 100;

/// A process, and the processor time that it has used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Used {
    started: u64,
    ticks: u64,
    /// Its threads by tid. None where the kernel does not account for them.
    threads: BTreeMap<u32, Thread>,
}

/// A thread's times so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Thread {
    /// Time on a processor.
    ran: Duration,
    /// Time in which it was runnable without a processor, up to its last turn.
    delayed: Duration,
    /// Number of its turns on a processor.
    turns: u64,
    /// Whether it has had no turn since the last check, and is runnable now.
    is_starved: bool,
}

/// Returns the processor time that a process has used, in hundredths of a second. None if it has
/// ended.
#[must_use]
pub fn used_ticks(pid: u32) -> Option<u64> {
    read(pid).map(|used| used.ticks)
}

/// Reads a process's counts without those of its threads.
fn read(pid: u32) -> Option<Used> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads the kernel's counts for a process, if it exists. `last` is the result of the last check.
fn used(pid: u32, last: Option<&Used>) -> Option<Used> {
    let mut used = read(pid)?;
    for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A thread that has just ended is left out.
        let text = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
        let Some(mut thread) = parse_thread(&text) else { continue };
        if last.and_then(|last| last.threads.get(&number)).is_some_and(|last| last.turns == thread.turns) {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            thread.is_starved = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'));
        }
        used.threads.insert(number, thread);
    }
    Some(used)
}

fn parse(stat: &str) -> Option<Used> {
    // A program's name may hold any character.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let (started, ticks) = (number(USER_TICKS + 8)?, number(USER_TICKS)? + number(USER_TICKS + 1)?);
    Some(Used { started, ticks, threads: BTreeMap::new() })
}

/// Parses a thread's `schedstat`. None if it has had no turn: the kernel does not count them, or it
/// is new.
fn parse_thread(schedstat: &str) -> Option<Thread> {
    let mut numbers = schedstat.split_ascii_whitespace().map(str::parse::<u64>);
    let (ran, delayed, turns) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
    let [ran, delayed] = [ran, delayed].map(Duration::from_nanos);
    (turns > 0).then_some(Thread { ran, delayed, turns, is_starved: false })
}

impl Used {
    /// Returns the share of a processor that the process has used in `elapsed` since `last`, of the
    /// time that its threads could have had.
    fn share_since(&self, last: &Self, elapsed: Duration) -> f64 {
        let of_thread = |(number, thread): (&u32, &Thread)| {
            let before = last.threads.get(number).copied().unwrap_or_default();
            let ran = thread.ran.saturating_sub(before.ran);
            // A wait that began before the last check counts when it ends.
            let could = elapsed.saturating_sub(thread.delayed.saturating_sub(before.delayed)).max(ran);
            if thread.is_starved { 1.0 } else { ran.as_secs_f64() / could.as_secs_f64().max(f64::MIN_POSITIVE) }
        };
        self.threads.iter().map(of_thread).sum()
    }
}

#[derive(Clone, Debug)]
struct Policy {
    after: Duration,
    dir: PathBuf,
    pid: u32,
    used: Used,
    looked: Instant,
    /// Start of its idle time.
    since: Instant,
    /// Whether it is being suspended.
    is_tried: bool,
    /// Attempts that have failed since the last one that has not.
    failures: u32,
}

impl Policy {
    /// Notes the time that its process has used by `now`. Returns whether to suspend the VM.
    fn look(&mut self, used: Used, now: Instant) -> bool {
        let elapsed = now.duration_since(self.looked);
        let busy = used.ticks.saturating_sub(self.used.ticks) as f64 / TICKS_A_SECOND as f64;
        let share = busy / elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        // One tick is the least that can be seen. Ended threads show only in the ticks.
        let is_busy = share > MAX_SHARE && busy > 1.0 / TICKS_A_SECOND as f64;
        if is_busy || used.share_since(&self.used, elapsed) > MAX_SHARE {
            self.since = now;
        }
        (self.used, self.looked) = (used, now);
        now.duration_since(self.since) >= self.after
    }
}

/// The policies of VMs, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Idle(Arc<Mutex<Policies>>);

#[derive(Debug, Default)]
struct Policies {
    by_name: BTreeMap<String, Policy>,
    /// Whether the task that checks the VMs runs.
    is_watched: bool,
}

/// A VM to suspend now. The VM is not due until this is dropped, also by a panic. If it could not
/// be suspended, the next attempt comes after its whole time.
#[derive(Debug)]
struct Attempt {
    of: Idle,
    name: String,
    dir: PathBuf,
    /// The VM's process.
    pid: u32,
    has_failed: bool,
}

impl Attempt {
    fn end(mut self, has_succeeded: bool) {
        self.has_failed = !has_succeeded;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(policy) = self.of.policies().by_name.get_mut(&self.name).filter(|policy| policy.pid == self.pid) {
            (policy.is_tried, policy.since) = (false, Instant::now());
            policy.failures = if self.has_failed { policy.failures.saturating_add(1) } else { 0 };
        }
    }
}

impl Idle {
    fn policies(&self) -> MutexGuard<'_, Policies> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a VM has been woken: its idle time begins anew, however little its guest does then.
    pub(super) fn woken(&self, name: &str) {
        if let Some(policy) = self.policies().by_name.get_mut(name) {
            policy.since = Instant::now();
        }
    }

    /// Forgets the VM that had a name: the next VM of that name is another.
    pub(super) fn forget(&self, name: &str) {
        self.policies().by_name.remove(name);
    }

    /// Returns up to `most` VMs to suspend now, of [`MAX_SUSPENDED`]. Forgets those that have gone. VMs whose last
    /// attempt has failed come last, and get half of the places at most: their processes may not answer.
    fn due(&self, most: usize) -> Vec<Attempt> {
        let (mut found, mut due, now) = (Vec::new(), Vec::new(), Instant::now());
        let mut policies = self.policies();
        policies.by_name.retain(|name, policy| {
            let used = used(policy.pid, Some(&policy.used));
            let Some(used) = used.filter(|used| used.started == policy.used.started) else { return false };
            if policy.look(used, now) && !policy.is_tried {
                found.push((policy.failures, policy.since, name.clone()));
            }
            true
        });
        found.sort();
        for (failures, _, name) in found {
            let free = most - due.len();
            if free == 0 || failures > 0 && free <= MAX_SUSPENDED / 2 {
                break;
            }
            let Some(policy) = policies.by_name.get_mut(&name) else { continue };
            policy.is_tried = true;
            due.push(Attempt { of: self.clone(), name, dir: policy.dir.clone(), pid: policy.pid, has_failed: true });
        }
        due
    }
}

impl Supervisor {
    /// Has a VM suspended whenever it has been idle for a time, which replaces an earlier one.
    ///
    /// # Errors
    /// When there is no such VM, or the time is out of range.
    pub(super) fn suspend_after(&self, name: &str, request: &SuspendAfterRequest) -> Result<(), DaemonError> {
        let SuspendAfterRequest { seconds, ref dir } = *request;
        // NaN is in no range.
        if !(seconds > 0.0 && seconds <= MAX_SECONDS) {
            let text = format!("seconds={seconds}: more than 0, and at most {MAX_SECONDS}");
            return Err(DaemonError::Refused { kind: ProblemKind::BadRequest, text });
        }
        let vm_record = VmRecord::expect(&self.0.dir, name)?;
        let gone = || DaemonError::NoSuchVm { name: name.to_owned() };
        let pid = self.recorded_pid(name, &vm_record).ok_or_else(gone)?;
        let (used, now) = (used(pid, None).ok_or_else(gone)?, Instant::now());
        let dir = dir.clone().unwrap_or_else(|| Path::new(super::suspend::DIR).to_owned());
        let after = Duration::from_secs_f64(seconds);
        let policy = Policy { after, dir, pid, used, looked: now, since: now, is_tried: false, failures: 0 };
        let mut policies = self.0.idle.policies();
        policies.by_name.insert(name.to_owned(), policy);
        if !std::mem::replace(&mut policies.is_watched, true) {
            self.0.runtime.spawn(watch(Arc::downgrade(&self.0)));
        }
        Ok(())
    }

    /// Returns the process of a VM that has this record.
    fn recorded_pid(&self, name: &str, vm_record: &VmRecord) -> Option<u32> {
        vm_record.process.map(ProcessId::pid).or_else(|| self.pid_of(name))
    }

    /// Suspends a VM that is due, unless another has its name by now.
    fn suspend_idle(&self, attempt: Attempt) -> Result<(), DaemonError> {
        let vm_record = VmRecord::expect(&self.0.dir, &attempt.name)?;
        if self.recorded_pid(&attempt.name, &vm_record) != Some(attempt.pid) {
            return Ok(());
        }
        let done = self.suspend(&attempt.name, &attempt.dir, &Cancel::default());
        attempt.end(done.is_ok());
        done.map(drop)
    }

    /// Returns the time after which a VM is suspended.
    pub(super) fn suspended_after(&self, name: &str) -> Result<SuspendAfterInfo, DaemonError> {
        VmRecord::expect(&self.0.dir, name)?;
        let policies = self.0.idle.policies();
        Ok(SuspendAfterInfo { seconds: policies.by_name.get(name).map(|policy| policy.after.as_secs_f64()) })
    }

    /// Stops suspending a VM.
    pub(super) fn suspend_never(&self, name: &str) -> Result<(), DaemonError> {
        VmRecord::expect(&self.0.dir, name)?;
        self.0.idle.policies().by_name.remove(name);
        Ok(())
    }
}

/// Suspends idle VMs, until the supervisor goes.
async fn watch(of: Weak<Inner>) {
    let permits = Arc::new(Semaphore::new(MAX_SUSPENDED));
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let Some(inner) = of.upgrade() else { return };
        let (supervisor, free) = (Supervisor(inner), permits.available_permits());
        let looker = supervisor.clone();
        let due = match on_a_thread(THREAD_PATIENCE, move || looker.0.idle.due(free)).await {
            Ok(due) => due,
            Err(error) => {
                tracing::error!(error = error.text, "idle VMs are not suspended: the check of VMs failed");
                continue;
            }
        };
        for attempt in due {
            // There are as many as were found: no one else takes them.
            let permit = Arc::clone(&permits).try_acquire_owned();
            let supervisor = supervisor.clone();
            tokio::spawn(async move {
                let name = attempt.name.clone();
                let suspend = move || {
                    let _permit = permit;
                    supervisor.suspend_idle(attempt)
                };
                let suspended = on_a_thread(THREAD_PATIENCE, suspend).await.and_then(|done| Ok(done?));
                if let Err(error) = suspended {
                    tracing::warn!(error = error.text, name, "an idle VM is not suspended");
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_called_what_it_likes() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 100 0 0 0 31 11 0 0 20 0 1 0 5000 0 0";
        assert_eq!(parse(stat), Some(Used { started: 5000, ticks: 42, ..Used::default() }));
        assert_eq!((parse("7 (a) S 1"), parse("")), (None, None));
        let own = used(std::process::id(), None).unwrap();
        assert!(own.started > 0 && used(std::process::id(), Some(&own)).unwrap().ticks >= own.ticks);
        let [ran, delayed] = [3, 5].map(Duration::from_nanos);
        assert_eq!(parse_thread("3 5 7\n"), Some(Thread { ran, delayed, turns: 7, is_starved: false }));
        assert_eq!((parse_thread("0 0 0\n"), parse_thread("")), (None, None));
    }

    fn policy(after: Duration, pid: u32, used: Used, now: Instant) -> Policy {
        Policy { after, dir: "/".into(), pid, used, looked: now, since: now, is_tried: false, failures: 0 }
    }

    /// Checks a policy every second on a VM with one thread. Returns whether each check would
    /// suspend the VM.
    fn looks(after: u64, seconds: u64, thread: impl Fn(u64) -> Thread) -> Vec<bool> {
        let begun = Instant::now();
        let used = |second| Used { started: 1, ticks: 0, threads: [(1, thread(second))].into() };
        let after = Duration::from_secs(after);
        let mut policy = policy(after, 1, used(0), begun);
        (1..=seconds).map(|second| policy.look(used(second), begun + Duration::from_secs(second))).collect()
    }

    #[test]
    fn a_starved_guest_is_busy_and_an_idle_guest_that_waits_for_its_turns_is_idle() {
        let thread = |ran_ms: u64, delayed_ms: u64, turns: u64, is_starved: bool| {
            let [ran, delayed] = [ran_ms, delayed_ms].map(Duration::from_millis);
            Thread { ran, delayed, turns, is_starved }
        };
        // A spinning guest gets 5 ms of each second, and waits for the rest.
        assert_eq!(looks(3, 20, |second| thread(5 * second, 995 * second, second, false)), [false; 20]);
        // The guest gets no time for ten seconds. The kernel accounts for the wait at its next turn.
        let starved = |second| if second < 10 { thread(0, 0, 1, true) } else { thread(1, 10_000, 2, false) };
        assert_eq!(looks(3, 10, starved), [false; 10]);
        // A guest that serves its timer takes 5 ms of each second, and waits 200 ms for its turns.
        let idle = looks(3, 5, |second| thread(5 * second, 200 * second, 20 * second, false));
        assert_eq!(idle, [false, false, true, true, true]);
    }

    #[test]
    fn the_idle_time_of_a_woken_vm_begins_anew() {
        let idle = Idle::default();
        let pid = std::process::id();
        let used = used(pid, None).unwrap();
        let now = Instant::now();
        // The time of the last attempt, which has found the VM suspended.
        let since = now.checked_sub(Duration::from_secs(1)).unwrap();
        let (after, looked) = (Duration::from_secs(3600), now);
        let policy = Policy { since, ..policy(after, pid, used, looked) };
        idle.policies().by_name.extend(["asleep", "woken"].map(|name| (name.to_owned(), policy.clone())));
        idle.woken("woken");
        idle.woken("nobody");
        let policies = idle.policies();
        assert!(policies.by_name["woken"].since >= now && policies.by_name["asleep"].since == since);
    }

    #[test]
    fn a_vm_that_is_being_suspended_is_not_due_and_others_are() {
        let idle = Idle::default();
        let pid = std::process::id();
        let used = used(pid, None).unwrap();
        let now = Instant::now();
        let policy = policy(Duration::ZERO, pid, used, now);
        let names = ["a", "b", "c"];
        idle.policies().by_name.extend(names.map(|name| (name.to_owned(), policy.clone())));
        let names_of = |due: &[Attempt]| due.iter().map(|attempt| attempt.name.clone()).collect::<Vec<_>>();
        assert_eq!(names_of(&idle.due(0)), [""; 0]);
        let mut first = idle.due(2);
        assert_eq!(names_of(&first), ["a", "b"]);
        let second = idle.due(2);
        assert_eq!((names_of(&second), names_of(&idle.due(2))), (vec!["c".to_owned()], vec![]));
        // The attempt to suspend one of them panics.
        let b = first.pop();
        assert!(std::panic::catch_unwind(move || b.map(|b| panic!("{}, on purpose", b.name))).is_err());
        second.into_iter().for_each(|attempt| attempt.end(true));
        // It comes last, and leaves half of the places to others.
        assert_eq!(names_of(&idle.due(MAX_SUSPENDED / 2)), ["c"]);
        assert_eq!(names_of(&idle.due(MAX_SUSPENDED)), ["b", "c"]);
    }

    /// The process of an ended VM may live on, idle, until its children have let go of its memory.
    #[test]
    fn the_next_vm_of_a_name_is_not_suspended() {
        let idle = Idle::default();
        let pid = std::process::id();
        let policy = policy(Duration::ZERO, pid, used(pid, None).unwrap(), Instant::now());
        idle.policies().by_name.extend(["web", "other"].map(|name| (name.to_owned(), policy.clone())));
        let due = idle.due(1);
        assert_eq!(due[0].name, "other");
        idle.forget("other");
        // Of the next VM, whose process is another.
        let next = Policy { pid: 1, failures: 7, ..policy };
        idle.policies().by_name.insert("other".to_owned(), next);
        drop(due);
        assert_eq!(idle.policies().by_name["other"].failures, 7, "the attempt was another VM's");
        idle.forget("other");
        assert_eq!(idle.due(2).iter().map(|attempt| attempt.name.as_str()).collect::<Vec<_>>(), ["web"]);
    }

    #[test]
    fn the_ticks_of_a_process_are_those_that_it_has_used() {
        let pid = std::process::id();
        let before = used_ticks(pid).unwrap();
        // Until the processor time of this process has grown by a tick.
        let used = || rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let (begun, mut sum) = (used(), 0u64);
        while used().tv_sec * 1000 + used().tv_nsec / 1_000_000 < begun.tv_sec * 1000 + begun.tv_nsec / 1_000_000 + 40 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(used_ticks(pid).unwrap() > before, "{sum}");
        assert_eq!(used_ticks(u32::MAX), None);
    }

    #[test]
    fn idle_is_what_takes_next_to_nothing_for_the_whole_time() {
        let begun = Instant::now();
        let at = |second: u64| begun + Duration::from_secs(second);
        let used = |ticks| Used { started: 1, ticks, ..Used::default() };
        let after = Duration::from_secs(3);
        let mut policy = policy(after, 1, used(0), begun);
        // One tick a second counts as idle.
        assert!(!policy.look(used(1), at(1)));
        assert!(!policy.look(used(2), at(2)));
        assert!(policy.look(used(2), at(3)), "three seconds");
        // Half a processor for one of them.
        policy.since = at(3);
        assert!(!policy.look(used(2), at(4)));
        assert!(!policy.look(used(2 + TICKS_A_SECOND / 2), at(5)), "busy");
        assert!(!policy.look(used(2 + TICKS_A_SECOND / 2), at(7)));
        assert!(policy.look(used(2 + TICKS_A_SECOND / 2), at(8)));
    }
}
