//! Handlers for checkpoints.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path as UrlPath, State};

use super::Wanted;
use crate::Supervisor;
use crate::reidentify::expect_reachable;
use clade_api::http::{Answer, ApiError, Cancel, Optional};
use clade_api::{
    CheckpointInfo, CheckpointRequest, ForkAnswer, ForkRequest, KeepRequest, OpenRequest, PrepareRequest, Prepared,
    ResetAnswer, ResetRequest, RollbackRequest,
};

/// Holds the image of a snapshot as a checkpoint.
#[utoipa::path(
    post,
    path = "/v1/checkpoints",
    request_body = OpenRequest,
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
pub(super) async fn open(State(supervisor): State<Supervisor>, request: Wanted<OpenRequest>) -> Answer<CheckpointInfo> {
    let Json(request) = request?;
    Ok(Json(supervisor.answer_open(request).await?))
}

/// Takes a checkpoint of a VM.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/checkpoint",
    request_body = CheckpointRequest,
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
pub(super) async fn checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(vm): UrlPath<String>,
    request: Wanted<CheckpointRequest>,
) -> Answer<CheckpointInfo> {
    let Json(request) = request?;
    Ok(Json(supervisor.answer_checkpoint(vm, request).await?))
}

/// Rolls a VM back to a checkpoint of its line, in place.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/rollback",
    request_body = RollbackRequest,
    responses((status = 200, description = "Done.", body = ResetAnswer))
)]
pub(super) async fn roll_back(
    State(supervisor): State<Supervisor>,
    UrlPath(vm): UrlPath<String>,
    request: Wanted<RollbackRequest>,
) -> Answer<ResetAnswer> {
    let Json(RollbackRequest { checkpoint, ready }) = request?;
    let permit = supervisor.permit(&vm).await?;
    let name = vm.clone();
    if ready {
        // Before the guest's state is given up.
        supervisor.expect_running(&name).await?;
    }
    let roll_back =
        move |supervisor: &Supervisor, cancel: &Cancel| supervisor.roll_back(&vm, &checkpoint, ready, permit, cancel);
    let answer = supervisor.work(roll_back).await?;
    if ready {
        supervisor.reidentify(&name).await?;
    }
    Ok(Json(answer))
}

/// Resets a forked VM to the instant of its fork.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/reset",
    request_body = Option<ResetRequest>,
    responses((status = 200, description = "Done.", body = ResetAnswer))
)]
pub(super) async fn reset(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    Optional(request): Optional<ResetRequest>,
) -> Answer<ResetAnswer> {
    let ready = request.unwrap_or_default().ready;
    if ready {
        // Before the guest's state is given up.
        supervisor.expect_running(&name).await?;
        expect_reachable(&name, &supervisor.record_of(&name).await?.template.config)?;
    }
    let answer = supervisor.answer_reset(&name).await?;
    if ready {
        supervisor.reidentify(&name).await?;
    }
    Ok(Json(answer))
}

/// Lists the checkpoints.
#[utoipa::path(
    get,
    path = "/v1/checkpoints",
    responses((status = 200, description = "Done.", body = Vec<CheckpointInfo>))
)]
pub(super) async fn checkpoints(State(supervisor): State<Supervisor>) -> Json<Vec<CheckpointInfo>> {
    Json(supervisor.checkpoints().list())
}

/// Shows a checkpoint.
#[utoipa::path(
    get,
    path = "/v1/checkpoints/{name}",
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
pub(super) async fn show_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    Ok(Json(supervisor.checkpoints().info(&name)?))
}

/// Writes a checkpoint to the disk, where later supervisors find it. Answers when it is there.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/{name}/keep",
    request_body = Option<KeepRequest>,
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
pub(super) async fn keep_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    body: Bytes,
) -> Answer<CheckpointInfo> {
    Ok(Json(supervisor.answer_keep(name, parse_keep(&body)?).await?))
}

/// Parses the body of a request to keep a checkpoint, which clients of the version before leave empty.
fn parse_keep(body: &[u8]) -> Result<KeepRequest, ApiError> {
    if body.is_empty() {
        return Ok(KeepRequest::default());
    }
    let Json(request) = Json::from_bytes(body)?;
    Ok(request)
}

/// Removes a checkpoint. Its children run on.
#[utoipa::path(
    delete,
    path = "/v1/checkpoints/{name}",
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
pub(super) async fn remove_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    Ok(Json(supervisor.answer_remove(name).await?))
}

/// Forks a checkpoint.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/{name}/fork",
    request_body = ForkRequest,
    responses((status = 200, description = "Done.", body = ForkAnswer))
)]
pub(super) async fn fork_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<ForkRequest>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    Ok(Json(supervisor.answer_fork_of_checkpoint(name, request).await?))
}

/// Prepares processes for children of a checkpoint.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/{name}/prepare",
    request_body = PrepareRequest,
    responses((status = 200, description = "Done.", body = Prepared))
)]
pub(super) async fn prepare(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<PrepareRequest>,
) -> Answer<Prepared> {
    let Json(request) = request?;
    let prepare = move |supervisor: &Supervisor, cancel: &Cancel| {
        Ok(Prepared { prepared: supervisor.prepare(&name, request.count, cancel)? })
    };
    Ok(Json(supervisor.work(prepare).await?))
}
