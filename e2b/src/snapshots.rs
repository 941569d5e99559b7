//! Snapshots: checkpoints of sandboxes, visible to their owners alone. An owner chooses a
//! snapshot's name, but not its checkpoint's.

use std::sync::PoisonError;

use axum::http::StatusCode;
use clade_api::{CheckpointRequest, ClientError, check_name, random_hex};
use jiff::Timestamp;

use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::quotas::Usage;
use crate::records::SnapshotRecord;
use crate::rules::checkpoint_name;
use crate::source::SNAPSHOT_PREFIX;
use crate::wire::SnapshotInfo;

impl Gateway {
    /// Holds the state of a sandbox at one instant, for further sandboxes. Returns once it is on the
    /// disk.
    pub(crate) async fn snapshot(&self, owner: &str, id: &str, name: Option<String>) -> Answer<SnapshotInfo> {
        let entry = self.owned(owner, id)?;
        let record = entry.get();
        let name = name.map(|name| checkpoint_name(&name).to_owned());
        let _named = match &name {
            Some(name) => Some(self.name_snapshot(owner, name).await?),
            None => None,
        };
        let _held = self.take(owner, Usage::of_snapshot(record.mib))?;
        let random = random_hex::<9>().map_err(|error| GatewayError::internal(error.to_string()))?;
        let request = CheckpointRequest {
            name: Some(format!("{SNAPSHOT_PREFIX}{random}")),
            detach: true,
            ..CheckpointRequest::default()
        };
        let taken = {
            let _turn = entry.turn.lock().await;
            self.0.supervisor.take_checkpoint(id, request).await?
        };
        // Not in the sandbox's turn: it is used while its memory is written to the disk.
        let is_kept = match self.keep_checkpoint(&taken.name).await {
            Ok(is_kept) => is_kept,
            Err(error) => {
                self.remove_checkpoint(&taken.name).await?;
                return Err(error);
            }
        };
        let snapshot = SnapshotRecord {
            id: taken.name.clone(),
            name: name.clone(),
            mib: record.mib,
            is_closed: record.is_template_closed,
            owner: owner.to_owned(),
            sandbox: id.to_owned(),
            taken_at: Timestamp::now(),
            is_kept,
        };
        let shown = SnapshotInfo { id: snapshot.shown().to_owned(), names: name.into_iter().collect() };
        if let Err(error) = self.0.snapshots.insert(snapshot) {
            // Without a record no owner could use or remove it.
            self.remove_checkpoint(&taken.name).await?;
            return Err(GatewayError::internal(error.to_string()));
        }
        Ok(shown)
    }

    /// Reserves a name for an owner's snapshot, until the result is dropped or a record has the
    /// name.
    async fn name_snapshot(&self, owner: &str, name: &str) -> Answer<Naming> {
        check_name(name).map_err(|error| GatewayError::bad(error.to_string()))?;
        let taken = |whose: &str| Err(GatewayError::conflict(format!("{name:?} is the name of {whose}")));
        // A template's checkpoint is reopened under its id: a snapshot of that name would hide it.
        if self.built(name).is_some() || name.starts_with(SNAPSHOT_PREFIX) || self.has_checkpoint(name).await? {
            return taken("a template");
        }
        let pair = (owner.to_owned(), name.to_owned());
        let mut naming = self.0.naming.lock().unwrap_or_else(PoisonError::into_inner);
        if self.snapshot_of(owner, name).is_some() || !naming.insert(pair.clone()) {
            return taken("another snapshot");
        }
        Ok(Naming { gateway: self.clone(), pair })
    }

    /// Writes a checkpoint to the disk, for later supervisors. Returns false without a directory for
    /// them: it ends with this one.
    async fn keep_checkpoint(&self, name: &str) -> Answer<bool> {
        match self.0.supervisor.keep_checkpoint(name).await.map_err(GatewayError::from) {
            Err(error) if error.status == StatusCode::CONFLICT => {
                tracing::warn!(%error.message, name, "a snapshot ends with this supervisor");
                Ok(false)
            }
            kept => kept.map(|_| true),
        }
    }

    pub(crate) async fn remove_checkpoint(&self, name: &str) -> Answer<()> {
        self.0.supervisor.remove_checkpoint(name).await?;
        Ok(())
    }

    /// Removes an owner's snapshot. Templates are the host's, and stay.
    pub(crate) async fn remove_snapshot(&self, owner: &str, id: &str) -> Answer<()> {
        let id = checkpoint_name(id);
        let none = || GatewayError::no_template(id);
        let snapshot = self.snapshot_of(owner, id).ok_or_else(none)?;
        let entry = self.0.snapshots.get(&snapshot.id).ok_or_else(none)?;
        // Of two removals at a time the second would take the first's note for the snapshot's own, and leave it.
        let _turn = entry.turn.lock().await;
        if self.0.snapshots.get(&snapshot.id).is_none() {
            return Err(none());
        }
        let was_kept = entry.get().is_kept;
        let note_kept = |is_kept| drop(self.0.snapshots.change(&entry, |one| one.is_kept = is_kept));
        // First: the record of a removal that is cut short is forgotten with its checkpoint.
        note_kept(false);
        match self.0.supervisor.remove_checkpoint(&snapshot.id).await {
            Ok(_) | Err(ClientError::Refused { status: 404, .. }) => {}
            Err(error) => {
                // Without an answer the checkpoint may have gone, and its record must go with it.
                if matches!(error, ClientError::Refused { .. } | ClientError::NoSupervisor { .. }) {
                    note_kept(was_kept);
                }
                return Err(error.into());
            }
        }
        self.0.snapshots.remove(&snapshot.id);
        Ok(())
    }
}

/// The reserved name of a snapshot.
#[derive(Debug)]
struct Naming {
    gateway: Gateway,
    pair: (String, String),
}

impl Drop for Naming {
    fn drop(&mut self) {
        self.gateway.0.naming.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.pair);
    }
}
