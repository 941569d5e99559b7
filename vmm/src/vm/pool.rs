//! A pool of prepared VMs, by the configuration they fit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::vm::config::VmConfig;
use crate::vm::prepared::PreparedVm;

/// Prepared VMs that wait for a boot, a fork or a restore.
#[derive(Debug, Default)]
pub(crate) struct VmPool(Mutex<Vec<(Arc<VmConfig>, PreparedVm)>>);

impl VmPool {
    fn entries(&self) -> MutexGuard<'_, Vec<(Arc<VmConfig>, PreparedVm)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, config: &Arc<VmConfig>, prepared: PreparedVm) {
        self.entries().push((Arc::clone(config), prepared));
    }

    /// The prepared VMs that fit `config`.
    pub(crate) fn count(&self, config: &VmConfig) -> usize {
        self.entries().iter().filter(|(of, _)| **of == *config).count()
    }

    /// Takes the newest prepared VM that fits `config`.
    pub(crate) fn take(&self, config: &VmConfig) -> Option<PreparedVm> {
        let mut entries = self.entries();
        entries.iter().rposition(|(of, _)| **of == *config).map(|at| entries.swap_remove(at).1)
    }

    pub(crate) fn clear(&self) {
        let entries = std::mem::take(&mut *self.entries());
        // Not under the lock: each joins its vCPU threads.
        drop(entries);
    }
}
