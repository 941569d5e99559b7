//! Checks forks. Children run on with requests in flight, and are stopped, forked, reset, destroyed
//! and compared.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Tally;
use super::rig::{
    Expectation, Random, all, compare_counts, compare_memory, pairs_go_on, reads, reset_and_read, stop_and_compare,
};
use crate::commands::Failure;
use clade_vmm::vm::{ChildOptions, Context, ForkImage, ForkReport, Vm};

/// The longest time that a child runs before the next action.
const RUNS: Duration = Duration::from_millis(8);

/// One in this many children that are reset in place is compared whole.
const WHOLE: u64 = 8;

/// A fork of the parent, and its expected state.
pub(super) struct Forked {
    pub(super) image: Arc<ForkImage>,
    pub(super) expect: Expectation,
    pub(super) report: ForkReport,
}

pub(super) struct Checker {
    context: Context,
    without_unshare: bool,
    random: Random,
    tally: Tally,
}

impl Checker {
    pub(super) fn new(context: Context, without_unshare: bool, random: Random) -> Self {
        Self { context, without_unshare, random, tally: Tally::default() }
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    pub(super) fn check(&mut self, forked: &Forked) -> Result<(), Failure> {
        tracing::debug!(in_flight = forked.report.in_flight, round = forked.expect.round, "a child");
        self.child(&forked.image, &forked.expect, 0)
    }

    fn child(&mut self, image: &Arc<ForkImage>, expect: &Expectation, depth: u64) -> Result<(), Failure> {
        let options = ChildOptions { paused: true, before_start: None };
        let vm = Vm::from_image(&self.context, "child", image, options).map_err(Failure::run)?;
        if self.without_unshare {
            vm.ram().set_pin_policy(clade_memory::PinPolicy::Ignore);
        }
        self.tally.children += 1;
        self.tally.nested += u64::from(depth > 0);
        // The state at the fork: a CPU may be one word ahead of its count.
        compare_counts(vm.ram(), 1, &mut self.tally)?;
        let read_before = reads(vm.ram())?;
        compare_memory(vm.ram(), expect, Some(&mut self.random), &mut self.tally)?;
        let whole = if self.random.one_in(WHOLE) { Some(all(vm.ram())?) } else { None };
        vm.resume().map_err(Failure::run)?;
        self.run_on();
        self.tally.stuck += u64::from(!pairs_go_on(&vm)?);
        while self.random.one_in(3) {
            self.put_back(&vm, expect, whole.as_deref(), read_before)?;
            self.run_on();
            self.tally.stuck += u64::from(!pairs_go_on(&vm)?);
        }
        if depth < 3 && self.random.one_in(6) {
            let (image, _) = vm.fork().map_err(Failure::run)?;
            self.child(&image, expect, depth + 1)?;
        }
        if self.random.one_in(4) {
            // Also after a freeze of its own, which the nested fork was.
            self.put_back(&vm, expect, whole.as_deref(), read_before)?;
            self.run_on();
        }
        match self.random.below(8) {
            // Destroyed with requests in flight.
            0 | 1 => self.tally.destroyed_running += 1,
            2 => {
                reset_and_read(&vm, &mut self.tally)?;
                compare_memory(vm.ram(), expect, None, &mut self.tally)?;
            }
            _ => {
                stop_and_compare(&vm, expect, read_before, &mut self.tally)?;
                compare_memory(vm.ram(), expect, Some(&mut self.random), &mut self.tally)?;
            }
        }
        Ok(())
    }

    fn run_on(&mut self) {
        thread::sleep(RUNS.mul_f64(self.random.below(1000) as f64 / 1000.0));
    }

    /// Resets a running child to its fork while it and its devices work, and compares it with its
    /// state at the fork. It runs afterwards.
    fn put_back(
        &mut self,
        vm: &Vm,
        expect: &Expectation,
        whole: Option<&[u8]>,
        read_before: u64,
    ) -> Result<(), Failure> {
        self.tally.resets += 1;
        if self.random.one_in(2) {
            vm.reset_to_origin().map_err(Failure::run)?;
            // It runs already: only memory that its CPUs and devices do not write is unchanged.
            return compare_memory(vm.ram(), expect, Some(&mut self.random), &mut self.tally);
        }
        vm.pause().map_err(Failure::run)?;
        vm.reset_to_origin().map_err(Failure::run)?;
        compare_counts(vm.ram(), 1, &mut self.tally)?;
        compare_memory(vm.ram(), expect, Some(&mut self.random), &mut self.tally)?;
        self.tally.violations += u64::from(reads(vm.ram())? != read_before);
        if let Some(then) = whole {
            let now = all(vm.ram())?;
            self.tally.wrong_bytes += now.iter().zip(then).filter(|(now, then)| now != then).count() as u64;
            self.tally.bytes_checked += now.len() as u64;
        }
        vm.resume().map_err(Failure::run)
    }
}
