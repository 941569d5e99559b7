//! State shared by all connections.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::process::Pid;
use tokio::sync::{Semaphore, watch};

use crate::children::Children;
use crate::filesystem::Watchers;
use crate::layer::Baseline;
use crate::lock::lock;
use crate::metrics::CpuTimes;
use crate::process::Table;
use crate::settings::Settings;

/// Number of messages and other bodies above 16 KiB in memory at a time.
const LARGE_BODIES: usize = 8;

/// The agent: the state shared by all its connections.
#[derive(Debug)]
pub struct Agent {
    settings: Mutex<Settings>,
    pub(crate) children: Children,
    pub(crate) processes: Table,
    pub(crate) watchers: Watchers,
    pub(crate) large: Semaphore,
    /// Counts the changes of the VM's generation. Each one ends the earlier connections.
    pub(crate) generation: watch::Sender<u64>,
    pub(crate) cpu: Mutex<CpuTimes>,
    /// The time that programs have to end in, once the end is requested.
    pub(crate) end: watch::Sender<Option<Duration>>,
    /// The process of the entrypoint, and the number of the signal that ends it in order.
    pub(crate) entrypoint: Mutex<Option<(Pid, i32)>>,
    /// The files that a layer is compared with.
    pub(crate) layer: Mutex<Option<Baseline>>,
    /// Held during a change of the generation, or `/init`: one at a time.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

impl Agent {
    /// An agent, which reaps all children of this process from now on.
    ///
    /// # Errors
    /// When the signal of children's ends cannot be received.
    pub fn new() -> io::Result<Arc<Self>> {
        let agent = Self {
            settings: Mutex::default(),
            children: Children::start()?,
            processes: Table::default(),
            watchers: Watchers::default(),
            large: Semaphore::new(LARGE_BODIES),
            generation: watch::Sender::new(0),
            cpu: Mutex::default(),
            end: watch::Sender::new(None),
            entrypoint: Mutex::default(),
            layer: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        };
        Ok(Arc::new(agent))
    }

    pub(crate) fn settings(&self) -> MutexGuard<'_, Settings> {
        lock(&self.settings)
    }
}
