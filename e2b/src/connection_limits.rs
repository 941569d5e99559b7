//! Limits of connections to guests, for a sandbox and for all of an owner's, and of an owner's
//! calls in progress. Each costs this process two descriptors for as long as its client likes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;

use crate::error::{Answer, GatewayError};

/// Most connections to one sandbox: fewer than its agent takes.
pub(crate) const PER_SANDBOX: usize = 256;
/// Most connections to the agent of one sandbox whose clients have not shown its token, and which the
/// agent itself judges. They leave room for those of the owner.
pub(crate) const PER_STRANGER: usize = 16;
/// Most connections of that kind to all sandboxes of an owner.
pub(crate) const STRANGERS_PER_KEY: usize = 256;
/// Most calls of one owner in progress.
pub(crate) const MAX_CALLS: usize = 256;
/// Most connections to all sandboxes of an owner: half of the address's limit.
pub(crate) const PER_KEY: usize = 1024;

/// The end of a connection in a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestEnd {
    /// The agent. The client has shown its token.
    Agent,
    /// A program's port, which may have any clients. A quarter of the slots stays for those of the agent.
    Port,
}

impl GuestEnd {
    /// Its share of `most` slots.
    const fn share(self, most: usize) -> usize {
        match self {
            Self::Agent => most,
            Self::Port => most / 4 * 3,
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    by_sandbox: BTreeMap<String, usize>,
    by_key: BTreeMap<String, usize>,
    /// Connections without a token, by sandbox and by owner. These do not count for those with a token.
    strangers: BTreeMap<String, usize>,
    strangers_by_key: BTreeMap<String, usize>,
}

/// The connections and calls in progress.
#[derive(Debug, Default)]
pub(crate) struct ConnectionLimits(Mutex<Counts>);

/// A connection's or a call's slot, until it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionSlot {
    connection_limits: Arc<ConnectionLimits>,
    sandbox: String,
    key: String,
    /// Whether its client has not shown the token.
    is_stranger: bool,
}

fn count(counts: &BTreeMap<String, usize>, name: &str) -> usize {
    counts.get(name).copied().unwrap_or(0)
}

fn leave(counts: &mut BTreeMap<String, usize>, name: &str) {
    match counts.get_mut(name) {
        Some(count) if *count > 1 => *count -= 1,
        _ => drop(counts.remove(name)),
    }
}

impl ConnectionLimits {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn taken(&self, sandbox: &str) -> usize {
        count(&self.counts().by_sandbox, sandbox)
    }

    #[cfg(test)]
    pub(crate) fn calls_of(&self, owner: &str) -> usize {
        count(&self.counts().by_key, owner)
    }

    /// Takes a slot for a call of an owner's. Calls have an instance of their own.
    ///
    /// # Errors
    /// 429 when no slot is left.
    pub(crate) fn take_call(self: &Arc<Self>, owner: &str) -> Answer<ConnectionSlot> {
        let mut counts = self.counts();
        if count(&counts.by_key, owner) >= MAX_CALLS {
            let why = format!("{MAX_CALLS} calls with keys of this owner are under way");
            return Err(GatewayError::new(StatusCode::TOO_MANY_REQUESTS, why));
        }
        *counts.by_key.entry(owner.to_owned()).or_default() += 1;
        Ok(self.slot("", owner, false))
    }

    fn slot(self: &Arc<Self>, sandbox: &str, key: &str, is_stranger: bool) -> ConnectionSlot {
        ConnectionSlot {
            connection_limits: Arc::clone(self),
            sandbox: sandbox.to_owned(),
            key: key.to_owned(),
            is_stranger,
        }
    }

    /// Takes a slot for a connection to the agent of `sandbox`, which was made with `key`, whose client has not shown
    /// its token.
    ///
    /// # Errors
    /// 429 when no slot is left.
    pub(crate) fn take_stranger(self: &Arc<Self>, sandbox: &str, key: &str) -> Answer<ConnectionSlot> {
        let mut counts = self.counts();
        if count(&counts.strangers, sandbox) >= PER_STRANGER {
            return full(&format!("the sandbox {sandbox:?} without its token"), PER_STRANGER);
        }
        // Else the sandboxes of one owner could take all connections of the address.
        if count(&counts.strangers_by_key, key) >= STRANGERS_PER_KEY {
            return full("its owner's sandboxes without their tokens", STRANGERS_PER_KEY);
        }
        *counts.strangers.entry(sandbox.to_owned()).or_default() += 1;
        *counts.strangers_by_key.entry(key.to_owned()).or_default() += 1;
        Ok(self.slot(sandbox, key, true))
    }

    /// Takes a slot for a connection to `sandbox`, which was made with `key`.
    ///
    /// # Errors
    /// 429 when no slot is left.
    pub(crate) fn take(self: &Arc<Self>, sandbox: &str, key: &str, end: GuestEnd) -> Answer<ConnectionSlot> {
        let mut counts = self.counts();
        let (of_sandbox, of_key) = (end.share(PER_SANDBOX), end.share(PER_KEY));
        if count(&counts.by_sandbox, sandbox) >= of_sandbox {
            return full(&format!("the sandbox {sandbox:?}"), of_sandbox);
        }
        if count(&counts.by_key, key) >= of_key {
            // Without the key's name: any client may see this.
            return full("its owner's sandboxes", of_key);
        }
        *counts.by_sandbox.entry(sandbox.to_owned()).or_default() += 1;
        *counts.by_key.entry(key.to_owned()).or_default() += 1;
        Ok(self.slot(sandbox, key, false))
    }
}

fn full<T>(whose: &str, most: usize) -> Answer<T> {
    let why = format!("{most} connections to {whose} are open");
    Err(GatewayError::new(StatusCode::TOO_MANY_REQUESTS, why))
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut counts = self.connection_limits.counts();
        let Counts { by_sandbox, by_key, strangers, strangers_by_key } = &mut *counts;
        let (of_sandbox, of_key) = if self.is_stranger { (strangers, strangers_by_key) } else { (by_sandbox, by_key) };
        leave(of_sandbox, &self.sandbox);
        leave(of_key, &self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_ports_leave_a_quarter_to_those_of_the_agent() {
        let connection_limits = Arc::new(ConnectionLimits::default());
        let take = |sandbox: &str, end| connection_limits.take(sandbox, "one", end);
        let of_port: Vec<_> = (0..192).map(|_| take("a", GuestEnd::Port).unwrap()).collect();
        assert!(take("a", GuestEnd::Port).unwrap_err().message.contains("192"));
        let own: Vec<_> = (0..64).map(|_| take("a", GuestEnd::Agent).unwrap()).collect();
        assert!(take("a", GuestEnd::Agent).unwrap_err().message.contains("256"));
        let others: Vec<_> = (256..768).map(|n| take(&format!("b{}", n % 8), GuestEnd::Port).unwrap()).collect();
        assert!(take("b", GuestEnd::Port).unwrap_err().message.contains("768"));
        let rest: Vec<_> = (768..PER_KEY).map(|n| take(&format!("c{}", n % 8), GuestEnd::Agent).unwrap()).collect();
        assert!(take("d", GuestEnd::Agent).unwrap_err().message.contains("1024"));
        drop((of_port, own, others, rest));
        assert!(connection_limits.counts().by_key.is_empty());
    }

    #[test]
    fn a_sandbox_and_a_key_have_their_bounds_and_nothing_is_left_of_them() {
        let connection_limits = Arc::new(ConnectionLimits::default());
        let take = |sandbox: &str, key: &str| connection_limits.take(sandbox, key, GuestEnd::Agent);
        let mut first: Vec<ConnectionSlot> = (0..PER_SANDBOX).map(|_| take("a", "one").unwrap()).collect();
        let full = take("a", "one").unwrap_err();
        assert_eq!(full.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(full.message.contains("\"a\"") && full.message.contains("256"), "{full:?}");
        let rest: Vec<ConnectionSlot> =
            (PER_SANDBOX..PER_KEY).map(|n| take(&format!("b{}", n % 8), "one").unwrap()).collect();
        let full = take("c", "one").unwrap_err();
        assert!(full.message.contains("1024") && !full.message.contains("one"), "{full:?}");
        // A refusal takes no slot, and another key has its own.
        let other = take("d", "two").unwrap();
        first.pop();
        let again = take("a", "one").unwrap();
        take("a", "one").unwrap_err();
        // Clients without a token take no slot of the owner's.
        let strangers: Vec<_> =
            (0..PER_STRANGER).map(|_| connection_limits.take_stranger("b", "one").unwrap()).collect();
        let full = connection_limits.take_stranger("b", "one").unwrap_err();
        assert!(full.message.contains("16") && full.message.contains("\"b\""), "{full:?}");
        let more: Vec<_> = (PER_STRANGER..STRANGERS_PER_KEY)
            .map(|n| connection_limits.take_stranger(&format!("s{}", n / PER_STRANGER), "one").unwrap())
            .collect();
        let full = connection_limits.take_stranger("z", "one").unwrap_err();
        assert!(full.message.contains("256") && !full.message.contains("one"), "{full:?}");
        connection_limits.take_stranger("a", "two").unwrap();
        assert_eq!(connection_limits.taken("b"), 0);
        drop((first, rest, other, again, strangers, more));
        let counts = connection_limits.counts();
        assert!(counts.by_sandbox.is_empty() && counts.by_key.is_empty(), "{counts:?}");
        assert!(counts.strangers.is_empty() && counts.strangers_by_key.is_empty(), "{counts:?}");
    }
}
