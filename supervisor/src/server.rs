//! The handlers of the supervisor's socket. Those of checkpoints, networks and saved VMs have files of
//! their own. `answers` has what they share with `in_process`, for servers in this process.

mod answers;
mod checkpoints;
mod in_process;
mod network;
mod saving;

pub(crate) use in_process::InProcessRequests;

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use axum::{Extension, Json, Router};
use serde_json::Value;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::idempotency::once;
use super::proxy::{ProxyLimits, bounded, forward, shown, with_own_socket};
use super::reidentify::PendingVms;
use super::vm_record::vsock_known;
use super::{Supervisor, browser_page, metrics, openapi};
use answers::{Activation, expect_paths};
use clade_api::http::{
    Acceptor, Answer, ApiError, Cancel, ClientProcess, Optional, SessionGate, THREAD_PATIENCE, TcpAcceptor,
    behind_gate, bind_tcp, fallback, not_allowed, on_a_thread, serve_http, session, with_bodies,
};
use clade_api::{
    BootRequest, Client, EndedVm, ForkAnswer, ForkRequest, ListedVms, ReadyAnswer, RestoreRequest, StopAnswer,
    StopRequest, SupervisorInfo, SupervisorKept, Token, VmInfo, ended_vms,
};
use clade_vmm::vm::VmConfig;

/// Time limit of a VM's process for requests that it answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Time limit for the record of the end of a VM that does not answer.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of the checks for it.
const END_INTERVAL: Duration = Duration::from_millis(10);

/// Serves the supervisor's socket until `ending`.
pub(super) async fn serve(socket: UnixListener, supervisor: Supervisor, ending: watch::Receiver<bool>) {
    let Some(acceptor) = Acceptor::new(socket, "supervisor") else { return };
    serve_http(acceptor, with_bodies(router(supervisor)), ending).await;
}

/// Reason why the API is not served over TCP.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TcpError {
    /// Others than this host's users could connect.
    #[error("{address} is not a loopback address: the API has no encryption; forward a port by ssh instead")]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be bound.
    #[error("{address} cannot be listened on")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The socket's error.
        #[source]
        source: io::Error,
    },
}

/// A port for the API, bound before there is a supervisor: a port that is taken leaves none.
#[derive(Debug)]
pub struct TcpPort {
    listener: std::net::TcpListener,
    address: SocketAddr,
}

impl TcpPort {
    /// Binds a loopback address. Port 0 stands for a free one.
    ///
    /// # Errors
    /// When the address is not a loopback address, or cannot be bound.
    pub fn bind(address: SocketAddr) -> Result<Self, TcpError> {
        if !address.ip().is_loopback() {
            return Err(TcpError::NotLoopback { address });
        }
        let (listener, address) = bind_tcp(address).map_err(|source| TcpError::Bind { address, source })?;
        Ok(Self { listener, address })
    }
}

impl Supervisor {
    /// Also serves the API and the page at `port`, for clients that show `token`. Returns the
    /// address.
    ///
    /// # Errors
    /// When the kernel refuses to watch the port.
    pub fn listen(&self, port: TcpPort, token: Token) -> Result<SocketAddr, TcpError> {
        let TcpPort { listener, address: bound } = port;
        let _runtime = self.0.runtime.enter();
        let failed = |source| TcpError::Bind { address: bound, source };
        let acceptor = TcpAcceptor(TcpListener::from_std(listener).map_err(failed)?);
        let gate = Arc::new(SessionGate::new(token, bound.port()));
        let api = behind_gate(router(self.clone()), gate);
        let router = browser_page::routes().merge(api).layer(from_fn(browser_page::harden));
        self.0.serve(serve_http(acceptor, router, self.0.ending.subscribe()));
        Ok(bound)
    }
}

type Wanted<T> = Result<Json<T>, JsonRejection>;

/// Shows the supervisor in numbers.
#[utoipa::path(get, path = "/v1/supervisor", responses((status = 200, description = "Done.", body = SupervisorInfo)))]
async fn info(State(supervisor): State<Supervisor>) -> Answer<SupervisorInfo> {
    if !supervisor.reads_for_info() {
        return Ok(Json(supervisor.info()));
    }
    Ok(Json(on_a_thread(THREAD_PATIENCE, move || supervisor.info()).await?))
}

/// Puts the end of a supervisor that ends when it is idle off, for two seconds.
#[utoipa::path(post, path = "/v1/supervisor", responses((status = 200, description = "Done.", body = SupervisorKept)))]
async fn keep(State(supervisor): State<Supervisor>) -> Answer<SupervisorKept> {
    supervisor.check(0, 0, &Cancel::default())?;
    // A POST puts the end off by itself.
    Ok(Json(SupervisorKept { pid: std::process::id() }))
}

/// Lists the VMs of the directory.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, description = "Done.", body = Vec<VmInfo>)))]
async fn vms(State(supervisor): State<Supervisor>) -> Answer<Vec<VmInfo>> {
    let ListedVms { vms: mut all, silent, .. } = Client::new(supervisor.dir()).list().await?;
    for name in silent {
        tracing::warn!(name, "a VM does not answer, and is not listed");
    }
    let known = move || {
        for vm in &mut all {
            // As in `shown`.
            if let Ok(Some(known)) = vsock_known(supervisor.dir(), &vm.name) {
                vm.vsock = known;
            }
        }
        all
    };
    Ok(Json(on_a_thread(THREAD_PATIENCE, known).await?))
}

/// Lists the names of the directory's VMs, also of those that do not answer. Some may have ended.
#[utoipa::path(get, path = "/v1/names", responses((status = 200, description = "Done.", body = Vec<String>)))]
async fn names(State(supervisor): State<Supervisor>) -> Answer<Vec<String>> {
    Ok(Json(on_a_thread(THREAD_PATIENCE, move || Client::new(supervisor.dir()).names()).await??))
}

/// Lists the VMs that ended by themselves, with the reasons.
#[utoipa::path(get, path = "/v1/ended", responses((status = 200, description = "Done.", body = Vec<EndedVm>)))]
async fn ended(State(supervisor): State<Supervisor>) -> Answer<Vec<EndedVm>> {
    let dir = supervisor.dir().to_owned();
    Ok(Json(on_a_thread(THREAD_PATIENCE, move || ended_vms(&dir)).await??))
}

/// Boots a VM. Answers when it runs; if it has ended by then, with its end. A VM that does not answer is stopped.
#[utoipa::path(
    post,
    path = "/v1/vms",
    request_body = BootRequest,
    responses((status = 200, description = "Done.", body = VmInfo))
)]
async fn boot(
    State(supervisor): State<Supervisor>,
    client: Option<Extension<ClientProcess>>,
    request: Wanted<BootRequest>,
) -> Answer<VmInfo> {
    let Json(request) = request?;
    let (dir, config) = (supervisor.dir().to_owned(), request.config.clone());
    let client = client.map(|Extension(client)| client);
    let (name, pending) = supervisor
        .work(move |supervisor, cancel| {
            let name = supervisor.boot(request, client, cancel)?.name;
            let pending = PendingVms::new(supervisor, std::slice::from_ref(&name));
            Ok((name, pending))
        })
        .await?;
    match shown_boot(&dir, name, &config).await {
        Ok(info) => {
            pending.leave();
            Ok(Json(info))
        }
        // The same request may come again, and finds the name free.
        Err(error) => {
            pending.stop().await;
            Err(error)
        }
    }
}

/// Shows a new VM, or its end.
async fn shown_boot(dir: &Path, name: String, config: &VmConfig) -> Result<VmInfo, ApiError> {
    let asked = Client::new(dir).request_within(ANSWER_TIMEOUT, hyper::Method::GET, &name, "", None::<&()>).await;
    let error = match asked {
        Ok(info) => return with_own_socket(dir, name, info).await,
        Err(error) => error,
    };
    let dir = dir.to_owned();
    let ended = on_a_thread(THREAD_PATIENCE, move || ended_soon(&dir, &name)).await?;
    ended.map(|ended| VmInfo::of_ended(ended, config)).ok_or_else(|| error.into())
}

/// Returns the end of a new VM that does not answer.
fn ended_soon(dir: &Path, name: &str) -> Option<EndedVm> {
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        let ended = ended_vms(dir).ok()?.into_iter().find(|ended| ended.name == name);
        if ended.is_some() || Instant::now() > deadline {
            return ended;
        }
        thread::sleep(END_INTERVAL);
    }
}

/// Forks a VM. Each child has a process of its own.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/fork",
    request_body = ForkRequest,
    responses((status = 200, description = "Done.", body = ForkAnswer))
)]
async fn fork_vm(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<ForkRequest>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    Ok(Json(supervisor.answer_fork(name, request).await?))
}

/// Has the agent in a VM's guest renew its identity: its clock, its random numbers, its tokens, its
/// hooks. Answers when it is ready.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/ready",
    responses((status = 200, description = "Done.", body = ReadyAnswer))
)]
async fn ready(State(supervisor): State<Supervisor>, UrlPath(name): UrlPath<String>) -> Answer<ReadyAnswer> {
    supervisor.expect_running(&name).await?;
    Ok(Json(supervisor.reidentify(&name).await?))
}

/// Starts VMs from a snapshot: all of them or none.
#[utoipa::path(
    post,
    path = "/v1/restore",
    request_body = RestoreRequest,
    responses((status = 200, description = "Done.", body = ForkAnswer))
)]
async fn restore(
    State(supervisor): State<Supervisor>,
    client: Option<Extension<ClientProcess>>,
    request: Wanted<RestoreRequest>,
) -> Answer<ForkAnswer> {
    let Json(mut request) = request?;
    expect_paths(&request.saved)?;
    let activation = Activation::of(&mut request.vms)?;
    let client = client.map(|Extension(client)| client);
    let restore = move |supervisor: &Supervisor, cancel: &Cancel| supervisor.restore(&request, client, cancel);
    Ok(Json(supervisor.activated(activation, supervisor.making(restore)).await?))
}

/// Stops a VM for good. On request its guest first has time to power itself off. Answers when its
/// name, interfaces and sockets are free. A process that does not answer is killed.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/stop",
    request_body = Option<StopRequest>,
    responses((status = 200, description = "Done.", body = StopAnswer))
)]
async fn stop(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    Optional(request): Optional<StopRequest>,
) -> Answer<StopAnswer> {
    Ok(Json(supervisor.answer_stop(&name, request.unwrap_or_default()).await?))
}

/// The VM's name in the path of a request.
fn name_in(request: &Request) -> String {
    let path = request.uri().path();
    path.strip_prefix("/v1/vms/").and_then(|rest| rest.split('/').next()).unwrap_or_default().to_owned()
}

/// Forwards a request for one VM to its process.
async fn pass_on(State(supervisor): State<Supervisor>, request: Request) -> Response {
    let name = name_in(&request);
    let action = request.uri().path().strip_prefix("/v1/vms/").and_then(|rest| rest.strip_prefix(&*name));
    let action = action.filter(|_| request.method() == Method::GET);
    let (is_shown, has_end) = (action == Some(""), action != Some("/console"));
    let passed = async {
        let permit = supervisor.0.forwarded_requests.begin(&name)?;
        let limits = ProxyLimits::default();
        let answer = forward(supervisor.dir(), &name, request, limits).await?;
        if is_shown && answer.status() == StatusCode::OK {
            shown(supervisor.dir(), name, answer).await
        } else {
            Ok(bounded(answer, permit, has_end.then_some(limits.answer)))
        }
    };
    passed.await.unwrap_or_else(IntoResponse::into_response)
}

/// Follows the events of VMs and checkpoints (Server-Sent Events).
#[utoipa::path(
    get,
    path = "/v1/events",
    params(("Last-Event-ID" = Option<String>, Header, description = "The id of the last event that was seen.")),
    responses((status = 200, description = "Events, without end.", body = String, content_type = "text/event-stream"))
)]
async fn events(State(supervisor): State<Supervisor>, headers: HeaderMap) -> Result<Response, ApiError> {
    let last = headers.get("last-event-id").map(|id| id.to_str().unwrap_or_default());
    let body = supervisor.0.events.follow(last, supervisor.0.ending.subscribe())?;
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    Ok((headers, body).into_response())
}

/// Describes this socket (OpenAPI).
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "The document.", body = Object)))]
async fn openapi_document() -> Response {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| described().to_string().into());
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.clone()).into_response()
}

fn routes() -> OpenApiRouter<Supervisor> {
    OpenApiRouter::new()
        .routes(routes!(openapi_document))
        .routes(routes!(session::log_in, session::show_session, session::log_out))
        .routes(routes!(info, keep))
        .routes(routes!(events))
        .routes(routes!(metrics::scrape))
        .routes(routes!(vms, boot))
        .routes(routes!(names))
        .routes(routes!(fork_vm))
        .routes(routes!(checkpoints::checkpoint))
        .routes(routes!(checkpoints::roll_back))
        .routes(routes!(checkpoints::reset))
        .routes(routes!(stop))
        .routes(routes!(ready))
        .routes(routes!(network::set_network))
        .routes(routes!(saving::suspend_vm))
        .routes(routes!(saving::show_suspend_after, saving::set_suspend_after, saving::remove_suspend_after))
        .routes(routes!(ended))
        .routes(routes!(saving::snapshot, saving::snapshot_progress, saving::cancel_snapshot))
        .routes(routes!(saving::working_set))
        .routes(routes!(checkpoints::checkpoints, checkpoints::open))
        .routes(routes!(restore))
        .routes(routes!(checkpoints::show_checkpoint, checkpoints::remove_checkpoint))
        .routes(routes!(checkpoints::fork_checkpoint))
        .routes(routes!(checkpoints::keep_checkpoint))
        .routes(routes!(checkpoints::prepare))
}

/// Returns the API of a runtime directory as an OpenAPI document, as `GET /openapi.json` does.
#[must_use]
pub fn described() -> Value {
    openapi::document(&routes().into_openapi(), &clade_worker::rpc::described())
}

fn router(supervisor: Supervisor) -> Router {
    let keys = Arc::clone(&supervisor.0.keys);
    let (router, own) = routes().split_for_parts();
    let pass_on_all =
        openapi::passed_on(&own, &clade_worker::rpc::described()).into_iter().filter_map(|(method, path)| {
            let method = Method::from_bytes(method.as_bytes()).ok()?;
            Some((path, on(MethodFilter::try_from(method).ok()?, pass_on)))
        });
    let router = pass_on_all
        .fold(router, |router, (path, handler)| router.route(&path, handler))
        .fallback(fallback)
        .method_not_allowed_fallback(not_allowed)
        .layer(from_fn_with_state(keys, once))
        .layer(from_fn_with_state(supervisor.clone(), touched));
    metrics::observed(router, &supervisor.0.requests).with_state(supervisor)
}

/// Notes that there are requests that change something: a supervisor that ends when it is idle waits
/// for the next.
async fn touched(State(supervisor): State<Supervisor>, request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await;
    }
    supervisor.0.touch();
    let response = next.run(request).await;
    supervisor.0.touch();
    response
}

#[cfg(test)]
mod tests {
    use clade_api::{KnownEnd, RuntimeDir, WorkerExit, record_end};
    use clade_vmm::vm::StopReason;

    use super::*;

    #[test]
    fn the_end_of_a_new_vm_is_waited_for() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(scratch.path()).unwrap();
        let record = |name| {
            let exit = WorkerExit { pid: 1, signal: Some(9), code: None };
            record_end(&dir, name, StopReason::Requested, KnownEnd { exit, parent: None, flight: Vec::new() });
        };
        record("another");
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| ended_soon(scratch.path(), "web"));
            // It has looked once by then: its process is reaped after that.
            thread::sleep(3 * END_INTERVAL);
            record("web");
            assert_eq!(ended.join().unwrap().map(|ended| ended.name).as_deref(), Some("web"));
        });
    }
}
