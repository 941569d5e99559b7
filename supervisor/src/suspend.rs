//! Suspension of VMs, and its events.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use super::Supervisor;
use super::vm_record::VmRecord;
use clade_api::http::Cancel;
use clade_api::{DaemonError, SuspendAnswer};
use clade_worker::image::suspend;

/// Default directory of the files.
pub(super) const DIR: &str = "/var/tmp";

impl Supervisor {
    /// Suspends a VM to a file in `dir`.
    ///
    /// # Errors
    /// When there is no such VM, no file can be made, or it cannot be suspended: it then runs on.
    pub(super) fn suspend(&self, name: &str, dir: &Path, cancel: &Cancel) -> Result<SuspendAnswer, DaemonError> {
        let _busy = self.0.busy.read();
        VmRecord::expect(&self.0.dir, name)?;
        let (answer, asleep) = suspend::suspend(self.0.dir.path(), name, dir, &|| self.check(0, 0, cancel))?;
        if answer.was_suspended {
            return Ok(answer);
        }
        self.0.events.suspended(name, answer.written_pages);
        let (events, of) = (Arc::clone(&self.0.events), name.to_owned());
        let watch = move || {
            if asleep.wait() {
                events.woken(&of);
            }
        };
        if let Err(error) = thread::Builder::new().name("clade-asleep".to_owned()).spawn(watch) {
            tracing::warn!(%error, name, "its wake will not be announced");
        }
        Ok(answer)
    }
}
