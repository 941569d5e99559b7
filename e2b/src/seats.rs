//! Connections to the address. One without an admitted request in progress makes way for a new one.
//! So clients without a key or a sandbox hold no resources that others need.
//!
//! The network with the most idle connections gives one up, so a flood from a few networks cuts its
//! own connections, and not the handshakes of other clients.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::Request;
use axum::http::StatusCode;
use tokio::sync::Notify;

use crate::error::GatewayError;

/// The addresses of one client: an IPv4 address, or the 64 bits of an IPv6 prefix, which is the
/// smallest that is assigned to a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ClientNetwork(IpAddr);

impl From<IpAddr> for ClientNetwork {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
            address => address,
        })
    }
}

#[derive(Debug)]
struct SeatedConnection {
    network: ClientNetwork,
    /// Admitted requests in progress.
    busy: usize,
    /// Ordinal of its last change: the lowest has been idle for longest.
    idle_since: u64,
    cut: Arc<Notify>,
}

#[derive(Debug, Default)]
struct SeatTable {
    all: BTreeMap<u64, SeatedConnection>,
    /// The connections that are not busy, by networks that have any: since when, and their numbers.
    idle: BTreeMap<ClientNetwork, BTreeSet<(u64, u64)>>,
}

impl SeatTable {
    fn add(&mut self, number: u64, connection: SeatedConnection) {
        self.idle.entry(connection.network).or_default().insert((connection.idle_since, number));
        self.all.insert(number, connection);
    }

    /// Changes the number of requests in progress. Without any, the connection is idle from `now` on.
    /// Returns whether the connection has its seat.
    fn change(&mut self, number: u64, now: u64, change: impl FnOnce(&mut usize)) -> bool {
        let Some(one) = self.all.get_mut(&number) else { return false };
        let (network, was) = (one.network, (one.idle_since, number));
        change(&mut one.busy);
        let is_busy = one.busy > 0;
        one.idle_since = now;
        self.remove_idle(network, was);
        if !is_busy {
            self.idle.entry(network).or_default().insert((now, number));
        }
        true
    }

    fn remove_idle(&mut self, network: ClientNetwork, which: (u64, u64)) {
        if let Some(of_network) = self.idle.get_mut(&network) {
            of_network.remove(&which);
            if of_network.is_empty() {
                self.idle.remove(&network);
            }
        }
    }

    fn remove(&mut self, number: u64) -> Option<SeatedConnection> {
        let one = self.all.remove(&number)?;
        self.remove_idle(one.network, (one.idle_since, number));
        Some(one)
    }

    /// Returns the connection that makes way: of the network with the most idle ones, that which has
    /// been idle for longest.
    fn makes_way(&self) -> Option<u64> {
        let longest = self.idle.values().filter_map(|one| Some((one.len(), Reverse(*one.first()?)))).max();
        longest.map(|(_, Reverse((_, number)))| number)
    }
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Seats {
    most: usize,
    table: Mutex<SeatTable>,
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
        Arc::new(Self { most, table: Mutex::default(), count: AtomicU64::new(0), freed: Notify::new() })
    }

    fn table(&self) -> MutexGuard<'_, SeatTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> u64 {
        // Relaxed: a counter that publishes no other data.
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a seat for a new connection from this address: a free one, or that of an idle
    /// connection, which is cut.
    fn try_take(self: &Arc<Self>, peer: IpAddr) -> Option<Seat> {
        let mut table = self.table();
        if table.all.len() >= self.most {
            let number = table.makes_way()?;
            table.remove(number).into_iter().for_each(|one| one.cut.notify_one());
        }
        let (number, cut) = (self.next(), Arc::new(Notify::new()));
        let network = peer.into();
        table.add(number, SeatedConnection { network, busy: 0, idle_since: number, cut: Arc::clone(&cut) });
        Some(Seat { of: Arc::clone(self), number, cut })
    }

    /// Waits for a seat.
    pub(crate) async fn take(self: &Arc<Self>, peer: IpAddr) -> Seat {
        loop {
            let freed = self.freed.notified();
            let mut freed = std::pin::pin!(freed);
            freed.as_mut().enable();
            if let Some(seat) = self.try_take(peer) {
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

    /// Notes that a request is admitted. The connection is not cut until it is done. None if the
    /// connection is cut already.
    fn admit(self: &Arc<Self>) -> Option<AdmittedRequest> {
        let now = self.of.next();
        let is_seated = self.of.table().change(self.number, now, |busy| *busy += 1);
        is_seated.then(|| AdmittedRequest(Arc::clone(self)))
    }
}

/// Admits a request on its connection. None if the request has come by none.
///
/// # Errors
/// When the connection is cut: the answer would be lost, so the request may change nothing.
pub(crate) fn admit(request: &Request) -> Result<Option<AdmittedRequest>, GatewayError> {
    let Some(seat) = request.extensions().get::<Arc<Seat>>() else { return Ok(None) };
    let cut = || GatewayError::new(StatusCode::SERVICE_UNAVAILABLE, "the connection has made way for another");
    seat.admit().map(Some).ok_or_else(cut)
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.of.table().remove(self.number);
        self.of.freed.notify_one();
    }
}

impl Drop for AdmittedRequest {
    fn drop(&mut self) {
        let (seats, now) = (&self.0.of, self.0.of.next());
        seats.table().change(self.0.number, now, |busy| *busy -= 1);
        seats.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn is_cut(seat: &Seat) -> bool {
        !seat.of.table().all.contains_key(&seat.number)
    }

    #[test]
    fn who_has_been_idle_for_longest_makes_way_and_who_is_busy_does_not() {
        let seats = Seats::new(3);
        let all: Vec<Arc<Seat>> = (0..3).map(|_| Arc::new(seats.try_take(HOME).unwrap())).collect();
        let busy = [all[0].admit().unwrap(), all[0].admit().unwrap()];
        let once = all[1].admit().unwrap();
        let fourth = Arc::new(seats.try_take(HOME).unwrap());
        assert!(is_cut(&all[2]) && !is_cut(&all[1]));
        assert!(all[2].admit().is_none(), "a cut connection admits nothing");
        let fourth_busy = fourth.admit().unwrap();
        assert!(seats.try_take(HOME).is_none(), "all are busy");
        drop(once);
        let [first, second] = busy;
        drop(first);
        drop(seats.try_take(HOME).unwrap());
        assert!(is_cut(&all[1]) && !is_cut(&all[0]));
        drop((second, fourth_busy));
        let fifth = seats.try_take(HOME).unwrap();
        drop(seats.try_take(HOME).unwrap());
        assert!(is_cut(&all[0]) && !is_cut(&fourth) && !is_cut(&fifth), "it was idle before the fourth");
        drop((all, fourth, fifth));
        let table = seats.table();
        assert!(table.all.is_empty() && table.idle.is_empty());
    }

    #[test]
    fn a_flood_from_one_network_cuts_its_own_connections() {
        let seats = Seats::new(8);
        let of = |address: &str| address.parse::<IpAddr>().unwrap();
        let network = |address| ClientNetwork::from(of(address));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("2001:db8:0:1::1"), network("2001:db8:0:2::1"));
        // Both are older than each connection of the flood.
        let others = ["192.0.2.1", "2001:db8::1"].map(|one| seats.try_take(of(one)).unwrap());
        let from_one = |_| "198.51.100.7".to_owned();
        let from_prefix = |n| format!("2001:db8:0:7::{n:x}");
        for flood in [from_one as fn(usize) -> String, from_prefix] {
            let flood: Vec<Seat> = (0..40).map(|n| seats.try_take(of(&flood(n))).unwrap()).collect();
            assert!(others.iter().all(|seat| !is_cut(seat)));
            assert!(flood[34..].iter().all(|seat| !is_cut(seat)) && flood[..34].iter().all(is_cut));
        }
        // A new client gets a seat of the larger network, and keeps it.
        let flood: Vec<Seat> = (0..6).map(|_| seats.try_take(HOME).unwrap()).collect();
        let new = seats.try_take(of("192.0.2.2")).unwrap();
        assert!(is_cut(&flood[0]));
        drop(seats.try_take(HOME).unwrap());
        assert!(is_cut(&flood[1]) && !is_cut(&new) && others.iter().all(|seat| !is_cut(seat)));
    }
}
