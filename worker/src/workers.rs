//! Workers whose VMs are made together: all or none (I13).

use std::time::{Duration, Instant};

use clade_api::DaemonError;

use crate::pace::in_groups;
use crate::process::{END_TIMEOUT, PATIENCE};
use crate::{BeforeTheyRun, Pace, ReportedVm, Worker};

/// Additional time for each of the workers, to make its VM.
const MADE_EACH: Duration = Duration::from_millis(100);

/// The workers of a request that has not succeeded yet. Ended when dropped.
#[derive(Debug)]
pub struct Workers(pub Vec<Worker>);

impl Workers {
    /// Waits until all have made their VMs, then lets all run at `pace`, and lets them go. Calls
    /// `check` with the number made so far, and again between the groups of a pace. Calls
    /// `before_they_run`, if there is one, when all are made and none has run, and `when_made` when all are made.
    ///
    /// # Errors
    /// That of `check` or of a worker. The drop of the workers then ends the VMs of earlier groups,
    /// and the others have not run.
    pub fn run_together(
        &mut self,
        pace: Pace,
        check: impl Fn(usize) -> Result<(), DaemonError>,
        before_they_run: Option<&BeforeTheyRun<'_>>,
        when_made: impl FnOnce(),
    ) -> Result<Vec<ReportedVm>, DaemonError> {
        let mut made = Vec::with_capacity(self.0.len());
        let is_single = self.0.len() == 1 && before_they_run.is_none();
        if let [worker] = self.0.as_slice()
            && is_single
        {
            // A single VM waits for no other: every wait of one process for another costs a
            // wake-up.
            worker.run();
            made.push(worker.wait_or_abort(|| check(0))?);
        } else {
            // One for all, as below.
            let deadline = Instant::now() + PATIENCE + MADE_EACH * self.0.len() as u32;
            for worker in &self.0 {
                let child = worker.made_until(deadline, || check(made.len()))?;
                made.push(child);
            }
            check(made.len())?;
            before_they_run.map_or(Ok(()), |before| before(&made))?;
        }
        when_made();
        // All VMs are made, so all may run. From here on a failure ends only its own VM.
        let start = |group: &[Worker]| {
            if !is_single {
                group.iter().for_each(Worker::run);
            }
            // One for the group: guests that have broken into their processes may keep all of them from reporting.
            let deadline = Instant::now() + PATIENCE;
            group.iter().for_each(|worker| worker.wait_running(deadline, || check(made.len())));
        };
        in_groups(&self.0, pace, start, || check(made.len()))?;
        self.0.iter_mut().for_each(Worker::let_go);
        Ok(made)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &self.0 {
            if worker.is_running.get() { worker.send_kill() } else { worker.dismiss() }
        }
        // One deadline for all. Then the drops meet processes that have ended.
        let deadline = Instant::now() + END_TIMEOUT;
        for worker in &self.0 {
            if !worker.has_ended(deadline.saturating_duration_since(Instant::now())) {
                worker.send_kill();
            }
        }
    }
}
