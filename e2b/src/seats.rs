//! Connections to the address. One without an admitted request in progress makes way for a new one.
//! So clients without a key or a sandbox hold no resources that others need.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;

#[derive(Debug)]
struct SeatedConnection {
    /// Admitted requests in progress.
    busy: usize,
    /// Ordinal of its last change: the lowest has been idle for longest.
    idle_since: u64,
    cut: Arc<Notify>,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Seats {
    most: usize,
    all: Mutex<BTreeMap<u64, SeatedConnection>>,
    count: AtomicU64,
    freed: Notify,
}

/// A connection's seat, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    of: Arc<Seats>,
    number: u64,
    cut: Arc<Notify>,
}

/// An admitted request in progress, until it is dropped.
#[derive(Debug)]
pub(crate) struct AdmittedRequest(Arc<Seat>);

impl Seats {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, all: Mutex::default(), count: AtomicU64::new(0), freed: Notify::new() })
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, SeatedConnection>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> u64 {
        // Relaxed: a counter that publishes no other data.
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a seat for a new connection: a free one, or that of the connection that has been idle
    /// for longest, which is cut.
    fn try_take(self: &Arc<Self>) -> Option<Seat> {
        let mut all = self.all();
        if all.len() >= self.most {
            let idle = all.iter().filter(|(_, one)| one.busy == 0).min_by_key(|(_, one)| one.idle_since);
            let number = *idle?.0;
            all.remove(&number).into_iter().for_each(|one| one.cut.notify_one());
        }
        let (number, cut) = (self.next(), Arc::new(Notify::new()));
        all.insert(number, SeatedConnection { busy: 0, idle_since: number, cut: Arc::clone(&cut) });
        Some(Seat { of: Arc::clone(self), number, cut })
    }

    /// Waits for a seat.
    pub(crate) async fn take(self: &Arc<Self>) -> Seat {
        loop {
            let freed = self.freed.notified();
            let mut freed = std::pin::pin!(freed);
            freed.as_mut().enable();
            if let Some(seat) = self.try_take() {
                return seat;
            }
            freed.await;
        }
    }
}

impl Seat {
    /// Waits until the connection has to make way for another.
    pub(crate) async fn until_cut(&self) {
        self.cut.notified().await;
    }

    /// Notes that a request is admitted. The connection is not cut until it is done.
    pub(crate) fn admit(self: &Arc<Self>) -> AdmittedRequest {
        if let Some(own) = self.of.all().get_mut(&self.number) {
            own.busy += 1;
        }
        AdmittedRequest(Arc::clone(self))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.of.all().remove(&self.number);
        self.of.freed.notify_one();
    }
}

impl Drop for AdmittedRequest {
    fn drop(&mut self) {
        let (seats, now) = (&self.0.of, self.0.of.next());
        if let Some(own) = seats.all().get_mut(&self.0.number) {
            own.busy -= 1;
            own.idle_since = now;
        }
        seats.freed.notify_one();
    }
}

/// A body that holds something until it has been sent, or is dropped.
struct Holding<T> {
    body: Body,
    _held: T,
}

impl<T: Unpin> HttpBody for Holding<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body that holds `held` until it has been sent, or is dropped.
pub(crate) fn holding<T: Send + Unpin + 'static>(body: Body, held: T) -> Body {
    Body::new(Holding { body, _held: held }.boxed_unsync())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_been_idle_for_longest_makes_way_and_who_is_busy_does_not() {
        let seats = Seats::new(3);
        let is_cut = |seat: &Seat| !seats.all().contains_key(&seat.number);
        let all: Vec<Arc<Seat>> = (0..3).map(|_| Arc::new(seats.try_take().unwrap())).collect();
        let busy = [all[0].admit(), all[0].admit()];
        let once = all[1].admit();
        let fourth = Arc::new(seats.try_take().unwrap());
        assert!(is_cut(&all[2]) && !is_cut(&all[1]));
        let fourth_busy = fourth.admit();
        assert!(seats.try_take().is_none(), "all are busy");
        drop(once);
        let [first, second] = busy;
        drop(first);
        drop(seats.try_take().unwrap());
        assert!(is_cut(&all[1]) && !is_cut(&all[0]));
        drop((second, fourth_busy));
        let fifth = seats.try_take().unwrap();
        drop(seats.try_take().unwrap());
        assert!(is_cut(&all[0]) && !is_cut(&fourth) && !is_cut(&fifth), "it was idle before the fourth");
        drop((all, fourth, fifth));
        assert!(seats.all().is_empty());
    }
}
