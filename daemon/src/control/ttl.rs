//! The time that a VM has to live: `PUT /v1/vms/{name}/ttl`.
//!
//! The VM's own process stops it, so it needs no supervisor. A new time in place of the old one
//! puts the end off.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, State};
use axum::{Extension, Json, Router};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::control::problem::{ApiError, ProblemKind};
use crate::control::server::{Answer, with_fleet};
use crate::fleet::WeakFleet;
use clade_vmm::vm::Vm;

/// The longest time, in seconds: a century.
const MAX_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;

/// A time that no VM can have.
#[derive(Debug, Error)]
#[error("seconds={seconds}: more than 0, and at most {MAX_SECONDS}")]
struct TtlError {
    seconds: f64,
}

impl From<TtlError> for ApiError {
    fn from(error: TtlError) -> Self {
        Self::new(ProblemKind::BadRequest, error.to_string())
    }
}

/// A request to stop a VM after a time, in place of the time that it had.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TtlRequest {
    /// Seconds from now on.
    pub seconds: f64,
}

/// The time that a VM has to live.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TtlInfo {
    /// Seconds until it is stopped; null if it is not.
    pub seconds_left: Option<f64>,
}

#[derive(Debug)]
struct Timer {
    vm: Weak<Vm>,
    at: Instant,
    task: AbortHandle,
}

/// The timers of a process's VMs, by name.
#[derive(Debug, Default)]
struct Timers(Mutex<BTreeMap<String, Timer>>);

impl Timers {
    /// Those of VMs that are there.
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Timer>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, timer| {
            let is_there = timer.vm.strong_count() > 0;
            if !is_there {
                timer.task.abort();
            }
            is_there
        });
        all
    }

    fn left(&self, name: &str) -> TtlInfo {
        let left = |timer: &Timer| timer.at.saturating_duration_since(Instant::now()).as_secs_f64();
        TtlInfo { seconds_left: self.all().get(name).map(left) }
    }

    fn end(&self, name: &str) {
        if let Some(timer) = self.all().remove(name) {
            timer.task.abort();
        }
    }

    /// Has `vm` stopped after `time`.
    fn begin(&self, fleet: WeakFleet, name: &str, vm: Weak<Vm>, time: Duration) {
        let at = Instant::now() + time;
        let task = tokio::spawn(stop_at(at, fleet, name.to_owned(), Weak::clone(&vm))).abort_handle();
        let replaced = self.all().insert(name.to_owned(), Timer { vm, at, task });
        if let Some(timer) = replaced {
            timer.task.abort();
        }
    }
}

async fn stop_at(at: Instant, fleet: WeakFleet, name: String, vm: Weak<Vm>) {
    sleep_until(at).await;
    let stopped = with_fleet(fleet, move |fleet| {
        // Another VM may have the name by now.
        let is_it = fleet.get(&name).is_ok_and(|listed| Weak::ptr_eq(&Arc::downgrade(&listed.vm), &vm));
        if !is_it {
            return Ok(());
        }
        tracing::info!(name, "its time is over");
        fleet.stop(&name, |_| ())
    });
    if let Err(error) = stopped.await {
        tracing::warn!(error = error.text, "a VM whose time is over");
    }
}

/// Shows the time that a VM has to live.
#[utoipa::path(get, path = "/v1/vms/{name}/ttl", responses((status = 200, description = "Done.", body = TtlInfo)))]
async fn show_ttl(
    State(fleet): State<WeakFleet>,
    Extension(timers): Extension<Arc<Timers>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<TtlInfo> {
    Ok(Json(with_fleet(fleet, move |fleet| fleet.get(&name).map(|_| timers.left(&name))).await?))
}

/// Has a VM stopped after a time.
#[utoipa::path(
    put,
    path = "/v1/vms/{name}/ttl",
    request_body = TtlRequest,
    responses((status = 200, description = "Done.", body = TtlInfo))
)]
async fn set_ttl(
    State(fleet): State<WeakFleet>,
    Extension(timers): Extension<Arc<Timers>>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<TtlRequest>, JsonRejection>,
) -> Answer<TtlInfo> {
    let Json(TtlRequest { seconds }) = request?;
    // Not a number is in no range.
    if !(seconds > 0.0 && seconds <= MAX_SECONDS) {
        return Err(TtlError { seconds }.into());
    }
    let of = name.clone();
    let vm = with_fleet(fleet.clone(), move |fleet| Ok(Arc::downgrade(&fleet.get(&of)?.vm))).await?;
    timers.begin(fleet, &name, vm, Duration::from_secs_f64(seconds));
    Ok(Json(timers.left(&name)))
}

/// Lets a VM live on.
#[utoipa::path(delete, path = "/v1/vms/{name}/ttl", responses((status = 200, description = "Done.", body = TtlInfo)))]
async fn remove_ttl(
    State(fleet): State<WeakFleet>,
    Extension(timers): Extension<Arc<Timers>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<TtlInfo> {
    let ended = move |fleet: &crate::fleet::Fleet| {
        fleet.get(&name)?;
        timers.end(&name);
        Ok(timers.left(&name))
    };
    Ok(Json(with_fleet(fleet, ended).await?))
}

/// The paths.
pub(super) fn routes() -> OpenApiRouter<WeakFleet> {
    OpenApiRouter::new().routes(routes!(show_ttl, set_ttl, remove_ttl))
}

/// Gives the handlers the timers of one fleet.
pub(super) fn with_timers(router: Router<WeakFleet>) -> Router<WeakFleet> {
    router.layer(Extension(Arc::<Timers>::default()))
}
