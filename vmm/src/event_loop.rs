//! The process's device loop: one thread that waits for input on consoles and hands it to VMs.

use std::io;
use std::sync::Arc;
use std::thread;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use thiserror::Error;

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The device loop could not be made or reached.
#[derive(Debug, Error)]
pub enum LoopError {
    /// No event manager.
    #[error("no device loop: {0}")]
    Manager(event_manager::Error),
    /// No thread.
    #[error("no thread for the device loop")]
    Thread(#[source] io::Error),
}

/// A handle to the loop. It ends with the process.
#[derive(Clone)]
pub struct EventLoop(Arc<RemoteEndpoint<Subscriber>>);

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventLoop")
    }
}

impl EventLoop {
    /// Starts the loop's thread.
    ///
    /// # Errors
    /// When there is no epoll or no thread to be had.
    pub fn start() -> Result<Self, LoopError> {
        let mut manager = EventManager::<Subscriber>::new().map_err(LoopError::Manager)?;
        let endpoint = manager.remote_endpoint();
        let turn = move || {
            loop {
                if let Err(error) = manager.run() {
                    tracing::warn!(%error, "device loop");
                }
            }
        };
        thread::Builder::new().name("clade-devices".into()).spawn(turn).map_err(LoopError::Thread)?;
        Ok(Self(Arc::new(endpoint)))
    }

    /// Adds a subscriber; it registers its events in its `init`.
    ///
    /// # Errors
    /// When the loop's thread is gone.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, LoopError> {
        self.0
            .call_blocking::<_, _, event_manager::Error>(move |manager| Ok(manager.add_subscriber(subscriber)))
            .map_err(LoopError::Manager)
    }

    /// Takes a subscriber out, and drops it.
    pub fn remove(&self, id: SubscriberId) {
        // Fails only when the subscriber is gone already.
        let _ = self.0.fire(move |manager| drop(manager.remove_subscriber(id)));
    }
}
