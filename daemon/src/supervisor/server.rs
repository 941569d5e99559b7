//! The handlers of the supervisor's socket.

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
use clade_devices::virtio::net::Link;
use serde_json::Value;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::idempotency::once;
use super::proxy::{ProxyLimits, forward, shown, with_own_socket};
use super::vm_record::VmRecord;
use super::vm_record::vsock_known;
use super::{Supervisor, metrics, openapi, page, suspend};
use crate::control;
use crate::control::session;
use crate::control::{
    Acceptor, Answer, ApiError, BootRequest, CancelOnDrop, CheckpointInfo, CheckpointRequest, Client, ClientError,
    ClientProcess, ForkAnswer, ForkRequest, ListedVms, NetworkRequest, OpenRequest, Optional, PrepareRequest, Prepared,
    ProblemKind, ReadyAnswer, RestoreRequest, SavedSource, SessionGate, SnapshotAnswer, SnapshotProgress,
    SnapshotRequest, StopAnswer, StopRequest, SupervisorInfo, SupervisorKept, SuspendAfterInfo, SuspendAfterRequest,
    SuspendAnswer, SuspendRequest, THREAD_PATIENCE, TcpAcceptor, Token, TouchedAnswer, VmInfo, WorkingSetAnswer,
    behind_gate, expect_absolute, fallback, grace, not_allowed, on_a_thread, serve_http, with_bodies,
};
use crate::vm_host::{Cancel, DaemonError, EndedVm, ended_vms};

/// Time limit of a VM's process for requests that it answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Time limit of a VM's process for a change of its network, which waits for a fork.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for the record of the end of a VM that does not answer.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of directories allowed for the parents of a snapshot.
const MAX_PARENT_DIRS: usize = 16;
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
        let failed = |source| TcpError::Bind { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
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
        let router = page::routes().merge(api).layer(from_fn(page::harden));
        self.0.serve(serve_http(acceptor, router, self.0.ending.subscribe()));
        Ok(bound)
    }
}

type Wanted<T> = Result<Json<T>, JsonRejection>;

/// Runs blocking work off the async threads, until its client has gone.
async fn work<T: Send + 'static>(
    supervisor: Supervisor,
    work: impl FnOnce(&Supervisor, &Cancel) -> Result<T, DaemonError> + Send + 'static,
) -> Answer<T> {
    let cancel = Cancel::default();
    let _cancel_on_drop = CancelOnDrop(cancel.clone());
    Ok(Json(on_a_thread(THREAD_PATIENCE, move || work(&supervisor, &cancel)).await??))
}

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
    // Each request that is no GET does so.
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

/// Lists the VMs that ended by themselves, with the reasons.
#[utoipa::path(get, path = "/v1/ended", responses((status = 200, description = "Done.", body = Vec<EndedVm>)))]
async fn ended(State(supervisor): State<Supervisor>) -> Answer<Vec<EndedVm>> {
    let dir = supervisor.dir().to_owned();
    Ok(Json(on_a_thread(THREAD_PATIENCE, move || ended_vms(&dir)).await??))
}

/// Boots a VM. Answers when it runs; if it has ended by then, with its end.
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
    let Json(name) =
        work(supervisor.clone(), move |supervisor, cancel| Ok(supervisor.boot(request, client, cancel)?.name)).await?;
    let client = Client::new(&dir);
    match client.request_within(ANSWER_TIMEOUT, hyper::Method::GET, &name, "", None::<&()>).await {
        Ok(info) => Ok(Json(with_own_socket(&dir, name, info).await?)),
        Err(error) => {
            let ended = on_a_thread(THREAD_PATIENCE, move || ended_soon(&dir, &name)).await?;
            ended.map(|ended| Json(VmInfo::of_ended(ended, &config))).ok_or_else(|| error.into())
        }
    }
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
    let permit = supervisor.permit(&name).await?;
    let ready = may_be_ready(&request)?;
    let fork = move |supervisor: &Supervisor, cancel: &Cancel| supervisor.fork_vm(&name, &request, permit, cancel);
    activate(&supervisor, ready, work(supervisor.clone(), fork).await?).await
}

/// Returns whether to make the VMs of a request ready. Those that start paused cannot be.
fn may_be_ready(request: &ForkRequest) -> Result<bool, ApiError> {
    if request.ready && request.paused {
        return Err(ApiError::new(ProblemKind::BadRequest, "a VM that starts paused is not ready: nothing in it runs"));
    }
    Ok(request.ready)
}

/// Activates new VMs: if `ready`, once they are.
async fn activate(supervisor: &Supervisor, ready: bool, Json(answer): Json<ForkAnswer>) -> Answer<ForkAnswer> {
    if ready {
        supervisor.reidentify_all(&answer.children).await?;
    }
    Ok(Json(answer))
}

/// Has the agent in a VM's guest renew its identity: its clock, its random numbers, its tokens, its
/// hooks. Answers when it is ready.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/ready",
    responses((status = 200, description = "Done.", body = ReadyAnswer))
)]
async fn ready(State(supervisor): State<Supervisor>, UrlPath(name): UrlPath<String>) -> Answer<ReadyAnswer> {
    Ok(Json(supervisor.reidentify(&name).await?))
}

/// Opens or closes a VM's network devices for packets, or sets their egress rules. The host closes
/// a network outside of the VM's process too: it takes the VM's TAP interfaces down, and stops its
/// passt.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/network",
    request_body = NetworkRequest,
    responses((status = 200, description = "Done.", body = VmInfo))
)]
async fn set_network(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<NetworkRequest>,
) -> Answer<VmInfo> {
    let Json(request) = request?;
    request.check().map_err(|text| ApiError::new(ProblemKind::BadRequest, text))?;
    // To its end, also without its client: an open device behind a closed interface would stay.
    let changed = tokio::spawn(change_network(supervisor, name, request)).await;
    let stopped = |error| ApiError::new(ProblemKind::Internal, format!("the request has ended early: {error}"));
    Ok(Json(changed.map_err(stopped)??))
}

async fn change_network(supervisor: Supervisor, name: String, request: NetworkRequest) -> Result<VmInfo, ApiError> {
    let _turn = supervisor.0.network_changes.begin(&name).await;
    let set = |link| {
        let (supervisor, name) = (supervisor.clone(), name.clone());
        on_a_thread(THREAD_PATIENCE, move || supervisor.set_link(&name, link))
    };
    let (dir, post) = (supervisor.dir().to_owned(), Method::POST);
    if request.network == Some(Link::Closed) {
        // A VM without a network device refuses the request, with the reason.
        set(Link::Closed).await??;
    }
    let client = Client::new(&dir);
    let info = client.request_within(NETWORK_TIMEOUT, post, &name, "/network", Some(&request)).await?;
    if request.network == Some(Link::Open) {
        // Last: the rules of the request hold by now.
        set(Link::Open).await??;
    }
    with_own_socket(&dir, name, info).await
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
    let Json(request) = request?;
    expect_paths(&request.saved)?;
    let ready = may_be_ready(&request.vms)?;
    let client = client.map(|Extension(client)| client);
    let restore = move |supervisor: &Supervisor, cancel: &Cancel| supervisor.restore(&request, client, cancel);
    activate(&supervisor, ready, work(supervisor.clone(), restore).await?).await
}

fn expect_paths(saved: &SavedSource) -> Result<(), ApiError> {
    if saved.parents.len() > MAX_PARENT_DIRS {
        let what = format!("{} directories of parents: at most {MAX_PARENT_DIRS}", saved.parents.len());
        return Err(ApiError::new(ProblemKind::BadRequest, what));
    }
    std::iter::once(&saved.dir).chain(&saved.overlays).chain(&saved.parents).try_for_each(|path| expect_absolute(path))
}

/// Holds the image of a snapshot as a checkpoint.
#[utoipa::path(
    post,
    path = "/v1/checkpoints",
    request_body = OpenRequest,
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
async fn open(State(supervisor): State<Supervisor>, request: Wanted<OpenRequest>) -> Answer<CheckpointInfo> {
    let Json(request) = request?;
    expect_paths(&request.saved)?;
    work(supervisor, move |supervisor, cancel| supervisor.open_checkpoint(&request, cancel)).await
}

/// Takes a checkpoint of a VM.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/checkpoint",
    request_body = CheckpointRequest,
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
async fn checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(vm): UrlPath<String>,
    request: Wanted<CheckpointRequest>,
) -> Answer<CheckpointInfo> {
    let Json(request) = request?;
    let permit = supervisor.permit(&vm).await?;
    work(supervisor, move |supervisor, cancel| supervisor.checkpoint(&vm, &request, permit, cancel)).await
}

/// Lists the checkpoints.
#[utoipa::path(
    get,
    path = "/v1/checkpoints",
    responses((status = 200, description = "Done.", body = Vec<CheckpointInfo>))
)]
async fn checkpoints(State(supervisor): State<Supervisor>) -> Json<Vec<CheckpointInfo>> {
    Json(supervisor.checkpoints().list())
}

/// Shows a checkpoint.
#[utoipa::path(
    get,
    path = "/v1/checkpoints/{name}",
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
async fn show_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    Ok(Json(supervisor.checkpoints().info(&name)?))
}

/// Writes a checkpoint to the disk, where later supervisors find it. Answers when it is there.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/{name}/keep",
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
async fn keep_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    work(supervisor, move |supervisor, cancel| supervisor.keep_checkpoint(&name, cancel)).await
}

/// Removes a checkpoint. Its children run on.
#[utoipa::path(
    delete,
    path = "/v1/checkpoints/{name}",
    responses((status = 200, description = "Done.", body = CheckpointInfo))
)]
async fn remove_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
) -> Answer<CheckpointInfo> {
    // Closing descriptors may free memory and disks.
    work(supervisor, move |supervisor, _| supervisor.remove_checkpoint(&name)).await
}

/// Forks a checkpoint.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/{name}/fork",
    request_body = ForkRequest,
    responses((status = 200, description = "Done.", body = ForkAnswer))
)]
async fn fork_checkpoint(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<ForkRequest>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    let ready = may_be_ready(&request)?;
    let fork = move |supervisor: &Supervisor, cancel: &Cancel| supervisor.fork_checkpoint(&name, &request, cancel);
    activate(&supervisor, ready, work(supervisor.clone(), fork).await?).await
}

/// Prepares processes for children of a checkpoint.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/{name}/prepare",
    request_body = PrepareRequest,
    responses((status = 200, description = "Done.", body = Prepared))
)]
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
    Ok(Json(stop_vm(&supervisor, &name, request.unwrap_or_default()).await?))
}

/// Stops the VM called `name`.
pub(super) async fn stop_vm(supervisor: &Supervisor, name: &str, request: StopRequest) -> Result<StopAnswer, ApiError> {
    // Before the request to its process, which has as much time.
    grace(request)?;
    // Not from the process itself.
    let pid = supervisor.pid_of(name);
    let (held, owned) = (supervisor.clone(), name.to_owned());
    if request.at_once && request.graceful_s.is_none() {
        // The signal comes first: threads that wait for the ends of others may all be taken.
        if let Some(killed) = supervisor.kill_at_once(name)? {
            return Ok(on_a_thread(THREAD_PATIENCE, move || held.reap(&owned, killed)).await??);
        }
    }
    match Client::new(supervisor.dir()).stop_process(name, request).await {
        Ok((answer, left)) => {
            // Closing descriptors may free memory and disks.
            on_a_thread(THREAD_PATIENCE, move || held.stopped(pid, left)).await?;
            Ok(answer)
        }
        Err(ClientError::Silent { .. }) => Ok(on_a_thread(THREAD_PATIENCE, move || held.kill(&owned)).await??),
        Err(error) => Err(error.into()),
    }
}

/// Suspends a VM: writes its memory to a file, and stops it until its guest is needed. Answers when
/// its memory is given back.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/suspend",
    request_body = Option<SuspendRequest>,
    responses((status = 200, description = "Done.", body = SuspendAnswer))
)]
async fn suspend_vm(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    Optional(request): Optional<SuspendRequest>,
) -> Answer<SuspendAnswer> {
    let dir = request.unwrap_or_default().dir.unwrap_or_else(|| Path::new(suspend::DIR).to_owned());
    expect_absolute(&dir)?;
    work(supervisor, move |supervisor, cancel| supervisor.suspend(&name, &dir, cancel)).await
}

/// Shows the idle time after which a VM is suspended.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/suspend-after",
    responses((status = 200, description = "Done.", body = SuspendAfterInfo))
)]
async fn show_suspend_after(
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
async fn set_suspend_after(
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
async fn remove_suspend_after(
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
async fn snapshot(
    State(supervisor): State<Supervisor>,
    UrlPath(name): UrlPath<String>,
    request: Wanted<SnapshotRequest>,
) -> Answer<SnapshotAnswer> {
    let Json(request) = request?;
    expect_absolute(&request.dir)?;
    let permit = supervisor.permit(&name).await?;
    work(supervisor, move |supervisor, cancel| supervisor.snapshot(&name, &request, permit, cancel)).await
}

/// Shows the progress of a VM's snapshot.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/snapshot",
    responses((status = 200, description = "Done.", body = SnapshotProgress))
)]
async fn snapshot_progress(
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
async fn cancel_snapshot(
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
async fn working_set(State(supervisor): State<Supervisor>, UrlPath(name): UrlPath<String>) -> Answer<WorkingSetAnswer> {
    let client = Client::new(supervisor.dir());
    let touched = client.request_within(ANSWER_TIMEOUT, hyper::Method::GET, &name, "/touched", None::<&()>);
    let touched: TouchedAnswer = touched.await?;
    let record = move |supervisor: &Supervisor, _: &Cancel| {
        Ok(WorkingSetAnswer { pages: supervisor.record_working_set(&name, &touched)? })
    };
    work(supervisor, record).await
}

/// The VM's name in the path of a request.
fn name_in(request: &Request) -> String {
    let path = request.uri().path();
    path.strip_prefix("/v1/vms/").and_then(|rest| rest.split('/').next()).unwrap_or_default().to_owned()
}

/// Forwards a request for one VM to its process.
async fn pass_on(State(supervisor): State<Supervisor>, request: Request) -> Response {
    let name = name_in(&request);
    let is_shown = request.method() == Method::GET && request.uri().path().strip_prefix("/v1/vms/") == Some(&name);
    let passed = async {
        let _turn = supervisor.0.forwarded_requests.begin(&name)?;
        let answer = forward(supervisor.dir(), &name, request, ProxyLimits::default()).await?;
        if is_shown && answer.status() == StatusCode::OK {
            shown(supervisor.dir(), name, answer).await
        } else {
            Ok(answer)
        }
    };
    passed.await.unwrap_or_else(IntoResponse::into_response)
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        Self { kind: error.problem(), text: clade_vmm::error_chain(&error) }
    }
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
        .routes(routes!(fork_vm))
        .routes(routes!(checkpoint))
        .routes(routes!(stop))
        .routes(routes!(ready))
        .routes(routes!(set_network))
        .routes(routes!(suspend_vm))
        .routes(routes!(show_suspend_after, set_suspend_after, remove_suspend_after))
        .routes(routes!(ended))
        .routes(routes!(snapshot, snapshot_progress, cancel_snapshot))
        .routes(routes!(working_set))
        .routes(routes!(checkpoints, open))
        .routes(routes!(restore))
        .routes(routes!(show_checkpoint, remove_checkpoint))
        .routes(routes!(fork_checkpoint))
        .routes(routes!(keep_checkpoint))
        .routes(routes!(prepare))
}

/// Returns the API of a runtime directory as an OpenAPI document, as `GET /openapi.json` does.
#[must_use]
pub fn described() -> Value {
    openapi::document(&routes().into_openapi(), &control::described())
}

fn router(supervisor: Supervisor) -> Router {
    let keys = Arc::clone(&supervisor.0.keys);
    let (router, own) = routes().split_for_parts();
    let pass_on_all = openapi::passed_on(&own, &control::described()).into_iter().filter_map(|(method, path)| {
        let method = Method::from_bytes(method.as_bytes()).ok()?;
        Some((path, on(MethodFilter::try_from(method).ok()?, pass_on)))
    });
    let router = pass_on_all
        .fold(router, |router, (path, handler)| router.route(&path, handler))
        .fallback(fallback)
        .method_not_allowed_fallback(not_allowed)
        .layer(from_fn_with_state(keys, once))
        .layer(from_fn_with_state(supervisor.clone(), touched));
    metrics::observed(router).with_state(supervisor)
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
