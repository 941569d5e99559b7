//! Handlers for the networks of VMs.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path as UrlPath, State};
use axum::http::Method;
use clade_devices::virtio::net::Link;

use super::Wanted;
use crate::Supervisor;
use crate::proxy::with_own_socket;
use clade_api::http::{Answer, ApiError, THREAD_PATIENCE, on_a_thread};
use clade_api::{Client, DaemonError, NetworkRequest, ProblemKind, VmInfo};

/// Time limit of a VM's process for a change of its network, which waits for a fork.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(60);

/// Opens or closes a VM's network devices for packets, or sets their egress rules. The host closes
/// a network outside of the VM's process too: it takes the VM's TAP interfaces down, and stops its
/// passt.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/network",
    request_body = NetworkRequest,
    responses((status = 200, description = "Done.", body = VmInfo))
)]
pub(super) async fn set_network(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<NetworkRequest>,
) -> Answer<VmInfo> {
    let Json(request) = request?;
    Ok(Json(supervisor.answer_network(name, request).await?))
}

impl Supervisor {
    /// Changes a VM's network.
    ///
    /// # Errors
    /// When the request is invalid, or the VM's process refuses it.
    pub(crate) async fn answer_network(&self, name: String, request: NetworkRequest) -> Result<VmInfo, ApiError> {
        request.check().map_err(|text| ApiError::new(ProblemKind::BadRequest, text))?;
        let permit = self.0.network_changes.admit(&name)?;
        let supervisor = self.clone();
        // To its end, also without its client: an open device behind a closed interface would stay.
        let changed = tokio::spawn(async move {
            let _permit = permit;
            change_network(supervisor, name, request).await
        });
        let changed = changed.await;
        let stopped = |error| ApiError::new(ProblemKind::Internal, format!("the request has ended early: {error}"));
        changed.map_err(stopped)?
    }
}

async fn change_network(supervisor: Supervisor, name: String, request: NetworkRequest) -> Result<VmInfo, ApiError> {
    let recorded = || {
        let (supervisor, name) = (supervisor.clone(), name.clone());
        async { Ok::<_, ApiError>(on_a_thread(THREAD_PATIENCE, move || supervisor.recorded_process(&name)).await??) }
    };
    // The VM of now: another may have the name when the earlier changes have ended, or its process has answered.
    let Some(turn) = supervisor.0.network_changes.begin(&name, recorded).await? else {
        return Err(DaemonError::NoSuchVm { name }.into());
    };
    let process = turn.process;
    let (dir, post) = (supervisor.dir().to_owned(), Method::POST);
    let set = |link| {
        let (supervisor, name) = (supervisor.clone(), name.clone());
        on_a_thread(THREAD_PATIENCE, move || supervisor.set_link(&name, process, link))
    };
    // A VM without a network device refuses the request, with the reason.
    let closed = if request.network == Some(Link::Closed) { set(Link::Closed).await? } else { Ok(()) };
    let closed = match closed {
        // Another VM may have the name by now. One of an earlier version has no recorded process.
        Err(gone @ DaemonError::NoSuchVm { .. }) if process.is_some() => return Err(gone.into()),
        closed => closed,
    };
    let client = Client::new(&dir);
    let asked = client.request_within(NETWORK_TIMEOUT, post, &name, "/network", Some(&request)).await;
    // After that: the process is asked, too, if the host has refused.
    closed?;
    let info = asked?;
    if request.network == Some(Link::Open) {
        // Last: the rules of the request hold by now.
        set(Link::Open).await??;
    }
    with_own_socket(&dir, name, info).await
}
