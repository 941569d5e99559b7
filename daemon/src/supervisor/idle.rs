//! VMs that are suspended when they have done nothing for a time.
//!
//! **Idle** is a VM whose process takes next to no processor: at most 2 % of one from one look to
//! the next, a second apart. vCPUs, devices and requests are all in it. A guest that halts is in
//! the kernel, and takes none; one that only serves its timer takes less than that. What cannot be
//! seen is a guest that waits for an answer from elsewhere: the packet that brings it wakes it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::about::About;
use super::processes::ProcessId;
use super::{Inner, Supervisor};
use crate::control::{ProblemKind, SuspendAfterInfo, SuspendAfterRequest};
use crate::fleet::{Cancel, FleetError};

/// How often the VMs are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The most of a processor that an idle VM's process takes.
const MAX_SHARE: f64 = 0.02;
/// The longest time, in seconds: a century.
const MAX_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;
/// Where `/proc/PID/stat` has the time in user mode, counted behind the program's name. The time in
/// the kernel follows, and the time of its start is seven behind that.
const USER_TICKS: usize = 11;
/// USER_HZ, which is the same on every kernel for x86-64.
const TICKS_A_SECOND: u64 = 100;

/// A process, and the processor time that it has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Used {
    started: u64,
    ticks: u64,
}

/// What the kernel says of a process, if it is there.
fn used(pid: u32) -> Option<Used> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(stat: &str) -> Option<Used> {
    // A program's name may have anything in it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Used { started: number(USER_TICKS + 8)?, ticks: number(USER_TICKS)? + number(USER_TICKS + 1)? })
}

#[derive(Debug)]
struct Policy {
    after: Duration,
    dir: PathBuf,
    pid: u32,
    used: Used,
    looked: Instant,
    /// Since when it does nothing.
    since: Instant,
}

impl Policy {
    /// Takes note of what its process has used by `now`. Whether it is to be suspended.
    fn look(&mut self, used: Used, now: Instant) -> bool {
        let busy = used.ticks.saturating_sub(self.used.ticks) as f64 / TICKS_A_SECOND as f64;
        let share = busy / now.duration_since(self.looked).as_secs_f64().max(f64::MIN_POSITIVE);
        // One tick is the least that can be seen.
        if share > MAX_SHARE && busy > 1.0 / TICKS_A_SECOND as f64 {
            self.since = now;
        }
        (self.used, self.looked) = (used, now);
        now.duration_since(self.since) >= self.after
    }
}

/// The policies of VMs, by name.
#[derive(Debug, Default)]
pub(super) struct Idle(Mutex<Policies>);

#[derive(Debug, Default)]
struct Policies {
    by_name: BTreeMap<String, Policy>,
    /// Whether somebody looks.
    is_watched: bool,
}

impl Idle {
    fn policies(&self) -> MutexGuard<'_, Policies> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMs that are to be suspended now, and where. Those that have gone are forgotten.
    fn due(&self) -> Vec<(String, PathBuf)> {
        let (mut due, now) = (Vec::new(), Instant::now());
        self.policies().by_name.retain(|name, policy| {
            let Some(used) = used(policy.pid).filter(|used| used.started == policy.used.started) else {
                return false;
            };
            if policy.look(used, now) {
                // If it cannot be suspended, it is tried again after as long.
                policy.since = now;
                due.push((name.clone(), policy.dir.clone()));
            }
            true
        });
        due
    }
}

impl Supervisor {
    /// Has a VM suspended whenever it has been idle for a time, in place of the time that it had.
    ///
    /// # Errors
    /// When there is no such VM, or no such time.
    pub(super) fn suspend_after(&self, name: &str, request: &SuspendAfterRequest) -> Result<(), FleetError> {
        let SuspendAfterRequest { seconds, ref dir } = *request;
        // Not a number is in no range.
        if !(seconds > 0.0 && seconds <= MAX_SECONDS) {
            let text = format!("seconds={seconds}: more than 0, and at most {MAX_SECONDS}");
            return Err(FleetError::Refused { kind: ProblemKind::BadRequest, text });
        }
        let about = About::expect(&self.0.dir, name)?;
        let gone = || FleetError::NoSuchVm { name: name.to_owned() };
        let pid = about.process.map(ProcessId::pid).or_else(|| self.pid_of(name)).ok_or_else(gone)?;
        let (used, now) = (used(pid).ok_or_else(gone)?, Instant::now());
        let dir = dir.clone().unwrap_or_else(|| Path::new(super::suspend::DIR).to_owned());
        let after = Duration::from_secs_f64(seconds);
        let policy = Policy { after, dir, pid, used, looked: now, since: now };
        let mut policies = self.0.idle.policies();
        policies.by_name.insert(name.to_owned(), policy);
        if !std::mem::replace(&mut policies.is_watched, true) {
            self.0.runtime.spawn(watch(Arc::downgrade(&self.0)));
        }
        Ok(())
    }

    /// After which time a VM is suspended.
    pub(super) fn suspended_after(&self, name: &str) -> Result<SuspendAfterInfo, FleetError> {
        About::expect(&self.0.dir, name)?;
        let policies = self.0.idle.policies();
        Ok(SuspendAfterInfo { seconds: policies.by_name.get(name).map(|policy| policy.after.as_secs_f64()) })
    }

    /// Has a VM no longer suspended.
    pub(super) fn suspend_never(&self, name: &str) -> Result<(), FleetError> {
        About::expect(&self.0.dir, name)?;
        self.0.idle.policies().by_name.remove(name);
        Ok(())
    }
}

/// Suspends what is idle, until the supervisor goes.
async fn watch(of: Weak<Inner>) {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let Some(inner) = of.upgrade() else { return };
        let supervisor = Supervisor(inner);
        let look = move || {
            for (name, dir) in supervisor.0.idle.due() {
                if let Err(error) = supervisor.suspend(&name, &dir, &Cancel::default()) {
                    let error = clade_vmm::error_chain(&error);
                    tracing::warn!(error, name, "an idle VM is not suspended");
                }
            }
        };
        if tokio::task::spawn_blocking(look).await.is_err() {
            tracing::error!("idle VMs are not suspended any more: a look at them panicked");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_called_what_it_likes() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 100 0 0 0 31 11 0 0 20 0 1 0 5000 0 0";
        assert_eq!(parse(stat), Some(Used { started: 5000, ticks: 42 }));
        assert_eq!((parse("7 (a) S 1"), parse("")), (None, None));
        let own = used(std::process::id()).unwrap();
        assert!(own.started > 0 && used(std::process::id()).unwrap().ticks >= own.ticks);
    }

    #[test]
    fn idle_is_what_takes_next_to_nothing_for_the_whole_time() {
        let begun = Instant::now();
        let at = |second: u64| begun + Duration::from_secs(second);
        let used = |ticks| Used { started: 1, ticks };
        let after = Duration::from_secs(3);
        let mut policy = Policy { after, dir: PathBuf::new(), pid: 1, used: used(0), looked: begun, since: begun };
        // One tick a second is what cannot be told from none.
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
