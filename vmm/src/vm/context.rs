//! What the VMs of a process share: the host's KVM, the store of layers, and warm shells.

use std::sync::{Arc, Mutex, PoisonError};

use clade_memory::{RamError, Store, StoreError};
use thiserror::Error;

use crate::kvm::{Host, HostError, StateLayout, VcpuStateError};
use crate::vm::VmError;
use crate::vm::config::VmConfig;
use crate::vm::shell::Shell;

/// Spare layers kept warm: 8 MiB each.
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
    /// Shells by what they fit, all idle.
    shells: Mutex<Vec<(Arc<VmConfig>, Shell)>>,
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
        Ok(Self(Arc::new(Inner { host, layout, store, shells: Mutex::default() })))
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

    /// Makes shells for `config` until `count` are warm, and memory for the layer of the next fork.
    ///
    /// # Errors
    /// When one cannot be made; those that were stay.
    pub fn warm(&self, config: &Arc<VmConfig>, count: usize) -> Result<(), VmError> {
        self.store().warm(SPARES).map_err(RamError::from)?;
        while self.warm_shells(config) < count {
            let shell = Shell::new(&self.0.host, &self.0.layout, &self.0.store, config)?;
            self.shells().push((Arc::clone(config), shell));
        }
        Ok(())
    }

    /// Shells for `config` that are warm.
    #[must_use]
    pub fn warm_shells(&self, config: &VmConfig) -> usize {
        self.shells().iter().filter(|(c, _)| **c == *config).count()
    }

    /// Lets all that is warm go.
    pub fn cool(&self) {
        let shells = std::mem::take(&mut *self.shells());
        drop(shells);
        self.store().cool();
    }

    /// A warm shell if there is one, a fresh one otherwise.
    pub(crate) fn shell(&self, config: &VmConfig) -> Result<Shell, VmError> {
        let warm = {
            let mut shells = self.shells();
            shells.iter().rposition(|(c, _)| **c == *config).map(|at| shells.swap_remove(at).1)
        };
        match warm {
            Some(shell) => Ok(shell),
            None => Shell::new(&self.0.host, &self.0.layout, &self.0.store, config),
        }
    }

    fn shells(&self) -> std::sync::MutexGuard<'_, Vec<(Arc<VmConfig>, Shell)>> {
        self.0.shells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
