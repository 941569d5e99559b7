//! What all connections share.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, watch};

use crate::children::Children;
use crate::filesystem::Watchers;
use crate::metrics::CpuTimes;
use crate::process::Table;
use crate::settings::Settings;

/// Messages and other bodies beyond 16 KiB that are in memory at a time.
const LARGE_BODIES: usize = 8;

/// The agent: what all its connections share.
#[derive(Debug)]
pub struct Agent {
    settings: Mutex<Settings>,
    pub(crate) children: Children,
    pub(crate) processes: Table,
    pub(crate) watchers: Watchers,
    pub(crate) large: Semaphore,
    /// Counts how often the VM has become another. Connections of before end.
    pub(crate) generation: watch::Sender<u64>,
    pub(crate) cpu: Mutex<CpuTimes>,
    pub(crate) end: watch::Sender<bool>,
    /// One change of the generation, or `/init`, at a time.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

/// The data behind a lock that a panic has passed is as good as before: no change of it can panic half-way.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// An agent, which reaps all children of this process from now on.
    ///
    /// # Errors
    /// When the end of children cannot be heard of.
    pub fn new() -> io::Result<Arc<Self>> {
        let agent = Self {
            settings: Mutex::default(),
            children: Children::start()?,
            processes: Table::default(),
            watchers: Watchers::default(),
            large: Semaphore::new(LARGE_BODIES),
            generation: watch::Sender::new(0),
            cpu: Mutex::default(),
            end: watch::Sender::new(false),
            turn: tokio::sync::Mutex::default(),
        };
        Ok(Arc::new(agent))
    }

    pub(crate) fn settings(&self) -> MutexGuard<'_, Settings> {
        lock(&self.settings)
    }
}
