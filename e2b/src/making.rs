//! Requests that make VMs, by owner. All owners share the supervisor's queue, which takes them in their
//! order: an owner has requests for a few VMs there, and the owner's others wait here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most VMs of one owner's requests at the supervisor, or one request: as many as it makes ready at a time.
const MAX_MAKING: u32 = 16;

/// The owners with such requests.
#[derive(Debug, Default)]
pub(crate) struct MakingLimits(Mutex<BTreeMap<String, Weak<Semaphore>>>);

impl MakingLimits {
    /// Waits until a request of an owner for `count` VMs may go to the supervisor. The limit counts them
    /// until the result is dropped.
    pub(crate) async fn begin(&self, owner: &str, count: usize) -> Option<OwnedSemaphorePermit> {
        let (semaphore, count) = (self.of(owner), u32::try_from(count).unwrap_or(u32::MAX).min(MAX_MAKING));
        // The semaphore is never closed.
        semaphore.acquire_many_owned(count).await.ok()
    }

    fn of(&self, owner: &str) -> Arc<Semaphore> {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = owners.get(owner).and_then(Weak::upgrade) {
            return semaphore;
        }
        owners.retain(|_, semaphore| semaphore.strong_count() > 0);
        let semaphore = Arc::new(Semaphore::new(MAX_MAKING as usize));
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
        let now =
            async |owner: &str, count| timeout(Duration::from_secs(1), limits.begin(owner, count)).await.ok().flatten();
        let mut one = Vec::new();
        for _ in 0..MAX_MAKING {
            one.push(now("one", 1).await.expect("one of the first"));
        }
        assert!(now("one", 1).await.is_none());
        let two = now("two", 100).await.expect("another owner's, however large");
        assert!(now("two", 1).await.is_none());
        one.pop();
        assert!(now("one", 2).await.is_none());
        assert!(now("one", 1).await.is_some());
        // Owners without requests are forgotten.
        drop((one, two));
        let _three = now("three", 1).await;
        assert_eq!(limits.0.lock().unwrap().keys().collect::<Vec<_>>(), ["three"]);
    }
}
