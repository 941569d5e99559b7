//! Permits of requests for ready VMs. A new guest has much to do at once: without a limit the guests of
//! requests that come together would all be late, and attempts to reach their agents would time out.
//!
//! | rule | reason |
//! |---|---|
//! | A request waits for a permit before it makes its VM. | The guest's first work is delayed too. |
//! | Making the VM takes [`BUSY_PERMIT_TIMEOUT`] of the permit at most. | A request that waits for a VM or a disk delays no others for long. |
//! | From then on a permit lasts [`PERMIT_TIMEOUT`] at most, and [`BUSY_PERMIT_TIMEOUT`] while no processor is free. | A guest that never answers delays others that long, and not for its own time limit. Permits that end before their guests are done would put all guests to work together. |
//! | The first of the queue goes on without a permit if the host has a free processor. | A guest that waits for something takes no processor. |
//! | At most [`MAX_QUEUED`] requests wait. | A request that waits holds a place among all requests in progress. |
//! | At the supervisor's end all these requests are refused, and VMs that are not ready are stopped. | The supervisor waits for the requests in progress. |

use std::sync::Arc;
use std::time::Duration;

use clade_api::ProblemKind;
use clade_api::http::ApiError;
use clade_worker::host_limits::has_free_processor;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Maximum time of a permit from when its VM is made: several times that of an interpreted guest that is
/// alone.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(3);
/// The same on a host without a free processor.
const BUSY_PERMIT_TIMEOUT: Duration = Duration::from_secs(12);
/// Interval of the checks for a free processor. A guest that went on without a permit is at work at the
/// next check.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of requests in the queue: three quarters of the requests in progress.
const MAX_QUEUED: usize = 192;

/// A request's permit, until it is dropped, or its time has passed. Nothing is held if the request goes
/// on without one.
#[derive(Debug)]
pub(super) struct ReadyPermit {
    /// The task that holds the permit.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is held"))]
    timed: JoinSet<()>,
    /// Sent to when the VM is made.
    made: Option<oneshot::Sender<()>>,
}

/// The permits of all requests.
#[derive(Debug)]
pub(super) struct ReadyLimiter {
    permits: Arc<Semaphore>,
    places: Semaphore,
    is_closed: watch::Sender<bool>,
    /// Held for the first of the queue. The lock is fair.
    front: Mutex<()>,
    is_free: fn() -> bool,
}

impl ReadyPermit {
    fn new(permit: Option<OwnedSemaphorePermit>, is_free: fn() -> bool) -> Self {
        let (made, is_made) = oneshot::channel();
        let mut timed = JoinSet::new();
        if let Some(permit) = permit {
            timed.spawn(async move {
                if let Ok(Ok(())) = timeout(BUSY_PERMIT_TIMEOUT, is_made).await {
                    let begun = Instant::now();
                    sleep(PERMIT_TIMEOUT).await;
                    while !is_free() && begun.elapsed() < BUSY_PERMIT_TIMEOUT {
                        sleep(POLL_INTERVAL).await;
                    }
                }
                drop(permit);
            });
        }
        Self { timed, made: Some(made) }
    }

    /// Begins the guest's time: its VM is made.
    pub(super) fn begin(mut self) -> Self {
        // A task that has ended holds no permit.
        let _ = self.made.take().map(|made| made.send(()));
        self
    }

    #[cfg(test)]
    fn has_permit(&self) -> bool {
        !self.timed.is_empty()
    }
}

impl ReadyLimiter {
    pub(super) fn new(at_a_time: usize) -> Self {
        Self::with(at_a_time, has_free_processor)
    }

    fn with(at_a_time: usize, is_free: fn() -> bool) -> Self {
        let permits = Arc::new(Semaphore::new(at_a_time));
        let (places, is_closed) = (Semaphore::new(MAX_QUEUED), watch::Sender::new(false));
        Self { permits, places, is_closed, front: Mutex::default(), is_free }
    }

    /// Waits for the permit of a request that will make a VM.
    ///
    /// # Errors
    /// When too many wait, or the supervisor ends.
    pub(super) async fn queue(&self) -> Result<ReadyPermit, ApiError> {
        let too_many = |_| ApiError::new(ProblemKind::TooMany, "too many requests wait for their VMs to be made ready");
        let _place = self.places.try_acquire().map_err(too_many)?;
        let permit = self.next().await;
        if *self.is_closed.borrow() { Err(ProblemKind::Ending.into()) } else { Ok(permit) }
    }

    /// Waits for the permit of a VM that its request has made already.
    pub(super) async fn next(&self) -> ReadyPermit {
        let _front = self.front.lock().await;
        let permit = tokio::select! {
            biased;
            () = self.closed() => None,
            permit = Arc::clone(&self.permits).acquire_owned() => permit.ok(),
            () = self.until_free() => None,
        };
        ReadyPermit::new(permit, self.is_free)
    }

    /// Ends all waits.
    pub(super) fn close(&self) {
        self.is_closed.send_replace(true);
    }

    /// Waits for the end of the supervisor.
    pub(super) async fn closed(&self) {
        // The sender is this.
        let _ = self.is_closed.subscribe().wait_for(|is_closed| *is_closed).await;
    }

    async fn until_free(&self) {
        loop {
            sleep(POLL_INTERVAL).await;
            if (self.is_free)() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use super::*;

    /// Polls once. None if the work waits.
    async fn now<T>(work: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(Duration::ZERO, work).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn permits_are_taken_in_order_and_given_back() {
        let limiter = Arc::new(ReadyLimiter::with(2, || false));
        let first = now(limiter.queue()).await.unwrap().unwrap();
        let _second = now(limiter.queue()).await.unwrap().unwrap();
        let done = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut waiting = JoinSet::new();
        for number in 0..3 {
            let (limiter, done) = (Arc::clone(&limiter), Arc::clone(&done));
            waiting.spawn(async move {
                let permit = if number == 1 { limiter.next().await } else { limiter.queue().await.unwrap() };
                done.lock().unwrap().push(number);
                permit
            });
            tokio::task::yield_now().await;
        }
        assert!(done.lock().unwrap().is_empty());
        drop(first);
        let third = waiting.join_next().await.unwrap().unwrap();
        assert_eq!(*done.lock().unwrap(), [0]);
        drop(third.begin());
        let _fourth = waiting.join_next().await.unwrap().unwrap();
        assert_eq!(*done.lock().unwrap(), [0, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_permit_has_an_end_before_and_after_its_vm_is_made() {
        for (is_free, running) in [((|| false) as fn() -> bool, BUSY_PERMIT_TIMEOUT), (|| true, PERMIT_TIMEOUT)] {
            // Of the queue alone: its first goes on by permits.
            let limiter = ReadyLimiter::with(1, || false);
            let unmade = limiter.queue().await.unwrap();
            // A wait that was given up leaves the queue.
            assert!(now(limiter.queue()).await.is_none());
            let begun = Instant::now();
            drop(limiter.queue().await.unwrap());
            assert_eq!(begun.elapsed(), BUSY_PERMIT_TIMEOUT);
            drop(unmade.begin());
            // The same permit, with another host.
            let permit = Arc::clone(&limiter.permits).acquire_owned().await.unwrap();
            let (_made, begun) = (ReadyPermit::new(Some(permit), is_free).begin(), Instant::now());
            drop(limiter.queue().await.unwrap());
            assert_eq!(begun.elapsed(), running);
            drop(limiter.queue().await.unwrap());
            assert_eq!(begun.elapsed(), running);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn free_processors_are_used_by_one_request_at_a_time() {
        let limiter = Arc::new(ReadyLimiter::with(0, || true));
        let begun = Instant::now();
        let mut waiting = JoinSet::new();
        for _ in 0..3 {
            let limiter = Arc::clone(&limiter);
            waiting.spawn(async move { (!limiter.queue().await.unwrap().has_permit(), begun.elapsed()) });
        }
        let mut done = waiting.join_all().await;
        done.sort_unstable();
        assert_eq!(done, [1, 2, 3].map(|count| (true, count * POLL_INTERVAL)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_has_a_length_and_an_end() {
        let limiter = Arc::new(ReadyLimiter::with(0, || false));
        let mut waiting = JoinSet::new();
        for _ in 0..MAX_QUEUED {
            let limiter = Arc::clone(&limiter);
            waiting.spawn(async move { limiter.queue().await.map(drop).map_err(|error| error.kind) });
        }
        while limiter.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(limiter.queue().await.map(drop).map_err(|error| error.kind), Err(ProblemKind::TooMany));
        // VMs that are there already wait in any case.
        assert!(now(limiter.next()).await.is_none());
        limiter.close();
        assert!(waiting.join_all().await.iter().all(|ended| *ended == Err(ProblemKind::Ending)));
        assert!(!limiter.next().await.has_permit());
        assert_eq!(limiter.queue().await.map(drop).map_err(|error| error.kind), Err(ProblemKind::Ending));
    }
}
