//! What the VMs of a process share: the host's KVM, the store of layers, and a pool of prepared VMs.

use std::sync::{Arc, Mutex, PoisonError};

use clade_memory::{RamError, Store, StoreError};
use thiserror::Error;

use crate::kvm::{Host, HostError, StateLayout, VcpuStateError};
use crate::vm::VmError;
use crate::vm::config::VmConfig;
use crate::vm::prepared::PreparedVm;

/// Spare layer files that are kept populated: 8 MiB each.
const SPARES: usize = 1;

/// Why this process cannot run VMs.
#[derive(Debug, Error)]
pub enum ContextError {
    /// No KVM, or not a good enough one.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A vCPU's state cannot be told on this host.
    #[error(transparent)]
    Layout(#[from] VcpuStateError),
    /// No memory files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Clones are handles to the same context.
#[derive(Clone, Debug)]
pub struct Context(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    host: Arc<Host>,
    layout: Arc<StateLayout>,
    store: Store,
    /// Prepared VMs by the configuration they fit.
    pool: Mutex<Vec<(Arc<VmConfig>, PreparedVm)>>,
}

impl Context {
    /// Opens KVM and the store.
    ///
    /// # Errors
    /// When either is not to be had on this host.
    pub fn open() -> Result<Self, ContextError> {
        Self::new(Arc::new(Host::open()?), Store::open()?)
    }

    /// A context over a host and a store.
    ///
    /// # Errors
    /// When the shape of a vCPU's state cannot be found out.
    pub fn new(host: Arc<Host>, store: Store) -> Result<Self, ContextError> {
        // Here and not at the first fork, because it probes the MSRs on a scratch VM.
        let layout = Arc::new(StateLayout::new(&host)?);
        Ok(Self(Arc::new(Inner { host, layout, store, pool: Mutex::default() })))
    }

    /// The host's KVM.
    #[must_use]
    pub fn host(&self) -> &Arc<Host> {
        &self.0.host
    }

    /// Where layers come from.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Prepares VMs for `config` until the pool has `count`, and memory for the layer of the next fork.
    ///
    /// # Errors
    /// When one cannot be made; those that were stay.
    pub fn prefill(&self, config: &Arc<VmConfig>, count: usize) -> Result<(), VmError> {
        self.store().prefill(SPARES).map_err(RamError::from)?;
        while self.prepared_count(config) < count {
            let prepared = PreparedVm::new(&self.0.host, &self.0.layout, &self.0.store, config)?;
            self.pool().push((Arc::clone(config), prepared));
        }
        Ok(())
    }

    /// Prepared VMs for `config` in the pool.
    #[must_use]
    pub fn prepared_count(&self, config: &VmConfig) -> usize {
        self.pool().iter().filter(|(c, _)| **c == *config).count()
    }

    /// Empties the pool, and the store's of files.
    pub fn drain(&self) {
        let pool = std::mem::take(&mut *self.pool());
        drop(pool);
        self.store().drain();
    }

    /// One from the pool if there is one, a fresh one otherwise.
    pub(crate) fn take_prepared(&self, config: &VmConfig) -> Result<PreparedVm, VmError> {
        let warm = {
            let mut pool = self.pool();
            pool.iter().rposition(|(c, _)| **c == *config).map(|at| pool.swap_remove(at).1)
        };
        match warm {
            Some(prepared) => Ok(prepared),
            None => PreparedVm::new(&self.0.host, &self.0.layout, &self.0.store, config),
        }
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Vec<(Arc<VmConfig>, PreparedVm)>> {
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
