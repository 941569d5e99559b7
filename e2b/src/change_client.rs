//! The clients of changes, which may go meanwhile.

use std::convert::Infallible;
use std::future::Future;

use axum::http::StatusCode;
use tokio::sync::oneshot;

use crate::error::{Answer, GatewayError};

/// The client of a change.
#[derive(Debug)]
pub(crate) struct ChangeClient(Option<oneshot::Receiver<Infallible>>);

impl ChangeClient {
    /// A client that is there until the sender is dropped.
    pub(crate) fn new() -> (oneshot::Sender<Infallible>, Self) {
        let (there, gone) = oneshot::channel();
        (there, Self(Some(gone)))
    }

    /// A client that may repeat its call, and then gets the answer of the first.
    pub(crate) fn repeating() -> Self {
        Self(None)
    }

    /// Awaits work that makes VMs, unless the client goes meanwhile. Then the work is dropped, and has to
    /// stop them: only the answer names them.
    pub(crate) async fn waits_for<T>(&mut self, work: impl Future<Output = Answer<T>>) -> Answer<T> {
        let Some(gone) = &mut self.0 else { return work.await };
        tokio::select! {
            biased;
            // Nothing is ever sent.
            _ = gone => Err(GatewayError::new(StatusCode::SERVICE_UNAVAILABLE, "the client has gone")),
            done = work => done,
        }
    }
}
