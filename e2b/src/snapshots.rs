//! Snapshots: checkpoints of sandboxes, each its owner's alone.

use clade_daemon::control::{CheckpointInfo, CheckpointRequest};
use hyper::Method;
use jiff::Timestamp;
use serde_json::Value;

use crate::error::{Answer, ApiError};
use crate::gateway::Gateway;
use crate::records::Snapshot;
use crate::rules::checkpoint_name;
use crate::secret::random_hex;
use crate::wire::SnapshotInfo;

impl Gateway {
    /// Holds the state of a sandbox at one instant, to make others of.
    pub(crate) async fn snapshot(&self, owner: &str, id: &str, name: Option<String>) -> Answer<SnapshotInfo> {
        let entry = self.owned(owner, id)?;
        let _turn = entry.turn.lock().await;
        let names: Vec<String> = name.iter().cloned().collect();
        let name = match name {
            Some(name) => checkpoint_name(&name).to_owned(),
            None => format!("s{}", random_hex::<9>().map_err(|error| ApiError::internal(error.to_string()))?),
        };
        // The checkpoint of a template is made again under its id, and the name would be the template's.
        if self.built(&name).is_some() {
            return Err(ApiError::conflict(format!("{name:?} is the name of a template")));
        }
        let request = CheckpointRequest { name: Some(name) };
        let taken: CheckpointInfo = self.vm(Method::POST, id, "/checkpoint", Some(&request)).await?;
        let (owner, sandbox) = (owner.to_owned(), id.to_owned());
        let snapshot = Snapshot { id: taken.name.clone(), owner, sandbox, taken_at: Timestamp::now() };
        if let Err(error) = self.0.snapshots.insert(snapshot) {
            // It would be everybody's.
            self.remove_checkpoint(&taken.name).await?;
            return Err(ApiError::internal(error.to_string()));
        }
        Ok(SnapshotInfo { id: taken.name, names })
    }

    async fn remove_checkpoint(&self, name: &str) -> Answer<()> {
        let _: Value = self.0.client.of_checkpoint(Method::DELETE, name, "", None::<&()>).await?;
        Ok(())
    }

    /// Removes a snapshot of its owner's. Templates are the host's: they are not removed here.
    pub(crate) async fn remove_snapshot(&self, owner: &str, id: &str) -> Answer<()> {
        let id = checkpoint_name(id);
        let owned = self.0.snapshots.get(id).is_some_and(|snapshot| snapshot.get().owner == owner);
        if !owned {
            return Err(ApiError::no_template(id));
        }
        let removed = self.remove_checkpoint(id).await;
        if removed.as_ref().is_err_and(|error| error.status.as_u16() != 404) {
            return removed;
        }
        self.0.snapshots.remove(id);
        Ok(())
    }
}
