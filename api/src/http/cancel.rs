//! Requests whose clients have gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::CancelReason;

/// Cancels a request. A clone cancels the same request.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Cancels because the client has gone.
    pub(crate) fn client_gone(&self) {
        // Relaxed: read between two children, and nothing is published through it.
        self.0.store(true, Ordering::Relaxed);
    }

    /// Returns the reason, if the request is cancelled.
    #[must_use]
    pub fn reason(&self) -> Option<CancelReason> {
        self.0.load(Ordering::Relaxed).then_some(CancelReason::ClientGone)
    }
}

/// Cancels a request when its handler is dropped, which is when the connection is closed.
#[derive(Debug)]
pub struct CancelOnDrop(pub Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.client_gone();
    }
}
