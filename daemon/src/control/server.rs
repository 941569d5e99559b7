//! The handlers of the control sockets.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clade_snapshot::Compression;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::control::api::{
    BalloonInfo, BalloonRequest, ForkAnswer, ForkRequest, LogsAnswer, ResetAnswer, SnapshotAnswer, SnapshotProgress,
    SnapshotRequest, VmInfo, WorkingSetAnswer,
};
use crate::control::{memory, pages, ttl};
use crate::fleet::{Cancel, Children, Fleet, FleetError, WeakFleet, last_output};
use crate::worker::{self, Made};
use clade_vmm::vm::{ChildOptions, SnapshotError, SnapshotOptions, Vm, VmError};

/// How long a guest may take to send its memory statistics. A guest that is paused, or whose kernel
/// is busy, does not send them.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval at which its answer is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How long a request waits for a thread if no more can be created.
pub(crate) const THREAD_PATIENCE: Duration = Duration::from_secs(5);

/// An error of the API.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.text }))).into_response()
    }
}

impl From<FleetError> for ApiError {
    fn from(error: FleetError) -> Self {
        Self { status: status(&error), text: clade_vmm::error_chain(&error) }
    }
}

/// The HTTP status of an error, for another process.
pub(crate) fn status_of(error: &FleetError) -> u16 {
    status(error).as_u16()
}

fn status(error: &FleetError) -> StatusCode {
    match error {
        FleetError::BadName { .. }
        | FleetError::Pattern { .. }
        | FleetError::Count { .. }
        | FleetError::LongPath { .. } => StatusCode::BAD_REQUEST,
        FleetError::Vm(VmError::Balloon { .. } | VmError::Boot(_) | VmError::Config(_) | VmError::Layout(_)) => {
            StatusCode::BAD_REQUEST
        }
        FleetError::NoSuchVm { .. } | FleetError::NoSuchCheckpoint { .. } => StatusCode::NOT_FOUND,
        FleetError::Taken { .. }
        | FleetError::CheckpointTaken { .. }
        | FleetError::Supervised { .. }
        | FleetError::Ending
        | FleetError::Cancelled { .. }
        | FleetError::Vm(VmError::Stopped(_) | VmError::NoDevice { .. } | VmError::NoOrigin | VmError::Inconsistent) => {
            StatusCode::CONFLICT
        }
        FleetError::Vm(VmError::Identity(error)) if error.is_choice() => StatusCode::CONFLICT,
        FleetError::Snapshot(error) => snapshot_status(error.as_ref()),
        FleetError::Room { .. } => StatusCode::INSUFFICIENT_STORAGE,
        FleetError::Refused { status, .. } => {
            StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
        }
        FleetError::Runtime { .. }
        | FleetError::Unreleased { .. }
        | FleetError::LinkedDir { .. }
        | FleetError::ForeignDir { .. }
        | FleetError::OpenDir { .. }
        | FleetError::Transfer(_)
        | FleetError::Worker { .. }
        | FleetError::Vm(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The status of a failed snapshot: whether the client or the host is at fault.
fn snapshot_status(error: &SnapshotError) -> StatusCode {
    use clade_snapshot::Error;
    match error {
        SnapshotError::Files(Error::Path { .. }) => StatusCode::BAD_REQUEST,
        // No snapshot can be made in such a place.
        SnapshotError::Files(Error::File { source, .. })
            if matches!(
                source.kind(),
                ErrorKind::NotFound
                    | ErrorKind::NotADirectory
                    | ErrorKind::PermissionDenied
                    | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            StatusCode::BAD_REQUEST
        }
        SnapshotError::Files(
            Error::NotASnapshot { .. }
            | Error::Parent { .. }
            | Error::WrongId { .. }
            | Error::Cycle { .. }
            | Error::TooDeep { .. }
            | Error::Shape { .. }
            | Error::Needed { .. }
            | Error::Locked { .. }
            | Error::OwnChain { .. }
            | Error::Cancelled,
        )
        | SnapshotError::NoBase { .. }
        | SnapshotError::Busy { .. }
        | SnapshotError::Vm(VmError::Stopped(_) | VmError::Inconsistent) => StatusCode::CONFLICT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text: rejection.body_text() }
    }
}

pub(crate) type Answer<T> = Result<Json<T>, ApiError>;

/// Runs blocking work of the fleet off the async threads: a fork waits for vCPUs and system calls.
pub(super) async fn with_fleet<T: Send + 'static>(
    fleet: WeakFleet,
    work: impl FnOnce(&Fleet) -> Result<T, FleetError> + Send + 'static,
) -> Result<T, ApiError> {
    let gone = || failed(StatusCode::INTERNAL_SERVER_ERROR, "the process is ending");
    let fleet = fleet.upgrade().ok_or_else(gone)?;
    Ok(on_a_thread(THREAD_PATIENCE, move || work(&fleet)).await??)
}

fn failed(status: StatusCode, text: &str) -> ApiError {
    ApiError { status, text: text.to_owned() }
}

/// Runs blocking work on a thread if one is free within `limit`, otherwise not at all.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let no_thread = || failed(StatusCode::SERVICE_UNAVAILABLE, "there is no thread for the request");
    // The first to set it decides whether the work is done: the thread, or the timeout.
    let taken = Arc::new(AtomicBool::new(false));
    let (begin, begun) = oneshot::channel();
    let takes = Arc::clone(&taken);
    let run = move || {
        // Relaxed: what follows goes through the channel and the task.
        if takes.swap(true, Ordering::Relaxed) {
            return None;
        }
        // The client may have gone.
        let _ = begin.send(());
        Some(work())
    };
    // spawn_blocking panics if there is no thread and none can be created. That fails this request,
    // not the connection.
    let task = catch_unwind(AssertUnwindSafe(|| tokio::task::spawn_blocking(run))).map_err(|_| no_thread())?;
    if timeout(limit, begun).await.is_err() && !taken.swap(true, Ordering::Relaxed) {
        return Err(no_thread());
    }
    let panicked = |_| failed(StatusCode::INTERNAL_SERVER_ERROR, "the request panicked; no VM was changed half-way");
    task.await.map_err(panicked)?.ok_or_else(no_thread)
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
}

async fn act(fleet: WeakFleet, name: String, verb: Verb) -> Answer<VmInfo> {
    let info = with_fleet(fleet, move |fleet| {
        let listed = fleet.get(&name)?;
        match verb {
            Verb::Pause => listed.vm.pause()?,
            Verb::Resume => listed.vm.resume()?,
        }
        Ok(VmInfo::from(&listed))
    });
    Ok(Json(info.await?))
}

async fn stop(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    Ok(Json(with_fleet(fleet, move |fleet| fleet.stop(&name, |listed| VmInfo::from(listed))).await?))
}

async fn logs(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<LogsAnswer> {
    Ok(Json(with_fleet(fleet, move |fleet| Ok(LogsAnswer { console: last_output(&fleet.get(&name)?.vm) })).await?))
}

/// Cancels a request when its handler is dropped, which is when the connection is closed.
pub(crate) struct CancelOnDrop(pub(crate) Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.client_gone();
    }
}

async fn fork(
    State(fleet): State<WeakFleet>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<ForkRequest>, JsonRejection>,
) -> Answer<ForkAnswer> {
    let Json(request) = request?;
    let cancel = Cancel::default();
    let _cancel_on_drop = CancelOnDrop(cancel.clone());
    let made = with_fleet(fleet, move |fleet| {
        let begun = Instant::now();
        let options = ChildOptions { paused: request.paused, before_start: None };
        let identity = request.identity();
        let wanted = Children { count: request.count, pattern: request.name.as_deref(), identity: &identity };
        let labels = request.labels.clone().unwrap_or_else(|| fleet.labels(&name));
        let (made, report) = if request.own_process {
            worker::fork(fleet, &name, &wanted, request.paused, &labels, &cancel)?
        } else {
            let (children, report) = fleet.fork(&name, &wanted, options, &cancel)?;
            children.iter().for_each(|vm| fleet.label(vm, labels.clone()));
            (children.iter().map(|vm| Made::of(vm)).collect(), report)
        };
        let times = (report.times.pause, report.times.freeze, begun.elapsed());
        Ok(ForkAnswer::new(made, times, (report.freeze.remapped, report.freeze.copied)))
    });
    Ok(Json(made.await?))
}

async fn snapshot(
    State(fleet): State<WeakFleet>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<SnapshotRequest>, JsonRejection>,
) -> Answer<SnapshotAnswer> {
    let Json(SnapshotRequest { dir, incremental, zstd, replace }) = request?;
    if !dir.is_absolute() {
        let text = format!("{} is not an absolute path", dir.display());
        return Err(ApiError { status: StatusCode::BAD_REQUEST, text });
    }
    let made = with_fleet(fleet, move |fleet| {
        let compression = if zstd { Compression::Zstd } else { Compression::None };
        let report = fleet.get(&name)?.vm.snapshot(&dir, SnapshotOptions { incremental, compression, replace })?;
        let us = |d: Duration| d.as_secs_f64() * 1e6;
        Ok(SnapshotAnswer {
            dir: report.place.dir,
            id: report.place.id.to_string(),
            pause_us: us(report.times.pause),
            total_us: us(report.took),
            data_pages: report.saved.data_pages,
            zero_pages: report.saved.zero_pages,
            data_bytes: report.saved.data_bytes,
            base_untold: report.saved.base_untold,
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

fn progress(vm: &Vm) -> SnapshotProgress {
    let progress = vm.snapshot_progress();
    let (done, total) = progress.unwrap_or_default();
    SnapshotProgress { running: progress.is_some(), done, total }
}

async fn snapshot_progress(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<SnapshotProgress> {
    Ok(Json(with_fleet(fleet, move |fleet| Ok(progress(&fleet.get(&name)?.vm))).await?))
}

async fn cancel_snapshot(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<SnapshotProgress> {
    let cancelled = with_fleet(fleet, move |fleet| {
        let vm = fleet.get(&name)?.vm;
        vm.cancel_snapshot();
        Ok(progress(&vm))
    });
    Ok(Json(cancelled.await?))
}

async fn working_set(State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>) -> Answer<WorkingSetAnswer> {
    let recorded =
        with_fleet(fleet, move |fleet| Ok(WorkingSetAnswer { pages: fleet.get(&name)?.vm.record_working_set()? }));
    Ok(Json(recorded.await?))
}

/// Requests statistics from the guest. Returns earlier ones if it does not answer in time.
fn ask_balloon(vm: &Vm) -> Result<BalloonInfo, FleetError> {
    let before = vm.balloon_stats()?.answers;
    vm.ask_balloon()?;
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    loop {
        let stats = vm.balloon_stats()?;
        let answered = stats.answers != before;
        if answered || Instant::now() > deadline {
            return Ok(BalloonInfo::new(&stats, answered));
        }
        std::thread::sleep(POLL_INTERVAL);
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

/// The answer at a path that there is none at.
pub(crate) async fn fallback() -> ApiError {
    failed(StatusCode::NOT_FOUND, "there is no such path")
}

/// The answer to a method that a path does not take.
pub(crate) async fn not_allowed() -> ApiError {
    failed(StatusCode::METHOD_NOT_ALLOWED, "the path is not for that method")
}

pub(super) fn router(fleet: WeakFleet) -> Router {
    let verb =
        |verb| post(move |State(fleet): State<WeakFleet>, UrlPath(name): UrlPath<String>| act(fleet, name, verb));
    Router::new()
        .route("/v1/vms", get(list))
        .route("/v1/vms/{name}", get(show))
        .route("/v1/vms/{name}/pages", get(pages::show))
        .route("/v1/vms/{name}/stats", get(memory::show))
        .route("/v1/vms/{name}/fork", post(fork))
        .route("/v1/vms/{name}/reset", post(reset))
        .route("/v1/vms/{name}/balloon", get(balloon).post(set_balloon))
        .route("/v1/vms/{name}/snapshot", get(snapshot_progress).post(snapshot).delete(cancel_snapshot))
        .route("/v1/vms/{name}/working-set", post(working_set))
        .route("/v1/vms/{name}/pause", verb(Verb::Pause))
        .route("/v1/vms/{name}/resume", verb(Verb::Resume))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/logs", get(logs))
        .merge(ttl::routes())
        .fallback(fallback)
        .method_not_allowed_fallback(not_allowed)
        .with_state(fleet)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_request_without_a_thread_is_refused_and_not_done_later() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let (end, ended) = mpsc::channel::<()>();
        runtime.block_on(async {
            let long = tokio::task::spawn_blocking(move || ended.recv().is_err());
            let done = Arc::new(AtomicBool::new(false));
            let does = Arc::clone(&done);
            let refused = on_a_thread(Duration::from_millis(10), move || does.store(true, Ordering::Relaxed)).await;
            assert_eq!(refused.map_err(|error| error.status), Err(StatusCode::SERVICE_UNAVAILABLE));
            drop(end);
            assert!(long.await.unwrap());
            // The one thread takes queued work in order.
            assert_eq!(on_a_thread(THREAD_PATIENCE, || 7).await.map_err(|error| error.text), Ok(7));
            assert!(!done.load(Ordering::Relaxed), "who asked was told that it is not done");
        });
    }

    #[test]
    fn a_request_that_panics_is_one_answer() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let panicked = runtime.block_on(on_a_thread(THREAD_PATIENCE, || -> u8 { panic!("on purpose") }));
        assert_eq!(panicked.map_err(|error| error.status), Err(StatusCode::INTERNAL_SERVER_ERROR));
    }
}
