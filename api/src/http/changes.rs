//! Changes in progress, for which the end of the process waits.

use std::sync::Arc;

use tokio::sync::watch;

/// The number of changes in progress.
#[derive(Debug, Default)]
pub struct Changes(watch::Sender<usize>);

/// A change in progress, until it is dropped.
#[derive(Debug)]
pub struct Change(Arc<Changes>);

impl Changes {
    /// Counts a change until the result is dropped.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> Change {
        self.0.send_modify(|count| *count += 1);
        Change(Arc::clone(self))
    }

    /// Waits until no change is in progress.
    pub async fn ended(&self) {
        // The sender is this.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}
