//! The handlers of the control sockets.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, State};
use axum::{Json, Router};
use clade_memory::PageRange;
use tokio::sync::oneshot;
use tokio::time::timeout;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::control::api::{
    BalloonInfo, BalloonRequest, LogsAnswer, MAX_GRACE, NetworkRequest, ResetAnswer, StopAnswer, StopRequest,
    TouchedAnswer, TouchedRun, VmInfo, WakeAnswer,
};
use crate::control::optional::Optional;
use crate::control::problem::{ApiError, ProblemKind};
use crate::control::{console, memory, page_map, pages, ram, ttl};
use crate::flight;
use crate::vm_host::{Cancel, DaemonError, VmHost, WeakVmHost, last_output};
use clade_vmm::vm::{Vm, VmError};

/// Time limit of a guest for its memory statistics. A guest that is paused, or whose kernel is
/// busy, does not send them.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval at which its answer is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Time limit of a request's wait for a thread if no more can be created.
pub(crate) const THREAD_PATIENCE: Duration = Duration::from_secs(5);

pub(crate) type Answer<T> = Result<Json<T>, ApiError>;

/// Runs blocking work of the VM host off the async threads: a fork waits for vCPUs and system
/// calls.
pub(super) async fn with_vm_host<T: Send + 'static>(
    vm_host: WeakVmHost,
    work: impl FnOnce(&VmHost) -> Result<T, DaemonError> + Send + 'static,
) -> Result<T, ApiError> {
    let vm_host = vm_host.upgrade().ok_or(ProblemKind::Ending)?;
    Ok(on_a_thread(THREAD_PATIENCE, move || work(&vm_host)).await??)
}

/// Runs blocking work on a thread if one is free within `limit`, otherwise not at all.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let no_thread = || ApiError::from(ProblemKind::NoThread);
    // The first to set it decides whether the work is done: the thread, or the timeout.
    let taken = Arc::new(AtomicBool::new(false));
    let (begin, begun) = oneshot::channel();
    let takes = Arc::clone(&taken);
    let run = move || {
        // Relaxed: the data goes through the channel and the task.
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
    let panicked = |_| ApiError::new(ProblemKind::Internal, "the request panicked; no VM was changed half-way");
    task.await.map_err(panicked)?.ok_or_else(no_thread)
}

/// Lists the VMs of the process.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, description = "Done.", body = Vec<VmInfo>)))]
async fn list(State(vm_host): State<WeakVmHost>) -> Answer<Vec<VmInfo>> {
    Ok(Json(with_vm_host(vm_host, |vm_host| Ok(vm_host.entry().iter().map(VmInfo::from).collect())).await?))
}

/// Shows a VM.
#[utoipa::path(get, path = "/v1/vms/{name}", responses((status = 200, description = "Done.", body = VmInfo)))]
async fn show(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    Ok(Json(with_vm_host(vm_host, move |vm_host| Ok(VmInfo::from(&vm_host.get(&name)?))).await?))
}

/// Pauses a VM.
#[utoipa::path(post, path = "/v1/vms/{name}/pause", responses((status = 200, description = "The VM.", body = VmInfo)))]
async fn pause(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    act(vm_host, name, Vm::pause, "paused").await
}

/// Lets a paused VM run on.
#[utoipa::path(post, path = "/v1/vms/{name}/resume", responses((status = 200, description = "The VM.", body = VmInfo)))]
async fn resume(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    act(vm_host, name, Vm::resume, "resumed").await
}

/// Wakes a VM, if it is suspended.
#[utoipa::path(post, path = "/v1/vms/{name}/wake", responses((status = 200, description = "Done.", body = WakeAnswer)))]
async fn wake(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<WakeAnswer> {
    let woken = with_vm_host(vm_host, move |vm_host| {
        let entry = vm_host.get(&name)?;
        let report = note_failure("woken", entry.vm.wake())?;
        if report.was_suspended {
            flight::note(&format!("woken in {} us", report.total.as_micros()));
        }
        Ok(WakeAnswer {
            vm: VmInfo::from(&entry),
            was_suspended: report.was_suspended,
            working_set_pages: report.working_set,
            total_us: report.total.as_secs_f64() * 1e6,
        })
    });
    Ok(Json(woken.await?))
}

async fn act(
    vm_host: WeakVmHost,
    name: String,
    act: fn(&Vm) -> Result<(), VmError>,
    done: &'static str,
) -> Answer<VmInfo> {
    let info = with_vm_host(vm_host, move |vm_host| {
        let entry = vm_host.get(&name)?;
        note_failure(done, act(&entry.vm))?;
        flight::note(done);
        Ok(VmInfo::from(&entry))
    });
    Ok(Json(info.await?))
}

/// Notes in the flight record why an action failed.
fn note_failure<T>(what: &str, outcome: Result<T, VmError>) -> Result<T, VmError> {
    outcome.inspect_err(|error| flight::note(&format!("not {what}: {}", clade_vmm::error_chain(error))))
}

/// Returns the time for a guest to end by itself, or None if the VM is to be stopped at once.
pub(crate) fn grace(request: StopRequest) -> Result<Option<Duration>, ApiError> {
    let Some(seconds) = request.graceful_s else { return Ok(None) };
    let refused = || {
        let text = format!("graceful_s={seconds}: 0 to {MAX_GRACE} seconds");
        ApiError::new(ProblemKind::BadRequest, text)
    };
    if !(0.0..=MAX_GRACE).contains(&seconds) {
        return Err(refused());
    }
    Duration::try_from_secs_f64(seconds).map(Some).map_err(|_| refused())
}

/// Stops a VM. On request its guest first has time to power itself off. Answers when all its
/// resources are free. The stop goes on even if its client goes.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/stop",
    request_body = Option<StopRequest>,
    responses((status = 200, description = "Done.", body = StopAnswer))
)]
async fn stop(
    State(vm_host): State<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    Optional(request): Optional<StopRequest>,
) -> Answer<StopAnswer> {
    let grace = grace(request.unwrap_or_default())?;
    flight::note(if grace.is_some() { "to be stopped by its power button" } else { "to be stopped" });
    let stopped = with_vm_host(vm_host, move |vm_host| match grace {
        None => vm_host.stop(&name, |entry| StopAnswer { vm: VmInfo::from(entry), shutdown: None, killed: false }),
        Some(time) => vm_host.shut_down(&name, time, |entry, shutdown| StopAnswer {
            vm: VmInfo::from(entry),
            shutdown: Some(shutdown.into()),
            killed: false,
        }),
    });
    Ok(Json(stopped.await?))
}

/// Shows the last output on a VM's console.
#[utoipa::path(get, path = "/v1/vms/{name}/logs", responses((status = 200, description = "Done.", body = LogsAnswer)))]
async fn logs(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<LogsAnswer> {
    Ok(Json(
        with_vm_host(vm_host, move |vm_host| {
            let vm = &vm_host.get(&name)?.vm;
            let exits = vm.last_exits().into_iter().map(flight::now);
            Ok(LogsAnswer { console: last_output(vm), flight: flight::noted().into_iter().chain(exits).collect() })
        })
        .await?,
    ))
}

/// Cancels a request when its handler is dropped, which is when the connection is closed.
pub(crate) struct CancelOnDrop(pub(crate) Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.client_gone();
    }
}

/// Refuses a relative path: this process may have another working directory than the client.
pub(crate) fn expect_absolute(dir: &Path) -> Result<(), ApiError> {
    if dir.is_absolute() {
        return Ok(());
    }
    Err(ApiError::new(ProblemKind::BadPath, format!("{} is not an absolute path", dir.display())))
}

/// Resets a forked VM to the instant of its fork.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/reset",
    responses((status = 200, description = "Done.", body = ResetAnswer))
)]
async fn reset(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<ResetAnswer> {
    let made = with_vm_host(vm_host, move |vm_host| {
        let entry = vm_host.get(&name)?;
        let report = note_failure("reset", entry.vm.reset_to_origin())?;
        Ok(ResetAnswer::new(&entry, &report, "reset"))
    });
    Ok(Json(made.await?))
}

/// Lists the pages that a VM has touched since it was started.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/touched",
    responses((status = 200, description = "Done.", body = TouchedAnswer))
)]
async fn touched(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<TouchedAnswer> {
    let entry = with_vm_host(vm_host, move |vm_host| {
        let runs = vm_host.get(&name)?.vm.touched_runs()?;
        let run = |run: &PageRange| TouchedRun { first: run.start(), count: run.len() };
        Ok(TouchedAnswer { runs: runs.iter().map(run).collect() })
    });
    Ok(Json(entry.await?))
}

/// Requests statistics from the guest. Returns earlier ones if it does not answer in time.
fn ask_balloon(vm: &Vm) -> Result<BalloonInfo, DaemonError> {
    // The driver in its guest answers.
    vm.wake()?;
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

/// Shows a VM's balloon and its guest's memory statistics.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/balloon",
    responses((status = 200, description = "Done.", body = BalloonInfo))
)]
async fn balloon(State(vm_host): State<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<BalloonInfo> {
    Ok(Json(with_vm_host(vm_host, move |vm_host| ask_balloon(&vm_host.get(&name)?.vm)).await?))
}

/// Sets the target of a VM's balloon.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/balloon",
    request_body = BalloonRequest,
    responses((status = 200, description = "Done.", body = BalloonInfo))
)]
async fn set_balloon(
    State(vm_host): State<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<BalloonRequest>, JsonRejection>,
) -> Answer<BalloonInfo> {
    let Json(request) = request?;
    let set = with_vm_host(vm_host, move |vm_host| {
        let vm = vm_host.get(&name)?.vm;
        vm.wake()?;
        vm.set_balloon(request.target_mib)?;
        ask_balloon(&vm)
    });
    Ok(Json(set.await?))
}

/// Opens or closes a VM's network devices for packets, or sets their egress rules.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/network",
    request_body = NetworkRequest,
    responses((status = 200, description = "Done.", body = VmInfo))
)]
async fn set_network(
    State(vm_host): State<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<NetworkRequest>, JsonRejection>,
) -> Answer<VmInfo> {
    let Json(request) = request?;
    request.check().map_err(|text| ApiError::new(ProblemKind::BadRequest, text))?;
    let set = with_vm_host(vm_host, move |vm_host| {
        let entry = vm_host.get(&name)?;
        // First: a network is opened only with its rules in place.
        if let Some(rules) = &request.egress {
            entry.vm.replace_egress(request.keep, rules)?;
        }
        if let Some(network) = request.network {
            entry.vm.set_network(network)?;
        }
        Ok(VmInfo::from(&entry))
    });
    Ok(Json(set.await?))
}

/// The answer at an unknown path.
pub(crate) async fn fallback() -> ApiError {
    ProblemKind::NoSuchPath.into()
}

/// The answer to a method that a path does not take.
pub(crate) async fn not_allowed() -> ApiError {
    ProblemKind::MethodNotAllowed.into()
}

fn routes() -> OpenApiRouter<WeakVmHost> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(reset))
        .routes(routes!(balloon, set_balloon))
        .routes(routes!(set_network))
        .routes(routes!(touched))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(wake))
        .routes(routes!(stop))
        .routes(routes!(logs))
        .routes(routes!(pages::show_pages))
        .routes(routes!(page_map::page_map))
        .routes(routes!(console::show, console::write))
        .routes(routes!(ram::read, ram::write))
        .routes(routes!(memory::show_stats))
}

/// The routes of a VM's socket, described.
pub(crate) fn described() -> OpenApi {
    routes().merge(ttl::routes()).into_openapi()
}

/// The routes without their descriptions, which take longer to make than a VM.
static ROUTER: LazyLock<Router<WeakVmHost>> = LazyLock::new(|| {
    let (router, _) = routes().split_for_parts();
    router.fallback(fallback).method_not_allowed_fallback(not_allowed)
});
/// The routes of times to live, whose timers belong to one VM host.
static TTL_ROUTER: LazyLock<Router<WeakVmHost>> = LazyLock::new(|| ttl::routes().split_for_parts().0);

/// Makes now the parts that each worker would make: for a process that is forked afterwards.
pub(crate) fn warm_up() {
    LazyLock::force(&ROUTER);
    LazyLock::force(&TTL_ROUTER);
}

pub(super) fn router(vm_host: WeakVmHost) -> Router {
    ROUTER.clone().merge(ttl::with_timers(TTL_ROUTER.clone())).with_state(vm_host)
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
            assert_eq!(refused.map_err(|error| error.kind), Err(ProblemKind::NoThread));
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
        assert_eq!(panicked.map_err(|error| error.kind), Err(ProblemKind::Internal));
    }
}
