//! The origins of sandboxes: built templates, snapshots of an owner, and checkpoints of the host.

use clade_api::CheckpointInfo;
use clade_devices::virtio::net::Link;

use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::records::SnapshotRecord;
use crate::rules::checkpoint_name;
use crate::templates::Template;

/// The prefix of the names of snapshots' checkpoints. No owner chooses one: a snapshot's own name
/// is in its record, so it takes no name of the host's or of another owner's.
pub(crate) const SNAPSHOT_PREFIX: &str = "e2b-snapshot-";

/// The origin of a sandbox.
#[derive(Clone, Debug)]
pub(crate) struct SandboxSource {
    /// Its name to the owner.
    pub(crate) template: String,
    pub(crate) checkpoint: String,
    pub(crate) built: Option<Template>,
    snapshot: Option<SnapshotRecord>,
}

impl SandboxSource {
    /// Returns whether the owner of the template has closed its network, of a checkpoint with this
    /// `network`. None if unknown.
    pub(crate) fn is_closed(&self, network: Option<Link>) -> Option<bool> {
        match &self.snapshot {
            // The owner of a snapshot may open a network if the owner of its sandbox could.
            Some(snapshot) => snapshot.is_closed,
            None => network.map(|link| link == Link::Closed).or(self.built.is_some().then_some(false)),
        }
    }

    /// Returns the state to ask for when a sandbox's owner asks for `link`.
    pub(crate) fn asked_link(&self, link: Link, network: Option<Link>) -> Option<Link> {
        // A checkpoint of the host may have been replaced by one with a closed network when the request
        // reaches it: a sandbox of it is open by inheriting that state only.
        let is_replaceable = self.built.is_none() && self.snapshot.is_none();
        let may_open = !is_replaceable && self.is_closed(network) == Some(false);
        (link == Link::Closed || may_open).then_some(link)
    }
}

impl Gateway {
    /// Returns the snapshot of that name or id, if it is the owner's.
    pub(crate) fn snapshot_of(&self, owner: &str, name: &str) -> Option<SnapshotRecord> {
        let is_it = |one: &SnapshotRecord| one.owner == owner && (one.id == name || one.name.as_deref() == Some(name));
        self.0.snapshots.such(is_it).into_iter().next()
    }

    /// Resolves a name for this owner. A checkpoint of the host may be missing.
    pub(crate) fn source(&self, owner: &str, name: &str) -> Answer<SandboxSource> {
        let name = checkpoint_name(name);
        if let Some(built) = self.built(name) {
            let (template, checkpoint) = (built.name.clone(), built.id.clone());
            return Ok(SandboxSource { template, checkpoint, built: Some(built), snapshot: None });
        }
        if let Some(snapshot) = self.snapshot_of(owner, name) {
            let (template, checkpoint) = (snapshot.shown().to_owned(), snapshot.id.clone());
            return Ok(SandboxSource { template, checkpoint, built: None, snapshot: Some(snapshot) });
        }
        // Even one whose record is not there yet, or no longer.
        if name.starts_with(SNAPSHOT_PREFIX) {
            return Err(GatewayError::no_template(name));
        }
        Ok(SandboxSource { template: name.to_owned(), checkpoint: name.to_owned(), built: None, snapshot: None })
    }

    /// Returns whether the host has a checkpoint of that name.
    pub(crate) async fn has_checkpoint(&self, name: &str) -> Answer<bool> {
        match self.checkpoint(name).await {
            Ok(_) => Ok(true),
            Err(error) if error.status.as_u16() == 404 => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn checkpoint(&self, name: &str) -> Answer<CheckpointInfo> {
        Ok(self.0.supervisor.checkpoint(name).await?)
    }

    /// Returns the checkpoint of a sandbox's origin. A built template's is reopened after a
    /// restart.
    pub(crate) async fn opened(&self, source: &SandboxSource) -> Answer<CheckpointInfo> {
        let gone = |error: GatewayError| match error.status.as_u16() {
            404 => GatewayError::no_template(&source.template),
            _ => error,
        };
        match (self.checkpoint(&source.checkpoint).await, &source.built) {
            (Err(error), Some(built)) if error.status.as_u16() == 404 => {
                // Checkpoints go with their supervisor.
                self.reopen(built).await?;
                self.checkpoint(&source.checkpoint).await.map_err(gone)
            }
            (found, _) => found.map_err(gone),
        }
    }
}
