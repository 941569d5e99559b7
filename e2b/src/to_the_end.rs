//! Changes that go on without their clients, up to their ends.

use std::convert::Infallible;
use std::future::Future;

use axum::http::StatusCode;
use tokio::sync::oneshot;

use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;

/// The client of a change.
#[derive(Debug)]
pub(crate) struct ChangeClient(Option<oneshot::Receiver<Infallible>>);

impl ChangeClient {
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

impl Gateway {
    /// Runs a change to its end, even if its client goes meanwhile: a partial change contradicts its
    /// record, or has none.
    pub(crate) async fn to_the_end<T: Send + 'static, F: Future<Output = Answer<T>> + Send + 'static>(
        &self,
        change: impl FnOnce(Self) -> F,
    ) -> Answer<T> {
        self.to_the_end_for(|gateway, _| change(gateway)).await
    }

    /// The same for a change that asks whether its client is there.
    pub(crate) async fn to_the_end_for<T: Send + 'static, F: Future<Output = Answer<T>> + Send + 'static>(
        &self,
        change: impl FnOnce(Self, ChangeClient) -> F,
    ) -> Answer<T> {
        // Dropped with this future.
        let (_there, gone) = oneshot::channel();
        let (in_progress, change) = (self.0.changes.begin(), change(self.clone(), ChangeClient(Some(gone))));
        let change = async move {
            let _in_progress = in_progress;
            change.await
        };
        tokio::spawn(change).await.unwrap_or_else(|error| Err(GatewayError::internal(error.to_string())))
    }

    /// Waits until no change is in progress. When the supervisor refuses requests, changes end soon, and
    /// stop the VMs that they have made: a VM without a record would have no end.
    pub async fn changes_ended(&self) {
        self.0.changes.ended().await;
    }
}
