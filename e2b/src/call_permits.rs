//! Permits of an owner's calls. The supervisor answers so many requests at a time for all owners: those of one owner
//! take half of them at most, and its further calls wait.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use clade_api::http::MAX_CONNECTIONS;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::connection_limits::ConnectionSlot;

/// Calls of one owner, and changes whose clients have gone, that have permits at a time.
pub(crate) const MAX_PERMITS: usize = 128;
const _: () = assert!(2 * MAX_PERMITS <= MAX_CONNECTIONS);

/// The permit of a call, held until the call is answered and its change has ended.
#[derive(Debug)]
pub(crate) struct CallPermit {
    _permit: Option<OwnedSemaphorePermit>,
    _slot: Arc<ConnectionSlot>,
}

tokio::task_local! {
    static PERMIT: Arc<CallPermit>;
}

/// The owners' permits.
#[derive(Debug, Default)]
pub(crate) struct CallPermits(Mutex<BTreeMap<String, Arc<Semaphore>>>);

impl CallPermits {
    /// Carries out a call of `owner`, which has the `slot`, once there is a permit.
    pub(crate) async fn run<T>(&self, owner: &str, slot: &Arc<ConnectionSlot>, call: impl Future<Output = T>) -> T {
        let permits = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(owner.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(MAX_PERMITS))))
        };
        // The semaphore is never closed.
        let permit = permits.acquire_owned().await.ok();
        PERMIT.scope(Arc::new(CallPermit { _permit: permit, _slot: Arc::clone(slot) }), call).await
    }

    /// Returns the permit of the call that is being carried out. None in background tasks.
    pub(crate) fn current() -> Option<Arc<CallPermit>> {
        PERMIT.try_with(Arc::clone).ok()
    }
}
