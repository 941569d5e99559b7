//! The time that a VM has to live: `PUT /v1/vms/{name}/ttl`.
//!
//! The VM's own process stops it, so it needs no supervisor. A new time in place of the old one
//! puts the end off.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use axum::extract::Path as UrlPath;
use axum::extract::rejection::JsonRejection;
use axum::{Extension, Json};
use thiserror::Error;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::rpc::with_vm_host;
use crate::vm_host::WeakVmHost;
use clade_api::http::{Answer, ApiError};
use clade_api::{ProblemKind, TtlInfo, TtlRequest};
use clade_vmm::vm::{StopReason, Vm};

/// The longest time, in seconds: a century.
const MAX_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;

/// A time out of range.
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

/// Interval of the attempts to stop a VM whose time is over.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Timer {
    vm: Weak<Vm>,
    at: Instant,
    task: AbortHandle,
    number: u64,
    /// Whether the time is over: no request can put the end off any more.
    is_over: bool,
}

/// The timers of a process's VMs, by name.
#[derive(Debug, Default)]
pub(super) struct Timers {
    by_name: Mutex<BTreeMap<String, Timer>>,
    /// Number of the next timer.
    number: AtomicU64,
}

impl Timers {
    /// Returns the timers of running VMs.
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Timer>> {
        let mut all = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Lifts the time of a VM. Fails if it is over.
    fn end(&self, name: &str) -> Result<(), ApiError> {
        let mut all = self.all();
        if all.get(name).is_some_and(|timer| timer.is_over) {
            return Err(over(name));
        }
        all.remove(name).into_iter().for_each(|timer| timer.task.abort());
        Ok(())
    }

    /// Has `vm` stopped after `time`, which replaces an earlier time. Fails if that is over.
    fn begin(self: &Arc<Self>, vm_host: WeakVmHost, name: &str, vm: Weak<Vm>, time: Duration) -> Result<(), ApiError> {
        let mut all = self.all();
        if all.get(name).is_some_and(|timer| timer.is_over) {
            return Err(over(name));
        }
        // Relaxed: under the lock.
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let at = Instant::now() + time;
        let (timers, of) = (Arc::clone(self), Weak::clone(&vm));
        let task = tokio::spawn(timers.stop_at(at, number, vm_host, name.to_owned(), of)).abort_handle();
        let timer = Timer { vm, at, task, number, is_over: false };
        all.insert(name.to_owned(), timer).into_iter().for_each(|timer| timer.task.abort());
        Ok(())
    }

    /// Returns whether timer `number` of a VM is over now. False if a newer timer has replaced it:
    /// its client has a confirmation.
    fn is_over(&self, name: &str, number: u64) -> bool {
        let mut all = self.all();
        let timer = all.get_mut(name).filter(|timer| timer.number == number);
        timer.is_some_and(|timer| {
            timer.is_over = true;
            true
        })
    }

    async fn stop_at(self: Arc<Self>, at: Instant, number: u64, vm_host: WeakVmHost, name: String, vm: Weak<Vm>) {
        sleep_until(at).await;
        if !self.is_over(&name, number) {
            return;
        }
        loop {
            let (of, vm) = (name.clone(), Weak::clone(&vm));
            let stopped = with_vm_host(vm_host.clone(), move |vm_host| {
                // Another VM may have the name by now.
                let is_it = vm_host.get(&of).is_ok_and(|entry| Weak::ptr_eq(&Arc::downgrade(&entry.vm), &vm));
                if !is_it {
                    return Ok(());
                }
                tracing::info!(name = of, "its time is over");
                vm_host.end(&of, StopReason::TimeOver)
            });
            match stopped.await {
                Ok(()) => return,
                Err(error) if error.kind == ProblemKind::Ending => return,
                Err(error) => tracing::warn!(error = error.text, name, "a VM whose time is over"),
            }
            sleep(RETRY_INTERVAL).await;
        }
    }
}

fn over(name: &str) -> ApiError {
    ApiError::new(ProblemKind::WrongState, format!("the time of {name:?} is over: it is being stopped"))
}

/// Shows the time that a VM has to live.
#[utoipa::path(get, path = "/v1/vms/{name}/ttl", responses((status = 200, description = "Done.", body = TtlInfo)))]
async fn show_ttl(
    Extension(vm_host): Extension<WeakVmHost>,
    Extension(timers): Extension<Arc<Timers>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<TtlInfo> {
    Ok(Json(with_vm_host(vm_host, move |vm_host| vm_host.get(&name).map(|_| timers.left(&name))).await?))
}

/// Has a VM stopped after a time.
#[utoipa::path(
    put,
    path = "/v1/vms/{name}/ttl",
    request_body = TtlRequest,
    responses((status = 200, description = "Done.", body = TtlInfo))
)]
async fn set_ttl(
    Extension(vm_host): Extension<WeakVmHost>,
    Extension(timers): Extension<Arc<Timers>>,
    UrlPath(name): UrlPath<String>,
    request: Result<Json<TtlRequest>, JsonRejection>,
) -> Answer<TtlInfo> {
    let Json(TtlRequest { seconds }) = request?;
    // NaN is in no range.
    if !(seconds > 0.0 && seconds <= MAX_SECONDS) {
        return Err(TtlError { seconds }.into());
    }
    let of = name.clone();
    let vm = with_vm_host(vm_host.clone(), move |vm_host| Ok(Arc::downgrade(&vm_host.get(&of)?.vm))).await?;
    timers.begin(vm_host, &name, vm, Duration::from_secs_f64(seconds))?;
    Ok(Json(timers.left(&name)))
}

/// Lets a VM live on.
#[utoipa::path(delete, path = "/v1/vms/{name}/ttl", responses((status = 200, description = "Done.", body = TtlInfo)))]
async fn remove_ttl(
    Extension(vm_host): Extension<WeakVmHost>,
    Extension(timers): Extension<Arc<Timers>>,
    UrlPath(name): UrlPath<String>,
) -> Answer<TtlInfo> {
    let of = name.clone();
    with_vm_host(vm_host, move |vm_host| vm_host.get(&of).map(drop)).await?;
    timers.end(&name)?;
    Ok(Json(timers.left(&name)))
}

/// The paths.
pub(super) fn routes() -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(show_ttl, set_ttl, remove_ttl))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm_host::tests::{host, vm_host_of_one};
    use clade_api::RuntimeDir;

    /// A request to renew a time either succeeds, and the old time does not stop the VM; or it
    /// fails because the time is over.
    #[test]
    fn a_time_is_renewed_or_over_and_not_both() {
        if host().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (vm_host, vm, starter) = vm_host_of_one(&RuntimeDir::create(dir.path()).unwrap(), true);
        starter.leave();
        let (weak, vm) = (vm_host.downgrade(), vm.unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let timers = Arc::<Timers>::default();
            let begin = |seconds| {
                let time = Duration::from_secs(seconds);
                timers.begin(weak.clone(), "one", Arc::downgrade(&vm), time).map_err(|error| error.kind)
            };
            begin(3600).unwrap();
            begin(7200).unwrap();
            assert!(!timers.is_over("one", 0), "another has taken its place");
            assert!(vm.stopped().is_none() && timers.left("one").seconds_left > Some(7000.0));
            assert!(timers.is_over("one", 1));
            assert_eq!(begin(7200), Err(ProblemKind::WrongState));
            assert_eq!(timers.end("one").map_err(|error| error.kind), Err(ProblemKind::WrongState));
            // The attempts go on until the VM has stopped: at the first, a handle is still in use.
            let of_vm = Arc::downgrade(&vm);
            let held = Arc::clone(&vm);
            drop(vm);
            let stops =
                tokio::spawn(Arc::clone(&timers).stop_at(Instant::now(), 1, weak.clone(), "one".to_owned(), of_vm));
            while held.stopped().is_none() {
                sleep(Duration::from_millis(5)).await;
            }
            drop(held);
            stops.await.unwrap();
            assert!(vm_host.get("one").is_err());
        });
    }
}
