//! The watchers that clients poll.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use clade_agent_proto::RpcError;
use clade_agent_proto::filesystem::FilesystemEvent;
use tokio::task::JoinHandle;

use crate::lock::lock;

/// Maximum number of watchers: as many as the kernel allows a user.
pub(crate) const MAX_WATCHERS: usize = 128;

/// Maximum number of events in a watcher between two polls.
pub(crate) const MAX_EVENTS: usize = 1 << 14;

/// The events of a watcher since the last poll, or the reason for its end.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) events: Mutex<Result<Vec<FilesystemEvent>, RpcError>>,
}

/// A watcher, and the task that receives its events.
type Open = (Arc<Watched>, JoinHandle<()>);

/// The watchers that clients have made.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    pub(crate) made: AtomicU64,
    pub(crate) open: Mutex<HashMap<String, Open>>,
}

impl Watchers {
    /// Returns whether another watcher can be made. Forgets those that have ended if there are too many.
    pub(crate) fn has_room(&self) -> bool {
        let mut open = lock(&self.open);
        if open.len() >= MAX_WATCHERS {
            open.retain(|_, (watched, _)| lock(&watched.events).is_ok());
        }
        open.len() < MAX_WATCHERS
    }

    /// Ends all watchers.
    pub(crate) fn end(&self) {
        lock(&self.open).drain().for_each(|(_, (_, task))| task.abort());
    }
}
