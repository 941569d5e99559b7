//! State that the VMs of a process share: the host's KVM, the store of layers, and a pool of
//! prepared VMs.

use std::sync::Arc;

use clade_memory::{HugeTmpfs, RamError, Store, StoreError};
use thiserror::Error;

use crate::kvm::{BootTime, Host, HostError, StateLayout, VcpuStateError};
use crate::vm::config::VmConfig;
use crate::vm::error::VmError;
use crate::vm::pool::VmPool;
use crate::vm::prepared::PreparedVm;

/// Spare layer files that are kept populated: 8 MiB each.
const SPARES: usize = 1;

/// Why this process cannot run VMs.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ContextError {
    /// The host has no KVM, or its KVM lacks a required feature.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The MSRs or the XSAVE area of a vCPU's state cannot be determined.
    #[error(transparent)]
    Layout(#[from] VcpuStateError),
    /// The host cannot make memory files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// State that the VMs of a process share. A clone is a handle to the same context.
#[derive(Clone, Debug)]
pub struct Context {
    inner: Arc<Inner>,
    report_port: bool,
}

#[derive(Debug)]
struct Inner {
    host: Arc<Host>,
    layout: Arc<StateLayout>,
    store: Store,
    pool: VmPool,
}

impl Context {
    /// Opens KVM and the store.
    ///
    /// # Errors
    /// When the host lacks either.
    pub fn open() -> Result<Self, ContextError> {
        Self::new(Arc::new(Host::open()?), Store::open()?)
    }

    /// The same, in a process that gets the mount of its memory files from another ([`Store::on`]).
    ///
    /// # Errors
    /// When the host lacks KVM, or a requirement of the store.
    pub fn open_on(mount: Option<HugeTmpfs>) -> Result<Self, ContextError> {
        Self::new(Arc::new(Host::open()?), Store::on(mount)?)
    }

    /// A context over a host and a store.
    ///
    /// # Errors
    /// When the layout of a vCPU's state cannot be determined.
    pub fn new(host: Arc<Host>, store: Store) -> Result<Self, ContextError> {
        // Here and not at the first fork, because it probes the MSRs on a scratch VM.
        let layout = Arc::new(StateLayout::new(&host)?);
        let inner = Arc::new(Inner { host, layout, store, pool: VmPool::default() });
        Ok(Self { inner, report_port: false })
    }

    /// A handle to the same context whose VMs have the report port of the bare guest. The port is
    /// not part of a VM's configuration: a VM has it if it was booted, forked or restored through
    /// such a handle.
    #[must_use]
    pub fn with_report_port(mut self) -> Self {
        self.report_port = true;
        self
    }

    pub(crate) fn has_report_port(&self) -> bool {
        self.report_port
    }

    /// The host's KVM.
    #[must_use]
    pub fn host(&self) -> &Arc<Host> {
        &self.inner.host
    }

    /// The store that memory layers are made in.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Determines the host's properties in advance of the first restore, for a process that is
    /// copied afterwards.
    ///
    /// # Errors
    /// When the host's properties cannot be determined.
    pub fn warm_up(&self) -> Result<(), HostError> {
        // Reads the id of this boot of the host.
        let _ = BootTime::now();
        self.inner.host.requirements().map(|_| ())
    }

    /// Prepares VMs for `config` until the pool has `count`, and memory for the layer of the next
    /// fork.
    ///
    /// # Errors
    /// When one cannot be made. Those made before stay in the pool.
    pub fn prefill(&self, config: &Arc<VmConfig>, count: usize) -> Result<(), VmError> {
        self.store().prefill(SPARES).map_err(RamError::from)?;
        self.prepare_vms(config, count)
    }

    /// Prepares VMs for `config` until the pool has `count`.
    ///
    /// # Errors
    /// When one cannot be made. Those made before stay in the pool.
    pub fn prepare_vms(&self, config: &Arc<VmConfig>, count: usize) -> Result<(), VmError> {
        while self.prepared_count(config) < count {
            self.inner.pool.push(config, self.prepare(config)?);
        }
        Ok(())
    }

    /// The number of prepared VMs for `config` in the pool.
    #[must_use]
    pub fn prepared_count(&self, config: &VmConfig) -> usize {
        self.inner.pool.count(config)
    }

    /// Drops the prepared VMs of the pool and the spare files of the store.
    pub fn drain(&self) {
        self.inner.pool.clear();
        self.store().drain();
    }

    /// A VM from the pool if it has one for `config`, a fresh one otherwise.
    pub(crate) fn take_prepared(&self, config: &VmConfig) -> Result<PreparedVm, VmError> {
        self.inner.pool.take(config).map_or_else(|| self.prepare(config), Ok)
    }

    fn prepare(&self, config: &VmConfig) -> Result<PreparedVm, VmError> {
        PreparedVm::new(&self.inner.host, &self.inner.layout, &self.inner.store, config)
    }
}
