//! Suspension of VMs, and its events.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::Supervisor;
use super::vm_record::VmRecord;
use clade_api::http::Cancel;
use clade_api::{DaemonError, SuspendAnswer};
use clade_worker::image::suspend::{self, SuspendedVm};

/// Default directory of the files.
pub(super) const DIR: &str = "/var/tmp";

/// The suspended VMs whose wakes are awaited, by name. One thread waits for each: the process of a VM may report one
/// suspension after another, and no wake.
#[derive(Debug, Default)]
pub(super) struct AwaitedWakes(Mutex<HashMap<String, Arc<SuspendedVm>>>);

impl AwaitedWakes {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<SuspendedVm>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces the suspension of the VM called `name`, whose wake is awaited from here on. The wait for an
    /// earlier wake of that name ends.
    fn begin(&self, name: &str, asleep: &Arc<SuspendedVm>, announce: impl FnOnce()) {
        let mut all = self.all();
        if let Some(earlier) = all.insert(name.to_owned(), Arc::clone(asleep)) {
            earlier.end_wait();
        }
        // Under the lock: otherwise the wake from an earlier suspension could be announced behind it.
        announce();
    }

    /// Ends the wait for a wake, and announces it if no later suspension of that name has done so.
    fn end(&self, name: &str, asleep: &Arc<SuspendedVm>, announce: impl FnOnce()) {
        let mut all = self.all();
        if all.get(name).is_some_and(|now| Arc::ptr_eq(now, asleep)) {
            all.remove(name);
            announce();
        }
    }
}

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
        let (asleep, of) = (Arc::new(asleep), name.to_owned());
        let (events, awaited_wakes) = (Arc::clone(&self.0.events), Arc::clone(&self.0.awaited_wakes));
        let idle = self.0.idle.clone();
        awaited_wakes.begin(name, &asleep, || events.suspended(name, answer.written_pages));
        let watch = move || {
            let is_woken = asleep.wait();
            awaited_wakes.end(&of, &asleep, || {
                if is_woken {
                    idle.woken(&of);
                    events.woken(&of);
                }
            });
        };
        if let Err(error) = thread::Builder::new().name("clade-asleep".to_owned()).spawn(watch) {
            tracing::warn!(%error, name, "its wake will not be announced");
        }
        Ok(answer)
    }
}
