//! The queue of the bare guest's reports.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clade_devices::PortReport;

/// Maximum number of unread reports. A guest can write the port for ever, so the oldest are
/// dropped.
const MAX_REPORTS: usize = 4_096;

/// Reports of the bare guest that no reader has taken yet.
#[derive(Clone, Debug, Default)]
pub struct Reports(Arc<(Mutex<VecDeque<PortReport>>, Condvar)>);

impl Reports {
    pub(super) fn push(&self, report: PortReport) {
        let mut queue = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() == MAX_REPORTS {
            queue.pop_front();
        }
        queue.push_back(report);
        self.0.1.notify_all();
    }

    pub(super) fn clear(&self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The next report, if one comes within `timeout`.
    #[must_use]
    pub fn next(&self, timeout: Duration) -> Option<PortReport> {
        let deadline = Instant::now() + timeout;
        let mut queue = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(report) = queue.pop_front() {
                return Some(report);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            queue = self.0.1.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
