//! Wrong tokens: an address has few attempts at a time, and each takes its time.
//!
//! While all of an address's places are taken, the login checks no token of it, not even the right
//! one: so guesses learn nothing. A place is kept for its time even if the client does not wait for
//! the answer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;

use super::ApiError;
use crate::ProblemKind;

/// Wrong tokens of an address at a time.
pub(super) const MAX_WRONG: usize = 4;
/// Delay of the answer to a wrong token.
pub(super) const WRONG_DELAY: Duration = Duration::from_secs(1);
/// Addresses that have places of their own. Further ones share the same.
const MAX_ADDRESSES: usize = 1024;

/// The address that a connection over TCP comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// Addresses that one client can have. None: all addresses without places of their own.
type PeerAddress = Option<IpAddr>;

/// Returns the source of an address. All loopback addresses are one, and so are those of an IPv6
/// network.
fn source(Peer(address): Peer) -> PeerAddress {
    let address = address.to_canonical();
    if address.is_loopback() {
        return Some(IpAddr::from([127, 0, 0, 1]));
    }
    Some(match address {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => IpAddr::from((address.to_bits() & !u128::from(u64::MAX)).to_be_bytes()),
    })
}

/// The places of all addresses.
#[derive(Debug, Default)]
pub(super) struct Guesses(Mutex<BTreeMap<PeerAddress, Arc<Semaphore>>>);

/// A place for the check of a token.
#[derive(Debug)]
pub(super) struct Guess(OwnedSemaphorePermit);

impl Guesses {
    fn places(&self, peer: Option<Peer>) -> Arc<Semaphore> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut of = peer.and_then(source);
        if !all.contains_key(&of) {
            // Places in use hold theirs.
            all.retain(|_, places| Arc::strong_count(places) > 1);
            of = of.filter(|_| all.len() < MAX_ADDRESSES);
        }
        Arc::clone(all.entry(of).or_insert_with(|| Arc::new(Semaphore::new(MAX_WRONG))))
    }

    /// Takes a place for a token from `peer`.
    ///
    /// # Errors
    /// When too many recent tokens were wrong.
    pub(super) fn take(&self, peer: Option<Peer>) -> Result<Guess, ApiError> {
        let taken = self.places(peer).try_acquire_owned();
        taken.map(Guess).map_err(|_| ProblemKind::TooManyLogins.into())
    }

    /// Returns the number of places that an address has left.
    #[cfg(test)]
    pub(super) fn left(&self, peer: Option<Peer>) -> usize {
        self.places(peer).available_permits()
    }
}

impl Guess {
    /// Gives the place back after its time, and returns then.
    pub(super) async fn wait_out(self) {
        tracing::warn!("a wrong token");
        // A task of its own: it runs on if the client goes.
        let held = tokio::spawn(async move {
            sleep(WRONG_DELAY).await;
            drop(self.0);
        });
        let _ = held.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str) -> Option<Peer> {
        Some(Peer(address.parse().unwrap()))
    }

    #[test]
    fn what_one_client_can_have_is_one_address() {
        for (one, other, is_same) in [
            ("127.0.0.1", "127.8.9.10", true),
            ("127.0.0.1", "::1", true),
            ("127.0.0.1", "::ffff:127.0.0.2", true),
            ("10.0.0.1", "10.0.0.2", false),
            ("10.0.0.1", "::ffff:10.0.0.1", true),
            ("2001:db8::1", "2001:db8::ffff:0:0:1", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("127.0.0.1", "10.0.0.1", false),
        ] {
            let source = |address| source(peer(address).unwrap());
            assert_eq!(source(one) == source(other), is_same, "{one} {other}");
        }
    }

    #[test]
    fn addresses_are_forgotten_and_bounded() {
        let guesses = Guesses::default();
        let held: Vec<Guess> = (0..MAX_WRONG).map(|_| guesses.take(peer("10.0.0.1")).unwrap()).collect();
        guesses.take(peer("10.0.0.1")).unwrap_err();
        drop(guesses.take(peer("10.0.0.2")).unwrap());
        assert_eq!(guesses.left(peer("10.0.0.3")), MAX_WRONG);
        assert_eq!(guesses.0.lock().unwrap().len(), 2, "the one without a place that is taken has gone");
        assert_eq!(guesses.left(peer("10.0.0.1")), 0);
        drop(held);
        assert_eq!(guesses.left(peer("10.0.0.1")), MAX_WRONG);
        let address = |n: usize| Some(Peer(IpAddr::from((0x0a01_0000 + n as u32).to_be_bytes())));
        let _held: Vec<Guess> = (0..MAX_ADDRESSES).map(|n| guesses.take(address(n)).unwrap()).collect();
        // Further addresses share places.
        let more: Vec<_> = (0..=MAX_WRONG).map(|n| guesses.take(address(MAX_ADDRESSES + n))).collect();
        assert!(more[..MAX_WRONG].iter().all(Result::is_ok) && more[MAX_WRONG].is_err());
        assert!(guesses.take(address(0)).is_ok());
        assert_eq!(guesses.0.lock().unwrap().len(), MAX_ADDRESSES + 1);
    }
}
