//! Checks forks. Children run on with requests in flight, and are stopped, forked, reset, destroyed
//! and compared.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Tally;
use super::rig::{
    Expectation, Random, all, compare_counts, compare_memory, pairs_go_on, reads, reset_and_read, stop_and_compare,
};
use super::world::{ForkCosts, StressImage, StressVm, World};
use clade::Failure;

/// The longest time that a child runs before the next action.
const RUNS: Duration = Duration::from_millis(8);

/// One in this many children that are reset in place is compared whole.
const WHOLE: u64 = 8;

/// A fork of the parent, and its expected state.
pub(super) struct Forked {
    pub(super) image: StressImage,
    pub(super) expect: Expectation,
    pub(super) costs: ForkCosts,
}

pub(super) struct Checker {
    world: Arc<World>,
    cpus: u64,
    random: Random,
    tally: Tally,
}

impl Checker {
    pub(super) fn new(world: Arc<World>, cpus: u64, random: Random) -> Self {
        Self { world, cpus, random, tally: Tally::default() }
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    pub(super) fn check(&mut self, forked: Forked) -> Result<(), Failure> {
        let Forked { image, expect, costs } = forked;
        tracing::debug!(in_flight = costs.in_flight, round = expect.round, "a child");
        self.child(image, &expect, 0)
    }

    fn child(&mut self, image: StressImage, expect: &Expectation, depth: u64) -> Result<(), Failure> {
        let world = Arc::clone(&self.world);
        let vm = world.child(&image)?;
        world.forget(image)?;
        self.tally.children += 1;
        self.tally.nested += u64::from(depth > 0);
        // The state at the fork: a CPU may be one word ahead of its count.
        compare_counts(&vm, 1, &mut self.tally)?;
        let read_before = reads(&vm)?;
        compare_memory(&vm, expect, Some(&mut self.random), &mut self.tally)?;
        let whole = if self.random.one_in(WHOLE) { Some(all(&vm)?) } else { None };
        vm.resume()?;
        self.run_on();
        self.tally.stuck += u64::from(!pairs_go_on(&vm, self.cpus)?);
        while self.random.one_in(3) {
            self.put_back(&vm, expect, whole.as_deref(), read_before)?;
            self.run_on();
            self.tally.stuck += u64::from(!pairs_go_on(&vm, self.cpus)?);
        }
        if depth < 3 && self.random.one_in(6) {
            let (image, _) = world.fork(&vm)?;
            self.child(image, expect, depth + 1)?;
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
                compare_memory(&vm, expect, None, &mut self.tally)?;
            }
            _ => {
                stop_and_compare(&vm, expect, read_before, &mut self.tally)?;
                compare_memory(&vm, expect, Some(&mut self.random), &mut self.tally)?;
            }
        }
        vm.destroy()
    }

    fn run_on(&mut self) {
        thread::sleep(RUNS.mul_f64(self.random.below(1000) as f64 / 1000.0));
    }

    /// Resets a running child to its fork while it and its devices work, and compares it with its
    /// state at the fork. It runs afterwards.
    fn put_back(
        &mut self,
        vm: &StressVm,
        expect: &Expectation,
        whole: Option<&[u8]>,
        read_before: u64,
    ) -> Result<(), Failure> {
        self.tally.resets += 1;
        if self.random.one_in(2) {
            vm.reset()?;
            // It runs already: only memory that its CPUs and devices do not write is unchanged.
            return compare_memory(vm, expect, Some(&mut self.random), &mut self.tally);
        }
        vm.pause()?;
        vm.reset()?;
        compare_counts(vm, 1, &mut self.tally)?;
        compare_memory(vm, expect, Some(&mut self.random), &mut self.tally)?;
        self.tally.violations += u64::from(reads(vm)? != read_before);
        if let Some(then) = whole {
            let now = all(vm)?;
            self.tally.wrong_bytes += now.iter().zip(then).filter(|(now, then)| now != then).count() as u64;
            self.tally.bytes_checked += now.len() as u64;
        }
        vm.resume()
    }
}
