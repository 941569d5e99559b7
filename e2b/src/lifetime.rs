//! What happens by itself: sandboxes pause when their time is over, and those that are gone are
//! forgotten.

use std::time::Duration;

use clade_daemon::control::{CheckpointInfo, ClientError};
use hyper::Method;
use jiff::Timestamp;

use crate::gateway::Gateway;

/// How often it is looked for sandboxes whose time is over, and after how many times for those that are gone.
const TICK: Duration = Duration::from_millis(250);
const TICKS_OF_A_SWEEP: u32 = 20;

impl Gateway {
    /// Forgets sandboxes whose VMs are gone, and snapshots whose checkpoints are.
    async fn sweep(&self) -> Result<(), ClientError> {
        // Before it is asked what is there: one that is made meanwhile is not forgotten.
        let (sandboxes, snapshots) = (self.0.sandboxes.list(), self.0.snapshots.list());
        if !sandboxes.is_empty() {
            let there = self.0.client.all_names().await?;
            for record in sandboxes.iter().filter(|record| !there.contains(&record.id)) {
                self.0.sandboxes.remove(&record.id);
            }
        }
        if !snapshots.is_empty() {
            let all: Vec<CheckpointInfo> =
                self.0.client.supervisor(Method::GET, "/v1/checkpoints", None::<&()>).await?;
            for snapshot in snapshots.iter().filter(|one| !all.iter().any(|there| there.name == one.id)) {
                self.0.snapshots.remove(&snapshot.id);
            }
        }
        Ok(())
    }

    /// Pauses sandboxes whose time is over, for ever.
    pub(crate) async fn keep_time(self) {
        let mut ticks: u32 = 0;
        loop {
            if ticks.is_multiple_of(TICKS_OF_A_SWEEP)
                && let Err(error) = self.sweep().await
            {
                tracing::debug!(%error, "sandboxes are not looked for");
            }
            ticks = ticks.wrapping_add(1);
            tokio::time::sleep(TICK).await;
            let now = Timestamp::now();
            for entry in self.0.sandboxes.select(|record| record.is_to_pause(now)) {
                // It may have been given more time meanwhile.
                if let Err(error) = self.pause(&entry, |record| record.is_to_pause(now)).await {
                    tracing::debug!(%error.message, id = entry.get().id, "a sandbox is not paused");
                }
            }
        }
    }
}
