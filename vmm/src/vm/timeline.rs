//! Completion times of the steps of a child's start: the parts of the time between a fork and the
//! child's first instruction.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A step of a child's start, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ChildStep {
    /// A prepared VM is taken.
    Prepared,
    /// Its memory is mapped, and withheld bytes there are erased.
    Memory,
    /// Its devices are made.
    Devices,
    /// Its vCPUs have their orders.
    Assembled,
    /// The thread of the last vCPU to start has its order.
    Woken,
    /// The last vCPU has its state.
    Vcpus,
    /// Interrupt controllers and the clock have their state.
    Controllers,
    /// The devices run, after the VM's admission.
    Resumed,
    /// The first vCPU enters the guest.
    Entered,
}

impl ChildStep {
    /// All steps, in their order.
    pub const ALL: [Self; 9] = [
        Self::Prepared,
        Self::Memory,
        Self::Devices,
        Self::Assembled,
        Self::Woken,
        Self::Vcpus,
        Self::Controllers,
        Self::Resumed,
        Self::Entered,
    ];

    /// Its name: the part that is complete by then.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepared => "prepared_vm",
            Self::Memory => "memory",
            Self::Devices => "devices",
            Self::Assembled => "assembled",
            Self::Woken => "vcpu_woken",
            Self::Vcpus => "vcpu_state",
            Self::Controllers => "controllers",
            Self::Resumed => "devices_resumed",
            Self::Entered => "entered",
        }
    }
}

/// The steps of one child's start. Marking one takes no lock.
#[derive(Debug)]
pub struct Timeline {
    begun: Instant,
    /// Nanoseconds since `begun`, plus one. 0: not done.
    at: [AtomicU64; ChildStep::ALL.len()],
}

impl Timeline {
    /// A timeline that begins now.
    pub(crate) fn begin() -> Self {
        Self { begun: Instant::now(), at: Default::default() }
    }

    /// Notes that `step` is done. The last of several vCPUs counts.
    pub(crate) fn mark(&self, step: ChildStep) {
        // Relaxed: numbers for display, on which no ordering depends.
        self.at[step as usize].store(self.now(), Ordering::Relaxed);
    }

    /// Notes that `step` is done, if it was not before.
    pub(crate) fn mark_first(&self, step: ChildStep) {
        // Relaxed: as above. A failure: another vCPU was first.
        let _ = self.at[step as usize].compare_exchange(0, self.now(), Ordering::Relaxed, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// When the start was begun.
    #[must_use]
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// The time of `step`, counted from the beginning of the start. None if it was not done: for a
    /// VM that was booted, and for one that is paused and has not run.
    #[must_use]
    pub fn at(&self, step: ChildStep) -> Option<Duration> {
        let ns = self.at[step as usize].load(Ordering::Relaxed);
        ns.checked_sub(1).map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_where_it_was_marked() {
        let timeline = Timeline::begin();
        assert!(ChildStep::ALL.iter().all(|step| timeline.at(*step).is_none()));
        for step in ChildStep::ALL {
            timeline.mark_first(step);
            std::thread::sleep(Duration::from_micros(10));
        }
        let all: Vec<_> = ChildStep::ALL.iter().map(|step| timeline.at(*step).unwrap()).collect();
        assert!(all.is_sorted() && *all.last().unwrap() <= timeline.begun().elapsed(), "{all:?}");
        timeline.mark_first(ChildStep::Memory);
        assert_eq!(timeline.at(ChildStep::Memory).unwrap(), all[1]);
        timeline.mark(ChildStep::Memory);
        assert!(timeline.at(ChildStep::Memory).unwrap() > all[8]);
    }

    #[test]
    fn steps_are_listed_in_their_order_and_by_names_of_their_own() {
        let names: std::collections::BTreeSet<_> = ChildStep::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), ChildStep::ALL.len());
        assert!(ChildStep::ALL.iter().enumerate().all(|(at, step)| *step as usize == at));
    }
}
