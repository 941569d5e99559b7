//! Starts the VMs of a fork beyond the host's bound (`--overcommit`) a few at a time.
//!
//! All children of a fork have the same instant, so all have the same work to do first: timers that
//! are due, random numbers, the agent's renewal. Together they would keep the processors from
//! everything else, and the first to be done would be done last. So a group starts once the guests
//! of the group before have run, or after a time, so that guests that compute delay no others.
//!
//! Forks within the bound start together, and so do children that start paused, of which the supervisor
//! resumes those that are to be ready. A request that is
//! cancelled between two groups, or by the supervisor's end, leaves no VM. A supervisor that is killed
//! between two groups takes the VMs of later groups with it, and those of earlier groups run.

use std::thread;
use std::time::{Duration, Instant};

use crate::host_limits::{most_running, processors, runnable_threads};

/// VMs of a group, for each processor.
const VMS_OF_A_PROCESSOR: usize = 16;
/// Runnable threads of the host, for each processor, at which the next group starts.
const QUIET: u64 = 2;
/// The longest wait for that.
const MAX_WAIT: Duration = Duration::from_millis(50);
/// Interval of the checks for it.
const INTERVAL: Duration = Duration::from_millis(1);

/// How the VMs of a request start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Together: their vCPUs stay paused.
    Paused,
    /// In groups, if they are more than the host should run.
    Running,
}

/// Calls `start` with all of `vms`. If they run and are more than the host should run, `start` gets up
/// to [`VMS_OF_A_PROCESSOR`] for each processor. Between the calls is a wait until the host has few
/// runnable threads, and then `check` decides whether the next group starts.
///
/// # Errors
/// That of `check`.
pub(super) fn in_groups<T, E>(
    vms: &[T],
    pace: Pace,
    start: impl FnMut(&[T]),
    check: impl Fn() -> Result<(), E>,
) -> Result<(), E> {
    let most = QUIET * processors() as u64;
    let is_quiet = || runnable_threads().is_none_or(|count| count <= most);
    let size = group_size(vms.len(), pace, most_running(), processors());
    in_groups_of(size, vms, start, || {
        wait_until(is_quiet);
        check()
    })
}

/// The size of the groups of `count` VMs on a host that should run `most`.
fn group_size(count: usize, pace: Pace, most: u64, processors: usize) -> usize {
    if pace == Pace::Running && count as u64 > most { processors * VMS_OF_A_PROCESSOR } else { count.max(1) }
}

fn in_groups_of<T, E>(
    size: usize,
    vms: &[T],
    mut start: impl FnMut(&[T]),
    mut between: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    for (at, group) in vms.chunks(size).enumerate() {
        if at > 0 {
            between()?;
        }
        start(group);
    }
    Ok(())
}

fn wait_until(is_quiet: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_quiet() && begun.elapsed() < MAX_WAIT {
        thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn each_vm_starts_once_and_each_group_waits_for_the_one_before() {
        for (count, groups) in [(0, vec![]), (1, vec![1]), (4, vec![4]), (5, vec![4, 1]), (12, vec![4, 4, 4])] {
            let vms: Vec<usize> = (0..count).collect();
            let (started, waits) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
            let start = |group: &[usize]| started.borrow_mut().push(group.to_vec());
            in_groups_of(4, &vms, start, || {
                waits.borrow_mut().push(started.borrow().len());
                Ok::<(), ()>(())
            })
            .unwrap();
            let started = started.into_inner();
            assert_eq!(started.iter().map(Vec::len).collect::<Vec<_>>(), groups);
            assert_eq!(started.concat(), vms);
            // Between groups, and not after the last.
            assert_eq!(waits.into_inner(), (1..groups.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_cancelled_request_starts_no_further_group() {
        let mut started = 0;
        let ended = in_groups_of(4, &[(); 12], |group| started += group.len(), || Err("gone"));
        assert_eq!((ended, started), (Err("gone"), 4));
    }

    #[test]
    fn only_more_vms_than_the_host_should_run_start_in_groups() {
        assert_eq!(group_size(1000, Pace::Running, 1000, 2), 1000);
        assert_eq!(group_size(1001, Pace::Running, 1000, 2), 2 * VMS_OF_A_PROCESSOR);
        assert_eq!(group_size(1001, Pace::Paused, 1000, 2), 1001);
        assert_eq!(group_size(0, Pace::Running, 1000, 2), 1);
    }

    #[test]
    fn a_busy_host_delays_a_group_for_a_time_only() {
        let looks = RefCell::new(0);
        wait_until(|| {
            *looks.borrow_mut() += 1;
            *looks.borrow() == 3
        });
        assert_eq!(looks.into_inner(), 3);
        let begun = Instant::now();
        wait_until(|| false);
        assert!(begun.elapsed() >= MAX_WAIT);
    }
}
