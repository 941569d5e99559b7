//! The calls that show templates: built ones, and checkpoints made by hand.

use std::collections::{BTreeMap, BTreeSet};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::{Extension, Json};
use clade_api::CheckpointInfo;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{GatewayState, InPath, KeyOwner, ListQueryResult, SortOrder, Who};
use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::records::SnapshotRecord;
use crate::rules::checkpoint_name;
use crate::source::SNAPSHOT_PREFIX;
use crate::templates::Template as Built;
use crate::wire::{ENVD_VERSION, ListedTemplate};

fn template(id: String, name: String, (cpu_count, memory_mib): (u8, u64), taken_at: Timestamp) -> ListedTemplate {
    ListedTemplate {
        public: true,
        build: id.clone(),
        cpu_count,
        memory_mib,
        disk_mib: 0,
        aliases: vec![name.clone()],
        names: vec![name],
        id,
        created_at: taken_at,
        updated_at: taken_at,
        created_by: None,
        last_spawned_at: None,
        spawn_count: 0,
        build_count: 1,
        envd_version: ENVD_VERSION,
        build_status: "ready",
    }
}

fn of_checkpoint(checkpoint: CheckpointInfo, snapshot: Option<&SnapshotRecord>) -> ListedTemplate {
    let age = SignedDuration::try_from_secs_f64(checkpoint.age_s).unwrap_or_default();
    let taken_at = Timestamp::now().checked_sub(age).unwrap_or_default();
    let name = snapshot.map_or(checkpoint.name, |snapshot| snapshot.shown().to_owned());
    ListedTemplate {
        public: snapshot.is_none(),
        ..template(name.clone(), name, (checkpoint.cpus, checkpoint.mib), taken_at)
    }
}

fn of_built(built: Built) -> ListedTemplate {
    template(built.id, built.name, (built.spec.cpus, built.spec.mib), built.created_at)
}

/// Returns all templates that this owner may use, by name. A built template hides a checkpoint of
/// its name.
async fn visible(gateway: &Gateway, owner: &KeyOwner) -> Answer<Vec<ListedTemplate>> {
    let mut all = gateway.0.supervisor.checkpoints().await?;
    let built = gateway.all_built()?;
    let hidden: BTreeSet<&str> = built.iter().flat_map(|one| [one.name.as_str(), one.id.as_str()]).collect();
    let own = gateway.0.snapshots.such(|one| one.owner == owner.0);
    let own: BTreeMap<&str, &SnapshotRecord> = own.iter().map(|one| (one.id.as_str(), one)).collect();
    let named: BTreeSet<&str> = own.values().map(|one| one.shown()).collect();
    all.retain(|one| {
        let name = one.name.as_str();
        // The checkpoint of a snapshot belongs to its owner alone, even before it has a record.
        own.contains_key(name) || !name.starts_with(SNAPSHOT_PREFIX) && !hidden.contains(name) && !named.contains(name)
    });
    let of = |one: CheckpointInfo| own.get(one.name.as_str()).copied();
    let mut all: Vec<ListedTemplate> = all.into_iter().map(|one| of_checkpoint(one.clone(), of(one))).collect();
    all.extend(built.into_iter().map(of_built));
    Ok(all)
}

pub(super) async fn list(
    State(gateway): GatewayState,
    Extension(owner): Who,
    query: ListQueryResult,
) -> Answer<(HeaderMap, Json<Vec<ListedTemplate>>)> {
    let axum::extract::Query(query) = query?;
    let mut all = visible(&gateway, &owner).await?;
    let key = |one: &ListedTemplate| (0, one.names.concat());
    all.sort_by_key(key);
    let (headers, page) = query.page(all, SortOrder::Ascending, key)?;
    Ok((headers, Json(page)))
}

pub(super) async fn alias(
    State(gateway): GatewayState,
    Extension(owner): Who,
    InPath(alias): InPath,
) -> Answer<Json<Value>> {
    let all = visible(&gateway, &owner).await?;
    let wanted = checkpoint_name(&alias);
    let found = all.into_iter().find(|one| one.id == wanted || one.names.iter().any(|name| name == wanted));
    let found = found.ok_or_else(|| GatewayError::no_template(&alias))?;
    Ok(Json(json!({"templateID": found.id, "public": found.public})))
}

pub(super) async fn remove(
    State(gateway): GatewayState,
    Extension(owner): Who,
    InPath(id): InPath,
) -> Answer<StatusCode> {
    gateway.to_the_end(|gateway| async move { gateway.remove_snapshot(&owner.0, &id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
