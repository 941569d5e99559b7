//! Places for large bodies of requests, which the process keeps in memory until the requests are answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// Places of the process. Other requests wait.
pub(super) const MAX: usize = 8;
/// Places for one path: a VM that does not answer keeps no places from others.
const MAX_OF_A_PATH: usize = 2;

/// The places of this process.
pub(super) static PLACES: Places = Places::new();

/// Places for all requests, and those of each path.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) all: Semaphore,
    by_path: Mutex<BTreeMap<String, Arc<Semaphore>>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place<'a> {
    _of_path: OwnedSemaphorePermit,
    _of_all: SemaphorePermit<'a>,
}

impl Places {
    const fn new() -> Self {
        Self { all: Semaphore::const_new(MAX), by_path: Mutex::new(BTreeMap::new()) }
    }

    /// Waits for a place for a request with this path.
    pub(super) async fn take(&self, path: &str) -> Option<Place<'_>> {
        // The semaphores are never closed.
        let of_path = self.of_path(path).acquire_owned().await.ok()?;
        Some(Place { _of_path: of_path, _of_all: self.all.acquire().await.ok()? })
    }

    fn of_path(&self, path: &str) -> Arc<Semaphore> {
        let mut all = self.by_path.lock().unwrap_or_else(PoisonError::into_inner);
        // Without those that no request has.
        all.retain(|_, places| Arc::strong_count(places) > 1);
        let new = || Arc::new(Semaphore::new(MAX_OF_A_PATH));
        Arc::clone(all.entry(path.to_owned()).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn the_requests_of_one_path_leave_places_to_others() {
        let places = Places::new();
        let now = |path: &str| match pin!(places.take(path)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => place,
            Poll::Pending => None,
        };
        let (first, second) = (now("/silent"), now("/silent"));
        assert!(first.is_some() && second.is_some() && now("/silent").is_none());
        let others: Vec<_> = (0..MAX - 2).map(|number| now(&format!("/{number}"))).collect();
        assert!(others.iter().all(Option::is_some));
        assert!(now("/one-more").is_none());
        drop(first);
        assert!(now("/silent").is_some());
        drop((second, others));
        assert!(now("/silent").is_some() && places.by_path.lock().unwrap().len() == 1);
    }
}
