//! Changes that go on without their clients, up to their ends.

use std::future::Future;

use crate::call_permits::CallPermits;
use crate::change_client::ChangeClient;
use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;

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
        let (_there, client) = ChangeClient::new();
        let (in_progress, change) = (self.0.changes.begin(), change(self.clone(), client));
        // Also if the client goes: otherwise an owner's changes could take all of the supervisor's slots.
        let permit = CallPermits::current();
        let change = async move {
            let _held = (in_progress, permit);
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
