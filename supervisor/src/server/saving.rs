//! Handlers for suspensions and snapshots of VMs.

use axum::Json;
use axum::extract::{Path as UrlPath, State};

use super::{ANSWER_TIMEOUT, Wanted};
use crate::Supervisor;
use crate::vm_record::VmRecord;
use clade_api::http::{Answer, Cancel, Optional, expect_absolute};
use clade_api::{
    Client, SnapshotAnswer, SnapshotProgress, SnapshotRequest, SuspendAfterInfo, SuspendAfterRequest, SuspendAnswer,
    SuspendRequest, TouchedAnswer, WorkingSetAnswer,
};

/// Suspends a VM: writes its memory to a file, and stops it until its guest is needed. Answers when
/// its memory is given back.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/suspend",
    request_body = Option<SuspendRequest>,
    responses((status = 200, description = "Done.", body = SuspendAnswer))
)]
pub(super) async fn suspend_vm(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    Optional(request): Optional<SuspendRequest>,
) -> Answer<SuspendAnswer> {
    Ok(Json(supervisor.answer_suspend(name, request.unwrap_or_default()).await?))
}

/// Shows the idle time after which a VM is suspended.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/suspend-after",
    responses((status = 200, description = "Done.", body = SuspendAfterInfo))
)]
pub(super) async fn show_suspend_after(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<SuspendAfterInfo> {
    Ok(Json(supervisor.suspended_after(&name)?))
}

/// Has a VM suspended whenever it has been idle for a time.
#[utoipa::path(
    put,
    path = "/v1/vms/{name}/suspend-after",
    request_body = SuspendAfterRequest,
    responses((status = 200, description = "Done.", body = SuspendAfterInfo))
)]
pub(super) async fn set_suspend_after(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<SuspendAfterRequest>,
) -> Answer<SuspendAfterInfo> {
    let Json(request) = request?;
    request.dir.as_deref().map_or(Ok(()), expect_absolute)?;
    supervisor.suspend_after(&name, &request)?;
    Ok(Json(supervisor.suspended_after(&name)?))
}

/// Has an idle VM run on.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}/suspend-after",
    responses((status = 200, description = "Done.", body = SuspendAfterInfo))
)]
pub(super) async fn remove_suspend_after(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<SuspendAfterInfo> {
    supervisor.suspend_never(&name)?;
    Ok(Json(supervisor.suspended_after(&name)?))
}

/// Saves a VM. Answers when everything is on the disk.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/snapshot",
    request_body = SnapshotRequest,
    responses((status = 200, description = "Done.", body = SnapshotAnswer))
)]
pub(super) async fn snapshot(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<SnapshotRequest>,
) -> Answer<SnapshotAnswer> {
    let Json(request) = request?;
    expect_absolute(&request.dir)?;
    let permit = supervisor.permit(&name).await?;
    let save = move |supervisor: &Supervisor, cancel: &Cancel| supervisor.snapshot(&name, &request, permit, cancel);
    Ok(Json(supervisor.work(save).await?))
}

/// Shows the progress of a VM's snapshot.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/snapshot",
    responses((status = 200, description = "Done.", body = SnapshotProgress))
)]
pub(super) async fn snapshot_progress(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<SnapshotProgress> {
    VmRecord::expect(&supervisor.0.dir, &name)?;
    Ok(Json(supervisor.snapshots().progress(&name)))
}

/// Cancels a VM's snapshot.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}/snapshot",
    responses((status = 200, description = "Done.", body = SnapshotProgress))
)]
pub(super) async fn cancel_snapshot(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<SnapshotProgress> {
    VmRecord::expect(&supervisor.0.dir, &name)?;
    supervisor.snapshots().cancel(&name);
    Ok(Json(supervisor.snapshots().progress(&name)))
}

/// Records a VM's working set in its snapshot.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/working-set",
    responses((status = 200, description = "Done.", body = WorkingSetAnswer))
)]
pub(super) async fn working_set(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<WorkingSetAnswer> {
    let client = Client::new(supervisor.dir());
    let touched = client.request_within(ANSWER_TIMEOUT, hyper::Method::GET, &name, "/touched", None::<&()>);
    let touched: TouchedAnswer = touched.await?;
    let record = move |supervisor: &Supervisor, _: &Cancel| {
        Ok(WorkingSetAnswer { pages: supervisor.record_working_set(&name, &touched)? })
    };
    Ok(Json(supervisor.work(record).await?))
}
