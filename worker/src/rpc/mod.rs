//! The HTTP API of a VM's process, on the VM's control socket. Paths name the VM, so that the
//! supervisor's socket takes the same requests for all of them and passes them on.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/vms` | | all VMs of the process: `[VmInfo]` |
//! | `GET /v1/vms/{name}` | | `VmInfo` |
//! | `GET /v1/vms/{name}/stats` | | `VmStats` |
//! | `GET /v1/vms/{name}/pages` | | `PagesAnswer`: the kind of each page |
//! | `GET /v1/vms/{name}/page-map` | | the same in few bytes: see `page_map` |
//! | `GET /v1/vms/{name}/console` | | its console's output, without end |
//! | `POST /v1/vms/{name}/console` | bytes | `ConsoleTyped` |
//! | `GET /v1/vms/{name}/memory` | | bytes of the guest's memory |
//! | `PUT /v1/vms/{name}/memory` | bytes | `MemoryWritten` |
//! | `GET /v1/vms/{name}/ttl`, `DELETE` | | `TtlInfo`: when it will be stopped |
//! | `PUT /v1/vms/{name}/ttl` | `TtlRequest` | `TtlInfo` |
//! | `POST /v1/vms/{name}/reset` | | `ResetAnswer` |
//! | `GET /v1/vms/{name}/balloon` | | `BalloonInfo` |
//! | `POST /v1/vms/{name}/balloon` | `BalloonRequest` | `BalloonInfo` |
//! | `POST /v1/vms/{name}/network` | `NetworkRequest` | `VmInfo` |
//! | `GET /v1/vms/{name}/touched` | | `TouchedAnswer`: the pages touched since the start |
//! | `GET /v1/vms/{name}/logs` | | `LogsAnswer` |
//! | `POST /v1/vms/{name}/pause`, `resume` | | `VmInfo` |
//! | `POST /v1/vms/{name}/wake` | | `WakeAnswer` |
//! | `POST /v1/vms/{name}/stop` | `StopRequest` or none | `StopAnswer`, when its name, interfaces and sockets are free |
//!
//! Errors are problem details: see [`clade_api::Problem`].

mod console;
mod listen;
mod page_map;
mod pages;
mod query;
mod ram;
mod stats;
mod ttl;

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::extract::Path as UrlPath;
use axum::extract::rejection::JsonRejection;
use axum::{Extension, Json, Router};
use clade_memory::PageRange;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::describe::reset_answer;
use crate::vm_host::{VmHost, WeakVmHost, last_output};
use clade_api::http::{
    Answer, ApiError, Optional, THREAD_PATIENCE, fallback, grace, not_allowed, on_a_thread, with_bodies,
};
use clade_api::{
    BalloonInfo, BalloonRequest, DaemonError, LogsAnswer, NetworkRequest, ProblemKind, ResetAnswer, StopAnswer,
    StopRequest, TouchedAnswer, TouchedRun, VmInfo, WakeAnswer, flight,
};
use clade_vmm::vm::{Vm, VmError};

/// Time limit of a guest for its memory statistics. A guest that is paused, or whose kernel is
/// busy, does not send them.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval at which its answer is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Runs blocking work of the VM host off the async threads: a fork waits for vCPUs and system
/// calls.
async fn with_vm_host<T: Send + 'static>(
    vm_host: WeakVmHost,
    work: impl FnOnce(&VmHost) -> Result<T, DaemonError> + Send + 'static,
) -> Result<T, ApiError> {
    let vm_host = vm_host.upgrade().ok_or(ProblemKind::Ending)?;
    Ok(on_a_thread(THREAD_PATIENCE, move || work(&vm_host)).await??)
}

/// Lists the VMs of the process.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, description = "Done.", body = Vec<VmInfo>)))]
async fn list(Extension(vm_host): Extension<WeakVmHost>) -> Answer<Vec<VmInfo>> {
    Ok(Json(with_vm_host(vm_host, |vm_host| Ok(vm_host.entry().iter().map(VmInfo::from).collect())).await?))
}

/// Shows a VM.
#[utoipa::path(get, path = "/v1/vms/{name}", responses((status = 200, description = "Done.", body = VmInfo)))]
async fn show(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    Ok(Json(with_vm_host(vm_host, move |vm_host| Ok(VmInfo::from(&vm_host.get(&name)?))).await?))
}

/// Pauses a VM.
#[utoipa::path(post, path = "/v1/vms/{name}/pause", responses((status = 200, description = "The VM.", body = VmInfo)))]
async fn pause(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    act(vm_host, name, Vm::pause, "paused").await
}

/// Lets a paused VM run on.
#[utoipa::path(post, path = "/v1/vms/{name}/resume", responses((status = 200, description = "The VM.", body = VmInfo)))]
async fn resume(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<VmInfo> {
    act(vm_host, name, Vm::resume, "resumed").await
}

/// Wakes a VM, if it is suspended.
#[utoipa::path(post, path = "/v1/vms/{name}/wake", responses((status = 200, description = "Done.", body = WakeAnswer)))]
async fn wake(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<WakeAnswer> {
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

/// Stops a VM. On request its guest first has time to power itself off. Answers when all its
/// resources are free. The stop goes on even if its client goes.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/stop",
    request_body = Option<StopRequest>,
    responses((status = 200, description = "Done.", body = StopAnswer))
)]
async fn stop(
    Extension(vm_host): Extension<WeakVmHost>,
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
async fn logs(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<LogsAnswer> {
    Ok(Json(
        with_vm_host(vm_host, move |vm_host| {
            let vm = &vm_host.get(&name)?.vm;
            let exits = vm.last_exits().into_iter().map(flight::now);
            Ok(LogsAnswer { console: last_output(vm), flight: flight::noted().into_iter().chain(exits).collect() })
        })
        .await?,
    ))
}

/// Resets a forked VM to the instant of its fork.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/reset",
    responses((status = 200, description = "Done.", body = ResetAnswer))
)]
async fn reset(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<ResetAnswer> {
    let made = with_vm_host(vm_host, move |vm_host| {
        let entry = vm_host.get(&name)?;
        let report = note_failure("reset", entry.vm.reset_to_origin())?;
        Ok(reset_answer(&entry, &report, "reset"))
    });
    Ok(Json(made.await?))
}

/// Lists the pages that a VM has touched since it was started.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/touched",
    responses((status = 200, description = "Done.", body = TouchedAnswer))
)]
async fn touched(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<TouchedAnswer> {
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
async fn balloon(Extension(vm_host): Extension<WeakVmHost>, UrlPath(name): UrlPath<String>) -> Answer<BalloonInfo> {
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
    Extension(vm_host): Extension<WeakVmHost>,
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
    Extension(vm_host): Extension<WeakVmHost>,
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

fn routes() -> OpenApiRouter {
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
        .routes(routes!(stats::show_stats))
}

pub(crate) use listen::serve_vm;
use ttl::Timers;

/// The routes of a VM's socket, described.
pub fn described() -> OpenApi {
    routes().merge(ttl::routes()).into_openapi()
}

/// The routes without their descriptions, which take longer to make than a VM. No route has a state: whoever adds
/// one to a copy of a router copies all of its routes.
static ROUTER: LazyLock<Router> = LazyLock::new(|| {
    let (router, _) = routes().merge(ttl::routes()).split_for_parts();
    with_bodies(router.fallback(fallback).method_not_allowed_fallback(not_allowed))
});

/// Makes now what each worker would make: for a process that is forked afterwards.
pub(crate) fn warm_up() {
    LazyLock::force(&ROUTER);
}

/// Returns the routes for one VM host: the handlers find it, and its timers, among a request's extensions.
fn router(vm_host: WeakVmHost) -> Router {
    let timers = Extension(Arc::<Timers>::default());
    Router::new().fallback_service(ROUTER.clone()).layer(timers).layer(Extension(vm_host))
}
