//! Limits on the supervisor's resources for each VM: a stopped process answers nothing, and
//! requests to it wait.
//!
//! A request for an image takes a thread until it is answered. A forwarded request takes a
//! connection. A change of a VM's network has several steps, and no other change between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use clade_api::ProblemKind;
use clade_api::http::ApiError;

/// The limit of a VM's process for requests at a time.
const MAX_IMAGE_REQUESTS: usize = 4;
/// Requests forwarded to one VM at a time.
const MAX_FORWARDED: usize = 64;
/// Time limit of a request's wait for its turn.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// Permission to ask for an image, until it is dropped.
#[derive(Debug)]
pub(crate) struct ImagePermit(#[expect(dead_code, reason = "it is held")] OwnedSemaphorePermit);

/// A value for each VM that a request uses.
#[derive(Debug)]
struct ByVm<T>(Mutex<BTreeMap<String, Arc<T>>>);

impl<T> Default for ByVm<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> ByVm<T> {
    /// Returns the value of `vm`. Values that no request holds or waits for are dropped.
    fn of(&self, vm: &str, new: impl FnOnce() -> T) -> Arc<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, value| Arc::strong_count(value) > 1);
        Arc::clone(all.entry(vm.to_owned()).or_insert_with(|| Arc::new(new())))
    }
}

/// Requests for images, by VM.
#[derive(Debug, Default)]
pub(super) struct ImageRequestLimiter(ByVm<Semaphore>);

impl ImageRequestLimiter {
    /// Waits for permission to request an image of `vm`. The wait takes no thread.
    ///
    /// # Errors
    /// When the current holders make no progress.
    pub(super) async fn begin(&self, vm: &str) -> Result<ImagePermit, ApiError> {
        self.begin_within(vm, TURN_TIMEOUT).await
    }

    async fn begin_within(&self, vm: &str, limit: Duration) -> Result<ImagePermit, ApiError> {
        let of_vm = self.0.of(vm, || Semaphore::new(MAX_IMAGE_REQUESTS));
        let silent = || {
            let text =
                format!("{MAX_IMAGE_REQUESTS} requests wait for an image of {vm:?}, whose process does not answer");
            ApiError::new(ProblemKind::VmSilent, text)
        };
        // The semaphore is never closed.
        let permit = timeout(limit, of_vm.acquire_owned()).await.ok().and_then(Result::ok);
        permit.map(ImagePermit).ok_or_else(silent)
    }
}

/// A change of the network of one VM, until this is dropped.
#[derive(Debug)]
pub(super) struct NetworkTurn<P> {
    pub(super) process: P,
    _turn: OwnedMutexGuard<()>,
}

/// Changes of VMs' networks: one at a time for each VM.
#[derive(Debug, Default)]
pub(super) struct NetworkChanges {
    turns: ByVm<AsyncMutex<()>>,
    /// Those that wait for their turn as well: they do so without their clients.
    pending: ForwardLimiter,
}

impl NetworkChanges {
    /// Admits a change of the network of `vm`.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn admit(&self, vm: &str) -> Result<ForwardPermit, ApiError> {
        self.pending.begin(vm)
    }

    /// Waits until no other change of the network of `vm` is under way. Returns the process of the VM, which `recorded`
    /// finds. None if another VM has the name after the wait.
    ///
    /// # Errors
    /// When `recorded` finds no VM, before the wait or after it.
    pub(super) async fn begin<P: PartialEq, E, F: Future<Output = Result<P, E>>>(
        &self,
        vm: &str,
        recorded: impl Fn() -> F,
    ) -> Result<Option<NetworkTurn<P>>, E> {
        let process = recorded().await?;
        let turn = self.turns.of(vm, AsyncMutex::default).lock_owned().await;
        Ok((recorded().await? == process).then_some(NetworkTurn { process, _turn: turn }))
    }
}

/// Forwarded requests, by VM.
#[derive(Clone, Debug, Default)]
pub(super) struct ForwardLimiter(Arc<Mutex<BTreeMap<String, usize>>>);

/// A forwarded request, until this is dropped.
#[derive(Debug)]
pub(super) struct ForwardPermit {
    of: ForwardLimiter,
    vm: String,
}

impl ForwardLimiter {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to forward a request to `vm`.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn begin(&self, vm: &str) -> Result<ForwardPermit, ApiError> {
        let mut counts = self.counts();
        let count = counts.entry(vm.to_owned()).or_default();
        if *count >= MAX_FORWARDED {
            let text = format!("{MAX_FORWARDED} requests to {vm:?} are under way");
            return Err(ApiError::new(ProblemKind::TooMany, text));
        }
        *count += 1;
        Ok(ForwardPermit { of: self.clone(), vm: vm.to_owned() })
    }
}

impl Drop for ForwardPermit {
    fn drop(&mut self) {
        let mut counts = self.of.counts();
        if let Some(count) = counts.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn a_vm_that_does_not_answer_takes_four_threads_and_no_more() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let limiter = ImageRequestLimiter::default();
            let soon = Duration::from_millis(20);
            let mut held = Vec::new();
            for _ in 0..MAX_IMAGE_REQUESTS {
                held.push(limiter.begin_within("web", soon).await.unwrap());
            }
            let refused = limiter.begin_within("web", soon).await.map(drop);
            assert_eq!(refused.map_err(|error| error.kind), Err(ProblemKind::VmSilent));
            // Other VMs are not delayed, and neither is this one once a holder has its image.
            limiter.begin_within("other", soon).await.map(drop).unwrap();
            held.pop();
            limiter.begin_within("web", soon).await.map(drop).unwrap();
            drop(held);
            limiter.begin_within("last", soon).await.map(drop).unwrap();
            assert_eq!(limiter.0.0.lock().unwrap().len(), 1, "nobody waits for the others");
        });
    }

    #[test]
    fn a_change_of_a_network_is_not_made_to_the_next_vm_of_the_name() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (changes, process) = (NetworkChanges::default(), Cell::new(Ok(7)));
            let begin = || changes.begin("web", || async { process.get() });
            for (after, begun) in [(Ok(7), Ok(Some(7))), (Ok(8), Ok(None)), (Err("gone"), Err("gone"))] {
                process.set(Ok(7));
                let first = begin().await.unwrap().unwrap();
                let mut second = pin!(begin());
                let polled = second.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                assert!(polled.is_pending(), "it waits for the first change");
                process.set(after);
                drop(first);
                assert_eq!(second.await.map(|turn| turn.map(|turn| turn.process)), begun);
            }
        });
    }

    #[test]
    fn requests_to_one_vm_are_bounded_and_counted_down() {
        let limiter = ForwardLimiter::default();
        let held: Vec<_> = (0..MAX_FORWARDED).map(|_| limiter.begin("web").unwrap()).collect();
        assert_eq!(limiter.begin("web").map(drop).map_err(|error| error.kind), Err(ProblemKind::TooMany));
        drop(limiter.begin("other").unwrap());
        drop(held);
        drop(limiter.begin("web").unwrap());
        assert!(limiter.counts().is_empty());
    }
}
