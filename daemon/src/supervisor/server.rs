//! The handlers of the supervisor's socket.

use std::os::unix::net::UnixListener;

use axum::body::Body;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::{Supervisor, metrics};
use crate::control::{
    Answer, ApiError, BootRequest, CancelOnDrop, CheckpointInfo, CheckpointRequest, Client, ClientError, ForkAnswer,
    ForkRequest, PrepareRequest, Prepared, SupervisorInfo, THREAD_PATIENCE, VmInfo, fallback, not_allowed, on_a_thread,
    serve_http,
};
use crate::fleet::{Cancel, FleetError, check_name, socket_path};

/// Serves the supervisor's socket until `ending`.
pub(super) async fn serve(socket: UnixListener, supervisor: Supervisor, ending: watch::Receiver<bool>) {
    serve_http(socket, "supervisor", router(supervisor), ending).await;
}

type Wanted<T> = Result<Json<T>, JsonRejection>;

/// Runs blocking work off the async threads, until its client has gone.
async fn work<T: Send + 'static>(
    supervisor: Supervisor,
    work: impl FnOnce(&Supervisor, &Cancel) -> Result<T, FleetError> + Send + 'static,
) -> Answer<T> {
    let cancel = Cancel::default();
    let _cancel_on_drop = CancelOnDrop(cancel.clone());
    Ok(Json(on_a_thread(THREAD_PATIENCE, move || work(&supervisor, &cancel)).await??))
}

async fn info(State(supervisor): State<Supervisor>) -> Json<SupervisorInfo> {
    Json(supervisor.info())
}

async fn vms(State(supervisor): State<Supervisor>) -> Answer<Vec<VmInfo>> {
    Ok(Json(Client::new(supervisor.dir()).list().await?.vms))
}

async fn boot(State(supervisor): State<Supervisor>, request: Wanted<BootRequest>) -> Answer<VmInfo> {
    let Json(request) = request?;
    let dir = supervisor.dir().to_owned();
    let Json(name) = work(supervisor, move |supervisor, cancel| Ok(supervisor.boot(request, cancel)?.name)).await?;
    Ok(Json(Client::new(&dir).request(hyper::Method::GET, &name, "", None::<&()>).await?))
}

async fn fork_vm(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<ForkRequest>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    work(supervisor, move |supervisor, cancel| supervisor.fork_vm(&name, &request, cancel)).await
}

async fn checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(vm): UrlPath<String>,
    request: Wanted<CheckpointRequest>,
) -> Answer<CheckpointInfo> {
    let Json(request) = request?;
    work(supervisor, move |supervisor, cancel| supervisor.checkpoint(&vm, request.name.as_deref(), cancel)).await
}

async fn checkpoints(State(supervisor): State<Supervisor>) -> Json<Vec<CheckpointInfo>> {
    Json(supervisor.checkpoints().list())
}

async fn show_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    Ok(Json(supervisor.checkpoints().get(&name)?.info(&name)))
}

async fn remove_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    // Closing descriptors may free memory and disks.
    work(supervisor, move |supervisor, _| supervisor.checkpoints().remove(&name)).await
}

async fn fork_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<ForkRequest>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    work(supervisor, move |supervisor, cancel| supervisor.fork_checkpoint(&name, &request, cancel)).await
}

async fn prepare(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<PrepareRequest>,
) -> Answer<Prepared> {
    let Json(request) = request?;
    let prepare = move |supervisor: &Supervisor, cancel: &Cancel| {
        Ok(Prepared { prepared: supervisor.prepare(&name, request.count, cancel)? })
    };
    work(supervisor, prepare).await
}

/// Passes a request for one VM on to its process.
async fn pass_on(State(supervisor): State<Supervisor>, request: Request) -> Response {
    let path = request.uri().path();
    let name = path.strip_prefix("/v1/vms/").and_then(|rest| rest.split('/').next()).unwrap_or_default().to_owned();
    match forward(&supervisor, &name, request).await {
        Ok(response) => response,
        Err(error) => ApiError::from(error).into_response(),
    }
}

async fn forward(supervisor: &Supervisor, name: &str, request: Request) -> Result<Response, ClientError> {
    check_name(name)?;
    let path = socket_path(supervisor.dir(), name);
    let stream = UnixStream::connect(&path).await;
    let stream = stream.map_err(|source| ClientError::unreachable(name, path, source))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    Ok(response.map(Body::new))
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        let status = match &error {
            ClientError::NoSuchVm { .. } | ClientError::Dead { .. } => StatusCode::NOT_FOUND,
            ClientError::Name(_) => StatusCode::BAD_REQUEST,
            ClientError::Forbidden { .. } => StatusCode::FORBIDDEN,
            ClientError::Refused { status, .. } => {
                StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            }
            // Its process ended before it answered.
            ClientError::Http(_) => StatusCode::BAD_GATEWAY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, text: clade_vmm::error_chain(&error) }
    }
}

fn router(supervisor: Supervisor) -> Router {
    let router = Router::new()
        .route("/v1/supervisor", get(info))
        .route("/v1/vms", get(vms).post(boot))
        .route("/v1/vms/{name}/fork", post(fork_vm))
        .route("/v1/vms/{name}/checkpoint", post(checkpoint))
        .route("/v1/vms/{name}", any(pass_on))
        .route("/v1/vms/{name}/{*rest}", any(pass_on))
        .route("/v1/checkpoints", get(checkpoints))
        .route("/v1/checkpoints/{name}", get(show_checkpoint).delete(remove_checkpoint))
        .route("/v1/checkpoints/{name}/fork", post(fork_checkpoint))
        .route("/v1/checkpoints/{name}/prepare", post(prepare))
        .fallback(fallback)
        .method_not_allowed_fallback(not_allowed);
    metrics::observed(router).with_state(supervisor)
}
