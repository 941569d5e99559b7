//! Requests that make VMs, by owner. All owners share the supervisor's queue, which takes them in their
//! order: an owner has a few there, and the owner's others wait here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most requests of one owner at the supervisor: twice its most permits for VMs to be made ready.
const MAX_MAKING: usize = 32;

/// The owners with such requests.
#[derive(Debug, Default)]
pub(crate) struct MakingLimits(Mutex<BTreeMap<String, Weak<Semaphore>>>);

impl MakingLimits {
    /// Waits until a request of an owner may go to the supervisor. The limit counts it until the result is
    /// dropped.
    pub(crate) async fn begin(&self, owner: &str) -> Option<OwnedSemaphorePermit> {
        let semaphore = self.of(owner);
        // The semaphore is never closed.
        semaphore.acquire_owned().await.ok()
    }

    fn of(&self, owner: &str) -> Arc<Semaphore> {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = owners.get(owner).and_then(Weak::upgrade) {
            return semaphore;
        }
        owners.retain(|_, semaphore| semaphore.strong_count() > 0);
        let semaphore = Arc::new(Semaphore::new(MAX_MAKING));
        owners.insert(owner.to_owned(), Arc::downgrade(&semaphore));
        semaphore
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_owners_requests_wait_for_one_another_and_for_no_other_owners() {
        let limits = MakingLimits::default();
        let now = async |owner: &str| timeout(Duration::from_secs(1), limits.begin(owner)).await.ok().flatten();
        let mut one = Vec::new();
        for _ in 0..MAX_MAKING {
            one.push(now("one").await.expect("one of the first"));
        }
        assert!(now("one").await.is_none());
        let two = now("two").await.expect("another owner's");
        one.pop();
        assert!(now("one").await.is_some());
        // Owners without requests are forgotten.
        drop((one, two));
        let _three = now("three").await;
        assert_eq!(limits.0.lock().unwrap().keys().collect::<Vec<_>>(), ["three"]);
    }
}
