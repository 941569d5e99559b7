//! Serving the control sockets.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use tokio::runtime::Handle;

use crate::control::api::{BalloonInfo, BalloonRequest, ForkAnswer, ForkRequest, IdentityInfo, ResetAnswer, VmInfo};
use crate::fleet::{Children, Fleet, FleetError, WeakFleet};
use crate::vm::{ChildOptions, Context, Vm, VmError};

/// How long a guest has to say how it stands with its memory. One whose kernel is busy, or that is paused, does not.
const ANSWER: Duration = Duration::from_secs(2);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// An error as the API gives it.
struct ApiError {
    status: StatusCode,
    text: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.text }))).into_response()
    }
}

impl From<FleetError> for ApiError {
    fn from(error: FleetError) -> Self {
        let status = match &error {
            FleetError::BadName { .. } | FleetError::Pattern { .. } | FleetError::Count { .. } => {
                StatusCode::BAD_REQUEST
            }
            FleetError::Vm(VmError::Balloon { .. }) => StatusCode::BAD_REQUEST,
            FleetError::NoSuchVm { .. } => StatusCode::NOT_FOUND,
            FleetError::Taken { .. }
            | FleetError::Vm(VmError::Stopped(_) | VmError::NoDevice { .. } | VmError::NoOrigin | VmError::HalfReset) => {
                StatusCode::CONFLICT
            }
            FleetError::Vm(VmError::Identity(error)) if error.is_choice() => StatusCode::CONFLICT,
            FleetError::Runtime { .. } | FleetError::Loop(_) | FleetError::Vm(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, text: crate::error_chain(&error) }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text: rejection.body_text() }
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

/// Runs blocking work of the fleet off the async threads: a fork waits for vCPUs and system calls.
async fn with_fleet<T: Send + 'static>(
    fleet: WeakFleet,
    work: impl FnOnce(&Fleet) -> Result<T, FleetError> + Send + 'static,
) -> Result<T, ApiError> {
    let gone = |text: &str| ApiError { status: StatusCode::INTERNAL_SERVER_ERROR, text: text.to_owned() };
    let fleet = fleet.upgrade().ok_or_else(|| gone("the process is ending"))?;
    let done = tokio::task::spawn_blocking(move || work(&fleet)).await;
    Ok(done.map_err(|_| gone("the request panicked; no VM was changed half-way"))??)
}

async fn list(State(fleet): State<WeakFleet>) -> Answer<Vec<VmInfo>> {
    Ok(Json(with_fleet(fleet, |fleet| Ok(fleet.list().iter().map(VmInfo::from).collect())).await?))
}

async fn show(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    Ok(Json(with_fleet(fleet, move |fleet| Ok(VmInfo::from(&fleet.get(&name)?))).await?))
}

#[derive(Clone, Copy)]
enum Verb {
    Pause,
    Resume,
    Stop,
}

async fn act(fleet: WeakFleet, name: String, verb: Verb) -> Answer<VmInfo> {
    let info = with_fleet(fleet, move |fleet| {
        let listed = fleet.get(&name)?;
        match verb {
            Verb::Pause => listed.vm.pause()?,
            Verb::Resume => listed.vm.resume()?,
            Verb::Stop => listed.vm.stop(),
        }
        Ok(VmInfo::from(&listed))
    });
    Ok(Json(info.await?))
}

async fn fork(
    State(fleet): State<WeakFleet>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<ForkRequest>, JsonRejection>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    let made = with_fleet(fleet, move |fleet| {
        let begun = Instant::now();
        let options = ChildOptions { paused: request.paused, before_start: None };
        let identity = request.identity();
        let wanted = Children { count: request.count, pattern: request.name.as_deref(), identity: &identity };
        let (children, report) = fleet.fork(&name, &wanted, options)?;
        let us = |d: std::time::Duration| d.as_secs_f64() * 1e6;
        Ok(ForkAnswer {
            children: children.iter().map(|vm| vm.name().to_owned()).collect(),
            identities: children.iter().filter_map(|vm| IdentityInfo::of(vm)).collect(),
            pause_us: us(report.times.pause),
            freeze_us: us(report.times.freeze),
            total_us: us(begun.elapsed()),
            remapped_pages: report.freeze.remapped,
            copied_pages: report.freeze.copied,
        })
    });
    Ok(Json(made.await?))
}

async fn reset(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<ResetAnswer> {
    let made = with_fleet(fleet, move |fleet| {
        let listed = fleet.get(&name)?;
        let report = listed.vm.reset_to_origin()?;
        let us = |d: Duration| d.as_secs_f64() * 1e6;
        Ok(ResetAnswer {
            vm: VmInfo::from(&listed),
            dropped_pages: report.memory.dropped,
            remapped_pages: report.memory.remapped,
            memory_us: us(report.drop),
            total_us: us(report.total),
        })
    });
    Ok(Json(made.await?))
}

/// Asks the guest, and takes what it said before if it does not answer in time.
fn ask_balloon(vm: &Vm) -> Result<BalloonInfo, FleetError> {
    let before = vm.balloon_stats()?.answers;
    vm.ask_balloon()?;
    let deadline = Instant::now() + ANSWER;
    loop {
        let stats = vm.balloon_stats()?;
        let answered = stats.answers != before;
        if answered || Instant::now() > deadline {
            return Ok(BalloonInfo::new(&stats, answered));
        }
        std::thread::sleep(LOOK);
    }
}

async fn balloon(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<BalloonInfo> {
    Ok(Json(with_fleet(fleet, move |fleet| ask_balloon(&fleet.get(&name)?.vm)).await?))
}

async fn set_balloon(
    State(fleet): State<WeakFleet>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<BalloonRequest>, JsonRejection>,
) -> Answer<BalloonInfo> {
    let Json(request) = request?;
    let set = with_fleet(fleet, move |fleet| {
        let vm = fleet.get(&name)?.vm;
        vm.set_balloon(request.target_mib)?;
        ask_balloon(&vm)
    });
    Ok(Json(set.await?))
}

fn router(fleet: WeakFleet) -> Router {
    let verb =
        |verb| post(move |State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>| act(fleet, name, verb));
    Router::new()
        .route("/v1/vms", get(list))
        .route("/v1/vms/{name}", get(show))
        .route("/v1/vms/{name}/fork", post(fork))
        .route("/v1/vms/{name}/reset", post(reset))
        .route("/v1/vms/{name}/balloon", get(balloon).post(set_balloon))
        .route("/v1/vms/{name}/pause", verb(Verb::Pause))
        .route("/v1/vms/{name}/resume", verb(Verb::Resume))
        .route("/v1/vms/{name}/stop", verb(Verb::Stop))
        .fallback(async || ApiError { status: StatusCode::NOT_FOUND, text: "there is no such path".into() })
        .method_not_allowed_fallback(async || ApiError {
            status: StatusCode::METHOD_NOT_ALLOWED,
            text: "the path is not for that method".into(),
        })
        .with_state(fleet)
}

/// A fleet whose control sockets are served on `runtime`.
///
/// # Errors
/// When the sockets' directory or the device loop cannot be made.
pub fn serve_fleet(context: &Context, dir: &Path, runtime: &Handle) -> Result<Fleet, FleetError> {
    let runtime = runtime.clone();
    Fleet::new(context, dir, |weak| {
        let router = router(weak);
        Box::new(move |socket, name| {
            let router = router.clone();
            let name = name.to_owned();
            runtime.spawn(async move {
                let served = async {
                    socket.set_nonblocking(true)?;
                    axum::serve(tokio::net::UnixListener::from_std(socket)?, router).await
                };
                let served: io::Result<()> = served.await;
                if let Err(error) = served {
                    tracing::error!(%error, name, "control socket");
                }
            });
        })
    })
}
